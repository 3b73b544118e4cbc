"""Published numbers of chips and slices, for planning without the hardware."""

import dataclasses
import math

from ssp_jax.errors import InputError
from ssp_jax.runtime.device_memory import RESERVE
from ssp_jax.runtime.platform import MEMORY_FRACTION

GIB = 2**30
MIB = 2**20
GB = 10**9
CPU = "cpu"  # kind of a slice, and platform


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler for a GPU asks of it, beside memory and bandwidth."""

    memory: float  # bytes that CUDA reports
    capability: tuple[int, int]  # compute capability: major and minor
    processors: int  # streaming multiprocessors
    clock: float  # GHz, boost
    l2: int  # bytes

    @property
    def has_bfloat16(self) -> bool:
        """Whether its matrix units multiply bfloat16; where not, XLA computes in float32."""
        return self.capability >= (8, 0)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip."""

    hbm: float  # bytes that a program may use
    flops: float  # per second, dense bfloat16
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s that leave a chip over ICI, NVLink or PCIe, in one direction
    per_host: int  # chips
    devices: int  # JAX devices per chip
    slices: tuple[str, ...]  # that can be had, smallest first
    alone: int = 0  # chips of the largest host that is a slice of its own, if not per_host
    gpu: Gpu | None = None
    clock: float = 0.0  # GHz, of a TPU's cores

    @property
    def usable(self) -> float:
        """Bytes for a plan: the run's reserve is for gaps in memory and libraries' workspaces."""
        return (1 - RESERVE) * self.hbm


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128")

# cloud.google.com/tpu/docs, one page per generation; memory is the compiler's limit of a program,
# which differs a little from the published size. Clocks are not published for all: they are the
# peak over the FLOPs of a cycle, 2^17 on v5e (four units of 128 x 128), 2^18 on v5p (two cores of
# such four), 2^19 on v6e and on each core of tpu7x (the power of two above what libtpu's estimate
# of a large product comes to: 0.78 and 0.85 of it; 0.92 and 0.94 on v5e and v5p).
TPUS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819 * GB, 200 * GB, 4, 1, _2D, alone=8, clock=1.5),
    "v6e": Chip(31.25 * GIB, 918e12, 1638 * GB, 400 * GB, 4, 1, _2D, alone=8, clock=1.75),
    "v5p": Chip(95.74 * GIB, 459e12, 2765 * GB, 600 * GB, 4, 1, _3D, clock=1.75),
    "tpu7x": Chip(189.5 * GIB, 2307e12, 7380 * GB, 600 * GB, 4, 2, _3D, clock=2.2),
}


def _gpu(flops: float, bandwidth: float, link: float, gpu: Gpu) -> Chip:
    """Up to eight in a host; the run takes its share of their memory."""
    return Chip(MEMORY_FRACTION * gpu.memory, flops, bandwidth, link, 8, 1, _GPUS, gpu=gpu)


