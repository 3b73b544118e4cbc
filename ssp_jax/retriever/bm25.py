"""BM25 in bounded memory: words to postings on disk, and the kernel that finds the best rows of a
query.

The result is what bm25s itself computes and stores (its "lucene" scores, float32, one column of
passages per term), so that `bm25s.BM25.load` reads it. bm25s holds all words of a corpus while it
indexes; here each block of passages is inverted and spilled, and the blocks are merged term range
by term range (Heinz & Zobel 2003, SPIMI): memory is the vocabulary plus one block.

The search skips what cannot matter (Turtle & Flood 1995, MaxScore, term at a time): rarest words
first, and once the words that are left could not lift an unseen passage into the top k, only
passages already seen are completed.
"""

import math
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

# names that bm25s looks for
DATA, ROWS, STARTS = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
HIGHEST = "highest.npy"  # ours: float32 [terms], the most that a term adds to any passage
BLOCK_TOKENS = 1 << 25  # words of a block: 128 MB, and as much again for each of its two columns
RANGE_POSTINGS = 1 << 24  # postings merged at a time: 128 MB
KNOWN_WORDS = 1 << 22  # word forms whose stem is remembered while building, some 400 MB
QUERY_WORDS = 1 << 20  # and while searching, some 100 MB

# two letters or more: finds what the token pattern of bm25s finds, \b\w\w+\b
_WORD = re.compile(r"\w\w+")
_STOP = -1


def _compiled(function: Callable[..., Any]) -> Any:
    """Numba's njit without the GIL. What it has compiled is kept on disk where it finds a place for
    that.

    It looks at NUMBA_CACHE_DIR, this folder and the user's own; a read-only installation of a user
    without a home has none of them, and compiles whenever it starts.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)


class Words(dict[str, int]):
    """Word form -> term number, in the order of first appearance; stop words -> -1. What is looked
    up is learnt.
    """

    def __init__(self, stemmer: str, stopwords: Iterable[str]) -> None:
        super().__init__()
        self.terms: dict[str, int] = {}
        self._stem = stem_function(stemmer)
        self._stopwords = dict.fromkeys(stopwords, _STOP)
        self.update(self._stopwords)

    def __missing__(self, word: str) -> int:
        term = self[word] = self.terms.setdefault(self._stem(word), len(self.terms))
        return term

    def forget(self) -> None:
        """Keeps the terms and drops the forms, once these are many."""
        if len(self) > KNOWN_WORDS:
            self.clear()
            self.update(self._stopwords)


class QueryWords(dict[str, int]):
    """Word form -> number of its term in the corpus; -1 for a stop word, and for one that the
    corpus lacks.

    Threads may look up at the same time. The forms are remembered, up to QUERY_WORDS of them.
    """

    def __init__(self, stemmer: str, stopwords: Iterable[str], terms: Mapping[str, int]) -> None:
        super().__init__()
        self._stem, self._lock = stem_function(stemmer), threading.Lock()
        self._stopwords, self._terms = frozenset(stopwords), terms

    def __missing__(self, word: str) -> int:
        with self._lock:  # PyStemmer's objects are not thread-safe
            number = _STOP if word in self._stopwords else self._terms.get(self._stem(word), _STOP)
            if len(self) >= QUERY_WORDS:
                self.clear()
            self[word] = number
        return number


def stem_function(stemmer: str) -> Any:
    if not stemmer:
        return str
    import Stemmer

    return Stemmer.Stemmer(stemmer).stemWord


def split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A spilled block: int32 files; starts [terms + 1], and rows and counts of its postings, term
    after term.
    """

    path: Path
    terms: int

    def read(self, part: str, start: int, count: int) -> np.ndarray:
        return np.fromfile(self.path.with_suffix(part), np.int32, count, offset=4 * start)


