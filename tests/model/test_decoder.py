"""Model: causal, equal in all its forms, and with Hugging Face's logits (tests/goldens, float32).

Compiling is nearly all of the time here: tests share models, shapes, and so compiled programs, and
read results with numpy, for an operation on a jax.Array compiles too.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.model import attention, decoder, hf_load, linear
from ssp_jax.rollout import kv_cache, sampler
from ssp_jax.rollout.stops import build_automaton
from tests.model_folders import edit_config
from tests.random_params import random_params

GOLDENS = Path(__file__).parents[1] / "goldens"


NAMES = ["qwen2", "qwen3", "llama3", "qwen2_untied", "llama3_tied"]


@functools.cache
def golden(name):
    """config, params and the reference's numbers."""
    config = hf_load.read_config(GOLDENS / name)
    with np.load(GOLDENS / f"{name}.npz") as numbers:
        return config, hf_load.load(GOLDENS / name, config, None, jnp.float32), dict(numbers)


@pytest.mark.parametrize("prompt", ["short", "long"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_huggingface(name, prompt):
    config, params, numbers = golden(name)
    got_BTV = np.asarray(full_logits(config, params, numbers[f"{prompt}_tokens"][None]))
    np.testing.assert_allclose(got_BTV[0], numbers[f"{prompt}_logits"], atol=2e-4)


LLAMA3 = json.loads((GOLDENS / "llama3/config.json").read_text())["rope_parameters"]
LENGTH = "original_max_position_embeddings"
BARE = {key: value for key, value in LLAMA3.items() if key not in (LENGTH, "rope_theta")}
OTHER = {"rope_type": "default", "rope_theta": 7.0}
SAME_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_untied", {"tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10000.0}),
    ("llama3", {"rope_parameters": OTHER, "rope_scaling": LLAMA3}),
    ("llama3", {"rope_parameters": OTHER, "rope_scaling": LLAMA3, "rope_theta": 9.0}),
    (
        "llama3",
        {"rope_parameters": OTHER, "rope_scaling": BARE | {LENGTH: 16}, "rope_theta": 100.0},
    ),
    ("llama3", {"rope_parameters": BARE, "rope_theta": 100.0, "max_position_embeddings": 16}),
    ("llama3", {"rope_parameters": LLAMA3 | {LENGTH: 99}, LENGTH: 16}),
]


