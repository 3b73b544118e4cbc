"""The folder of a search index: its files, and the checks before their numbers are addresses.

meta.json is written last and has, for each file, its size and a CRC-32 of each PIECE of it. Loading
compares them, and then checks the arrays themselves, for an index may come from a stranger: a row
number is an address in memory. That reads all but the passages once, with all cores. Each line of
the passages has a CRC-32 of its own, compared when it is shown.
"""

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ssp_jax.corpus import words
from ssp_jax.data import Document, parse_document, parse_row
from ssp_jax.errors import InputError, reading
from ssp_jax.retriever import bm25
from ssp_jax.retriever.progress import Progress
from ssp_jax.retriever.settings import STEMMERS, STOPWORDS
from ssp_jax.runtime import folder_swap

# To be raised when the files of an index change their meaning: old folders are then built anew.
FORMAT = 3
PIECE = 1 << 23  # bytes of a file that one CRC-32 covers
VOCABULARY_SAMPLE = 10_000  # words of an older index that are looked at
RANGE_POSTINGS = 1 << 20  # postings that a thread checks at a time

META = "meta.json"
PASSAGES = "passages.jsonl"
VOCABULARY = "vocab.index.json"
OFFSETS = "offsets.npy"  # int64 [passages + 1], where each line of PASSAGES begins
LINE_SUMS = "line_sums.npy"  # uint32 [passages], the CRC-32 of each line

_ARRAYS = {
    bm25.SCORES: np.float32,
    bm25.ROWS: np.int32,
    bm25.STARTS: np.int64,
    bm25.MAX_IMPACT: np.float32,
    OFFSETS: np.int64,
    LINE_SUMS: np.uint32,
}
_POSTINGS = (bm25.SCORES, bm25.ROWS, bm25.STARTS, bm25.MAX_IMPACT)
_META_TYPES = {
    "format": int,
    "settings": dict,
    "stopwords": list,
    "corpus": dict,
    "passages": int,
    "files": dict,
    "sums": dict,
}
_WORD_RULES = (words.PLAIN, words.SCRIPTS)
ANEW = "delete the index to build it anew"


@dataclass(frozen=True)
class Passages:
    """The passages of an index, mapped from disk. One is known by its row in the corpus, from 0."""

    path: Path
    offsets: np.ndarray  # int64 [passages + 1], where each line of `lines` begins
    line_sums: np.ndarray  # uint32 [passages], the CRC-32 of each line
    lines: np.ndarray  # uint8, the bytes of PASSAGES

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, corpus_row: int) -> Document:
        """The passage of a row. Raises InputError if its bytes were changed on disk."""
        if not 0 <= corpus_row < len(self):
            raise IndexError(f"row {corpus_row} of an index with {len(self)} passages")
        begin, end = self.offsets[corpus_row : corpus_row + 2]
        line = self.lines[begin:end].tobytes()
        number = corpus_row + 1
        if zlib.crc32(line) != self.line_sums[corpus_row]:
            raise InputError(
                f"{self.path} line {number}: expected the bytes that were written; {ANEW}"
            )
        return parse_document(parse_row(str(self.path), number, line))


@dataclass(frozen=True)
class Index:
    """An open index. The arrays are mapped from files; plain ones, for Numba knows no np.memmap."""

    meta: dict[str, Any]
    vocabulary: dict[str, int]  # word -> its term number
    scores: np.ndarray  # float32 [postings], term after term
    rows: np.ndarray  # uint32 [postings], their corpus rows, ascending for each term
    starts: np.ndarray  # int64 [terms + 1], where the postings of each term begin
    max_impact: np.ndarray  # float32 [terms], the highest score of each term
    passages: Passages


def checked_settings(
    stemmer: object, stopwords: object, k1: object, b: object, words: object = words.SCRIPTS
) -> dict[str, Any]:
    """The settings of an index, as they stand in its meta.json. Raises InputError.

    words: the rule by which texts become words; an index without one has words.PLAIN.
    """
    if stemmer not in STEMMERS:
        raise InputError(f"retriever: stemmer is {stemmer!r}, expected one of {STEMMERS}")
    if stopwords not in tuple(STOPWORDS):
        raise InputError(
            f"retriever: stopwords is {stopwords!r}, expected one of {tuple(STOPWORDS)}"
        )
    if words not in _WORD_RULES:
        raise InputError(f"retriever: words is {words!r}, expected one of {_WORD_RULES}")
    if not _is_number(k1) or not _is_number(b) or not 0 <= k1 < math.inf or not 0 <= b <= 1:
        raise InputError(
            f"retriever: k1 is {k1} and b is {b}, expected a finite k1 >= 0 and b between 0 and 1"
        )
    return {
        "stemmer": stemmer,
        "stopwords": stopwords,
        "k1": float(k1),
        "b": float(b),
        "words": words,
    }


