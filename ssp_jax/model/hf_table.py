"""The table of names: where each parameter is in a Hugging Face file, and in what order of axes.

An adapter's names follow from those of the kernels beside which it is, as PEFT makes them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ssp_jax.model.decoder import PROJECTIONS, ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter, with axes in the letters of ssp_jax/__init__.py."""

    path: str  # in params
    tensor: str  # in the file, {} is the layer
    file_axes: str  # each word is one axis of the file: "NH D" is 2-D
    axes: str  # in params, without the layer axis

    @property
    def layered(self) -> bool:
        """Whether the file has a tensor for each layer, which params stack."""
        return "{}" in self.tensor

    def module(self, tree: Params) -> Any:
        """The parameters of this one's module, in a tree that is shaped like params."""
        node: Any = tree
        for key in self.path.split("/")[:-1]:
            node = node[key]
        return node

    def leaf(self, tree: Params) -> Any:
        """This parameter of a tree that is shaped like params."""
        return self.module(tree)[self.path.rpartition("/")[2]]

    def file_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of the tensor in the file. sizes: letter -> size."""
        shape = []
        for word in self.file_axes.split():
            merged = [sizes[letter] for letter in word]
            shape.append(math.prod(merged))
        return tuple(shape)

    @property
    def split(self) -> str:
        """The file's axes, with merged ones apart."""
        return self.file_axes.replace(" ", "")

    def as_in_file(self, items: Sequence[Any]) -> list[Any]:
        """Puts one item per axis of params into the order of the file's axes."""
        return [items[self.axes.index(letter)] for letter in self.split]


# Two names of one tensor in tied models.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER = "model.layers.{}."
# Parameters of all models; `table` has those of one.
EVERY = (
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


# PEFT wraps a model twice, and names its modules from outside.
_ADAPTER_PREFIX = "base_model.model."


def table(config: ModelConfig) -> list[Name]:
    """The parameters of a model of this shape without its adapter, in the order of the table."""
    absent = set()
    if not config.qkv_bias:
        absent |= {"bias"}
    if not config.qk_norm:
        absent |= {"q_norm", "k_norm"}
    if config.tie_embeddings:
        absent |= {"head"}
    return [name for name in EVERY if absent.isdisjoint(name.path.split("/"))]


def kernel(projection: str) -> Name:
    """The kernel of a projection of each layer, by its name in PEFT."""
    path = f"layers/{PROJECTIONS[projection]}/kernel"
    return next(name for name in EVERY if name.path == path)


def adapter_table(config: ModelConfig) -> list[Name]:
    """The parameters of the model's adapter: A and B of each projection that has one."""
    if config.lora is None:
        return []
    names = []
    for projection in config.lora.targets:
        of = kernel(projection)
        outputs, inputs = of.file_axes.split()
        path = of.path.removesuffix("kernel")
        tensor = _ADAPTER_PREFIX + of.tensor.removesuffix("weight")
        names += [
            Name(path + "lora_a", tensor + "lora_A.weight", f"Y {inputs}", f"{inputs}Y"),
            Name(path + "lora_b", tensor + "lora_B.weight", f"{outputs} Y", f"Y{outputs}"),
        ]
    return names


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter."""
    rank = {} if config.lora is None else {"Y": config.lora.rank}
    return rank | {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }


def tensors(name: Name, config: ModelConfig) -> list[str]:
    """Names of a parameter's tensors in the file, layer by layer."""
    if not name.layered:
        return [name.tensor]
    return [name.tensor.format(layer) for layer in range(config.num_layers)]


def file_shapes(names: Sequence[Name], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of these parameters, in the order in which they are written."""
    shapes = {}
    for name in names:
        shape = name.file_shape(sizes(config))
        for tensor in tensors(name, config):
            shapes[tensor] = shape
    return shapes
