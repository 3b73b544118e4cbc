"""The folder of a search index: its files, and the checks between them and the kernels that use
them as addresses.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ssp_jax.errors import InputError, reading
from ssp_jax.retriever import bm25
from ssp_jax.runtime import folder_swap

# raise it whenever the files of an index change their meaning: old folders are then built anew
FORMAT = 3
PIECE = 1 << 23  # bytes of a file that one CRC-32 is of
RANGE_POSTINGS = 1 << 20  # that a thread checks at a time

META, PASSAGES, VOCABULARY = "meta.json", "passages.jsonl", "vocab.index.json"
OFFSETS = "offsets.npy"  # int64 [passages + 1], where each line of PASSAGES begins
LINE_SUMS = "line_sums.npy"  # uint32 [passages], the CRC-32 of each line
STEMMERS, STOPWORDS = ("", "english"), ("", "en")

_ARRAYS = {
    bm25.DATA: np.float32,
    bm25.ROWS: np.int32,
    bm25.STARTS: np.int64,
    bm25.HIGHEST: np.float32,
    OFFSETS: np.int64,
    LINE_SUMS: np.uint32,
}
_META_TYPES = {
    "format": int,
    "settings": dict,
    "stopwords": list,
    "corpus": dict,
    "passages": int,
    "files": dict,
    "sums": dict,
}
ANEW = "delete the index to build it anew"


# hears what to show of so many seconds, now and then
Shown = Callable[[Callable[[float], str]], None]


@dataclass(frozen=True)
class Index:
    """Arrays that are mapped from files; plain ones, for Numba does not know np.memmap."""

    meta: dict[str, Any]
    vocabulary: dict[str, int]  # word -> its term number
    data: np.ndarray  # float32, scores of the postings, term after term
    rows: np.ndarray  # uint32, their passages, ascending for each term
    starts: np.ndarray  # int64 [terms + 1]
    highest: np.ndarray  # float32 [terms]
    offsets: np.ndarray
    line_sums: np.ndarray
    passages: np.ndarray  # uint8


def checked_settings(stemmer: object, stopwords: object, k1: object, b: object) -> dict[str, Any]:
    """The settings of an index, as they stand in its meta.json."""
    if stemmer not in STEMMERS:
        raise InputError(f"retriever: stemmer is {stemmer!r}, expected one of {STEMMERS}")
    if stopwords not in STOPWORDS:
        raise InputError(f"retriever: stopwords is {stopwords!r}, expected one of {STOPWORDS}")
    if not _is_number(k1) or not _is_number(b) or not 0 <= k1 < math.inf or not 0 <= b <= 1:
        raise InputError(
            f"retriever: k1 is {k1} and b is {b}, expected a finite k1 >= 0 and b between 0 and 1"
        )
    return {"stemmer": stemmer, "stopwords": stopwords, "k1": float(k1), "b": float(b)}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- meta.json --------------------------------------------------------------------------------------------------------


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Makes an index of a folder in which all other files are written."""
    names = sorted(path.name for path in folder.iterdir() if path.name != folder_swap.MARKER)
    files = {name: (folder / name).stat().st_size for name in names}
    with _pool() as pool:
        sums = {
            name: list(pool.map(zlib.crc32, _pieces(folder / name)))
            for name in names
            if name != PASSAGES
        }
    text = json.dumps(meta | {"format": FORMAT, "files": files, "sums": sums}, indent=1)
    (folder / META).write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """InputError where there is no index of this format."""
    meta = _read_json(folder)
    fault = _fault(meta)
    if fault:
        raise InputError(
            f"{folder}: expected a search index of format {FORMAT}; its {META} {fault}"
        )
    return meta


def _read_json(folder: Path) -> Any:
    try:
        return json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _fault(meta: Any) -> str:
    """What makes it no meta.json of an index, "" for nothing."""
    if not isinstance(meta, dict):
        return "is missing or not a JSON object"
    if meta.get("format") != FORMAT:
        return f"has format {meta.get('format')!r}"
    for key, kind in _META_TYPES.items():
        if type(meta.get(key)) is not kind:
            return f'has no "{key}" that is a JSON value of type {kind.__name__}'
    settings, files, sums = meta["settings"], meta["files"], meta["sums"]
    try:
        checked_settings(**settings)
    except (InputError, TypeError) as error:
        return f'has "settings" of no index: {error}'
    if not all(isinstance(word, str) for word in meta["stopwords"]):
        return 'has "stopwords" that are not text'
    corpus = [type(meta["corpus"].get(key)) for key in ("size", "mtime_ns", "sha256")]
    if corpus != [int, int, str]:
        return 'has a "corpus" without size, mtime_ns and sha256'
    needed = {*_ARRAYS, PASSAGES, VOCABULARY}
    if not needed <= files.keys() or sums.keys() != files.keys() - {PASSAGES}:
        return f'has "files" and "sums" that do not name {", ".join(sorted(needed))}'
    if not all(_is_whole(name, size, sums.get(name, [])) for name, size in files.items()):
        return 'has "files" and "sums" that are not sizes and CRC-32s of files of the folder'
    return ""


def _is_whole(name: str, size: object, sums: object) -> bool:
    plain = type(size) is int and size > 0 and "/" not in name and isinstance(sums, list)
    return plain and all(type(value) is int for value in sums)  # type: ignore[attr-defined]


def written(folder: Path) -> list[str]:
    """The files that an index of whatever format has written; none if it is no index."""
    meta = _read_json(folder)
    if not isinstance(meta, dict) or not {"format", "settings", "corpus", "files"} <= meta.keys():
        return []
    return [META, *map(str, meta["files"])] if isinstance(meta["files"], dict) else []


