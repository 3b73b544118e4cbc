"""Token log-probs, advantages, policy loss, KL: pure functions of arrays. Knows nothing of search.

Every loss is sum(weight * term) over tokens: what a mean is taken over (tokens, sequences) is data, made once on the
host, so packing and micro-batching cannot change it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOG_RATIO_BOUND = 20.0  # exp() of more is useless and overflows; only broken tokens get there


class LossSums(NamedTuple):
    """Sums over tokens; loss is ready, the others are divided by the number of tokens."""

    loss: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clipped: jax.Array
    gap: jax.Array  # |trainer log-prob - sampler log-prob|
    gap_max: jax.Array


def token_logprobs(
    hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the targets and entropies [B, T], float32, of the distribution at this temperature.

    Logits exist for `chunk` positions of a row at a time and are recomputed in the backward pass, so [B, T, V] never
    exists. T must be a multiple of chunk.
    """
    B, T, D = hidden_BTD.shape
    hidden_XBCD = jnp.moveaxis(hidden_BTD.reshape(B, T // chunk, chunk, D), 1, 0)
    targets_XBC = jnp.moveaxis(targets_BT.reshape(B, T // chunk, chunk), 1, 0)
    weight_VD = weight_VD.astype(hidden_BTD.dtype)

    @jax.checkpoint
    def one(carry: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_BCD, targets_BC = x
        logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, weight_VD, preferred_element_type=jnp.float32) / temperature
        total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        probs_BCV = jnp.exp(logits_BCV - total_BC[..., None])
        entropy_BC = total_BC - (probs_BCV * logits_BCV).sum(-1)
        return None, (picked_BC - total_BC, jax.lax.stop_gradient(entropy_BC))

    _, (logprobs_XBC, entropy_XBC) = jax.lax.scan(one, None, (hidden_XBCD, targets_XBC))
    return jnp.moveaxis(logprobs_XBC, 0, 1).reshape(B, T), jnp.moveaxis(entropy_XBC, 0, 1).reshape(B, T)


def advantages(
    rewards_E: np.ndarray, groups_E: np.ndarray, *, std: bool = False, leave_one_out: bool = False
) -> np.ndarray:
    """Reward minus its group's mean, over the group's standard deviation if asked.

    One function for all estimators, because a group is data: GRPO groups by question [P eq.4], plain REINFORCE gives
    each episode a group of its own [P eq.5], a batch baseline puts all into one group, hop-grouped by requested
    searches (Dr. Zero). A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's
    rule). leave_one_out: the mean of the others (RLOO, arXiv 2402.14740). std uses ddof 1 and epsilon 1e-6 (verl).
    """
    rewards_E = np.asarray(rewards_E, np.float64)
    result_E = rewards_E.copy()
    for group in np.unique(groups_E):
        rows = np.flatnonzero(groups_E == group)
        n = len(rows)
        if n == 1:
            continue
        centred = rewards_E[rows] - rewards_E[rows].mean()
        if leave_one_out:
            centred *= n / (n - 1)  # r - mean of the others = n / (n - 1) * (r - mean of all)
        if std:
            centred /= rewards_E[rows].std(ddof=1) + 1e-6
        result_E[rows] = centred
    return result_E.astype(np.float32)


def sequence_weight(num_tokens_E: np.ndarray, aggregation: str) -> np.ndarray:
    """The weight of each sampled token of an episode in the loss; all weights of a mini-batch sum to 1.

    sequence_mean: mean over an episode's tokens, then over episodes [P eq.4]. token_mean: over all tokens (verl, DAPO).
    """
    num_tokens_E = np.asarray(num_tokens_E, np.float64)
    if aggregation == "sequence_mean":
        return 1.0 / (np.maximum(num_tokens_E, 1) * max(len(num_tokens_E), 1))
    return np.full(len(num_tokens_E), 1.0 / max(num_tokens_E.sum(), 1))


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str) -> jax.Array:
    """Per-token estimate of KL(policy || reference) (Schulman 2020): k1 unbiased, k2 low bias, k3 low variance."""
    delta = jnp.clip(ref_logp - logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * jnp.square(delta)
    return jnp.exp(delta) - delta - 1


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
) -> LossSums:
    """Clipped surrogate (PPO with clip-higher) plus KL to the reference, summed with weights; weight 0 is no token.

    loss = sum_t w_t * [ c_t * -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + kl_coef * KL_t ] with r the ratio to
    the old policy and c = min(old / sampler, cap) the truncated importance weight, 1 when old is the sampler's own.
    """
    real_BT = weight_BT != 0

    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(real_BT, x, 0.0)

    log_ratio_BT = jnp.clip(masked(logp_BT - old_logp_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_BT = jnp.exp(log_ratio_BT)
    bounded_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    surrogate_BT = jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT)
    correction_BT = jnp.minimum(
        jnp.exp(jnp.clip(masked(old_logp_BT - sampler_logp_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)), importance_cap
    )
    term_BT = -jax.lax.stop_gradient(correction_BT) * surrogate_BT
    kl_BT = jnp.zeros_like(logp_BT)
    if ref_logp_BT is not None:
        kl_BT = kl_estimate(masked(logp_BT), masked(ref_logp_BT), kl_type)
        term_BT = term_BT + kl_coef * kl_BT
    gap_BT = jnp.abs(masked(logp_BT - sampler_logp_BT))
    return LossSums(
        loss=(weight_BT * masked(term_BT)).sum(),
        kl=masked(kl_BT).sum(),
        entropy=masked(entropy_BT).sum(),
        clipped=masked(ratio_BT * advantage_BT > surrogate_BT).sum(),
        gap=gap_BT.sum(),
        gap_max=gap_BT.max(),
    )
