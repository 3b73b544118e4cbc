"""Advantages, policy loss, KL, token log-probs: pure functions of arrays. Knows nothing of search.

Every loss is sum(weight * term) over tokens: what a mean is taken over (tokens, sequences) is data,
made once on the host, so packing and micro-batching cannot change it.
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
    A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's
    rule).
    """
    rewards_E = np.asarray(rewards_E, np.float64)
    result_E = rewards_E.copy()
    for group in np.unique(groups_E):
        rows = np.flatnonzero(groups_E == group)
        n = len(rows)
        if n == 1:
            continue
        # equal rewards give 0 and no rounding, which std would blow up
        centred = rewards_E[rows] - rewards_E[rows[0]]
        centred -= centred.mean()
        if leave_one_out:
            centred *= n / (n - 1)  # r - mean of the others = n / (n - 1) * (r - mean of all)
        if std:
            centred /= rewards_E[rows].std(ddof=1) + 1e-6
        result_E[rows] = centred
    return result_E.astype(np.float32)


def sequence_weight(num_tokens_E: np.ndarray, aggregation: str, constant: int) -> np.ndarray:
    """The weight w of each sampled token of an episode in the loss sum_i sum_t w_i l_it, for E
    episodes of n_i tokens.

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
    """Clipped surrogate (PPO, arXiv 1707.06347; clip-higher: DAPO, 2503.14476) plus KL to the
    reference.

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
        jnp.exp(jnp.clip(masked(old_logp_BT - sampler_logp_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)),
        importance_cap,
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
    """Per-token estimate of KL(policy || reference), with d = log reference - log policy (Schulman
    2020, joschu.net).

    k1 = -d, unbiased; k2 = d^2 / 2, low bias; k3 = exp(d) - d - 1, low variance and never negative.
    As losses their gradients differ: that of k1 has mean 0, that of k2 is the KL's own. k3 grows
    like the exponential of d, so that one token can outweigh all others. bound, if not 0, cuts it,
    and beyond it there is no gradient.
    """
    delta = jnp.clip(ref_logp - logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * jnp.square(delta)
    k3 = jnp.exp(delta) - delta - 1
    return jnp.minimum(k3, bound) if bound else k3
