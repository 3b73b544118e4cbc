"""The machine that plans, as a slice, and what a config sets there first."""

from typing import Any

import jax
from ml_collections import ConfigDict

from ssp_jax.config.keys import flatten_config
from ssp_jax.errors import InputError
from ssp_jax.model import attention
from ssp_jax.plan.hardware import CPU, GIB, Chip, Gpu, Slice
from ssp_jax.runtime import device_memory, platform

# Of a machine's memory. Shapes are 10 of the 16 GiB that a step of a 0.5B model took (measured);
# the system has needs of its own.
_CPU_SHARE = 0.5
# A CPU computes two rows in twice the time of one, so that more at a time only take memory; and in
# bfloat16 it takes three to four times as long as in float32 (measured).
_CPU_DTYPE = "float32"
_CPU_LIMITS = {"learner.rows": 1, "engine.slots": 8, "engine.extend_rows": 1}


def this_slice() -> Slice:
    """The devices of this machine, with the memory that a run finds on each. Starts JAX.

    Raises InputError.
    """
    devices = jax.local_devices()
    number = len(devices)
    device = devices[0]
    if device.platform == CPU:
        memory = _CPU_SHARE * platform.host_memory() / number
    elif found := device_memory.stats(device):
        memory = float(found["bytes_limit"])
    else:
        raise InputError(
            f"flag --hardware=this: {device.device_kind} devices do not report their memory; "
            "expected --topology"
        )
    gpu = None
    if device.platform == "gpu":
        capability = attention.capability(device) or (0, 0)
        gpu = Gpu(memory, capability, processors=0, clock=0.0, l2=0)
    # Rates are not known, and no time is planned.
    chip = Chip(memory, 0.0, 0.0, 0.0, per_host=number, devices=1, slices=(), gpu=gpu)
    kind = CPU if device.platform == CPU else device.device_kind
    return Slice("this machine", chip, number, kind, str(number), number)


def first_values(config: ConfigDict, slice_: Slice) -> dict[str, Any]:
    """Keys that suit a CPU whether the config fits without them or not."""
    if slice_.platform != CPU:
        return {}
    present = flatten_config(config)
    values: dict[str, Any] = {}
    if present["model.dtype"] != _CPU_DTYPE:
        values["model.dtype"] = _CPU_DTYPE
    for key, limit in _CPU_LIMITS.items():
        if present[key] > limit:
            values[key] = limit
    return values


def describe(slice_: Slice) -> str:
    """The devices and their memory, for a person."""
    each = " each" if slice_.chips > 1 else ""
    return f"{slice_.chips} x {slice_.kind}, {slice_.device.usable / GIB:.1f} GiB{each} for a run"
