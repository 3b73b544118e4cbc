"""A corpus of the user's: a file of rows, or text files and folders of them, as passages.

A folder counts as its .txt and .md files, in the order of their names.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from ssp_jax.corpus import text_files
from ssp_jax.data import PIECE_BYTES, Document, Position, iterate_corpus
from ssp_jax.errors import InputError

SUFFIXES = (".txt", ".md", ".markdown")
_SHOWN_KINDS = 3  # of files that are left out


def read_passages(
    corpus: str | Path, position: Position | None = None
) -> Generator[Document, None, None]:
    """The passages of a corpus, in its order. Raises InputError.

    The position's digest is digest() of the corpus once all are read.
    """
    corpus = Path(corpus)
    if not corpus.is_dir():
        if is_text(corpus.name):
            yield from text_files.passages_of(corpus, corpus.name, position)
        else:
            yield from iterate_corpus(corpus, position)
        return
    for name in _checked_names(corpus):
        if position is not None:
            position.sha256.update(_header(corpus, name))
        yield from text_files.passages_of(corpus / name, name, position)


def is_text(name: str) -> bool:
    """Whether a file of this name is cut into passages; others have a passage in each row."""
    return Path(name.lower().removesuffix(".gz")).suffix in SUFFIXES


# --- folders --------------------------------------------------------------------------------------


def _names(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; without hidden ones."""

    def report(error: OSError) -> None:
        raise InputError(f"{error.filename}: expected a readable folder ({error.strerror})")

    for place, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _text_names(folder: Path) -> list[str]:
    return sorted(filter(is_text, _names(folder)))


def _checked_names(folder: Path) -> list[str]:
    """The text files of a folder. Raises InputError where there are none."""
    names = _text_names(folder)
    if not names:
        found = _kinds(folder) or "no files"
        raise InputError(
            f"{folder}: expected a folder with .txt or .md files, or a .jsonl file; found {found}"
        )
    for name in names:
        if not name.isprintable():  # such as bytes that are no UTF-8
            raise InputError(f"{folder}: expected names of files in UTF-8, found {name!r}")
    return names


def _kinds(folder: Path) -> str:
    """How many files there are of each kind that is no text, or ""."""
    others = (name for name in _names(folder) if not is_text(name))
    kinds = Counter(Path(name).suffix or "without a suffix" for name in others)
    parts = [f"{number} {kind}" for kind, number in kinds.most_common(_SHOWN_KINDS)]
    more = kinds.total() - sum(number for _, number in kinds.most_common(_SHOWN_KINDS))
    return ", ".join([*parts, f"{more} others"] if more else parts)


def left_out(corpus: str | Path) -> str:
    """A sentence on the files of a folder that are not read, or ""."""
    corpus = Path(corpus)
    kinds = _kinds(corpus) if corpus.is_dir() else ""
    return f"{corpus}: only .txt and .md files are read; left out: {kinds}" if kinds else ""


# --- which corpus it is ---------------------------------------------------------------------------


def stamp(corpus: Path) -> dict[str, Any]:
    """Size in bytes and time of modification, ns: what differs almost whenever the corpus does.

    Of a folder: the sums over its text files, and the times of all folders. Raises InputError.
    """
    try:
        stat = corpus.stat()
        if not corpus.is_dir():
            return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        names = _checked_names(corpus)
        sizes = [(corpus / name).stat().st_size for name in names]
        # A file that is renamed keeps its time, and its folder does not.
        places = {Path(name) for name in names}
        places.update(*(place.parents for place in list(places)))
        times = [(corpus / place).stat().st_mtime_ns for place in places]
        return {"size": sum(sizes), "mtime_ns": sum(times)}
    except OSError as error:
        raise _unreadable(corpus, error) from None


def digest(corpus: Path) -> str:
    """SHA-256 of the corpus as it lies on disk; of a folder, of its text files and their names."""
    found = hashlib.sha256()
    try:
        if not corpus.is_dir():
            _update(found, corpus)
        else:
            for name in _text_names(corpus):
                found.update(_header(corpus, name))
                _update(found, corpus / name)
    except OSError as error:
        raise _unreadable(corpus, error) from None
    return found.hexdigest()


def _header(folder: Path, name: str) -> bytes:
    """What stands before a file in the digest of its folder."""
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        raise _unreadable(folder / name, error) from None
    return os.fsencode(name) + f"\0{size}\0".encode()


def _update(found: Any, file: Path) -> None:
    with open(file, "rb") as raw:
        while piece := raw.read(PIECE_BYTES):
            found.update(piece)


def _unreadable(corpus: Path, error: OSError) -> InputError:
    return InputError(f"{corpus}: expected a readable corpus file ({error.strerror})")
