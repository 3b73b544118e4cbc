"""Learner: packing, micro-batching and sharding never change the update; broken ones are skipped.

Compiling is nearly all of the time here. So tests share a model, shapes and compiled programs:
`learner(c)` and `programs(c)` compile once for each config. And results are read with numpy: an
operation on a jax.Array outside of a program compiles for each shape.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssp_jax.errors import InputError
from ssp_jax.learner import objective
from ssp_jax.learner.batches import empty_batch, make_batches, pack
from ssp_jax.learner.state import LearnerConfig, TrainState, init_state, learning_rate, optimizer
from ssp_jax.learner.update import Learner, as_metrics, jit_programs, score
from ssp_jax.model import decoder, sharding
from ssp_jax.runtime.logger import CompileCounter
from tests.random_params import random_params
from tests.train_states import FAR_ABOVE, NOISE, assert_same_update

# As many key/value heads as devices: train refuses a mesh.tensor that does not divide them.
MODEL = decoder.ModelConfig(61, 2, 32, 16, 8, 4, 48, qkv_bias=True)
BASE = LearnerConfig(
    model=MODEL,
    dtype=jnp.float32,
    remat="full",
    temperature=1.0,
    learning_rate=1e-2,
    warmup_steps=1,
    adam_b1=0.9,
    adam_b2=0.99,
    weight_decay=0.0,
    max_grad_norm=1.0,
    row_tokens=32,
    rows=8,
    logprob_chunk=16,
    clip_low=0.2,
    clip_high=0.3,
    kl_coef=0.1,
    kl_type="k3",
    aggregation="sequence_mean",
    old_logprobs="sampler",
    importance_cap=2.0,
)
PARAMS = jax.device_put(random_params(MODEL))


pytestmark = pytest.mark.usefixtures("quick_compile")


@dataclasses.dataclass
class Played:
    tokens: list
    sampled: list
    logprobs: list


def make_episodes(lengths, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        sampled = [False] * 3 + [bool(x) for x in rng.random(n - 3) < 0.7]
        tokens = rng.integers(0, 61, n).tolist()
        logprobs = np.where(sampled, -rng.random(n) * 5, 0.0).tolist()
        made.append(Played(tokens, sampled, logprobs))
    return made


EPISODES = make_episodes([5, 9, 20, 7, 11, 6, 32, 8])
ADVANTAGES = np.linspace(-1, 1, 8).astype(np.float32)


copied = jax.jit(lambda params: jax.tree.map(jnp.copy, params))


def fresh_state(c=BASE, params=PARAMS):
    """Of its own buffers: an update takes them away."""
    return init_state(c, copied(params))


@functools.cache
def _programs(c):
    return jit_programs(c, sharding.device_layout(fresh_state(c)))


def programs(c):
    """What these fields do is all in the batches: one compilation serves all their values."""
    in_batches = {"aggregation": "", "drop_no_advantage": False, "rows": 0, "row_tokens": 0}
    return _programs(dataclasses.replace(c, **in_batches))


@functools.cache
def learner(c):
    return Learner(c, fresh_state(c), PARAMS if c.kl_coef else None, lambda batch: batch)


def on_mesh(c, *axes):
    """A learner of its own on a mesh of these axes, and a train state that lies there."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)))
    rows = sharding.rows_sharding(mesh)
    params = jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))
    c = dataclasses.replace(c, rows_sharding=rows)
    state = fresh_state(c, params)
    return Learner(c, state, params, lambda batch: jax.device_put(batch, rows)), state


def update(c, state=None, episodes=EPISODES, advantages=ADVANTAGES, seed=0, mini_batches=1):
    order = np.random.default_rng(seed)
    state = fresh_state(c) if state is None else state
    return learner(c).update(state, episodes, advantages, order, mini_batches)


@functools.cache
def single_device():
    return update(BASE)


def logprobs(c, batch, params=PARAMS):
    return programs(c).score(params, {}, batch)


