"""Each fault that may have several causes is told which, from how its episode ended."""

import dataclasses
from pathlib import Path

import pytest

from ssp_jax.data import Document
from ssp_jax.game import prompts, roles
from ssp_jax.game.causes import CAUSES, cause
from ssp_jax.game.roles import PROPOSER, VERIFIER
from ssp_jax.model import hf_load
from ssp_jax.rollout import sampler

CONTEXT = roles.EpisodeContext(
    hf_load.load_tokenizer(Path("assets/tiny/model")),
    prompts.STYLES["brief"],
    "chat",
    roles.Limits(200, 200, 500, 200, 4, 3, 200),
)
GOLDS = ("Ulaanbaatar",)
PLAIN = "I look for a city that lies far from any sea"
LOOP = PLAIN[:10] + " so the city is" * 4 + " so the"
CUTS = {
    "turn_tokens": {"turn_tokens": 1},
    "response_tokens": {"response_tokens": 1, "verify_response_tokens": 1},
}


def episode(role, turns, stop=None, limits=None):
    """stop: of the last turn; None for the tag that it ends in."""
    context = CONTEXT
    if limits:
        changed = dataclasses.replace(CONTEXT.limits, **limits)
        context = dataclasses.replace(CONTEXT, limits=changed)
    player = roles.EpisodePlayer(context, role, 0, 1.0, context.encode("Answer: Ulaanbaatar"))
    for text in turns:
        tags = [number for number, tag in enumerate(role.stops) if text.endswith(tag)]
        tokens = context.encode(text)
        ended = tags[0] if tags else stop
        if player.end_turn(tokens, [0.0] * len(tokens), ended) is not None:
            player.insert_result([Document("1", '"a"', "text")])
    assert player.stop_reason
    return player.episode()


def search(query):
    return f"<search> {query} </search>"


NO_QUESTION = [
    ("turn_tokens", dict(turns=[PLAIN], stop=sampler.LIMIT, limits=CUTS["turn_tokens"])),
    ("response_tokens", dict(turns=[PLAIN], stop=sampler.LIMIT, limits=CUTS["response_tokens"])),
    ("cache_tokens", dict(turns=[PLAIN], stop=sampler.FULL)),
    ("loop", dict(turns=[LOOP], stop=sampler.LIMIT)),
    ("loop", dict(turns=[search("a"), search("b"), search("a"), search("c")], stop=None)),
    ("loop", dict(turns=[search("a"), search("a"), PLAIN], stop=sampler.LIMIT)),
    ("searches", dict(turns=[search("a"), search("b"), search("c"), search("d")], stop=None)),
    ("turns", dict(turns=[search("a"), search("b")], limits={"turns": 2})),
    ("malformed_search", dict(turns=["a </search>"])),
    ("no_tags", dict(turns=[PLAIN], stop=sampler.EOS)),
    ("no_tags", dict(turns=[LOOP], stop=sampler.EOS)),
    ("no_opening_tag", dict(turns=["Which city? </question>"])),
]
UNVERIFIED = [
    ("turn_tokens", dict(turns=[PLAIN], stop=sampler.LIMIT, limits=CUTS["turn_tokens"])),
    ("response_tokens", dict(turns=[PLAIN], stop=sampler.LIMIT, limits=CUTS["response_tokens"])),
    ("cache_tokens", dict(turns=[PLAIN], stop=sampler.FULL)),
    ("loop", dict(turns=[LOOP], stop=sampler.LIMIT)),
    ("no_tags", dict(turns=[PLAIN], stop=sampler.EOS)),
    ("no_opening_tag", dict(turns=["Oslo </answer>"])),
    ("wordy", dict(turns=["<answer> It is Ulaanbaatar. </answer>"])),
    ("other_answer", dict(turns=["<answer> Oslo </answer>"])),
]


@pytest.mark.parametrize(("expected", "played"), NO_QUESTION)
def test_why_a_proposer_wrote_no_question(expected, played):
    proposal = episode(PROPOSER, **played)
    assert cause("no_question", proposal, None, GOLDS) == expected


@pytest.mark.parametrize(("expected", "played"), UNVERIFIED)
def test_why_a_verifier_did_not_confirm(expected, played):
    proposal = episode(PROPOSER, ["<question> Which? </question>"])
    verification = episode(VERIFIER, **played)
    assert cause("unverified", proposal, verification, GOLDS) == expected


def test_why_there_are_no_documents():
    silent = episode(PROPOSER, ["<question> Which? </question>"])
    searched = episode(PROPOSER, [search("a"), "<question> Which? </question>"])
    assert cause("no_documents", silent, None, GOLDS) == "no_search"
    assert cause("no_documents", searched, None, GOLDS) == "nothing_found"


def test_every_cause_has_an_example_here():
    assert {name for name, _ in NO_QUESTION} == set(CAUSES["no_question"])
    assert {name for name, _ in UNVERIFIED} == set(CAUSES["unverified"])


def test_other_faults_say_all_by_their_names():
    assert cause("too_short", episode(PROPOSER, [PLAIN], sampler.EOS), None, GOLDS) == ""
    assert cause("", None, None, GOLDS) == ""
