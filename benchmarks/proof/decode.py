"""Check 5: a decode step of Qwen2.5-0.5B at each depth of the cache, and its memory."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.proof import device
from benchmarks.proof.rows import Row, Setting, bound, near, noted, skipped
from benchmarks.proof.shapes import Case, qwen_0p5b
from ssp_jax.model import attention, decoder, sharding
from ssp_jax.plan import memory
from ssp_jax.rollout import decode_kernel, kv_cache, sampler
from ssp_jax.rollout.engine import attend_by
from ssp_jax.rollout.scheduler import RowAllocator
from ssp_jax.rollout.stops import NO_STOP
from ssp_jax.runtime import device_memory
from ssp_jax.runtime.device_memory import GIB

KERNEL_TOKENS = 1500  # of a slot, about the mean of a step of the paper's lengths
CHUNKS = 5  # timed at each depth, after one that is not
BANDWIDTH_SHARE = 0.4  # of what a copy reaches: a step may take 2.5 times its bytes' time
MEMORY_SHARE = 0.1  # by which the peak may differ from the plan


def check(setting: Setting) -> Iterator[Row]:
    case = qwen_0p5b(setting)
    bandwidth = device.copy_rate(setting)
    depths = range(1, len(case.sizes.cache_ends()) + 1)
    slots = Slots(case)
    start = time.perf_counter()
    slots.compile(depths)
    yield noted("seconds of compiling the decode programs", f"{time.perf_counter() - start:.1f}")
    for depth in depths:
        yield from speed(setting, slots, depth, bandwidth)
    yield from by_kernel(setting, slots, bandwidth)
    yield peak_against_plan(slots)
    planned = memory.temporaries(case.target(), 0.0)["decode"]
    found = device_memory.program_bytes(slots.programs[depths[-1]])
    sizes = f"{found / GIB:.3f}, the planner estimates {planned / GIB:.3f}"
    yield noted("temporaries of a decode chunk, GiB", sizes)


def speed(setting: Setting, slots: "Slots", depth: int, bandwidth: float) -> Iterator[Row]:
    seconds = slots.step_seconds(depth)
    size = slots.step_bytes(depth)
    name = f"decode of {slots.case.sizes.slots} slots, depth {depth}"
    yield from against_bandwidth(setting, slots.case, name, seconds, size, bandwidth)


def by_kernel(setting: Setting, slots: "Slots", bandwidth: float) -> Iterator[Row]:
    """What a run decodes by where there is a kernel: right, and as fast as its bytes."""
    case = slots.case
    name = f"decode of {case.sizes.slots} slots of {KERNEL_TOKENS} tokens, by the kernel"
    gpu = attention.capability(jax.devices()[0])
    chosen = attention.select_kernel("auto", jax.default_backend(), gpu)
    if attend_by(chosen, case.model, case.sizes, case.dtype) == "xla":
        yield skipped(name, "this device has none")
        return
    m = case.model
    decode_kernel.check(chosen, (m.num_heads, m.num_kv_heads, m.head_dim), case.dtype)
    depth = len(case.sizes.cache_ends())
    slots.compile([depth], attend_by=chosen)
    slots.fill(KERNEL_TOKENS)
    seconds = slots.step_seconds(depth)
    used = case.sizes.slots * KERNEL_TOKENS * kv_cache.token_bytes(m, case.dtype)
    size = slots.weight_bytes + used
    yield from against_bandwidth(setting, case, name, seconds, size, bandwidth)


def against_bandwidth(
    setting: Setting, case: Case, name: str, seconds: float, size: int, bandwidth: float
) -> Iterator[Row]:
    """seconds: of a step that reads `size` bytes. bandwidth: of a copy, bytes a second."""
    number = case.sizes.slots
    rate = f"{1e3 * seconds:.3f} ms, {number / seconds:,.0f} tokens/s"
    yield noted(f"{name}: a step", f"{rate}, {size / 1e9:.3g} GB of weights, keys and values")
    share = 100 * size / bandwidth / seconds
    yield bound(setting, f"{name}: share of a copy's bandwidth", share, 100 * BANDWIDTH_SHARE, " %")


@dataclass
class Slots:
    """Slots that all run, with random weights, keys and values, and the programs over them."""

    case: Case

    def __post_init__(self) -> None:
        case = self.case
        layout = kv_cache.full_layout(case.sizes.cache_ends(), case.sizes.slots)
        memory_of_slots = RowAllocator(layout)
        for slot in range(case.sizes.slots):
            memory_of_slots.grow(slot, layout.ends[-1])
        self._rows_JB = memory_of_slots.rows_JB
        self._room_B = memory_of_slots.room_B
        self._params = random_params(case)
        self._state = random_state(case, layout)
        vocab = case.model.vocab_size
        # Nothing ends a turn.
        self._stops = sampler.Stops(jnp.zeros((1, vocab), jnp.int8), jnp.full((1,), NO_STOP))
        self._key = jax.random.key(2)
        self.programs: dict[int, Any] = {}  # by depth

    def _arrays(self) -> tuple[Any, ...]:
        return (self._params, self._state, self._rows_JB, self._room_B, self._stops, self._key)

    def fill(self, tokens: int) -> None:
        """So many tokens in each slot."""
        length_B = jnp.full_like(self._state.length_B, tokens)
        self._state = dataclasses.replace(self._state, length_B=length_B)

    def compile(self, depths: Sequence[int], attend_by: str = "xla") -> None:
        """Compiles the chunks of these depths side by side."""
        options = {
            "config": self.case.model,
            "eos": (self.case.model.vocab_size,),  # none
            "steps": self.case.sizes.chunk,
            "dtype": self.case.dtype,
            "attend_by": attend_by,
        }
        lowered = [
            sampler.decode_chunk.lower(*self._arrays(), depth=depth, **options) for depth in depths
        ]
        with ThreadPoolExecutor() as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
        self.programs = dict(zip(depths, compiled, strict=True))

    def chunk(self, depth: int) -> None:
        """Decodes a chunk, and returns when it is done."""
        self._state, chunk = self.programs[depth](*self._arrays())
        tokens = int(np.asarray(chunk.count_B).sum())
        expected = self.case.sizes.slots * self.case.sizes.chunk
        assert tokens == expected, f"{tokens} tokens, expected {expected}"

    def step_seconds(self, depth: int) -> float:
        """Of one step, median over chunks."""
        self.chunk(depth)
        seconds = []
        for _ in range(CHUNKS):
            start = time.perf_counter()
            self.chunk(depth)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) / self.case.sizes.chunk

    @property
    def weight_bytes(self) -> int:
        """Of the weights that a step reads: of an embedding that is not the head, a row."""
        params = self._params
        read = {key: params[key] for key in params if key != "embed" or "head" not in params}
        return sum(x.nbytes for x in jax.tree.leaves(read))

    @property
    def head_bytes(self) -> int:
        """Of the part of them that is there whatever the number of layers."""
        return self.weight_bytes - sum(x.nbytes for x in jax.tree.leaves(self._params["layers"]))

    def step_bytes(self, depth: int) -> int:
        """Weights, and keys and values of all pieces up to the depth, whatever of them is used."""
        token = kv_cache.token_bytes(self.case.model, self.case.dtype)
        sizes = self.case.sizes
        return self.weight_bytes + sizes.slots * sizes.cache_ends()[depth - 1] * token


def random_params(case: Case) -> decoder.Params:
    """As the sampler has them."""
    init = jax.jit(decoder.init_params, static_argnums=0)
    copy = sharding.sampler_copy(case.model, case.mesh, case.dtype)
    return copy(init(case.model, jax.random.key(0)))


def random_state(case: Case, layout: kv_cache.Layout) -> sampler.SamplerState:
    """All slots in the middle of a turn that none of them ends."""

    def fill(x: jax.Array) -> jax.Array:
        # One row of random numbers in all rows: zeros would be faster than what a run has.
        row = jax.random.normal(jax.random.key(1), (1, *x.shape[1:]), x.dtype)
        return jnp.broadcast_to(row, x.shape)

    @jax.jit
    def make() -> sampler.SamplerState:
        state = sampler.init_state(case.model, layout, case.dtype)
        slots = state.uid_B.shape
        return dataclasses.replace(
            state,
            caches=jax.tree.map(fill, state.caches),
            length_B=jnp.full(slots, case.sizes.chunk, jnp.int32),
            limit_B=jnp.full(slots, 1 << 30, jnp.int32),
            stop_B=jnp.full(slots, sampler.RUNNING, jnp.int32),
            uid_B=jnp.arange(layout.rows[0], dtype=jnp.int32),
            temperature_B=jnp.ones(slots),
        )

    return make()


def peak_against_plan(slots: Slots) -> Row:
    return against_plan("peak while decoding, GiB", planned_bytes(slots.case), MEMORY_SHARE)


def planned_bytes(case: Case) -> float:
    """What is in memory here: the sampler's copy, keys and values, and a chunk's temporaries."""
    target = case.target()
    kept = memory.persistent_bytes(target)
    temporary = memory.temporaries(target, kept["parameters"])["decode"]
    return kept["sampler copy"] + kept["key/value cache"] + temporary


def against_plan(name: str, planned: float, share: float) -> Row:
    """The peak of this process beside the planner's estimate, in bytes."""
    name = f"{name}, against the planner's estimate"
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return skipped(name, f"this device does not say; planned are {planned / GIB:.3g}")
    return near(name, stats["peak_bytes_in_use"] / GIB, planned / GIB, share)
