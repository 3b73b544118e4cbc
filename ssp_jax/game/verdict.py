"""A judge's words → yes, no, or neither."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from ssp_jax.game.chat import encode_prompt as encode_prompt

# What a model thinks before it speaks. Where a template writes the opening tag, a reply has only
# the other.
_THOUGHT = r"(?:seed:)?(?:think|thinking|thoughts?)"
_THOUGHT_BEGINS = re.compile(rf"<{_THOUGHT}>|\[think\]|◁think▷", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"</{_THOUGHT}>|\[/think\]|◁/think▷", re.IGNORECASE)
# Reasons with tags of their own, before or after a verdict.
_REASONS = re.compile(
    r"<(reason|reasoning|analysis|explanation|reflection)>.*?(?:</\1>|$)", re.DOTALL | re.IGNORECASE
)
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|\n")  # a word, a mark, the end of a line
_BEGINNING = 2000  # characters of a reply in which its first word stands
# May stand before a verdict and are none: "Final verdict: ...", "<answer>...", "It is ...", "1.
# ...".
_INTRODUCTION = frozenset(
    ("my", "the", "final", "verdict", "judgement", "judgment", "decision", "result", "evaluation")
    + ("grade", "answer", "response", "output", "boxed", "text", "textbf", "mathrm", "json", "1")
    + ("it", "this", "that", "is", "it's", "it’s", "that's", "that’s")
)
_QUOTES = frozenset("*\"'`“”‘’")
_NOT = ("not", "isn't", "isn’t")
_ADVERBS = ("a", "quite", "entirely", "fully", "completely", "exactly")
_CHOICE = ("or", "/", "|", "?")  # "Correct or wrong?" repeats the question
_REASON_FOLLOWS = ("because", "since", "as", "and")  # any other word is the name of a thing
_YES_OR_NO = {"true": True, "yes": True, "false": False, "no": False}
_VERDICTS = {"correct": True, "wrong": False, "incorrect": False}


def read_verdict(reply: str) -> bool | None:
    """What a judge's reply says of an answer: the first word after its thinking decides.

    True for "Correct", False for "Wrong", "Incorrect" and "Not correct", None for anything else: no
    guess is made, neither up nor down. Passed over before that word are marks and the few words
    that introduce a verdict. "Correct answer" and "correct date" name a thing, "Correct or Wrong"
    repeats the question. A JSON object says it by its values. A thought without its end is
    followed by no verdict yet. (The reference takes every reply that contains "correct" for a yes,
    "Incorrect" too.)
    """
    said = _THOUGHT_ENDS.split(reply)[-1]
    if _THOUGHT_BEGINS.search(said):
        return None
    said = _REASONS.sub(" ", said)
    values = _json_values(said)
    return _agreed(values) if values else _spoken(said)


def _spoken(text: str) -> bool | None:
    """The verdict that a text begins with."""
    first, *then = [*_words_from_the_first(text), "", "", ""]
    if first in _NOT:
        adverbs = next(i for i, word in enumerate(then) if word not in _ADVERBS)
        return False if then[adverbs] == "correct" else None
    if first not in _VERDICTS or then[0] in _CHOICE:
        return None
    if first != "correct":
        return False
    if then[0] in (":", "：", "=") and then[1] in _YES_OR_NO and not then[2].isalnum():
        return _YES_OR_NO[then[1]]  # {"correct": false
    names_a_thing = then[0].isalnum() and then[0] not in _REASON_FOLLOWS
    return None if names_a_thing else True


def _words_from_the_first(text: str) -> list[str]:
    """Words and marks, without quotes and without what may stand before a verdict."""
    tokens = [
        token for token in _TOKEN.findall(text.strip()[:_BEGINNING].lower()) if token not in _QUOTES
    ]
    before = itertools.takewhile(
        lambda token: token in _INTRODUCTION or not token[0].isalnum(), tokens
    )
    return tokens[len(list(before)) :]


def _json_values(text: str) -> list[tuple[str, Any]]:
    """Names and values of a JSON object that a text begins with, in all its depth."""
    pairs: list[tuple[str, Any]] = []
    start = text.lstrip().removeprefix("```json").removeprefix("```").lstrip()
    try:
        json.JSONDecoder(object_pairs_hook=pairs.extend).raw_decode(start)
    except (ValueError, RecursionError):
        return []
    return pairs


def _agreed(values: Sequence[tuple[str, Any]]) -> bool | None:
    """The verdict of all values that are one; None where they say both, or none is."""
    said = set()
    for name, value in values:
        meaning = _VERDICTS.get(re.sub(r"[\W_]|^is", "", name.lower()))
        truth = _YES_OR_NO.get(str(value).lower())
        words = [token for token in _TOKEN.findall(str(value).lower()) if token.isalnum()]
        if meaning is not None and truth is not None:
            said.add(truth == meaning)
        elif words in (["correct"], ["wrong"], ["incorrect"], ["not", "correct"]):
            said.add(words == ["correct"])
    return said.pop() if len(said) == 1 else None
