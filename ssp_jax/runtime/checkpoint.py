"""Saving and resuming a run: everything that a bit-faithful continuation needs, in one Orbax step.

A step holds `state`, the train state's arrays, and `game`, the host's side (data position, replay
pool, noise documents). Orbax writes under a temporary name in a background thread and renames at
the end, so a step exists as a whole or not at all, whenever the process dies. Digests find damage
that a disk or a bucket has done since.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from ssp_jax.errors import InputError
from ssp_jax.runtime import device_memory, files, processes

T = TypeVar("T")

FOLDER = "checkpoints"  # of a workdir
DAMAGED = ".damaged"  # ends the name of a step that was set aside
# Timeout of a save: 390 GB of a 32B model to one disk at 40 MB/s.
SAVE_SECONDS = 3 * 3600
# Raised by Orbax, TensorStore and JSON for damaged files (found by damaging each of them).
_READ_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError)


class Damaged(Exception):
    """A step is not what was saved. The message says which file or array of it."""


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps, and one that may lie before them."""

    def __init__(self, newest: int) -> None:
        self._newest = ocp.checkpoint_managers.LatestN(newest)
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = self._newest.should_preserve(checkpoints, context=context)
        best = [checkpoint.step == self.best for checkpoint in checkpoints]
        return list(map(max, newest, best))


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its question to JAX's preemption service.

    At each save Orbax asks with the number of the step. processes.Stop asks with the ticks of a
    clock, which that would set back: a signal that arrives then would be lost.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step as it was saved. damaged: newer steps that could not be read -> the reason."""

    step: int
    state: Any
    game: dict[str, Any]
    damaged: dict[int, str]


class Checkpoints:
    """workdir/checkpoints, the newest `keep` steps and the best one; a context manager.

    every: steps between saves. minutes: since the last save. 0 for never. All processes of a run
    make the same calls.
    """

    def __init__(
        self,
        workdir: str,
        every: int,
        keep: int,
        *,
        minutes: float = 0.0,
        read_only: bool = False,
    ) -> None:
        self._every = every
        self._minutes = minutes
        self._folder = Path(workdir).resolve() / FOLDER
        self._saved_at = time.monotonic()
        self._kept = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            # each save() is meant: with `every` as Orbax's interval it would skip the last step of
            # a run
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
            preservation_policy=self._kept,
            cleanup_tmp_directories=not read_only,  # what a killed run left unfinished
            read_only=read_only,
            single_host_load_and_broadcast=True,  # a shared file system may show others an old list
            lightweight_initialize=True,  # it would read files of each step, which may be damaged
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_SECONDS,
                post_finalization_callback=self._sync,
            ),
        )
        # On GPUs Orbax would copy the whole state to pinned memory first, of which XLA gives 64 GiB
        # a process.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=False, enable_pinned_host_transfer=False)
        items = ocp.handlers.create_default_handler_registry(
            state=handler, game=ocp.JsonCheckpointHandler()
        )
        self._manager = _Manager(self._folder, options=options, handler_registry=items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # close() waits for the other processes, which know nothing of an error of this one alone.
        collective = kind is None or issubclass(kind, processes.CollectiveInputError | SystemExit)
        if collective or jax.process_count() == 1:
            self.close()

    def steps(self) -> list[int]:
        """Finished steps in ascending order, as the coordinator sees them.

        The list of another process may be old.
        """
        return processes.all_gather_objects(lambda: finished_steps(self._folder.parent))[0]

    def due(self, step: int) -> bool:
        """Whether to save now.

        Call it after each step: it also raises what has failed in the background.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()
        if self._every > 0 and step % self._every == 0:
            return True
        if not self._minutes:
            return False

        def is_late() -> bool:
            return time.monotonic() - self._saved_at >= 60 * self._minutes

        return processes.all_gather_objects(is_late)[0]

    def keep_best(self, step: int | None) -> None:
        """From the next save on this step is kept beside the newest, and no other."""
        self._kept.best = step

    def save(self, step: int, train_state: Any, game: Mapping[str, Any]) -> None:
        """Returns when the arrays are copied to the host, so that the caller may donate them.

        A background thread writes them; an error there is raised by the next call here. Orbax does
        not overwrite a step that exists.
        """
        document: dict[str, Any] = {"game": dict(game), "leaves": leaf_digests(train_state)}
        document["digest"] = _text_digest(document)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(train_state),
            game=ocp.args.JsonSave(document),
        )
        with _writing():
            self._manager.save(step, args=items)
        self._saved_at = time.monotonic()

    def restore_newest(self, abstract_train_state: Any) -> Restored | None:
        """The newest undamaged step, bitwise as saved, or None where there is no step at all.

        Arrays get the shardings of `abstract_train_state` (jax.ShapeDtypeStruct leaves). Damaged
        newer steps are renamed, so that the run can write them anew. Where all steps are damaged
        nothing is renamed, and CollectiveInputError is raised.
        """
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, game = self.restore(step, abstract_train_state)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(list(damaged))
            return Restored(step, state, game, damaged)
        if damaged:
            raise processes.CollectiveInputError(_none_is_good(self._folder, damaged))
        return None

    def restore(self, step: int, abstract_train_state: Any) -> tuple[Any, dict[str, Any]]:
        """Train state and game of one step. Raises Damaged."""
        document = self._document(step)
        state = self._arrays(step, document, abstract_train_state, "")
        return state, document["game"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The weights alone, cast to the dtypes of `abstract_params`. Raises Damaged."""
        return self._arrays(step, self._document(step), abstract_params, "params")

    def _document(self, step: int) -> dict[str, Any]:
        folder = self._folder / str(step)

        def read() -> dict[str, Any]:
            if not processes.appears(folder):
                raise Damaged("it is not there")
            return read_document(folder)

        return _on_all(read)

    def _arrays(self, step: int, document: dict[str, Any], wanted: Any, within: str) -> Any:
        """The subtree `within` of the train state ("" for all of it), one array at a time.

        wanted: its shapes, dtypes and shardings.
        """
        saved = document["leaves"]
        folder = self._folder / str(step) / "state"

        def one(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            name = "/".join(filter(None, (within, _name(path))))
            array = _on_all(lambda: read_array(folder, name, like))
            if _digest(array) != saved.get(name):
                raise Damaged(f"{name} is not what was saved")
            return array if array.dtype == like.dtype else array.astype(like.dtype)

        return jax.tree_util.tree_map_with_path(one, wanted)

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps: nothing is lost, and their names are free again."""
        if not steps:
            return

        def rename() -> None:
            if not processes.is_coordinator():
                return
            for step in steps:
                folder = self._folder / str(step)
                folder.rename(_free_name(folder))
            files.sync(self._folder)

        processes.run_on_all(rename)
        self._manager.reload()

    def _sync(self) -> None:
        """Flushes unfinished steps; Orbax's thread calls it before it renames one."""
        for folder in self._folder.iterdir():
            is_final = folder.name.isdecimal() or folder.name.endswith(DAMAGED)
            if folder.is_dir() and not is_final:
                files.sync_all(folder)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        with _writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, and for the other processes."""
        with _writing():
            self._manager.close()


# --- files of a step ------------------------------------------------------------------------------


def finished_steps(workdir: str | Path) -> list[int]:
    """Steps that have a checkpoint, in ascending order."""
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(int(path.name) for path in paths)


def newest_game(workdir: str) -> tuple[int, dict[str, Any]] | None:
    """Number and `game` of the newest step whose `game` is undamaged; None where there is no step.

    It reads no arrays, so that an InputError, where all are damaged, comes before slow work.
    """
    folder = Path(workdir).resolve() / FOLDER
    damaged: dict[int, str] = {}
    for step in reversed(finished_steps(workdir)):
        try:
            return step, read_document(folder / str(step))["game"]
        except Damaged as error:
            damaged[step] = str(error)
    if damaged:
        raise InputError(_none_is_good(folder, damaged))
    return None


def read_game(workdir: str, step: int) -> dict[str, Any]:
    """`game` of one step. Raises Damaged."""
    game: dict[str, Any] = read_document(Path(workdir).resolve() / FOLDER / str(step))["game"]
    return game


def _none_is_good(folder: Path, damaged: Mapping[int, str]) -> str:
    reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
    return (
        f"no checkpoint in {folder} can be read ({reasons}); "
        "without that folder the same command starts anew"
    )


def read_document(folder: Path) -> dict[str, Any]:
    """`game`, and `leaves`, the digests of the arrays, of one step's folder. Raises Damaged."""
    with _reading():
        document = ocp.JsonCheckpointHandler().restore(folder / "game")
        digest = document.pop("digest", None) if isinstance(document, dict) else None
        if digest is None or digest != _text_digest(document):
            raise ValueError("game is not what was saved")
    return dict(document)


def read_array(folder: Path, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """One array of the item `state`, sharded as `like`, of the dtype that was saved.

    It uses TensorStore: Orbax reads all arrays at once, and where one fails the others go on and
    report errors for long. Raises Damaged.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{folder}/",
            "path": name.replace("/", ".") + "/",
        },
        "fill_missing_data_reads": False,
    }
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    with _reading():
        store = tensorstore.open(spec, read=True).result()
        if store.shape != like.shape:
            raise ValueError(f"{name} has shape {store.shape}; expected {like.shape}")
        # Of replicas only one is read; all reads begin before the first is waited for.
        reads = {_bounds(index, like.shape): store[index].read() for index in indices}
        shards = {bounds: np.asarray(read.result()) for bounds, read in reads.items()}
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: shards[_bounds(index, like.shape)]
    )


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """The slices of an index as a key of a dict."""
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns errors of reading a step's files into Damaged."""
    try:
        yield
    except _READ_ERRORS as error:
        if processes.is_peer_failure(error):
            raise
        raise Damaged(_reason(error)) from error


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turns errors of writing a step into a short OSError.

    TensorStore raises ValueError for a full disk.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if processes.is_peer_failure(error):
            raise
        raise OSError(f"a checkpoint cannot be written ({_reason(error)})") from error


def _on_all(read: Callable[[], T]) -> T:
    """The result of `read` on this process. Where one process finds damage, all raise Damaged."""
    results: list[T] = []

    def act() -> str:
        try:
            results.append(read())
        except Damaged as error:
            return str(error) or "it cannot be read"
        return ""

    for process, reason in enumerate(processes.all_gather_objects(act)):
        if reason:
            raise Damaged(f"process {process}: {reason}" if processes.is_multiprocess() else reason)
    return results[0]


def _reason(error: Exception) -> str:
    """The last two clauses of a message, without TensorStore's specifications."""
    message = re.sub(r" \[\w+(\[\d+\])?='.*", "", " ".join(str(error).split()))
    clauses = message.split(": ")
    return shorten(": ".join(clauses[-2:]) or type(error).__name__, 300)


def _free_name(folder: Path) -> Path:
    """12.damaged, or 12.2.damaged where that is taken."""
    path = folder.with_name(f"{folder.name}{DAMAGED}")
    for number in itertools.count(2):
        if not path.exists():
            break
        path = folder.with_name(f"{folder.name}.{number}{DAMAGED}")
    return path


# --- digests --------------------------------------------------------------------------------------

# Odd, so that multiplying by one of them is one-to-one (constants of murmur3 and xxHash).
_OF_POSITION = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)
_OF_VALUE = (0x7FEB352D, 0x846CA68B)


def leaf_digests(tree: Any) -> dict[str, str]:
    """A digest of each array, by name. All processes call this together."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): _digest(leaf) for path, leaf in leaves}


def _digest(x: jax.Array) -> str:
    return _hex(jax.device_get(_sums(_on_device(x))))


def _hex(sums: tuple[Any, Any]) -> str:
    return "".join(f"{int(number):08x}" for number in sums)


def _name(path: Any) -> str:
    """The path of a leaf in its tree: params/layers/q_kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _on_device(leaf: jax.Array) -> jax.Array:
    """Moments may live in host memory, where programs do not compute."""
    kind = device_memory.default_kind()
    if leaf.sharding.memory_kind in (None, kind):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The digest of an array: two uint32 sums over the bits and the position of each element.

    They do not depend on how the array is sharded: each device sums its own shard at the speed of
    its memory. Each step from an element's bits to its summand is one-to-one: a change of one
    element always shows, others are missed once in 2^64.
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    for axis, factor in zip(range(x.ndim), _OF_POSITION, strict=False):
        positions = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        bits += positions * jnp.uint32(factor)
    one = bits * jnp.uint32(_OF_VALUE[0])
    one ^= one >> 15
    two = one * jnp.uint32(_OF_VALUE[1])
    two ^= two >> 13
    return one.sum(dtype=jnp.uint32), two.sum(dtype=jnp.uint32)


def _text_digest(document: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(document).encode(), digest_size=8).hexdigest()
