"""Search: a BM25 index of a corpus, built once, mapped from disk, asked in batches; or somebody's
retrieval server.

    python -m ssp_jax.retriever build --corpus=wiki-18.jsonl.gz --out=wiki-18.index
    python -m ssp_jax.retriever search --index=wiki-18.index "capital of France"

An index is a folder: the arrays and vocabulary of bm25s (which loads it too), `passages.jsonl` with
the corpus in row order, and what index.py adds to find and check them. Passages and postings stay
on disk and are read through memory maps: only the vocabulary, and 12 bytes a passage for each
thread that searches, are in host memory.

bm25s is imported inside functions only, when an index is built: `import bm25s` runs a JAX op, after
which jax.distributed.initialize() raises. Open a retriever after the distributed start.
"""

import itertools
import os
import queue
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from ssp_jax.data import Document, parse_document, parse_row
from ssp_jax.errors import InputError
from ssp_jax.retriever import bm25, index
from ssp_jax.retriever.build import (
    PARTS,
    SMALL_PART,
    Progress,
    digest_in_meta,
    ensure_index,
    recover,
)
from ssp_jax.retriever.index import Index

# of the queries asked last: of an index 100,000, of a server 20,000 with their passages
CACHE_BYTES = 1 << 26
_ENTRY_BYTES = 250  # of a query in the cache, beside its text and its result
_HIT_BYTES = 150  # of a row number and a score in Python
# More than 1,024 words, the most clauses of Lucene; encoders behind servers read 512 tokens at
# most.
QUERY_CHARACTERS = 8192

T = TypeVar("T")
Hits = tuple[tuple[int, float], ...]  # row and score, best first


class Search(Protocol):
    """What a run needs. The rows are those of the corpus, or the passages that a server gave at the
    start.
    """

    source: str  # what is searched; another text means that the same query may find other passages

    def __len__(self) -> int: ...
    def document(self, row: int) -> Document: ...
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]: ...


def shortened(query: str) -> str:
    """A query as it is searched: what a model writes may be long, and would cost its length in
    postings.

    Half of a character that was written as two is no Unicode, and no server takes it.
    """
    return query[:QUERY_CHARACTERS].encode("utf-8", "replace").decode()


class Cache(Generic[T]):
    """The results of the queries asked last, up to `size` bytes. Threads may ask at the same time.

    measure: bytes of a result.
    """

    def __init__(self, size: int, measure: Callable[[T], int]) -> None:
        self._size, self._measure, self._lock = size, measure, threading.Lock()
        self._kept: OrderedDict[tuple[str, int], T] = OrderedDict()
        self._bytes = 0

    def get(
        self, queries: Sequence[str], top_k: int, find: Callable[[list[str], int], Iterable[T]]
    ) -> list[T]:
        """What `find` gives for these queries; it is asked, once for each, for those that are not
        here.
        """
        keys = [(query, top_k) for query in queries]
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            known |= zip(missing, find([query for query, _ in missing], top_k), strict=True)
        with self._lock:
            for key in known:
                if key not in self._kept:
                    self._bytes += self._cost(key, known[key])
                    self._kept[key] = known[key]
            for key in keys:
                self._kept.move_to_end(key)
            while self._bytes > self._size:
                self._bytes -= self._cost(*self._kept.popitem(last=False))
        return [known[key] for key in keys]

    def _cost(self, key: tuple[str, int], result: T) -> int:
        return _ENTRY_BYTES + sys.getsizeof(key[0]) + self._measure(result)


# --- searching --------------------------------------------------------------------------------------------------------


