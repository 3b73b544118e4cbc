"""Several runs on one page: their gains, each against the first run, and their curves.

Runs are compared question by question, so that an interval is that of the difference. Only
questions that both have answered count, with the same golds, judged by exact match where their
judges differ.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssp_jax.errors import InputError, printable
from ssp_jax.evaluation import scores
from ssp_jax.evaluation.scores import AVERAGE, Gain
from ssp_jax.report import drawing, held_out, page
from ssp_jax.report.curves import Curves, Point
from ssp_jax.runtime import figures

FILE = "compare.html"

# Title -> the line of a run's own page.
_LINES = {
    "Proposer's reward": "Rewards: proposer",
    "Solver's reward": "Rewards: solver",
    "Well-formed questions, %": "Funnel, % of the questions asked: well-formed",
    "Verified questions, %": "Funnel, % of the questions asked: verified",
    "Searches of a solver": "Searches of an episode: solver",
    "Tokens of a solver": "Tokens sampled in an episode: solver",
    "Solver's KL to the initial model": "KL to the initial model: solver",
    "Solver's entropy, nats a token": "Entropy of the policy: solver",
    "Seconds of a step": "Seconds: a whole step",
}


@dataclass(frozen=True)
class Run:
    """A run folder, as far as it is compared."""

    name: str
    workdir: Path
    steps: page.Steps
    evaluations: list[dict[str, Any]]  # of the last one's judge and inputs, in the order of steps

    def answered(self, judge: str) -> dict[held_out.Key, held_out.Answered]:
        """The questions of the last evaluation."""
        if not self.evaluations:
            return {}
        return held_out.read(self.workdir, self.evaluations[-1]["step"], judge)


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, and its average or only set."""

    name: str
    steps: int
    minutes: float
    before: str  # percent
    after: str
    by_rule: list[str]  # percent after, of scores.RULES
    against: Gain | None  # of the first run's and this one's last evaluations


def read(workdir: Path) -> Run:
    """Raises InputError where it is no run folder."""
    evaluations = page.comparable(page.read_evaluations(workdir))
    return Run(
        name=printable(workdir.resolve().name),
        workdir=workdir,
        steps=page.read_metrics(workdir),
        evaluations=evaluations[0] if evaluations else [],
    )


def against(first: Run, other: Run) -> Gain | None:
    """The difference of their last scores on the questions of both; None where there are none."""
    judges = {run.evaluations[-1]["judge"] for run in (first, other) if run.evaluations}
    judge = judges.pop() if len(judges) == 1 else "em"
    before, after = first.answered(judge), other.answered(judge)
    keys = sorted(
        key for key in before.keys() & after.keys() if before[key].compares_with(after[key])
    )
    if not keys:
        return None
    gains = scores.gains(held_out.values(before, keys), held_out.values(after, keys), {})
    return gains.get(AVERAGE) or next(iter(gains.values()))


def _row(run: Run, first: Run) -> Row:
    scored = [figures.percent(point.mean) for point in _scores(run)]
    last = _whole(run.evaluations[-1]) if run.evaluations else {}
    return Row(
        name=run.name,
        steps=run.steps.last,
        minutes=run.steps.seconds / 60,
        before=scored[0] if len(scored) > 1 else "",
        after=scored[-1] if scored else "",
        by_rule=[figures.percent(last[column]) if last else "" for column in scores.RULES],
        against=None if run is first else against(first, run),
    )


def _charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    shown = []
    for title, line in {"Right answers to held-out questions, %": "", **_LINES}.items():
        axes = drawing.figure()
        drawn = 0
        for run, color in zip(runs, itertools.cycle(drawing.COLORS), strict=False):
            points = run.steps.curves.line(line) if line else _scores(run)
            if points:
                each = run.steps.curves.each if line else 1
                drawing.line(axes, run.name, points, each, color)
                drawn += 1
        if drawn:
            shown.append({"title": title, "note": "", "image": drawing.image(axes)})
    return shown


def _whole(document: dict[str, Any]) -> dict[str, Any]:
    """The average, or only set, of an evaluation."""
    sets = document["sets"]
    return sets.get(AVERAGE) or next(iter(sets.values()))


def _scores(run: Run) -> list[Point]:
    """What is right at each evaluation."""
    curve = Curves()
    for document in run.evaluations:
        curve.add(document["step"], {"right": _whole(document)["right"]})
    return curve.line("right")


def compared(workdirs: Sequence[Path]) -> str:
    """The HTML page of several run folders. Raises InputError."""
    for workdir in workdirs:
        if not workdir.is_dir():
            raise InputError(f"{workdir}: expected a run folder, found none")
    runs = [read(workdir) for workdir in workdirs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # seeds of one config, in folders of one name
        named = [printable(str(workdir)) for workdir in workdirs]
        runs = [
            Run(name, run.workdir, run.steps, run.evaluations)
            for name, run in zip(named, runs, strict=True)
        ]
    judges = {document["judge"] for run in runs for document in run.evaluations[-1:]}
    return page.template("compare.html").render(
        rows=[_row(run, runs[0]) for run in runs],
        charts=_charts(runs),
        judge=", ".join(sorted(judges)),
    )


def write(workdirs: Sequence[Path], out: Path) -> int:
    """Writes the page; returns its bytes. Raises InputError."""
    return page.write_text(out, lambda: compared(workdirs))
