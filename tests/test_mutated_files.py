"""Files as a crash, a bad disk or another program leaves them: each reader of the product either reads them or says in
one sentence that it can't. Nothing else may happen: no other exception, no warning, no end of the process.

Each example takes a whole file, changes it in one to three places, and reads it as a command does.
"""

import contextlib
import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import default
from ssp_jax import data, report, weights
from ssp_jax.checkpoint import check_workdir
from ssp_jax.errors import InputError
from ssp_jax.metrics import Logger

TINY = ROOT / "assets/tiny"

# --- what is done to a file ---------------------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1.5, 1e308, 10**30, float("nan"), "", " ", "x", "\0", "\ud83d", "\x1b[2J"),
    *([], {}, [[]], [None], {"a": 1}, ["x", 3], [[[[[]]]]], "9" * 5000, "~", "../x", "['a', 'b']"),
)
ODD_BYTES = (b"", b"\0", b"\n", b"\xff", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"]", b"NaN", b"\xed\xa0\xbd", b"\0" * 64)


def change_bytes(chance: random.Random, raw: bytes) -> bytes:
    """One accident of a disk or of a transfer."""
    if not raw:
        return chance.choice(ODD_BYTES)
    start = chance.randrange(len(raw))
    end = min(len(raw), start + chance.choice((1, 1, 2, 8, 100)))
    piece = raw[start:end]
    changed = {
        "cut": lambda: raw[:start],
        "flipped": lambda: raw[:start] + bytes(b ^ (1 << chance.randrange(8)) for b in piece) + raw[end:],
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
    """A JSON value with one part changed: a key or item lost, renamed, doubled, or of an odd value."""
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
        value[key] = change_value(chance, value[key]) if how == "inside" else chance.choice(ODD_VALUES)
    return value


def change_json(chance: random.Random, raw: bytes) -> bytes:
    """The document, or one of the lines, with a part changed; what is no JSON any more gets another change."""
    lines = [raw] if raw.startswith(b"{\n") else raw.splitlines(keepends=True) or [b""]
    at = chance.randrange(len(lines))
    try:
        changed = change_value(chance, json.loads(lines[at]))
    except ValueError:
        return change_bytes(chance, raw)
    lines[at] = json.dumps(changed).encode() + b"\n"
    return b"".join(lines)


CHANGES = {"json": (change_json, change_json, change_bytes), "lines": (change_lines, change_json, change_bytes)}


def mutate(chance: random.Random, raw: bytes, kind: str) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 3))):
        raw = chance.choice(CHANGES.get(kind, (change_bytes,)))(chance, raw)
    return raw


# --- the readers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """One file of a whole folder, and the reader that reads it."""

    name: str
    make: Callable[[Path], None]  # fills an empty folder
    file: str  # that is changed
    read: Callable[[Path], object]  # the folder, as a command reads it
    kind: str = "json"  # how its content is changed: json, lines, bytes, or gzip of lines
    examples: int = 40


def model(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/goldens/qwen2", folder, dirs_exist_ok=True)


def lines(name: str, *rows: Any) -> Callable[[Path], None]:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    raw = gzip.compress(text, mtime=0) if name.endswith(".gz") else text
    return lambda folder: (folder / name).write_bytes(raw) and None


def parquet(*rows: Any) -> Callable[[Path], None]:
    table = pyarrow.Table.from_pylist(list(rows))
    return lambda folder: pyarrow.parquet.write_table(table, folder / "f.parquet")


ANSWERS = ({"ground_truth": "Paris", "search_turns": 2, "sys_question_example": "1. Who?"},) * 3
QUESTIONS = (
    {"question": "Capital of France?", "golden_answers": ["Paris", "City of Paris"]},
    {"question": "Capital of France?", "possible_answers": '["Paris", "City of Paris"]'},
    {
        "data_source": "searchR1_nq",
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Answer. Question: who?"}]}],
        "reward_model": {"ground_truth": {"target": ["Paris"]}},
        "extra_info": {"question": None},
    },
)
PASSAGES = ({"id": "0", "contents": '"Paris"\nParis is a city.'}, {"id": 1, "title": "Rome", "text": "is one too"})
CONFIG = json.dumps({"steps": 3, "reward.proposer": "one_minus_mean", "reward.metric": "em", "game.train": "both"})
METRICS = tuple({"step": step, "seconds": 1.5, "reward/solver": 0.5, "update/solver/kl": None} for step in (1, 2, 3))


def questions(folder: Path, name: str = "f.jsonl") -> object:
    return data.load_question_sets({"set": str(folder / name)})


def read_weights(folder: Path) -> object:
    config = weights.read_config(folder)
    weights.check_tensors(folder, config)
    return weights.load(folder, config, None, "float32")


def log(folder: Path) -> None:
    with Logger(str(folder), 3, tensorboard=False, resume_step=2) as logger:
        logger.say("goes on")


READERS = [
    Reader("answers", lines("f.jsonl", *ANSWERS), "f.jsonl", lambda f: data.load_answers(f / "f.jsonl"), "lines", 150),
    Reader("answers in text", lines("f.txt", "Paris", "Röm", "x"), "f.txt", lambda f: data.load_answers(f / "f.txt"), "lines"),
    Reader("answers in parquet", parquet(*ANSWERS), "f.parquet", lambda f: data.load_answers(f / "f.parquet"), "bytes", 100),
    Reader("questions", lines("f.jsonl", *QUESTIONS), "f.jsonl", questions, "lines", 200),
    Reader("questions in parquet", parquet(*QUESTIONS[2:]), "f.parquet", lambda f: questions(f, "f.parquet"), "bytes", 100),
    Reader("a corpus", lines("f.jsonl", *PASSAGES), "f.jsonl", lambda f: list(data.iterate_corpus(f / "f.jsonl")), "lines", 100),
    Reader("a packed corpus", lines("f.jsonl.gz", *PASSAGES), "f.jsonl.gz", lambda f: list(data.iterate_corpus(f / "f.jsonl.gz")), "gzip", 100),
]


@contextlib.contextmanager
def only_told(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        assert str(error).strip(), name


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_changed_file_is_read_or_told(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("whole")
    reader.make(folder)
    reader.read(folder)  # the whole one
    path = folder / reader.file
    raw = path.read_bytes()

    @settings(max_examples=reader.examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1))
    def try_one(seed: int) -> None:
        chance = random.Random(seed)
        packed = reader.kind == "gzip" and chance.random() < 0.5
        path.write_bytes(gzip.compress(mutate(chance, gzip.decompress(raw), "lines")) if packed else mutate(chance, raw, reader.kind))
        with only_told(reader.name):
            reader.read(folder)

    try_one()
