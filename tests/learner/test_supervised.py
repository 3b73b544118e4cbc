"""Supervised updates: the loss is that of sampled tokens alone, by hand; nothing else moves it."""

import dataclasses

import jax
import numpy as np
import pytest

from ssp_jax.learner.batches import make_batches
from ssp_jax.warm_start.run import SUPERVISED
from tests.learner.test_update import BASE, EPISODES, PARAMS, close, learner, logprobs, programs
from tests.model.test_decoder import full_logits

pytestmark = pytest.mark.usefixtures("quick_compile")

C = dataclasses.replace(BASE, **SUPERVISED)
ONES = np.ones(len(EPISODES), np.float32)


def accumulated(c, batch):
    """Gradient and loss of a micro-batch."""
    grads, sums = programs(c).accumulate(None, PARAMS, {}, batch, batch.sampler_logp_BT, None)
    return jax.device_get(grads), float(sums.loss)


@pytest.fixture(scope="module")
def batch():
    (made,) = make_batches(C, EPISODES, ONES)
    return made


@pytest.fixture(scope="module")
def shown(batch):
    return accumulated(C, batch)


def test_the_loss_is_the_mean_of_own_tokens_by_hand(shown):
    """Each episode in a row of its own, by the softmax of whole logits, in float64."""
    tokens_BT = np.zeros((len(EPISODES), C.row_tokens), np.int32)
    for row, episode in enumerate(EPISODES):
        tokens_BT[row, : len(episode.tokens)] = episode.tokens
    logits_BTV = np.asarray(full_logits(C.model, PARAMS, tokens_BT), np.float64)
    log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
    losses = []
    for row, episode in enumerate(EPISODES):
        for t in np.flatnonzero(episode.sampled):
            losses.append(log_sum_BT[row, t - 1] - logits_BTV[row, t - 1, episode.tokens[t]])
    assert shown[1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert learner(C).surprise(PARAMS, EPISODES) == pytest.approx(np.mean(losses), rel=1e-5)


def test_targets_that_were_given_change_nothing(batch, shown):
    is_given = batch.weight_BT == 0
    assert is_given.any() and not is_given.all()
    other = np.where(is_given, (batch.targets_BT + 7) % C.model.vocab_size, batch.targets_BT)
    grads, loss = accumulated(C, dataclasses.replace(batch, targets_BT=other))
    assert loss == shown[1]
    jax.tree.map(np.testing.assert_array_equal, grads, shown[0])


@pytest.mark.ci
def test_its_gradient_is_that_of_the_policy_loss_with_advantages_of_one(batch, shown):
    """Of a policy that has not moved: its sampler's log-probs are the learner's."""
    policy = dataclasses.replace(C, supervised=False)
    exact = dataclasses.replace(batch, sampler_logp_BT=logprobs(policy, batch))
    grads, _ = accumulated(policy, exact)
    close(grads, shown[0], atol=1e-6)