class Postings:
    """Takes passages one by one, holds one block of them, and at the end writes the arrays of
    bm25s.
    """

    def __init__(self, folder: Path, words: Words) -> None:
        self._folder, self._words = folder, words
        self._tokens, self._ends = array("i"), array("q")
        self._runs: list[_Run] = []
        self._frequencies = np.zeros(0, np.int64)  # passages per term
        self._lengths: list[np.ndarray] = []  # int32, words per passage

    def add(self, text: str) -> None:
        self._tokens.extend(map(self._words.__getitem__, split(text)))
        self._ends.append(len(self._tokens))
        if len(self._tokens) >= BLOCK_TOKENS:
            self._spill()

    def _spill(self) -> None:
        first_row = sum(map(len, self._lengths))
        run = _Run(self._folder / f"run_{len(self._runs):05d}", len(self._words.terms))
        starts, rows, counts, lengths = _invert(
            np.asarray(self._tokens), np.asarray(self._ends), run.terms
        )
        rows += np.int32(first_row)
        for part, values in ((".starts", starts), (".rows", rows), (".counts", counts)):
            values.tofile(run.path.with_suffix(part))
        frequencies = np.diff(starts).astype(np.int64)
        frequencies[: len(self._frequencies)] += self._frequencies
        self._runs.append(run)
        self._lengths.append(lengths)
        self._frequencies = frequencies
        self._tokens, self._ends = array("i"), array("q")
        self._words.forget()

    def write(self, target: Path, k1: float, b: float) -> Iterator[float]:
        """Writes the arrays; yields the share that is done."""
        if self._ends:
            self._spill()
        lengths = np.concatenate(self._lengths)
        self._lengths.clear()
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._frequencies)])
        np.save(target / STARTS, starts)
        idf = _idf(self._frequencies, len(lengths))
        highest, average = np.empty(len(idf), np.float32), lengths.mean(dtype=np.float64)
        with open(target / DATA, "wb") as data_file, open(target / ROWS, "wb") as rows_file:
            _write_header(data_file, np.float32, int(starts[-1]))
            _write_header(rows_file, np.int32, int(starts[-1]))
            for low, high in _ranges(starts):
                rows = np.empty(starts[high] - starts[low], np.int32)
                scores, heads = np.empty(len(rows), np.float32), starts[low:high] - starts[low]
                for run in self._runs:
                    count = min(high, run.terms) - low
                    if count > 0:
                        self._merge(
                            run,
                            low,
                            count,
                            (heads, rows, scores),
                            (idf[low:high], lengths, average, k1, b),
                        )
                highest[low:high] = np.maximum.reduceat(scores, starts[low:high] - starts[low])
                rows_file.write(rows.data)
                data_file.write(scores.data)
                yield high / len(idf)
        np.save(target / HIGHEST, highest)

    @staticmethod
    def _merge(
        run: _Run, low: int, count: int, out: tuple[Any, ...], weights: tuple[Any, ...]
    ) -> None:
        """Appends the postings of `count` terms from `low` to what earlier runs have put under
        their heads.
        """
        starts = run.read(".starts", low, count + 1)
        first, number = int(starts[0]), int(starts[-1] - starts[0])
        _append(
            starts - first,
            run.read(".rows", first, number),
            run.read(".counts", first, number),
            *out,
            *weights,
        )


def _idf(frequencies: np.ndarray, passages: int) -> np.ndarray:
    """float32 [terms]: ln(1 + (N - n + 0.5) / (n + 0.5)), by math.log as in bm25s (NumPy's may
    round otherwise).
    """
    values, inverse = np.unique(frequencies, return_inverse=True)
    return np.array(
        [math.log(1 + (passages - n + 0.5) / (n + 0.5)) for n in values.tolist()], np.float32
    )[inverse]


def _write_header(file: Any, dtype: Any, number: int) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (number,)}
    np.lib.format.write_array_header_1_0(file, header)


