"""Check 1: which device this is, what it lets a program have, and its two ceilings."""

import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import generate
from benchmarks.proof.rows import Row, Setting, at_least, near, noted, skipped
from ssp_jax.plan import hardware
from ssp_jax.runtime import platform

COPY_SHARE = 0.8  # of the published bandwidth, that a copy must reach
GEMM_SHARE = 0.7  # of the published rate, that a large matrix product must reach


def check(setting: Setting) -> Iterator[Row]:
    devices = jax.devices()
    kind = devices[0].device_kind
    version = devices[0].client.platform_version.splitlines()[0]
    yield noted("device", f"{len(devices)} x {kind}; {version}; jax {jax.__version__}")
    yield memory_limit()
    # XLA ends a process at a flag that it does not know: this one lives.
    yield noted("flags accepted", os.environ.get("XLA_FLAGS", "none are set"))
    yield noted("page-locked memory, GB", os.environ.get(platform.HOST_MEMORY, "not set"))

    chip = published(kind)
    copied = ("copy, GB/s read and written", copy_rate(setting) / 1e9)
    rate = gemm_rate(512 if setting.small else 8192) / 1e12
    multiplied = ("bfloat16 matrix product, TFLOP/s", rate)
    if chip is None:
        yield from (noted(name, f"{value:.3g}") for name, value in (copied, multiplied))
        return
    yield at_least(*copied, COPY_SHARE * chip.bandwidth / 1e9)
    yield at_least(*multiplied, GEMM_SHARE * chip.flops / 1e12)


def copy_rate(setting: Setting) -> float:
    """Bytes a second that a pass over 4 GiB reads and writes, on a CPU over 64 MiB.

    So long that the dispatch of it, some 50 microseconds, does not count.
    """
    return generate.measure_bandwidth(1 << (24 if setting.small else 30))


def published(kind: str) -> hardware.Chip | None:
    """The published figures of a GPU, by JAX's device_kind; None for another device."""
    words = re.split(r"[^a-z0-9]+", kind.lower())
    found = [chip for name, chip in hardware.GPUS.items() if name in words]
    return found[0] if found else None


def memory_limit() -> Row:
    """The share of the device's memory that JAX may take."""
    name = "memory that a program may take, GiB"
    stats = jax.devices()[0].memory_stats()
    total = gpu_bytes()
    if not stats or total is None:
        return skipped(name, "this device does not say")
    fraction = float(os.environ.get("XLA_CLIENT_MEM_FRACTION", platform.MEMORY_FRACTION))
    return near(name, stats["bytes_limit"] / 2**30, fraction * total / 2**30, 0.02)


def gpu_bytes() -> int | None:
    """Memory of the first GPU, from NVIDIA's own tool; None where that is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    first = done.stdout.split("\n")[0].strip()
    return int(first) << 20 if first.isdecimal() else None


def gemm_rate(size: int, repeats: int = 10) -> float:
    """FLOPs a second of a product of two random square matrices in bfloat16, median."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds)
