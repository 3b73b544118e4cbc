"""Adapters for tests."""

import jax
import numpy as np

from ssp_jax.model import decoder
from ssp_jax.model.decoder import ModelConfig, Params


def random_adapter(config: ModelConfig) -> Params:
    """An adapter that changes what the model says: its B is not zero. Stacked, float32."""
    rng = np.random.default_rng(2)
    shapes = decoder.trainable(config, decoder.abstract_params(config))
    return jax.tree.map(
        lambda x: jax.device_put(np.float32(0.1) * rng.standard_normal(x.shape, np.float32)), shapes
    )
