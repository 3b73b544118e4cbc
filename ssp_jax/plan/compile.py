"""The programs of a run compiled ahead of time for a TPU slice that is not there, and what its
compiler says of them.

The PyPI package libtpu holds the whole TPU compiler and runs it on any CPU.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.game.roles import ROLES
from ssp_jax.learner import batches, update
from ssp_jax.model import sharding
from ssp_jax.plan.hardware import Slice
from ssp_jax.plan.memory import (
    Target,
    cast,
    device_bytes,
    sampler_params,
    sampler_state,
    train_state,
)
from ssp_jax.rollout import sampler

# libtpu must not look for the machine that it compiles for, and two plans may run side by side.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _bytes(found: Any) -> float:
    return float(found[1]) * _UNITS[found[2]]


def available() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def make_devices(slice_: Slice) -> list[Any]:
    os.environ |= _ENVIRONMENT
    options = {"chips_per_host_bounds": (1, 1, 1)} if slice_.chips == 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_.name, **options
        ).devices
        return sorted(found, key=lambda device: (device.process_index, device.id))
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology={slice_.name}: the TPU compiler refuses it: {str(error).splitlines()[0]}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device. FLOPs and bytes count the body of a loop
    once.
    """

    name: str
    phase: str
    seconds: float  # that compiling took
    temporaries: float  # bytes beyond what is kept, padding and code included
    flops: float
    hbm: float  # bytes
    fits: bool  # False: the compiler gave up


@dataclasses.dataclass(frozen=True)
class _Source:
    """A program before compilation: arguments are shapes with shardings; `counted` output bytes are
    kept.
    """

    name: str
    phase: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    counted: float = 0.0

    def compile(self) -> Program:
        start = time.monotonic()
        given = device_bytes(
            [x for x in jax.tree.leaves(self.arguments) if isinstance(x, jax.ShapeDtypeStruct)]
        )
        try:
            compiled = self.function.lower(*self.arguments, **self.options).compile()
        except jax.errors.JaxRuntimeError as error:
            # The compiler gives up before or after it has placed all buffers.
            needs = re.search(r"required for HLO temporaries \(([\d.]+)([KMG]?)\)", str(error))
            used = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", str(error))
            if needs is None and used is None:
                raise
            spent = time.monotonic() - start
            beyond = _bytes(needs) if needs else _bytes(used) - given - self.counted
            return Program(self.name, self.phase, spent, beyond, 0.0, 0.0, False)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        needed = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        spent = time.monotonic() - start
        beyond = needed - given - self.counted
        return Program(
            self.name, self.phase, spent, beyond, cost["flops"], cost["bytes accessed"], True
        )


def _sampler_sources(target: Target) -> Iterator[_Source]:
    """The largest prefill and the longest decode chunk, of one host."""
    sizes = target.sizes
    V = target.model.vocab_size
    whole = NamedSharding(target.playing, P())

    def struct(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    params, state = sampler_params(target), sampler_state(target)
    M = target.extend_rows * state.layout.shards
    T = max(b for b in sizes.extend_buckets if b <= sizes.cache_tokens)
    starts = {field.name: struct(jnp.int32, M) for field in dataclasses.fields(sampler.TurnStarts)}
    starts["temperature_M"] = struct(jnp.float32, M)
    pieces = len(state.layout.ends)
    rows_JB = struct(jnp.int32, pieces - 1, state.layout.rows[0])
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options: dict[str, Any] = {
        "config": target.model,
        "depth": pieces,
        "dtype": target.dtype,
        "shardings": shardings,
    }
    arguments: tuple[Any, ...] = (
        params,
        state,
        rows_JB,
        sampler.TurnStarts(**starts),
        struct(jnp.int32, M, T),
        struct(jnp.int32, M),
    )
    yield _Source(f"prefill of {M} x {T}", "prefill", sampler.extend, arguments, options)

    # of the stop automata: at most one a byte
    states = sum(len(stop) + 1 for role in ROLES for stop in role.stops)
    key = jax.eval_shape(lambda: jax.random.key(0))
    stops = sampler.Stops(struct(jnp.int8, states, V), struct(jnp.int8, states))
    arguments = (
        params,
        state,
        rows_JB,
        struct(jnp.int32, state.layout.rows[0]),
        stops,
        struct(key.dtype),
    )
    # not in place: the prefill has the other
    options = options | {"eos": (0,), "steps": sizes.chunk}
    yield _Source(
        f"decode of {sizes.slots} slots", "decode", sampler.decode_chunk, arguments, options
    )


def _learner_sources(target: Target) -> Iterator[_Source]:
    c, state = target.learner, train_state(target)
    copy = sampler_params(target)
    reshard = sharding.sampler_copy(target.model, target.mesh, target.dtype)
    yield _Source("reshard", "reshard", reshard, (state.params,), {}, device_bytes(copy))

    rows, whole = sharding.rows_sharding(target.mesh), NamedSharding(target.mesh, P())

    def column(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((c.rows, c.row_tokens), dtype, sharding=rows)

    batch = batches.Batch(*[column(jnp.int32)] * 4, *[column(jnp.float32)] * 3)
    zeros = jax.eval_shape(update._zeros, state.params)
    total = (
        state.params,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), zeros[1]),
    )
    layout = jax.tree.map(lambda x: x.sharding, state)
    reference_logp = None
    if c.kl_coef:
        reference_logp, reference = column(jnp.float32), cast(state.params, c.dtype)
        score = jax.jit(lambda params, batch: update.score(c, params, batch)[0])
        yield _Source("scores of the reference", "scores", score, (reference, batch), {})
    out = (layout.params, None)
    accumulate = jax.jit(
        functools.partial(update._accumulate, c), donate_argnums=(0,), out_shardings=out
    )
    arguments = (total, state.params, batch, column(jnp.float32), reference_logp)
    yield _Source(f"gradients of {c.rows} x {c.row_tokens}", "gradients", accumulate, arguments, {})
    apply = jax.jit(
        functools.partial(update._apply, c), donate_argnums=(0,), out_shardings=(layout, None)
    )
    yield _Source("optimizer step", "optimizer", apply, (state, state.params), {})


def compile_all(target: Target, tell: Callable[[str], None]) -> list[Program]:
    """target.mesh must be of make_devices(). One after the other: each takes all cores and much
    memory.
    """
    sources = [*_sampler_sources(target), *_learner_sources(target)]
    programs: list[Program] = []
    start = time.monotonic()
    for number, source in enumerate(sources, 1):
        tell(
            f"{time.monotonic() - start:5.0f} s: compiling {source.name} ({number} of {len(sources)})"
        )
        programs.append(source.compile())
    tell(f"{time.monotonic() - start:5.0f} s: compiled all")
    return programs
