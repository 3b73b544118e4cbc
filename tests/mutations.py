"""Accidents of files, for tests: what a disk, a transfer, or a program that writes JSON can do to
one.
"""

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        1.5,
        1e308,
        10**30,
        float("nan"),
        "",
        " ",
        "x",
        "\0",
        "\ud83d",
        "\x1b[2J",
    ),
    *([], {}, [[]], [None], {"a": 1}, ["x", 3], [[[[[]]]]], "9" * 5000, "~", "../x", "['a', 'b']"),
)
ODD_BYTES = (
    b"",
    b"\0",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b'"',
    b"{",
    b"]",
    b"NaN",
    b"\xed\xa0\xbd",
    b"\0" * 64,
)


def change_bytes(chance: random.Random, raw: bytes) -> bytes:
    """One accident of a disk or of a transfer."""
    if not raw:
        return chance.choice(ODD_BYTES)
    start = chance.randrange(len(raw))
    end = min(len(raw), start + chance.choice((1, 1, 2, 8, 100)))
    piece = raw[start:end]
    changed = {
        "cut": lambda: raw[:start],
        "flipped": lambda: (
            raw[:start] + bytes(b ^ (1 << chance.randrange(8)) for b in piece) + raw[end:]
        ),
        "removed": lambda: raw[:start] + raw[end:],
        "doubled": lambda: raw[:end] + raw[start:],
        "zeroed": lambda: raw[:start] + bytes(len(piece)) + raw[end:],
        "replaced": lambda: raw[:start] + chance.choice(ODD_BYTES) + raw[end:],
        "moved": lambda: raw[start:] + raw[:start],
        "longer": lambda: raw + chance.choice(ODD_BYTES),
        "other": lambda: chance.choice(ODD_BYTES),
    }
    return changed[chance.choice(list(changed))]()


def change_lines(chance: random.Random, raw: bytes) -> bytes:
    """One accident of a program that writes lines."""
    lines = raw.splitlines(keepends=True) or [b""]
    at, other = (chance.randrange(len(lines)) for _ in range(2))
    changed = {
        "doubled": lambda: lines.insert(at, lines[at]),
        "removed": lambda: lines.pop(at),
        "joined": lambda: lines.__setitem__(at, lines[at].rstrip(b"\r\n")),
        "swapped": lambda: lines.__setitem__(slice(None), [*lines[at:], *lines[:at]]),
        "blank": lambda: lines.insert(other, b"\n"),
        "odd": lambda: lines.insert(other, chance.choice(ODD_BYTES) + b"\n"),
    }
    changed[chance.choice(list(changed))]()
    return b"".join(lines)


def change_value(chance: random.Random, value: Any) -> Any:
    """A JSON value with one change: a key or item lost, renamed, doubled, or of an odd value."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(ODD_VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = (chance.choice(keys) for _ in range(2))
    how = chance.choice(("inside", "inside", "inside", "odd", "lost", "swapped", "new"))
    if how == "lost":
        del value[key]
    elif how == "swapped":
        value[key], value[other] = value[other], value[key]
    elif how == "new" and isinstance(value, dict):
        value[chance.choice((f"{key}x", "", "\ud83d"))] = value[key]
    elif how == "new":
        value.append(chance.choice(ODD_VALUES))
    else:
        value[key] = (
            change_value(chance, value[key]) if how == "inside" else chance.choice(ODD_VALUES)
        )
    return value


def change_json(chance: random.Random, raw: bytes) -> bytes:
    """The document, or one of the lines, with a part changed; what is no JSON any more gets another
    change.
    """
    lines = [raw] if raw.startswith(b"{\n") else raw.splitlines(keepends=True) or [b""]
    at = chance.randrange(len(lines))
    try:
        changed = change_value(chance, json.loads(lines[at]))
    except ValueError:
        return change_bytes(chance, raw)
    lines[at] = json.dumps(changed).encode() + b"\n"
    return b"".join(lines)


def change_safetensors(chance: random.Random, raw: bytes) -> bytes:
    """A part of the header changed, with its length in front made right again."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + size:
        return change_bytes(chance, raw)
    header = change_json(chance, raw[8 : 8 + size]).strip()
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def change_npy(chance: random.Random, raw: bytes) -> bytes:
    """A number of an array changed; the header stays."""
    if len(raw) < 140:
        return change_bytes(chance, raw)
    at = chance.randrange(128, len(raw))
    return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]


KINDS: dict[str, tuple[Callable[[random.Random, bytes], bytes], ...]] = {
    "bytes": (change_bytes,),
    "lines": (change_lines, change_json, change_bytes),
    "json": (change_json, change_json, change_bytes),
    "safetensors": (change_safetensors, change_bytes),
    "npy": (change_npy, change_bytes),
}


def mutate(chance: random.Random, raw: bytes, kind: str) -> bytes:
    """One to three accidents of a file of this kind; of a packed one also before it was packed."""
    if kind == "gzip":
        unpacked = gzip.decompress(raw)
        return (
            gzip.compress(mutate(chance, unpacked, "lines"))
            if chance.random() < 0.5
            else mutate(chance, raw, "bytes")
        )
    for _ in range(chance.choice((1, 1, 2, 3))):
        raw = chance.choice(KINDS[kind])(chance, raw)
    return raw
