"""Episodes to learn from as tokens: the prompt and results are given, the rest is the player's."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.game.roles import EpisodeContext, Role
from ssp_jax.warm_start import rows
from ssp_jax.warm_start.rows import Selection, Shown

_STREAM = 6  # of random numbers: which games are held out


@dataclasses.dataclass(frozen=True)
class Lesson:
    """An episode in the learner's terms: a Trajectory."""

    role: Role
    tokens: list[int]
    sampled: list[bool]
    turns: tuple[int, ...]  # at which tokens the player's turns begin
    game: int

    @property
    def logprobs(self) -> list[float]:
        """No sampler has scored the tokens."""
        return [0.0] * len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """Episodes to train on, and episodes of other games to watch."""

    training: list[Lesson]
    held_out: list[Lesson]
    left_out: Counter[str]  # by role

    @property
    def summary(self) -> str:
        """For people."""
        roles = Counter(lesson.role.name for lesson in self.training)
        shown = ", ".join(f"{number:,} {name}s" for name, number in sorted(roles.items()))
        tokens = sum(map(len, (lesson.tokens for lesson in self.training)))
        own = sum(sum(lesson.sampled) for lesson in self.training)
        games = len({lesson.game for lesson in self.held_out})
        return (
            f"{len(self.training):,} episodes to learn from ({shown}; {tokens:,} tokens, {own:,} "
            f"of them the players' own), {len(self.held_out):,} of {games:,} other games held out, "
            f"{self.left_out.total():,} left out (warm_start.keep)"
        )


def load(
    paths: Sequence[Path],
    context: EpisodeContext,
    selection: Selection,
    row_tokens: int,
    held_out: float,
    seed: int,
) -> Lessons:
    """Reads and encodes all episodes.

    row_tokens: of a packed row, which must hold each. held_out: share of games. Raises InputError.
    """
    shown = rows.read(paths, context, selection)
    found = [encode(context, episode, row_tokens) for episode in shown]
    if not found:
        raise InputError(
            f"config key warm_start.episodes: expected episodes to learn from, found none that "
            f"warm_start.keep={selection.keep} keeps, and {selection.left_out.total()} others"
        )
    return Lessons(*_divided(found, held_out, seed), selection.left_out)


def _divided(found: list[Lesson], held_out: float, seed: int) -> tuple[list[Lesson], list[Lesson]]:
    """Episodes of most games, and those of the share `held_out`, which chance has drawn."""
    games = sorted({lesson.game for lesson in found})
    number = max(1, round(held_out * len(games)))
    if number >= len(games):
        raise InputError(
            f"config key warm_start.episodes: expected at least {number + 1} games, of which "
            f"warm_start.held_out={held_out:g} takes {number} to watch, found {len(games)}"
        )
    rng = np.random.default_rng((seed, _STREAM))
    watched = {games[i] for i in rng.permutation(len(games))[:number]}
    training = [lesson for lesson in found if lesson.game not in watched]
    return training, [lesson for lesson in found if lesson.game in watched]


def encode(context: EpisodeContext, shown: Shown, row_tokens: int) -> Lesson:
    """The tokens of an episode, encoded piece by piece as the game does it. Raises InputError."""
    tokens = context.prompt(shown.messages)
    sampled = [False] * len(tokens)
    turns = []
    for text, is_own in shown.segments:
        piece = context.encode(text) if is_own else context.cut(text)
        if is_own:
            turns.append(len(tokens))
        tokens = tokens + piece
        sampled += [is_own] * len(piece)
    if len(tokens) > row_tokens:
        row = shown.row
        raise InputError(
            f"{row.path} {row.unit} {row.line}: the {shown.role.name}'s episode has {len(tokens)} "
            f"tokens; expected at most learner.row_tokens = {row_tokens}"
        )
    return Lesson(shown.role, tokens, sampled, tuple(turns), shown.game)
