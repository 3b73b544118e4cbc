"""The solver on question sets, greedy, through the same engine as training; judged, scored, and nothing done twice.

For the weights of a step, workdir/eval/ holds step_000040/episodes.jsonl and step_000040/verdicts.jsonl, a line written
as each episode or verdict ends, and step_000040.json with the scores. What stands there is not played or judged again:
an evaluation that was killed goes on, one that is repeated with another judge only asks that judge.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssp_jax import hosts, prompts, rewards, scores
from ssp_jax.data import Task
from ssp_jax.engine import Engine, Stats
from ssp_jax.episodes import SOLVER, Episode, Player, Stage, episode_id
from ssp_jax.judge import Case, Judge, Verdict
from ssp_jax.metrics import Logger
from ssp_jax.scores import Values

Record = dict[str, Any]  # a line of episodes.jsonl
Key = tuple[str, int]  # set, and row in its file


@dataclass(frozen=True)
class Setting:
    """What the evaluations of a run have in common."""

    folder: Path  # workdir/eval
    initial: str  # digest of the weights that the run starts from
    sets: dict[str, list[Task]]
    engine: Engine
    stage: Stage
    key: Any  # of random numbers
    temperature: float
    metric: str  # config key eval.judge
    judge: Judge | None  # where that is one
    logger: Logger
    stop: Callable[[], None]  # called often; may raise

    @property
    def questions(self) -> list[tuple[str, Task]]:
        return [(name, task) for name, tasks in self.sets.items() for task in tasks]


@dataclass(frozen=True)
class Result:
    step: int
    document: dict[str, Any]  # what step_000040.json holds
    values: Values


def evaluate(setting: Setting, step: int, weights: str, params: Callable[[], Any]) -> Result:
    """weights: what they are, in words. params: gives the sampler's copy, asked for only if a question is left.

    Each process plays and judges its share, and writes files of its own; all get the whole.
    """
    folder = setting.folder / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"the questions of an evaluation": hosts.digest(setting.questions), "the step": step}
    records: dict[Key, Record] = hosts.share(lambda: _played(setting, folder) if hosts.first() else {}, facts)[0]
    missing = [(name, task) for name, task in setting.questions if (name, task.uid) not in records]
    if missing:
        weights_now, own = params(), [missing[i] for i in hosts.own_share([1.0] * len(missing))]
        for part in hosts.share(lambda: _play(setting, own, weights_now, folder / _own_file("episodes"))):
            records |= part
        del weights_now
    verdicts = _judge(setting, folder, records)
    values = {
        name: _values([records[name, task.uid] for task in tasks], setting.metric, verdicts)
        for name, tasks in setting.sets.items()
    }
    document = {
        "step": step,
        "weights": weights,
        "judge": setting.judge.name if setting.judge else setting.metric,
        "unjudged": sum(verdict.right is None for verdict in verdicts.values()),
        "stop_reasons": dict(Counter(record["stop_reason"] for record in records.values())),
        "seconds": round(_seconds(records.values()), 1),
        "sets": scores.summarize(values),
    }
    if hosts.first():
        folder.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Result(step, document, values)


def _values(records: list[Record], metric: str, verdicts: dict[Key, Verdict]) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {name: [] for name in (*scores.SHARES, *scores.MEANS)}
    for record in records:
        answer, golds = record["answer"], record["answers"]
        verdict = verdicts.get((record["set"], record["row"]))
        found["right"].append(rewards.is_right(answer, golds, metric, verdict.right if verdict else None))
        for name, number in (
            ("em", rewards.exact_match(answer, golds)),
            ("cover_em", rewards.cover_exact_match(answer, golds)),
            ("f1", rewards.f1_score(answer, golds)),
            ("searches", len(record["searches"])),
            ("tokens", record["tokens"]),
        ):
            found[name].append(number)
    return {name: np.array(numbers, float) for name, numbers in found.items()}


# --- playing ----------------------------------------------------------------------------------------------------------


def _play(setting: Setting, questions: list[tuple[str, Task]], params: Any, path: Path) -> dict[Key, Record]:
    """All questions of all sets at once, so that the slots stay full across sets."""
    rows = {(name, task.uid): row for row, (name, task) in enumerate(setting.questions)}
    began, start, owners, players = round(time.time(), 3), time.monotonic(), {}, []
    for name, task in questions:
        prompt = setting.stage.prompt(prompts.solver_messages(setting.stage.style, task.question))
        uid = episode_id(SOLVER, rows[name, task.uid], 0)  # the same whatever is left to play
        players.append(Player(setting.stage, SOLVER, uid, setting.temperature, prompt))
        owners[uid] = (name, task)
    records: dict[Key, Record] = {}

    with open(path, "a", encoding="utf-8") as file, setting.logger.phase("evaluating", len(questions)) as phase:

        def finished(player: Player) -> list[Player]:
            name, task = owners[player.uid]
            of = {"initial": setting.initial, "began": began, "process": path.stem}
            of["seconds"] = round(time.monotonic() - start, 3)
            records[name, task.uid] = record = _record(name, task, player.episode()) | of
            _write(file, record)
            return []

        def progress(stats: Stats) -> None:
            setting.stop()
            phase.advance(len(records), tokens=stats.sampled_tokens / max(stats.seconds, 1e-9))

        setting.engine.play(params, setting.key, players, finished, progress)
    return records


def _record(name: str, task: Task, episode: Episode) -> Record:
    return {
        "set": name,
        "row": task.uid,
        "question": task.question,
        "answers": list(task.answers),
        "answer": prompts.last_answer(episode.text),
        "searches": list(episode.queries),
        "tokens": episode.num_sampled,
        "length": len(episode.tokens) - episode.prompt_length,
        "stop_reason": episode.stop_reason,
        "turns": [{"who": who, "text": text} for who, text in episode.turns],
    }


def _seconds(records: Iterable[Record]) -> float:
    """Of play: each start of a process has written how long it took so far. Of processes side by side the slowest."""
    starts: dict[tuple[str, float], float] = {}
    for record in records:
        start = record["process"], record["began"]
        starts[start] = max(starts.get(start, 0.0), record["seconds"])
    sums: dict[str, float] = {}
    for (process, _), seconds in starts.items():
        sums[process] = sums.get(process, 0.0) + seconds
    return max(sums.values(), default=0.0)


def _played(setting: Setting, folder: Path) -> dict[Key, Record]:
    """The episodes of earlier starts with these weights whose questions are still asked, word for word."""
    asked = {(name, task.uid): (task.question, list(task.answers), setting.initial) for name, task in setting.questions}
    lines = {key: line for line in _lines(folder, "episodes") if (key := (line["set"], line["row"])) in asked}
    same = {key: line for key, line in lines.items() if _about(line) == asked[key]}
    if len(same) < len(lines):
        number = len(lines) - len(same)
        setting.logger.say(f"{number} episodes in {folder} are of other weights or questions: played again")
    return same


def _about(line: Record) -> tuple[Any, ...]:
    """Whatever else a line says, it says it of these; one of an earlier version may lack some."""
    return line.get("question"), line.get("answers"), line.get("initial")


# --- judging ----------------------------------------------------------------------------------------------------------


def _judge(setting: Setting, folder: Path, records: dict[Key, Record]) -> dict[Key, Verdict]:
    """The verdicts on answers that need one. Failed ones are asked for again."""
    judge, metric = setting.judge, setting.metric
    if judge is None:
        return {}
    asked = {k: r for k, r in records.items() if rewards.needs_judge(r["answer"], r["answers"], metric)}
    verdicts: dict[Key, Verdict] = hosts.share(lambda: _judged(folder, judge.name, asked) if hosts.first() else {})[0]
    left = [key for key in asked if key not in verdicts or verdicts[key].right is None]
    if left:
        # Perhaps none; yet all processes come here, for the judge may load its weights.
        own = [asked[left[i]] for i in hosts.own_share([1.0] * len(left))]
        for part in hosts.share(lambda: _ask(setting, judge, own, folder / _own_file("verdicts"))):
            verdicts |= part
    return verdicts


def _judged(folder: Path, judge: str, asked: dict[Key, Record]) -> dict[Key, Verdict]:
    """What this judge said of these answers before. What it said counts for more than that it failed."""
    verdicts: dict[Key, Verdict] = {}
    for line in _lines(folder, "verdicts"):
        key = (line["set"], line["row"])
        known = key in verdicts and verdicts[key].right is not None
        same = key in asked and _about(line) == _about(asked[key]) and line["answer"] == asked[key]["answer"]
        if line["judge"] == judge and same and not known:
            verdicts[key] = Verdict(line["right"], line["reply"])
    return verdicts


def _ask(setting: Setting, judge: Judge, asked: list[Record], path: Path) -> dict[Key, Verdict]:
    cases = [Case(record["question"], tuple(record["answers"]), record["answer"]) for record in asked]
    verdicts: dict[Key, Verdict] = {}
    with open(path, "a", encoding="utf-8") as file, setting.logger.phase("judging", len(asked)) as phase:

        def take(i: int, verdict: Verdict) -> None:
            line = {name: asked[i][name] for name in ("set", "row", "question", "answers", "initial", "answer")}
            verdicts[line["set"], line["row"]] = verdict
            _write(file, line | {"judge": judge.name, "right": verdict.right, "reply": verdict.reply})

        def progress() -> None:
            setting.stop()
            phase.advance(len(verdicts))

        judge.ask(cases, take, progress)
    return verdicts


# --- files and tables -------------------------------------------------------------------------------------------------


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()  # so that a process that is killed the next moment has it on disk


def _own_file(name: str) -> str:
    """episodes.jsonl of the first process, episodes_1.jsonl of the next."""
    return f"{name}.jsonl" if hosts.first() else f"{name}_{jax.process_index()}.jsonl"


def _lines(folder: Path, name: str) -> list[Record]:
    """The whole lines of all processes' files; what a killed one left half written is cut off, for more will follow.

    A line that a machine's crash has spoilt is passed over: what it said is played or judged again.
    """
    lines: list[Record] = []
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)
        for line in text[:whole].splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def show(logger: Logger, result: Result) -> None:
    found = result.document
    cells, heads = scores.rows(found["sets"], found["judge"])
    title = f"Held-out questions, {found['weights']}: percent, 95 % interval; {found['seconds']:.0f} s of play"
    logger.table(title, cells, heads)
    if refused := found["stop_reasons"].get("prompt_tokens"):
        logger.say(f"{refused} questions are longer than limits.prompt_tokens and count as wrong")
    if found["unjudged"]:
        logger.say(
            f"{found['unjudged']} verdicts failed and count as wrong, verdicts.jsonl says why; the same command asks "
            "again (a judge cut off in its reply needs a larger judge.max_tokens)"
        )


def compare(
    logger: Logger, folder: Path, before: Result, after: Result, paper: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """Shows and writes before and after, beside the paper's figures where it has this model and these sets."""
    found = scores.gains(before.values, after.values, paper)
    cells, heads = scores.gain_rows(found)
    judge = after.document["judge"]
    logger.table(f"Right by {judge}, {after.step} steps of self-play", cells, heads)
    document = {"before": before.step, "after": after.step, "judge": judge, "sets": scores.gains_json(found)}
    if hosts.first():
        (folder / "gain.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
