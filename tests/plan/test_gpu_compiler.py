"""What XLA's compiler for GPUs makes of a run's programs, on a machine without a GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from configs import qwen7b
from ssp_jax.model import presets
from ssp_jax.plan import compile, hardware, memory
from ssp_jax.plan import planner as plan
from ssp_jax.runtime import device_memory, platform

pytestmark = pytest.mark.ci
needs_compiler = pytest.mark.skipif(
    not platform.gpu_compiler_installed(),
    reason="JAX's CUDA plugin is not installed: pip install '.[plan-gpu]'",
)
# The 7B's layers, two of them, and fewer words, rows of the prefill and tokens of the update: what
# is tested does not depend on these, and half a minute of compiling does.
MODEL = dataclasses.replace(presets.ARCHITECTURES["Qwen2.5-7B"], num_layers=2, vocab_size=16384)
SHORT = {
    "engine.extend_rows": 1,
    "engine.extend_buckets": (64,),
    "learner.row_tokens": 512,
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
@pytest.mark.parametrize("topology", ["gpu:h100x1", "gpu:h100x8"])
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

    # Attention is XLA's own operations, as in a run: no kernel, and nothing that asks the host.
    assert target.learner.attention == "xla"
    for name, program in programs.items():
        assert "custom_call_target=" not in program.as_text(), name

    # Each GPU gathers its layers, and gets its share of their gradients.
    text = programs["gradients"].as_text()
    communication = set(re.findall(r"(all-gather|reduce-scatter)\S*\(", text))
    expected = {"all-gather", "reduce-scatter"} if target.mesh.size > 1 else set()
    assert communication == expected

    # Shapes say what the optimizer step takes at most.
    parameters = memory.device_bytes(memory.train_state(target).params)
    estimate = memory.temporaries(target, parameters)["optimizer"]
    taken = device_memory.program_bytes(programs["optimizer"])
    assert taken < 1.1 * estimate


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
