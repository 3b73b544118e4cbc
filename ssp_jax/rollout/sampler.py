"""The device side of generation: one donated state and three jitted programs over it.

A slot holds an episode's keys and values for all tokens but its newest. That newest token is
*pending*: it has been chosen but not been fed to the model. So writing a prompt or an observation
(`extend`) never needs the head, and the decode loop is always the same: feed the pending token,
sample the next.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    caches: tuple[kv_cache.KVCache, ...]
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
    """Slots that begin or resume a turn: M rows, as many for each shard, in the order of shards.

    NumPy or JAX arrays. slot_M counts inside the row's shard; a row whose slot is out of range is
    padding and writes nothing. The other fields are those of SamplerState, for these slots.
    """

    slot_M: Any
    length_M: Any
    token_M: Any
    limit_M: Any
    match_M: Any
    uid_M: Any
    temperature_M: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of one decode chunk of C steps, for the host."""

    tokens_CB: Any  # int32
    logprobs_CB: Any  # float32, of the sampled distribution, temperature inside
    count_B: Any  # int32: the first count_B steps are this slot's new tokens
    stop_B: Any  # int32, as in SamplerState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stops:
    """The stop automaton on the device. NumPy or JAX arrays."""

    table_AV: Any
    found_A: Any


def init_state(config: decoder.ModelConfig, layout: kv_cache.Layout, dtype: Any) -> SamplerState:
    """The state before any turn: no slot runs."""
    caches = tuple(kv_cache.init_cache(config, layout, dtype) for _ in range(config.num_layers))
    slots = (layout.rows[0],)

    def full(value: int) -> jax.Array:
        return jnp.full(slots, value, jnp.int32)

    return SamplerState(
        caches=caches,
        token_B=full(0),
        length_B=full(0),
        limit_B=full(0),
        match_B=full(0),
        stop_B=full(LIMIT),
        uid_B=full(0),
        temperature_B=jnp.zeros(slots),
        layout=layout,
    )


def _pinned(state: SamplerState, shardings: SamplerState | None) -> SamplerState:
    """The state where the next program expects it, or that would be compiled a second time."""
    if shardings is None:
        return state
    return jax.lax.with_sharding_constraint(state, shardings)


@functools.partial(jax.jit, static_argnames=("config", "layout", "dtype", "shardings"))
def new_state(
    config: decoder.ModelConfig,
    layout: kv_cache.Layout,
    dtype: Any,
    shardings: SamplerState | None = None,
) -> SamplerState:
    return _pinned(init_state(config, layout, dtype), shardings)


_STATIC = (
    "config",
    "eos",
    "steps",
    "depth",
    "rows",
    "dtype",
    "truncation",
    "attend_by",
    "mesh",
    "shardings",
)
_CHUNK_AXES = Chunk(tokens_CB=1, logprobs_CB=1, count_B=0, stop_B=0)  # of the slots


def _program(out: Any = 0, **split: int | None) -> Callable[[Callable[..., Any]], Any]:
    """Makes one jitted program over all slots from a function of the slots of one shard.

    The program takes its arrays by position and everything that is static by name; it takes
    `shardings` (those of the state, None for a single device) beside what the function takes.
    split, out: the axis of each array and result that is split over shards; None: each shard has
    the whole. The state is donated.
    """

    def decorate(run: Callable[..., Any]) -> Any:
        def program(
            *arrays: Any, shardings: SamplerState | None = None, **static: Any
        ) -> SamplerState | tuple[SamplerState, Chunk]:
            own: Any = functools.partial(run, **static)
            slots = shardings and shardings.token_B
            own = sharding.shard_map_rows(own, slots, tuple(split.values()), out)
            result = own(*arrays)
            if isinstance(result, SamplerState):
                return _pinned(result, shardings)
            state, chunk = result
            return _pinned(state, shardings), chunk

        program.__name__ = run.__name__
        program.__doc__ = run.__doc__
        return jax.jit(program, static_argnames=_STATIC, donate_argnums=[*split].index("state"))

    return decorate


