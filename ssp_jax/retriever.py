"""Search: a BM25 index of a corpus, built once, mapped from disk, asked in batches; or somebody's retrieval server.

    python -m ssp_jax.retriever build --corpus=wiki-18.jsonl.gz --out=wiki-18.index
    python -m ssp_jax.retriever search --index=wiki-18.index "capital of France"

An index is a folder: the arrays and vocabulary of bm25s (which loads it too), `passages.jsonl` with the corpus in row
order, and what index.py adds to find and check them. Passages and postings stay on disk and are read through memory
maps: only the vocabulary, and 12 bytes a passage for each thread that searches, are in host memory.

bm25s is imported inside functions only, when an index is built: `import bm25s` runs a JAX op, after which
jax.distributed.initialize() raises. Open a retriever after the distributed start.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ssp_jax import bm25, index
from ssp_jax.config import BOUNDS, user_path
from ssp_jax.data import Document, Position, iterate_corpus, parse_document, parse_row
from ssp_jax.errors import InputError, Parser, exit_code, printable
from ssp_jax.folder_swap import FolderSwap
from ssp_jax.index import Index

CACHE_BYTES = 1 << 26  # of the queries asked last: of an index 100,000, of a server 20,000 with their passages
_ENTRY_BYTES = 250  # of a query in the cache, beside its text and its result
_HIT_BYTES = 150  # of a row number and a score in Python
# More than 1,024 words, the most clauses of Lucene; encoders behind servers read 512 tokens at most.
QUERY_CHARACTERS = 8192
SMALL_PART = 1 << 14  # postings that a thread walks in a tenth of a millisecond: not worth being split further
PARTS = 2  # of a batch for each thread, so that one that wakes late or is disturbed leaves its second to the others
PROGRESS_SECONDS = 10.0

T = TypeVar("T")
Hits = tuple[tuple[int, float], ...]  # row and score, best first


class Search(Protocol):
    """What a run needs. The rows are those of the corpus, or the passages that a server gave at the start."""

    source: str  # what is searched; another text means that the same query may find other passages

    def __len__(self) -> int: ...
    def document(self, row: int) -> Document: ...
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]: ...


def _bm25s() -> ModuleType:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and talks through our handlers
    return bm25s


def shortened(query: str) -> str:
    """A query as it is searched: what a model writes may be long, and would cost its length in postings.

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

    def get(self, queries: Sequence[str], top_k: int, find: Callable[[list[str], int], Iterable[T]]) -> list[T]:
        """What `find` gives for these queries; it is asked, once for each, for those that are not here."""
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


class Progress:
    """Lines on stderr, one in PROGRESS_SECONDS: what is done quickly is done silently."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, text: Callable[[float], str]) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            print(f"ssp_jax: {printable(text(now - self._start))}", file=sys.stderr, flush=True)


# --- building ---------------------------------------------------------------------------------------------------------


def build_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Index title and text of every passage. The folder appears, or replaces an older index, only once it is whole."""
    settings, swap = index.checked_settings(stemmer, stopwords, k1, b), _swap(index_dir)
    with _locked(swap):
        _build(Path(corpus), swap, settings)


def _build(corpus: Path, swap: FolderSwap, settings: dict[str, Any]) -> None:
    with swap.building() as work:
        _write_index(corpus, work, settings)


def _swap(index_dir: str | Path) -> FolderSwap:
    return FolderSwap(index_dir, "an index", index.written)