@pytest.mark.parametrize(("name", "changes"), SAME_MODELS)
def test_other_configs_of_the_same_model_equal_huggingface(tmp_path, name, changes):
    """transformers 5.23 finds the golden numbers from each of these folders, too."""
    folder = edit_config(Path(shutil.copytree(GOLDENS / name, tmp_path / "model")), **changes)
    config = hf_load.read_config(folder)
    params = hf_load.load(folder, config, None, jnp.float32)
    _, _, numbers = golden(name)
    got_BTV = np.asarray(full_logits(config, params, numbers["long_tokens"][None]))
    np.testing.assert_allclose(got_BTV[0], numbers["long_logits"], atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_right_padding_and_packing_give_huggingfaces_logits(name):
    """Row 0: the short prompt, then padding; row 1: the short one packed before the beginning of
    the long one.
    """
    config, params, numbers = golden(name)
    short, long = numbers["short_tokens"], numbers["long_tokens"]
    n, m = len(short), len(long) - len(short)
    rows = np.stack([np.pad(short, (0, m)), np.concatenate([short, long[:m]])])
    segments = np.array([[1] * n + [0] * m, [1] * n + [2] * m])
    positions = np.array([[*range(n), *[0] * m], [*range(n), *range(m)]])
    got_BTV = np.asarray(full_logits(config, params, rows, segments, positions))
    np.testing.assert_allclose(got_BTV[0, :n], numbers["padded_logits"], atol=2e-4)
    np.testing.assert_allclose(got_BTV[1, :n], numbers["short_logits"], atol=2e-4)
    np.testing.assert_allclose(got_BTV[1, n:], numbers["long_logits"][:m], atol=2e-4)


# all features once: it compiles for long
@pytest.mark.parametrize(
    "name",
    [
        "qwen2_untied",
        pytest.param("qwen3", marks=pytest.mark.ci),
        pytest.param("llama3_tied", marks=pytest.mark.ci),
    ],
)
def test_cached_decoding_gives_huggingfaces_tokens(name):
    """Through the sampler, greedily: a prompt, then one token after the other."""
    config, params, numbers = golden(name)
    prompt, expected = numbers["short_tokens"], numbers["greedy_tokens"]
    params = decoder.unstack(jax.device_get(params), np.float32)
    no_stop = build_automaton(["</s>"], [b""] * config.vocab_size, config.vocab_size)
    start = [np.array([x], np.int32) for x in (0, len(prompt) - 1, prompt[-1], 100, 0, 0)]
    rows = np.zeros((0, 1), np.int32)  # the cache is one piece: no row of a later one
    state = sampler.extend(
        params,
        sampler.new_state(config, kv_cache.full_layout((48,), 1), jnp.float32),
        rows,
        sampler.TurnStarts(*start, np.zeros((1,), np.float32)),
        prompt[None, :-1],
        np.array([len(prompt) - 1], np.int32),
        config=config,
        depth=1,
        dtype=jnp.float32,
    )
    stops, room = sampler.Stops(no_stop.table_AV, no_stop.stop_A), np.array([48], np.int32)
    # eos never comes
    key, options = (
        jax.random.key(0),
        dict(config=config, eos=(config.vocab_size,), depth=1, dtype=jnp.float32),
    )
    _, chunk = sampler.decode_chunk(
        params, state, rows, room, stops, key, steps=len(expected), **options
    )
    chunk = jax.device_get(chunk)
    np.testing.assert_array_equal(chunk.tokens_CB[:, 0], expected)
    np.testing.assert_allclose(chunk.logprobs_CB[:, 0], numbers["greedy_logprobs"], atol=2e-4)


pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def random_model(**changes):
    shape = dict(
        vocab_size=61,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
    )
    config = decoder.ModelConfig(**(shape | changes))
    params = jax.device_put(random_params(config))
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12), np.int32)
    return config, params, tokens_BT


def full_logits(config, params, tokens_BT, segments_BT=None, positions_BT=None, remat="none"):
    shape = tokens_BT.shape
    segments_BT = np.ones(shape, np.int32) if segments_BT is None else segments_BT
    positions_BT = np.arange(shape[1])[None] if positions_BT is None else positions_BT
    positions_BT = np.broadcast_to(positions_BT, shape)
    return _full_logits(config, params, tokens_BT, segments_BT, positions_BT, remat)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _full_logits(config, params, tokens_BT, segments_BT, positions_BT, remat):
    hidden_BTD = decoder.forward(
        config,
        params,
        tokens_BT,
        positions_BT,
        lambda q, k, v: (attention.packed(q, k, v, segments_BT), None),
        dtype=jnp.float32,
        remat=remat,
    )
    return jax.vmap(decoder.logits, in_axes=(None, 0))(params, hidden_BTD)


def test_future_tokens_change_nothing():
    config, params, tokens_BT = random_model()
    changed_BT = tokens_BT.copy()
    changed_BT[:, 7:] = 0
    a = np.asarray(full_logits(config, params, tokens_BT))
    b = np.asarray(full_logits(config, params, changed_BT))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] != b[:, 7:]).any()


def test_packed_segments_equal_rows_of_their_own():
    config, params, tokens_BT = random_model(qkv_bias=True)
    segments = np.array([[1] * 5 + [2] * 7] * 2)
    positions = np.array([[*range(5), *range(7)]])
    packed = np.asarray(full_logits(config, params, tokens_BT, segments, positions))
    first = full_logits(config, params, tokens_BT[:, :5])
    second = full_logits(config, params, tokens_BT[:, 5:])
    np.testing.assert_allclose(packed[:, :5], first, atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], second, atol=1e-4)


def test_right_padding_changes_nothing():
    config, params, tokens_BT = random_model(qk_norm=True)
    segments = np.array([[1] * 9 + [0] * 3] * 2)
    padded = np.asarray(full_logits(config, params, tokens_BT, segments))
    alone = full_logits(config, params, tokens_BT[:, :9])
    np.testing.assert_allclose(padded[:, :9], alone, atol=1e-4)
    assert np.isfinite(padded).all()


