"""The keys of configs/default.py: their names and the types of their values."""

import re
from typing import Any

from ml_collections import ConfigDict

from configs import default
from ssp_jax.errors import InputError
from ssp_jax.runtime.command import nearest

FREE_SECTION = "data.eval_sets"  # its keys are names of the user's own choice, its values files
# Keys of paths, besides those of FREE_SECTION.
PATHS = (
    "model.path",
    "model.adapter",
    "data.answers",
    "retriever.corpus",
    "retriever.index",
    "retriever.encoder",
)


def flatten_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"learner.rows": 8, ...}; an empty section leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def default_values() -> dict[str, Any]:
    return flatten_config(default.get_config())


def is_eval_set(key: str) -> bool:
    """Whether a key is the user's own name of a question set."""
    return key.startswith(f"{FREE_SECTION}.")


def check_keys(config: ConfigDict, where: str) -> None:
    """Raises InputError unless the keys are those of the default, each with its type.

    The elements of tuples are checked too.
    """
    expected = default_values()
    found = flatten_config(config)
    for key, value in found.items():
        if is_eval_set(key):
            expected[key] = ""
            check_set_name(where, key)
        if key not in expected:
            raise InputError(f"{where}: {no_key(key, expected)}")
        same = type(value) is type(expected[key])
        if same and isinstance(value, tuple):
            allowed = set(map(type, expected[key]))
            same = set(map(type, value)) <= allowed
        if not same:
            raise InputError(f"{where}: {wrong_type(key, repr(value), expected)}")
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(
            f"{where}: key {missing[0]} is missing; start from configs/default.py, which has every "
            "key"
        )


def check_set_name(where: str, key: str) -> None:
    """Checks the name of an evaluation set: files, metrics, tables and flags have to show it."""
    name = key.removeprefix(f"{FREE_SECTION}.")
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(
            f"{where}: the name of the set is {name!r}; expected letters, digits, _ and - alone"
        )


def no_key(key: str, known: dict[str, Any]) -> str:
    """A sentence on a key that does not exist, with the likeliest one that does."""
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key} is a section; set one of its keys, such as {inside[0]}"
    sections = dict.fromkeys(known_key.partition(".")[0] for known_key in known)
    found = nearest(key, [*known, *sections])
    expected = f"the nearest is {found}" if found else "--help=WORD finds keys by a word"
    return f"there is no key {key}; {expected}"


def wrong_type(key: str, shown: str, known: dict[str, Any]) -> str:
    """A sentence on a value of another type than the default. shown: the value, as text."""
    example = known[key]
    kind = type(example).__name__
    if isinstance(example, tuple):
        kind = f"tuple of {type(example[0]).__name__}"
    return f"key {key} must be {kind}, such as {example!r}, and not {shown}"
