"""Prompts: the forms that trained models know, and parsing what models write."""

import re
from pathlib import Path

import pytest
import tokenizers
import transformers

from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.game import chat, prompts
from ssp_jax.game.examples import example_sets
from ssp_jax.model import hf_load

STYLES = list(prompts.STYLES.values())
SHOWN = example_sets(2)[1]
DOCUMENTS = [Document("7", '"Paris"', "Paris is big."), Document("9", '"Lyon"', "Lyon is old.")]


@pytest.mark.parametrize("shown", [(), SHOWN], ids=["plain", "shown"])
@pytest.mark.parametrize("style", STYLES)
def test_the_question_ends_the_solvers_prompt(style, shown):
    last = prompts.solver_messages(style, "Who {is} it?", shown)[-1]
    assert last["role"] == "user"
    assert last["content"].rstrip().endswith("Who {is} it?")


@pytest.mark.parametrize("shown", [(), SHOWN], ids=["plain", "shown"])
@pytest.mark.parametrize("style", STYLES)
def test_the_proposer_is_given_answer_number_and_examples(style, shown):
    messages = prompts.proposer_messages(style, "Lake {Chad}", 3, "1. Why {not}?", shown)
    assert "Lake {Chad}" in messages[-1]["content"] and "3" in messages[-1]["content"]
    if style.system_text:
        assert "1. Why {not}?" in messages[0]["content"]


@pytest.mark.parametrize("shown", [(), SHOWN], ids=["plain", "shown"])
@pytest.mark.parametrize("style", STYLES)
def test_the_verifier_sees_documents_and_question(style, shown):
    text = prompts.verifier_messages(style, "Which?", DOCUMENTS, shown)[-1]["content"]
    assert 'Doc 1(Title: "Paris") Paris is big.\nDoc 2(Title: "Lyon") Lyon is old.\n' in text
    assert "Question: Which?" in text


def test_observations_have_each_familys_form():
    """Search-R1 strips the list (llm_agent/generation.py); R-Search's newlines are those of the SSP
    reference.
    """
    shown = 'Doc 1(Title: "Paris") Paris is big.\nDoc 2(Title: "Lyon") Lyon is old.'
    forms = {name: prompts.observation(style, DOCUMENTS) for name, style in prompts.STYLES.items()}
    assert forms["search_r1"] == f"\n\n<information>{shown}</information>\n\n"
    assert forms["r_search"] == f"\n<observation>{shown}</observation>\n"


def test_the_solvers_prompt_has_the_form_that_trained_models_know():
    """One system turn, one user turn: instruction, the tags in this order, one example of the
    answer tags, question.
    """
    system, user = prompts.solver_messages(prompts.STYLES["search_r1"], "Who?")
    assert system == {"role": "system", "content": "You are a helpful and harmless assistant."}
    text = user["content"]
    assert text.startswith("Answer the given question. ") and text.endswith(
        "</answer>. Question: Who?\n"
    )
    order = [
        "<think>",
        "</think>",
        "<search>",
        "</search>",
        "<information>",
        "</information>",
        "<answer> Beijing",
    ]
    assert sorted(order, key=text.index) == order and "<observation>" not in text


@pytest.mark.parametrize("style", STYLES)
def test_results_come_in_the_tag_that_the_prompts_name(style):
    """The reference's validation prompt names one and its template inserts another (FACTS 1.8)."""
    told = prompts.solver_messages(style, "Who?") + prompts.proposer_messages(style, "Paris", 2, "")
    named = set(
        re.findall(
            r"<(information|observation|tool_response)>", "".join(m["content"] for m in told)
        )
    )
    inserted = set(re.findall(r"<(\w+)>", prompts.observation(style, DOCUMENTS)))
    assert len(inserted) == 1 and (
        named == inserted or (style is prompts.STYLES["brief"] and not named)
    )


def test_r_search_asks_the_bare_question_and_explains_in_the_system_turn():
    system, user = prompts.solver_messages(prompts.STYLES["r_search"], "Who?")
    assert user["content"] == "Who?"
    order = ["<think>", "<search>", "<observation>", "<original_evidence>", "<answer>"]
    assert (
        sorted(order, key=system["content"].index) == order
        and "<information>" not in system["content"]
    )


@pytest.mark.parametrize("style", STYLES)
def test_the_verifier_is_not_told_of_a_search_engine(style):
    text = "".join(m["content"] for m in prompts.verifier_messages(style, "Which?", DOCUMENTS))
    assert "search" not in text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("render", "given"),
    [
        (prompts.solver_messages, ("Who?",)),
        (prompts.proposer_messages, ("Paris", 2, "")),
        (prompts.verifier_messages, ("Who?", DOCUMENTS)),
    ],
)
def test_worked_examples_are_earlier_exchanges_in_the_same_form(style, render, given):
    messages = render(style, *given, SHOWN)
    plain = render(style, *given)
    before = len(plain) - 1
    assert messages[:before] + messages[-1:] == plain
    roles = [message["role"] for message in messages[before:-1]]
    assert roles == ["user", "assistant"] * len(SHOWN)


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
    text = (
        "<answer> a </answer><question> q1? </question><answer> b </answer><question>q2?</question>"
    )
    assert prompts.last_answer(text) == "b"
    assert prompts.first_question(text) == "q1?"
    assert prompts.last_answer("<answer> a") is None and prompts.first_question("") is None


def test_templates():
    tokenizer = hf_load.load_tokenizer(Path("assets/tiny/model"))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    own = tokenizer.decode(chat.encode_prompt(tokenizer, messages, "chat"))
    raw = tokenizer.decode(chat.encode_prompt(tokenizer, messages, "raw_chatml"))
    assert own == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert raw == "<|im_start|>system\nS<|im_start|>user\nU<|im_start|>assistant\n"
    with pytest.raises(InputError, match="prompt.template"):
        chat.encode_prompt(tokenizer, messages, "chatml")


def test_raw_chatml_writes_an_example_without_ends_of_turns():
    tokenizer = hf_load.load_tokenizer(Path("assets/tiny/model"))
    messages = prompts.solver_messages(STYLES[0], "Who?", SHOWN[:1])
    text = tokenizer.decode(chat.encode_prompt(tokenizer, messages, "raw_chatml"))
    assert [part.split("\n")[0] for part in text.split("<|im_start|>")] == [
        "",
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert "<|im_end|>" not in text


def test_a_tokenizer_that_lacks_what_a_template_needs_is_named():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"U": 0}, unk_token="U"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="mine")
    messages = [{"role": "user", "content": "U"}]
    with pytest.raises(InputError, match="'mine' has no chat template"):
        chat.encode_prompt(tokenizer, messages, "chat")
    with pytest.raises(InputError, match=r"'mine' lacks <\|im_start\|>"):
        chat.encode_prompt(tokenizer, messages, "raw_chatml")


def test_a_template_that_refuses_the_messages_is_told():
    tokenizer = hf_load.load_tokenizer(Path("assets/tiny/model"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        chat.encode_prompt(tokenizer, [{"role": "user", "content": "U"}], "chat")
