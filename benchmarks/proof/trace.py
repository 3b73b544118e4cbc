"""Check 9: a profiler's trace of one decode chunk: kernels of a step, and gaps between them."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.proof.decode import Slots
from benchmarks.proof.rows import Row, Setting, at_most, noted, skipped
from benchmarks.proof.shapes import qwen_0p5b

DEPTH = 1
KERNELS_OF_A_LAYER = 30.0  # at most
GPU_PLANE = "/device:GPU"
STREAM = "Stream"  # begins the names of a GPU's lines that hold kernels


def check(setting: Setting) -> Iterator[Row]:
    slots = Slots(qwen_0p5b(setting))
    slots.compile([DEPTH])  # check 5 has left it in the cache
    slots.chunk(DEPTH)
    with tempfile.TemporaryDirectory(prefix="ssp_jax_trace_") as folder:
        with jax.profiler.trace(folder):
            slots.chunk(DEPTH)
        trace = next(Path(folder).rglob("*.xplane.pb"))
        kept = setting.out / "trace.xplane.pb"
        shutil.copy(trace, kept)
    yield noted("trace", f"{kept.name}, {kept.stat().st_size / 2**20:.1f} MiB")
    yield from of_kernels(kernels(kept), slots)


def kernels(trace: Path) -> list[tuple[float, float]]:
    """Start and end, ns, of all kernels and copies of the GPUs, by start."""
    found = []
    for plane in ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith(GPU_PLANE):
            continue
        for line in plane.lines:
            if line.name.startswith(STREAM):
                found += [(event.start_ns, event.end_ns) for event in line.events]
    return sorted(found)


def of_kernels(events: list[tuple[float, float]], slots: Slots) -> Iterator[Row]:
    if not events:
        yield skipped("kernels of a decode step", "the trace has no stream of a GPU")
        return
    number = len(events) / slots.case.sizes.chunk
    layers = slots.case.model.num_layers
    yield noted("kernels of a decode step", f"{number:.0f}")
    yield at_most(
        "kernels of a layer, the rest of a step included", number / layers, KERNELS_OF_A_LAYER
    )
    busy, whole = spans(events)
    gaps = f"{1 - busy / whole:.1%} of {whole / 1e6:.2f} ms"
    yield noted("time of a chunk in which no kernel runs", gaps)


def spans(events: list[tuple[float, float]]) -> tuple[float, float]:
    """Time in which an event runs, and from the first start to the last end. events: by start."""
    busy = 0.0
    end = events[0][0]
    for start, stop in events:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - events[0][0]