def gradient(c, episodes=EPISODES, advantages=ADVANTAGES):
    """Gradient and sums of one mini-batch, added up over its micro-batches as an update does."""
    batches = make_batches(c, episodes, advantages)
    jitted = programs(c)
    total = None if len(batches) == 1 else jitted.zero_total(PARAMS)
    for batch in batches:
        reference = jitted.score(PARAMS, {}, batch) if c.kl_coef else None
        total = jitted.accumulate(total, PARAMS, {}, batch, batch.sampler_logp_BT, reference)
    return total


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


@functools.cache
def exact_gradient():
    grads, _ = gradient(BASE)
    return jax.device_get(grads)


def step_with(change, c=BASE):
    """The train state after an optimizer step with `change(gradient leaf, rng)` as gradient."""
    rng = np.random.default_rng(1)
    changed = jax.tree.map(lambda leaf: change(leaf, rng), exact_gradient())
    state, _ = programs(c).apply(fresh_state(c), changed)
    return jax.device_get(state)


def with_noise(size):
    return lambda grad, rng: grad + size * rng.standard_normal(grad.shape, np.float32)


def a_percent_more_in_half(grad, rng):
    """Not in all: clipping by the norm takes a common factor out."""
    return grad * np.where(rng.random(grad.shape) < 0.5, np.float32(1.01), np.float32(1.0))


@pytest.mark.ci
def test_updates_are_compared_as_loosely_as_rounding_needs_and_no_looser():
    """A test of these tests: noise of rounding size passes, on any CPU; small mistakes do not."""
    exact = step_with(lambda grad, rng: grad)
    assert_same_update(exact, step_with(with_noise(NOISE)), BASE)
    assert_same_update(exact, step_with(with_noise(-NOISE)), BASE)
    mistakes = [
        step_with(a_percent_more_in_half),
        step_with(with_noise(1e-6)),
        dataclasses.replace(exact, params=jax.tree.map(lambda x: x + 3e-4, exact.params)),
        dataclasses.replace(exact, updates=exact.updates + 1),
    ]
    for mistaken in mistakes:
        with pytest.raises(AssertionError):
            assert_same_update(exact, mistaken, BASE)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("changes", [{"rows": 2, "row_tokens": 48}, {"row_tokens": 128, "rows": 1}])
def test_packing_and_micro_batches_do_not_change_loss_and_gradient(aggregation, changes):
    base = dataclasses.replace(BASE, aggregation=aggregation)
    expected, got = gradient(base), gradient(dataclasses.replace(base, **changes))
    close(expected[0], got[0])
    np.testing.assert_allclose(expected[1].loss, got[1].loss, rtol=1e-5)


def test_sequence_mean_is_the_mean_over_episodes_alone():
    """Loss and gradient, to the rounding of float32; also of prompts alone, and of one token."""
    odd = [Played([5], [False], [0.0]), Played([7, 7], [False, False], [0.0, 0.0])]
    episodes = [*EPISODES, *odd]
    advantages = np.append(ADVANTAGES, [1, 1]).astype(np.float32)
    grads, sums = gradient(BASE, episodes, advantages)
    alone = [gradient(BASE, [e], advantages[i : i + 1]) for i, e in enumerate(episodes)]
    grads, alone = jax.device_get((grads, alone))
    np.testing.assert_allclose(sums.loss, np.mean([one[1].loss for one in alone]), rtol=1e-5)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *[one[0] for one in alone])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, mean
    )


def test_gradient_reaches_sampled_tokens_only():
    """d loss / d logits is zero wherever the next token was a prompt, a result or padding."""
    (batch,) = make_batches(dataclasses.replace(BASE, rows=4, row_tokens=64), EPISODES, ADVANTAGES)
    logits = np.random.default_rng(1).standard_normal((4, 64, 61), np.float32)

    @jax.jit
    @jax.grad
    def gradient_of_loss(logits):
        targets = batch.targets_BT[..., None]
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, -1)[..., 0]
        fixed = jax.lax.stop_gradient(logp)
        settings = dict(clip_low=0.2, clip_high=0.3, kl_coef=0.1, kl_type="k3", importance_cap=2.0)
        return objective.policy_loss(
            logp,
            logp,
            old_logp_BT=fixed,
            sampler_logp_BT=fixed,
            ref_logp_BT=fixed - 0.1,
            advantage_BT=batch.advantage_BT,
            weight_BT=batch.weight_BT,
            positions_BT=batch.positions_BT,
            **settings,
        ).loss

    touched = np.abs(gradient_of_loss(logits)).sum(-1) > 0
    np.testing.assert_array_equal(touched, batch.weight_BT > 0)
    assert touched.sum() == sum(sum(e.sampled) for e in EPISODES)


