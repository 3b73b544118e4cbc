"""Files that a run writes and reads again: JSON records, one a line, and JSON documents.

A process can be killed, and a machine can go down, while such a file is written. That leaves a last
line without its end, NUL bytes, or two records in one line. Readers skip such lines and count them;
their records are made again. A document exists as a whole or not at all.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from ssp_jax.runtime.files import replacing

LONGEST_LINE = 1 << 26  # bytes; an episode has some hundred thousand, so a longer line is spoilt

Fields = Mapping[str, tuple[type, ...]]  # names that a record must have -> types of their values


@dataclass(frozen=True)
class Line:
    """One whole line of a file."""

    raw: bytes  # its newline included
    next: int  # byte at which the next line begins
    record: dict[str, Any] | None  # None where the line is spoilt


def read_lines(path: Path, fields: Fields) -> Iterator[Line]:
    """The whole lines of a file, one at a time; a last line without its newline is left out."""
    with open(path, "rb") as file:
        while raw := file.readline(LONGEST_LINE):
            if raw.endswith(b"\n"):
                yield Line(raw, file.tell(), _record(raw, fields))
            elif _skip_line(file):
                yield Line(b"", file.tell(), None)


def read_to_append(path: Path, fields: Fields) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and the number of its spoilt lines.

    Cuts off a last line without its newline, so that a new line can follow.
    """
    found = []
    spoilt = 0
    end = 0
    for line in read_lines(path, fields):
        end = line.next
        if line.record is None:
            spoilt += 1
        else:
            found.append(line.record)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return found, spoilt


def _skip_line(file: IO[bytes]) -> bool:
    """Skips the rest of a line that is too long. Whether it has a newline."""
    while piece := file.readline(LONGEST_LINE):
        if piece.endswith(b"\n"):
            return True
    return False


def _record(raw: bytes, fields: Fields) -> dict[str, Any] | None:
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    for name, types in fields.items():
        if name not in record or not _is_one_of(record[name], types):
            return None
    return record


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    """By exact type: True would be an int. 1e999 is read as an infinity, which is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return type(value) in types


def count_lines(path: Path, start: int = 0) -> int:
    """The number of whole lines from byte `start` on."""
    with open(path, "rb") as file:
        file.seek(start)
        pieces = iter(lambda: file.read(1 << 20), b"")
        return sum(piece.count(b"\n") for piece in pieces)


def write_document(path: Path, document: Any) -> None:
    """Replaces a JSON file; a concurrent reader finds the old or the new content."""
    text = json.dumps(document, indent=1) + "\n"
    with replacing(path, str(path)) as file:
        file.write(text)
