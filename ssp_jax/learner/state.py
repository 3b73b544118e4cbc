"""What the learner keeps between steps: parameters, optimizer, and the settings of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssp_jax.model import attention as attention
from ssp_jax.model import decoder, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """float32 master weights and moments. updates counts optimizer steps, bad_updates skipped ones
    in a row.
    """

    params: decoder.Params
    opt_state: Any
    updates: jax.Array
    bad_updates: jax.Array


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Config section `learner`, with compute dtype, remat (a key of model.REMAT) and the sampler's
    temperature.
    """

    model: decoder.ModelConfig
    dtype: Any
    remat: str
    temperature: float
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
    schedule: str = "constant"
    decay_steps: int = 1
    final_rate: float = 0.0
    momentum_dtype: str = "float32"
    offload_moments: bool = False
    offload_reference: bool = False
    # how rows are split over devices, None for one device
    rows_sharding: jax.sharding.NamedSharding | None = None
    attention: str = "xla"  # what attention.select_kernel() says


def learning_rate(c: LearnerConfig) -> optax.Schedule:
    """Linear warm-up, then constant, or down to final_rate * learning_rate by a cosine or a line
    over decay_steps.
    """
    top, last = c.learning_rate, c.learning_rate * c.final_rate
    warm = optax.schedules.linear_schedule(top / max(c.warmup_steps, 1), top, c.warmup_steps)
    if c.schedule == "constant":
        return warm
    down = {
        "cosine": optax.schedules.cosine_decay_schedule(top, c.decay_steps, c.final_rate),
        "linear": optax.schedules.linear_schedule(top, last, c.decay_steps),
    }
    return optax.schedules.join_schedules([warm, down[c.schedule]], [c.warmup_steps])


def optimizer(c: LearnerConfig) -> optax.GradientTransformation:
    """AdamW; `_apply` clips its gradients.

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
    """Fresh moments laid out like the params, in host memory if they are to live there."""
    # two: a donated buffer can be given once only
    counts = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    state = sharding.commit(TrainState(params, optimizer(c).init(params), *counts), params)
    if c.offload_moments:
        state = dataclasses.replace(
            state, opt_state=sharding.to_host(state.opt_state, "learner.offload_moments")
        )
    return state
