"""The rules: which questions are well-formed, and what each fault is called."""

from collections.abc import Sequence
from typing import Protocol

MAX_ANSWER_TAGS = 10  # more opening or closing tags than this cost three quarters of the reward [C]


class QuestionRules(Protocol):
    """What a question must satisfy; a ConfigDict with these keys serves. configs/default.py has the
    sources.
    """

    min_chars: int
    max_chars: int
    min_words: int
    min_searches: int
    distinct_searches: bool
    forbid_answer_in_search: bool


QUESTION_FAULTS = (
    "no_question",
    "empty",
    "too_short",
    "too_long",
    "too_few_words",
    "answer_in_question",
    "too_few_searches",
    "repeated_search",
    "answer_in_search",
    "no_documents",
)
# Of well-formed ones: the verifier's answer is not right, or limits.verify_prompt_tokens leaves no
# room for the prompt.
VERIFICATION_FAULTS = ("unverified", "too_long_to_verify")
# limits.prompt_tokens leaves no room for the given answer, or for the question.
PROMPT_FAULTS = ("too_long_to_propose", "too_long_to_solve")
FAULTS = (*QUESTION_FAULTS, *PROMPT_FAULTS, *VERIFICATION_FAULTS)


def question_fault(
    question: str | None,
    answer: str,
    queries: Sequence[str],
    num_documents: int,
    rules: QuestionRules,
) -> str | None:
    """The first rule, in the order of QUESTION_FAULTS, that a proposed question breaks; None for a
    well-formed one.

    A malformed question is an ordinary outcome of the game, so nothing here raises. As in the
    reference (problem_extraction.py), the answer counts as revealed when its lower-cased text is a
    substring of the lower-cased question: "1" is revealed by "1990" and "Iran" by "Tirana", and no
    normalisation is applied. Queries repeat when they are the same string. A question without any
    retrieved document cannot be verified and never passes.
    """
    text, hidden = (question or "").strip(), answer.strip().lower()
    broken = {
        "no_question": question is None,
        "empty": not text,
        "too_short": len(text) < rules.min_chars,
        "too_long": len(text) > rules.max_chars,
        "too_few_words": len(text.split()) < rules.min_words,
        "answer_in_question": hidden in text.lower(),
        "too_few_searches": len(queries) < rules.min_searches,
        "repeated_search": rules.distinct_searches and len(set(queries)) < len(queries),
        "answer_in_search": rules.forbid_answer_in_search
        and any(hidden in query.lower() for query in queries),
        "no_documents": num_documents < 1,
    }
    return next((fault for fault in QUESTION_FAULTS if broken[fault]), None)
