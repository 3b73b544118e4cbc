"""Check 7: some layers of Qwen2.5-7B, decoded and trained, and what that says of all layers."""

import dataclasses
from collections.abc import Iterator

from benchmarks.proof import decode, device, gradient
from benchmarks.proof.rows import Row, Setting, noted
from benchmarks.proof.shapes import slice_of_7b
from ssp_jax.model import presets


def check(setting: Setting) -> Iterator[Row]:
    case = slice_of_7b(setting)
    whole = presets.architecture(case.config.model.path).num_layers
    yield from of_decode(setting, whole)
    yield from of_update(setting, whole)


def of_decode(setting: Setting, whole: int) -> Iterator[Row]:
    """The arrays of the slots are gone when this ends."""
    case = slice_of_7b(setting)
    depth = len(case.sizes.cache_ends())
    bandwidth = device.copy_rate(setting)
    slots = decode.Slots(case)
    slots.compile([depth])
    yield from decode.speed(setting, slots, depth, bandwidth)
    head = slots.head_bytes
    of_slice = slots.step_bytes(depth)
    of_all = head + (of_slice - head) * whole / case.model.num_layers
    seconds = slots.step_seconds(depth) * of_all / of_slice
    yield noted(f"a decode step of {whole} layers, scaled by bytes", f"{1e3 * seconds:.2f} ms")


def of_update(setting: Setting, whole: int) -> Iterator[Row]:
    case = slice_of_7b(setting)
    tokens = case.config.learner.row_tokens
    for kernel, key in gradient.attention.kernels().items():
        speed = gradient.measure(case, key)
        layers = case.model.num_layers
        yield noted(f"update of 1 x {tokens} tokens, {layers} layers, {kernel}", str(speed))
        shape = dataclasses.replace(gradient.shape_of(case), layers=whole)
        flops = shape.flops(tokens, tokens // gradient.EPISODES)
        seconds = speed.seconds * flops / speed.flops
        yield noted(f"the same of {whole} layers, scaled by FLOPs", f"{seconds:.2f} s")
