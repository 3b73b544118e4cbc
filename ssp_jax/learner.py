"""The update: pack episodes into fixed rows, accumulate gradients over micro-batches, one optimizer step.

Two jitted programs of fixed shape, whatever was played: `accumulate` adds one micro-batch's gradient to a donated
buffer, `apply` takes the optimizer step. A scan over micro-batches would tie the program to their number and compile
anew when it changes; a loop on the host costs one dispatch each, hidden behind the device's work.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssp_jax import attention, model, objective
from ssp_jax.data import InputError


class Trajectory(Protocol):
    """What the update needs of an episode."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def sampled(self) -> Sequence[bool]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """float32 master weights and moments. updates counts optimizer steps, bad_updates skipped ones in a row."""

    params: model.Params
    opt_state: Any
    updates: jax.Array
    bad_updates: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, [B, T] each. Column t is about predicting targets[t] = tokens[t + 1] inside one segment."""

    tokens_BT: Any  # int32
    targets_BT: Any  # int32
    positions_BT: Any  # int32, from 0 in every segment
    segments_BT: Any  # int32, 0 is padding
    weight_BT: Any  # float32: share in the loss; 0 where the target was not sampled
    advantage_BT: Any  # float32
    sampler_logp_BT: Any  # float32


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Config section `learner`, with the compute dtype, remat and the temperature that the sampler used."""

    model: model.ModelConfig
    dtype: Any
    remat: bool
    temperature: float
    learning_rate: float
    warmup_steps: int
    adam_b1: float
    adam_b2: float
    weight_decay: float
    max_grad_norm: float
    mini_batches: int
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


def optimizer(c: LearnerConfig) -> optax.GradientTransformation:
    """AdamW with linear warm-up to a constant rate, after clipping by the global norm."""
    rate = optax.schedules.linear_schedule(c.learning_rate / max(c.warmup_steps, 1), c.learning_rate, c.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(c.max_grad_norm),
        optax.adamw(rate, b1=c.adam_b1, b2=c.adam_b2, weight_decay=c.weight_decay),
    )


def init_state(c: LearnerConfig, params: model.Params) -> TrainState:
    return TrainState(params, optimizer(c).init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: rows of indices whose lengths sum to at most row_tokens."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_tokens:
            raise InputError(
                f"config key learner.row_tokens is {row_tokens} but an episode has {lengths[index]} tokens; "
                "expected at least limits.prompt_tokens + limits.response_tokens"
            )
        row = next((r for r, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def make_batches(c: LearnerConfig, episodes: Sequence[Trajectory], advantage_E: np.ndarray) -> list[Batch]:
    """Packed micro-batches of c.rows rows; weights make the loss a mean over all episodes given here."""
    weight_E = objective.sequence_weight(np.array([sum(e.sampled) for e in episodes]), c.aggregation)
    rows = pack([len(e.tokens) for e in episodes], c.row_tokens)
    batches = []
    for start in range(0, len(rows), c.rows):
        shape = (c.rows, c.row_tokens)
        ints = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "positions", "segments")}
        floats = {n: np.zeros(shape, np.float32) for n in ("weight", "advantage", "sampler_logp")}
        for b, row in enumerate(rows[start : start + c.rows]):
            at = 0
            for segment, index in enumerate(row, 1):
                e, n = episodes[index], len(episodes[index].tokens)
                place, head = np.s_[b, at : at + n], np.s_[b, at : at + n - 1]
                sampled = np.asarray(e.sampled[1:], np.float32)
                ints["tokens"][place] = e.tokens
                ints["targets"][head] = e.tokens[1:]
                ints["positions"][place] = np.arange(n)
                ints["segments"][place] = segment
                floats["weight"][head] = weight_E[index] * sampled
                floats["advantage"][head] = advantage_E[index]
                floats["sampler_logp"][head] = e.logprobs[1:]
                at += n
        batches.append(Batch(**{f"{n}_BT": x for n, x in (ints | floats).items()}))
    return batches


def score(c: LearnerConfig, params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [B, T] of the batch's targets."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention.packed(q, k, v, batch.segments_BT), None

    hidden_BTD = model.forward(
        c.model, params, batch.tokens_BT, batch.positions_BT, attend, dtype=c.dtype, remat=c.remat
    )
    weight_VD = model.head_weight(params)
    return objective.token_logprobs(hidden_BTD, weight_VD, batch.targets_BT, c.temperature, c.logprob_chunk)


def loss(
    c: LearnerConfig, params: model.Params, batch: Batch, old_logp_BT: jax.Array, ref_logp_BT: jax.Array | None
) -> tuple[jax.Array, objective.LossSums]:
    logp_BT, entropy_BT = score(c, params, batch)
    sums = objective.policy_loss(
        logp_BT,
        entropy_BT,
        old_logp_BT=old_logp_BT,
        sampler_logp_BT=batch.sampler_logp_BT,
        ref_logp_BT=ref_logp_BT,
        advantage_BT=batch.advantage_BT,
        weight_BT=batch.weight_BT,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        kl_coef=c.kl_coef,
        kl_type=c.kl_type,
        importance_cap=c.importance_cap,
    )
    return sums.loss, sums


class Learner:
    """Compiled programs for one configuration and mesh; all state is passed in and returned."""

    def __init__(self, c: LearnerConfig, reference: model.Params | None, put_batch: Callable[[Batch], Batch]):
        """reference: params of the initial model in the compute dtype, None when kl_coef is 0."""
        self._config, self._reference, self._put = c, reference, put_batch
        self._score = jax.jit(lambda params, batch: score(c, params, batch)[0])
        self._accumulate = jax.jit(functools.partial(_accumulate, c), donate_argnums=(0,))
        self._apply = jax.jit(functools.partial(_apply, c), donate_argnums=(0,))

    def warm_up(self, params: model.Params) -> None:
        """Compiles the long program by running it on a batch without tokens; its result is dropped."""
        shape = (self._config.rows, self._config.row_tokens)
        batch = self._put(Batch(*[np.zeros(shape, np.int32)] * 4, *[np.zeros(shape, np.float32)] * 3))
        old_logp_BT = self._old_logprobs(params, batch)
        jax.block_until_ready(self._accumulate(_zeros(params), params, self._reference, batch, old_logp_BT))

    def update(
        self, state: TrainState, episodes: Sequence[Trajectory], advantage_E: np.ndarray, order: np.random.Generator
    ) -> tuple[TrainState, dict[str, float]]:
        """All optimizer steps of one role: the episodes, shuffled by `order`, in c.mini_batches parts."""
        split = np.array_split(order.permutation(len(episodes)), self._config.mini_batches)
        parts = [sorted(part.tolist()) for part in split if len(part)]
        made = [make_batches(self._config, [episodes[i] for i in part], advantage_E[part]) for part in parts]
        batches = [[self._put(batch) for batch in part] for part in made]
        # Old log-probs belong to the policy before the first of these optimizer steps.
        old = [[self._old_logprobs(state.params, batch) for batch in part] for part in batches]
        reports = []
        for part, part_old in zip(batches, old, strict=True):
            grads, sums = _zeros(state.params)
            for batch, old_logp_BT in zip(part, part_old, strict=True):
                grads, sums = self._accumulate((grads, sums), state.params, self._reference, batch, old_logp_BT)
            state, norm = self._apply(state, grads)
            reports.append((sums, norm))
        tokens = sum(sum(episodes[i].sampled) for part in parts for i in part)
        length = sum(len(e.tokens) for e in episodes)
        cells = sum(len(part) for part in batches) * self._config.rows * self._config.row_tokens
        first = jax.device_get(reports[0][0])  # before any optimizer step of this update
        gap = {"logprob_gap": float(first.gap) / max(sum(sum(episodes[i].sampled) for i in parts[0]), 1)}
        gap["logprob_gap_max"] = float(first.gap_max)
        report = _report(reports, tokens) | gap
        return state, report | {"packed": length / max(cells, 1), "tokens": float(length)}

    def _old_logprobs(self, params: model.Params, batch: Batch) -> jax.Array:
        return batch.sampler_logp_BT if self._config.old_logprobs == "sampler" else self._score(params, batch)


@jax.jit
def _zeros(params: model.Params) -> tuple[model.Params, objective.LossSums]:
    """Where gradients and sums are added up: float32, laid out like the params."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params), objective.LossSums(*jnp.zeros((6,)))


