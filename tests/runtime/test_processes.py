"""Runs of several real processes: on this machine, over loopback, with fake devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ssp_jax import train
from ssp_jax.config.files import load_config
from ssp_jax.errors import InputError
from ssp_jax.model import hf_load
from ssp_jax.runtime import launchers
from ssp_jax.runtime.command import Parser
from ssp_jax.runtime.launchers import ProcessSpec
from ssp_jax.runtime.processes import HEARTBEAT_SECONDS, balance, check_alike, detected, fail_fast
from tests.conftest import ROOT

# for whatever is waited for: these tests also pass on a machine that has much else to do
SECONDS = 600
SMALL = {
    "steps": 2,
    "game.answers_per_step": 6,
    "game.group_size": 2,
    "limits.searches": 2,
    "engine.slots": 8,
    "engine.extend_rows": 4,
    "engine.cache_buckets": (),
    "engine.extend_buckets": (448,),
    "learner.rows": 4,
    "eval.after": False,
    "eval.max_questions": 3,
    "checkpoint.every": 1,
    "log.episodes_every": 1,
    "log.tensorboard": False,
}

LEARNING_RATE = load_config(ROOT / "configs/tiny.py").learner.learning_rate
ROLES = 2  # each takes an optimizer step in a step of the game


# --- rules ---


@pytest.mark.parametrize(("number", "processes"), [(256, 4), (7, 3), (2, 4), (0, 2)])
def test_shares_are_a_partition_alike_in_number_and_cost(number: int, processes: int) -> None:
    costs = np.random.default_rng(number).integers(1, 11, number).tolist()
    shares = balance(costs, processes)
    assert sorted(i for share in shares for i in share) == list(range(number))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    totals = [sum(costs[i] for i in share) for share in shares]
    assert max(totals) - min(totals) <= max(costs, default=0)
    assert balance([1, 4, 3, 2], 2) == [[0, 1], [2, 3]]


def test_what_differs_between_processes_is_named() -> None:
    check_alike([{"the step": 3, "seed": 0}] * 3)
    with pytest.raises(InputError, match="not alike: the step is 3 on 0, 2; 4 on 1"):
        check_alike(
            [{"seed": 0, "the step": 3}, {"seed": 0, "the step": 4}, {"seed": 0, "the step": 3}]
        )
    with pytest.raises(InputError, match="seed is 0 on 0; None on 1"):
        check_alike([{"seed": 0}, {}])


SLURM = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}
GPU_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # inside an allocation, not inside srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        (GPU_POD, False),  # without the package that JAX asks Kubernetes with
    ],
)
def test_clusters_are_seen_in_the_environment(
    tmp_path: Path, environment: dict[str, str], expected: bool
) -> None:
    assert detected(environment, tmp_path) is expected


def test_place_is_taken_from_the_command_line() -> None:
    parser = Parser()
    launchers.add_flags(parser)

    def parsed(*arguments: str) -> tuple[ProcessSpec, list[str]]:
        given, rest = parser.parse_known_args(arguments)
        return launchers.process_spec(given), rest

    place = ("--coordinator=host0:1234", "--processes=2", "--process=1")
    others = ["--config=a.py", "--config.seed=1"]
    assert parsed(others[0], *place, others[1]) == (ProcessSpec("host0:1234", 2, 1), others)
    assert parsed("--processes=1") == (ProcessSpec(processes=1), [])
    assert parsed() == (ProcessSpec(), [])


DISK_FULL = 'OSError(28, "No space left on device", "x")'
NO_SPACE = (
    "the run in runs/a ends because of its files: [Errno 28] No space left on device: 'x'; "
    "the same command goes on from the last checkpoint"
)


def test_a_full_disk_is_one_sentence_and_not_unusable_input() -> None:
    """So that a cluster starts the run again."""
    with pytest.raises(SystemExit) as ended, fail_fast("runs/a"):
        raise eval(DISK_FULL)
    assert ended.value.code == f"ssp_jax: {NO_SPACE}"


# --- for real ---


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """The processes of a run, each with this many devices; what they print is in files."""

    def __init__(
        self,
        workdir: Path,
        processes: int,
        devices: int,
        logs: Path,
        seeds: tuple[int, ...] = (),
        **changes: Any,
    ) -> None:
        port = free_port()
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        }
        command = [
            sys.executable,
            "-m",
            "ssp_jax.main",
            f"--config={ROOT}/configs/tiny.py",
            f"--workdir={workdir}",
        ]
        logs.mkdir(parents=True)
        self.workdir, self.outputs = (
            workdir,
            [logs / f"{process}.log" for process in range(processes)],
        )
        self.processes = []
        for process, output in enumerate(self.outputs):
            place = [
                f"--coordinator=127.0.0.1:{port}",
                f"--processes={processes}",
                f"--process={process}",
            ]
            values = settings(**changes) | ({"seed": seeds[process]} if seeds else {})
            given = [
                *command,
                *(place if processes > 1 else []),
                *(f"--config.{k}={v}" for k, v in values.items()),
            ]
            with output.open("w") as file:
                started = subprocess.Popen(
                    given, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            self.processes.append(started)

    def codes(self) -> list[int]:
        end = time.monotonic() + SECONDS
        return [process.wait(max(1, end - time.monotonic())) for process in self.processes]

    def until(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not reached():
            running = [process.poll() is None for process in self.processes]
            assert all(running) and time.monotonic() < end, self.said()
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        path = self.workdir / "metrics.jsonl"
        self.until(
            lambda: path.exists() and any(row["step"] >= step for row in rows_of(self.workdir))
        )

    def said(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.outputs)


def settings(**changes: Any) -> dict[str, Any]:
    return SMALL | {key.replace("__", "."): value for key, value in changes.items()}


def here(workdir: Path, **changes: Any) -> None:
    """The same run by this process."""
    config = load_config(ROOT / "configs" / "tiny.py").copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(settings(**changes))
    train.train(config, str(workdir))


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def assert_same_run(a: Path, b: Path) -> None:
    """The same episodes to the letter; the same scores; the same parameters up to rounding."""
    games = sorted(path.name for path in (a / "episodes").iterdir())
    assert len(games) >= SMALL["steps"]
    assert games == sorted(path.name for path in (b / "episodes").iterdir())
    for name in games:
        assert (a / "episodes" / name).read_text() == (b / "episodes" / name).read_text()
    exact = ("funnel/", "fault/", "reward/", "solver/", "proposer/", "play/episodes", "eval/")
    one, other = (
        [{k: v for k, v in row.items() if k.startswith(exact)} for row in rows_of(run)]
        for run in (a, b)
    )
    assert one == other
    one, other = (json.loads((run / "summary.json").read_text())["eval"] for run in (a, b))
    assert one == other
    config = hf_load.read_config(a / "export")
    values = [hf_load.load(run / "export", config, None, np.float32) for run in (a, b)]
    one, other = (np.concatenate([x.ravel() for x in jax.tree.leaves(run)]) for run in values)
    # Where a gradient is nothing but rounding, Adam makes a step of any size up to the learning
    # rate of it: so few weights may differ by as much as all steps can move, and the mean may not.
    # The export is bfloat16.
    moved = 2 * LEARNING_RATE * len(rows_of(a)) * ROLES
    np.testing.assert_allclose(one, other, rtol=2**-7, atol=moved)
    assert np.abs(one - other).mean() < 1e-3 * LEARNING_RATE


def assert_lost(run: Run, victim: int) -> None:
    """One process was killed: every other one ends, with the sentence."""
    for process, (code, output) in enumerate(zip(run.codes(), run.outputs, strict=True)):
        if process == victim:
            assert code == -signal.SIGKILL, run.said()
        else:
            assert code not in (0, 2), run.said()
            # where JAX has ended the process another one says so, a moment later
            end = time.monotonic() + 60
            while (
                f"ssp_jax: process {process}" not in output.read_text() and time.monotonic() < end
            ):
                time.sleep(0.1)
            said = [
                line
                for line in output.read_text().splitlines()
                if line.startswith(f"ssp_jax: process {process}")
            ]
            assert len(said) == 1 and "another process of the run is gone" in said[0], run.said()


@pytest.mark.ci
def test_a_process_that_stays_alone_says_so() -> None:
    code = (
        "from ssp_jax.runtime import launchers, processes\n"
        "processes.START_SECONDS = 3\nprocesses.start(launchers.ProcessSpec({}, 2, {}), {{}})"
    )
    for process in (0, 1):
        place = repr(f"127.0.0.1:{free_port()}"), process
        done = subprocess.run(
            [sys.executable, "-c", code.format(*place)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode not in (0, 2)
        assert (
            "ssp_jax: the processes of this run did not find each other in 3 seconds" in done.stderr
        )


OPEN_SEARCH = """
import fcntl, json, sys, time
from ssp_jax.runtime import processes
from ssp_jax.config.files import load_config
from ssp_jax.runtime.launchers import ProcessSpec
from ssp_jax.errors import InputError
from ssp_jax.assembly.search import open_search
fcntl.flock = lambda *_: None  # what it does between hosts, on gcsfuse and on many an NFS
corpus, workdir, coordinator, process = sys.argv[1:]
processes.start(ProcessSpec(coordinator, 2, int(process)), {})
config = load_config("configs/tiny.py").copy_and_resolve_references().retriever
config.corpus = corpus
try:
    search = open_search(config, workdir, [])
    # It is imported where an index is built.
    print(json.dumps([len(search), "bm25s" in sys.modules]))
