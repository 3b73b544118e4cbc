"""What all commands share: flags, help, the nearest name, paths of the user, and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from textwrap import shorten
from typing import Any, NoReturn

from ssp_jax.errors import InputError, sentence
from ssp_jax.runtime import signals

_ALIKE = 0.7  # names that differ by a slip of the fingers are more alike than that


class Parser(argparse.ArgumentParser):
    """The flags of a command. Mistakes are InputErrors, like all other bad input.

    prog: what the user types. description: the docstring of the command's module. find: gives the
    text of --help=WORD; without it --help takes no word.
    """

    def __init__(self, *, find: Callable[[str], str] | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("add_help", find is None)
        super().__init__(allow_abbrev=False, **options)
        if find is not None:
            help = "show this, or the config's keys with WORD in their names or comments"
            self.add_argument(
                "-h", "--help", action=_Help, nargs="?", metavar="WORD", find=find, help=help
            )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags of {self.prog}")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parses arguments that must all be this command's; None: those of the process."""
        # Intermixed: words may come after flags. Verbs have words of their own.
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        found, rest = parse(arguments)
        for argument in rest:
            self._refuse(argument)
        return found

    def _refuse(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            raise InputError(f"unexpected argument {argument!r}; write flags as --NAME=VALUE")
        name = argument.partition("=")[0].lstrip("-")
        flags = (text for action in self._actions for text in action.option_strings)
        found = nearest(name, [flag.lstrip("-") for flag in flags])
        if found is None:
            self.error(f"unknown flag --{name}")
        raise InputError(f"unknown flag --{name}; the nearest is --{found}")


class _Help(argparse.Action):
    """--help shows the flags, and --help=WORD what `find` says of the word."""

    def __init__(self, *, find: Callable[[str], str], **options: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **{**options, "dest": argparse.SUPPRESS})
        self._find = find

    def __call__(self, parser: argparse.ArgumentParser, _: Any, word: Any, *__: Any) -> NoReturn:
        if word is None:
            parser.print_help()
        else:
            print(self._find(word))
        parser.exit()


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The likeliest intended name: alike as a whole, and in its section or in its last part.

    None where no last part is much like that of `name`.
    """

    def alike(a: str, b: str) -> float:
        return SequenceMatcher(None, a, b).ratio()

    section, _, last = name.rpartition(".")

    def likeness(candidate: str) -> float:
        their_section, _, their_last = candidate.rpartition(".")
        of_sections = alike(section, their_section) if section else 0
        return alike(name, candidate) + max(alike(last, their_last), of_sections)

    candidates = [known for known in names if alike(last, known.rpartition(".")[2]) > _ALIKE]
    return max(candidates, key=likeness, default=None)


def exit_code(run: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Returns what `run` returns, or 0; 2 for bad input, in one sentence; 130 for Ctrl-C."""
    try:
        with signals.interruptible():
            return run() or 0
    except InputError as error:
        print(f"ssp_jax: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ssp_jax: {interrupted}", file=sys.stderr)
        return signals.INTERRUPTED


def one_line(error: BaseException) -> str:
    """The text of an error on one line of at most 200 characters."""
    return shorten(str(error), 200)


def user_path(text: str, name: str) -> str:
    """A path as a user gives it. Shells leave the `~` of `--workdir=~/x` alone.

    name: of the flag or key.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        expected = f"expected a folder of a known user, or ./{text} for one of that name"
        raise InputError(f"{name}={text}: {expected}")
    return path
