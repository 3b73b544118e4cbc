"""One round of the game in the paper's words: propose, verify, solve, reward (SSP section 3,
Algorithm 1).

All episodes of a round share the engine's slots: a question is verified as soon as its proposer
ends, and its solvers start as soon as it is verified; those that need a judge's word wait until all
its cases are there. Everything that an episode depends on is fixed when the round starts (the noise
documents come from the round before, reused questions from the pool as it stood), so results do not
depend on timing.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssp_jax.data import Document, Task
from ssp_jax.game import prompts, roles, rules
from ssp_jax.game.judge import Case, Judge, Verdict
from ssp_jax.game.noise import Noise, distinct
from ssp_jax.game.rewards import PROPOSER_REWARDS, needs_judge, solver_reward
from ssp_jax.game.roles import (
    PROPOSER,
    SOLVER,
    VERIFIER,
    Episode,
    EpisodeContext,
    EpisodePlayer,
    Role,
)
from ssp_jax.learner import objective
from ssp_jax.retriever.search import Search
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import processes


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that is played: verified in this round, or reused from the pool."""

    text: str
    answers: tuple[str, ...]
    reused: bool = False


@dataclasses.dataclass
class Game:
    """One given answer's way through a round, filled in as its episodes end. fault is "" once
    verified.
    """

    index: int
    task: Task
    proposer: Episode | None = None
    proposals: int = 0
    fault: str = ""
    noise: list[Document] = dataclasses.field(default_factory=list)  # that the verifier read
    verifier: Episode | None = None
    question: Question | None = None
    attempts: list[Episode] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    verdicts: dict[int, Verdict] = dataclasses.field(default_factory=dict)  # of episodes, by uid
    proposer_reward: float = 0.0


@dataclasses.dataclass
class ReplayState:
    """What a round leaves to the next: verified questions; for noise, each game's finds and
    answers.
    """

    pool: list[Question] = dataclasses.field(default_factory=list)
    documents: list[list[Document]] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "pool": [[q.text, list(q.answers)] for q in self.pool],
            "documents": [[[d.id, d.title, d.text] for d in game] for game in self.documents],
            "answers": [list(answers) for answers in self.answers],
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "ReplayState":
        pool = [Question(text, tuple(answers)) for text, answers in saved["pool"]]
        documents = [[Document(*d) for d in game] for game in saved["documents"]]
        answers = saved.get("answers", [])  # earlier versions kept none
        return cls(pool, documents, [tuple(of_game) for of_game in answers])


@dataclasses.dataclass(frozen=True)
class Training:
    """Episodes of one role with their rewards and advantages."""

    episodes: list[Episode]
    rewards: np.ndarray
    advantages: np.ndarray


@dataclasses.dataclass(frozen=True)
class Round:
    games: list[Game]
    proposer: Training
    solver: Training
    stats: Stats
    metrics: dict[str, float]

    @property
    def useless_reply(self) -> str | None:
        """What the judge said, where it was asked and not one of its replies was a verdict."""
        verdicts = [verdict for game in self.games for verdict in game.verdicts.values()]
        unheard = bool(verdicts) and all(verdict.right is None for verdict in verdicts)
        return verdicts[0].reply if unheard else None


