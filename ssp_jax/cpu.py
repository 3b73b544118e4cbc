"""What a CPU run needs of the C library, told before JAX starts."""

import importlib.util
import platform
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from ssp_jax import gpu

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # PCI vendor of TPU chips
_HUGE_PAGES = "glibc.malloc.hugetlb"  # 1: malloc asks for transparent huge pages; in glibc from 2.35 on


def will_be_used(environment: Mapping[str, str]) -> bool:
    """Whether JAX is about to run on the CPU, without asking it: asking would start the backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not gpu.will_be_used(environment) and not _has_tpu()


def _has_tpu() -> bool:
    """libtpu alone says little: whoever compiles ahead of time for TPUs has it too."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(vendor.read_text().strip() == _GOOGLE for vendor in _PCI_DEVICES.glob("*/vendor"))


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
