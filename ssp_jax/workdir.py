"""A workdir belongs to one run at a time, to one config, and to the files that its run read."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssp_jax.config.command_line import Origin
from ssp_jax.config.files import config_of_values
from ssp_jax.config.keys import flatten_config
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.runtime import checkpoint, processes, records
from ssp_jax.runtime.files import replacing
from ssp_jax.user_code import load

CONFIG_FILE = "config.json"  # of a workdir
METRICS_FILE = "metrics.jsonl"  # likewise
# Keys, or sections, that a resumed run may set anew: how far and how it is watched, and where
# servers are.
MAY_CHANGE = (
    "steps",
    "eval.",
    "judge.",
    "checkpoint.",
    "log.",
    "retriever.url",
    "retriever.timeout_s",
    "retriever.retries",
    "retriever.threads",
    "retriever.device_gib",
    "warm_start.",
)
# What a resumed warm start may set anew: when it ends, how it is watched, and what it does not use.
WARM_START_MAY_CHANGE = (
    *(key for key in MAY_CHANGE if key != "warm_start."),
    "warm_start.steps",
    "warm_start.stop_loss",
    "warm_start.look_every",
    "warm_start.form_prompts",
    "data.",
    "game.",
    "retriever.",
    "reward.proposer",
    "reward.invalid_question",
    "rules.",
)
# Keys that a resumed run may set anew although its weights depend on them. Its log says from which
# step on they hold.
STEERED = (
    "model.remat",
    "learner.learning_rate",
    "learner.warmup_steps",
    "learner.schedule",
    "learner.decay_steps",
    "learner.final_rate",
    "learner.weight_decay",
    "learner.max_grad_norm",
    "learner.clip_",
    "learner.kl_",
    "learner.importance_cap",
    "learner.max_bad_updates",
    "reward.",
    "game.noise_",
)
# Of a run that is forked from another one: what its train state consists of.
FORK_KEEPS = ("model.path", "model.adapter", "lora.", "learner.momentum_dtype")
# What an evaluation may change besides: model, prompts, limits, search and sampling are those of
# the run.
EVALUATION_MAY_CHANGE = (
    *MAY_CHANGE,
    "model.remat",
    "mesh.",
    "data.",
    "game.",
    "rules.",
    "reward.",
    "engine.",
    "learner.",
)


@contextlib.contextmanager
def made_workdir(workdir: str) -> Iterator[None]:
    """Makes the workdir. Removes it at the end if it is empty: the command was refused.

    Its parents that were missing are made and removed too. Raises InputError.
    """
    path = Path(workdir)
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(workdir, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty, and its parents, stay
            for folder in missing:
                folder.rmdir()


def _unusable(workdir: str, error: OSError) -> InputError:
    return InputError(f"workdir {workdir} cannot be used: {error}")


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """Locks the workdir. A second run on this machine gets InputError: both would write its files.

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
        folder = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise _unusable(workdir, error) from error
    try:
        processes.run_on_all(lambda: lock() if processes.is_coordinator() else None)
        yield
    finally:
        os.close(folder)


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs in the workdir, unless the user has chosen another folder.

    A resumed run finds them there. Of several processes JAX lets only the first one write: on GPUs
    all find their programs; on TPUs the others compile those of play again, which know their
    devices by name.
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
    # So would the paths of source files.
    options.update("jax_compilation_cache_include_metadata_in_key", False)


# --- config ---------------------------------------------------------------------------------------


def check_workdir(
    workdir: str,
    config: ConfigDict,
    may_change: tuple[str, ...] = (*MAY_CHANGE, *STEERED),
    *,
    evaluating: bool = False,
) -> None:
    """Raises InputError where config.json differs in another key than those of may_change.

    An evaluation may change more, and so may a run where only evaluations were. Writes nothing: a
    command that is refused here leaves the run in the workdir as it is.
    """
    now = as_read(config)
    try:
        before = _config_before(workdir)
        trained = (Path(workdir) / METRICS_FILE).exists() or checkpoint.finished_steps(workdir)
    except OSError as error:
        raise _unusable(workdir, error) from error
    if before is None:
        return
    free = may_change if trained and not evaluating else EVALUATION_MAY_CHANGE
    changed = sorted(
        key
        for key in now.keys() | before.keys()
        if now.get(key) != before.get(key) and not key.startswith(free)
    )
    if changed:
        changes = [f"{key} was {_show(before, key)} and is {_show(now, key)}" for key in changed]
        raise InputError(
            f"workdir {workdir} holds a run of another config: {', '.join(changes)}; take another "
            "--workdir"
        )


def _config_before(workdir: str) -> dict[str, Any] | None:
    """The config of the run in the workdir: of config.json, or without that of the newest step."""
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


def config_of(workdir: str) -> ConfigDict:
    """The config of the run in a workdir. Raises InputError."""
    values = _config_before(workdir)
    if values is None:
        raise InputError(f"{workdir}: expected a run folder, found no {CONFIG_FILE} in it")
    return config_of_values(values, f"{workdir}/{CONFIG_FILE}")


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
            raise _unusable(workdir, error) from error

    processes.run_on_all(write)


@dataclass(frozen=True)
class Change:
    """A key that a run has set anew: steps after this one have the new value."""

    step: int
    key: str
    before: Any  # as a file has it
    now: Any

    def to_json(self) -> list[Any]:
        return [self.step, self.key, self.before, self.now]

    def __str__(self) -> str:
        values = f"{json.dumps(self.now)} and was {json.dumps(self.before)}"
        return f"from step {self.step + 1} on {self.key} is {values}"


