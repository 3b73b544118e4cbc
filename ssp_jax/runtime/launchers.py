"""What Slurm and Open MPI say of the processes of a machine, in their environment variables."""

import re
from collections.abc import Mapping

from ssp_jax.errors import InputError


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def _of_node(tasks: str, node: int) -> int | None:
    """Slurm's list of the tasks of each node, such as 8(x2),4: the number of one node."""
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        node -= int(repeated or 1)
        if node < 0:
            return int(count)
    return None


def local_tasks(environment: Mapping[str, str]) -> int | None:
    """How many processes of the run are on this machine; None where no launcher says so."""
    if found := _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"):
        return found
    if "SLURM_PROCID" not in environment:
        return None
    of_nodes = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get(
        "SLURM_TASKS_PER_NODE", ""
    )
    if found := _of_node(of_nodes, _number(environment, "SLURM_NODEID") or 0):
        return found
    return _number(environment, "SLURM_NTASKS_PER_NODE")


def _local_rank(environment: Mapping[str, str]) -> int | None:
    found = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    return _number(environment, "SLURM_LOCALID") if found is None else found


def local_gpus(environment: Mapping[str, str], visible: int) -> list[int] | None:
    """Which of the visible GPUs this process takes. None: JAX decides, or the user has.

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
            f"{found} processes of the run see {visible} GPUs on this machine; expected one process "
            "for each machine, or a number that divides its GPUs, or JAX_LOCAL_DEVICE_IDS=0,1,... "
            "in the environment of each"
        )
    each = visible // tasks
    return list(range(rank * each, (rank + 1) * each))
