"""Attention over packed rows for NVIDIA GPUs: Pallas kernels that Triton compiles.

FlashAttention-2 (arXiv 2307.08691) for segments: scores exist for a tile at a time. A tile of
queries meets the keys from the start of its first query's segment on, a tile of keys the queries up
to the end of its last key's segment, so the work is that of the segments, not of the row. Query
heads read the keys of their group: nothing is repeated.

Inside a kernel T is a tile of queries or keys. Scores have base 2, which GPUs raise faster.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ssp_jax.model.attention import KEPT, NEG_INF

_MIN_SIZE = 16  # of a product in Triton, on each axis
# Of the keys of a tile: 64 of 128 bfloat16. With queries, values and gradients they fit the shared
# memory of an L4, which has the least (100 KiB), and all registers (255 of a thread).
_TILE_BYTES = 2**14
_FULL_HEAD = 128  # a tile of smaller heads has no more keys
_LOG2_E = math.log2(math.e)


class _Call(NamedTuple):
    """What is static of a call."""

    head_dim: int  # before padding
    tile: int  # keys forward, keys and queries backward; forward has twice as many queries
    interpret: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


# --- the kernels ----------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _is_visible(first: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether queries see keys, all by their positions; first: of the query's segment."""
    return (first <= key) & (key <= query)