def test_a_batch_says_what_each_column_predicts():
    (batch,) = make_batches(BASE, EPISODES[:2], ADVANTAGES[:2])
    first, second = EPISODES[1], EPISODES[0]  # the longest first
    n, m = len(first.tokens), len(second.tokens)
    assert batch.tokens_BT[0, : n + m].tolist() == first.tokens + second.tokens
    assert batch.targets_BT[0, : n - 1].tolist() == first.tokens[1:]
    assert batch.positions_BT[0, : n + m].tolist() == [*range(n), *range(m)]
    assert batch.segments_BT[0, : n + m + 1].tolist() == [1] * n + [2] * m + [0]
    np.testing.assert_allclose(batch.sampler_logp_BT[0, : n - 1], first.logprobs[1:], rtol=1e-6)
    assert (batch.weight_BT[0, : n - 1] > 0).tolist() == first.sampled[1:]
    assert batch.weight_BT[0, n - 1] == 0  # the last token of a segment predicts nothing
    assert batch.advantage_BT[0, 0] == ADVANTAGES[1]
    np.testing.assert_allclose(batch.weight_BT.sum(), 1.0, rtol=1e-6)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_rows_hold_everything_once_and_never_overflow(lengths):
    rows = pack(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) <= max(1, 2 * sum(lengths) / 40 + 1)


def test_an_episode_longer_than_a_row_is_an_input_error():
    with pytest.raises(InputError, match=r"learner.row_tokens is 32 but an episode has 33"):
        pack([33], 32)


# a prompt beyond its limit, and longer than a row
REFUSED = Played([5] * 40, [False] * 40, [0.0] * 40)


def test_an_episode_in_which_nothing_was_sampled_is_not_packed():
    """It counts in the mean over episodes, like one that fits, and adds nothing."""
    fits = Played([5] * 8, [False] * 8, [0.0] * 8)
    advantages = np.append(ADVANTAGES, 1).astype(np.float32)
    expected, got = (gradient(BASE, [*EPISODES, last], advantages) for last in (fits, REFUSED))
    close(expected[0], got[0])
    np.testing.assert_allclose(expected[1].loss, got[1].loss, rtol=1e-6)
    assert not make_batches(BASE, [REFUSED], advantages[:1])


@pytest.mark.ci
def test_an_update_takes_refused_episodes():
    """Also where nothing else is in a mini-batch, and where nothing else was played at all."""
    c = dataclasses.replace(BASE, old_logprobs="recompute")
    state, report = update(
        c, episodes=[REFUSED, EPISODES[0]], advantages=ADVANTAGES[:2], mini_batches=2
    )
    assert int(state.updates) == 2 and report["tokens"] == len(EPISODES[0].tokens)
    state, report = update(c, episodes=[REFUSED], advantages=ADVANTAGES[:1])
    assert int(state.updates) == 1 and report["tokens"] == 0 == report["grad_norm"]
    assert all(np.isfinite(value) for value in report.values())


