"""Scripted players: they know the game's rules and a world's form, and search for the rest.

A player is a generator that yields a search query, is sent the documents found, and returns its
episode. `Imperfection` makes them know every move but play poorly, so that a model taught by them
leaves self-play something to find. The tokens of an episode are the prompt's, then each segment's,
encoded alone: as the real game makes them.
"""

import json
import random
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assets.tiny import worlds
from assets.tiny.facts import real_words
from assets.tiny.worlds import Country, Passage, Question, World
from ssp_jax.data import Document
from ssp_jax.game.chat import encode_prompt
from ssp_jax.game.prompts import (
    STYLES,
    observation,
    proposer_messages,
    solver_messages,
    verifier_messages,
)
from ssp_jax.game.rewards import exact_match
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.search import Retriever

STYLE = STYLES["brief"]
TOP_K = 3
PROPOSER_SEARCHES = 3  # at most
NOISE_PASSAGES = 4
EPISODES_PER_WORLD = 100
ROLE_SHARES = {"solver_one_hop": 0.25, "solver_two_hop": 0.25, "proposer": 0.28, "verifier": 0.22}

# The word by which the corpus speaks of a relation.
KEYWORDS = {
    "capital": "capital",
    "currency": "currency",
    "language": "language",
    "domain": "internet domain",
    "code": "calling code",
    "city": "place",
}

Segments = list[tuple[str, bool]]
Search = Callable[[Sequence[str], int], list[list[Document]]]


@dataclass(frozen=True)
class Imperfection:
    """Probabilities of weak moves. All zero: as good as the script can play."""

    # searches for the name alone, without the word for what it wants to know
    entity_query: float = 0.0
    question_query: float = 0.0  # searches for the whole question (a proposer: for the name alone)
    # guesses after a search that did not show the fact, instead of searching again
    give_up: float = 0.0
    answer_early: float = 0.0  # guesses after the first search for a two-hop question
    slip: float = 0.0  # copies another value of the documents although the right one stands there
    short_question: float = 0.0  # proposer asked for two searches writes a question with one hop
    wrong_question: float = 0.0  # proposer asks for another relation than that of the given answer
    spoiled_question: float = 0.0  # proposer names the given answer in the question


PERFECT = Imperfection()
MIXED = Imperfection(
    entity_query=0.25,
    question_query=0.25,
    give_up=0.6,
    answer_early=0.6,
    slip=0.05,
    short_question=0.2,
    wrong_question=0.03,
    spoiled_question=0.03,
)
VARIANTS = {
    "perfect": PERFECT,
    "name as query": replace(PERFECT, entity_query=1.0),
    "name as query, gives up": replace(PERFECT, entity_query=1.0, give_up=1.0),
    "question as query": replace(PERFECT, question_query=1.0),
    "question as query, gives up": replace(PERFECT, question_query=1.0, give_up=1.0),
    "answers early": replace(PERFECT, answer_early=1.0),
    "mixed": MIXED,
}


@dataclass(frozen=True)
class Episode:
    """A scripted episode.

    messages: the prompt. A segment is (text, written by the model?). answer: of a solver or
    verifier, or the true one of a proposer's question. right: it is the wanted one, and the
    question does not contain it.
    """

    role: str
    messages: list[dict[str, str]]
    segments: Segments
    question: Question
    documents: tuple[Document, ...]
    answer: str
    right: bool


Player = Generator[str, list[Document], Episode]


@dataclass(frozen=True)
class Goal:
    """A given answer: the value `text` of a relation to `country`, or itself ("country")."""

    text: str
    relation: str
    country: str

    @property
    def requests(self) -> tuple[int, ...]:
        """Numbers of searches to ask for; a country itself is the bridge of two-hop questions."""
        return (1,) if self.relation == "country" else (1, 2)


