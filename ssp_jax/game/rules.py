"""The rules: episodes of each role, well-formed questions, and the names of faults."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ssp_jax.game.rewards import cover_exact_match

# Pairs of algorithms [P Table 6]: proposer_solver -> (proposer, solver). grpo plays a group and
# centres on it; reinforce plays one and centres on nothing; reinforcepp (REINFORCE++, arXiv
# 2501.03262) normalises over the whole batch.
RL_PAIRS = {
    "reinforce_grpo": ("reinforce", "grpo"),
    "reinforce_reinforce": ("reinforce", "reinforce"),
    "reinforcepp_grpo": ("reinforcepp", "grpo"),
    "grpo_reinforce": ("grpo", "reinforce"),
    "grpo_reinforcepp": ("grpo", "reinforcepp"),
    "grpo_grpo": ("grpo", "grpo"),
}

# Values of config keys; configs/default.py says what each means.
Trained = Literal["both", "solver", "proposer"]
NoiseUnit = Literal["passage", "trajectory"]
NoiseSource = Literal["previous_step", "same_step"]
BatchFill = Literal["dummy", "resample", "full_reuse", "periodic_reset"]
ProposerBaseline = Literal["none", "batch_mean", "leave_one_out", "hop_grouped"]

# The most rows and attempts of one role in a step: an episode's id (roles.episode_id) has bits for
# so many.
ID_ROWS = 1 << 19
ID_ATTEMPTS = 1 << 9


# Config sections, typed; configs/default.py has units and sources.


@dataclass(frozen=True)
class GameSection:
    """Config section `game`."""

    answers_per_step: int
    group_size: int
    rl_pair: str
    train: Trained
    verify: bool
    noise_documents: int
    noise_unit: NoiseUnit
    noise_source: NoiseSource
    batch_fill: BatchFill
    reset_interval: int
    pool_reuse: int
    resample_rounds: int


@dataclass(frozen=True)
class QuestionRules:
    """Config section `rules`: what a question must satisfy."""

    min_chars: int
    max_chars: int
    min_words: int
    min_searches: int
    distinct_searches: bool
    forbid_answer_in_search: bool
    forbid_found_at_once: bool


@dataclass(frozen=True)
class RewardSection:
    """Config section `reward`."""

    metric: str  # of rewards.METRIC_NAMES
    proposer: str  # of rewards.PROPOSER_REWARDS
    invalid_question: float


@dataclass(frozen=True)
class GameConfig:
    """What a round of the game depends on, beside the model and the search."""

    seed: int
    game: GameSection
    rules: QuestionRules
    reward: RewardSection
    top_k: int  # passages of a search
    temperature: float  # of proposers and solvers
    verify_temperature: float
    grpo_std: bool
    proposer_baseline: ProposerBaseline

    @property
    def algorithms(self) -> tuple[str, str]:
        """Of the proposer and of the solver."""
        return RL_PAIRS[self.game.rl_pair]

    @property
    def proposals(self) -> int:
        """Proposals for each given answer."""
        return group_sizes(self.game.rl_pair, self.game.group_size)[0]

    @property
    def attempts(self) -> int:
        """Attempts at each question."""
        return group_sizes(self.game.rl_pair, self.game.group_size)[1]


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
# Of a question that should take several searches (rules.forbid_found_at_once).
SEARCH_FAULTS = ("found_at_once",)
# Of well-formed questions: the verifier's answer is not right, or its prompt is longer than
# limits.verify_prompt_tokens.
VERIFICATION_FAULTS = ("unverified", "too_long_to_verify")
# The given answer, or the question, makes a prompt longer than limits.prompt_tokens.
PROMPT_FAULTS = ("too_long_to_propose", "too_long_to_solve")
FAULTS = (*QUESTION_FAULTS, *SEARCH_FAULTS, *PROMPT_FAULTS, *VERIFICATION_FAULTS)


def group_sizes(rl_pair: str, group_size: int) -> tuple[int, int]:
    """Proposals for each given answer, and attempts at each question [P T4].

    A role that is trained with GRPO plays group_size of them, any other role plays one.
    """
    proposer, solver = (group_size if name == "grpo" else 1 for name in RL_PAIRS[rl_pair])
    return proposer, solver


def question_fault(
    question: str | None,
    answer: str,
    queries: Sequence[str],
    num_documents: int,
    rules: QuestionRules,
    aliases: Sequence[str] = (),
) -> str | None:
    """The first fault, in the order of QUESTION_FAULTS, of a question; None if it is well-formed.

    A malformed question is an ordinary outcome of the game, so nothing here raises. As in the
    reference (problem_extraction.py), the answer counts as revealed when its lower-cased text is a
    substring of the lower-cased question: "1" is revealed by "1990" and "Iran" by "Tirana", and no
    normalisation is applied. An alias, which the reference does not have, counts as a whole word or
    words: it may be as short as "US". Queries repeat when they are the same string. A question
    without any retrieved document cannot be verified and never passes.
    """
    text = (question or "").strip()
    hidden = answer.strip().lower()

    def reveals(words: str) -> bool:
        return hidden in words.lower() or cover_exact_match(words, aliases)

    broken = {
        "no_question": question is None,
        "empty": not text,
        "too_short": len(text) < rules.min_chars,
        "too_long": len(text) > rules.max_chars,
        "too_few_words": len(text.split()) < rules.min_words,
        "answer_in_question": reveals(text),
        "too_few_searches": len(queries) < rules.min_searches,
        "repeated_search": rules.distinct_searches and len(set(queries)) < len(queries),
        "answer_in_search": rules.forbid_answer_in_search and any(map(reveals, queries)),
        "no_documents": num_documents < 1,
    }
    return next((fault for fault in QUESTION_FAULTS if broken[fault]), None)
