"""The charts of a page: matplotlib SVGs, as data URIs.

They are some 15 KB each and sharp at any size, where an embedded plotly would bring 4 MB. In a long
run each point of a curve is the mean of many steps, and the page says so.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssp_jax.errors import printable
from ssp_jax.evaluation.scores import AVERAGE
from ssp_jax.report.curves import Curves, Point

EVALUATIONS_SHOWN = 200  # at most as points of a curve
LONG_LABEL = 22  # characters of one that leaves no room for four beside each other
SMOOTHED_POINTS = 60  # lines of more points get a running mean over a twentieth of them
COLORS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#db2777",
    "#7c3aed",
    "#0891b2",
    "#65a30d",
    "#64748b",
    "#b91c1c",
    "#1e293b",
)
UPDATES = ("proposer", "solver", "both")  # in the order, and so the colours, of the other charts
FAULTS = ("fault/", "cause/")  # of questions that failed, and what was behind some of them

Row = dict[str, float | None]


@dataclass(frozen=True)
class Chart:
    """One chart. Metrics that the run has not written are left out, so is a chart without any."""

    title: str
    lines: Mapping[str, str | Callable[[Row], float | None]]  # label -> metric, or its computation
    note: str = ""
    percent: bool = False

    def name(self, label: str) -> str:
        """The name of a line among those of all charts."""
        return f"{self.title}: {label}"


def _percent(part: str, whole: str) -> Callable[[Row], float | None]:
    """100 * part / whole of a row, by the names of metrics; None where one is missing."""

    def percent(row: Row) -> float | None:
        numerator = row.get(part)
        denominator = row.get(whole)
        if numerator is None or not denominator:
            return None
        return 100 * numerator / denominator

    return percent


def _percent_of(share: str) -> Callable[[Row], float | None]:
    def percent(row: Row) -> float | None:
        value = row.get(share)
        return None if value is None else 100 * value

    return percent


def _of_updates(metric: str) -> dict[str, str]:
    return {name: f"update/{name}/{metric}" for name in UPDATES}


REWARDS = Chart("Rewards", {"proposer": "reward/proposer", "solver": "reward/solver"})
CHARTS = (
    REWARDS,  # its note: reward_note()
    Chart(
        "Funnel, % of the questions asked",
        {
            "well-formed": _percent("funnel/well_formed", "funnel/proposed"),
            "verified": _percent("funnel/verified", "funnel/proposed"),
            "taken from the pool": _percent("funnel/reused", "funnel/proposed"),
            "different ones played": _percent("funnel/distinct", "funnel/proposed"),
        },
        "Verified: answered from the proposer's own documents.",
        percent=True,
    ),
    Chart("Searches of an episode", {"proposer": "proposer/searches", "solver": "solver/searches"}),
    Chart(
        "Tokens sampled in an episode", {"proposer": "proposer/tokens", "solver": "solver/tokens"}
    ),
    Chart(
        "Names of worked examples in episodes, %",
        {name: _percent_of(f"{name}/leak") for name in ("proposer", "verifier", "solver")},
        "That the player has read nowhere else.",
        percent=True,
    ),
    Chart("KL to the initial model", _of_updates("kl")),
    Chart("Entropy of the policy", _of_updates("entropy"), "Nats a token."),
    Chart(
        "Difference between the sampler's and the learner's log-probs, nats a token",
        {
            "all": "update/logprob_gap",
            "below 1k tokens": "update/logprob_gap_0_1k",
            "1k to 4k": "update/logprob_gap_1k_4k",
            "from 4k on": "update/logprob_gap_4k",
        },
        "Of the step's first update, by the number of tokens before a token in its episode. Both "
        "have the same weights: only rounding should differ.",
    ),
    Chart("Gradient norm", _of_updates("grad_norm"), "Before clipping."),
    Chart(
        "Throughput, tokens a second",
        {"sampled": "play/tokens_per_second", "trained": "update/tokens_per_second"},
    ),
    Chart(
        "Seconds",
        {"a whole step": "seconds", "playing": "play/seconds", "updating": "update/seconds"},
    ),
)

LINES = [(chart.name(label), metric) for chart in CHARTS for label, metric in chart.lines.items()]


# --- drawing --------------------------------------------------------------------------------------


def figure() -> Any:
    """The axes of an empty chart, made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes = Figure(figsize=(5.4, 2.9), layout="constrained").add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    return axes


