"""Noise: as many distinct documents as asked for, of other answers, whatever the games before have
found.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssp_jax.data import Document
from ssp_jax.game.noise import Noise


class Corpus:
    """Passages with these ids, as a retriever gives them."""

    def __init__(self, *ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def document(self, row):
        return passage(self.ids[row])


def passage(name):
    return Document(name, f'"{name}"', f"about {name}")


def found(*games):
    return [[passage(name) for name in game.split()] for game in games]


def drawn(
    games, corpus=(), number=4, own="", answers=("Rome",), of_games=None, by_game=False, seed=0
):
    """The ids that are drawn; the games' answers are none of these unless told."""
    of_games = of_games or [(f"answer {i}",) for i in range(len(games))]
    noise = Noise(of_games, found(*games), Corpus(*corpus), by_game=by_game)
    documents = noise.draw(np.random.default_rng(seed), number, own.split(), answers)
    return [document.id for document in documents]


@pytest.mark.parametrize("seed", range(5))
def test_a_passage_that_many_have_found_is_drawn_once(seed):
    assert sorted(drawn(["a b", "a b", "a c", "a d a a"], seed=seed)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("seed", range(5))
def test_own_documents_are_not_noise_and_others_take_their_place(seed):
    assert sorted(drawn(["a b c", "d e f"], own="b e", seed=seed)) == ["a", "c", "d", "f"]


@pytest.mark.parametrize("answer", ["Rome", "the Rome", "ROME!"])
def test_what_was_found_for_the_same_answer_is_not_noise(answer):
    """In normal form, and not by way of another game that found it too."""
    games = ["a b c", "c d", "e f"]
    assert sorted(drawn(games, of_games=[(answer, "Roma"), ("Oslo",), ("Bern",)])) == [
        "d",
        "e",
        "f",
    ]
    assert sorted(
        drawn(games, answers=("Bern", "Roma"), of_games=[(answer, "Roma"), ("Oslo",), ("Bern",)])
    ) == ["d"]


def test_the_corpus_gives_what_games_do_not_have():
    """In the first step all of it; never a document twice, nor one that is taken."""
    first = drawn([], corpus=[*"abcdef"], own="a b")
    assert len(set(first)) == 4 and not {"a", "b"} & set(first)
    later = drawn(["x a", "y"], corpus=[*"abcx"], own="a")
    assert set(later[:2]) == {"x", "y"} and set(later[2:]) == {"b", "c"}


def test_it_ends_when_nothing_is_left():
    assert sorted(drawn(["a b"], corpus=[*"bc"], own="a")) == ["b", "c"]
    assert drawn(["a b"], own="a b") == drawn([]) == []
    assert drawn(["a b"], number=0) == []


def test_a_corpus_with_repeated_ids_is_searched_to_its_end():
    assert sorted(drawn([], corpus=[*["a"] * 500, "b", "c"], number=3)) == ["a", "b", "c"]


def test_whole_games_are_taken_with_what_they_have_of_new():
    games = ["a1 a2", "b1 b2 own", "own", ""]
    assert sorted(drawn(games, number=2, own="own", by_game=True)) == ["a1", "a2", "b1", "b2"]
    one = drawn(games, number=1, own="own", by_game=True)
    assert sorted(one) in (["a1", "a2"], ["b1", "b2"])
    same = [("Rome",), ("Oslo",), ("Oslo",), ("Oslo",)]
    assert sorted(drawn(games, number=2, own="own", of_games=same, by_game=True)) == ["b1", "b2"]


def test_what_is_taken_does_not_change_the_order_of_the_rest():
    """So a draw depends on its key and on the games before, and on nothing that is in play."""
    games = ["a b c d", "e f g h"]
    whole = drawn(games, number=8, seed=3)
    assert drawn(games, number=8, own="b g", seed=3) == [name for name in whole if name not in "bg"]
    assert drawn(games, number=8, seed=4) != whole


@given(
    games=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=5),
    of_games=st.lists(st.sampled_from(["Rome", "Oslo"]), min_size=5, max_size=5),
    corpus=st.lists(st.sampled_from("abcdefghijkl"), max_size=12),
    own=st.sets(st.sampled_from("abcdefgh")),
    number=st.integers(0, 6),
)
def test_as_many_as_asked_for_or_all_that_there_are(games, of_games, corpus, own, number):
    got = drawn(
        [" ".join(game) for game in games],
        corpus,
        number,
        " ".join(own),
        of_games=[(a,) for a in of_games],
    )
    same = {
        name
        for game, answer in zip(games, of_games, strict=False)
        if answer == "Rome"
        for name in game
    }
    allowed = {name for game in [*games, corpus] for name in game} - own - same
    assert len(got) == len(set(got)) == min(number, len(allowed)) and set(got) <= allowed
