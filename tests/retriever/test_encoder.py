"""The encoder has transformers' hidden states and vectors (tests/goldens), and reads its folder."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ssp_jax.errors import InputError
from ssp_jax.model import hf_files
from ssp_jax.retriever import encoder, encoder_files, settings
from ssp_jax.retriever.encoder import Pooling
from ssp_jax.retriever.settings import EncoderKeys
from tests.conftest import ROOT
from tests.model_folders import edit_config, edit_tensors

GOLDEN = ROOT / "tests/goldens/bert"
# Of make_encoder_goldens.py.
TEXTS = ("moon", "the moon and the sea, 1969", "a river: long, slow and far from any sea " * 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "bert"))


@functools.cache
def golden() -> tuple[encoder_files.TextEncoder, dict[str, np.ndarray]]:
    with np.load(GOLDEN.with_suffix(".npz")) as numbers:
        return encoder_files.load(GOLDEN, EncoderKeys()), dict(numbers)


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_vectors(pooling: Pooling, tokens_BT: Any, lengths_B: Any) -> Any:
    found, _ = golden()
    params = jax.tree.map(jnp.asarray, found.params)
    arguments = (params, tokens_BT, lengths_B, jnp.float32)
    hidden_BTD = encoder.forward(found.config, *arguments)
    return hidden_BTD, encoder.encode(found.config, pooling, *arguments)


@pytest.mark.parametrize("kind", settings.POOLINGS)
def test_hidden_states_and_vectors_equal_huggingface(kind: str) -> None:
    _, numbers = golden()
    pooling = Pooling(kind, normalize=True)
    hidden, vectors = hidden_and_vectors(pooling, numbers["tokens"], numbers["lengths"])
    for row, length in enumerate(numbers["lengths"]):
        np.testing.assert_allclose(hidden[row, :length], numbers["hidden"][row, :length], atol=2e-5)
    np.testing.assert_allclose(vectors, numbers[kind], atol=2e-6)


def test_padding_changes_no_vector() -> None:
    _, numbers = golden()
    more = np.pad(numbers["tokens"], ((0, 1), (0, 8)), constant_values=7)[:, :48]
    lengths = np.append(numbers["lengths"], 0)
    _, vectors = hidden_and_vectors(Pooling("mean", normalize=True), more, lengths)
    np.testing.assert_allclose(vectors[:3], numbers["mean"], atol=2e-6)
    assert np.isfinite(vectors).all()


def test_texts_become_the_tokens_of_huggingface_cut_and_not_padded() -> None:
    found, numbers = golden()
    tokens = found.query_tokens(TEXTS)
    for row, length in enumerate(numbers["lengths"]):
        assert tokens[row] == numbers["tokens"][row, :length].tolist()
    assert len(tokens[0]) < 20 and len(tokens[2]) == found.recipe.max_tokens == 40


def test_the_folder_says_what_is_done_and_keys_say_the_rest(folder: Path) -> None:
    keys = EncoderKeys("cls", normalize=False, query_prefix="q: ", passage_prefix="p: ")
    config = encoder_files.read_config(hf_files.find(folder))

    def recipe() -> encoder_files.Recipe:
        return encoder_files.read_recipe(hf_files.find(folder), config, keys)

    found = recipe()
    assert (found.pooling, found.max_tokens) == (Pooling("mean", True), 40)
    # an empty prompt is none
    assert (found.query_prefix, found.passage_prefix) == ("query: ", "p: ")
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    assert recipe().pooling == Pooling("cls", False)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    found = recipe()
    assert (found.pooling, found.max_tokens) == (Pooling("cls", False), 48)
    assert (found.query_prefix, found.passage_prefix) == ("q: ", "p: ")


def test_the_digest_tells_weights_and_tokenizers_apart(folder: Path) -> None:
    digest = golden()[0].digest
    assert encoder_files.load(folder, EncoderKeys("cls", False, "q", "p")).digest == digest
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"?"', '"!"'))
    assert encoder_files.load(folder, EncoderKeys()).digest != digest
    (folder / "tokenizer.json").write_text(tokenizer)
    edit_tensors(folder, **{"embeddings.LayerNorm.bias": np.zeros(32, np.float32)})
    assert encoder_files.load(folder, EncoderKeys()).digest != digest


def test_names_with_a_prefix_heads_and_positions_are_those_of_the_bare_encoder(
    folder: Path,
) -> None:
    """As BertForMaskedLM and older versions write them."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {f"bert.{name}": x for name, x in tensors.items()}
    renamed |= {"bert.embeddings.position_ids": np.arange(48)[None], "cls.bias": np.ones(2, "f4")}
    safetensors.numpy.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert encoder_files.load(folder, EncoderKeys()).digest == golden()[0].digest


SCALE = "encoder.layer.2.output.LayerNorm.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "xlm-roberta"}, "model_type.*is 'xlm-roberta'; only encoders of"),
        ({"hidden_act": "relu"}, "hidden_act.*is 'relu'; only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*asks to run code"),
        ({"num_attention_heads": 5}, "hidden_size.*is no multiple of 5"),
        ({"num_hidden_layers": ...}, "num_hidden_layers.*is missing"),
        ({"num_hidden_layers": 4}, 'tensor "encoder.layer.3.attention.self.query.weight" is miss'),
        ({"intermediate_size": 64}, r"has shape \(48, 32\); config.json asks for \(64, 32\)"),
    ],
)
def test_other_architectures_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=says):
        encoder_files.load(folder, EncoderKeys())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", "{", "modules.json: expected a list of modules"),
        (
            "modules.json",
            '[{"type": "a.Transformer", "path": ""}]',
            "has the modules 'Transformer'",
        ),
        ("1_Pooling/config.json", '{"pooling_mode": "max"}', "pools by 'max'; supported are mean"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
            "pools by .*; supported are mean, cls",
        ),
        ("sentence_bert_config.json", '{"max_seq_length": 49}', "number of tokens up to 48"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}', "an object of texts"),
    ],
)
def test_what_sentence_transformers_adds_is_checked(
    folder: Path, file: str, content: str, says: str
) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=says):
        encoder_files.load(folder, EncoderKeys())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({SCALE: np.full(32, np.nan, np.float32)}, f'"{SCALE}" has values that are not finite'),
        ({SCALE: None}, f'tensor "{SCALE}" is missing'),
        ({"encoder.rope.weight": np.ones(2, np.float32)}, "is not part of the encoder"),
    ],
)
def test_other_weights_are_refused(folder: Path, tensors: dict[str, Any], says: str) -> None:
    edit_tensors(folder, **tensors)
    with pytest.raises(InputError, match=says):
        encoder_files.load(folder, EncoderKeys())
