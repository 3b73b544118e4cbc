"""Objective: hand-computed losses and gradients, groups, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ssp_jax.learner import logprobs, objective

SETTINGS = dict(clip_low=0.2, clip_high=0.3, kl_coef=0.0, kl_type="k3", importance_cap=2.0)


# eager, each operation would compile for itself
policy_loss = jax.jit(objective.policy_loss, static_argnames=(*SETTINGS, "clip_dual", "kl_bound"))


def loss_of(logp, *, old=None, sampler=None, ref=None, advantage=1.0, weight=None, **changes):
    logp = jnp.asarray(logp, jnp.float32).reshape(1, -1)
    row = logp.shape
    old = logp if old is None else np.float32(old).reshape(row)
    return policy_loss(
        logp,
        np.zeros(row, np.float32),
        old_logp_BT=old,
        sampler_logp_BT=old if sampler is None else np.float32(sampler).reshape(row),
        ref_logp_BT=None if ref is None else np.float32(ref).reshape(row),
        advantage_BT=np.broadcast_to(np.float32(advantage), row),
        weight_BT=np.ones(row, np.float32) if weight is None else np.float32(weight).reshape(row),
        positions_BT=np.zeros(row, np.int32),
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


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) + 0.5 - 1)]
)
def test_kl_estimates_by_hand(kind, expected):
    sums = loss_of([-1.0], ref=[-1.5], advantage=0.0, kl_coef=0.1, kl_type=kind)
    np.testing.assert_allclose(sums.kl, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.loss, 0.1 * expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_dual", "loss", "grad"),
    [
        (5.0, -2.0, 3.0, 6.0, 0.0),  # three times the advantage is the most that it costs
        (2.5, -2.0, 3.0, 5.0, 5.0),  # not yet
        (0.5, -2.0, 3.0, 1.6, 0.0),  # the lower bound holds as before
        (5.0, 2.0, 3.0, -2.6, 0.0),  # a good token has the upper bound
        (0.1, 2.0, 3.0, -0.2, -0.2),
        (5.0, -2.0, 0.0, 10.0, 10.0),  # off
    ],
)
def test_dual_clip_by_hand(ratio, advantage, clip_dual, loss, grad):
    def total(logp):
        return loss_of([logp], old=[-1.0], advantage=advantage, clip_dual=clip_dual)

    sums = total(np.log(ratio) - 1.0)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: total(x).loss)(np.log(ratio) - 1.0), grad, rtol=1e-5
    )
    assert bool(sums.clipped) == (grad == 0.0)


@pytest.mark.parametrize(
    ("delta", "kind", "bound", "kl", "grad"),
    [
        (2.0, "k3", 10.0, np.exp(2) - 3, 1 - np.exp(2)),
        (3.0, "k3", 10.0, 10.0, 0.0),  # exp(3) - 4 = 16.1
        (-11.5, "k3", 10.0, 10.0, 0.0),  # 10.5
        (-9.0, "k3", 10.0, np.exp(-9) + 8, 1 - np.exp(-9)),
        (3.0, "k3", 0.0, np.exp(3) - 4, 1 - np.exp(3)),  # off
        (12.0, "k1", 10.0, -12.0, 1.0),  # these do not grow so fast
        (12.0, "k2", 10.0, 72.0, -12.0),
    ],
)
def test_bounded_kl_by_hand(delta, kind, bound, kl, grad):
    """delta: log reference - log policy."""

    def total(logp):
        return loss_of(
            [logp],
            ref=[delta - 1.0],
            old=[-1.0],
            advantage=0.0,
            kl_coef=1.0,
            kl_type=kind,
            kl_bound=bound,
        )

    np.testing.assert_allclose(total(-1.0).loss, kl, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: total(x).loss)(-1.0), grad, rtol=1e-5)


def reference_token(logp, old, sampler, ref, advantage, s):
    """Loss of one token and its gradient, by cases in float64: written from the equations."""
    inside = abs(logp - old) < 20
    ratio = np.exp(np.clip(logp - old, -20, 20))
    surrogate, grad = ratio * advantage, ratio * advantage * inside
    if advantage > 0 and ratio > 1 + s["clip_high"]:
        surrogate, grad = (1 + s["clip_high"]) * advantage, 0.0
    if advantage < 0 and ratio < 1 - s["clip_low"]:
        surrogate, grad = (1 - s["clip_low"]) * advantage, 0.0
    if advantage < 0 and s["clip_dual"] and ratio > s["clip_dual"]:
        surrogate, grad = s["clip_dual"] * advantage, 0.0
    weight = min(np.exp(np.clip(old - sampler, -20, 20)), s["importance_cap"])
    delta = np.clip(ref - logp, -20, 20)
    kl, kl_grad = np.exp(delta) - delta - 1, (1 - np.exp(delta)) * (abs(ref - logp) < 20)
    if s["kl_bound"] and kl > s["kl_bound"]:
        kl, kl_grad = s["kl_bound"], 0.0
    return -weight * surrogate + s["kl_coef"] * kl, -weight * grad + s["kl_coef"] * kl_grad


@pytest.mark.parametrize("clip_dual", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("kl_bound", [0.0, 0.5, 10.0])
def test_loss_and_gradient_equal_an_independent_reference(clip_dual, kl_bound):
    """400 tokens, of which 300 count, with ratios from e^-4 to e^4 and a few beyond all bounds."""
    rng, n = np.random.default_rng(0), 400
    logp = -rng.exponential(2.0, n)
    old = logp + rng.uniform(-4, 4, n)
    sampler = logp + rng.uniform(-3, 3, n)
    ref = logp + rng.uniform(-12, 4, n)
    old[:8] += [25, -25] * 4
    ref[4:12] += [25, -45] * 4
    advantage = rng.choice([-1.3, -0.4, 0.0, 0.7, 2.0], n)
    weight = np.where(np.arange(n) < 300, rng.uniform(0.1, 1, n), 0.0)
    s = {**SETTINGS, "kl_coef": 0.3, "clip_dual": clip_dual, "kl_bound": kl_bound}
    tokens = zip(logp, old, sampler, ref, advantage, strict=True)
    expected = np.array([reference_token(*token, s) for token in tokens])

    @jax.jit
    @jax.value_and_grad
    def differentiate(x):
        given = dict(old=old, sampler=sampler, ref=ref, weight=weight)
        return loss_of(x, advantage=advantage, **given, **s).loss

    loss, grad = differentiate(jnp.asarray(logp, jnp.float32))
    np.testing.assert_allclose(loss, weight @ expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(grad, weight * expected[:, 1], rtol=2e-3, atol=1e-4)


def test_kl_pulls_towards_the_reference():
    grad = jax.grad(
        lambda x: loss_of([x], old=[-1.0], ref=[-2.0], advantage=0.0, kl_coef=1.0).loss
    )(-1.0)
    assert grad > 0  # likelier than in the reference: gradient descent makes it less likely


@pytest.mark.parametrize(
    ("sampler", "expected"), [(-1.0, -1.0), (-1.5, -np.exp(0.5)), (-9.0, -2.0)]
)
def test_truncated_importance_weight(sampler, expected):
    np.testing.assert_allclose(
        loss_of([-1.0], old=[-1.0], sampler=[sampler]).loss, expected, rtol=1e-6
    )


def test_on_policy_gradient_is_reinforce():
    logp = jnp.array([-0.5, -1.0, -2.0])
    grad = jax.grad(lambda x: loss_of(x, old=logp, advantage=3.0).loss)(logp)
    np.testing.assert_allclose(grad, [-3.0] * 3, rtol=1e-6)


def test_weight_zero_means_no_token_even_when_it_is_broken():
    def total(x):
        return loss_of(
            jnp.array([-1.0, x]), old=[-1.0, -2.0], ref=[-1.0, -1.0], weight=[1.0, 0.0], kl_coef=1.0
        ).loss

    assert float(total(-2.0)) == float(total(jnp.nan)) == -1.0
    assert float(jax.grad(total)(-3.0)) == float(jax.grad(total)(jnp.nan)) == 0.0


def test_extreme_ratios_stay_finite():
    sums = loss_of(
        [0.0], old=[-1000.0], sampler=[-5000.0], ref=[500.0], advantage=-1.0, kl_coef=1.0
    )
    assert np.isfinite(sums.loss)


def test_gradients_match_finite_differences():
    old = np.array([-1.0, -0.7, -2.0])
    check_grads(
        lambda x: loss_of(x, old=old, ref=old - 0.3, kl_coef=0.5).loss,
        (jnp.array(old + 0.05),),
        order=1,
        rtol=2e-2,
    )


def test_group_of_one_keeps_its_reward():
    rewards = np.array([0.0, 0.4, 1.0])
    for std in (False, True):
        np.testing.assert_allclose(
            objective.advantages(rewards, np.arange(3), std=std), rewards, rtol=1e-6
        )


def test_equal_group_has_no_advantage():
    for changes in ({}, {"std": True}, {"leave_one_out": True}):
        for reward in (1.0, 0.1):  # three times 0.1 is not 0.3
            assert not objective.advantages(np.full(3, reward), np.zeros(3), **changes).any()


def test_grpo_by_hand():
    rewards, groups = np.array([1.0, 0.0, 0.0, 1.0, 1.0]), np.array([7, 7, 7, 2, 2])
    np.testing.assert_allclose(
        objective.advantages(rewards, groups), [2 / 3, -1 / 3, -1 / 3, 0, 0], atol=1e-6
    )
    std = np.array([1.0, 0.0, 0.0]).std(ddof=1)
    expected = np.array([2 / 3, -1 / 3, -1 / 3, 0, 0]) / (std + 1e-6)
    np.testing.assert_allclose(
        objective.advantages(rewards, groups, std=True), expected, rtol=1e-5, atol=1e-6
    )


def test_leave_one_out_is_reward_minus_mean_of_the_others():
    rewards = np.array([1.0, 0.0, 0.5])
    expected = [1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5]
    np.testing.assert_allclose(
        objective.advantages(rewards, np.zeros(3), leave_one_out=True), expected, atol=1e-6
    )


@pytest.mark.parametrize(
    ("aggregation", "expected", "total"),
    [
        ("sequence_mean", [1 / 4, 1 / 8], 1.0),
        ("token_mean", [1 / 6, 1 / 6], 1.0),
        ("constant", [1 / 20, 1 / 20], 0.3),  # 2 episodes of at most 10 tokens, 6 of 20 taken
    ],
)
def test_sequence_weights_by_hand(aggregation, expected, total):
    lengths = np.array([2, 4])
    weight = objective.sequence_weight(lengths, aggregation, 10)
    np.testing.assert_allclose(weight, expected)
    assert (weight * lengths).sum() == pytest.approx(total)


_random = np.random.default_rng(0)
HIDDEN = jnp.asarray(_random.standard_normal((2, 8, 5), np.float32))
WEIGHT = jnp.asarray(_random.standard_normal((11, 5), np.float32))
TARGETS = jnp.asarray(_random.integers(0, 11, (2, 8)), jnp.int32)
ALL = jnp.ones((2, 8), bool)
# eager, each call would trace and compile its loops
token_logprobs = jax.jit(logprobs.token_logprobs, static_argnums=(4, 5))


def plain(hidden, weight, temperature):
    return jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, weight) / temperature)


@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_token_logprobs_equal_plain_log_softmax_where_wanted(chunk, temperature, share):
    """Values and gradients; what is not wanted is 0 and gets none, whatever its cotangent."""
    wanted = np.random.default_rng(0).random((2, 8)) < share
    got = with_gradients(chunked, wanted, temperature, chunk)
    expected = with_gradients(whole, wanted, temperature, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def chunked(hidden, weight, wanted, temperature, chunk):
    return logprobs.token_logprobs(hidden, weight, TARGETS, wanted, temperature, chunk)[0]


def whole(hidden, weight, wanted, temperature, chunk):
    logp = plain(hidden, weight, temperature)
    return jnp.take_along_axis(logp, TARGETS[..., None], -1)[..., 0] * wanted


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def with_gradients(function, wanted, temperature, chunk):
    """Outputs, and gradients of something that weighs each of them differently."""

    def run(hidden, weight):
        return function(hidden, weight, wanted, temperature, chunk)

    outputs, back = jax.vjp(run, HIDDEN, WEIGHT)
    return outputs, back(jnp.linspace(-1, 2, 16).reshape(2, 8))


def test_gradient_of_a_float32_weight_is_not_rounded_to_the_compute_dtype():
    @jax.jit
    @jax.grad
    def gradient(weight):
        hidden = HIDDEN.astype(jnp.bfloat16)
        return logprobs.token_logprobs(hidden, weight, TARGETS, ALL, 1.0, 2)[0].sum()

    grad = gradient(WEIGHT)
    assert grad.dtype == jnp.float32 and (grad != grad.astype(jnp.bfloat16)).any()


def test_entropy_equals_plain_and_has_no_gradient():
    @jax.jit
    def with_gradient(hidden):
        def entropy(hidden):
            return logprobs.token_logprobs(hidden, WEIGHT, TARGETS, ALL, 0.7, 4)[1]

        entropies, back = jax.vjp(entropy, hidden)
        return entropies, *back(jnp.ones_like(entropies))

    logp = np.asarray(plain(HIDDEN, WEIGHT, 0.7))
    entropies, grad = with_gradient(HIDDEN)
    np.testing.assert_allclose(entropies, -(np.exp(logp) * logp).sum(-1), rtol=1e-4)
    assert not grad.any()


def test_no_array_of_all_logits_exists():
    def total(hidden, weight):
        return logprobs.token_logprobs(hidden, weight, TARGETS, ALL, 1.0, 2)[0].sum()

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(HIDDEN, WEIGHT).as_text()
    assert "tensor<2x2x11xf32>" in text and "2x8x11x" not in text and "4x2x2x11x" not in text


def test_entropy_by_hand():
    hidden = np.ones((1, 2, 1), np.float32)
    weight = np.log(np.array([[0.5], [0.25], [0.25]], np.float32))
    targets = np.zeros((1, 2), np.int32)
    _, entropy = token_logprobs(hidden, weight, targets, np.ones((1, 2), bool), 1.0, 2)
    np.testing.assert_allclose(entropy, 1.5 * np.log(2), rtol=1e-6)


def test_reinforce_by_hand():
    """-1/2 sum_i 1/n_i sum_t A_i log p_it: episodes of 1 and 2 tokens, rewards 1 and 0.5."""
    advantages = objective.advantages(np.array([1.0, 0.5]), np.arange(2))
    weights = objective.sequence_weight(np.array([1, 2]), "sequence_mean", 1)
    logp = jnp.array([[-1.0, -2.0, -3.0]])

    def total(logp_BT):
        episodes = [0, 1, 1]
        given = dict(advantage=advantages[episodes], weight=weights[episodes])
        return loss_of(logp_BT, old=logp, **given).loss

    loss, grad = jax.value_and_grad(total)(logp)
    np.testing.assert_allclose(loss, -(1 / 2) * (1.0 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5, -0.125, -0.125]], rtol=1e-6)
