"""The update: pack episodes into fixed rows, accumulate gradients over micro-batches, one optimizer
step.

Jitted programs of fixed shape, whatever was played: `accumulate` adds one micro-batch's gradient to
a donated buffer, `apply` takes the optimizer step. A scan over micro-batches would tie the program
to their number and compile anew when it changes; a loop on the host costs one dispatch each, hidden
behind the device's work.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssp_jax.learner import objective
from ssp_jax.learner.batches import Batch, Trajectory, make_batches
from ssp_jax.learner.logprobs import token_logprobs
from ssp_jax.learner.state import LearnerConfig, TrainState, optimizer
from ssp_jax.model import attention as attention
from ssp_jax.model import decoder, sharding

# What to change where the update does not fit.
MEMORY_REMEDY = (
    "more devices for mesh.fsdp or mesh.tensor, a smaller learner.rows or learner.row_tokens, model.remat=full, "
    "learner.offload_moments or learner.offload_reference"
)


def _attention(c: LearnerConfig) -> Callable[..., jax.Array]:
    """Of packed rows: (q, k, v, segments) -> o. The kernel is interpreted on what is no TPU, which
    tests ask for.
    """
    if c.attention == "xla":
        return attention.packed
    rows = c.rows_sharding
    platform = jax.default_backend() if rows is None else rows.mesh.devices.flat[0].platform
    return sharding.on_own_rows_and_heads(
        functools.partial(attention.splash, interpret=platform != "tpu"), rows
    )


def score(c: LearnerConfig, params: decoder.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [B, T] of the batch's sampled targets, 0 elsewhere."""

    packed = _attention(c)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return packed(q, k, v, batch.segments_BT), None

    def place(x_BTD: jax.Array) -> jax.Array:
        return (
            x_BTD
            if c.rows_sharding is None
            else jax.lax.with_sharding_constraint(x_BTD, c.rows_sharding)
        )

    hidden_BTD = decoder.forward(
        c.model,
        params,
        batch.tokens_BT,
        batch.positions_BT,
        attend,
        dtype=c.dtype,
        remat=c.remat,
        place=place,
    )
    weight_VD = decoder.head_weight(params)
    wanted_BT = batch.weight_BT != 0
    return token_logprobs(
        hidden_BTD,
        weight_VD,
        batch.targets_BT,
        wanted_BT,
        c.temperature,
        c.logprob_chunk,
        c.rows_sharding,
    )


def loss(
    c: LearnerConfig,
    params: decoder.Params,
    batch: Batch,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
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
        clip_dual=c.clip_dual,
        kl_bound=c.kl_bound,
    )
    return sums.loss, sums


class Learner:
    """Compiled programs for one configuration and mesh; all state is passed in and returned."""

    def __init__(
        self,
        c: LearnerConfig,
        state: TrainState,
        reference: decoder.Params | None,
        put_batch: Callable[[Batch], Batch],
    ):
        """state: how the train state is laid out. reference: the initial model in the compute
        dtype, or None.
        """
        if reference is not None and c.offload_reference:
            reference = sharding.to_host(reference, "learner.offload_reference")
        self._config, self._reference, self._put = c, reference, put_batch
        # Told and not left to XLA: a gradient or moment that comes out whole on every device does
        # not fit there.
        layout = sharding.device_layout(state)
        self._score = jax.jit(lambda params, batch: score(c, params, batch)[0])
        self._accumulate = jax.jit(
            functools.partial(_accumulate, c),
            donate_argnums=(0,),
            out_shardings=(layout.params, None),
        )
        self._apply = jax.jit(
            functools.partial(_apply, c), donate_argnums=(0,), out_shardings=(layout, None)
        )
        self._no_gradient = jax.jit(_zeros, out_shardings=(layout.params, None))

    def warm_up(self, params: decoder.Params) -> None:
        """Compiles the long programs by running them on a batch without tokens; the result is
        dropped.
        """
        shape = (self._config.rows, self._config.row_tokens)
        batch = self._put(
            Batch(*[np.zeros(shape, np.int32)] * 4, *[np.zeros(shape, np.float32)] * 3)
        )
        old, reference = self._old_logprobs(params, [[batch]]), self._reference_logprobs([[batch]])
        arguments = (params, batch, old[0][0], reference[0][0])
        jax.block_until_ready(self._accumulate(self._accumulate(None, *arguments), *arguments))

    def update(
        self,
        state: TrainState,
        episodes: Sequence[Trajectory],
        advantage_E: np.ndarray,
        order: np.random.Generator,
        mini_batches: int = 1,
    ) -> tuple[TrainState, dict[str, float]]:
        """All optimizer steps of one role: the episodes, shuffled by `order`, in mini_batches
        parts.
        """
        split = np.array_split(order.permutation(len(episodes)), mini_batches)
        parts = [sorted(part.tolist()) for part in split if len(part)]
        made = [
            make_batches(self._config, [episodes[i] for i in part], advantage_E[part])
            for part in parts
        ]
        batches = [[self._put(batch) for batch in part] for part in made]
        reference = self._reference_logprobs(batches)
        # Old log-probs belong to the policy before the first of these optimizer steps.
        old = self._old_logprobs(state.params, batches)
        reports = []
        for part in zip(batches, old, reference, strict=True):
            # no rows: everything was dropped
            total: Any = None if part[0] else self._no_gradient(state.params)
            for batch, old_logp_BT, ref_logp_BT in zip(*part, strict=True):
                total = self._accumulate(total, state.params, batch, old_logp_BT, ref_logp_BT)
            state, norm = self._step(state, total[0])
            reports.append((total[1], norm))
        return state, _report(reports, made)

    def _step(self, state: TrainState, grads: decoder.Params) -> tuple[TrainState, jax.Array]:
        """The optimizer step. Moments that live on the host visit the device for it."""
        if not self._config.offload_moments:
            return self._apply(state, grads)
        on_device = dataclasses.replace(state, opt_state=sharding.to_device(state.opt_state))
        state, norm = self._apply(on_device, grads)
        opt_state = sharding.to_host(state.opt_state, "learner.offload_moments")
        return dataclasses.replace(state, opt_state=opt_state), norm

    def _old_logprobs(
        self, params: decoder.Params, batches: list[list[Batch]]
    ) -> list[list[jax.Array]]:
        if self._config.old_logprobs == "sampler":
            return [[batch.sampler_logp_BT for batch in part] for part in batches]
        return [[self._score(params, batch) for batch in part] for part in batches]

    def _reference_logprobs(self, batches: list[list[Batch]]) -> list[list[jax.Array | None]]:
        """Ahead of all gradients, so that a reference that lives on the host is on the device only
        here.
        """
        if self._reference is None:
            return [[None] * len(part) for part in batches]
        reference = (
            sharding.to_device(self._reference)
            if self._config.offload_reference
            else self._reference
        )
        return [[self._score(reference, batch) for batch in part] for part in batches]


