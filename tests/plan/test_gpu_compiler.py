"""What XLA's compiler for GPUs makes of a run's programs, on a machine without a GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from configs import qwen7b
from ssp_jax.learner import flash
from ssp_jax.model import decoder, presets, sharding
from ssp_jax.plan import compile, hardware, memory
from ssp_jax.plan import planner as plan
from ssp_jax.runtime import device_memory, platform

pytestmark = pytest.mark.ci
needs_compiler = pytest.mark.skipif(
    not platform.gpu_compiler_installed(),
    reason="JAX's CUDA plugin is not installed: pip install '.[plan-gpu]'",
)
# The 7B's layers, two of them, and fewer words and rows of the prefill: what is tested does not
# depend on these, and half a minute of compiling does.
MODEL = dataclasses.replace(presets.ARCHITECTURES["Qwen2.5-7B"], num_layers=2, vocab_size=16384)
TRITON = "__gpu$xla.gpu.triton"
SHORT = {
    "engine.extend_rows": 1,
    "engine.extend_buckets": (64,),
    # What is kept for the backward pass would be most of what is measured.
    "model.remat": "full",
}


def compiled(topology: str) -> tuple[memory.Target, dict[str, jax.stages.Compiled]]:
    """By phase, with 32 slots and a row on each GPU."""
    slice_ = hardware.parse_topology(topology)
    sizes = {"engine.slots": 32 * slice_.chips, "learner.rows": slice_.chips}
    config = plan.with_values(qwen7b.get_config(), SHORT | sizes)
    target = plan.make_target(config, MODEL, slice_, compiled=True)
    sources = [*compile._sampler_sources(target), *compile._learner_sources(target)]
    return target, {
        source.phase: source.executable(compile.compile_options("gpu"))
        for source in sources
        if source.phase != "scores"
    }


@needs_compiler
@pytest.mark.parametrize(
    "topology", [pytest.param("gpu:h100x1", marks=pytest.mark.slow), "gpu:h100x8"]
)
def test_a_slice_of_the_7b_compiles_for_gpus(topology: str) -> None:
    target, programs = compiled(topology)
    assert set(programs) == {"prefill", "decode", "gradients", "optimizer"}
    caches = memory.sampler_state(target).caches
    size = memory.device_bytes(caches)
    pieces = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(caches)]
    of_a_device = [sorted(piece) for piece in pieces]

    # A chunk and a prefill read the cache where it is, and write into it.
    for name in ("prefill", "decode"):
        assert device_memory.program_bytes(programs[name]) < 0.15 * size, name
        made = re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|transpose)\(", programs[name].as_text())
        assert not [x for x in made if sorted(map(int, x.split(","))) in of_a_device], name

    # Attention of the update and of decoding is in kernels, as in a run, the latter one in each
    # layer, and all else in XLA's own operations.
    assert target.learner.attention == target.attend_by == "flash"
    for name, program in programs.items():
        targets = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
        assert set(targets) == ({TRITON} if name in ("gradients", "decode") else set()), name
        assert name != "decode" or len(targets) == MODEL.num_layers

    # So scores never exist, which are most of what XLA's blocks need. Gradients of layers do not
    # exist beside their sum either: on one GPU they would be too much.
    parameters = memory.device_bytes(memory.train_state(target).params)
    xla = plan.with_values(target.config, {"model.attention": "xla"})
    in_blocks = memory.temporaries(dataclasses.replace(target, config=xla), parameters)
    assert device_memory.program_bytes(programs["gradients"]) < in_blocks["gradients"] / 3.5

    # Each GPU gathers its layers, and gets its share of their gradients.
    text = programs["gradients"].as_text()
    communication = set(re.findall(r"(all-gather|reduce-scatter)\S*\(", text))
    expected = {"all-gather", "reduce-scatter"} if target.mesh.size > 1 else set()
    assert communication == expected

    # Shapes say what the optimizer step takes at most.
    estimate = memory.temporaries(target, parameters)["optimizer"]
    taken = device_memory.program_bytes(programs["optimizer"])
    assert taken < 1.1 * estimate


@needs_compiler
@pytest.mark.parametrize(
    ("remat", "dtype", "kernels"), [("full", jnp.bfloat16, 4), ("attention", jnp.float32, 3)]
)
def test_what_remat_keeps_of_flash_is_not_computed_again(
    remat: str, dtype: jnp.dtype, kernels: int
) -> None:
    """One kernel forward, two backward; only where nothing is kept another forward.

    And all fit the L4, whose multiprocessors have the least memory.
    """
    devices = compile.make_devices(hardware.parse_topology("gpu:l4x1"))
    rows = sharding.rows_sharding(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices))
    attend = sharding.shard_map_rows_and_heads(flash.attend, rows)
    q = jax.ShapeDtypeStruct((1, 256, 4, 128), dtype, sharding=rows)
    k = jax.ShapeDtypeStruct((1, 256, 2, 128), dtype, sharding=rows)
    segments = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=rows)

    @functools.partial(jax.checkpoint, policy=decoder.REMAT[remat])
    def layer(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return attend(jnp.sin(q), jnp.sin(k), jnp.sin(v), segments).astype(jnp.float32).sum()

    grads = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2)))
    program = grads.lower(q, k, k, segments).compile(compile.compile_options("gpu"))
    assert program.as_text().count(f'custom_call_target="{TRITON}"') == kernels


@needs_compiler
@pytest.mark.parametrize("kind", hardware.GPUS)
def test_the_compiler_knows_each_gpu(kind: str) -> None:
    """It multiplies bfloat16 where the table says so, and float32 copies elsewhere."""
    slice_ = hardware.parse_topology(f"gpu:{kind}x1")
    (device,) = compile.make_devices(slice_)
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=place)
    product = jax.jit(lambda x, y: x @ y).lower(x, x)
    text = product.compile(compile.compile_options("gpu")).as_text()
    gpu = slice_.chip.gpu
    assert gpu is not None
    copies = re.findall(r"= f32\[512,512\]\S* convert\(%param", text)
    assert len(copies) == (0 if gpu.has_bfloat16 else 2)
