"""A run folder as one HTML page, with curves and games to read, that needs no network and no other file:

    python -m ssp_jax.report WORKDIR [--out=report.html] [--games=300]

Curves are matplotlib SVGs: some 15 KB each and sharp at any size, where an embedded plotly would bring 4 MB. The page
may be made while the run goes on.
"""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ssp_jax import prompts, rewards
from ssp_jax.config import user_path
from ssp_jax.errors import InputError, Parser, exit_code, masked, printable
from ssp_jax.files import replacing
from ssp_jax.scores import AVERAGE, MEANS, SHARES

EVALUATIONS = "eval/step_*.json"  # in a run folder
GAMES = 300  # shown at most, spread over the dumps of a run
SMOOTHED_STEPS = 60  # runs longer than this get a running mean over a twentieth of their steps
COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#64748b", "#b91c1c", "#1e293b")
UPDATES = ("proposer", "solver", "both")  # in the order, and so the colours, of the other charts

Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Chart:
    """label -> metric; a metric that the run never wrote is left out, and so is a chart without any."""

    title: str
    lines: Mapping[str, str | Callable[[dict[str, float]], float | None]]
    note: str = ""
    percent: bool = False


def _share(part: str, whole: str) -> Callable[[dict[str, float]], float | None]:
    return lambda row: 100 * row[part] / row[whole] if row.get(whole) and row.get(part) is not None else None


CHARTS = (
    Chart("Rewards", {"proposer": "reward/proposer", "solver": "reward/solver"}),  # its note: reward_note
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
    Chart("Tokens sampled in an episode", {"proposer": "proposer/tokens", "solver": "solver/tokens"}),
    Chart("KL to the initial model", {name: f"update/{name}/kl" for name in UPDATES}),
    Chart("Entropy of the policy", {name: f"update/{name}/entropy" for name in UPDATES}, "Nats a token."),
    Chart("Gradient norm", {name: f"update/{name}/grad_norm" for name in UPDATES}, "Before clipping."),
    Chart(
        "Throughput, tokens a second",
        {"sampled": "play/tokens_per_second", "trained": "update/tokens_per_second"},
    ),
    Chart("Seconds", {"a whole step": "seconds", "playing": "play/seconds", "updating": "update/seconds"}),
)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _written(where: object) -> Iterator[None]:
    """What is not as a run writes it is told with its place."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: expected it as a run writes it, which it is not ({found})") from error


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a file, each with its place. A last one that a running process has half written waits."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        where = f"{path} line {number}"
        with _written(where):
            row = dict(json.loads(line))
        yield where, row


def read_metrics(workdir: Path) -> Steps:
    """The rows of steps; none where there was only an evaluation."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        if any(workdir.glob(EVALUATIONS)):
            return []
        raise InputError(f"{workdir}: expected a run folder, found neither metrics.jsonl nor {EVALUATIONS} in it")
    rows: list[dict[str, Any]] = []
    for where, row in _lines(path):
        if "seconds" in row:
            with _written(where):
                rows.append({name: None if value is None else float(value) for name, value in row.items()})
                rows[-1] |= {name: float(row[name]) for name in ("step", "seconds")}  # which are never null
    return rows


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """What evaluations wrote, in the order of steps. A file that is just being written waits."""
    found = []
    for path in sorted(workdir.glob(EVALUATIONS)):
        try:
            document = json.loads(path.read_bytes())
        except ValueError:
            continue
        with _written(path):
            found.append(shown_evaluation(document))
    return found


def shown_evaluation(document: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a document that evaluate.evaluate wrote."""
    columns = (*SHARES, "right_low", "right_high", *MEANS, "n")
    sets = {name: {column: float(row[column]) for column in columns} for name, row in document["sets"].items()}
    return {"step": int(document["step"]), "judge": str(document["judge"]), "sets": sets}


def read_config(workdir: Path) -> tuple[str, str]:
    """As it stands in the file, but for secrets, and its reward_note; "" where there is none."""
    path, text, note = workdir / "config.json", "", ""
    if path.is_file():
        with _written(path):
            text = masked(path.read_text(encoding="utf-8"))
            note = reward_note(text)
    return text, note


def read_games(workdir: Path, most: int) -> tuple[list[dict[str, Any]], int]:
    """At most `most` games, as many of each dump, and how many there are in all."""
    dumps = sorted((workdir / "episodes").glob("step_*.jsonl"))
    each, games, total = max(1, most // max(len(dumps), 1)), [], 0
    kept = {dumps[i] for i in np.linspace(0, len(dumps) - 1, min(len(dumps), most)).round().astype(int)}
    for path in dumps:
        with _written(path):
            step = int(path.stem.removeprefix("step_"))
        for number, (where, game) in enumerate(_lines(path)):
            total += 1
            if path in kept and number < each:
                with _written(where):
                    games.append(shown_game(step, game))
    return games, total


def shown_game(step: int, game: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a record that selfplay.readable wrote."""
    scores = [attempt["score"] for attempt in game["attempts"]]
    question = game["question"]
    outcome = game["fault"] or "unfinished"
    said = [turn["text"] for turn in (game["proposer"] or {"turns": []})["turns"] if turn["who"] == "proposer"]
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
        {"found": turn["who"] == "search engine", "titles": _titles(turn["text"]), "text": turn["text"].strip()}
        for turn in episode["turns"]
    ]
    searches = sum(turn["found"] for turn in turns)
    answer = prompts.last_answer("".join(turn["text"] for turn in turns if not turn["found"])) or ""
    stop = episode["stop_reason"]
    return {"name": name, "turns": turns, "stop": stop, "score": score, "searches": searches, "answer": answer}