def _zeros(params: decoder.Params) -> tuple[decoder.Params, objective.LossSums]:
    """The gradient and sums of no rows at all."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params), objective.LossSums(
        *jnp.zeros((6,))
    )


def _accumulate(
    c: LearnerConfig,
    total: tuple[decoder.Params, objective.LossSums] | None,
    params: decoder.Params,
    batch: Batch,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
) -> tuple[decoder.Params, objective.LossSums]:
    """The total with this micro-batch's gradient. The first has none: a program of its own, without
    that memory.
    """
    (_, sums), grads = jax.value_and_grad(functools.partial(loss, c), has_aux=True)(
        params, batch, old_logp_BT, ref_logp_BT
    )
    if total is None:
        return grads, sums
    added = objective.LossSums(*(a + b for a, b in zip(total[1], sums, strict=True)))
    added = added._replace(gap_max=jnp.maximum(total[1].gap_max, sums.gap_max))
    return jax.tree.map(jnp.add, total[0], grads), added


def _apply(
    c: LearnerConfig, state: TrainState, grads: decoder.Params
) -> tuple[TrainState, jax.Array]:
    """One optimizer step after clipping by the global norm; a gradient that is not finite changes
    nothing but the count of bad updates.

    A branch, not a choice between old and new, and one factor, not a clipped copy: else XLA's CPU
    backend keeps twice the gradients' memory in temporaries (measured; so, none).
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm)

    def step() -> tuple[decoder.Params, Any]:
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, c.max_grad_norm / norm), grads)
        updates, opt_state = optimizer(c).update(clipped, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(good, step, lambda: (state.params, state.opt_state))
    return TrainState(
        params, opt_state, state.updates + good, jnp.where(good, 0, state.bad_updates + 1)
    ), norm


def _report(
    reports: list[tuple[objective.LossSums, jax.Array]], made: list[list[Batch]]
) -> dict[str, float]:
    """Means over the sampled tokens in rows; the loss and the gradient norm are means over
    optimizer steps.
    """
    sums = jax.device_get([r[0] for r in reports])
    norms = np.array(jax.device_get([r[1] for r in reports]))
    segments = [batch.segments_BT for part in made for batch in part]
    sampled = [sum(int(np.count_nonzero(batch.weight_BT)) for batch in part) for part in made]
    length, cells = sum(int(np.count_nonzero(x)) for x in segments), sum(x.size for x in segments)

    def per_token(name: str) -> float:
        return float(sum(getattr(s, name) for s in sums) / max(sum(sampled), 1))

    return {
        "loss": float(np.mean([s.loss for s in sums])),
        "kl": per_token("kl"),
        "entropy": per_token("entropy"),
        "clip_fraction": per_token("clipped"),
        "grad_norm": float(norms.mean()),
        # Of the first step alone: later ones see weights that have moved since sampling.
        "logprob_gap": float(sums[0].gap) / max(sampled[0], 1),
        "logprob_gap_max": float(sums[0].gap_max),
        "packed": length / max(cells, 1),
        "tokens": float(length),
    }
