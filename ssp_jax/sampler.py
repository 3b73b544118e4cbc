"""The device side of generation: one donated state, three jitted functions over it. Knows nothing of search.

A slot holds an episode's keys and values for all tokens but its newest. That newest token is *pending*: it has been
chosen but not been fed to the model. So writing a prompt or an observation (`extend`) never needs the head, and the
decode loop is always the same: feed the pending token, sample the next.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax import attention, model

RUNNING, EOS, LIMIT = -1, 100, 101  # values of `stop` beside the indices of stop strings (0, 1, ...)
_BLOCK = 128  # vocabulary columns per block of the two-level draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """All slots. B slots, S cache length; one array per layer so that an update never copies its neighbours."""

    k: tuple[jax.Array, ...]  # L x [B, K, S, H]
    v: tuple[jax.Array, ...]
    token_B: jax.Array  # int32: the pending token
    length_B: jax.Array  # int32: tokens in the cache = position of the pending token
    limit_B: jax.Array  # int32: total number of tokens (cache + pending) at which the turn ends
    match_B: jax.Array  # int32: state of the stop automaton
    stop_B: jax.Array  # int32: RUNNING, EOS, LIMIT or the index of the stop string found
    uid_B: jax.Array  # int32: episode id, part of the key of every token
    temperature_B: jax.Array  # float32: 0 is greedy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Starts:
    """Slots that begin or resume a turn. N rows; a row whose slot is out of range is padding and writes nothing."""

    slot_N: Any  # the fields of SamplerState, for these slots; numpy or JAX arrays
    length_N: Any
    token_N: Any
    limit_N: Any
    match_N: Any
    uid_N: Any
    temperature_N: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one decode chunk produced, for the host. C steps."""

    tokens_CB: jax.Array
    logprobs_CB: jax.Array  # log-probs of the sampled distribution, temperature inside
    count_B: jax.Array  # leading rows that are this slot's new tokens
    stop_B: jax.Array


def init_state(config: model.ModelConfig, slots: int, cache_tokens: int, dtype: Any) -> SamplerState:
    def per_layer() -> tuple[jax.Array, ...]:
        shape = (slots, config.num_kv_heads, cache_tokens, config.head_dim)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    def full(value: int) -> jax.Array:
        return jnp.full((slots,), value, jnp.int32)

    return SamplerState(
        per_layer(), per_layer(), full(0), full(0), full(0), full(0), full(LIMIT), full(0), jnp.zeros((slots,))
    )


def _begin(state: SamplerState, s: Starts) -> SamplerState:
    def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
        return old.at[s.slot_N].set(new, mode="drop")

    return dataclasses.replace(
        state,
        token_B=put(state.token_B, s.token_N),
        length_B=put(state.length_B, s.length_N),
        limit_B=put(state.limit_B, s.limit_N),
        match_B=put(state.match_B, s.match_N),
        stop_B=put(state.stop_B, RUNNING),
        uid_B=put(state.uid_B, s.uid_N),
        temperature_B=put(state.temperature_B, s.temperature_N),
    )


@functools.partial(jax.jit, static_argnames=("config", "cache_len", "dtype"), donate_argnames=("state",))
def extend(
    config: model.ModelConfig,
    params: model.Params,
    state: SamplerState,
    starts: Starts,
    tokens_NT: jax.Array,
    count_N: jax.Array,
    *,
    cache_len: int,
    dtype: Any,
) -> SamplerState:
    """Feeds count_N tokens to each slot, after what its cache holds, and starts its turn.

    Serves prompts (empty cache) and observations alike. cache_len: the keys that these rows may look at.
    """
    N, T = tokens_NT.shape
    slots, capacity = state.token_B.shape[0], state.k[0].shape[2]
    column_T = jnp.arange(T)[None, :]
    positions_NT = (starts.length_N - count_N)[:, None] + column_T
    real_NT = (column_T < count_N[:, None]) & (starts.slot_N < slots)[:, None]
    write_NT = jnp.where(real_NT, positions_NT, capacity)  # out of range: dropped
    row_N = jnp.arange(N)[:, None]

    def attend(cache: tuple[jax.Array, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        gathered = [c[starts.slot_N, :, :cache_len] for c in cache]
        k_row, v_row = (g.at[row_N, :, write_NT].set(x, mode="drop") for g, x in zip(gathered, (k, v), strict=True))
        o_NTNH = attention.cached(q, k_row, v_row, positions_NT)
        slot_N = starts.slot_N[:, None]
        return o_NTNH, tuple(c.at[slot_N, :, write_NT].set(x, mode="drop") for c, x in zip(cache, (k, v), strict=True))

    caches = tuple(zip(state.k, state.v, strict=True))
    _, caches = model.forward_cached(config, params, tokens_NT, positions_NT, attend, caches, dtype=dtype)
    state = dataclasses.replace(state, k=tuple(c[0] for c in caches), v=tuple(c[1] for c in caches))
    return _begin(state, starts)


@functools.partial(jax.jit, static_argnames=("cache_len",), donate_argnames=("state",))
def share(state: SamplerState, source_N: jax.Array, starts: Starts, *, cache_len: int) -> SamplerState:
    """Starts slots from the keys and values that another slot holds: a group's prompt is computed once."""

    def copy(cache: jax.Array) -> jax.Array:
        rows = cache[source_N, :, :cache_len]
        return cache.at[starts.slot_N, :, :cache_len].set(rows, mode="drop")

    state = dataclasses.replace(state, k=tuple(map(copy, state.k)), v=tuple(map(copy, state.v)))
    return _begin(state, starts)


def _draw(logp_BV: jax.Array, key_B: jax.Array) -> jax.Array:
    """One token a row by the Gumbel-max trick in two levels: a block of the vocabulary, then a token inside it.

    Exact, with V / 128 + 128 random numbers a row instead of V. Comparing perturbed log-probs (and not a random number
    with a running sum, which is cheaper still) makes rounding matter once in a million tokens, not once in a thousand:
    so a trajectory survives another batch size.
    """
    B, V = logp_BV.shape
    padded_BXC = jnp.pad(logp_BV, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf).reshape(B, -1, _BLOCK)
    X = padded_BXC.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (X + _BLOCK,)))(key_B)
    block_B = jnp.argmax(jax.nn.logsumexp(padded_BXC, axis=-1) + noise[:, :X], axis=-1)
    inside_BC = jnp.take_along_axis(padded_BXC, block_B[:, None, None], axis=1)[:, 0]
    return block_B * _BLOCK + jnp.argmax(inside_BC + noise[:, X:], axis=-1)


