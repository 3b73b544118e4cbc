"""Vectors on disk: the bytes of an unbroken build after any kill, faiss's files, and the checks."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssp_jax.errors import InputError
from ssp_jax.retriever import dense_build, vectors
from ssp_jax.retriever.encoder import Pooling
from ssp_jax.retriever.encoder_files import Recipe
from ssp_jax.retriever.progress import Progress
from ssp_jax.retriever.vectors import About

ROWS = 70  # not a multiple of the blocks below
WIDTH = 6
RECIPE = Recipe(Pooling("mean", True), "q: ", "p: ", 40)
NUMBERS = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
NUMBERS[3] = 0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 16)
    monkeypatch.setattr(dense_build, "BLOCK_ROWS", 16)


def about(dtype: str = "bfloat16", **changes: Any) -> About:
    values = dict(corpus="c" * 64, encoder="bert", digest="d" * 32, recipe=RECIPE, width=WIDTH)
    return About(**(values | {"passages": ROWS, "dtype": dtype} | changes))


def blocks_from(first: int, numbers: np.ndarray = NUMBERS) -> Iterator[np.ndarray]:
    for start in range(first * 16, len(numbers), 16):
        yield numbers[start : start + 16]


def built(folder: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    vectors.ensure(folder, about(dtype, **changes), blocks_from, "encoding")
    return folder / "dense"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(folder: Path) -> vectors.Vectors:
    return vectors.open_vectors(folder, "c" * 64, ROWS, Progress())


@pytest.mark.parametrize("dtype", vectors.DTYPES)
def test_vectors_are_read_as_they_were_written(tmp_path: Path, dtype: str) -> None:
    built(tmp_path, dtype)
    found = opened(tmp_path)
    assert found.about == about(dtype)
    step = np.abs(NUMBERS).max(axis=1, keepdims=True) * (1 / 254 if dtype == "int8" else 2**-8)
    assert (np.abs(found.float32(slice(None)) - NUMBERS) <= 1.01 * step).all()
    some = np.array([5, 3, 69])
    np.testing.assert_array_equal(found.float32(some), found.float32(slice(None))[some])


@pytest.mark.parametrize("dtype", vectors.DTYPES)
def test_a_build_that_is_killed_anywhere_ends_as_the_unbroken_one(
    tmp_path: Path, dtype: str
) -> None:
    whole = files(built(tmp_path / "whole", dtype))
    for kill_at in range(5):
        index = tmp_path / f"killed{kill_at}"
        index.mkdir()

        def killed(first: int, kill_at: int = kill_at) -> Iterator[np.ndarray]:
            for number, block in enumerate(blocks_from(first), first):
                if number == kill_at:
                    raise KeyboardInterrupt
                yield block

        with pytest.raises(KeyboardInterrupt):
            vectors.ensure(index, about(dtype), killed, "encoding")
        # What a loss of power may leave: a block and a part of one, and no sum of them.
        sizes = [about(dtype).sizes(kill_at + n)[vectors.ROWS] for n in (0, 1)]
        with open(index / vectors.BUILDING / vectors.ROWS, "ab") as file:
            file.write(b"?" * (sizes[1] - sizes[0]) + b"half a row")
        asked = []

        def rest(first: int, asked: list[int] = asked) -> Iterator[np.ndarray]:
            asked.append(first)
            return blocks_from(first)

        vectors.ensure(index, about(dtype), rest, "encoding")
        assert asked == [kill_at] and files(index / "dense") == whole
        assert [path.name for path in index.iterdir()] == ["dense"]


def test_what_is_there_is_kept_and_another_build_is_refused(tmp_path: Path) -> None:
    before = files(built(tmp_path))
    built(tmp_path)
    for changes, says in (
        (
            {"digest": "e" * 32, "encoder": "other"},
            r"by another encoder, bert \(dddd.*expected other",
        ),
        ({"corpus": "x"}, "was built with corpus 'cccc.*expected 'x', or delete"),
        ({"dtype": "int8"}, "was built with dtype 'bfloat16'; expected 'int8'"),
        (
            {"recipe": Recipe(RECIPE.pooling, "q: ", "", 40)},
            "with passage_prefix 'p: '; expected ''",
        ),
    ):
        with pytest.raises(InputError, match=says):
            built(tmp_path, **changes)
    built(tmp_path, encoder="the same elsewhere")
    assert files(tmp_path / "dense") == before


def damaged(folder: Path, name: str, change: Any) -> None:
    path = folder / "dense" / name
    path.write_bytes(change(path.read_bytes()))


def meta_of(folder: Path, **changes: Any) -> None:
    path = folder / "dense" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f / "dense"), "has no vectors; build them with python -m"),
        (
            lambda f: damaged(f, "vectors.bin", lambda b: b[:-1]),
            "vectors.bin: expected 840 bytes, f",
        ),
        (lambda f: (f / "dense/sums.bin").unlink(), "sums.bin: expected 20 bytes, found 0"),
        (
            lambda f: damaged(f, "vectors.bin", lambda b: b[:-1] + b"?"),
            "vectors.bin: expected the bytes that were written, from row 64 on",
        ),
        (lambda f: damaged(f, "meta.json", lambda b: b[:-3]), "meta.json is missing or not a JSON"),
        (lambda f: meta_of(f, format=9), "of format 1; its meta.json has format 9"),
        (lambda f: meta_of(f, width="6"), 'has no "width" of type int'),
        (lambda f: meta_of(f, dtype="int4"), "has a dtype, width or number of passages of none"),
        (
            lambda f: meta_of(f, passages=71),
            "has vectors of 71 passages of another corpus; expected",
        ),
        (lambda f: meta_of(f, corpus="x"), "of another corpus; expected those of the 70 beside"),
        (lambda f: meta_of(f, width=7), "vectors.bin: expected 980 bytes, found 840"),
    ],
)
def test_damaged_or_foreign_vectors_are_refused(tmp_path: Path, damage: Any, says: str) -> None:
    built(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", vectors.DTYPES)
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, dtype: str) -> None:
    numbers = NUMBERS.copy()
    numbers[20, 1] = np.inf
    with np.errstate(invalid="ignore"):
        vectors.ensure(tmp_path, about(dtype), lambda first: blocks_from(first, numbers), "x")
    with pytest.raises(InputError, match="found NaN or infinity, from row 16 on"):
        opened(tmp_path)


# --- faiss ---


def faiss_file(folder: Path, numbers: np.ndarray = NUMBERS, **changes: Any) -> Path:
    """As faiss 1.15.1 writes an IndexFlatIP."""
    rows, width = numbers.shape
    fields = {"kind": b"IxFI", "d": width, "n": rows, "a": 1 << 20, "b": 1 << 20}
    fields |= {"trained": True, "metric": 0, "count": rows * width}
    header = struct.pack("<4siqqq?iQ", *(fields | changes).values())
    assert len(header) == 45
    (folder / "flat.index").write_bytes(header + numbers.tobytes())
    return folder / "flat.index"


def test_a_file_of_faiss_gives_the_vectors_of_a_build(tmp_path: Path) -> None:
    file = faiss_file(tmp_path)
    rows = dense_build.open_faiss(file, WIDTH, ROWS)
    np.testing.assert_array_equal(rows, NUMBERS)
    (tmp_path / "imported").mkdir()
    imported = tmp_path / "imported"
    vectors.ensure(
        imported, about(), lambda first: dense_build._imported_blocks(file, rows, first), "x"
    )
    assert files(imported / "dense") == files(built(tmp_path / "built"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": b"IHNf"}, r"is of type IndexHNSWFlat; expected faiss's IndexFlatIP"),
        ({"kind": b"IxF2"}, "is of type IndexFlatL2"),
        ({"kind": b"\x00\x01\x02\x03"}, r"is of type b'\\x00"),
        ({"d": 7}, "has the width 7; expected 6"),
        ({"n": 69}, "has the number of vectors 69; expected 70"),
        ({"a": 5}, "has the constants .*; expected"),
        ({"trained": False}, "has the flag of training False; expected True"),
        ({"metric": 1}, "has the metric 1; expected 0"),
        ({"count": 419}, "has the number of numbers 419; expected 420"),
    ],
)
def test_other_files_of_faiss_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        dense_build.open_faiss(faiss_file(tmp_path, **changes), WIDTH, ROWS)


def test_a_file_of_faiss_that_is_cut_or_not_finite_is_refused(tmp_path: Path) -> None:
    file = faiss_file(tmp_path)
    whole = file.read_bytes()
    for content, says in (
        (whole[:-4], "number of bytes 1721; expected 1725"),
        (whole + b"x", "number of bytes 1726; expected 1725"),
        (whole[:20], "is truncated: it has 20 bytes"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=says):
            dense_build.open_faiss(file, WIDTH, ROWS)
    numbers = NUMBERS.copy()
    numbers[41, 2] = np.nan
    rows = dense_build.open_faiss(faiss_file(tmp_path, numbers), WIDTH, ROWS)
    with pytest.raises(InputError, match="vector 41 has NaN or infinity"):
        list(dense_build._imported_blocks(file, rows, 0))
