"""The values that a key may have: one of a few names, or a number of a range."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ssp_jax.errors import InputError
from ssp_jax.game import examples, prompts, rewards, rules
from ssp_jax.retriever import settings
from ssp_jax.user_code import load

# Keys whose value is one of a few names.
CHOICES: dict[str, Iterable[str]] = {
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("full", "attention", "dots", "none"),
    "model.attention": ("auto", "splash", "flash", "xla"),
    "prompt.style": prompts.STYLES,
    "prompt.template": ("chat", "raw_chatml"),
    "game.rl_pair": rules.RL_PAIRS,
    "retriever.kind": (*settings.INDEX_KINDS, "http"),
    "retriever.stemmer": settings.STEMMERS,
    "retriever.stopwords": settings.STOPWORDS,
    "retriever.pooling": settings.POOLINGS,
    "retriever.device_dtype": settings.DTYPES,
    "game.train": get_args(rules.Trained),
    "game.noise_unit": get_args(rules.NoiseUnit),
    "game.noise_source": get_args(rules.NoiseSource),
    "game.batch_fill": get_args(rules.BatchFill),
    "reward.metric": rewards.METRIC_NAMES,
    "eval.judge": rewards.METRIC_NAMES,
    "reward.proposer": rewards.PROPOSER_REWARDS,
    "engine.schedule": ("pipelined", "barrier"),
    "learner.kl_type": ("k1", "k2", "k3"),
    "learner.proposer_baseline": get_args(rules.ProposerBaseline),
    "learner.aggregation": ("sequence_mean", "token_mean", "constant"),
    "learner.schedule": ("constant", "cosine", "linear"),
    "learner.momentum_dtype": ("float32", "bfloat16"),
    "learner.update_order": ("solver_first", "proposer_first", "combined"),
    "learner.old_logprobs": ("sampler", "recompute"),
    "warm_start.keep": ("right", "all"),
    "checkpoint.export": ("auto", "model", "adapter", "none"),
}

# Of these, the keys that also take a function or class of the user's own file.
USER_CODE = ("reward.metric", "eval.judge", "retriever.kind")


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have: from `low` to `high`."""

    low: float
    high: float
    above: bool = False  # low itself is too low
    below: bool = False  # high itself is too high
    zero: bool = False  # 0 is one of them, whatever low is

    def check(self, what: str, value: float) -> None:
        """what: the key or flag."""
        high = f"{self.high:.15g}"
        if isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif value < self.low or (self.above and value == self.low):
            if self.zero and value == 0:
                return
            to = "less than" if self.below else "up to"
            expected = f"{self._minimum()}, {to} {high}"
        elif value > self.high or (self.below and value == self.high):
            limit = "less than" if self.below else "at most"
            expected = f"{limit} {high}"
        else:
            return
        shown: object = value
        if isinstance(value, int) and abs(value) > 1e30:
            shown = f"a number of {value.bit_length()} bits"
        raise InputError(f"{what} is {shown}; expected {expected}")

    def _minimum(self) -> str:
        bound = "more than" if self.above else "at least"
        minimum = f"{bound} {self.low:.15g}"
        return f"0, or {minimum}" if self.zero else minimum


_INT32 = (1 << 31) - 1  # of JAX's arrays and counters
_WHOLE = Range(0, _INT32)
_COUNT = Range(0, _INT32, above=True)
_ROWS = Range(0, rules.ID_ROWS, above=True)
_TOKENS = Range(0, 1 << 24, above=True)  # float32 has each position up to there
_FACTOR = Range(0, 1e6)
_SECONDS = Range(0, 86_400, above=True)  # sockets know no longer ones than some weeks
_RETRIES = Range(0, 1000)
# below, float32 logits and gradients overflow; 0 is greedy
_TEMPERATURE = Range(0.01, 100, zero=True)
_DEVICES = Range(-1, 1 << 20)