# Rates, memory and its bandwidth: NVIDIA's data sheet of each, of the SXM board where there is one.
# What CUDA reports of the memory is less than the size on the sheet. Multiprocessors, clock and
# second-level cache: NVIDIA's architecture white papers (Turing, Ampere GA100, Ada, Hopper), of the
# B200 its tuning guide for Blackwell and what the driver reports.
GPUS = {
    # Turing has no matrix units for bfloat16: the rate is that of float32.
    "t4": _gpu(8.1e12, 320 * GB, 16 * GB, Gpu(14.56 * GIB, (7, 5), 40, 1.59, 4 * MIB)),
    "l4": _gpu(121e12, 300 * GB, 32 * GB, Gpu(22.0 * GIB, (8, 9), 58, 2.04, 48 * MIB)),
    "4090": _gpu(165e12, 1008 * GB, 32 * GB, Gpu(23.5 * GIB, (8, 9), 128, 2.52, 72 * MIB)),
    "l40s": _gpu(362e12, 864 * GB, 32 * GB, Gpu(44.4 * GIB, (8, 9), 142, 2.52, 96 * MIB)),
    "a100-40": _gpu(312e12, 1555 * GB, 300 * GB, Gpu(39.4 * GIB, (8, 0), 108, 1.41, 40 * MIB)),
    "a100": _gpu(312e12, 2039 * GB, 300 * GB, Gpu(79.1 * GIB, (8, 0), 108, 1.41, 40 * MIB)),
    "h100": _gpu(989e12, 3350 * GB, 450 * GB, Gpu(79.1 * GIB, (9, 0), 132, 1.98, 50 * MIB)),
    "h200": _gpu(989e12, 4800 * GB, 450 * GB, Gpu(139.8 * GIB, (9, 0), 132, 1.98, 50 * MIB)),
    "b200": _gpu(2250e12, 8000 * GB, 900 * GB, Gpu(178 * GIB, (10, 0), 148, 1.97, 126 * MIB)),
}
_OTHER_NAMES = {"a100-80": "a100"}
# What the number of a name such as v5p-16 counts in each chip: the chip, or its TensorCores.
_COUNTED = {"v5e": 1, "v6e": 1, "v5p": 2}


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
    shape: str  # of a TPU slice; the number of GPUs
    chips_per_host: int

    @property
    def platform(self) -> str:
        """Of its devices, in JAX's words."""
        if self.kind == CPU:
            return CPU
        return "tpu" if self.chip.gpu is None else "gpu"

    @property
    def is_tpu(self) -> bool:
        return self.platform == "tpu"

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return -(-self.chips // self.chips_per_host)

    @property
    def per_host(self) -> int:
        """JAX devices of a host."""
        return min(self.chips, self.chips_per_host) * self.chip.devices

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
    """A slice by shape, a TPU slice by name, or GPUs by number. Raises InputError.

    `v5p:2x2x2`, `v6e-8` or `gpu:h100x8`. A slice that is named by its number of chips is one host
    as long as there are such hosts.
    """
    if text.startswith("gpu:"):
        kind, _, shape = text.removeprefix("gpu:").rpartition("x")
        kind = _OTHER_NAMES.get(kind, kind)
    elif ":" in text:
        kind, _, shape = text.partition(":")
    else:
        return _named_slice(text)
    chip = (GPUS if text.startswith("gpu:") else TPUS).get(kind)
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    if chip is None or not all(sizes):
        raise _unknown(text)
    example = chip.slices[1]
    if len(sizes) != len(example.split("x")):
        raise InputError(f"--topology={text}: expected a shape such as {example}")
    chips = math.prod(sizes)
    if chip.gpu is not None and chips > chip.per_host and chips % chip.per_host:
        raise InputError(f"--topology={text}: expected whole hosts of {chip.per_host} GPUs")
    return Slice(text, chip, chips, kind, shape, chip.per_host)


def _named_slice(text: str) -> Slice:
    """`v6e-8`, as Cloud TPU names it."""
    kind, _, number = text.partition("-")
    chip = TPUS.get(kind)
    counted = _COUNTED.get(kind)
    if chip is None or counted is None or not number.isdecimal():
        raise _unknown(text)
    shapes = {counted * _chips(shape): shape for shape in chip.slices}
    if int(number) not in shapes:
        names = ", ".join(f"{kind}-{n}" for n in shapes)
        raise InputError(f"--topology={text}: expected one of {names}")
    shape = shapes[int(number)]
    chips = _chips(shape)
    per_host = chips if chips <= chip.alone else chip.per_host
    return Slice(text, chip, chips, kind, shape, per_host)


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _unknown(text: str) -> InputError:
    known = [f"{tpu}:{chip.slices[1]}" for tpu, chip in TPUS.items()]
    known += [f"{tpu}-{chip.alone}" for tpu, chip in TPUS.items() if chip.alone]
    known += [f"gpu:{gpu}x8" for gpu in GPUS]
    return InputError(
        f"--topology={text}: expected chips and their number, such as {', '.join(known)}"
    )


def slices_of(kind: str) -> list[Slice]:
    """All slices of one TPU generation, or numbers of one GPU, that can be had, smallest first."""
    if kind in GPUS:
        return [parse_topology(f"gpu:{kind}x{number}") for number in GPUS[kind].slices]
    chip = TPUS[kind]
    found = []
    for shape in chip.slices:
        chips = _chips(shape)
        # A host with another number of chips than hosts of larger slices have, goes by its name.
        is_named = chips <= chip.alone and chips != chip.per_host
        found.append(parse_topology(f"{kind}-{chips}" if is_named else f"{kind}:{shape}"))
    return found


def one_host(slice_: Slice) -> Slice:
    """One of the hosts of a slice of several."""
    chips = slice_.chips_per_host
    return next(host for host in slices_of(slice_.kind) if host.chips == chips)
