"""Advantages, policy loss, KL, token log-probs: pure functions of arrays. Knows nothing of search.

Every loss is sum(weight * term) over tokens: what a mean is taken over (tokens, sequences) is data,
made once on the host, so packing and micro-batching cannot change it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOG_RATIO_BOUND = 20.0  # exp() of more is useless and overflows; only broken tokens get there


# Buckets of sampled tokens by how many tokens of their episode stand before them: the name in
# metrics -> the fewest. Sampler and learner differ more where caches and positions are long.
POSITION_BUCKETS = {"0_1k": 0, "1k_4k": 1024, "4k": 4096}


def position_bucket(positions_BT: Any) -> Any:
    """The number of each target's bucket, [B, T] ints. positions_BT: as in Batch, on any device."""
    return sum(positions_BT + 1 >= fewest for fewest in list(POSITION_BUCKETS.values())[1:])


class LossSums(NamedTuple):
    """float32 sums over tokens, but for gap_max. The loss is weighted, the others not."""

    loss: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clipped: jax.Array  # tokens whose surrogate a bound has changed
    gap: jax.Array  # |trainer log-prob - sampler log-prob|
    gap_max: jax.Array
    gaps: jax.Array  # the gap of each of POSITION_BUCKETS


def zero_sums() -> LossSums:
    """The sums of no token."""
    zero = jnp.zeros(())
    gaps = jnp.zeros(len(POSITION_BUCKETS))
    return LossSums(
        loss=zero, kl=zero, entropy=zero, clipped=zero, gap=zero, gap_max=zero, gaps=gaps
    )


def advantages(
    rewards_E: np.ndarray, groups_E: np.ndarray, *, std: bool = False, leave_one_out: bool = False
) -> np.ndarray:
    """Reward minus its group's mean, over the group's standard deviation if asked; [E] float32.

    One function for all estimators, because a group is data. With r the rewards of a group of G:
      GRPO: groups by question [P eq.4], Dr. GRPO (arXiv 2503.20783)
                          A_i = r_i - mean(r)
      GRPO with std: arXiv 2402.03300, with verl's ddof of 1 and its epsilon
                          A_i = (r_i - mean(r)) / (std(r) + 1e-6)
      REINFORCE: groups of one [P eq.5]
                          A_i = r_i
      RLOO: leave_one_out (arXiv 2402.14740)
                          A_i = r_i - mean of the others
      REINFORCE++: one group, with std (arXiv 2501.03262)
      HRPO: groups of episodes of as many requested searches, with std (Dr. Zero, arXiv 2601.07055)
    A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's
    rule).
    """
    rewards_E = np.asarray(rewards_E, np.float64)
    result_E = rewards_E.copy()
    for group in np.unique(groups_E):
        members = np.flatnonzero(groups_E == group)
        n = len(members)
        if n == 1:
            continue
        # equal rewards give 0 and no rounding, which std would blow up
        centred = rewards_E[members] - rewards_E[members[0]]
        centred -= centred.mean()
        if leave_one_out:
            centred *= n / (n - 1)  # r - mean of the others = n / (n - 1) * (r - mean of all)
        if std:
            centred /= rewards_E[members].std(ddof=1) + 1e-6
        result_E[members] = centred
    return result_E.astype(np.float32)


