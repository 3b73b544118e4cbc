"""Answer matching, the rule filter and the rewards of both roles, as tables and as properties."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ssp_jax.data import load_questions
from ssp_jax.game.rewards import (
    JUDGES,
    MAX_ANSWER_TAGS,
    PROPOSER_REWARDS,
    cover_exact_match,
    exact_match,
    f1_score,
    is_right,
    needs_judge,
    normalize_answer,
    solver_reward,
)
from ssp_jax.game.rules import QUESTION_FAULTS, question_fault


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Beatles", "beatles"),
        ("An apple, a day.", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("\tA\n", ""),
        ("Zürich!", "zürich"),
    ],
)
def test_normalize(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    "prediction, golds, em, cover, f1",
    [
        ("Paris", ["Paris"], True, True, 1.0),
        ("the paris.", ["Paris"], True, True, 1.0),
        ("Paris", ["London", "PARIS"], True, True, 1.0),
        ("It is Paris", ["Paris"], False, True, 0.5),
        ("Paris", ["Paris, France"], False, False, 2 / 3),
        ("Parisian", ["Paris"], False, False, 0.0),
        ("1990s", ["1990"], False, False, 0.0),
        ("France is where Paris is", ["Paris France"], False, False, 2 * 2 / (5 + 2)),
        ("New York City", ["York", "New York"], False, True, 0.8),
        ("paris paris", ["Paris"], False, True, 2 / 3),
        ("paris paris", ["Paris Paris"], True, True, 1.0),
        ("", ["Paris"], False, False, 0.0),
        (None, ["Paris"], False, False, 0.0),
        (None, ["None"], False, False, 0.0),
        ("The", ["A"], False, False, 0.0),
        ("", ["A"], False, False, 0.0),
        ("...", ["!"], False, False, 0.0),
        ("", ["The"], False, False, 0.0),
        ("a", ["A"], True, True, 1.0),
        ("blood type a", ["!"], False, False, 0.0),
    ],
)
def test_matching(prediction, golds, em, cover, f1):
    assert exact_match(prediction, golds) is em
    assert cover_exact_match(prediction, golds) is cover
    assert f1_score(prediction, golds) == pytest.approx(f1)


texts = st.text(st.sampled_from("ab the.,' Xé"), max_size=20)


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(texts.filter(str.strip), min_size=1, max_size=3))
def test_matching_properties(prediction, golds):
    assert normalize_answer(normalize_answer(prediction)) == normalize_answer(prediction)
    assert all(exact_match(gold, golds) for gold in golds)
    if exact_match(prediction, golds):
        assert cover_exact_match(prediction, golds) and f1_score(prediction, golds) == 1.0
    assert 0.0 <= f1_score(prediction, golds) <= 1.0
    assert exact_match(prediction, golds) == any(exact_match(prediction, [gold]) for gold in golds)


@pytest.mark.parametrize(
    "text, metric, reward",
    [
        ("<think>x</think><answer> Paris </answer>", "em", 1.0),
        ("<answer>London</answer> no, <answer>Paris</answer>", "em", 1.0),
        # The reference reads what follows the first word "answer", wherever it stands.
        ("<think>The answer: London? Its answer is no.</think><answer>Paris</answer>", "em", 1.0),
        ("<answer>Paris</answer> no, <answer>London</answer>", "em", 0.0),
        # As in the reference tags count wherever they stand, in thoughts too; the engine stops at
        # the first of them.
        ("<think>perhaps <answer>Paris</answer>", "em", 1.0),
        ("<think><answer>London</answer></think> I do not know", "em", 0.0),
        ("<think>I write <answer> and </answer>.</think><answer>Paris</answer>", "em", 1.0),
        ("<answer>Paris</answer><think>or <answer>London</answer>", "em", 0.0),
        ("<answer>London <answer>Paris</answer>", "em", 1.0),
        ("<answer>Paris</answer> London</answer>", "em", 1.0),
        ("<answer>Paris <answer>", "em", 0.0),
        ("</answer>Paris<answer>", "cover_em", 0.0),
        ("<answer><answer>Paris</answer></answer>", "em", 1.0),
        ("<Answer>Paris</Answer>", "em", 0.0),
        ("<answer>Paris</answer>" * MAX_ANSWER_TAGS + "<answer>London</answer>", "em", 0.0),
        (
            "<think>" + "<answer>" * MAX_ANSWER_TAGS + "</think><answer>Paris</answer>",
            "cover_em",
            0.25,
        ),
        ("<answer>It is Paris</answer>", "em", 0.0),
        ("<answer>It is Paris</answer>", "cover_em", 1.0),
        ("Paris", "em", 0.0),
        ("<answer>Paris", "cover_em", 0.0),
        ("<answer></answer>", "em", 0.0),
        ("<answer>Paris</answer>" * MAX_ANSWER_TAGS, "em", 1.0),
        ("<answer>Paris</answer>" * (MAX_ANSWER_TAGS + 1), "em", 0.25),
        ("<answer>" * MAX_ANSWER_TAGS + "<answer>Paris</answer>", "em", 0.25),
        ("<answer>Paris</answer>" + "</answer>" * MAX_ANSWER_TAGS, "em", 0.25),
    ],
)
def test_solver_reward(text, metric, reward):
    assert solver_reward(text, ["Paris"], metric) == reward


@pytest.mark.parametrize(
    "answer, verdict, asked, right",
    [
        ("Paris", None, False, True),
        ("the PARIS.", False, False, True),
        ("the French capital", True, True, True),
        ("the French capital", False, True, False),
        ("the French capital", None, True, False),
        ("", True, False, False),
        (None, True, False, False),
    ],
)
def test_judged_answers(answer, verdict, asked, right):
    """Exact match comes first; a judge that failed, or was never asked, makes nothing right."""
    for metric in JUDGES:
        assert needs_judge(answer, ["Paris"], metric) is asked
        assert is_right(answer, ["Paris"], metric, verdict) is right
        text = f"<answer>{answer}</answer>" if answer is not None else "none"
        assert solver_reward(text, ["Paris"], metric, verdict) == float(right)
    assert not needs_judge(answer, ["Paris"], "em") and not is_right(
        "London", ["Paris"], "em", True
    )


@pytest.mark.parametrize("target", ["Paris", ["Paris"]])
def test_listed_answers_have_valid_questions(target, tmp_path):
    """The reference rejects every question whose row lists its answers, as its own data do."""
    row = {
        "reward_model": {"ground_truth": {"target": target}},
        "extra_info": {"question": "Capital of France?"},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (task,) = load_questions(tmp_path / "rows.jsonl")
    rules = ConfigDict(RULES.to_dict() | {"min_searches": 1, "min_words": 1})
    assert question_fault(task.question, task.answers[0], ["a search"], 1, rules) is None
    assert (
        question_fault("Is it Paris, France?", task.answers[0], ["a search"], 1, rules)
        == "answer_in_question"
    )


RULES = ConfigDict(
    {
        "min_chars": 10,
        "max_chars": 100,
        "min_words": 4,
        "min_searches": 2,
        "distinct_searches": True,
        "forbid_answer_in_search": True,
        "forbid_found_at_once": False,
    }
)
GOOD = "Which city hosts the Louvre?"


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"question": None}, "no_question"),
        ({"question": " \n"}, "empty"),
        ({"question": "A b c d?"}, "too_short"),
        ({"question": "abcd " * 21}, "too_long"),
        ({"question": "abcdefgh ijklmnop qrst"}, "too_few_words"),
        ({"question": "Which city of PARIS hosts the Louvre?"}, "answer_in_question"),
        # a mere substring
        ({"answer": "our", "question": "Which is one of our four cities?"}, "answer_in_question"),
        ({"queries": ["one"]}, "too_few_searches"),
        ({"queries": ["one", "two", "one"]}, "repeated_search"),
        ({"queries": ["one", "what of paris?"]}, "answer_in_search"),
        ({"num_documents": 0}, "no_documents"),
        ({"answer": "  Louvre "}, "answer_in_question"),
        ({"answer": "  Rome "}, None),
        ({"aliases": ["Paris (city)", "the Louvre"]}, "answer_in_question"),
        ({"aliases": ["os", "Ouvre"]}, None),  # an alias is whole words
        ({"aliases": ["City of Light"], "queries": ["one", "city of light"]}, "answer_in_search"),
        ({"question": f"  {'ab ' * 33}x  "}, None),  # 100 characters without the outer spaces
    ],
)
def test_question_fault(change, fault):
    game = {
        "question": GOOD,
        "answer": "Paris",
        "queries": ["one", "two"],
        "num_documents": 3,
    } | change
    assert question_fault(rules=RULES, **game) == fault


def test_every_fault_has_a_row_above_and_the_first_one_is_named():
    marks = {fault for _, fault in test_question_fault.pytestmark[0].args[1]}
    assert marks - {None} == set(QUESTION_FAULTS)
    assert question_fault(None, "Paris", [], 0, RULES) == "no_question"
    assert question_fault("", "Paris", [], 0, RULES) == "empty"
    assert question_fault("Paris?", "Paris", [], 0, RULES) == "too_short"
    assert question_fault(GOOD, "Paris", ["paris"], 0, RULES) == "too_few_searches"
    more = ConfigDict(RULES.to_dict() | {"min_searches": 3})
    assert question_fault(GOOD, "Paris", ["paris", "paris"], 0, more) == "too_few_searches"
    assert question_fault(GOOD, "Paris", ["paris", "paris"], 0, RULES) == "repeated_search"
    assert question_fault(GOOD, "Paris", ["paris", "two"], 0, RULES) == "answer_in_search"


def test_switched_off_rules():
    loose = ConfigDict(
        RULES.to_dict() | {"distinct_searches": False, "forbid_answer_in_search": False}
    )
    assert question_fault(GOOD, "Paris", ["paris", "paris"], 1, loose) is None


SCORES_QG = np.array(
    [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0.25, 0, 0, 0.75], [0.25, 0, 0, 0]]
)


@pytest.mark.parametrize(
    "name, expected_Q",
    [
        ("one_minus_mean", [1, 0.75, 0.5, 0, 0.75, 0.9375]),
        ("intermediate", [0, 0.75, 1, 0, 0.75, 0.234375]),
        ("azr", [0, 0.75, 0.5, 0, 0.75, 0.9375]),
        ("dr_zero", [0, 1, 2 / 3, 0, 1, 1]),
        ("variance", np.exp([-3.125, -0.1953125, 0, -3.125, -1.220703125, -2.838897705078125])),
        ("r_zero", [0, 0.5, 1, 0, 0.5, 0.125]),
        ("format_only", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_proposer_rewards(name, expected_Q):
    np.testing.assert_allclose(PROPOSER_REWARDS[name](SCORES_QG), expected_Q)
    # a step in which no question was verified
    assert PROPOSER_REWARDS[name](np.zeros((0, 4))).shape == (0,)
    single_Q = PROPOSER_REWARDS[name](np.array([[0.0], [1.0]]))  # one attempt a question
    assert single_Q.shape == (2,) and np.isfinite(single_Q).all()


def test_every_proposer_reward_is_in_the_table():
    assert {row[0] for row in test_proposer_rewards.pytestmark[0].args[1]} == set(PROPOSER_REWARDS)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=24))
def test_proposer_plus_mean_solver_is_one(attempts, scores):
    scores_QG = np.array(scores * attempts).reshape(-1, attempts)
    np.testing.assert_allclose(
        PROPOSER_REWARDS["one_minus_mean"](scores_QG) + scores_QG.mean(axis=1), 1.0
    )
    for reward in PROPOSER_REWARDS.values():
        # never negative: [P Fig. 5] collapses
        assert ((reward(scores_QG) >= 0) & (reward(scores_QG) <= 1)).all()
