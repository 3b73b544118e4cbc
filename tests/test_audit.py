"""Overlap counts what exact match would count; the table is what a person sees."""

import json

import pytest

from ssp_jax import audit
from ssp_jax.data import Task
from ssp_jax.game.rewards import exact_match


def test_overlap():
    questions = [
        Task(0, ("The Paris!", "P."), "a?"),
        Task(1, ("rome",), "b?"),
        Task(2, ("paris",), "a?"),
        Task(3, ("the", "x"), "c?"),
    ]
    training = set().union(
        *audit.normalized([Task(0, ("Paris",)), Task(1, ("A Rome",)), Task(2, ("The",))])
    )
    # what is nothing once normalised counts as it stands
    assert training == {"paris", "rome", "the"}
    assert audit.overlap(training, questions) == audit.Overlap(4, 1, ["paris", "rome", "the"], 4)


@pytest.mark.parametrize("answer", ["A", "The The", "+", "The Who", "C++", "Paris!", "an", "---"])
@pytest.mark.parametrize("gold", ["a", "the the", "+", "who", "C", "C++", "paris", "The", "-"])
def test_overlap_is_what_exact_match_says(answer, gold):
    training = audit.normalized([Task(0, (answer,))])[0]
    found = audit.overlap(training, [Task(0, ("something else", gold), "q?")])
    assert bool(found.asked) == exact_match(answer, ["something else", gold])


def test_table(tmp_path, capsys):
    answers = [("Paris", 2), ("the Paris", 1), ("City of Light and more", 2)]
    rows = [{"ground_truth": answer, "search_turns": n} for answer, n in answers]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "q.jsonl").write_text('{"question": "Where?", "golden_answers": ["paris", "x"]}\n')
    assert audit.main([f"--answers={tmp_path}/a.jsonl", f"--eval={tmp_path}/q.jsonl"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "answers 3",
        "different, normalised 2",
        "repeats 1 (most: 'paris' x 2)",
        "1: 1, 2: 2",
    ):
        assert any(expected in line for line in shown), (expected, shown)
    assert "words, least / median / most 1 / 2 / 5" in shown
    assert any(line.endswith("q.jsonl 1 0 1 100.0% paris") for line in shown), shown


def test_brackets_and_colons_are_shown_as_they_are(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"ground_truth": "[/b] a [red] one :smile:", "search_turns": 1}\n'
    )
    (tmp_path / "q[x].jsonl").write_text('{"question": "Where?", "golden_answers": ["Paris"]}\n')
    assert audit.main([f"--answers={tmp_path}/a.jsonl", f"--eval={tmp_path}/q[x].jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "'[/b] a [red] one :smile:'" in shown and " q[x].jsonl " in shown


def test_wrong_file(tmp_path, capsys):
    assert audit.main([f"--answers={tmp_path}/none.jsonl"]) == 2
    assert "none.jsonl: expected a readable file" in capsys.readouterr().err