def _accumulate(
    c: LearnerConfig,
    total: tuple[model.Params, objective.LossSums],
    params: model.Params,
    reference: model.Params | None,
    batch: Batch,
    old_logp_BT: jax.Array,
) -> tuple[model.Params, objective.LossSums]:
    ref_logp_BT = None if reference is None else score(c, reference, batch)[0]
    (_, sums), grads = jax.value_and_grad(functools.partial(loss, c), has_aux=True)(
        params, batch, old_logp_BT, ref_logp_BT
    )
    added = objective.LossSums(*(a + b for a, b in zip(total[1], sums, strict=True)))
    added = added._replace(gap_max=jnp.maximum(total[1].gap_max, sums.gap_max))
    return jax.tree.map(jnp.add, total[0], grads), added


def _apply(c: LearnerConfig, state: TrainState, grads: model.Params) -> tuple[TrainState, jax.Array]:
    """One optimizer step; a gradient that is not finite changes nothing but the count of bad updates."""
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm)
    updates, opt_state = optimizer(c).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(good, new, old)

    return TrainState(
        jax.tree.map(keep, params, state.params),
        jax.tree.map(keep, opt_state, state.opt_state),
        state.updates + good,
        jnp.where(good, 0, state.bad_updates + 1),
    ), norm


def _report(reports: list[tuple[objective.LossSums, jax.Array]], tokens: int) -> dict[str, float]:
    """Means over sampled tokens; the loss and the gradient norm are means over optimizer steps."""
    sums = jax.device_get([r[0] for r in reports])
    norms = np.array(jax.device_get([r[1] for r in reports]))

    def per_token(name: str) -> float:
        return float(sum(getattr(s, name) for s in sums) / max(tokens, 1))

    return {
        "loss": float(np.mean([s.loss for s in sums])),
        "kl": per_token("kl"),
        "entropy": per_token("entropy"),
        "clip_fraction": per_token("clipped"),
        "grad_norm": float(norms.mean()),
    }
