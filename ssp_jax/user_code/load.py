"""Loading what a config key names as FILE.py:NAME. Without JAX."""

import contextlib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssp_jax.errors import InputError, first_line

_SUFFIX = ".py"


def is_one(value: str) -> bool:
    """Whether a value has the form FILE.py:NAME."""
    return file_of(value).endswith(_SUFFIX) and name_of(value).isidentifier()


def file_of(value: str) -> str:
    return value.rpartition(":")[0]


def name_of(value: str) -> str:
    return value.rpartition(":")[2]


def digest(value: str) -> str:
    """Of the file's bytes; what it imports is not in it. Raises InputError."""
    return hashlib.blake2b(_read(value), digest_size=16).hexdigest()


def load(key: str, value: str) -> Any:
    """What a config key names. Raises InputError."""
    file = file_of(value)
    name = name_of(value)
    _read(value)
    unique = f"ssp_jax_user_code_{hashlib.blake2b(file.encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(unique, file)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # where dataclasses look their module up
    with running(key, value):
        spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        names = [found for found, thing in vars(module).items() if _is_own(thing, unique)]
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise InputError(
            f"config key {key} is {value}: expected a function or class {name} in that file; "
            f"{known}"
        )
    return getattr(module, name)


def _is_own(thing: Any, module: str) -> bool:
    return callable(thing) and getattr(thing, "__module__", None) == module


def _read(value: str) -> bytes:
    try:
        return Path(file_of(value)).read_bytes()
    except OSError as error:
        raise InputError(
            f"{file_of(value)}: expected a readable file of Python ({error.strerror})"
        ) from None


@contextlib.contextmanager
def running(key: str, value: str) -> Iterator[None]:
    """Turns whatever the user's code raises into an InputError with its line.

    The net is as wide as that, for what stands there is not this program's.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        file = file_of(value)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        where = f"{file} line {line}" if line else file
        raise InputError(
            f"config key {key}: {where}: {type(error).__name__}: {first_line(error)}"
        ) from error
