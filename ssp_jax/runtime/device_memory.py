"""Memory of devices: how much is free, and one sentence where something does not fit."""

import contextlib
from collections.abc import Iterator

import jax

from ssp_jax.errors import InputError, first_line

GIB = 1 << 30
# Of a device's free memory, for an allocator that cannot use every gap, and for library workspaces.
RESERVE = 0.05


def stats(device: jax.Device) -> dict[str, int]:
    """What a device reports of its memory: nothing of a CPU, nor through Pathways' proxy."""
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError as error:
        if "MemoryStats is only supported" not in str(error):
            raise
        return {}


def free_bytes() -> int | None:
    """Bytes free on the fullest device of this process; None where devices do not report it."""
    reported = map(stats, jax.local_devices())
    return min((s["bytes_limit"] - s["bytes_in_use"] for s in reported if s), default=None)


def default_kind() -> str:
    """JAX's name of the memory in which this process's programs compute."""
    return jax.local_devices()[0].default_memory().kind


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes on a device that a program takes beside its arguments, while it runs."""
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not know
        return 0
    new_outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.temp_size_in_bytes + max(0, new_outputs))


@contextlib.contextmanager
def must_fit(what: str, remedy: str) -> Iterator[None]:
    """InputError in one sentence where a device or a compiler runs out of memory in the body."""
    try:
        yield
    # ValueError: as a program is dispatched.
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"{what} does not fit into a device's memory ({first_line(error)}); expected {remedy}; "
            "python -m ssp_jax.plan says for a config what would fit"
        ) from None
