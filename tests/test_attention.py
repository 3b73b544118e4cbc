"""Attention: what a query sees."""

import jax
import jax.numpy as jnp
import numpy as np

from ssp_jax import attention

B, T, N, K, H = 2, 6, 4, 2, 8


def random_qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (B, T, heads, H)) for k, heads in zip(keys, (N, K, K), strict=True))


def test_packed_equals_plain_attention_per_segment():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    got = attention.packed(q, k, v, segments)
    for b, places in ((0, [0, 1]), (0, [2, 3, 4]), (1, [0, 1, 2, 3, 4, 5])):
        part = (x[b : b + 1, jnp.array(places)] for x in (q, k, v))
        expected = jax.nn.dot_product_attention(*part, is_causal=True)
        np.testing.assert_allclose(got[b, jnp.array(places)], expected[0], atol=1e-5)


def test_packed_has_no_gradient_across_segments_or_from_the_future():
    q, k, v = random_qkv()
    segments = jnp.array([[1, 1, 1, 2, 2, 2]] * B)
    slope = jax.grad(lambda v: attention.packed(q, k, v, segments)[:, 4].sum())(v)
    assert not slope[:, [0, 1, 2, 5]].any()
    assert slope[:, [3, 4]].any()


def test_parts_put_together_equal_attention_to_all_keys():
    """Keys in three places, in any order; one of them out of sight for some queries, one for all."""
    q, k, v = random_qkv()
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    pieces = [slice(4, 6), slice(0, 1), slice(1, 4)]
    parts = [attention.part(q, k[:, :, p], v[:, :, p], seen[:, :, p]) for p in pieces]
    parts.append(attention.part(q, 9 * k, 9 * v, jnp.zeros_like(seen)))
    got = attention.merged(parts)
    expected = attention.packed(q, *(jnp.moveaxis(x, 2, 1) for x in (k, v)), jnp.ones((B, T), jnp.int32))
    np.testing.assert_allclose(got, expected, atol=1e-5)
