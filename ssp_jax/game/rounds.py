"""The records of a round: its games, what is trained on, and what the next round needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssp_jax.data import Document, Task
from ssp_jax.game.causes import cause
from ssp_jax.game.examples import Example
from ssp_jax.game.judge import Verdict
from ssp_jax.game.noise import distinct
from ssp_jax.game.roles import Episode
from ssp_jax.rollout.engine import Stats


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that is played: verified in this round, or reused from the pool."""

    text: str
    answers: tuple[str, ...]
    reused: bool = False


@dataclasses.dataclass
class Game:
    """A given answer and the episodes about it. They are filled in as they end."""

    index: int  # in the round; proposals for one answer are neighbours
    task: Task
    proposer: Episode | None = None
    proposals: int = 0
    fault: str = ""  # "" once the question is verified
    noise: list[Document] = dataclasses.field(default_factory=list)  # that the verifier read
    verifier: Episode | None = None
    # Ids of the documents, in the order in which the verifier read them.
    verifier_order: list[str] = dataclasses.field(default_factory=list)
    question: Question | None = None
    attempts: list[Episode] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    verdicts: dict[int, Verdict] = dataclasses.field(default_factory=dict)  # of episodes, by uid
    proposer_reward: float = 0.0
    shown: tuple[Example, ...] = ()  # worked examples in the prompts of all its players

    @property
    def cause(self) -> str:
        """Why its proposal has the fault; "" where the fault says it, or there is none."""
        return cause(self.fault, self.proposer, self.verifier, self.task.answers)

    @property
    def is_fresh(self) -> bool:
        """The question is a new one, and verified."""
        return self.question is not None and not self.question.reused

    @property
    def is_reused(self) -> bool:
        """The question is one of the pool."""
        return self.question is not None and self.question.reused


@dataclasses.dataclass
class ReplayState:
    """What the next round needs: verified questions and, for noise, the documents that each game
    has found and its answers.
    """

    pool: list[Question] = dataclasses.field(default_factory=list)
    documents: list[list[Document]] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        documents = []
        for of_game in self.documents:
            documents.append([[d.id, d.title, d.text] for d in of_game])
        return {
            "pool": [[question.text, list(question.answers)] for question in self.pool],
            "documents": documents,
            "answers": [list(answers) for answers in self.answers],
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "ReplayState":
        pool = [Question(text, tuple(answers)) for text, answers in saved["pool"]]
        documents = []
        for of_game in saved["documents"]:
            documents.append([Document(*fields) for fields in of_game])
        answers = saved.get("answers", [])  # earlier versions kept none
        return cls(pool, documents, [tuple(of_game) for of_game in answers])


@dataclasses.dataclass(frozen=True)
class Training:
    """Episodes of one role with their rewards and advantages, arrays of one float an episode."""

    episodes: list[Episode]
    rewards: np.ndarray
    advantages: np.ndarray


@dataclasses.dataclass(frozen=True)
class Round:
    """What was played in a step. Every process has the games of all."""

    games: list[Game]
    proposer: Training
    solver: Training
    stats: Stats
    metrics: dict[str, float]

    @property
    def useless_reply(self) -> str | None:
        """The judge's first reply, where it was asked and no reply was a verdict; else None."""
        verdicts = all_verdicts(self.games)
        if not verdicts or any(verdict.right is not None for verdict in verdicts):
            return None
        return verdicts[0].reply


def all_verdicts(games: Sequence[Game]) -> list[Verdict]:
    return [verdict for game in games for verdict in game.verdicts.values()]


def found_documents(game: Game) -> list[Document]:
    """The documents that the game's proposer has found, each once."""
    return list(distinct(game.proposer.documents).values()) if game.proposer else []


def readable(game: Game) -> dict[str, Any]:
    """A game for JSON files that people read."""
    attempts = []
    for episode, score in zip(game.attempts, game.scores, strict=True):
        attempts.append({**_readable_episode(episode), "score": score})
    found = game.proposer.documents if game.proposer else ()
    return {
        "answer": game.task.answers[0],
        "requested_searches": game.task.searches,
        "examples": game.task.examples,
        "proposer": game.proposer and _readable_episode(game.proposer),
        "documents": [dataclasses.asdict(document) for document in found],
        "noise": [dataclasses.asdict(document) for document in game.noise],
        "verifier_order": game.verifier_order,
        "fault": game.fault,
        "cause": game.cause,
        "question": game.question and dataclasses.asdict(game.question),
        "verifier": game.verifier and _readable_episode(game.verifier),
        "attempts": attempts,
        "proposer_reward": game.proposer_reward,
    }


def _readable_episode(episode: Episode) -> dict[str, Any]:
    return {"turns": episode.turns_for_json(), "stop_reason": episode.stop_reason}
