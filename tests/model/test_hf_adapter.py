"""Adapters: PEFT's folders in and out, with PEFT's logits (tests/goldens), and bad ones say why."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ssp_jax.errors import InputError
from ssp_jax.model import decoder, hf_adapter, hf_load, hf_save, hf_table, sharding
from ssp_jax.model.linear import Lora
from ssp_jax.model.weights import LoraWeights
from tests.model.test_decoder import full_logits
from tests.model_folders import GOLDENS, assert_same, load

pytestmark = pytest.mark.usefixtures("quick_compile")

BASES = {"qwen2_lora": "qwen2", "qwen3_rslora": "qwen3"}
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DOWN_B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


def config_of(name: str) -> decoder.ModelConfig:
    base = hf_load.read_config(GOLDENS / BASES[name])
    return dataclasses.replace(base, lora=hf_adapter.read(GOLDENS / name, base).lora)


@functools.cache
def golden(name: str) -> tuple[decoder.ModelConfig, Any, Any]:
    """config, and the params of the base and of the adapter."""
    config = config_of(name)
    adapter = hf_adapter.load(GOLDENS / name, config, None, jnp.float32)
    return config, load(GOLDENS / BASES[name]), adapter


def assert_logits(config: decoder.ModelConfig, params: Any, name: str) -> None:
    with np.load(GOLDENS / f"{name}.npz") as numbers:
        got_BTV = full_logits(config, params, jnp.asarray(numbers["tokens"])[None])
        np.testing.assert_allclose(got_BTV[0], numbers["logits"], atol=2e-4)


# --- the same numbers as PEFT's -------------------------------------------------------------------


def test_the_config_says_what_the_adapter_is():
    assert config_of("qwen2_lora").lora == Lora(4, 8.0, tuple(decoder.PROJECTIONS))
    assert config_of("qwen3_rslora").lora == Lora(3, 2.5, ("q_proj", "v_proj"), True)


@pytest.mark.parametrize("name", BASES)
def test_logits_with_the_adapter_unmerged_equal_pefts(name):
    config, base, adapter = golden(name)
    assert_logits(config, decoder.join(base, adapter), name)
    with pytest.raises(AssertionError):  # the base alone says something else
        assert_logits(config.base, base, name)


@pytest.mark.parametrize("name", BASES)
def test_logits_of_the_merged_export_equal_pefts(name, tmp_path):
    config, base, adapter = golden(name)
    source = GOLDENS / BASES[name]
    hf_save.save(decoder.join(base, adapter), config, tmp_path / "merged", source, "float32")
    assert hf_load.read_config(tmp_path / "merged") == config.base
    assert_logits(config.base, load(tmp_path / "merged"), name)


@pytest.mark.parametrize("name", BASES)
def test_the_exported_folder_is_the_one_that_peft_was_given(name, tmp_path):
    """make_adapter_goldens.py --check loads NAME_written by peft, and finds the same logits."""
    config, _, adapter = golden(name)
    hf_save.save_adapter(adapter, config, tmp_path / "out", BASES[name])
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    expected = {path.name: path.read_bytes() for path in (GOLDENS / f"{name}_written").iterdir()}
    assert written == expected
    tensors = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    original = safetensors.numpy.load_file(GOLDENS / name / "adapter_model.safetensors")
    assert tensors.keys() == original.keys()
    for tensor, x in original.items():
        np.testing.assert_array_equal(tensors[tensor], x, strict=True)
    with safetensors.safe_open(tmp_path / "out/adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_adapter_of_one_layer_for_each_device(tmp_path):
    """Loaded in shards it is the one that is loaded whole, and 8 devices write the same bytes."""
    config, base, adapter = golden("qwen2_lora")
    for sizes in ({"data": 1, "fsdp": 4, "tensor": 2}, {"data": 8, "fsdp": 1, "tensor": 1}):
        mesh = sharding.make_mesh(sizes)
        shardings = sharding.param_shardings(decoder.abstract_trainable(config), mesh)
        sharded = hf_adapter.load(GOLDENS / "qwen2_lora", config, shardings, jnp.float32)
        assert_same(sharded, adapter)
        for x, place in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings), strict=True):
            assert x.sharding == place
        hf_save.save_adapter(sharded, config, tmp_path / "out", "qwen2")
        for path in (GOLDENS / "qwen2_lora_written").iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.ci
def test_a_merged_export_of_8_devices_is_that_of_one(tmp_path):
    """Integers, so that no sum of theirs is rounded, in whatever order it is made."""
    config, base, adapter = golden("qwen2_lora")
    whole = jax.tree.map(lambda x: jnp.round(4 * x), decoder.join(base, adapter))
    hf_save.save(whole, config, tmp_path / "one", GOLDENS / "qwen2", "float32")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    sharded = jax.device_put(whole, sharding.param_shardings(whole, mesh))
    hf_save.save(sharded, config, tmp_path / "eight", GOLDENS / "qwen2", "float32")
    assert_same(load(tmp_path / "eight"), load(tmp_path / "one"))
    kernel = whole["layers"]["mlp"]["down"]
    expected = kernel["kernel"] + 2.0 * jnp.einsum(
        "lfy,lyd->lfd", kernel["lora_a"], kernel["lora_b"]
    )
    merged = load(tmp_path / "eight")["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(merged, expected)


def test_a_run_starts_from_the_adapter_of_the_folder():
    """What it trains begins as the folder's tensors; what it plays with is they, on the base."""
    config, base, adapter = golden("qwen3_rslora")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])
    folder = str(GOLDENS / "qwen3_rslora")
    weights = LoraWeights(str(GOLDENS / "qwen3"), config, mesh, jnp.float32, folder)
    assert_same(weights.initial(), adapter)
    played = weights.initial_for_sampler()
    assert_same(played, decoder.unstack(decoder.join(base, adapter), jnp.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(adapter, dtype):
    file = adapter / "adapter_model.safetensors"
    halves = {name: x.astype(dtype) for name, x in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(halves, file)
    config = config_of("qwen2_lora")
    found = hf_adapter.load(adapter, config, None, jnp.float32)

    def rounded(x):
        # Not by JAX: its CPU compiler has no float16 where the CPU has none.
        return np.asarray(x).astype(dtype).astype(np.float32)

    expected = jax.tree.map(rounded, golden("qwen2_lora")[2])
    assert_same(found, expected)


# --- adapter_config.json --------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of an adapter of all projections, which a test may damage."""
    return Path(shutil.copytree(GOLDENS / "qwen2_lora", tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> None:
    """Sets keys of adapter_config.json; the value `...` removes one."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in values.items() if x is not ...}))


ALL = tuple(decoder.PROJECTIONS)
NO_UP = tuple(projection for projection in ALL if projection != "up_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FULL_NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
SAME_FUNCTIONS: list[tuple[dict[str, Any], Lora]] = [
    ({"target_modules": "all-linear"}, Lora(4, 8.0, ALL)),
    ({"target_modules": "All-Linear", "exclude_modules": ["mlp.up_proj"]}, Lora(4, 8.0, NO_UP)),
    ({"target_modules": r".*\.mlp\.\w+_proj"}, Lora(4, 8.0, MLP)),
    ({"target_modules": r".*proj", "exclude_modules": r".*self_attn.*"}, Lora(4, 8.0, MLP)),
    ({"target_modules": ["v_proj", "self_attn.q_proj"]}, Lora(4, 8.0, ("q_proj", "v_proj"))),
    ({"target_modules": FULL_NAMES}, Lora(4, 8.0, ("q_proj",))),
    ({"r": ..., "lora_alpha": ...}, Lora(8, 8.0, ALL)),
    ({"lora_alpha": 0.5, "use_rslora": True}, Lora(4, 0.5, ALL, True)),
    ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8.0}}, Lora(4, 8.0, ALL)),
    ({"rank_pattern": None, "alpha_pattern": ..., "bias": ...}, Lora(4, 8.0, ALL)),
    ({"init_lora_weights": "gaussian", "task_type": None, "revision": "main"}, Lora(4, 8.0, ALL)),
    ({"fan_in_fan_out": True, "inference_mode": False, "eva_config": {"a": 1}}, Lora(4, 8.0, ALL)),
    ({"of_a_later_version": None, "and_this": False, "or_that": []}, Lora(4, 8.0, ALL)),
    ({"layers_to_transform": [], "modules_to_save": []}, Lora(4, 8.0, ALL)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), SAME_FUNCTIONS)
def test_keys_are_read_as_peft_reads_them(adapter, changes, expected):
    edit(adapter, **changes)
    assert hf_adapter.read(adapter, config_of("qwen2_lora").base).lora == expected


def test_the_dropout_of_its_training_is_known(adapter):
    edit(adapter, lora_dropout=0.05)
    assert hf_adapter.read(adapter, config_of("qwen2_lora").base).dropout == 0.05


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, '"peft_type" is \'LOHA\'; expected "LORA"'),
    ({"peft_type": ...}, '"peft_type" is None; expected "LORA"'),
    ({"task_type": "SEQ_CLS"}, "\"task_type\" is 'SEQ_CLS'; only None or 'CAUSAL_LM'"),
    ({"bias": "all"}, "\"bias\" is 'all'; only 'none' is supported"),
    ({"use_dora": True}, '"use_dora" is True; only False is supported'),
    ({"lora_bias": True}, '"lora_bias" is True; only False'),
    ({"use_qalora": True}, '"use_qalora" is True; only False'),
    ({"use_rslora": "yes"}, "\"use_rslora\" expected true or false, found 'yes'"),
    ({"modules_to_save": ["lm_head"]}, "\"modules_to_save\" is \\['lm_head'\\]; only None or"),
    ({"layers_to_transform": [0]}, '"layers_to_transform" is \\[0\\]; only None or'),
    ({"layers_to_transform": 0}, '"layers_to_transform" is 0; only None or'),
    ({"layers_pattern": "layers"}, "\"layers_pattern\" is 'layers'; only None or"),
    ({"layer_replication": [[0, 2]]}, '"layer_replication" is \\[\\[0, 2\\]\\]; only'),
    ({"target_parameters": ["a"]}, "\"target_parameters\" is \\['a'\\]; only"),
    ({"trainable_token_indices": [1]}, '"trainable_token_indices" is \\[1\\]; only None'),
    ({"alora_invocation_tokens": []}, '"alora_invocation_tokens" is \\[\\]; only None'),
    ({"use_bdlora": {"nblocks": 2}}, '"use_bdlora" is .*; only None'),
    ({"kasa_config": {}}, '"kasa_config" is {}; only None'),
    ({"of_a_later_version": 0.5}, '"of_a_later_version" is unknown and may change'),
    ({"rank_pattern": {"q_proj": 8}}, "\"rank_pattern\" gives 'q_proj' 8; only that of \"r\", 4"),
    ({"rank_pattern": [8]}, '"rank_pattern" expected a JSON object, found \\[8\\]'),
    ({"alpha_pattern": {"q_proj": 1}}, "\"alpha_pattern\" gives 'q_proj' 1; only that of"),
    ({"r": 0}, '"r" expected a positive int, found 0'),
    ({"r": 4.0}, '"r" expected a positive int, found 4.0'),
    ({"r": True}, '"r" expected a positive int, found True'),
    ({"r": None}, '"r" expected a positive int, found None'),
    ({"r": 10**6}, '"r" is 1000000; expected at most 16384'),
    ({"lora_alpha": "16"}, "\"lora_alpha\" expected a positive float, found '16'"),
    ({"lora_alpha": float("nan")}, '"lora_alpha" expected a positive float, found nan'),
    ({"lora_alpha": -8}, '"lora_alpha" expected a positive float, found -8'),
    ({"lora_dropout": 1.5}, '"lora_dropout" expected a number from 0 to 1, found 1.5'),
    ({"lora_dropout": True}, '"lora_dropout" expected a number from 0 to 1, found True'),
    *(
        ({"init_lora_weights": value}, f'"init_lora_weights" is {value!r}, which may change')
        for value in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new")
    ),
    ({"target_modules": None}, '"target_modules" is None, which picks no layer'),
    ({"target_modules": []}, '"target_modules" is \\[\\], which picks no layer'),
    ({"target_modules": {"q_proj": 1}}, '"target_modules" expected a list of names or a text'),
    ({"target_modules": ["q_proj", 1]}, '"target_modules" expected a list of names or a text'),
    ({"target_modules": ["lm_head"]}, '"target_modules" picks lm_head; supported are q_proj'),
    ({"target_modules": ["embed_tokens"]}, '"target_modules" picks model.embed_tokens; supported'),
    ({"target_modules": ["q_proj", "W_pack"]}, "\"target_modules\" has 'W_pack'; supported are"),
    ({"target_modules": ["mlp"]}, "\"target_modules\" has 'mlp'; supported are"),
    ({"target_modules": ".*"}, '"target_modules" picks model.embed_tokens; supported'),
    ({"target_modules": "q_proj"}, "\"target_modules\" is 'q_proj', which picks no layer"),
    ({"target_modules": "(q_proj"}, '"target_modules" is no regular expression'),
    ({"target_modules": "(" * 9999}, '"target_modules" is no regular expression'),
    ({"target_modules": FULL_NAMES[:2]}, 'picks q_proj in 2 of 3 layers; expected all'),
    ({"target_modules": r".*\.[01]\..*_proj"}, 'picks q_proj in 2 of 3 layers; expected all'),
    ({"exclude_modules": [FULL_NAMES[0]]}, 'picks q_proj in 2 of 3 layers; expected all'),
    ({"exclude_modules": ".*"}, "which picks no layer"),
    ({"exclude_modules": 3}, '"exclude_modules" expected a list of names or a text, found 3'),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_a_config_of_another_function_is_refused(adapter, changes, sentence):
    edit(adapter, **changes)
    with pytest.raises(InputError, match=f"adapter/adapter_config.json: .*{sentence}") as error:
        hf_adapter.read(adapter, config_of("qwen2_lora").base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# --- adapter_model.safetensors --------------------------------------------------------------------


def edit_tensors(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Sets tensors; None removes one."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file) | changes
    present = {name: x for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(present, file)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


NAN = np.full((4, 64), np.nan, np.float32)
BAD_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({Q_A: None}, f'tensor "{Q_A}" is missing; key "target_modules" of adapter_config.json asks'),
    ({Q_A: ones(4, 128)}, r'has shape \(4, 128\); expected \(4, 64\), for the base\'s q_proj'),
    ({Q_A: ones(8, 64)}, r'has shape \(8, 64\); expected \(4, 64\), .* and r is 4'),
    ({Q_A: ones(64, 4)}, r'has shape \(64, 4\); expected \(4, 64\)'),
    ({DOWN_B: ones(96, 4)}, r"expected \(64, 4\), for the base's down_proj is \(64, 96\)"),
    ({Q_A: NAN}, f'tensor "{Q_A}" has values that are not finite'),
    ({"lm_head.weight": ones(3)}, 'tensor "lm_head.weight" is of no layer that key "target_mod'),
    ({Q_A.replace("_A", "_A.default"): ones(4, 64)}, 'lora_A.default.weight" is of no layer'),
    ({Q_A.replace("layers.1", "layers.3"): ones(4, 64)}, "layers.3.* is of no layer that"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), BAD_TENSORS)
def test_tensors_that_are_not_those_of_the_config_are_refused(adapter, changes, sentence):
    edit_tensors(adapter, changes)
    for read in (hf_adapter.check_tensors, lambda *of: hf_adapter.load(*of, None, jnp.float32)):
        with pytest.raises(InputError, match=f"adapter/adapter_model.safetensors: .*{sentence}"):
            read(adapter, config_of("qwen2_lora"))


def test_one_value_that_is_not_finite_is_found(adapter):
    x = ones(64, 4)
    x[63, 3] = np.inf
    edit_tensors(adapter, {DOWN_B: x})
    with pytest.raises(InputError, match=f'tensor "{DOWN_B}" has values that are not finite'):
        hf_adapter.load(adapter, config_of("qwen2_lora"), None, jnp.float32)


def test_folders_that_are_no_adapter(adapter, tmp_path):
    config = config_of("qwen2_lora")
    with pytest.raises(InputError, match="adapter_config.json does not exist; expected"):
        hf_adapter.read(GOLDENS / "qwen2", config.base)
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere does not exist"):
        hf_adapter.read(tmp_path / "nowhere", config.base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle, .* never loaded"):
        hf_adapter.check_tensors(adapter, config)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors does not exist"):
        hf_adapter.check_tensors(adapter, config)


def test_an_adapter_in_place_of_its_base_says_where_it_goes(adapter, folder):
    with pytest.raises(InputError, match=r"config.json does not exist .* as model.adapter"):
        hf_load.read_config(adapter)
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    with pytest.raises(InputError, match="expected it in another folder, given as model.adapter"):
        load(folder)


def test_the_digest_tells_adapters_apart(adapter):
    config = config_of("qwen2_lora")
    original = hf_adapter.check_tensors(adapter, config)
    for tensor, shape in hf_table.file_shapes(hf_table.adapter_table(config), config).items():
        edit_tensors(adapter, {tensor: ones(*shape)})
        changed = hf_adapter.check_tensors(adapter, config)
        assert changed != original, tensor
        original = changed
