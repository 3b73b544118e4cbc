"""LoRA: what an update does not compute. Programs here are compiled as runs compile theirs."""

import dataclasses
import functools
import math
import re

import jax
import pytest

from ssp_jax.learner.batches import empty_batch
from ssp_jax.learner.state import init_state
from ssp_jax.learner.update import jit_programs
from ssp_jax.model import decoder, sharding
from ssp_jax.model.linear import Lora
from tests.learner.test_update import BASE

pytestmark = pytest.mark.ci
# Attention is little beside the weights, and no activation has as many numbers as a kernel.
MODEL = decoder.ModelConfig(1280, 2, 320, 5, 5, 64, 704)
KERNELS = {1280 * 320, 320 * 320, 320 * 704}  # numbers of the head, and of a layer's kernels
TOKENS = 48
LORA = Lora(2, 32.0, tuple(decoder.PROJECTIONS))


@functools.cache
def gradient_program(lora: Lora | None, remat: str) -> jax.stages.Compiled:
    """One micro-batch's gradient, of all weights or of the adapter alone."""
    model = dataclasses.replace(MODEL, lora=lora)
    c = dataclasses.replace(
        BASE, model=model, remat=remat, rows=1, row_tokens=TOKENS, logprob_chunk=TOKENS, kl_coef=0.0
    )
    params = decoder.init_params(model, jax.random.key(0))
    base, adapter = decoder.split_adapter(params)
    state = init_state(c, decoder.trainable(model, params))
    frozen = {} if lora is None else base
    batch = empty_batch(c.rows, c.row_tokens)
    accumulate = jit_programs(c, sharding.device_layout(state)).accumulate
    arguments = (None, state.params, frozen, batch, batch.sampler_logp_BT, None)
    return accumulate.lower(*arguments).compile()


def flops(program: jax.stages.Compiled) -> float:
    """The body of a loop counts once: one layer, and one chunk of logits."""
    return program.cost_analysis()["flops"]


def products(program: jax.stages.Compiled) -> set[int]:
    """How many numbers the results of matrix products have."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


@pytest.mark.parametrize(
    ("remat", "most"), [pytest.param("full", 0.75, marks=pytest.mark.slow), ("dots", 0.7)]
)
def test_no_gradient_of_a_frozen_weight_is_computed(remat: str, most: float) -> None:
    """Of forward, recomputation, and two products backward, one is not there.

    most: of the arithmetic of full fine-tuning. An adapter of rank 2 adds 1 %.
    """
    full = gradient_program(None, remat)
    lora = gradient_program(LORA, remat)
    assert products(full) >= KERNELS
    assert not products(lora) & KERNELS
    assert 0.6 < flops(lora) / flops(full) < most


def test_no_memory_is_kept_for_gradients_of_frozen_weights() -> None:
    layers = sum(x.size for x in jax.tree.leaves(decoder.abstract_params(MODEL)["layers"]))
    full, lora = (gradient_program(which, "full").memory_analysis() for which in (None, LORA))
    assert full.output_size_in_bytes > 4 * layers
    assert lora.output_size_in_bytes + lora.temp_size_in_bytes < 4 * layers
