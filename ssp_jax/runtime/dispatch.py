"""How many programs wait for the devices at the same time."""

from typing import TypeVar

import jax

T = TypeVar("T")


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
