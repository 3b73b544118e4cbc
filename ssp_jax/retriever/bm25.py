"""BM25 in bounded memory: words to postings on disk, and the kernels that find a query's top k.

A posting is a corpus row, of a passage that has the term, and the term's BM25 score in it. The
result is what bm25s itself computes and stores (its "lucene" scores, float32, one column of
passages per term), so that `bm25s.BM25.load` reads it. bm25s holds all words of a corpus while it
indexes; here each block of passages is inverted and spilled to disk, and the blocks are merged term
range by term range (Heinz & Zobel 2003, SPIMI): memory is the vocabulary plus one block.

The search prunes with score bounds (Turtle & Flood 1995, MaxScore, term at a time): it adds the
rarest words first, and once the remaining words cannot lift an unseen passage into the top k, it
completes only the passages already seen.
"""

import math
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

# File names. bm25s looks for the first three; the last one is ours.
SCORES = "data.csc.index.npy"  # float32 [postings]
ROWS = "indices.csc.index.npy"  # int32 [postings]
STARTS = "indptr.csc.index.npy"  # int64 [terms + 1]
MAX_IMPACT = "highest.npy"  # float32 [terms], the most that a term adds to any passage

BLOCK_TOKENS = 1 << 25  # words of a block: 128 MB, and as much again for each of its two columns
RANGE_POSTINGS = 1 << 24  # postings merged at a time: 128 MB
KNOWN_WORDS = 1 << 22  # word forms whose stem is cached while building, some 400 MB
QUERY_WORDS = 1 << 20  # the same while searching, some 100 MB

_STOP = -1  # term number of a stop word


