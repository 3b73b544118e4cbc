"""Ranking equals a BM25 written out by hand; ties, unknown words, damaged or foreign indexes."""

import fcntl
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.retriever import __main__ as command
from ssp_jax.retriever import index as index_files
from ssp_jax.retriever import progress, search, settings
from ssp_jax.retriever.build import build_index, ensure_index
from ssp_jax.retriever.search import SLICES_PER_THREAD, QueryCache, Retriever, open_retriever
from ssp_jax.runtime.folder_swap import MARKER

PLAIN: dict[str, Any] = {"stemmer": "", "stopwords": "", "k1": 0.9, "b": 0.4}
ENGLISH: dict[str, Any] = {"stemmer": "english", "stopwords": "en", "k1": 1.5, "b": 0.75}
WORDS = [f"w{i:02d}" for i in range(40)]


def corpus_of(folder: Path, texts: list[str], name: str = "corpus.jsonl") -> Path:
    with open(folder / name, "w") as file:
        for i, text in enumerate(texts):
            contents = f'"{text.split()[0]}"\n{text}'
            file.write(json.dumps({"id": f"p{i}", "contents": contents}) + "\n")
    return folder / name


def random_texts(number: int, seed: int = 0) -> list[str]:
    """Few words and few lengths, so that scores tie often."""
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        words = rng.choices(WORDS, weights=range(1, 41), k=rng.choice([3, 8, 20]))
        texts.append(" ".join(words))
    return texts


def brute_force(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """Lucene's BM25: the sum over words of idf * tf / (tf + k1 * (1 - b + b * length / mean)).

    idf = ln(1 + (docs - n + 0.5) / (n + 0.5)) of a word in n documents.
    """
    docs = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean = sum(map(len, docs)) / len(docs)
    scores = [0.0] * len(docs)
    for word in re.findall(r"\w\w+", query.lower()):
        n = sum(word in doc for doc in docs)
        idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
        for row, doc in enumerate(docs):
            tf = doc.count(word)
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * len(doc) / mean))
    return scores


def ids(retriever: Retriever, query: str, top_k: int) -> list[str]:
    return [document.id for document in retriever.search([query], top_k)[0]]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_equals_brute_force(tmp_path):
    texts = random_texts(120)
    retriever = open_retriever(corpus_of(tmp_path, texts), tmp_path / "index", **PLAIN)
    assert len(retriever) == 120
    indexed = [f"{text.split()[0]} {text}" for text in texts]  # title and text
    for query in [*random_texts(20, seed=1), "W01 w01 unknown w02", "w39"]:
        expected = brute_force(indexed, query, PLAIN["k1"], PLAIN["b"])
        hits = retriever.hits([query], 120)[0]
        rows = [row for row, _ in hits]
        scores = [score for _, score in hits]
        np.testing.assert_allclose(scores, [expected[row] for row in rows], rtol=1e-5)
        assert set(rows) == {row for row, score in enumerate(expected) if score > 0}
        # what differs only by float32 rounding is a tie
        rounded = [round(score, 4) for score in expected]
        best = sorted(range(120), key=lambda row: (-rounded[row], row))
        for top_k in (1, 3, 10):
            found = [rounded[int(name[1:])] for name in ids(retriever, query, top_k)]
            assert found == [rounded[row] for row in best[:top_k] if rounded[row] > 0]


def test_ties_go_to_the_lower_row_wherever_they_are_cut(tmp_path):
    texts = ["moon sun", "river lake", "moon sun", "moon moon moon sun", "river lake"]
    texts += ["moon sun", "moon sun"]
    retriever = open_retriever(corpus_of(tmp_path, texts), tmp_path / "index", **PLAIN)
    order = ["p3", "p0", "p2", "p5", "p6"]
    for top_k in range(1, 6):
        assert ids(retriever, "moon", top_k) == order[:top_k]
    large = open_retriever(corpus_of(tmp_path, ["same words"] * 3000), tmp_path / "large", **PLAIN)
    assert ids(large, "words", 5) == ["p0", "p1", "p2", "p3", "p4"]


