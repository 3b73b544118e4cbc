"""Files that a run writes and reads again: JSON records, one a line, and JSON documents.

A process can be killed, and a machine can go down, while such a file is written. What is left then
is a last line without its end, NUL bytes, or two records in one line. Such lines are passed over
and counted: what they said is made again. A document is there as a whole or not at all.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from ssp_jax.runtime.files import replacing

LONGEST_LINE = 1 << 26  # bytes; an episode has some hundred thousand, so a longer line is spoilt

Fields = Mapping[str, tuple[type, ...]]  # what a record must have, and of which types


@dataclass(frozen=True)
class Line:
    """A line with its end, where the next one begins, and its record: None where it is spoilt."""

    raw: bytes
    next: int
    record: dict[str, Any] | None


def read_lines(path: Path, fields: Fields) -> Iterator[Line]:
    """The whole lines of a file, one at a time. A last one that has no end yet is left out."""
    with open(path, "rb") as file:
        while raw := file.readline(LONGEST_LINE):
            if raw.endswith(b"\n"):
                yield Line(raw, file.tell(), _record(raw, fields))
            elif _skip_line(file):
                yield Line(b"", file.tell(), None)


def _skip_line(file: IO[bytes]) -> bool:
    """Reads on to the end of a line that is too long to be kept. Whether it has one."""
    part = b""
    while not part.endswith(b"\n"):
        part = file.readline(LONGEST_LINE)
        if not part:
            return False
    return True


def _record(raw: bytes, fields: Fields) -> dict[str, Any] | None:
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(
        name in record and _is_one_of(record[name], types) for name, types in fields.items()
    )
    return record if whole else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    """By its exact type, for Python's True is an int. 1e999 becomes an infinity, which is no
    number.
    """
    return type(value) in types and not (isinstance(value, float) and not math.isfinite(value))


def count_lines(path: Path, start: int = 0) -> int:
    """The whole lines from that byte on."""
    with open(path, "rb") as file:
        file.seek(start)
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))


def write_document(path: Path, document: Any) -> None:
    """Replaces a JSON file: whoever reads it meanwhile finds the old or the new one."""
    text = json.dumps(document, indent=1) + "\n"
    with replacing(path, str(path)) as file:
        file.write(text)
