"""Attention over packed rows and over the sampler's cache: the one place that decides how it is computed.

Both are XLA einsums today, on every backend. Scores and softmax are float32 in both, so that sampler and trainer agree.
"""

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite: a row with no visible key (padding) stays free of NaN


def _weighted(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Grouped-query softmax attention; each of the K key/value heads serves R = N / K query heads."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    scores = jnp.einsum("bkrth,bksh->bkrts", q_BKRTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(visible_BTS[:, None, None], scores, NEG_INF)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    o_BKRTH = jnp.einsum("bkrts,bksh->bkrth", weights, v_BKSH)
    return jnp.moveaxis(o_BKRTH, 3, 1).reshape(B, T, N, H)


def packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Causal attention inside each segment of a packed row; segment 0 is padding."""
    T = q_BTNH.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    k_BKTH, v_BKTH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    return _weighted(q_BTNH, k_BKTH, v_BKTH, same & causal[None])


def cached(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attention of queries at `positions` over a cache in which key s is the token at position s."""
    S = k_BKSH.shape[2]
    visible_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    return _weighted(q_BTNH, k_BKSH, v_BKSH, visible_BTS)
