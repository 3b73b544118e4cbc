"""Adapters for tests."""

import jax

from ssp_jax.model import decoder
from ssp_jax.model.decoder import ModelConfig, Params


def random_adapter(config: ModelConfig) -> Params:
    """An adapter that changes what the model says: its B is not zero. Stacked, float32."""
    adapter = decoder.trainable(config, decoder.init_params(config, jax.random.key(1)))
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)
