"""The kernels of decoding, interpreted: what XLA computes, from nothing beyond a slot's length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.model import decoder, sharding
from ssp_jax.rollout import decode_kernel, decode_triton, kv_cache, sampler
from ssp_jax.rollout.engine import Engine, Sizes, attend_by
from ssp_jax.rollout.stops import build_automaton

pytestmark = pytest.mark.usefixtures("quick_compile")
KERNELS = ("flash", "splash")
ROWS = np.array([[5, 5, 5, 2, 0, 1], [3, 3, 3, 3, 3, 2]], np.int32)  # 5 and 3: none
LAYOUTS = {
    "flash": kv_cache.Layout((32, 96, 224), (6, 5, 3)),
    "splash": kv_cache.Layout((512, 1536, 2560), (6, 5, 3)),  # tiles of two blocks
}
# Slots of no token, of one, up to the end of a piece and over it, and of all that fit.
LENGTHS = {
    kernel: np.array([0, 1, ends[0], ends[0] + 1, ends[1], ends[2]], np.int32)
    for kernel, ends in ((kernel, layout.ends) for kernel, layout in LAYOUTS.items())
}


def arrays(kernel, dtype, N=6, K=2, H=16):
    """Queries, keys and values."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    layout = LAYOUTS[kernel]
    pieces = list(zip(layout.rows, layout.lengths, strict=True))
    k = tuple(draw(n, K, H, S) for n, S in pieces)
    v = tuple(draw(n, K, S, H) for n, S in pieces)
    return draw(layout.rows[0], 1, N, H), kv_cache.KVCache(k, v)


@functools.partial(jax.jit, static_argnames="kernel")
def by_kernel(kernel, q, cache):
    view = kv_cache.View(LAYOUTS[kernel], jnp.asarray(ROWS), 3)
    length_B = jnp.asarray(LENGTHS[kernel])
    return view.attend_to_lengths(q, cache, length_B, kernel=kernel, mesh=None)


@functools.partial(jax.jit, static_argnames="kernel")
def by_xla(kernel, q, cache):
    view = kv_cache.View(LAYOUTS[kernel], jnp.asarray(ROWS), 3)
    return view.attend_all(q, cache, jnp.asarray(LENGTHS[kernel]))


def whole(parts):
    """o and the log-sum-exp of all parts together; of the first slot, without tokens, zeros."""
    maximum = np.max([part.max_BTN for part in parts], axis=0)
    scales = [np.exp(part.max_BTN - maximum) for part in parts]
    pairs = list(zip(parts, scales, strict=True))
    total = np.sum([part.sum_BTN * scale for part, scale in pairs], axis=0)
    o = np.sum([part.o_BTNH * scale[..., None] for part, scale in pairs], axis=0)
    has_tokens = (np.arange(len(total)) > 0)[:, None, None]
    log_sum = np.where(has_tokens, maximum + np.log(np.maximum(total, 1e-30)), 0)
    return np.where(has_tokens[..., None], o / np.maximum(total, 1e-30)[..., None], 0), log_sum


