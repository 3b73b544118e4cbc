"""A corpus → an index folder, built once by however many processes start together."""

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssp_jax.data import Position, iterate_corpus
from ssp_jax.errors import InputError, printable
from ssp_jax.retriever import bm25, index
from ssp_jax.runtime.folder_swap import FolderSwap

# postings that a thread walks in a tenth of a millisecond: not worth being split further
SMALL_PART = 1 << 14
# of a batch for each thread, so that one that wakes late or is disturbed leaves its second to the
# others
PARTS = 2
PROGRESS_SECONDS = 10.0


def import_bm25s() -> ModuleType:
    import bm25s

    # it sets itself to DEBUG and talks through our handlers
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


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
    """Index title and text of every passage. The folder appears, or replaces an older index, only
    once it is whole.
    """
    settings, swap = index.checked_settings(stemmer, stopwords, k1, b), _swap(index_dir)
    with _locked(swap):
        _build(Path(corpus), swap, settings)


def _build(corpus: Path, swap: FolderSwap, settings: dict[str, Any]) -> None:
    with swap.building() as work:
        _write_index(corpus, work, settings)


def _swap(index_dir: str | Path) -> FolderSwap:
    return FolderSwap(index_dir, "an index", index.written)


def recover(index_dir: Path) -> None:
    """Puts an index back that a killed build has left under another name, unless a living one is
    just at it.
    """
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
                print(
                    f"ssp_jax: waiting for the process that builds {swap.folder}",
                    file=sys.stderr,
                    flush=True,
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise swap.error(error) from None


def _write_index(corpus: Path, work: Path, settings: dict[str, Any]) -> None:
    stamp, position = _stamp(corpus), Position()
    stop_list = list(import_bm25s().stopwords.STOPWORDS_EN) if settings["stopwords"] else []
    words = bm25.Words(settings["stemmer"], stop_list)
    (work / "runs").mkdir()
    postings, progress = bm25.Postings(work / "runs", words), Progress()
    offsets, sums = _copy(
        corpus, work / index.PASSAGES, stamp["size"], position, postings.add, progress
    )
    if not words.terms:
        raise InputError(
            f"{corpus}: expected passages with words to index, found {len(offsets) - 1} passages and none"
        )
    # bm25s writes its parameters and vocabulary itself, and three empty arrays that are replaced
    # below.
    empty = import_bm25s().BM25(
        k1=settings["k1"], b=settings["b"], method="lucene", backend="numpy"
    )
    nothing = np.zeros(0, np.float32)
    empty.scores = {
        "data": nothing,
        "indices": nothing,
        "indptr": nothing,
        "num_docs": len(offsets) - 1,
    }
    empty.vocab_dict, empty.nonoccurrence_array = words.terms, None
    empty.save(work, show_progress=False)
    np.save(work / index.OFFSETS, np.asarray(offsets, np.int64))
    np.save(work / index.LINE_SUMS, np.asarray(sums, np.uint32))
    for share in postings.write(work, settings["k1"], settings["b"]):
        progress(lambda seconds, share=share: f"merging postings: {share:.0%}, {seconds:.0f} s")  # type: ignore[misc]
    shutil.rmtree(work / "runs")
    source = {
        "size": position.bytes,
        "mtime_ns": stamp["mtime_ns"],
        "sha256": position.sha256.hexdigest(),
    }
    meta = {
        "settings": settings,
        "stopwords": stop_list,
        "corpus": source,
        "passages": len(offsets) - 1,
    }
    index.write_meta(work, meta)


def _copy(
    corpus: Path,
    target: Path,
    size: int,
    position: Position,
    add: Callable[[str], None],
    progress: Progress,
) -> "tuple[array[int], array[int]]":
    """Copies each passage into the index and hands its text on: the corpus is read once and never
    held.

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


def ensure_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Builds the index of this corpus with these settings unless it is there.

    A lock file beside the folder makes processes of one machine that start together build once. An
    index that is already right is only read, so it may lie on a read-only disk. Without a corpus
    the index is taken as it is.
    """
    folder, source, settings = (
        Path(index_dir),
        Path(corpus),
        index.checked_settings(stemmer, stopwords, k1, b),
    )
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
    """What is searched, as a digest: the corpus, or, where none is given, what the index was built
    from.

    The corpus is read where it is not, by size and time, the one of the index.
    """
    folder = Path(index_dir)
    if not corpus:
        recover(folder)
        return digest_in_meta(index.read_meta(folder))
    stamp = _stamp(Path(corpus))
    try:
        known = index.read_meta(folder)["corpus"]
    except InputError:  # it is not built yet
        return _digest(Path(corpus))
    same = all(known[key] == value for key, value in stamp.items())
    return known["sha256"] if same else _digest(Path(corpus))


def digest_in_meta(meta: dict[str, Any]) -> str:
    return f"{meta['settings']} {meta['stopwords']} corpus {meta['corpus']['sha256']}"


def _matches(folder: Path, corpus: Path, settings: dict[str, Any]) -> bool:
    """Size and time tell in an instant; a copied file (same size, other time) is told by its
    digest.
    """
    stamp = _stamp(corpus)
    try:
        meta = index.read_meta(folder)
    except InputError:
        return False
    if meta["settings"] != settings or meta["corpus"]["size"] != stamp["size"]:
        return False
    return meta["corpus"]["mtime_ns"] == stamp["mtime_ns"] or meta["corpus"]["sha256"] == _digest(
        corpus
    )