def test_only_matching_passages_come_back(tmp_path):
    texts = ["moon sun", "river lake", "moon river"]
    retriever = open_retriever(corpus_of(tmp_path, texts), tmp_path / "index", **PLAIN)
    assert ids(retriever, "lake", 3) == ["p1"]  # not padded with passages of score 0
    assert ids(retriever, "moon", 50) == ["p0", "p2"]  # more asked for than there are passages
    for query in ("unknown words", "", "   ", "?!", "x", "\ud800"):
        assert ids(retriever, query, 3) == []
    assert ids(retriever, "unknown lake", 3) == ["p1"]
    assert retriever.search([], 3) == []


def test_stemmer_and_stopwords(tmp_path):
    corpus = corpus_of(tmp_path, ["the running dogs", "the cat"])
    english = open_retriever(corpus, tmp_path / "english", **ENGLISH)
    assert ids(english, "dog runs", 2) == ["p0"] and ids(english, "the", 2) == []
    plain = open_retriever(corpus, tmp_path / "plain", **PLAIN)
    assert ids(plain, "dog runs", 2) == [] and sorted(ids(plain, "the", 2)) == ["p0", "p1"]


def test_documents_and_cache(tmp_path):
    rows = [
        {"id": "a", "contents": '"Zürich"\n Stadt\nder  Schweiz \n'},
        {"id": 5, "contents": "Bern\nHauptstadt"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    retriever = open_retriever(tmp_path / "c.jsonl", tmp_path / "index", **PLAIN)
    zurich = Document("a", '"Zürich"', " Stadt\nder  Schweiz \n")
    assert retriever.document(0) == zurich
    assert retriever.document(1) == Document("5", "Bern", "Hauptstadt")
    for row in (-1, 2):
        with pytest.raises(IndexError):
            retriever.document(row)
    first = retriever.search(["zürich", "bern", "zürich"], 1)
    assert first[0] == first[2] == [zurich]
    first[0].clear()  # a caller that changes its list does not change the cache
    assert retriever.search(["zürich"], 1) == [[zurich]]


def test_the_cache_forgets_what_was_asked_longest_ago(monkeypatch):
    monkeypatch.setattr(search, "_ENTRY_BYTES", 0)
    one = sys.getsizeof("a") + 100
    asked: list[str] = []
    cache: QueryCache[str] = QueryCache(2 * one, lambda result: 100)

    def find(queries: list[str], top_k: int) -> list[str]:
        asked.append("".join(queries))
        return [f"{query}{top_k}" for query in queries]

    assert cache.get(["a", "b", "a"], 3, find) == ["a3", "b3", "a3"]
    # now a is younger than b
    assert cache.get(["a"], 3, find) + cache.get(["c"], 3, find) == ["a3", "c3"]
    assert cache.get(["a", "c"], 3, find) == ["a3", "c3"] and asked == ["ab", "c"]
    assert cache.get(["b"], 3, find) + cache.get(["b"], 1, find) == ["b3", "b1"]
    assert asked == ["ab", "c", "b", "b"]


def test_the_cache_counts_bytes(tmp_path):
    """Of queries and of results. A result larger than the cache is returned and not cached."""
    sizes: list[int] = []
    cache: QueryCache[bytes] = QueryCache(100_000, len)

    def find(queries: list[str], top_k: int) -> list[bytes]:
        sizes.append(len(queries))
        return [bytes(top_k) for _ in queries]

    for top_k, fits in ((40_000, True), (99_000, True), (100_000, False)):
        sizes.clear()
        results = [cache.get(["moon"], top_k, find) for _ in range(2)]
        assert results == [[bytes(top_k)]] * 2
        assert len(sizes) == 2 - fits and cache._bytes <= 100_000
    sizes.clear()
    long = "moon " * 20_000
    assert cache.get([long], 1, find) == cache.get([long], 1, find) and sizes == [1, 1]
    assert cache._bytes == 0 and not cache._results


def test_a_query_of_any_length_is_searched_in_no_time(tmp_path):
    """Only its beginning is searched and cached."""
    corpus = corpus_of(tmp_path, [*random_texts(200), "sun"])
    retriever = open_retriever(corpus, tmp_path / "index", **PLAIN)
    beginning = " ".join(random_texts(400, seed=3))
    assert len(beginning) > search.QUERY_CHARACTERS
    began = time.monotonic()
    found = retriever.hits([beginning + " sun" * 2_500_000, beginning + " moon"], 3)
    assert time.monotonic() - began < 1
    assert found[0] == found[1] and len(retriever._cache._results) == 1
    assert found[0] == retriever.hits([beginning[: search.QUERY_CHARACTERS]], 3)[0]


def test_threads_get_the_serial_results(tmp_path):
    corpus = corpus_of(tmp_path, random_texts(200))
    queries = random_texts(100, seed=2)
    settings = {**PLAIN, "stemmer": "english"}
    serial = open_retriever(corpus, tmp_path / "index", **settings).search(queries, 3)
    shared = Retriever.load(tmp_path / "index")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda query: shared.search([query], 3)[0], queries))
    assert results == serial


