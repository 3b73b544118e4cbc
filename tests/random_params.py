"""Random weights from numpy: to compile `decoder.init_params` takes a test file ten seconds."""

from typing import Any

import jax
import numpy as np

from ssp_jax.model import decoder


def random_params(config: decoder.ModelConfig, seed: int = 0) -> decoder.Params:
    """Float32 params on the host, of about the sizes that `decoder.init_params` gives them."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(x.shape, np.float32)
        if path[-1].key == "bias":
            return np.zeros(x.shape, np.float32)
        std = np.float32(config.embed_dim**-0.5)
        return std * rng.standard_normal(x.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract_params(config))
