"""The warm start of the tiny model: a short supervised pass on scripted episodes, stopped early on purpose.

Pretrained models know how to use tags, to search and to copy an answer; a model of a million parameters must be shown.
It only ever sees invented worlds, and players that know all moves but play them poorly (script.MIXED).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ssp_jax import learner, model

CONFIG = model.ModelConfig(
    vocab_size=2048,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    rope_theta=10000.0,
    tie_embeddings=True,
    qkv_bias=True,
)
STEPS = 3000
LEARNING_RATE = 3e-3
ROWS, ROW_TOKENS = 8, 384
GIVEN_WEIGHT = 0.1  # of prompt and result tokens in the loss: predicting them teaches to copy names


@dataclasses.dataclass(frozen=True)
class Shown:
    """A scripted episode in the learner's terms."""

    tokens: Sequence[int]
    sampled: Sequence[bool]
    logprobs: Sequence[float]


def repeats(vocab_size: int, steps: int, rng: np.random.Generator) -> Iterator[learner.Batch]:
    """Rows that repeat a random string of tokens: the quickest way to learn to copy, and nothing else can be learnt."""
    for _ in range(steps):
        tokens = np.zeros((ROWS, ROW_TOKENS + 1), np.int32)
        weight = np.zeros((ROWS, ROW_TOKENS), np.float32)
        for row in range(ROWS):
            period = int(rng.integers(4, 64))
            tokens[row] = np.resize(rng.integers(3, vocab_size, period), ROW_TOKENS + 1)
            weight[row, period:] = 1.0
        ones = np.ones((ROWS, ROW_TOKENS), np.int32)
        positions = np.broadcast_to(np.arange(ROW_TOKENS, dtype=np.int32), ones.shape)
        zeros = np.zeros_like(weight)
        yield learner.Batch(tokens[:, :-1], tokens[:, 1:], positions, ones, weight / weight.sum(), zeros, zeros)


def batches(episodes: Sequence[Shown], settings: Any, rng: np.random.Generator) -> Iterator[learner.Batch]:
    """Packed rows in random order, without end. Weights make the loss a mean over tokens."""
    while True:
        order = rng.permutation(len(episodes))
        for start in range(0, len(order), 2000):
            part = [episodes[i] for i in order[start : start + 2000]]
            packed = learner.make_batches(settings, part, np.ones(len(part), np.float32))
            for batch in packed[:-1]:  # the last one is not full
                real = (batch.segments_BT != 0) & (batch.targets_BT != 0)
                weight = np.where(batch.weight_BT > 0, 1.0, GIVEN_WEIGHT * real)
                yield dataclasses.replace(batch, weight_BT=(weight / weight.sum()).astype(np.float32))


def train_steps(
    params: Any, settings: Any, shown: Iterator[learner.Batch], steps: int, total: int
) -> Iterator[tuple[int, Any, float]]:
    """Yields (step, params, loss of the model's own tokens) after each supervised step."""
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 100, total, LEARNING_RATE / 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, batch: learner.Batch) -> Any:
        def loss(params: Any) -> Any:
            logp_BT = learner.score(settings, params, batch)[0]
            own_BT = batch.weight_BT == batch.weight_BT.max()
            return -(batch.weight_BT * logp_BT).sum(), -(own_BT * logp_BT).sum() / own_BT.sum()

        grads, own = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, own

    opt_state = optimizer.init(params)
    for step in range(1, steps + 1):
        params, opt_state, own = update(params, opt_state, next(shown))
        yield step, params, own