@pytest.mark.ci
def test_one_broken_token_does_not_take_the_gradient():
    """Two such: 10^6 times likelier than when sampled, and unwanted; far from the reference."""
    (batch,) = make_batches(BASE, EPISODES, ADVANTAGES)
    row, column = np.argwhere((batch.weight_BT != 0) & (batch.advantage_BT < 0))[0]
    reference = np.asarray(logprobs(BASE, batch))
    unlikely = batch.sampler_logp_BT.copy()
    far = reference.copy()
    unlikely[row, column] = -20.0
    far[row, column] += 15.0
    bounded = dataclasses.replace(BASE, clip_dual=3.0, kl_bound=10.0)
    for sampler, ref in ((unlikely, reference), (batch.sampler_logp_BT, far)):
        broken = dataclasses.replace(batch, sampler_logp_BT=sampler)
        grads = [
            programs(c).accumulate(None, PARAMS, {}, broken, sampler, ref)[0]
            for c in (BASE, bounded)
        ]
        norms = [[np.linalg.norm(leaf) for leaf in jax.tree.leaves(grad)] for grad in grads]
        assert np.linalg.norm(norms[0]) > 1e3 * np.linalg.norm(norms[1])


FACTORS_OF_8 = [x for x in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(x) == 8]


SHARDED = [
    *(
        # all axes together; the others are minutes of compiling
        pytest.param(x, "xla", marks=pytest.mark.ci if x == (2, 2, 2) else pytest.mark.slow)
        for x in FACTORS_OF_8
    ),
    pytest.param((2, 2, 2), "splash", marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("axes", "attention"), SHARDED)
def test_sharded_update_equals_single_device(axes, attention):
    """Every factorisation of 8; the vocabulary of 61 does not divide and stays whole.

    The kernel is interpreted.
    """
    expected, reported = single_device()
    split, state = on_mesh(dataclasses.replace(BASE, attention=attention), *axes)
    laid_out = jax.tree.map(lambda x: x.sharding, state.params)
    state, report = split.update(state, EPISODES, ADVANTAGES, np.random.default_rng(0))
    assert_same_update(expected, state, BASE)
    assert report == pytest.approx(reported, rel=1e-3, abs=1e-5)
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        jax.tree.map(
            lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), tree, laid_out
        )


@pytest.mark.ci
def test_a_split_vocabulary_is_not_gathered():
    """Over `tensor` each device keeps the logits of its own shard of the vocabulary.

    Forward and backward. And of these words the weight is sent around and its gradient added up
    once, not for every chunk; of the embedding, which is looked up in, nothing is.
    """
    config = dataclasses.replace(MODEL, vocab_size=80)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = decoder.abstract_params(config)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        sharding.param_shardings(params, mesh),
    )
    (batch,) = make_batches(BASE, EPISODES, ADVANTAGES)
    rows = sharding.rows_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    c = dataclasses.replace(BASE, model=config, rows_sharding=rows)
    grad = jax.grad(lambda p, b: (score(c, p, {}, b)[0] * b.weight_BT).sum())
    like_params = jax.tree.map(lambda x: x.sharding, placed)
    program = jax.jit(grad, out_shardings=like_params).lower(placed, batch)
    text = program.compile().as_text()
    assert "f32[2,16,40]" in text  # 8 rows over 4, chunk of 16, 80 words over 2
    assert not re.search(r"f32\[\d+,16,80\]", text)
    loops, program = text.split("\nENTRY ")
    sent = re.compile(r"= [^=]*\[(40,\d+|\d+,40)\][^=]* (all-gather|all-reduce|reduce-scatter)\(")
    assert sent.search(program) and not sent.search(loops)
    assert not re.search(r"= [^=]*\[(80,\d+|\d+,80)\][^=]* all-[a-z]+\(", text)


@pytest.mark.ci
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_dropping_what_has_no_advantage_changes_rows_and_nothing_else(aggregation):
    c = dataclasses.replace(BASE, kl_coef=0.0, aggregation=aggregation)
    advantages = np.array([0, 0, 0, 0, 1, -1, 0, 0.5], np.float32)
    dropping = dataclasses.replace(c, drop_no_advantage=True)
    # One optimizer step: a second one would start from weights that rounding has moved.
    expected, full = update(c, advantages=advantages)
    state, report = update(dropping, advantages=advantages)
    assert_same_update(expected, state, BASE)
    assert report["tokens"] == sum(len(EPISODES[i].tokens) for i in (4, 5, 7)) < full["tokens"]
    assert report["loss"] == pytest.approx(full["loss"], rel=1e-5)
    nothing, report = update(dropping, advantages=np.zeros(8, np.float32), mini_batches=2)
    assert int(nothing.updates) == 2 and report["tokens"] == 0 == report["grad_norm"]


