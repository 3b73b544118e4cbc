"""Objective: hand-computed losses and gradients, groups, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ssp_jax import objective

SETTINGS = dict(clip_low=0.2, clip_high=0.3, kl_coef=0.0, kl_type="k3", importance_cap=2.0)


def loss_of(logp, *, old=None, sampler=None, ref=None, advantage=1.0, weight=None, **changes):
    logp = jnp.asarray(logp, jnp.float32)[None]
    old = logp if old is None else jnp.asarray(old, jnp.float32)[None]
    return objective.policy_loss(
        logp,
        jnp.zeros_like(logp),
        old_logp_BT=old,
        sampler_logp_BT=old if sampler is None else jnp.asarray(sampler, jnp.float32)[None],
        ref_logp_BT=None if ref is None else jnp.asarray(ref, jnp.float32)[None],
        advantage_BT=jnp.full_like(logp, advantage),
        weight_BT=jnp.ones_like(logp) if weight is None else jnp.asarray(weight, jnp.float32)[None],
        **{**SETTINGS, **changes},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.6),  # clipped at 1 + 0.3
        (1.5, -2.0, 3.0),  # a bad token that became likelier is not clipped
        (0.5, -2.0, 1.6),  # clipped at 1 - 0.2
        (0.5, 2.0, -1.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, expected):
    sums = loss_of([np.log(ratio) - 1.0], old=[-1.0], advantage=advantage)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    assert float(sums.clipped) == float(abs(expected) != pytest.approx(abs(ratio * advantage)))


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) + 0.5 - 1)])
def test_kl_estimates_by_hand(kind, expected):
    sums = loss_of([-1.0], ref=[-1.5], advantage=0.0, kl_coef=0.1, kl_type=kind)
    np.testing.assert_allclose(sums.kl, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.loss, 0.1 * expected, rtol=1e-6)


def test_kl_pulls_towards_the_reference():
    slope = jax.grad(lambda x: loss_of([x], old=[-1.0], ref=[-2.0], advantage=0.0, kl_coef=1.0).loss)(-1.0)
    assert slope > 0  # likelier than in the reference: gradient descent makes it less likely


@pytest.mark.parametrize(("sampler", "expected"), [(-1.0, -1.0), (-1.5, -np.exp(0.5)), (-9.0, -2.0)])
def test_truncated_importance_weight(sampler, expected):
    np.testing.assert_allclose(loss_of([-1.0], old=[-1.0], sampler=[sampler]).loss, expected, rtol=1e-6)


def test_on_policy_gradient_is_reinforce():
    logp = jnp.array([-0.5, -1.0, -2.0])
    slope = jax.grad(lambda x: loss_of(x, old=logp, advantage=3.0).loss)(logp)
    np.testing.assert_allclose(slope, [-3.0] * 3, rtol=1e-6)


def test_weight_zero_means_no_token_even_when_it_is_broken():
    def total(x):
        return loss_of(jnp.array([-1.0, x]), old=[-1.0, -2.0], ref=[-1.0, -1.0], weight=[1.0, 0.0], kl_coef=1.0).loss

    assert float(total(-2.0)) == float(total(jnp.nan)) == -1.0
    assert float(jax.grad(total)(-3.0)) == 0.0


def test_extreme_ratios_stay_finite():
    sums = loss_of([0.0], old=[-1000.0], sampler=[-5000.0], ref=[500.0], advantage=-1.0, kl_coef=1.0)
    assert np.isfinite(sums.loss)


def test_gradients_match_finite_differences():
    old = np.array([-1.0, -0.7, -2.0])
    check_grads(
        lambda x: loss_of(x, old=old, ref=old - 0.3, kl_coef=0.5).loss, (jnp.array(old + 0.05),), order=1, rtol=2e-2
    )


def test_group_of_one_keeps_its_reward():
    rewards = np.array([0.0, 0.4, 1.0])
    for std in (False, True):
        np.testing.assert_allclose(objective.advantages(rewards, np.arange(3), std=std), rewards, rtol=1e-6)


def test_equal_group_has_no_advantage():
    for changes in ({}, {"std": True}, {"leave_one_out": True}):
        assert not objective.advantages(np.ones(4), np.zeros(4), **changes).any()


def test_grpo_by_hand():
    rewards, groups = np.array([1.0, 0.0, 0.0, 1.0, 1.0]), np.array([7, 7, 7, 2, 2])
    np.testing.assert_allclose(objective.advantages(rewards, groups), [2 / 3, -1 / 3, -1 / 3, 0, 0], atol=1e-6)
    std = np.array([1.0, 0.0, 0.0]).std(ddof=1)
    expected = np.array([2 / 3, -1 / 3, -1 / 3, 0, 0]) / (std + 1e-6)
    np.testing.assert_allclose(objective.advantages(rewards, groups, std=True), expected, rtol=1e-5, atol=1e-6)


def test_leave_one_out_is_reward_minus_mean_of_the_others():
    rewards = np.array([1.0, 0.0, 0.5])
    expected = [1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5]
    np.testing.assert_allclose(objective.advantages(rewards, np.zeros(3), leave_one_out=True), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("sequence_mean", [1 / 4, 1 / 8]), ("token_mean", [1 / 6, 1 / 6])]
)
def test_sequence_weights_by_hand_and_sum_to_one(aggregation, expected):
    lengths = np.array([2, 4])
    weight = objective.sequence_weight(lengths, aggregation)
    np.testing.assert_allclose(weight, expected)
    assert (weight * lengths).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("chunk", [2, 4, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_plain_log_softmax(chunk, temperature):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weight = jax.random.normal(keys[0], (2, 8, 5)), jax.random.normal(keys[1], (11, 5))
    targets = jax.random.randint(keys[2], (2, 8), 0, 11)

    def chunked(hidden, weight):
        return objective.token_logprobs(hidden, weight, targets, temperature, chunk)[0].sum()

    def plain(hidden, weight):
        logp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, weight) / temperature)
        return jnp.take_along_axis(logp, targets[..., None], -1).sum()

    got, expected = (jax.value_and_grad(f, argnums=(0, 1))(hidden, weight) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_entropy_by_hand():
    hidden, weight = jnp.ones((1, 2, 1)), jnp.log(jnp.array([[0.5], [0.25], [0.25]]))
    _, entropy = objective.token_logprobs(hidden, weight, jnp.zeros((1, 2), jnp.int32), 1.0, 2)
    np.testing.assert_allclose(entropy, 1.5 * np.log(2), rtol=1e-6)
