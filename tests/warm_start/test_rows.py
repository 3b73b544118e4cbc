"""Episodes to learn from: which are kept, and that prompts and tokens are those of the game."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ssp_jax.errors import InputError
from ssp_jax.game import prompts
from ssp_jax.game.examples import example_sets
from ssp_jax.game.rounds import readable
from ssp_jax.warm_start import lessons, rows
from tests.game.test_selfplay import CONTEXT, ROOMY, play, script

R1 = dataclasses.replace(CONTEXT, style=prompts.STYLES["search_r1"], limits=ROOMY)
ROW_TOKENS = 4000


def write(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def parsed(path, context=CONTEXT, keep="right"):
    """The episodes of a file, and what was left out."""
    selection = rows.Selection(keep, "em", Counter())
    return list(rows.read([path], context, selection)), selection.left_out


def encoded(path, context=CONTEXT, keep="right", row_tokens=ROW_TOKENS):
    return [lessons.encode(context, shown, row_tokens) for shown in parsed(path, context, keep)[0]]


def dumped(path, round_):
    return write(path, *map(readable, round_.games))


@pytest.fixture(scope="module")
def round_():
    played, _, _ = play(script())
    return played


def test_a_played_episode_becomes_the_tokens_of_self_play(tmp_path, round_):
    """Byte for byte: prompts of all roles, with the verifier's documents in their order. What the
    players wrote themselves is marked.
    """
    path = dumped(tmp_path / "step.jsonl", round_)
    expected = []
    for game in round_.games:
        assert game.noise and len(game.verifier_order) == len(game.noise) + 1
        expected += [game.proposer, game.verifier, *game.attempts]
    found = encoded(path, keep="all")
    assert [lesson.tokens for lesson in found] == [episode.tokens for episode in expected]
    assert [lesson.sampled for lesson in found] == [episode.sampled for episode in expected]
    for lesson in found:
        assert lesson.turns[0] == lesson.sampled.index(True)
        begins = np.flatnonzero(np.diff(lesson.sampled)) + 1
        assert set(lesson.turns) == {i for i in begins if lesson.sampled[i]}


def test_with_the_default_wrong_solvers_are_left_out(tmp_path, round_):
    path = dumped(tmp_path / "step.jsonl", round_)
    found, left_out = parsed(path)
    kept = Counter(shown.role.name for shown in found)
    assert kept == {"proposer": 4, "verifier": 4, "solver": 8}
    assert left_out == {"solver": 12}


def test_a_question_that_was_not_verified_teaches_no_proposer(tmp_path):
    played, _, _ = play(script(verified=False))
    path = dumped(tmp_path / "step.jsonl", played)
    assert parsed(path) == ([], Counter({"proposer": 4}))
    assert [shown.role.name for shown in parsed(path, keep="all")[0]] == ["proposer"] * 4


def test_a_scripted_game_is_kept_whole(tmp_path, round_):
    values = [{**readable(game), "player": rows.SCRIPT} for game in round_.games]
    found, left_out = parsed(write(tmp_path / "games.jsonl", *values))
    assert len(found) == 4 * 7 and not left_out


def test_prompts_are_rendered_again_as_they_will_be_played(tmp_path, round_):
    """Context distillation: games that were played in one form are learnt in another."""
    path = dumped(tmp_path / "step.jsonl", round_)
    shown = dataclasses.replace(R1, example_sets=example_sets(1))
    for context in (R1, shown):
        found = [s for s in parsed(path, context)[0] if s.role.name == "solver"]
        for solver in found:
            examples = context.example_sets[solver.game % len(context.example_sets)]
            question = round_.games[solver.game].question.text
            assert solver.messages == prompts.solver_messages(context.style, question, examples)
    proposer = parsed(path, R1)[0][0]
    result = proposer.segments[1][0]
    assert result.startswith("\n\n<information>Doc 1(Title: ") and result.endswith(
        "found</information>\n\n"
    )


CHAT = {
    "messages": [
        {"role": "system", "content": "You search."},
        {"role": "user", "content": "Answer with tags. Question: Where is Lhasa?\n"},
        {
            "role": "assistant",
            "content": "<think> Hm. </think>\n<search> Lhasa </search>\n\n<information>Doc 1"
            "(Title: Lhasa) It is in Tibet.</information>\n\n<answer> Tibet </answer><|im_end|>",
        },
    ],
    "golden_answers": ["Tibet"],
}


def chat(content, **changes):
    messages = [*CHAT["messages"][:2], {"role": "assistant", "content": content}]
    return {**CHAT, "messages": messages, **changes}


def test_a_chat_becomes_a_solvers_episode(tmp_path):
    path = write(tmp_path / "chat.jsonl", CHAT)
    ((solver,), left_out) = parsed(path, R1)
    assert not left_out
    assert solver.messages == prompts.solver_messages(R1.style, "Where is Lhasa?")
    assert solver.segments == [
        ("<think> Hm. </think>\n<search> Lhasa </search>", True),
        ("\n\n<information>Doc 1(Title: Lhasa) It is in Tibet.</information>\n\n", False),
        ("<answer> Tibet </answer>", True),
    ]
    turns = [
        *CHAT["messages"][:2],
        {"role": "assistant", "content": "<think> Hm. </think>\n<search> Lhasa </search>"},
        {"role": "tool", "content": "Doc 1(Title: Lhasa) It is in Tibet."},
        {"role": "assistant", "content": "<answer> Tibet </answer>"},
    ]
    several = write(tmp_path / "several.jsonl", {**CHAT, "messages": turns})
    assert parsed(several, R1)[0][0].segments == solver.segments


def test_an_answer_of_generate_is_kept_if_it_is_right(tmp_path):
    turns = [{"who": "solver", "text": "<answer> Tibet </answer>"}]
    answer = {"question": "Where is Lhasa?", "turns": turns, "golden_answers": ["tibet"]}
    wrong = {**answer, "golden_answers": ["Nepal"]}
    found, left_out = parsed(write(tmp_path / "answers.jsonl", answer, wrong))
    assert [shown.messages for shown in found] == [
        prompts.solver_messages(CONTEXT.style, "Where is Lhasa?")
    ]
    assert left_out == {"solver": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, 'field "messages" expected a chat (or "attempts"'),
        (chat("<answer> Tibet </answer>", role="judge"), 'field "role" expected "solver", for a'),
        (chat("It is in Tibet."), 'field "messages" expected an assistant that writes </search>'),
        (chat("x\n<information>y</information>\n<answer> z </answer>"), "writes </search> before"),
        ({**CHAT, "golden_answers": None}, 'field "golden_answers" expected the right answers'),
        ({**CHAT, "messages": CHAT["messages"][:2]}, "a question of the user and what the assist"),
        ({**CHAT, "messages": "x"}, "a question of the user and what the assistant"),
        ({"attempts": 3, "question": {"text": "Who?"}}, 'field "attempts" expected a list'),
        ({"attempts": [], "proposer": 3}, 'field "proposer" expected an object, or null'),
        (
            {"attempts": [{"score": 1.0, "turns": []}], "question": {"text": "Who?"}},
            'field "attempts.turns" expected turns of "solver" and "search engine"',
        ),
        (
            {
                "attempts": [{"score": 1, "turns": [{"who": "ghost", "text": "x"}]}],
                "question": {"text": "Who?"},
            },
            'field "attempts.turns" expected turns of "solver" and "search engine"',
        ),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_line(tmp_path, row, says):
    path = write(tmp_path / "rows.jsonl", CHAT, row)
    with pytest.raises(InputError) as raised:
        parsed(path, R1)
    assert says in str(raised.value) and "rows.jsonl line 2: " in str(raised.value)


def load(path, context=CONTEXT, held_out=0.25, row_tokens=ROW_TOKENS, keep="right", seed=0):
    selection = rows.Selection(keep, "em", Counter())
    return lessons.load(rows.files(str(path)), context, selection, row_tokens, held_out, seed)


def test_whole_games_are_held_out_and_chance_draws_the_same_ones(tmp_path, round_):
    path = dumped(tmp_path / "step.jsonl", round_)
    found = load(path)
    watched = {lesson.game for lesson in found.held_out}
    assert len(watched) == 1 and not watched & {lesson.game for lesson in found.training}
    assert len(found.held_out) + len(found.training) == 16
    assert load(path) == found
    assert "12 left out" in found.summary and "4 of 1 other games held out" in found.summary


def test_a_folder_of_a_run_is_its_dumped_episodes(tmp_path, round_):
    (tmp_path / "episodes").mkdir()
    for step in (10, 20):
        dumped(tmp_path / f"episodes/step_{step:06d}.jsonl", round_)
    names = [path.name for path in rows.files(f"{tmp_path}, {tmp_path / 'episodes'}")]
    assert names == ["step_000010.jsonl", "step_000020.jsonl"] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected the folder of a run .* found no"):
        rows.files(str(tmp_path / "empty"))


def test_what_cannot_be_trained_on_is_one_sentence(tmp_path, round_):
    path = dumped(tmp_path / "step.jsonl", round_)
    with pytest.raises(
        InputError, match="line 1: the proposer's episode has .*learner.row_tokens = 10"
    ):
        load(path, row_tokens=10)
    one = write(tmp_path / "one.jsonl", CHAT)
    with pytest.raises(InputError, match="expected at least 2 games, of which .* found 1"):
        load(one, R1)
    wrong = write(tmp_path / "wrong.jsonl", {**CHAT, "golden_answers": ["Nepal"]})
    with pytest.raises(InputError, match="found none that warm_start.keep=right keeps, and 1 oth"):
        load(wrong, R1)