def sequence_weight(num_tokens_E: np.ndarray, aggregation: str, constant: int) -> np.ndarray:
    """The weight w_i of each sampled token of episode i in the loss sum_i sum_t w_i l_it; [E].

    For E episodes of n_i sampled tokens:
      sequence_mean   w_i = 1 / (E n_i)          mean over an episode's tokens, then over episodes
                                                 [P eq.4]
      token_mean      w_i = 1 / sum_j n_j        mean over all tokens (DAPO, arXiv 2503.14476; verl)
      constant        w_i = 1 / (E constant)     constant is the longest response allowed, so a long
                                                 wrong answer is not let off lightly (Dr. GRPO,
                                                 arXiv 2503.20783)
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
    positions_BT: jax.Array,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_type: str,
    importance_cap: float,
    clip_dual: float = 0.0,
    kl_bound: float = 0.0,
) -> LossSums:
    """Clipped surrogate plus KL to the reference, over [B, T] tokens [P eq.4, eq.5].

    loss = sum_t w_t * (-c_t * S_t + kl_coef * KL_t), where
      r = exp(log p - log p_old)
      S = min(r * A, clip(r, 1 - low, 1 + high) * A)   PPO (arXiv 1707.06347); two bounds as in DAPO
      c = min(p_old / p_sampler, cap)                  carries no gradient
    c is the truncated importance weight (Ionides 2008, "Truncated Importance Sampling") of tokens
    that were sampled by another program than p_old comes from; 1 where p_old is the sampler's own.
    Log-ratios are clamped to +-LOG_RATIO_BOUND. Where w is 0 there is no token, and whatever stands
    there adds nothing.

    clip_dual: see _dual_clip. kl_bound: see kl_estimate. 0 turns either off.
    """
    is_token_BT = weight_BT != 0

    def masked(x_BT: jax.Array) -> jax.Array:
        return jnp.where(is_token_BT, x_BT, 0.0)

    def ratio(a_BT: jax.Array, b_BT: jax.Array) -> jax.Array:
        return jnp.exp(jnp.clip(masked(a_BT - b_BT), -LOG_RATIO_BOUND, LOG_RATIO_BOUND))

    # S: the clipped surrogate
    ratio_BT = ratio(logp_BT, old_logp_BT)
    unclipped_BT = ratio_BT * advantage_BT
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high) * advantage_BT
    surrogate_BT = jnp.minimum(unclipped_BT, clipped_BT)
    if clip_dual:
        surrogate_BT = _dual_clip(surrogate_BT, advantage_BT, clip_dual)

    # c: the importance weight
    importance_BT = jnp.minimum(ratio(old_logp_BT, sampler_logp_BT), importance_cap)

    # the loss of each token
    loss_BT = -jax.lax.stop_gradient(importance_BT) * surrogate_BT
    kl_BT = jnp.zeros_like(logp_BT)
    if ref_logp_BT is not None:
        kl_BT = kl_estimate(masked(logp_BT), masked(ref_logp_BT), kl_type, kl_bound)
        loss_BT = loss_BT + kl_coef * kl_BT

    # the sums, over tokens alone
    gap_BT = jnp.abs(masked(logp_BT - sampler_logp_BT))
    bucket_BT = position_bucket(positions_BT)
    gaps = [jnp.where(bucket_BT == i, gap_BT, 0.0).sum() for i in range(len(POSITION_BUCKETS))]
    return LossSums(
        loss=(weight_BT * masked(loss_BT)).sum(),
        kl=masked(kl_BT).sum(),
        entropy=masked(entropy_BT).sum(),
        clipped=masked(unclipped_BT != surrogate_BT).sum(),
        gap=gap_BT.sum(),
        gap_max=gap_BT.max(),
        gaps=jnp.stack(gaps),
    )


def likelihood_loss(logp_BT: jax.Array, entropy_BT: jax.Array, weight_BT: jax.Array) -> LossSums:
    """Negative log-likelihood, sum_t w_t * -log p_t: supervised training. A weight of 0: no token.

    Its gradient is that of policy_loss with advantages of 1, of a policy that has not moved since
    old_logp. What a ratio is needed for is 0 in the sums.
    """
    is_own_BT = weight_BT != 0
    return zero_sums()._replace(
        loss=-jnp.where(is_own_BT, weight_BT * logp_BT, 0.0).sum(),
        entropy=jnp.where(is_own_BT, entropy_BT, 0.0).sum(),
    )


def _dual_clip(surrogate_BT: jax.Array, advantage_BT: jax.Array, bound: float) -> jax.Array:
    """Bounds what one token with A < 0 can cost (dual clip, arXiv 1912.09729).

    S is at least bound * A, and constant where the ratio is larger.
    """
    dual_BT = jnp.maximum(surrogate_BT, bound * advantage_BT)
    return jnp.where(advantage_BT < 0, dual_BT, surrogate_BT)


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str, bound: float = 0.0) -> jax.Array:
    """Per-token estimate of KL(policy || reference) (Schulman 2020, joschu.net/blog/kl-approx).

    With d = log reference - log policy:
      k1 = -d                 unbiased; as a loss its gradient has mean 0
      k2 = d^2 / 2            low bias; as a loss its gradient is the KL's own
      k3 = exp(d) - d - 1     low variance and never negative
    k3 grows like exp(d), so one token can outweigh all others. bound, if not 0, cuts it off, and
    beyond it there is no gradient.
    """
    delta = jnp.clip(ref_logp - logp, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * jnp.square(delta)
    k3 = jnp.exp(delta) - delta - 1
    return jnp.minimum(k3, bound) if bound else k3
