"""The frozen base is in memory once, whoever asks for it, and keeps its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.model import decoder, sharding
from ssp_jax.model.decoder import ModelConfig
from ssp_jax.model.weights import FrozenBase
from tests.random_params import random_params

# Wide enough for transposed kernels; all kinds of leaves.
CONFIG = ModelConfig(61, 2, 256, 4, 2, 64, 96, qkv_bias=True, qk_norm=True)
PARAMS = random_params(CONFIG)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_the_base_moves_between_learner_and_sampler_and_keeps_its_bytes(axes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)))
    laid_out = sharding.param_shardings(PARAMS, mesh)

    def as_loaded():
        return jax.device_put(PARAMS, laid_out)

    expected = sharding.sampler_copy(CONFIG, mesh, jnp.float32)(as_loaded())
    stacked = as_loaded()
    frozen = FrozenBase(CONFIG, stacked, mesh)

    # As the learner has it: the arrays that were given.
    jax.tree.map(lambda x, y: np.testing.assert_(x is y), frozen.for_learner(), stacked)

    # As the sampler has it: what its copy of these weights would be, and the other is gone.
    playing = frozen.for_sampler()
    jax.tree.map(np.testing.assert_array_equal, playing, expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_(x.sharding.is_equivalent_to(y.sharding, x.ndim)),
        playing,
        expected,
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(stacked["layers"]))

    # And back.
    back = frozen.for_learner()
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)
    jax.tree.map(
        lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), back, laid_out
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(playing["layers"]))


def test_base_and_adapter_are_one_tree_apart_and_joined():
    config = ModelConfig(61, 2, 32, 4, 2, 8, 48, lora=None)
    params = random_params(config)
    base, adapter = decoder.split_adapter(params)
    assert adapter == {} and jax.tree.structure(base) == jax.tree.structure(params)
    assert jax.tree.structure(decoder.join(base, adapter)) == jax.tree.structure(params)
