"""Saving and resuming a run: everything that a bit-faithful continuation needs, in one Orbax step.

A step holds `state`, the train state's arrays, and `game`, what the host knows (data position, replay pool, noise
documents). Orbax writes under a temporary name in a background thread and renames at the end, so a step is there as a
whole or not at all, whenever the process dies.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from ssp_jax import hosts
from ssp_jax.config import flatten_config
from ssp_jax.errors import InputError, masked, sentence

CONFIG_FILE = "config.json"  # of a workdir
# Keys, or sections, that a resumed run may set anew: how far and how it is watched, and where servers are.
MAY_CHANGE = (
    *("steps", "eval.", "judge.", "checkpoint.", "log."),
    *("retriever.url", "retriever.timeout_s", "retriever.retries", "retriever.threads"),
)
# What an evaluation may change besides: model, prompts, limits, search and sampling are those of the run.
EVALUATION_MAY_CHANGE = (*MAY_CHANGE, "mesh.", "data.", "game.", "rules.", "reward.", "engine.", "learner.")


class _Manager(ocp.CheckpointManager):
    """Orbax asks JAX's preemption service at each save, with the step's number. hosts.Stop asks it with the ticks of
    a clock, which that would set back: a signal of that moment would never be heard.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """workdir/checkpoints, the newest `keep` steps; a context manager. `every` is in steps, 0 for never."""

    def __init__(self, workdir: str, every: int, keep: int, *, read_only: bool = False) -> None:
        self._every, self._folder = every, Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            # each save() is meant: with `every` as Orbax's interval it would skip the last step of a run
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=not read_only,  # what a killed run left unfinished
            read_only=read_only,
        )
        self._manager = _Manager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if jax.process_count() == 1 or kind is None or issubclass(kind, hosts.AllTold | SystemExit):
            self.close()  # it waits for the other processes, which know nothing of an error of this one

    def latest_step(self) -> int | None:
        """The newest finished step (or one that this process is just writing); None when there is none."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Asked after each step, so that what has failed in the background is told before many more are played."""
        if not self._manager.is_saving_in_progress():
            self.wait()
        return self._every > 0 and step % self._every == 0

    def save(self, step: int, train_state: Any, game: dict[str, Any]) -> None:
        """Returns when the arrays are copied to the host, so that the caller may donate them; writing goes on behind.

        Orbax leaves a step that is already there as it is. What fails in its thread is raised by the next call here.
        """
        state, host = ocp.args.StandardSave(train_state), ocp.args.JsonSave(game)
        with _writing():
            self._manager.save(step, args=ocp.args.Composite(state=state, game=host))

    def restore(self, step: int, abstract_train_state: Any) -> tuple[Any, dict[str, Any]]:
        """Arrays on the shardings of `abstract_train_state` (jax.ShapeDtypeStruct leaves), bitwise, and the game."""
        state, host = ocp.args.StandardRestore(abstract_train_state), ocp.args.JsonRestore()
        found = self._read(step, ocp.args.Composite(state=state, game=host))
        return found["state"], found["game"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The weights alone, cast to the dtypes that are asked for."""
        wanted = {"params": abstract_params}
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        state = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
        return self._read(step, ocp.args.Composite(state=state))["state"]["params"]

    def _read(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            if hosts.lost_another(error):
                raise
            raise InputError(
                f"checkpoint {self._folder / str(step)} cannot be read ({_reason(error)}); without that folder the "
                "same command goes on from the step before"
            ) from error

    def wait(self) -> None:
        """Until what was saved is on disk."""
        with _writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _writing():
            self._manager.close()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """What does not let a step be written as OSError, in a few words: TensorStore has ValueErrors for a full disk."""
    try:
        yield
    except (ValueError, OSError) as error:
        if hosts.lost_another(error):
            raise
        raise OSError(f"a checkpoint cannot be written ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The end of a message that tells the whole way down to the file; without TensorStore's specifications."""
    message = re.sub(r" \[\w+(\[\d+\])?='.*", "", " ".join(str(error).split()))
    return ": ".join(message.split(": ")[-2:])


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """The workdir, for one run on this machine at a time: a second one would write into the same files.

    The lock is one of the folder itself, and ends with the process, however that ends.
    """

    def lock() -> None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"workdir {workdir} is in use by another run, which is still going on") from None
        except OSError as error:  # a file system that has no locks
            unlocked = f"nothing keeps a second run out of {workdir}: {error.strerror}"
            print(f"ssp_jax: {sentence(unlocked)}", file=sys.stderr)

    folder = os.open(workdir, os.O_RDONLY)
    try:
        hosts.agree(lambda: lock() if hosts.first() else None)
        yield
    finally:
        os.close(folder)


def check_workdir(workdir: str, config: ConfigDict, *, evaluating: bool = False) -> None:
    """A workdir belongs to one config: what a run left in config.json must agree, but for the keys of MAY_CHANGE.

    An evaluation is freer, and so is a run where only evaluations were. Nothing is written: a command that is refused
    here leaves the run in the workdir as it is.
    """
    path, now = Path(workdir) / CONFIG_FILE, _as_read(config)
    free = EVALUATION_MAY_CHANGE if evaluating or not path.with_name("metrics.jsonl").exists() else MAY_CHANGE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else json.dumps(now)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error}") from error
    try:
        before = _without_secrets(dict(json.loads(text)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not the config of a run: {error}; expected a JSON object of keys") from error
    changed = sorted(
        key for key in now.keys() | before.keys() if now.get(key) != before.get(key) and not key.startswith(free)
    )
    if changed:
        keys = ", ".join(f"{key} was {_show(before, key)} and is {_show(now, key)}" for key in changed)
        raise InputError(f"workdir {workdir} holds a run of another config: {keys}; take another --workdir")


def keep_config(workdir: str, config: ConfigDict, *, evaluating: bool = False) -> None:
    """Writes config.json, with the new values of keys that may change; an evaluation leaves the file of a run alone."""
    path = Path(workdir) / CONFIG_FILE
    if evaluating and path.exists():
        return
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(_as_read(config), indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error}") from error


def trained_with(workdir: str) -> str:
    """A digest of the keys in config.json that the weights of a step depend on."""
    values = json.loads((Path(workdir) / CONFIG_FILE).read_text(encoding="utf-8"))
    return hosts.digest({key: value for key, value in sorted(values.items()) if not key.startswith(MAY_CHANGE)})


def check_shared(workdir: str) -> None:
    """Every process must see what the first one has just written."""
    if not (Path(workdir) / CONFIG_FILE).exists():
        raise InputError(f"workdir {workdir} is not the same folder on all hosts; expected one that they share")


def _as_read(config: ConfigDict) -> dict[str, Any]:
    """The keys as they come back from a file: tuples are lists, and the secrets of URLs are masked."""
    return _without_secrets(json.loads(json.dumps(flatten_config(config))))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json may be shown to anybody. Who has another password goes on with the same run."""
    return {key: masked(value) if isinstance(value, str) else value for key, value in values.items()}


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"
