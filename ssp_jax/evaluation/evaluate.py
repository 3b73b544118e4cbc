"""The solver on question sets, greedy, through the same engine as training; judged, scored, and
nothing done twice.

For the weights of a step, workdir/eval/ holds step_000040/episodes.jsonl and
step_000040/verdicts.jsonl, a line written as each episode or verdict ends, and step_000040.json
with the scores. What stands there is not played or judged again: an evaluation that was killed goes
on, one that is repeated with another judge only asks that judge. Each line says what it depends on,
as digests; where one of them differs now, it is played or judged anew.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssp_jax.data import Task
from ssp_jax.errors import json_line
from ssp_jax.evaluation import scores
from ssp_jax.evaluation.scores import Values
from ssp_jax.game import prompts, rewards
from ssp_jax.game.judge import Case, Judge, Verdict
from ssp_jax.game.judge import shown as shown_reply
from ssp_jax.game.roles import SOLVER, Episode, EpisodeContext, EpisodePlayer, episode_id
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import processes, records
from ssp_jax.runtime.logger import Logger

Record = dict[str, Any]  # a line of episodes.jsonl
Key = tuple[str, int]  # set, and row in its file

_TEXT, _NUMBER, _LIST = (str,), (int, float), (list,)
_ASKED: records.Fields = {"set": _TEXT, "row": (int,), "question": _TEXT, "answers": _LIST}
_EPISODE: records.Fields = {
    **_ASKED,
    "answer": (str, type(None)),
    "searches": _LIST,
    "tokens": (int,),
    "stop_reason": _TEXT,
    "process": _TEXT,
    "began": _NUMBER,
    "seconds": _NUMBER,
}
_VERDICT: records.Fields = {
    **_ASKED,
    "answer": _TEXT,
    "judge": _TEXT,
    "right": (bool, type(None)),
    "reply": _TEXT,
}


@dataclass(frozen=True)
class EvalContext:
    """What the evaluations of a run have in common."""

    folder: Path  # workdir/eval
    # digests of what an episode depends on, beside its question; by names for people
    inputs: Mapping[str, str]
    training: str  # digest of what the weights of later steps depend on besides
    sets: dict[str, list[Task]]
    engine: Engine
    stage: EpisodeContext
    key: Any  # of random numbers
    temperature: float
    metric: str  # config key eval.judge
    judge: Judge | None  # where that is one
    logger: Logger
    stop: Callable[[], None]  # called often; may raise

    @property
    def questions(self) -> list[tuple[str, Task]]:
        return [(name, task) for name, tasks in self.sets.items() for task in tasks]

    def depends_on(self, step: int) -> dict[str, str]:
        """What an episode with the weights of a step depends on, beside its question."""
        return {**self.inputs, **({"the training": self.training} if step else {})}


@dataclass(frozen=True)
class Result:
    step: int
    document: dict[str, Any]  # what step_000040.json holds
    values: Values


def evaluate(setting: EvalContext, step: int, weights: str, params: Callable[[], Any]) -> Result:
    """weights: what they are, in words. params: gives the sampler's copy, asked for only if a
    question is left.

    Each process plays and judges its share, and writes files of its own; all get the whole.
    """
    folder = setting.folder / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    of = setting.depends_on(step)
    facts: dict[str, Any] = {
        f"{name} (a digest), of an evaluation": digest for name, digest in of.items()
    }
    facts |= {
        "the questions of an evaluation": processes.digest(setting.questions),
        "the step": step,
    }
    played: dict[Key, Record]
    played = processes.all_gather_objects(
        lambda: _load_episodes(setting, folder, of) if processes.is_coordinator() else {}, facts
    )[0]
    missing = [(name, task) for name, task in setting.questions if (name, task.uid) not in played]
    if missing:
        weights_now, own = (
            params(),
            [missing[i] for i in processes.local_share([1.0] * len(missing))],
        )
        for part in processes.all_gather_objects(
            lambda: _play(setting, own, of, weights_now, folder / _own_file("episodes"))
        ):
            played |= part
        del weights_now
    verdicts = _judge(setting, folder, played)
    values = {
        name: _values([played[name, task.uid] for task in tasks], setting.metric, verdicts)
        for name, tasks in setting.sets.items()
    }
    unjudged = [verdict.reply for _, verdict in sorted(verdicts.items()) if verdict.right is None]
    document = {
        "step": step,
        "weights": weights,
        "judge": setting.judge.name if setting.judge else setting.metric,
        "unjudged": len(unjudged),
        "unjudged_reply": unjudged[0] if unjudged else "",
        "stop_reasons": dict(Counter(record["stop_reason"] for record in played.values())),
        "seconds": round(_seconds(played.values()), 1),
        "sets": scores.summarize(values),
        "inputs": setting.inputs,
        "questions": {name: processes.digest(tasks) for name, tasks in setting.sets.items()},
    }
    if processes.is_coordinator():
        records.write_document(folder.with_suffix(".json"), document)
    return Result(step, document, values)


def _values(
    played: list[Record], metric: str, verdicts: dict[Key, Verdict]
) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {name: [] for name in (*scores.SHARES, *scores.MEANS)}
    for record in played:
        answer, golds = record["answer"], record["answers"]
        verdict = verdicts.get((record["set"], record["row"]))
        found["right"].append(
            rewards.is_right(answer, golds, metric, verdict.right if verdict else None)
        )
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


def _play(
    setting: EvalContext,
    questions: list[tuple[str, Task]],
    of: Mapping[str, str],
    params: Any,
    path: Path,
) -> dict[Key, Record]:
    """All questions of all sets at once, so that the slots stay full across sets."""
    rows = {(name, task.uid): row for row, (name, task) in enumerate(setting.questions)}
    began, start, owners, players = round(time.time(), 3), time.monotonic(), {}, []
    for name, task in questions:
        prompt = setting.stage.prompt(prompts.solver_messages(setting.stage.style, task.question))
        uid = episode_id(SOLVER, rows[name, task.uid], 0)  # the same whatever is left to play
        players.append(EpisodePlayer(setting.stage, SOLVER, uid, setting.temperature, prompt))
        owners[uid] = (name, task)
    played: dict[Key, Record] = {}

    with (
        open(path, "a", encoding="utf-8") as file,
        setting.logger.phase("evaluating", len(questions)) as phase,
    ):

        def finished(player: EpisodePlayer) -> list[EpisodePlayer]:
            name, task = owners[player.uid]
            seconds = round(time.monotonic() - start, 3)
            record = _record(name, task, player.episode())
            record |= {"of": of, "began": began, "process": path.stem, "seconds": seconds}
            played[name, task.uid] = record
            _write(file, record)
            return []

        def progress(stats: Stats) -> None:
            setting.stop()
            phase.advance(len(played), tokens=stats.tokens_per_second)

        setting.engine.play(params, setting.key, players, finished, progress)
    return played


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
        "turns": episode.turns_for_json(),
    }


def _seconds(played: Iterable[Record]) -> float:
    """Of play: each start of a process has written how long it took so far. Of processes side by
    side the slowest.
    """
    starts: dict[tuple[str, float], float] = {}
    for record in played:
        start = record["process"], record["began"]
        starts[start] = max(starts.get(start, 0.0), record["seconds"])
    sums: dict[str, float] = {}
    for (process, _), seconds in starts.items():
        sums[process] = sums.get(process, 0.0) + seconds
    return max(sums.values(), default=0.0)


def _load_episodes(setting: EvalContext, folder: Path, of: Mapping[str, str]) -> dict[Key, Record]:
    """The episodes of earlier starts that would be the same if they were played now."""
    asked = {
        (name, task.uid): (task.question, list(task.answers)) for name, task in setting.questions
    }
    same: dict[Key, Record] = {}
    changed: dict[Key, set[str]] = {}
    for line in _lines(setting, folder, "episodes", _EPISODE):
        key = line["set"], line["row"]
        if key in asked:
            changed[key] = _changes(line, asked[key], of)
            same[key] = line
    for key in [key for key, names in changed.items() if names]:
        del same[key]
    names = sorted(set().union(*changed.values()))
    if names:
        number = len(changed) - len(same)
        setting.logger.say(
            f"{number} episodes in {folder} are played again; changed since: {', '.join(names)}"
        )
    return same


def _changes(line: Record, asked: tuple[str, list[str]], of: Mapping[str, str]) -> set[str]:
    """What a line depends on and is not so any more. A line of an earlier version may not say."""
    said = line.get("of")
    before: dict[str, Any] = said if isinstance(said, dict) else {}
    names = {name for name in before.keys() | of.keys() if before.get(name) != of.get(name)}
    return names | ({"the questions"} if (line["question"], line["answers"]) != asked else set())


# --- judging ----------------------------------------------------------------------------------------------------------


def _judge(setting: EvalContext, folder: Path, played: dict[Key, Record]) -> dict[Key, Verdict]:
    """The verdicts on answers that need one. Failed ones are asked for again."""
    judge, metric = setting.judge, setting.metric
    if judge is None:
        return {}
    asked = {
        k: r for k, r in played.items() if rewards.needs_judge(r["answer"], r["answers"], metric)
    }
    known = processes.all_gather_objects(
        lambda: _load_verdicts(setting, folder, judge, asked) if processes.is_coordinator() else {}
    )
    verdicts: dict[Key, Verdict] = known[0]
    left = [key for key in asked if key not in verdicts or verdicts[key].right is None]
    if left:
        # Perhaps none; yet all processes come here, for the judge may load its weights.
        own = [asked[left[i]] for i in processes.local_share([1.0] * len(left))]
        for part in processes.all_gather_objects(
            lambda: _ask(setting, judge, own, folder / _own_file("verdicts"))
        ):
            verdicts |= part
    return verdicts


def _load_verdicts(
    setting: EvalContext, folder: Path, judge: Judge, asked: dict[Key, Record]
) -> dict[Key, Verdict]:
    """What this judge said of these answers before. What it said counts for more than that it
    failed.
    """
    verdicts: dict[Key, Verdict] = {}
    for line in _lines(setting, folder, "verdicts", _VERDICT):
        key = (line["set"], line["row"])
        known = key in verdicts and verdicts[key].right is not None
        same = key in asked and all(
            line[name] == asked[key][name] for name in ("question", "answers", "answer")
        )
        if line.get("judge_of") == judge.identity and same and not known:
            verdicts[key] = Verdict(line["right"], line["reply"])
    return verdicts


def _ask(setting: EvalContext, judge: Judge, asked: list[Record], path: Path) -> dict[Key, Verdict]:
    cases = [
        Case(record["question"], tuple(record["answers"]), record["answer"]) for record in asked
    ]
    verdicts: dict[Key, Verdict] = {}
    with (
        open(path, "a", encoding="utf-8") as file,
        setting.logger.phase("judging", len(asked)) as phase,
    ):

        def take(i: int, verdict: Verdict) -> None:
            line = {
                name: asked[i][name] for name in ("set", "row", "question", "answers", "answer")
            }
            verdicts[line["set"], line["row"]] = verdict
            line |= {"judge": judge.name, "judge_of": judge.identity}
            _write(file, line | {"right": verdict.right, "reply": verdict.reply})

        def progress() -> None:
            setting.stop()
            phase.advance(len(verdicts))

        judge.ask(cases, take, progress)
    return verdicts


# --- files and tables -------------------------------------------------------------------------------------------------


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json_line(line) + "\n")
    file.flush()  # so that a process that is killed the next moment has it on disk


def _own_file(name: str) -> str:
    """episodes.jsonl of the first process, episodes_1.jsonl of the next."""
    return f"{name}.jsonl" if processes.is_coordinator() else f"{name}_{jax.process_index()}.jsonl"


def _lines(setting: EvalContext, folder: Path, name: str, fields: records.Fields) -> list[Record]:
    """The whole lines of all processes' files; what a killed one left half written is cut off, for
    more will follow.
    """
    found: list[Record] = []
    spoilt = 0
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        end = 0
        for line in records.read_lines(path, fields):
            end = line.next
            if line.record is None:
                spoilt += 1
            else:
                found.append(line.record)
        if end < path.stat().st_size:
            os.truncate(path, end)
    if spoilt:
        setting.logger.say(
            f"{spoilt} spoilt lines of {name} in {folder} are passed over: what they said is made "
            "again"
        )
    return found


def show(logger: Logger, result: Result) -> None:
    found = result.document
    cells, heads = scores.rows(found["sets"], found["judge"])
    title = f"Held-out questions, {found['weights']}: percent, 95 % interval; {found['seconds']:.0f} s of play"
    logger.table(title, cells, heads)
    if refused := found["stop_reasons"].get("prompt_tokens"):
        logger.say(f"{refused} questions are longer than limits.prompt_tokens and count as wrong")
    if found["unjudged"]:
        logger.say(
            f"{found['unjudged']} verdicts failed and count as wrong, verdicts.jsonl says why; the "
            "same command asks again (a judge cut off in its reply needs a larger "
            f"judge.max_tokens). The first reply of them: {shown_reply(found['unjudged_reply'])}"
        )


def compare(
    logger: Logger,
    folder: Path,
    before: Result,
    after: Result,
    paper: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """Shows and writes before and after, beside the paper's figures where it has this model and
    these sets.
    """
    found = scores.gains(before.values, after.values, paper)
    cells, heads = scores.gain_rows(found)
    judge = after.document["judge"]
    logger.table(f"Right by {judge}, {after.step} steps of self-play", cells, heads)
    document = {
        "before": before.step,
        "after": after.step,
        "judge": judge,
        "sets": scores.gains_json(found),
    }
    if processes.is_coordinator():
        records.write_document(folder / "gain.json", document)
    return document