def has_settings(meta: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether an index has these settings; one that an earlier version built names no words."""
    named: dict[str, Any] = meta["settings"]
    return named.items() <= settings.items()


def words_of(meta: dict[str, Any]) -> str:
    """The rule by which an index has made words of its passages."""
    return str(meta["settings"].get("words", words.PLAIN))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- meta.json ---


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Completes an index: writes meta.json of a folder that has all other files."""
    names = folder_swap.written_names(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    sums = {}
    with _pool() as pool:
        for name in names:
            if name != PASSAGES:
                sums[name] = list(pool.map(zlib.crc32, _pieces(folder / name)))
    text = json.dumps(meta | {"format": FORMAT, "files": sizes, "sums": sums}, indent=1)
    (folder / META).write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of an index. Raises InputError where there is no index of this format."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        meta = None
    fault = _fault(meta)
    if fault:
        raise InputError(
            f"{folder}: expected a search index of format {FORMAT}; its {META} {fault}"
        )
    return meta


def _fault(meta: Any) -> str:
    """Why this is not the meta.json of an index, or ""."""
    if not isinstance(meta, dict):
        return "is missing or not a JSON object"
    if meta.get("format") != FORMAT:
        return f"has format {meta.get('format')!r}"
    for key, kind in _META_TYPES.items():
        if type(meta.get(key)) is not kind:
            return f'has no "{key}" that is a JSON value of type {kind.__name__}'
    try:
        checked_settings(**meta["settings"])
    except (InputError, TypeError) as error:
        return f'has "settings" of no index: {error}'
    if not all(isinstance(word, str) for word in meta["stopwords"]):
        return 'has "stopwords" that are not text'
    corpus_types = [type(meta["corpus"].get(key)) for key in ("size", "mtime_ns", "sha256")]
    if corpus_types != [int, int, str]:
        return 'has a "corpus" without size, mtime_ns and sha256'
    return _fault_of_files(meta["files"], meta["sums"])


def _fault_of_files(files: dict[str, Any], sums: dict[str, Any]) -> str:
    """Why these are not the sizes and CRC-32s of an index's files, or ""."""
    needed = {*_ARRAYS, PASSAGES, VOCABULARY}
    if not needed <= files.keys() or sums.keys() != files.keys() - {PASSAGES}:
        return f'has "files" and "sums" that do not name {", ".join(sorted(needed))}'
    for name, size in files.items():
        sums_of_file = sums.get(name, [])
        is_sound = type(size) is int and size > 0 and "/" not in name
        is_sound = is_sound and isinstance(sums_of_file, list)
        if not is_sound or not all(type(value) is int for value in sums_of_file):
            return 'has "files" and "sums" that are not sizes and CRC-32s of files of the folder'
    return ""


def written(folder: Path) -> list[str]:
    """Names of the files that an index of any format has; none if the folder is no index."""
    return folder_swap.listed_names(folder, META, ("format", "settings", "corpus"))


def takes_clauses_for_words(index: Index) -> bool:
    """Whether most words of an older index would be several by the rule of today."""
    if words_of(index.meta) != words.PLAIN:
        return False
    sample = list(itertools.islice(index.vocabulary, VOCABULARY_SAMPLE))
    several = sum(len(words.split(word)) > 1 for word in sample)
    return several > len(sample) / 2


def digest_in_meta(meta: dict[str, Any]) -> str:
    """A text that identifies what an index was built from, and how."""
    return f"{meta['settings']} {meta['stopwords']} corpus {meta['corpus']['sha256']}"


# --- opening ---


def open_index(folder: Path, progress: Progress) -> Index:
    """Maps the files and checks them. Raises InputError, one sentence that names the file."""
    meta = read_meta(folder)
    _check_sizes(folder, meta["files"])
    with _pool() as pool:
        _check_sums(folder, meta["sums"], pool, progress)
        with reading(str(folder / VOCABULARY)):
            vocabulary = json.loads((folder / VOCABULARY).read_bytes())
        arrays = {name: _open_array(folder / name, _ARRAYS[name]) for name in _POSTINGS}
        index = Index(
            meta=meta,
            vocabulary=vocabulary,
            scores=arrays[bm25.SCORES],
            rows=arrays[bm25.ROWS].view(np.uint32),
            starts=arrays[bm25.STARTS],
            max_impact=arrays[bm25.MAX_IMPACT],
            passages=_open_passages(folder),
        )
        _check_lengths(folder, index)
        _check_passages(folder, index.passages, meta["passages"])
        _check_postings(folder, index, pool, progress)
    return index


def open_passages(folder: Path, progress: Progress) -> tuple[dict[str, Any], Passages]:
    """The meta and the passages of an index alone, checked. Raises InputError."""
    meta = read_meta(folder)
    _check_sizes(folder, {name: meta["files"][name] for name in (PASSAGES, OFFSETS, LINE_SUMS)})
    with _pool() as pool:
        sums = {name: meta["sums"][name] for name in (OFFSETS, LINE_SUMS)}
        _check_sums(folder, sums, pool, progress)
    passages = _open_passages(folder)
    _check_passages(folder, passages, meta["passages"])
    return meta, passages


def _open_passages(folder: Path) -> Passages:
    return Passages(
        path=folder / PASSAGES,
        offsets=_open_array(folder / OFFSETS, _ARRAYS[OFFSETS]),
        line_sums=_open_array(folder / LINE_SUMS, _ARRAYS[LINE_SUMS]),
        lines=np.asarray(np.memmap(folder / PASSAGES, np.uint8, mode="r")),
    )


def _check_sizes(folder: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != f"{size} bytes":
            raise InputError(f"{path}: expected {size} bytes, found {found}; {ANEW}")


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="index")


def _pieces(path: Path) -> Iterator[np.ndarray]:
    """The bytes of a file, in pieces of PIECE."""
    file = np.asarray(np.memmap(path, np.uint8, mode="r"))
    for start in range(0, len(file), PIECE):
        yield file[start : start + PIECE]


def _check_sums(
    folder: Path, sums: dict[str, list[int]], pool: ThreadPoolExecutor, progress: Progress
) -> None:
    for name, expected_sums in sums.items():
        sums_on_disk = pool.map(zlib.crc32, _pieces(folder / name))
        pairs = itertools.zip_longest(sums_on_disk, expected_sums)
        for piece, (found, expected) in enumerate(pairs):
            progress.share(f"checking {name}", piece / len(expected_sums))
            if found != expected:
                raise InputError(
                    f"{folder / name}: expected the bytes that were written; "
                    f"from byte {piece * PIECE:,} on they differ; {ANEW}"
                )


def _open_array(path: Path, dtype: type) -> np.ndarray:
    with reading(str(path)):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(
            f"{path}: expected an array of {np.dtype(dtype)} with one axis, "
            f"found {array.dtype} with {array.ndim}; {ANEW}"
        )
    return np.asarray(array)


def _check(is_right: bool, path: Path, expected: str) -> None:
    if not is_right:
        raise InputError(f"{path}: expected {expected}; {ANEW}")


def _check_lengths(folder: Path, index: Index) -> None:
    """Checks what the kernels rely on, but for the postings."""
    terms = len(index.max_impact)
    postings = len(index.scores)
    is_positive = np.isfinite(index.max_impact) & (index.max_impact > 0)
    _check(bool(is_positive.all()), folder / bm25.MAX_IMPACT, "finite scores above 0")
    _check(
        _numbers_terms(index.vocabulary, terms),
        folder / VOCABULARY,
        f"words with the numbers 0 to {terms - 1}, each once",
    )
    _check(len(index.rows) == postings, folder / bm25.ROWS, f"{postings} rows, one for each score")
    _check(
        _ascends(index.starts, terms, postings),
        folder / bm25.STARTS,
        f"{terms + 1} ascending numbers from 0 to {postings}, the number of scores",
    )


def _check_passages(folder: Path, passages: Passages, number: int) -> None:
    """Checks what the reading of passages relies on. number: of passages."""
    size = len(passages.lines)
    _check(
        0 < len(passages.line_sums) == number < 2**31,
        folder / LINE_SUMS,
        f"{number} numbers, one for each passage",
    )
    _check(
        _ascends(passages.offsets, number, size),
        folder / OFFSETS,
        f"{number + 1} ascending numbers from 0 to {size}, the bytes of {PASSAGES}",
    )


def _numbers_terms(vocabulary: Any, terms: int) -> bool:
    """Whether each term has one word."""
    if not isinstance(vocabulary, dict) or {*map(type, vocabulary.values())} != {int}:
        return False
    return sorted(vocabulary.values()) == list(range(terms))


def _ascends(starts: np.ndarray, number: int, end: int) -> bool:
    """Whether these are the starts of `number` non-empty stretches, and the end of the last one."""
    if len(starts) != number + 1 or starts[0] != 0 or starts[-1] != end:
        return False
    return bool((starts[1:] > starts[:-1]).all())


def _check_postings(
    folder: Path, index: Index, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    """Checks rows and scores.

    A row is an address in the memory of a search, and a score that is not finite wins every
    comparison or none.
    """
    terms = len(index.max_impact)
    passages = len(index.passages)
    cuts = np.searchsorted(index.starts, np.arange(0, len(index.scores), RANGE_POSTINGS))
    ranges = list(itertools.pairwise([*np.unique(cuts).tolist(), terms]))

    def check(term_range: tuple[int, int]) -> int:
        return bm25.first_wrong_term(
            index.scores, index.rows, index.starts, index.max_impact, passages, *term_range
        )

    for (_, end), wrong_term in zip(ranges, pool.map(check, ranges), strict=True):
        progress.share("checking the postings", end / terms)
        if wrong_term >= 0:
            raise InputError(
                f"{folder / bm25.ROWS} and {bm25.SCORES}: expected for each word ascending rows "
                f"below {passages} and scores above 0, up to that in {bm25.MAX_IMPACT}; "
                f"word number {wrong_term} has others; {ANEW}"
            )