@pytest.mark.ci
def test_remat_changes_no_gradient_but_what_is_kept():
    config, params, tokens_BT = random_model()

    def compiled(remat):
        grad = jax.grad(lambda p: full_logits(config, p, tokens_BT, remat=remat).sum())
        return jax.jit(grad).lower(params).compile()

    programs = {remat: compiled(remat) for remat in decoder.REMAT}
    expected = programs["none"](params)
    for program in programs.values():
        got = program(params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, expected
        )
    sizes = [programs[r].memory_analysis().temp_size_in_bytes for r in decoder.REMAT]
    assert list(decoder.REMAT) == ["full", "attention", "dots", "none"]
    full, kept_attention, dots, none = sizes
    assert full <= kept_attention < dots < none, sizes


def test_an_adapter_adds_little_to_what_dots_keeps():
    """The sums of frozen and low-rank products, and not both of them."""
    config, _, tokens_BT = random_model()

    def kept(lora, remat):
        model = dataclasses.replace(config, lora=lora)
        logits = functools.partial(full_logits, model, tokens_BT=tokens_BT, remat=remat)
        params = decoder.abstract_params(model)
        pullback = jax.eval_shape(lambda params: jax.vjp(logits, params)[1], params)
        return sum(x.size for x in jax.tree.leaves(pullback))

    lora = linear.Lora(1, 32.0, tuple(decoder.PROJECTIONS))
    plain, adapted = (kept(which, "dots") - kept(which, "full") for which in (None, lora))
    assert plain < adapted < 1.2 * plain


def test_gradient_of_a_kernel_comes_in_its_own_dtype():
    """Float32 master weights under bfloat16 compute: the product is not rounded on the way."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 4, 5), np.float32)
    x = jnp.asarray(rng.standard_normal((2, 6, 3, 4)), jnp.bfloat16)

    def squares(kernel):
        return (linear.contract(2, x, kernel).astype(jnp.float32) ** 2).sum()

    def expected_squares(kernel):
        return (jnp.einsum("btnh,nhd->btd", x.astype(jnp.float32), kernel) ** 2).sum()

    got = jax.jit(jax.grad(squares))(kernel)
    assert got.dtype == jnp.float32 and (got != got.astype(jnp.bfloat16)).any()
    expected = jax.jit(jax.grad(expected_squares))(kernel)
    np.testing.assert_allclose(got, expected, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("copies", [1, 8])  # 24 rows, for skinny_matmul, and 192
def test_unstacked_layers_give_the_same_hidden_states(copies, is_transposed):
    config, params, tokens_BT = random_model(qkv_bias=True, qk_norm=True)
    tokens_BT = np.tile(tokens_BT, (copies, 1))
    positions = np.broadcast_to(np.arange(12), tokens_BT.shape)

    def attend(cache, q, k, v):
        return attention.packed(q, k, v, jnp.ones(tokens_BT.shape, jnp.int32)), cache

    @jax.jit
    def cached_logits(params):
        unstacked = decoder.unstack(params, jnp.float32)
        if is_transposed:
            unstacked = decoder.transpose_kernels(config, unstacked)
        caches = (None,) * config.num_layers
        hidden_BTD, _ = decoder.forward_cached(
            config, unstacked, tokens_BT, positions, attend, caches, dtype=jnp.float32
        )
        return jax.vmap(decoder.logits, in_axes=(None, 0))(unstacked, hidden_BTD)

    expected = full_logits(config, params, tokens_BT)
    np.testing.assert_allclose(cached_logits(params), expected, atol=1e-4)


def test_tied_and_untied_heads():
    _, tied, _ = random_model(tie_embeddings=True)
    _, untied, _ = random_model()
    assert "head" not in tied and decoder.head_weight(tied) is tied["embed"]["weight"]
    assert decoder.head_weight(untied) is untied["head"]["weight"]


def test_abstract_params_are_the_params():
    config, _, _ = random_model(qkv_bias=True, qk_norm=True)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    got = jax.tree.map(lambda x: (x.shape, x.dtype), decoder.abstract_params(config))
    assert got == expected
