"""Sampler: what it records is what the trainer computes; stops, limits, independence of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ssp_jax.assembly.sections import make_learner_config
from ssp_jax.learner import batches, update
from ssp_jax.model import decoder
from ssp_jax.model.linear import Lora
from ssp_jax.rollout import kv_cache, sampler, sampling
from ssp_jax.rollout.stops import build_automaton
from tests.adapters import random_adapter
from tests.random_params import random_params

pytestmark = pytest.mark.usefixtures("quick_compile")
V = 64
SLOTS = 4
CACHE = 48  # tokens of a slot
CONFIG = decoder.ModelConfig(V, 2, 32, 4, 2, 8, 48, qkv_bias=True)
PARAMS = random_params(CONFIG)
SETTINGS = dataclasses.replace(
    make_learner_config(default.get_config(), CONFIG), dtype=jnp.float32, logprob_chunk=8
)
UNSTACKED = jax.device_put(decoder.unstack(PARAMS, np.float32))
# The same model with an adapter that changes it, as the trainer and as the sampler have it.
LORA = dataclasses.replace(CONFIG, lora=Lora(4, 8.0, tuple(decoder.PROJECTIONS)))
ADAPTER = random_adapter(LORA)
UNSTACKED_LORA = decoder.join(UNSTACKED, decoder.unstack(ADAPTER, np.float32))
KEY = jax.random.key(3)
EOS = 63
# Token i < 60 is the letter chr(48 + i); 60 is "</", 61 "s>": the stop "</s>" takes two tokens or
# four.
PIECES = [bytes([48 + i]) for i in range(60)] + [b"</", b"s>!", b"", b""]
AUTOMATON = build_automaton(["</s>"], PIECES, V)
STOPS = sampler.Stops(jnp.asarray(AUTOMATON.table_AV), jnp.asarray(AUTOMATON.stop_A))
# Two pieces: every slot has memory for 16 tokens, and the second row of the rest belongs to slot 0,
# and so on.
LAYOUT = kv_cache.Layout((16, CACHE), (SLOTS, SLOTS))
ROWS = np.array([[1, 0, 3, 2]], np.int32)
ROOM = np.full((SLOTS,), CACHE, np.int32)


def starts(rows):
    """rows: (slot, total length, pending token, limit, uid, temperature), padded to SLOTS rows that
    write nothing.
    """
    rows = [*rows, *[(SLOTS, 0, 0, 0, 0, 0.0)] * (SLOTS - len(rows))]
    slot, length, token, limit, uid, temperature = zip(*rows, strict=True)
    ints = [np.array(x, np.int32) for x in (slot, length, token, limit, [0] * SLOTS, uid)]
    return sampler.TurnStarts(*ints, np.array(temperature, np.float32))


def extend(state, rows, tokens, counts, config=CONFIG, params=UNSTACKED):
    """One shape for all tests: SLOTS rows of 8 tokens."""
    tokens_MT = np.zeros((SLOTS, 8), np.int32)
    count_M = np.zeros((SLOTS,), np.int32)
    for i, (row, count) in enumerate(zip(tokens, counts, strict=True)):
        tokens_MT[i, : len(row)] = row
        count_M[i] = count
    return sampler.extend(
        params,
        state,
        ROWS,
        starts(rows),
        tokens_MT,
        count_M,
        config=config,
        depth=2,
        dtype=jnp.float32,
    )


def decode(
    state,
    steps=6,
    depth=2,
    params=UNSTACKED,
    room=ROOM,
    truncation=sampling.ALL_TOKENS,
    config=CONFIG,
):
    """The state, and the chunk in numpy: to index a jax.Array compiles."""
    state, chunk = sampler.decode_chunk(
        params,
        state,
        ROWS,
        room,
        STOPS,
        KEY,
        eos=(EOS,),
        steps=steps,
        depth=depth,
        dtype=jnp.float32,
        truncation=truncation,
        config=config,
    )
    return state, jax.device_get(chunk)


def fresh():
    return sampler.new_state(CONFIG, LAYOUT, jnp.float32)


def generate(
    prompts,
    temperature=1.0,
    steps=6,
    uids=(10, 11, 12, 13),
    slots=None,
    limit=CACHE,
    config=CONFIG,
    params=UNSTACKED,
):
    slots = range(len(prompts)) if slots is None else slots
    rows = [
        (s, len(p) - 1, p[-1], limit, u, temperature)
        for s, p, u in zip(slots, prompts, uids, strict=False)
    ]
    fed = [p[:-1] for p in prompts]
    state = extend(fresh(), rows, fed, [len(p) - 1 for p in prompts], config, params)
    return decode(state, steps, params=params, config=config)


PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [3, 2, 1]]
score = jax.jit(update.score, static_argnums=0)


def assert_trainers_logprobs(chunk, temperature, config=CONFIG, params=PARAMS, frozen=None):
    """Asserts that the recorded log-probs are those that the trainer computes."""
    for slot, prompt in enumerate(PROMPTS):
        n = int(chunk.count_B[slot])
        new = chunk.tokens_CB[:n, slot].tolist()
        tokens = np.array([prompt + new + [0] * (16 - len(prompt) - n)], np.int32)
        ones = np.ones_like(tokens)
        positions = np.arange(16, dtype=np.int32)[None]
        batch = batches.Batch(tokens, np.roll(tokens, -1, 1), positions, ones, ones, ones, ones)
        settings = dataclasses.replace(SETTINGS, temperature=temperature, model=config)
        logp = np.asarray(score(settings, params, frozen or {}, batch)[0])[0]
        sampled = slice(len(prompt) - 1, len(prompt) - 1 + n)
        np.testing.assert_allclose(chunk.logprobs_CB[:n, slot], logp[sampled], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_equal_the_trainers(temperature):
    _, chunk = generate(PROMPTS, temperature)
    assert_trainers_logprobs(chunk, temperature)


@pytest.mark.ci
def test_recorded_logprobs_of_an_adapter_equal_the_trainers():
    _, base = generate(PROMPTS)
    _, chunk = generate(PROMPTS, config=LORA, params=UNSTACKED_LORA)
    assert np.abs(np.subtract(base.logprobs_CB[0], chunk.logprobs_CB[0])).max() > 0.1
    assert_trainers_logprobs(chunk, 1.0, LORA, ADAPTER, PARAMS)


def test_an_adapter_whose_b_is_zero_samples_like_the_base_bit_for_bit():
    # in one program, which leaves out the base
    new_adapter = jax.jit(lambda key: decoder.trainable(LORA, decoder.init_params(LORA, key)))
    adapter = jax.device_get(new_adapter(jax.random.key(5)))
    params = decoder.join(UNSTACKED, decoder.unstack(adapter, np.float32))
    _, expected = generate(PROMPTS)
    _, chunk = generate(PROMPTS, config=LORA, params=params)
    jax.tree.map(np.testing.assert_array_equal, expected, chunk)


def test_greedy_ignores_key_and_takes_the_likeliest():
    _, a = generate(PROMPTS, 0.0, uids=(1, 2, 3, 4))
    _, b = generate(PROMPTS, 0.0, uids=(5, 6, 7, 8))
    np.testing.assert_array_equal(a.tokens_CB, b.tokens_CB)
    _, hot = generate(PROMPTS, 1.0)
    assert (hot.tokens_CB != a.tokens_CB).any()


def test_tokens_do_not_depend_on_slot_or_neighbours():
    _, together = generate(PROMPTS)
    _, alone = generate([PROMPTS[1]], uids=(11,), slots=[3])
    np.testing.assert_array_equal(together.tokens_CB[:, 1], alone.tokens_CB[:, 3])
    np.testing.assert_allclose(together.logprobs_CB[:, 1], alone.logprobs_CB[:, 3], atol=1e-5)


def test_other_episode_id_other_tokens():
    _, a = generate([PROMPTS[0]] * 2, uids=(1, 2))
    assert (a.tokens_CB[:, 0] != a.tokens_CB[:, 1]).any()


def test_two_short_chunks_equal_a_long_one():
    state, first = generate(PROMPTS, steps=3)
    _, second = decode(state, steps=3)
    _, whole = generate(PROMPTS, steps=6)
    np.testing.assert_array_equal(
        np.concatenate([first.tokens_CB, second.tokens_CB]), whole.tokens_CB
    )


def test_extend_then_decode_equals_one_long_prompt():
    long = PROMPTS[2] + [20, 21, 22]
    _, expected = generate([long], uids=(9,))
    state = extend(fresh(), [(0, 3, long[3], CACHE, 9, 1.0)], [long[:3]], [3])
    state = extend(
        state, [(0, len(long) - 1, long[-1], CACHE, 9, 1.0)], [long[3:-1]], [len(long) - 4]
    )
    _, got = decode(state)
    np.testing.assert_array_equal(got.tokens_CB[:, 0], expected.tokens_CB[:, 0])
    np.testing.assert_allclose(got.logprobs_CB[:, 0], expected.logprobs_CB[:, 0], atol=1e-5)


def test_shared_prompt_equals_own_prompt():
    _, expected = generate([PROMPTS[0]] * 2, uids=(1, 2))
    prompt = PROMPTS[0]
    state = extend(fresh(), [(0, 3, prompt[-1], CACHE, 1, 1.0)], [prompt[:-1]], [3])
    state = sampler.copy_prefix(
        state,
        ROWS,
        np.zeros(SLOTS, np.int32),
        starts([(1, 3, prompt[-1], CACHE, 2, 1.0)]),
        depth=2,
    )
    _, got = decode(state)
    np.testing.assert_array_equal(got.tokens_CB[:, :2], expected.tokens_CB[:, :2])


def test_pieces_that_nobody_has_reached_need_not_be_read():
    state, _ = generate(PROMPTS, steps=2)
    copy = jax.tree.map(jnp.copy, state)
    np.testing.assert_array_equal(decode(state)[1].tokens_CB, decode(copy, depth=1)[1].tokens_CB)


def long_prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 60, length).tolist()


def written(prompts, layout=LAYOUT, rows=ROWS, temperature=1.0):
    """State after these prompts, fed in eights."""
    state = sampler.new_state(CONFIG, layout, jnp.float32)
    for start in range(0, max(map(len, prompts)) - 1, 8):
        heads = [p[: min(start + 8, len(p) - 1)] for p in prompts]
        counts = [max(0, len(head) - start) for head in heads]
        begun = [
            (slot, start + n, p[start + n], CACHE, 10 + slot, temperature)
            if n
            else (SLOTS, 0, 0, 0, 0, 0.0)
            for slot, (p, n) in enumerate(zip(prompts, counts, strict=True))
        ]
        tokens = np.zeros((SLOTS, 8), np.int32)
        for i, (head, n) in enumerate(zip(heads, counts, strict=True)):
            tokens[i, :n] = head[start:]
        count_M = np.pad(np.array(counts, np.int32), (0, SLOTS - len(counts)))
        state = sampler.extend(
            UNSTACKED,
            state,
            rows,
            starts(begun),
            tokens,
            count_M,
            config=CONFIG,
            depth=len(layout.ends),
            dtype=jnp.float32,
        )
    return state


@pytest.mark.ci
@pytest.mark.parametrize("length", [10, 15, 16, 17, 30])
def test_an_episode_that_crosses_pieces_equals_one_in_a_single_piece(length):
    """Written before, at and behind the border, and decoded over it."""
    prompts = [long_prompt(length), long_prompt(12, seed=1), long_prompt(20, seed=2)]
    single = kv_cache.full_layout((CACHE,), SLOTS)
    no_rows = np.zeros((0, SLOTS), np.int32)
    options = dict(config=CONFIG, eos=(EOS,), steps=6, dtype=jnp.float32)
    _, expected = sampler.decode_chunk(
        UNSTACKED,
        written(prompts, single, no_rows),
        no_rows,
        ROOM,
        STOPS,
        KEY,
        depth=1,
        **options,
    )
    state, first = decode(written(prompts), steps=3)
    _, second = decode(state, steps=3)
    for name in ("tokens_CB", "logprobs_CB"):
        got = np.concatenate([getattr(first, name), getattr(second, name)])
        whole = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(got[:, :3], whole[:, :3], atol=1e-5)


@pytest.mark.ci
def test_a_slot_without_room_waits_and_goes_on():
    """Memory for 6 tokens, then for all: the same tokens as without waiting, and the neighbours do
    not notice.
    """
    _, expected = generate(PROMPTS)
    state, _ = generate(PROMPTS, steps=1)
    little = np.array([6, CACHE, 6, CACHE], np.int32)
    state, first = decode(state, steps=5, room=little)
    assert first.count_B.tolist() == [2, 5, 0, 5]
    assert first.stop_B.tolist() == [sampler.RUNNING] * 4
    _, second = decode(state, steps=5)
    got = np.concatenate([first.tokens_CB[:2, 0], second.tokens_CB[:3, 0]])
    np.testing.assert_array_equal(got, expected.tokens_CB[1:, 0])
    np.testing.assert_array_equal(first.tokens_CB[:, 1], expected.tokens_CB[1:, 1])
    np.testing.assert_array_equal(second.tokens_CB[:, 2], expected.tokens_CB[1:, 2])


def test_rows_out_of_range_write_nothing():
    state, _ = generate(PROMPTS, steps=2)
    before = jax.device_get(state)
    after = jax.device_get(extend(state, [(SLOTS, 3, 1, 9, 1, 1.0)], [[1, 2, 3]], [3]))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def forced(tokens):
    """Params whose next token is a function of the last one, as `tokens` (a dict) says."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), UNSTACKED)
    embed = np.zeros((V, 32), np.float32)
    head = np.zeros((V, 32), np.float32)
    for axis, (last, following) in enumerate(tokens.items()):
        embed[last, axis] = 1.0
        head[following, axis] = 100.0
    made = {
        "embed": {"weight": embed},
        "head": {"weight": head},
        "final_norm": {"scale": np.ones((32,), np.float32)},
    }
    return zeros | made


