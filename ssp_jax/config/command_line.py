"""The flags of a command that takes a config, and overrides of its keys."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default
from ssp_jax.config.files import expand_paths, load_config
from ssp_jax.config.keys import (
    FREE_SECTION,
    check_keys,
    check_set_name,
    default_values,
    flatten_config,
    no_key,
    wrong_type,
)
from ssp_jax.errors import InputError
from ssp_jax.runtime.command import Parser, nearest, one_line, user_path

# of the repository, or where `pip install .` has put configs/
ROOT = Path(default.__file__).parent.parent


MODES = ("train", "eval", "warm_start")


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another run that a new one starts from."""

    workdir: str
    step: int | None  # None: the newest

    def __str__(self) -> str:
        return self.workdir if self.step is None else f"{self.workdir}@{self.step}"


@dataclass(frozen=True)
class CommandLine:
    config: ConfigDict  # locked
    workdir: str
    mode: str  # of MODES
    file: str  # of the config
    origin: Origin | None = None


def add_flags(parser: Parser) -> None:
    """Adds the flags of a command that takes a config; overrides of its keys are what is left."""
    parser.add_argument("--config", default="", metavar="FILE", help="such as configs/tiny.py")
    workdir = "of the run; runs/NAME for configs/NAME.py"
    parser.add_argument("--workdir", default="", metavar="FOLDER", help=workdir)
    origin = "start from a checkpoint of another run, with its optimizer, pool and memory"
    parser.add_argument("--from", default="", metavar="WORKDIR[@STEP]", dest="origin", help=origin)
    mode = "eval plays the question sets alone, warm_start trains on episodes"
    parser.add_argument("--mode", default=MODES[0], choices=MODES, help=mode)


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parses `--config=FILE [--workdir=FOLDER] [--mode=MODE] [--config.KEY=VALUE ...]`.

    Raises InputError.
    """
    parser = Parser(prog="python -m ssp_jax.main", add_help=False)
    add_flags(parser)
    return command_line(*parser.parse_known_args(arguments))


def command_line(given: argparse.Namespace, overrides: list[str]) -> CommandLine:
    """The config that flags of add_flags() and overrides of keys give. Raises InputError."""
    if not given.config:
        raise InputError(
            "flag --config is missing; expected a config file, such as --config=configs/tiny.py"
        )
    if "://" in given.workdir:
        raise InputError(
            f"--workdir={given.workdir} is a URL; expected a folder (gcsfuse makes one of a bucket)"
        )
    workdir = user_path(given.workdir, "--workdir")
    path = _find_config(user_path(given.config, "--config"))
    config = load_config(path)
    _override(config, overrides)
    by_default = Path("runs") / path.stem
    origin = _parse_origin(given.origin) if given.origin else None
    if origin and given.mode != "train":
        raise InputError(f"--from={origin} starts a run; expected no --mode={given.mode} beside it")
    return CommandLine(config, workdir or str(by_default), given.mode, str(path), origin)


def _parse_origin(text: str) -> Origin:
    found = re.fullmatch(r"(.+)@(\d{1,9})", text)
    if found is None:
        return Origin(user_path(text, "--from"), None)
    return Origin(user_path(found[1], "--from"), int(found[2]))


def _find_config(name: str) -> Path:
    """A path from the current folder, or from the repository's."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    names = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]
    found = nearest(Path(name).stem, names)
    known = f"the nearest is configs/{found}.py" if found else f"configs has {', '.join(names)}"
    raise InputError(f"--config={name}: there is no such file; {known}")


def _override(config: ConfigDict, overrides: list[str]) -> None:
    """Applies `--config.KEY=VALUE` arguments in place."""
    rest = ["ssp_jax", *overrides]  # absl expects a program first
    overridden = _apply_eval_sets(config, rest)
    known = default_values() | flatten_config(config)
    for argument in rest[1:]:
        flag = re.match(r"--?([^=]+)", argument)
        if flag is None:
            continue  # the value of `--config.KEY VALUE`, or a stray word: found below
        name = flag[1]
        if name.startswith("noconfig."):
            name = name.removeprefix("no")
        key = name.removeprefix("config.")
        if not name.startswith("config."):
            raise InputError(_no_flag(name, known))
        if key not in known:
            raise InputError(f"--{name}: {no_key(key, known)}")
        overridden.add(key)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        stray = values(rest)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        found = re.search(r"flag --config\.([\w.]+)=(.*?): ", str(error), flags=re.DOTALL)
        if found is None:
            raise InputError(one_line(error)) from None
        key, value = found.groups()
        raise InputError(wrong_type(key, repr(value), known)) from None
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; write overrides as --config.KEY=VALUE")
    check_keys(config, "--config." + ", --config.".join(sorted(overridden)))
    expand_paths(config)


def _apply_eval_sets(config: ConfigDict, rest: list[str]) -> set[str]:
    """Moves `--config.data.eval_sets.NAME=FILE` from `rest` into the config; returns the keys.

    An empty FILE removes the set. config_flags reads a key as Python, where 2wikimultihopqa is no
    name.
    """
    found: dict[str, str] = {}
    pattern = rf"--?config\.({re.escape(FREE_SECTION)}\.[^=]*)(?:=(.*))?"
    at = 1
    while at < len(rest):
        flag = re.fullmatch(pattern, rest[at], re.DOTALL)
        if flag is None:
            at += 1
            continue
        key, value = flag.groups()
        del rest[at]
        if value is None:  # the next word
            if at == len(rest):
                raise InputError(f"Missing value for flag --config.{key}")
            value = rest.pop(at)
        found[key] = value
        check_set_name(f"--config.{key}", key)
    with config.unlocked():
        config.update_from_flattened_dict({key: value for key, value in found.items() if value})
        for key in (key for key, value in found.items() if not value):
            _remove_eval_set(config, key.removeprefix(f"{FREE_SECTION}."))
    return set(found)


def _remove_eval_set(config: ConfigDict, name: str) -> None:
    sets = config.data.eval_sets
    if name not in sets:
        known = ", ".join(sets) or "none"
        raise InputError(
            f"--config.{FREE_SECTION}.{name}=: expected a file, or the name of a set of the config "
            f"that is to be removed; it has {known}"
        )
    del sets[name]


def _no_flag(name: str, known: dict[str, Any]) -> str:
    keys = [f"config.{key}" for key in known]
    found = nearest(name, ["config", "workdir", "mode", "from", *keys])
    expected = f"the nearest is --{found}" if found else "--help lists the flags"
    return f"unknown flag --{name}; {expected}"
