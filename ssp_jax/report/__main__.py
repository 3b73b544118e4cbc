"""A run folder as one HTML page, with curves and games to read, that needs no network and no other
file:

    python -m ssp_jax.report WORKDIR [--out=report.html] [--games=300]

Curves are matplotlib SVGs: some 15 KB each and sharp at any size, where an embedded plotly would
bring 4 MB. Of a long run each of their points stands for many steps, and the page says so. It may
be made while the run goes on.
"""

import base64
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ssp_jax.errors import InputError, masked, printable
from ssp_jax.evaluation.scores import AVERAGE, MEANS, SHARES
from ssp_jax.game import prompts, rewards
from ssp_jax.report.curves import Curves, Point
from ssp_jax.runtime import records
from ssp_jax.runtime.command import Parser, run_command, user_path
from ssp_jax.runtime.files import replacing

EVALUATIONS = "eval/step_*.json"  # in a run folder
EVALUATIONS_SHOWN = 200  # at most as points of a curve
GAMES = 300  # shown at most, spread over the dumps of a run
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

Row = dict[str, float | None]


@dataclass(frozen=True)
class Chart:
    """label -> metric; a metric that the run never wrote is left out, and so is a chart without
    any.
    """

    title: str
    lines: Mapping[str, str | Callable[[Row], float | None]]
    note: str = ""
    percent: bool = False

    def name(self, label: str) -> str:
        return f"{self.title}: {label}"


def _share(part: str, whole: str) -> Callable[[Row], float | None]:
    def share(row: Row) -> float | None:
        some, all_ = row.get(part), row.get(whole)
        return 100 * some / all_ if all_ and some is not None else None

    return share


CHARTS = (
    # its note: reward_note
    Chart("Rewards", {"proposer": "reward/proposer", "solver": "reward/solver"}),
    Chart(
        "Funnel, % of the questions asked",
        {
            "well-formed": _share("funnel/well_formed", "funnel/proposed"),
            "verified": _share("funnel/verified", "funnel/proposed"),
            "taken from the pool": _share("funnel/reused", "funnel/proposed"),
        },
        "Verified: answered from the proposer's own documents.",
        percent=True,
    ),
    Chart("Searches of an episode", {"proposer": "proposer/searches", "solver": "solver/searches"}),
    Chart(
        "Tokens sampled in an episode", {"proposer": "proposer/tokens", "solver": "solver/tokens"}
    ),
    Chart("KL to the initial model", {name: f"update/{name}/kl" for name in UPDATES}),
    Chart(
        "Entropy of the policy",
        {name: f"update/{name}/entropy" for name in UPDATES},
        "Nats a token.",
    ),
    Chart(
        "Gradient norm", {name: f"update/{name}/grad_norm" for name in UPDATES}, "Before clipping."
    ),
    Chart(
        "Throughput, tokens a second",
        {"sampled": "play/tokens_per_second", "trained": "update/tokens_per_second"},
    ),
    Chart(
        "Seconds",
        {"a whole step": "seconds", "playing": "play/seconds", "updating": "update/seconds"},
    ),
)