except InputError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.ci
@pytest.mark.parametrize("broken", [False, True])
def test_the_first_of_several_processes_builds_the_index(tmp_path: Path, broken: bool) -> None:
    lines = (ROOT / "assets/tiny/corpus.jsonl").read_text().splitlines(keepends=True)[:50]
    (tmp_path / "corpus.jsonl").write_text("".join(lines) + ("{\n" if broken else ""))
    command = [sys.executable, "-c", OPEN_SEARCH, str(tmp_path / "corpus.jsonl"), str(tmp_path)]
    command.append(f"127.0.0.1:{free_port()}")
    started = [
        subprocess.Popen([*command, i], cwd=ROOT, stdout=subprocess.PIPE, text=True) for i in "01"
    ]
    said = [
        json.loads(process.communicate(timeout=SECONDS)[0].splitlines()[-1]) for process in started
    ]
    if broken:
        assert "corpus.jsonl line 51" in said[0] and said[1] == f"process 0: {said[0]}"
    else:
        assert said == [[50, True], [50, False]]
    assert not (tmp_path / "index.building").exists()


SAVE_AT_ONCE = """
import sys
import jax
from ssp_jax.runtime import processes
from ssp_jax.runtime.launchers import ProcessSpec
folder, coordinator, process = sys.argv[1:]
processes.start(ProcessSpec(coordinator, 2, int(process)), {})
from ssp_jax.learner.state import init_state
from ssp_jax.model import sharding
from ssp_jax.runtime.checkpoint import Checkpoints
from tests.learner.test_update import BASE, PARAMS
mesh = sharding.make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1})
params = jax.device_put(jax.device_get(PARAMS), sharding.param_shardings(PARAMS, mesh))
state = init_state(BASE, params)
with Checkpoints(folder, 1, 1) as checkpoints:
    checkpoints.save(0, state, {})
    checkpoints.wait()
    print(checkpoints.steps())
"""