def test_a_large_batch_is_searched_in_parts_by_several_threads(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, random_texts(200))
    queries = random_texts(50, seed=2)
    open_retriever(corpus, tmp_path / "index", **PLAIN)
    alone = Retriever.load(tmp_path / "index", threads=1).hits(queries, 3)
    monkeypatch.setattr("ssp_jax.retriever.search.MIN_SLICE_POSTINGS", 1)
    # most words leave the cache on the way
    monkeypatch.setattr("ssp_jax.retriever.bm25.QUERY_WORDS", 3)
    threaded = Retriever.load(tmp_path / "index", threads=3)
    slices = []
    search_slice = Retriever._search_slice

    def watched(self, batch, first, last):
        slices.append((first, last))
        search_slice(self, batch, first, last)

    monkeypatch.setattr(Retriever, "_search_slice", watched)
    assert threaded.hits(queries, 3) == alone and len({hits for hits in alone}) > 20
    slices.sort()
    assert len(slices) == 3 * SLICES_PER_THREAD
    assert [last for _, last in slices] == [first for first, _ in slices[1:]] + [50]
    assert 0 < len(threaded._vocabulary) <= 3


def test_threads_that_do_not_come_are_not_waited_for(tmp_path, monkeypatch):
    """As on a machine whose cores are all at work: the caller searches every slice itself."""
    corpus = corpus_of(tmp_path, random_texts(200))
    queries = random_texts(50, seed=2)
    gate = threading.Event()
    alone = open_retriever(corpus, tmp_path / "index", **PLAIN, threads=1).hits(queries, 3)
    monkeypatch.setattr("ssp_jax.retriever.search.MIN_SLICE_POSTINGS", 1)
    threaded = Retriever.load(tmp_path / "index", threads=3)
    busy = [threaded._pool.submit(gate.wait, 60) for _ in range(3)]
    assert threaded.hits(queries, 3) == alone and not any(future.done() for future in busy)
    gate.set()


def test_built_once_then_loaded(tmp_path):
    corpus = corpus_of(tmp_path, random_texts(30))
    index = tmp_path / "deep" / "index"
    before = open_retriever(corpus, index, **PLAIN).search(WORDS, 3)
    stamp = (index / "meta.json").stat().st_mtime_ns
    assert open_retriever(corpus, index, **PLAIN).search(WORDS, 3) == before
    os.utime(corpus, ns=(1, 1))  # copied elsewhere: other time, same bytes
    assert open_retriever(corpus, index, **PLAIN).search(WORDS, 3) == before
    assert (index / "meta.json").stat().st_mtime_ns == stamp
    assert names_in(index.parent) == ["index", "index.lock"]
    (index.parent / "index.lock").unlink()
    open_retriever(corpus, index, **PLAIN)
    # a right index is only read, also from a read-only disk
    assert not (index.parent / "index.lock").exists()