# --- opening ----------------------------------------------------------------------------------------------------------


def open_index(folder: Path, progress: Shown) -> Index:
    """Maps the files and checks them. Each fault is one sentence that names the file."""
    meta = read_meta(folder)
    for name, size in meta["files"].items():
        path = folder / name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != f"{size} bytes":
            raise InputError(f"{path}: expected {size} bytes, found {found}; {ANEW}")
    with _pool() as pool:
        _check_sums(folder, meta["sums"], pool, progress)
        with reading(str(folder / VOCABULARY)):
            vocabulary = json.loads((folder / VOCABULARY).read_bytes())
        arrays = {name: _array(folder / name, dtype) for name, dtype in _ARRAYS.items()}
        passages = np.asarray(np.memmap(folder / PASSAGES, np.uint8, mode="r"))
        index = Index(
            meta=meta,
            vocabulary=vocabulary,
            data=arrays[bm25.DATA],
            rows=arrays[bm25.ROWS].view(np.uint32),
            starts=arrays[bm25.STARTS],
            highest=arrays[bm25.HIGHEST],
            offsets=arrays[OFFSETS],
            line_sums=arrays[LINE_SUMS],
            passages=passages,
        )
        _check_lengths(folder, index)
        _check_postings(folder, index, pool, progress)
    return index


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="index")


def _pieces(path: Path) -> Iterator[np.ndarray]:
    file = np.asarray(np.memmap(path, np.uint8, mode="r"))
    return (file[start : start + PIECE] for start in range(0, len(file), PIECE))


def _check_sums(
    folder: Path, sums: dict[str, list[int]], pool: ThreadPoolExecutor, progress: Shown
) -> None:
    for name, expected in sums.items():
        found = pool.map(zlib.crc32, _pieces(folder / name))
        for piece, (value, right) in enumerate(itertools.zip_longest(found, expected)):
            share = piece / len(expected)
            what = f"checking {name}: {share:.0%}"
            progress(lambda seconds, what=what: f"{what}, {seconds:.0f} s")  # type: ignore[misc]
            if value != right:
                raise InputError(
                    f"{folder / name}: expected the bytes that were written; from byte {piece * PIECE:,} on they "
                    f"differ; {ANEW}"
                )


def _array(path: Path, dtype: type) -> np.ndarray:
    with reading(str(path)):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(
            f"{path}: expected an array of {np.dtype(dtype)} with one axis, found {array.dtype} with {array.ndim}; "
            f"{ANEW}"
        )
    return np.asarray(array)


def _check_lengths(folder: Path, index: Index) -> None:
    """Everything that the kernels and the reading of passages rely on, but for the postings."""
    terms = len(index.highest)
    postings = len(index.data)
    passages = index.meta["passages"]
    size = len(index.passages)
    right = {
        bm25.HIGHEST: (
            bool((np.isfinite(index.highest) & (index.highest > 0)).all()),
            "finite scores above 0",
        ),
        VOCABULARY: (
            _numbers(index.vocabulary, terms),
            f"words with the numbers 0 to {terms - 1}, each once",
        ),
        bm25.ROWS: (len(index.rows) == postings, f"{postings} rows, one for each score"),
        bm25.STARTS: (
            _ascends(index.starts, terms, postings),
            f"{terms + 1} ascending numbers from 0 to {postings}, the number of scores",
        ),
        LINE_SUMS: (
            0 < len(index.line_sums) == passages < 2**31,
            f"{passages} numbers, one for each passage",
        ),
        OFFSETS: (
            _ascends(index.offsets, passages, size),
            f"{passages + 1} ascending numbers from 0 to {size}, the bytes of {PASSAGES}",
        ),
    }
    for name, (is_right, expected) in right.items():
        if not is_right:
            raise InputError(f"{folder / name}: expected {expected}; {ANEW}")


def _numbers(vocabulary: Any, terms: int) -> bool:
    """Whether each term has one word."""
    if not isinstance(vocabulary, dict) or {*map(type, vocabulary.values())} != {int}:
        return False
    return sorted(vocabulary.values()) == list(range(terms))


def _ascends(starts: np.ndarray, number: int, end: int) -> bool:
    """Whether these are the starts of `number` stretches, none of them empty, and the end of the
    last one.
    """
    if len(starts) != number + 1 or starts[0] != 0 or starts[-1] != end:
        return False
    return bool((starts[1:] > starts[:-1]).all())


def _check_postings(folder: Path, index: Index, pool: ThreadPoolExecutor, progress: Shown) -> None:
    """Rows are addresses in the memory of a search, and a score that is not finite wins every
    comparison or none.
    """
    passages = len(index.line_sums)
    cuts = np.searchsorted(index.starts, np.arange(0, len(index.data), RANGE_POSTINGS))
    ranges = list(itertools.pairwise([*np.unique(cuts).tolist(), len(index.highest)]))

    def check(terms: tuple[int, int]) -> int:
        return bm25.first_wrong_term(
            index.data, index.rows, index.starts, index.highest, passages, *terms
        )

    for (_, end), term in zip(ranges, pool.map(check, ranges), strict=True):
        share = end / len(index.highest)
        what = f"checking the postings: {share:.0%}"
        progress(lambda seconds, what=what: f"{what}, {seconds:.0f} s")  # type: ignore[misc]
        if term >= 0:
            raise InputError(
                f"{folder / bm25.ROWS} and {bm25.DATA}: expected for each word ascending rows below {passages} and "
                f"scores above 0, up to that in {bm25.HIGHEST}; word number {term} has others; {ANEW}"
            )
