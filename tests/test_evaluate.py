"""Evaluation: scores per set, each answer with its own question, whatever the order of ends."""

import pytest
from test_selfplay import STAGE, ScriptedEngine

from ssp_jax.data import Task
from ssp_jax.evaluate import evaluate

SETS = {
    "first": [Task(0, ("Oslo",), "Capital of Norway?"), Task(1, ("Rome", "Roma"), "Capital of Italy?")],
    "second": [Task(0, ("New York",), "Where is the bridge?"), Task(1, ("Bern",), "Capital of Switzerland?")],
}
ANSWERS = {"Norway": "oslo.", "Italy": "Paris", "bridge": "York", "Switzerland": None}


def script(player):
    question = STAGE.decode(player.tokens)
    answer = next(answer for word, answer in ANSWERS.items() if word in question)
    if answer is None:
        return "no idea"
    return f"<answer> {answer} </answer>" if player.queries else "<search> it </search>"


@pytest.mark.parametrize("last_first", [False, True])
def test_scores_per_set(last_first):
    results = evaluate(ScriptedEngine(script, last_first), STAGE, SETS, None, None, 0.0)
    assert results["first"].summary() == {"em": 50.0, "f1": 50.0, "n": 2}
    assert results["second"].summary() == {"em": 0.0, "f1": pytest.approx(100 * (2 / 3) / 2), "n": 2}
    assert [r.searches for r in results.values()] == [1.0, 0.5]
    assert "Norway" in STAGE.decode(results["first"].episodes[0].tokens)


def test_players_are_greedy_solvers():
    seen = set()

    def watching(player):
        seen.add((player.role.name, player.temperature))
        return script(player)

    evaluate(ScriptedEngine(watching), STAGE, SETS, None, None, 0.0)
    assert seen == {("solver", 0.0)}
