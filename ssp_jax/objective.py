"""Advantages, policy loss, KL, token log-probs: pure functions of arrays. Knows nothing of search.

Every loss is sum(weight * term) over tokens: what a mean is taken over (tokens, sequences) is data, made once on the
host, so packing and micro-batching cannot change it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssp_jax import sharding

LOG_RATIO_BOUND = 20.0  # exp() of more is useless and overflows; only broken tokens get there


class LossSums(NamedTuple):
    """Sums over tokens; loss is ready, the others are divided by the number of tokens."""

    loss: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clipped: jax.Array
    gap: jax.Array  # |trainer log-prob - sampler log-prob|
    gap_max: jax.Array


def advantages(
    rewards_E: np.ndarray, groups_E: np.ndarray, *, std: bool = False, leave_one_out: bool = False
) -> np.ndarray:
    """Reward minus its group's mean, over the group's standard deviation if asked.

    One function for all estimators, because a group is data. With r_i the rewards of a group of G:
      GRPO, groups by question    A_i = r_i - mean(r)                    [P eq.4], Dr. GRPO (arXiv 2503.20783)
      GRPO with std               A_i = (r_i - mean(r)) / (std(r) + 1e-6)    arXiv 2402.03300; ddof 1, epsilon of verl
      REINFORCE, groups of one    A_i = r_i                              [P eq.5]
      RLOO, leave_one_out         A_i = r_i - mean of the others         arXiv 2402.14740
      REINFORCE++, one group      GRPO with std over the whole batch     arXiv 2501.03262
      HRPO, groups by searches    the same over all episodes of as many requested searches (Dr. Zero, 2601.07055)
    A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's rule).
    """
    rewards_E = np.asarray(rewards_E, np.float64)
    result_E = rewards_E.copy()
    for group in np.unique(groups_E):
        rows = np.flatnonzero(groups_E == group)
        n = len(rows)
        if n == 1:
            continue
        centred = rewards_E[rows] - rewards_E[rows[0]]  # equal rewards give 0 and no rounding, which std would blow up
        centred -= centred.mean()
        if leave_one_out:
            centred *= n / (n - 1)  # r - mean of the others = n / (n - 1) * (r - mean of all)
        if std:
            centred /= rewards_E[rows].std(ddof=1) + 1e-6
        result_E[rows] = centred
    return result_E.astype(np.float32)


def sequence_weight(num_tokens_E: np.ndarray, aggregation: str, constant: int) -> np.ndarray:
    """The weight w of each sampled token of an episode in the loss sum_i sum_t w_i l_it, for E episodes of n_i tokens.

    sequence_mean   w_i = 1 / (E n_i)     mean over an episode's tokens, then over episodes [P eq.4]
    token_mean      w_i = 1 / sum_j n_j   mean over all tokens (DAPO, arXiv 2503.14476; verl)
    constant        w_i = 1 / (E C)       C is the longest response allowed, so a long wrong answer is not let off
                                          lightly (Dr. GRPO, arXiv 2503.20783)
    """
    num_tokens_E = np.asarray(num_tokens_E, np.float64)
    episodes = max(len(num_tokens_E), 1)
    if aggregation == "sequence_mean":
        return 1.0 / (np.maximum(num_tokens_E, 1) * episodes)
    if aggregation == "constant":
        return np.full(len(num_tokens_E), 1.0 / (episodes * constant))
    return np.full(len(num_tokens_E), 1.0 / max(num_tokens_E.sum(), 1))


def policy_loss(
    logp_BT: jax.Array,
    entropy_BT: jax.Array,
    *,
    old_logp_BT: jax.Array,
    sampler_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
    advantage_BT: jax.Array,
    weight_BT: jax.Array,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_type: str,
    importance_cap: float,
    clip_dual: float = 0.0,
    kl_bound: float = 0.0,
) -> LossSums:
    """Clipped surrogate (PPO, arXiv 1707.06347; clip-higher: DAPO, 2503.14476) plus KL to the reference.

    loss = sum_t w_t * [ -c_t * S_t + kl_coef * KL_t ]   [P eq.4, eq.5]
    with S = min(r A, clip(r, 1 - low, 1 + high) A), r = exp(clamp(logp - old))
    and c = min(exp(clamp(old - sampler)), cap), the truncated importance weight of what was sampled
    by another program than `old` comes from (Ionides 2008, "Truncated Importance Sampling"; 1 when
    old is the sampler's own).
    The clamp is +-LOG_RATIO_BOUND. Where w is 0 there is no token, and whatever stands there adds
    nothing.

    clip_dual bounds what one token with A < 0 can cost: S is at least clip_dual * A, and constant
    where r is larger (dual clip, arXiv 1912.09729). kl_bound: see kl_estimate. 0 turns either off.
    """
    real_BT = weight_BT != 0

    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(real_BT, x, 0.0)

    log_ratio_BT = jnp.clip(masked(logp_BT - old_logp_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_BT = jnp.exp(log_ratio_BT)
    bounded_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    unclipped_BT = ratio_BT * advantage_BT
    surrogate_BT = jnp.minimum(unclipped_BT, bounded_BT * advantage_BT)
    if clip_dual:
        dual_BT = jnp.maximum(surrogate_BT, clip_dual * advantage_BT)
        surrogate_BT = jnp.where(advantage_BT < 0, dual_BT, surrogate_BT)
    correction_BT = jnp.minimum(
        jnp.exp(jnp.clip(masked(old_logp_BT - sampler_logp_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)), importance_cap
    )
    term_BT = -jax.lax.stop_gradient(correction_BT) * surrogate_BT
    kl_BT = jnp.zeros_like(logp_BT)
    if ref_logp_BT is not None:
        kl_BT = kl_estimate(masked(logp_BT), masked(ref_logp_BT), kl_type, kl_bound)
        term_BT = term_BT + kl_coef * kl_BT
    gap_BT = jnp.abs(masked(logp_BT - sampler_logp_BT))
    return LossSums(
        loss=(weight_BT * masked(term_BT)).sum(),
        kl=masked(kl_BT).sum(),
        entropy=masked(entropy_BT).sum(),
        clipped=masked(unclipped_BT != surrogate_BT).sum(),
        gap=gap_BT.sum(),
        gap_max=gap_BT.max(),
    )


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str, bound: float = 0.0) -> jax.Array:
    """Per-token estimate of KL(policy || reference), with d = log reference - log policy (Schulman 2020, joschu.net).

    k1 = -d, unbiased; k2 = d^2 / 2, low bias; k3 = exp(d) - d - 1, low variance and never negative. As losses their
    gradients differ: that of k1 has mean 0, that of k2 is the KL's own.
    k3 grows like the exponential of d, so that one token can outweigh all others. bound, if not 0,
    cuts it, and beyond it there is no gradient.
    """
    delta = jnp.clip(ref_logp - logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * jnp.square(delta)
    k3 = jnp.exp(delta) - delta - 1
    return jnp.minimum(k3, bound) if bound else k3


def token_logprobs(
    hidden_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    temperature: float,
    chunk: int,
    rows: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden W^T / temperature) at the targets, and entropies, [B, T] float32; 0 where not wanted.

    Wanted positions of a row are moved to its front, and logits exist for `chunk` of them at a time, forward and again
    backward: [B, T, V] never exists, and prompts, inserted results and padding cost nothing. T must be a multiple of
    chunk. Entropies carry no gradient. rows: how rows are split over devices, None for one device.
    """
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    chunks = -(-wanted_BT.sum(1).max() // chunk)
    front = _front_logprobs(temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks)
    inverse_BT = jnp.argsort(order_BT, axis=1)
    back = (jnp.where(wanted_BT, jnp.take_along_axis(x_BT, inverse_BT, axis=1), 0.0) for x_BT in front)
    logp_BT, entropy_BT = back
    return logp_BT, jax.lax.stop_gradient(entropy_BT)


def _chunk_logits(hidden_BCD: jax.Array, weight_VD: jax.Array, temperature: float) -> jax.Array:
    """float32. The vocabulary may be split over devices: nothing below gathers it."""
    return jnp.einsum("bcd,vd->bcv", hidden_BCD, weight_VD, preferred_element_type=jnp.float32) / temperature


def _hits(targets_BC: jax.Array, vocab: int) -> jax.Array:
    """[B, C, V]: true at the target. A comparison stays on the device that holds its part of V, a gather would not."""
    return targets_BC[..., None] == jnp.arange(vocab)[None, None]


def _forward_chunks(
    temperature: float, chunk: int, front_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, chunks: jax.Array
) -> tuple[jax.Array, ...]:
    """Log-probs, entropies and log-sums of exp(logit) [B, T] of the first `chunks` chunks."""

    def one(i: jax.Array, filled: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden_BCD, targets_BC = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in (front_BTD, targets_BT))
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        top_BC = logits_BCV.max(-1)
        exp_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        sum_BC = exp_BCV.sum(-1)
        total_BC = top_BC + jnp.log(sum_BC)
        picked_BC = jnp.where(_hits(targets_BC, logits_BCV.shape[-1]), logits_BCV, 0.0).sum(-1)
        entropy_BC = total_BC - (exp_BCV * logits_BCV).sum(-1) / sum_BC
        new = (picked_BC - total_BC, entropy_BC, total_BC)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, 1) for x, y in zip(filled, new, strict=True))

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
    """d log p_t / d logits = onehot(t) - p. Gradients of front_BTD, and of the weight, turned: float32 [1, D, V]."""

    def one(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts = (front_BTD, targets_BT, total_BT, slope_BT)
        hidden_BCD, targets_BC, total_BC, slope_BC = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in parts
        )
        logits_BCV = _chunk_logits(hidden_BCD, weight_VD, temperature)
        probs_BCV = jnp.exp(logits_BCV - total_BC[..., None])
        hits_BCV = _hits(targets_BC, logits_BCV.shape[-1])
        slope_BCV = jnp.where(hits_BCV, 1.0 - probs_BCV, -probs_BCV) * (slope_BC / temperature)[..., None]
        slope_BCV = jax.lax.optimization_barrier(slope_BCV.astype(front_BTD.dtype))  # once, not inside two products
        front_slope_BCD = jnp.einsum("bcv,vd->bcd", slope_BCV, weight_VD)
        weight_slope_DV = jnp.einsum("bcd,bcv->dv", hidden_BCD, slope_BCV, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(sums[0], front_slope_BCD, i * chunk, 1), sums[1] + weight_slope_DV

    start = (jnp.zeros_like(front_BTD), jnp.zeros(weight_VD.shape[::-1], jnp.float32))
    front_slope_BTD, weight_slope_DV = jax.lax.fori_loop(0, chunks, one, start)
    return front_slope_BTD, weight_slope_DV[None]


# The loops run on each part of the rows by itself. Left to XLA, devices that share a weight would send it around, and
# add up its gradient over all of them, once for every chunk instead of once.


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
    run = sharding.in_parts(alone, rows, (0, None, 0, None), (0, 0, 0))
    logp_BT, entropy_BT, total_BT = run(front_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, chunks)
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
    return _front_forward(temperature, chunk, rows, hidden_BTD, weight_VD, targets_BT, order_BT, chunks)[0]


def _front_backward(temperature: float, chunk: int, rows: Any, kept: Any, slopes: Any) -> tuple[jax.Array | None, ...]:
    front_BTD, weight_VD, targets_BT, order_BT, chunks, total_BT = kept
    alone = functools.partial(_backward_chunks, temperature, chunk)
    run = sharding.in_parts(alone, rows, (0, None, 0, 0, 0, None), (0, 0))
    cast_VD = weight_VD.astype(front_BTD.dtype)
    front_slope_BTD, weight_slopes_XDV = run(front_BTD, cast_VD, targets_BT, total_BT, slopes[0], chunks)
    inverse_BT = jnp.argsort(order_BT, axis=1)
    hidden_slope_BTD = jnp.take_along_axis(front_slope_BTD, inverse_BT[..., None], axis=1)
    return hidden_slope_BTD, weight_slopes_XDV.sum(0).T.astype(weight_VD.dtype), None, None, None


_front_logprobs.defvjp(_front_forward, _front_backward)
