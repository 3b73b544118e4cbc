"""Noise: what a verifier reads beside the documents of the question's own proposer [P s3.3]."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ssp_jax.data import Document
from ssp_jax.game.rewards import comparable
from ssp_jax.retriever.search import Search


def distinct(documents: Iterable[Document]) -> dict[str, Document]:
    """The documents by id, each once."""
    return {document.id: document for document in documents}


class Noise:
    """What the games of one step have found, to be drawn from for other games.

    A unit is one passage [P] or, by_game, all passages of one game [C].
    """

    def __init__(
        self,
        answers: Sequence[tuple[str, ...]],
        documents: Sequence[Sequence[Document]],
        corpus: Search,
        *,
        by_game: bool,
    ) -> None:
        """answers and documents: of each game. Without answers, a game's answer is another one."""
        found = [distinct(of_game) for of_game in documents]
        passages = {name: document for of_game in found for name, document in of_game.items()}
        self._units = found if by_game else [{name: passage} for name, passage in passages.items()]
        self._corpus = corpus
        # answer -> ids of passages
        self._found_for: defaultdict[str, set[str]] = defaultdict(set)
        for of_game, names in zip(answers, found, strict=False):
            for answer in of_game:
                self._found_for[comparable(answer)] |= names.keys()

    def draw(
        self,
        rng: np.random.Generator,
        number: int,
        own: Iterable[str],
        answers: Iterable[str],
    ) -> list[Document]:
        """Units that hold something new, until there are so many or the corpus is used up.

        own: ids of the game's own documents. Neither those nor what a game of the same answer has
        found is noise. What the games cannot give comes from the corpus, passage by passage.
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
        """All units of the games, then the corpus, of which `rows` are enough if all ids differ."""
        for i in rng.permutation(len(self._units)):
            yield self._units[i]
        size = len(self._corpus)
        while True:
            for row in rng.choice(size, min(size, rows), replace=False):
                yield distinct([self._corpus.document(int(row))])
            if rows >= size:
                return
            rows *= 2  # where ids repeat, so many rows were not enough