def _compiled(function: Callable[..., Any]) -> Any:
    """Numba's njit without the GIL, cached on disk where possible.

    Numba caches in NUMBA_CACHE_DIR, this folder or the user's own. A read-only installation of a
    user without a home has none of them, and compiles whenever it starts.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)


class Vocabulary(dict[str, int]):
    """Word form -> term number, in the order of first appearance; -1 for a stop word.

    A look-up adds a new word.
    """

    def __init__(self, stemmer: str, stopwords: Iterable[str]) -> None:
        super().__init__()
        self.terms: dict[str, int] = {}  # stem -> term number
        self._stem = stem_function(stemmer)
        self._stopwords = dict.fromkeys(stopwords, _STOP)
        self.update(self._stopwords)

    def __missing__(self, word: str) -> int:
        term = self.terms.setdefault(self._stem(word), len(self.terms))
        self[word] = term
        return term

    def limit_forms(self) -> None:
        """Drops the word forms, but not the terms, once there are more than KNOWN_WORDS."""
        if len(self) > KNOWN_WORDS:
            self.clear()
            self.update(self._stopwords)


class QueryVocabulary(dict[str, int]):
    """Word form -> term number in the corpus; -1 for a stop word or a word that the corpus lacks.

    Thread-safe. Up to QUERY_WORDS word forms are cached.
    """

    def __init__(self, stemmer: str, stopwords: Iterable[str], terms: Mapping[str, int]) -> None:
        super().__init__()
        self._stem = stem_function(stemmer)
        self._lock = threading.Lock()
        self._stopwords = frozenset(stopwords)
        self._terms = terms

    def __missing__(self, word: str) -> int:
        with self._lock:  # PyStemmer's objects are not thread-safe
            number = _STOP if word in self._stopwords else self._terms.get(self._stem(word), _STOP)
            if len(self) >= QUERY_WORDS:
                self.clear()
            self[word] = number
        return number


def stem_function(stemmer: str) -> Any:
    """A function from a word to its stem; the identity for the stemmer ""."""
    if not stemmer:
        return str
    import Stemmer

    return Stemmer.Stemmer(stemmer).stemWord


# --- building ---


@dataclass(frozen=True)
class _Run:
    """A spilled block: int32 files of starts [terms + 1], and of rows and counts of its postings.

    The postings stand term after term.
    """

    path: Path
    terms: int

    def write(self, column: str, values: np.ndarray) -> None:
        values.tofile(self.path.with_suffix(column))

    def read(self, column: str, start: int, count: int) -> np.ndarray:
        return np.fromfile(self.path.with_suffix(column), np.int32, count, offset=4 * start)


class Postings:
    """Takes passages one by one, holds one block of them, and writes the arrays of bm25s."""

    def __init__(
        self, folder: Path, vocabulary: Vocabulary, split: Callable[[str], list[str]]
    ) -> None:
        """folder: for the spilled blocks. split: gives the words of a passage."""
        self._folder = folder
        self._vocabulary = vocabulary
        self._split = split
        # The block: the terms of its passages, and where each passage ends.
        self._tokens = array("i")
        self._ends = array("q")
        # All blocks before it.
        self._runs: list[_Run] = []
        self._frequencies = np.zeros(0, np.int64)  # passages per term
        self._lengths: list[np.ndarray] = []  # int32, words per passage

    def add(self, text: str) -> None:
        """Adds the next passage of the corpus."""
        self._tokens.extend(map(self._vocabulary.__getitem__, self._split(text)))
        self._ends.append(len(self._tokens))
        if len(self._tokens) >= BLOCK_TOKENS:
            self._spill()

    def _spill(self) -> None:
        """Inverts the block and writes it to disk."""
        first_row = sum(map(len, self._lengths))
        terms = len(self._vocabulary.terms)
        starts, rows, counts, lengths = _invert(
            np.asarray(self._tokens), np.asarray(self._ends), terms
        )
        rows += np.int32(first_row)
        run = _Run(self._folder / f"run_{len(self._runs):05d}", terms)
        run.write(".starts", starts)
        run.write(".rows", rows)
        run.write(".counts", counts)

        frequencies = np.diff(starts).astype(np.int64)
        frequencies[: len(self._frequencies)] += self._frequencies
        self._frequencies = frequencies
        self._lengths.append(lengths)
        self._runs.append(run)

        self._tokens = array("i")
        self._ends = array("q")
        self._vocabulary.limit_forms()

    def write(self, target: Path, k1: float, b: float) -> Iterator[float]:
        """Writes the arrays into the folder `target`; yields the share that is done."""
        if self._ends:
            self._spill()
        lengths = np.concatenate(self._lengths)
        self._lengths.clear()
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._frequencies)])
        np.save(target / STARTS, starts)

        idf = _idf(self._frequencies, len(lengths))
        max_impact = np.empty(len(idf), np.float32)
        weights = (lengths, lengths.mean(dtype=np.float64), k1, b)
        with open(target / SCORES, "wb") as scores_file, open(target / ROWS, "wb") as rows_file:
            _write_header(scores_file, np.float32, int(starts[-1]))
            _write_header(rows_file, np.int32, int(starts[-1]))
            for low, high in _term_ranges(starts):
                own_starts = starts[low : high + 1] - starts[low]
                rows, scores = self._merge(low, own_starts, idf[low:high], weights)
                max_impact[low:high] = np.maximum.reduceat(scores, own_starts[:-1])
                rows_file.write(rows.data)
                scores_file.write(scores.data)
                yield high / len(idf)
        np.save(target / MAX_IMPACT, max_impact)

    def _merge(
        self, low: int, starts: np.ndarray, idf: np.ndarray, weights: tuple[Any, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int32) and scores (float32) of a range of terms, from all runs, term after term.

        The range begins at term `low`; starts [terms + 1] says where the postings of each term go.
        """
        rows = np.empty(starts[-1], np.int32)
        scores = np.empty(len(rows), np.float32)
        heads = starts[:-1].copy()  # where the next posting of each term goes
        for run in self._runs:
            terms = min(len(heads), run.terms - low)
            if terms > 0:
                run_starts = run.read(".starts", low, terms + 1)
                first = int(run_starts[0])
                number = int(run_starts[-1]) - first
                run_rows = run.read(".rows", first, number)
                run_counts = run.read(".counts", first, number)
                out = (heads, rows, scores)
                _append(run_starts - first, run_rows, run_counts, *out, idf, *weights)
        return rows, scores


