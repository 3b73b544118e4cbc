"""Held-out episodes of a run: what each question was answered, and what training has changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssp_jax.evaluation.scores import Values
from ssp_jax.game import rewards
from ssp_jax.runtime import records

Key = tuple[str, int]  # the set, and the question's number in its file

_EPISODE: records.Fields = {
    "set": (str,),
    "row": (int,),
    "question": (str,),
    "answers": (list,),
    "answer": (str, type(None)),
    "turns": (list,),
    "stop_reason": (str,),
}
_VERDICT: records.Fields = {
    "set": (str,),
    "row": (int,),
    "answer": (str,),
    "judge": (str,),
    "right": (bool, type(None)),
}


@dataclass(frozen=True)
class Answered:
    """A question with what a model made of it."""

    record: dict[str, Any]  # a line of episodes.jsonl
    right: bool  # by the judge of the evaluation

    @property
    def answer(self) -> str:
        return self.record["answer"] or "(none)"

    def compares_with(self, other: "Answered") -> bool:
        """Whether both were asked the same, and the same answers count as right."""
        return all(self.record[name] == other.record[name] for name in ("question", "answers"))


@dataclass(frozen=True)
class Change:
    """A question that two evaluations do not judge alike."""

    question: str
    gold: str
    before: str
    after: Answered


def read(workdir: Path, step: int, judge: str) -> dict[Key, Answered]:
    """All questions of the evaluation of a step; the last line of each counts.

    judge: of its document. Empty where its episodes are gone.
    """
    folder = workdir / "eval" / f"step_{step:06d}"
    verdicts = {}
    for line in _lines(folder, "verdicts", _VERDICT):
        if line["judge"] == judge:
            verdicts[line["set"], line["row"], line["answer"]] = bool(line["right"])
    answered = {}
    for record in _lines(folder, "episodes", _EPISODE):
        answer = record["answer"]
        golds = [str(gold) for gold in record["answers"]]
        said = verdicts.get((record["set"], record["row"], answer or ""))
        right = said if said is not None else rewards.is_right(answer, golds, _metric(judge))
        answered[record["set"], record["row"]] = Answered(record, right)
    return answered


def _metric(judge: str) -> str:
    """What decides where a judge has given no verdict: those of models ask about no exact match."""
    return judge if judge in rewards.METRICS else "em"


def _lines(folder: Path, name: str, fields: records.Fields) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        found += [line.record for line in records.read_lines(path, fields) if line.record]
    return found


def changes(
    before: Mapping[Key, Answered], after: Mapping[Key, Answered]
) -> tuple[list[Change], list[Change]]:
    """What became right, and what became wrong, in the order of sets and questions.

    What is no longer the same question, or has other golds, is passed over.
    """
    became: dict[bool, list[Change]] = {True: [], False: []}
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        if old.compares_with(new) and old.right != new.right:
            record = new.record
            gold = str(record["answers"][0]) if record["answers"] else ""
            became[new.right].append(Change(record["question"], gold, old.answer, new))
    return became[True], became[False]


def values(answered: Mapping[Key, Answered], keys: list[Key]) -> Values:
    """Whether these questions are right, by sets, as scores.gains takes them."""
    found: dict[str, list[float]] = {}
    for key in keys:
        found.setdefault(key[0], []).append(float(answered[key].right))
    return {name: {"right": np.array(column)} for name, column in found.items()}
