"""Noise: documents that a verifier reads beside those of the question's proposer [P s3.3]."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ssp_jax.data import Document
from ssp_jax.game.rewards import comparable
from ssp_jax.retriever.search import Searcher


def distinct(documents: Iterable[Document]) -> dict[str, Document]:
    """The documents by id, each once: where one was cut more than another time, the longer text."""
    found: dict[str, Document] = {}
    for document in documents:
        before = found.setdefault(document.id, document)
        if len(document.text) > len(before.text):
            found[document.id] = document
    return found


class Noise:
    """The documents that the games of one step have found, to draw noise from.

    Units are drawn: single passages [P] or, by_game, all passages of one game [C].
    """

    def __init__(
        self,
        answers: Sequence[tuple[str, ...]],
        documents: Iterable[Sequence[Document]],
        corpus: Searcher,
        *,
        by_game: bool,
    ) -> None:
        """answers and documents: of each game. Games without answers share none with others."""
        found = [distinct(of_game) for of_game in documents]
        self._units = found
        if not by_game:
            passages = distinct(itertools.chain.from_iterable(map(dict.values, found)))
            self._units = [{name: passage} for name, passage in passages.items()]
        self._corpus = corpus
        # answer -> ids of passages
        self._found_for: defaultdict[str, set[str]] = defaultdict(set)
        for answers_of_game, names in zip(answers, found, strict=False):
            for answer in answers_of_game:
                self._found_for[comparable(answer)] |= names.keys()

    def draw(
        self,
        rng: np.random.Generator,
        number: int,
        own: Iterable[str],
        answers: Iterable[str],
    ) -> list[Document]:
        """The documents of `number` units that hold a new one; fewer where the corpus is used up.

        own: ids of the game's own documents. Neither those nor the documents that a game of the
        same answer has found are noise. Passages of the corpus follow those of the games.
        """
        taken = set(own)
        for answer in answers:
            taken |= self._found_for.get(comparable(answer), set())
        drawn: list[Document] = []
        units = self._shuffled(rng, number + len(taken))
        while number and (unit := next(units, None)) is not None:
            new = {name: document for name, document in unit.items() if name not in taken}
            taken |= new.keys()
            drawn += new.values()
            number -= bool(new)
        return drawn

    def _shuffled(self, rng: np.random.Generator, rows: int) -> Iterator[dict[str, Document]]:
        """All units of the games, then passages of the corpus.

        rows: so many corpus rows are enough if all ids differ.
        """
        for i in rng.permutation(len(self._units)):
            yield self._units[i]
        size = len(self._corpus)
        while True:
            for row in rng.choice(size, min(size, rows), replace=False):
                yield distinct([self._corpus.document(int(row))])
            if rows >= size:
                return
            rows *= 2  # ids repeat: so many rows were not enough
