"""Evaluation: each answer with its own question, nothing played or judged twice, failed verdicts
never right.
"""

import json
import time

import numpy as np
import pytest

from ssp_jax.data import Task
from ssp_jax.evaluation import evaluate
from ssp_jax.game.judge import Verdict
from ssp_jax.runtime.logger import Logger
from tests.game.test_selfplay import CONTEXT, ScriptedEngine

SETS = {
    "first": [
        Task(0, ("Oslo",), "Capital of Norway?"),
        Task(1, ("Rome", "Roma"), "Capital of Italy?"),
    ],
    "second": [
        Task(0, ("New York",), "Where is the bridge?"),
        Task(1, ("Bern",), "Capital of Switzerland?"),
    ],
}
ANSWERS = {"Norway": "oslo.", "Italy": "Paris", "bridge": "York", "Switzerland": None}


INPUTS = {"weights": "w", "search": "s", "prompts": "p"}
CONDITIONS = {
    "retriever": "dense",
    "encoder": "some-encoder",
    "passages": 1_000,
    "top_k": 3,
    "judge": "openai",
    "judge_model": "a judge",
}


def script(player):
    question = CONTEXT.decode(player.tokens)
    answer = next(answer for word, answer in ANSWERS.items() if word in question)
    if answer is None:
        return "no idea"
    return f"<answer> {answer} </answer>" if player.queries else "<search> it </search>"


class Judge:
    """Gives these verdicts on answers; remembers the answers that it was asked about."""

    name = "scripted"

    def __init__(self, identity="scripted", **said):
        self.identity, self.said, self.asked = identity, said, []

    def ask(self, cases, on_verdict, progress):
        for i in reversed(range(len(cases))):
            self.asked.append(cases[i].answer)
            on_verdict(i, Verdict(self.said[cases[i].answer], "reply"))
            progress()


def run(
    folder,
    engine=None,
    judge=None,
    sets=SETS,
    stop=lambda: None,
    params=lambda: None,
    step=3,
    training="t",
    **inputs,
):
    with Logger(str(folder), 0, tensorboard=False) as logger:
        context = evaluate.EvalContext(
            folder=folder / "eval",
            inputs=INPUTS | inputs,
            training=training,
            conditions=CONDITIONS,
            sets=sets,
            retriever=None,
            engine=engine or ScriptedEngine(script),
            episodes=CONTEXT,
            key=None,
            temperature=0.0,
            metric="policy" if judge else "em",
            judge=judge,
            logger=logger,
            stop=stop,
        )
        return evaluate.evaluate(context, step, "some weights", params)


