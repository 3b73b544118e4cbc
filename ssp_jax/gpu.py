"""What a GPU run needs in its environment before JAX starts, set only where the user has not set it."""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from ssp_jax import launchers

# JAX takes 75 % of a GPU by default. This program is alone on it; the rest is left to the driver, cuBLAS and NCCL.
MEMORY_FRACTION = 0.92
# XLA ends a process at a flag that it does not know. These three are in jaxlib 0.10.2, 0.11.2 and 0.12.0.1, and in the
# CUDA plugins (jax-cuda12-pjrt) of 0.10.2 and 0.12.0.1, as strings of their shared libraries.
XLA_FLAGS = {
    # Collectives run beside the matrix work of the layer before and after: what FSDP needs (JAX's performance tips).
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Seconds until a group of GPUs that talk for the first time is complete: processes compile for unequal times, and
    # XLA's 40 would end the run.
    "--xla_gpu_first_collective_call_terminate_timeout_seconds": "1800",
    # Seconds until threads that wait for each other before a collective give up; XLA's default is never.
    "--xla_gpu_nccl_termination_timeout_seconds": "1800",
}
# XLA's pool of page-locked memory, for offloaded states and for what is copied to be saved. Its default of 64 GiB a
# process is less than the train state of a 7B on one node.
HOST_MEMORY = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
HOST_MEMORY_FRACTION = 0.85  # of the machine's memory
_MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DRIVER = Path("/proc/driver/nvidia/version")
_GPUS = Path("/proc/driver/nvidia/gpus")
# Limits of a container, of both generations of control groups.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def will_be_used(environment: Mapping[str, str], driver: Path = _DRIVER) -> bool:
    """Whether JAX is about to take an NVIDIA GPU, without asking it: asking would start the backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return wanted and driver.exists() and any(importlib.util.find_spec(name) for name in _PLUGINS)


def visible(environment: Mapping[str, str], gpus: Path = _GPUS) -> int:
    """How many NVIDIA GPUs a process with this environment sees."""
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return len(list(gpus.glob("*")))
    names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
    # CUDA reads up to the first that is none.
    return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))


def host_memory(limits: Sequence[Path] = _MEMORY_LIMITS) -> int:
    """Bytes of memory of this machine, or of this container where that has less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in limits:
        text = path.read_text().strip() if path.exists() else ""
        found += [int(text)] if text.isdecimal() else []
    return min(found)


def set_defaults(environment: MutableMapping[str, str]) -> list[str]:
    """Sets what is missing; returns one `NAME=VALUE` for each thing set, for the log."""
    told = []
    if HOST_MEMORY not in environment:
        each = HOST_MEMORY_FRACTION * host_memory() / (launchers.local_tasks(environment) or 1)
        environment[HOST_MEMORY] = str(max(1, int(each / 2**30)))
        told.append(f"{HOST_MEMORY}={environment[HOST_MEMORY]}")
    if not any(name in environment for name in _MEMORY_NAMES):
        environment[_MEMORY_NAMES[0]] = str(MEMORY_FRACTION)
        told.append(f"{_MEMORY_NAMES[0]}={MEMORY_FRACTION}")
    flags = environment.get("XLA_FLAGS", "").split()
    given = {flag.split("=")[0] for flag in flags}
    missing = [f"{name}={value}" for name, value in XLA_FLAGS.items() if name not in given]
    if missing:
        environment["XLA_FLAGS"] = " ".join(flags + missing)
        told.append("XLA_FLAGS+=" + " ".join(missing))
    return told
