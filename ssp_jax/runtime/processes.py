"""The processes of one run: how they start, exchange objects, and end together.

Each process plays its own share of a step on its own devices, without a message to the others, and
hands over its episodes at the end. From then on all processes hold the same episodes and compute
the same update, each on its shard of the mesh. In a run of one process nothing here does anything.
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

# Until all processes must have joined: a cluster starts its hosts one by one.
START_SECONDS = 600
# Until all processes see a file: NFS and gcsfuse cache a folder for up to a minute.
SHARED_SECONDS = 90
# A process that has been silent for so long counts as dead.
HEARTBEAT_SECONDS = 100
# A process that waits for the others ends when they have not come for so long. It waits longer
# where its own share took long: shares are equal in games, not in seconds.
STUCK_SECONDS = 1800
STUCK_TIMES = 3  # of the time that its own share took
_TICK_SECONDS = 0.5
# Bytes of each process in one collective: one compiled program, whatever the size of the objects.
_BLOCK = 1 << 18
_GONE = "another process of the run is gone"
_RESUME = "the same command goes on from the last checkpoint"
# Prints its argument when its standard input closes before a byte has come. It ignores the signals
# that a whole job gets.
_WATCHDOG = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read(1) or print("ssp_jax:", sys.argv[1], file=sys.stderr)
"""


class Terminated(Exception):
    """A signal that ends the run arrived at one of the processes; raised between decode chunks."""


class CollectiveInputError(InputError):
    """An InputError of one process, raised by all at the same place: they can act together."""