@pytest.mark.ci
def test_several_processes_save_a_state_that_no_update_has_seen(tmp_path: Path) -> None:
    """As a run does that a signal ends while it compiles."""
    command = [sys.executable, "-c", SAVE_AT_ONCE, str(tmp_path), f"127.0.0.1:{free_port()}"]
    one_device = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen([*command, i], cwd=ROOT, env=one_device, stdout=subprocess.PIPE, text=True)
        for i in "01"
    ]
    said = [process.communicate(timeout=SECONDS)[0].splitlines()[-1:] for process in started]
    assert said == [["[0]"], ["[0]"]]


TOLD_ALONE = """
import sys
from ssp_jax.runtime import processes
from ssp_jax.runtime.launchers import ProcessSpec
from ssp_jax.errors import InputError
processes.start(ProcessSpec(sys.argv[1], 2, int(sys.argv[2])), {})
processes.run_on_all(lambda: None)
with processes.fail_fast("runs/a"):
    if sys.argv[2] == "1":
        raise eval(sys.argv[3])
    processes.run_on_all(lambda: None)
"""


@pytest.mark.parametrize(
    ("devices", "error", "code", "sentence"),
    [
        (1, 'InputError("file: expected another")', 2, "file: expected another"),
        (2, "KeyboardInterrupt", 130, "interrupted"),
        (2, DISK_FULL, 1, NO_SPACE),
    ],
)
def test_what_one_process_alone_is_told_ends_it_and_the_others_at_once(
    devices: int, error: str, code: int, sentence: str
) -> None:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", TOLD_ALONE, f"127.0.0.1:{free_port()}"]
    began, pipe = time.monotonic(), subprocess.PIPE
    started = [
        subprocess.Popen([*command, i, error], cwd=ROOT, env=environment, stderr=pipe, text=True)
        for i in "01"
    ]
    other, printed = (process.communicate(timeout=SECONDS)[1] for process in started)
    assert started[1].returncode == code, printed
    assert printed.splitlines()[-1] == f"ssp_jax: process 1: {sentence}"
    assert started[0].returncode not in (0, 2) and "another process of the run is gone" in other, (
        other
    )
    assert time.monotonic() - began < HEARTBEAT_SECONDS + 60


