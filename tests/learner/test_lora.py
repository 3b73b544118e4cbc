"""LoRA: only the adapter is trained, the base stays as it is, and the reference is where it was."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ssp_jax.learner.batches import make_batches
from ssp_jax.learner.state import init_state
from ssp_jax.learner.update import Learner, jit_programs
from ssp_jax.model import decoder, sharding
from ssp_jax.model.linear import Lora
from ssp_jax.model.weights import FrozenBase
from tests.adapters import random_adapter
from tests.learner.test_update import ADVANTAGES, BASE, EPISODES, MODEL, PARAMS, copied
from tests.train_states import assert_same_update

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = dataclasses.replace(MODEL, lora=Lora(4, 8.0, tuple(decoder.PROJECTIONS)))
C = dataclasses.replace(BASE, model=CONFIG)
# its B is 0; in one program, which leaves out the base
new_adapter = jax.jit(lambda key: decoder.trainable(CONFIG, decoder.init_params(CONFIG, key)))
NEW = new_adapter(jax.random.key(7))
MOVED = random_adapter(CONFIG)


def fresh_state(c=C, adapter=NEW):
    """Of its own buffers: an update takes them away."""
    return init_state(c, copied(adapter))


@functools.cache
def learner():
    return Learner(C, fresh_state(), NEW, lambda batch: batch, lambda: PARAMS)


def update(state, seed=0):
    return learner().update(state, EPISODES, ADVANTAGES, np.random.default_rng(seed))


@functools.cache
def score(c):
    return jit_programs(c, sharding.device_layout(fresh_state())).score


def test_an_adapter_whose_b_is_zero_gives_the_bases_logprobs_bit_for_bit():
    (batch,) = make_batches(C, EPISODES, ADVANTAGES)
    expected = np.asarray(score(BASE)(PARAMS, {}, batch))
    np.testing.assert_array_equal(score(C)(NEW, PARAMS, batch), expected)
    assert np.abs(np.asarray(score(C)(MOVED, PARAMS, batch)) - expected).max() > 0.1


def test_an_adapter_adds_its_product_to_the_kernel():
    """Log-probs with an adapter are those of W + alpha / rank * A B, rounding apart."""
    (batch,) = make_batches(C, EPISODES, ADVANTAGES)
    merged, adapter = jax.device_get((PARAMS, MOVED))
    for path in decoder.PROJECTIONS.values():
        owner, name = path.split("/")
        added = adapter["layers"][owner][name]
        num_in = decoder.kernel_inputs(CONFIG)[path]
        layers = zip(added["lora_a"], added["lora_b"], strict=True)
        product = np.stack([np.tensordot(a, b, axes=1) for a, b in layers])
        kernel = merged["layers"][owner][name]["kernel"]
        assert num_in == added["lora_a"].ndim - 2 and product.shape == kernel.shape
        merged["layers"][owner][name]["kernel"] = kernel + 8.0 / 4 * product
    got = score(C)(MOVED, PARAMS, batch)
    np.testing.assert_allclose(got, score(BASE)(merged, {}, batch), atol=2e-4)


def test_an_update_trains_the_adapter_alone():
    before = jax.device_get(PARAMS)
    state, _ = update(fresh_state())
    assert decoder.flatten(state.params).keys() == decoder.flatten(NEW).keys()
    old = decoder.flatten(jax.device_get(NEW))
    for name, leaf in decoder.flatten(state.params).items():
        # The gradient of A is 0 while B is.
        moved = np.any(np.asarray(leaf) != old[name])
        assert moved == name.endswith("lora_b"), name
    state, _ = update(state)
    for name, leaf in decoder.flatten(state.params).items():
        assert np.any(np.asarray(leaf) != old[name]), name
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)


def test_the_reference_is_the_initial_model_whatever_is_trained():
    """The divergence is exactly 0 before the first update, and again for the initial adapter."""
    state, report = update(fresh_state())
    assert report["kl"] == 0.0
    _, report = update(state)
    assert report["kl"] > 1e-6
    _, report = update(fresh_state())
    assert report["kl"] == 0.0


@pytest.mark.ci
@pytest.mark.parametrize("axes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_a_sharded_update_equals_a_single_devices(axes):
    """The base moves to the sampler and back in between."""
    start = fresh_state(adapter=MOVED)
    expected, _ = learner().update(start, EPISODES, ADVANTAGES, np.random.default_rng(0))

    mesh = sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)))
    on_host = jax.device_get(PARAMS)
    base = jax.device_put(on_host, sharding.param_shardings(on_host, mesh))
    frozen = FrozenBase(CONFIG.base, base, mesh)
    frozen.for_sampler()
    rows = sharding.rows_sharding(mesh)
    c = dataclasses.replace(C, rows_sharding=rows)
    laid_out = sharding.param_shardings(MOVED, mesh)
    state = init_state(c, jax.device_put(MOVED, laid_out))
    reference = jax.device_put(NEW, laid_out)
    split = Learner(
        c, state, reference, lambda batch: jax.device_put(batch, rows), frozen.for_learner
    )
    state, _ = split.update(state, EPISODES, ADVANTAGES, np.random.default_rng(0))
    assert_same_update(expected, state, BASE)
