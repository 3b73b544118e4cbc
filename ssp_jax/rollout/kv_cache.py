"""Where keys and values live: cut along the positions of a slot, with memory only for the pieces
that are in use.

The positions of a slot are cut at fixed ends, say 1024, 4096 and 12288. Every slot owns the memory
of its first piece; of each later piece there is a smaller number of rows, and a slot takes one when
its episode grows into it. So memory follows what episodes use, nothing is ever moved, and every
program reads dense arrays: no page table to gather from.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax.errors import InputError
from ssp_jax.model import attention, decoder

_TILE = 128  # elements of a TPU tile along an array's last axis


@dataclasses.dataclass(frozen=True)
class Layout:
    """ends: exclusive last position of each piece. rows: how many rows each has; rows[0] is the
    number of slots.

    parts: slots and rows are split evenly over this many parts (of a mesh), and a slot takes rows
    of its own part. So each part plays alone.
    """

    ends: tuple[int, ...]
    rows: tuple[int, ...]
    parts: int = 1

    @property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])

    @property
    def tokens(self) -> int:
        """Tokens that all rows hold together."""
        return sum(
            n * (end - start)
            for n, start, end in zip(self.rows, self.starts, self.ends, strict=True)
        )

    @property
    def per_shard(self) -> "Layout":
        """What one part has."""
        return Layout(self.ends, tuple(n // self.parts for n in self.rows))

    def part(self, slot: int) -> int:
        return slot // (self.rows[0] // self.parts)

    def depth(self, tokens: int) -> int:
        """How many pieces an episode of so many tokens needs."""
        return sum(start < tokens for start in self.starts)


def full_layout(ends: tuple[int, ...], slots: int, parts: int = 1) -> Layout:
    """The longest episode in every slot."""
    return Layout(ends, (slots,) * len(ends), parts)


def layout_for(ends: tuple[int, ...], slots: int, tokens: int, parts: int = 1) -> Layout:
    """Rows such that all together hold at most `tokens` tokens, with at least one row of each piece
    in each part.

    Rows fall off with the position as if the lengths of episodes were exponentially distributed, as
    far as memory asks for it; if even one row of each later piece is too much, the slots become
    fewer.
    """

    def falling(rate: float, first: int) -> Layout:
        each = [
            max(1, math.floor(first * math.exp(-rate * start / ends[-1])))
            for start in (0, *ends[:-1])
        ]
        return Layout(ends, tuple(n * parts for n in each), parts)

    each = slots // parts
    if falling(0.0, each).tokens <= tokens:
        return falling(0.0, each)
    steepest = 1e3
    while falling(steepest, each).tokens > tokens:
        each -= 1
        if each < 1:
            raise InputError(
                f"config key engine.kv_cache_gib has room for {tokens} tokens; expected at least {parts * ends[-1]}, "
                f"one episode of engine.cache_tokens in each of {parts} parts"
            )
    low, high = 0.0, steepest  # `low` does not fit, `high` does
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if falling(middle, each).tokens <= tokens else (middle, high)
    return falling(high, each)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One layer's keys and values. See attention.partial_softmax for the order of the axes."""

    k: tuple[jax.Array, ...]  # for each piece [rows, K, H, positions]
    v: tuple[jax.Array, ...]  # for each piece [rows, K, positions, H]


def init_cache(config: decoder.ModelConfig, layout: Layout, dtype: Any) -> Cache:
    K, H = config.num_kv_heads, config.head_dim
    sizes = [
        (n, end - start)
        for n, start, end in zip(layout.rows, layout.starts, layout.ends, strict=True)
    ]
    return Cache(
        tuple(jnp.zeros((n, K, H, S), dtype) for n, S in sizes),
        tuple(jnp.zeros((n, K, S, H), dtype) for n, S in sizes),
    )