STUCK = """
import os, signal, sys, time
from ssp_jax.runtime import processes
from ssp_jax.runtime.launchers import ProcessSpec
processes.start(ProcessSpec(sys.argv[1], 2, int(sys.argv[2])), {})
processes.STUCK_SECONDS = 3
if sys.argv[2] == "1":
    print(os.getpid(), flush=True)
    eval(sys.argv[3])
processes.run_on_all(lambda: None)
"""


@pytest.mark.ci
@pytest.mark.parametrize("stuck", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(10**6)"])
def test_a_process_that_is_alive_and_stuck_does_not_hang_the_others(stuck: str) -> None:
    """Stopped as a whole, or in one thread, where heartbeats go on."""
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", STUCK, f"127.0.0.1:{free_port()}"]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [*command, i, stuck], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        )
        for i in "01"
    ]
    # it is where it will be stuck
    assert started[1].stdout is not None and started[1].stdout.readline()
    began = time.monotonic()
    said = started[0].communicate(timeout=SECONDS)[1]
    took = time.monotonic() - began
    started[1].kill()
    started[1].communicate(timeout=SECONDS)
    assert started[0].returncode == 1 and took < 30, said
    lines = [line for line in said.splitlines() if line.startswith("ssp_jax:")]
    assert (
        len(lines) == 1
        and "process 0 ends because another process of the run has not come for 3 seconds" in said
    )


UNDER_SLURM = """
import os, jax
from ssp_jax.runtime import processes
from ssp_jax.runtime.launchers import ProcessSpec
processes.start(ProcessSpec(), os.environ)
print()
print(jax.process_count(), jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""


def test_one_process_a_node_has_all_gpus_under_slurm() -> None:
    """Two nodes by what Slurm says, each with one task; JAX finds the coordinator by itself."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "XLA_FLAGS": "",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", UNDER_SLURM],
            cwd=ROOT,
            env=os.environ | slurm | {"SLURM_PROCID": i, "SLURM_NODEID": i},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in "01"
    ]
    said = [process.communicate(timeout=SECONDS)[0].splitlines() for process in started]
    assert [lines[-1] for lines in said] == ["2 0,1,2,3"] * 2


@pytest.mark.slow  # minutes, but CI runs it
def test_a_run_of_two_processes_is_the_run_of_one_that_ends_it_after_a_sudden_death(
    tmp_path: Path,
) -> None:
    mesh = {"mesh__data": 2, "mesh__fsdp": 2}
    here(tmp_path / "one", **mesh)
    run = Run(tmp_path / "two", 2, 2, tmp_path / "logs", **mesh)
    run.until(lambda: (tmp_path / "two" / "checkpoints" / "1").exists())
    run.processes[1].kill()
    began = time.monotonic()
    assert_lost(run, 1)
    assert time.monotonic() - began < HEARTBEAT_SECONDS + 60
    played = rows_of(tmp_path / "two")[-1]["step"]
    here(tmp_path / "two", **mesh)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert 1 <= played <= SMALL["steps"]


