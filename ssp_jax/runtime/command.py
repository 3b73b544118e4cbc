"""What all commands share: help, flags, paths of the user, and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from textwrap import shorten
from typing import NoReturn, TypeVar

from absl import flags

from ssp_jax.errors import InputError, sentence
from ssp_jax.runtime import signals

Arguments = TypeVar("Arguments")


class Parser(argparse.ArgumentParser):
    """Mistakes in flags are InputErrors, like all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags of {self.prog}")


def run_command(
    run: Callable[[Arguments], int | None],
    arguments: Arguments,
    *,
    help: str = "",
    interrupted: str = "interrupted",
) -> int:
    """Runs a command and returns its exit code.

    help: printed for -h and --help. Without it the command's own parser sees to these flags.
    """
    if help and isinstance(arguments, list) and {"-h", "--help"} & set(arguments):
        print(help.strip())
        return 0
    return exit_code(lambda: run(arguments), interrupted)


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


def parse_known_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Sets the flags defined in `values`; returns the rest of argv, its program name included."""
    values.set_gnu_getopt(True)
    try:
        return list(values(argv, known_only=True))
    except flags.Error as error:
        raise InputError(one_line(error)) from None


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
