"""The update: pack episodes, accumulate gradients over micro-batches, take optimizer steps.

Jitted programs of fixed shape, whatever was played: `accumulate` adds one micro-batch's gradient to
a donated buffer, `apply` takes the optimizer step. A scan over micro-batches would tie the program
to their number and compile anew when it changes; a loop on the host costs one dispatch each, hidden
behind the device's work.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssp_jax.learner import kernel_check, objective
from ssp_jax.learner.batches import Batch, Trajectory, empty_batch, make_batches
from ssp_jax.learner.logprobs import token_logprobs
from ssp_jax.learner.state import LearnerConfig, TrainState, learning_rate, optimizer
from ssp_jax.model import attention, decoder, sharding
from ssp_jax.runtime.dispatch import compile_together, in_turn

# What to change where the update does not fit.
MEMORY_REMEDY = (
    "more devices for mesh.fsdp or mesh.tensor, a smaller learner.rows or learner.row_tokens, "
    "model.remat=full, learner.offload_moments or learner.offload_reference"
)

Total = tuple[decoder.Params, objective.LossSums]  # gradient and sums of the micro-batches so far
MiniBatch = list[Batch]  # the micro-batches of one optimizer step


# What is differentiated


def score(
    c: LearnerConfig, params: decoder.Params, frozen: decoder.Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies, [B, T] float32, of the batch's sampled targets; 0 elsewhere.

    params: what is trained. frozen: the other params, none in full fine-tuning.
    """
    all_params = decoder.join(frozen, params)
    hidden_BTD = decoder.forward(c.model, all_params, **_forward_options(c, batch))
    return _token_logprobs(c, all_params, batch, hidden_BTD)


def _forward_options(c: LearnerConfig, batch: Batch) -> dict[str, Any]:
    """Arguments of decoder.forward and forward_adding, beside the model and its params."""
    packed_attention = _packed_attention(c)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return packed_attention(q, k, v, batch.segments_BT), None

    def place(x_BTD: jax.Array) -> jax.Array:
        if c.rows_sharding is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, c.rows_sharding)

    look_up: Any = decoder.embed
    if c.rows_sharding is not None:
        look_up = functools.partial(sharding.embed_rows, c.rows_sharding)
    return {
        "tokens_BT": batch.tokens_BT,
        "positions_BT": batch.positions_BT,
        "attend": attend,
        "dtype": c.dtype,
        "remat": c.remat,
        "look_up": look_up,
        "place": place,
    }