@pytest.mark.slow
def test_any_number_of_processes_plays_the_same_run(tmp_path: Path) -> None:
    """8 devices as 1 x 8, 2 x 4 and 4 x 2 (processes x devices), three steps; without and with
    tensor parallelism.
    """
    changes: dict[str, Any] = {
        "steps": 3,
        "learner__rows": 8,
        "game__answers_per_step": 12,
        "engine__slots": 16,
    }
    for tensor in (1, 2):
        mesh = {"mesh__data": 2, "mesh__fsdp": -1, "mesh__tensor": tensor, "eval__after": True}
        runs = []
        for processes in (1, 2, 4):
            name = f"{processes}_{tensor}"
            run = Run(
                tmp_path / name,
                processes,
                8 // processes,
                tmp_path / f"{name}.logs",
                **changes,
                **mesh,
            )
            assert run.codes() == [0] * processes, run.said()
            runs.append(run.workdir)
        assert_same_run(runs[0], runs[1])
        assert_same_run(runs[0], runs[2])


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_trains(tmp_path: Path) -> None:
    """The base moves between the learner's mesh of all devices and each process's own."""
    changes: dict[str, Any] = {
        "mesh__data": 2,
        "mesh__fsdp": 2,
        "lora__rank": 4,
        "checkpoint__export": "model",
    }
    here(tmp_path / "one", **changes)
    run = Run(tmp_path / "two", 2, 2, tmp_path / "logs", **changes)
    assert run.codes() == [0, 0], run.said()
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sigterm_at_one_process_saves_once_for_all_and_four_go_on(tmp_path: Path) -> None:
    # JAX takes a second or two to tell all of a signal
    changes = {"steps": 4, "mesh__data": 2, "mesh__fsdp": 2}
    here(tmp_path / "one", **changes)
    run = Run(tmp_path / "many", 2, 2, tmp_path / "two", **changes)
    run.until_step(1)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes() == [0, 0], run.said()
    assert run.said().count("terminated: saved step") == 1  # one of them speaks
    run = Run(tmp_path / "many", 4, 1, tmp_path / "four", **changes)
    assert run.codes() == [0] * 4, run.said()
    assert "resuming after step" in run.said()
    assert_same_run(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_the_first_process_may_die_too_and_early(tmp_path: Path) -> None:
    """It coordinates the others."""
    run = Run(tmp_path / "run", 2, 1, tmp_path / "logs", mesh__data=2, mesh__fsdp=1)
    run.until(lambda: "starting" in run.outputs[0].read_text())  # both are compiling
    run.processes[0].kill()
    assert_lost(run, 0)


@pytest.mark.slow
def test_processes_with_different_configs_do_not_begin(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 2, 1, tmp_path / "logs", mesh__data=2, mesh__fsdp=1, seeds=(0, 1))
    assert run.codes() == [2, 2], run.said()
    assert run.said().count("not alike: config key seed is 0 on 0; 1 on 1") == 2
    # which the two might have built with different settings
    assert not (tmp_path / "run" / "index").exists()


LATE = """
import sys, time
import jax, numpy as np
from ssp_jax.runtime import processes
from ssp_jax.model import sharding
from ssp_jax.runtime.launchers import ProcessSpec
processes.start(ProcessSpec(sys.argv[1], 2, int(sys.argv[2])), {})
processes.run_on_all(lambda: None)
mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
rows = sharding.put_rows(np.ones((4, 4), np.float32), sharding.rows_sharding(mesh))
time.sleep(40 * int(sys.argv[2]))  # as if it compiled what the first one finds in its cache
processes.barrier()
assert jax.jit(lambda x: x.sum())(rows) == 16
"""


@pytest.mark.slow
def test_a_process_that_compiles_for_long_is_waited_for(tmp_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", LATE, f"127.0.0.1:{free_port()}"]
    started = [
        subprocess.Popen(
            [*command, i], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in "01"
    ]
    said = [process.communicate(timeout=SECONDS)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
