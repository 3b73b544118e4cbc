"""What a CPU run needs of the C library, told before JAX starts."""

import platform
from collections.abc import Mapping, MutableMapping

from ssp_jax import gpu, tpu

_HUGE_PAGES = "glibc.malloc.hugetlb"  # 1: malloc asks for transparent huge pages; in glibc from 2.35 on


def will_be_used(environment: Mapping[str, str]) -> bool:
    """Whether JAX is about to run on the CPU, without asking it: asking would start the backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not gpu.will_be_used(environment) and not tpu.may_be_used(environment)


def set_huge_pages(environment: MutableMapping[str, str]) -> bool:
    """For processes that start with this environment; False where the user has said something, or has another libc.

    An XLA program asks for its temporaries as one block at every call, and glibc gives a block above 32 MiB back to the
    kernel when it is free, which clears its pages for the next. Huge pages make that cheap (measured on updates of
    1M to 0.5B parameters: 10 to 15 % of the time; keeping freed memory is as fast, and takes up to 20 % more of it).
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or _HUGE_PAGES in tunables:
        return False
    environment["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return True
