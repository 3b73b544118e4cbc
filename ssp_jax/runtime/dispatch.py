"""Several programs at the same time: how they are compiled, and how many wait for the devices."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

T = TypeVar("T")


def compile_together(
    programs: Sequence[jax.stages.Lowered], stop: Callable[[], None] = lambda: None
) -> list[jax.stages.Compiled]:
    """Compiles programs on all cores, for XLA compiles without Python's lock.

    JAX keeps what it has lowered: a call of the jitted function with such arguments compiles
    nothing more. stop: called after each program; may raise.
    """
    # GPUs of several processes share the tuning of a program, and wait for each other's part of it:
    # all must compile in the same order.
    in_order = jax.process_count() > 1 and jax.default_backend() == "gpu"
    pool = ThreadPoolExecutor(1 if in_order else os.cpu_count())
    compiled = []
    try:
        for program in pool.map(lambda lowered: lowered.compile(), programs):
            compiled.append(program)
            stop()
    finally:
        pool.shutdown(cancel_futures=True)
    return compiled


def in_turn(result: T) -> T:
    """The result of a jitted program of which many are called in a row.

    XLA's CPU client takes at most 32 programs a device. Where CPU devices exchange data, a 33rd
    program can be started on one device and not on another, and all wait for ever (seen with
    jaxlib 0.10.2, in one process and in several; not with 0.12.0.1). So there the program ends
    before the next is called. Everywhere else the host runs ahead of the device.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(result)
    return result