def changes_of(game: Mapping[str, Any]) -> list[Change]:
    """The changes of the run up to a checkpoint. game: of it."""
    return [Change(*change) for change in game.get("changes", [])]  # earlier versions had none


def changes_since(game: Mapping[str, Any], step: int, config: ConfigDict) -> list[Change]:
    """The keys in which a config differs from that of the checkpoint of a step. game: of it."""
    before = game["config"]
    now = as_read(config)
    return [
        Change(step, key, before[key], now[key])
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]


def trained_with(values: Mapping[str, Any], changes: Sequence[Change], step: int) -> str:
    """A digest of the keys that the weights of a step depend on, and of their changes until then.

    values: all keys, as a file has them, after all changes.
    """
    initial = dict(values)
    for change in reversed(changes):
        initial[change.key] = change.before
    fixed = {key: initial[key] for key in sorted(initial) if not key.startswith(MAY_CHANGE)}
    steered = [
        change.to_json()
        for change in changes
        if change.step < step and not change.key.startswith(MAY_CHANGE)
    ]
    return processes.digest((fixed, steered) if steered else fixed)


def as_read(config: ConfigDict) -> dict[str, Any]:
    """The keys as a file has them: tuples are lists, and the secrets of URLs are masked."""
    return _without_secrets(json.loads(json.dumps(flatten_config(config))))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json may be shown to anybody. Another password does not make another run."""
    return {
        key: masked(value) if isinstance(value, str) else value for key, value in values.items()
    }


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"


# --- files that a run depends on ------------------------------------------------------------------


def check_unchanged(
    workdir: str, stamps: Callable[[], Mapping[str, str]], config: ConfigDict
) -> None:
    """Raises InputError where a file that the run depends on is not that of its newest step.

    stamps: gives a digest of each file, by name. The file of a reward.metric that is another one
    now does not count: the run says that the key has changed.
    """
    newest = checkpoint.newest_game(workdir)
    if newest is None:
        return
    step, game = newest
    metrics = {game["config"].get("reward.metric", ""), config.reward.metric}
    changed = {load.file_of(metric) for metric in metrics} if len(metrics) == 2 else set()

    def counted(digests: Mapping[str, str]) -> dict[str, str]:
        return {name: digests[name] for name in digests if name not in changed}

    check_same_files(counted(game["stamps"]), counted(stamps()), f"step {step} of {workdir}")


def check_same_files(before: Mapping[str, str], now: Mapping[str, str], since: str) -> None:
    """Raises InputError for a file whose digest differs, or that only one of both has.

    since: when they were taken, in words.
    """
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        change = "has changed"
        if name not in now:
            change = "is gone"
        elif name not in before:
            change = "is new"
        raise InputError(
            f"{name} {change} since {since}; expected it as it was, or another --workdir"
        )


# --- a run that is forked from another one --------------------------------------------------------


def check_origin(
    origin: Origin, workdir: str, config: ConfigDict, stamps: Mapping[str, str]
) -> None:
    """Raises InputError unless a run can start, or has started, from that checkpoint.

    stamps: digests of the files of the run. All keys may differ but those of FORK_KEEPS.
    """
    own = checkpoint.newest_game(workdir)
    if own is not None:
        _check_forked(origin, workdir, own[1])
        return
    steps = checkpoint.finished_steps(origin.workdir)
    if not steps:
        raise InputError(f"--from={origin}: expected a run with a checkpoint, found none")
    step = steps[-1] if origin.step is None else origin.step
    if step not in steps:
        kept = ", ".join(map(str, steps))
        raise InputError(f"--from={origin}: there is no such checkpoint; it has {kept}")
    try:
        game = checkpoint.read_game(origin.workdir, step)
    except checkpoint.Damaged as error:
        raise InputError(f"--from={origin}: checkpoint {step} cannot be read ({error})") from None
    kept_keys = [c for c in changes_since(game, step, config) if c.key.startswith(FORK_KEEPS)]
    if kept_keys:
        key = kept_keys[0]
        raise InputError(
            f"--from={origin}: {key.key} was {json.dumps(key.before)} and is "
            f"{json.dumps(key.now)}; expected it as it was, for the weights depend on it"
        )
    folders = (config.model.path, config.model.adapter)
    inside = tuple(f"{masked(folder).rstrip('/')}/" for folder in folders if folder)

    def of_model(digests: Mapping[str, str]) -> dict[str, str]:
        return {name: digests[name] for name in digests if name.startswith(inside)}

    check_same_files(of_model(game["stamps"]), of_model(stamps), f"step {step} of {origin.workdir}")


def _check_forked(origin: Origin, workdir: str, game: Mapping[str, Any]) -> None:
    """Raises InputError unless the run in a workdir came from there. game: of its checkpoint."""
    found = game.get("origin", "")
    folder, _, step = found.rpartition("@")
    if folder != origin.workdir or (origin.step is not None and step != str(origin.step)):
        came = f"comes from {found}" if found else "started by itself"
        raise InputError(
            f"--from={origin}: workdir {workdir} holds a run that {came}; take another --workdir"
        )


def copy_metrics(origin: str, workdir: str) -> None:
    """Gives a run that is forked the metrics of the other one; its logger drops later steps.

    The coordinator does.
    """

    def copy() -> None:
        source = Path(origin) / METRICS_FILE
        target = Path(workdir) / METRICS_FILE
        if processes.is_coordinator() and source.is_file() and not target.exists():
            with replacing(target, str(target)) as file:
                file.write(source.read_text(encoding="utf-8", errors="replace"))

    processes.run_on_all(copy)
