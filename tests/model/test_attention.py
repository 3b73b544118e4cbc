"""Attention: what a query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.model import attention, decoder, sharding

B, T, N, K, H = 2, 6, 4, 2, 8


def random_qkv(B=B, T=T, H=H):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, (B, T, heads, H)) for k, heads in zip(keys, (N, K, K), strict=True)
    )


def test_packed_equals_plain_attention_per_segment():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    got = attention.packed(q, k, v, segments)
    for b, places in ((0, [0, 1]), (0, [2, 3, 4]), (1, [0, 1, 2, 3, 4, 5])):
        part = (x[b : b + 1, jnp.array(places)] for x in (q, k, v))
        expected = jax.nn.dot_product_attention(*part, is_causal=True)
        np.testing.assert_allclose(got[b, jnp.array(places)], expected[0], atol=1e-5)


def test_blocks_change_neither_values_nor_gradients(monkeypatch):
    """Against softmax over all scores at once; the last block is a short one."""
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    slope = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def plain(q, k, v):
        mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(T, dtype=bool)[None]
        return (slope * jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])).sum()

    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v)
    for size in (4, 128):
        monkeypatch.setattr(attention, "_MIN_BLOCK", size)
        assert len(attention.spans(T)) == (2 if size == 4 else 1)
        got = jax.value_and_grad(
            lambda *qkv: (slope * attention.packed(*qkv, segments)).sum(), argnums=(0, 1, 2)
        )(q, k, v)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected
        )


def test_a_long_row_never_has_all_its_scores_at_once():
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.bfloat16) for _ in range(3))
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    slope = jax.grad(
        lambda q, k, v, s: attention.packed(q, k, v, s).astype(jnp.float32).sum(), argnums=(0, 1, 2)
    )
    text = jax.jit(slope).lower(q, k, v, segments).as_text()
    assert "x256x4096xf32>" in text and "4096x4096" not in text


def test_packed_has_no_gradient_across_segments_or_from_the_future():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 1, 2, 2, 2]] * B)
    slope = jax.grad(lambda v: attention.packed(q, k, v, segments)[:, 4].sum())(v)
    assert not slope[:, [0, 1, 2, 5]].any()
    assert slope[:, [3, 4]].any()


def test_the_kernel_is_for_tpus_and_can_be_declined():
    assert attention.select_kernel("auto", "tpu") == "splash"
    assert {
        attention.select_kernel(*x) for x in (("auto", "cpu"), ("auto", "gpu"), ("xla", "tpu"))
    } == {"xla"}


def both(attend):
    """Outputs, and the gradients of something that weighs each of them differently."""

    @jax.jit
    def run(q, k, v, segments):
        o, back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return o, back(jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape))

    return run


def test_splash_equals_packed(monkeypatch):
    """Two blocks, several segments, rows that must be padded, a row of padding alone."""
    monkeypatch.setattr(attention, "_SPLASH_KEYS", 256)
    T = 300
    q, k, v = random_qkv(3, T, 64)
    ends = jnp.array([[T // 5, T // 2, T - 9], [T, T, T], [0, 0, 0]])
    segments = (jnp.arange(T)[None, :, None] < ends[:, None]).sum(-1)
    interpreted = functools.partial(attention.splash, interpret=True)
    got, expected = (both(attend)(q, k, v, segments) for attend in (interpreted, attention.packed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


@pytest.mark.parametrize(
    ("remat", "kernels"), [("full", 3), ("attention", 2), ("dots", 2), ("none", 2)]
)
def test_what_remat_keeps_of_splash_is_not_computed_again(remat, kernels):
    """One kernel forward, one backward; only where nothing is kept another forward."""
    rows = sharding.rows_sharding(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    splash, segments = (
        sharding.on_own_rows_and_heads(attention.splash, rows),
        jnp.ones((B, T), jnp.int32),
    )
    layer = jax.checkpoint(
        lambda q, k, v: splash(q, k, v, segments).sum(), policy=decoder.REMAT[remat]
    )
    slopes = jax.jit(jax.value_and_grad(lambda *qkv: layer(*map(jnp.sin, qkv)), argnums=(0, 1, 2)))
    for_tpu = slopes.trace(*random_qkv()).lower(lowering_platforms=("tpu",)).as_text()
    assert for_tpu.count("tpu_custom_call") == kernels


def test_parts_put_together_equal_attention_to_all_keys():
    """Keys in three places, in any order; one of them out of sight for some queries, one for all."""
    q, k, v = random_qkv()
    k_BKHS, v_BKSH = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    pieces = [slice(4, 6), slice(0, 1), slice(1, 4)]
    parts = [
        attention.partial_softmax(q, k_BKHS[..., p], v_BKSH[:, :, p], seen[:, :, p]) for p in pieces
    ]
    parts.append(attention.partial_softmax(q, 9 * k_BKHS, 9 * v_BKSH, jnp.zeros_like(seen)))
    got = attention.combine(parts)
    expected = attention.packed(q, k, v, jnp.ones((B, T), jnp.int32))
    np.testing.assert_allclose(got, expected, atol=1e-5)
