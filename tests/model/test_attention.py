"""Attention: what a query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.errors import InputError
from ssp_jax.learner import flash, kernel_check
from ssp_jax.model import attention, decoder, sharding

B, T, N, K, H = 2, 6, 4, 2, 8


def random_qkv(B=B, T=T, H=H):
    rng = np.random.default_rng(0)
    shapes = [(B, T, heads, H) for heads in (N, K, K)]
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)


# eager, each of their operations would be compiled by itself
packed = jax.jit(attention.packed)
plain = jax.jit(jax.nn.dot_product_attention, static_argnames="is_causal")
partial_softmax = jax.jit(attention.partial_softmax)


def test_packed_equals_plain_attention_per_segment():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    got = np.asarray(packed(q, k, v, segments))
    for b, begin, end in ((0, 0, 2), (0, 2, 5), (1, 0, 6)):
        alone = [np.asarray(x)[b : b + 1, begin:end] for x in (q, k, v)]
        expected = plain(*alone, is_causal=True)
        np.testing.assert_allclose(got[b, begin:end], expected[0], atol=1e-5)


def test_blocks_change_neither_values_nor_gradients(monkeypatch):
    """Against softmax over all scores at once; the last block is a short one."""
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    cotangent = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def all_at_once(q, k, v):
        mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(T, dtype=bool)[None]
        return (cotangent * plain(q, k, v, mask=mask[:, None])).sum()

    def in_blocks(q, k, v):
        return (cotangent * attention.packed(q, k, v, segments)).sum()

    def with_gradients(loss):
        # a function of its own each time: JAX must trace each size of blocks
        return jax.jit(jax.value_and_grad(lambda *qkv: loss(*qkv), argnums=(0, 1, 2)))(q, k, v)

    expected = with_gradients(all_at_once)
    for size in (4, 128):
        monkeypatch.setattr(attention, "_MIN_BLOCK", size)
        assert len(attention.spans(T)) == (2 if size == 4 else 1)
        got = with_gradients(in_blocks)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected
        )


def test_a_long_row_never_has_all_its_scores_at_once():
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.bfloat16) for _ in range(3))
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    grad = jax.grad(
        lambda q, k, v, s: attention.packed(q, k, v, s).astype(jnp.float32).sum(), argnums=(0, 1, 2)
    )
    text = jax.jit(grad).lower(q, k, v, segments).as_text()
    assert "x256x4096xf32>" in text and "4096x4096" not in text


def test_packed_has_no_gradient_across_segments_or_from_the_future():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 1, 2, 2, 2]] * B)
    grad = jax.jit(jax.grad(lambda v: packed(q, k, v, segments)[:, 4].sum()))(v)
    grad = np.asarray(grad)
    assert not grad[:, [0, 1, 2, 5]].any()
    assert grad[:, [3, 4]].any()


def test_kernels_are_for_tpus_and_newer_gpus_and_can_be_declined():
    assert attention.select_kernel("auto", "tpu") == "splash"
    assert attention.select_kernel("auto", "gpu", (8, 0)) == "flash"
    turing, hopper = (7, 5), (9, 0)
    others = (
        ("auto", "cpu"),
        ("auto", "gpu"),  # AMD's
        ("auto", "gpu", turing),
        ("xla", "tpu"),
        ("xla", "gpu", hopper),
    )
    assert {attention.select_kernel(*x) for x in others} == {"xla"}


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (("flash", "cpu"), "expected auto or xla"),
        (("flash", "gpu", (7, 5)), "expected auto or xla"),
        (("flash", "tpu"), "expected auto, splash or xla"),
        (("splash", "gpu", (9, 0)), "expected auto, flash or xla"),
    ],
)
def test_a_kernel_that_the_devices_lack_is_refused(devices, expected):
    with pytest.raises(InputError, match=expected):
        attention.select_kernel(*devices)


def both(attend):
    """Outputs, and the gradients of something that weighs each of them differently."""

    @jax.jit
    def run(q, k, v, segments):
        o, back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return o, back(jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape))

    return run


@pytest.mark.ci
def test_splash_equals_packed(monkeypatch):
    """Two blocks, several segments, rows that must be padded, a row of padding alone."""
    monkeypatch.setattr(attention, "_SPLASH_KEYS", 256)
    T = 300
    q, k, v = random_qkv(3, T, 64)
    ends = jnp.array([[T // 5, T // 2, T - 9], [T, T, T], [0, 0, 0]])
    segments = (jnp.arange(T)[None, :, None] < ends[:, None]).sum(-1)
    interpreted = functools.partial(attention.splash, interpret=True)
    got = both(interpreted)(q, k, v, segments)
    expected = both(attention.packed)(q, k, v, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


def test_flash_equals_packed_on_each_shard():
    """Five tiles, several segments, rows and heads that are padded, a row of padding alone."""
    T = 150
    q, k, v = random_qkv(4, T, 24)
    ends = jnp.array([[T // 5, T // 2, T - 9], [T, T, T], [0, 0, 0], [1, 64, 128]])
    segments = (jnp.arange(T)[None, :, None] < ends[:, None]).sum(-1)
    rows = sharding.rows_sharding(sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}))
    interpreted = functools.partial(flash.attend, interpret=True)
    got = both(sharding.shard_map_rows_and_heads(interpreted, rows))(q, k, v, segments)
    expected = both(attention.packed)(q, k, v, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


def test_the_check_of_a_kernel_passes_one_that_is_right():
    interpreted = functools.partial(flash.attend, interpret=True)
    kernel_check.check_kernel("flash", interpreted, (2, 1, 16), jnp.bfloat16)


def across_segments(q, k, v, segments):
    return attention.packed(q, k, v, jnp.minimum(segments, 1))


def of_other_heads(q, k, v, segments):
    return attention.packed(q, k[:, :, ::-1], v[:, :, ::-1], segments)


def without_a_gradient(q, k, v, segments):
    return attention.packed(q, jax.lax.stop_gradient(k), v, segments)


def without_a_number(q, k, v, segments):
    return jnp.nan * attention.packed(q, k, v, segments)


@pytest.mark.parametrize(
    ("kernel", "array"),
    [
        (across_segments, "o"),
        (of_other_heads, "o"),
        (without_a_gradient, "dk"),
        (without_a_number, "o"),
    ],
)
def test_the_check_of_a_kernel_refuses_one_that_is_wrong(kernel, array):
    with pytest.raises(InputError, match=f"its {array} differs .* model.attention=xla"):
        kernel_check.check_kernel("some", kernel, (4, 2, 8), jnp.float32)


def test_the_check_of_a_kernel_refuses_one_that_does_not_run():
    def fails(q, k, v, segments):
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Triton is for Ampere\nand more")

    with pytest.raises(InputError, match=r"does not run .* \(FAILED_PRECONDITION: .*Ampere\)"):
        kernel_check.check_kernel("some", fails, (4, 2, 8), jnp.float32)


@pytest.mark.parametrize(
    ("remat", "kernels"), [("full", 3), ("attention", 2), ("dots", 2), ("none", 2)]
)
def test_what_remat_keeps_of_splash_is_not_computed_again(remat, kernels):
    """One kernel forward, one backward; only where nothing is kept another forward."""
    rows = sharding.rows_sharding(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    splash = sharding.shard_map_rows_and_heads(attention.splash, rows)
    segments = jnp.ones((B, T), jnp.int32)
    layer = jax.checkpoint(
        lambda q, k, v: splash(q, k, v, segments).sum(), policy=decoder.REMAT[remat]
    )
    grads = jax.jit(jax.value_and_grad(lambda *qkv: layer(*map(jnp.sin, qkv)), argnums=(0, 1, 2)))
    for_tpu = grads.trace(*random_qkv()).lower(lowering_platforms=("tpu",)).as_text()
    assert for_tpu.count("tpu_custom_call") == kernels


def test_parts_put_together_equal_attention_to_all_keys():
    """Keys in three places, in any order; one out of sight for some queries, one for all."""
    q, k, v = random_qkv()
    k_BKHS = np.moveaxis(np.asarray(k), 1, 3)
    v_BKSH = np.moveaxis(np.asarray(v), 1, 2)
    seen = np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))
    pieces = [slice(4, 6), slice(0, 1), slice(1, 4)]
    parts = [partial_softmax(q, k_BKHS[..., p], v_BKSH[:, :, p], seen[:, :, p]) for p in pieces]
    parts.append(partial_softmax(q, 9 * k_BKHS, 9 * v_BKSH, np.zeros_like(seen)))
    got = jax.jit(attention.combine)(parts)
    expected = packed(q, k, v, np.ones((B, T), np.int32))
    np.testing.assert_allclose(got, expected, atol=1e-5)
