"""The sampler's compiled programs: no copies of the cache, no rows computed twice, nothing sent
between shards.
"""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ssp_jax.model import decoder, sharding
from ssp_jax.plan import memory
from ssp_jax.rollout import kv_cache, sampler

pytestmark = pytest.mark.usefixtures("quick_compile")  # LLVM knows nothing of copies and shards
CONFIG = decoder.ModelConfig(64, 2, 32, 4, 2, 8, 48)
DEEP = decoder.ModelConfig(64, 5, 32, 4, 2, 8, 48)


def compiled(
    axes,
    config=CONFIG,
    ends=(16, 48),
    rows=(8, 8),
    written=(8, 16),
    dtype="float32",
    devices=None,
    steps=8,
    rows_read=None,
    attend_by="xla",
    names=("extend", "share", "decode"),
):
    """Each program for a mesh that is split so, and the bytes of keys and values on one of its
    devices.

    written: rows and tokens of each in a call of extend. rows_read: of the second piece, by a
    chunk. names: the programs to compile.
    """
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)), devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def numbers(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    state = jax.eval_shape(
        lambda: sampler.init_state(config, kv_cache.Layout(ends, rows, axes[0] * axes[1]), dtype)
    )
    params = jax.eval_shape(
        lambda: decoder.unstack(decoder.init_params(config, jax.random.key(0)), dtype)
    )
    shardings = sharding.state_shardings(state, mesh)
    params = memory.place(params, sharding.param_shardings(params, mesh, drop=("fsdp",)))
    state = memory.place(state, shardings)
    rows_JB = numbers(1, rows[0])
    slots = numbers(rows[0])
    some = numbers(written[0])
    begun = sampler.TurnStarts(*[some] * 6, numbers(written[0], dtype=jnp.float32))
    stops = sampler.Stops(numbers(9, config.vocab_size, dtype=jnp.int8), numbers(9, dtype=jnp.int8))
    key = numbers(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    tokens_MT = numbers(*written)
    common = dict(depth=2, shardings=shardings)
    model = dict(config=config, dtype=dtype)
    chunk = dict(eos=(1,), steps=steps, rows=rows_read, attend_by=attend_by)
    chunk |= dict(mesh=sampler.kernel_mesh(shardings))
    extended = (params, state, rows_JB, begun, tokens_MT, some)
    decoded = (params, state, rows_JB, slots, stops, key)
    lower = {
        "extend": lambda: sampler.extend.lower(*extended, **model, **common),
        "share": lambda: sampler.copy_prefix.lower(state, rows_JB, some, begun, **common),
        "decode": lambda: sampler.decode_chunk.lower(*decoded, **model, **chunk, **common),
    }
    programs = {name: lower[name]().compile() for name in names}
    return programs, memory.device_bytes(state.caches)


IN_PLACE = ("extend", "decode")  # programs that must write into the cache where it is


@pytest.mark.ci
@pytest.mark.parametrize("steps", [1, 8])
def test_the_cache_is_not_copied(steps):
    """Temporaries are about what one of many layers has: a chunk reads the cache where it is, and
    writes into it.
    """
    sizes = dict(ends=(256, 1024), rows=(64, 16), written=(4, 16))
    programs, size = compiled((1, 1, 1), DEEP, **sizes, steps=steps, names=IN_PLACE)
    for name in IN_PLACE:
        assert programs[name].memory_analysis().temp_size_in_bytes < 0.3 * size, name


@pytest.mark.ci
def test_a_chunk_reads_only_the_rows_that_it_is_told():
    """Few rows of the second piece, which is nearly all of the cache: where they are, uncopied."""
    sizes = dict(ends=(16, 1024), rows=(64, 64), written=(4, 16), names=("decode",))
    read = {}
    for rows in (4, 64):
        programs, size = compiled((1, 1, 1), DEEP, **sizes, rows_read=rows)
        decode = programs["decode"]
        assert decode.memory_analysis().temp_size_in_bytes < 0.3 * size
        read[rows] = decode.cost_analysis()["bytes accessed"]
    assert read[64] - read[4] > 0.9 * size


@pytest.mark.ci
def test_bfloat16_programs_of_two_devices_compile_and_send_nothing():
    """What accelerators run: JAX 0.11.2 has a compiler that crashes here, and only in bfloat16."""
    for name, program in compiled((1, 2, 1), dtype="bfloat16")[0].items():
        assert not re.findall(r" (?:all-|collective-|reduce-scatter)\w*\(", program.as_text()), name


@pytest.mark.ci
def test_each_part_of_a_mesh_computes_its_own_rows_and_sends_nothing():
    """On 8 devices each computes an eighth, and with `tensor` nothing goes beyond the two that
    share heads.
    """
    one, _ = compiled((1, 1, 1))
    split, _ = compiled((4, 2, 1))
    mixed, _ = compiled((2, 2, 2))
    communication = r" (?:all-|collective-|reduce-scatter)\w*\(.*"
    for name, program in one.items():
        flops = program.cost_analysis()["flops"]
        assert split[name].cost_analysis()["flops"] < 1.1 * flops / 8, name
        assert name == "share" or mixed[name].cost_analysis()["flops"] < 1.4 * flops / 8, name
        assert not re.findall(communication, split[name].as_text()), name
        for found in re.findall(communication, mixed[name].as_text()):
            groups = re.findall(r"[{,]\{(\d),(\d)\}", found)
            assert "replica_groups=[4,2]<=[8]," in found or groups, found
            assert all(int(a) // 2 == int(b) // 2 for a, b in groups), found


TPU = """
import json, re, sys
from ssp_jax.model import decoder
from ssp_jax.plan import compile, hardware
from tests.rollout.test_programs import IN_PLACE, compiled

topology, head_dim, *axes = json.loads(sys.argv[1])
data, fsdp, tensor = axes
shards = data * fsdp
config = decoder.ModelConfig(2048, 2, 256, 8, 4, head_dim, 512)
sizes = dict(ends=(512, 2048), rows=(32, 16), written=(2 * shards, 128), dtype="bfloat16")
devices = compile.make_devices(hardware.parse_topology(topology))
programs, size = compiled(
    axes, config, **sizes, devices=devices, attend_by="splash", names=IN_PLACE
)
kernels = re.findall('custom_call_target="tpu_custom_call"', programs["decode"].as_text())
assert len(kernels) == config.num_layers
pieces = ((32, 512), (16, 1536))
of_a_device = [sorted((rows // shards, 4 // tensor, head_dim, length)) for rows, length in pieces]
for name, program in programs.items():
    for line in program.as_text().splitlines():
        made = re.search(r"= bf16\\[([\\d,]+)\\].* (copy|transpose|scatter)\\(", line)
        assert not made or sorted(map(int, made[1].split(","))) not in of_a_device, (name, line)
temporaries = [program.memory_analysis().temp_size_in_bytes for program in programs.values()]
print(json.dumps(max(temporaries) / size))
"""


@pytest.mark.ci
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs `pip install libtpu`: compiles for TPU",
)
@pytest.mark.parametrize(
    ("topology", "head_dim", "axes"),
    [
        ("v5e:2x2", 64, (1, 2, 2)),  # slots and heads are split
        pytest.param("v5e:1x1", 64, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("v5e:2x2", 128, (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 128, (1, 1, 4), marks=pytest.mark.slow),
    ],
)
def test_on_tpu_the_cache_is_not_copied_either(topology, head_dim, axes):
    """Decoding has a kernel in each layer."""
    command = [sys.executable, "-c", TPU, json.dumps([topology, head_dim, *axes])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) < 0.3
