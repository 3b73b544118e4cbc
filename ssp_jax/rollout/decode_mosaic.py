"""Attention of decoding for TPUs: a Pallas kernel for Mosaic that stops at each length.

The cache stays in HBM. A program goes through some slots in turn, and through the tiles of each:
while it computes with one tile, the next, perhaps of the next slot, is on its way to VMEM. Of a
tile only the blocks that hold tokens of the slot are read.

Inside the kernel T is a tile of keys, and R is padded.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssp_jax.model.attention import LANES, NEG_INF

_SUBLANES = 16  # of a tile of bfloat16 in memory; of float32 there are 8
# Of a tile of keys, of all heads. VMEM has two of them and two of values, 2 MiB of 16 on a v5e.
_TILE_BYTES = 2**19
# However small the heads. A tile takes some hundred cycles of scalar work, and a v6e reads 2^19
# bytes in that time.
_MAX_KEYS = 1024
_BLOCK = 256  # keys, that are read together
_SLOTS = 16  # of a program. A v5p has two cores, which share the programs.


def tile(heads: int, head_dim: int, dtype: Any, lengths: Sequence[int]) -> int:
    """Keys of a tile for pieces of these lengths; 0 where there is no kernel for them.

    A tile lies in one piece. heads: of keys on a device.
    """
    fitting = _TILE_BYTES // (heads * head_dim * jnp.dtype(dtype).itemsize)
    most = min(_MAX_KEYS, max(LANES, 1 << (fitting.bit_length() - 1)))
    keys = math.gcd(most, *lengths)
    fits = keys % LANES == 0 and head_dim % _SUBLANES == 0
    return keys if fits else 0


def block(keys: int) -> int:
    """Keys of a tile of so many that are read together."""
    return min(keys, _BLOCK)


def padded_group(R: int) -> int:
    """Query heads of a key head, in the kernel."""
    return -(-R // 8) * 8


def _positions_last(head_dim: int) -> bool:
    """Whether the compiler keeps positions of values last in memory, as it does not pad heads."""
    return head_dim % LANES > 0


class _Cache(NamedTuple):
    """References to the cache in HBM, and to two tiles of it in VMEM."""

    length_B: Any
    rows: Any  # the row of each slot in each piece, [pieces, B]
    starts: Sequence[int]  # first position of each piece
    k: Sequence[Any]  # of each piece [rows, K, H, S]
    v: Sequence[Any]  # [rows, K, S, H], or as k
    k_tiles: Any  # [2, K, H, T]
    v_tiles: Any  # [2, K, T, H], or as k_tiles
    arrived: Any  # semaphores of the tiles, [2]

    @property
    def keys(self) -> int:
        """Of a tile."""
        return int(self.k_tiles.shape[3])

    def start(self, slot: Any, i: Any, buffer: Any) -> None:
        """Starts to read what the slot's tile i holds of the slot's tokens."""
        for piece, start in enumerate(self.starts):
            first = start // self.keys
            last = first + self.k[piece].shape[3] // self.keys

            @pl.when((first <= i) & (i < last))
            def _(piece: int = piece, first: int = first) -> None:
                row = self.rows[piece, slot]

                def start_block(offset: int) -> None:
                    there = pl.multiple_of((i - first) * self.keys + offset, LANES)
                    for copy in self._copies(piece, row, there, buffer, offset):
                        copy.start()

                self._each_block(slot, i, start_block)

    def wait(self, slot: jax.Array, i: jax.Array, buffer: jax.Array) -> None:
        """Waits for what `start` has started with the same arguments."""

        def wait_for_block(offset: int) -> None:
            # Only their sizes count.
            for copy in self._copies(0, 0, 0, buffer, offset):
                copy.wait()

        self._each_block(slot, i, wait_for_block)

    def _each_block(self, slot: jax.Array, i: jax.Array, act: Callable[[int], None]) -> None:
        """Acts on each block of tile i that holds tokens, by its offset in the tile."""
        tokens = self.length_B[slot] - i * self.keys
        for offset in range(0, self.keys, block(self.keys)):
            pl.when(offset < tokens)(functools.partial(act, offset))

    def _copies(self, piece: int, row: Any, there: Any, buffer: Any, offset: int) -> list[Any]:
        """Of a block of keys and of values from position `there` of a row of a piece."""
        size = block(self.keys)
        source = pl.ds(there, size)
        target = pl.ds(offset, size)
        arrived = self.arrived.at[buffer]
        k = self.k[piece].at[row, :, :, source]
        k_tile = self.k_tiles.at[buffer, :, :, target]
        if _positions_last(self.k_tiles.shape[2]):
            v = self.v[piece].at[row, :, :, source]
            v_tile = self.v_tiles.at[buffer, :, :, target]
        else:
            v = self.v[piece].at[row, :, source]
            v_tile = self.v_tiles.at[buffer, :, target]
        copies = ((k, k_tile), (v, v_tile))
        return [pltpu.make_async_copy(*places, arrived) for places in copies]


_Sums = tuple[jax.Array, jax.Array, jax.Array]  # o_KRH, max_KR1 and sum_KR1


def _add_tile(
    q_KRH: jax.Array, k_KHT: jax.Array, v_tile: jax.Array, tokens: jax.Array, sums: _Sums
) -> _Sums:
    """The sums with a tile's keys before position `tokens` of the tile."""
    o_KRH, max_KR1, sum_KR1 = sums
    H, T = k_KHT.shape[1:]
    positions = 2 if _positions_last(H) else 1
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    is_seen = jax.lax.broadcasted_iota(jnp.int32, (1, 1, T), 2) < tokens
    scores_KRT = dot(q_KRH, k_KHT, (((2,), (1,)), ((0,), (0,)))) * H**-0.5
    scores_KRT = jnp.where(is_seen, scores_KRT, NEG_INF)
    new_max_KR1 = jnp.maximum(max_KR1, scores_KRT.max(2, keepdims=True))
    # A slot without tokens has no sum.
    weights_KRT = jnp.where(is_seen, jnp.exp(scores_KRT - new_max_KR1), 0)
    shrunk_KR1 = jnp.exp(max_KR1 - new_max_KR1)
    rounded_KRT = weights_KRT.astype(v_tile.dtype)
    added_KRH = dot(rounded_KRT, v_tile, (((2,), (positions,)), ((0,), (0,))))
    new_sum_KR1 = sum_KR1 * shrunk_KR1 + weights_KRT.sum(2, keepdims=True)
    return o_KRH * shrunk_KR1 + added_KRH, new_max_KR1, new_sum_KR1


