"""Dense search finds what a sort of all inner products finds, wherever the vectors are."""

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from ssp_jax.errors import InputError
from ssp_jax.retriever import dense, dense_build, encoder_files, topk, vectors
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.dense import DenseRetriever, HybridRetriever
from ssp_jax.retriever.search import Retriever
from ssp_jax.retriever.settings import ALL, MAX_TOP_K, DenseSettings, EncoderKeys
from ssp_jax.runtime.logger import CompileCounter
from tests.conftest import ROOT
from tests.model_folders import edit_tensors
from tests.retriever.test_search import corpus_of

pytestmark = pytest.mark.ci
ENCODER = str(ROOT / "tests/goldens/bert")
KEYS = EncoderKeys(passage_prefix="p: ")
NUMBER = 300
WORDS = ["moon", "sea", "river", "lake", "sun", "star", "ship", "wind", "king", "city"]


def texts(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 7))) for _ in range(number)]


QUERIES = [*texts(9, seed=1), "moon " * 20]  # the last one is longer than the shortest bucket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with vectors; two passages are the same."""
    where = tmp_path_factory.mktemp("dense")
    passages = texts(NUMBER)
    passages[200] = passages[7]
    index = where / "index"
    build_index(corpus_of(where, passages), index, stemmer="", stopwords="", k1=1.5, b=0.75)
    dense_build.ensure_vectors(index, ENCODER, KEYS)
    return index


@pytest.fixture(autouse=True, scope="module")
def few_programs(quick_compile: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(dense, "QUERY_BATCHES", (8, 16))
    patch.setattr(dense, "QUERY_TOKENS", (32,))
    yield
    patch.undo()


# Settings of where the vectors are -> rows on devices.
PLACES = {
    "host": (DenseSettings(ENCODER, KEYS), 0),
    "devices": (DenseSettings(ENCODER, KEYS, 1.0), 300),
    "int8": (DenseSettings(ENCODER, KEYS, 1.0, "int8"), 300),
}


@pytest.fixture(scope="module")
def retrievers(folder: Path) -> dict[str, DenseRetriever]:
    return {
        name: DenseRetriever.load(folder, settings, 3) for name, (settings, _) in PLACES.items()
    }


def all_vectors(folder: Path) -> np.ndarray:
    return np.fromfile(folder / "dense/vectors.bin", vectors.DTYPES["bfloat16"]).reshape(NUMBER, -1)


def test_passages_have_the_vectors_of_the_encoder(folder: Path) -> None:
    found = encoder_files.load(ENCODER, KEYS)
    shape = dense.Shape(found.config, found.recipe.pooling, "float32")
    tokens = found.passage_tokens([f'"{text.split()[0]}"\n{text}' for text in texts(NUMBER)[:5]])
    expected = dense_build.encode_passages(
        shape, found.params, *encoder_files.padded(tokens, 8, 40)
    )
    rows = all_vectors(folder).astype(np.float32)
    np.testing.assert_allclose(rows[:5], expected[:5], atol=2**-8)
    np.testing.assert_array_equal(rows[200], rows[7])


def test_a_block_has_the_same_vectors_wherever_a_build_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_build, "BLOCK_ROWS", 100)
    _, passages, found = dense_build._open(folder, ENCODER, KEYS)
    blocks = list(dense_build._encoded_blocks(found, passages, 0))
    later = list(dense_build._encoded_blocks(found, passages, 2))
    assert [len(block) for block in blocks] == [100, 100, 100] and len(later) == 1
    np.testing.assert_array_equal(later[0], blocks[2])
    near = np.concatenate(blocks).astype(vectors.DTYPES["bfloat16"])
    np.testing.assert_allclose(near.astype("f4"), all_vectors(folder).astype("f4"), atol=2**-7)


@pytest.mark.parametrize("place", PLACES)
def test_hits_are_those_of_a_sort(
    folder: Path, retrievers: dict[str, DenseRetriever], place: str
) -> None:
    retriever = retrievers[place]
    found = encoder_files.load(ENCODER, KEYS)
    assert len(retriever) == NUMBER
    for query, hits in zip(QUERIES, retriever.hits(QUERIES, 3), strict=True):
        [tokens] = found.query_tokens([query])
        padded = encoder_files.padded([tokens], 8, 32 if len(tokens) <= 32 else 40)
        vector = np.asarray(dense.encode_queries(retriever._shape, found.params, *padded)[0])[0, 0]
        scores = all_vectors(folder).astype(np.float64) @ vector.astype(np.float64)
        best = np.argsort(-scores.round(6), kind="stable")[:3]
        assert [row for row, _ in hits] == best.tolist()
        np.testing.assert_allclose([score for _, score in hits], scores[best], rtol=1e-5)


