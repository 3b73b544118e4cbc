"""A run folder as one HTML page, with curves and games to read.

The page needs no network and no other file, and may be made while the run goes on. Curves are
matplotlib SVGs: some 15 KB each and sharp at any size, where an embedded plotly would bring 4 MB.
In a long run each point of a curve is the mean of many steps, and the page says so.
"""

import base64
import io
import itertools
import json
import math
import re
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
from ssp_jax.runtime import figures, records
from ssp_jax.runtime.files import replacing

FILE = "report.html"  # where a page is written, in a run folder
EVALUATIONS = "eval/step_*.json"  # there, too
EVALUATIONS_SHOWN = 200  # at most as points of a curve
LONG_LABEL = 22  # characters of one that leaves no room for four beside each other
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


_REWARDS = Chart("Rewards", {"proposer": "reward/proposer", "solver": "reward/solver"})
CHARTS = (
    _REWARDS,  # its note: reward_note()
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

_FAULTS = ("fault/", "cause/")  # of questions that failed, and what was behind some of them
_LINES = [(chart.name(label), metric) for chart in CHARTS for label, metric in chart.lines.items()]


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def _expecting_run_files(where: object) -> Iterator[None]:
    """Turns errors of reading a file that a run has written into InputError with its place."""
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
    """Steps of a run, from metrics.jsonl."""

    last: int = 0
    seconds: float = 0.0
    lora: tuple[float, float] | None = None  # with it: trained parameters, and their share
    curves: Curves = field(default_factory=Curves)
    spoilt: int = 0  # lines that were skipped

    def add(self, row: Row, step: int, seconds: float) -> None:
        values = {name: value for name, value in row.items() if name.startswith(_FAULTS)}
        for name, metric in _LINES:
            values[name] = metric(row) if callable(metric) else row.get(metric)
        trained = row.get("lora/parameters")
        share = row.get("lora/share")
        if trained and share:
            self.lora = trained, share
        self.last = step
        self.seconds += seconds
        self.curves.add(step, {name: value for name, value in values.items() if value is not None})


def read_metrics(workdir: Path) -> Steps:
    """No steps if there was only an evaluation.

    Spoilt lines are skipped. Raises InputError if all are, or if this is no run folder.
    """
    path = workdir / "metrics.jsonl"
    steps = Steps()
    if not path.is_file():
        if any(workdir.glob(EVALUATIONS)):
            return steps
        raise InputError(
            f"{workdir}: expected a run folder, found neither metrics.jsonl nor {EVALUATIONS} in it"
        )
    whole = 0
    for number, line in enumerate(records.read_lines(path, {}), 1):
        if line.record is None:
            steps.spoilt += 1
            continue
        with _expecting_run_files(f"{path} line {number}"):
            _add_row(steps, line.record)
        whole += 1
    if steps.spoilt and not whole:
        raise InputError(
            f"{path} line 1: expected it as a run writes it, a JSON object; no line is one"
        )
    return steps


def _add_row(steps: Steps, record: dict[str, Any]) -> None:
    step = int(_number(record["step"]))
    if "seconds" in record:  # else it is an evaluation's
        row = {name: None if value is None else _number(value) for name, value in record.items()}
        steps.add(row, step, _number(record["seconds"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Evaluations in the order of steps; a file that is half written is skipped."""
    evaluations = []
    for path in sorted(workdir.glob(EVALUATIONS)):
        try:
            document = json.loads(path.read_bytes())
        except ValueError:
            continue
        except RecursionError:
            document = None
        with _expecting_run_files(path):
            evaluations.append(shown_evaluation(document))
    return evaluations


def shown_evaluation(document: Any) -> dict[str, Any]:
    """The fields that the page shows of a document of evaluation.evaluate.

    inputs: of its episodes, as text that is equal where they are.
    """
    columns = (*SHARES, "right_low", "right_high", *MEANS, "n")
    questions = dict(document.get("questions") or {})
    sets = {}
    for name, row in document["sets"].items():
        shown = {column: _number(row[column]) for column in columns}
        sets[printable(name)] = shown | {"questions": questions.get(name)}
    inputs = json.dumps(document.get("inputs") or {}, sort_keys=True)
    return {
        "step": int(_number(document["step"])),
        "judge": printable(str(document["judge"])),
        "inputs": inputs,
        "sets": sets,
    }


def read_config(workdir: Path) -> tuple[str, str]:
    """The text of config.json without secrets, and its reward_note(); "" where there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        return "", ""
    with _expecting_run_files(path):
        text = masked(path.read_text(encoding="utf-8"))
        return text, reward_note(text)


@dataclass
class Games:
    """Games of a run's dumps."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0  # games, shown or not
    spoilt: int = 0  # lines that were skipped


def read_games(workdir: Path, limit: int) -> Games:
    """At most `limit` games, as many of each dump, and how many there are in all."""
    dumps = sorted((workdir / "episodes").glob("step_*.jsonl"))
    per_dump = max(1, limit // max(len(dumps), 1))
    shown_dumps = {dumps[i] for i in _spread(len(dumps), limit)}
    games = Games()
    for path in dumps:
        with _expecting_run_files(path):
            step = int(path.stem.removeprefix("step_"))
        count = per_dump if path in shown_dumps else 0
        lines = itertools.islice(records.read_lines(path, {}), count)
        end = 0
        for number, line in enumerate(lines, 1):
            end = line.next
            if line.record is None:
                games.spoilt += 1
                continue
            with _expecting_run_files(f"{path} line {number}"):
                games.shown.append(shown_game(step, line.record))
            games.total += 1
        games.total += records.count_lines(path, end)
    return games


def shown_game(step: int, game: dict[str, Any]) -> dict[str, Any]:
    """The fields that the page shows of a record of selfplay.readable."""
    outcome = game["fault"] or "unfinished"
    question = game["question"]
    if question is not None:
        outcome = "reused" if question["reused"] else "verified"
        text = question["text"]
        golds = question["answers"]
    else:
        proposer = game["proposer"] or {"turns": []}
        texts = [turn["text"] for turn in proposer["turns"] if turn["who"] == "proposer"]
        text = prompts.first_question("".join(texts))
        golds = [game["answer"]]

    episodes = []
    for name in ("proposer", "verifier"):
        if game[name]:
            episodes.append(shown_episode(name.capitalize(), game[name], None))
    solved = 0
    for i, attempt in enumerate(game["attempts"], 1):
        solved += attempt["score"] > 0
        episodes.append(shown_episode(f"Attempt {i}", attempt, attempt["score"]))
    return {
        "step": step,
        "answer": game["answer"],
        "requested": game["requested_searches"],
        "question": text,
        "golds": golds,
        "played": question is not None,
        "outcome": outcome,
        "reason": _reason(game["fault"], game.get("cause", "")),
        "solved": f"{solved}/{len(game['attempts'])}" if game["attempts"] else "",
        "reward": float(game["proposer_reward"]),
        "episodes": episodes,
    }


def shown_episode(name: str, episode: dict[str, Any], score: float | None) -> dict[str, Any]:
    """The fields that the page shows of an episode in such a record."""
    turns = []
    written = ""
    for turn in episode["turns"]:
        found = turn["who"] == "search engine"
        text = turn["text"].strip()
        turns.append({"found": found, "titles": _titles(turn["text"]), "text": text})
        if not found:
            written += text
    return {
        "name": name,
        "turns": turns,
        "stop": episode["stop_reason"],
        "score": score,
        "searches": sum(turn["found"] for turn in turns),
        "answer": prompts.last_answer(written) or "",
    }


def _titles(text: str) -> list[str]:
    titles = re.findall(r"^(?:<\w+>)?Doc \d+\(Title: (.*?)\) ", text, re.MULTILINE)
    return [title.strip(' "') for title in titles]


# --- drawing --------------------------------------------------------------------------------------


def _figure() -> Any:
    """The axes of an empty chart, made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes = Figure(figsize=(5.4, 2.9), layout="constrained").add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    return axes


def _image(axes: Any) -> str:
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


def _line(axes: Any, label: str, points: Sequence[Point], each: int, color: str) -> None:
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
    axes = _figure()
    drawn = 0
    for label, color in zip(chart.lines, COLORS, strict=False):
        if points := curves.line(chart.name(label)):
            _line(axes, label, points, curves.each, color)
            drawn += 1
    if not drawn:
        return None
    if chart.percent:
        axes.set_ylim(bottom=0, top=103)
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return _image(axes)


def draw_faults(curves: Curves) -> str | None:
    """Counts of failed questions by reason, stacked; None where none has failed.

    A fault whose causes are known is shown by these.
    """
    lines = {}
    for name in curves.names:
        if name.startswith(_FAULTS):
            line = {point.step: point.mean for point in curves.line(name)}
            if any(line.values()):
                lines[name] = line
    for name in list(lines):
        prefix, fault, *_ = name.split("/")
        if prefix == "cause":
            lines.pop(f"fault/{fault}", None)
    if not lines:
        return None
    axes = _figure()
    steps = sorted({step for line in lines.values() for step in line})
    counts = [[line.get(step, 0.0) for step in steps] for line in lines.values()]
    labels = [_reason(*name.split("/")[1:]) for name in lines]
    colors = [COLORS[i % len(COLORS)] for i in range(len(lines))]
    axes.stackplot(steps, counts, labels=labels, colors=colors, alpha=0.8)
    return _image(axes)


def _reason(fault: str, cause: str = "") -> str:
    """A fault and its cause, for people."""
    return printable(": ".join(filter(None, (fault, cause))).replace("_", " "))


def draw_evaluations(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """Percent right of each set over steps, with the interval of each point; None of no sets."""
    drawn = [evaluations[i] for i in _spread(len(evaluations), EVALUATIONS_SHOWN)]
    names = list(dict.fromkeys(name for document in drawn for name in document["sets"]))
    if not names:
        return None
    axes = _figure()
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
    return _image(axes)


def _spread(number: int, limit: int) -> list[int]:
    """At most `limit` indices below `number`: the first, the last, and evenly between."""
    indices = np.linspace(0, number - 1, min(number, limit)).round()
    return sorted(set(indices.astype(int).tolist()))


# --- the page -------------------------------------------------------------------------------------


def reward_note(config: str) -> str:
    """The rewards of both roles in words, from the text of a run's config.json."""
    values = json.loads(config)
    if values.get("reward.proposer") not in rewards.PROPOSER_REWARDS:
        return ""
    name, metric = values["reward.proposer"], values["reward.metric"]
    what = " ".join(str(rewards.PROPOSER_REWARDS[name].__doc__).split())
    return (
        f"Proposer, {name}: {what} A question that fails: {values['reward.invalid_question']:g}. "
        f"Solver: share of attempts that are right by {metric}."
    )


def lora_note(config: str, steps: Steps) -> str:
    """The adapter that a run trains, in words; "" of full fine-tuning.

    config: the text of its config.json, "" where there is none.
    """
    values = json.loads(config) if config else {}
    rank = values.get("lora.rank")
    if not rank:
        return ""
    note = (
        f"LoRA of rank {rank}, alpha {values['lora.alpha']:g}, on {len(values['lora.targets'])} "
        "projections"
    )
    if steps.lora is None:
        return note
    trained, share = steps.lora
    return f"{note}: {figures.trained_parameters(trained, trained / share)}"


def comparable(evals: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups of evaluations by the same judge and of the same inputs; the last one's group first.

    Verdicts of two judges make two curves, and so do episodes with two search indexes.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for document in reversed(evals):
        groups.setdefault((document["judge"], document["inputs"]), []).insert(0, document)
    return list(groups.values())


def _charts(steps: Steps, evals: Sequence[dict[str, Any]], rewarded: str) -> list[dict[str, str]]:
    """All charts that have data. rewarded: reward_note()."""
    shown: list[dict[str, str]] = []

    def show(title: str, note: str, image: str | None) -> None:
        if image:
            shown.append({"title": title, "note": note, "image": image})

    judges: set[str] = set()
    for documents in comparable(evals):
        judge = documents[0]["judge"]
        earlier = " with earlier inputs" if judge in judges else ""
        judges.add(judge)
        title = f"Right answers to held-out questions by {judge}{earlier}, %"
        note = "With 95 % bootstrap intervals."
        if len(documents) > EVALUATIONS_SHOWN:
            note += f" {EVALUATIONS_SHOWN} of {len(documents)} evaluations."
        show(title, note, draw_evaluations(documents))

    each = steps.curves.each
    of_means = f" A point is the mean of {each} steps, the band their range." if each > 1 else ""
    for number, chart in enumerate(CHARTS):
        note = rewarded if chart is _REWARDS else chart.note
        show(chart.title, note + of_means, draw(chart, steps.curves))
        if number == 1:
            note = f"Mean of {each} steps." if each > 1 else "Questions of a step."
            show("Questions that failed, by reason", note, draw_faults(steps.curves))
    return shown


def _ends(evals: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Set -> its rows of the first and the last evaluation of the last one's group, with steps."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for document in next(iter(comparable(evals)), []):
        for name, row in document["sets"].items():
            rows.setdefault(name, []).append(row | {"step": document["step"]})
    return {name: (of_set[0], of_set[-1]) for name, of_set in rows.items()}


def page(workdir: Path, most_games: int) -> str:
    """The HTML page of a run folder. Raises InputError where it is none."""
    steps = read_metrics(workdir)
    evals = read_evaluations(workdir)
    games = read_games(workdir, most_games)
    config, rewarded = read_config(workdir)
    with _expecting_run_files(workdir / "config.json"):
        lora = lora_note(config, steps)
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_as_text
    )
    environment.globals["figures"] = figures
    return environment.from_string(source).render(
        name=workdir.resolve().name,
        steps=steps.last,
        minutes=steps.seconds / 60,
        lora=lora,
        evaluations=_ends(evals),
        judge=evals[-1]["judge"] if evals else "",
        charts=_charts(steps, evals, rewarded),
        spoilt=steps.spoilt + games.spoilt,
        games=games.shown,
        total=games.total,
        outcomes=sorted({game["outcome"] for game in games.shown}),
        dumps=sorted({game["step"] for game in games.shown}),
        config=config,
    )


def _as_text(value: Any) -> Any:
    """Escapes characters that no page may hold, in plain text only: a macro's HTML is markup."""
    return printable(value) if type(value) is str else value


def write(workdir: Path, out: Path, most_games: int = GAMES) -> int:
    """Writes the page of a run folder; returns its bytes. Raises InputError."""
    if not workdir.is_dir():
        raise InputError(f"{workdir}: expected a run folder, found none")
    try:
        with replacing(out, str(out)) as file:  # first, for a page may take minutes
            text = page(workdir, most_games)
            file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return len(text.encode())
