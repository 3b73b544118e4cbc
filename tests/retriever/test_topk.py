"""The best rows are those of a sort, whatever the dtype, the shape and the number of devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ssp_jax.retriever import topk

Arrays = tuple[np.ndarray, np.ndarray]


def by_sorting(queries: np.ndarray, rows: np.ndarray, k: int) -> Arrays:
    scores = queries @ rows.astype(np.float32).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def small_numbers(rows: int, width: int, seed: int = 0) -> Arrays:
    """Whole numbers, of which every sum is exact, and many scores are equal."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (8, width)).astype(np.float32)
    return queries, rng.integers(-3, 4, (rows, width)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(4, 5))
def on_device(queries: Any, rows: Any, scales: Any, count: Any, k: int, chunk: int) -> Any:
    return topk.device_top(queries, rows, scales, count, k, chunk)


@pytest.mark.parametrize(
    ("rows", "width", "k", "chunk"),
    [(128, 4, 3, 128), (1000, 8, 5, 256), (1000, 3, 20, 1024), (7, 4, 12, 128), (300, 2, 130, 384)],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.int8])
def test_a_device_finds_what_a_sort_finds(
    dtype: Any, rows: int, width: int, k: int, chunk: int
) -> None:
    queries, vectors = small_numbers(rows, width)
    padded = np.full((-(-rows // chunk) * chunk, width), 100, dtype)  # padding would win
    padded[:rows] = vectors
    scales = np.full(len(padded), 0.5, np.float32) if dtype is np.int8 else None
    found_scores, found_rows = on_device(queries, padded, scales, rows, k, chunk)
    scores, order = by_sorting(queries, vectors, k)
    number = min(k, rows)
    np.testing.assert_array_equal(found_rows[:, :number], order)
    np.testing.assert_array_equal(
        found_scores[:, :number], scores if scales is None else scores * 0.5
    )
    assert np.isneginf(found_scores[:, number:]).all()


@pytest.mark.parametrize(("rows", "k"), [(1, 3), (50, 3), (333, 7), (333, 400)])
def test_the_host_finds_what_a_sort_finds(
    monkeypatch: pytest.MonkeyPatch, rows: int, k: int
) -> None:
    monkeypatch.setattr(topk, "HOST_CHUNK", 64)
    queries, vectors = small_numbers(rows, 5, seed=1)
    scores, order = by_sorting(queries, vectors, k)
    found_scores, found_rows = topk.host_top(queries, lambda where: vectors[where], 0, rows, k)
    np.testing.assert_array_equal(found_rows, order)
    np.testing.assert_array_equal(found_scores, scores)
    if rows > 60:
        _, some = topk.host_top(queries, lambda where: vectors[where], 60, rows, k)
        np.testing.assert_array_equal(some, 60 + by_sorting(queries, vectors[60:], k)[1])


def test_no_row_is_missed_where_all_scores_are_negative_or_equal() -> None:
    queries = np.ones((8, 2), np.float32)
    rows = np.full((512, 2), -5, np.float32)
    rows[300] = -4
    rows[400:] = 0  # padding, which would be better
    found = np.asarray(on_device(queries, rows.astype(jnp.bfloat16), None, 400, 3, 128)[1])
    assert found.tolist() == [[300, 0, 1]] * 8


def test_chunks_divide_the_padded_rows() -> None:
    for rows in (0, 1, 127, 128, 129, 5000, topk.CHUNK - 1, topk.CHUNK, topk.CHUNK + 1, 2_626_916):
        chunk = topk.chunk_rows(rows)
        padded = topk.padded_rows(rows)
        assert padded % chunk == 0 and chunk % topk.BLOCK == 0 and rows <= padded < rows + chunk + 1
