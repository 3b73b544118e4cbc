"""What the learner keeps between steps: parameters, optimizer, and the settings of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssp_jax.model import decoder, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes; the weights and their moments are float32."""

    params: decoder.Params
    opt_state: Any
    updates: jax.Array  # int32 []: optimizer steps taken
    bad_updates: jax.Array  # int32 []: optimizer steps skipped in a row, up to now


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Config section `learner`, and what else the update depends on."""

    model: decoder.ModelConfig
    dtype: Any  # of the arithmetic
    remat: str  # a key of decoder.REMAT
    temperature: float  # of the sampler
    learning_rate: float
    warmup_steps: int
    adam_b1: float
    adam_b2: float
    weight_decay: float
    max_grad_norm: float
    row_tokens: int
    rows: int
    logprob_chunk: int
    clip_low: float
    clip_high: float
    kl_coef: float
    kl_type: str
    aggregation: str
    old_logprobs: str
    importance_cap: float
    clip_dual: float = 0.0  # 0: none
    kl_bound: float = 0.0  # 0: none
    response_tokens: int = 1  # the longest response: the divisor of aggregation = "constant"
    drop_no_advantage: bool = False
    supervised: bool = False  # the loss is objective.likelihood_loss, without ratios
    schedule: str = "constant"
    decay_steps: int = 1
    final_rate: float = 0.0
    momentum_dtype: str = "float32"
    offload_moments: bool = False
    offload_reference: bool = False
    rows_sharding: jax.sharding.NamedSharding | None = None  # of packed rows; None: one device
    attention: str = "xla"  # what attention.select_kernel() returned


def learning_rate(c: LearnerConfig) -> optax.Schedule:
    """Linear warm-up, then constant, or down to final_rate * learning_rate over decay_steps."""
    top = c.learning_rate
    last = c.learning_rate * c.final_rate
    warmup = optax.schedules.linear_schedule(top / max(c.warmup_steps, 1), top, c.warmup_steps)
    if c.schedule == "constant":
        return warmup
    if c.schedule == "cosine":
        decay = optax.schedules.cosine_decay_schedule(top, c.decay_steps, c.final_rate)
    else:
        decay = optax.schedules.linear_schedule(top, last, c.decay_steps)
    return optax.schedules.join_schedules([warmup, decay], [c.warmup_steps])


def optimizer(c: LearnerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) without clipping, which update.py does before it.

    Only the first moment may be bfloat16: the second moves by a share of 1 - b2 = 0.001 a step,
    which is less than half of bfloat16's spacing, so it would stand still.
    """
    return optax.adamw(
        learning_rate(c),
        b1=c.adam_b1,
        b2=c.adam_b2,
        weight_decay=c.weight_decay,
        mu_dtype=jnp.dtype(c.momentum_dtype),
    )


def init_state(c: LearnerConfig, params: decoder.Params) -> TrainState:
    """Fresh moments laid out like the params; with c.offload_moments they lie in host memory."""
    state = TrainState(
        params=params,
        opt_state=optimizer(c).init(params),
        # two arrays: a buffer can be donated only once
        updates=jnp.zeros((), jnp.int32),
        bad_updates=jnp.zeros((), jnp.int32),
    )
    state = sharding.commit(state, params)
    if c.offload_moments:
        opt_state = sharding.to_host(state.opt_state, "learner.offload_moments")
        state = dataclasses.replace(state, opt_state=opt_state)
    return state
