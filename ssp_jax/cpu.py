"""What a CPU run needs of the C library, told before JAX starts its threads."""

import ctypes
import importlib.util
import platform
from collections.abc import Mapping

from ssp_jax import gpu

# glibc's malloc.h: one arena for all threads, no mapping of its own for a large block, nothing given back.
_KEEP = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def will_be_used(environment: Mapping[str, str]) -> bool:
    """Whether JAX is about to run on the CPU, without asking it: asking would start the backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not gpu.will_be_used(environment) and importlib.util.find_spec("libtpu") is None


def keep_memory() -> None:
    """The process keeps what it has freed, and the next call of a program finds it again.

    Left alone, glibc gives each block above 32 MiB back to the kernel, which has to clear its pages for the next: an
    XLA program asks for all its temporaries as one such block, at every call (measured: 10 to 35 % of an update).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in _KEEP.values():
        libc.mallopt(option, value)
