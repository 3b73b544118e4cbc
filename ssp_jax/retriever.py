"""Search: a BM25 index (bm25s) of a corpus, built once, mapped from disk, asked in batches.

An index is a folder: bm25s's own arrays and vocabulary, `passages.jsonl` with the corpus in row order, `offsets.npy`
(int64 [rows + 1], where each line begins), and `meta.json`, written last. Passages and postings stay on disk and are
read through memory maps, so the size of a corpus costs no host memory.

bm25s and Stemmer are imported inside functions only: `import bm25s` runs a JAX op, after which
jax.distributed.initialize() raises. Open a retriever after the distributed start.
"""

import fcntl
import functools
import hashlib
import json
import logging
import shutil
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssp_jax.data import Document, InputError, iterate_corpus, parse_document, parse_row

FORMAT = 1  # raise it whenever the files of an index change their meaning: old folders are then built anew
CACHED_QUERIES = 65_536  # about ten steps of the paper's setting; only row numbers are kept, some 10 MB

_META, _PASSAGES, _OFFSETS = "meta.json", "passages.jsonl", "offsets.npy"
_STEMMERS, _STOPWORDS = ("", "english"), ("", "en")


def _bm25s() -> ModuleType:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and talks through our handlers
    return bm25s


def _stemmer(name: str) -> Any:
    import Stemmer

    return Stemmer.Stemmer(name) if name else None


def _tokens(texts: Iterable[str], settings: dict[str, Any], stemmer: Any, return_ids: bool) -> Any:
    """The same words for passages and queries: lower case, two letters or more, no stop words, stemmed."""
    stopwords = settings["stopwords"] or None
    return _bm25s().tokenize(
        texts, stopwords=stopwords, stemmer=stemmer, return_ids=return_ids, show_progress=False, leave=False
    )


def _checked(stemmer: str, stopwords: str, k1: float, b: float) -> dict[str, Any]:
    if stemmer not in _STEMMERS:
        raise InputError(f"retriever: stemmer is {stemmer!r}, expected one of {_STEMMERS}")
    if stopwords not in _STOPWORDS:
        raise InputError(f"retriever: stopwords is {stopwords!r}, expected one of {_STOPWORDS}")
    if not k1 >= 0 or not 0 <= b <= 1:
        raise InputError(f"retriever: k1 is {k1} and b is {b}, expected k1 >= 0 and b between 0 and 1")
    return {"stemmer": stemmer, "stopwords": stopwords, "k1": float(k1), "b": float(b)}


# --- building ---------------------------------------------------------------------------------------------------------


def build_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Index title and text of every passage. The folder appears, or replaces an older index, only once it is whole."""
    settings, folder = _checked(stemmer, stopwords, k1, b), Path(index_dir)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / _META).is_file():
        raise InputError(f"{folder}: expected an index or no such folder; it holds other things and is left alone")
    work, old = folder.with_name(folder.name + ".building"), folder.with_name(folder.name + ".old")
    try:
        for leftover in (work, old):  # of a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        _write_index(Path(corpus), work, settings)
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder where an index can be written ({error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_index(corpus: Path, work: Path, settings: dict[str, Any]) -> None:
    source = _stamp(corpus) | {"sha256": _digest(corpus)}
    offsets = array("q", [0])
    tokens = _tokens(_copied(corpus, work / _PASSAGES, offsets), settings, _stemmer(settings["stemmer"]), True)
    if not tokens.vocab:
        raise InputError(f"{corpus}: expected passages with words to index, found {len(tokens.ids)} passages and none")
    bm25 = _bm25s().BM25(k1=settings["k1"], b=settings["b"], method="lucene", backend="numpy")
    bm25.index(tokens, create_empty_token=False, show_progress=False)
    bm25.save(work, show_progress=False)
    np.save(work / _OFFSETS, np.asarray(offsets, np.int64))
    files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    meta = {"format": FORMAT, "settings": settings, "corpus": source, "passages": len(tokens.ids), "files": files}
    (work / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _copied(corpus: Path, target: Path, offsets: array) -> Iterator[str]:
    """Copies each passage into the index on its way to the tokenizer: the corpus is read once and never held."""
    with open(target, "wb") as file:
        for document in iterate_corpus(corpus):
            contents = f"{document.title}\n{document.text}"
            line = json.dumps({"id": document.id, "contents": contents}, ensure_ascii=False)
            offsets.append(offsets[-1] + file.write(line.encode() + b"\n"))
            yield contents


def _stamp(corpus: Path) -> dict[str, int]:
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


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """None where there is no index of this format."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