_LINES = [(chart.name(label), metric) for chart in CHARTS for label, metric in chart.lines.items()]


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def _written(where: object) -> Iterator[None]:
    """What is not as a run writes it is told with its place."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{where}: expected it as a run writes it, which it is not ({found})"
        ) from error


@dataclass
class Steps:
    """What metrics.jsonl says of the steps."""

    last: int = 0
    seconds: float = 0.0
    curves: Curves = field(default_factory=Curves)
    spoilt: int = 0  # lines that were passed over

    def add(self, row: Row, step: int, seconds: float) -> None:
        values = {
            name: metric(row) if callable(metric) else row.get(metric) for name, metric in _LINES
        }
        values |= {name: value for name, value in row.items() if name.startswith("fault/")}
        self.last, self.seconds = step, self.seconds + seconds
        self.curves.add(step, {name: value for name, value in values.items() if value is not None})


def read_metrics(workdir: Path) -> Steps:
    """None where there was only an evaluation. Lines that a crash has spoilt are passed over, if
    others are whole.
    """
    path, found = workdir / "metrics.jsonl", Steps()
    if not path.is_file():
        if any(workdir.glob(EVALUATIONS)):
            return found
        raise InputError(
            f"{workdir}: expected a run folder, found neither metrics.jsonl nor {EVALUATIONS} in it"
        )
    whole = 0
    for number, line in enumerate(records.read_lines(path, {}), 1):
        if line.record is None:
            found.spoilt += 1
            continue
        with _written(f"{path} line {number}"):
            _add_row(found, line.record)
        whole += 1
    if found.spoilt and not whole:
        raise InputError(
            f"{path} line 1: expected it as a run writes it, a JSON object; no line is one"
        )
    return found


def _add_row(found: Steps, record: dict[str, Any]) -> None:
    step = int(_number(record["step"]))
    if "seconds" in record:  # else it is an evaluation's
        row = {name: None if value is None else _number(value) for name, value in record.items()}
        found.add(row, step, _number(record["seconds"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """What evaluations wrote, in the order of steps. A file that is just being written waits."""
    found = []
    for path in sorted(workdir.glob(EVALUATIONS)):
        try:
            document = json.loads(path.read_bytes())
        except ValueError:
            continue
        except RecursionError:
            document = None
        with _written(path):
            found.append(shown_evaluation(document))
    return found


def shown_evaluation(document: Any) -> dict[str, Any]:
    """What the page needs of a document that evaluate.evaluate wrote. inputs: what its episodes
    were played with.
    """
    columns = (*SHARES, "right_low", "right_high", *MEANS, "n")
    questions = dict(document.get("questions") or {})
    sets = {}
    for name, row in document["sets"].items():
        sets[printable(name)] = {column: _number(row[column]) for column in columns} | {
            "questions": questions.get(name)
        }
    inputs = json.dumps(document.get("inputs") or {}, sort_keys=True)
    return {
        "step": int(_number(document["step"])),
        "judge": printable(str(document["judge"])),
        "inputs": inputs,
        "sets": sets,
    }


def read_config(workdir: Path) -> tuple[str, str]:
    """As it stands in the file, but for secrets, and its reward_note; "" where there is none."""
    path, text, note = workdir / "config.json", "", ""
    if path.is_file():
        with _written(path):
            text = masked(path.read_text(encoding="utf-8"))
            note = reward_note(text)
    return text, note


@dataclass
class Games:
    shown: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    spoilt: int = 0


def read_games(workdir: Path, most: int) -> Games:
    """At most `most` games, as many of each dump, and how many there are in all."""
    dumps = sorted((workdir / "episodes").glob("step_*.jsonl"))
    each, found = max(1, most // max(len(dumps), 1)), Games()
    kept = {dumps[i] for i in _spread(len(dumps), most)}
    for path in dumps:
        with _written(path):
            step = int(path.stem.removeprefix("step_"))
        lines = itertools.islice(records.read_lines(path, {}), each if path in kept else 0)
        end = 0
        for number, line in enumerate(lines, 1):
            end = line.next
            if line.record is None:
                found.spoilt += 1
                continue
            with _written(f"{path} line {number}"):
                found.shown.append(shown_game(step, line.record))
            found.total += 1
        found.total += records.count_lines(path, end)
    return found


def shown_game(step: int, game: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a record that selfplay.readable wrote."""
    scores = [attempt["score"] for attempt in game["attempts"]]
    question = game["question"]
    outcome = game["fault"] or "unfinished"
    said = [
        turn["text"]
        for turn in (game["proposer"] or {"turns": []})["turns"]
        if turn["who"] == "proposer"
    ]
    if question is not None:
        outcome = "reused" if question["reused"] else "verified"
    episodes = [("Proposer", game["proposer"], None), ("Verifier", game["verifier"], None)]
    episodes += [(f"Attempt {i}", a, a["score"]) for i, a in enumerate(game["attempts"], 1)]
    return {
        "step": step,
        "answer": game["answer"],
        "requested": game["requested_searches"],
        "question": question["text"] if question else prompts.first_question("".join(said)),
        "golds": question["answers"] if question else [game["answer"]],
        "played": question is not None,
        "outcome": outcome,
        "solved": f"{sum(s > 0 for s in scores)}/{len(scores)}" if scores else "",
        "reward": float(game["proposer_reward"]),
        "episodes": [shown_episode(name, e, score) for name, e, score in episodes if e],
    }