def _recover(index_dir: Path) -> None:
    """Puts an index back that a killed build has left under another name, unless a living one is just at it."""
    swap = _swap(index_dir)
    if swap.is_interrupted:
        with contextlib.suppress(OSError), open(_lock_path(swap), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            swap.recover()


def _lock_path(swap: FolderSwap) -> Path:
    return swap.folder.with_name(swap.folder.name + ".lock")


@contextlib.contextmanager
def _locked(swap: FolderSwap) -> Iterator[None]:
    """Only one process of this machine writes an index at a time; the others wait, and say so."""
    swap.check()
    try:
        swap.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(_lock_path(swap), "a") as lock:  # "a": a file of that name stays as it is
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"ssp_jax: waiting for the process that builds {swap.folder}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise swap.error(error) from None


def _write_index(corpus: Path, work: Path, settings: dict[str, Any]) -> None:
    stamp, position = _stamp(corpus), Position()
    stop_list = list(_bm25s().stopwords.STOPWORDS_EN) if settings["stopwords"] else []
    words = bm25.Words(settings["stemmer"], stop_list)
    (work / "runs").mkdir()
    postings, progress = bm25.Postings(work / "runs", words), Progress()
    offsets, sums = _copy(corpus, work / index.PASSAGES, stamp["size"], position, postings.add, progress)
    if not words.terms:
        raise InputError(f"{corpus}: expected passages with words to index, found {len(offsets) - 1} passages and none")
    # bm25s writes its parameters and vocabulary itself, and three empty arrays that are replaced below.
    empty = _bm25s().BM25(k1=settings["k1"], b=settings["b"], method="lucene", backend="numpy")
    nothing = np.zeros(0, np.float32)
    empty.scores = {"data": nothing, "indices": nothing, "indptr": nothing, "num_docs": len(offsets) - 1}
    empty.vocab_dict, empty.nonoccurrence_array = words.terms, None
    empty.save(work, show_progress=False)
    np.save(work / index.OFFSETS, np.asarray(offsets, np.int64))
    np.save(work / index.LINE_SUMS, np.asarray(sums, np.uint32))
    for share in postings.write(work, settings["k1"], settings["b"]):
        progress(lambda seconds, share=share: f"merging postings: {share:.0%}, {seconds:.0f} s")  # type: ignore[misc]
    shutil.rmtree(work / "runs")
    source = {"size": position.bytes, "mtime_ns": stamp["mtime_ns"], "sha256": position.sha256.hexdigest()}
    meta = {"settings": settings, "stopwords": stop_list, "corpus": source, "passages": len(offsets) - 1}
    index.write_meta(work, meta)


def _copy(
    corpus: Path, target: Path, size: int, position: Position, add: Callable[[str], None], progress: Progress
) -> "tuple[array[int], array[int]]":
    """Copies each passage into the index and hands its text on: the corpus is read once and never held.

    Gives where each line begins, and its CRC-32. size: of the corpus in bytes, 0 for a pipe.
    """
    offsets, sums = array("q", [0]), array("L")

    def line(seconds: float) -> str:
        done = len(offsets) - 1
        told = f"reading {corpus.name}: {done:,} passages"
        if not size:
            return f"{told}, {done / seconds:,.0f}/s"
        share = min(position.bytes / size, 1.0)
        left = seconds * (1 - share) / max(share, 1e-9)
        return f"{told} ({share:.0%}), {done / seconds:,.0f}/s, {left:.0f} s left"

    with open(target, "wb") as file:
        for document in iterate_corpus(corpus, position):
            contents = f"{document.title}\n{document.text}"
            text = json.dumps({"id": document.id, "contents": contents}, ensure_ascii=False)
            written = text.encode() + b"\n"
            offsets.append(offsets[-1] + file.write(written))
            sums.append(zlib.crc32(written))
            add(contents)
            progress(line)
    return offsets, sums


def _stamp(corpus: Path) -> dict[str, Any]:
    try:
        stat = corpus.stat()
    except OSError as error:
        raise InputError(f"{corpus}: expected a readable corpus file ({error.strerror})") from None
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _digest(corpus: Path) -> str:
    try:
        with open(corpus, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{corpus}: expected a readable corpus file ({error.strerror})") from None


# --- searching --------------------------------------------------------------------------------------------------------


class Retriever:
    """A loaded index. Threads may ask at the same time; a batch is searched by `threads` threads, 0 for all cores."""

    def __init__(self, folder: Path, found: Index, threads: int = 0) -> None:
        self._path = str(folder / index.PASSAGES)
        meta = found.meta
        self.source = _source(meta)
        self._arrays = found.data, found.rows, found.starts, found.highest
        self._offsets, self._line_sums, self._passages = found.offsets, found.line_sums, found.passages
        self._words = bm25.QueryWords(meta["settings"]["stemmer"], meta["stopwords"], found.vocabulary)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="search")
        self._scratch: queue.SimpleQueue[tuple[np.ndarray, np.ndarray]] = queue.SimpleQueue()
        self._cache: Cache[Hits] = Cache(CACHE_BYTES, lambda hits: _HIT_BYTES * len(hits))
        self._search([""], 1)  # compiles, or reads what was compiled before

    @classmethod
    def load(cls, index_dir: str | Path, threads: int = 0) -> "Retriever":
        """Opens an index; refuses one of another format, and one whose files are not what was written."""
        folder = Path(index_dir)
        _recover(folder)
        try:
            return cls(folder, index.open_index(folder, Progress()), threads)
        except OSError as error:  # of the index, or of the folder where Numba keeps what it has compiled
            raise InputError(f"{folder}: expected an index that can be read ({error})") from None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def document(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index with {len(self)} passages")
        line = self._passages[self._offsets[row] : self._offsets[row + 1]].tobytes()
        if zlib.crc32(line) != self._line_sums[row]:
            raise InputError(f"{self._path} line {row + 1}: expected the bytes that were written; {index.ANEW}")
        return parse_document(parse_row(self._path, row + 1, line))

    def _query_terms(self, query: str) -> list[int]:
        """The numbers of the query's words that the corpus has, in their order, repeats included."""
        return [number for number in map(self._words.__getitem__, bm25.split(query)) if number >= 0]

    def _best(self, terms: np.ndarray, ends: np.ndarray, best: tuple[np.ndarray, ...], a: int, b: int) -> None:
        """Fills `best` for the queries from a to b, of which query i has terms[ends[i] : ends[i + 1]]."""
        try:
            scratch = self._scratch.get_nowait()
        except queue.Empty:
            scratch = np.zeros(len(self), np.float32), np.empty(2 * len(self) + 1, np.uint32)
        own = terms[ends[a] : ends[b]], ends[a + 1 : b + 1] - ends[a]
        bm25.best_rows_of_all(*self._arrays, *own, *scratch, *(array[a:b] for array in best))
        self._scratch.put(scratch)

    def hits(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """For each query the best top_k rows with their scores; only rows that share a word with it.

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
        return [tuple(zip(rows[:found], scores[:found], strict=True)) for rows, scores, found in shown]

    def _cuts(self, terms: np.ndarray, ends: np.ndarray) -> list[int]:
        """Where the queries are cut into parts of about as many postings, a few for each thread if they are many."""
        starts = self._arrays[2]
        postings = np.concatenate([[0], np.cumsum(starts[terms + 1] - starts[terms])])[ends]
        most = PARTS * self._threads if self._threads > 1 else 1
        parts = min(max(1, int(postings[-1]) // SMALL_PART), most)
        inner = np.searchsorted(postings, postings[-1] * np.arange(1, parts) / parts)
        return [0, *sorted(set(inner.tolist()) - {0, len(ends) - 1}), len(ends) - 1]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """For each query at most top_k passages that share a word with it, best first; fewer or none if fewer match."""
        return [[self.document(row) for row, _ in hits] for hits in self.hits(queries, top_k)]


def open_retriever(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float, threads: int = 0
) -> Retriever:
    """The index of this corpus with these settings, built first where it does not exist."""
    ensure_index(corpus, index_dir, stemmer=stemmer, stopwords=stopwords, k1=k1, b=b)
    return Retriever.load(index_dir, threads)


def ensure_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Builds the index of this corpus with these settings unless it is there.

    A lock file beside the folder makes processes of one machine that start together build once. An index that is
    already right is only read, so it may lie on a read-only disk. Without a corpus the index is taken as it is.
    """
    folder, source, settings = Path(index_dir), Path(corpus), index.checked_settings(stemmer, stopwords, k1, b)
    if not corpus:
        return
    if source.exists() and not source.is_file():
        raise InputError(
            f"{source}: expected a file, for a run looks at its corpus whenever it starts, and a pipe can be read only "
            "once; build the index with python -m ssp_jax.retriever build, and give retriever.index alone"
        )
    if _matches(folder, source, settings):
        return
    swap = _swap(folder)
    with _locked(swap):
        if not _matches(folder, source, settings):
            _build(source, swap, settings)


def source(corpus: str | Path, index_dir: str | Path) -> str:
    """What is searched, as a digest: the corpus, or, where none is given, what the index was built from.

    The corpus is read where it is not, by size and time, the one of the index.
    """
    folder = Path(index_dir)
    if not corpus:
        _recover(folder)
        return _source(index.read_meta(folder))
    stamp = _stamp(Path(corpus))
    try:
        known = index.read_meta(folder)["corpus"]
    except InputError:  # it is not built yet
        return _digest(Path(corpus))
    same = all(known[key] == value for key, value in stamp.items())
    return known["sha256"] if same else _digest(Path(corpus))


def _source(meta: dict[str, Any]) -> str:
    return f"{meta['settings']} {meta['stopwords']} corpus {meta['corpus']['sha256']}"


def _matches(folder: Path, corpus: Path, settings: dict[str, Any]) -> bool:
    """Size and time tell in an instant; a copied file (same size, other time) is told by its digest."""
    stamp = _stamp(corpus)
    try:
        meta = index.read_meta(folder)
    except InputError:
        return False
    if meta["settings"] != settings or meta["corpus"]["size"] != stamp["size"]:
        return False
    return meta["corpus"]["mtime_ns"] == stamp["mtime_ns"] or meta["corpus"]["sha256"] == _digest(corpus)


# --- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m ssp_jax.retriever", description="Build a BM25 index, or ask one.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="index a corpus")
    build.add_argument("--corpus", required=True, help='jsonl or jsonl.gz of {"id", "contents"}, Search-R1\'s format')
    build.add_argument("--out", required=True, help="folder of the index: config key retriever.index")
    build.add_argument("--stemmer", default="english", choices=index.STEMMERS)
    build.add_argument("--stopwords", default="en", choices=index.STOPWORDS)
    build.add_argument("--k1", default=1.5, type=float)
    build.add_argument("--b", default=0.75, type=float)
    ask = verbs.add_parser("search", help="show the best passages of a query")
    ask.add_argument("--index", required=True)
    ask.add_argument("--top_k", default=3, type=int)
    ask.add_argument("query")
    args = parser.parse_args(arguments)
    _build_command(args) if args.verb == "build" else _search_command(args)


def _build_command(args: argparse.Namespace) -> None:
    start, folder = time.monotonic(), Path(user_path(args.out, "--out")).absolute()
    corpus = user_path(args.corpus, "--corpus")
    build_index(corpus, folder, stemmer=args.stemmer, stopwords=args.stopwords, k1=args.k1, b=args.b)
    size = sum(path.stat().st_size for path in folder.iterdir())
    passages = len(Retriever.load(folder, threads=1))
    cost = f"{size / 1e9:.2f} GB, built in {time.monotonic() - start:.0f} s"
    print(printable(f"{folder}: {passages:,} passages, {cost}"))


def _search_command(args: argparse.Namespace) -> None:
    BOUNDS["retriever.top_k"].check("flag --top_k", args.top_k)
    retriever = Retriever.load(user_path(args.index, "--index"), threads=1)
    hits = retriever.hits([args.query], args.top_k)[0]
    for row, score in hits:
        document = retriever.document(row)
        print(printable(f"{score:8.3f}  [{document.id}] {document.title}\n          {document.text}"))
    if not hits:
        print("no passage has a word of this query")


if __name__ == "__main__":
    # bm25s starts JAX as it is imported, and an index needs no device: no GPU's memory is taken, no TPU is looked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