@_program(params=None, state=0, rows_JB=1, starts=0, tokens_MT=0, count_M=0)
def extend(
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    starts: TurnStarts,
    tokens_MT: jax.Array,
    count_M: jax.Array,
    *,
    config: decoder.ModelConfig,
    depth: int,
    dtype: Any,
) -> SamplerState:
    """Feeds count_M tokens to each slot, after what its cache holds, and starts its turn.

    Serves prompts (empty cache, depth 0) and observations alike. depth: pieces of the cache that
    these tokens look at.
    """
    T = tokens_MT.shape[1]
    view = kv_cache.View(state.layout.per_shard, rows_JB, depth)
    before_M = starts.length_M - count_M
    positions_MT = before_M[:, None] + jnp.arange(T)[None, :]
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    causal_MTT = jnp.broadcast_to(causal_TT, (len(tokens_MT), T, T))

    def attend(
        layer: kv_cache.KVCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, kv_cache.KVCache]:
        k_MKHT = jnp.moveaxis(k, 1, 3)
        v_MKTH = jnp.moveaxis(v, 1, 2)
        own = attention.partial_softmax(q, k_MKHT, v_MKTH, causal_MTT)
        earlier = view.attend_slots(q, layer, starts.slot_M, before_M)
        o_MTNH = attention.combine([own, *earlier]).astype(dtype)
        first_M = _after(o_MTNH, before_M)
        new = [(k_MKHT, v_MKTH)]
        (written,) = view.write([layer], new, starts.slot_M, first_M, count_M)
        return o_MTNH, written

    _, caches = decoder.forward_cached(
        config, params, tokens_MT, positions_MT, attend, state.caches, dtype=dtype
    )
    return _begin(state, caches, starts)


@_program(state=0, rows_JB=1, source_M=0, starts=0)
def copy_prefix(
    state: SamplerState,
    rows_JB: jax.Array,
    source_M: jax.Array,
    starts: TurnStarts,
    *,
    depth: int,
) -> SamplerState:
    """Starts slots from the keys and values of other slots of their shard: source_M, int32.

    A prompt that several episodes share is computed once in a shard.
    """
    view = kv_cache.View(state.layout.per_shard, rows_JB, depth)
    caches = tuple(view.copy(layer, source_M, starts.slot_M) for layer in state.caches)
    return _begin(state, caches, starts)


def _begin(
    state: SamplerState, caches: tuple[kv_cache.KVCache, ...], starts: TurnStarts
) -> SamplerState:
    """The state with these caches, and with these turns started."""

    def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
        return old.at[starts.slot_M].set(new, mode="drop")

    return dataclasses.replace(
        state,
        caches=caches,
        token_B=put(state.token_B, starts.token_M),
        length_B=put(state.length_B, starts.length_M),
        limit_B=put(state.limit_B, starts.limit_M),
        match_B=put(state.match_B, starts.match_M),
        stop_B=put(state.stop_B, RUNNING),
        uid_B=put(state.uid_B, starts.uid_M),
        temperature_B=put(state.temperature_B, starts.temperature_M),
    )


def _after(read: jax.Array, index: jax.Array) -> jax.Array:
    """`index`, which waits for `read`.

    A write that may come before a read of the same cache costs a copy of it, and an
    optimization_barrier does not prevent that.
    """
    is_nan = jnp.isnan(read.ravel()[0])
    zero = jnp.minimum(is_nan.astype(index.dtype), 0)
    return index + zero


class _Turns(NamedTuple):
    """Fields of SamplerState that a decode step changes."""

    token_B: jax.Array
    length_B: jax.Array
    match_B: jax.Array
    stop_B: jax.Array