def lines(folder, name="episodes"):
    return [
        json.loads(line)
        for line in (folder / "eval/step_000003" / f"{name}.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("last_first", [False, True])
def test_scores_per_set(tmp_path, last_first):
    result = run(tmp_path, ScriptedEngine(script, last_first))
    assert json.loads((tmp_path / "eval/step_000003.json").read_text()) == result.document
    first, second = result.document["sets"]["first"], result.document["sets"]["second"]
    assert (first["right"], first["em"], first["cover_em"], first["f1"], first["n"]) == (
        50.0,
        50.0,
        50.0,
        50.0,
        2,
    )
    assert (second["right"], second["em"], second["f1"]) == (
        0.0,
        0.0,
        pytest.approx(100 * (2 / 3) / 2),
    )
    assert (first["searches"], second["searches"]) == (1.0, 0.5)
    assert (
        result.document["sets"]["average"]["em"] == 25.0
        and result.document["sets"]["average"]["n"] == 4
    )
    episodes = {line["question"]: line for line in lines(tmp_path)}
    assert (
        episodes["Capital of Norway?"]["answer"] == "oslo."
        and episodes["Capital of Italy?"]["set"] == "first"
    )
    said = [turn["who"] for turn in episodes["Capital of Norway?"]["turns"]]
    assert said == ["solver", "search engine", "solver"]
    assert episodes["Capital of Switzerland?"]["tokens"] == len(CONTEXT.encode("no idea"))
    assert second["tokens"] == np.mean(
        [line["tokens"] for line in lines(tmp_path) if line["set"] == "second"]
    )


def test_players_are_greedy_solvers(tmp_path):
    seen = set()

    def watching(player):
        seen.add((player.role.name, player.temperature))
        return script(player)

    run(tmp_path, ScriptedEngine(watching))
    assert seen == {("solver", 0.0)}


class Stopped(Exception):
    pass


def stops_after(number):
    """A policy whose process dies at that episode."""
    seen = set()

    def turn(player):
        seen.add(player.uid)
        if len(seen) > number:
            raise Stopped
        return script(player)

    return ScriptedEngine(turn)


def test_an_evaluation_goes_on_where_it_was_killed(tmp_path, capsys):
    with pytest.raises(Stopped):
        run(tmp_path, stops_after(2))
    before = lines(tmp_path)
    assert len(before) == 2
    path = tmp_path / "eval/step_000003/episodes.jsonl"
    # by a crash of the machine
    spoilt = "\0" * 40 + '\n{"set": "first"}{"row": 1}\n{"set": "first", "row": 0}\n'
    # what it was just writing
    path.write_text(spoilt + path.read_text() + '{"set": "second", "row": 1, "ques')
    engine = ScriptedEngine(script)
    whole, again = run(tmp_path / "whole"), run(tmp_path, engine)
    assert len(engine.prompts) == 2
    assert "3 spoilt lines of episodes in" in capsys.readouterr().out
    path.write_text(path.read_text().removeprefix(spoilt))
    assert lines(tmp_path)[:2] == before and len(lines(tmp_path)) == 4
    assert again.document["sets"] == whole.document["sets"]
    # as they were in the run of all questions: rows 2 and 3
    assert set(engine.prompts) == {2 << 9, 3 << 9}


def test_what_is_complete_is_neither_played_nor_loaded(tmp_path):
    first = run(tmp_path)

    def never():
        raise AssertionError("the weights were asked for")

    again = run(tmp_path, stops_after(0), params=never)
    assert again.document == first.document


@pytest.mark.parametrize(
    "now",
    [
        Task(1, ("Paris",), "Capital of Italy?"),
        Task(1, ("Milan",), "Capital of Italy?"),
        Task(1, ("Rome", "Roma"), "Italy, capital?"),
    ],
)
def test_a_question_that_has_changed_is_played_and_judged_again(tmp_path, now):
    run(tmp_path, judge=Judge(Paris=True, York=False))
    changed, judge = {"first": [SETS["first"][0], now]}, Judge(Paris=False)
    engine = ScriptedEngine(script)
    result = run(tmp_path, engine, judge, sets=changed)
    assert len(engine.prompts) == 1 and result.document["sets"].keys() == {"first"}
    right_now = now.answers == ("Paris",)  # as the policy says, and so nobody needs to judge it
    assert judge.asked == ([] if right_now else ["Paris"])
    assert result.document["sets"]["first"]["right"] == (100.0 if right_now else 50.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"search": "other"}, "search"),
        ({"more": "x"}, "more"),
        ({"training": "other"}, "the training"),
    ],
)
def test_where_an_input_has_changed_all_is_played_again(tmp_path, capsys, change, named):
    before = run(tmp_path)

    def other(player):
        return "<answer> Rome </answer>"

    engine = ScriptedEngine(other)
    after = run(tmp_path, engine, **change)
    assert len(engine.prompts) == 4
    assert (
        after.document["sets"]["first"]["right"]
        == 50.0
        == before.document["sets"]["first"]["right"]
    )
    assert {line["answer"] for line in lines(tmp_path)[4:]} == {"Rome"}
    assert (
        f"4 episodes in {tmp_path}/eval/step_000003 are played again; changed since: {named}"
        in (" ".join(capsys.readouterr().out.split()))
    )
    assert run(tmp_path, stops_after(0), **change).document == after.document


def test_initial_weights_do_not_depend_on_the_training(tmp_path):
    before = run(tmp_path, step=0)
    assert run(tmp_path, stops_after(0), step=0, training="other").document == before.document