def _scores(q_TH: jax.Array, k_TH: jax.Array, visible_TT: jax.Array, scale: float) -> jax.Array:
    """[queries, keys]; or [keys, queries] with keys and queries exchanged."""
    return jnp.where(visible_TT, _dot(q_TH, k_TH.T) * (scale * _LOG2_E), NEG_INF)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    o_ref: Any,
    log_sum_ref: Any,
    *,
    keys: int,
    scale: float,
) -> None:
    """Outputs of a tile of queries of one head."""
    queries, H = q_ref.shape
    start = pl.program_id(0) * queries
    q_TH = q_ref[...]
    first_T1 = first_ref[pl.ds(start, queries)][:, None]
    query_T1 = start + jnp.arange(queries)[:, None]

    def add_keys(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        o_TH, max_T, sum_T = sums
        tile = pl.ds(i * keys, keys)
        key_1T = i * keys + jnp.arange(keys)[None]
        v_TH = v_ref[tile, :]
        visible_TT = _is_visible(first_T1, query_T1, key_1T)
        scores_TT = _scores(q_TH, k_ref[tile, :], visible_TT, scale)
        new_max_T = jnp.maximum(max_T, scores_TT.max(1))
        weights_TT = jnp.exp2(scores_TT - new_max_T[:, None])
        shrunk_T = jnp.exp2(max_T - new_max_T)
        o_TH = o_TH * shrunk_T[:, None] + _dot(weights_TT.astype(v_TH.dtype), v_TH)
        return o_TH, new_max_T, sum_T * shrunk_T + weights_TT.sum(1)

    # What a query adds before it has seen a key is wiped out when it sees one: its own comes last.
    zeros_T = jnp.zeros((queries,), jnp.float32)
    nothing = (jnp.zeros((queries, H), jnp.float32), zeros_T + NEG_INF, zeros_T)
    begin = jax.lax.div(first_ref[start], keys)
    end = jax.lax.div(start + queries, keys)
    o_TH, max_T, sum_T = jax.lax.fori_loop(begin, end, add_keys, nothing)
    o_ref[...] = (o_TH / sum_T[:, None]).astype(o_ref.dtype)
    log_sum_ref[...] = max_T + jnp.log2(sum_T)


def _queries_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    do_ref: Any,
    log_sum_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    keys: int,
    scale: float,
) -> None:
    """Gradient of a tile of queries of one head."""
    queries, H = q_ref.shape
    start = pl.program_id(0) * queries
    q_TH = q_ref[...]
    do_TH = do_ref[...]
    log_sum_T1 = log_sum_ref[...][:, None]
    delta_T1 = delta_ref[...][:, None]
    first_T1 = first_ref[pl.ds(start, queries)][:, None]
    query_T1 = start + jnp.arange(queries)[:, None]

    def add_keys(i: jax.Array, dq_TH: jax.Array) -> jax.Array:
        tile = pl.ds(i * keys, keys)
        key_1T = i * keys + jnp.arange(keys)[None]
        k_TH = k_ref[tile, :]
        visible_TT = _is_visible(first_T1, query_T1, key_1T)
        weights_TT = jnp.exp2(_scores(q_TH, k_TH, visible_TT, scale) - log_sum_T1)
        dscores_TT = weights_TT * (_dot(do_TH, v_ref[tile, :].T) - delta_T1)
        return dq_TH + _dot(dscores_TT.astype(k_TH.dtype), k_TH)

    begin = jax.lax.div(first_ref[start], keys)
    end = jax.lax.div(start + queries, keys)
    dq_TH = jax.lax.fori_loop(begin, end, add_keys, jnp.zeros((queries, H), jnp.float32))
    dq_ref[...] = (dq_TH * scale).astype(dq_ref.dtype)


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    end_ref: Any,
    do_ref: Any,
    log_sum_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    queries: int,
    scale: float,
) -> None:
    """Gradients of a tile of keys and values, from all query heads of their group."""
    keys, H = k_ref.shape
    heads = q_ref.shape[1]
    start = pl.program_id(0) * keys
    k_TH = k_ref[...]
    v_TH = v_ref[...]
    key_T1 = start + jnp.arange(keys)[:, None]
    begin = jax.lax.div(start, queries)
    end = jax.lax.div(end_ref[start + keys - 1] + queries - 1, queries)

    def add_queries(
        head: jax.Array, i: jax.Array, sums: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        dk_TH, dv_TH = sums
        tile = pl.ds(i * queries, queries)
        query_1T = i * queries + jnp.arange(queries)[None]
        q_TH = q_ref[tile, head, :]
        do_TH = do_ref[tile, head, :]
        visible_TT = _is_visible(first_ref[tile][None], query_1T, key_T1)
        scores_TT = _scores(k_TH, q_TH, visible_TT, scale)
        weights_TT = jnp.exp2(scores_TT - log_sum_ref[head, tile][None])
        dv_TH = dv_TH + _dot(weights_TT.astype(do_TH.dtype), do_TH)
        dscores_TT = weights_TT * (_dot(v_TH, do_TH.T) - delta_ref[head, tile][None])
        return dk_TH + _dot(dscores_TT.astype(q_TH.dtype), q_TH), dv_TH

    def add_head(head: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
        return jax.lax.fori_loop(begin, end, functools.partial(add_queries, head), sums)

    zeros_TH = jnp.zeros((keys, H), jnp.float32)
    dk_TH, dv_TH = jax.lax.fori_loop(0, heads, add_head, (zeros_TH, zeros_TH))
    dk_ref[...] = (dk_TH * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_TH.astype(dv_ref.dtype)


# --- what calls them ------------------------------------------------------------------------------

# The grid of all three is (tile, head, row).


def _tile_of_head(tile: int, H: int) -> pl.BlockSpec:
    """Of [B, T, N, H]."""
    return pl.BlockSpec((None, tile, None, H), lambda i, n, b: (b, i, n, 0))


def _sums_of_head(tile: int) -> pl.BlockSpec:
    """Of [B, N, T]."""
    return pl.BlockSpec((None, None, tile), lambda i, n, b: (b, n, i))


def _row_of_head(T: int, H: int, group: int) -> pl.BlockSpec:
    """Of [B, T, K, H], where `group` query heads read one of keys."""
    return pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n // group, 0))


def _row(T: int) -> pl.BlockSpec:
    """Of [B, T]."""
    return pl.BlockSpec((None, T), lambda i, n, b: (b, 0))


def _pallas_call(call: _Call, kernel: Any, warps: int, **layout: Any) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, scale=call.scale),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=call.interpret,
        **layout,
    )


def _outputs(
    call: _Call,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
) -> list[jax.Array]:
    """Outputs, and log2 of the sums of 2**score, [B, N, T] float32."""
    B, T, N, H = q_BTNH.shape
    queries = 2 * call.tile
    keys = _row_of_head(T, H, N // k_BTKH.shape[2])
    run = _pallas_call(
        call,
        functools.partial(_forward_kernel, keys=call.tile),
        warps=8,
        grid=(T // queries, N, B),
        in_specs=[_tile_of_head(queries, H), keys, keys, _row(T)],
        out_specs=[_tile_of_head(queries, H), _sums_of_head(queries)],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
    )
    return run(q_BTNH, k_BTKH, v_BTKH, first_BT)


def _query_gradients(
    call: _Call,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    do_BTNH: jax.Array,
    log_sum_BNT: jax.Array,
    delta_BNT: jax.Array,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    own = _tile_of_head(call.tile, H)
    sums = _sums_of_head(call.tile)
    keys = _row_of_head(T, H, N // k_BTKH.shape[2])
    run = _pallas_call(
        call,
        functools.partial(_queries_kernel, keys=call.tile),
        warps=4,
        grid=(T // call.tile, N, B),
        in_specs=[own, keys, keys, _row(T), own, sums, sums],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    )
    return run(q_BTNH, k_BTKH, v_BTKH, first_BT, do_BTNH, log_sum_BNT, delta_BNT)


def _key_gradients(
    call: _Call,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    end_BT: jax.Array,
    do_BTNH: jax.Array,
    log_sum_BNT: jax.Array,
    delta_BNT: jax.Array,
) -> list[jax.Array]:
    """Of keys and of values."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    own = _tile_of_head(call.tile, H)
    queries = pl.BlockSpec((None, T, N // K, H), lambda i, k, b: (b, 0, k, 0))
    sums = pl.BlockSpec((None, N // K, T), lambda i, k, b: (b, k, 0))
    run = _pallas_call(
        call,
        functools.partial(_keys_kernel, queries=call.tile),
        warps=4,
        grid=(T // call.tile, K, B),
        in_specs=[queries, own, own, _row(T), _row(T), queries, sums, sums],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BTKH, v_BTKH)],
    )
    return run(q_BTNH, k_BTKH, v_BTKH, first_BT, end_BT, do_BTNH, log_sum_BNT, delta_BNT)


# --- their derivative -----------------------------------------------------------------------------


def _attend_forward(
    call: _Call,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    end_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    o_BTNH, log_sum_BNT = _outputs(call, q_BTNH, k_BTKH, v_BTKH, first_BT)
    o_BTNH = checkpoint_name(o_BTNH, KEPT)
    log_sum_BNT = checkpoint_name(log_sum_BNT, KEPT)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, end_BT, o_BTNH, log_sum_BNT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    end_BT: jax.Array,
) -> jax.Array:
    return _attend_forward(call, q_BTNH, k_BTKH, v_BTKH, first_BT, end_BT)[0]


def _attend_backward(
    call: _Call, residuals: tuple[jax.Array, ...], do_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BTNH, k_BTKH, v_BTKH, first_BT, end_BT, o_BTNH, log_sum_BNT = residuals
    delta_BTN = (do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)).sum(-1)
    sums = (do_BTNH, log_sum_BNT, jnp.swapaxes(delta_BTN, 1, 2))
    qkv = (q_BTNH, k_BTKH, v_BTKH)
    dq_BTNH = _query_gradients(call, *qkv, first_BT, *sums)
    dk_BTKH, dv_BTKH = _key_gradients(call, *qkv, first_BT, end_BT, *sums)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- the whole ------------------------------------------------------------------------------------


def spans(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each position its segment's first position and last + 1, [B, T] int32.

    A segment is a run of one number.
    """
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    is_first_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    is_last_BT = jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
    T = segments_BT.shape[1]
    position_1T = jnp.arange(T, dtype=jnp.int32)[None]
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, position_1T, 0), axis=1)
    end_BT = jax.lax.cummin(jnp.where(is_last_BT, position_1T + 1, T), axis=1, reverse=True)
    return first_BT, end_BT


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """What attention.packed computes of segments that are runs of one number.

    Rows are padded to whole tiles, and heads to a power of 2, of which all sizes in Triton are.
    interpret: on a CPU, for tests.
    """
    _, T, _, H = q_BTNH.shape
    head_padding = max(pl.next_power_of_2(H), _MIN_SIZE) - H
    tile = _TILE_BYTES // (max(H + head_padding, _FULL_HEAD) * q_BTNH.dtype.itemsize)
    call = _Call(H, max(tile, _MIN_SIZE), interpret)
    row_padding = -T % (2 * call.tile)

    def padded(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, row_padding), (0, 0), (0, head_padding)))

    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, row_padding)))
    first_BT, end_BT = spans(segment_ids_BT)
    q, k, v = map(padded, (q_BTNH, k_BTKH, v_BTKH))
    return _attend(call, q, k, v, first_BT, end_BT)[:, :T, :, :H]
