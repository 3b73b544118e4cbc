"""Sections of the config as typed parts."""

import pytest

from configs import default, tiny, vital_0p5b
from ssp_jax.assembly.sections import evaluation_sizes, make_sizes


@pytest.mark.parametrize(
    ("config", "tokens"), [(tiny, 64 + 320), (vital_0p5b, 640 + 1920), (default, 4096 + 8192)]
)
def test_an_evaluation_has_slots_for_solvers(config, tokens):
    c = config.get_config()
    sizes = evaluation_sizes(c, 1)
    assert sizes.cache_tokens == tokens <= c.engine.cache_tokens
    # A length of no whole steps, which a run's slots hold just so.
    c.limits.response_tokens -= 1
    c.engine.cache_tokens = tokens - 1
    assert evaluation_sizes(c, 1).cache_tokens == tokens - 1
    # A judge in the same slots may read more.
    c = config.get_config()
    c.eval.judge = "policy"
    assert evaluation_sizes(c, 1) == make_sizes(c, 1)
