"""Where keys and values live: cut along the positions of a slot, with memory only for the pieces that are in use.

The positions of a slot are cut at fixed ends, say 1024, 4096 and 12288. Every slot owns the memory of its first piece;
of each later piece there is a smaller number of rows, and a slot takes one when its episode grows into it. So memory
follows what episodes use, nothing is ever moved, and every program reads dense arrays: no page table to gather from.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ssp_jax import attention, model
from ssp_jax.data import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """ends: exclusive last position of each piece. rows: how many rows each has; rows[0] is the number of slots.

    parts: slots and rows are split evenly over this many parts (of a mesh), and a slot takes rows of its own part.
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
        return sum(n * (end - start) for n, start, end in zip(self.rows, self.starts, self.ends, strict=True))

    def depth(self, tokens: int) -> int:
        """How many pieces an episode of so many tokens needs."""
        return sum(start < tokens for start in self.starts)


def full_layout(ends: tuple[int, ...], slots: int, parts: int = 1) -> Layout:
    """The longest episode in every slot."""
    return Layout(ends, (slots,) * len(ends), parts)


def layout_for(ends: tuple[int, ...], slots: int, tokens: int, parts: int = 1) -> Layout:
    """Rows such that all together hold at most `tokens` tokens, with at least one row of each piece in each part.

    Rows fall off with the position as if the lengths of episodes were exponentially distributed, as far as memory asks
    for it; if even one row of each later piece is too much, the slots become fewer.
    """

    def falling(rate: float, first: int) -> Layout:
        each = [max(1, math.floor(first * math.exp(-rate * start / ends[-1]))) for start in (0, *ends[:-1])]
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
    """One layer's keys and values. See attention.part for the order of the axes."""

    k: tuple[jax.Array, ...]  # for each piece [rows, K, H, positions]
    v: tuple[jax.Array, ...]  # for each piece [rows, K, positions, H]


def init_cache(config: model.ModelConfig, layout: Layout, dtype: Any) -> Cache:
    K, H = config.num_kv_heads, config.head_dim
    sizes = [(n, end - start) for n, start, end in zip(layout.rows, layout.starts, layout.ends, strict=True)]
    return Cache(
        tuple(jnp.zeros((n, K, H, S), dtype) for n, S in sizes),
        tuple(jnp.zeros((n, K, S, H), dtype) for n, S in sizes),
    )


def token_bytes(config: model.ModelConfig, dtype: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class View:
    """The cache of all slots as one program sees it. rows_JB: the row, inside its part, that each slot has taken of
    each piece after the first; the number of rows in a part where it has none.

    depth: how many pieces are read; no slot in play has tokens beyond them.
    """

    layout: Layout
    rows_JB: jax.Array
    depth: int

    def _pick(self, values: jax.Array, index: jax.Array, fill: float = 0) -> jax.Array:
        """values[index] inside each part, so that no part needs another's values."""
        parts = self.layout.parts
        picked = jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=fill))(
            values.reshape(parts, -1, *values.shape[1:]), index.reshape(parts, -1)
        )
        return picked.reshape(-1, *values.shape[1:])

    def _owners(self, piece: int) -> jax.Array:
        """For each row of a piece its slot inside the part, or the number of slots in a part."""
        parts, slots = self.layout.parts, self.layout.rows[0]
        row_PB = self.rows_JB[piece - 1].reshape(parts, -1)
        none = jnp.full((self.layout.rows[piece] // parts,), slots // parts, jnp.int32)
        place = jnp.arange(slots // parts, dtype=jnp.int32)
        return jax.vmap(lambda row: none.at[row].set(place, mode="drop"))(row_PB).reshape(-1)

    def _row(self, piece: int, slot_N: jax.Array) -> jax.Array:
        """Row numbers in a whole piece; out of range for a slot that has none, or is out of range itself."""
        slots, rows = self.layout.rows[0], self.layout.rows[piece]
        if piece == 0:
            return slot_N
        row_N = self.rows_JB[piece - 1].at[slot_N].get(mode="fill", fill_value=rows)
        each = rows // self.layout.parts
        return jnp.where(row_N < each, row_N + slot_N // (slots // self.layout.parts) * each, rows)

    def _positions(self, piece: int) -> jax.Array:
        return jnp.arange(self.layout.starts[piece], self.layout.ends[piece])

    def attend_all(self, q_BTNH: jax.Array, cache: Cache, length_B: jax.Array) -> list[attention.Part]:
        """Attention of every slot to the first length_B tokens of its own."""
        found = []
        for piece in range(self.depth):
            position_S = self._positions(piece)
            owner_R = self._owners(piece) if piece else None
            q, length = (x if owner_R is None else self._pick(x, owner_R) for x in (q_BTNH, length_B))
            seen = (position_S[None, :] < length[:, None])[:, None]
            part = attention.part(q, cache.k[piece], cache.v[piece], seen)
            if owner_R is not None:
                row_B = self.rows_JB[piece - 1]
                part = attention.Part(
                    self._pick(part.o_BTNH, row_B),
                    self._pick(part.max_BTN, row_B, attention.NEG_INF),
                    self._pick(part.sum_BTN, row_B),
                )
            found.append(part)
        return found

    def attend_some(
        self, q_NTNH: jax.Array, cache: Cache, slot_N: jax.Array, length_N: jax.Array
    ) -> list[attention.Part]:
        """Attention of queries of these slots to the first length_N tokens of each."""
        found = []
        for piece in range(self.depth):
            row_N = self._row(piece, slot_N)
            position_S = self._positions(piece)
            seen = (position_S[None, :] < length_N[:, None])[:, None]
            seen = jnp.broadcast_to(seen, (*q_NTNH.shape[:2], len(position_S)))
            found.append(attention.part(q_NTNH, cache.k[piece][row_N], cache.v[piece][row_N], seen))
        return found

    def write(
        self, cache: Cache, k_NTKH: jax.Array, v_NTKH: jax.Array, slot_N: jax.Array, position_NT: jax.Array
    ) -> Cache:
        """Puts keys and values of tokens at their positions; a token whose position is negative is not written."""
        new_k, new_v = [], []
        for piece, (start, end) in enumerate(zip(self.layout.starts, self.layout.ends, strict=True)):
            row_N1 = self._row(piece, slot_N)[:, None]
            inside_NT = (position_NT >= start) & (position_NT < end)
            place_NT = jnp.where(inside_NT, position_NT - start, end - start)  # out of range: dropped
            new_k.append(cache.k[piece].at[row_N1, :, :, place_NT].set(k_NTKH, mode="drop"))
            new_v.append(cache.v[piece].at[row_N1, :, place_NT].set(v_NTKH, mode="drop"))
        return Cache(tuple(new_k), tuple(new_v))

    def copy(self, cache: Cache, source_N: jax.Array, slot_N: jax.Array) -> Cache:
        """The pieces up to `depth` of some slots, from other slots."""

        def one(piece: int, old: jax.Array) -> jax.Array:
            if piece >= self.depth:
                return old
            return old.at[self._row(piece, slot_N)].set(old[self._row(piece, source_N)], mode="drop")

        return Cache(*(tuple(one(i, old) for i, old in enumerate(side)) for side in (cache.k, cache.v)))
