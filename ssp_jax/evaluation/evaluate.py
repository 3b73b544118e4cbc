"""The solver on question sets: played greedily by the engine of training, judged, and scored.

For the weights of a step, workdir/eval/ holds step_000040/episodes.jsonl and
step_000040/verdicts.jsonl, with a line written as each episode or verdict ends, and
step_000040.json with the scores. Nothing is played or judged twice: an evaluation that was killed
goes on, and one that is repeated with another judge only asks that judge. Each line has digests of
all that it depends on; where one of them differs now, its question is played or judged again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from ssp_jax.data import Task
from ssp_jax.errors import json_line
from ssp_jax.evaluation import conditions, coverage, scores
from ssp_jax.evaluation.scores import Values
from ssp_jax.game import prompts, rewards
from ssp_jax.game.judge import Case, Judge, Verdict
from ssp_jax.game.judge import shown as shown_reply
from ssp_jax.game.roles import SOLVER, Episode, EpisodeContext, EpisodePlayer, episode_id
from ssp_jax.retriever.search import Searcher
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import figures, processes, records
from ssp_jax.runtime.logger import Logger

Record = dict[str, Any]  # a line of episodes.jsonl
Key = tuple[str, int]  # the set, and the question's number in its file

_TEXT = (str,)
_NUMBER = (int, float)
_LIST = (list,)
_ASKED: records.Fields = {"set": _TEXT, "row": (int,), "question": _TEXT, "answers": _LIST}
_CASE = ("question", "answers", "answer")  # what a judge is asked about
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
    """The parts that all evaluations of a run share."""

    folder: Path  # workdir/eval
    # Digests of what an episode depends on, beside its question, under names for people.
    inputs: Mapping[str, str]
    training: str  # digest of what the weights of later steps depend on besides
    conditions: Mapping[str, Any]  # the same in words and numbers, for people
    sets: dict[str, list[Task]]
    retriever: Searcher | None  # None: what it finds is not measured
    engine: Engine
    episodes: EpisodeContext
    key: Any  # of random numbers
    temperature: float
    metric: str  # config key eval.judge
    judge: Judge | None  # where the metric is one
    logger: Logger
    stop: Callable[[], None]  # called often; may raise

    @property
    def questions(self) -> dict[Key, Task]:
        """Of all sets, in order."""
        found: dict[Key, Task] = {}
        for name, tasks in self.sets.items():
            found |= {(name, task.uid): task for task in tasks}
        return found

    def depends_on(self, step: int) -> dict[str, str]:
        """Digests of what an episode with the weights of a step depends on, beside its question."""
        digests = dict(self.inputs)
        if step:
            digests["the training"] = self.training
        return digests


@dataclass(frozen=True)
class Result:
    step: int
    document: dict[str, Any]  # the content of step_000040.json
    values: Values


def evaluate(context: EvalContext, step: int, weights: str, params: Callable[[], Any]) -> Result:
    """Plays, judges and scores all questions with the weights of a step.

    weights: their name for people. params: gives the sampler's copy of them; it is called only if
    a question is left to play. Each process plays and judges its share, and writes files of its
    own; all get the whole.
    """
    folder = context.folder / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    digests = context.depends_on(step)
    facts: dict[str, Any] = {}
    for name, digest in digests.items():
        facts[f"{name} (a digest), of an evaluation"] = digest
    facts["the questions of an evaluation"] = processes.digest(context.questions)
    facts["the step"] = step

    # Play what earlier starts have not played.
    def load() -> dict[Key, Record]:
        return _load_episodes(context, folder, digests) if processes.is_coordinator() else {}

    played = processes.all_gather_objects(load, facts)[0]
    missing = [key for key in context.questions if key not in played]
    if missing:
        played |= _play_missing(context, folder, missing, digests, params)

    # Judge, then score.
    verdicts = _judge(context, folder, played)
    values: Values = {}
    for name, tasks in context.sets.items():
        records_of_set = [played[name, task.uid] for task in tasks]
        values[name] = _values(records_of_set, context.metric, verdicts)
    document = _document(context, step, weights, played, verdicts, values)
    if processes.is_coordinator():
        found = coverage.of_run(context.folder, context.sets, context.retriever)
        document["coverage"] = found
        records.write_document(folder.with_suffix(".json"), document)
    return Result(step, document, values)


def _document(
    context: EvalContext,
    step: int,
    weights: str,
    played: dict[Key, Record],
    verdicts: dict[Key, Verdict],
    values: Values,
) -> dict[str, Any]:
    judge = context.judge.name if context.judge else context.metric
    in_order = [verdicts[key] for key in sorted(verdicts)]
    unjudged = [verdict.reply for verdict in in_order if verdict.right is None]
    stop_reasons = Counter(record["stop_reason"] for record in played.values())
    return {
        "step": step,
        "weights": weights,
        "judge": judge,
        "unjudged": len(unjudged),
        "unjudged_reply": unjudged[0] if unjudged else "",
        "stop_reasons": dict(stop_reasons),
        "seconds": round(_seconds(played.values()), 1),
        "date": _date(played.values()),
        "conditions": context.conditions,
        "sets": scores.summarize(values),
        "inputs": context.inputs,
        "questions": {name: processes.digest(tasks) for name, tasks in context.sets.items()},
    }


def _values(
    played: list[Record], metric: str, verdicts: dict[Key, Verdict]
) -> dict[str, np.ndarray]:
    """The columns of scores.SHARES and scores.MEANS: one value an episode."""
    columns: dict[str, list[float]] = {name: [] for name in scores.COLUMNS}
    for record in played:
        answer = record["answer"]
        golds = record["answers"]
        verdict = verdicts.get((record["set"], record["row"]))
        right = rewards.is_right(answer, golds, metric, verdict.right if verdict else None)
        columns["right"].append(right)
        columns["em"].append(rewards.exact_match(answer, golds))
        columns["cover_em"].append(rewards.cover_exact_match(answer, golds))
        columns["f1"].append(rewards.f1_score(answer, golds))
        columns["searches"].append(len(record["searches"]))
        columns["tokens"].append(record["tokens"])
    return {name: np.array(column, float) for name, column in columns.items()}


# --- playing ---


def _play_missing(
    context: EvalContext,
    folder: Path,
    missing: list[Key],
    digests: Mapping[str, str],
    params: Callable[[], Any],
) -> dict[Key, Record]:
    """Each process plays its share of these questions; all get all records.

    The weights are freed when this returns: a judge needs the memory.
    """
    weights = params()
    own = _own_share(missing)
    path = folder / _own_file("episodes")
    played: dict[Key, Record] = {}
    for of_process in processes.all_gather_objects(
        lambda: _play(context, own, digests, weights, path)
    ):
        played |= of_process
    return played


def _own_share(keys: list[Key]) -> list[Key]:
    """This process's share of questions, which are taken to cost the same. It may be empty."""
    return [keys[i] for i in processes.local_share([1.0] * len(keys))]


