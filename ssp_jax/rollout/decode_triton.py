"""Attention of decoding for NVIDIA GPUs: a Pallas kernel for Triton that stops at each length.

Flash-decoding (Dao et al., 2023, pytorch.org/blog/flash-decoding): the tiles of a slot's keys are
split over several programs, each of which has a softmax of its own. A program walks through the
pieces of the cache and reads the tiles that hold tokens of its slot, and nothing else.

Inside the kernel T is a tile of keys, and R is padded. Scores have base 2, which GPUs raise faster.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ssp_jax.model.attention import NEG_INF

_MIN_SIZE = 16  # of a product in Triton, on each axis
# Of the keys of a tile: 64 of 128 bfloat16. Two of them and of values fit the shared memory of an
# L4, which has the least (100 KiB).
_TILE_BYTES = 2**14
_FULL_HEAD = 128  # a tile of smaller heads has no more keys
# An H100 has 132 multiprocessors, and runs several programs on each. Each program writes a result,
# so there are not many more.
_PROGRAMS = 1024
_MAX_SPLITS = 16
_LOG2_E = math.log2(math.e)


def tile(head_dim: int, dtype: Any, lengths: Sequence[int]) -> int:
    """Keys of a tile for pieces of these lengths; 0 where there is no kernel for them.

    A tile lies in one piece, and all sizes in Triton are powers of 2.
    """
    most = _TILE_BYTES // (max(head_dim, _FULL_HEAD) * jnp.dtype(dtype).itemsize)
    keys = math.gcd(most, *lengths)
    fits = keys >= _MIN_SIZE and head_dim >= _MIN_SIZE and head_dim.bit_count() == 1
    return keys if fits else 0


def splits(slots: int, heads: int) -> int:
    """Programs that share a slot's keys of one head."""
    wanted = max(1, _PROGRAMS // (slots * heads))
    return min(_MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def padded_group(R: int) -> int:
    """Query heads of a key head, in the kernel."""
    return max(_MIN_SIZE, 1 << (R - 1).bit_length())


def _kernel(q_ref: Any, length_ref: Any, *refs: Any, starts: Sequence[int], keys: int) -> None:
    """One split of one head of keys of one slot.

    refs: keys [rows, H, S] of each piece, then values [rows, S, H], then the rows of the slots in
    each later piece, then the results. starts: first position of each piece.
    """
    *arrays, o_ref, max_ref, sum_ref = refs
    k_refs, v_refs, row_refs = (arrays[i * len(starts) :][: len(starts)] for i in range(3))
    slot = pl.program_id(0)
    rows = [slot, *[row_ref[slot] for row_ref in row_refs]]
    split = pl.program_id(2)
    length = length_ref[slot]
    q_RH = q_ref[...]
    R, H = q_RH.shape

    def add_keys(
        k_ref: Any, v_ref: Any, row: jax.Array, start: int, i: jax.Array, sums: tuple[Any, ...]
    ) -> tuple[jax.Array, ...]:
        o_RH, max_R, sum_R = sums
        own = pl.ds(i * keys, keys)
        k_HT = k_ref[row, :, own]
        v_TH = v_ref[row, own, :]
        position_1T = start + i * keys + jnp.arange(keys)[None]
        scores_RT = jnp.dot(q_RH, k_HT, preferred_element_type=jnp.float32)
        scores_RT = jnp.where(position_1T < length, scores_RT * (H**-0.5 * _LOG2_E), NEG_INF)
        new_max_R = jnp.maximum(max_R, scores_RT.max(1))
        weights_RT = jnp.exp2(scores_RT - new_max_R[:, None])
        shrunk_R = jnp.exp2(max_R - new_max_R)
        added_RH = jnp.dot(weights_RT.astype(v_TH.dtype), v_TH, preferred_element_type=jnp.float32)
        return o_RH * shrunk_R[:, None] + added_RH, new_max_R, sum_R * shrunk_R + weights_RT.sum(1)

    # As many tiles of the slot for each split, in order.
    tiles = jax.lax.div(length + keys - 1, keys)
    each = jax.lax.div(tiles + pl.num_programs(2) - 1, pl.num_programs(2))
    begin = split * each
    end = jnp.minimum(begin + each, tiles)

    zeros_R = jnp.zeros((R,), jnp.float32)
    sums: Any = (jnp.zeros((R, H), jnp.float32), zeros_R + NEG_INF, zeros_R)
    for k_ref, v_ref, row, start in zip(k_refs, v_refs, rows, starts, strict=True):
        # Of a piece that the slot has no row of, no tile is read.
        own = functools.partial(add_keys, k_ref, v_ref, row, start)
        first = start // keys
        last = first + k_ref.shape[2] // keys
        lower, upper = [jnp.clip(x, first, last) - first for x in (begin, end)]
        sums = jax.lax.fori_loop(lower, upper, own, sums)
    o_ref[...], max_R, sum_ref[...] = sums
    max_ref[...] = max_R * (1 / _LOG2_E)


def attend(
    q_BTNH: jax.Array,
    length_B: jax.Array,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """o, max and sum of each split, as in PartialSoftmax with an axis before its own.

    Of one device's slots and heads.
    """
    B, _, N, H = q_BTNH.shape
    K = k[0].shape[1]
    R = N // K
    R_padded = padded_group(R)
    lengths = [x.shape[3] for x in k]
    starts = [sum(lengths[:piece]) for piece in range(len(k))]
    number = splits(B, K)
    padding = ((0, 0), (0, 0), (0, R_padded - R), (0, 0))
    q_BKRH = jnp.pad(q_BTNH.reshape(B, K, R, H), padding)

    def of_head(x: jax.Array) -> pl.BlockSpec:
        rows, _, *rest = x.shape
        return pl.BlockSpec((rows, None, *rest), lambda b, k, s: (0, k, 0, 0))

    def result(*shape: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        zeros = (0,) * len(shape)
        spec = pl.BlockSpec((None, None, None, *shape), lambda b, k, s: (s, b, k, *zeros))
        return spec, jax.ShapeDtypeStruct((number, B, K, *shape), jnp.float32)

    of_slots = pl.BlockSpec((B,), lambda b, k, s: (0,))
    results = [result(R_padded, H), result(R_padded), result(R_padded)]
    run = pl.pallas_call(
        functools.partial(_kernel, starts=starts, keys=tile(H, k[0].dtype, lengths)),
        grid=(B, K, number),
        in_specs=[
            pl.BlockSpec((None, None, R_padded, H), lambda b, k, s: (b, k, 0, 0)),
            of_slots,
            *map(of_head, (*k, *v)),
            *[of_slots] * len(rows),
        ],
        out_specs=[spec for spec, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    found = run(q_BKRH, length_B, *k, *v, *rows)
    return tuple(x[:, :, :, :R].reshape(number, B, 1, N, *x.shape[4:]) for x in found)