def rates(**changes):
    rate = learning_rate(dataclasses.replace(BASE, learning_rate=1.0, warmup_steps=4, **changes))
    return [round(float(rate(step)), 4) for step in (0, 2, 4, 9, 14, 99)]


def test_schedules_by_hand():
    """4 steps from 1/4 to 1; then 10 steps down to 0.2: the middle of both ways is 0.6."""
    assert rates() == [0.25, 0.625, 1.0, 1.0, 1.0, 1.0]
    down = dict(decay_steps=10, final_rate=0.2)
    expected = [0.25, 0.625, 1.0, 0.6, 0.2, 0.2]
    assert rates(schedule="linear", **down) == rates(schedule="cosine", **down) == expected
    base = dataclasses.replace(BASE, learning_rate=1.0, **down)
    schedules = [dataclasses.replace(base, schedule=name) for name in ("linear", "cosine")]
    quarter = [float(learning_rate(c)(1 + 2.5)) for c in schedules]
    np.testing.assert_allclose(quarter, [0.8, 0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2], rtol=1e-5)


@pytest.mark.ci
def test_momentum_in_bfloat16_keeps_the_second_moment_in_float32():
    state, _ = jax.device_get(update(dataclasses.replace(BASE, momentum_dtype="bfloat16")))
    adam = state.opt_state[0]
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    expected, _ = jax.device_get(single_device())
    # A first step moves by the sign of the moment, which bfloat16 keeps, where it is no rounding.
    far = jax.tree.map(lambda mu: np.abs(mu) > 0.1 * FAR_ABOVE, expected.opt_state[0].mu)
    jax.tree.map(
        lambda x, y, f: np.testing.assert_allclose(x[f], y[f], atol=1e-3),
        expected.params,
        state.params,
        far,
    )


@pytest.mark.ci
def test_offloaded_moments_and_reference_change_nothing_but_where_they_are():
    c = dataclasses.replace(BASE, offload_moments=True, offload_reference=True)
    state, report = update(c)
    expected, reported = single_device()
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert report == reported
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)}
    assert kinds == {sharding.HOST}
    assert jax.tree.leaves(state.params)[0].sharding.memory_kind != sharding.HOST


@pytest.mark.ci
@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_nothing_compiles_after_the_warm_up_whatever_was_played(axes):
    one, state = on_mesh(BASE, *axes)
    rng = np.random.default_rng(0)
    one.warm_up(state)
    counter = CompileCounter()
    for lengths in ([4], [32] * 20, [5, 6, 7] * 9):
        episodes = make_episodes(lengths)
        advantages = np.ones(len(lengths), np.float32)
        state, _ = one.update(state, episodes, advantages, rng)
    assert counter.count == 0


def test_mini_batches_take_one_optimizer_step_each():
    c = dataclasses.replace(BASE, learning_rate=1e-3, warmup_steps=8)
    state, metrics = update(c, mini_batches=2)
    assert int(state.updates) == 2
    assert metrics["learning_rate"] == pytest.approx((1 / 8 + 7 / 64) * 1e-3)  # of the second
    state, _ = update(BASE, episodes=EPISODES[:1], advantages=ADVANTAGES[:1], mini_batches=2)
    assert int(state.updates) == 1


def test_mini_batches_share_the_old_policy():
    """The one before the first optimizer step.

    At the second, ratios differ from 1, and narrow bounds clip them.
    """
    c = dataclasses.replace(BASE, old_logprobs="recompute", clip_low=1e-3, clip_high=1e-3)
    assert update(c, mini_batches=2)[1]["clip_fraction"] > 0


