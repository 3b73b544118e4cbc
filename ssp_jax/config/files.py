"""Config files, and the keys that a run has kept."""

import re
import runpy
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import default
from ssp_jax.config.checks import check_numbers
from ssp_jax.config.keys import (
    PATHS,
    check_keys,
    default_values,
    flatten_config,
    is_eval_set,
    no_key,
    wrong_type,
)
from ssp_jax.config.values import USER_CODE
from ssp_jax.errors import InputError
from ssp_jax.runtime.command import one_line, user_path
from ssp_jax.user_code import load

# What a file of assignments can do wrong; anything else is a defect and keeps its traceback.
_FILE_ERRORS = (
    SyntaxError,
    ImportError,
    NameError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OSError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
)


def load_config(path: Path) -> ConfigDict:
    """Runs a config file, checks its result against configs/default.py, and locks it."""
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except _FILE_ERRORS as error:
        raise InputError(_file_error(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: get_config() gives {type(config).__name__}; expected an ml_collections "
            "ConfigDict"
        )
    check_keys(config, str(path))
    expand_paths(config)
    return config.lock()


def _file_error(path: Path, error: BaseException) -> str:
    """Where in the config file, which key, and the nearest one."""
    whole_trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole_trace if frame.filename == str(path)]
    if isinstance(error, SyntaxError) or not frames:
        line = getattr(error, "lineno", None)
        where = f"{path} line {line}" if line else str(path)
        what = "it has no get_config()" if str(error) == "'get_config'" else one_line(error)
        return f"{where}: {what}"

    where = f"{path} line {frames[-1].lineno}"
    known = default_values()
    assigned = re.match(r"\w+\.([\w.]+)\s*=\s*(.*?)\s*(?:#.*)?$", frames[-1].line or "")
    if assigned and assigned[1] not in known:
        return f"{where}: {no_key(assigned[1], known)}"
    if assigned and isinstance(error, TypeError | ValueError):
        return f"{where}: {wrong_type(assigned[1], assigned[2], known)}"
    if unknown := re.search(r'Key "([\w.]+)" does not exist', str(error)):
        return f"{where}: {no_key(unknown[1], known)}"
    return f"{where}: {type(error).__name__}: {one_line(error)}"


def config_of_values(values: dict[str, Any], where: str) -> ConfigDict:
    """The config of a run, from its keys as a file has them (workdir.as_read).

    where: names the file. Keys that are younger than the run have their defaults. Raises
    InputError.
    """
    defaults = default_values()
    found = {}
    for key, value in values.items():
        is_tuple = isinstance(value, list) and isinstance(defaults.get(key), tuple)
        found[key] = tuple(value) if is_tuple else value
    config = default.get_config().copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(found)
    check_keys(config, where)
    check_numbers(config)
    return config.lock()


def expand_paths(config: ConfigDict) -> None:
    """Puts folders of users in the place of `~`, in every key that is a path."""
    paths = {}
    for key, value in flatten_config(config).items():
        is_own = key in USER_CODE and load.is_one(value)
        if key in PATHS or is_eval_set(key) or is_own:
            paths[key] = user_path(value, f"config key {key}")
    with config.unlocked():
        config.update_from_flattened_dict(paths)
