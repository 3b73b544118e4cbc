"""What a GPU run needs in its environment before JAX starts, set only where the user has not set it."""

import importlib.util
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# JAX takes 75 % of a GPU by default. This program is alone on it; the rest is left to the driver, cuBLAS and NCCL.
MEMORY_FRACTION = 0.92
# Collectives run beside the matrix work of the layer before and after: what FSDP needs (JAX's GPU performance tips).
XLA_FLAGS = {"--xla_gpu_enable_latency_hiding_scheduler": "true"}
_MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DRIVER = Path("/proc/driver/nvidia/version")


def will_be_used(environment: Mapping[str, str], driver: Path = _DRIVER) -> bool:
    """Whether JAX is about to take an NVIDIA GPU, without asking it: asking would start the backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return wanted and driver.exists() and any(importlib.util.find_spec(name) for name in _PLUGINS)


def set_defaults(environment: MutableMapping[str, str]) -> list[str]:
    """Sets what is missing; returns one `NAME=VALUE` for each thing set, for the log."""
    told = []
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