@_program(out=(0, _CHUNK_AXES), params=None, state=0, rows_JB=1, room_B=0, stops=None, key=None)
def decode_chunk(
    params: decoder.Params,
    state: SamplerState,
    rows_JB: jax.Array,
    room_B: jax.Array,
    stops: Stops,
    key: jax.Array,
    *,
    config: decoder.ModelConfig,
    eos: tuple[int, ...],
    steps: int,
    depth: int,
    rows: int | None = None,
    dtype: Any,
    truncation: Truncation = ALL_TOKENS,
    attend_by: str = "xla",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[SamplerState, Chunk]:
    """Decodes `steps` tokens in every slot; a slot that stops stays as it is until it is extended.

    room_B: how many tokens there is memory for; a slot waits when it has no more. depth, rows: the
    pieces of the cache that are read, and the rows of the deepest of these, None for all; they stay
    as they are inside the loop. The chunk's own keys and values lie in a buffer of `steps`
    positions, where all slots write at the same place, and go to the cache once, at the end. A slot
    that does not run computes along, and nothing of it is kept. attend_by: "xla", or the kernel
    that reads the tokens of each running slot, of all pieces; mesh: of decode_kernel.attend.
    """
    B = len(state.token_B)
    view = kv_cache.View(state.layout.per_shard, rows_JB, depth, rows)
    earlier = view.attend_all
    if attend_by != "xla":
        earlier = functools.partial(view.attend_to_lengths, kernel=attend_by, mesh=mesh)

    def step(carry: tuple[Any, _Turns], i: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        buffers, turns = carry
        running_B = (turns.stop_B == RUNNING) & (turns.length_B < room_B)

        # The pending tokens go through the model.
        layers = tuple(zip(state.caches, buffers, strict=True))
        before_B = state.length_B
        if attend_by != "xla":
            before_B = jnp.where(running_B, before_B, 0)
        attend = functools.partial(_attend_step, earlier, before_B, i)
        tokens_B1 = turns.token_B[:, None]
        positions_B1 = turns.length_B[:, None]
        hidden_B1D, buffers = decoder.forward_cached(
            config, params, tokens_B1, positions_B1, attend, layers, dtype=dtype
        )

        # The next tokens are drawn, and may end the turns.
        logits_BV = decoder.logits(params, hidden_B1D[:, 0])
        position_B = turns.length_B + 1
        next_B, logprob_B = sample(
            logits_BV, key, state.uid_B, position_B, state.temperature_B, truncation
        )
        turns = _advance(turns, running_B, next_B, state.limit_B, stops, eos)
        return (buffers, turns), (turns.token_B, logprob_B, running_B)

    # All steps, which read the cache and write into the buffers.
    buffers = (_buffers(config, B, steps, dtype),) * config.num_layers
    turns = _Turns(state.token_B, state.length_B, state.match_B, state.stop_B)
    (buffers, turns), sampled = jax.lax.scan(step, (buffers, turns), jnp.arange(steps))
    tokens_CB, logprobs_CB, running_CB = sampled

    # No token is negative, but this way all reads of the cache come before the write. XLA unrolls a
    # loop of one step, and on CPU it then copied the whole cache first, half the time of a step (an
    # optimization_barrier does not help).
    count_B = jnp.where(turns.token_B >= 0, running_CB.sum(0), 0)
    # The first count_B steps of the buffers go behind what the caches held.
    slot_B = jnp.arange(B)
    caches = view.write(state.caches, buffers, slot_B, state.length_B, count_B)
    state = dataclasses.replace(state, caches=caches, **turns._asdict())
    return state, Chunk(tokens_CB, logprobs_CB, count_B, turns.stop_B)


def kernel_mesh(shardings: SamplerState | None) -> jax.sharding.Mesh | None:
    """The mesh of a state that is on several devices; else None. See decode_kernel.attend."""
    if shardings is None:
        return None
    mesh: jax.sharding.Mesh = shardings.token_B.mesh  # type: ignore[attr-defined]
    return mesh if mesh.size > 1 else None


def _buffers(
    config: decoder.ModelConfig, slots: int, steps: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Zeros for a chunk's keys [B, K, H, C] and values [B, K, C, H] in one layer."""
    K = config.num_kv_heads
    H = config.head_dim
    k_BKHC = jnp.zeros((slots, K, H, steps), dtype)
    v_BKCH = jnp.zeros((slots, K, steps, H), dtype)
    return k_BKHC, v_BKCH


def _advance(
    turns: _Turns,
    running_B: jax.Array,
    next_B: jax.Array,
    limit_B: jax.Array,
    stops: Stops,
    eos: tuple[int, ...],
) -> _Turns:
    """The turns after their next tokens; a slot that does not run keeps what it has.

    A stop string counts before eos, eos before the limit.
    """
    token_B = jnp.where(running_B, next_B, turns.token_B)
    length_B = turns.length_B + running_B
    after_B = stops.table_AV[turns.match_B, token_B].astype(jnp.int32)
    match_B = jnp.where(running_B, after_B, turns.match_B)

    found_B = stops.found_A[match_B]
    is_eos_B = (token_B[:, None] == jnp.array(eos, jnp.int32)[None, :]).any(-1)
    is_full_B = length_B + 1 >= limit_B
    otherwise_B = jnp.where(is_eos_B, EOS, jnp.where(is_full_B, LIMIT, RUNNING))
    now_B = jnp.where(found_B >= 0, found_B.astype(jnp.int32), otherwise_B)
    stop_B = jnp.where(running_B, now_B, turns.stop_B)
    return _Turns(token_B, length_B, match_B, stop_B)


def _attend_step(
    earlier: Callable[..., list[attention.PartialSoftmax]],
    before_B: jax.Array,
    i: jax.Array,
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of step i to the cache, which ends at before_B, and to steps up to i.

    earlier: (q, cache, before_B) -> what the cache adds.
    """
    cache, (k_BKHC, v_BKCH) = layer
    k_BKHC = jax.lax.dynamic_update_slice_in_dim(k_BKHC, jnp.moveaxis(k, 1, 3), i, axis=3)
    v_BKCH = jax.lax.dynamic_update_slice_in_dim(v_BKCH, jnp.moveaxis(v, 1, 2), i, axis=2)
    B, _, C, _ = v_BKCH.shape
    seen_BTC = jnp.broadcast_to(jnp.arange(C) <= i, (B, 1, C))
    own = attention.partial_softmax(q, k_BKHC, v_BKCH, seen_BTC)
    o_BTNH = attention.combine([own, *earlier(q, cache, before_B)]).astype(q.dtype)
    return o_BTNH, (k_BKHC, v_BKCH)