class LocalFailure(Exception):
    """An error that only this process saw. Its peers would hang, so it exits at once."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


# --- start ----------------------------------------------------------------------------------------


def start(spec: ProcessSpec, environment: MutableMapping[str, str]) -> None:
    """Joins the other processes, if there are any. Call it before anything touches the devices.

    Raises InputError.
    """
    if platform.pathways_will_be_used(environment):
        # Whatever else the environment announces: GKE numbers the pods of every job.
        if (spec.processes or 1) > 1:
            raise InputError(
                f"flag --processes is {spec.processes}; expected 1 or no such flag, for through "
                "Pathways' proxy one process drives all chips"
            )
        return
    if spec.processes == 1 or not (spec.coordinator or detected(environment)):
        return
    expected = (
        "expected --coordinator=HOST:PORT, --processes=N and --process=I on each, "
        "or --processes=1 for a run on its own"
    )
    lost = "the processes of this run did not find each other"
    own_gpus = launchers.local_gpus(environment, platform.visible_gpus(environment))
    disarm = _arm_watchdog(f"{lost} in {START_SECONDS} seconds; {expected}")
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
        disarm()
        # Code 1 and not 2: a cluster that restarts all of them may have more luck.
        sys.exit(f"ssp_jax: {lost} ({error}); {expected}")
    disarm()
    if is_multiprocess():
        _end_at_once_on_errors()
        # The first collective, before downloads keep some processes longer than others: XLA gives
        # up on devices that do not all come to their first collective.
        barrier()


def detected(environment: MutableMapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether the environment announces other processes, in a way that JAX reads too.

    On a Cloud TPU VM only its metadata server knows; JAX asks it, and may find that this host is
    the only one.
    """

    def many(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    def listed(name: str) -> bool:
        return "," in environment.get(name, "")

    slurm = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"}
    if many("SLURM_NTASKS") and slurm <= environment.keys():
        return True
    if many("OMPI_COMM_WORLD_SIZE") or many("MEGASCALE_NUM_SLICES"):
        return True
    if listed("TPU_PROCESS_ADDRESSES") or listed("TPU_WORKER_HOSTNAMES"):
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        # JAX asks for the other pods with this package.
        return importlib.util.find_spec("kubernetes") is not None
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu").split(","):
        return False
    if "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment:
        return False
    chips = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_multiprocess() -> bool:
    """Whether the run has other processes.

    It asks no device where there are none, so that bad input is reported before devices are up.
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_coordinator() -> bool:
    """Whether this is process 0, which writes logs, scores and whatever else is written once."""
    return jax.process_index() == 0


# --- the end --------------------------------------------------------------------------------------


def _arm_watchdog(sentence: str) -> Callable[[], None]:
    """Starts a watchdog that prints the sentence if this process dies; returns what disarms it.

    JAX's runtime aborts a process whose coordinator or peer is gone, from another thread. Nothing
    in the process itself can print anything then, so a small process beside it does.
    """
    command = [sys.executable, "-S", "-E", "-c", _WATCHDOG, sentence]
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def disarm() -> None:
        watchdog.communicate(b".")

    return disarm


def _end_at_once_on_errors() -> None:
    """Makes an error end this process at once.

    At exit JAX would wait for the other processes, which would wait for this one.
    """
    own = f"process {jax.process_index()}"
    disarm = _arm_watchdog(
        f"{own} was ended from outside, or by JAX because {_GONE} "
        f"(the lines above may say which); {_RESUME}"
    )
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
    """Around a wait for all others: ends this process if one of them is alive and stuck.

    seconds: after which it ends, STUCK_SECONDS if None.
    """
    if not is_multiprocess():
        yield
        return
    limit = STUCK_SECONDS if seconds is None else seconds

    def end() -> None:
        signals.say(
            f"process {jax.process_index()} ends because another process of the run has not come "
            f"for {limit:.0f} seconds: it may be alive and stuck, such as in a file system or a "
            f"server; {_RESUME}"
        )
        for action in signals.before_leaving:
            action()
        os._exit(1)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def fail_fast(workdir: str) -> Iterator[None]:
    """Around a run: an error that only this process sees ends it at once.

    The others then see it gone, and end too. A disk that is full or gone is reported in one
    sentence, and not as bad input: the same command may do better later.

    Raises LocalFailure, CollectiveInputError, or SystemExit.
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
    """Whether all processes of the run see this error."""
    return not is_multiprocess() or isinstance(error, CollectiveInputError)


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because of another process.

    By the words that gloo, NCCL and JAX's coordinator use then.
    """
    # ValueError: where a program fails as it is dispatched.
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        return False
    words = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "unhealthy")
    return any(word in str(error) for word in words)


class Stop:
    """A context in which Ctrl-C, SIGTERM and SIGHUP only set a flag.

    Calling the object raises Terminated once the flag is set. A second Ctrl-C leaves at once.

    With several processes JAX's preemption service handles SIGTERM: whichever process gets it, all
    set their flag at the same tick of a clock that each keeps on its own. They leave the game then,
    and meet where they hand over episodes. The other two signals are forwarded as SIGTERM.
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
                    "interrupted: saves as soon as the work at hand allows; "
                    "Ctrl-C again leaves at once"
                )
            if is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                self._set.set()
        elif number == signal.SIGINT:
            signals.leave_at_once()

    def _leave_terminal(self) -> None:
        """Redirects output to /dev/null: each write to a terminal that is gone is an error."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def _tick(self) -> None:
        start = time.monotonic()
        for tick in itertools.count(1):
            if multihost_utils.reached_preemption_sync_point(tick):
                self._set.set()
            # Ticks follow the time since the start, also where this thread woke late: a process
            # whose ticks are behind would see the signal late.
            due = start + tick * _TICK_SECONDS
            if self._over.wait(max(0.0, due - time.monotonic())):
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
        """One word for messages."""
        return "interrupted" if self._first == signal.SIGINT else "terminated"

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if is_multiprocess():
            self._clock.join()
        self._listening.__exit__(None, None, None)


# --- what they tell each other --------------------------------------------------------------------


def balance(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Indices of each process's share, in ascending order; shares are even in number and in cost.

    The most expensive come first and go to processes 0, 1, 2, 2, 1, 0, 0, ...
    """
    expensive_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    to_and_fro = [*range(processes), *reversed(range(processes))]
    shares: list[list[int]] = [[] for _ in range(processes)]
    for i, process in zip(expensive_first, itertools.cycle(to_and_fro), strict=False):
        shares[process].append(i)
    return [sorted(share) for share in shares]


def local_share(costs: Sequence[float]) -> list[int]:
    """The indices that this process plays, see balance()."""
    return balance(costs, jax.process_count())[jax.process_index()]


