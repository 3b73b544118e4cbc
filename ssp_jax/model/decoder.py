"""The decoder of Qwen2.5, Qwen3 and Llama-3 in Flax NNX. Knows no search, mesh or sampling.

The module defines names, shapes and arithmetic; `nnx.split` happens once and from there on
everything passes `params`, one pure nested dict whose layer weights are stacked on axis 0. Training
scans over that stack. The sampler keeps the layers as a tuple instead (`unstack`) and unrolls them:
slicing a stacked weight inside a decode loop copies it on CPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssp_jax.model import attention, linear
from ssp_jax.model.linear import (
    LORA_LEAVES,
    Linear,
    Lora,
    TransposedLinear,
    matmul,
    skinny_matmul,
)

Params = dict[str, Any]
# (q, k, v) -> (o, what is kept: a cache, or None)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# (params, tokens, dtype) -> [B, T, D]
LookUp = Callable[[Params, jax.Array, Any], jax.Array]
Place = Callable[[jax.Array], jax.Array]  # constrains how [B, T, D] is split over devices
# What the forward pass keeps of a layer; the backward pass computes the rest again. From little
# memory to much: full keeps the layer's input alone (about 4/3 of the arithmetic), none everything.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.KEPT),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.KEPT, linear.KEPT),
    ),
    "none": jax.checkpoint_policies.everything_saveable,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's "llama3" scaling of rotary frequencies (config.json, rope_scaling)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model, as read from a Hugging Face config.json."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    lora: Lora | None = None  # of the model's adapter; config.json knows nothing of it

    @property
    def base(self) -> "ModelConfig":
        """The same model without its adapter."""
        return dataclasses.replace(self, lora=None)

    def adapter(self, projection: str) -> Lora | None:
        """The adapter of this projection of each layer, by its name in PEFT."""
        has_one = self.lora is not None and projection in self.lora.targets
        return self.lora if has_one else None


# Linear layers that can have an adapter: name in PEFT's folders -> path in a layer.
PROJECTIONS = {
    "q_proj": "attention/q",
    "k_proj": "attention/k",
    "v_proj": "attention/v",
    "o_proj": "attention/o",
    "gate_proj": "mlp/gate",
    "up_proj": "mlp/up",
    "down_proj": "mlp/down",
}


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 as the reference models do."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
        scale = self.scale[...].astype(x.dtype)
        leading = (1,) * (x.ndim - 1)
        return x32.astype(x.dtype) * scale.reshape(leading + scale.shape)


def _residual_gain(c: ModelConfig) -> float:
    """As in GPT-2: the sum of all layers' outputs stays small."""
    return (2 * c.num_layers) ** -0.5


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        queries = (c.num_heads, c.head_dim)
        keys = (c.num_kv_heads, c.head_dim)
        width = (c.embed_dim,)
        self.q = Linear(width, queries, rngs, c.qkv_bias, lora=c.adapter("q_proj"))
        self.k = Linear(width, keys, rngs, c.qkv_bias, lora=c.adapter("k_proj"))
        self.v = Linear(width, keys, rngs, c.qkv_bias, lora=c.adapter("v_proj"))
        gain = _residual_gain(c)
        self.o = Linear(queries, width, rngs, gain=gain, lora=c.adapter("o_proj"))
        self.qk_norm = c.qk_norm
        if c.qk_norm:  # Qwen3
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        q_BTNH = self.q(x_BTD)
        k_BTKH = self.k(x_BTD)
        v_BTKH = self.v(x_BTD)
        if self.qk_norm:
            q_BTNH = self.q_norm(q_BTNH)
            k_BTKH = self.k_norm(k_BTKH)
        o_BTNH, kept = attend(rotate(q_BTNH, rope), rotate(k_BTKH, rope), v_BTKH)
        return self.o(o_BTNH), kept


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        width = (c.embed_dim,)
        inner = (c.mlp_dim,)
        self.gate = Linear(width, inner, rngs, lora=c.adapter("gate_proj"))
        self.up = Linear(width, inner, rngs, lora=c.adapter("up_proj"))
        gain = _residual_gain(c)
        self.down = Linear(inner, width, rngs, gain=gain, lora=c.adapter("down_proj"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer. `attend` decides what is attended to, and what is kept."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attention = Attention(c, rngs)
        self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.mlp = MLP(c, rngs)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        out_BTD, kept = self.attention(self.attention_norm(x_BTD), rope, attend)
        x_BTD = x_BTD + out_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kept


class Embedding(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        std = c.embed_dim**-0.5  # logits start with a standard deviation near 1
        shape = (c.vocab_size, c.embed_dim)
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Decoder(nnx.Module):
    """Names and shapes of all weights; what is computed around the layers is below."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embed = Embedding(c, rngs)
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers = nnx.vmap(lambda key: Block(c, nnx.Rngs(params=key)))(keys)
        self.final_norm = RMSNorm(c.embed_dim, c.norm_eps)
        if not c.tie_embeddings:
            self.head = Embedding(c, rngs)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 params, for tests and for models that are trained from nothing."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: ModelConfig) -> Params:
    """The params tree with jax.ShapeDtypeStruct leaves; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def abstract_trainable(config: ModelConfig) -> Params:
    """The tree of what an update changes, with jax.ShapeDtypeStruct leaves."""
    return trainable(config, abstract_params(config))


@functools.cache
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """How many numbers an update changes, and how many the model has with its adapter."""

    def count(params: Params) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    params = abstract_params(config)
    return count(trainable(config, params)), count(params)


# --- what is trained: all params, or the adapter alone --------------------------------------------


def split_adapter(params: Params) -> tuple[Params, Params]:
    """(base, adapter): the leaves of LoRA apart from all others. `join` is the way back.

    params: stacked. Either part has only the branches in which it has leaves.
    """
    base: Params = {}
    adapter: Params = {}
    for name, node in params.items():
        if isinstance(node, dict):
            parts = split_adapter(node)
            for part, child in zip((base, adapter), parts, strict=True):
                if child:
                    part[name] = child
        elif name in LORA_LEAVES:
            adapter[name] = node
        else:
            base[name] = node
    return base, adapter


def join(base: Params, adapter: Params) -> Params:
    """One tree with the leaves of both; no array is copied."""
    joined = dict(base)
    for name, node in adapter.items():
        own: Any = joined.get(name)
        if own is None:
            joined[name] = node
        elif isinstance(node, tuple):
            joined[name] = tuple(map(join, own, node))
        else:
            joined[name] = join(own, node)
    return joined


def flatten(params: Params) -> dict[str, Any]:
    """Path, such as layers/mlp/up/kernel, -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def unflatten(leaves: dict[str, Any]) -> Params:
    """The tree of these paths; `flatten` is the way back."""
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def split_trained(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """(frozen, trained): an update changes the adapter where there is one, or all params."""
    return ({}, params) if config.lora is None else split_adapter(params)


def trainable(config: ModelConfig, params: Params) -> Params:
    """The part of the params that an update changes."""
    return split_trained(config, params)[1]


# --- the layers' modules --------------------------------------------------------------------------


@functools.cache
def kernel_inputs(config: ModelConfig) -> dict[str, int]:
    """Path of each Linear of a layer -> how many of its kernel's first axes are contracted."""
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    return {
        path: getattr(getattr(block, owner), name).num_in
        for path in PROJECTIONS.values()
        for owner, name in [path.split("/")]
    }


def _transpose(block: Block) -> Block:
    """The block with TransposedLinear in place of each Linear."""
    for owner in (block.attention, block.mlp):
        for name, module in list(vars(owner).items()):
            if isinstance(module, Linear):
                setattr(owner, name, TransposedLinear(module))
    return block


@functools.cache
def _block_graph(config: ModelConfig, is_transposed: bool) -> Any:
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    if is_transposed:
        block = nnx.eval_shape(_transpose, block)
    graph, _ = nnx.split(block)
    return graph


def _run_block(config: ModelConfig, layer: Params, *args: Any) -> tuple[jax.Array, Any]:
    is_transposed = "transposed" in layer["mlp"]["down"]
    return nnx.merge(_block_graph(config, is_transposed), layer)(*args)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of the last axis with this scale."""
    norm = RMSNorm(scale.shape[0], eps)
    norm.scale[...] = scale
    return norm(x)


def _frequencies(c: ModelConfig) -> np.ndarray:
    """Rotary frequencies [H/2], radians per position."""
    exponents = np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim
    freq = 1.0 / c.rope_theta**exponents
    s = c.rope_scaling
    if s is not None:
        # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        turns = s.original_max_position_embeddings * freq / (2 * np.pi)
        width = s.high_freq_factor - s.low_freq_factor
        smooth = np.clip((turns - s.low_freq_factor) / width, 0, 1)
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    return freq.astype(np.float32)


def rotary(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H/2]; float32, as bfloat16 is wrong beyond a few hundred positions."""
    positions = positions_BT[:, :, None, None].astype(jnp.float32)
    angles = positions * _frequencies(config)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head against each other (the Hugging Face convention)."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def embed(params: Params, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """[B, T, D] in dtype."""
    return params["embed"]["weight"][tokens_BT].astype(dtype)


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Attend,
    *,
    dtype: Any,
    remat: str = "none",
    look_up: LookUp = embed,
    place: Place = lambda x_BTD: x_BTD,
) -> jax.Array:
    """Hidden states [B, T, D] before the head; for training: stacked params, a scan over layers.

    remat: a key of REMAT. look_up: `embed`, or what does the same on several devices. place:
    constrains how hidden states are split over devices; left alone, XLA may split D as the weights
    are, and then sends activations of all rows to all devices instead of one layer's weights.
    """
    step = _layer_step(config, positions_BT, attend, remat, place)
    x_BTD = place(look_up(params, tokens_BT, dtype))
    x_BTD, _ = jax.lax.scan(step, x_BTD, params["layers"])
    return rms_norm(params["final_norm"]["scale"], x_BTD, config.norm_eps)


def _layer_step(
    config: ModelConfig, positions_BT: jax.Array, attend: Attend, remat: str, place: Place
) -> Callable[[jax.Array, Params], tuple[jax.Array, None]]:
    """One layer, as a step of a scan."""
    rope = rotary(config, positions_BT)

    def layer(x_BTD: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        x_BTD, _ = _run_block(config, weights, x_BTD, rope, attend)
        return place(x_BTD), None

    return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat])


def forward_adding(
    config: ModelConfig,
    params: Params,
    sums: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Attend,
    *,
    dtype: Any,
    remat: str = "none",
    look_up: LookUp = embed,
    place: Place = lambda x_BTD: x_BTD,
) -> tuple[jax.Array, Params]:
    """What `forward` computes, and `sums`, by which layers' gradients are added up in place.

    sums: shaped like the trained part of params["layers"]; their values are not read. Give the
    returned ones earlier sums of gradients as cotangent, and the cotangent of the given ones is the
    sums with this pass's gradients. They travel through the backward pass as the carry of its scan,
    so a layer's gradient is added as soon as it is there, and those of all layers never exist
    beside their sums. params["layers"] itself has no gradient.
    """
    step = _layer_step(config, positions_BT, attend, remat, place)

    def layer(
        carry: tuple[jax.Array, Params], inputs: tuple[jax.Array, Params]
    ) -> tuple[tuple[jax.Array, Params], None]:
        x_BTD, sums = carry
        i, weights = inputs
        frozen, trained = split_trained(config, weights)
        trained, sums = _add_gradients(i, trained, sums)
        x_BTD, _ = step(x_BTD, join(frozen, trained))
        return (x_BTD, sums), None

    x_BTD = place(look_up(params, tokens_BT, dtype))
    inputs = (jnp.arange(config.num_layers), params["layers"])
    (x_BTD, sums), _ = jax.lax.scan(layer, (x_BTD, sums), jax.lax.stop_gradient(inputs))
    return rms_norm(params["final_norm"]["scale"], x_BTD, config.norm_eps), sums


@jax.custom_vjp
def _add_gradients(i: jax.Array, weights: Params, sums: Params) -> tuple[Params, Params]:
    """The weights of layer i, and sums whose cotangent gets their gradients in row i."""
    return weights, sums


def _add_gradients_forward(i: jax.Array, weights: Params, sums: Params) -> Any:
    return (weights, sums), i


def _add_gradients_backward(i: jax.Array, cotangents: tuple[Params, Params]) -> Any:
    grads, sums = cotangents
    return None, None, jax.tree.map(lambda total, grad: total.at[i].add(grad), sums, grads)


_add_gradients.defvjp(_add_gradients_forward, _add_gradients_backward)


def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    caches: tuple[Any, ...],
    *,
    dtype: Any,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Hidden states [B, T, D] and new caches; for sampling: unstacked params, unrolled layers.

    attend(cache, q, k, v) -> (o, new cache). caches: one of each layer.
    """
    rope = rotary(config, positions_BT)
    x_BTD = embed(params, tokens_BT, dtype)
    new_caches = []
    for weights, cache in zip(params["layers"], caches, strict=True):
        attend_layer = functools.partial(attend, cache)
        x_BTD, new_cache = _run_block(config, weights, x_BTD, rope, attend_layer)
        new_caches.append(new_cache)
    return rms_norm(params["final_norm"]["scale"], x_BTD, config.norm_eps), tuple(new_caches)


def head_weight(params: Params) -> jax.Array:
    """[V, D]: the embedding itself when the model ties the two."""
    return params["head" if "head" in params else "embed"]["weight"]


def logits(params: Params, hidden_XD: jax.Array) -> jax.Array:
    """float32 logits [X, V] of hidden states [X, D]."""
    weight_VD = head_weight(params).astype(hidden_XD.dtype)
    on_cpu = functools.partial(skinny_matmul, dtype=jnp.float32)
    elsewhere = functools.partial(matmul, dtype=jnp.float32)
    return jax.lax.platform_dependent(hidden_XD, weight_VD, cpu=on_cpu, default=elsewhere)


def unstack(params: Params, dtype: Any) -> Params:
    """The sampler's copy: cast to the compute dtype, layers as a tuple of per-layer dicts."""
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]

    def layer(i: int) -> Params:
        return jax.tree.map(lambda x: x[i], cast["layers"])

    return cast | {"layers": tuple(map(layer, range(num_layers)))}


def transpose_kernels(config: ModelConfig, unstacked: Params) -> Params:
    """The sampler's copy for CPUs: the contracted axes of kernels come last.

    So Eigen reads a kernel once, in order, for all rows of a decode step, and packs the rows: half
    the time of x @ W (8 rows, 4,864 x 896), which packs the kernel from all over the memory.
    Prompts take 2 % longer.
    """

    def transposed(layer: Params) -> Params:
        block = nnx.merge(_block_graph(config, False), layer)
        return nnx.to_pure_dict(nnx.state(_transpose(block), nnx.Param))

    return unstacked | {"layers": tuple(map(transposed, unstacked["layers"]))}