def token_bytes(config: decoder.ModelConfig, dtype: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def _pick(values: jax.Array, index: jax.Array, fill: float = 0) -> jax.Array:
    return values.at[index].get(mode="fill", fill_value=fill)


def put(
    old: jax.Array,
    new: jax.Array,
    row_N: jax.Array,
    first_N: jax.Array,
    count_N: jax.Array,
    axis: int,
) -> Any:
    """old[row_N] with the first count_N positions of new at first_N and on, as one scatter; outside
    is dropped.
    """
    column_1T = jnp.arange(new.shape[axis])[None, :]
    place_NT = first_N[:, None] + column_1T
    size = old.shape[axis]
    place_NT = jnp.where((column_1T < count_N[:, None]) & (place_NT >= 0), place_NT, size)
    index = (row_N[:, None], *[slice(None)] * (axis - 1), place_NT)
    return old.at[index].set(jnp.moveaxis(new, axis, 1), mode="drop")


def scatter_sequential(
    old: jax.Array,
    new: jax.Array,
    row_N: jax.Array,
    first_N: jax.Array,
    count_N: jax.Array,
    axis: int,
) -> Any:
    """The same, one row after the other: the TPU's compiler turns a scatter's operand round and
    back, whole copies.

    It does so too for a few positions of the last axis, so there whole tiles of that axis are read
    and written.
    """
    size, length = old.shape[axis], new.shape[axis]
    tile = _TILE if axis == old.ndim - 1 else 1
    width = min(size, -(-(length + tile - 1) // tile) * tile)
    shape = (1, *(width if i == axis else n for i, n in enumerate(old.shape) if i))

    def one(n: jax.Array, old: jax.Array) -> jax.Array:
        at = jnp.clip(first_N[n] // tile * tile, 0, size - width)
        column_W = at - first_N[n] + jnp.arange(width)
        mine_W = (column_W >= 0) & (column_W < count_N[n]) & (row_N[n] < old.shape[0])
        place = [jnp.minimum(row_N[n], old.shape[0] - 1), *[jnp.int32(0)] * (old.ndim - 1)]
        place[axis] = at.astype(jnp.int32)
        there = jax.lax.dynamic_slice(old, place, shape)
        row = jnp.take(new[n], jnp.clip(column_W, 0, length - 1), axis=axis - 1)[None]
        mine = jnp.expand_dims(mine_W, [i for i in range(old.ndim) if i != axis])
        return jax.lax.dynamic_update_slice(old, jnp.where(mine, row, there), place)

    return jax.lax.fori_loop(0, len(row_N), one, old)


@dataclasses.dataclass(frozen=True)
class View:
    """The cache of one part's slots as a program sees it. rows_JB: the row that each slot has taken
    of each piece after the first; the number of rows where it has none.

    depth: how many pieces are read; no slot in play has tokens beyond them.
    """

    layout: Layout  # of a part
    rows_JB: jax.Array
    depth: int

    def _owners(self, piece: int) -> jax.Array:
        """For each row of a piece its slot, or the number of slots."""
        slots = self.layout.rows[0]
        none_R = jnp.full((self.layout.rows[piece],), slots, jnp.int32)
        return none_R.at[self.rows_JB[piece - 1]].set(
            jnp.arange(slots, dtype=jnp.int32), mode="drop"
        )

    def _row(self, piece: int, slot_N: jax.Array) -> jax.Array:
        """Row numbers in a piece; out of range for a slot that has none, or is out of range itself."""
        if piece == 0:
            return slot_N
        return (
            self.rows_JB[piece - 1].at[slot_N].get(mode="fill", fill_value=self.layout.rows[piece])
        )

    def _positions(self, piece: int) -> jax.Array:
        return jnp.arange(self.layout.starts[piece], self.layout.ends[piece])

    def attend_all(
        self, q_BTNH: jax.Array, cache: Cache, length_B: jax.Array
    ) -> list[attention.PartialSoftmax]:
        """Attention of every slot to the first length_B tokens of its own."""
        found = []
        for piece in range(self.depth):
            position_S = self._positions(piece)
            owner_R = self._owners(piece) if piece else None
            q, length = (x if owner_R is None else _pick(x, owner_R) for x in (q_BTNH, length_B))
            seen = (position_S[None, :] < length[:, None])[:, None]
            part = attention.partial_softmax(q, cache.k[piece], cache.v[piece], seen)
            if owner_R is not None:
                row_B = self.rows_JB[piece - 1]
                part = attention.PartialSoftmax(
                    _pick(part.o_BTNH, row_B),
                    _pick(part.max_BTN, row_B, attention.NEG_INF),
                    _pick(part.sum_BTN, row_B),
                )
            found.append(part)
        return found

    def attend_slots(
        self, q_NTNH: jax.Array, cache: Cache, slot_N: jax.Array, length_N: jax.Array
    ) -> list[attention.PartialSoftmax]:
        """Attention of queries of these slots to the first length_N tokens of each.

        XLA on every backend: the splash kernel knows which blocks to leave out from a mask that is
        fixed when it is compiled, and here each row has a length of its own.
        """
        found = []
        for piece in range(self.depth):
            row_N = self._row(piece, slot_N)
            position_S = self._positions(piece)
            seen = (position_S[None, :] < length_N[:, None])[:, None]
            seen = jnp.broadcast_to(seen, (*q_NTNH.shape[:2], len(position_S)))
            found.append(
                attention.partial_softmax(
                    q_NTNH, cache.k[piece][row_N], cache.v[piece][row_N], seen
                )
            )
        return found

    def write(
        self,
        cache: Cache,
        k_NKHT: jax.Array,
        v_NKTH: jax.Array,
        slot_N: jax.Array,
        first_N: jax.Array,
        count_N: jax.Array,
    ) -> Cache:
        """Puts keys and values of each row's first count_N tokens at position first_N of its slot
        and those behind.
        """
        new_k: list[jax.Array] = []
        new_v: list[jax.Array] = []
        for piece, start in enumerate(self.layout.starts):
            where = (self._row(piece, slot_N), first_N - start, count_N)
            for new, old, values, axis in (
                (new_k, cache.k, k_NKHT, 3),
                (new_v, cache.v, v_NKTH, 2),
            ):
                at_once, in_turn = (
                    functools.partial(f, axis=axis) for f in (put, scatter_sequential)
                )
                new.append(
                    jax.lax.platform_dependent(
                        old[piece], values, *where, tpu=in_turn, default=at_once
                    )
                )
        return Cache(tuple(new_k), tuple(new_v))

    def copy(self, cache: Cache, source_N: jax.Array, slot_N: jax.Array) -> Cache:
        """The pieces up to `depth` of some slots, from other slots."""

        def one(piece: int, old: jax.Array) -> jax.Array:
            if piece >= self.depth:
                return old
            return old.at[self._row(piece, slot_N)].set(
                old[self._row(piece, source_N)], mode="drop"
            )

        return Cache(
            *(tuple(one(i, old) for i, old in enumerate(side)) for side in (cache.k, cache.v))
        )
