"""Scripted players over any corpus with titles: games of all roles, found by the real search.

The proposer searches the given answer and whatever the results name, until a passage states
something that the answer completes; it knows no more than it has read. Its question is that
statement. The solver searches the names of the question, the verifier reads. They play imperfectly
on purpose (Manner): a model that is taught by perfect players has nothing left to find.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from ssp_jax.data import Document, Task
from ssp_jax.game import prompts, rewards
from ssp_jax.game.noise import Noise, distinct
from ssp_jax.game.prompts import Style
from ssp_jax.game.roles import PROPOSER, SEARCH_ENGINE, SOLVER, VERIFIER, Episode, Role
from ssp_jax.game.rounds import Game, Question
from ssp_jax.game.rules import QuestionRules, question_fault
from ssp_jax.retriever.search import Searcher
from ssp_jax.warm_start.links import SEEN_CHARACTERS, Fact, Links, names, title_of

# Several, so that the form is learnt and not one wording. {asked}: what is asked for, such as "the
# lowest point of Ghana", or with a nested clause "the lowest point of the country of Accra".
ASKED = (
    "Name {asked}.",
    "Tell me {asked}.",
    "Do you know {asked}?",
    "Can you find {asked}?",
    "Please look up {asked}.",
    "I would like to know {asked}. What is it?",
)
# Where only a statement tells. {a}: a statement that a name completes; {kind}: what that name is,
# such as river.
ONE_HOP = ("{a} what?", 'What follows "{a}"?', "Which name completes this: {a} ...?")
ONE_HOP_OF_A_KIND = ("Which {kind} is it that {a}?", "{a} which {kind}?")
# {b}: the statement that follows from {a}, in which that name is X, or "the river that {a}".
TWO_HOP = (
    "If {a} X, then {b} what?",
    "{a} X. {b} what?",
    'What follows "{b}", where {a} X?',
)
NESTED = ("{b} what?", "Which name completes this: {b} ...?")
NESTED_OF_A_KIND = ("Which {kind} is it that {b}?", "{b} which {kind}?")
UNKNOWN = "X"
QUERIES = 5  # of each kind that are tried about a name
_COMMON_WORD = re.compile(r"\b[a-z]{5,}\b")  # which says what kind of thing is looked for
PASSES = 8  # over all names


@dataclass(frozen=True)
class Manner:
    """How the players play; the shares are those of a start from which 135M parameters rose."""

    one_hop: float = 0.5  # share of the games whose question one search answers
    one_hop_fields: float = 0.5  # of these, those that ask for what a field tells
    stop_early: float = 0.35  # of the others: solvers that answer with what the first search gave
    search_again: float = 0.2  # of one-hop games: solvers that search once too often


@dataclass
class Moves:
    """An episode in the making: its turns, what was searched, and what was found."""

    role: Role
    style: Style
    turns: list[tuple[str, str]] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)

    def search(self, thought: str, query: str, found: Sequence[Document]) -> None:
        call = f"<think> {thought} </think>\n<search> {query} </search>"
        self.turns.append((self.role.name, call))
        self.turns.append((SEARCH_ENGINE, prompts.observation(self.style, found)))
        self.queries.append(query)
        self.documents += found

    def end(self, thought: str, tag: str, text: str, evidence: str = "") -> Episode:
        """The last turn. evidence: what styles that quote it quote."""
        quoted = ""
        if evidence and self.style.quotes_evidence:
            quoted = f"<original_evidence> {evidence} </original_evidence>\n"
        last = f"<think> {thought} </think>\n{quoted}<{tag}> {text} </{tag}>"
        return Episode(
            uid=0,
            role=self.role.name,
            tokens=[],
            sampled=[],
            logprobs=[],
            prompt_length=0,
            queries=tuple(self.queries),
            documents=tuple(self.documents),
            turns=(*self.turns, (self.role.name, last)),
            stop_reason=tag,
        )


class Script:
    """Makes games of one corpus. The same seed makes the same games."""

    def __init__(
        self,
        retriever: Searcher,
        links: Links,
        facts: Iterable[Fact],
        style: Style,
        rules: QuestionRules,
        *,
        top_k: int,
        noise: int,
        manner: Manner,
        seed: int,
    ) -> None:
        """facts: of the links, those that games may be about. noise: documents that a verifier
        reads beside the proposer's.
        """
        self._retriever = retriever
        self._links = links
        self._stated: dict[str, list[Fact]] = defaultdict(list)  # by what completes them
        self._told: dict[str, list[Fact]] = defaultdict(list)  # by their document
        for fact in facts:
            self._stated[fact.object].append(fact)
            self._told[fact.document.id].append(fact)
        self._style = style
        self._rules = rules
        self._top_k = top_k
        self._noise = noise
        self._manner = manner
        self._random = random.Random(seed)
        self._draws = np.random.default_rng(seed)

    def games(self, number: int, progress: Callable[[int], None]) -> Iterator[Game]:
        """`number` games on different questions, fewer where the corpus has no more."""
        asked: set[str] = set()
        wanted = self._wanted(number)
        answers = {kind: self._answers(of_fields=kind[1]) for kind in wanted}
        while any(wanted.values()):
            # By turns, as long as all are wanted.
            kind = max(wanted, key=lambda kind: wanted[kind])
            answer = next(answers[kind], None)
            if answer is None:
                wanted[kind] = 0
                continue
            hops, _ = kind
            game = self._game(len(asked), answer, hops)
            if game is None or game.question is None or game.question.text in asked:
                continue
            asked.add(game.question.text)
            wanted[kind] -= 1
            progress(len(asked))
            yield game

    def _wanted(self, number: int) -> dict[tuple[int, bool], int]:
        """How many games of each number of hops, and about fields or not.

        What takes two hops asks for a field, through what leads to its thing.
        """
        of_one_hop = round(self._manner.one_hop * number)
        of_fields = round(self._manner.one_hop_fields * of_one_hop)
        return {
            (1, False): of_one_hop - of_fields,
            (1, True): of_fields,
            (2, True): number - of_one_hop,
        }

    def _answers(self, of_fields: bool) -> Iterator[str]:
        """What facts of fields, or of sentences, lead to, several times; all if there is none."""
        facts = [fact for facts in self._stated.values() for fact in facts]
        wanted = [fact for fact in facts if fact.is_field == of_fields] or facts
        by_noun: dict[str, dict[str, None]] = defaultdict(dict)
        for fact in wanted:
            by_noun[fact.noun if fact.is_field else ""][fact.object] = None
        for _ in range(PASSES):
            groups = [sorted(group) for group in by_noun.values()]
            for group in groups:
                self._random.shuffle(group)
            # All nouns alike: half of the fields of a corpus may tell who its ambassadors are.
            for dealt in zip_longest(*groups):
                yield from filter(None, dealt)

    def _game(self, index: int, answer: str, hops: int) -> Game | None:
        """A game on this answer; None where no search leads to a question that keeps the rules."""
        proposer = Moves(PROPOSER, self._style)
        chain = self._chain(proposer, answer, hops)
        if chain is None:
            return None
        text, unknown = self._worded(chain)
        found = len(proposer.documents)
        told = any(fact.object.lower() in text.lower() for fact in chain)
        if told or question_fault(text, answer, proposer.queries, found, self._rules):
            return None
        attempt = self._solve(chain, unknown)
        if attempt is None:
            return None

        task = Task(index, (answer,), searches=hops)
        game = Game(index, task, question=Question(text, (answer,)))
        leads = " ".join(map(_leads, chain))
        game.proposer = proposer.end(leads, "question", text)
        game.attempts = [attempt]
        game.scores = [rewards.solver_reward(attempt.text, (answer,), "em")]
        game.proposer_reward = 1.0 - game.scores[0]
        self._verify(game, chain)
        return game

    # --- proposer ---

    def _chain(self, proposer: Moves, answer: str, hops: int) -> list[Fact] | None:
        """The facts that lead to the answer, that of the first search first."""
        chain: list[Fact] = []
        name = answer
        thought = f"The answer must be {answer}. I look for what is known about it."
        for left in reversed(range(hops)):
            taken = {answer, *(fact.subject for fact in chain)}
            fact = self._clue(proposer, thought, name, self._leading(name, taken, left > 0))
            if fact is None:
                return None
            chain.insert(0, fact)
            name = fact.subject
            thought = f"{_leads(fact)} What leads to {name}?"
        return chain

    def _leading(self, name: str, taken: set[str], further: bool) -> set[str]:
        """What passages are about that the name completes. further: to which others lead too."""
        subjects = {fact.subject for fact in self._stated.get(name, ())} - taken
        return {subject for subject in subjects if subject in self._stated or not further}

    def _clue(self, proposer: Moves, thought: str, name: str, subjects: set[str]) -> Fact | None:
        """Searches a name until a passage about one of the subjects states what it completes:
        directly, or by the search of a subject that the results name.
        """
        for query in self._queries(name, subjects):
            if query in proposer.queries:
                continue
            found = self._search(query)
            fact = self._fact(found, name, subjects)
            if fact is not None:
                proposer.search(thought, query, found)
                return fact
            for other in self._named(found, subjects):
                more = self._search(other)
                fact = self._fact(more, name, {other})
                if fact is not None and other not in proposer.queries:
                    proposer.search(thought, query, found)
                    proposer.search(f"This names {other}. I look for {other}.", other, more)
                    return fact
        return None

    def _queries(self, name: str, subjects: set[str]) -> list[str]:
        """What may be searched about a name: it alone, with an aspect, or with a common word, best
        the kind of a thing.
        """
        aspects = self._links.aspects(name)
        facts = [fact for fact in self._stated[name] if fact.subject in subjects]
        words = [fact.noun for fact in facts if fact.is_field]
        words += [self._links.kind(fact.subject) for fact in facts]
        words = [word for word in words if word]
        if not words:
            words = [word for fact in facts for word in _COMMON_WORD.findall(fact.statement)]
        for extra in (aspects, words):
            self._random.shuffle(extra)
        extended = [*aspects[:QUERIES], *words[:QUERIES]]
        self._random.shuffle(extended)
        queries = [f"{name} {extra}" for extra in extended]
        queries.insert(0 if self._chance(0.5) else len(queries), name)
        return list(dict.fromkeys(queries))

    def _fact(self, found: Sequence[Document], name: str, subjects: set[str]) -> Fact | None:
        """A fact of these documents about one of the subjects that the name completes."""
        facts = [fact for document in found for fact in self._told.get(document.id, ())]
        fitting = [fact for fact in facts if fact.object == name and fact.subject in subjects]
        return self._random.choice(fitting) if fitting else None

    def _named(self, found: Sequence[Document], subjects: set[str]) -> list[str]:
        """The subjects that documents name where they are seen."""
        listed = []
        for document in found:
            seen = document.text[:SEEN_CHARACTERS]
            listed += [name for _, name in self._links.named(seen) if name in subjects]
        distinct_names = list(dict.fromkeys(listed))
        self._random.shuffle(distinct_names)
        return distinct_names

    def _worded(self, chain: Sequence[Fact]) -> tuple[str, str]:
        """The question, and what it calls the name that its first search finds."""
        first, last = chain[0], chain[-1]
        if all(fact.noun for fact in chain):
            asked = first.asked if first is last else f"the {last.noun} of {first.asked}"
            return self._random.choice(ASKED).format(asked=asked), first.asked
        kind = self._links.kind(last.object)
        if len(chain) == 1:
            text = self._random.choice(ONE_HOP + (ONE_HOP_OF_A_KIND if kind else ()))
            return text.format(a=_inside(first.statement), kind=kind), UNKNOWN

        found = names(first.object, last.statement)
        assert found is not None  # Links takes no other statement
        between = self._links.kind(first.object)
        # "the river that the length of Ghana is" would be no English.
        if title_of(first.document).aspect or not between or self._chance(0.4):
            text = self._random.choice(TWO_HOP)
            statement = last.statement.replace(found[0], UNKNOWN)
            return text.format(a=first.statement, b=statement), UNKNOWN
        unknown = f"the {between}"
        inner = f"{unknown} that {_inside(first.statement)}"
        statement = _inside(last.statement.replace(found[0], inner)).replace("the the ", "the ")
        text = self._random.choice(NESTED + (NESTED_OF_A_KIND if kind else ()))
        return text.format(b=statement, kind=kind), unknown

    # --- solver and verifier ---

    def _solve(self, chain: Sequence[Fact], unknown: str) -> Episode | None:
        """A solver's episode; None where the search does not find what the proposer has read.

        unknown: what the question calls the name that the first search finds.
        """
        solver = Moves(SOLVER, self._style)
        first, last = chain[0], chain[-1]
        thought = f"First I need {unknown}." if len(chain) == 2 else ""
        if not self._look_up(solver, thought, first):
            return None
        if len(chain) == 2:
            known = first.read
            if not first.noun:
                known = f"{unknown[:1].upper()}{unknown[1:]} is {first.object}."
            if self._chance(self._manner.stop_early):
                return solver.end(known, "answer", first.object, first.document.text)
            if not self._look_up(solver, known, last):
                return None
        elif self._chance(self._manner.search_again):
            again = f"{_read(chain)} I look at {last.object} too."
            solver.search(again, last.object, self._search(last.object))
        return solver.end(last.read, "answer", last.object, f"{last.statement} {last.object}.")

    def _look_up(self, solver: Moves, thought: str, fact: Fact) -> bool:
        """Searches what the fact is about; whether its passage is found."""
        asked = f"{fact.subject} {fact.noun}" if fact.is_field else fact.subject
        for query in dict.fromkeys((asked, title_of(fact.document).query, fact.subject)):
            found = self._search(query)
            if fact.document in found and query not in solver.queries:
                looked_for = fact.asked if fact.is_field and query == asked else query
                solver.search(f"{thought} I look for {looked_for}.".lstrip(), query, found)
                return True
        return False

    def _verify(self, game: Game, chain: Sequence[Fact]) -> None:
        """The verifier reads the proposer's own documents and noise, and answers rightly."""
        assert game.proposer is not None
        own = distinct(game.proposer.documents)
        noise = Noise([], [], self._retriever, by_game=False)
        game.noise = noise.draw(self._draws, self._noise, own, game.task.answers)
        documents = [*own.values(), *game.noise]
        order = self._draws.permutation(len(documents))
        game.verifier_order = [documents[i].id for i in order]
        verifier = Moves(VERIFIER, self._style)
        game.verifier = verifier.end(_read(chain), "answer", game.task.answers[0])

    def _search(self, query: str) -> list[Document]:
        return self._retriever.search([query], self._top_k)[0]

    def _chance(self, share: float) -> bool:
        return self._random.random() < share


def _inside(statement: str) -> str:
    """A statement as it stands inside of a sentence."""
    return "the " + statement[4:] if statement.startswith("The ") else statement


def _read(chain: Sequence[Fact]) -> str:
    """What the documents state, in the order of the question."""
    return " ".join(fact.read for fact in chain)


def _leads(fact: Fact) -> str:
    if not fact.noun:
        return f"{fact.subject} leads to {fact.object}."
    return f"The {fact.noun} of {fact.subject} is {fact.object}."
