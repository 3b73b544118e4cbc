"""The models and configs of the checks of speed, and what the planner says that they need."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.proof.rows import Setting
from configs import qwen0p5b, qwen7b
from ssp_jax.assembly import sections
from ssp_jax.model import attention as kernels
from ssp_jax.model import decoder, presets, sharding
from ssp_jax.plan import memory
from ssp_jax.rollout.engine import Sizes

SLICE_LAYERS = 4  # of the 28 of 7B
SLICE_SLOTS = 32
_SMALL_MODEL = decoder.ModelConfig(
    512, 2, 64, 4, 2, 16, 96, rope_theta=1e6, tie_embeddings=True, qkv_bias=True
)
_SMALL: dict[str, Any] = {
    "engine.slots": 4,
    "engine.chunk": 4,
    "engine.cache_tokens": 384,
    "engine.cache_buckets": (128, 256),
    "engine.extend_buckets": (64,),
    "engine.extend_rows": 1,
    "learner.row_tokens": 512,
}


@dataclass(frozen=True)
class Case:
    """A model of random weights, and the config that it is played and trained with."""

    model: decoder.ModelConfig
    config: ConfigDict

    @property
    def sizes(self) -> Sizes:
        return sections.make_sizes(self.config, 1)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The first device alone."""
        return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def target(self, attention: str = "auto") -> memory.Target:
        """What the planner plans for."""
        config = self.config.copy_and_resolve_references()
        config.model.attention = attention
        platform = jax.default_backend()
        gpu = kernels.capability(jax.devices()[0])
        return memory.Target(config, self.model, self.mesh, platform=platform, gpu=gpu)


def qwen_0p5b(setting: Setting) -> Case:
    """Qwen2.5-0.5B with the slots of its config, and one row of an update."""
    config = qwen0p5b.get_config()
    return _case(setting, config, presets.architecture(config.model.path), {})


def slice_of_7b(setting: Setting) -> Case:
    """Some layers of Qwen2.5-7B with the slots of one of eight GPUs."""
    config = qwen7b.get_config()
    model = presets.architecture(config.model.path)
    model = dataclasses.replace(model, num_layers=SLICE_LAYERS)
    return _case(setting, config, model, {"engine.slots": SLICE_SLOTS})


def _case(
    setting: Setting, config: ConfigDict, model: decoder.ModelConfig, changes: dict[str, Any]
) -> Case:
    # The objective of benchmarks/update.py, which has no reference model.
    values = changes | {"mesh.fsdp": 1, "learner.rows": 1, "learner.kl_coef": 0.0}
    if setting.small:
        values |= _SMALL
        model = dataclasses.replace(_SMALL_MODEL, tie_embeddings=model.tie_embeddings)
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return Case(model, config)
