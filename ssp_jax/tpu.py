"""Whether this machine may have a TPU, without asking JAX: asking would start the backend."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ssp_jax import gpu

_GOOGLE = "0x1ae0"  # PCI vendor of TPU chips
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_DEVICES = Path("/dev")
# Variables that whoever starts a program on TPUs sets. (JAX itself sets others as it is imported, wherever libtpu is.)
_NAMES = (
    *("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"),
    *("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "TPU_TOPOLOGY", "MEGASCALE_NUM_SLICES"),
)


def installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def may_be_used(environment: Mapping[str, str], pci: Path = _PCI_DEVICES, devices: Path = _DEVICES) -> bool:
    """libtpu alone says little: whoever compiles ahead of time for TPUs has it too."""
    if not installed():
        return False
    if any(vendor.read_text().strip() == _GOOGLE for vendor in pci.glob("*/vendor")):
        return True
    if [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]:
        return True
    return any(name in environment for name in _NAMES)


def platforms_without(environment: Mapping[str, str], pci: Path = _PCI_DEVICES, devices: Path = _DEVICES) -> str | None:
    """JAX_PLATFORMS for a machine that has libtpu and no TPU, where JAX would look for one, and
    libtpu tell a page about it. None: JAX needs no word, or the user has said it, or another
    plugin may have a device.
    """
    said = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME")
    if said or not installed() or may_be_used(environment, pci, devices) or _other_plugins():
        return None
    return "cuda,cpu" if gpu.will_be_used(environment) else "cpu"


def _other_plugins() -> bool:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return any("cuda" not in plugin.name for plugin in plugins)
