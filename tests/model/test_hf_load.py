"""Weights: a folder's shapes, tokenizer and tensors as they are, and bad folders say why."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ssp_jax.errors import InputError
from ssp_jax.model import hf_files, hf_load
from ssp_jax.model.decoder import abstract_params
from ssp_jax.model.hf_table import EMBEDDING, HEAD
from tests.model_folders import GOLDENS, NAMES, assert_same, edit_config, edit_tensors, load


@pytest.mark.parametrize("name", NAMES)
def test_params_have_the_shape_of_the_model(name):
    config = hf_load.read_config(GOLDENS / name)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), load(GOLDENS / name))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


def test_generation_config(folder):
    assert hf_load.read_generation_config(folder) == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert hf_load.read_generation_config(folder) == {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is not valid JSON"):
        hf_load.read_generation_config(folder)


def test_missing_folder_and_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        InputError, match="config.json does not exist; expected a Hugging Face folder"
    ):
        hf_load.read_config(folder)
    with pytest.raises(
        InputError, match="model folder nowhere does not exist; expected a local folder, a URL"
    ):
        hf_load.read_config("nowhere")


# --- bad weights ---

NORM = "model.layers.1.input_layernorm.weight"


def bad_weights(folder: Path, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load(folder)
    assert sentence in str(error.value) and str(folder) in str(error.value)


def test_the_digest_tells_weights_apart(folder):
    def digest():
        return hf_load.check_tensors(folder, hf_load.read_config(folder))

    original = digest()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert digest() == original
    assert original == hf_load.check_tensors(GOLDENS / "qwen2", hf_load.read_config(folder))
    for name in tensors:
        edit_tensors(folder, **{name: np.nextafter(tensors[name], np.inf)})
        assert digest() != original, name
        edit_tensors(folder, **{name: tensors[name]})
    assert digest() == original


def test_tensor_of_another_shape(folder):
    edit_tensors(folder, **{NORM: np.ones(65, np.float32)})
    bad_weights(
        folder, f'model.safetensors: tensor "{NORM}" has shape (65,); config.json asks for (64,)'
    )


def test_more_embedding_rows_than_the_config_says(folder):
    edit_config(folder, vocab_size=120)
    bad_weights(
        folder,
        'tensor "model.embed_tokens.weight" has shape (128, 64); config.json asks for (120, 64)',
    )


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    end = f"ends at byte {len(content)}, but the file is truncated: it has {len(content) - 4}"
    bad_weights(folder, f'model.safetensors: tensor "model.norm.weight" {end}')
    for size in (0, 7, 100):
        file.write_bytes(content[:size])
        bad_weights(folder, f"truncated or not a safetensors file: it has {size} bytes")


def test_known_extra_tensors_are_passed_over(folder):
    """Rotary tables of old Llama files, and the embedding again as the head of a tied model."""
    expected = load(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    rotary = {names[0]: np.ones((), np.float32), names[1]: np.ones(8, np.float32)}
    edit_tensors(folder, **{HEAD: tensors[EMBEDDING]}, **rotary)
    config = hf_load.read_config(folder)
    assert config.tie_embeddings
    assert hf_load.check_tensors(folder, config) == hf_load.check_tensors(GOLDENS / "qwen2", config)
    assert_same(load(folder), expected)


def test_the_head_of_a_tied_model_may_be_all_that_is_there(folder):
    """safetensors drops one of two names of the same memory, whichever."""
    expected = load(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit_tensors(folder, **{HEAD: tensors[EMBEDDING], EMBEDDING: None})
    assert hf_load.read_config(folder).tie_embeddings
    assert_same(load(folder), expected)


@pytest.mark.parametrize("row", [0, 63, 127])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_head_of_its_own_is_used_whatever_the_config_says(folder, monkeypatch, row, dtype):
    """One weight differs, in the first, a middle or the last piece that is compared."""
    monkeypatch.setattr(hf_files._LocalFile, "chunk", 1024)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    embedding = tensors[EMBEDDING].astype(dtype)
    head = embedding.copy()
    head[row, 5] += 1
    edit_tensors(folder, **{EMBEDDING: embedding, HEAD: head})
    assert not hf_load.read_config(folder).tie_embeddings
    params = load(folder)
    np.testing.assert_array_equal(params["embed"]["weight"], embedding.astype(np.float32))
    np.testing.assert_array_equal(params["head"]["weight"], head.astype(np.float32))
    edit_tensors(folder, **{HEAD: embedding.astype(np.float32)})  # the same numbers, longer
    assert hf_load.read_config(folder).tie_embeddings


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("loaded", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_not_finite(folder, value, dtype, loaded):
    x = np.full(64, np.finfo(np.float16).max, dtype)
    x[0] = 6e-8  # the smallest of float16: subnormal
    edit_tensors(folder, **{NORM: x})
    load(folder, loaded)
    x[63] = value
    edit_tensors(folder, **{NORM: x})
    with pytest.raises(
        InputError, match=f'model.safetensors: tensor "{NORM}" has values that are not finite'
    ):
        load(folder, loaded)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(folder, dtype):
    x = np.linspace(-2, 2, 64).astype(dtype)
    edit_tensors(folder, **{NORM: x})
    loaded = load(folder)["layers"]["attention_norm"]["scale"][1]
    np.testing.assert_array_equal(loaded, x.astype(np.float32))


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    bad_weights(
        folder, "has no model weights; expected model.safetensors or model.safetensors.index.json"
    )


def test_bad_indices(folder):
    """A tensor missing in the index or in its file, no weight map, a missing file."""
    index = folder / "model.safetensors.index.json"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    files = {name: f"part{'embed' in name}.safetensors" for name in tensors}
    for file in set(files.values()):
        own = {name: x for name, x in tensors.items() if files[name] == file}
        safetensors.numpy.save_file(own, folder / file)
    index.write_text(json.dumps({"weight_map": files}))
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    assert_same(load(folder), expected)

    without_norm = {name: file for name, file in files.items() if name != NORM}
    index.write_text(json.dumps({"weight_map": without_norm}))
    bad_weights(folder, f'model.safetensors.index.json: tensor "{NORM}" is missing')
    index.write_text(json.dumps({"weight_map": files | {NORM: "partTrue.safetensors"}}))
    missing = f'tensor "{NORM}" is missing, though model.safetensors.index.json says'
    bad_weights(folder, f"partTrue.safetensors: {missing}")
    for damaged in ({}, {"weight_map": {NORM: 1}}):
        index.write_text(json.dumps(damaged))
        no_map = 'key "weight_map" is missing or does not give a file name'
        bad_weights(folder, f"model.safetensors.index.json: {no_map}")
    index.write_text(json.dumps({"weight_map": files}))
    (folder / "partFalse.safetensors").unlink()
    bad_weights(folder, "partFalse.safetensors does not exist; it should hold model weights")


def test_tokenizer_that_does_not_fit_the_model(folder):
    """transformers would give an unknown eos token a new id; JAX clamps an id that is too large."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(folder)
    assert hf_load.load_tokenizer(folder).eos_token_id == 1
    edit_config(folder, vocab_size=1)
    with pytest.raises(
        InputError, match='tokenizer.json: token "b" has id 1; the model has 1 rows'
    ):
        hf_load.load_tokenizer(folder)
    edit_config(folder, vocab_size=128)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r'tokenizer.json lacks the token "<\|im_end\|>", its eos_token'
    ):
        hf_load.load_tokenizer(folder)