def _ranges(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Term ranges of at most RANGE_POSTINGS postings, or of one term that has more."""
    low, terms = 0, len(starts) - 1
    while low < terms:
        high = int(np.searchsorted(starts, starts[low] + RANGE_POSTINGS, side="right")) - 1
        high = min(max(high, low + 1), terms)
        yield low, high
        low = high


@_compiled
def _invert(tokens, ends, terms):
    """Words of passages -> for each term the passages that have it, ascending, and how often."""
    starts, last = np.zeros(terms + 1, np.int32), np.full(terms, -1, np.int32)
    lengths = np.zeros(len(ends), np.int32)
    begin = 0
    for row in range(len(ends)):
        for term in tokens[begin : ends[row]]:
            if term >= 0:
                lengths[row] += 1
                if last[term] != row:
                    last[term] = row
                    starts[term + 1] += 1
        begin = ends[row]
    for term in range(terms):
        starts[term + 1] += starts[term]
    heads = starts[:-1] - 1
    rows, counts = np.empty(starts[-1], np.int32), np.zeros(starts[-1], np.int32)
    last[:] = -1
    begin = 0
    for row in range(len(ends)):
        for term in tokens[begin : ends[row]]:
            if term >= 0:
                if last[term] != row:
                    last[term] = row
                    heads[term] += 1
                    rows[heads[term]] = row
                counts[heads[term]] += 1
        begin = ends[row]
    return starts, rows, counts, lengths


@_compiled
def _append(starts, rows, counts, heads, out_rows, out_scores, idf, lengths, average, k1, b):
    """Postings of one run for a range of terms, scored; the order of operations is bm25s's, so the
    bits are too.
    """
    for term in range(len(starts) - 1):
        head = heads[term]
        for i in range(starts[term], starts[term + 1]):
            count, length = np.float64(counts[i]), np.float64(lengths[rows[i]])
            out_rows[head] = rows[i]
            out_scores[head] = np.float64(idf[term]) * (
                count / (k1 * ((1 - b) + b * length / average) + count)
            )
            head += 1
        heads[term] = head


# --- checking ---------------------------------------------------------------------------------------------------------


@_compiled
def first_wrong_term(data, rows, starts, highest, passages, begin, end):
    """The first term from begin to end whose postings no search must see, or -1.

    `starts` must be right. The inner loop has no branch, so that it goes as fast as memory does.
    """
    for term in range(begin, end):
        before, most, good = np.int64(-1), highest[term], True
        for at in range(np.uint64(starts[term]), np.uint64(starts[term + 1])):
            row, score = np.int64(rows[at]), data[at]
            good &= (row > before) & (score > 0) & (score <= most)
            before = row
        if not good or before >= passages:
            return term
    return -1


# --- searching --------------------------------------------------------------------------------------------------------
# Rows come as uint32, for an index that may be negative costs a comparison at each access; and
# where one posting in two would take another way, both ways are gone at once.


@_compiled
def _offer(row, score, size, best_rows, best_scores):
    """Puts a row with its new score into the list of the best, higher score first, then lower row;
    the new size.
    """
    last = len(best_rows) - 1
    if size > last and (
        score < best_scores[last] or (score == best_scores[last] and row > best_rows[last])
    ):
        return size
    at = 0
    while at < size and best_rows[at] != row:
        at += 1
    if at == size:  # not in the list: it takes a free place or the last one
        size = min(size + 1, len(best_rows))
        at = size - 1
    while at > 0 and (
        score > best_scores[at - 1] or (score == best_scores[at - 1] and row < best_rows[at - 1])
    ):
        best_rows[at], best_scores[at] = best_rows[at - 1], best_scores[at - 1]
        at -= 1
    best_rows[at], best_scores[at] = row, score
    return size


@_compiled
def _posting(rows, low, high, row):
    """Where `row` stands in rows[low:high], which has at least one, or -1."""
    at, left = np.uint64(low), np.uint64(high - low)
    while left > np.uint64(1):
        half = left >> np.uint64(1)
        at = at + half if rows[at + half] <= row else at
        left -= half
    return np.int64(at) if rows[at] == row else -1


@_compiled
def best_rows_of_all(
    data, rows, starts, highest, terms, ends, scores, seen, best_rows, best_scores, found
):
    """best_rows_of for many queries in one call: terms[ends[i - 1] : ends[i]] fill best_rows[i] and
    best_scores[i].
    """
    begin = 0
    for i in range(len(ends)):
        query = terms[begin : ends[i]]
        found[i] = best_rows_of(
            data, rows, starts, highest, query, scores, seen, best_rows[i], best_scores[i]
        )
        begin = ends[i]


@_compiled
def best_rows_of(data, rows, starts, highest, terms, scores, seen, best_rows, best_scores):
    """Fills best_rows and best_scores with the top len(best_rows) of a query; how many there are.

    `terms` are the query's, repeats included. `scores` (float32 [passages], all zero, and again so
    at the end) and `seen` (uint32 [2 * passages + 1]) are scratch. Scores only grow, so the best of
    the partial sums is a lower bound of the final k-th score; what cannot reach it is left out.
    `slack` covers that float32 sums depend on their order; at the end the few that are left are
    summed in the order of the query, as bm25s does.
    """
    number, size = len(terms), 0
    order = np.argsort(-highest[terms])
    slack = 1 - 2.4e-7 * (number + 1)
    rest = np.zeros(number + 1)  # the most that the words from here on can add
    for i in range(number - 1, -1, -1):
        rest[i] = rest[i + 1] + highest[terms[order[i]]]
    # the bar: the k-th best partial score; alive: passages that may pass it
    bar, alive, i = np.float32(0), 0, 0
    # an unseen passage could still get in
    while i < number and (size < len(best_rows) or rest[i] >= bar * slack):
        low, high = starts[terms[order[i]]], starts[terms[order[i]] + 1]
        alive, size, bar = _add(
            data, rows, low, high, scores, seen, alive, size, bar, best_rows, best_scores
        )
        i += 1
    while i < number:
        alive = _drop(seen, alive, scores, bar * slack - rest[i])
        low, high = starts[terms[order[i]]], starts[terms[order[i]] + 1]
        bar = _complete(data, rows, low, high, seen, alive, scores, bar, best_rows, best_scores)
        i += 1
    if number > 2:  # of two numbers the sum is the same in any order
        alive = _drop(seen, alive, scores, bar * slack)
        size = 0
        for j in range(alive):
            size = _offer(
                seen[j], _sum(data, rows, starts, terms, seen[j]), size, best_rows, best_scores
            )
    for j in range(alive):
        scores[seen[j]] = 0
    return size


@_compiled
def _add(data, rows, low, high, scores, seen, num_seen, size, bar, best_rows, best_scores):
    """Adds a word to all passages that have it; the new number of passages seen, size of the list,
    and bar.
    """
    last = len(best_rows) - 1
    for at in range(np.uint64(low), np.uint64(high)):
        row = rows[at]
        score = scores[row]
        seen[num_seen] = row  # stays if it is new
        num_seen += score == 0
        score += data[at]
        scores[row] = score
        if score >= bar:
            size = _offer(row, score, size, best_rows, best_scores)
            if size > last:
                bar = best_scores[last]
    return num_seen, size, bar


@_compiled
def _drop(seen, alive, scores, least):
    """Forgets rows that score less than `least`, as if they had not been seen; how many are left."""
    kept = 0
    for j in range(alive):
        row = seen[j]
        score = scores[row]
        stays = score >= least
        seen[kept] = row
        scores[row] = score if stays else np.float32(0)
        kept += stays
    return kept


@_compiled
def _complete(data, rows, low, high, seen, alive, scores, bar, best_rows, best_scores):
    """Adds a word to passages already seen: looks each up when they are few, else walks its
    postings. The new bar.
    """
    found = alive  # seen[alive:found]: its postings in passages that are alive, counted from low
    if alive * 4 * math.log2(high - low + 2.0) < high - low:
        for j in range(alive):
            at = _posting(rows, low, high, seen[j])
            seen[found] = at - low
            found += at >= 0
    else:
        for at in range(np.uint64(low), np.uint64(high)):
            seen[found] = at - np.uint64(low)
            found += scores[rows[at]] > 0
    size = len(best_rows)
    for j in range(alive, found):
        at = np.uint64(low) + seen[j]
        row = rows[at]
        score = scores[row] + data[at]
        scores[row] = score
        if score >= bar:
            _offer(row, score, size, best_rows, best_scores)
            bar = best_scores[size - 1]
    return bar


@_compiled
def _sum(data, rows, starts, terms, row):
    score = np.float32(0)
    for term in terms:
        at = _posting(rows, starts[term], starts[term + 1], row)
        if at >= 0:
            score += data[at]
    return score