def test_a_line_of_an_earlier_version_is_played_again(tmp_path):
    run(tmp_path)
    path = tmp_path / "eval/step_000003/episodes.jsonl"
    old = [{k: v for k, v in line.items() if k != "of"} for line in lines(tmp_path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    engine = ScriptedEngine(script)
    run(tmp_path, engine)
    assert len(engine.prompts) == 4


def test_a_judge_that_has_changed_is_asked_again(tmp_path):
    """Its name stays the same where its address or its own weights are others."""
    run(tmp_path, judge=Judge(Paris=True, York=True))
    judge = Judge("another", Paris=False, York=True)
    result = run(tmp_path, stops_after(0), judge)
    assert (
        sorted(judge.asked) == ["Paris", "York"]
        and result.document["sets"]["first"]["right"] == 50.0
    )
    first = Judge()  # knows nothing, so asking it would fail
    assert run(tmp_path, stops_after(0), first).document["sets"]["first"]["right"] == 100.0


def test_a_question_that_is_too_long_is_counted(tmp_path, capsys):
    long = {"first": [*SETS["first"], Task(2, ("Oslo",), "Capital of Norway? " * 300)]}
    result = run(tmp_path, sets=long)
    assert (
        result.document["stop_reasons"]["prompt_tokens"] == 1
        and result.document["sets"]["first"]["n"] == 3
    )
    with Logger(str(tmp_path), 0, tensorboard=False) as logger:
        evaluate.show(logger, result)
    assert "1 questions are longer than limits.prompt_tokens" in capsys.readouterr().out


def test_a_judge_is_asked_where_exact_match_fails_and_never_twice(tmp_path):
    judge = Judge(Paris=False, York=None)
    result = run(tmp_path, judge=judge)
    # "oslo." equals a gold, and "no idea" is no answer
    assert sorted(judge.asked) == ["Paris", "York"]
    assert result.document["unjudged"] == 1 and result.document["judge"] == "scripted"
    assert [result.document["sets"][name]["right"] for name in ("first", "second")] == [50.0, 0.0]
    judge = Judge(York=True)
    result = run(tmp_path, stops_after(0), judge)
    assert judge.asked == ["York"] and result.document["unjudged"] == 0
    assert (
        result.document["sets"]["second"]["right"] == 50.0
        and result.document["sets"]["second"]["em"] == 0.0
    )
    run(tmp_path, stops_after(0), Judge())  # knows nothing, so asking it would fail
    assert [line["right"] for line in lines(tmp_path, "verdicts")] == [None, False, True]


def test_stopping_between_verdicts_keeps_those_that_are_there(tmp_path):
    run(tmp_path)

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, judge=Judge(Paris=False, York=True), stop=stop)
    assert [line["answer"] for line in lines(tmp_path, "verdicts")] == ["York"]
    judge = Judge(Paris=False)
    assert run(tmp_path, judge=judge).document["unjudged"] == 0 and judge.asked == ["Paris"]


def test_seconds_add_up_over_processes(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stops_after(2))
    path = tmp_path / "eval/step_000003/episodes.jsonl"
    rows = [line | {"began": 1.0, "seconds": 10.0 + i} for i, line in enumerate(lines(tmp_path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 11.0 <= run(tmp_path).document["seconds"] < 12.0


def test_tables(tmp_path, capsys):
    before = run(tmp_path / "before", judge=Judge(Paris=False, York=None))
    after = run(tmp_path / "after", judge=Judge(Paris=True, York=True))
    with Logger(str(tmp_path), 0, tensorboard=False) as logger:
        evaluate.show(logger, before)
        found = evaluate.compare(logger, tmp_path, before, after, {"first": (40.0, 50.0)})
    shown = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Held-out questions, some weights",
        "| first | " + 4 * "50.0 (0.0 to 100.0) | " + "1.0 |",
        "1 verdicts failed and count as wrong",
        "The first reply of them: 'reply'",
        "| first | 50.0 | 100.0 | +50.0 | +0.0 to +100.0 | "
        + 2 * "+0.0 (+0.0 to +0.0) | "
        + "40.0 | 50.0 | +10.0",
        "| average | 25.0 | 75.0 | +50.0 |",
        "these scores: dense (some-encoder) of 1,000 passages, 3 a search, judged by openai (a ",
        "the paper searched Wikipedia 2018 by E5-base-v2",
    ):
        assert expected.replace("| first", "first").replace("| average", "average") in shown, (
            expected,
            shown,
        )
    assert json.loads((tmp_path / "gain.json").read_text()) == found
    assert [found[name]["average"]["gain"] for name in ("sets", "em", "cover_em")] == [50, 0, 0]
    assert before.document["conditions"] == CONDITIONS
    played = time.gmtime(max(line["began"] for line in lines(tmp_path / "before")))
    assert before.document["date"] == time.strftime("%Y-%m-%d", played)
    assert (
        found["sets"]["first"]["paper_after"] == 50.0
        and "paper_after" not in found["sets"]["second"]
    )
