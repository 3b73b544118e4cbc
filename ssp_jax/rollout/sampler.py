"""The device side of generation: one donated state, three jitted functions over it. Knows nothing
of search.

A slot holds an episode's keys and values for all tokens but its newest. That newest token is
*pending*: it has been chosen but not been fed to the model. So writing a prompt or an observation
(`extend`) never needs the head, and the decode loop is always the same: feed the pending token,
sample the next.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax.model import attention, decoder, sharding
from ssp_jax.rollout import kv_cache
from ssp_jax.rollout.sampling import ALL_TOKENS, Truncation, sample

# Values of `stop` beside the indices of stop strings (0, 1, ...). FULL: the slot's memory ends
# before its limit.
RUNNING, EOS, LIMIT, FULL = -1, 100, 101, 102


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """All slots: B of them."""

    # one per layer, so that an update never copies its neighbours
    caches: tuple[kv_cache.Cache, ...]
    token_B: jax.Array  # int32: the pending token
    length_B: jax.Array  # int32: tokens in the cache = position of the pending token
    limit_B: jax.Array  # int32: total number of tokens (cache + pending) at which the turn ends
    match_B: jax.Array  # int32: state of the stop automaton
    stop_B: jax.Array  # int32: RUNNING, EOS, LIMIT or the index of the stop string found
    uid_B: jax.Array  # int32: episode id, part of the key of every token
    temperature_B: jax.Array  # float32: 0 is greedy
    layout: kv_cache.Layout = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TurnStarts:
    """Slots that begin or resume a turn. N rows, as many for each part of the layout, in the order
    of parts; a row whose slot is out of range is padding and writes nothing.
    """

    # inside the row's part; the rest is the fields of SamplerState, for these slots; numpy or JAX
    # arrays
    slot_N: Any
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


def init_state(config: decoder.ModelConfig, layout: kv_cache.Layout, dtype: Any) -> SamplerState:
    def full(value: int) -> jax.Array:
        return jnp.full((layout.rows[0],), value, jnp.int32)

    caches = tuple(kv_cache.init_cache(config, layout, dtype) for _ in range(config.num_layers))
    return SamplerState(
        caches,
        full(0),
        full(0),
        full(0),
        full(0),
        full(LIMIT),
        full(0),
        jnp.zeros((layout.rows[0],)),
        layout,
    )


def _begin(state: SamplerState, s: TurnStarts) -> SamplerState:
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


def _pinned(state: SamplerState, shardings: SamplerState | None) -> SamplerState:
    """What a program gives back lies where the next one expects it: else it would be compiled a
    second time.
    """
    return state if shardings is None else jax.lax.with_sharding_constraint(state, shardings)


@functools.partial(jax.jit, static_argnames=("config", "layout", "dtype", "shardings"))
def new_state(
    config: decoder.ModelConfig,
    layout: kv_cache.Layout,
    dtype: Any,
    shardings: SamplerState | None = None,
) -> SamplerState:
    return _pinned(init_state(config, layout, dtype), shardings)


@functools.partial(
    jax.jit, static_argnames=("config", "depth", "dtype", "shardings"), donate_argnames=("state",)
)
def extend(
    config: decoder.ModelConfig,
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    starts: TurnStarts,
    tokens_NT: jax.Array,
    count_N: jax.Array,
    *,
    depth: int,
    dtype: Any,
    shardings: SamplerState | None = None,
) -> SamplerState:
    """Feeds count_N tokens to each slot, after what its cache holds, and starts its turn.

    Serves prompts (empty cache, depth 0) and observations alike. depth: pieces of the cache that
    these tokens look at.
    """
    run: Any = functools.partial(_extend, config, depth=depth, dtype=dtype)
    run = sharding.shard_map_rows(run, shardings and shardings.token_B, (None, 0, 1, 0, 0, 0), 0)
    return _pinned(run(params, state, rows_JB, starts, tokens_NT, count_N), shardings)


def _extend(
    config: decoder.ModelConfig,
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    starts: TurnStarts,
    tokens_NT: jax.Array,
    count_N: jax.Array,
    *,
    depth: int,
    dtype: Any,
) -> SamplerState:
    T = tokens_NT.shape[1]
    view = kv_cache.View(state.layout.per_shard, rows_JB, depth)
    before_N = starts.length_N - count_N
    positions_NT = before_N[:, None] + jnp.arange(T)[None, :]
    causal_NTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (len(tokens_NT), T, T))

    def attend(
        layer: kv_cache.Cache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, kv_cache.Cache]:
        k_NKHT, v_NKTH = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
        own = attention.partial_softmax(q, k_NKHT, v_NKTH, causal_NTT)
        o_NTNH = attention.combine(
            [own, *view.attend_slots(q, layer, starts.slot_N, before_N)]
        ).astype(dtype)
        return o_NTNH, view.write(
            layer, k_NKHT, v_NKTH, starts.slot_N, _after(o_NTNH, before_N), count_N
        )

    _, caches = decoder.forward_cached(
        config, params, tokens_NT, positions_NT, attend, state.caches, dtype=dtype
    )
    return _begin(dataclasses.replace(state, caches=caches), starts)


@functools.partial(jax.jit, static_argnames=("depth", "shardings"), donate_argnames=("state",))
def copy_prefix(
    state: SamplerState,
    rows_JB: jax.Array,
    source_N: jax.Array,
    starts: TurnStarts,
    *,
    depth: int,
    shardings: SamplerState | None = None,
) -> SamplerState:
    """Starts slots from the keys and values that another slot of their part holds: a prompt is
    computed once there.
    """

    def run(
        state: SamplerState, rows_JB: jax.Array, source_N: jax.Array, starts: TurnStarts
    ) -> SamplerState:
        view = kv_cache.View(state.layout.per_shard, rows_JB, depth)
        caches = tuple(view.copy(layer, source_N, starts.slot_N) for layer in state.caches)
        return _begin(dataclasses.replace(state, caches=caches), starts)

    run = sharding.shard_map_rows(run, shardings and shardings.token_B, (0, 1, 0, 0), 0)
    return _pinned(run(state, rows_JB, source_N, starts), shardings)


def _after(read: jax.Array, index: jax.Array) -> jax.Array:
    """index, made to wait for `read`: a write that may come before a read of the same cache costs a
    copy of it.
    """
    # an optimization_barrier is not enough
    zero = jnp.minimum(jnp.isnan(read.ravel()[0]).astype(index.dtype), 0)
    return index + zero


def _turn_end(
    token_B: jax.Array, found_B: jax.Array, over_B: jax.Array, eos: tuple[int, ...]
) -> jax.Array:
    """Why a turn ends with this token, or RUNNING: a stop string counts before eos, eos before the
    limit.
    """
    is_eos_B = (token_B[:, None] == jnp.array(eos, jnp.int32)[None, :]).any(-1)
    otherwise_B = jnp.where(is_eos_B, EOS, jnp.where(over_B, LIMIT, RUNNING))
    return jnp.where(found_B >= 0, found_B.astype(jnp.int32), otherwise_B)


def _attend_step(
    view: kv_cache.View,
    before_B: jax.Array,
    i: jax.Array,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of step i to the cache, which ends at before_B, and to the steps of this chunk up
    to i.
    """
    old, (k_BKHC, v_BKCH) = layer
    k_BKHC = jax.lax.dynamic_update_slice_in_dim(k_BKHC, jnp.moveaxis(k, 1, 3), i, axis=3)
    v_BKCH = jax.lax.dynamic_update_slice_in_dim(v_BKCH, jnp.moveaxis(v, 1, 2), i, axis=2)
    B, _, C, _ = v_BKCH.shape
    own = attention.partial_softmax(
        q, k_BKHC, v_BKCH, jnp.broadcast_to(jnp.arange(C) <= i, (B, 1, C))
    )
    return attention.combine([own, *view.attend_all(q, old, before_B)]).astype(q.dtype), (
        k_BKHC,
        v_BKCH,
    )


