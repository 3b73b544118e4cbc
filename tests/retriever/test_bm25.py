"""The index is that of bm25s bit for bit; the pruned search equals adding everything up."""

import random
from pathlib import Path

import numpy as np
import pytest

from ssp_jax.corpus import words
from ssp_jax.data import iterate_corpus
from ssp_jax.retriever import bm25
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.search import Retriever

CORPUS = Path(__file__).parents[2] / "assets" / "tiny" / "corpus.jsonl"
SETTINGS = {"stemmer": "english", "stopwords": "en", "k1": 1.2, "b": 0.7}


def columns(data, rows, starts, vocabulary):
    """word -> its postings, as bytes."""
    found = {}
    for word, term in vocabulary.items():
        own = slice(starts[term], starts[term + 1])
        found[word] = (rows[own].tobytes(), data[own].tobytes())
    return found


def columns_of(index):
    arrays = (index.scores[name] for name in ("data", "indices", "indptr"))
    return columns(*arrays, index.vocab_dict)


def loaded_by_bm25s(folder):
    import bm25s

    return bm25s.BM25.load(folder, show_progress=False)


@pytest.fixture(scope="module")
def reference():
    """bm25s's own index of the tiny corpus."""
    import bm25s
    import Stemmer

    texts = [f"{document.title}\n{document.text}" for document in iterate_corpus(CORPUS)]
    tokens = bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False
    )
    index = bm25s.BM25(k1=SETTINGS["k1"], b=SETTINGS["b"], method="lucene")
    index.index(tokens, create_empty_token=False, show_progress=False)
    return index


def test_index_is_that_of_bm25s_bit_for_bit(tmp_path, reference, monkeypatch):
    build_index(CORPUS, tmp_path / "one", **SETTINGS)
    index = loaded_by_bm25s(tmp_path / "one")
    assert index.scores["num_docs"] == reference.scores["num_docs"]
    assert columns_of(index) == columns_of(reference)
    for name, value in (("BLOCK_TOKENS", 1000), ("RANGE_POSTINGS", 300), ("KNOWN_WORDS", 50)):
        monkeypatch.setattr(bm25, name, value)
    # many blocks and ranges, and words forgotten in between
    build_index(CORPUS, tmp_path / "many", **SETTINGS)
    for path in (tmp_path / "one").iterdir():
        if path.name != "meta.json":
            assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_results_are_those_of_bm25s(tmp_path, reference):
    build_index(CORPUS, tmp_path / "index", **SETTINGS)
    retriever = Retriever.load(tmp_path / "index", threads=2)
    stem = bm25.stem_function("english")
    rng = random.Random(0)
    texts = [document.text for document in iterate_corpus(CORPUS)]
    pools = [words.split(" ".join(rng.choices(texts, k=3))) for _ in range(200)]
    queries = [" ".join(rng.choices(pool, k=rng.randint(1, 12))) for pool in pools]
    for query, hits in zip(queries, retriever.hits(queries, 10), strict=True):
        stems = [stem(word) for word in words.split(query)]
        scores = reference.get_scores(stems)
        best = sorted(np.flatnonzero(scores > 0), key=lambda row: (-scores[row], row))[:10]
        assert list(hits) == [(row, scores[row]) for row in best]


def random_postings(rng, passages, frequencies):
    """Arrays with `frequencies` postings of each term; few distinct scores, so that some tie."""
    rows = [np.sort(rng.choice(passages, n, replace=False)).astype(np.uint32) for n in frequencies]
    data = []
    for n in frequencies:
        scores = rng.integers(1, 6, n) * np.log(1 + passages / n) / 7
        data.append(scores.astype(np.float32))
    starts = np.concatenate([[0], np.cumsum(frequencies)]).astype(np.int64)
    max_impact = np.array([column.max() for column in data], np.float32)
    return np.concatenate(data), np.concatenate(rows), starts, max_impact


def added_up(data, rows, starts, terms, passages):
    scores = np.zeros(passages, np.float32)
    for term in terms:
        own = slice(starts[term], starts[term + 1])
        scores[rows[own]] += data[own]
    return scores


@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_pruned_search_equals_adding_everything_up(top_k):
    """Frequencies from 1 to all passages, so that frequent words are looked up or walked."""
    rng = np.random.default_rng(top_k)
    passages = 20_000
    frequencies = [1, 1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000, 5000, 10_000, 19_999, 20_000]
    arrays = random_postings(rng, passages, frequencies)
    scratch = (np.zeros(passages, np.float32), np.empty(2 * passages + 1, np.uint32))
    for _ in range(300):
        terms = rng.integers(len(frequencies), size=rng.integers(0, 9))  # with repeats
        rows = np.empty(top_k, np.int32)
        scores = np.empty(top_k, np.float32)
        found = bm25.search_query(*arrays, terms, *scratch, rows, scores)
        every = added_up(*arrays[:3], terms, passages)
        best = np.lexsort((np.arange(passages), -every))[:top_k]
        best = best[every[best] > 0]
        np.testing.assert_array_equal(rows[:found], best)
        np.testing.assert_array_equal(scores[:found], every[best])
        assert not scratch[0].any()  # ready for the next query


def test_few_seen_passages_are_looked_up_and_many_walked():
    """Both ways of completing a sum, one after the other, on a case small enough to read."""
    passages = 4000
    rows = [np.array([7, 900], np.uint32), np.arange(passages, dtype=np.uint32)]
    data = [np.array([5, 5], np.float32), np.full(passages, 0.5, np.float32)]
    data[1][900] = 0.75
    arrays = (np.concatenate(data), np.concatenate(rows), 2, 2 + passages)
    few = [7, 900]
    many = list(range(0, passages, 2))
    for candidates in (few, many):
        scores = np.zeros(passages, np.float32)
        scores[candidates] = 1
        scores[[7, 900]] = 5
        best_rows = np.array([7, 900], np.int32)
        best_scores = np.array([5, 5], np.float32)
        room = np.array(candidates + [0] * (len(candidates) + 1), np.uint32)
        threshold = bm25._complete(
            *arrays, room, len(candidates), scores, np.float32(5), best_rows, best_scores
        )
        assert scores[[7, 900]].tolist() == [5.5, 5.75]
        assert (scores[1::2][:5] == 0)[[0, 1, 2, 4]].all()
        assert threshold == 5.5
        assert best_rows.tolist() == [900, 7] and best_scores.tolist() == [5.75, 5.5]
