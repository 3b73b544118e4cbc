"""Check 8: moments that visit the host come back bit for bit; an infinite gradient is skipped."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import update
from benchmarks.proof.rows import Row, Setting, at_most, noted, verdict
from ssp_jax.model import sharding
from ssp_jax.model.sharding import HOST

SHAPE = update.SHAPES["1m"]
ROW_TOKENS = 256
UPDATES = 2  # between them the moments are on the host
KEY = "learner.offload_moments"


def check(setting: Setting) -> Iterator[Row]:
    _, plain = trained(offload_moments=False)
    learner, offloaded = trained(offload_moments=True)

    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(offloaded.opt_state)}
    yield verdict("moments lie in", ", ".join(map(str, kinds)), HOST, kinds == {HOST})
    there = sharding.to_host(plain.opt_state, KEY)
    back = sharding.to_device(there)
    yield equal("moments to the host and back", plain.opt_state, back)
    # A GPU adds the gradients of an embedding in any order.
    error = distance(plain.opt_state, offloaded.opt_state)
    yield at_most("moments of updates with and without the host differ by", error, 1e-4)

    before = jax.device_get(offloaded.params)
    after, report = step(learner, offloaded, np.inf)
    yield noted("norm of a gradient that is not finite", f"{report['grad_norm']}")
    counts = f"{int(after.bad_updates)} skipped in a row, {int(after.updates)} taken"
    is_skipped = int(after.bad_updates) == 1 and int(after.updates) == UPDATES
    expected = f"1 skipped in a row, {UPDATES} taken"
    yield verdict("such an update", counts, expected, is_skipped)
    yield equal("the weights after it", before, after.params)


def trained(**changes: Any) -> tuple[Any, Any]:
    """A learner, and its state after some updates."""
    learner, state = update.our_learner(SHAPE, SHAPE.rows, ROW_TOKENS, 0, **changes)
    for _ in range(UPDATES):
        state, _ = step(learner, state, 1.0)
    return learner, state


def step(learner: Any, state: Any, advantage: float) -> tuple[Any, dict[str, float]]:
    played = update.episodes(SHAPE, [ROW_TOKENS] * SHAPE.batch, ROW_TOKENS // 4)
    advantages = advantage * np.linspace(0.5, 1.0, len(played), dtype=np.float32)
    return learner.update(state, played, advantages, np.random.default_rng(0))


def equal(name: str, a: Any, b: Any) -> Row:
    """Whether all arrays of two trees are equal bit for bit."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    same = sum(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    return verdict(name, f"{same} of {len(pairs)} arrays", "bit for bit", same == len(pairs))


def distance(a: Any, b: Any) -> float:
    """Norm of the difference, as a share of the norm."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(float(np.sum((np.asarray(x) - np.asarray(y)) ** 2)) for x, y in pairs)
    whole = sum(float(np.sum(np.asarray(x) ** 2)) for x, _ in pairs)
    return (difference / whole) ** 0.5
