"""Episodes: scripted tokens through each role's state machine; marks, documents, and how each limit
ends it.
"""

import dataclasses
from pathlib import Path

import pytest

from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.game import prompts, roles
from ssp_jax.game.examples import example_sets
from ssp_jax.game.roles import PROPOSER, SOLVER, VERIFIER, EpisodeContext, EpisodePlayer, Limits
from ssp_jax.model import hf_load
from ssp_jax.rollout import sampler

TOKENIZER = hf_load.load_tokenizer(Path("assets/tiny/model"))
LIMITS = Limits(
    prompt_tokens=64,
    verify_prompt_tokens=200,
    response_tokens=120,
    turn_tokens=30,
    turns=4,
    searches=3,
    observation_tokens=60,
)
CONTEXT = EpisodeContext(TOKENIZER, prompts.STYLES["brief"], "chat", LIMITS)
FOUND = [Document("1", '"Ulaanbaatar"', "Ulaanbaatar is the capital of Mongolia.")]
SEARCH, ANSWER = 0, 1  # indices of the solver's stops


def player(role=SOLVER, context=CONTEXT, text="Question: Where?"):
    return EpisodePlayer(context, role, 5, 1.0, context.encode(text))


def write(p, text, stop):
    tokens = p.context.encode(text)
    return p.end_turn(tokens, [-0.5] * len(tokens), stop)


def test_an_episode_of_two_turns():
    p = player()
    prompt = list(p.tokens)
    assert write(p, "<search> Mongolia capital </search>", SEARCH) == "Mongolia capital"
    p.insert_result(FOUND)
    assert write(p, "<answer> Ulaanbaatar </answer>\n", ANSWER) is None
    e = p.episode()
    assert (e.stop_reason, e.queries, e.documents) == (
        "answer",
        ("Mongolia capital",),
        tuple(FOUND),
    )
    assert e.tokens[: e.prompt_length] == prompt
    assert e.text == "<search> Mongolia capital </search><answer> Ulaanbaatar </answer>\n"
    assert len(e.tokens) == len(e.sampled) == len(e.logprobs)
    own = [t for t, mark in zip(e.tokens, e.sampled, strict=True) if mark]
    assert CONTEXT.decode(own) == e.text
    assert all((logp == -0.5) == mark for logp, mark in zip(e.logprobs, e.sampled, strict=True))
    given = e.tokens[e.prompt_length :]
    assert CONTEXT.decode(given).replace(CONTEXT.decode(own), "").count("<information>") == 1


def test_a_turn_may_arrive_in_pieces():
    a, b = player(), player()
    tokens = CONTEXT.encode("<search> Mongolia </search>")
    a.append(tokens[:2], [-0.5] * 2)
    assert a.end_turn(tokens[2:], [-0.5] * len(tokens[2:]), SEARCH) == write(
        b, "<search> Mongolia </search>", SEARCH
    )
    assert a.episode() == b.episode()


@pytest.mark.parametrize("stop", [sampler.EOS, sampler.LIMIT])
def test_end_of_turn_and_length_have_their_own_reasons(stop):
    p = player()
    write(p, "hm", stop)
    assert p.stop_reason == {sampler.EOS: "eos", sampler.LIMIT: "turn_tokens"}[stop]


def test_limits_bound_the_coming_turn():
    p = player()
    assert p.token_limit() == len(p.tokens) + LIMITS.turn_tokens
    p.prompt_length -= 100  # as if 100 tokens of the response were used
    assert p.token_limit() == len(p.tokens) + 20
    write(p, "x x x", sampler.LIMIT)
    assert p.stop_reason == "turn_tokens"
    p.prompt_length -= 20
    p.end_turn([], [], sampler.LIMIT)
    assert p.stop_reason == "response_tokens"


def test_a_verifier_has_a_limit_of_its_own():
    context = dataclasses.replace(
        CONTEXT, limits=dataclasses.replace(LIMITS, verify_response_tokens=10)
    )
    p = player(VERIFIER, context)
    assert p.token_limit() == len(p.tokens) + 10
    p.end_turn([5] * 10, [-0.5] * 10, sampler.LIMIT)
    assert p.stop_reason == "response_tokens"
    assert player(SOLVER, context).token_limit() == player(SOLVER).token_limit()