def sample(
    logits_BV: jax.Array, key: jax.Array, uid_B: jax.Array, position_B: jax.Array, temperature_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Next tokens and their log-probs. The key of a token is a function of (key, episode id, position) alone."""
    hot_B = temperature_B > 0
    logp_BV = jax.nn.log_softmax(logits_BV / jnp.where(hot_B, temperature_B, 1.0)[:, None], axis=-1)

    def token_key(uid: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, uid), position)

    drawn_B = _draw(logp_BV, jax.vmap(token_key)(uid_B, position_B))
    token_B = jnp.where(hot_B, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


def _turn_end(token_B: jax.Array, found_B: jax.Array, over_B: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Why a turn ends with this token, or RUNNING: a stop string counts before eos, eos before the limit."""
    is_eos_B = (token_B[:, None] == jnp.array(eos, jnp.int32)[None, :]).any(-1)
    otherwise_B = jnp.where(is_eos_B, EOS, jnp.where(over_B, LIMIT, RUNNING))
    return jnp.where(found_B >= 0, found_B.astype(jnp.int32), otherwise_B)


@functools.partial(
    jax.jit, static_argnames=("config", "eos", "steps", "cache_len", "dtype"), donate_argnames=("state",)
)
def decode_chunk(
    config: model.ModelConfig,
    params: model.Params,
    state: SamplerState,
    table_AV: jax.Array,
    found_A: jax.Array,
    key: jax.Array,
    *,
    eos: tuple[int, ...],
    steps: int,
    cache_len: int,
    dtype: Any,
) -> tuple[SamplerState, Chunk]:
    """A fixed number of decode steps over all slots; slots that stop stay as they are until they are extended.

    A stopped slot computes along and writes its pending token's keys where they belong anyway, so nothing is masked.
    """
    B = state.token_B.shape[0]
    row_B = jnp.arange(B)

    def attend(position_B: jax.Array, cache: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        k_new, v_new = (
            c.at[row_B, :, position_B].set(x[:, 0], mode="drop") for c, x in zip(cache, (k, v), strict=True)
        )
        return attention.cached(q, k_new, v_new, position_B[:, None]), (k_new, v_new)

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[jax.Array, ...]]:
        caches, token_B, length_B, match_B, stop_B = carry
        running_B = stop_B == RUNNING
        hidden_BTD, caches = model.forward_cached(
            config,
            params,
            token_B[:, None],
            length_B[:, None],
            functools.partial(attend, length_B),
            caches,
            dtype=dtype,
        )
        logits_BV = model.logits(params, hidden_BTD[:, 0])
        next_B, logprob_B = sample(logits_BV, key, state.uid_B, length_B + 1, state.temperature_B)
        token_B = jnp.where(running_B, next_B, token_B)
        length_B = length_B + running_B
        match_B = jnp.where(running_B, table_AV[match_B, token_B].astype(jnp.int32), match_B)
        now_B = _turn_end(token_B, found_A[match_B], length_B + 1 >= state.limit_B, eos)
        stop_B = jnp.where(running_B, now_B, stop_B)
        return (caches, token_B, length_B, match_B, stop_B), (token_B, logprob_B, running_B)

    # The loop runs over a slice of the cache, copied once per chunk: all slots fit into it.
    caches = tuple((k[:, :, :cache_len], v[:, :, :cache_len]) for k, v in zip(state.k, state.v, strict=True))
    carry = (caches, state.token_B, state.length_B, state.match_B, state.stop_B)
    (caches, token_B, length_B, match_B, stop_B), (tokens_CB, logprobs_CB, running_CB) = jax.lax.scan(
        step, carry, None, length=steps
    )
    state = dataclasses.replace(
        state,
        k=tuple(k.at[:, :, :cache_len].set(c[0]) for k, c in zip(state.k, caches, strict=True)),
        v=tuple(v.at[:, :, :cache_len].set(c[1]) for v, c in zip(state.v, caches, strict=True)),
        token_B=token_B,
        length_B=length_B,
        match_B=match_B,
        stop_B=stop_B,
    )
    return state, Chunk(tokens_CB, logprobs_CB, running_CB.sum(0), stop_B)