def _token_logprobs(
    c: LearnerConfig, all_params: decoder.Params, batch: Batch, hidden_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return token_logprobs(
        hidden_BTD,
        decoder.head_weight(all_params),
        batch.targets_BT,
        batch.weight_BT != 0,
        c.temperature,
        c.logprob_chunk,
        c.rows_sharding,
    )


def _packed_attention(c: LearnerConfig) -> Callable[..., jax.Array]:
    """(q, k, v, segments) -> o. Elsewhere a kernel is interpreted, which only tests ask for."""
    if c.attention == "xla":
        return attention.packed
    rows = c.rows_sharding
    platform = jax.default_backend() if rows is None else rows.mesh.devices.flat[0].platform
    kernel, compiled_for = _kernel(c.attention)
    kernel = functools.partial(kernel, interpret=platform != compiled_for)
    return sharding.shard_map_rows_and_heads(kernel, rows)


def _kernel(name: str) -> tuple[Callable[..., jax.Array], str]:
    """The kernel, and the platform of the devices that it is compiled for."""
    if name == "splash":
        return attention.splash, "tpu"
    # Here: only GPUs need it.
    from ssp_jax.learner import flash

    return flash.attend, "gpu"


def check_attention(c: LearnerConfig) -> None:
    """Raises InputError where the kernel for GPUs is wrong on this process's first one."""
    if c.attention != "flash":
        return
    tensor = 1 if c.rows_sharding is None else c.rows_sharding.mesh.shape["tensor"]
    heads = (c.model.num_heads // tensor, c.model.num_kv_heads // tensor, c.model.head_dim)
    kernel_check.check_kernel(c.attention, _kernel(c.attention)[0], heads, c.dtype)


def loss(
    c: LearnerConfig,
    params: decoder.Params,
    frozen: decoder.Params,
    batch: Batch,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
) -> tuple[jax.Array, objective.LossSums]:
    """The loss of one micro-batch, and the sums that are reported of it."""
    logp_BT, entropy_BT = score(c, params, frozen, batch)
    return _loss_of_scores(c, batch, logp_BT, entropy_BT, old_logp_BT, ref_logp_BT)


def loss_adding(
    c: LearnerConfig,
    params: decoder.Params,
    layer_sums: decoder.Params,
    frozen: decoder.Params,
    batch: Batch,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
) -> tuple[tuple[jax.Array, decoder.Params], objective.LossSums]:
    """`loss`, with the layers' gradients added up as in decoder.forward_adding."""
    all_params = decoder.join(frozen, params)
    options = _forward_options(c, batch)
    hidden_BTD, layer_sums = decoder.forward_adding(c.model, all_params, layer_sums, **options)
    logp_BT, entropy_BT = _token_logprobs(c, all_params, batch, hidden_BTD)
    scores = (logp_BT, entropy_BT, old_logp_BT, ref_logp_BT)
    value, sums = _loss_of_scores(c, batch, *scores)
    return (value, layer_sums), sums


def _loss_of_scores(
    c: LearnerConfig,
    batch: Batch,
    logp_BT: jax.Array,
    entropy_BT: jax.Array,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
) -> tuple[jax.Array, objective.LossSums]:
    if c.supervised:
        sums = objective.likelihood_loss(logp_BT, entropy_BT, batch.weight_BT)
        return sums.loss, sums
    sums = objective.policy_loss(
        logp_BT,
        entropy_BT,
        old_logp_BT=old_logp_BT,
        sampler_logp_BT=batch.sampler_logp_BT,
        ref_logp_BT=ref_logp_BT,
        advantage_BT=batch.advantage_BT,
        weight_BT=batch.weight_BT,
        positions_BT=batch.positions_BT,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        kl_coef=c.kl_coef,
        kl_type=c.kl_type,
        importance_cap=c.importance_cap,
        clip_dual=c.clip_dual,
        kl_bound=c.kl_bound,
    )
    return sums.loss, sums


# The jitted programs


class Programs(NamedTuple):
    """The jitted programs of an update. Each compiles once for a configuration and mesh."""

    score: Any  # (params, frozen, batch) -> log-probs [B, T] of the sampled targets
    # (total or None, params, frozen, batch, old_logp_BT, ref_logp_BT or None) -> total; donates the
    # total
    accumulate: Any
    apply: Any  # (state, gradient) -> (state, the gradient's global norm); donates the state
    zero_total: Any  # (params) -> the total of no micro-batch


def jit_programs(c: LearnerConfig, layout: TrainState) -> Programs:
    """The programs for a train state of this layout: its shardings, on the devices.

    Results have them explicitly. Left to XLA, a gradient or moment may come out whole on every
    device, and not fit there.
    """
    total_layout = (layout.params, layout.updates)
    accumulate = functools.partial(_accumulate, c)
    apply = functools.partial(_apply, c)
    return Programs(
        score=jax.jit(lambda params, frozen, batch: score(c, params, frozen, batch)[0]),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=total_layout),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(layout, None)),
        zero_total=jax.jit(_zero_total, out_shardings=total_layout),
    )


def _zero_total(params: decoder.Params) -> Total:
    grads = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    return grads, objective.zero_sums()


def _accumulate(
    c: LearnerConfig,
    total: Total | None,
    params: decoder.Params,
    frozen: decoder.Params,
    batch: Batch,
    old_logp_BT: jax.Array,
    ref_logp_BT: jax.Array | None,
) -> Total:
    """The total with this micro-batch's gradient.

    The first has no total: a program of its own, without that memory. Later ones add the gradient
    of each layer as it comes, and keep that of no other.
    """
    inputs = (frozen, batch, old_logp_BT, ref_logp_BT)
    if total is None:
        differentiate = jax.value_and_grad(functools.partial(loss, c), has_aux=True)
        (_, sums), grads = differentiate(params, *inputs)
        return grads, sums

    old_grads, old_sums = total
    layers = {"layers": params["layers"]}
    old_layers = old_grads["layers"]

    def differentiated(others: decoder.Params, layer_sums: decoder.Params) -> Any:
        return loss_adding(c, others | layers, layer_sums, *inputs)

    others = {name: part for name, part in params.items() if name != "layers"}
    (value, _), back, sums = jax.vjp(differentiated, others, old_layers, has_aux=True)
    grads, new_layers = back((jnp.ones_like(value), old_layers))
    new_grads = {name: jax.tree.map(jnp.add, old_grads[name], part) for name, part in grads.items()}
    new_sums = objective.LossSums(*map(jnp.add, old_sums, sums))
    new_sums = new_sums._replace(gap_max=jnp.maximum(old_sums.gap_max, sums.gap_max))
    return new_grads | {"layers": new_layers}, new_sums