def test_one_search_too_many_ends_it():
    p = player(
        context=dataclasses.replace(
            CONTEXT, limits=dataclasses.replace(LIMITS, searches=1, response_tokens=500)
        )
    )
    assert write(p, "<search> a </search>", SEARCH) == "a"
    p.insert_result([])
    assert write(p, "<search> b </search>", SEARCH) is None
    assert (p.stop_reason, p.queries) == ("searches", ["a"])


def test_too_many_turns_end_it():
    p = player(
        context=dataclasses.replace(
            CONTEXT, limits=dataclasses.replace(LIMITS, turns=2, response_tokens=500)
        )
    )
    for query in "ab":
        assert not p.stop_reason
        write(p, f"<search> {query} </search>", SEARCH)
        p.insert_result(FOUND)
    assert p.stop_reason == "turns"


def test_a_result_that_does_not_fit_ends_it_and_is_not_appended():
    p = player(
        context=dataclasses.replace(CONTEXT, limits=dataclasses.replace(LIMITS, response_tokens=20))
    )
    write(p, "<search> a </search>", SEARCH)
    before = len(p.tokens)
    p.insert_result(FOUND)
    assert (p.stop_reason, len(p.tokens)) == ("response_tokens", before)


OTHER = [Document("2", '"Oslo"', "Oslo is the capital of Norway.")]


@pytest.mark.parametrize("told", [False, True])
def test_a_result_that_was_shown_already_is_told_so_where_asked(told):
    """Also by other words, and of an empty result by the same words alone."""
    limits = dataclasses.replace(LIMITS, turns=20, searches=20, response_tokens=900)
    p = player(context=dataclasses.replace(CONTEXT, limits=limits, tell_repeats=told))
    searches = [("a", FOUND), ("b", OTHER), ("c", FOUND), ("d", []), ("e", []), ("d", [])]
    for query, result in searches:
        write(p, f"<search> {query} </search>", SEARCH)
        p.insert_result(result)
    shown = [text for who, text in p.turns if who == roles.SEARCH_ENGINE]
    repeats = [number for number, text in enumerate(shown) if "shown above" in text]
    assert repeats == ([2, 5] if told else [])
    assert shown[3] == shown[4] and "No document" in shown[3]
    assert all("</information>" in text for text in shown)
    assert shown[2] == shown[0] or told
    read = [document.id for document in p.documents]
    assert read == (["1", "2"] if told else ["1", "2", "1"])


def test_a_search_without_its_opening_tag_ends_it():
    p = player()
    assert write(p, "capital </search>", SEARCH) is None
    assert p.stop_reason == "malformed_search"


@pytest.mark.parametrize(("role", "limit"), [(SOLVER, 64), (PROPOSER, 64), (VERIFIER, 200)])
def test_a_prompt_that_is_too_long_ends_at_once(role, limit):
    assert not EpisodePlayer(CONTEXT, role, 0, 1.0, [5] * limit).stop_reason
    assert EpisodePlayer(CONTEXT, role, 0, 1.0, [5] * (limit + 1)).stop_reason == "prompt_tokens"


def test_each_role_stops_at_its_own_tags():
    reasons = {}
    for role in (SOLVER, PROPOSER, VERIFIER):
        for index, tag in enumerate(role.stops):
            p = player(role)
            write(p, f"<search> x {tag}", index)
            reasons[role.name, tag] = p.stop_reason
    assert reasons == {
        ("solver", "</search>"): "",
        ("solver", "</answer>"): "answer",
        ("proposer", "</search>"): "",
        ("proposer", "</question>"): "question",
        ("verifier", "</answer>"): "answer",
    }


def test_a_long_result_is_cut_but_closed():
    tokens = CONTEXT.observation(FOUND * 30)
    assert len(tokens) == LIMITS.observation_tokens
    assert CONTEXT.decode(tokens).endswith("</information>\n")
    short = dataclasses.replace(CONTEXT, limits=dataclasses.replace(LIMITS, observation_tokens=1))
    # not all but a few tokens
    assert CONTEXT.decode(short.observation(FOUND * 30)) == "</information>\n"