def test_old_logprobs_from_the_sampler_or_computed():
    """Right ones give the same update as recomputing; wrong ones are corrected, up to the cap."""
    batches = make_batches(BASE, EPISODES, ADVANTAGES)
    exact = [Played(e.tokens, e.sampled, list(e.logprobs)) for e in EPISODES]
    rows = pack([len(e.tokens) for e in EPISODES], BASE.row_tokens)
    logp = np.asarray(logprobs(BASE, batches[0]))
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            n = len(exact[i].tokens)
            exact[i].logprobs = [0.0, *logp[b, at : at + n - 1].tolist()]
            at += n
    recompute = dataclasses.replace(BASE, old_logprobs="recompute")
    a, report = update(BASE, episodes=exact)
    b, _ = update(recompute, episodes=exact)
    assert_same_update(a, b, BASE)
    assert report["logprob_gap_max"] < 1e-5 and report["clip_fraction"] == 0
    _, report = update(BASE, episodes=exact, mini_batches=2)
    assert report["logprob_gap_max"] < 1e-5  # that of the first optimizer step
    off, report = update(recompute)
    # the ratio to the recomputed policy is 1
    assert report["logprob_gap"] > 0.1 and report["clip_fraction"] == 0
    leaves = [jax.tree.leaves(jax.device_get(state.params)) for state in (off, b)]
    pairs = zip(*leaves, strict=True)
    assert any((x != y).any() for x, y in pairs)


def test_gaps_by_the_place_in_the_episode_by_hand():
    """A row of two episodes, from their 1,022nd and 4,095th token on; the last predict nothing."""
    batch = empty_batch(BASE.rows, BASE.row_tokens)
    batch.segments_BT[0, :9] = [1, 1, 1, 1, 1, 2, 2, 2, 2]
    batch.positions_BT[0, :9] = [1021, 1022, 1023, 1024, 1025, 4094, 4095, 4096, 4097]
    batch.weight_BT[0, :9] = [1, 1, 1, 1, 0, 1, 1, 1, 0]
    gaps = np.float32([0.1, -0.3, 0.5, -0.6, 0, 0.7, 0.8, -1.0, 0])
    sampler = np.array(logprobs(BASE, batch))
    sampler[0, :9] -= gaps

    def report(batch):
        reference = sampler if BASE.kl_coef else None
        _, sums = programs(BASE).accumulate(None, PARAMS, {}, batch, sampler, reference)
        return as_metrics([(sums, np.float32(1))], [[batch]])

    batch = dataclasses.replace(batch, sampler_logp_BT=sampler)
    # Before the tokens that are predicted stand 1,022, 1,023, 1,024, 1,025; 4,095, 4,096, 4,097.
    expected = {"": 4.0 / 7, "_max": 1.0, "_0_1k": 0.2, "_1k_4k": 0.6, "_4k": 0.9}
    found = report(batch)
    for name, gap in expected.items():
        assert found[f"logprob_gap{name}"] == pytest.approx(gap, abs=1e-5)

    batch.weight_BT[0, 2:6] = 0
    rest = report(batch)
    assert "logprob_gap_1k_4k" not in rest  # and not 0
    assert rest["logprob_gap_0_1k"] == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize(("most", "factor"), [(1.0, 0.1), (20.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(most, factor):
    """A norm of 10, by hand.

    The first step's moments are 1 - b1 of the clipped gradient and 1 - b2 of its square, and the
    step is the learning rate times its sign, and the weight decay.
    """
    c = dataclasses.replace(BASE, max_grad_norm=most, weight_decay=0.5)
    params = jax.device_get(PARAMS)
    count = sum(x.size for x in jax.tree.leaves(params))
    grads = jax.tree.map(lambda x: np.full_like(x, 10 / np.sqrt(count)), params)
    state, norm = programs(c).apply(fresh_state(c), grads)
    np.testing.assert_allclose(norm, 10.0, rtol=1e-5)
    expected = jax.tree.map(lambda g: (1 - BASE.adam_b1) * factor * g, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.opt_state[0].mu, expected
    )
    expected = jax.tree.map(lambda g: (1 - BASE.adam_b2) * np.square(factor * g), grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.opt_state[0].nu, expected
    )
    expected = jax.tree.map(lambda x: x - BASE.learning_rate * (1 + 0.5 * x), params)
    close(state.params, expected)


@pytest.mark.ci
def test_what_a_step_replaces_is_given_back():
    state = fresh_state()
    (batch,) = make_batches(BASE, EPISODES, ADVANTAGES)
    arguments = (state.params, {}, batch, batch.sampler_logp_BT, batch.sampler_logp_BT)
    first = programs(BASE).accumulate(None, *arguments)
    total = programs(BASE).accumulate(first, *arguments)
    programs(BASE).apply(state, total[0])
    for replaced in (first[0], state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        assert all(x.is_deleted() for x in jax.tree.leaves(replaced))


def abstract_programs(c):
    """A train state's shapes, and the programs of one device, of a model that is never made."""
    params = decoder.abstract_params(c.model)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimizer(c).init, params), count, count)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return state, jit_programs(c, jax.tree.map(lambda _: place, state))


def test_the_optimizer_step_needs_no_memory_of_its_own():
    """Less than a tenth of the gradients in temporaries: a clipped copy would be all of them."""
    c = dataclasses.replace(BASE, model=dataclasses.replace(MODEL, vocab_size=2048, mlp_dim=512))
    state, jitted = abstract_programs(c)
    program = jitted.apply.lower(state, state.params).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < 0.1 * 4 * sum(x.size for x in jax.tree.leaves(state.params))


def test_a_later_gradient_is_added_to_the_total_bit_for_bit():
    """Though it is added layer by layer, inside of the backward pass."""
    (batch,) = make_batches(BASE, EPISODES, ADVANTAGES)
    arguments = (PARAMS, {}, batch, batch.sampler_logp_BT, logprobs(BASE, batch))
    grads, sums = jax.device_get(programs(BASE).accumulate(None, *arguments))
    rng = np.random.default_rng(2)
    earlier = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), grads)
    total, _ = programs(BASE).accumulate((earlier, sums), *arguments)
    expected = jax.tree.map(np.add, earlier, grads)
    jax.tree.map(np.testing.assert_array_equal, total["layers"], expected["layers"])
    close(total, expected)  # XLA adds to the embedding's total token by token