def _stored(
    view: kv_cache.View, state: SamplerState, buffers: Any, count_B: jax.Array
) -> tuple[kv_cache.Cache, ...]:
    """The cache with the first count_B steps of a chunk behind what it held."""
    B = len(state.length_B)
    return tuple(
        view.write(old, k, v, jnp.arange(B), state.length_B, count_B)
        for old, (k, v) in zip(state.caches, buffers, strict=True)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stops:
    """The stop automaton on the device."""

    table_AV: Any  # NumPy or JAX arrays
    found_A: Any


@functools.partial(
    jax.jit,
    static_argnames=("config", "eos", "steps", "depth", "dtype", "truncation", "shardings"),
    donate_argnames=("state",),
)
def decode_chunk(
    config: decoder.ModelConfig,
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    room_B: jax.Array,
    stops: Stops,
    key: jax.Array,
    *,
    eos: tuple[int, ...],
    steps: int,
    depth: int,
    dtype: Any,
    truncation: Truncation = ALL_TOKENS,
    shardings: SamplerState | None = None,
) -> tuple[SamplerState, Chunk]:
    """A fixed number of decode steps over all slots; slots that stop stay as they are until they
    are extended.

    room_B: how many tokens there is memory for; a slot waits when it has no more. depth: pieces of
    the cache that are read; they stay as they are inside the loop. The chunk's own keys and values
    lie in a buffer of `steps` positions, where all slots write at the same place, and go to the
    cache once, at the end. A slot that does not run computes along, and nothing of it is kept.
    """
    run: Any = functools.partial(
        _decode_chunk, config, eos=eos, steps=steps, depth=depth, dtype=dtype, truncation=truncation
    )
    run = sharding.shard_map_rows(
        run, shardings and shardings.token_B, (None, 0, 1, 0, None, None), (0, 1, 0)
    )
    state, of_steps, of_slots = run(params, state, rows_JB, room_B, stops, key)
    return _pinned(state, shardings), Chunk(*of_steps, *of_slots)


def _decode_chunk(
    config: decoder.ModelConfig,
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    room_B: jax.Array,
    stops: Stops,
    key: jax.Array,
    *,
    eos: tuple[int, ...],
    steps: int,
    depth: int,
    dtype: Any,
    truncation: Truncation,
) -> tuple[SamplerState, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The new state; then Chunk's fields, first those that have a step's axis in front."""
    B = state.token_B.shape[0]
    view = kv_cache.View(state.layout.per_shard, rows_JB, depth)

    def step(carry: tuple[Any, ...], i: jax.Array) -> tuple[tuple[Any, ...], tuple[jax.Array, ...]]:
        buffers, token_B, length_B, match_B, stop_B = carry
        running_B = (stop_B == RUNNING) & (length_B < room_B)
        layers = tuple(zip(state.caches, buffers, strict=True))
        hidden_BTD, buffers = decoder.forward_cached(
            config,
            params,
            token_B[:, None],
            length_B[:, None],
            functools.partial(_attend_step, view, state.length_B, i),
            layers,
            dtype=dtype,
        )
        logits_BV = decoder.logits(params, hidden_BTD[:, 0])
        next_B, logprob_B = sample(
            logits_BV, key, state.uid_B, length_B + 1, state.temperature_B, truncation
        )
        token_B = jnp.where(running_B, next_B, token_B)
        length_B = length_B + running_B
        match_B = jnp.where(running_B, stops.table_AV[match_B, token_B].astype(jnp.int32), match_B)
        now_B = _turn_end(token_B, stops.found_A[match_B], length_B + 1 >= state.limit_B, eos)
        stop_B = jnp.where(running_B, now_B, stop_B)
        return (buffers, token_B, length_B, match_B, stop_B), (token_B, logprob_B, running_B)

    K, H = config.num_kv_heads, config.head_dim
    buffers = (
        (jnp.zeros((B, K, H, steps), dtype), jnp.zeros((B, K, steps, H), dtype)),
    ) * config.num_layers
    carry = (buffers, state.token_B, state.length_B, state.match_B, state.stop_B)
    (buffers, token_B, length_B, match_B, stop_B), (tokens_CB, logprobs_CB, running_CB) = (
        jax.lax.scan(step, carry, jnp.arange(steps))
    )
    # No token is negative, but this way all reads of the cache come before the write. XLA unrolls a
    # loop of one step, and on CPU it then copied the whole cache first, half the time of a step (an
    # optimization_barrier does not help).
    count_B = jnp.where(token_B >= 0, running_CB.sum(0), 0)
    caches = _stored(view, state, buffers, count_B)
    state = dataclasses.replace(
        state, caches=caches, token_B=token_B, length_B=length_B, match_B=match_B, stop_B=stop_B
    )
    return state, (tokens_CB, logprobs_CB), (count_B, stop_B)
