"""How many continuations are in form: does the model end its turns as the game wants it?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from ssp_jax.game import prompts
from ssp_jax.game.roles import EpisodeContext, EpisodePlayer, episode_id
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import processes
from ssp_jax.runtime.logger import Phase
from ssp_jax.warm_start.lessons import Lesson


class OneTurn(EpisodePlayer):
    """A player of one turn: a search ends its episode too."""

    in_form = False

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        query = super().end_turn(tokens, logprobs, stop)
        if query is not None:
            self.stop_reason = "search"
        text = self.turns[-1][1]
        found = {
            "search": query,
            "answer": prompts.last_answer(text),
            "question": prompts.first_question(text),
        }
        self.in_form = bool(found.get(self.stop_reason))
        return None


def share_in_form(
    engine: Engine,
    context: EpisodeContext,
    params: Any,
    lessons: Sequence[Lesson],
    stop: processes.Stop,
    phase: Phase,
) -> float:
    """Continues each episode greedily from where one of its turns begins: of the first one the
    first turn, of the next one the second, as far as there are so many.
    """
    # What was shown may be longer than what is played: it is not refused for that.
    longest = max(len(lesson.tokens) for lesson in lessons)
    limits = dataclasses.replace(
        context.limits, prompt_tokens=longest, verify_prompt_tokens=longest
    )
    free = dataclasses.replace(context, limits=limits)
    own = processes.local_share([1.0] * len(lessons))

    def play() -> int:
        players = [_player(free, lessons[i], i) for i in own]

        def progress(stats: Stats) -> None:
            stop()
            phase.advance(stats.finished, tokens=stats.tokens_per_second)

        engine.play(params, jax.random.key(0), players, progress=progress)
        return sum(player.in_form for player in players)

    return sum(processes.all_gather_objects(play)) / len(lessons)


def _player(context: EpisodeContext, lesson: Lesson, number: int) -> OneTurn:
    begin = lesson.turns[number % len(lesson.turns)]
    uid = episode_id(lesson.role, number, 0)
    return OneTurn(context, lesson.role, uid, 0.0, lesson.tokens[:begin])
