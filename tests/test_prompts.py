"""Prompts: the forms that trained models know, and parsing what models write."""

from pathlib import Path

import pytest

from ssp_jax import prompts, weights
from ssp_jax.data import Document, InputError

STYLES = list(prompts.STYLES.values())
DOCUMENTS = [Document("7", '"Paris"', "Paris is big."), Document("9", '"Lyon"', "Lyon is old.")]


@pytest.mark.parametrize("style", STYLES)
def test_the_question_ends_the_solvers_prompt(style):
    last = prompts.solver_messages(style, "Who {is} it?")[-1]
    assert last["role"] == "user"
    assert last["content"].rstrip().endswith("Who {is} it?")


@pytest.mark.parametrize("style", STYLES)
def test_the_proposer_is_given_answer_number_and_examples(style):
    messages = prompts.proposer_messages(style, "Lake {Chad}", 3, "1. Why {not}?")
    assert "Lake {Chad}" in messages[-1]["content"] and "3" in messages[-1]["content"]
    if style.system_text:
        assert "1. Why {not}?" in messages[0]["content"]


@pytest.mark.parametrize("style", STYLES)
def test_the_verifier_sees_documents_and_question(style):
    text = prompts.verifier_messages(style, "Which?", DOCUMENTS)[-1]["content"]
    assert 'Doc 1(Title: "Paris") Paris is big.\nDoc 2(Title: "Lyon") Lyon is old.\n' in text
    assert "Question: Which?" in text


def test_observations_have_each_familys_form():
    shown = 'Doc 1(Title: "Paris") Paris is big.\n'
    forms = {name: prompts.observation(style, DOCUMENTS[:1]) for name, style in prompts.STYLES.items()}
    assert forms["search_r1"] == f"\n\n<information>{shown}</information>\n\n"
    assert forms["r_search"] == f"\n<observation>{shown}</observation>\n"


@pytest.mark.parametrize("style", STYLES)
def test_an_empty_result_says_so(style):
    assert "No document" in prompts.observation(style, [])


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("<search> a b </search>", "a b"),
        ("<search>one</search> x <search>two\nlines</search>", "two\nlines"),
        ("<search> <search> inner </search>", "inner"),
        ("no tags </search>", None),
        ("<search>  </search>", None),
        ("<search> open", None),
    ],
)
def test_the_last_complete_search_counts(text, query):
    assert prompts.last_search(text) == query


def test_the_last_answer_and_the_first_question_count():
    text = "<answer> a </answer><question> q1? </question><answer> b </answer><question>q2?</question>"
    assert prompts.last_answer(text) == "b"
    assert prompts.first_question(text) == "q1?"
    assert prompts.last_answer("<answer> a") is None and prompts.first_question("") is None


def test_templates():
    tokenizer = weights.load_tokenizer(Path("assets/tiny/model"))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    chat, raw = (tokenizer.decode(prompts.encode_prompt(tokenizer, messages, t)) for t in ("chat", "raw_chatml"))
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert raw == "<|im_start|>system\nS<|im_start|>user\nU<|im_start|>assistant\n"
    with pytest.raises(InputError, match="prompt.template"):
        prompts.encode_prompt(tokenizer, messages, "chatml")