class Retriever:
    """A loaded index. Threads may ask at the same time; a batch is searched by `threads` threads, 0
    for all cores.
    """

    def __init__(self, folder: Path, found: Index, threads: int = 0) -> None:
        self._path = str(folder / index.PASSAGES)
        meta = found.meta
        self.source = digest_in_meta(meta)
        self._arrays = found.data, found.rows, found.starts, found.highest
        self._offsets, self._line_sums, self._passages = (
            found.offsets,
            found.line_sums,
            found.passages,
        )
        self._words = bm25.QueryWords(
            meta["settings"]["stemmer"], meta["stopwords"], found.vocabulary
        )
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="search")
        self._scratch: queue.SimpleQueue[tuple[np.ndarray, np.ndarray]] = queue.SimpleQueue()
        self._cache: Cache[Hits] = Cache(CACHE_BYTES, lambda hits: _HIT_BYTES * len(hits))
        self._search([""], 1)  # compiles, or reads what was compiled before

    @classmethod
    def load(cls, index_dir: str | Path, threads: int = 0) -> "Retriever":
        """Opens an index; refuses one of another format, and one whose files are not what was
        written.
        """
        folder = Path(index_dir)
        recover(folder)
        try:
            return cls(folder, index.open_index(folder, Progress()), threads)
        # of the index, or of the folder where Numba keeps what it has compiled
        except OSError as error:
            raise InputError(f"{folder}: expected an index that can be read ({error})") from None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def document(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index with {len(self)} passages")
        line = self._passages[self._offsets[row] : self._offsets[row + 1]].tobytes()
        if zlib.crc32(line) != self._line_sums[row]:
            raise InputError(
                f"{self._path} line {row + 1}: expected the bytes that were written; {index.ANEW}"
            )
        return parse_document(parse_row(self._path, row + 1, line))

    def _query_terms(self, query: str) -> list[int]:
        """The numbers of the query's words that the corpus has, in their order, repeats included."""
        return [number for number in map(self._words.__getitem__, bm25.split(query)) if number >= 0]

    def _best(
        self, terms: np.ndarray, ends: np.ndarray, best: tuple[np.ndarray, ...], a: int, b: int
    ) -> None:
        """Fills `best` for the queries from a to b, of which query i has terms[ends[i] : ends[i +
        1]].
        """
        try:
            scratch = self._scratch.get_nowait()
        except queue.Empty:
            scratch = np.zeros(len(self), np.float32), np.empty(2 * len(self) + 1, np.uint32)
        own = terms[ends[a] : ends[b]], ends[a + 1 : b + 1] - ends[a]
        bm25.best_rows_of_all(*self._arrays, *own, *scratch, *(array[a:b] for array in best))
        self._scratch.put(scratch)

    def hits(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """For each query the best top_k rows with their scores; only rows that share a word with
        it.

        Higher score first, at equal score the lower row, also where top_k cuts a tie.
        """
        return self._cache.get([shortened(query) for query in queries], top_k, self._search)

    def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        of_queries, number = [self._query_terms(query) for query in queries], len(queries)
        terms = np.array([term for own in of_queries for term in own], np.int64)
        ends = np.cumsum([0] + [len(own) for own in of_queries])
        shape = number, min(top_k, len(self))
        best = np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty(number, np.int64)
        parts = list(itertools.pairwise(self._cuts(terms, ends)))
        left = iter(parts)  # each thread takes the next one

        def work() -> None:
            for a, b in left:
                self._best(terms, ends, best, a, b)

        others = [self._pool.submit(work) for _ in range(min(len(parts), self._threads) - 1)]
        work()
        for other in others:
            if not other.cancel():  # one that has not begun until now has nothing left to do
                other.result()
        shown = zip(*(array.tolist() for array in best), strict=True)
        return [
            tuple(zip(rows[:found], scores[:found], strict=True)) for rows, scores, found in shown
        ]

    def _cuts(self, terms: np.ndarray, ends: np.ndarray) -> list[int]:
        """Where the queries are cut into parts of about as many postings, a few for each thread if
        they are many.
        """
        starts = self._arrays[2]
        postings = np.concatenate([[0], np.cumsum(starts[terms + 1] - starts[terms])])[ends]
        most = PARTS * self._threads if self._threads > 1 else 1
        parts = min(max(1, int(postings[-1]) // SMALL_PART), most)
        inner = np.searchsorted(postings, postings[-1] * np.arange(1, parts) / parts)
        return [0, *sorted(set(inner.tolist()) - {0, len(ends) - 1}), len(ends) - 1]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """For each query at most top_k passages that share a word with it, best first; fewer or
        none if fewer match.
        """
        return [[self.document(row) for row, _ in hits] for hits in self.hits(queries, top_k)]


def open_retriever(
    corpus: str | Path,
    index_dir: str | Path,
    *,
    stemmer: str,
    stopwords: str,
    k1: float,
    b: float,
    threads: int = 0,
) -> Retriever:
    """The index of this corpus with these settings, built first where it does not exist."""
    ensure_index(corpus, index_dir, stemmer=stemmer, stopwords=stopwords, k1=k1, b=b)
    return Retriever.load(index_dir, threads)