class Script:
    """The players of one world. They see documents, and know of each which fact it states."""

    def __init__(
        self,
        world: World,
        passages: Sequence[Passage],
        imperfection: Imperfection,
        rng: random.Random,
    ) -> None:
        self.world, self.imperfection, self.rng = world, imperfection, rng
        self.facts = {passage.document.id: passage for passage in passages}

    def read(self, documents: Sequence[Document]) -> list[Passage]:
        return [self.facts[document.id] for document in documents]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # --- solver and verifier ---

    def solve(self, question: Question) -> Player:
        """Search for the bridge, then for the fact, each by a name and the word of a relation."""
        segments: Segments = []
        found: list[Document] = []
        asked: list[str] = []
        early = question.hops == 2 and self.chance(self.imperfection.answer_early)
        for turn in range(question.hops + 1):
            country, answer = solution(question, self.read(found))
            stuck = turn >= question.hops or (turn == 1 and country is None)
            if (
                answer
                or (turn == 1 and early)
                or (stuck and self.chance(self.imperfection.give_up))
            ):
                break
            name, wanted = (
                (country, question.target) if country else (question.start_value, question.start)
            )
            best = f"{name} {KEYWORDS[wanted]}"
            query = best if stuck else self._query(best, name, question.text)
            query = next((q for q in (query, best, question.text, name) if q not in asked), best)
            asked.append(query)
            yield from _search(segments, found, query)
        return self._answered(
            f"solver_{'two' if question.hops == 2 else 'one'}_hop", question, segments, found
        )

    def verify(self, question: Question, documents: Sequence[Document]) -> Episode:
        """Answer from the given documents alone."""
        return self._answered("verifier", question, [], documents)

    def _answered(
        self, role: str, question: Question, segments: Segments, documents: Sequence[Document]
    ) -> Episode:
        facts = self.read(documents)
        answer = solution(question, facts)[1]
        if answer is None or self.chance(self.imperfection.slip):
            answer = self._guess(question, facts)
        segments.append((f"<answer> {answer} </answer>", True))
        if role == "verifier":
            messages = verifier_messages(STYLE, question.text, documents)
        else:
            messages = solver_messages(STYLE, question.text)
        right = exact_match(answer, [question.answer])
        return Episode(role, messages, segments, question, tuple(documents), answer, right)

    def _guess(self, question: Question, facts: Sequence[Passage]) -> str:
        """A wrong answer out of the documents, of the right kind when there is one."""
        if question.target == "country":
            kind = [fact.country for fact in facts]
        else:
            kind = [fact.value for fact in facts if fact.relation == question.target]
        anything = [name for fact in facts for name in (fact.country, fact.value)]
        for names in (kind, anything):
            wrong = [name for name in names if name not in (question.answer, question.start_value)]
            if wrong:
                return self.rng.choice(wrong)
        return question.start_value

    def _query(self, best: str, name: str, question: str) -> str:
        weak = self.imperfection
        weights = (
            weak.entity_query,
            weak.question_query,
            1 - weak.entity_query - weak.question_query,
        )
        return self.rng.choices((name, question, best), weights)[0]

    # --- proposer ---

    def propose(self, goal: Goal, searches: int) -> Player:
        """Search for the given answer, then, for its country, for as many clues as are needed."""
        segments: Segments = []
        found: list[Document] = []
        hops = 1 if self.chance(self.imperfection.short_question) else searches
        needed = 1 if goal.relation == "country" else hops - 1
        relations = [relation for relation in worlds.VALUE_RELATIONS if relation != goal.relation]
        self.rng.shuffle(relations)
        first = relations.pop() if goal.relation == "country" else goal.relation
        yield from _search(
            segments, found, self._query(f"{goal.text} {KEYWORDS[first]}", goal.text, goal.text)
        )
        for _ in range(PROPOSER_SEARCHES - 1):
            facts = self.read(found)
            linked = goal.relation == "country" or _find(facts, goal.relation, value=goal.text)
            if not linked or len(self._clues(goal, facts)) >= needed:
                break
            best = f"{goal.country} {KEYWORDS[relations.pop()]}"
            yield from _search(segments, found, self._query(best, goal.country, goal.country))
        question = self._compose(goal, self._clues(goal, self.read(found)), needed)
        segments.append((f"<question> {question.text} </question>", True))
        right = question.answer == goal.text and fair(question)
        messages = proposer_messages(STYLE, goal.text, searches, "")
        return Episode(
            "proposer", messages, segments, question, tuple(found), question.answer, right
        )

    def _clues(self, goal: Goal, facts: Sequence[Passage]) -> list[tuple[str, str]]:
        """The facts read so far that can stand for the country and do not give the answer away."""
        own = {
            (f.relation, f.value): None
            for f in facts
            if f.country == goal.country and f.relation != goal.relation
        }
        return [
            clue
            for clue in own
            if self.world.leads(*clue) and not worlds.similar(clue[1], goal.text)
        ]

    def _compose(self, goal: Goal, clues: list[tuple[str, str]], needed: int) -> Question:
        """The question that the clues allow; with too few clues, an easier one."""
        country = self.world.by_name[goal.country]
        if self.chance(self.imperfection.spoiled_question):
            return self._spoiled(goal, country)
        chosen = self.rng.sample(clues, min(needed, len(clues)))
        if goal.relation == "country":
            return (
                worlds.country_question(country, *chosen[0], self.rng)
                if chosen
                else self._spoiled(goal, country)
            )
        target = goal.relation
        if self.chance(self.imperfection.wrong_question):
            target = self.rng.choice([r for r in worlds.VALUE_RELATIONS if country.values(r)])
        if chosen and chosen[0][0] != target:
            return worlds.bridge_question(country, *chosen[0], target, self.rng)
        return worlds.value_question(country, target, self.rng)

    def _spoiled(self, goal: Goal, country: Country) -> Question:
        """A question that names the given answer."""
        if goal.relation == "country":
            targets = [relation for relation in worlds.VALUE_RELATIONS if country.values(relation)]
            return worlds.value_question(country, self.rng.choice(targets), self.rng)
        return worlds.country_question(country, goal.relation, goal.text, self.rng)