def test_the_layers_gradients_never_exist_beside_their_total():
    """Less than half of them in temporaries: a second copy would be all of them."""
    model = dataclasses.replace(MODEL, num_layers=16, mlp_dim=1024)
    c = dataclasses.replace(BASE, model=model, rows=1, kl_coef=0.0)
    state, jitted = abstract_programs(c)
    (batch,) = make_batches(c, EPISODES[:1], ADVANTAGES[:1])
    arguments = (state.params, {}, batch, batch.sampler_logp_BT, None)
    total = jax.eval_shape(jitted.zero_total, state.params)
    program = jitted.accumulate.lower(total, *arguments).compile()
    layers = 4 * sum(x.size for x in jax.tree.leaves(state.params["layers"]))
    assert program.memory_analysis().temp_size_in_bytes < layers / 2


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    broken = np.full(8, np.nan, np.float32)
    state, _ = update(BASE, advantages=broken)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert (int(state.updates), int(state.bad_updates)) == (0, 1)
    state, _ = update(BASE, state=state)
    assert (int(state.updates), int(state.bad_updates)) == (1, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_the_reference_model_holds_the_policy():
    """With no reward at all the first step moves nothing: the policy is the reference."""
    _, report = update(BASE, advantages=np.zeros(8, np.float32))
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["grad_norm"] == pytest.approx(0, abs=1e-5)


@pytest.mark.ci
def test_rewarded_tokens_become_likelier():
    c = dataclasses.replace(BASE, kl_coef=0.0, clip_high=1e9, old_logprobs="recompute")
    state = fresh_state(c)
    good = [EPISODES[2]]
    advantages = np.ones(1, np.float32)
    (batch,) = make_batches(c, good, advantages)
    before = (logprobs(c, batch) * batch.weight_BT).sum()
    for step in range(5):
        state, _ = update(c, state, good, advantages, seed=step)
    assert (logprobs(c, batch, state.params) * batch.weight_BT).sum() > before + 0.5
