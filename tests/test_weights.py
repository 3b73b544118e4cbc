"""Weights: a folder's shapes, tokenizer and tensors as they are, and bad folders say why."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from model_folders import GOLDENS, NAMES, assert_same, edit_config, edit_tensors, load
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ssp_jax import weights
from ssp_jax.errors import InputError
from ssp_jax.model import ModelConfig, RopeScaling, abstract_params


@pytest.mark.parametrize("name", NAMES)
def test_params_have_the_shape_of_the_model(name):
    config = weights.read_config(GOLDENS / name)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), load(GOLDENS / name))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


# --- config.json ---


def test_config_of_transformers_5():
    assert weights.read_config(GOLDENS / "llama3") == ModelConfig(
        **dict(vocab_size=128, num_layers=3, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96),
        **dict(rope_theta=100.0, rope_scaling=RopeScaling(8.0, 1.0, 2.0, 16), norm_eps=1e-6),
    )
    qwen2, qwen3 = (weights.read_config(GOLDENS / name) for name in ("qwen2", "qwen3"))
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tie_embeddings, qwen2.head_dim) == (True, False, True, 16)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tie_embeddings, qwen3.head_dim) == (False, True, False, 20)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_config_of_transformers_4(folder, kind):
    edit_config(folder, rope_parameters=..., rope_theta=1e6, rope_scaling=None, tie_word_embeddings=...)
    config = weights.read_config(folder)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (1e6, None, False)
    factors = dict(factor=8, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    edit_config(folder, rope_scaling={kind: "llama3", **factors})
    assert weights.read_config(folder).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "key \"architectures\" is 'MistralForCausalLM'; supported are Qwen2",
        ),
        ({"architectures": ...}, 'key "architectures" is None'),
        ({"hidden_size": ...}, 'key "hidden_size" is missing'),
        ({"vocab_size": "many"}, "key \"vocab_size\" expected a positive int, found 'many'"),
        ({"num_hidden_layers": 0}, 'key "num_hidden_layers" expected a positive int, found 0'),
        ({"num_hidden_layers": True}, 'key "num_hidden_layers" expected a positive int, found True'),
        ({"rms_norm_eps": None}, 'key "rms_norm_eps" expected a positive float, found None'),
        ({"num_key_value_heads": 3}, 'key "num_key_value_heads" is 3, which does not divide 4 heads'),
        ({"num_attention_heads": 6}, 'key "head_dim" is missing and 6 heads do not divide hidden_size 64'),
        ({"rope_parameters": ...}, 'key "rope_theta" is missing'),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "key \"rope_type\" is 'yarn'; only"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, 'key "factor" is missing'),
        ({"use_sliding_window": True}, 'key "use_sliding_window" is True; only False is supported'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "key \"layer_types\" contains 'sliding_attention'"),
        ({"mlp_bias": True}, 'key "mlp_bias" is True; only False is supported'),
        ({"partial_rotary_factor": 0.5}, 'key "partial_rotary_factor" is 0.5; only'),
        ({"hidden_act": "gelu"}, "key \"hidden_act\" is 'gelu'; only 'silu'"),
        ({"quantization_config": {"bits": 4}}, 'key "quantization_config" is'),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, 'key "attention_bias" is True; only False'),
    ],
)
def test_bad_config(folder, changes, sentence):
    with pytest.raises(InputError) as error:
        weights.read_config(edit_config(folder, **changes))
    assert str(error.value).startswith(f"{folder / 'config.json'}: {sentence}")


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not valid JSON"), ("[]", "expected a JSON object, found list")]
)
def test_config_that_is_no_object(folder, text, sentence):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json {sentence}"):
        weights.read_config(folder)


def test_generation_config(folder):
    assert weights.read_generation_config(folder) == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert weights.read_generation_config(folder) == {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is not valid JSON"):
        weights.read_generation_config(folder)


def test_missing_folder_and_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json does not exist; expected a Hugging Face folder"):
        weights.read_config(folder)
    with pytest.raises(InputError, match="model folder nowhere does not exist; expected a local folder, a URL"):
        weights.read_config("nowhere")


# --- bad weights ---

NORM = "model.layers.1.input_layernorm.weight"


def bad_weights(folder: Path, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load(folder)
    assert sentence in str(error.value) and str(folder) in str(error.value)


def test_the_digest_tells_weights_apart(folder):
    def digest():
        return weights.check_tensors(folder, weights.read_config(folder))

    as_it_was, tensors = digest(), safetensors.numpy.load_file(folder / "model.safetensors")
    assert digest() == as_it_was == weights.check_tensors(GOLDENS / "qwen2", weights.read_config(folder))
    for name in tensors:
        edit_tensors(folder, **{name: np.nextafter(tensors[name], np.inf)})
        assert digest() != as_it_was, name
        edit_tensors(folder, **{name: tensors[name]})
    assert digest() == as_it_was


def test_missing_tensor(folder):
    bad_weights(edit_tensors(folder, **{NORM: None}), f'tensor "{NORM}" is missing')


def test_tensor_of_another_shape(folder):
    edit_tensors(folder, **{NORM: np.ones(65, np.float32)})
    bad_weights(folder, f'model.safetensors: tensor "{NORM}" has shape (65,); config.json asks for (64,)')


def test_more_embedding_rows_than_the_config_says(folder):
    edit_config(folder, vocab_size=120)
    bad_weights(folder, 'tensor "model.embed_tokens.weight" has shape (128, 64); config.json asks for (120, 64)')


def test_more_layers_than_the_config_says(folder):
    bad_weights(edit_config(folder, num_hidden_layers=2), "is not part of the model in config.json")


def test_untied_config_without_a_head(folder):
    bad_weights(edit_config(folder, tie_word_embeddings=False), 'tensor "lm_head.weight" is missing')


def test_known_extra_tensors_are_passed_over(folder):
    expected = load(folder)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    edit_tensors(folder, **{"lm_head.weight": np.ones((128, 64), np.float32)}, **rotary)
    assert_same(load(folder), expected)


def test_dtype_that_we_cannot_read(folder):
    edit_tensors(folder, **{NORM: np.ones(64, np.int8)})
    bad_weights(folder, f'model.safetensors: tensor "{NORM}" has dtype I8; expected F32, F16, BF16')


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(folder, dtype):
    x = np.linspace(-2, 2, 64).astype(dtype)
    edit_tensors(folder, **{NORM: x})
    np.testing.assert_array_equal(load(folder)["layers"]["attention_norm"]["scale"][1], x.astype(np.float32))


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    end = f"ends at byte {len(content)}, but the file is truncated: it has {len(content) - 4}"
    bad_weights(folder, f'model.safetensors: tensor "model.norm.weight" {end}')
    for size in (0, 7, 100):
        file.write_bytes(content[:size])
        bad_weights(folder, f"truncated or not a safetensors file: it has {size} bytes")


def test_file_that_is_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    bad_weights(folder, "model.safetensors is not a safetensors file: its header is not valid JSON")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "of shape (3,) has 8 bytes"),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            "has shape (2,) and offsets [-8, 0]; expected",
        ),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "has shape (True, 2) and offsets [0, 8]"),
        ({"dtype": "F32", "shape": [2]}, "has no dtype, shape and data_offsets in the header"),
        ([], "has no dtype, shape and data_offsets in the header"),
    ],
)
def test_header_that_makes_no_sense(folder, entry, sentence):
    header = json.dumps({"x": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    bad_weights(folder, f'model.safetensors: tensor "x" {sentence}')


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    bad_weights(folder, "has no model weights; expected model.safetensors or model.safetensors.index.json")


def test_bad_indices(folder):
    """A tensor that the index forgets, one that its file does not have, no index at all, a missing file."""
    parts = folder / "model.safetensors.index.json"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    files = {name: f"part{'embed' in name}.safetensors" for name in tensors}
    for file in set(files.values()):
        safetensors.numpy.save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
    parts.write_text(json.dumps({"weight_map": files}))
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    assert_same(load(folder), expected)

    parts.write_text(json.dumps({"weight_map": {n: f for n, f in files.items() if n != NORM}}))
    bad_weights(folder, f'model.safetensors.index.json: tensor "{NORM}" is missing')
    parts.write_text(json.dumps({"weight_map": files | {NORM: "partTrue.safetensors"}}))
    bad_weights(folder, f'partTrue.safetensors: tensor "{NORM}" is missing, though model.safetensors.index.json says')
    for damaged in ({}, {"weight_map": {NORM: 1}}):
        parts.write_text(json.dumps(damaged))
        bad_weights(folder, 'model.safetensors.index.json: key "weight_map" is missing or does not give a file name')
    parts.write_text(json.dumps({"weight_map": files}))
    (folder / "partFalse.safetensors").unlink()
    bad_weights(folder, "partFalse.safetensors does not exist; it should hold model weights")


def test_tokenizer_that_does_not_fit_the_model(folder):
    """transformers would give an unknown eos token a new id; a row that the model lacks would be read as its last."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(folder)
    assert weights.load_tokenizer(folder).eos_token_id == 1
    edit_config(folder, vocab_size=1)
    with pytest.raises(InputError, match='tokenizer.json: token "b" has id 1; the model has 1 rows'):
        weights.load_tokenizer(folder)
    edit_config(folder, vocab_size=128)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r'tokenizer.json lacks the token "<\|im_end\|>", its eos_token'):
        weights.load_tokenizer(folder)