class Retriever:
    """A loaded index. Threads may search at the same time."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self._settings, self._path = meta["settings"], str(folder / _PASSAGES)
        self._bm25 = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
        self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
        self._passages = np.memmap(self._path, np.uint8, mode="r")
        self._stemmer, self._stemmer_lock = _stemmer(self._settings["stemmer"]), threading.Lock()
        self._cached_rows = functools.lru_cache(CACHED_QUERIES)(self._rows)

    @classmethod
    def load(cls, index_dir: str | Path) -> "Retriever":
        """Opens an index; refuses one of another format and one with missing or truncated files."""
        folder = Path(index_dir)
        meta = _read_meta(folder)
        if meta is None:
            raise InputError(f"{folder}: expected a search index of format {FORMAT} ({_META} is missing or differs)")
        for name, size in meta["files"].items():
            path = folder / name
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            if found != f"{size} bytes":
                raise InputError(f"{path}: expected {size} bytes, found {found}; delete the index to build it anew")
        return cls(folder, meta)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def document(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index with {len(self)} passages")
        line = self._passages[self._offsets[row] : self._offsets[row + 1]].tobytes()
        return parse_document(parse_row(self._path, row + 1, line))

    def scores(self, query: str) -> np.ndarray:
        """float32 [passages]: BM25 (Lucene's form) of each row; words that the corpus does not have add nothing."""
        with self._stemmer_lock:  # PyStemmer's objects are not thread-safe
            words = _tokens([query], self._settings, self._stemmer, False)[0]
        return self._bm25.get_scores_from_ids(self._bm25.get_tokens_ids(words))

    def _rows(self, query: str, top_k: int) -> tuple[int, ...]:
        """The best rows, higher score first, at equal score the lower row first, also where top_k cuts a tie.

        Not bm25s's retrieve(): that pads with zero-score rows, cuts ties at random, and asks JAX for the top k.
        """
        scores = self.scores(query)
        rows = np.flatnonzero(scores > 0)
        if len(rows) > top_k:
            cut = len(rows) - top_k
            rows = rows[scores[rows] >= np.partition(scores[rows], cut)[cut]]
        return tuple(rows[np.argsort(-scores[rows], kind="stable")][:top_k].tolist())

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """For each query at most top_k passages that share a word with it, best first; fewer or none if fewer match."""
        return [[self.document(row) for row in self._cached_rows(query, top_k)] for query in queries]


def open_retriever(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> Retriever:
    """The index of this corpus with these settings: loaded where it exists, built first where not.

    A lock file beside the folder makes processes that start together build once. An index that is already right is only
    read, so it may lie on a read-only disk.
    """
    folder, source, settings = Path(index_dir), Path(corpus), _checked(stemmer, stopwords, k1, b)
    if not _matches(folder, source, settings):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.with_name(folder.name + ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _matches(folder, source, settings):
                    build_index(source, folder, **settings)
        except OSError as error:
            raise InputError(f"{folder}: expected a folder where an index can be written ({error})") from None
    return Retriever.load(folder)


def _matches(folder: Path, corpus: Path, settings: dict[str, Any]) -> bool:
    """Size and time tell in an instant; a copied file (same size, other time) is told by its digest."""
    meta, stamp = _read_meta(folder), _stamp(corpus)
    if meta is None or meta["settings"] != settings or meta["corpus"]["size"] != stamp["size"]:
        return False
    return meta["corpus"]["mtime_ns"] == stamp["mtime_ns"] or meta["corpus"]["sha256"] == _digest(corpus)