def test_where_the_vectors_are_changes_no_bit(retrievers: dict[str, DenseRetriever]) -> None:
    [expected, *others] = [retriever.hits(QUERIES, 3) for retriever in retrievers.values()]
    assert others == [expected, expected]


@pytest.fixture(scope="module")
def deep(folder: Path) -> DenseRetriever:
    return DenseRetriever.load(folder, DenseSettings(ENCODER), MAX_TOP_K)


def test_equal_passages_come_in_the_order_of_rows(deep: DenseRetriever) -> None:
    twins = 0
    for hits in deep.hits(QUERIES, MAX_TOP_K):
        assert len(hits) == 50 and list(hits) == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        rows = [row for row, _ in hits]
        if 200 in rows:
            assert dict(hits)[7] == dict(hits)[200]
            twins += 1
    assert twins


def test_some_rows_on_devices_and_the_others_on_the_host(
    folder: Path, retrievers: dict[str, DenseRetriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    gib = 128 * dense.row_bytes(32, "bfloat16") / 2**30
    some = DenseRetriever.load(folder, DenseSettings(ENCODER, KEYS, gib), 3)
    assert some._each == 128
    assert some.hits(QUERIES, 3) == retrievers["host"].hits(QUERIES, 3)


@pytest.mark.parametrize("place", ["host", "devices"])
def test_a_hit_depends_on_its_query_alone_and_nothing_compiles(
    retrievers: dict[str, DenseRetriever], place: str
) -> None:
    retriever = retrievers[place]
    compiles = CompileCounter()
    alone = [retriever._search([query], 3)[0] for query in QUERIES]
    together = retriever._search([*texts(23, seed=5), *QUERIES], 3)
    assert together[23:] == alone and compiles.count == 0


def test_a_blank_query_finds_nothing_and_top_k_is_kept(
    retrievers: dict[str, DenseRetriever],
) -> None:
    retriever = retrievers["host"]
    assert retriever.hits(["", "  \n", "\ud800"], 2)[:2] == [(), ()]
    assert retriever.hits([], 3) == []
    documents = retriever.search(["moon"], 2)[0]
    assert [document.id for document in documents] == [
        f"p{row}" for row, _ in retriever.hits(["moon"], 3)[0][:2]
    ]
    with pytest.raises(ValueError, match="loaded for 3"):
        retriever.hits(["moon"], 4)


def test_hybrid_adds_up_reciprocal_ranks(folder: Path, deep: DenseRetriever) -> None:
    sparse = Retriever.load(folder, threads=1)
    hybrid = HybridRetriever(sparse, deep)
    for query in QUERIES:
        scores: dict[int, float] = {}
        for part in (sparse, deep):
            for rank, (row, _) in enumerate(part.hits([query], 50)[0]):
                scores[row] = scores.get(row, 0) + 1 / (61 + rank)
        best = sorted(scores, key=lambda row: (-scores[row], row))[:5]
        assert [row for row, _ in hybrid.hits([query], 5)[0]] == best
    assert hybrid.source != sparse.source


def test_keys_must_be_those_of_the_build_and_commands_need_none(folder: Path) -> None:
    assert DenseRetriever.load(folder, DenseSettings(ENCODER), 3)._encoder.recipe.passage_prefix
    with pytest.raises(InputError, match="was built with passage_prefix 'p: '; expected 'x'"):
        other = dataclasses.replace(KEYS, passage_prefix="x")
        DenseRetriever.load(folder, DenseSettings(ENCODER, other), 3)


def test_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(ENCODER, tmp_path / "other"))
    edit_tensors(other, **{"embeddings.LayerNorm.bias": np.zeros(32, np.float32)})
    says = r"by another encoder, .*goldens/bert \(.*\); expected .*other \("
    with pytest.raises(InputError, match=says):
        DenseRetriever.load(folder, DenseSettings(str(other), KEYS), 3)
    with pytest.raises(InputError, match=says):
        dense_build.ensure_vectors(folder, str(other), KEYS)


@pytest.mark.parametrize(
    ("rows", "gib", "each"),
    [
        (21_015_324, ALL, 2_626_916),
        (21_015_324, 0.0, 0),
        (21_015_324, 1.0, 655_360),  # 10 chunks of 65,536, of 1536 bytes a row
        (1000, 1.0, 125),
        (1_000_000, 0.01, 6_912),  # 54 blocks
    ],
)
def test_rows_on_devices_take_what_is_allowed(rows: int, gib: float, each: int) -> None:
    size = dense.row_bytes(768, "bfloat16")
    found = dense.rows_per_device(rows, size, 8, gib)
    assert found == each
    if gib > 0 and found:
        assert topk.padded_rows(found) * size <= gib * 2**30