def _apply(
    c: LearnerConfig, state: TrainState, grads: decoder.Params
) -> tuple[TrainState, jax.Array]:
    """One optimizer step, after clipping by the global norm.

    A gradient that is not finite changes nothing but the count of bad updates.

    A branch, not a choice between old and new, and one factor, not a clipped copy: else XLA's CPU
    backend keeps twice the gradients' memory in temporaries (measured; so, none).
    """
    norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(norm)

    def step() -> tuple[decoder.Params, Any]:
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, c.max_grad_norm / norm), grads)
        updates, opt_state = optimizer(c).update(clipped, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def skip() -> tuple[decoder.Params, Any]:
        return state.params, state.opt_state

    params, opt_state = jax.lax.cond(is_finite, step, skip)
    updates = state.updates + is_finite
    bad_updates = jnp.where(is_finite, 0, state.bad_updates + 1)
    return TrainState(params, opt_state, updates, bad_updates), norm


@jax.jit
def _weighted(weight_BT: jax.Array, x_BT: jax.Array) -> jax.Array:
    return (weight_BT * x_BT).sum()


def _abstract(tree: Any, layout: Any) -> Any:
    """Shapes of arrays with this layout: shardings, each of an array or of a part of the tree."""

    def of(sharding_: Any, part: Any) -> Any:
        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_)

        return jax.tree.map(shape, part)

    return jax.tree.map(of, layout, tree)


