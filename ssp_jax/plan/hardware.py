"""Published numbers of chips and slices, for planning without the hardware."""

import dataclasses
import math

from ssp_jax.errors import InputError
from ssp_jax.runtime.platform import MEMORY_FRACTION

GIB = 2**30
GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip."""

    hbm: float  # bytes that a program may use
    flops: float  # per second, dense bfloat16
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s that leave a chip over ICI or NVLink, in one direction
    per_host: int  # chips
    devices: int  # JAX devices per chip
    slices: tuple[str, ...]  # that can be had, smallest first


_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128")

# TPUs: cloud.google.com/tpu/docs, one page per generation; memory is the compiler's limit of a
# program, which differs a little from the published size. GPUs: NVIDIA's data sheets of the SXM
# boards, L4: of the PCIe card; memory is the run's share of the size that CUDA reports.
TPUS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819 * GB, 200 * GB, 4, 1, _2D),
    "v6e": Chip(31.25 * GIB, 918e12, 1638 * GB, 400 * GB, 4, 1, _2D),
    "v5p": Chip(95.74 * GIB, 459e12, 2765 * GB, 600 * GB, 4, 1, _3D),
    "tpu7x": Chip(189.5 * GIB, 2307e12, 7380 * GB, 600 * GB, 4, 2, _3D),
}
GPUS = {
    "l4": Chip(MEMORY_FRACTION * 22.0 * GIB, 121e12, 300 * GB, 32 * GB, 8, 1, _GPUS),
    "a100": Chip(MEMORY_FRACTION * 79.1 * GIB, 312e12, 2039 * GB, 300 * GB, 8, 1, _GPUS),
    "h100": Chip(MEMORY_FRACTION * 79.1 * GIB, 989e12, 3350 * GB, 450 * GB, 8, 1, _GPUS),
    "h200": Chip(MEMORY_FRACTION * 139.8 * GIB, 989e12, 4800 * GB, 450 * GB, 8, 1, _GPUS),
    "b200": Chip(MEMORY_FRACTION * 178 * GIB, 2250e12, 8000 * GB, 900 * GB, 8, 1, _GPUS),
}


# Start of JAX's device_kind -> FLOPs per second of a chip. A longer start comes first.
_FLOPS_OF_KIND = {
    "NVIDIA H100": GPUS["h100"].flops,
    "NVIDIA H200": GPUS["h200"].flops,
    "TPU v4": 275e12,
    "TPU v5 lite": TPUS["v5e"].flops,
    "TPU v5": TPUS["v5p"].flops,
    "TPU v6": TPUS["v6e"].flops,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs per second, by JAX's device_kind; None for an unknown device."""
    for start, flops in _FLOPS_OF_KIND.items():
        if device_kind.startswith(start):
            return flops
    return None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips of one kind. A chip has one JAX device; tpu7x has two."""

    name: str  # as in --topology
    chip: Chip
    chips: int
    kind: str  # key of TPUS or of GPUS

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return -(-self.chips // self.chip.per_host)

    @property
    def per_host(self) -> int:
        """JAX devices of a host."""
        return min(self.chips, self.chip.per_host) * self.chip.devices

    @property
    def device(self) -> Chip:
        """The share of one JAX device in its chip."""
        chip = self.chip
        n = chip.devices
        return dataclasses.replace(
            chip,
            hbm=chip.hbm / n,
            flops=chip.flops / n,
            bandwidth=chip.bandwidth / n,
            link=chip.link / n,
        )


def parse_topology(text: str) -> Slice:
    """`v5p:2x2x2`, or `gpu:h100x8` (GPUs have no shape). Raises InputError."""
    kind, _, shape = text.partition(":")
    is_gpu = kind == "gpu"
    if is_gpu:
        kind, _, shape = shape.rpartition("x")
    chip = (GPUS if is_gpu else TPUS).get(kind)
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    if chip is None or not all(sizes):
        known = [f"{tpu}:{chip.slices[1]}" for tpu, chip in TPUS.items()]
        known += [f"gpu:{gpu}x8" for gpu in GPUS]
        raise InputError(
            f"--topology={text}: expected chips and their number, such as {', '.join(known)}"
        )
    example = chip.slices[1]
    if len(sizes) != len(example.split("x")):
        raise InputError(f"--topology={text}: expected a shape such as {example}")
    return Slice(text, chip, math.prod(sizes), kind)


def slices_of(kind: str) -> list[Slice]:
    """All slices of one TPU generation, or numbers of one GPU, that can be had, smallest first."""
    if kind in GPUS:
        return [parse_topology(f"gpu:{kind}x{number}") for number in GPUS[kind].slices]
    return [parse_topology(f"{kind}:{shape}") for shape in TPUS[kind].slices]
