"""The weights of a run: the initial ones, and those of its checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax.model import decoder, sharding
from ssp_jax.model.decoder import Params
from ssp_jax.model.weights import FullWeights, LoraWeights, Weights
from ssp_jax.runtime.checkpoint import Checkpoints


def make_weights(
    config: ConfigDict, model_config: decoder.ModelConfig, mesh: jax.sharding.Mesh
) -> Weights:
    """Where the weights of a run come from."""
    folder = config.model.path
    dtype = jnp.dtype(config.model.dtype)
    if model_config.lora is None:
        return FullWeights(folder, model_config, mesh, dtype)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # steps of play take 1, 2, ...
    return LoraWeights(folder, model_config, mesh, dtype, config.model.adapter or key)


def restore_trained(
    checkpoints: Checkpoints,
    step: int,
    model_config: decoder.ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> Params:
    """What a run trains, as it was after a step, laid out as the learner has it. Raises Damaged.

    The optimizer's state stays on disk.
    """

    def array_like(x: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)

    abstract = decoder.abstract_trainable(model_config)
    like = jax.tree.map(array_like, abstract, sharding.param_shardings(abstract, mesh))
    params: Params = checkpoints.restore_params(step, like)
    return params


def initial_name(config: ConfigDict) -> str:
    """How tables and logs name the weights that a run starts from."""
    name = f"initial weights of {config.model.path}"
    return f"{name} with {config.model.adapter}" if config.model.adapter else name
