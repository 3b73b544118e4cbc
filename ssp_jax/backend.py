"""What a process needs to have told its environment before JAX starts."""

import os
import sys

from ssp_jax import cpu, gpu, tpu


def prepare() -> None:
    """For the device that JAX is about to take. The first thing a program does: it may start itself once more, because
    glibc reads its settings only when a process starts. What is set for a GPU is said on the standard error.
    """
    if platforms := tpu.platforms_without(os.environ):
        os.environ["JAX_PLATFORMS"] = platforms
        if "jax" in sys.modules:  # it has read its environment
            sys.modules["jax"].config.update("jax_platforms", platforms)
    if gpu.will_be_used(os.environ):
        print("GPU: set", *gpu.set_defaults(os.environ) or ["nothing; the environment has it all"], file=sys.stderr)
    if cpu.will_be_used(os.environ) and cpu.set_huge_pages(os.environ):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
