"""Why a proposal failed: what cut or misled the episode that is at fault.

A fault (rules.py) says what a question lacks; a cause says what to change: a limit, the prompt, or
the model.
"""

from collections.abc import Sequence

from ssp_jax.game.prompts import last_answer
from ssp_jax.game.rewards import cover_exact_match
from ssp_jax.game.roles import Episode

_LIMITS = ("turn_tokens", "response_tokens", "cache_tokens")
_OF_TURNS = ("loop", *_LIMITS, "no_tags", "no_opening_tag")
# Fault -> its causes. The other faults say all by their names.
CAUSES: dict[str, tuple[str, ...]] = {
    "no_question": (*_OF_TURNS, "turns", "searches", "malformed_search"),
    "no_documents": ("no_search", "nothing_found"),
    "unverified": (*_OF_TURNS, "wordy", "other_answer"),
}

# Tokens. A turn loops if it ends in a piece of at most so many that stands there three times, in a
# stretch of some length: numbers such as 1,000,000 repeat a token too.
_LONGEST_LOOP = 100
_SHORTEST_STRETCH = 12


def cause(
    fault: str, proposer: Episode | None, verifier: Episode | None, golds: Sequence[str]
) -> str:
    """A cause of CAUSES[fault]; "" where the fault has none. golds: the given answers."""
    if fault == "no_question" and proposer is not None:
        return _cause_of_end(proposer)
    if fault == "no_documents" and proposer is not None:
        return "nothing_found" if proposer.queries else "no_search"
    if fault == "unverified" and verifier is not None:
        answer = last_answer(verifier.text)
        if answer is None:
            return _cause_of_end(verifier)
        return "wordy" if cover_exact_match(answer, golds) else "other_answer"
    return ""


def _cause_of_end(episode: Episode) -> str:
    """Why an episode has ended without what it was to write."""
    reason = episode.stop_reason
    if reason in (*_LIMITS, "turns", "searches"):
        return "loop" if _loops(episode) else reason
    if reason == "malformed_search":
        return reason
    return "no_tags" if reason == "eos" else "no_opening_tag"


def _loops(episode: Episode) -> bool:
    """Whether its last search repeats one, or its last turn itself."""
    if episode.queries and episode.queries[-1] in episode.queries[:-1]:
        return True
    written = episode.sampled[::-1].index(False)  # tokens of the last turn
    turn = episode.tokens[len(episode.tokens) - written :]
    for period in range(1, _LONGEST_LOOP + 1):
        length = max(3 * period, _SHORTEST_STRETCH)
        end = turn[-length:]
        if len(end) == length and end[:-period] == end[period:]:
            return True
    return False
