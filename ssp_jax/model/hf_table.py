"""The one table of names: where a parameter of ours is in a Hugging Face model, and how its axes
lie there.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from ssp_jax.model.decoder import ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter. Axes in the letters of ssp_jax/__init__.py; the file merges the axes of a word
    ("NH D" is 2-D).
    """

    path: str  # in params
    tensor: str  # in the file, {} is the layer
    file_axes: str
    axes: str  # in params, without the layer axis

    @property
    def layered(self) -> bool:
        return "{}" in self.tensor

    def leaf(self, tree: Params) -> Any:
        """This parameter of a tree that is shaped like params."""
        return functools.reduce(lambda node, part: node[part], self.path.split("/"), tree)

    def file_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[a] for a in word) for word in self.file_axes.split())

    @property
    def split(self) -> str:
        """The file's axes one by one."""
        return self.file_axes.replace(" ", "")

    def as_in_file(self, items: Sequence[Any]) -> list[Any]:
        """What is given per axis of params, in the order of the file's."""
        return [items[self.axes.index(a)] for a in self.split]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one and the same in tied models
_LAYER = "model.layers.{}."
_NAMES = (
    Name("embed/weight", EMBEDDING, "V D", "VD"),
    Name("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", "D", "D"),
    Name("layers/attention/q/kernel", _LAYER + "self_attn.q_proj.weight", "NH D", "DNH"),
    Name("layers/attention/q/bias", _LAYER + "self_attn.q_proj.bias", "NH", "NH"),
    Name("layers/attention/q_norm/scale", _LAYER + "self_attn.q_norm.weight", "H", "H"),
    Name("layers/attention/k/kernel", _LAYER + "self_attn.k_proj.weight", "KH D", "DKH"),
    Name("layers/attention/k/bias", _LAYER + "self_attn.k_proj.bias", "KH", "KH"),
    Name("layers/attention/k_norm/scale", _LAYER + "self_attn.k_norm.weight", "H", "H"),
    Name("layers/attention/v/kernel", _LAYER + "self_attn.v_proj.weight", "KH D", "DKH"),
    Name("layers/attention/v/bias", _LAYER + "self_attn.v_proj.bias", "KH", "KH"),
    Name("layers/attention/o/kernel", _LAYER + "self_attn.o_proj.weight", "D NH", "NHD"),
    Name("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D", "D"),
    Name("layers/mlp/gate/kernel", _LAYER + "mlp.gate_proj.weight", "F D", "DF"),
    Name("layers/mlp/up/kernel", _LAYER + "mlp.up_proj.weight", "F D", "DF"),
    Name("layers/mlp/down/kernel", _LAYER + "mlp.down_proj.weight", "D F", "FD"),
    Name("final_norm/scale", "model.norm.weight", "D", "D"),
    Name("head/weight", HEAD, "V D", "VD"),
)


def table(config: ModelConfig) -> list[Name]:
    """The rows of the table that a model of this shape has."""
    absent = {
        "bias": not config.qkv_bias,
        "q_norm": not config.qk_norm,
        "k_norm": not config.qk_norm,
    }
    absent["head"] = config.tie_embeddings
    return [
        name for name in _NAMES if not any(absent.get(part, False) for part in name.path.split("/"))
    ]


def sizes(c: ModelConfig) -> dict[str, int]:
    return dict(
        V=c.vocab_size, D=c.embed_dim, F=c.mlp_dim, N=c.num_heads, K=c.num_kv_heads, H=c.head_dim
    )


def tensors(name: Name, config: ModelConfig) -> list[str]:
    return (
        [name.tensor.format(layer) for layer in range(config.num_layers)]
        if name.layered
        else [name.tensor]
    )


def file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of a model in the order in which they are written."""
    return {
        tensor: name.file_shape(sizes(config))
        for name in table(config)
        for tensor in tensors(name, config)
    }
