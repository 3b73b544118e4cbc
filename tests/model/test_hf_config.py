"""config.json: each key, in both of its versions, means what transformers means, or is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ssp_jax.errors import InputError
from ssp_jax.model import hf_load
from ssp_jax.model.decoder import ModelConfig, RopeScaling
from tests.model_folders import GOLDENS, edit_config

CLASSES = {
    "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WITHOUT_LENGTH = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
}
LLAMA3 = WITHOUT_LENGTH | {"original_max_position_embeddings": 16}
ABSENT = object()


def read(folder: Path, kind: str, **values: Any) -> ModelConfig:
    values = SHAPE | {"model_type": kind, "architectures": [CLASSES[kind][1]]} | values
    present = {key: value for key, value in values.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(present))
    return hf_load.read_config(folder)


def reference(kind: str, **values: Any) -> Any:
    """transformers' own reading."""
    present = {key: value for key, value in (SHAPE | values).items() if value is not ABSENT}
    config = CLASSES[kind][0](**json.loads(json.dumps(present)))
    config.standardize_rope_params()  # as its rotary embedding does, once all keys are there
    return config


def test_config_of_transformers_5():
    assert hf_load.read_config(GOLDENS / "llama3") == ModelConfig(
        vocab_size=128,
        num_layers=3,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        rope_theta=100.0,
        rope_scaling=RopeScaling(8.0, 1.0, 2.0, 16),
        norm_eps=1e-6,
    )
    qwen2 = hf_load.read_config(GOLDENS / "qwen2")
    assert qwen2.qkv_bias and not qwen2.qk_norm
    assert qwen2.tie_embeddings and qwen2.head_dim == 16
    qwen3 = hf_load.read_config(GOLDENS / "qwen3")
    assert qwen3.qk_norm and not qwen3.qkv_bias
    assert not qwen3.tie_embeddings and qwen3.head_dim == 20


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_config_of_transformers_4(folder, kind):
    edit_config(
        folder, rope_parameters=..., rope_theta=1e6, rope_scaling=None, tie_word_embeddings=...
    )
    config = hf_load.read_config(folder)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (1e6, None, False)
    factors = dict(
        factor=8, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    edit_config(folder, rope_scaling={kind: "llama3", **factors})
    assert hf_load.read_config(folder).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


PARAMETERS = [
    ABSENT,
    None,
    {},
    {"rope_type": "default"},
    {"rope_theta": 7.0},
    {**LLAMA3, "rope_theta": 7.0},
]
SCALINGS = [
    ABSENT,
    None,
    {},
    {"type": "default"},
    {"rope_type": "default", "rope_theta": 3.0},
    LLAMA3,
    {**WITHOUT_LENGTH, "rope_theta": 3.0},
    {**LLAMA3, "rope_type": "default", "type": "llama3"},
    {"type": "yarn", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.0},
]


@pytest.mark.parametrize("kind", CLASSES)
def test_rotary_positions_are_those_of_transformers(tmp_path, kind):
    """All combinations of where transformers 4 and 5 write theta and the scaling."""
    num_read = 0
    for parameters, scaling, theta, length in itertools.product(
        PARAMETERS, SCALINGS, (ABSENT, 5.0), (ABSENT, 24)
    ):
        values = dict(rope_parameters=parameters, rope_scaling=scaling, rope_theta=theta)
        values["original_max_position_embeddings"] = length
        expected = reference(kind, **values).rope_parameters
        theta_is_written = theta is not ABSENT or "rope_theta" in _effective(parameters, scaling)
        try:
            config = read(tmp_path, kind, **values)
        except InputError as error:
            unknown = expected["rope_type"] not in ("default", "llama3")
            assert unknown or not theta_is_written, (values, error)
            continue
        num_read += 1
        assert config.rope_theta == expected["rope_theta"], values
        assert theta_is_written or kind == "llama"
        factors = config.rope_scaling and vars(config.rope_scaling)
        is_scaled = expected["rope_type"] == "llama3"
        assert factors == ({key: expected[key] for key in factors} if is_scaled else None), values
    assert num_read > 100


def _effective(parameters: Any, scaling: Any) -> dict[str, Any]:
    given = [x for x in (scaling, parameters) if isinstance(x, dict) and x]
    return given[0] if given else {}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *((kind, {"num_key_value_heads": None}) for kind in CLASSES),
        ("llama", {"num_key_value_heads": ABSENT}),
        ("llama", {"head_dim": None}),
        ("llama", {}),
        ("qwen3", {}),
        *((kind, {"head_dim": 20}) for kind in CLASSES),
    ],
)
def test_sizes_of_heads_are_those_of_transformers(tmp_path, kind, values):
    config = read(tmp_path, kind, rope_theta=5.0, **values)
    expected = reference(kind, rope_theta=5.0, **values)
    assert config.num_kv_heads == expected.num_key_value_heads
    # Qwen2's class has no such field: its model divides.
    assert config.head_dim == getattr(expected, "head_dim", 256 // 32)


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_transformers(tmp_path, kind):
    config = read(tmp_path, kind, rope_theta=5.0)
    expected = reference(kind)
    assert config.norm_eps == expected.rms_norm_eps
    assert config.tie_embeddings == expected.tie_word_embeddings
    assert expected.hidden_act == "silu" and not getattr(expected, "use_sliding_window", False)


def test_keys_that_change_nothing(tmp_path):
    """Those of training, and two names of one function."""
    expected = read(tmp_path, "qwen2", rope_theta=5.0)
    more = {
        "attention_dropout": 0.1,
        "initializer_range": 1.0,
        "pretraining_tp": 2,
        "use_cache": False,
        "dtype": "float16",
        "torch_dtype": "bfloat16",
        "sliding_window": 64,
        "max_window_layers": 1,
        "hidden_act": "swish",
        "attention_bias": True,
        "quantization_config": None,
        "auto_map": {},
        "partial_rotary_factor": 1,
        "is_causal": True,
        "layer_types": None,
        "rope_scaling": None,
    }
    assert read(tmp_path, "qwen2", rope_theta=5.0, **more) == expected


def test_the_largest_numbers_are_those_of_larger_models_than_there_are(tmp_path):
    """Llama-3.1-405B, with Qwen's vocabulary and twice the layers."""
    large = {
        "vocab_size": 151936,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 252,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    }
    assert read(tmp_path, "llama", **large).head_dim == 128
