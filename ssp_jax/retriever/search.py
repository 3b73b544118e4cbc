"""Search in a BM25 index: mapped from disk, queried in batches by several threads.

An index is a folder: the arrays and vocabulary of bm25s (which loads it too), `passages.jsonl` with
the corpus in its order, and what index.py adds to find and check them. A passage is known by its
row in the corpus, from 0. Passages and postings stay on disk and are read through memory maps: only
the vocabulary, and 12 bytes a passage for each thread that searches, are in host memory.

bm25s is imported inside functions only, when an index is built: `import bm25s` runs a JAX op, after
which jax.distributed.initialize() raises. Open a retriever after the distributed start.
"""

import abc
import itertools
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from ssp_jax.corpus import words
from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.retriever import bm25, index
from ssp_jax.retriever.build import ensure_index, recover
from ssp_jax.retriever.index import Index, Passages
from ssp_jax.retriever.progress import Progress

# Some 100,000 queries of an index; 20,000 of a server, whose passages are cached as well.
CACHE_BYTES = 1 << 26
_ENTRY_BYTES = 250  # overhead of a cached query, beside its text and its result
_HIT_BYTES = 150  # of a row number and a score in Python
# More than 1,024 words, Lucene's limit of clauses. Encoders behind servers read at most 512 tokens.
QUERY_CHARACTERS = 8192
# A batch is cut into slices for the threads. A thread walks the postings of the smallest slice in
# a tenth of a millisecond: less is not worth a thread.
MIN_SLICE_POSTINGS = 1 << 14
# Two, so that a thread that starts late or is disturbed leaves its second slice to the others.
SLICES_PER_THREAD = 2

_OLDER_WORDS = (
    "an earlier version has built this index, and took whole clauses of Chinese, Japanese, Thai "
    "and the like for words, so that searches find little in it"
)

T = TypeVar("T")
Hits = tuple[tuple[int, float], ...]  # corpus row and score, best first


class Searcher(Protocol):
    """The search that a run needs: a LocalRetriever or a RemoteRetriever.

    Its corpus rows are those of the corpus, or the passages that a server found at the start.
    """

    source: str  # what is searched; if it differs, the same query may find other passages
    program_bytes: int  # on a device, that a search takes beside what stays there

    def __len__(self) -> int: ...
    def document(self, corpus_row: int) -> Document: ...
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]: ...


def shortened(query: str) -> str:
    """The query as it is searched: at most QUERY_CHARACTERS of it, in valid Unicode.

    A model may write a query of any length, which would cost as many postings. A lone surrogate
    is not Unicode, and no server takes it.
    """
    return query[:QUERY_CHARACTERS].encode("utf-8", "replace").decode()


class QueryCache(Generic[T]):
    """A thread-safe cache of the results of the latest queries, limited in bytes (LRU)."""

    def __init__(self, max_bytes: int, measure: Callable[[T], int]) -> None:
        """measure: bytes of a result."""
        self._max_bytes = max_bytes
        self._measure = measure
        self._lock = threading.Lock()
        self._results: OrderedDict[tuple[str, int], T] = OrderedDict()
        self._bytes = 0

    def get(
        self, queries: Sequence[str], top_k: int, find: Callable[[list[str], int], Iterable[T]]
    ) -> list[T]:
        """The results of the queries. `find` is called for those that are not cached, once each."""
        keys = [(query, top_k) for query in queries]
        with self._lock:
            results = {key: self._results[key] for key in keys if key in self._results}

        # Outside the lock: other threads go on while this one searches.
        missing = [key for key in dict.fromkeys(keys) if key not in results]
        if missing:
            found = find([query for query, _ in missing], top_k)
            results |= zip(missing, found, strict=True)

        with self._lock:
            for key, result in results.items():
                if key not in self._results:
                    self._bytes += self._cost(key, result)
                    self._results[key] = result
            for key in keys:
                self._results.move_to_end(key)
            while self._bytes > self._max_bytes:
                oldest = self._results.popitem(last=False)
                self._bytes -= self._cost(*oldest)
        return [results[key] for key in keys]

    def _cost(self, key: tuple[str, int], result: T) -> int:
        return _ENTRY_BYTES + sys.getsizeof(key[0]) + self._measure(result)


@dataclass(frozen=True)
class _Batch:
    """The queries of one call as arrays, and room for their results.

    Query i has the terms[ends[i] : ends[i + 1]] and finds the rows[i, : found[i]].
    """

    terms: np.ndarray  # int64, of all queries
    ends: np.ndarray  # int64 [queries + 1]
    rows: np.ndarray  # int32 [queries, top_k], corpus rows, best first
    scores: np.ndarray  # float32 [queries, top_k]
    found: np.ndarray  # int64 [queries]