def _search(
    segments: Segments, found: list[Document], query: str
) -> Generator[str, list[Document], None]:
    """Write the call, receive the documents, write the observation."""
    segments.append((f"<search> {query} </search>", True))
    documents = yield query
    found.extend(document for document in documents if document not in found)
    segments.append((observation(STYLE, documents), False))


def _find(
    facts: Sequence[Passage], relation: str, *, country: str = "", value: str = ""
) -> Passage | None:
    for fact in facts:
        if (
            fact.relation == relation
            and country in ("", fact.country)
            and value in ("", fact.value)
        ):
            return fact
    return None


def solution(question: Question, facts: Sequence[Passage]) -> tuple[str | None, str | None]:
    """(the country, the answer), each None where the facts do not show it."""
    if question.start != "country" and not _find(facts, question.start, value=question.start_value):
        return None, None
    if question.target == "country":
        return question.country, question.country
    fact = _find(facts, question.target, country=question.country)
    return question.country, fact.value if fact else None


def fair(question: Question) -> bool:
    """The game refuses a question that contains its answer."""
    return question.answer.lower() not in question.text.lower()


def goals(world: World) -> list[Goal]:
    """All given answers with a question of their own: countries, and values of one country."""
    found = []
    for country in world.countries:
        if worlds.starts(world, country):
            found.append(Goal(country.name, "country", country.name))
        for relation in worlds.VALUE_RELATIONS:
            for value in country.values(relation):
                question = worlds.value_question(country, relation, random.Random(0))
                if (
                    world.owners[relation, value] == [country.name]
                    and worlds.searchable(value)
                    and fair(question)
                ):
                    found.append(Goal(value, relation, country.name))
    return found


def play(players: Sequence[Player], search: Search) -> list[Episode]:
    """Run all players side by side; each round is one batch of queries."""
    episodes: dict[int, Episode] = {}
    queries: dict[int, str] = {}
    inbox: dict[int, list[Document] | None] = dict.fromkeys(range(len(players)))
    while inbox:
        queries = {}
        for row, documents in inbox.items():
            try:
                queries[row] = (
                    next(players[row]) if documents is None else players[row].send(documents)
                )
            except StopIteration as end:
                episodes[row] = end.value
        inbox = dict(zip(queries, search(list(queries.values()), TOP_K), strict=True))
    return [episodes[row] for row in range(len(players))]