class Learner:
    """Compiled programs for one configuration and mesh; all state is passed in and returned."""

    def __init__(
        self,
        c: LearnerConfig,
        state: TrainState,
        reference: decoder.Params | None,
        put_batch: Callable[[Batch], Batch],
        frozen: Callable[[], decoder.Params] = dict,
    ):
        """state: only its layout is read.

        reference: state.params of the initial model in the compute dtype, or None. put_batch: host
        to devices. frozen: gives the params that are not trained, of which there may be none.
        """
        if reference is not None and c.offload_reference:
            reference = sharding.to_host(reference, "learner.offload_reference")
        self._config = c
        self._reference = reference
        self._put = put_batch
        self._frozen = frozen
        self._layout = sharding.device_layout(state)
        self._programs = jit_programs(c, self._layout)
        rate = learning_rate(c)
        # Of the optimizer step that was taken last.
        self._last_rate = jax.jit(lambda updates: rate(jnp.maximum(updates - 1, 0)))

    def warm_up(self, state: TrainState) -> None:
        """Compiles the programs, and runs those of the gradient on a batch without tokens.

        But for zero_total, which only a mini-batch without rows needs.
        """
        batch = self._put(empty_batch(self._config.rows, self._config.row_tokens))
        frozen = self._frozen()
        [[old_logp_BT]] = self._old_logprobs(state.params, frozen, [[batch]])
        [[ref_logp_BT]] = self._reference_logprobs(frozen, [[batch]])

        accumulate, apply = self._programs.accumulate, self._programs.apply
        arguments = (state.params, frozen, batch, old_logp_BT, ref_logp_BT)
        first = accumulate.lower(None, *arguments)
        total = _abstract(first.out_info, (self._layout.params, self._layout.updates))
        later = accumulate.lower(total, *arguments)
        step = apply.lower(_abstract(state, self._layout), total[0])
        compile_together([first, later, step])
        self._last_rate(state.updates)

        total = accumulate(None, *arguments)
        jax.block_until_ready(accumulate(total, *arguments))

    def update(
        self,
        state: TrainState,
        episodes: Sequence[Trajectory],
        advantage_E: np.ndarray,
        order: np.random.Generator,
        mini_batches: int = 1,
    ) -> tuple[TrainState, dict[str, float]]:
        """All optimizer steps of one role, one a mini-batch of the episodes, shuffled by `order`.

        Returns the new state and metrics; the old state is donated.
        """
        # Shuffle, split into mini-batches, and pack each into micro-batches.
        made: list[MiniBatch] = []
        for drawn in np.array_split(order.permutation(len(episodes)), mini_batches):
            members = sorted(drawn.tolist())
            if members:
                played = [episodes[index] for index in members]
                made.append(make_batches(self._config, played, advantage_E[members]))
        batches = [[self._put(batch) for batch in mini_batch] for mini_batch in made]

        # Score all of them under the reference, and under the policy before the first step.
        frozen = self._frozen()
        reference = self._reference_logprobs(frozen, batches)
        old = self._old_logprobs(state.params, frozen, batches)

        # For each mini-batch: the gradient, micro-batch by micro-batch, then the optimizer step.
        reports = []
        for mini_batch, old_logp, ref_logp in zip(batches, old, reference, strict=True):
            # A mini-batch from which all was dropped has no micro-batch.
            total: Any = None if mini_batch else self._programs.zero_total(state.params)
            for arguments in zip(mini_batch, old_logp, ref_logp, strict=True):
                accumulated = self._programs.accumulate(total, state.params, frozen, *arguments)
                total = in_turn(accumulated)
            state, norm = self._step(state, total[0])
            reports.append((total[1], norm))

        # Metrics last: reading them waits for the device.
        metrics = as_metrics(reports, made)
        metrics["learning_rate"] = float(self._last_rate(state.updates))
        return state, metrics

    def surprise(
        self,
        params: decoder.Params,
        episodes: Sequence[Trajectory],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> float:
        """The negative log-likelihood of the episodes' sampled tokens in nats, their mean by
        learner.aggregation. progress: gets the micro-batches that are done, and all.
        """
        everything = np.ones(len(episodes), np.float32)
        total = 0.0
        frozen = self._frozen()
        batches = make_batches(self._config, episodes, everything)
        for number, batch in enumerate(batches, 1):
            on_device = self._put(batch)
            logp_BT = in_turn(self._programs.score(params, frozen, on_device))
            total -= float(_weighted(on_device.weight_BT, logp_BT))
            progress(number, len(batches))
        return total

    def _step(self, state: TrainState, grads: decoder.Params) -> tuple[TrainState, jax.Array]:
        """The optimizer step. Moments that live on the host visit the device for it."""
        if not self._config.offload_moments:
            return self._programs.apply(state, grads)
        on_device = dataclasses.replace(state, opt_state=sharding.to_device(state.opt_state))
        state, norm = self._programs.apply(on_device, grads)
        opt_state = sharding.to_host(state.opt_state, "learner.offload_moments")
        return dataclasses.replace(state, opt_state=opt_state), norm

    def _old_logprobs(
        self, params: decoder.Params, frozen: decoder.Params, batches: list[MiniBatch]
    ) -> list[list[jax.Array]]:
        """The denominators of the ratios: recorded by the sampler, or computed by the learner."""
        if self._config.old_logprobs == "sampler":
            return [[batch.sampler_logp_BT for batch in mini_batch] for mini_batch in batches]
        return self._score_all(params, frozen, batches)

    def _reference_logprobs(
        self, frozen: decoder.Params, batches: list[MiniBatch]
    ) -> list[list[jax.Array | None]]:
        """Ahead of all gradients: a reference that lives on the host is on the device only here."""
        if self._reference is None:
            return [[None] * len(mini_batch) for mini_batch in batches]
        reference = self._reference
        if self._config.offload_reference:
            reference = sharding.to_device(reference)
        return self._score_all(reference, frozen, batches)

    def _score_all(
        self, params: decoder.Params, frozen: decoder.Params, batches: list[MiniBatch]
    ) -> list[list[Any]]:
        def score_one(batch: Batch) -> Any:
            return in_turn(self._programs.score(params, frozen, batch))

        return [list(map(score_one, mini_batch)) for mini_batch in batches]


def as_metrics(
    reports: list[tuple[objective.LossSums, jax.Array]], made: list[MiniBatch]
) -> dict[str, float]:
    """Means over the sampled tokens in rows; loss and gradient norm: means over optimizer steps.

    reports: the sums and the gradient norm of each optimizer step.
    """
    all_sums, all_norms = zip(*jax.device_get(reports), strict=True)
    num_sampled = [sum(int(np.count_nonzero(x.weight_BT)) for x in batches) for batches in made]
    segments = [batch.segments_BT for mini_batch in made for batch in mini_batch]
    tokens = sum(int(np.count_nonzero(x)) for x in segments)
    cells = sum(x.size for x in segments)

    def per_token(name: str) -> float:
        total = sum(getattr(sums, name) for sums in all_sums)
        return float(total / max(sum(num_sampled), 1))

    first = all_sums[0]  # later steps see weights that have moved since sampling
    gaps = _mean_gaps(first.gaps, made[0])
    return gaps | {
        "loss": float(np.mean([sums.loss for sums in all_sums])),
        "kl": per_token("kl"),
        "entropy": per_token("entropy"),
        "clip_fraction": per_token("clipped"),
        "grad_norm": float(np.array(all_norms).mean()),
        "logprob_gap": float(first.gap) / max(num_sampled[0], 1),
        "logprob_gap_max": float(first.gap_max),
        "packed": tokens / max(cells, 1),
        "tokens": float(tokens),
    }


def _mean_gaps(gaps: np.ndarray, batches: MiniBatch) -> dict[str, float]:
    """The gap of a sampled token in each position bucket that has one. gaps: their sums."""
    counts = np.zeros(len(gaps), int)
    for batch in batches:
        buckets = objective.position_bucket(batch.positions_BT)[batch.weight_BT != 0]
        counts += np.bincount(buckets, minlength=len(gaps))
    means = zip(objective.POSITION_BUCKETS, gaps, counts, strict=True)
    return {f"logprob_gap_{name}": float(total) / n for name, total, n in means if n}