def _play(
    context: EvalContext,
    keys: list[Key],
    digests: Mapping[str, str],
    params: Any,
    path: Path,
) -> dict[Key, Record]:
    """Plays questions of all sets at once, so that the slots stay full across sets."""
    questions = context.questions
    numbers = {key: number for number, key in enumerate(questions)}
    began = round(time.time(), 3)
    start = time.monotonic()
    players = []
    shown = context.episodes.example_sets[0]
    for key in keys:
        messages = prompts.solver_messages(context.episodes.style, questions[key].question, shown)
        player = EpisodePlayer(
            context=context.episodes,
            role=SOLVER,
            # The same, whichever questions are left to play.
            uid=episode_id(SOLVER, numbers[key], 0),
            temperature=context.temperature,
            tokens=context.episodes.prompt(messages),
            tag=key,
        )
        players.append(player)
    played: dict[Key, Record] = {}

    with (
        open(path, "a", encoding="utf-8") as file,
        context.logger.phase("evaluating", len(keys)) as phase,
    ):

        def finished(player: EpisodePlayer) -> list[EpisodePlayer]:
            key = player.tag
            record = _record(key, questions[key], player.episode())
            record["of"] = digests
            record["began"] = began
            record["process"] = path.stem
            record["seconds"] = round(time.monotonic() - start, 3)
            played[key] = record
            _write(file, record)
            return []

        def progress(stats: Stats) -> None:
            context.stop()
            phase.advance(len(played), tokens=stats.tokens_per_second)

        context.engine.play(params, context.key, players, finished, progress)
    return played


