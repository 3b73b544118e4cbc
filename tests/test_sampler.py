"""Sampler: what it records is what the trainer computes; stops, limits, independence of rows."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax import learner, model, sampler
from ssp_jax.stops import build_automaton

V, SLOTS, CACHE = 64, 4, 48
CONFIG = model.ModelConfig(V, 2, 32, 4, 2, 8, 48, qkv_bias=True)
PARAMS = model.init_params(CONFIG, jax.random.key(0))
UNSTACKED = model.unstack(PARAMS, jnp.float32)
KEY = jax.random.key(3)
EOS = 63
# Token i < 60 is the letter chr(48 + i); 60 is "</", 61 "s>": the stop "</s>" takes two tokens or four.
PIECES = [bytes([48 + i]) for i in range(60)] + [b"</", b"s>!", b"", b""]
AUTOMATON = build_automaton(["</s>"], PIECES, V)


def starts(rows):
    """rows: (slot, total length, pending token, limit, uid, temperature), padded to SLOTS rows that write nothing."""
    rows = [*rows, *[(SLOTS, 0, 0, 0, 0, 0.0)] * (SLOTS - len(rows))]
    slot, length, token, limit, uid, temperature = zip(*rows, strict=True)
    ints = [jnp.array(x, jnp.int32) for x in (slot, length, token, limit, [0] * SLOTS, uid)]
    return sampler.Starts(*ints, jnp.array(temperature, jnp.float32))


def extend(state, rows, tokens, counts):
    """One shape for all tests: SLOTS rows of 8 tokens."""
    tokens_NT, count_N = np.zeros((SLOTS, 8), np.int32), np.zeros((SLOTS,), np.int32)
    for i, (row, count) in enumerate(zip(tokens, counts, strict=True)):
        tokens_NT[i, : len(row)], count_N[i] = row, count
    return sampler.extend(
        CONFIG, UNSTACKED, state, starts(rows), tokens_NT, count_N, cache_len=CACHE, dtype=jnp.float32
    )


def decode(state, steps=6, cache_len=CACHE, params=UNSTACKED):
    return sampler.decode_chunk(
        CONFIG,
        params,
        state,
        jnp.asarray(AUTOMATON.table_SV),
        jnp.asarray(AUTOMATON.stop_S),
        KEY,
        eos=(EOS,),
        steps=steps,
        cache_len=cache_len,
        dtype=jnp.float32,
    )


def fresh():
    return sampler.init_state(CONFIG, SLOTS, CACHE, jnp.float32)


def generate(prompts, temperature=1.0, steps=6, uids=(10, 11, 12, 13), slots=None, limit=CACHE):
    slots = range(len(prompts)) if slots is None else slots
    rows = [(s, len(p) - 1, p[-1], limit, u, temperature) for s, p, u in zip(slots, prompts, uids, strict=False)]
    state = extend(fresh(), rows, [p[:-1] for p in prompts], [len(p) - 1 for p in prompts])
    return decode(state, steps)


PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [3, 2, 1]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_equal_the_trainers(temperature):
    _, chunk = generate(PROMPTS, temperature)
    for slot, prompt in enumerate(PROMPTS):
        n = int(chunk.count_B[slot])
        new = np.asarray(chunk.tokens_CB[:n, slot]).tolist()
        tokens = jnp.array([prompt + new + [0] * (16 - len(prompt) - n)])
        ones = jnp.ones_like(tokens)
        batch = learner.Batch(tokens, jnp.roll(tokens, -1, 1), jnp.arange(16)[None], ones, ones, ones, ones)
        values = dict(model=CONFIG, dtype=jnp.float32, remat="none", temperature=temperature, logprob_chunk=8)
        settings = types.SimpleNamespace(**values)
        logp = learner.score(settings, PARAMS, batch)[0][0, len(prompt) - 1 : len(prompt) - 1 + n]
        np.testing.assert_allclose(chunk.logprobs_CB[:n, slot], logp, atol=1e-5)


def test_greedy_ignores_key_and_takes_the_likeliest():
    _, a = generate(PROMPTS, 0.0, uids=(1, 2, 3, 4))
    _, b = generate(PROMPTS, 0.0, uids=(5, 6, 7, 8))
    np.testing.assert_array_equal(a.tokens_CB, b.tokens_CB)
    _, hot = generate(PROMPTS, 1.0)
    assert (np.asarray(hot.tokens_CB) != np.asarray(a.tokens_CB)).any()


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
    np.testing.assert_array_equal(jnp.concatenate([first.tokens_CB, second.tokens_CB]), whole.tokens_CB)


def test_extend_then_decode_equals_one_long_prompt():
    long = PROMPTS[2] + [20, 21, 22]
    _, expected = generate([long], uids=(9,))
    state = extend(fresh(), [(0, 3, long[3], CACHE, 9, 1.0)], [long[:3]], [3])
    state = extend(state, [(0, len(long) - 1, long[-1], CACHE, 9, 1.0)], [long[3:-1]], [len(long) - 4])
    _, got = decode(state)
    np.testing.assert_array_equal(got.tokens_CB[:, 0], expected.tokens_CB[:, 0])
    np.testing.assert_allclose(got.logprobs_CB[:, 0], expected.logprobs_CB[:, 0], atol=1e-5)


def test_shared_prompt_equals_own_prompt():
    _, expected = generate([PROMPTS[0]] * 2, uids=(1, 2))
    prompt = PROMPTS[0]
    state = extend(fresh(), [(0, 3, prompt[-1], CACHE, 1, 1.0)], [prompt[:-1]], [3])
    state = sampler.share(
        state, jnp.zeros(SLOTS, jnp.int32), starts([(1, 3, prompt[-1], CACHE, 2, 1.0)]), cache_len=CACHE
    )
    _, got = decode(state)
    np.testing.assert_array_equal(got.tokens_CB[:, :2], expected.tokens_CB[:, :2])


def test_short_cache_bucket_gives_the_same_tokens():
    state, _ = generate(PROMPTS, steps=2)
    copy = jax.tree.map(jnp.copy, state)
    np.testing.assert_array_equal(decode(state)[1].tokens_CB, decode(copy, cache_len=16)[1].tokens_CB)


def test_rows_out_of_range_write_nothing():
    state, _ = generate(PROMPTS, steps=2)
    before = jax.device_get(state)
    after = jax.device_get(extend(state, [(SLOTS, 3, 1, 9, 1, 1.0)], [[1, 2, 3]], [3]))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def forced(tokens):
    """Params whose next token is a function of the last one, as `tokens` (a dict) says."""
    zeros = jax.tree.map(jnp.zeros_like, UNSTACKED)
    embed, head = np.zeros((V, 32), np.float32), np.zeros((V, 32), np.float32)
    for axis, (last, following) in enumerate(tokens.items()):
        embed[last, axis], head[following, axis] = 1.0, 100.0
    ones = jnp.ones((32,))
    made = {"embed": {"weight": jnp.array(embed)}, "head": {"weight": jnp.array(head)}, "final_norm": {"scale": ones}}
    return zeros | made


@pytest.mark.parametrize(
    ("script", "limit", "count", "stop"),
    [
        ({1: 60, 60: 61, 61: 2}, CACHE, 2, 0),  # "</" + "s>!": found although the tag's last token carries more
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


def test_draw_follows_the_probabilities_in_and_across_blocks():
    probs = np.zeros(300)
    probs[[0, 2, 150, 299]] = [0.1, 0.6, 0.25, 0.05]
    logp = jnp.broadcast_to(jnp.log(probs), (20000, 300))
    drawn = sampler._draw(logp, jax.random.split(jax.random.key(0), 20000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=300) / 20000, probs, atol=0.012)
    assert not set(np.unique(drawn)) - {0, 2, 150, 299}


def test_cache_is_updated_in_place():
    """No copy of the whole cache inside the loop: temporaries stay near one copy per chunk, far below one a step."""
    state = jax.eval_shape(lambda: sampler.init_state(CONFIG, 64, 512, jnp.float32))
    shapes = jax.eval_shape(lambda: (UNSTACKED, jnp.asarray(AUTOMATON.table_SV), jnp.asarray(AUTOMATON.stop_S), KEY))
    compiled = sampler.decode_chunk.lower(
        CONFIG, shapes[0], state, *shapes[1:], eos=(EOS,), steps=16, cache_len=512, dtype=jnp.float32
    ).compile()
    cache = sum(x.size * 4 for x in (*state.k, *state.v))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache
    assert dataclasses.is_dataclass(state)