def image(axes: Any) -> str:
    """The chart with a legend, as a data URI: in an image its ids cannot clash with another's."""
    import matplotlib

    buffer = io.BytesIO()
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ssp_jax",
        "font.family": "sans-serif",
        "text.parse_math": False,  # a set's name may have a $
    }
    with matplotlib.rc_context(settings):
        _, labels = axes.get_legend_handles_labels()
        columns = 4 if max(map(len, labels)) < LONG_LABEL else 2
        axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        axes.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def line(axes: Any, label: str, points: Sequence[Point], each: int, color: str) -> None:
    """Draws points, or, of many, a running mean over them.

    each: steps of a point; of several, a band reaches from their lowest to their highest value.
    """
    steps, rows, means, lows, highs = np.array(points, float).T
    if len(points) < SMOOTHED_POINTS:
        axes.plot(steps, means, color=color, label=label, marker="o", markersize=3)
        return
    if each == 1:
        axes.plot(steps, means, color=color, alpha=0.25, linewidth=0.8)
    else:
        axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    window = np.ones(max(3, len(steps) // 20))
    smooth = np.convolve(means * rows, window, "same") / np.convolve(rows, window, "same")
    axes.plot(steps, smooth, color=color, label=label)


def draw(chart: Chart, curves: Curves) -> str | None:
    """The image of a chart; None where none of its lines has a point."""
    axes = figure()
    drawn = 0
    for label, color in zip(chart.lines, COLORS, strict=False):
        if points := curves.line(chart.name(label)):
            line(axes, label, points, curves.each, color)
            drawn += 1
    if not drawn:
        return None
    if chart.percent:
        axes.set_ylim(bottom=0, top=103)
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return image(axes)


def draw_faults(curves: Curves) -> str | None:
    """Counts of failed questions by reason, stacked; None where none has failed.

    A fault whose causes are known is shown by these.
    """
    lines = {}
    for name in curves.names:
        if name.startswith(FAULTS):
            line = {point.step: point.mean for point in curves.line(name)}
            if any(line.values()):
                lines[name] = line
    for name in list(lines):
        prefix, fault, *_ = name.split("/")
        if prefix == "cause":
            lines.pop(f"fault/{fault}", None)
    if not lines:
        return None
    axes = figure()
    steps = sorted({step for line in lines.values() for step in line})
    counts = [[line.get(step, 0.0) for step in steps] for line in lines.values()]
    labels = [reason(*name.split("/")[1:]) for name in lines]
    colors = [COLORS[i % len(COLORS)] for i in range(len(lines))]
    axes.stackplot(steps, counts, labels=labels, colors=colors, alpha=0.8)
    return image(axes)


def reason(fault: str, cause: str = "") -> str:
    """A fault and its cause, for people."""
    return printable(": ".join(filter(None, (fault, cause))).replace("_", " "))


def draw_evaluations(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """Percent right of each set over steps, with the interval of each point; None of no sets."""
    drawn = [evaluations[i] for i in spread(len(evaluations), EVALUATIONS_SHOWN)]
    names = list(dict.fromkeys(name for document in drawn for name in document["sets"]))
    if not names:
        return None
    axes = figure()
    for i, name in enumerate(names):
        documents = [document for document in drawn if name in document["sets"]]
        rows = [document["sets"][name] for document in documents]
        right = np.array([row["right"] for row in rows])
        below = right - np.array([row["right_low"] for row in rows])
        above = np.array([row["right_high"] for row in rows]) - right
        axes.errorbar(
            [document["step"] for document in documents],
            right,
            np.maximum(0, [below, above]),
            label=name,
            color=COLORS[i % len(COLORS)],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.5,
            elinewidth=0.8,
            linestyle="--" if name == AVERAGE else "-",
        )
    axes.set_ylim(0, 103)
    return image(axes)


def spread(number: int, limit: int) -> list[int]:
    """At most `limit` indices below `number`: the first, the last, and evenly between."""
    indices = np.linspace(0, number - 1, min(number, limit)).round()
    return sorted(set(indices.astype(int).tolist()))
