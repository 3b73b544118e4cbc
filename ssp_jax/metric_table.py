"""What each number of metrics.jsonl and TensorBoard means.

In names ROLE stands for solver, proposer, or both (learner.update_order = combined), and SET for
the name of an evaluation set, or average; its percentages have a 95 % interval beside them, as
NAME_low and NAME_high. The page docs/metrics.md is made from this table.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """written: where it is there, "" for always."""

    name: str
    unit: str
    meaning: str
    written: str = ""


_JUDGED = "a model judges (`reward.metric`)"
_SHOWN = "`prompt.worked_examples` is not 0"
_LORA = "`lora.rank` is not 0"
_PLACED = "the first update has such tokens"
_LOOK = "a look is due (`warm_start.look_every`)"

# Heading -> metrics.
METRICS = {
    "Each line": (
        Metric(
            "step", "steps", "Steps of self-play so far; an evaluation has that of its weights."
        ),
        Metric("time", "s", "When the line was written, since 1970."),
        Metric("seconds", "s", "A whole step, without saves and evaluations."),
        Metric(
            "changes",
            "keys",
            "Config keys that steps after this one have anew, each with its values before and now.",
            "a run goes on with other values, in a line of its own",
        ),
        Metric("compiles", "programs", "XLA compilations of this process so far."),
    ),
    "The funnel of questions": (
        Metric("funnel/proposed", "questions", "Proposals of the step."),
        Metric("funnel/well_formed", "questions", "Of these, those that keep all rules."),
        Metric(
            "funnel/verified", "questions", "Of these, those that the verifier answered rightly."
        ),
        Metric(
            "funnel/reused", "questions", "Questions from the pool, played for those that failed."
        ),
        Metric("funnel/distinct", "questions", "Different ones that were played."),
        Metric("funnel/solved", "share", "Of attempts at new questions that were right."),
    ),
    "Why proposals failed: the first reason of each": (
        Metric("fault/no_question", "proposals", "The episode has no question in its tags."),
        Metric("fault/empty", "proposals", "The question is empty."),
        Metric("fault/too_short", "proposals", "It has fewer characters than rules.min_chars."),
        Metric("fault/too_long", "proposals", "It has more characters than rules.max_chars."),
        Metric("fault/too_few_words", "proposals", "It has fewer words than rules.min_words."),
        Metric("fault/answer_in_question", "proposals", "It has the given answer in it."),
        Metric("fault/too_few_searches", "proposals", "Fewer searches than rules.min_searches."),
        Metric("fault/repeated_search", "proposals", "A query twice (rules.distinct_searches)."),
        Metric(
            "fault/answer_in_search", "proposals", "A query has the answer in it, where forbidden."
        ),
        Metric("fault/no_documents", "proposals", "No search found anything."),
        Metric(
            "fault/found_at_once", "proposals", "One search finds it (rules.forbid_found_at_once)."
        ),
        Metric(
            "fault/too_long_to_propose", "proposals", "The given answer makes too long a prompt."
        ),
        Metric("fault/too_long_to_solve", "proposals", "The question makes too long a prompt."),
        Metric("fault/unverified", "proposals", "The verifier's answer is not the given one."),
        Metric("fault/too_long_to_verify", "proposals", "The documents make too long a prompt."),
    ),
    "What was behind them": (
        Metric("cause/no_question/loop", "proposals", "Its last search, or turn, repeats itself."),
        Metric("cause/no_question/turn_tokens", "proposals", "Cut by limits.turn_tokens."),
        Metric("cause/no_question/response_tokens", "proposals", "Cut by limits.response_tokens."),
        Metric("cause/no_question/cache_tokens", "proposals", "Cut by engine.cache_tokens."),
        Metric("cause/no_question/turns", "proposals", "Ended by limits.turns."),
        Metric("cause/no_question/searches", "proposals", "Ended by limits.searches."),
        Metric(
            "cause/no_question/malformed_search", "proposals", "A search without its opening tag."
        ),
        Metric("cause/no_question/no_tags", "proposals", "Ended by itself, without the tags."),
        Metric("cause/no_question/no_opening_tag", "proposals", "The closing tag alone."),
        Metric("cause/no_documents/no_search", "proposals", "Nothing was searched for."),
        Metric("cause/no_documents/nothing_found", "proposals", "Its searches found nothing."),
        Metric("cause/unverified/loop", "proposals", "The verifier repeats itself."),
        Metric("cause/unverified/turn_tokens", "proposals", "It is cut by limits.turn_tokens."),
        Metric(
            "cause/unverified/response_tokens", "proposals", "By limits.verify_response_tokens."
        ),
        Metric("cause/unverified/cache_tokens", "proposals", "By engine.cache_tokens."),
        Metric("cause/unverified/no_tags", "proposals", "It gives no answer in tags."),
        Metric("cause/unverified/no_opening_tag", "proposals", "The closing tag alone."),
        Metric("cause/unverified/wordy", "proposals", "The given answer, and other words."),
        Metric("cause/unverified/other_answer", "proposals", "An answer without the given one."),
    ),
    "What limits cut; of more than a tenth the console says it once": (
        Metric("cut/results", "share", "Of search results, cut to limits.observation_tokens."),
        Metric("cut/prompts", "share", "Of games, refused by limits.prompt_tokens."),
        Metric(
            "cut/verifier_prompts", "share", "Of verifiers, refused by limits.verify_prompt_tokens."
        ),
        Metric("cut/turns", "share", "Of episodes of all roles, ended by limits.turn_tokens."),
        Metric(
            "cut/responses", "share", "Of proposers and solvers, ended by limits.response_tokens."
        ),
    ),
    "The roles": (
        Metric(
            "verifier/noise", "documents", "Foreign documents that a verifier read, on average."
        ),
        Metric("reward/proposer", "reward", "Mean over all proposals, failed ones included."),
        Metric("reward/solver", "reward", "Mean over all attempts, reused questions included."),
        Metric("solver/answered", "share", "Of solver episodes that ended with an answer."),
        Metric("solver/searches", "searches", "Of a solver episode, on average."),
        Metric("solver/tokens", "tokens", "Sampled in a solver episode, on average."),
        Metric(
            "solver/length", "tokens", "Prompt, sampled and inserted tokens of a solver episode."
        ),
        Metric("proposer/searches", "searches", "Of a proposer episode, on average."),
        Metric("proposer/tokens", "tokens", "Sampled in a proposer episode, on average."),
        Metric("proposer/length", "tokens", "Prompt, sampled and inserted tokens of one."),
        Metric(
            "proposer/leak", "share", "Of its episodes that write a name of an example.", _SHOWN
        ),
        Metric("verifier/leak", "share", "Likewise, where its materials have none.", _SHOWN),
        Metric("solver/leak", "share", "Likewise, where its question has none.", _SHOWN),
        Metric("judge/asked", "verdicts", "Answers that the judge was asked about.", _JUDGED),
        Metric("judge/failed", "verdicts", "Of these, those without a verdict.", _JUDGED),
    ),
    "Play": (
        Metric("play/seconds", "s", "Of the slowest process."),
        Metric("play/episodes", "episodes", "Of all roles and processes."),
        Metric("play/tokens_per_second", "tokens/s", "Sampled tokens of all processes."),
        Metric(
            "play/written_tokens_per_second", "tokens/s", "Prompts and inserted results computed."
        ),
        Metric("play/occupancy", "share", "Of decode steps of slots in which a token was sampled."),
        Metric("play/stalled", "share", "Of decode steps of slots that waited for cache memory."),
        Metric("play/waiting", "share", "Of the processes' time spent waiting for the slowest."),
        Metric("play/searches_per_second", "searches/s", "Of all processes."),
    ),
    "The update": (
        Metric("update/seconds", "s", "All updates of a step."),
        Metric("update/tokens", "tokens", "In packed rows of all updates, prompts included."),
        Metric("update/tokens_per_second", "tokens/s", "update/tokens in update/seconds."),
        Metric(
            "update/logprob_gap", "nats", "Between sampler and learner, mean of a sampled token."
        ),
        Metric("update/logprob_gap_max", "nats", "The same, the largest of a token."),
        Metric(
            "update/logprob_gap_0_1k",
            "nats",
            "The mean of tokens with fewer than 1,024 tokens of their episode before them.",
            _PLACED,
        ),
        Metric("update/logprob_gap_1k_4k", "nats", "With 1,024 to 4,095 before them.", _PLACED),
        Metric("update/logprob_gap_4k", "nats", "With 4,096 or more before them.", _PLACED),
        Metric("update/ROLE/loss", "loss", "Mean over the optimizer steps."),
        Metric(
            "update/ROLE/kl", "nats", "Of a sampled token, to the initial model (learner.kl_type)."
        ),
        Metric("update/ROLE/entropy", "nats", "Of the policy at a sampled token."),
        Metric("update/ROLE/clip_fraction", "share", "Of sampled tokens that a bound has changed."),
        Metric(
            "update/ROLE/grad_norm", "norm", "Of the gradient before clipping, mean over steps."
        ),
        Metric("update/ROLE/learning_rate", "rate", "Of the last optimizer step."),
        Metric("update/ROLE/packed", "share", "Of the rows' places that have a token."),
        Metric("update/ROLE/tokens", "tokens", "In packed rows, prompts included."),
    ),
    "A warm start, which plays no game": (
        Metric("warm_start/loss", "nats", "Of a token of the players' own, in the step."),
        Metric("warm_start/entropy", "nats", "Of the model at such a token."),
        Metric("warm_start/grad_norm", "norm", "Of the gradient before clipping."),
        Metric(
            "warm_start/held_out_loss", "nats", "The loss of games that are not trained on.", _LOOK
        ),
        Metric(
            "warm_start/form",
            "share",
            "Of held-out turns, continued greedily, that end with a search, question or answer.",
            _LOOK,
        ),
    ),
    "LoRA": (
        Metric("lora/parameters", "parameters", "Trained ones.", _LORA),
        Metric("lora/share", "share", "Of all parameters that are trained.", _LORA),
    ),
    "Memory of the fullest device of a host; on a CPU, of the process": (
        Metric(
            "memory/play_gib", "GiB", "The peak of play, or the highest so far on accelerators."
        ),
        Metric("memory/update_gib", "GiB", "The peak of the update, likewise."),
    ),
    "Evaluations, in lines of their own": (
        Metric("eval/SET/right", "%", "Answers that are right by eval.judge."),
        Metric("eval/SET/em", "%", "Exact match."),
        Metric("eval/SET/cover_em", "%", "A golden answer stands in the answer."),
        Metric("eval/SET/f1", "%", "F1 over words, the best of the golden answers."),
        Metric("eval/SET/searches", "searches", "Of an episode, on average."),
        Metric("eval/SET/tokens", "tokens", "Sampled in an episode, on average."),
        Metric("eval/SET/n", "questions", "Of the set."),
    ),
}


_MEANINGS = {metric.name: metric.meaning for group in METRICS.values() for metric in group}


def meaning(name: str) -> str:
    """What a metric of a step means."""
    return _MEANINGS[re.sub("^update/(solver|proposer|both)/", "update/ROLE/", name)]