@pytest.mark.parametrize(
    ("script", "limit", "count", "stop"),
    [
        # "</" + "s>!": found although the tag's last token carries more
        ({1: 60, 60: 61, 61: 2}, CACHE, 2, 0),
        ({1: 12, 12: 60, 60: 61}, CACHE, 3, 0),
        ({1: 2, 2: EOS}, CACHE, 2, sampler.EOS),
        ({1: 2, 2: 1}, 5, 4, sampler.LIMIT),  # total of 5 tokens with the prompt's one
        ({1: 2, 2: 1}, CACHE, 6, sampler.RUNNING),
    ],
)
def test_turn_ends(script, limit, count, stop):
    state = extend(fresh(), [(0, 0, 1, limit, 1, 0.0)], [[0]], [0])
    state, chunk = decode(state, params=forced(script))
    assert (int(chunk.count_B[0]), int(chunk.stop_B[0])) == (count, stop)
    assert int(state.length_B[0]) == count


def test_rows_end_independently():
    state = extend(fresh(), [(0, 0, 1, 3, 1, 0.0), (1, 0, 1, 6, 2, 0.0)], [[0], [0]], [0, 0])
    _, chunk = decode(state, params=forced({1: 2, 2: 1}))
    assert chunk.count_B.tolist() == [2, 5, 0, 0]
    assert chunk.stop_B.tolist() == [sampler.LIMIT] * 4


