"""Trajectories → packed rows of a fixed shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.learner import objective
from ssp_jax.learner.state import LearnerConfig
from ssp_jax.model import attention as attention


class Trajectory(Protocol):
    """What the update needs of an episode."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def sampled(self) -> Sequence[bool]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, [B, T] each. Column t is about predicting targets[t] = tokens[t + 1] inside one
    segment.
    """

    tokens_BT: Any  # int32
    targets_BT: Any  # int32
    positions_BT: Any  # int32, from 0 in every segment
    segments_BT: Any  # int32, 0 is padding
    weight_BT: Any  # float32: share in the loss; 0 where the target was not sampled
    advantage_BT: Any  # float32
    sampler_logp_BT: Any  # float32


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: rows of indices whose lengths sum to at most row_tokens."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_tokens:
            raise InputError(
                f"config key learner.row_tokens is {row_tokens} but an episode has {lengths[index]} tokens; "
                "expected at least limits.prompt_tokens + limits.response_tokens"
            )
        row = next((r for r, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def make_batches(
    c: LearnerConfig, episodes: Sequence[Trajectory], advantage_E: np.ndarray
) -> list[Batch]:
    """Packed micro-batches of c.rows rows; weights make the loss a mean over all episodes given
    here.

    Also over those that are then left out: by c.drop_no_advantage (groups of equal rewards, as in
    DAPO, arXiv 2503.14476), which would add nothing but their KL term, and those without a sampled
    token, which add nothing and may be longer than a row: their prompts were refused for that.
    """
    lengths_E = np.array([sum(e.sampled) for e in episodes])
    weight_E = objective.sequence_weight(lengths_E, c.aggregation, c.response_tokens)
    counts_E = (lengths_E > 0) & ((np.asarray(advantage_E) != 0) | (not c.drop_no_advantage))
    played = np.flatnonzero(counts_E).tolist()
    rows = [
        [played[i] for i in row]
        for row in pack([len(episodes[i].tokens) for i in played], c.row_tokens)
    ]
    batches = []
    for start in range(0, len(rows), c.rows):
        shape = (c.rows, c.row_tokens)
        ints = {
            n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "positions", "segments")
        }
        floats = {n: np.zeros(shape, np.float32) for n in ("weight", "advantage", "sampler_logp")}
        for b, row in enumerate(rows[start : start + c.rows]):
            at = 0
            for segment, index in enumerate(row, 1):
                e, n = episodes[index], len(episodes[index].tokens)
                place, head = np.s_[b, at : at + n], np.s_[b, at : at + n - 1]
                sampled = np.asarray(e.sampled[1:], np.float32)
                ints["tokens"][place] = e.tokens
                ints["targets"][head] = e.tokens[1:]
                ints["positions"][place] = np.arange(n)
                ints["segments"][place] = segment
                floats["weight"][head] = weight_E[index] * sampled
                floats["advantage"][head] = advantage_E[index]
                floats["sampler_logp"][head] = e.logprobs[1:]
                at += n
        batches.append(Batch(**{f"{n}_BT": x for n, x in (ints | floats).items()}))
    return batches
