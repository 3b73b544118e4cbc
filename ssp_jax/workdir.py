"""A workdir belongs to one run at a time, to one config, and to the files that the run began with."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssp_jax.config import flatten_config
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.runtime import checkpoint, processes, records

CONFIG_FILE = "config.json"  # of a workdir
# Keys, or sections, that a resumed run may set anew: how far and how it is watched, and where
# servers are.
MAY_CHANGE = (
    *("steps", "eval.", "judge.", "checkpoint.", "log."),
    *("retriever.url", "retriever.timeout_s", "retriever.retries", "retriever.threads"),
)
# What an evaluation may change besides: model, prompts, limits, search and sampling are those of
# the run.
EVALUATION_MAY_CHANGE = (
    *MAY_CHANGE,
    "mesh.",
    "data.",
    "game.",
    "rules.",
    "reward.",
    "engine.",
    "learner.",
)


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """The workdir, for one run on this machine at a time: a second one would write into the same
    files.

    The lock is one of the folder itself, and ends with the process, however that ends.
    """

    def lock() -> None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"workdir {workdir} is in use by another run, which is still going on"
            ) from None
        except OSError as error:  # a file system that has no locks
            unlocked = f"nothing keeps a second run out of {workdir}: {error.strerror}"
            print(f"ssp_jax: {sentence(unlocked)}", file=sys.stderr)

    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error}") from error
    try:
        processes.run_on_all(lambda: lock() if processes.is_coordinator() else None)
        yield
    finally:
        os.close(folder)


def keep_compiled(workdir: str) -> None:
    """A run that is resumed finds its programs in the workdir; a folder of the user's own choice
    stays.

    (Of several processes JAX lets only the first one write. On GPUs all find their programs; on
    TPUs the others compile those of play anew, which know their devices by name.)
    """
    options: Any = jax.config  # which makes its attributes at import, unseen by a type checker
    if options.jax_compilation_cache_dir is None:
        options.update("jax_compilation_cache_dir", str(Path(workdir) / "compiled"))
    # Programs that compile in less than a second are many, and are kept too.
    options.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    options.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # The folder of XLA's own caches would be a part of each program's key: none would be found in a
    # workdir that was moved or copied. They hold what autotuning on GPUs found, which is in the
    # programs too.
    options.update("jax_persistent_cache_enable_xla_caches", "")
    # so would be the paths of source files
    options.update("jax_compilation_cache_include_metadata_in_key", False)


# --- config -----------------------------------------------------------------------------------------------------------


def check_workdir(workdir: str, config: ConfigDict, *, evaluating: bool = False) -> None:
    """A workdir belongs to one config: what a run left in config.json must agree, but for the keys
    of MAY_CHANGE.

    An evaluation is freer, and so is a run where only evaluations were. Nothing is written: a
    command that is refused here leaves the run in the workdir as it is.
    """
    now = as_read(config)
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        before = _config_before(workdir)
        trained = (Path(workdir) / "metrics.jsonl").exists() or checkpoint.finished_steps(workdir)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error}") from error
    if before is None:
        return
    free = MAY_CHANGE if trained and not evaluating else EVALUATION_MAY_CHANGE
    changed = sorted(
        key
        for key in now.keys() | before.keys()
        if now.get(key) != before.get(key) and not key.startswith(free)
    )
    if changed:
        keys = ", ".join(
            f"{key} was {_show(before, key)} and is {_show(now, key)}" for key in changed
        )
        raise InputError(
            f"workdir {workdir} holds a run of another config: {keys}; take another --workdir"
        )


def _config_before(workdir: str) -> dict[str, Any] | None:
    """The config of the run in the workdir: of config.json, or, where that has been deleted, of the
    newest step.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        newest = checkpoint.newest_game(workdir)
        return newest[1]["config"] if newest else None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_a_config(path, str(error)) from error
    if not isinstance(found, dict):
        raise _not_a_config(path, f"it holds {type(found).__name__}")
    return _without_secrets(found)


def _not_a_config(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is not the config of a run: {reason}; expected a JSON object of keys "
        "(without that file the config is compared with the newest checkpoint's)"
    )


def keep_config(workdir: str, config: ConfigDict, *, evaluating: bool = False) -> None:
    """Writes config.json, with the new values of keys that may change. The coordinator does.

    An evaluation leaves the file of a run alone.
    """

    def write() -> None:
        path = Path(workdir) / CONFIG_FILE
        if not processes.is_coordinator() or (evaluating and path.exists()):
            return
        try:
            records.write_document(path, as_read(config))
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be used: {error}") from error

    processes.run_on_all(write)


def trained_with(workdir: str) -> str:
    """A digest of the keys in config.json that the weights of a step depend on."""
    values = json.loads((Path(workdir) / CONFIG_FILE).read_text(encoding="utf-8"))
    return processes.digest(
        {key: value for key, value in sorted(values.items()) if not key.startswith(MAY_CHANGE)}
    )


def as_read(config: ConfigDict) -> dict[str, Any]:
    """The keys as they come back from a file: tuples are lists, and the secrets of URLs are masked."""
    return _without_secrets(json.loads(json.dumps(flatten_config(config))))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json may be shown to anybody. Who has another password goes on with the same run."""
    return {
        key: masked(value) if isinstance(value, str) else value for key, value in values.items()
    }


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"


# --- files that a run depends on --------------------------------------------------------------------------------------


def check_unchanged(workdir: str, stamps: Callable[[], Mapping[str, str]]) -> None:
    """The files that a run depends on are those of its newest step. `stamps`: a digest of each, by
    name.
    """
    newest = checkpoint.newest_game(workdir)
    if newest is None:
        return
    step, game = newest
    before: Mapping[str, str] = game["stamps"]
    now = stamps()
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            how = (
                "is gone" if name not in now else "is new" if name not in before else "has changed"
            )
            raise InputError(
                f"{name} {how} since step {step} of {workdir}; expected it as it was, or another --workdir"
            )