@pytest.mark.parametrize("what, builds", [(open_retriever, 1), (build_index, 2)])
def test_who_comes_at_the_same_time_waits(tmp_path, monkeypatch, capsys, what, builds):
    """A run finds what another has built; `build` builds anew. They do not write at once."""
    corpus = corpus_of(tmp_path, random_texts(30))
    index = tmp_path / "index"
    written: list[Path] = []
    write = index_files.write_meta

    def watched(folder: Path, meta: dict[str, Any]) -> None:
        written.append(folder)
        write(folder, meta)

    monkeypatch.setattr(index_files, "write_meta", watched)
    with ThreadPoolExecutor(2) as pool:
        with open(tmp_path / "index.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            both = [pool.submit(what, corpus, index, **PLAIN) for _ in range(2)]
            printed = ""
            end = time.monotonic() + 60
            while printed.count(f"ssp_jax: waiting for the process that builds {index}\n") < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
                printed += capsys.readouterr().err
            assert not index.exists()  # they have seen that there is no index, and wait
        for other in both:
            other.result(timeout=60)
    assert len(written) == builds and len(Retriever.load(index)) == 30
    assert names_in(tmp_path) == ["corpus.jsonl", "index", "index.lock"]


def test_rebuilt_when_corpus_settings_or_format_differ(tmp_path):
    corpus = corpus_of(tmp_path, ["moon sun", "moon lake"])
    index = tmp_path / "index"
    open_retriever(corpus, index, **PLAIN)
    corpus_of(tmp_path, ["star sun", "moon lake"])  # as many bytes
    os.utime(corpus, ns=(1, 1))
    assert ids(open_retriever(corpus, index, **PLAIN), "moon", 2) == ["p1"]
    corpus_of(tmp_path, ["star sun", "moon lake", "moon"])
    os.utime(corpus, ns=(1, 1))  # other size, same time
    assert ids(open_retriever(corpus, index, **PLAIN), "moon", 2) == ["p2", "p1"]
    assert ids(open_retriever(corpus, index, **ENGLISH), "moons", 1) == ["p2"]
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(InputError, match="format"):
        Retriever.load(index)
    assert len(open_retriever(corpus, index, **ENGLISH)) == 3
    assert names_in(tmp_path) == ["corpus.jsonl", "index", "index.lock"]


FILES = [*index_files._ARRAYS, "passages.jsonl", "vocab.index.json", "params.index.json"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """An index that tests copy before they damage it."""
    folder = tmp_path_factory.mktemp("built")
    build_index(corpus_of(folder, random_texts(30)), folder / "index", **PLAIN)
    return folder / "index"


def copied(built: Path, folder: Path) -> Path:
    return Path(shutil.copytree(built, folder / "index"))


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_missing_file_is_refused(built, tmp_path, name):
    index = copied(built, tmp_path)
    (index / name).write_bytes((index / name).read_bytes()[:-7])
    with pytest.raises(
        InputError, match=rf"{name}: expected \d+ bytes, found \d+ bytes; delete the index"
    ):
        Retriever.load(index)
    with pytest.raises(InputError, match=name):
        open_retriever(built.parent / "corpus.jsonl", index, **PLAIN)
    (index / name).unlink()
    with pytest.raises(InputError, match=f"{name}.*no such file"):
        Retriever.load(index)


@pytest.mark.parametrize("name", sorted({*FILES} - {"passages.jsonl"}))
def test_bytes_that_are_not_those_written_are_refused(built, tmp_path, name, monkeypatch):
    """One flipped bit anywhere, or the zeros that a crash of the machine may leave of a file."""
    index = copied(built, tmp_path)
    original = (index / name).read_bytes()
    rng = random.Random(name)
    for at in [0, len(original) - 1, *rng.sample(range(len(original)), 6)]:
        changed = bytearray(original)
        changed[at] ^= 1 << rng.randrange(8)
        (index / name).write_bytes(changed)
        with pytest.raises(
            InputError, match=f"{name}: expected the bytes that were written; from byte 0 on they"
        ):
            Retriever.load(index)
    (index / name).write_bytes(bytes(len(original)))
    with pytest.raises(
        InputError, match=f"{name}: expected the bytes.*delete the index to build it anew"
    ):
        Retriever.load(index)


def test_each_piece_of_a_file_is_compared(built, tmp_path, monkeypatch):
    monkeypatch.setattr(index_files, "PIECE", 64)
    build_index(built.parent / "corpus.jsonl", tmp_path / "index", **PLAIN)
    path = tmp_path / "index" / "data.csc.index.npy"
    raw = bytearray(path.read_bytes())
    raw[64 * 3 + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        InputError, match=r"data\.csc\.index\.npy: expected the bytes.*from byte 192 on"
    ):
        Retriever.load(tmp_path / "index")


def test_a_passage_that_is_not_as_written_is_refused_when_it_is_shown(built, tmp_path):
    index = copied(built, tmp_path)
    raw = bytearray((index / "passages.jsonl").read_bytes())
    raw[raw.index(b"\n") + 40] ^= 1  # of the second line
    (index / "passages.jsonl").write_bytes(raw)
    retriever = Retriever.load(index)
    assert retriever.document(0).id == "p0" and retriever.document(2).id == "p2"
    with pytest.raises(
        InputError, match=r"passages\.jsonl line 2: expected the bytes that were written"
    ):
        retriever.document(1)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def make(index: Path) -> None:
        np.save(index / name, change(np.load(index / name)))

    return make


def put(name: str, at: int, value: float) -> Callable[[Path], None]:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return changed(name, change)


def words(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(index: Path) -> None:
        path = index / "vocab.index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return make


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda index: (index / name).write_bytes(content) and None


DATA = "data.csc.index.npy"
ROWS = "indices.csc.index.npy"
STARTS = "indptr.csc.index.npy"
IMPACTS = "highest.npy"
OFFSETS = "offsets.npy"
SUMS = "line_sums.npy"
WORDS_FILE = "vocab.index.json"
HOSTILE = {
    "a row beyond the passages": (put(ROWS, -1, 30), "ascending rows below 30"),
    "a row far away": (put(ROWS, 0, 2**31 - 1), "ascending rows"),
    "a negative row": (put(ROWS, 0, -1), "ascending rows"),
    "a row twice": (changed(ROWS, lambda a: np.repeat(a[::2], 2)[: len(a)]), "ascending rows"),
    "rows as int64": (
        changed(ROWS, lambda a: a.astype(np.int64)),
        f"{ROWS}: expected an array of int32",
    ),
    "rows in two axes": (
        changed(ROWS, lambda a: a[:, None]),
        f"{ROWS}.*one axis, found int32 with 2",
    ),
    "rows of the other byte order": (
        changed(ROWS, lambda a: a.astype(">i4")),
        f"{ROWS}: expected an array of int32",
    ),
    "rows too few": (
        changed(ROWS, lambda a: a[:-1]),
        f"{ROWS}: expected \\d+ rows, one for each score",
    ),
    "a score of NaN": (put(DATA, 5, math.nan), "scores above 0"),
    "an endless score": (put(DATA, 5, math.inf), "scores above 0"),
    "a negative score": (put(DATA, 5, -1), "scores above 0"),
    "a score above the highest": (put(DATA, 5, 99), "up to that in highest.npy"),
    "scores as float64": (
        changed(DATA, lambda a: a.astype(np.float64)),
        f"{DATA}: expected an array of float32",
    ),
    "scores as objects": (changed(DATA, lambda a: a.astype(object)), f"{DATA} cannot be read"),
    "scores as text": (
        changed(DATA, lambda a: a.astype("U9")),
        f"{DATA}: expected an array of float32",
    ),
    "no array": (raw(DATA, b"PK\x03\x04" + bytes(200)), f"{DATA} cannot be read"),
    "a header that is no dict": (
        raw(DATA, b"\x93NUMPY\x01\x00\x10\x00((((((((((((((({{"),
        f"{DATA} cannot be read",
    ),
    "a start beyond the end": (put(STARTS, 3, 2**40), f"{STARTS}: expected \\d+ ascending"),
    "a negative start": (put(STARTS, 3, -5), f"{STARTS}: expected"),
    "starts too few": (changed(STARTS, lambda a: a[:-1]), f"{STARTS}: expected"),
    "an end too large": (put(STARTS, -1, 2**40), f"{STARTS}: expected"),
    "a first start that is not 0": (put(STARTS, 0, 1), f"{STARTS}: expected"),
    "a word without postings": (
        changed(STARTS, lambda a: np.r_[a[:2], a[1], a[3:]]),
        f"{STARTS}: expected",
    ),
    "a highest score of NaN": (put(IMPACTS, 0, math.nan), f"{IMPACTS}: expected finite scores"),
    "highest scores too few": (changed(IMPACTS, lambda a: a[:-1]), f"{WORDS_FILE}|{STARTS}"),
    "an offset beyond the file": (
        put(OFFSETS, 7, 2**50),
        f"{OFFSETS}: expected 31 ascending numbers",
    ),
    "an offset before the one before": (put(OFFSETS, 7, 1), f"{OFFSETS}: expected"),
    "an end beyond the file": (put(OFFSETS, -1, 2**50), f"{OFFSETS}: expected"),
    "sums too few": (changed(SUMS, lambda a: a[:-1]), f"{SUMS}: expected 30 numbers"),
    "words as a list": (words(list), f"{WORDS_FILE}: expected words"),
    "a word of another's number": (
        words(lambda v: dict.fromkeys(v, 1) | {"w39": 0}),
        f"{WORDS_FILE}: expected words",
    ),
    "a word of number 1.0": (
        words(lambda v: {w: n or 0.0 for w, n in v.items()}),
        f"{WORDS_FILE}: expected words",
    ),
    "a word of number true": (
        words(lambda v: {w: n == 1 or n for w, n in v.items()}),
        f"{WORDS_FILE}: expected words",
    ),
    "a huge number": (
        words(lambda v: {w: n or 10**30 for w, n in v.items()}),
        f"{WORDS_FILE}: expected words",
    ),
    "a word too many": (words(lambda v: v | {"more": len(v)}), f"{WORDS_FILE}: expected words"),
    "a word too few": (
        words(lambda v: dict(list(v.items())[:-1])),
        f"{WORDS_FILE}: expected words",
    ),
    "words that nest deeply": (raw(WORDS_FILE, b"[" * 99_999), f"{WORDS_FILE} cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_of_a_stranger_is_checked_before_its_numbers_are_addresses(built, tmp_path, name):
    """Its sizes and sums agree with its files, so only their contents can show it."""
    index = copied(built, tmp_path)
    damage, said = HOSTILE[name]
    damage(index)
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").unlink()
    index_files.write_meta(index, meta)
    with pytest.raises(InputError, match=said) as caught:
        Retriever.load(index)
    assert str(index) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("format", 2),
        ("format", "3"),
        ("format", None),
        ("settings", None),
        ("settings", {"k1": 1.5}),
        ("settings", PLAIN | {"k1": "1.5"}),
        ("settings", PLAIN | {"stemmer": "klingon"}),
        ("stopwords", [1]),
        ("corpus", {}),
        ("passages", "30"),
        ("passages", True),
        ("files", {}),
        ("files", {"../x": 1}),
        ("sums", {}),
        ("sums", dict.fromkeys(FILES, ["x"])),
    ],
)
def test_a_damaged_meta_is_refused(built, tmp_path, key, value):
    index = copied(built, tmp_path)
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(
        InputError, match="index: expected a search index of format 3; its meta.json"
    ):
        Retriever.load(index)


def test_failed_build_leaves_the_old_index(tmp_path):
    corpus = corpus_of(tmp_path, ["moon sun"] * 3)
    index = tmp_path / "index"
    build_index(corpus, index, **PLAIN)
    with open(corpus, "a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(InputError, match="line 4"):
        build_index(corpus, index, **PLAIN)
    assert len(Retriever.load(index)) == 3
    assert names_in(tmp_path) == ["corpus.jsonl", "index", "index.lock"]


@pytest.mark.parametrize("build", [build_index, ensure_index])
def test_a_corpus_that_cannot_be_read_leaves_nothing_behind(tmp_path, build):
    with pytest.raises(InputError, match="none.jsonl: expected a readable corpus"):
        build(tmp_path / "none.jsonl", tmp_path / "index", **PLAIN)
    assert names_in(tmp_path) == []


def test_killed_build_is_repeated(tmp_path):
    """At its end, when the folder has another name for a moment, and in the middle."""
    corpus = corpus_of(tmp_path, ["moon sun"] * 3)
    index = tmp_path / "index"
    build_index(corpus, index, **PLAIN)
    for name in ("index.old", "index.building"):
        shutil.copytree(index, tmp_path / name)
        (tmp_path / name / MARKER).touch()
    shutil.rmtree(index)
    assert len(Retriever.load(index)) == 3 and not (tmp_path / "index.old").exists()
    assert len(open_retriever(corpus, index, **ENGLISH)) == 3
    assert names_in(tmp_path) == ["corpus.jsonl", "index", "index.lock"]


def test_an_empty_folder_is_taken(tmp_path):
    corpus = corpus_of(tmp_path, ["moon sun"])
    (tmp_path / "empty").mkdir()
    assert len(open_retriever(corpus, tmp_path / "empty", **PLAIN)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"stemmer": "klingon"},
        {"stopwords": "xx"},
        {"k1": -1.0},
        {"k1": math.inf},
        {"b": 1.5},
        {"b": float("nan")},
    ],
)
def test_wrong_settings(tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change))):
        open_retriever(corpus_of(tmp_path, ["moon sun"]), tmp_path / "index", **(PLAIN | change))


