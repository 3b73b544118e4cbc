"""Where keys and values live: cut along the positions of a slot, in memory for what is in use.

The positions of a slot are cut at fixed ends, say 1024, 4096 and 12288. Every slot owns the memory
of its first piece; of each later piece there is a smaller number of rows, and a slot takes one when
its episode grows into it. So memory follows what episodes use, nothing is ever moved, and every
program reads dense arrays: no page table to gather from.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax.errors import InputError
from ssp_jax.model import attention, decoder

_TILE = 128  # elements of a TPU tile along an array's last axis


@dataclasses.dataclass(frozen=True)
class Layout:
    """The pieces of the cache, and how many rows each has.

    ends: exclusive last position of each piece. rows[0] is the number of slots. shards: slots and
    rows are split evenly over this many shards (of a mesh), and a slot takes rows of its own shard.
    So each shard plays alone.
    """

    ends: tuple[int, ...]
    rows: tuple[int, ...]
    shards: int = 1

    @property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each piece."""
        return tuple(end - start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens that all rows hold together."""
        return sum(n * length for n, length in zip(self.rows, self.lengths, strict=True))

    @property
    def per_shard(self) -> "Layout":
        """The layout of one shard."""
        return Layout(self.ends, tuple(n // self.shards for n in self.rows))

    def row_buckets(self, depth: int, shares: Sequence[float]) -> list[int]:
        """Numbers of rows of a shard that a program may read of the deepest of `depth` pieces.

        shares: of all its rows, which are always the last number. Of the first piece all are read.
        """
        rows = self.per_shard.rows[depth - 1]
        fewer = {math.ceil(share * rows) for share in shares} if depth > 1 else set()
        return sorted({*fewer, rows})

    def shard_of(self, slot: int) -> int:
        return slot // (self.rows[0] // self.shards)

    def depth(self, tokens: int) -> int:
        """How many pieces an episode of so many tokens needs."""
        return sum(start < tokens for start in self.starts)


def full_layout(ends: tuple[int, ...], slots: int, shards: int = 1) -> Layout:
    """The longest episode in every slot."""
    return Layout(ends, (slots,) * len(ends), shards)


def layout_for(ends: tuple[int, ...], slots: int, tokens: int, shards: int = 1) -> Layout:
    """Rows that hold at most `tokens` tokens together, at least one of each piece in each shard.

    Rows fall off with the position as if the lengths of episodes were exponentially distributed, as
    far as memory asks for it; if even one row of each later piece is too much, the slots become
    fewer. Raises InputError if there is no room for one slot in each shard.
    """
    starts = (0, *ends[:-1])

    def falling(rate: float, slots_of_shard: int) -> Layout:
        shares = [math.exp(-rate * start / ends[-1]) for start in starts]
        rows = [max(1, math.floor(slots_of_shard * share)) for share in shares]
        return Layout(ends, tuple(n * shards for n in rows), shards)

    slots_of_shard = slots // shards
    full = falling(0.0, slots_of_shard)
    if full.tokens <= tokens:
        return full

    # As many slots as fit with one row of each later piece.
    steepest = 1e3
    while falling(steepest, slots_of_shard).tokens > tokens:
        slots_of_shard -= 1
        if slots_of_shard < 1:
            raise InputError(
                f"config key engine.kv_cache_gib has room for {tokens} tokens; expected at least "
                f"{shards * ends[-1]}, one episode of engine.cache_tokens in each of {shards} parts"
            )

    # The flattest fall that fits, by halving: `flat` does not fit, `steep` does.
    flat = 0.0
    steep = steepest
    for _ in range(50):
        middle = (flat + steep) / 2
        if falling(middle, slots_of_shard).tokens <= tokens:
            steep = middle
        else:
            flat = middle
    return falling(steep, slots_of_shard)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One layer's keys and values. See attention.partial_softmax for the order of the axes."""

    k: tuple[jax.Array, ...]  # for each piece [rows, K, H, S]
    v: tuple[jax.Array, ...]  # for each piece [rows, K, S, H]


def init_cache(config: decoder.ModelConfig, layout: Layout, dtype: Any) -> KVCache:
    K = config.num_kv_heads
    H = config.head_dim
    pieces = list(zip(layout.rows, layout.lengths, strict=True))
    k = tuple(jnp.zeros((n, K, H, S), dtype) for n, S in pieces)
    v = tuple(jnp.zeros((n, K, S, H), dtype) for n, S in pieces)
    return KVCache(k, v)


def token_bytes(config: decoder.ModelConfig, dtype: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return numbers * jnp.dtype(dtype).itemsize


def put(
    old: jax.Array,
    new: jax.Array,
    row_M: jax.Array,
    first_M: jax.Array,
    count_M: jax.Array,
    axis: int,
) -> Any:
    """old[row_M] with the first count_M positions of `new` at first_M and on, as one scatter.

    Positions and rows out of range are dropped. axis: that of the positions in both.
    """
    column_1T = jnp.arange(new.shape[axis])[None, :]
    place_MT = first_M[:, None] + column_1T
    is_written_MT = (column_1T < count_M[:, None]) & (place_MT >= 0)
    place_MT = jnp.where(is_written_MT, place_MT, old.shape[axis])
    between = [slice(None)] * (axis - 1)
    index = (row_M[:, None], *between, place_MT)
    return old.at[index].set(jnp.moveaxis(new, axis, 1), mode="drop")


def scatter_sequential(
    old: Sequence[jax.Array],
    new: Sequence[jax.Array],
    row_M: jax.Array,
    first_M: jax.Array,
    count_M: jax.Array,
    axes: Sequence[int],
) -> list[jax.Array]:
    """What `put` makes of each of these arrays, in one loop over the rows that write something.

    axes: of the positions in each array; there are as many in all of them. For TPUs, whose compiler
    transposes a scatter's operand and transposes it back: whole copies. It fuses what a turn does
    to several arrays, and by its estimates any operation takes as long as that on a window of a
    row: a loop for each array took four fifths of the time of a chunk's steps.
    """
    size = old[0].shape[axes[0]]
    is_inside_M = (first_M < size) & (first_M + count_M > 0) & (row_M < len(old[0]))
    writes_M = is_inside_M & (count_M > 0)
    order_M = jnp.argsort(~writes_M, stable=True)

    def one(i: jax.Array, old: list[jax.Array]) -> list[jax.Array]:
        m = order_M[i]
        place = (row_M[m], first_M[m], count_M[m])
        rows = [jax.lax.dynamic_slice_in_dim(x, m, 1) for x in new]
        arrays = zip(old, rows, axes, strict=True)
        return [_put_row(x, y, *place, axis) for x, y, axis in arrays]

    return jax.lax.fori_loop(0, writes_M.sum(), one, list(old))


def _put_row(
    old: jax.Array, new: jax.Array, row: jax.Array, first: jax.Array, count: jax.Array, axis: int
) -> jax.Array:
    """old[row] with the first `count` positions of new[0] at `first` and on.

    The TPU's compiler transposes, too, for a few positions of the last axis: there whole tiles of
    that axis are read and written.
    """
    size = old.shape[axis]
    length = new.shape[axis]
    tile = _TILE if axis == old.ndim - 1 else 1
    tiles = -(-(length + tile - 1) // tile)
    width = min(size, tiles * tile)
    window = [1, *old.shape[1:]]
    window[axis] = width
    other_axes = [i for i in range(old.ndim) if i != axis]

    # The window of whole tiles around the new positions, and which of it is written.
    start = jnp.clip(first // tile * tile, 0, size - width)
    position_W = start + jnp.arange(width)
    is_written_W = (position_W >= first) & (position_W < first + count)

    # The same window of `new`: it may begin before these positions and end after them.
    padding = [(0, 0)] * new.ndim
    padding[axis] = (width, width)
    padded = jnp.pad(new, padding)
    fresh = jax.lax.dynamic_slice_in_dim(padded, width + start - first, width, axis)

    # The window is read, changed and written back.
    place = [jnp.int32(0)] * old.ndim
    place[0] = row
    place[axis] = start
    there = jax.lax.dynamic_slice(old, place, window)
    changed = jnp.where(jnp.expand_dims(is_written_W, other_axes), fresh, there)
    return jax.lax.dynamic_update_slice(old, changed, place)


def _put_all(
    old: Sequence[jax.Array],
    new: Sequence[jax.Array],
    row_M: jax.Array,
    first_M: jax.Array,
    count_M: jax.Array,
    axes: Sequence[int],
) -> list[jax.Array]:
    """`put`, or where that would copy, `scatter_sequential`: of the arrays of a piece."""

    def put_each(old: Any, new: Any, row_M: Any, first_M: Any, count_M: Any) -> list[jax.Array]:
        arrays = zip(old, new, axes, strict=True)
        return [put(x, y, row_M, first_M, count_M, axis) for x, y, axis in arrays]

    in_turn = functools.partial(scatter_sequential, axes=axes)
    written: list[jax.Array] = jax.lax.platform_dependent(
        old, new, row_M, first_M, count_M, tpu=in_turn, default=put_each
    )
    return written


def _pick(values: jax.Array, index: jax.Array, fill: float = 0) -> jax.Array:
    return values.at[index].get(mode="fill", fill_value=fill)


@dataclasses.dataclass(frozen=True)
class View:
    """The cache of one shard's slots as a program sees it.

    rows_JB: the row that each slot has taken of each later piece; the number of rows where it has
    none. depth: how many pieces are read; no slot in play has tokens beyond them. rows: how many
    rows of the deepest of these attend_all reads; no slot in play has a higher one.
    """

    layout: Layout  # of a shard
    rows_JB: jax.Array
    depth: int
    rows: int | None = None  # all

    def _rows_read(self, piece: int) -> int:
        is_deepest = piece == self.depth - 1
        return self.rows if is_deepest and self.rows else self.layout.rows[piece]

    def _slots_of_rows(self, piece: int) -> jax.Array:
        """For each row that is read of a later piece its slot, or the number of slots."""
        slots = self.layout.rows[0]
        none = jnp.full((self._rows_read(piece),), slots, jnp.int32)
        slot_B = jnp.arange(slots, dtype=jnp.int32)
        return none.at[self.rows_JB[piece - 1]].set(slot_B, mode="drop")

    def _rows_of_slots(self, piece: int, slot_M: jax.Array) -> jax.Array:
        """Row numbers in a piece; out of range for a slot that has none, or is out of range."""
        if piece == 0:
            return slot_M
        return _pick(self.rows_JB[piece - 1], slot_M, self.layout.rows[piece])

    def _seen(self, piece: int, length: jax.Array) -> jax.Array:
        """[rows, 1, S]: whether a position of a piece is among the first `length` of its row."""
        start = self.layout.starts[piece]
        end = self.layout.ends[piece]
        position_S = jnp.arange(start, end)
        return (position_S[None, :] < length[:, None])[:, None]

    def attend_all(
        self, q_BTNH: jax.Array, cache: KVCache, length_B: jax.Array
    ) -> list[attention.PartialSoftmax]:
        """Attention of every slot to the first length_B tokens of its own, piece by piece."""
        seen = self._seen(0, length_B)
        found = [attention.partial_softmax(q_BTNH, cache.k[0], cache.v[0], seen)]
        for piece in range(1, self.depth):
            # Queries go to the rows of the piece, and results back to the slots.
            slots = self._slots_of_rows(piece)
            q = _pick(q_BTNH, slots)
            seen = self._seen(piece, _pick(length_B, slots))
            k = cache.k[piece][: len(slots)]
            v = cache.v[piece][: len(slots)]
            rows = attention.partial_softmax(q, k, v, seen)
            row_B = self.rows_JB[piece - 1]
            o_BTNH = _pick(rows.o_BTNH, row_B)
            max_BTN = _pick(rows.max_BTN, row_B, attention.NEG_INF)
            sum_BTN = _pick(rows.sum_BTN, row_B)
            found.append(attention.PartialSoftmax(o_BTNH, max_BTN, sum_BTN))
        return found

    def attend_to_lengths(
        self, q_BTNH: jax.Array, cache: KVCache, length_B: jax.Array, *, kernel: str, mesh: Any
    ) -> list[attention.PartialSoftmax]:
        """What attend_all computes, by a kernel that reads no further than length_B.

        kernel, mesh: of decode_kernel.attend.
        """
        # Here: only accelerators need it.
        from ssp_jax.rollout import decode_kernel

        arrays = (q_BTNH, length_B, cache.k, cache.v, self.rows_JB)
        return decode_kernel.attend(kernel, *arrays, mesh)

    def attend_slots(
        self, q_MTNH: jax.Array, cache: KVCache, slot_M: jax.Array, length_M: jax.Array
    ) -> list[attention.PartialSoftmax]:
        """Attention of queries of these slots to the first length_M tokens of each.

        XLA on every backend: the splash kernel knows which blocks to leave out from a mask that is
        fixed when it is compiled, and here each row has a length of its own.
        """
        found = []
        for piece in range(self.depth):
            row_M = self._rows_of_slots(piece, slot_M)
            k = cache.k[piece][row_M]
            v = cache.v[piece][row_M]
            seen = self._seen(piece, length_M)
            M, T = q_MTNH.shape[:2]
            seen_MTS = jnp.broadcast_to(seen, (M, T, seen.shape[-1]))
            found.append(attention.partial_softmax(q_MTNH, k, v, seen_MTS))
        return found

    def write(
        self,
        caches: Sequence[KVCache],
        new: Sequence[tuple[jax.Array, jax.Array]],
        slot_M: jax.Array,
        first_M: jax.Array,
        count_M: jax.Array,
    ) -> tuple[KVCache, ...]:
        """The caches with each row's first count_M tokens at position first_M of its slot and on.

        caches: of some layers. new: keys [M, K, H, T] and values [M, K, T, H] of each.
        """
        layers = len(caches)
        new_arrays = [k_MKHT for k_MKHT, _ in new] + [v_MKTH for _, v_MKTH in new]
        axes = [3] * layers + [2] * layers
        pieces = []
        for piece, start in enumerate(self.layout.starts):
            old = [cache.k[piece] for cache in caches] + [cache.v[piece] for cache in caches]
            place = (self._rows_of_slots(piece, slot_M), first_M - start, count_M)
            pieces.append(_put_all(old, new_arrays, *place, axes))
        arrays = list(zip(*pieces, strict=True))
        pairs = zip(arrays[:layers], arrays[layers:], strict=True)
        return tuple(KVCache(k, v) for k, v in pairs)

    def copy(self, cache: KVCache, source_M: jax.Array, slot_M: jax.Array) -> KVCache:
        """The cache with the pieces up to `depth` of some slots taken from other slots."""

        def one(piece: int, old: jax.Array) -> jax.Array:
            if piece >= self.depth:
                return old
            copied = old[self._rows_of_slots(piece, source_M)]
            return old.at[self._rows_of_slots(piece, slot_M)].set(copied, mode="drop")

        k = tuple(one(piece, old) for piece, old in enumerate(cache.k))
        v = tuple(one(piece, old) for piece, old in enumerate(cache.v))
        return KVCache(k, v)
