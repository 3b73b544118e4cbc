"""The rows with the largest inner products, exactly, without sorting millions of scores.

On a device: a scan over chunks of rows keeps of each block of BLOCK rows only its largest score.
The k best rows lie in the k blocks with the largest of these (k blocks with a larger one would hold
k better rows), so only these blocks are scored once more and sorted. At equal scores the lower row
comes first: blocks are in the order of rows, and a sort by score keeps that order.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
CHUNK = 1 << 16  # rows scored at a time on a device
HOST_CHUNK = 1 << 14  # and on the host: 64 queries take 4 MB, and rows of 768 numbers 48
GROUP = 8  # queries whose blocks are scored once more at a time


def chunk_rows(rows: int) -> int:
    """Rows of a chunk, for a device with so many rows."""
    return min(CHUNK, max(1, -(-rows // BLOCK)) * BLOCK)


def padded_rows(rows: int) -> int:
    """Rows that such a device holds with its padding: whole chunks."""
    chunk = chunk_rows(rows)
    return max(1, -(-rows // chunk)) * chunk


def device_top(
    queries_BD: jax.Array,
    vectors: jax.Array,
    scales: jax.Array | None,
    count: jax.Array,
    k: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores (float32) and rows (int32) of the k best of the first `count` rows, [B, k] each.

    vectors: bfloat16 or int8 [rows, D], rows a multiple of chunk. scales: float32 [rows], of int8.
    Where there are fewer than k rows the last scores are -inf.
    """
    queries_BD = queries_BD.astype(jnp.bfloat16)
    scores_of = functools.partial(_scores, vectors=vectors, scales=scales, count=count)

    def chunk_maxima(first: jax.Array) -> jax.Array:
        scores = scores_of(queries_BD, first, chunk)
        return scores.reshape(len(queries_BD), -1, BLOCK).max(axis=-1)

    starts = jnp.arange(0, len(vectors), chunk, dtype=jnp.int32)
    maxima = jax.lax.map(chunk_maxima, starts)  # [chunks, B, blocks of a chunk]
    maxima = jnp.moveaxis(maxima, 0, 1).reshape(len(queries_BD), -1)
    _, blocks = jax.lax.top_k(maxima, min(k, maxima.shape[1]))

    def rescore(query_and_blocks: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query_D, own_blocks = query_and_blocks
        # In the order of rows, so that ties go to the lower one.
        firsts = jnp.sort(own_blocks) * BLOCK
        scores = jax.vmap(lambda first: scores_of(query_D[None], first, BLOCK))(firsts)
        best, at = jax.lax.top_k(scores.reshape(-1), min(k, scores.size))
        rows = firsts[at // BLOCK] + at % BLOCK
        padding = (0, k - len(best))
        return jnp.pad(best, padding, constant_values=-jnp.inf), jnp.pad(rows, padding)

    return jax.lax.map(rescore, (queries_BD, blocks), batch_size=GROUP)


def _scores(
    queries_BD: jax.Array,
    first: jax.Array,
    number: int,
    *,
    vectors: jax.Array,
    scales: jax.Array | None,
    count: jax.Array,
) -> jax.Array:
    """float32 [B, number]: of the rows from `first` on; -inf from row `count` on."""
    some = jax.lax.dynamic_slice_in_dim(vectors, first, number)
    dimensions = (((1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(
        queries_BD, some.astype(jnp.bfloat16), dimensions, preferred_element_type=jnp.float32
    )
    if scales is not None:
        scores = scores * jax.lax.dynamic_slice_in_dim(scales, first, number)[None]
    is_row = first + jnp.arange(number) < count
    return jnp.where(is_row[None], scores, -jnp.inf)


def host_top(
    queries_BD: np.ndarray,
    float32_rows: Callable[[slice], np.ndarray],
    first: int,
    last: int,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The same on the host, of the rows from `first` to `last` (exclusive), read chunk by chunk.

    queries, and the rows that a slice gives: float32. Scores and rows are [B, up to k].
    """
    scores = np.zeros((len(queries_BD), 0), np.float32)
    rows = np.zeros((len(queries_BD), 0), np.int64)
    for start in range(first, last, HOST_CHUNK):
        end = min(start + HOST_CHUNK, last)
        of_chunk = queries_BD @ float32_rows(slice(start, end)).T
        numbers = np.broadcast_to(np.arange(start, end), of_chunk.shape)
        scores, rows = best_of(
            np.concatenate([scores, of_chunk], axis=1),
            np.concatenate([rows, numbers], axis=1),
            k,
        )
    return scores, rows


def best_of(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each line, best first, at equal scores the one that stands first."""
    k = min(k, scores.shape[1])
    places = np.empty((len(scores), k), np.int64)
    for line, own_scores in enumerate(scores):
        threshold = np.partition(own_scores, -k)[-k]
        # More than k, where several equal the threshold.
        candidates = np.flatnonzero(own_scores >= threshold)
        order = np.argsort(-own_scores[candidates], kind="stable")
        places[line] = candidates[order[:k]]
    lines = np.arange(len(scores))[:, None]
    return scores[lines, places], rows[lines, places]