@pytest.mark.parametrize(
    ("kernel", "dtype", "heads", "error"),
    [
        ("flash", jnp.float32, (6, 2, 16), 1e-6),
        ("flash", jnp.float32, (2, 2, 32), 1e-6),
        ("flash", jnp.bfloat16, (6, 2, 16), 5e-3),
        ("splash", jnp.float32, (6, 2, 16), 1e-6),
        ("splash", jnp.float32, (2, 2, 128), 1e-6),
        ("splash", jnp.bfloat16, (6, 2, 16), 5e-3),
    ],
)
def test_it_computes_what_xla_does(kernel, dtype, heads, error):
    case = arrays(kernel, dtype, *heads)
    pairs = zip(whole(by_kernel(kernel, *case)), whole(by_xla(kernel, *case)), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=error * np.abs(expected).max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_slot_without_tokens_adds_nothing(kernel):
    for part in by_kernel(kernel, *arrays(kernel, jnp.float32)):
        assert (np.asarray(part.o_BTNH[0]) == 0).all()
        assert (np.asarray(part.sum_BTN[0]) == 0).all()
        assert (np.asarray(part.max_BTN[0]) < -1e29).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_reads_only_blocks_that_hold_tokens_of_the_slot(kernel):
    """All others are not numbers, and so would be what they touch."""
    q, cache = arrays(kernel, jnp.float32)
    layout = LAYOUTS[kernel]
    block = decode_kernel.keys_read_together(kernel, 2, 16, jnp.float32, layout.lengths)
    rows = np.concatenate([np.arange(6)[None], ROWS])
    is_read = [np.zeros((n, S), bool) for n, S in zip(layout.rows, layout.lengths, strict=True)]
    for slot, length in enumerate(LENGTHS[kernel]):
        for piece, start in enumerate(layout.starts):
            end = -(-(length - start) // block) * block
            if end > 0:
                is_read[piece][rows[piece, slot], :end] = True
    poisoned = kv_cache.KVCache(
        tuple(
            jnp.where(x[:, None, None], k, jnp.nan) for x, k in zip(is_read, cache.k, strict=True)
        ),
        tuple(
            jnp.where(x[:, None, :, None], v, jnp.nan)
            for x, v in zip(is_read, cache.v, strict=True)
        ),
    )
    assert np.mean([x.mean() for x in is_read]) < 0.6
    found, expected = by_kernel(kernel, q, poisoned), by_kernel(kernel, q, cache)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


CONFIG = decoder.ModelConfig(64, 1, 32, 4, 2, 16, 48)
SIZES = Sizes(
    slots=4,
    chunk=4,
    cache_tokens=384,
    cache_buckets=(128,),
    extend_buckets=(16, 64),
    extend_rows=4,
    row_shares=(0.25, 0.5),
)


@pytest.mark.ci
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chunk_samples_the_same_tokens_with_heads_and_slots_split_over_devices(kernel):
    """One slot of four does not run."""
    axes = dict(zip(sharding.AXES, (2, 1, 2), strict=True))
    mesh = sharding.make_mesh(axes, jax.devices()[:4])
    layout = kv_cache.full_layout(SIZES.cache_ends(), 4, shards=2)
    rng = np.random.default_rng(0)
    state = sampler.init_state(CONFIG, layout, jnp.float32)
    state = dataclasses.replace(
        state,
        caches=jax.tree.map(
            lambda x: np.asarray(rng.standard_normal(x.shape), np.float32), state.caches
        ),
        length_B=np.array([0, 5, 140, 360], np.int32),
        limit_B=np.full(4, 400, np.int32),
        stop_B=np.array([-1, -1, -1, sampler.EOS], np.int32),
        uid_B=np.arange(4, dtype=np.int32),
        temperature_B=np.ones(4, np.float32),
    )
    shardings = sharding.state_shardings(state, mesh)
    params = decoder.unstack(decoder.init_params(CONFIG, jax.random.key(0)), jnp.float32)
    params = jax.device_put(params, sharding.param_shardings(params, mesh, drop=("fsdp",)))
    rows_JB = np.array([[2, 2, 1, 2]], np.int32)
    room_B = np.full(4, 384, np.int32)
    stops = sampler.Stops(jnp.zeros((1, 64), jnp.int8), jnp.full((1,), -1))
    options = dict(config=CONFIG, eos=(64,), steps=4, depth=2, dtype=jnp.float32)
    ways = {"xla": None, kernel: sampler.kernel_mesh(shardings)}
    chunks = {}
    for way, own in ways.items():
        arrays = (params, jax.device_put(state, shardings), rows_JB, room_B, stops)
        _, chunk = sampler.decode_chunk(
            *arrays, jax.random.key(1), shardings=shardings, attend_by=way, mesh=own, **options
        )
        chunks[way] = jax.device_get(chunk)
    np.testing.assert_array_equal(chunks[kernel].count_B, [4, 4, 4, 0])
    running = np.s_[:, :3]
    same = [(chunk.tokens_CB[running], chunk.logprobs_CB[running]) for chunk in chunks.values()]
    np.testing.assert_array_equal(same[0][0], same[1][0])
    np.testing.assert_allclose(same[0][1], same[1][1], atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_engine_compiles_one_chunk_for_it(kernel):
    automaton = build_automaton(["</s>"], [b"a"] * 64, 64)
    params = decoder.unstack(decoder.init_params(CONFIG, jax.random.key(0)), jnp.float32)
    chunks = {}
    for way in ("xla", kernel):
        one = Engine(CONFIG, SIZES, [automaton], (1,), jnp.float32, list, attention=way)
        device = one.abstract_device(params, jax.random.key(1))
        calls = list(device.empty_calls([16]))
        chunks[way] = [call.options for call in calls if call.program is sampler.decode_chunk]
    assert len(chunks["xla"]) == 4  # the first piece whole, and a quarter, half and all of the next
    (only,) = chunks[kernel]
    assert only["attend_by"] == kernel and only["depth"] == 2


@pytest.mark.parametrize(
    ("chosen", "head_dim", "pieces", "found"),
    [
        ("flash", 64, (1024, 4096), "flash"),
        ("flash", 64, (1024, 4100), "xla"),
        ("flash", 80, (1024, 4096), "xla"),
        ("flash", 8, (1024, 4096), "xla"),
        ("splash", 64, (1024, 4096), "splash"),
        ("splash", 80, (1024, 2048), "splash"),
        ("splash", 64, (1024, 4100), "xla"),
        ("splash", 72, (1024, 4096), "xla"),
        ("xla", 64, (1024, 4096), "xla"),
    ],
)
def test_it_is_for_sizes_that_its_compiler_has(chosen, head_dim, pieces, found):
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    sizes = dataclasses.replace(SIZES, cache_tokens=12288, cache_buckets=pieces)
    assert attend_by(chosen, config, sizes, jnp.bfloat16) == found


@pytest.mark.parametrize(("slots", "heads", "number"), [(32, 4, 8), (96, 2, 4), (1, 1, 16)])
def test_few_slots_are_split_more(slots, heads, number):
    assert decode_triton.splits(slots, heads) == number


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_check_passes_it(kernel):
    decode_kernel.check(kernel, (6, 2, 16), jnp.bfloat16)
