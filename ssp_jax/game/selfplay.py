"""A round of the game: propose, verify, solve, reward (SSP section 3, Algorithm 1).

All episodes of a round share the engine's slots, without barriers between the phases: the end of an
episode leads to those of the next phase at once. Episodes that need a judge's verdict wait until
all cases of their wave are there. Whatever an episode depends on is fixed when the round starts
(noise documents come from the round before, reused questions from the pool as it was then), so
results do not depend on timing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ssp_jax.data import Document, Task
from ssp_jax.game import prompts, roles, rules
from ssp_jax.game.judge import Case, Judge, Verdict
from ssp_jax.game.metrics import round_metrics
from ssp_jax.game.noise import Noise, distinct
from ssp_jax.game.rewards import (
    PROPOSER_REWARDS,
    cover_exact_match,
    needs_judge,
    solver_reward,
)
from ssp_jax.game.roles import (
    PROPOSER,
    SOLVER,
    VERIFIER,
    Episode,
    EpisodeContext,
    EpisodePlayer,
    Role,
)
from ssp_jax.game.rounds import (
    Game,
    Question,
    ReplayState,
    Round,
    Training,
    all_verdicts,
    found_documents,
)
from ssp_jax.learner import objective
from ssp_jax.retriever.search import Searcher
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import processes

# Takes an episode that has ended and its game; gives the players that follow from it.
Phase = Callable[[Game, Episode], list[EpisodePlayer]]


class SelfPlay:
    """Plays rounds by the rules of a run. Has no state of its own: that is ReplayState."""

    def __init__(
        self,
        config: rules.GameConfig,
        context: EpisodeContext,
        engine: Engine,
        retriever: Searcher,
        judge: Judge | None = None,
    ):
        self._config = config
        self._context = context
        self._engine = engine
        self._retriever = retriever
        self._judge = judge

    def play(
        self,
        step: int,
        tasks: Sequence[Task],
        replay: ReplayState,
        params: Any,
        key: Any,
        progress: Callable[[Stats], None] = lambda stats: None,
    ) -> tuple[Round, ReplayState]:
        """One round over these given answers, and what the next round needs.

        Each process plays its share of the answers; all get the whole round. progress, which may
        raise, is called often. Errors of one process are raised by all.
        """
        games = self._new_games(step, tasks)
        own = processes.local_share([game.task.searches for game in games])
        noise = None
        if self._config.game.noise_source == "previous_step":
            noise = self._noise(replay.answers, replay.documents)

        # Propose, verify, solve, reward: the end of an episode leads to the next phase.
        fillers = self._fillers(step, len(games), replay.pool)
        phases = _Phases(self._config, self._context, self._retriever, step, noise, fillers)
        after = {PROPOSER: phases.verify, VERIFIER: phases.solve, SOLVER: phases.reward}
        waves = _Waves(self._engine, self._judge, self._config.reward.metric, after)
        facts = {
            "the step": step,
            "a step's given answers": processes.digest(tasks),
            "the memory": processes.digest(replay),
        }

        def play_own(first: Callable[[], list[EpisodePlayer]]) -> list[Stats]:
            """Plays these players and all that follow from them; costs of all processes."""

            def action() -> tuple[Stats, list[Game]]:
                stats = waves.play(params, key, first(), progress)
                return stats, [games[index] for index in own]

            gathered = processes.all_gather_objects(action, facts)
            for _, played in gathered:
                for game in played:
                    if game.index not in own:
                        games[game.index] = game
            return [stats for stats, _ in gathered]

        # A question is verified as soon as it is proposed, and solved as soon as it is verified.
        costs = play_own(lambda: [phases.propose(games[index]) for index in own])

        # But where the noise is that of this step, it waits until all have proposed. One that fails
        # then may be proposed again, and waits again.
        for _ in range(self._waits if noise is None else 0):
            noise = self._noise([game.task.answers for game in games], map(found_documents, games))
            more = play_own(functools.partial(phases.verify_waiting, noise))
            costs = [_added(*pair) for pair in zip(costs, more, strict=True)]
        return self._round(games, costs), self._next_replay(step, games, replay)

    def _new_games(self, step: int, tasks: Sequence[Task]) -> list[Game]:
        """As many games for each given answer as it has proposals. At first all have failed."""
        reward = self._config.reward.invalid_question
        sets = self._context.example_sets
        proposed = [task for task in tasks for _ in range(self._config.proposals)]
        games = []
        for i, task in enumerate(proposed):
            drawn = int(_random(self._config.seed, 5, step, i).integers(len(sets)))
            games.append(Game(i, task, proposer_reward=reward, shown=sets[drawn]))
        return games

    def _fillers(self, step: int, games: int, pool: Sequence[Question]) -> list[Question | None]:
        """For each game the question of the pool that takes its place if its own fails.

        With game.pool_reuse = n the pool has n copies of each question, which are dealt out by
        chance: also to games that do not need them, so that none waits for the others.
        """
        section = self._config.game
        if not pool or section.batch_fill in ("dummy", "resample"):
            return [None] * games
        seed = self._config.seed
        if not section.pool_reuse:
            draws = (_random(seed, 3, step, i).integers(len(pool)) for i in range(games))
            return [pool[int(drawn)] for drawn in draws]
        copies = list(dict.fromkeys(pool)) * section.pool_reuse
        places = _random(seed, 3, step, games).permutation(max(games, len(copies)))
        return [copies[place] if place < len(copies) else None for place in places[:games]]

    @property
    def _waits(self) -> int:
        """How often a question may wait for the noise of its step."""
        resamples = self._config.game.batch_fill == "resample"
        return 1 + (self._config.game.resample_rounds if resamples else 0)

    def _noise(
        self, answers: Sequence[tuple[str, ...]], documents: Iterable[Sequence[Document]]
    ) -> Noise:
        by_game = self._config.game.noise_unit == "trajectory"
        return Noise(answers, documents, self._retriever, by_game=by_game)

    def _round(self, games: list[Game], costs: list[Stats]) -> Round:
        # Processes play side by side: their work adds up, the slowest one's time is the round's.
        seconds = [cost.seconds for cost in costs]
        stats = dataclasses.replace(functools.reduce(_added, costs), seconds=max(seconds))
        metrics = round_metrics(games, stats)
        metrics["play/waiting"] = 0.0
        if len(costs) > 1:
            metrics["play/waiting"] = 1 - sum(seconds) / max(len(costs) * stats.seconds, 1e-9)
        if self._judge:
            verdicts = all_verdicts(games)
            metrics["judge/asked"] = len(verdicts)
            metrics["judge/failed"] = sum(verdict.right is None for verdict in verdicts)

        proposed = []
        solved = []
        for game in games:
            if game.proposer is not None:
                proposed.append((game, game.proposer, game.proposer_reward))
            for episode, score in zip(game.attempts, game.scores, strict=True):
                solved.append((game, episode, score))
        return Round(
            games=games,
            proposer=self._training(PROPOSER, proposed),
            solver=self._training(SOLVER, solved),
            stats=stats,
            metrics=metrics,
        )

    def _training(self, role: Role, ended: list[tuple[Game, Episode, float]]) -> Training:
        # In an episode whose prompt was refused for its length the model has written nothing.
        played = [each for each in ended if each[1].num_sampled]
        games = [game for game, _, _ in played]
        rewards_E = np.array([reward for _, _, reward in played])
        advantages_E = self._advantages(role, games, rewards_E)
        return Training([episode for _, episode, _ in played], rewards_E, advantages_E)

    def _advantages(self, role: Role, games: list[Game], rewards_E: np.ndarray) -> np.ndarray:
        """By the algorithm and baseline of the role: objective.advantages has the equations."""
        config = self._config
        algorithm = config.algorithms[0 if role is PROPOSER else 1]
        advantages = functools.partial(objective.advantages, rewards_E)
        everything = np.zeros(len(games), int)
        each = np.arange(len(games))
        if algorithm == "grpo":
            # Proposals for one answer form a group, and so do attempts at one question.
            proposals = config.proposals if role is PROPOSER else 1
            groups_E = np.array([game.index // proposals for game in games], int)
            return advantages(groups_E, std=config.grpo_std)
        if algorithm == "reinforcepp":
            return advantages(everything, std=True)
        if role is SOLVER or config.proposer_baseline == "none":
            return advantages(each)
        if config.proposer_baseline == "hop_grouped":
            hops_E = np.array([game.task.searches for game in games], int)
            return advantages(hops_E, std=True)
        return advantages(everything, leave_one_out=config.proposer_baseline == "leave_one_out")

    def _next_replay(self, step: int, games: list[Game], replay: ReplayState) -> ReplayState:
        pool: list[Question] = []
        fill = self._config.game.batch_fill
        reset = fill == "periodic_reset" and (step + 1) % self._config.game.reset_interval == 0
        if fill in ("full_reuse", "periodic_reset") and not reset:
            pool += replay.pool
            pool += [game.question for game in games if game.question and game.is_fresh]
        documents = [found_documents(game) for game in games]
        return ReplayState(pool, documents, [game.task.answers for game in games])


class _Waves:
    """Plays episodes and all that follow from them. Between waves it asks the judge."""

    def __init__(
        self,
        engine: Engine,
        judge: Judge | None,
        metric: str,
        after: Mapping[Role, Phase],
    ):
        self._engine = engine
        self._judge = judge
        self._metric = metric
        self._after = after
        self._unjudged: list[tuple[Game, EpisodePlayer]] = []

    def play(
        self,
        params: Any,
        key: Any,
        players: list[EpisodePlayer],
        progress: Callable[[Stats], None],
    ) -> Stats:
        stats = Stats()
        while players:
            played = self._engine.play(params, key, players, self._ended, progress)
            stats = _added(stats, played)
            players = []
            if self._judge:
                players = self._judged(self._judge, functools.partial(progress, stats))
        return stats

    def _ended(self, player: EpisodePlayer) -> list[EpisodePlayer]:
        game: Game = player.tag
        episode = player.episode()
        if player.role is not PROPOSER and game.question is not None:
            answer = prompts.last_answer(episode.text)
            if needs_judge(answer, game.question.answers, self._metric):
                self._unjudged.append((game, player))
                return []
        return self._after[player.role](game, episode)

    def _judged(self, judge: Judge, progress: Callable[[], None]) -> list[EpisodePlayer]:
        """Asks the judge about all that wait for it; gives the players that follow from them."""
        # In an order that does not depend on timing.
        waiting = sorted(self._unjudged, key=lambda pair: pair[1].uid)
        self._unjudged = []
        cases = []
        for game, player in waiting:
            assert game.question is not None
            answer = prompts.last_answer(player.episode().text) or ""
            cases.append(Case(game.question.text, game.question.answers, answer))

        def on_verdict(i: int, verdict: Verdict) -> None:
            game, player = waiting[i]
            game.verdicts[player.uid] = verdict

        if cases:
            judge.ask(cases, on_verdict, progress)
        followers = []
        for game, player in waiting:
            followers += self._after[player.role](game, player.episode())
        return followers


class _Phases:
    """What follows from an episode, phase by phase. Each method gives the players to play next.

    noise: for the verifiers; None where questions wait for verify_waiting.
    fillers: of each game, a question of an earlier round to play where its own fails.
    """

    def __init__(
        self,
        config: rules.GameConfig,
        context: EpisodeContext,
        retriever: Searcher,
        step: int,
        noise: Noise | None,
        fillers: Sequence[Question | None],
    ):
        self._config = config
        self._context = context
        self._retriever = retriever
        self._step = step
        self._noise = noise
        self._fillers = fillers
        self._waiting: list[Game] = []  # for the noise of this step

    def propose(self, game: Game) -> EpisodePlayer:
        task = game.task
        messages = prompts.proposer_messages(
            self._context.style, task.answers[0], task.searches, task.examples, game.shown
        )
        game.proposals += 1
        game.noise = []
        game.verifier = None  # of the proposal before
        return self._player(PROPOSER, game, game.proposals - 1, messages)

    def verify(self, game: Game, proposal: Episode) -> list[EpisodePlayer]:
        """The rule filter, and the verifier of a question that passes it [P s3.3]."""
        game.proposer = proposal
        if proposal.stop_reason == "prompt_tokens":
            return self._failed(game, "too_long_to_propose")
        text = prompts.first_question(proposal.text)
        fault = rules.question_fault(
            text,
            game.task.answers[0],
            proposal.queries,
            len(proposal.documents),
            self._config.rules,
            game.task.answers[1:],
        )
        if fault is not None:
            return self._failed(game, fault)
        assert text is not None
        if self._is_found_at_once(text, game.task):
            return self._failed(game, "found_at_once")
        game.fault = ""
        game.question = Question(text, game.task.answers)
        if self._solver(game, 0).stop_reason:  # no solver could read it, so none would be right
            return self._failed(game, "too_long_to_solve")
        if not self._config.game.verify:
            return self._solvers(game)
        if self._noise is None:
            self._waiting.append(game)
            return []
        return [self._verifier(game, self._noise)]

    def _is_found_at_once(self, question: str, task: Task) -> bool:
        """Whether a search for the question itself shows what it should take several to find."""
        if not self._config.rules.forbid_found_at_once or task.searches < 2:
            return False
        (found,) = self._retriever.search([question], self._config.top_k)
        shown = self._context.seen(found)
        return any(cover_exact_match(f"{page.title}\n{page.text}", task.answers) for page in shown)

    def verify_waiting(self, noise: Noise) -> list[EpisodePlayer]:
        """The verifiers of the questions that have waited for the noise of this step."""
        waiting = self._waiting
        self._waiting = []
        return [self._verifier(game, noise) for game in waiting]

    def solve(self, game: Game, verification: Episode) -> list[EpisodePlayer]:
        """The solvers of a question that its verifier has answered."""
        game.verifier = verification
        if self._score(game, verification) > 0:
            return self._solvers(game)
        too_long = verification.stop_reason == "prompt_tokens"
        return self._failed(game, "too_long_to_verify" if too_long else "unverified")

    def reward(self, game: Game, attempt: Episode) -> list[EpisodePlayer]:
        """The rewards of all solvers of a question and of its proposer, once all have ended.

        The proposer of a failed question keeps reward.invalid_question, though one of the pool is
        solved in its place.
        """
        game.attempts.append(attempt)
        if len(game.attempts) < self._config.attempts:
            return []
        game.attempts.sort(key=lambda episode: episode.uid)  # in their order, not that of ends
        game.scores = [self._score(game, episode) for episode in game.attempts]
        if game.is_fresh:
            scores_QG = np.array([game.scores])
            proposer_reward_Q = PROPOSER_REWARDS[self._config.reward.proposer](scores_QG)
            game.proposer_reward = float(proposer_reward_Q[0])
        return []

    def _failed(self, game: Game, fault: str) -> list[EpisodePlayer]:
        """Fills the place of a question that fails [P B.1]. A dummy gives no signal: none plays."""
        game.fault = fault
        game.question = None
        section = self._config.game
        if section.batch_fill == "resample":
            return [self.propose(game)] if game.proposals <= section.resample_rounds else []
        filler = self._fillers[game.index]
        if filler is None:
            return []
        game.question = dataclasses.replace(filler, reused=True)
        return self._solvers(game)

    def _verifier(self, game: Game, noise: Noise) -> EpisodePlayer:
        """The same model answers from the proposer's own documents and noise, without a search.

        All of them are as long as players see them.
        """
        assert game.proposer is not None and game.question is not None
        own = distinct(game.proposer.documents)
        number = self._config.game.noise_documents
        drawn = noise.draw(self._random(1, game), number, own, game.task.answers)
        game.noise = [seen for document in drawn for seen in self._context.seen([document])]
        documents = [*own.values(), *game.noise]
        order = self._random(2, game).permutation(len(documents))
        shuffled = [documents[i] for i in order]
        game.verifier_order = [document.id for document in shuffled]
        messages = prompts.verifier_messages(
            self._context.style, game.question.text, shuffled, game.shown
        )
        return self._player(VERIFIER, game, game.proposals - 1, messages)

    def _solvers(self, game: Game) -> list[EpisodePlayer]:
        return [self._solver(game, attempt) for attempt in range(self._config.attempts)]

    def _solver(self, game: Game, attempt: int) -> EpisodePlayer:
        assert game.question is not None
        messages = prompts.solver_messages(self._context.style, game.question.text, game.shown)
        return self._player(SOLVER, game, attempt, messages)

    def _player(
        self, role: Role, game: Game, attempt: int, messages: list[dict[str, str]]
    ) -> EpisodePlayer:
        temperature = self._config.temperature
        if role is VERIFIER:
            temperature = self._config.verify_temperature
        return EpisodePlayer(
            context=self._context,
            role=role,
            uid=roles.episode_id(role, game.index, attempt),
            temperature=temperature,
            tokens=self._context.prompt(messages),
            tag=game,
        )

    def _score(self, game: Game, episode: Episode) -> float:
        assert game.question is not None
        verdict = game.verdicts.get(episode.uid)
        return solver_reward(
            episode.text,
            game.question.answers,
            self._config.reward.metric,
            verdict.right if verdict else None,
        )

    def _random(self, stream: int, game: Game) -> np.random.Generator:
        return _random(self._config.seed, stream, self._step, game.index)


def _random(seed: int, stream: int, step: int, game: int) -> np.random.Generator:
    """Random numbers of one use in one game: the same whenever they are drawn.

    stream: 1 noise, 2 the order of documents, 3 the pool, 5 the examples shown. (4 is train's.)
    """
    return np.random.default_rng((seed, stream, step, game))


def _added(a: Stats, b: Stats) -> Stats:
    names = [field.name for field in dataclasses.fields(Stats)]
    return Stats(**{name: getattr(a, name) + getattr(b, name) for name in names})