def draw(probs, rows=20000, temperature=1.0, truncation=sampling.ALL_TOKENS):
    """Tokens and log-probs of independent rows with these probabilities."""
    with np.errstate(divide="ignore"):  # log(0)
        logits = np.broadcast_to(np.log(np.float32(probs)), (rows, len(probs)))
    ids = np.arange(rows, dtype=np.int32)
    temperatures = np.full((rows,), temperature, np.float32)
    return sample(logits, KEY, ids, ids * 0, temperatures, truncation=truncation)


sample = jax.jit(sampling.sample, static_argnames="truncation")
PROBS = np.zeros(300)
PROBS[[0, 2, 150, 299]] = [0.1, 0.6, 0.25, 0.05]


def test_draw_follows_the_probabilities_in_and_across_blocks():
    drawn, logp = draw(PROBS)
    np.testing.assert_allclose(np.bincount(drawn, minlength=300) / 20000, PROBS, atol=0.012)
    assert not set(np.unique(drawn)) - {0, 2, 150, 299}
    np.testing.assert_allclose(logp, np.log(PROBS[np.asarray(drawn)]), atol=1e-5)


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (sampling.Truncation(top_k=1), [2]),
        (sampling.Truncation(top_k=3), [2, 150, 0]),
        (sampling.Truncation(top_p=0.5), [2]),
        (sampling.Truncation(top_p=0.7), [2, 150]),  # 0.6 is too little, 0.85 is enough
        (sampling.Truncation(top_p=0.96), [2, 150, 0, 299]),
        # 0.6 of the 0.85 that top_k leaves is 0.706
        (sampling.Truncation(top_k=2, top_p=0.71), [2, 150]),
        (sampling.Truncation(top_k=2, top_p=0.7), [2]),
    ],
)
def test_truncated_draw_has_the_renormalised_probabilities(truncation, kept):
    drawn, logp = draw(PROBS, truncation=truncation)
    left = np.zeros(300)
    left[kept] = PROBS[kept] / PROBS[kept].sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=300) / 20000, left, atol=0.012)
    np.testing.assert_allclose(logp, np.log(left[np.asarray(drawn)]), atol=1e-5)


def test_truncation_comes_after_temperature_and_equals_sorting():
    logits = 3 * np.random.default_rng(0).standard_normal((6, 1000), np.float32)
    got = np.asarray(sampling.Truncation(top_k=50, top_p=0.9).cut(jnp.asarray(logits)))
    for row, before in zip(got, np.asarray(logits), strict=True):
        best = np.sort(before)[::-1][:50]
        probs = np.exp(best) / np.exp(best).sum()
        n = int((np.cumsum(probs) < 0.9).sum()) + 1
        assert set(row[np.isfinite(row)]) == set(best[:n])
    hot, _ = draw(PROBS, temperature=5.0, truncation=sampling.Truncation(top_p=0.7))
    assert set(np.unique(hot)) == {2, 150, 0}  # at this temperature 2 and 150 have 0.57 together


def test_greedy_draw_takes_the_first_of_the_likeliest():
    logits = np.zeros((2, 300), np.float32)
    logits[:, [140, 141, 290]] = 1.0
    ids = np.arange(2, dtype=np.int32)
    token, logp = sample(logits, KEY, ids, ids, np.zeros(2, np.float32))
    assert token.tolist() == [140, 140]
    expected = 1 - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(logp, expected, rtol=1e-6)
