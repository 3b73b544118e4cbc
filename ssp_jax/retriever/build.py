"""Building an index folder from a corpus, once, however many processes start together."""

import contextlib
import fcntl
import json
import logging
import shutil
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssp_jax.corpus import passages, words
from ssp_jax.data import Position
from ssp_jax.errors import InputError, printable
from ssp_jax.retriever import bm25, index
from ssp_jax.retriever.progress import Progress
from ssp_jax.retriever.settings import STOPWORDS
from ssp_jax.runtime.folder_swap import FolderSwap

# Passages at the beginning of a corpus that are looked at for words, and then one in so many.
SAMPLED_PASSAGES = 1000
SAMPLE_STRIDE = 64


def build_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Indexes title and text of every passage.

    The folder appears, or replaces an older index, only once it is whole. Raises InputError.
    """
    settings = index.checked_settings(stemmer, stopwords, k1, b)
    passages.stamp(Path(corpus))  # where it cannot be read, no lock file is left behind
    swap = _swap(index_dir)
    with _locked(swap), swap.building() as work:
        _write_index(Path(corpus), work, settings)


def ensure_index(
    corpus: str | Path, index_dir: str | Path, *, stemmer: str, stopwords: str, k1: float, b: float
) -> None:
    """Builds the index of this corpus with these settings unless it is there. Raises InputError.

    A lock file beside the folder makes processes of one machine that start together build once. An
    index that is already right is only read, so it may lie on a read-only disk. Without a corpus
    the index is taken as it is.
    """
    settings = index.checked_settings(stemmer, stopwords, k1, b)
    if not corpus:
        return
    folder = Path(index_dir)
    corpus = Path(corpus)
    if corpus.exists() and not corpus.is_file() and not corpus.is_dir():
        raise InputError(
            f"{corpus}: expected a file or a folder, for a run looks at its corpus whenever it "
            "starts, and a pipe can be read only once; build the index with "
            "python -m ssp_jax.retriever build, and give retriever.index alone"
        )
    if _matches(folder, corpus, settings):
        return
    swap = _swap(folder)
    with _locked(swap):
        if not _matches(folder, corpus, settings):  # another process may have built it meanwhile
            with swap.building() as work:
                _write_index(corpus, work, settings)


# --- the folder and its lock ---


def _swap(index_dir: str | Path) -> FolderSwap:
    return FolderSwap(index_dir, "an index", index.written)


def recover(index_dir: Path) -> None:
    """Puts an index back that a killed build has left under another name.

    Does nothing while another process builds.
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
    """Lets one process of this machine at a time write the index. The others wait, and say so."""
    swap.check()
    try:
        swap.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(_lock_path(swap), "a") as lock:  # "a": a file of that name stays as it is
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"ssp_jax: waiting for the process that builds {swap.folder}"
                print(message, file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise swap.error(error) from None


# --- writing ---


def _write_index(corpus: Path, work: Path, settings: dict[str, Any]) -> None:
    """Writes all files of an index of `corpus` into the folder `work`."""
    stamp = passages.stamp(corpus)
    _say(passages.left_out(corpus))
    stop_list = _stop_list(settings["stopwords"])
    vocabulary = bm25.Vocabulary(settings["stemmer"], stop_list)
    progress = Progress()

    # One pass over the corpus: passages into the folder, postings into runs on disk.
    runs = work / "runs"
    runs.mkdir()
    postings = bm25.Postings(runs, vocabulary, words.splitter(settings["words"]))
    coverage = _Coverage()

    def add(text: str) -> None:
        postings.add(text)
        coverage.add(text)

    position = Position()
    offsets, sums = _copy_passages(
        corpus, work / index.PASSAGES, stamp["size"], position, add, progress
    )
    number = len(offsets) - 1
    if not vocabulary.terms:
        raise InputError(
            f"{corpus}: expected passages with words to index, found {number} passages and none"
        )
    _say(coverage.warning(corpus))

    # The files of bm25s, whose arrays are then replaced by the merged runs.
    _save_empty_bm25s(work, vocabulary.terms, number, settings)
    np.save(work / index.OFFSETS, np.asarray(offsets, np.int64))
    np.save(work / index.LINE_SUMS, np.asarray(sums, np.uint32))
    for done in postings.write(work, settings["k1"], settings["b"]):
        progress.share("merging postings", done)
    shutil.rmtree(runs)

    source = {
        "size": position.bytes,
        "mtime_ns": stamp["mtime_ns"],
        "sha256": position.sha256.hexdigest(),
    }
    meta = {
        "settings": settings,
        "stopwords": stop_list,
        "corpus": source,
        "passages": number,
    }
    index.write_meta(work, meta)


def _say(sentence: str) -> None:
    """Prints a remark on the corpus, unless it is empty."""
    if sentence:
        print(f"ssp_jax: {printable(sentence)}", file=sys.stderr, flush=True)


def _stop_list(name: str) -> list[str]:
    """name: of STOPWORDS."""
    return list(getattr(_import_bm25s().stopwords, STOPWORDS[name])) if name else []


class _Coverage:
    """Which share of a corpus is in words, of a sample: all first passages, then some."""

    def __init__(self) -> None:
        self._passages = 0
        self._inside = 0
        self._visible = 0

    def add(self, text: str) -> None:
        """Takes the next passage."""
        self._passages += 1
        if self._passages <= SAMPLED_PASSAGES or self._passages % SAMPLE_STRIDE == 0:
            inside, visible = words.covered(text)
            self._inside += inside
            self._visible += visible

    def warning(self, corpus: Path) -> str:
        """A sentence where most characters are in no word, else ""."""
        if 2 * self._inside >= self._visible:
            return ""
        share = self._inside / self._visible
        return (
            f"{corpus}: only {share:.0%} of its characters stand in words of two letters or more, "
            "so that searches find little of it; is it text?"
        )


def _import_bm25s() -> ModuleType:
    import bm25s

    # It sets its logger to DEBUG, and our handlers would print that.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _save_empty_bm25s(
    folder: Path, terms: dict[str, int], passages: int, settings: dict[str, Any]
) -> None:
    """Lets bm25s write its parameters and vocabulary, and three arrays, which are empty."""
    empty = np.zeros(0, np.float32)
    model = _import_bm25s().BM25(
        k1=settings["k1"], b=settings["b"], method="lucene", backend="numpy"
    )
    model.scores = {"data": empty, "indices": empty, "indptr": empty, "num_docs": passages}
    model.vocab_dict = terms
    model.nonoccurrence_array = None
    model.save(folder, show_progress=False)


