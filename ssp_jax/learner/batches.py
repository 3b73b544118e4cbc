"""Episodes → packed rows of a fixed shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.learner import objective
from ssp_jax.learner.state import LearnerConfig


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
    """Packed rows, [B, T] each; an episode is one segment of a row.

    Column t predicts targets[t] = tokens[t + 1], inside its segment.
    """

    tokens_BT: Any  # int32
    targets_BT: Any  # int32
    positions_BT: Any  # int32, from 0 in every segment
    segments_BT: Any  # int32, from 1; 0 is padding
    weight_BT: Any  # float32: share in the loss; 0 where the target was not sampled
    advantage_BT: Any  # float32
    sampler_logp_BT: Any  # float32


def empty_batch(rows: int, row_tokens: int) -> Batch:
    """Rows of padding, as NumPy arrays."""

    def ints() -> np.ndarray:
        return np.zeros((rows, row_tokens), np.int32)

    def floats() -> np.ndarray:
        return np.zeros((rows, row_tokens), np.float32)

    return Batch(
        tokens_BT=ints(),
        targets_BT=ints(),
        positions_BT=ints(),
        segments_BT=ints(),
        weight_BT=floats(),
        advantage_BT=floats(),
        sampler_logp_BT=floats(),
    )


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: rows of indices whose lengths sum to at most row_tokens.

    Raises InputError for a length that no row can hold.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_tokens:
            raise InputError(
                f"config key learner.row_tokens is {row_tokens} but an episode has "
                f"{lengths[index]} tokens; expected at least limits.prompt_tokens + "
                "limits.response_tokens"
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
    """Packed micro-batches of c.rows rows, weighted so that the loss is a mean over all episodes.

    The mean also counts episodes that are then left out:
    * of no advantage, with c.drop_no_advantage (groups of equal rewards, as in DAPO,
      arXiv 2503.14476), which would add nothing but their KL term;
    * of no sampled token, which add nothing and may be longer than a row: their prompts were
      refused for that.
    """
    num_sampled_E = np.array([sum(episode.sampled) for episode in episodes])
    weight_E = objective.sequence_weight(num_sampled_E, c.aggregation, c.response_tokens)
    is_kept_E = num_sampled_E > 0
    if c.drop_no_advantage:
        is_kept_E = is_kept_E & (np.asarray(advantage_E) != 0)
    kept = np.flatnonzero(is_kept_E).tolist()
    rows = pack([len(episodes[index].tokens) for index in kept], c.row_tokens)

    batches = []
    for start in range(0, len(rows), c.rows):
        batch = empty_batch(c.rows, c.row_tokens)
        for b, members in enumerate(rows[start : start + c.rows]):
            begin = 0
            for segment, member in enumerate(members, 1):
                index = kept[member]
                end = begin + len(episodes[index].tokens)
                columns = slice(begin, end)
                _write(batch, b, columns, episodes[index], weight_E[index], advantage_E[index])
                batch.segments_BT[b, columns] = segment
                begin = end
        batches.append(batch)
    return batches


def _write(
    batch: Batch, row: int, columns: slice, episode: Trajectory, weight: float, advantage: float
) -> None:
    """Writes an episode into its columns of a row; the last of them predicts nothing."""
    batch.tokens_BT[row, columns] = episode.tokens
    batch.positions_BT[row, columns] = np.arange(len(episode.tokens))
    predicting = slice(columns.start, columns.stop - 1)
    batch.targets_BT[row, predicting] = episode.tokens[1:]
    batch.weight_BT[row, predicting] = weight * np.asarray(episode.sampled[1:], np.float32)
    batch.advantage_BT[row, predicting] = advantage
    batch.sampler_logp_BT[row, predicting] = episode.logprobs[1:]
