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
    """log softmax(hidden W^T / temperature) at the targets, and entropies: [B, T] float32 each.

    Both are 0 where not wanted; entropies carry no gradient. T must be a multiple of chunk.
    rows: how rows are split over devices, None for one device.

    Wanted positions of a row are moved to its front, and logits exist for `chunk` of them at a
    time, forward and again backward: [B, T, V] never exists, and prompts, inserted results and
    padding cost nothing.
    """
    # The wanted positions first, in their order.
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    chunks = -(-wanted_BT.sum(1).max() // chunk)
    front = _front_logprobs(
        temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks
    )

    # Back to where they were.
    inverse_BT = jnp.argsort(order_BT, axis=1)

    def restored(front_BT: jax.Array) -> jax.Array:
        return jnp.where(wanted_BT, jnp.take_along_axis(front_BT, inverse_BT, axis=1), 0.0)

    logp_BT, entropy_BT = map(restored, front)
    return logp_BT, jax.lax.stop_gradient(entropy_BT)


def _chunk_logits(hidden_BCD: jax.Array, weight_VD: jax.Array, temperature: float) -> jax.Array:
    """[B, C, V] float32. V may be split over devices: nothing below gathers it."""
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv", hidden_BCD, weight_VD, preferred_element_type=jnp.float32
    )
    return logits_BCV / temperature


def _is_target(targets_BC: jax.Array, vocab: int) -> jax.Array:
    """[B, C, V]. A comparison stays on the device that holds its shard of V, a gather would not."""
    return targets_BC[..., None] == jnp.arange(vocab)[None, None]


def _forward_chunks(
    temperature: float,
    chunk: int,
    front_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, ...]:
    """Log-probs, entropies and log-sums of exp(logit), [B, T], of the first `chunks` chunks."""

    def add_chunk(i: jax.Array, filled: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden_BCD = jax.lax.dynamic_slice_in_dim(front_BTD, i * chunk, chunk, 1)
        targets_BC = jax.lax.dynamic_slice_in_dim(targets_BT, i * chunk, chunk, 1)
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        max_BC = logits_BCV.max(-1)
        exp_BCV = jnp.exp(logits_BCV - max_BC[..., None])
        sum_BC = exp_BCV.sum(-1)
        log_sum_BC = max_BC + jnp.log(sum_BC)
        is_target_BCV = _is_target(targets_BC, logits_BCV.shape[-1])
        target_BC = jnp.where(is_target_BCV, logits_BCV, 0.0).sum(-1)
        entropy_BC = log_sum_BC - (exp_BCV * logits_BCV).sum(-1) / sum_BC
        new = (target_BC - log_sum_BC, entropy_BC, log_sum_BC)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x_BT, x_BC, i * chunk, 1)
            for x_BT, x_BC in zip(filled, new, strict=True)
        )

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks, add_chunk, (zeros_BT, zeros_BT, zeros_BT))


def _backward_chunks(
    temperature: float,
    chunk: int,
    front_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    log_sum_BT: jax.Array,
    dlogp_BT: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the hidden states and of the weight, from that of the log-probs.

    d log p(target) / d logits = onehot(target) - p. The weight's is float32, transposed, and has an
    axis in front for the shards of rows: [1, D, V].
    """

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def of_chunk(x_BT: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x_BT, i * chunk, chunk, 1)

        dfront_BTD, dweight_DV = sums
        hidden_BCD = of_chunk(front_BTD)
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        probs_BCV = jnp.exp(logits_BCV - of_chunk(log_sum_BT)[..., None])
        is_target_BCV = _is_target(of_chunk(targets_BT), logits_BCV.shape[-1])
        dscaled_BC = of_chunk(dlogp_BT) / temperature
        dlogits_BCV = jnp.where(is_target_BCV, 1.0 - probs_BCV, -probs_BCV) * dscaled_BC[..., None]
        # computed once, not inside each of two products
        dlogits_BCV = jax.lax.optimization_barrier(dlogits_BCV.astype(front_BTD.dtype))
        dhidden_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, weight_VD)
        added_DV = jnp.einsum(
            "bcd,bcv->dv", hidden_BCD, dlogits_BCV, preferred_element_type=jnp.float32
        )
        dfront_BTD = jax.lax.dynamic_update_slice_in_dim(dfront_BTD, dhidden_BCD, i * chunk, 1)
        return dfront_BTD, dweight_DV + added_DV

    zeros_DV = jnp.zeros(weight_VD.shape[::-1], jnp.float32)
    start = (jnp.zeros_like(front_BTD), zeros_DV)
    dfront_BTD, dweight_DV = jax.lax.fori_loop(0, chunks, add_chunk, start)
    return dfront_BTD, dweight_DV[None]


# The loops run on each shard of the rows by itself. Left to XLA, devices that share a weight would
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
    on_shard = functools.partial(_forward_chunks, temperature, chunk)
    run = sharding.shard_map_rows(on_shard, rows, (0, None, 0, None), (0, 0, 0))
    cast_VD = weight_VD.astype(hidden_BTD.dtype)
    logp_BT, entropy_BT, log_sum_BT = run(front_BTD, cast_VD, targets_BT, chunks)
    residuals = (front_BTD, weight_VD, targets_BT, order_BT, chunks, log_sum_BT)
    return (logp_BT, entropy_BT), residuals


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
    outputs, _ = _front_forward(
        temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks
    )
    return outputs


def _front_backward(
    temperature: float, chunk: int, rows: Any, residuals: Any, cotangents: Any
) -> tuple[jax.Array | None, ...]:
    front_BTD, weight_VD, targets_BT, order_BT, chunks, log_sum_BT = residuals
    dlogp_BT, _ = cotangents  # entropies carry none
    on_shard = functools.partial(_backward_chunks, temperature, chunk)
    run = sharding.shard_map_rows(on_shard, rows, (0, None, 0, 0, 0, None), (0, 0))
    cast_VD = weight_VD.astype(front_BTD.dtype)
    dfront_BTD, dweights = run(front_BTD, cast_VD, targets_BT, log_sum_BT, dlogp_BT, chunks)
    inverse_BT = jnp.argsort(order_BT, axis=1)
    dhidden_BTD = jnp.take_along_axis(dfront_BTD, inverse_BT[..., None], axis=1)
    dweight_VD = dweights.sum(0).T.astype(weight_VD.dtype)
    return dhidden_BTD, dweight_VD, None, None, None


_front_logprobs.defvjp(_front_forward, _front_backward)
