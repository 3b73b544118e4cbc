"""A run folder as one HTML page, with curves and games to read.

The page needs no network and no other file, and may be made while the run goes on.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from ssp_jax.errors import InputError, masked, printable
from ssp_jax.evaluation.scores import MEANS, SHARES
from ssp_jax.game import prompts, rewards
from ssp_jax.report import drawing, held_out
from ssp_jax.report.curves import Curves
from ssp_jax.runtime import figures, records
from ssp_jax.runtime.files import replacing

FILE = "report.html"  # where a page is written, in a run folder
EVALUATIONS = "eval/step_*.json"  # there, too
GAMES = 300  # shown at most, spread over the dumps of a run
CHANGES = 20  # held-out questions shown that became right, and as many that became wrong


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

    def add(self, row: drawing.Row, step: int, seconds: float) -> None:
        values = {name: value for name, value in row.items() if name.startswith(drawing.FAULTS)}
        for name, metric in drawing.LINES:
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
    shown_dumps = {dumps[i] for i in drawing.spread(len(dumps), limit)}
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
            if name == "verifier":
                episodes[-1]["materials"] = _materials(game)
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
        "fault": game["fault"],
        "reason": drawing.reason(game["fault"], game.get("cause", "")),
        "solved": f"{solved}/{len(game['attempts'])}" if game["attempts"] else "",
        "reward": float(game["proposer_reward"]),
        "episodes": episodes,
    }


def _materials(game: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """What a verifier was given to read, by where it came from."""
    shown = {}
    for title, key in (("the proposer's documents", "documents"), ("noise", "noise")):
        found = game.get(key) or []  # of an earlier version there may be none
        shown[title] = [{"title": d["title"].strip(' "'), "text": d["text"]} for d in found]
    return shown


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
        "materials": {},
    }


def first_to_read(games: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Games to begin with: what they are -> their place in `games`."""
    found: dict[str, int] = {}
    partly = [
        (int(won) / int(all_), place)
        for place, (won, _, all_) in enumerate(game["solved"].partition("/") for game in games)
        if won and 0 < int(won) < int(all_)
    ]
    if partly:
        found["the hardest question that was solved"] = min(partly)[1]
    newest = [place for place, game in enumerate(games) if game["outcome"] == "verified"]
    if newest:
        found["the newest that was verified"] = newest[-1]
    return found


def _titles(text: str) -> list[str]:
    titles = re.findall(r"^(?:<\w+>)?Doc \d+\(Title: (.*?)\) ", text, re.MULTILINE)
    return [title.strip(' "') for title in titles]


# --- the page -------------------------------------------------------------------------------------


# For people; the formulas are in game/rewards.py.
REWARD_WORDS = {
    "one_minus_mean": "the share of attempts that are wrong.",
    "intermediate": "most where half of the attempts are right, nothing where all are or none.",
    "azr": "the share of attempts that are wrong, but nothing where all are.",
    "dr_zero": "most where one attempt alone is right, nothing where all are or none.",
    "variance": "most where half of the attempts are right, next to nothing where all are or none.",
    "r_zero": "most where half of the attempts are right, falling evenly to both ends.",
    "format_only": "1 for every verified question, however hard.",
}


def reward_note(config: str) -> str:
    """The rewards of both roles in words, from the text of a run's config.json."""
    values = json.loads(config)
    if values.get("reward.proposer") not in rewards.PROPOSER_REWARDS:
        return ""
    name, metric = values["reward.proposer"], values["reward.metric"]
    words = (
        f"Proposer ({name}): {REWARD_WORDS[name]} A question that fails earns "
        f"{values['reward.invalid_question']:g}. Solver: share of attempts that are right by "
        f"{metric}."
    )
    if name == "one_minus_mean":
        words += (
            " A question that nobody solves may be hard, or nonsense, and earns most; with "
            "reward.proposer=azr or intermediate it earns nothing."
        )
    return words


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
        if len(documents) > drawing.EVALUATIONS_SHOWN:
            note += f" {drawing.EVALUATIONS_SHOWN} of {len(documents)} evaluations."
        show(title, note, drawing.draw_evaluations(documents))

    each = steps.curves.each
    of_means = f" A point is the mean of {each} steps, the band their range." if each > 1 else ""
    for number, chart in enumerate(drawing.CHARTS):
        note = rewarded if chart is drawing.REWARDS else chart.note
        show(chart.title, note + of_means, drawing.draw(chart, steps.curves))
        if number == 1:
            note = f"Mean of {each} steps." if each > 1 else "Questions of a step."
            show("Questions that failed, by reason", note, drawing.draw_faults(steps.curves))
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
    return template("report.html").render(
        name=workdir.resolve().name,
        steps=steps.last,
        minutes=steps.seconds / 60,
        lora=lora,
        evaluations=_ends(evals),
        judge=evals[-1]["judge"] if evals else "",
        charts=_charts(steps, evals, rewarded),
        changes=_changes(workdir, evals),
        start=first_to_read(games.shown),
        spoilt=steps.spoilt + games.spoilt,
        games=games.shown,
        total=games.total,
        outcomes=sorted({game[key] for game in games.shown for key in ("outcome", "fault")} - {""}),
        dumps=sorted({game["step"] for game in games.shown}),
        config=config,
    )


def _as_text(value: Any) -> Any:
    """Escapes characters that no page may hold, in plain text only: a macro's HTML is markup."""
    return printable(value) if type(value) is str else value


def template(name: str) -> jinja2.Template:
    """A template of this folder, for plain text of any origin."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_as_text,
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    )
    environment.globals["figures"] = figures
    return environment.get_template(name)


def _changes(workdir: Path, evals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Title -> how many held-out questions, and some of them, that training has changed."""
    of_last = next(iter(comparable(evals)), [])
    if len(of_last) < 2:
        return {}
    before, after = (
        held_out.read(workdir, document["step"], document["judge"])
        for document in (of_last[0], of_last[-1])
    )
    shown = {}
    for title, found in zip(
        ("became right", "became wrong"), held_out.changes(before, after), strict=True
    ):
        rows = []
        for change in (found[i] for i in drawing.spread(len(found), CHANGES)):
            episode = shown_episode("Episode", change.after.record, float(change.after.right))
            rows.append({"change": change, "episode": episode})
        shown[title] = {"number": len(found), "rows": rows}
    return shown


def write(workdir: Path, out: Path, most_games: int = GAMES) -> int:
    """Writes the page of a run folder; returns its bytes. Raises InputError."""
    if not workdir.is_dir():
        raise InputError(f"{workdir}: expected a run folder, found none")
    return write_text(out, lambda: page(workdir, most_games))


def write_text(out: Path, make: Callable[[], str]) -> int:
    """Writes a page that `make` gives; returns its bytes. Raises InputError."""
    try:
        with replacing(out, str(out)) as file:  # first, for a page may take minutes
            text = make()
            file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return len(text.encode())