def test_import_touches_neither_bm25s_nor_jax():
    """`import bm25s` runs a JAX op, after which jax.distributed.initialize() raises."""
    code = "import sys, ssp_jax.retriever; print({'bm25s', 'Stemmer', 'jax'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_a_corpus_from_a_pipe(tmp_path):
    """It is read once, and the index is that of the file with the same bytes."""
    corpus = corpus_of(tmp_path, random_texts(300))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, corpus.read_bytes())
        build_index(pipe, tmp_path / "index", **PLAIN)
    stamp = (tmp_path / "index" / "meta.json").stat().st_mtime_ns
    assert len(open_retriever(corpus, tmp_path / "index", **PLAIN)) == 300
    assert (tmp_path / "index" / "meta.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        InputError, match=r"pipe: expected a file or a folder, .* a pipe can be read only once"
    ):
        open_retriever(pipe, tmp_path / "index", **PLAIN)


@pytest.mark.parametrize(
    "pack", [lambda raw: raw, gzip.compress, lambda raw: gzip.compress(raw) * 2 + bytes(512)]
)
def test_the_digest_is_of_the_file_as_it_lies_on_disk(tmp_path, pack):
    raw = pack(corpus_of(tmp_path, random_texts(3000)).read_bytes())
    path = tmp_path / ("c.jsonl" if raw[:1] == b"{" else "c.jsonl.gz")
    path.write_bytes(raw)
    build_index(path, tmp_path / "index", **PLAIN)
    source = json.loads((tmp_path / "index" / "meta.json").read_text())["corpus"]
    assert source["size"] == len(raw) and source["sha256"] == hashlib.sha256(raw).hexdigest()


