"""Worked examples keep the rules that they teach: the game's own parts play and judge them."""

import dataclasses
import sys
from pathlib import Path

import pytest

from configs import default
from ssp_jax.assembly.sections import make_game_config
from ssp_jax.game import prompts, rewards, roles, rules
from ssp_jax.game.examples import EXAMPLES, MOST, SETS, example_sets, leaks, query
from ssp_jax.game.roles import PROPOSER, SOLVER, VERIFIER
from ssp_jax.model import hf_load

TOKENIZER = hf_load.load_tokenizer(Path("assets/tiny/model"))
ENDLESS = roles.Limits(*[sys.maxsize] * 7)
STYLES = list(prompts.STYLES.values())
KEPT = dataclasses.replace(
    make_game_config(default.get_config()).rules, distinct_searches=True, min_words=4
)


def played(style, role, messages, example):
    """The episode of an example: its turns go through the role's own stops, parsing and results."""
    context = roles.EpisodeContext(TOKENIZER, style, "chat", ENDLESS)
    *_, asked, said, _ = messages
    player = roles.EpisodePlayer(context, role, 0, 1.0, context.encode(asked["content"]))
    results = {query(document): document for document in example.found}
    results.setdefault(example.answer, example.about_answer)
    rest = said["content"]
    while not player.stop_reason:
        stop = min((stop for stop in role.stops if stop in rest), key=lambda stop: rest.index(stop))
        end = rest.index(stop) + len(stop)
        turn = context.encode(rest[:end])
        asked_for = player.end_turn(turn, [0.0] * len(turn), role.stops.index(stop))
        rest = rest[end:]
        if asked_for is not None:
            player.insert_result([results[asked_for]])
            shown = player.turns[-1][1]
            assert rest.startswith(shown)
            rest = rest.removeprefix(shown)
    assert not rest
    return player.episode()


def last_of(example):
    """It stands last in a prompt, which begins with others."""
    return (*(other for other in EXAMPLES[:2] if other is not example), example)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.answer)
@pytest.mark.parametrize("style", STYLES)
def test_a_solver_looks_up_names_and_answers_rightly(style, example):
    messages = prompts.solver_messages(style, "Who?", last_of(example))
    episode = played(style, SOLVER, messages, example)
    assert rewards.solver_reward(episode.text, (example.answer,), "em") == 1
    assert episode.stop_reason == "answer"
    assert episode.queries == tuple(query(document) for document in example.found)
    assert not rewards.cover_exact_match(episode.queries[0], (example.answer,))
    # It is led by what it reads: each search but the first is for a name of a result.
    for number, name in enumerate(episode.queries):
        read = example.question if number == 0 else episode.documents[number - 1].text
        assert rewards.cover_exact_match(read, (name,)), (name, read)
    assert rewards.cover_exact_match(episode.documents[-1].text, (example.answer,))
    assert ("<original_evidence>" in episode.text) == style.quotes_evidence


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.answer)
@pytest.mark.parametrize("style", STYLES)
def test_a_proposer_asks_what_the_rules_allow(style, example):
    """And where it is told not to search for the answer, it does not."""
    messages = prompts.proposer_messages(style, "Paris", 2, "", last_of(example))
    episode = played(style, PROPOSER, messages, example)
    kept = dataclasses.replace(KEPT, forbid_answer_in_search=not style.answer_first)
    question = prompts.first_question(episode.text)
    documents = episode.documents
    fault = rules.question_fault(question, example.answer, episode.queries, len(documents), kept)
    assert fault is None and question == example.question
    assert (episode.queries[0] == example.answer) == style.answer_first
    assert len(episode.queries) == example.searches
    asked = messages[-3]["content"]
    assert example.answer in asked and str(example.searches) in asked
    found = " ".join(document.text for document in documents)
    assert rewards.cover_exact_match(found, (example.answer,))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.answer)
@pytest.mark.parametrize("style", STYLES)
def test_a_verifier_answers_from_its_materials(style, example):
    messages = prompts.verifier_messages(style, "Who?", [], last_of(example))
    episode = played(style, VERIFIER, messages, example)
    assert rewards.solver_reward(episode.text, (example.answer,), "em") == 1
    materials = messages[-3]["content"]
    assert rewards.cover_exact_match(materials, (example.answer,))
    assert query(example.noise) in materials and "<search>" not in episode.text


def test_the_pool_is_varied_and_each_set_has_both_lengths():
    assert len(EXAMPLES) == SETS * MOST >= 12
    assert len({example.answer for example in EXAMPLES}) == len(EXAMPLES)
    assert {example.searches for example in EXAMPLES} == {1, 2}
    assert 0 < sum(example.answer.isdigit() for example in EXAMPLES) < len(EXAMPLES) / 2
    for number in range(2, MOST + 1):
        for shown in example_sets(number):
            assert {example.searches for example in shown} == {1, 2}


@pytest.mark.parametrize("number", range(MOST + 1))
def test_sets_share_no_example(number):
    sets = example_sets(number)
    shown = [example for each in sets for example in each]
    assert {len(each) for each in sets} == {number}
    assert len(set(shown)) == len(shown) == number * SETS


OKER = (EXAMPLES[0],)


@pytest.mark.parametrize(
    ("turns", "given", "leaked"),
    [
        ([("solver", "<search>Oker</search>")], "Who?", True),
        ([("solver", "Then louis  SPOHR came.")], "Who?", True),
        ([("solver", "Hungary")], "Who?", False),
        ([("solver", "<search> Oker </search>")], "Where is the Oker?", False),
        ([("search engine", "The Oker is long."), ("solver", "Oker")], "Who?", False),
        ([("solver", "<search> Oker </search>"), ("search engine", "The Oker.")], "Who?", True),
        ([("solver", "<search> Okerland </search>")], "Who?", False),
    ],
)
def test_a_leak_is_a_name_of_an_example_that_was_read_nowhere_else(turns, given, leaked):
    assert leaks(turns, "solver", given, OKER) == leaked
    assert not leaks(turns, "solver", given, (EXAMPLES[1],))


def test_years_are_no_names():
    assert not any(name.isdigit() for example in EXAMPLES for name in example.names)
