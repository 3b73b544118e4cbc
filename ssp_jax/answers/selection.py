"""Which candidates of a corpus become answers: a few of each passage, none of the evaluation's."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssp_jax.answers.candidates import QUOTAS, Candidate, Frequencies, choose, forms, plain_title
from ssp_jax.corpus import passages
from ssp_jax.data import Document, Position
from ssp_jax.errors import InputError
from ssp_jax.game.rewards import comparable, normalize_answer
from ssp_jax.retriever.progress import Progress

SEARCHES = 3  # an answer asks for 1 to so many, by chance


@dataclass(frozen=True)
class Answer:
    """An answer and where it stands."""

    candidate: Candidate
    place: tuple[int, int]  # number of its passage, from 0, and its own among those of the passage
    passage: str  # id
    draw: int  # a random number, by seed and answer
    aliases: tuple[str, ...]  # which count as right too

    def row(self) -> str:
        """As data.answers has it, and where it comes from."""
        row: dict[str, Any] = {
            "ground_truth": self.candidate.text,
            "search_turns": 1 + self.draw % SEARCHES,
            "kind": self.candidate.kind,
            "passage": self.passage,
        }
        if self.aliases:
            row["aliases"] = self.aliases
        return json.dumps(row, ensure_ascii=False)


class Chosen:
    """At most `limit` answers, no two equal: a random sample of all that are offered.

    It depends on the seed and not on the order of the corpus, for those with the lowest numbers
    stay.
    """

    def __init__(self, limit: int, seed: int, held_out: Collection[str]) -> None:
        """held_out: answers of the evaluation, in comparable form."""
        self.answers: dict[str, Answer] = {}  # by comparable form
        self.left_out: set[str] = set()  # in comparable form, for they are held out
        self._limit = limit
        self._key = seed.to_bytes(8, "little")
        self._held_out = held_out
        self._highest: list[tuple[int, str]] = []  # a heap of negated numbers

    def offer(self, row: int, document: Document, candidates: Iterator[Candidate]) -> None:
        """Takes what a passage gives, up to the quota of each kind."""
        given: Counter[str] = Counter()
        for number, candidate in enumerate(candidates):
            form = comparable(candidate.text)
            aliases = _aliases(document, candidate.text)
            if held_out := {form, *map(comparable, aliases)}.intersection(self._held_out):
                self.left_out |= held_out
            elif given[candidate.kind] < QUOTAS[candidate.kind] and self._is_new(candidate, form):
                given[candidate.kind] += 1
                draw = self._draw(form)
                answer = Answer(candidate, (row, number), document.id, draw, aliases)
                self._add(form, answer)

    def _is_new(self, candidate: Candidate, form: str) -> bool:
        return form not in self.answers and bool(normalize_answer(candidate.text))

    def _draw(self, form: str) -> int:
        return int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8, key=self._key).digest())

    def _add(self, form: str, answer: Answer) -> None:
        self.answers[form] = answer
        heapq.heappush(self._highest, (-answer.draw, form))
        if len(self.answers) > self._limit:
            _, highest = heapq.heappop(self._highest)
            del self.answers[highest]

    def in_order(self) -> list[Answer]:
        """In the order of the corpus."""
        return sorted(self.answers.values(), key=lambda answer: answer.place)


def _aliases(document: Document, text: str) -> tuple[str, ...]:
    """The title "Mercury (planet)" of a passage that gives Mercury: who reads it may answer so."""
    title = plain_title(document)
    return (title,) if title.startswith(f"{text} (") and title.endswith(")") else ()


def find_answers(
    corpus: str | Path, limit: int, seed: int, held_out: Collection[str]
) -> tuple[Chosen, int]:
    """Answers of a corpus, and the number of its passages.

    Reads it twice: counts how many passages have each text, and then chooses. Raises InputError.
    """
    frequencies = Frequencies()
    for document in _read(corpus, "counting words and names"):
        frequencies.add(forms(document))
    chosen = Chosen(limit, seed, held_out)
    for row, document in enumerate(_read(corpus, "choosing answers")):
        chosen.offer(row, document, choose(document, frequencies))
    if not chosen.answers:
        raise InputError(
            f"{corpus}: expected passages with titles, names, dates, numbers or terms, found "
            f"{frequencies.passages} passages and none that can be an answer"
        )
    return chosen, frequencies.passages


def _read(corpus: str | Path, what: str) -> Iterator[Document]:
    """The passages of a corpus, with progress."""
    progress = Progress()
    position = Position()
    size = max(passages.stamp(Path(corpus))["size"], 1)
    for document in passages.read_passages(corpus, position):
        progress.share(what, min(position.bytes / size, 1.0))
        yield document
