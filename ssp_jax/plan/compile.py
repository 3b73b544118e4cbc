"""Compiling a run's programs ahead of time for absent TPUs or GPUs: their memory, FLOPs, cycles.

The PyPI package libtpu holds the whole TPU compiler, JAX's CUDA plugin that for GPUs, and both run
on any CPU.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError, first_line
from ssp_jax.game.roles import ROLES
from ssp_jax.learner import batches, update
from ssp_jax.model import sharding, weights
from ssp_jax.plan import gpu_target
from ssp_jax.plan.cycles import estimated_cycles
from ssp_jax.plan.hardware import Slice
from ssp_jax.plan.memory import (
    Target,
    cast,
    device_bytes,
    frozen_base,
    largest_moved,
    sampler_params,
    sampler_state,
    train_state,
)
from ssp_jax.plan.search import QUERIES
from ssp_jax.rollout import sampler
from ssp_jax.runtime import platform

# libtpu must not look for the machine that it compiles for, and two plans may run side by side.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Chips of a host in each direction, where they are not libtpu's own.
_HOST_BOUNDS = {1: (1, 1, 1), 8: (2, 4, 1)}
# The search for the fastest kernels runs them.
_WITHOUT_A_GPU = {"--xla_gpu_autotune_level": "0"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _bytes(match: re.Match[str]) -> float:
    """Groups of the match: a number, and a key of _UNITS."""
    return float(match[1]) * _UNITS[match[2]]


def make_devices(slice_: Slice) -> list[Any]:
    """Devices of the slice, host by host. Raises InputError where the compiler refuses it."""
    try:
        devices = _tpu_devices(slice_) if slice_.is_tpu else _gpu_devices(slice_)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology={slice_.name}: the compiler refuses it: {first_line(error)}"
        ) from None
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _tpu_devices(slice_: Slice) -> list[Any]:
    os.environ |= _ENVIRONMENT
    bounds = _HOST_BOUNDS.get(min(slice_.chips, slice_.chips_per_host))
    options = {"chips_per_host_bounds": bounds} if bounds else {}
    name = f"{slice_.kind}:{slice_.shape}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _gpu_devices(slice_: Slice) -> list[Any]:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=gpu_target.target_config(slice_.chip),
        topology=f"1x{slice_.hosts}x{slice_.per_host}",
    )
    return topology.devices


def compile_options(devices: str) -> dict[str, str | bool]:
    """XLA's flags with which a run compiles, beside those of the environment.

    devices: platform of the devices.
    """
    if devices != "gpu":
        return {}
    of_a_run = platform.missing_flags(os.environ) | _WITHOUT_A_GPU
    # The text of a flag is `true`; an option is a bool.
    bools = {"true": True, "false": False}
    return {name.removeprefix("--"): bools.get(text, text) for name, text in of_a_run.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiler's report of one program, per device. It counts the body of a loop once."""

    name: str
    phase: str
    seconds: float  # that compiling took
    temporaries: float  # bytes beyond persistent arrays, padding and code included
    flops: float | None  # None: the compiler does not count them
    fits: bool  # False: the compiler gave up
    cycles: float = 0.0  # of a TPU, in loops, too: see plan.cycles


@dataclasses.dataclass(frozen=True)
class _Source:
    """A program before compilation."""

    name: str
    phase: str
    function: Any  # jitted
    arguments: tuple[Any, ...]  # shapes with shardings
    options: dict[str, Any]
    persistent_outputs: float = 0.0  # bytes of outputs that are no temporaries
    turns: float = 1.0  # mean number of turns of the loops for which it depends on data

    def executable(self, xla: Mapping[str, str | bool]) -> jax.stages.Compiled:
        """xla: of compile_options()."""
        return self.function.lower(*self.arguments, **self.options).compile(dict(xla))

    def compile(self, xla: Mapping[str, str | bool] | None = None) -> Program:
        """Compiles it; one that the compiler gives up on for memory has fits=False.

        xla: of compile_options().
        """
        start = time.monotonic()
        leaves = jax.tree.leaves(self.arguments)
        arguments = device_bytes([x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)])
        try:
            compiled = self.executable(xla or {})
        except jax.errors.JaxRuntimeError as error:
            # The compiler gives up before or after it has placed all buffers.
            needs = re.search(r"required for HLO temporaries \(([\d.]+)([KMG]?)\)", str(error))
            used = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", str(error))
            if needs:
                temporaries = _bytes(needs)
            elif used:
                temporaries = _bytes(used) - arguments - self.persistent_outputs
            else:
                raise
            seconds = time.monotonic() - start
            return Program(self.name, self.phase, seconds, temporaries, None, False)
        memory = compiled.memory_analysis()
        text = compiled.as_text()
        assert memory is not None and text is not None
        cost = compiled.cost_analysis()  # None of a GPU's program
        temporaries = (
            memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
            - self.persistent_outputs
        )
        # Padding of arguments. Those that the program does not read are not its arguments.
        temporaries += max(memory.argument_size_in_bytes - arguments, 0)
        return Program(
            self.name,
            self.phase,
            seconds=time.monotonic() - start,
            temporaries=temporaries,
            # A program without arithmetic has no entry for it.
            flops=None if cost is None else cost.get("flops", 0.0),
            fits=True,
            cycles=estimated_cycles(text, self.turns),
        )


