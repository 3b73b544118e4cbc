"""The environment of JAX's devices, read, checked and completed before JAX starts.

Nothing here asks JAX which device there is: asking would start the backend.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from ssp_jax.errors import InputError
from ssp_jax.runtime import launchers

# --- GPUs -----------------------------------------------------------------------------------------

# JAX takes 75 % of a GPU by default. This program is alone on it; the rest is left to the driver,
# cuBLAS and NCCL.
MEMORY_FRACTION = 0.92
# XLA ends a process at a flag that it does not know. These three are in jaxlib 0.10.2, 0.11.2 and
# 0.12.0.1, and in the CUDA plugins (jax-cuda12-pjrt) of 0.10.2 and 0.12.0.1, as strings of their
# shared libraries.
XLA_FLAGS = {
    # Collectives overlap with the matrix products of the layers around them, as FSDP needs (JAX's
    # performance tips).
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Seconds until a group of GPUs has come to its first collective: processes compile for unequal
    # times, and XLA's 40 would end the run.
    "--xla_gpu_first_collective_call_terminate_timeout_seconds": "1800",
    # Seconds until threads that wait for each other before a collective give up; XLA's default is
    # never.
    "--xla_gpu_nccl_termination_timeout_seconds": "1800",
}
# XLA's pool of page-locked memory, for offloaded states and for copies that are saved. Its default
# of 64 GiB a process is less than the train state of a 7B on one node.
HOST_MEMORY = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
HOST_MEMORY_FRACTION = 0.85  # of the machine's memory
_MEMORY_NAMES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DRIVER = Path("/proc/driver/nvidia/version")
_GPUS = Path("/proc/driver/nvidia/gpus")
# Limits of a container, of both generations of control groups.
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def gpu_will_be_used(environment: Mapping[str, str], driver: Path = _DRIVER) -> bool:
    """Whether JAX is about to take an NVIDIA GPU."""
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return wanted and driver.exists() and gpu_compiler_installed()


def visible_gpus(environment: Mapping[str, str], gpus: Path = _GPUS) -> int:
    """How many NVIDIA GPUs a process with this environment sees."""
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return len(list(gpus.glob("*")))
    names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
    # CUDA reads up to the first name that is no GPU.
    return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))


def host_memory(limits: Sequence[Path] = _MEMORY_LIMITS) -> int:
    """Bytes of memory of this machine, or of this container where that has less."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in limits:
        text = path.read_text().strip() if path.exists() else ""
        if text.isdecimal():
            sizes.append(int(text))
    return min(sizes)


def gpu_compiler_installed() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is there; it needs no GPU."""
    return any(importlib.util.find_spec(name) for name in _PLUGINS)


def missing_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """Names and values of XLA_FLAGS that the environment's XLA_FLAGS does not name."""
    given = {flag.split("=")[0] for flag in environment.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in XLA_FLAGS.items() if name not in given}


def set_defaults(environment: MutableMapping[str, str]) -> list[str]:
    """Sets missing variables; returns one `NAME=VALUE` for each that it has set, for the log."""
    added = []
    if HOST_MEMORY not in environment:
        processes = launchers.local_tasks(environment) or 1
        each = HOST_MEMORY_FRACTION * host_memory() / processes
        environment[HOST_MEMORY] = str(max(1, int(each / 2**30)))
        added.append(f"{HOST_MEMORY}={environment[HOST_MEMORY]}")
    if not any(name in environment for name in _MEMORY_NAMES):
        environment[_MEMORY_NAMES[0]] = str(MEMORY_FRACTION)
        added.append(f"{_MEMORY_NAMES[0]}={MEMORY_FRACTION}")
    missing = [f"{name}={value}" for name, value in missing_flags(environment).items()]
    if missing:
        flags = environment.get("XLA_FLAGS", "").split()
        environment["XLA_FLAGS"] = " ".join(flags + missing)
        added.append("XLA_FLAGS+=" + " ".join(missing))
    return added


# --- TPUs -----------------------------------------------------------------------------------------

_GOOGLE = "0x1ae0"  # PCI vendor of TPU chips
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_DEVICES = Path("/dev")
# Variables that launchers of programs on TPUs set. (JAX sets others as it is imported, wherever
# libtpu is.)
_TPU_NAMES = (
    "MEGASCALE_NUM_SLICES",
    "TPU_ACCELERATOR_TYPE",
    "TPU_NAME",
    "TPU_PROCESS_ADDRESSES",
    "TPU_TOPOLOGY",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)


