"""Is an answer right, is a question well-formed, and what both roles earn. Pure functions of texts
and small arrays.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ssp_jax.game.prompts import last_answer
from ssp_jax.game.rules import MAX_ANSWER_TAGS

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's and Search-R1's form: lower case, no ASCII punctuation, no articles, single spaces."""
    without_punctuation = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def comparable(text: str) -> str:
    """The normal form, or the bare lower-case text where nothing would be left of it.

    Deviation from Search-R1: there "A", "The" and "!" are all the empty text, equal to each other
    and to no answer.
    """
    return normalize_answer(text) or text.strip().lower()


def exact_match(prediction: str | None, golds: Sequence[str]) -> bool:
    """The prediction equals one of the golds in normal form; None means that no answer was given."""
    return bool(prediction) and comparable(str(prediction)) in {comparable(gold) for gold in golds}


def cover_exact_match(prediction: str | None, golds: Sequence[str]) -> bool:
    """One of the golds stands in the prediction as a sequence of whole words, in normal form."""
    words = f" {comparable(prediction or '')} "
    return any(f" {comparable(gold)} " in words for gold in golds)


def f1_score(prediction: str | None, golds: Sequence[str]) -> float:
    """SQuAD's F1 over the words of the normal form, the best over the golds."""
    return max(
        (_f1(comparable(prediction or "").split(), comparable(gold).split()) for gold in golds),
        default=0.0,
    )


def _f1(predicted: list[str], gold: list[str]) -> float:
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


METRICS: dict[str, Callable[[str | None, Sequence[str]], bool]] = {
    "em": exact_match,
    "cover_em": cover_exact_match,
}
JUDGES = ("policy", "openai")  # models that are asked where exact match fails (judge.py)
METRIC_NAMES = (*METRICS, *JUDGES)  # config keys reward.metric and eval.judge


def needs_judge(answer: str | None, golds: Sequence[str], metric: str) -> bool:
    """No judge is asked about an answer that equals a gold, nor about none at all [C]."""
    return metric in JUDGES and bool(answer) and not exact_match(answer, golds)


def is_right(
    answer: str | None, golds: Sequence[str], metric: str, verdict: bool | None = None
) -> bool:
    """verdict: what the judge said, for metrics that have one; None, when it failed to say, is
    never right.
    """
    if metric in METRICS:
        return METRICS[metric](answer, golds)
    return exact_match(answer, golds) or (needs_judge(answer, golds, metric) and bool(verdict))


def solver_reward(
    text: str, golds: Sequence[str], metric: str, verdict: bool | None = None
) -> float:
    """1 if the last answer in what the model wrote itself is right by the metric, else 0 [P s3.2].

    text: the sampled turns of an episode, joined, without the observations. Writing the answer tag
    all over the place keeps only a quarter (reference: quark_score.py).
    """
    score = float(is_right(last_answer(text), golds, metric, verdict))
    tags = max(text.count("<answer>"), text.count("</answer>"))
    return score / 4 if tags > MAX_ANSWER_TAGS else score


# Rewards of the proposer, from the solver's scores on its question. All use the mean of the
# solver's rewards, as the paper's formula does; the reference counts every reward > 0 as solved, so
# there a quarter weighs as much as a one.


def one_minus_mean(scores_QG: np.ndarray) -> np.ndarray:
    """The main setting: the two roles share one unit of reward (SSP eq. 1, zero-sum)."""
    return 1.0 - scores_QG.mean(axis=1)


def intermediate(scores_QG: np.ndarray) -> np.ndarray:
    """Highest where the solver wins half of its games, 0 at both ends (reference:
    intermediate_difficulty).
    """
    solved_Q = scores_QG.mean(axis=1)
    return 4.0 * solved_Q * (1.0 - solved_Q)


def azr(scores_QG: np.ndarray) -> np.ndarray:
    """The harder the better, as long as somebody solves it (Absolute Zero, arXiv 2505.03335)."""
    solved_Q = scores_QG.mean(axis=1)
    return np.where(solved_Q > 0, 1.0 - solved_Q, 0.0)


def dr_zero(scores_QG: np.ndarray) -> np.ndarray:
    """(G - k) / (G - 1) for k of G solved, so 1 for a single success; 0 at both ends (Dr. Zero,
    arXiv 2601.07055).

    k is the sum of the rewards; a sum below one success (a lone quarter) counts as one, else it
    would earn more than 1.
    """
    attempts, solved_Q = scores_QG.shape[1], scores_QG.sum(axis=1)
    reward_Q = np.minimum(1.0, (attempts - solved_Q) / max(attempts - 1, 1))
    return np.where(solved_Q > 0, reward_Q, 0.0)


def variance(scores_QG: np.ndarray) -> np.ndarray:
    """exp(-(Var - 1/4)^2 / 0.02) of the solver's scores: 1 where half of them are right, the
    largest variance that scores in [0, 1] can have, and 0.04 where all agree (SPICE, arXiv
    2510.24684).
    """
    return np.exp(-np.square(scores_QG.var(axis=1) - 0.25) / 0.02)


def r_zero(scores_QG: np.ndarray) -> np.ndarray:
    """1 - 2 |s - 1/2|: falls evenly from half of the games won to both ends (R-Zero, arXiv
    2508.05004).
    """
    return 1.0 - 2.0 * np.abs(scores_QG.mean(axis=1) - 0.5)


def format_only(scores_QG: np.ndarray) -> np.ndarray:
    """Every verified question earns 1, however hard (reference: format_only)."""
    return np.ones(len(scores_QG))


PROPOSER_REWARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one_minus_mean": one_minus_mean,
    "intermediate": intermediate,
    "azr": azr,
    "dr_zero": dr_zero,
    "variance": variance,
    "r_zero": r_zero,
    "format_only": format_only,
}