def shown_episode(name: str, episode: dict[str, Any], score: float | None) -> dict[str, Any]:
    turns = [
        {
            "found": turn["who"] == "search engine",
            "titles": _titles(turn["text"]),
            "text": turn["text"].strip(),
        }
        for turn in episode["turns"]
    ]
    searches = sum(turn["found"] for turn in turns)
    answer = prompts.last_answer("".join(turn["text"] for turn in turns if not turn["found"])) or ""
    stop = episode["stop_reason"]
    return {
        "name": name,
        "turns": turns,
        "stop": stop,
        "score": score,
        "searches": searches,
        "answer": answer,
    }


def _titles(text: str) -> list[str]:
    return [
        title.strip(' "')
        for title in re.findall(r"^(?:<\w+>)?Doc \d+\(Title: (.*?)\) ", text, re.MULTILINE)
    ]


# --- drawing --------------------------------------------------------------------------------------


def _figure() -> Any:
    """An empty chart; made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes = Figure(figsize=(5.4, 2.9), layout="constrained").add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    return axes


def _image(axes: Any) -> str:
    """With a legend, as a data URI: as an image its ids cannot meet those of another chart."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "ssp_jax",
            "font.family": "sans-serif",
            "text.parse_math": False,  # a set's name may have a $
        }
    ):
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        axes.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _line(axes: Any, label: str, points: Sequence[Point], each: int, color: str) -> None:
    """each: steps that a point stands for; then a band reaches from the lowest to the highest of
    them.
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
    axes, drawn = _figure(), 0
    for label, color in zip(chart.lines, COLORS, strict=False):
        if points := curves.line(chart.name(label)):
            _line(axes, label, points, curves.each, color)
            drawn += 1
    if not drawn:
        return None
    low = axes.get_ylim()[0]
    axes.set_ylim(bottom=0 if low > 0 or chart.percent else low, top=103 if chart.percent else None)
    return _image(axes)


def draw_faults(curves: Curves) -> str | None:
    """Why questions failed, stacked, as counts of a step."""
    lines = {
        name: {p.step: p.mean for p in curves.line(name)}
        for name in curves.names
        if name.startswith("fault/")
    }
    lines = {name: line for name, line in lines.items() if any(line.values())}
    if not lines:
        return None
    axes = _figure()
    steps = sorted({step for line in lines.values() for step in line})
    counts = [[line.get(step, 0.0) for step in steps] for line in lines.values()]
    labels = [printable(name.removeprefix("fault/").replace("_", " ")) for name in lines]
    colors = [COLORS[i % len(COLORS)] for i in range(len(lines))]
    axes.stackplot(steps, counts, labels=labels, colors=colors, alpha=0.8)
    return _image(axes)


def draw_evaluations(found: Sequence[dict[str, Any]]) -> str | None:
    """Percent right of each set over steps, with the interval of each point."""
    found = [found[i] for i in _spread(len(found), EVALUATIONS_SHOWN)]
    names = list(dict.fromkeys(name for document in found for name in document["sets"]))
    if not names:
        return None
    axes = _figure()
    for i, name in enumerate(names):
        points = [
            (document["step"], document["sets"][name])
            for document in found
            if name in document["sets"]
        ]
        values = np.array([row["right"] for _, row in points])
        errors = np.array(
            [
                [row["right"] - row["right_low"], row["right_high"] - row["right"]]
                for _, row in points
            ]
        ).T
        style: dict[str, Any] = {
            "marker": "o",
            "markersize": 4,
            "capsize": 3,
            "linewidth": 1.5,
            "elinewidth": 0.8,
        }
        style["linestyle"] = "--" if name == AVERAGE else "-"
        steps = [step for step, _ in points]
        axes.errorbar(
            steps, values, np.maximum(0, errors), label=name, color=COLORS[i % len(COLORS)], **style
        )
    axes.set_ylim(0, 103)
    return _image(axes)


def _spread(number: int, most: int) -> list[int]:
    """At most `most` of so many: the first, the last, and evenly between."""
    return sorted(set(np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist()))


# --- the page -------------------------------------------------------------------------------------


def reward_note(config: str) -> str:
    """What both roles earn by a run's config.json."""
    values = json.loads(config)
    if values.get("reward.proposer") not in rewards.PROPOSER_REWARDS:
        return ""
    name, metric = values["reward.proposer"], values["reward.metric"]
    what = " ".join(str(rewards.PROPOSER_REWARDS[name].__doc__).split())
    return (
        f"Proposer, {name}: {what} A question that fails: {values['reward.invalid_question']:g}. "
        f"Solver: share of attempts that are right by {metric}."
    )


