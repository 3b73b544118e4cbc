"""The solver on question sets, greedy, through the same engine as training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ssp_jax import hosts, prompts, rewards
from ssp_jax.data import Task
from ssp_jax.engine import Engine, Stats
from ssp_jax.episodes import SOLVER, Episode, Player, Stage, episode_id


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one set in percent; episodes in the order of its questions."""

    em: float
    f1: float
    n: int
    searches: float  # per question
    episodes: list[Episode]

    def summary(self) -> dict[str, float]:
        return {"em": self.em, "f1": self.f1, "n": self.n}


def evaluate(
    engine: Engine,
    stage: Stage,
    sets: dict[str, list[Task]],
    params: Any,
    key: Any,
    temperature: float,
    progress: Callable[[Stats], None] = lambda stats: None,
) -> dict[str, Result]:
    """Plays all questions of all sets at once, so that the slots stay full; each process plays its share."""
    tasks = [(name, task) for name, questions in sets.items() for task in questions]
    ended: dict[int, Episode] = {}

    def finished(player: Player) -> list[Player]:
        ended[player.uid] = player.episode()
        return []

    def play_own() -> dict[int, Episode]:
        players = []
        for row in hosts.own_share([1.0] * len(tasks)):
            prompt = stage.prompt(prompts.solver_messages(stage.style, tasks[row][1].question))
            players.append(Player(stage, SOLVER, episode_id(SOLVER, row, 0), temperature, prompt))
        engine.play(params, key, players, finished, progress)
        return dict(ended)

    for part in hosts.share(play_own, {"the questions of an evaluation": hosts.digest(tasks)}):
        ended |= part
    results = {}
    for name in sets:
        rows = [row for row, (owner, _) in enumerate(tasks) if owner == name]
        played = [ended[episode_id(SOLVER, row, 0)] for row in rows]
        answers = [(prompts.last_answer(e.text), tasks[row][1].answers) for e, row in zip(played, rows, strict=True)]
        results[name] = Result(
            em=100 * float(np.mean([rewards.exact_match(a, golds) for a, golds in answers])),
            f1=100 * float(np.mean([rewards.f1_score(a, golds) for a, golds in answers])),
            n=len(rows),
            searches=float(np.mean([len(e.queries) for e in played])),
            episodes=played,
        )
    return results