class SelfPlay:
    """The rules of a run, ready to play rounds. Holds no state between rounds: that is `Memory`."""

    def __init__(
        self,
        config: ConfigDict,
        stage: EpisodeContext,
        engine: Engine,
        retriever: Search,
        judge: Judge | None = None,
    ):
        self._config, self._stage, self._engine, self._retriever = config, stage, engine, retriever
        self._judge = judge
        self._pair = rules.RL_PAIRS[config.game.rl_pair]
        sizes = rules.group_sizes(config.game.rl_pair, config.game.group_size)
        self._proposals, self._attempts = sizes

    def play(
        self,
        step: int,
        tasks: Sequence[Task],
        memory: ReplayState,
        params: Any,
        key: Any,
        progress: Callable[[Stats], None] = lambda stats: None,
    ) -> tuple[Round, ReplayState]:
        """One round over these given answers. Each process plays its share of them, and all get the
        whole round.
        """
        games = [
            Game(i, task) for i, task in enumerate(t for t in tasks for _ in range(self._proposals))
        ]
        noise = self._noise(memory.answers, memory.documents)
        table = _Play(self._config, self._stage, games, noise, memory.pool, step)
        table.attempts = self._attempts
        own = processes.local_share([game.task.searches for game in games])
        facts: dict[str, Any] = {
            "the step": step,
            "a step's given answers": processes.digest(tasks),
        }
        facts["the memory"] = processes.digest(memory)

        def played(first: Callable[[], list[EpisodePlayer]]) -> list[Stats]:
            """These players and what they lead to; then all processes hand over their games."""

            def action() -> tuple[Stats, list[Game]]:
                players, stats = first(), Stats()
                while players:  # those that wait for a judge go on in a next wave
                    stats = _added(
                        stats, self._engine.play(params, key, players, table.finished, progress)
                    )
                    players = (
                        table.judged(self._judge, functools.partial(progress, stats))
                        if self._judge
                        else []
                    )
                return stats, [games[i] for i in own]

            parts = processes.all_gather_objects(action, facts)
            for game in (game for _, part in parts for game in part):
                if game.index not in own:
                    games[game.index] = game
            return [stats for stats, _ in parts]

        costs = played(lambda: [table.propose(games[i]) for i in own])
        c = self._config.game
        # nothing is verified before all have proposed, and proposed again
        if c.noise_source == "same_step":
            for _ in range(1 + (c.resample_rounds if c.batch_fill == "resample" else 0)):
                answers = [game.task.answers for game in games]
                table.noise = self._noise(answers, _documents_of(games))
                costs = [_added(*pair) for pair in zip(costs, played(table.release), strict=True)]
        return self._reward(games, costs), self._remember(step, games, memory)

    def _reward(self, games: list[Game], costs: list[Stats]) -> Round:
        """Solver: is the answer right. Proposer: 1 - mean solver success, or the price of a failed
        question.
        """
        c = self._config.reward
        for game in games:
            fresh = game.question is not None and not game.question.reused
            scores_QG = np.array([game.scores])
            own = PROPOSER_REWARDS[c.proposer](scores_QG)[0] if fresh and game.scores else None
            game.proposer_reward = c.invalid_question if own is None else float(own)
        proposed = [(g.proposer, g.proposer_reward, g) for g in games if g.proposer is not None]
        solved = [(e, s, g) for g in games for e, s in zip(g.attempts, g.scores, strict=True)]
        # Processes play side by side: their work adds up, and the slowest one's time is the
        # round's.
        stats = dataclasses.replace(
            functools.reduce(_added, costs), seconds=max(cost.seconds for cost in costs)
        )
        waiting = 1 - sum(cost.seconds for cost in costs) / max(len(costs) * stats.seconds, 1e-9)
        metrics = _metrics(games, stats) | {"play/waiting": waiting if len(costs) > 1 else 0.0}
        if self._judge:
            verdicts = [verdict for game in games for verdict in game.verdicts.values()]
            metrics |= {
                "judge/asked": len(verdicts),
                "judge/failed": sum(v.right is None for v in verdicts),
            }
        proposer, solver = self._training(PROPOSER, proposed), self._training(SOLVER, solved)
        return Round(games, proposer, solver, stats, metrics)

    def _training(self, role: Role, ended: list[tuple[Episode, float, Game]]) -> Training:
        """Without those episodes whose prompt was refused for its length: the model wrote nothing."""
        played = [(episode, reward, game) for episode, reward, game in ended if episode.num_sampled]
        reward_E = np.array([reward for _, reward, _ in played])
        algorithm, baseline = (
            self._pair[0 if role is PROPOSER else 1],
            self._config.learner.proposer_baseline,
        )
        games, std, leave_one_out = [game for _, _, game in played], False, False
        groups: Sequence[int]
        # proposals for one answer form a group, attempts at one question form a group
        if algorithm == "grpo":
            groups = [g.index // self._proposals if role is PROPOSER else g.index for g in games]
            std = self._config.learner.grpo_std
        elif algorithm == "reinforcepp":
            groups, std = [0] * len(games), True
        elif role is SOLVER or baseline == "none":
            groups = range(len(games))
        elif baseline == "hop_grouped":
            groups, std = [g.task.searches for g in games], True
        else:
            groups, leave_one_out = [0] * len(games), baseline == "leave_one_out"
        advantage_E = objective.advantages(
            reward_E, np.array(groups), std=std, leave_one_out=leave_one_out
        )
        return Training([e for e, _, _ in played], reward_E, advantage_E)

    def _noise(
        self, answers: Sequence[tuple[str, ...]], documents: Sequence[Sequence[Document]]
    ) -> Noise:
        by_game = self._config.game.noise_unit == "trajectory"
        return Noise(answers, documents, self._retriever, by_game=by_game)

    def _remember(self, step: int, games: list[Game], memory: ReplayState) -> ReplayState:
        fill = self._config.game.batch_fill
        pool = [] if fill in ("dummy", "resample") else list(memory.pool)
        if fill == "periodic_reset" and (step + 1) % self._config.game.reset_interval == 0:
            pool = []
        elif fill not in ("dummy", "resample"):
            pool += [g.question for g in games if g.question is not None and not g.question.reused]
        return ReplayState(pool, _documents_of(games), [game.task.answers for game in games])


class _Play:
    """What follows the end of each episode. Its methods return the players that an end leads to."""

    def __init__(
        self,
        config: ConfigDict,
        stage: EpisodeContext,
        games: list[Game],
        noise: Noise,
        pool: list[Question],
        step: int,
    ):
        self._config, self._stage, self._games = config, stage, games
        self.noise, self._pool, self._step = noise, pool, step
        self.attempts = 1
        self.held: list[Game] = []  # waiting for the noise of this round
        self._unjudged: list[tuple[Game, Episode]] = []

    def _player(
        self, role: Role, game: Game, attempt: int, messages: list[dict[str, str]]
    ) -> EpisodePlayer:
        s = self._config.sampling
        temperature = s.verify_temperature if role is VERIFIER else s.temperature
        uid = roles.episode_id(role, game.index, attempt)
        return EpisodePlayer(self._stage, role, uid, temperature, self._stage.prompt(messages))

    def propose(self, game: Game) -> EpisodePlayer:
        task = game.task
        messages = prompts.proposer_messages(
            self._stage.style, task.answers[0], task.searches, task.examples
        )
        game.proposals += 1
        game.noise = []
        game.verifier = None  # of the proposal before
        return self._player(PROPOSER, game, game.proposals - 1, messages)

    def finished(self, player: EpisodePlayer) -> Iterable[EpisodePlayer]:
        game, episode = self._games[roles.row_of(player.uid)], player.episode()
        if player.role is PROPOSER:
            return self._after_proposer(game, episode)
        answer, metric = prompts.last_answer(episode.text), self._config.reward.metric
        if game.question is not None and needs_judge(answer, game.question.answers, metric):
            self._unjudged.append((game, episode))
            return []
        return self._after_answer(game, episode)

    def judged(self, judge: Judge, progress: Callable[[], None]) -> list[EpisodePlayer]:
        """Hears the judge about all who wait for it, and goes on with them, in an order that no
        timing changes.
        """
        waiting, self._unjudged = sorted(self._unjudged, key=lambda pair: pair[1].uid), []
        asked = [
            (game.question, prompts.last_answer(episode.text) or "") for game, episode in waiting
        ]
        cases = [
            Case(question.text, question.answers, answer) for question, answer in asked if question
        ]

        def take(i: int, verdict: Verdict) -> None:
            game, episode = waiting[i]
            game.verdicts[episode.uid] = verdict

        if cases:
            judge.ask(cases, take, progress)
        return [player for game, episode in waiting for player in self._after_answer(game, episode)]

    def _after_answer(self, game: Game, episode: Episode) -> Iterable[EpisodePlayer]:
        return (self._after_verifier if episode.role == VERIFIER.name else self._after_solver)(
            game, episode
        )

    def _after_proposer(self, game: Game, episode: Episode) -> Iterable[EpisodePlayer]:
        """The rule filter."""
        game.proposer = episode
        if episode.stop_reason == "prompt_tokens":
            return self._failed(game, "too_long_to_propose")
        text, answer = prompts.first_question(episode.text), game.task.answers[0]
        fault = rules.question_fault(
            text, answer, episode.queries, len(episode.documents), self._config.rules
        )
        if fault is not None:
            return self._failed(game, fault)
        assert text is not None
        game.fault, game.question = "", Question(text, game.task.answers)
        if self._solver(game, 0).stop_reason:  # no solver could hear it, so none would be right
            return self._failed(game, "too_long_to_solve")
        if not self._config.game.verify:
            return self._solve(game)
        if self._config.game.noise_source == "same_step":
            self.held.append(game)
            return []
        return self.verify(game)

    def release(self) -> list[EpisodePlayer]:
        """Verifies what waited for the noise of this round."""
        held, self.held = self.held, []
        return [player for game in held for player in self.verify(game)]

    def verify(self, game: Game) -> list[EpisodePlayer]:
        """The same model answers from the proposer's own results and noise, without searching."""
        assert game.proposer is not None and game.question is not None
        own, number = distinct(game.proposer.documents), self._config.game.noise_documents
        rng = np.random.default_rng((self._config.seed, 1, self._step, game.index))
        game.noise = self.noise.draw(rng, number, own, game.task.answers)
        documents = [*own.values(), *game.noise]
        rng = np.random.default_rng((self._config.seed, 2, self._step, game.index))
        shuffled = [documents[i] for i in rng.permutation(len(documents))]
        messages = prompts.verifier_messages(self._stage.style, game.question.text, shuffled)
        return [self._player(VERIFIER, game, game.proposals - 1, messages)]

    def _after_verifier(self, game: Game, episode: Episode) -> Iterable[EpisodePlayer]:
        game.verifier = episode
        if self._score(game, episode) > 0:
            return self._solve(game)
        return self._failed(
            game, "too_long_to_verify" if episode.stop_reason == "prompt_tokens" else "unverified"
        )

    def _failed(self, game: Game, fault: str) -> Iterable[EpisodePlayer]:
        """How the batch is filled when a question fails [P B.1]; a dummy question gives no signal,
        so none plays.
        """
        game.fault, game.question = fault, None
        c = self._config.game
        if c.batch_fill == "resample":
            return [self.propose(game)] if game.proposals <= c.resample_rounds else []
        if c.batch_fill == "dummy" or not self._pool:
            return []
        rng = np.random.default_rng((self._config.seed, 3, self._step, game.index))
        game.question = dataclasses.replace(self._pool[rng.integers(len(self._pool))], reused=True)
        return self._solve(game)

    def _solver(self, game: Game, attempt: int) -> EpisodePlayer:
        assert game.question is not None
        messages = prompts.solver_messages(self._stage.style, game.question.text)
        return self._player(SOLVER, game, attempt, messages)

    def _solve(self, game: Game) -> list[EpisodePlayer]:
        return [self._solver(game, attempt) for attempt in range(self.attempts)]

    def _after_solver(self, game: Game, episode: Episode) -> Iterable[EpisodePlayer]:
        game.attempts.append(episode)
        if len(game.attempts) == self.attempts:
            game.attempts.sort(key=lambda e: e.uid)  # in the order of attempts, not of ends
            game.scores = [self._score(game, e) for e in game.attempts]
        return []

    def _score(self, game: Game, episode: Episode) -> float:
        assert game.question is not None
        found = game.verdicts.get(episode.uid)
        golds, metric = game.question.answers, self._config.reward.metric
        return solver_reward(episode.text, golds, metric, found.right if found else None)


def readable(game: Game) -> dict[str, Any]:
    """A game as a person reads it, for JSON."""

    def shown(episode: Episode | None) -> dict[str, Any] | None:
        if episode is None:
            return None
        turns = [{"who": who, "text": text} for who, text in episode.turns]
        return {"turns": turns, "stop_reason": episode.stop_reason}

    return {
        "answer": game.task.answers[0],
        "requested_searches": game.task.searches,
        "proposer": shown(game.proposer),
        "documents": [dataclasses.asdict(d) for d in game.proposer.documents]
        if game.proposer
        else [],
        "noise": [dataclasses.asdict(d) for d in game.noise],
        "fault": game.fault,
        "question": dataclasses.asdict(game.question) if game.question else None,
        "verifier": shown(game.verifier),
        "attempts": [
            {**(shown(e) or {}), "score": s}
            for e, s in zip(game.attempts, game.scores, strict=True)
        ],
        "proposer_reward": game.proposer_reward,
    }


def _documents_of(games: Sequence[Game]) -> list[list[Document]]:
    return [list(distinct(g.proposer.documents).values()) if g.proposer else [] for g in games]


def _added(a: Stats, b: Stats) -> Stats:
    return Stats(
        **{f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(Stats)}
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0


def _metrics(games: list[Game], stats: Stats) -> dict[str, float]:
    """The funnel, rewards, lengths and rates of a round."""
    faults = Counter(g.fault for g in games if g.fault)
    malformed = sum(n for fault, n in faults.items() if fault not in rules.VERIFICATION_FAULTS)
    fresh = [g for g in games if g.question is not None and not g.question.reused]
    solvers = [e for g in games for e in g.attempts]
    proposers = [g.proposer for g in games if g.proposer is not None]
    answered = [e for e in solvers if e.stop_reason == "answer"]
    return {
        "funnel/proposed": len(games),
        "funnel/well_formed": len(games) - malformed,
        "funnel/verified": len(fresh),
        "funnel/reused": sum(g.question is not None and g.question.reused for g in games),
        "funnel/solved": _mean(_mean(g.scores) for g in fresh),
        **{f"fault/{name}": float(faults[name]) for name in rules.FAULTS},
        "verifier/noise": _mean(len(g.noise) for g in games if g.verifier is not None),
        "reward/proposer": _mean(g.proposer_reward for g in games),
        "reward/solver": _mean(s for g in games for s in g.scores),
        "solver/searches": _mean(len(e.queries) for e in solvers),
        "solver/tokens": _mean(e.num_sampled for e in solvers),
        "solver/length": _mean(len(e.tokens) for e in solvers),
        "solver/answered": len(answered) / max(len(solvers), 1),
        "proposer/searches": _mean(len(e.queries) for e in proposers),
        "proposer/tokens": _mean(e.num_sampled for e in proposers),
        "proposer/length": _mean(len(e.tokens) for e in proposers),
        "play/seconds": stats.seconds,
        "play/episodes": float(stats.finished),
        "play/tokens_per_second": stats.tokens_per_second,
        "play/written_tokens_per_second": stats.written_tokens / max(stats.seconds, 1e-9),
        "play/occupancy": stats.busy_steps / max(stats.slot_steps, 1),
        # of slots that waited for memory
        "play/stalled": stats.stalled_steps / max(stats.slot_steps, 1),
        "play/searches_per_second": stats.searches / max(stats.seconds, 1e-9),
    }