def all_gather_objects(action: Callable[[], T], facts: Mapping[str, Any] | None = None) -> list[T]:
    """Runs `action` on each process; returns all results, in the order of processes.

    facts: values by name that must be equal on all processes.

    An InputError of one process is raised by all (CollectiveInputError on the others too), and so
    is Terminated: they end together.
    """
    if not is_multiprocess():
        return [action()]
    result: T | None = None
    raised: InputError | Terminated | None = None
    began = time.monotonic()
    try:
        result = action()
    except (InputError, Terminated) as error:
        raised = error
    own = pickle.dumps((dict(facts or {}), raised, result))
    own_seconds = time.monotonic() - began
    with watched(max(STUCK_SECONDS, STUCK_TIMES * own_seconds)):
        gathered = [pickle.loads(message) for message in _gather(own)]
    check_alike([its_facts for its_facts, _, _ in gathered])
    for process, (_, its_error, _) in enumerate(gathered):
        if isinstance(its_error, InputError):
            where = "" if process == jax.process_index() else f"process {process}: "
            raise CollectiveInputError(f"{where}{its_error}")
        if its_error is not None:
            raise its_error
    return [its_result for _, _, its_result in gathered]


def run_on_all(action: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
    """Runs `action` on each process; returns this one's result. Errors as all_gather_objects()."""
    results: list[T] = []
    all_gather_objects(lambda: results.append(action()), facts)
    return results[0]


def barrier() -> None:
    """Waits for all processes, so that those that compile and those that find it cached meet.

    Devices that have not communicated before must all come within half a minute (Gloo's limit);
    later the limit is half an hour.
    """
    all_gather_objects(lambda: None)


def appears(path: Path) -> bool:
    """Whether the path exists. Processes other than the coordinator wait for it to appear."""
    end = time.monotonic() + (0 if is_coordinator() else SHARED_SECONDS)
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(_TICK_SECONDS)
    return True


def check_shared(folder: Path) -> None:
    """InputError unless all processes see what the coordinator writes into this folder.

    The file's name is new each time: a file system may remember that an old one was not there.
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
            found = f"{folder} is not the same folder on all hosts"
            raise InputError(f"{found}; expected one that they share")

    try:
        run_on_all(look)
    finally:
        if is_coordinator():
            path.unlink(missing_ok=True)


def run_on_coordinator(action: Callable[[], object]) -> None:
    """Runs `action` on the coordinator while the others wait; its InputError is raised by all.

    They wait in many short collectives, for hours if need be: one long collective would count as
    failed (Gloo gives up after half an hour).
    """
    raised: list[InputError] = []

    def act() -> None:
        try:
            action()
        except InputError as error:
            raised.append(error)

    # daemon: Ctrl-C ends the process and not only the wait
    thread = threading.Thread(target=act, daemon=True)
    if is_coordinator():
        thread.start()

    def is_done() -> bool:
        if is_coordinator():
            thread.join(_TICK_SECONDS)
        ended = not thread.is_alive()
        if raised:
            raise raised[0]
        return ended

    while not all(all_gather_objects(is_done)):
        pass


def check_alike(facts: Sequence[Mapping[str, Any]]) -> None:
    """CollectiveInputError with the first fact that differs between processes, and where.

    facts: of each process, values by name.
    """
    names = dict.fromkeys(name for own in facts for name in own)
    for name in names:
        processes_of: dict[str, list[str]] = {}
        for process, own in enumerate(facts):
            processes_of.setdefault(repr(own.get(name)), []).append(str(process))
        if len(processes_of) > 1:
            groups = [f"{value} on {', '.join(them)}" for value, them in processes_of.items()]
            raise CollectiveInputError(
                f"the processes of this run are not alike: {name} is {'; '.join(groups)}"
            )


def digest(value: Any) -> str:
    """A short digest of repr(value): equal values have the same on every process."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _gather(own: bytes) -> list[bytes]:
    """The messages of all processes, in the order of processes."""
    sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
    blocks = -(-int(sizes.max()) // _BLOCK)
    padded = np.zeros(blocks * _BLOCK, np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    gathered = [multihost_utils.process_allgather(block) for block in np.split(padded, blocks)]
    messages = np.concatenate(gathered, axis=1)
    return [message[:size].tobytes() for message, size in zip(messages, sizes, strict=True)]
