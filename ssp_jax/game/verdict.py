"""A judge's reply → right, wrong, or neither."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

# A model's thinking before its answer. Where the template writes the opening tag, the reply has
# only the closing one.
_THOUGHT = r"(?:seed:)?(?:think|thinking|thoughts?)"
_THOUGHT_BEGINS = re.compile(rf"<{_THOUGHT}>|\[think\]|◁think▷", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"</{_THOUGHT}>|\[/think\]|◁/think▷", re.IGNORECASE)
# Reasons with tags of their own, before or after a verdict.
_REASONS = re.compile(
    r"<(reason|reasoning|analysis|explanation|reflection)>.*?(?:</\1>|$)", re.DOTALL | re.IGNORECASE
)
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|\n")  # a word, a mark, the end of a line
_BEGINNING = 2000  # characters of a reply in which its first word stands
# Words that introduce a verdict: "Final verdict: ...", "<answer>...", "It is ...", "1. ...".
_INTRODUCTION = frozenset(
    ("my", "the", "final", "verdict", "judgement", "judgment", "decision", "result", "evaluation")
    + ("grade", "answer", "response", "output", "boxed", "text", "textbf", "mathrm", "json", "1")
    + ("it", "this", "that", "is", "it's", "it’s", "that's", "that’s")
)
_QUOTES = frozenset("*\"'`“”‘’")
_NOT = ("not", "isn't", "isn’t")
_ADVERBS = ("a", "quite", "entirely", "fully", "completely", "exactly")
_CHOICE = ("or", "/", "|", "?")  # "Correct or wrong?" repeats the question
_REASON_FOLLOWS = ("because", "since", "as", "and")  # after any other word it names a thing
_YES_OR_NO = {"true": True, "yes": True, "false": False, "no": False}
_VERDICTS = {"correct": True, "wrong": False, "incorrect": False}


def read_verdict(reply: str) -> bool | None:
    """The verdict of a judge's reply: the first word after its thinking decides.

    True for "Correct", False for "Wrong", "Incorrect" and "Not correct", None for anything else:
    there is no guess, neither up nor down. Marks and a few words may introduce the verdict.
    "Correct answer" and "correct date" name a thing, "Correct or Wrong" repeats the question. The
    values of a JSON object give its verdict. A thought without its end has no verdict yet. (The
    reference takes every reply that contains "correct" for a yes, "Incorrect" too.)
    """
    answer = _THOUGHT_ENDS.split(reply)[-1]
    if _THOUGHT_BEGINS.search(answer):
        return None
    answer = _REASONS.sub(" ", answer)
    values = _json_values(answer)
    return _agreed(values) if values else _first_verdict(answer)


def _first_verdict(text: str) -> bool | None:
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
    beginning = text.strip()[:_BEGINNING].lower()
    tokens = [token for token in _TOKEN.findall(beginning) if token not in _QUOTES]

    def introduces(token: str) -> bool:
        return token in _INTRODUCTION or not token[0].isalnum()

    return list(itertools.dropwhile(introduces, tokens))


def _json_values(text: str) -> list[tuple[str, Any]]:
    """Names and values, at any depth, of a JSON object that a text begins with."""
    pairs: list[tuple[str, Any]] = []
    start = text.lstrip().removeprefix("```json").removeprefix("```").lstrip()
    try:
        json.JSONDecoder(object_pairs_hook=pairs.extend).raw_decode(start)
    except (ValueError, RecursionError):
        return []
    return pairs


def _agreed(values: Sequence[tuple[str, Any]]) -> bool | None:
    """The verdict of those values that are one; None where they differ, or none is."""
    found = set()
    for name, value in values:
        meaning = _VERDICTS.get(re.sub(r"[\W_]|^is", "", name.lower()))
        text = str(value).lower()
        truth = _YES_OR_NO.get(text)
        words = [token for token in _TOKEN.findall(text) if token.isalnum()]
        if meaning is not None and truth is not None:
            found.add(truth == meaning)
        elif words in (["correct"], ["wrong"], ["incorrect"], ["not", "correct"]):
            found.add(words == ["correct"])
    return found.pop() if len(found) == 1 else None
