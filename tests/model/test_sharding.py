"""Sharding: the mesh from the config, and the table that says what is split."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model import decoder, sharding

PARAMS = decoder.abstract_params(
    decoder.ModelConfig(64, 2, 32, 4, 2, 8, 48, qkv_bias=True, qk_norm=True)
)


def specs(**options):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    return jax.tree.map(lambda s: s.spec, sharding.param_shardings(PARAMS, mesh, **options))


def test_the_table():
    found = specs()
    assert found["embed"]["weight"] == P("tensor", "fsdp")
    attention, mlp = found["layers"]["attention"], found["layers"]["mlp"]
    assert attention["q"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert attention["k"]["bias"] == P(None, "tensor", None)
    assert attention["o"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert mlp["gate"]["kernel"] == P(None, "fsdp", "tensor")
    assert mlp["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert attention["q_norm"]["scale"] == P(None, None)


def samplers_copy(width):
    """Of both forms, the weights of the second layer."""
    config = decoder.ModelConfig(64, 2, width, 4, 2, 8, 48)
    rng = np.random.default_rng(0)
    given = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), decoder.abstract_params(config)
    )
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    copy = sharding.sampler_copy(config, mesh, np.float32)(given)
    layers = jax.tree.map(lambda x: x[1], given["layers"]), copy["layers"][1]
    return [layer["attention"] | layer["mlp"] for layer in layers]


def test_on_cpus_the_sampler_has_the_kernels_of_wide_models_turned_and_split_as_the_others():
    expected = {
        "q": P("tensor", None, None),
        "o": P(None, "tensor", None),
        "gate": P("tensor", None),
        "down": P(None, "tensor"),
    }
    given, copy = samplers_copy(256)
    for name, spec in expected.items():
        got = copy[name]["transposed"]
        num_in = 2 if name == "o" else 1
        kernel = np.moveaxis(given[name]["kernel"], range(num_in), range(-num_in, 0))
        np.testing.assert_array_equal(got, kernel)
        assert got.sharding.is_equivalent_to(NamedSharding(got.sharding.mesh, spec), got.ndim)
    given, copy = samplers_copy(128)
    np.testing.assert_array_equal(copy["down"]["kernel"], given["down"]["kernel"])


@pytest.mark.parametrize("width", [8, 7])  # 7 columns stay whole
def test_a_look_up_sends_no_table(width, capfd):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = sharding.rows_sharding(mesh)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, width), np.float32)
    tokens = rng.integers(0, 64, (8, 3), np.int32)
    dx = rng.standard_normal((8, 3, width), np.float32)

    def look_up(weight, tokens, dx):
        """The states, and the gradient of the weight."""

        def states(weight):
            x = sharding.embed_rows(rows, {"embed": {"weight": weight}}, tokens, np.float32)
            return jax.lax.with_sharding_constraint(x, rows)

        x, pull_back = jax.vjp(states, weight)
        return x, *pull_back(dx)

    of_weight = sharding.param_sharding("embed/weight", weight.shape, mesh)
    placed = jax.device_put((weight, tokens, dx), (of_weight, rows, rows))
    program = jax.jit(look_up, out_shardings=(rows, of_weight)).lower(*placed).compile()
    x, dweight = program(*placed)
    np.testing.assert_array_equal(x, weight[tokens])
    expected = np.zeros_like(weight)
    np.add.at(expected, tokens, dx)
    np.testing.assert_allclose(dweight, expected, rtol=1e-5, atol=1e-6)
    assert not re.search(r"= [^=]*\[64,\d+\][^=]* all-[a-z]+\(", program.as_text())
    assert "full rematerialization" not in capfd.readouterr().err


def test_a_dropped_axis_splits_nothing():
    spec = specs(drop=("fsdp",))["layers"]["mlp"]["gate"]["kernel"]
    assert spec == P(None, None, "tensor")


def test_sizes_that_do_not_divide_stay_whole():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 8})
    found = sharding.param_shardings(PARAMS, mesh)["layers"]["attention"]
    assert found["k"]["kernel"].spec == P(None, "fsdp", None, None)  # 2 key/value heads over 8


def test_a_parameter_without_a_rule_is_refused():
    params = {"layers": {"gate": jax.ShapeDtypeStruct((2, 2), "float32")}}
    with pytest.raises(ValueError, match="no sharding rule for parameter layers/gate"):
        sharding.param_shardings(params, sharding.make_mesh(ONE))


ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 1, 2), (2, 1, 2)),
    ],
)
def test_mesh_sizes(axes, shape):
    assert sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True))).devices.shape == shape


@pytest.mark.parametrize("axes", [(-1, -1, 1), (1, 0, 1), (3, -1, 1), (1, 16, 1)])
def test_impossible_meshes_are_input_errors(axes):
    with pytest.raises(InputError, match="config section mesh"):
        sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)))


def test_arrays_go_to_the_host_and_back():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    x = jax.device_put(np.arange(16.0).reshape(8, 2), NamedSharding(mesh, P("fsdp", "tensor")))
    host = sharding.to_host({"x": x}, "learner.offload_moments")["x"]
    assert host.sharding.memory_kind == sharding.HOST and host.sharding.spec == x.sharding.spec
    back = sharding.to_device({"x": host})["x"]
    assert back.sharding == x.sharding
    np.testing.assert_array_equal(back, x)


def test_a_backend_without_host_memory_is_told(monkeypatch):
    monkeypatch.setattr(sharding, "HOST", "attic")
    message = "key learner.offload_moments is True; expected False, for cpu has no attic"
    with pytest.raises(InputError, match=message):
        sharding.to_host(np.zeros(2), "learner.offload_moments")


@pytest.mark.parametrize(
    ("version", "devices", "shardy"),
    [("0.11.2", 2, False), ("0.11.2", 1, True), ("0.12.0", 2, True)],
)
def test_the_broken_shardy_is_off_on_several_devices(monkeypatch, capsys, version, devices, shardy):
    monkeypatch.setattr(jax, "__version__", version)
    before = jax.config.jax_use_shardy_partitioner
    try:
        jax.config.update("jax_use_shardy_partitioner", True)
        for _ in range(2):
            sharding.make_mesh({"data": devices, "fsdp": 1, "tensor": 1})
        assert jax.config.jax_use_shardy_partitioner is shardy
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)
    # printed once
    assert capsys.readouterr().err.count("Shardy, which crashes there, is off") == (not shardy)


def test_rows_heads_and_devices_that_do_not_divide_are_input_errors():
    mesh = sharding.abstract_mesh({"data": 2, "fsdp": 2, "tensor": -1}, 8)
    assert sharding.row_shards(mesh) == 4 and mesh.shape["tensor"] == 2
    sharding.check_rows(mesh, learner_rows=8, slots=4)
    with pytest.raises(InputError, match="engine.slots is 6; expected a multiple of .* = 4"):
        sharding.check_rows(mesh, learner_rows=8, slots=6)
    sharding.check_kv_heads(4, 2)
    with pytest.raises(InputError, match="tensor is 2; expected a divisor of 3 key/value heads"):
        sharding.check_kv_heads(3, 2)
    sharding.check_host_devices(4, 2)
    with pytest.raises(InputError, match="tensor is 8; expected a divisor of the 4 devices"):
        sharding.check_host_devices(4, 8)
