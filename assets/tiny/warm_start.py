"""The warm start of the tiny model: supervised on scripted episodes, stopped early on purpose.

Pretrained models know how to use tags, to search and to copy an answer; a model of a million
parameters must be shown. It only ever sees invented worlds, and players that know all moves but
play them poorly (script.MIXED).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from assets.tiny import script
from configs import default
from ssp_jax.assembly.sections import make_learner_config
from ssp_jax.learner.batches import Batch, make_batches
from ssp_jax.learner.state import LearnerConfig
from ssp_jax.learner.update import score
from ssp_jax.model import decoder

CONFIG = decoder.ModelConfig(
    vocab_size=2048,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    rope_theta=1e6,
    tie_embeddings=True,
    qkv_bias=True,
)
COPY_STEPS, COPY_ROWS, COPY_TOKENS = 750, 4, 128  # of repeated random strings
STEPS, ROWS, ROW_TOKENS = 4000, 4, 384  # of scripted episodes
EPISODES = 30_000
LEARNING_RATE = 2e-3
GIVEN_WEIGHT = 0.3  # of prompt and result tokens in the loss: predicting them teaches to copy names


@dataclasses.dataclass(frozen=True)
class Shown:
    """A scripted episode in the learner's terms."""

    tokens: Sequence[int]
    sampled: Sequence[bool]
    logprobs: Sequence[float]


