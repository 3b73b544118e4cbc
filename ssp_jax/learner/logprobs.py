"""Log-probs of given tokens, in chunks: the logits of a whole batch never exist."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax.model import sharding


def token_logprobs(
    hidden_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    temperature: float,
    chunk: int,
    rows: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden W^T / temperature) at the targets, and entropies, [B, T] float32; 0 where
    not wanted.

    Wanted positions of a row are moved to its front, and logits exist for `chunk` of them at a
    time, forward and again backward: [B, T, V] never exists, and prompts, inserted results and
    padding cost nothing. T must be a multiple of chunk. Entropies carry no gradient. rows: how rows
    are split over devices, None for one device.
    """
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    chunks = -(-wanted_BT.sum(1).max() // chunk)
    front = _front_logprobs(
        temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks
    )
    inverse_BT = jnp.argsort(order_BT, axis=1)
    back = (
        jnp.where(wanted_BT, jnp.take_along_axis(x_BT, inverse_BT, axis=1), 0.0) for x_BT in front
    )
    logp_BT, entropy_BT = back
    return logp_BT, jax.lax.stop_gradient(entropy_BT)


def _chunk_logits(hidden_BCD: jax.Array, weight_VD: jax.Array, temperature: float) -> jax.Array:
    """float32. The vocabulary may be split over devices: nothing below gathers it."""
    return (
        jnp.einsum("bcd,vd->bcv", hidden_BCD, weight_VD, preferred_element_type=jnp.float32)
        / temperature
    )


def _hits(targets_BC: jax.Array, vocab: int) -> jax.Array:
    """[B, C, V]: true at the target. A comparison stays on the device that holds its part of V, a
    gather would not.
    """
    return targets_BC[..., None] == jnp.arange(vocab)[None, None]


def _forward_chunks(
    temperature: float,
    chunk: int,
    front_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, ...]:
    """Log-probs, entropies and log-sums of exp(logit) [B, T] of the first `chunks` chunks."""

    def one(i: jax.Array, filled: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden_BCD, targets_BC = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in (front_BTD, targets_BT)
        )
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        top_BC = logits_BCV.max(-1)
        exp_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        sum_BC = exp_BCV.sum(-1)
        total_BC = top_BC + jnp.log(sum_BC)
        picked_BC = jnp.where(_hits(targets_BC, logits_BCV.shape[-1]), logits_BCV, 0.0).sum(-1)
        entropy_BC = total_BC - (exp_BCV * logits_BCV).sum(-1) / sum_BC
        new = (picked_BC - total_BC, entropy_BC, total_BC)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, 1)
            for x, y in zip(filled, new, strict=True)
        )

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks, one, (zeros_BT, zeros_BT, zeros_BT))


def _backward_chunks(
    temperature: float,
    chunk: int,
    front_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    total_BT: jax.Array,
    slope_BT: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """d log p_t / d logits = onehot(t) - p. Gradients of front_BTD, and of the weight, turned:
    float32 [1, D, V].
    """

    def one(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts = (front_BTD, targets_BT, total_BT, slope_BT)
        hidden_BCD, targets_BC, total_BC, slope_BC = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in parts
        )
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        probs_BCV = jnp.exp(logits_BCV - total_BC[..., None])
        hits_BCV = _hits(targets_BC, logits_BCV.shape[-1])
        slope_BCV = (
            jnp.where(hits_BCV, 1.0 - probs_BCV, -probs_BCV) * (slope_BC / temperature)[..., None]
        )
        # once, not inside two products
        slope_BCV = jax.lax.optimization_barrier(slope_BCV.astype(front_BTD.dtype))
        front_slope_BCD = jnp.einsum("bcv,vd->bcd", slope_BCV, weight_VD)
        weight_slope_DV = jnp.einsum(
            "bcd,bcv->dv", hidden_BCD, slope_BCV, preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(sums[0], front_slope_BCD, i * chunk, 1), sums[
            1
        ] + weight_slope_DV

    start = (jnp.zeros_like(front_BTD), jnp.zeros(weight_VD.shape[::-1], jnp.float32))
    front_slope_BTD, weight_slope_DV = jax.lax.fori_loop(0, chunks, one, start)
    return front_slope_BTD, weight_slope_DV[None]


# The loops run on each part of the rows by itself. Left to XLA, devices that share a weight would
# send it around, and add up its gradient over all of them, once for every chunk instead of once.


def _front_forward(
    temperature: float,
    chunk: int,
    rows: Any,
    hidden_BTD: Any,
    weight_VD: Any,
    targets_BT: Any,
    order_BT: Any,
    chunks: Any,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    front_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1)
    alone = functools.partial(_forward_chunks, temperature, chunk)
    run = sharding.shard_map_rows(alone, rows, (0, None, 0, None), (0, 0, 0))
    logp_BT, entropy_BT, total_BT = run(
        front_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, chunks
    )
    return (logp_BT, entropy_BT), (front_BTD, weight_VD, targets_BT, order_BT, chunks, total_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _front_logprobs(
    temperature: float,
    chunk: int,
    rows: Any,
    hidden_BTD: Any,
    weight_VD: Any,
    targets_BT: Any,
    order_BT: Any,
    chunks: Any,
) -> tuple[jax.Array, jax.Array]:
    """token_logprobs in the order of `order_BT`, for its first `chunks` chunks."""
    return _front_forward(
        temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks
    )[0]


def _front_backward(
    temperature: float, chunk: int, rows: Any, kept: Any, slopes: Any
) -> tuple[jax.Array | None, ...]:
    front_BTD, weight_VD, targets_BT, order_BT, chunks, total_BT = kept
    alone = functools.partial(_backward_chunks, temperature, chunk)
    run = sharding.shard_map_rows(alone, rows, (0, None, 0, 0, 0, None), (0, 0))
    cast_VD = weight_VD.astype(front_BTD.dtype)
    front_slope_BTD, weight_slopes_XDV = run(
        front_BTD, cast_VD, targets_BT, total_BT, slopes[0], chunks
    )
    inverse_BT = jnp.argsort(order_BT, axis=1)
    hidden_slope_BTD = jnp.take_along_axis(front_slope_BTD, inverse_BT[..., None], axis=1)
    return hidden_slope_BTD, weight_slopes_XDV.sum(0).T.astype(weight_VD.dtype), None, None, None


_front_logprobs.defvjp(_front_forward, _front_backward)