READ_ONLY = """
import numpy as np
from numba.core.caching import NullCache
from ssp_jax.retriever import bm25
kernel, arrays = bm25.first_wrong_term, [np.ones(2, kind) for kind in ("f4", "u4")]
print(bm25.__file__, isinstance(kernel._cache, NullCache))
print(kernel(*arrays, np.array([0, 1, 2]), np.ones(2, "f4"), 2, 0, 2))
"""


def test_an_installation_that_cannot_be_written_compiles_each_time(tmp_path):
    """Numba finds no folder for its cache, neither in the package nor in a home.

    (Root may write everywhere, so a file stands where the folder would be.)
    """
    source = Path(command.__file__).parents[1]
    package = shutil.copytree(source, tmp_path / "ssp_jax", ignore=lambda *_: ["__pycache__"])
    (package / "retriever/__pycache__").write_text("no folder")
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path)}
    run: dict[str, Any] = {
        "env": os.environ | nowhere,
        "cwd": tmp_path,
        "capture_output": True,
        "text": True,
    }
    done = subprocess.run([sys.executable, "-c", READ_ONLY], timeout=300, **run)
    assert done.stdout == f"{package}/retriever/bm25.py True\n-1\n", done.stderr


def test_silent(tmp_path, capfd, caplog):
    corpus = corpus_of(tmp_path, random_texts(30))
    open_retriever(corpus, tmp_path / "index", **ENGLISH).search(WORDS, 3)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_command_line(tmp_path, monkeypatch, capsys):
    """Long work prints its progress; a build and a search print their results."""
    corpus = corpus_of(tmp_path, ["moon sun"] * 3000)
    index = tmp_path / "index"
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    assert command.main(["build", f"--corpus={corpus}", f"--out={index}"]) == 0
    printed = capsys.readouterr()
    assert f"{index}: 3,000 passages, 0.00 GB, built in " in printed.out
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command.main(["build", f"--corpus={corpus}", "--out=."]) == 0
    assert "here: 3,000" in capsys.readouterr().out
    lines = printed.err.splitlines()
    reading = [line for line in lines if "reading corpus.jsonl: " in line]
    percents = [int(line.split("(")[1].split("%")[0]) for line in reading]
    assert len(percents) == 3000 and percents == sorted(percents)
    assert percents[0] < 50 < percents[-1]
    merged = [line for line in lines if "merging" in line]
    assert merged[-1].startswith("ssp_jax: merging postings: 100%")
    assert lines[-1].startswith("ssp_jax: checking the postings: 100%")
    for query, answer in (
        ("suns", '[p0] "moon"\n          moon sun\n'),
        ("stars", "no passage has a word of this query\n"),
    ):
        assert command.main(["search", f"--index={index}", "--top_k=1", query]) == 0
        assert capsys.readouterr().out.endswith(answer)


def test_a_corpus_that_is_no_text_gets_a_sentence(tmp_path, capsys):
    corpus = corpus_of(tmp_path, ["one word ☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃☃ ☃☃☃☃☃☃"] * 5)
    build_index(corpus, tmp_path / "index", **PLAIN)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "corpus.jsonl: only 26% of its characters stand in wo" in said


def test_all_stemmers_and_stop_words_are_there(tmp_path):
    import Stemmer
    from bm25s import stopwords

    assert {"", *Stemmer.algorithms()} >= set(settings.STEMMERS)
    assert all(getattr(stopwords, name) for name in settings.STOPWORDS.values() if name)
    corpus = corpus_of(tmp_path, ["les grandes maisons", "un chat"])
    french = PLAIN | {"stemmer": "french", "stopwords": "french"}
    retriever = open_retriever(corpus, tmp_path / "index", **french)
    assert ids(retriever, "grande maison", 2) == ["p0"] and ids(retriever, "les", 2) == []
