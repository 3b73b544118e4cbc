"""When a run is on the CPU."""

import pytest

from ssp_jax import cpu


@pytest.mark.parametrize(
    ("platforms", "gpu", "tpu", "expected"),
    [("cpu", True, True, True), ("", False, False, True), ("", True, False, False), ("", False, True, False)]
    + [("tpu", False, False, False), ("cuda,cpu", True, False, False)],
)
def test_the_cpu_is_used_where_nothing_else_is_there_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, platforms: str, gpu: bool, tpu: bool, expected: bool
) -> None:
    monkeypatch.setattr(cpu.gpu, "will_be_used", lambda environment: gpu)
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object() if tpu else None)
    assert cpu.will_be_used({"JAX_PLATFORMS": platforms}) is expected
