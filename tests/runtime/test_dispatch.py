"""Many programs in a row, on CPU devices that exchange data: none waits for ever.

In processes of their own, for what waits for ever cannot be interrupted.
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ci
SECONDS = 300
DIGESTS = """
import jax
import numpy as np
from ssp_jax.model import sharding
from ssp_jax.runtime.checkpoint import leaf_digests

rows = sharding.rows_sharding(sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
leaves = [jax.device_put(np.full((8, 4), i), rows) for i in range(100)]
for _ in range(5):
    print(len(set(leaf_digests(leaves).values())))
"""
MICRO_BATCHES = """
import numpy as np
from tests.learner.test_update import BASE, make_episodes, on_mesh

learner, state = on_mesh(BASE, 2, 2, 2)
episodes = make_episodes([BASE.row_tokens] * BASE.rows * 40)
for _ in range(3):
    state, _ = learner.update(state, episodes, np.ones(len(episodes)), np.random.default_rng(0))
    print(int(state.updates))
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        pytest.param(DIGESTS, [100] * 5, id="digests"),
        pytest.param(MICRO_BATCHES, [1, 2, 3], id="micro-batches", marks=pytest.mark.slow),
    ],
)
def test_no_number_of_programs_waits_for_ever(code: str, said: list[int]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=SECONDS
    )
    assert done.returncode == 0
    assert list(map(int, done.stdout.split())) == said