def write_corpus(path: Path, passages: Sequence[Passage]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for document in (passage.document for passage in passages):
            line = {"id": document.id, "contents": f"{document.title}\n{document.text}"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def index_passages(passages: Sequence[Passage], folder: Path) -> Retriever:
    """The real retriever with its default settings."""
    write_corpus(folder / "corpus.jsonl", passages)
    build_index(
        folder / "corpus.jsonl", folder / "index", stemmer="english", stopwords="en", k1=1.5, b=0.75
    )
    return Retriever.load(folder / "index")


def world_episodes(script: Script, search: Search, count: int) -> list[Episode]:
    """`count` episodes of all roles in one world, in random order.

    Verifiers are asked questions of its proposers.
    """
    rng, world = script.rng, script.world
    roles = rng.choices(list(ROLE_SHARES), list(ROLE_SHARES.values()), k=count)
    one_hop = [
        q for country in world.countries for q in worlds.one_hop_questions(world, country, rng)
    ]
    two_hop = [
        q for country in world.countries for q in worlds.two_hop_questions(world, country, rng)
    ]
    given = goals(world)
    players: list[Player] = []
    for role in roles:
        if role == "solver_one_hop":
            players.append(script.solve(rng.choice(one_hop)))
        elif role == "solver_two_hop":
            players.append(script.solve(rng.choice(two_hop)))
        else:  # a verifier's question needs a proposer
            goal = rng.choice(given)
            players.append(script.propose(goal, rng.choice(goal.requests)))
    episodes = play(players, search)
    passages = [passage.document for passage in script.facts.values()]
    for row, role in enumerate(roles):
        if role == "verifier":
            proposal = episodes[row]
            noise = [d for d in rng.sample(passages, NOISE_PASSAGES) if d not in proposal.documents]
            documents = [*proposal.documents, *noise]
            rng.shuffle(documents)
            episodes[row] = script.verify(proposal.question, documents)
    return episodes


def scripted_episodes(
    seed: int, count: int, vocabulary: Sequence[str], imperfection: Imperfection
) -> list[Episode]:
    """Episodes in invented worlds with names of the vocabulary's tokens; a pure function."""
    pieces = worlds.vocabulary_pieces(vocabulary, real_words())
    rng = random.Random(seed)
    episodes: list[Episode] = []
    while len(episodes) < count:
        world = worlds.make_invented_world(rng, pieces)
        script = Script(world, worlds.passages(world, rng), imperfection, rng)
        with tempfile.TemporaryDirectory() as folder:
            retriever = index_passages(list(script.facts.values()), Path(folder))
            episodes += world_episodes(
                script, retriever.search, min(EPISODES_PER_WORLD, count - len(episodes))
            )
    return episodes


def encode_episode(tokenizer: Any, episode: Episode) -> tuple[list[int], list[bool]]:
    """(tokens, written by the model?)"""
    tokens = encode_prompt(tokenizer, episode.messages, "chat")
    sampled = [False] * len(tokens)
    for text, by_model in episode.segments:
        piece = tokenizer.encode(text, add_special_tokens=False)
        tokens = tokens + piece
        sampled += [by_model] * len(piece)
    return tokens, sampled


def generate_episodes(
    seed: int, count: int, tokenizer: Any, imperfection: Imperfection
) -> list[tuple[str, list[int], list[bool]]]:
    """(role, tokens, written by the model?) of scripted episodes, for the warm start."""
    episodes = scripted_episodes(seed, count, sorted(tokenizer.get_vocab()), imperfection)
    return [(episode.role, *encode_episode(tokenizer, episode)) for episode in episodes]


def success_rate(
    questions: Sequence[Question],
    world: World,
    passages: Sequence[Passage],
    search: Search,
    weak: Imperfection,
) -> float:
    """Share of the questions that the scripted solver answers."""
    script = Script(world, passages, weak, random.Random(0))
    played = play([script.solve(question) for question in questions], search)
    return sum(episode.right for episode in played) / len(played)
