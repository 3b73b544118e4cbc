"""Several processes that play one run: how they start, what they tell each other, and how they end
together.

Each process plays its own share of a step on its own devices, without any word to the others, and
hands over what it played at the end. From then on all of them hold the same and compute the same
update, each on its part of the mesh. On one process nothing here does anything.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import itertools
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssp_jax.errors import InputError, sentence
from ssp_jax.runtime import launchers, platform, signals
from ssp_jax.runtime.launchers import ProcessSpec

T = TypeVar("T")

START_SECONDS = 600  # until all processes must have come: a cluster starts its hosts one by one
# until all see a file: NFS and gcsfuse keep what they know of a folder for up to a minute
SHARED_SECONDS = 90
HEARTBEAT_SECONDS = 100  # a process that has been silent for so long counts as dead
# A process that waits for the others ends when they have not come for so long. It may wait longer
# where its own part took long: shares of play are alike in number of games, and not in seconds.
STUCK_SECONDS = 1800
STUCK_TIMES = 3  # as long as its own part took
_TICK_SECONDS = 0.5
# bytes that a process hands over in one collective: one program, however much there is to tell
_BLOCK = 1 << 18
_GONE = "another process of the run is gone"
_RESUME = "the same command goes on from the last checkpoint"
# Prints its argument when its standard input ends without a word; signals that a whole job gets are
# not for it.
_WATCHDOG = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read(1) or print("ssp_jax:", sys.argv[1], file=sys.stderr)
"""


class Terminated(Exception):
    """A signal that ends the run arrived at one of the processes; raised between decode chunks."""


class CollectiveInputError(InputError):
    """What one of several processes was told, raised by all of them at the same place: they can
    still act together.
    """