class LocalRetriever(abc.ABC):
    """An index in this process. Several threads may search at the same time."""

    program_bytes = 0  # on a device, that a search takes beside what stays there

    def __init__(self, passages: Passages, source: str) -> None:
        self.passages = passages
        self.source = source
        self._cache: QueryCache[Hits] = QueryCache(CACHE_BYTES, lambda hits: _HIT_BYTES * len(hits))

    def __len__(self) -> int:
        return len(self.passages)

    def document(self, corpus_row: int) -> Document:
        """The passage of a row, from 0. Raises InputError if its bytes were changed on disk."""
        return self.passages.document(corpus_row)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """For each query at most top_k passages, best first."""
        results = []
        for hits in self.hits(queries, top_k):
            results.append([self.document(corpus_row) for corpus_row, _ in hits])
        return results

    def hits(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """For each query the best top_k corpus rows and their scores.

        The higher score comes first, at equal scores the lower row, also where top_k cuts a tie.
        """
        return self._cache.get([shortened(query) for query in queries], top_k, self._search)

    @abc.abstractmethod
    def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """The hits of each of these queries."""


class Retriever(LocalRetriever):
    """A loaded BM25 index. It finds passages that share a word with the query."""

    def __init__(self, index_files: Index, threads: int = 0) -> None:
        """threads: how many search one batch together, 0 for all cores."""
        super().__init__(index_files.passages, index.digest_in_meta(index_files.meta))
        self._index = index_files
        # As the kernels take them.
        self._postings = (
            index_files.scores,
            index_files.rows,
            index_files.starts,
            index_files.max_impact,
        )
        settings = index_files.meta["settings"]
        self._vocabulary = bm25.QueryVocabulary(
            settings["stemmer"], index_files.meta["stopwords"], index_files.vocabulary
        )
        self._split = words.splitter(index.words_of(index_files.meta))
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="search")
        self._scratch: queue.SimpleQueue[tuple[np.ndarray, np.ndarray]] = queue.SimpleQueue()
        self._search([""], 1)  # compiles the kernels, or loads them from Numba's cache

    @classmethod
    def load(cls, index_dir: str | Path, threads: int = 0) -> "Retriever":
        """Opens an index.

        Raises InputError if it has another format, or if its files are not those that were written.
        """
        folder = Path(index_dir)
        recover(folder)
        try:
            index_files = index.open_index(folder, Progress())
            if index.takes_clauses_for_words(index_files):
                print(f"ssp_jax: {folder}: {_OLDER_WORDS}; {index.ANEW}", file=sys.stderr)
            return cls(index_files, threads)
        # of the index, or of the folder where Numba caches the compiled kernels
        except OSError as error:
            raise InputError(f"{folder}: expected an index that can be read ({error})") from None

    def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        batch = self._make_batch(queries, top_k)
        slices = list(itertools.pairwise(self._cuts(batch)))

        # Each thread takes the next slice until none is left; so does this one.
        remaining = iter(slices)

        def work() -> None:
            for first, last in remaining:
                self._search_slice(batch, first, last)

        helpers = min(len(slices), self._threads) - 1
        futures = [self._pool.submit(work) for _ in range(helpers)]
        work()
        for future in futures:
            if not future.cancel():  # a thread that has not begun by now has nothing left to do
                future.result()

        columns = (batch.rows.tolist(), batch.scores.tolist(), batch.found.tolist())
        hits = []
        for rows, scores, found in zip(*columns, strict=True):
            hits.append(tuple(zip(rows[:found], scores[:found], strict=True)))
        return hits

    def _make_batch(self, queries: Sequence[str], top_k: int) -> _Batch:
        terms_of_queries = [self._query_terms(query) for query in queries]
        terms = list(itertools.chain.from_iterable(terms_of_queries))
        shape = (len(queries), min(top_k, len(self)))
        return _Batch(
            terms=np.array(terms, np.int64),
            ends=np.cumsum([0, *map(len, terms_of_queries)]),
            rows=np.empty(shape, np.int32),
            scores=np.empty(shape, np.float32),
            found=np.empty(len(queries), np.int64),
        )

    def _query_terms(self, query: str) -> list[int]:
        """The term numbers of the query's words that the corpus has; in order, with repeats."""
        numbers = map(self._vocabulary.__getitem__, self._split(query))
        return [number for number in numbers if number >= 0]

    def _cuts(self, batch: _Batch) -> list[int]:
        """Where to cut the queries into slices of about as many postings, from 0 to their number.

        A large batch gives SLICES_PER_THREAD slices for each thread.
        """
        number = len(batch.found)
        frequencies = self._index.starts[batch.terms + 1] - self._index.starts[batch.terms]
        postings = np.concatenate([[0], np.cumsum(frequencies)])[batch.ends]
        total = postings[-1]
        limit = SLICES_PER_THREAD * self._threads if self._threads > 1 else 1
        slices = min(max(1, int(total) // MIN_SLICE_POSTINGS), limit)
        inner = np.searchsorted(postings, total * np.arange(1, slices) / slices)
        return [0, *sorted(set(inner.tolist()) - {0, number}), number]

    def _search_slice(self, batch: _Batch, first: int, last: int) -> None:
        """Fills in the results of the batch's queries from `first` to `last` (exclusive)."""
        try:
            scratch = self._scratch.get_nowait()
        except queue.Empty:
            partial_scores = np.zeros(len(self), np.float32)
            candidates = np.empty(2 * len(self) + 1, np.uint32)
            scratch = (partial_scores, candidates)
        begin = batch.ends[first]
        terms = batch.terms[begin : batch.ends[last]]
        ends = batch.ends[first + 1 : last + 1] - begin
        results = (batch.rows[first:last], batch.scores[first:last], batch.found[first:last])
        bm25.search_queries(*self._postings, terms, ends, *scratch, *results)
        self._scratch.put(scratch)


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
