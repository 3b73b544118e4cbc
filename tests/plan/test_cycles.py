"""The TPU compiler's own estimates: how they are added up, and what they say of the sampler."""

import jax
import jax.numpy as jnp
import pytest

from ssp_jax.plan import compile, cycles, hardware
from ssp_jax.rollout import kv_cache
from ssp_jax.runtime import platform

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p: s32[]) -> s32[] {
  ROOT %a = s32[] add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}

%known (p: (s32[])) -> pred[] {
  %two = s32[]{:T(128)} constant(2)
  %three.1 = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %three.1), direction=LT, metadata={}
}

%unknown (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}
}

%body (p: s32[]) -> s32[] {
  %b = s32[] fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %c = s32[] add(%b, %b)
}

%outer (p: s32[]) -> s32[] {
  %d = s32[] while(%p), condition=%unknown, body=%body, metadata={}
  ROOT %e = s32[] add(%d, %d), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %f = s32[] while(%p), condition=%known, body=%outer, metadata={}
  %g = s32[] call(%f), to_apply=%body
  %h = s32[] conditional(%g, %f, %f), branch_computations={%body, %outer}, metadata={}
  %i = s32[] conditional(%g, %f, %f), true_computation=%body, false_computation=%fused
  ROOT %j = s32[] add(%h, %h), backend_config={"estimated_cycles":"5"}
}
"""


@pytest.mark.parametrize("turns", [0.5, 4])
def test_loops_count_as_often_as_they_turn_and_of_branches_the_longer(turns: float) -> None:
    outer = 10 * turns + 7
    expected = 3 * outer + 10 + max(10, outer) + 1000000 + 5
    assert cycles.estimated_cycles(TEXT, turns) == expected


@pytest.mark.ci
@pytest.mark.skipif(
    not platform.tpu_installed(), reason="libtpu is not installed: pip install '.[plan]'"
)
def test_on_tpu_a_chunk_is_written_in_a_tenth_of_the_time_that_its_steps_read() -> None:
    """A shard of a 7B on four chips: 64 slots, a head of keys; four layers, one is much the same.

    The steps take longer than to read keys and values at the memory's peak.
    """
    slice_ = hardware.parse_topology("v6e:2x2")
    place = jax.sharding.SingleDeviceSharding(compile.make_devices(slice_)[0])
    layout = kv_cache.full_layout((1024, 4096, 12288), 64)
    B, C, H, layers = 64, 16, 128, 4

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    k = tuple(array(B, 1, H, S) for S in layout.lengths)
    v = tuple(array(B, 1, S, H) for S in layout.lengths)
    caches = [kv_cache.KVCache(k, v)] * layers
    new = [(array(B, 1, H, C), array(B, 1, C, H))] * layers

    def write(
        caches: list[kv_cache.KVCache],
        new: list[tuple[jax.Array, jax.Array]],
        rows_JB: jax.Array,
        length_B: jax.Array,
        count_B: jax.Array,
    ) -> tuple[kv_cache.KVCache, ...]:
        view = kv_cache.View(layout, rows_JB, 3)
        return view.write(caches, new, jnp.arange(B), length_B, count_B)

    rows = array(2, B, dtype="int32")
    slots = array(B, dtype="int32")
    program = jax.jit(write, donate_argnums=0).lower(caches, new, rows, slots, slots).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**22  # a piece has 2**24 bytes or more

    # Each slot writes into one of the pieces.
    written = cycles.estimated_cycles(program.as_text(), turns=B / len(layout.ends))
    read = C * layers * 2 * layout.tokens * H * 2 / slice_.device.bandwidth
    assert written / (1e9 * slice_.chip.clock) < 0.1 * read
