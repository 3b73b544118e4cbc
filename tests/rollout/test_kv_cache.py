"""Cache: what a budget buys. What the pieces hold is tested where they are used, in test_sampler
and test_engine.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssp_jax.errors import InputError
from ssp_jax.rollout.kv_cache import Layout, full_layout, layout_for, put, scatter_sequential
from ssp_jax.rollout.scheduler import RowAllocator

ENDS = (1024, 4096, 12288)


@functools.partial(jax.jit, static_argnames="axis")
def put_once(old, new, row_M, first_M, count_M, axis):
    return put(old, new, row_M, first_M, count_M, axis)


@functools.partial(jax.jit, static_argnames="axis")
def put_in_turn(old, new, row_M, first_M, count_M, axis):
    """Beside an array whose positions are another axis."""
    other = 5 - axis
    arrays = [[x, jnp.swapaxes(x, axis, other)] for x in (old, new)]
    written, beside = scatter_sequential(*arrays, row_M, first_M, count_M, axes=(axis, other))
    return jnp.where(written == jnp.swapaxes(beside, axis, other), written, jnp.nan)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 4), st.integers(1, 64), st.integers(12288, 3_000_000))
def test_a_layout_keeps_to_its_budget(shards, slots_of_shard, tokens):
    tokens *= shards
    slots = slots_of_shard * shards
    layout = layout_for(ENDS, slots, tokens, shards)
    assert layout.tokens <= tokens
    assert all(n % shards == 0 and n >= shards for n in layout.rows)
    assert list(layout.rows) == sorted(layout.rows, reverse=True)
    if tokens >= slots * 12288:
        assert layout == full_layout(ENDS, slots, shards)
    elif layout.rows[0] == slots:
        # No rows are left unbought that a flatter fall would have given: three quarters of the
        # budget are used.
        assert layout.tokens > 0.5 * tokens or layout.rows[0] == layout.rows[1]


def test_seven_billion_parameters_on_one_device():
    """24 GiB at 56 KiB a token: every slot starts, and 25 of them may be in the last piece, 27
    times more than none.
    """
    layout = layout_for(ENDS, 64, 24 * 2**20 // 56)
    assert layout.rows[0] == 64 and 50 <= layout.rows[1] <= 60 and 24 <= layout.rows[2] <= 30
    assert full_layout(ENDS, 64).tokens > 1.7 * layout.tokens


def test_less_memory_than_slots_makes_fewer_slots():
    assert layout_for(ENDS, 64, 12288 + 10 * 1024).rows == (11, 1, 1)
    with pytest.raises(
        InputError, match="kv_cache_gib has room for 12287 tokens; expected at least 12288"
    ):
        layout_for(ENDS, 64, 12287)


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_no_row_ever_has_two_owners(data):
    """Slots that grow and leave in any order; memory is exactly what was promised, and all comes
    back.
    """
    layout = layout_for((4, 8, 16), 4, 60, shards=2)
    memory = RowAllocator(layout)
    for _ in range(30):
        slot = data.draw(st.integers(0, 3))
        if data.draw(st.booleans()):
            memory.grow(slot, data.draw(st.integers(1, 16)))
        else:
            memory.release(slot)
        for piece in (1, 2):
            rows_of_shard = layout.rows[piece] // 2
            for slots in (slice(0, 2), slice(2, 4)):
                cache_rows = memory.rows_JB[piece - 1, slots]
                taken = [row for row in cache_rows if row < rows_of_shard]
                assert len(taken) == len(set(taken))
        has = (memory.rows_JB < [[layout.rows[1] // 2], [layout.rows[2] // 2]]).sum(0)
        assert [layout.ends[n] for n in has] == memory.room_B.tolist()
    for slot in range(4):
        memory.release(slot)
    for slot in range(4):
        assert memory.fits(slot, 16)
        memory.grow(slot, 16)
        assert memory.room_B[slot] == 16
        memory.release(slot)


@pytest.mark.parametrize("axis,size,length", [(3, 300, 7), (3, 384, 150), (2, 40, 7), (2, 6, 9)])
def test_both_ways_to_write_put_the_same_tokens_where_they_belong(axis, size, length):
    """Before, inside, across and behind a piece and the tiles of its last axis; a row out of range
    is padding.
    """
    shape = [5, 2, 3, 3]
    shape[axis] = size
    old = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shape[0], shape[axis] = 2, length
    new = -1 - np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    firsts = (-length, -1, 0, 1, 121, 127, 128, 250, size - length, size - 1, size + 1)
    for row, first, count in itertools.product((0, 4, 5), firsts, (0, 1, length // 2, length)):
        rows = (row, 2)
        places = (first, 3)
        counts = (count, 2)
        expected = np.moveaxis(old.copy(), axis, 1)
        for n, values in enumerate(np.moveaxis(new, axis, 1)):
            for i in range(counts[n]):
                if rows[n] < 5 and 0 <= places[n] + i < size:
                    expected[rows[n], places[n] + i] = values[i]
        arrays = [jnp.asarray(x) for x in (old, new, rows, places, counts)]
        for write in (put_once, put_in_turn):
            got = np.moveaxis(np.asarray(write(*arrays, axis=axis)), axis, 1)
            np.testing.assert_array_equal(got, expected)


@given(st.integers(1, 3), st.integers(1, 40), st.lists(st.floats(0.01, 1), max_size=4))
def test_row_buckets_hold_any_number_of_rows(shards, rows, shares):
    layout = Layout((4, 8, 16), (40 * shards, rows * shards, rows * shards), shards)
    assert layout.row_buckets(1, shares) == [40]
    for depth in (2, 3):
        buckets = layout.row_buckets(depth, shares)
        assert buckets[-1] == rows and all(1 <= bucket <= rows for bucket in buckets)
        assert buckets == sorted(set(buckets))
    assert layout.row_buckets(2, [0.5]) == sorted({-(-rows // 2), rows})


def test_slots_take_the_lowest_rows():
    """So that a chunk need not read the others; rows are counted in each shard on its own."""
    memory = RowAllocator(Layout((4, 8), (8, 8), shards=2))
    for slot in (3, 1, 2, 7):
        memory.grow(slot, 5)
    assert memory.rows_JB.tolist() == [[4, 1, 2, 0, 4, 4, 4, 0]]
    assert memory.rows_of([0, 1, 2, 3, 7], 1) == 3 and memory.rows_of([3, 7], 1) == 1
    assert memory.rows_of([0, 4], 1) == 1  # none: a program reads at least one
    assert memory.rows_of([0], 0) == 4  # a slot each
    memory.release(3)
    memory.release(1)
    memory.grow(0, 8)
    assert memory.rows_JB.tolist() == [[0, 4, 2, 4, 4, 4, 4, 0]]
