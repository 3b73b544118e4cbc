"""Attention over packed rows and over keys that lie in several places: the one place that decides how it is computed.

Both are XLA einsums today, on every backend. Scores and softmax are float32 in both, so that sampler and trainer agree.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite: a row with no visible key (padding) stays free of NaN


def _scores(q_BTNH: jax.Array, k_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """float32 [B, K, R, T, S]; each of the K key/value heads serves R = N / K query heads."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    scores = jnp.einsum("bkrth,bksh->bkrts", q_BKRTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    return jnp.where(visible_BTS[:, None, None], scores, NEG_INF)


def _weighted(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Grouped-query softmax attention."""
    weights = jax.nn.softmax(_scores(q_BTNH, k_BKSH, visible_BTS), axis=-1).astype(v_BKSH.dtype)
    o_BKRTH = jnp.einsum("bkrts,bksh->bkrth", weights, v_BKSH)
    return jnp.moveaxis(o_BKRTH, 3, 1).reshape(q_BTNH.shape)


def packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Causal attention inside each segment of a packed row; segment 0 is padding."""
    T = q_BTNH.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    k_BKTH, v_BKTH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    return _weighted(q_BTNH, k_BKTH, v_BKTH, same & causal[None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Attention over some of the keys, not divided by its sum yet; float32. `merged` puts parts together."""

    o_BTNH: jax.Array  # sum of exp(score - max) * value
    max_BTN: jax.Array
    sum_BTN: jax.Array  # of exp(score - max)


def part(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> Part:
    """Grouped-query attention over these keys. A query that sees none of them gets a max of NEG_INF."""
    scores = _scores(q_BTNH, k_BKSH, visible_BTS)
    max_BKRT = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - max_BKRT[..., None])
    o_BKRTH = jnp.einsum("bkrts,bksh->bkrth", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    o_BTKRH, max_BTKR, sum_BTKR = (jnp.moveaxis(x, 3, 1) for x in (o_BKRTH, max_BKRT, weights.sum(axis=-1)))
    per_head = q_BTNH.shape[:3]
    return Part(o_BTKRH.reshape(q_BTNH.shape), max_BTKR.reshape(per_head), sum_BTKR.reshape(per_head))


def merged(parts: list[Part]) -> jax.Array:
    """Attention [B, T, N, H], float32, over the keys of all parts; each query must see a key in one of them."""
    max_BTN = functools.reduce(jnp.maximum, [p.max_BTN for p in parts])
    scales = [jnp.exp(p.max_BTN - max_BTN) for p in parts]
    pairs = list(zip(parts, scales, strict=True))
    sum_BTN = functools.reduce(jnp.add, [p.sum_BTN * scale for p, scale in pairs])
    o_BTNH = functools.reduce(jnp.add, [p.o_BTNH * scale[..., None] for p, scale in pairs])
    return o_BTNH / sum_BTN[..., None]
