"""Comparing train states of runs that differ by the rounding of their gradients."""

from typing import Any, Protocol

import jax
import numpy as np

from ssp_jax.learner.state import TrainState

NOISE = 1e-8  # of gradients: their rounding, which is another one on each CPU
FAR_ABOVE = 1e-5  # a gradient of this size has no sign or size from rounding


class Optimizer(Protocol):
    """What bounds a step, of a LearnerConfig or of the config section `learner`."""

    learning_rate: float
    adam_b2: float


def assert_same_update(expected: TrainState, got: TrainState, c: Optimizer) -> None:
    """Asserts that both are after the same optimizer steps, a few, from the same params.

    Adam divides a gradient by its own size, so where a gradient is nothing but rounding, the step
    that it makes is of any size up to the learning rate. The moments are compared everywhere, to
    the rounding of gradients; the parameters where a gradient is far above rounding.
    """
    expected, got = jax.device_get((expected, got))
    updates = int(expected.updates)
    assert updates == int(got.updates) > 0

    def same(
        path: Any, param: Any, other_param: Any, mu: Any, other_mu: Any, nu: Any, other_nu: Any
    ) -> None:
        name = jax.tree_util.keystr(path)
        # sqrt: a second moment is a square, and so is its rounding.
        size = np.sqrt(nu / (1 - c.adam_b2))
        other_size = np.sqrt(other_nu / (1 - c.adam_b2))
        np.testing.assert_allclose(size, other_size, rtol=1e-3, atol=10 * NOISE, err_msg=name)
        np.testing.assert_allclose(mu, other_mu, rtol=1e-3, atol=10 * NOISE, err_msg=name)
        far = size > FAR_ABOVE
        assert far.any(), f"{name} has no gradient to compare by"
        np.testing.assert_allclose(
            param[far], other_param[far], atol=1e-2 * c.learning_rate, err_msg=name
        )
        most = 2.1 * updates * c.learning_rate
        np.testing.assert_allclose(param, other_param, atol=most, err_msg=name)

    adam = expected.opt_state[0]
    other = got.opt_state[0]
    trees = (expected.params, got.params, adam.mu, other.mu, adam.nu, other.nu)
    jax.tree_util.tree_map_with_path(same, *trees)