def comparable(evals: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Evaluations by the same judge and of the same inputs, the last one's first.

    What one judge finds right is no point on another's curve, nor is what was played with another
    search index on that of this one.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for document in reversed(evals):
        found.setdefault((document["judge"], document["inputs"]), []).insert(0, document)
    return list(found.values())


def _charts(
    steps: Steps, evals: Sequence[dict[str, Any]], rewarded: str
) -> Iterator[dict[str, str]]:
    groups = comparable(evals)
    for i, documents in enumerate(groups):
        judge = documents[0]["judge"]
        earlier = (
            " with earlier inputs" if judge in [group[0]["judge"] for group in groups[:i]] else ""
        )
        title, note = (
            f"Right answers to held-out questions by {judge}{earlier}, %",
            "With 95 % bootstrap intervals.",
        )
        if len(documents) > EVALUATIONS_SHOWN:
            note += f" {EVALUATIONS_SHOWN} of {len(documents)} evaluations."
        yield from _shown(title, note, draw_evaluations(documents))
    each = (
        f" A point is the mean of {steps.curves.each} steps, the band their range."
        if steps.curves.each > 1
        else ""
    )
    for number, chart in enumerate(CHARTS):
        note = rewarded if number == 0 else chart.note
        yield from _shown(chart.title, note + each, draw(chart, steps.curves))
        if number == 1:
            note = f"Mean of {steps.curves.each} steps." if each else "Questions of a step."
            yield from _shown("Questions that failed, by reason", note, draw_faults(steps.curves))


def _shown(title: str, note: str, image: str | None) -> Iterator[dict[str, str]]:
    if image:
        yield {"title": title, "note": note, "image": image}


def _ends(evals: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Set -> its row of the first evaluation that compares with the last one, and of the last, each
    with its step.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for document in next(iter(comparable(evals)), []):
        for name, row in document["sets"].items():
            rows.setdefault(name, []).append(row | {"step": document["step"]})
    return {name: (found[0], found[-1]) for name, found in rows.items()}


def page(workdir: Path, most_games: int) -> str:
    steps, evals = read_metrics(workdir), read_evaluations(workdir)
    games = read_games(workdir, most_games)
    config, rewarded = read_config(workdir)
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_as_text
    )
    return environment.from_string(source).render(
        name=workdir.resolve().name,
        steps=steps.last,
        minutes=steps.seconds / 60,
        evaluations=_ends(evals),
        judge=evals[-1]["judge"] if evals else "",
        charts=list(_charts(steps, evals, rewarded)),
        spoilt=steps.spoilt + games.spoilt,
        games=games.shown,
        total=games.total,
        outcomes=sorted({game["outcome"] for game in games.shown}),
        dumps=sorted({game["step"] for game in games.shown}),
        config=config,
    )


def _as_text(value: Any) -> Any:
    """What a model wrote may hold characters that no page may; a macro's HTML is not text any more."""
    return printable(value) if type(value) is str else value


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m ssp_jax.report", description=__doc__.partition("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--out", default="", help="WORKDIR/report.html if not given")
    parser.add_argument("--games", type=int, default=GAMES, help="shown at most")
    args = parser.parse_args(arguments)
    if args.games < 0:
        parser.error(f"--games: expected 0 or more, got {args.games}")
    workdir = Path(user_path(args.workdir, "WORKDIR"))
    out = Path(user_path(args.out, "--out")) if args.out else workdir / "report.html"
    if not workdir.is_dir():
        raise InputError(f"{workdir}: expected a run folder, found none")
    try:
        with replacing(out, str(out)) as file:  # first, for a page may take minutes
            text = page(workdir, args.games)
            file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    print(f"{printable(str(out))}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