def initial_params(seed: int) -> decoder.Params:
    """Random weights, but for one circuit: look up the token after this token's last occurrence.

    A large model finds this induction circuit (Olsson et al. 2022, arXiv 2209.11895) early in its
    pretraining; this one did not within the whole warm start, and started with a weak form of it,
    it does within a minute. Head 0 of layer 0 looks one token back, by its biases: with query
    angles 0 and key angles w per rotary frequency w, the score of a query at t and a key at s is a
    sum of cos(w * (t - s - 1)). It writes that token into a subspace; head 0 of layer 1 compares
    the current token with it, on the slow frequencies alone, and copies what it finds.
    """
    params = decoder.init_params(CONFIG, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    D, H = CONFIG.embed_dim, CONFIG.head_dim
    frequency = CONFIG.rope_theta ** (-np.arange(0, H, 2) / H)
    slow = np.tile(frequency < 0.02, 2)
    # where it is kept, and all else
    place, rest = np.split(np.linalg.qr(rng.normal(size=(D, D)))[0], [H], axis=1)
    name, copied = (
        rest @ np.linalg.qr(rng.normal(size=(D - H, H)))[0] for _ in range(2)
    )  # fingerprint; what is copied
    look_back = 12.0  # size of the biases: far likelier than the next best place
    for kernel in (params["layers"]["attention"]["o"], params["layers"]["mlp"]["down"]):
        kernel["kernel"] *= 0.2  # the rest starts quietly
    attention = params["layers"]["attention"]
    for part, leaf, layer, value in (
        ("q", "bias", 0, look_back * np.repeat([1.0, 0.0], H // 2)),
        ("k", "bias", 0, look_back * np.concatenate([np.cos(frequency), np.sin(frequency)])),
        ("v", "kernel", 0, name),
        ("o", "kernel", 0, 0.15 * place.T),
        ("q", "kernel", 1, 1.8 * name * slow),
        ("k", "kernel", 1, 1.8 * place * slow),
        ("v", "kernel", 1, copied),
        ("o", "kernel", 1, 0.5 * copied.T),
    ):
        head = (layer, 0) if leaf == "bias" or part == "o" else (layer, slice(None), 0)
        attention[part][leaf] = attention[part][leaf].at[head].set(jnp.asarray(value, jnp.float32))
    return params


def repeats(rng: np.random.Generator) -> Iterator[Batch]:
    """Endless rows that repeat a random string of tokens: only copying can be learnt from them."""
    shape = (COPY_ROWS, COPY_TOKENS)
    positions, ones = (
        np.broadcast_to(np.arange(COPY_TOKENS, dtype=np.int32), shape),
        np.ones(shape, np.int32),
    )
    while True:
        tokens, weight = (
            np.zeros((COPY_ROWS, COPY_TOKENS + 1), np.int32),
            np.zeros(shape, np.float32),
        )
        for row in range(COPY_ROWS):
            period = int(rng.integers(4, 32))
            tokens[row] = np.resize(rng.integers(3, CONFIG.vocab_size, period), COPY_TOKENS + 1)
            weight[row, period:] = 1.0
        zeros = np.zeros_like(weight)
        yield Batch(
            tokens[:, :-1], tokens[:, 1:], positions, ones, weight / weight.sum(), zeros, zeros
        )


def batches(episodes: Sequence[Shown], settings: Any, rng: np.random.Generator) -> Iterator[Batch]:
    """Packed rows in random order, without end. Weights make the loss a mean over tokens."""
    while True:
        order = rng.permutation(len(episodes))
        for start in range(0, len(order), 2000):
            part = [episodes[i] for i in order[start : start + 2000]]
            packed = make_batches(settings, part, np.ones(len(part), np.float32))
            # the last one is not full
            rows = jax.tree.map(lambda *parts: np.concatenate(parts), *packed[:-1])
            # Packing goes from long episodes to short ones; a model that follows this order learns
            # the order.
            mixed = rng.permutation(len(rows.tokens_BT))
            for first in range(0, len(mixed), settings.rows):
                batch = jax.tree.map(
                    lambda x, chosen=mixed[first : first + settings.rows]: x[chosen], rows
                )
                real = (batch.segments_BT != 0) & (batch.targets_BT != 0)
                weight = np.where(batch.weight_BT > 0, 1.0, GIVEN_WEIGHT * real)
                yield dataclasses.replace(
                    batch, weight_BT=(weight / weight.sum()).astype(np.float32)
                )


def train(
    params: decoder.Params,
    settings: LearnerConfig,
    source: Iterator[Batch],
    steps: int,
    name: str,
) -> decoder.Params:
    """Supervised steps; prints the loss of the model's own tokens."""
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, 100, steps, LEARNING_RATE / 10
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: decoder.Params, opt_state: Any, batch: Batch) -> Any:
        def loss(params: decoder.Params) -> Any:
            logp_BT = score(settings, params, {}, batch)[0]
            own_BT = batch.weight_BT == batch.weight_BT.max()
            return -(batch.weight_BT * logp_BT).sum(), -(own_BT * logp_BT).sum() / own_BT.sum()

        grads, own = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, own

    opt_state, losses = optimizer.init(params), []
    for step in range(1, steps + 1):
        params, opt_state, own = update(params, opt_state, next(source))
        losses.append(own)
        if step % 250 == 0:
            print(
                f"{name}, step {step} of {steps}: loss {np.mean(jax.device_get(losses)):.3f}",
                flush=True,
            )
            losses = []
    return params


def settings(rows: int, row_tokens: int) -> LearnerConfig:
    """What packing and scoring need; the loss and the optimizer are those of train()."""
    config = default.get_config()
    config.model.dtype = "float32"
    config.learner.update(rows=rows, row_tokens=row_tokens, logprob_chunk=COPY_TOKENS)
    return make_learner_config(config, CONFIG)


def warm_start(tokenizer: Any, seed: int) -> decoder.Params:
    """First copying, then scripted episodes of all roles."""
    params, rng = initial_params(seed), np.random.default_rng(seed)
    params = train(params, settings(COPY_ROWS, COPY_TOKENS), repeats(rng), COPY_STEPS, "copying")
    playing = settings(ROWS, ROW_TOKENS)
    episodes = script.generate_episodes(seed + 1, EPISODES, tokenizer, script.MIXED)
    shown = [
        Shown(tokens, own, [0.0] * len(tokens))
        for _, tokens, own in episodes
        if len(tokens) <= ROW_TOKENS
    ]
    return train(params, playing, batches(shown, playing, rng), STEPS, "scripted episodes")


def hf_config() -> dict[str, Any]:
    """CONFIG as the config.json of a Qwen2 model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.embed_dim,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "intermediate_size": CONFIG.mlp_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "tie_word_embeddings": CONFIG.tie_embeddings,
        "use_sliding_window": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
