"""Which GPUs a process takes, from the environment that Slurm and Open MPI give it."""

import pytest

from ssp_jax.errors import InputError
from ssp_jax.runtime import launchers


def slurm(tasks: str, node: int = 0, local: int = 0, **more: str) -> dict[str, str]:
    found = {"SLURM_PROCID": "0", "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    return found | {"SLURM_STEP_TASKS_PER_NODE": tasks} | more


def open_mpi(tasks: int, local: int = 0) -> dict[str, str]:
    return {"OMPI_COMM_WORLD_LOCAL_SIZE": str(tasks), "OMPI_COMM_WORLD_LOCAL_RANK": str(local)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (slurm("1"), 1),
        (slurm("1(x4)", node=3), 1),
        (slurm("8(x2),4", node=1), 8),
        (slurm("8(x2),4", node=2), 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS_PER_NODE": "2"}, None),  # in an allocation, not started by srun
        (open_mpi(1), 1),
        (open_mpi(4) | slurm("1"), 4),  # mpirun in an allocation of Slurm
    ],
)
def test_processes_of_a_machine_are_counted(
    environment: dict[str, str], expected: int | None
) -> None:
    assert launchers.local_tasks(environment) == expected


@pytest.mark.parametrize(
    ("environment", "visible", "expected"),
    [
        ({}, 8, None),
        (slurm("1(x2)"), 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # the usual launch: one process a node
        (open_mpi(1), 4, [0, 1, 2, 3]),
        (slurm("8", local=3), 8, [3]),
        (open_mpi(2, local=1), 8, [4, 5, 6, 7]),
        (slurm("8", local=3), 1, [0]),  # each sees its own GPU alone
        (slurm("2", local=1, SLURM_GPUS_PER_TASK="4"), 4, [0, 1, 2, 3]),
        (slurm("2", local=1, JAX_LOCAL_DEVICE_IDS="0"), 8, None),
        (slurm("1"), 0, None),  # a machine without GPUs
    ],
)
def test_a_process_takes_its_share_of_the_visible_gpus(
    environment: dict[str, str], visible: int, expected: list[int] | None
) -> None:
    assert launchers.local_gpus(environment, visible) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (slurm("3", local=2), "3 processes of the run see 8 GPUs"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "an unknown number of processes"),
    ],
)
def test_gpus_that_cannot_be_shared_out_are_told(environment: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=f"{said}.*expected one process for each machine"):
        launchers.local_gpus(environment, 8)
