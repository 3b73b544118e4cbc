"""Which of a run's checkpoints is the best, by the scores in metrics.jsonl. Without JAX."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ssp_jax.evaluation.scores import AVERAGE
from ssp_jax.runtime import records

_RIGHT = re.compile(r"eval/(.+)/right")


def score(row: Mapping[str, Any], name: str) -> float | None:
    """The percentage of right answers in a row of metrics; None where it has none.

    name: of a question set, or AVERAGE for the mean over all of them.
    """
    shares = {found[1]: row[key] for key in row if (found := _RIGHT.fullmatch(key))}
    if name != AVERAGE:
        return shares.get(name)
    sets = [share for set_name, share in shares.items() if set_name != AVERAGE]
    return sum(sets) / len(sets) if sets and None not in sets else None


def best_step(workdir: str | Path, name: str, steps: Collection[int]) -> int | None:
    """The best of these steps, the earliest where several are; None where none was evaluated.

    name: as for `score`.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        return None
    scores: dict[int, float] = {}
    for line in records.read_lines(path, {"step": (int,)}):
        if line.record is None or line.record["step"] not in steps:
            continue
        found = score(line.record, name)
        if found is not None:
            scores[line.record["step"]] = found  # the last row of a step counts
    return max(sorted(scores), key=lambda step: scores[step], default=None)
