"""What a process tells its environment and the C library before JAX starts."""

import sys
from collections.abc import MutableMapping

from ssp_jax import cpu, gpu


def prepare(environment: MutableMapping[str, str]) -> None:
    """For the device that JAX is about to take; what it sets for a GPU it says on the standard error."""
    if gpu.will_be_used(environment):
        print("GPU: set", *gpu.set_defaults(environment) or ["nothing; the environment has it all"], file=sys.stderr)
    if cpu.will_be_used(environment):
        cpu.keep_memory()