def tpu_installed() -> bool:
    """Whether libtpu is there."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_may_be_used(
    environment: Mapping[str, str], pci: Path = _PCI_DEVICES, devices: Path = _DEVICES
) -> bool:
    """Whether this machine may have a TPU, beside libtpu, which also compiles ahead of time."""
    if not tpu_installed():
        return False
    if any(vendor.read_text().strip() == _GOOGLE for vendor in pci.glob("*/vendor")):
        return True
    if [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]:
        return True
    return any(name in environment for name in _TPU_NAMES)


def platforms_without(
    environment: Mapping[str, str], pci: Path = _PCI_DEVICES, devices: Path = _DEVICES
) -> str | None:
    """JAX_PLATFORMS for a machine that has a compiler for TPUs or GPUs, and not the device.

    There JAX would look for one, and libtpu or the CUDA plugin print a page of errors. None: JAX
    needs no setting, or the user has set it, or another plugin may have a device.
    """
    if environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME"):
        return None
    if tpu_may_be_used(environment, pci, devices):
        return None
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if any("cuda" not in plugin.name for plugin in plugins):
        return None
    has_gpu = gpu_will_be_used(environment)
    if not tpu_installed() and (has_gpu or not gpu_compiler_installed()):
        return None
    return "cuda,cpu" if has_gpu else "cpu"


# --- Pathways -------------------------------------------------------------------------------------

# Set to 1, pathwaysutils has the hosts of the chips write checkpoints, each into its own file
# system, and not as runtime.checkpoint reads them.
_PERSISTENCE = "ENABLE_PATHWAYS_PERSISTENCE"


def pathways_will_be_used(environment: Mapping[str, str]) -> bool:
    """Whether JAX is about to drive the chips of all hosts from this process, through a proxy."""
    return "proxy" in environment.get("JAX_PLATFORMS", "").split(",")


def check_pathways(environment: Mapping[str, str]) -> None:
    """Raises InputError where JAX could not reach Pathways' proxy, or a run could not resume."""
    if not environment.get("JAX_BACKEND_TARGET"):
        raise InputError(
            "JAX_PLATFORMS names Pathways' proxy and JAX_BACKEND_TARGET is not set; expected the "
            "proxy's address, such as grpc://localhost:29000"
        )
    if environment.get(_PERSISTENCE, "0") != "0":
        raise InputError(
            f"{_PERSISTENCE} is {environment[_PERSISTENCE]}; expected 0 or none, for this process "
            "writes and reads checkpoints itself"
        )
    if importlib.util.find_spec("pathwaysutils") is None:
        raise InputError(
            "JAX_PLATFORMS names Pathways' proxy and pathwaysutils is not installed; expected "
            "pip install '.[pathways]'"
        )


def start_pathways(environment: Mapping[str, str]) -> None:
    """Makes the proxy known to JAX, before JAX asks for devices. Raises InputError."""
    check_pathways(environment)
    import pathwaysutils

    pathwaysutils.initialize()


# --- CPUs -----------------------------------------------------------------------------------------

# 1: malloc asks for transparent huge pages; in glibc from 2.35 on
_HUGE_PAGES = "glibc.malloc.hugetlb"


def cpu_will_be_used(environment: Mapping[str, str]) -> bool:
    """Whether JAX is about to run on the CPU."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not gpu_will_be_used(environment) and not tpu_may_be_used(environment)


def set_huge_pages(environment: MutableMapping[str, str]) -> bool:
    """Sets huge pages for processes that start with this environment; whether it did.

    It does not where the user has set them, or has another libc than glibc.

    An XLA program allocates its temporaries as one block at every call. glibc returns a free block
    above 32 MiB to the kernel, which clears its pages before the next call gets them. Huge pages
    make that cheap (measured on updates of 1M to 0.5B parameters: 10 to 15 % of the time; keeping
    freed memory is as fast, and takes up to 20 % more of it).
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or _HUGE_PAGES in tunables:
        return False
    environment["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return True


def prepare_once() -> None:
    """prepare(), unless JAX is loaded: then a program that has prepared itself calls a command."""
    if "jax" not in sys.modules:
        prepare()


def prepare() -> None:
    """Prepares the environment for the device that JAX is about to take.

    Call it first in a program: it may start the program once more, because glibc reads its
    settings only when a process starts. Settings for a GPU are printed to standard error. Raises
    InputError.
    """
    if platforms := platforms_without(os.environ):
        os.environ["JAX_PLATFORMS"] = platforms
        if "jax" in sys.modules:  # it has read its environment
            sys.modules["jax"].config.update("jax_platforms", platforms)
    if pathways_will_be_used(os.environ):
        start_pathways(os.environ)
    if gpu_will_be_used(os.environ):
        added = set_defaults(os.environ) or ["nothing; the environment has it all"]
        print("GPU: set", *added, file=sys.stderr)
    if cpu_will_be_used(os.environ) and set_huge_pages(os.environ):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