@pytest.mark.parametrize("tokens", range(12, 90, 7))
@pytest.mark.parametrize("style", list(prompts.STYLES.values()))
def test_the_documents_of_an_episode_are_as_long_as_they_were_shown(style, tokens):
    limits = dataclasses.replace(LIMITS, observation_tokens=tokens, response_tokens=500)
    p = player(context=dataclasses.replace(CONTEXT, style=style, limits=limits))
    found = [Document(name, f'"{name}"', f"{name} is old. \u00e9\u6771" * 3) for name in "ABC"]
    write(p, "<search> a </search>", SEARCH)
    p.insert_result(found)
    shown = p.turns[-1][1]
    for document, whole in zip(p.documents, found, strict=False):
        assert f'(Title: "{whole.id}") {document.text}' in shown
    for number, whole in enumerate(found):
        if whole.text in shown:
            assert p.documents[number] == whole
    *before, last = [document.text for document in p.documents] or [""]
    assert before == [document.text for document in found[: len(before)]]
    # Nothing that was shown is missing, but for a part of a character.
    closing = style.observation_text.split("{documents}")[1].strip()
    after = shown.split(closing)[0].rstrip("\ufffd\n")
    assert after.endswith(last) or len(p.documents) < len(found)


def test_episode_ids_are_unique_and_fit():
    ids = {
        roles.episode_id(r, row, a)
        for r in roles.ROLES
        for row in (0, 1, 2**19 - 1)
        for a in (0, 511)
    }
    assert len(ids) == 6 * len(roles.ROLES) and max(ids) < 2**31
    with pytest.raises(ValueError, match="rows"):
        roles.episode_id(SOLVER, 2**19, 0)


def test_eos_tokens_come_from_tokenizer_and_generation_config():
    own = TOKENIZER.eos_token_id
    assert roles.eos_tokens(TOKENIZER, {}) == (own,)
    assert roles.eos_tokens(TOKENIZER, {"eos_token_id": [own, 0]}) == tuple(sorted({own, 0}))
    assert roles.eos_tokens(TOKENIZER, {"eos_token_id": 0}) == tuple(sorted({own, 0}))
    nameless = type("Tokenizer", (), {"eos_token_id": None})
    with pytest.raises(InputError, match="eos"):
        roles.eos_tokens(nameless, {})


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("style", list(prompts.STYLES.values()))
@pytest.mark.parametrize("role", [SOLVER, PROPOSER, VERIFIER])
def test_what_the_prompts_of_a_role_share_is_found(role, style, number):
    """The rest is what differs, and what follows from there. Each set of examples has its own."""
    context = dataclasses.replace(CONTEXT, style=style, example_sets=example_sets(number))

    def messages(text, number, shown):
        if role is PROPOSER:
            return prompts.proposer_messages(style, text, number, "", shown)
        if role is VERIFIER:
            return prompts.verifier_messages(style, text, [Document(text, text, text)], shown)
        return prompts.solver_messages(style, text, shown)

    prefixes = set()
    for shown in context.example_sets:
        ours = context.prompt(messages("Who built it?", 2, shown))
        others = context.prompt(messages("1,000 rivers", 5, shown))
        shared = EpisodePlayer(context, role, 0, 1.0, ours).shared_prefix
        prefixes.add(tuple(ours[:shared]))
        assert ours[:shared] == others[:shared]
        pairs = enumerate(zip(ours, others, strict=False))
        fixed = next(n for n, pair in pairs if len({*pair}) > 1)
        assert shared == (fixed if fixed >= 64 else 0)
        assert shared > 0 or not shown
    assert len(prefixes) == len(context.example_sets)


def test_the_examples_of_an_answer_come_after_what_proposers_share():
    style = prompts.STYLES["search_r1"]
    context = dataclasses.replace(CONTEXT, style=style)
    plain, with_examples = (
        context.prompt(prompts.proposer_messages(style, "Paris", 2, examples))
        for examples in ("", "1. Why?")
    )
    assert 64 < context.shared_prefix(with_examples) < context.shared_prefix(plain)


def test_prompts_outside_the_game_share_nothing():
    style = prompts.STYLES["search_r1"]
    context = dataclasses.replace(CONTEXT, style=style)
    prompt = context.prompt(prompts.solver_messages(style, "Who?"))
    assert EpisodePlayer(context, SOLVER, 0, 1.0, prompt).shared_prefix > 64
    assert EpisodePlayer(context, roles.ASSISTANT, 0, 1.0, prompt).shared_prefix == 0