def _kernel(length_ref: Any, row_ref: Any, q_ref: Any, *refs: Any, starts: Sequence[int]) -> None:
    """Some slots, one after the other.

    refs: keys of each piece, then values, then the results, then what _Cache has in VMEM.
    """
    pieces = len(starts)
    k_refs = refs[:pieces]
    v_refs = refs[pieces : 2 * pieces]
    o_ref, max_ref, sum_ref, *tiles = refs[2 * pieces :]
    cache = _Cache(length_ref, row_ref, starts, k_refs, v_refs, *tiles)
    slots, K, R, H = q_ref.shape
    first = pl.program_id(0) * slots
    # What is not read counts nothing, if it is a number.
    cache.v_tiles[...] = jnp.zeros(cache.v_tiles.shape, cache.v_tiles.dtype)
    cache.start(first, 0, 0)

    def attend_slot(own: jax.Array, turn: jax.Array) -> jax.Array:
        """turn: tiles of all slots before this one."""
        slot = first + own
        length = length_ref[slot]
        number = jnp.maximum(1, pl.cdiv(length, cache.keys))

        def attend_tile(i: jax.Array, sums: _Sums) -> _Sums:
            buffer = (turn + i) & 1
            is_last = i + 1 == number
            next_slot = jnp.where(is_last, slot + 1, slot)

            @pl.when(next_slot < first + slots)
            def _() -> None:
                cache.start(next_slot, jnp.where(is_last, 0, i + 1), 1 - buffer)

            cache.wait(slot, i, buffer)
            tile = (cache.k_tiles[buffer], cache.v_tiles[buffer])
            return _add_tile(q_ref[own], *tile, length - i * cache.keys, sums)

        zeros_KR1 = jnp.zeros((K, R, 1), jnp.float32)
        sums = (jnp.zeros((K, R, H), jnp.float32), zeros_KR1 + NEG_INF, zeros_KR1)
        o_KRH, max_KR1, sum_KR1 = jax.lax.fori_loop(0, number, attend_tile, sums)
        o_ref[own] = o_KRH
        max_ref[own] = max_KR1[..., 0]
        sum_ref[own] = sum_KR1[..., 0]
        return turn + number

    jax.lax.fori_loop(0, slots, attend_slot, jnp.int32(0))


def _cost(q_BTNH: jax.Array, k: jax.Array) -> pl.CostEstimate:
    """For the compiler's schedule, as if each slot had the tokens of the first piece: keys k."""
    B, _, N, H = q_BTNH.shape
    scores = B * N * k.shape[3]
    return pl.CostEstimate(
        flops=4 * scores * H, bytes_accessed=2 * k.size * k.dtype.itemsize, transcendentals=scores
    )


def attend(
    q_BTNH: jax.Array,
    length_B: jax.Array,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """o, max and sum, as in PartialSoftmax with an axis of one split before its own.

    Of one device's slots and heads.
    """
    B, _, N, H = q_BTNH.shape
    K = k[0].shape[1]
    R = N // K
    R_padded = padded_group(R)
    dtype = k[0].dtype
    lengths = [x.shape[3] for x in k]
    keys = tile(K, H, dtype, lengths)
    v_tile = (K, keys, H)
    if _positions_last(H):
        v = [jnp.swapaxes(x, 2, 3) for x in v]
        v_tile = (K, H, keys)
    padding = ((0, 0), (0, 0), (0, R_padded - R), (0, 0))
    q_BKRH = jnp.pad(q_BTNH.reshape(B, K, R, H), padding)
    rows_of_pieces = jnp.stack([jnp.arange(B, dtype=jnp.int32), *rows])
    slots = math.gcd(B, _SLOTS)

    def of_slots(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((slots, *shape), lambda program, *_: (program, *zeros))

    results = [(K, R_padded, H), (K, R_padded), (K, R_padded)]
    run = pl.pallas_call(
        functools.partial(_kernel, starts=[sum(lengths[:piece]) for piece in range(len(lengths))]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B // slots,),
            in_specs=[of_slots(K, R_padded, H)] + [pl.BlockSpec(memory_space=pl.ANY)] * 2 * len(k),
            out_specs=[of_slots(*shape) for shape in results],
            scratch_shapes=[
                pltpu.VMEM((2, K, H, keys), dtype),
                pltpu.VMEM((2, *v_tile), dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, *shape), jnp.float32) for shape in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        cost_estimate=_cost(q_BTNH, k[0]),
        interpret=interpret,
    )
    found = run(length_B, rows_of_pieces, q_BKRH, *k, *v)
    return tuple(x[:, :, :R].reshape(1, B, 1, N, *x.shape[3:]) for x in found)