# Every key that is a number, or a tuple of them.
BOUNDS: dict[str, Range] = {
    "seed": Range(0, (1 << 32) - 1),  # JAX's generators take 32 bits and drop the rest
    "steps": _WHOLE,
    "lora.rank": _WHOLE,
    "lora.alpha": Range(0, 1e6, above=True),
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "mesh.tensor": _DEVICES,
    "retriever.threads": Range(0, 4096),
    "retriever.timeout_s": _SECONDS,
    "retriever.retries": _RETRIES,
    "retriever.top_k": Range(0, 10_000, above=True),
    "retriever.device_gib": Range(settings.ALL, 1e6),
    "retriever.k1": Range(0, 1000),
    "retriever.b": Range(0, 1),
    "prompt.worked_examples": Range(0, examples.MOST),
    "game.answers_per_step": _ROWS,
    "game.group_size": Range(0, rules.ID_ATTEMPTS, above=True),
    "game.noise_documents": Range(0, 10_000),
    "game.reset_interval": _COUNT,
    "game.pool_reuse": Range(0, rules.ID_ROWS),
    "game.resample_rounds": Range(0, rules.ID_ATTEMPTS - 1, above=True),
    "rules.min_searches": _WHOLE,
    "rules.min_chars": _WHOLE,
    "rules.max_chars": _COUNT,
    "rules.min_words": _WHOLE,
    "reward.invalid_question": Range(-1e6, 1e6),
    "judge.concurrency": Range(0, 10_000, above=True),
    "judge.timeout_s": _SECONDS,
    "judge.retries": _RETRIES,
    "judge.max_tokens": _TOKENS,
    "limits.prompt_tokens": _TOKENS,
    "limits.verify_prompt_tokens": _TOKENS,
    "limits.response_tokens": _TOKENS,
    "limits.verify_response_tokens": _TOKENS,
    "limits.turn_tokens": _TOKENS,
    "limits.turns": _COUNT,
    "limits.searches": _COUNT,
    "limits.observation_tokens": _TOKENS,
    "sampling.temperature": dataclasses.replace(_TEMPERATURE, zero=False),
    "sampling.verify_temperature": _TEMPERATURE,
    "sampling.top_k": _WHOLE,
    "sampling.top_p": Range(0, 1, above=True),
    "sampling.eval_temperature": _TEMPERATURE,
    "engine.slots": _ROWS,
    "engine.chunk": Range(0, 1 << 16, above=True),
    "engine.cache_tokens": _TOKENS,
    "engine.cache_buckets": _TOKENS,
    "engine.row_shares": Range(0, 1, above=True),
    "engine.kv_cache_gib": _FACTOR,
    "engine.extend_buckets": _TOKENS,
    "engine.extend_rows": _ROWS,
    "learner.learning_rate": Range(0, 1, above=True),
    "learner.warmup_steps": _WHOLE,
    "learner.decay_steps": _COUNT,
    "learner.final_rate": Range(0, 1),
    "learner.adam_b1": Range(0, 1, below=True),
    "learner.adam_b2": Range(0, 1, below=True),
    "learner.weight_decay": Range(0, 100),
    "learner.max_grad_norm": Range(0, 1e9, above=True),
    "learner.solver_mini_batches": _ROWS,
    "learner.proposer_mini_batches": _ROWS,
    "learner.row_tokens": _TOKENS,
    "learner.rows": _ROWS,
    "learner.logprob_chunk": _TOKENS,
    "learner.clip_low": _FACTOR,
    "learner.clip_high": _FACTOR,
    "learner.clip_dual": Range(1, 1e6, above=True, zero=True),
    "learner.kl_coef": _FACTOR,
    "learner.kl_bound": _FACTOR,
    "learner.importance_cap": Range(0, 1e9, above=True),
    "learner.max_bad_updates": _COUNT,
    "eval.every": _WHOLE,
    "eval.max_questions": _WHOLE,
    "warm_start.held_out": Range(0, 1, above=True, below=True),
    "warm_start.steps": _WHOLE,
    "warm_start.episodes_per_step": _ROWS,
    "warm_start.learning_rate": Range(0, 1, above=True),
    "warm_start.stop_loss": _FACTOR,
    "warm_start.look_every": _COUNT,
    "warm_start.form_prompts": _WHOLE,
    "checkpoint.every": _WHOLE,
    "checkpoint.minutes": Range(0, 1e6),
    "checkpoint.keep": _COUNT,
    "log.episodes_every": _WHOLE,
}


def check_each(values: Mapping[str, Any]) -> None:
    """Raises InputError for a value that is none of a key's names, or out of its range."""
    for key, names in CHOICES.items():
        is_own = key in USER_CODE and load.is_one(values[key])
        if values[key] not in names and not is_own:
            own = ", or FILE.py:NAME" if key in USER_CODE else ""
            raise InputError(
                f"config key {key} is {values[key]!r}; expected one of {', '.join(names)}{own}"
            )
    for key, bounds in BOUNDS.items():
        value = values[key]
        for number in value if isinstance(value, tuple) else (value,):
            bounds.check(f"config key {key}", number)