class LocalFailure(Exception):
    """What only this one of several processes was told: the others go on and would wait for it."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


# --- start ------------------------------------------------------------------------------------------------------------


def start(spec: ProcessSpec, environment: MutableMapping[str, str]) -> None:
    """Joins the other processes, if there are any; before anything touches the devices."""
    if spec.processes == 1 or not (spec.coordinator or detected(environment)):
        return
    expected = "expected --coordinator=HOST:PORT, --processes=N and --process=I on each, or --processes=1 for a run on its own"
    own_gpus = launchers.local_gpus(environment, platform.visible_gpus(environment))
    found = _arm_watchdog(
        f"the processes of this run did not find each other in {START_SECONDS} seconds; {expected}"
    )
    try:
        jax.distributed.initialize(
            spec.coordinator,
            spec.processes,
            spec.process,
            own_gpus,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, OSError, RuntimeError) as error:
        found()
        # Code 1 and not 2: a cluster that starts all of them again may have more luck.
        sys.exit(
            f"ssp_jax: the processes of this run did not find each other ({error}); {expected}"
        )
    found()
    if is_multiprocess():
        _end_at_once_on_errors()
        # The first words between devices, before downloads and the like keep some processes longer
        # than others: XLA gives up on devices that do not all come to their first collective.
        barrier()


def detected(environment: MutableMapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether a cluster's environment says that there are more processes than this one, in a way
    that JAX reads too.

    On a Cloud TPU VM only its metadata server knows; JAX asks it, and may find that this host is
    the only one.
    """

    def many(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    if (
        many("SLURM_NTASKS")
        and {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"} <= environment.keys()
    ):
        return True
    if many("OMPI_COMM_WORLD_SIZE"):
        return True
    if any(
        "," in environment.get(name, "")
        for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    ):
        return True
    if many("MEGASCALE_NUM_SLICES"):
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        # what JAX asks for the other pods with
        return importlib.util.find_spec("kubernetes") is not None
    platforms = environment.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    alone = "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment
    return (
        "tpu" in platforms
        and bool(chips)
        and not alone
        and importlib.util.find_spec("libtpu") is not None
    )


def is_multiprocess() -> bool:
    """Asks no device where there is no other process, so that mistakes in the input are told before
    devices are up.
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_coordinator() -> bool:
    """Whether this is the process that writes logs, scores and everything else that is written
    once.
    """
    return jax.process_index() == 0


# --- the end ----------------------------------------------------------------------------------------------------------


def _arm_watchdog(sentence: str) -> Callable[[], None]:
    """The sentence is printed should this process end before it calls what is returned.

    JAX's runtime aborts a process whose coordinator or peer is gone, from another thread: nothing
    in the process itself can say anything then, so a small one beside it does.
    """
    command = [sys.executable, "-S", "-E", "-c", _WATCHDOG, sentence]
    mourner = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def disarm() -> None:
        mourner.communicate(b".")

    return disarm


def _end_at_once_on_errors() -> None:
    """An error ends this process without the wait for the others that JAX has at exit: they would
    wait for this one.
    """
    own = f"process {jax.process_index()}"
    why = f"{own} was ended from outside, or by JAX because {_GONE} (the lines above may say which); {_RESUME}"
    disarm = _arm_watchdog(why)
    signals.before_leaving.append(disarm)

    def leave(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> NoReturn:
        if isinstance(error, LocalFailure):
            print(f"ssp_jax: {own}: {sentence(error)}", file=sys.stderr)
        elif is_peer_failure(error):
            print(f"{error}\nssp_jax: {own} ends because {_GONE}; {_RESUME}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
        disarm()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, LocalFailure) else 1)

    atexit.register(disarm)
    sys.excepthook = leave


@contextlib.contextmanager
def watched(seconds: float | None = None) -> Iterator[None]:
    """In here this process waits for all others: one that is alive and stuck must not hang it for
    ever.
    """
    if not is_multiprocess():
        yield
        return
    most = STUCK_SECONDS if seconds is None else seconds

    def end() -> None:
        signals.say(
            f"process {jax.process_index()} ends because another process of the run has not come for {most:.0f} "
            f"seconds: it may be alive and stuck, such as in a file system or a server; {_RESUME}"
        )
        for action in signals.before_leaving:
            action()
        os._exit(1)

    timer = threading.Timer(most, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def fail_fast(workdir: str) -> Iterator[None]:
    """Around a run: what one of several processes alone is told ends it at once, and so the others,
    which see it gone.

    A full disk, or one that is gone, is told in one sentence. Not as unusable input: the same
    command may do better.
    """
    try:
        yield
    except InputError as error:
        if is_collective(error):
            raise
        raise LocalFailure(str(error), 2) from None
    except KeyboardInterrupt:
        if not is_multiprocess():
            raise
        raise LocalFailure("interrupted", 130) from None
    except OSError as error:
        sentence = f"the run in {workdir} ends because of its files: {error}; {_RESUME}"
        if is_multiprocess():
            raise LocalFailure(sentence, 1) from None
        sys.exit(f"ssp_jax: {sentence}")


def is_collective(error: InputError) -> bool:
    """Whether no other process goes on as if nothing had happened."""
    return not is_multiprocess() or isinstance(error, CollectiveInputError)


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because of another process: what gloo, NCCL and JAX's coordinator
    say then.
    """
    said = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "unhealthy")
    # the latter where a program fails as it is dispatched
    kinds = jax.errors.JaxRuntimeError, ValueError
    return isinstance(error, kinds) and any(words in str(error) for words in said)


class Stop:
    """While this context is open Ctrl-C, SIGTERM and SIGHUP only set a flag; calling the object
    raises Terminated once it is set. A second Ctrl-C leaves at once.

    With several processes JAX's preemption service has SIGTERM: whichever process gets it, all have
    their flag set at the same tick of a clock that each keeps on its own. They leave the game then,
    and meet where they hand over. The other two signals are passed on to it.
    """

    def __enter__(self) -> "Stop":
        self._set = threading.Event()
        self._over = threading.Event()
        self._first: int | None = None
        self._terminals = [number for number in (0, 1, 2) if os.isatty(number)]
        numbers = [signal.SIGINT, signal.SIGHUP]
        if is_multiprocess():
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()
        else:
            numbers.append(signal.SIGTERM)
        self._listening = signals.heard(numbers, self._arrived)
        self._listening.__enter__()
        return self

    def _arrived(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self._first is None:
            self._first = number
            if number == signal.SIGINT:
                signals.say(
                    "interrupted: saves as soon as the work at hand allows; Ctrl-C again leaves at once"
                )
            if is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                self._set.set()
        elif number == signal.SIGINT:
            signals.leave_at_once()

    def _leave_terminal(self) -> None:
        """A terminal that is gone takes no more words, and each would be an error."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def _tick(self) -> None:
        start = time.monotonic()
        for tick in itertools.count(1):
            if multihost_utils.reached_preemption_sync_point(tick):
                self._set.set()
            # As many ticks as time has passed, also where this thread came late: who is behind
            # hears of it late.
            if self._over.wait(max(0.0, start + tick * _TICK_SECONDS - time.monotonic())):
                return

    def __call__(self) -> None:
        if self._set.is_set():
            raise Terminated

    @property
    def code(self) -> int:
        """The exit code of this process once it has saved."""
        return signals.INTERRUPTED if self._first == signal.SIGINT else 0

    @property
    def cause(self) -> str:
        return "interrupted" if self._first == signal.SIGINT else "terminated"

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if is_multiprocess():
            self._clock.join()
        self._listening.__exit__(None, None, None)


# --- what they tell each other ----------------------------------------------------------------------------------------


def balance(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Who plays what, as indices: the dearest first, to and fro, so that shares are alike in number
    and in cost.
    """
    dearest = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    turn = [*range(processes), *reversed(range(processes))]
    return [
        sorted(i for place, i in enumerate(dearest) if turn[place % len(turn)] == process)
        for process in range(processes)
    ]


def local_share(costs: Sequence[float]) -> list[int]:
    return balance(costs, jax.process_count())[jax.process_index()]


def all_gather_objects(action: Callable[[], T], facts: Mapping[str, Any] | None = None) -> list[T]:
    """What `action` gives on each process, for all of them, in the order of processes.

    What one of them is told (InputError, Terminated) all are told, so that they end together.
    `facts` must be the same everywhere.
    """
    if not is_multiprocess():
        return [action()]
    result: T | None = None
    told: InputError | Terminated | None = None
    began = time.monotonic()
    try:
        result = action()
    except (InputError, Terminated) as error:
        told = error
    own = pickle.dumps((dict(facts or {}), told, result))
    with watched(max(STUCK_SECONDS, STUCK_TIMES * (time.monotonic() - began))):
        parts = [pickle.loads(part) for part in _gather(own)]
    check_alike([part[0] for part in parts])
    for process, (_, of_one, _) in enumerate(parts):
        if isinstance(of_one, InputError):
            raise CollectiveInputError(
                str(of_one) if process == jax.process_index() else f"process {process}: {of_one}"
            )
        if of_one is not None:
            raise of_one
    return [part[2] for part in parts]


def run_on_all(action: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
    """What `action` gives on this process; InputError of one is raised by all."""
    kept: list[T] = []
    all_gather_objects(lambda: kept.append(action()), facts)
    return kept[0]


def barrier() -> None:
    """Waits for those that compile what others find in their cache, before devices talk that have
    not talked before.

    (Gloo gives up after half a minute then, and after half an hour between those that have.)
    """
    all_gather_objects(lambda: None)


def appears(path: Path) -> bool:
    """Whether the path is there. Where another process wrote it, it is waited for."""
    end = time.monotonic() + (0 if is_coordinator() else SHARED_SECONDS)
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(_TICK_SECONDS)
    return True


def check_shared(folder: Path) -> None:
    """All processes see what the first one writes into this folder; else InputError.

    By a name that is new each time: a file system may remember that another one was not there.
    """
    if not is_multiprocess():
        return

    def mark() -> str:
        name = f".shared_{secrets.token_hex(8)}"
        if is_coordinator():
            try:
                (folder / name).touch()
            except OSError as error:
                raise InputError(f"{folder} cannot be used: {error}") from error
        return name

    path = folder / all_gather_objects(mark)[0]

    def look() -> None:
        if not appears(path):
            raise InputError(
                f"{folder} is not the same folder on all hosts; expected one that they share"
            )

    try:
        run_on_all(look)
    finally:
        if is_coordinator():
            path.unlink(missing_ok=True)


def run_on_coordinator(action: Callable[[], object]) -> None:
    """The first process acts while the others wait, for hours if need be; its InputError is raised
    by all.

    They wait in many short collectives: a long one counts as a failed one (Gloo gives up after half
    an hour).
    """
    told: list[InputError] = []

    def act() -> None:
        try:
            action()
        except InputError as error:
            told.append(error)

    # daemon: Ctrl-C ends the process and not only the wait
    thread = threading.Thread(target=act, daemon=True)
    if is_coordinator():
        thread.start()

    def over() -> bool:
        if is_coordinator():
            thread.join(_TICK_SECONDS)
        ended = not thread.is_alive()
        if told:
            raise told[0]
        return ended

    while not all(all_gather_objects(over)):
        pass


def check_alike(facts: Sequence[Mapping[str, Any]]) -> None:
    """The same facts of each process, or InputError with the first that differs and where."""
    for name in dict.fromkeys(name for own in facts for name in own):
        values = [own.get(name) for own in facts]
        where: dict[str, list[str]] = {}
        for process, value in enumerate(values):
            where.setdefault(repr(value), []).append(str(process))
        if len(where) > 1:
            differ = "; ".join(
                f"{value} on {', '.join(processes)}" for value, processes in where.items()
            )
            raise CollectiveInputError(
                f"the processes of this run are not alike: {name} is {differ}"
            )


def digest(value: Any) -> str:
    """Short, and the same on every process that has the same."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _gather(own: bytes) -> list[bytes]:
    """The bytes of every process."""
    sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
    padded = np.zeros(-(-int(sizes.max()) // _BLOCK) * _BLOCK, np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    blocks = [
        multihost_utils.process_allgather(padded[i : i + _BLOCK])
        for i in range(0, len(padded), _BLOCK)
    ]
    everything = np.concatenate(blocks, axis=1)
    return [everything[process, :size].tobytes() for process, size in enumerate(sizes)]