def _titles(text: str) -> list[str]:
    return [title.strip(' "') for title in re.findall(r"^(?:<\w+>)?Doc \d+\(Title: (.*?)\) ", text, re.MULTILINE)]


# --- drawing ----------------------------------------------------------------------------------------------------------


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


def _line(axes: Any, label: str, points: Sequence[tuple[float, float]], color: str) -> None:
    steps, values = np.array(points, float).T
    if len(steps) < SMOOTHED_STEPS:
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        return
    width = max(3, len(steps) // 20)
    weights = np.convolve(np.ones_like(values), np.ones(width), "same")
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, np.convolve(values, np.ones(width), "same") / weights, color=color, label=label)


def draw(chart: Chart, rows: Steps) -> str | None:
    axes, drawn = _figure(), 0
    for (label, metric), color in zip(chart.lines.items(), COLORS, strict=False):
        found = [(row["step"], metric(row) if callable(metric) else row.get(metric)) for row in rows]
        points = [(step, value) for step, value in found if value is not None]
        if points:
            _line(axes, label, points, color)
            drawn += 1
    if not drawn:
        return None
    low = axes.get_ylim()[0]
    axes.set_ylim(bottom=0 if low > 0 or chart.percent else low, top=103 if chart.percent else None)
    return _image(axes)


def draw_faults(rows: Steps) -> str | None:
    """Why questions failed, stacked, as counts of a step."""
    names = list(dict.fromkeys(key for row in rows for key, count in row.items() if key.startswith("fault/") and count))
    if not names:
        return None
    axes, steps = _figure(), [row["step"] for row in rows]
    counts = [[row.get(name) or 0 for row in rows] for name in names]
    labels = [name.removeprefix("fault/").replace("_", " ") for name in names]
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    axes.stackplot(steps, counts, labels=labels, colors=colors, alpha=0.8)
    return _image(axes)


def draw_evaluations(found: Sequence[dict[str, Any]]) -> str | None:
    """Percent right of each set over steps, with the interval of each point."""
    names = list(dict.fromkeys(name for document in found for name in document["sets"]))
    if not names:
        return None
    axes = _figure()
    for i, name in enumerate(names):
        points = [(document["step"], document["sets"][name]) for document in found if name in document["sets"]]
        values = np.array([row["right"] for _, row in points])
        errors = np.array([[row["right"] - row["right_low"], row["right_high"] - row["right"]] for _, row in points]).T
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.5, "elinewidth": 0.8}
        style["linestyle"] = "--" if name == AVERAGE else "-"
        steps = [step for step, _ in points]
        axes.errorbar(steps, values, np.maximum(0, errors), label=name, color=COLORS[i % len(COLORS)], **style)
    axes.set_ylim(0, 103)
    return _image(axes)


# --- the page ---------------------------------------------------------------------------------------------------------


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


def by_judge(evals: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What one judge finds right is no point on another's curve. The last one's come first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for document in reversed(evals):
        found.setdefault(document["judge"], []).insert(0, document)
    return found


def _charts(steps: Steps, evals: Sequence[dict[str, Any]], rewarded: str) -> Iterator[dict[str, str]]:
    drawn = [(chart.title, chart.note, draw(chart, steps)) for chart in CHARTS]
    drawn[0] = (drawn[0][0], rewarded, drawn[0][2])
    drawn.insert(2, ("Questions that failed, by reason", "Questions of a step.", draw_faults(steps)))
    for judge, documents in reversed(by_judge(evals).items()):
        title, note = f"Right answers to held-out questions by {judge}, %", "With 95 % bootstrap intervals."
        drawn.insert(0, (title, note, draw_evaluations(documents)))
    yield from ({"title": title, "note": note, "image": image} for title, note, image in drawn if image)


def _ends(evals: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Set -> its row of the last judge's first evaluation and of the last, each with its step."""
    rows: dict[str, list[dict[str, float]]] = {}
    for document in next(iter(by_judge(evals).values()), []):
        for name, row in document["sets"].items():
            rows.setdefault(name, []).append(row | {"step": document["step"]})
    return {name: (found[0], found[-1]) for name, found in rows.items()}


def page(workdir: Path, most_games: int) -> str:
    steps, evals = read_metrics(workdir), read_evaluations(workdir)
    games, total = read_games(workdir, most_games)
    config, rewarded = read_config(workdir)
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(
        name=workdir.resolve().name,
        steps=int(steps[-1]["step"]) if steps else 0,
        minutes=sum(row["seconds"] for row in steps) / 60,
        evaluations=_ends(evals),
        judge=evals[-1]["judge"] if evals else "",
        charts=list(_charts(steps, evals, rewarded)),
        games=games,
        total=total,
        outcomes=sorted({game["outcome"] for game in games}),
        dumps=sorted({game["step"] for game in games}),
        config=config,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(arguments))


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
    try:
        text = page(workdir, args.games)
        with replacing(out, str(out)) as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    print(f"{printable(str(out))}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
