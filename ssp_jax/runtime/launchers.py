"""Which process of a run this is: by its flags, or by the variables of Slurm and Open MPI.

Imports no JAX, so that a mistaken flag is reported at once.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ssp_jax.errors import InputError
from ssp_jax.runtime.command import Parser


@dataclass(frozen=True)
class ProcessSpec:
    """This process among those of the run, by its flags. None: the cluster's environment says."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None


def add_flags(parser: Parser) -> None:
    """Adds the flags of processes: all three are given, or none of them, or --processes=1."""
    group = parser.add_argument_group("where no launcher numbers the processes of a run")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", metavar="N", type=int, help="how many; 1 asks nobody")
    group.add_argument("--process", metavar="I", type=int, help="this one, from 0 to N - 1")


def process_spec(given: argparse.Namespace) -> ProcessSpec:
    """What the flags of processes say. Raises InputError."""
    for name, number, minimum in (
        ("processes", given.processes, 1),
        ("process", given.process, 0),
    ):
        if number is not None and number < minimum:
            raise InputError(f"flag --{name} is {number}; expected at least {minimum}")
    spec = ProcessSpec(given.coordinator, given.processes, given.process)
    if spec in (ProcessSpec(), ProcessSpec(processes=1)):
        return spec
    if spec.coordinator is None or spec.processes is None or spec.process is None:
        raise InputError(
            "expected --coordinator=HOST:PORT, --processes=N and --process=I together, or none of "
            "them"
        )
    if not re.fullmatch(r"\S+:\d+", spec.coordinator) or spec.process >= spec.processes:
        raise InputError(
            f"--coordinator={spec.coordinator} --processes={spec.processes} "
            f"--process={spec.process}: expected HOST:PORT of process 0, and for each process its "
            "own number from 0 to N - 1"
        )
    return spec


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def _of_node(tasks: str, node: int) -> int | None:
    """The number of tasks of one node, from Slurm's list for all nodes, such as 8(x2),4."""
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        node -= int(repeated or 1)
        if node < 0:
            return int(count)
    return None


def local_tasks(environment: Mapping[str, str]) -> int | None:
    """How many processes of the run are on this machine; None where no launcher says so."""
    if number := _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"):
        return number
    if "SLURM_PROCID" not in environment:
        return None
    of_job = environment.get("SLURM_TASKS_PER_NODE", "")
    of_step = environment.get("SLURM_STEP_TASKS_PER_NODE")
    node = _number(environment, "SLURM_NODEID") or 0
    if number := _of_node(of_step or of_job, node):
        return number
    return _number(environment, "SLURM_NTASKS_PER_NODE")


def _local_rank(environment: Mapping[str, str]) -> int | None:
    found = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    return _number(environment, "SLURM_LOCALID") if found is None else found


def local_gpus(environment: Mapping[str, str], visible: int) -> list[int] | None:
    """Indices of the visible GPUs that this process takes. None: JAX decides, or the user has.

    Left alone JAX takes one GPU a process under these launchers, and leaves the others idle.
    """
    rank = _local_rank(environment)
    if rank is None or not visible or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = local_tasks(environment)
    bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    if tasks == 1 or bound or (tasks is not None and visible < tasks):
        return list(range(visible))  # no other process sees them
    if tasks is None or visible % tasks:
        found = "an unknown number of" if tasks is None else str(tasks)
        raise InputError(
            f"{found} processes of the run see {visible} GPUs on this machine; expected one "
            "process for each machine, or a number that divides its GPUs, or "
            "JAX_LOCAL_DEVICE_IDS=0,1,... in the environment of each"
        )
    each = visible // tasks
    return list(range(rank * each, (rank + 1) * each))
