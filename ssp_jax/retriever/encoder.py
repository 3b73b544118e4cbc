"""BERT as an encoder of texts, in Flax NNX: tokens to hidden states to one vector a text.

The architecture of E5, BGE, GTE and MiniLM (arXiv 1810.04805): learned positions, norms after each
sum, attention in both directions. As in model.decoder the module has names, shapes and arithmetic,
and what is passed around is `params`, a nested dict whose layer weights are stacked on axis 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssp_jax.model.decoder import Params
from ssp_jax.model.linear import Linear


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder, as read from a Hugging Face config.json."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    positions: int  # tokens of the longest text
    norm_eps: float = 1e-12

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its vector."""

    kind: str  # mean: of all tokens | cls: of the first one
    normalize: bool  # to length 1


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32_BTD = x_BTD.astype(jnp.float32)
        centered_BTD = x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True)
        variance_BT1 = jnp.mean(jnp.square(centered_BTD), axis=-1, keepdims=True)
        normal_BTD = centered_BTD * jax.lax.rsqrt(variance_BT1 + self.eps)
        y_BTD = normal_BTD * self.scale[...][None, None] + self.bias[...][None, None]
        return y_BTD.astype(x_BTD.dtype)


class Attention(nnx.Module):
    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        width = (c.embed_dim,)
        heads = (c.num_heads, c.head_dim)
        self.q = Linear(width, heads, rngs, bias=True)
        self.k = Linear(width, heads, rngs, bias=True)
        self.v = Linear(width, heads, rngs, bias=True)
        self.o = Linear(heads, width, rngs, bias=True)

    def __call__(self, x_BTD: jax.Array, is_token_BT: jax.Array) -> jax.Array:
        q_BTNH = self.q(x_BTD) * self.q.kernel.shape[-1] ** -0.5
        scores_BNTT = jnp.einsum(
            "btnh,bsnh->bnts", q_BTNH, self.k(x_BTD), preferred_element_type=jnp.float32
        )
        # Finite: a row of padding alone must not become NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores_BNTT = jnp.where(is_token_BT[:, None, None], scores_BNTT, lowest)
        shares_BNTT = jax.nn.softmax(scores_BNTT, axis=-1).astype(x_BTD.dtype)
        return self.o(jnp.einsum("bnts,bsnh->btnh", shares_BNTT, self.v(x_BTD)))


class Layer(nnx.Module):
    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        self.attention = Attention(c, rngs)
        self.attention_norm = LayerNorm(c.embed_dim, c.norm_eps)
        self.up = Linear((c.embed_dim,), (c.mlp_dim,), rngs, bias=True)
        self.down = Linear((c.mlp_dim,), (c.embed_dim,), rngs, bias=True)
        self.mlp_norm = LayerNorm(c.embed_dim, c.norm_eps)

    def __call__(self, x_BTD: jax.Array, is_token_BT: jax.Array) -> jax.Array:
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, is_token_BT))
        inner_BTF = jax.nn.gelu(self.up(x_BTD), approximate=False)
        return self.mlp_norm(x_BTD + self.down(inner_BTF))


class Embedding(nnx.Module):
    """Vectors of tokens and of positions. Those of positions include that of token type 0."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (rows, c.embed_dim), jnp.float32))

        self.tokens = table(c.vocab_size)
        self.positions = table(c.positions)
        self.norm = LayerNorm(c.embed_dim, c.norm_eps)


class Encoder(nnx.Module):
    """Names and shapes of all weights."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(c, rngs)
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers = nnx.vmap(lambda key: Layer(c, nnx.Rngs(params=key)))(keys)


def init_params(config: EncoderConfig, key: jax.Array) -> Params:
    """Random float32 params."""
    return nnx.to_pure_dict(nnx.state(Encoder(config, nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: EncoderConfig) -> Params:
    """The params tree with jax.ShapeDtypeStruct leaves; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def _layer_graph(config: EncoderConfig) -> Any:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(params=0))))
    return graph


def forward(
    config: EncoderConfig, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, dtype: Any
) -> jax.Array:
    """Hidden states [B, T, D] in dtype. lengths: tokens of each row; what follows is padding."""
    T = tokens_BT.shape[1]
    embed = params["embed"]
    norm = LayerNorm(config.embed_dim, config.norm_eps)
    norm.scale[...] = embed["norm"]["scale"]
    norm.bias[...] = embed["norm"]["bias"]
    x_BTD = norm(embed["tokens"][tokens_BT] + embed["positions"][None, :T]).astype(dtype)
    is_token_BT = _is_token(tokens_BT, lengths_B)

    def layer(x_BTD: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        return nnx.merge(_layer_graph(config), weights)(x_BTD, is_token_BT), None

    x_BTD, _ = jax.lax.scan(layer, x_BTD, params["layers"])
    return x_BTD


def _is_token(tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    positions_T = jnp.arange(tokens_BT.shape[1])
    return positions_T[None] < lengths_B[:, None]


def encode(
    config: EncoderConfig,
    pooling: Pooling,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    dtype: Any,
) -> jax.Array:
    """The vector of each row, float32 [B, D]. dtype: of the layers' arithmetic."""
    hidden_BTD = forward(config, params, tokens_BT, lengths_B, dtype).astype(jnp.float32)
    if pooling.kind == "cls":
        vectors_BD = hidden_BTD[:, 0]
    else:
        is_token_BT = _is_token(tokens_BT, lengths_B)
        sums_BD = jnp.sum(jnp.where(is_token_BT[:, :, None], hidden_BTD, 0), axis=1)
        vectors_BD = sums_BD / jnp.maximum(lengths_B, 1)[:, None]
    if pooling.normalize:
        # 1e-12 as in PyTorch's normalize: a vector of zeros stays one.
        norm_B1 = jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True)
        vectors_BD = vectors_BD / jnp.maximum(norm_B1, 1e-12)
    return vectors_BD