def _copy_passages(
    corpus: Path,
    target: Path,
    size: int,
    position: Position,
    add: Callable[[str], None],
    progress: Progress,
) -> "tuple[array[int], array[int]]":
    """Copies each passage into the index and gives its text to `add`.

    The corpus is read once and never held in memory. Returns where each line begins, with the end
    of the last one, and the CRC-32 of each line. size: of the corpus in bytes, 0 for a pipe.
    """
    offsets = array("q", [0])
    sums = array("L")

    def describe(seconds: float) -> str:
        number = len(offsets) - 1
        rate = f"{number / seconds:,.0f}/s"
        text = f"reading {corpus.name}: {number:,} passages"
        if not size:
            return f"{text}, {rate}"
        share = min(position.bytes / size, 1.0)
        seconds_left = seconds * (1 - share) / max(share, 1e-9)
        return f"{text} ({share:.0%}), {rate}, {seconds_left:.0f} s left"

    with open(target, "wb") as file:
        for document in passages.read_passages(corpus, position):
            contents = f"{document.title}\n{document.text}"
            text = json.dumps({"id": document.id, "contents": contents}, ensure_ascii=False)
            line = text.encode() + b"\n"
            offsets.append(offsets[-1] + file.write(line))
            sums.append(zlib.crc32(line))
            add(contents)
            progress(describe)
    return offsets, sums


# --- what an index was built from ---


def source(corpus: str | Path, index_dir: str | Path) -> str:
    """A digest of what is searched: of the corpus, or of the index where no corpus is given.

    The corpus is hashed only if its size or time differs from what the index has recorded.
    """
    folder = Path(index_dir)
    if not corpus:
        recover(folder)
        return index.digest_in_meta(index.read_meta(folder))
    stamp = passages.stamp(Path(corpus))
    try:
        recorded = index.read_meta(folder)["corpus"]
    except InputError:  # it is not built yet
        return passages.digest(Path(corpus))
    is_same = all(recorded[key] == value for key, value in stamp.items())
    return recorded["sha256"] if is_same else passages.digest(Path(corpus))


def _matches(folder: Path, corpus: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is the index of this corpus with these settings.

    Equal size and time suffice. A copied file has another time: its digest decides.
    """
    stamp = passages.stamp(corpus)
    try:
        meta = index.read_meta(folder)
    except InputError:
        return False
    recorded = meta["corpus"]
    if not index.has_settings(meta, settings) or recorded["size"] != stamp["size"]:
        return False
    return recorded["mtime_ns"] == stamp["mtime_ns"] or recorded["sha256"] == passages.digest(
        corpus
    )