def _record(key: Key, task: Task, episode: Episode) -> Record:
    name, row = key
    return {
        "set": name,
        "row": row,
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
    """The time of play: of each process the sum over its starts; the slowest process counts.

    A record has the seconds from the start of its process.
    """
    starts: dict[tuple[str, float], float] = {}
    for record in played:
        start = record["process"], record["began"]
        starts[start] = max(starts.get(start, 0.0), record["seconds"])
    sums: dict[str, float] = {}
    for (process, _), seconds in starts.items():
        sums[process] = sums.get(process, 0.0) + seconds
    return max(sums.values(), default=0.0)


def _date(played: Iterable[Record]) -> str:
    """The day, in UTC, on which the last of these was played."""
    last = max((record["began"] for record in played), default=0.0)
    return time.strftime("%Y-%m-%d", time.gmtime(last))


def _load_episodes(
    context: EvalContext, folder: Path, digests: Mapping[str, str]
) -> dict[Key, Record]:
    """The episodes of earlier starts that would be the same if they were played now."""
    questions = context.questions
    same: dict[Key, Record] = {}
    changed: dict[Key, set[str]] = {}
    for line in _lines(context, folder, "episodes", _EPISODE):
        key = line["set"], line["row"]
        if key in questions:
            changed[key] = _changes(line, questions[key], digests)
            same[key] = line
    for key, names in changed.items():
        if names:
            del same[key]
    all_names = sorted(set().union(*changed.values()))
    if all_names:
        number = len(changed) - len(same)
        context.logger.say(
            f"{number} episodes in {folder} are played again; changed since: {', '.join(all_names)}"
        )
    return same


def _changes(line: Record, task: Task, digests: Mapping[str, str]) -> set[str]:
    """The names of what a line depends on and is not the same now.

    A line of an earlier version may have no digests.
    """
    before = line.get("of")
    if not isinstance(before, dict):
        before = {}
    names = set()
    for name in before.keys() | digests.keys():
        if before.get(name) != digests.get(name):
            names.add(name)
    if (line["question"], line["answers"]) != (task.question, list(task.answers)):
        names.add("the questions")
    return names


# --- judging ---


def _judge(context: EvalContext, folder: Path, played: dict[Key, Record]) -> dict[Key, Verdict]:
    """The verdicts on answers that need one. Failed ones are asked for again."""
    judge = context.judge
    if judge is None:
        return {}
    asked: dict[Key, Record] = {}
    for key, record in played.items():
        if rewards.needs_judge(record["answer"], record["answers"], context.metric):
            asked[key] = record

    def load() -> dict[Key, Verdict]:
        return _load_verdicts(context, folder, judge, asked) if processes.is_coordinator() else {}

    verdicts = processes.all_gather_objects(load)[0]
    judged = {key for key, verdict in verdicts.items() if verdict.right is not None}
    left = [key for key in asked if key not in judged]
    if left:
        # All processes ask, also with an empty share, for the judge may load its weights.
        own = [asked[key] for key in _own_share(left)]
        path = folder / _own_file("verdicts")
        for of_process in processes.all_gather_objects(lambda: _ask(context, judge, own, path)):
            verdicts |= of_process
    return verdicts


def _load_verdicts(
    context: EvalContext, folder: Path, judge: Judge, asked: dict[Key, Record]
) -> dict[Key, Verdict]:
    """This judge's earlier verdicts on these answers. One that failed gives way to any other."""
    verdicts: dict[Key, Verdict] = {}
    for line in _lines(context, folder, "verdicts", _VERDICT):
        key = (line["set"], line["row"])
        if line.get("judge_of") != judge.identity or key not in asked:
            continue
        record = asked[key]
        same = all(line[name] == record[name] for name in _CASE)
        known = key in verdicts and verdicts[key].right is not None
        if same and not known:
            verdicts[key] = Verdict(line["right"], line["reply"])
    return verdicts


def _ask(context: EvalContext, judge: Judge, asked: list[Record], path: Path) -> dict[Key, Verdict]:
    cases = []
    for record in asked:
        answers = tuple(record["answers"])
        cases.append(Case(record["question"], answers, record["answer"]))
    verdicts: dict[Key, Verdict] = {}
    with (
        open(path, "a", encoding="utf-8") as file,
        context.logger.phase("judging", len(asked)) as phase,
    ):

        def on_verdict(i: int, verdict: Verdict) -> None:
            line = {name: asked[i][name] for name in ("set", "row", *_CASE)}
            line["judge"] = judge.name
            line["judge_of"] = judge.identity
            line["right"] = verdict.right
            line["reply"] = verdict.reply
            verdicts[line["set"], line["row"]] = verdict
            _write(file, line)

        def progress() -> None:
            context.stop()
            phase.advance(len(verdicts))

        judge.ask(cases, on_verdict, progress)
    return verdicts


# --- files and tables ---


def _write(file: IO[str], line: dict[str, Any]) -> None:
    file.write(json_line(line) + "\n")
    file.flush()  # so that it is on disk if the process is killed the next moment


def _own_file(name: str) -> str:
    """episodes.jsonl of the first process, episodes_1.jsonl of the next."""
    return f"{name}.jsonl" if processes.is_coordinator() else f"{name}_{jax.process_index()}.jsonl"


def _lines(context: EvalContext, folder: Path, name: str, fields: records.Fields) -> list[Record]:
    """The whole lines of all processes' files, to which more lines will be appended."""
    found: list[Record] = []
    spoilt = 0
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        whole, others = records.read_to_append(path, fields)
        found += whole
        spoilt += others
    if spoilt:
        context.logger.say(
            f"{spoilt} spoilt lines of {name} in {folder} are passed over: what they said is made "
            "again"
        )
    return found


def show(logger: Logger, result: Result) -> None:
    """The table of an evaluation, and sentences on what counts as wrong."""
    document = result.document
    cells, heads = scores.rows(document["sets"], document["judge"])
    title = f"Held-out questions, {document['weights']}: percent, 95 % interval; "
    title += f"{figures.seconds(document['seconds'])} of play"
    logger.table(title, cells, heads)
    for name, found in document.get("coverage", {}).items():
        logger.say_once(f"coverage of {name}", coverage.sentence(name, found))
    if refused := document["stop_reasons"].get("prompt_tokens"):
        logger.say(f"{refused} questions are longer than limits.prompt_tokens and count as wrong")
    if document["unjudged"]:
        logger.say(
            f"{document['unjudged']} verdicts failed and count as wrong, verdicts.jsonl says why; "
            "the same command asks again (a judge cut off in its reply needs a larger "
            "judge.max_tokens). The first reply of them: "
            f"{shown_reply(document['unjudged_reply'])}"
        )


def compare(
    logger: Logger,
    folder: Path,
    before: Result,
    after: Result,
    paper: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """Shows and writes the results before and after.

    paper: its figures before and after by sets, to stand beside those of the same sets.
    """
    judge = after.document["judge"]
    gains = scores.gains(before.values, after.values, paper)
    by_rule = {}
    for column in scores.other_rules(judge):
        by_rule[column] = scores.gains(before.values, after.values, {}, column)
    cells, heads = scores.gain_rows(gains, by_rule)
    logger.table(f"Right by {judge}, {after.step} steps of self-play", cells, heads)
    if any(gain.paper for gain in gains.values()):
        logger.say(conditions.beside_the_paper(after.document["conditions"]))
    document = {
        "before": before.step,
        "after": after.step,
        "judge": judge,
        "sets": scores.gains_json(gains),
        **{column: scores.gains_json(found) for column, found in by_rule.items()},
    }
    if processes.is_coordinator():
        records.write_document(folder / "gain.json", document)
    return document
