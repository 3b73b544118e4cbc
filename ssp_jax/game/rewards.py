"""Right answers and the rewards of both roles: pure functions of texts and small arrays."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ssp_jax.game.prompts import last_answer

MAX_ANSWER_TAGS = 10  # more opening or closing tags than this cost three quarters of the reward [C]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD, Search-R1)."""
    without_punctuation = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def comparable(text: str) -> str:
    """The normal form, or the bare lower-case text where nothing would be left of it.

    Deviation from Search-R1: there "A", "The" and "!" are all the empty text, equal to each other
    and to no answer.
    """
    return normalize_answer(text) or text.strip().lower()


def exact_match(prediction: str | None, golds: Sequence[str]) -> bool:
    """The prediction equals a gold in normal form. None: no answer was given, which is wrong."""
    if not prediction:
        return False
    return comparable(prediction) in {comparable(gold) for gold in golds}


def cover_exact_match(prediction: str | None, golds: Sequence[str]) -> bool:
    """One of the golds stands in the prediction as a sequence of whole words, in normal form."""
    words = f" {comparable(prediction or '')} "
    return any(f" {comparable(gold)} " in words for gold in golds)


def f1_score(prediction: str | None, golds: Sequence[str]) -> float:
    """SQuAD's F1 over the words of the normal form, the best over the golds."""
    predicted = comparable(prediction or "").split()
    return max((_f1(predicted, comparable(gold).split()) for gold in golds), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


METRICS: dict[str, Callable[[str | None, Sequence[str]], bool]] = {
    "em": exact_match,
    "cover_em": cover_exact_match,
}
JUDGES = ("policy", "openai")  # models that judge where exact match fails (judge.py)
METRIC_NAMES = (*METRICS, *JUDGES)  # values of config keys reward.metric and eval.judge


def needs_judge(answer: str | None, golds: Sequence[str], metric: str) -> bool:
    """No model is asked about an answer that equals a gold, nor about none at all [C].

    A function of the user's, FILE.py:NAME, is asked about every answer.
    """
    if not answer or metric in METRICS:
        return False
    return metric not in JUDGES or not exact_match(answer, golds)


def is_right(
    answer: str | None, golds: Sequence[str], metric: str, verdict: bool | None = None
) -> bool:
    """Whether an answer is right by a metric of METRIC_NAMES, or by a function of the user's.

    verdict: the judge's, where it is asked. None, of a judge that failed, is never right.
    """
    if metric in METRICS:
        return METRICS[metric](answer, golds)
    if needs_judge(answer, golds, metric):
        return bool(verdict)
    return exact_match(answer, golds)


def solver_reward(
    text: str, golds: Sequence[str], metric: str, verdict: bool | None = None
) -> float:
    """1 if the last answer in what the model wrote itself is right by the metric, else 0 [P s3.2].

    text: the sampled turns of an episode, joined, without the observations. More than
    MAX_ANSWER_TAGS answer tags leave a quarter of the reward (reference: quark_score.py).
    """
    score = float(is_right(last_answer(text), golds, metric, verdict))
    tags = max(text.count("<answer>"), text.count("</answer>"))
    return score / 4 if tags > MAX_ANSWER_TAGS else score


# Rewards of the proposer, from the solver's scores on its questions, of which s is the mean, as in
# the paper's formula. The reference counts every score > 0 as solved, so there a quarter weighs as
# much as a one.


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
    attempts = scores_QG.shape[1]
    solved_Q = scores_QG.sum(axis=1)
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