def _idf(frequencies: np.ndarray, passages: int) -> np.ndarray:
    """ln(1 + (passages - n + 0.5) / (n + 0.5)) of terms in n passages each, float32 [terms].

    By math.log as in bm25s: NumPy's may round otherwise.
    """
    distinct, inverse = np.unique(frequencies, return_inverse=True)
    values = [math.log(1 + (passages - n + 0.5) / (n + 0.5)) for n in distinct.tolist()]
    return np.array(values, np.float32)[inverse]


def _write_header(file: Any, dtype: Any, number: int) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (number,)}
    np.lib.format.write_array_header_1_0(file, header)


def _term_ranges(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of terms with at most RANGE_POSTINGS postings, or of one term that has more."""
    terms = len(starts) - 1
    low = 0
    while low < terms:
        high = int(np.searchsorted(starts, starts[low] + RANGE_POSTINGS, side="right")) - 1
        high = min(max(high, low + 1), terms)
        yield low, high
        low = high


@_compiled
def _invert(tokens, ends, terms):
    """Term numbers of passages -> for each term its rows, ascending, and its counts in them.

    Returns starts [terms + 1], rows and counts [postings], lengths [passages], all int32.
    """
    # First pass: the number of postings of each term, and the words of each passage.
    starts = np.zeros(terms + 1, np.int32)
    lengths = np.zeros(len(ends), np.int32)
    last_row = np.full(terms, -1, np.int32)  # the last row in which a term was seen
    begin = 0
    for row in range(len(ends)):
        for term in tokens[begin : ends[row]]:
            if term >= 0:
                lengths[row] += 1
                if last_row[term] != row:
                    last_row[term] = row
                    starts[term + 1] += 1
        begin = ends[row]
    for term in range(terms):
        starts[term + 1] += starts[term]

    # Second pass: each posting goes to its place.
    heads = starts[:-1] - 1
    rows = np.empty(starts[-1], np.int32)
    counts = np.zeros(starts[-1], np.int32)
    last_row[:] = -1
    begin = 0
    for row in range(len(ends)):
        for term in tokens[begin : ends[row]]:
            if term >= 0:
                if last_row[term] != row:
                    last_row[term] = row
                    heads[term] += 1
                    rows[heads[term]] = row
                counts[heads[term]] += 1
        begin = ends[row]
    return starts, rows, counts, lengths


@_compiled
def _append(starts, rows, counts, heads, out_rows, out_scores, idf, lengths, average, k1, b):
    """Appends a run's postings of a range of terms, scored, after those of earlier runs.

    The order of operations is bm25s's, so the bits are too.
    """
    for term in range(len(starts) - 1):
        head = heads[term]
        for i in range(starts[term], starts[term + 1]):
            count = np.float64(counts[i])
            length = np.float64(lengths[rows[i]])
            out_rows[head] = rows[i]
            out_scores[head] = np.float64(idf[term]) * (
                count / (k1 * ((1 - b) + b * length / average) + count)
            )
            head += 1
        heads[term] = head


# --- checking ---


@_compiled
def first_wrong_term(impacts, rows, starts, max_impact, passages, begin, end):
    """The first term from begin to end whose postings no search must see, or -1.

    `starts` must be right. The inner loop has no branch, so it runs at the speed of memory.
    """
    for term in range(begin, end):
        previous = np.int64(-1)
        highest = max_impact[term]
        is_right = True
        for at in range(np.uint64(starts[term]), np.uint64(starts[term + 1])):
            row = np.int64(rows[at])
            score = impacts[at]
            is_right &= (row > previous) & (score > 0) & (score <= highest)
            previous = row
        if not is_right or previous >= passages:
            return term
    return -1


# --- searching ---
# Rows are uint32 and positions uint64: an index that may be negative costs a comparison at each
# access. Where one posting in two would take the other branch, both are computed without a branch.
#
# Names in the kernels below:
#   impacts [postings], rows [postings], starts [terms + 1], max_impact [terms]: the index
#   scores [passages]: scratch, the partial score of each passage, 0 for one that is no candidate
#   candidates [2 * passages + 1]: scratch, of which [:num_candidates] may enter the top k
#   best_rows [k], best_scores [k]: the top k so far, of which `size` are filled
#   threshold: the k-th best partial score so far, 0 while there are fewer than k


@_compiled
def search_queries(
    impacts,
    rows,
    starts,
    max_impact,
    terms,
    ends,
    scores,
    candidates,
    best_rows,
    best_scores,
    found,
):
    """search_query for several queries: terms[ends[i - 1] : ends[i]] fill row i of the results.

    best_rows and best_scores are [queries, k]; found [queries] is how many each query finds.
    """
    begin = 0
    for i in range(len(ends)):
        query = terms[begin : ends[i]]
        found[i] = search_query(
            impacts,
            rows,
            starts,
            max_impact,
            query,
            scores,
            candidates,
            best_rows[i],
            best_scores[i],
        )
        begin = ends[i]


@_compiled
def search_query(
    impacts, rows, starts, max_impact, terms, scores, candidates, best_rows, best_scores
):
    """Fills best_rows and best_scores with a query's top k, k = len(best_rows); how many it finds.

    `terms` are the query's, with repeats. `scores` are zero before and after. Scores only grow, so
    the k-th best partial score is a lower bound of the final one: what cannot reach it is pruned.
    """
    number = len(terms)
    by_impact = terms[np.argsort(-max_impact[terms])]
    upper_bound = _upper_bounds(max_impact, by_impact)
    slack = 1 - 2.4e-7 * (number + 1)  # for sums of float32, which depend on their order
    # While an unseen passage could still enter the top k: add words to all passages.
    threshold = np.float32(0)
    num_candidates = 0
    size = 0
    i = 0  # terms that are added
    while i < number and (size < len(best_rows) or upper_bound[i] >= threshold * slack):
        term = by_impact[i]
        num_candidates, size, threshold = _accumulate(
            impacts,
            rows,
            starts[term],
            starts[term + 1],
            scores,
            candidates,
            num_candidates,
            size,
            threshold,
            best_rows,
            best_scores,
        )
        i += 1
    # Then add the remaining words to the candidates only.
    while i < number:
        term = by_impact[i]
        minimum = threshold * slack - upper_bound[i]
        num_candidates = _prune(candidates, num_candidates, scores, minimum)
        threshold = _complete(
            impacts,
            rows,
            starts[term],
            starts[term + 1],
            candidates,
            num_candidates,
            scores,
            threshold,
            best_rows,
            best_scores,
        )
        i += 1

    # Rank the last candidates by their exact scores. (Two numbers have one sum in either order.)
    if number > 2:
        num_candidates = _prune(candidates, num_candidates, scores, threshold * slack)
        remaining = candidates[:num_candidates]
        size = _rank(impacts, rows, starts, terms, remaining, best_rows, best_scores)
    for j in range(num_candidates):
        scores[candidates[j]] = 0
    return size


@_compiled
def _upper_bounds(max_impact, terms):
    """What the terms from the i-th on can add to a passage at most, float64 [terms + 1]."""
    bounds = np.zeros(len(terms) + 1)
    for i in range(len(terms) - 1, -1, -1):
        bounds[i] = bounds[i + 1] + max_impact[terms[i]]
    return bounds


@_compiled
def _accumulate(
    impacts,
    rows,
    low,
    high,
    scores,
    candidates,
    num_candidates,
    size,
    threshold,
    best_rows,
    best_scores,
):
    """Adds a word, of postings low to high, to all passages that have it.

    Returns the new num_candidates, size and threshold.
    """
    last = len(best_rows) - 1
    for at in range(np.uint64(low), np.uint64(high)):
        row = rows[at]
        score = scores[row]
        candidates[num_candidates] = row  # stays if it is new
        num_candidates += score == 0
        score += impacts[at]
        scores[row] = score
        if score >= threshold:
            size = _insert_sorted(row, score, size, best_rows, best_scores)
            if size > last:
                threshold = best_scores[last]
    return num_candidates, size, threshold


@_compiled
def _prune(candidates, num_candidates, scores, minimum):
    """Drops candidates that score less than `minimum`, as if unseen; the new num_candidates."""
    remaining = 0
    for j in range(num_candidates):
        row = candidates[j]
        score = scores[row]
        stays = score >= minimum
        candidates[remaining] = row
        scores[row] = score if stays else np.float32(0)
        remaining += stays
    return remaining


@_compiled
def _complete(
    impacts,
    rows,
    low,
    high,
    candidates,
    num_candidates,
    scores,
    threshold,
    best_rows,
    best_scores,
):
    """Adds a word, of postings low to high, to the candidates; the new threshold.

    Looks each candidate up when they are few, else walks the postings.
    """
    # candidates[num_candidates:end]: the word's postings in candidates, counted from low
    end = num_candidates
    if num_candidates * 4 * math.log2(high - low + 2.0) < high - low:
        for j in range(num_candidates):
            at = _find_posting(rows, low, high, candidates[j])
            candidates[end] = at - low
            end += at >= 0
    else:
        for at in range(np.uint64(low), np.uint64(high)):
            candidates[end] = at - np.uint64(low)
            end += scores[rows[at]] > 0

    size = len(best_rows)
    for j in range(num_candidates, end):
        at = np.uint64(low) + candidates[j]
        row = rows[at]
        score = scores[row] + impacts[at]
        scores[row] = score
        if score >= threshold:
            _insert_sorted(row, score, size, best_rows, best_scores)
            threshold = best_scores[size - 1]
    return threshold


@_compiled
def _rank(impacts, rows, starts, terms, candidates, best_rows, best_scores):
    """Fills the top k with the candidates' exact scores; its size."""
    size = 0
    for row in candidates:
        score = _exact_score(impacts, rows, starts, terms, row)
        size = _insert_sorted(row, score, size, best_rows, best_scores)
    return size


@_compiled
def _exact_score(impacts, rows, starts, terms, row):
    """The score of a passage, summed in the order of the query's terms, as bm25s does."""
    score = np.float32(0)
    for term in terms:
        at = _find_posting(rows, starts[term], starts[term + 1], row)
        if at >= 0:
            score += impacts[at]
    return score


@_compiled
def _find_posting(rows, low, high, row):
    """Where `row` stands in rows[low:high], which is not empty, or -1."""
    at = np.uint64(low)
    left = np.uint64(high - low)
    while left > np.uint64(1):
        half = left >> np.uint64(1)
        at = at + half if rows[at + half] <= row else at
        left -= half
    return np.int64(at) if rows[at] == row else -1


@_compiled
def _insert_sorted(row, score, size, best_rows, best_scores):
    """Inserts a row with its new score into the top k, or moves it up; the new size.

    The higher score comes first, at equal scores the lower row. A sorted array and no heap: k is
    small, and a row may already be in it.
    """
    last = len(best_rows) - 1
    if size > last and (
        score < best_scores[last] or (score == best_scores[last] and row > best_rows[last])
    ):
        return size

    # Its place in the top k; else a free place, or the last one.
    at = 0
    while at < size and best_rows[at] != row:
        at += 1
    if at == size:
        size = min(size + 1, len(best_rows))
        at = size - 1

    # Rows that rank lower move down.
    while at > 0 and (
        score > best_scores[at - 1] or (score == best_scores[at - 1] and row < best_rows[at - 1])
    ):
        best_rows[at] = best_rows[at - 1]
        best_scores[at] = best_scores[at - 1]
        at -= 1
    best_rows[at] = row
    best_scores[at] = score
    return size
