"""What is told to the C library before a run on the CPU."""

import platform
import subprocess
import sys

import pytest

from ssp_jax import cpu

CALLS = """
import resource
from ssp_jax import cpu
cpu.keep_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (jnp.exp(x.reshape(4096, 4096)) @ jnp.ones((4096, 8))).sum())  # a temporary of 64 MiB
x = jnp.ones(2**24)
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_called_again_finds_its_memory() -> None:
    """Fewest page faults of five calls; its 64 MiB are 16,384 of them where the kernel clears them anew."""
    done = subprocess.run([sys.executable, "-c", CALLS], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2000


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