def _sampler_sources(target: Target) -> Iterator[_Source]:
    """The largest prefill and the longest decode chunk, of one host."""
    sizes = target.sizes
    replicated = NamedSharding(target.playing, P())

    def struct(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    params = sampler_params(target)
    state = sampler_state(target)
    layout = state.layout
    shardings = jax.tree.map(lambda x: x.sharding, state)
    buckets = len(layout.ends)
    rows_JB = struct(jnp.int32, buckets - 1, layout.rows[0])
    options: dict[str, Any] = {
        "config": target.model,
        "depth": buckets,
        "dtype": target.dtype,
        "shardings": shardings,
    }

    # Prefill.
    M = target.extend_rows * layout.shards
    T = target.extend_tokens
    starts = {field.name: struct(jnp.int32, M) for field in dataclasses.fields(sampler.TurnStarts)}
    starts["temperature_M"] = struct(jnp.float32, M)
    arguments: tuple[Any, ...] = (
        params,
        state,
        rows_JB,
        sampler.TurnStarts(**starts),
        struct(jnp.int32, M, T),
        struct(jnp.int32, M),
    )
    # Each row is written into one of the pieces.
    turns = target.extend_rows / buckets
    yield _Source(
        f"prefill of {M} x {T}", "prefill", sampler.extend, arguments, options, turns=turns
    )

    # Decode. A stop automaton has at most one state a byte.
    V = target.model.vocab_size
    A = sum(len(stop) + 1 for role in ROLES for stop in role.stops)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        params,
        state,
        rows_JB,
        struct(jnp.int32, layout.rows[0]),
        sampler.Stops(struct(jnp.int8, A, V), struct(jnp.int8, A)),
        struct(key.dtype),
    )
    # A new dict: the prefill has the other.
    options = options | {"eos": (0,), "steps": sizes.chunk}
    options |= {"attend_by": target.attend_by, "mesh": sampler.kernel_mesh(shardings)}
    name = f"decode of {sizes.slots} slots"
    turns = layout.per_shard.rows[0] / buckets
    yield _Source(name, "decode", sampler.decode_chunk, arguments, options, turns=turns)


def _search_sources(target: Target) -> Iterator[_Source]:
    """The largest batch of queries, on one host."""
    search = target.search
    if search is not None and search.rows:
        program, arguments = search.program(target.playing.devices)
        yield _Source(f"search of {QUERIES} queries", "search", program, arguments, {})


def _reshard_sources(target: Target) -> Iterator[_Source]:
    """The sampler's copy of what is trained, and, of LoRA, a move of the base to it and back."""
    params = train_state(target).params
    copy = sharding.sampler_copy(target.model, target.mesh, target.dtype)
    copy_bytes = device_bytes(sampler_params(target))
    if target.model.lora is None:
        yield _Source("reshard", "reshard", copy, (params,), {}, copy_bytes)
        return
    base = dataclasses.replace(target, model=target.model.base)
    copy_bytes -= device_bytes(sampler_params(base))
    yield _Source("copy of the adapter", "reshard", copy, (params,), {}, copy_bytes)

    # The layers are what is not temporary, wherever they are: an output, and then an argument.
    path, stacked, layers = largest_moved(target)
    there = weights.unstacker(len(layers), 0, layers[0].sharding)
    back = weights.stacker(0, stacked.sharding)
    more = device_bytes(layers) - device_bytes(stacked)
    yield _Source(f"move of {path}", "reshard", there, (stacked,), {}, more)
    yield _Source(f"move of {path} back", "reshard", back, (layers,), {})


def _learner_sources(target: Target) -> Iterator[_Source]:
    """The programs of an update, over all devices."""
    c = target.learner
    state = train_state(target)
    frozen = frozen_base(target)
    by_rows = sharding.rows_sharding(target.mesh)
    replicated = NamedSharding(target.mesh, P())

    def placed(tree: Any, where: NamedSharding) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    programs = update.jit_programs(c, jax.tree.map(lambda x: x.sharding, state))
    batch = placed(batches.empty_batch(c.rows, c.row_tokens), by_rows)
    logp_BT = batch.sampler_logp_BT
    # Chunks of logits, where all tokens of a row are sampled.
    chunks = c.row_tokens / c.logprob_chunk
    if c.kl_coef:
        arguments: tuple[Any, ...] = (cast(state.params, c.dtype), frozen, batch)
        name = "scores of the reference"
        yield _Source(name, "scores", programs.score, arguments, {}, turns=chunks)

    _, sums = jax.eval_shape(programs.zero_total, state.params)
    total = (state.params, placed(sums, replicated))
    arguments = (total, state.params, frozen, batch, logp_BT, logp_BT if c.kl_coef else None)
    name = f"gradients of {c.rows} x {c.row_tokens}"
    yield _Source(name, "gradients", programs.accumulate, arguments, {}, turns=chunks)

    arguments = (state, state.params)
    yield _Source("optimizer step", "optimizer", programs.apply, arguments, {})


def compile_all(target: Target, log: Callable[[str], None]) -> list[Program]:
    """Compiles all programs of a run; target.mesh must be of make_devices().

    One after the other: each compilation takes all cores and much memory.
    """
    sources = [
        *_sampler_sources(target),
        *_search_sources(target),
        *_reshard_sources(target),
        *_learner_sources(target),
    ]
    xla = compile_options(target.platform)
    programs: list[Program] = []
    start = time.monotonic()
    for number, source in enumerate(sources, 1):
        seconds = time.monotonic() - start
        log(f"{seconds:5.0f} s: compiling {source.name} ({number} of {len(sources)})")
        programs.append(source.compile(xla))
    log(f"{time.monotonic() - start:5.0f} s: compiled all")
    return programs
