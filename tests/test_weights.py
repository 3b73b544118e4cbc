"""Weights: what is read and written is what Hugging Face's own library sees, to the bit, and bad folders say why."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ssp_jax import weights
from ssp_jax.data import InputError
from ssp_jax.model import ModelConfig, RopeScaling, abstract_params, init_params

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ["qwen2", "qwen3", "llama3"]  # tied with biases; untied with norms of q and k; untied and plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tied model that a test may damage."""
    return Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Sets keys of config.json; the value `...` removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return folder


def edit_tensors(folder: Path, **changes: Any) -> Path:
    """Sets tensors of model.safetensors by Hugging Face's own library; None removes one."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors") | changes
    safetensors.numpy.save_file(
        {name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def load(folder: Path, dtype: Any = jnp.float32) -> Any:
    return weights.load(folder, weights.read_config(folder), None, dtype)


def assert_same(a: Any, b: Any) -> None:
    """Same tree, dtypes and bits."""
    leaves_a, leaves_b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    for (path_a, x), (path_b, y) in zip(leaves_a, leaves_b, strict=True):
        assert path_a == path_b and x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_params_have_the_shape_of_the_model(name):
    config = weights.read_config(GOLDENS / name)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), load(GOLDENS / name))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


@pytest.mark.parametrize("name", NAMES)
def test_load_save_load_is_exact_in_bfloat16(name, tmp_path):
    config, params = weights.read_config(GOLDENS / name), load(GOLDENS / name, jnp.bfloat16)
    weights.save(params, config, tmp_path / "saved", GOLDENS / name)
    assert_same(load(tmp_path / "saved", jnp.bfloat16), params)
    written = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    assert {x.dtype for x in written.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_saved_file_is_the_one_that_was_loaded(name, tmp_path):
    """Names, shapes and values, read by Hugging Face's own library."""
    weights.save(
        load(GOLDENS / name), weights.read_config(GOLDENS / name), tmp_path / "saved", GOLDENS / name, "float32"
    )
    original = safetensors.numpy.load_file(GOLDENS / name / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    assert written.keys() == original.keys()
    for tensor, x in original.items():
        np.testing.assert_array_equal(written[tensor], x, strict=True)
    with safetensors.safe_open(tmp_path / "saved/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    header = (tmp_path / "saved/model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0  # tensors are aligned


def test_many_files_with_an_index(tmp_path):
    config, params = weights.read_config(GOLDENS / "qwen3"), load(GOLDENS / "qwen3")
    limit = 40_000
    weights.save(params, config, tmp_path / "saved", GOLDENS / "qwen3", "float32", max_shard_bytes=limit)
    files = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
    assert max(sizes) <= limit
    assert all(size + following > limit for size, following in zip(sizes, sizes[1:], strict=False))  # well filled
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    names = {file.name: set(safetensors.numpy.load_file(file)) for file in files}
    assert all(tensor in names[file] for tensor, file in index["weight_map"].items())
    assert not (tmp_path / "saved/model.safetensors").exists()
    assert_same(load(tmp_path / "saved"), params)


def test_shards_hold_the_same_values(tmp_path):
    """Every axis of every parameter is cut in turn, layers and heads' insides too, over 8 devices; then saved again."""
    source = Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "source"))
    edit_config(source, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    config = weights.read_config(source)
    whole = init_params(config, jax.random.key(0))
    weights.save(whole, config, tmp_path / "saved", source, "float32")
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    for axis in range(4):

        def cut(x: jax.Array, axis: int = axis) -> NamedSharding:
            names: list[str | None] = [None] * x.ndim
            names[axis % x.ndim] = "fsdp"
            if x.ndim > 1:
                names[(axis + 1) % x.ndim] = "tensor"
            return NamedSharding(mesh, PartitionSpec(*names))

        shardings = jax.tree.map(cut, whole)
        params = weights.load(tmp_path / "saved", config, shardings, jnp.float32)
        assert_same(params, whole)
        for x, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
            assert x.sharding == sharding
    weights.save(params, config, tmp_path / "again", source, "float32")
    assert_same(load(tmp_path / "again"), whole)


# --- the folder that is written ---


def test_folder_has_config_and_tokenizer(folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "training_args.bin").write_text("not ours to copy")
    config = weights.read_config(folder)
    weights.save(load(folder), config, tmp_path / "out/saved", folder)
    saved = tmp_path / "out/saved"
    assert weights.load_tokenizer(saved).encode("b") == [1]
    assert weights.load_tokenizer(saved).chat_template == "{{ messages }}"
    assert (saved / "generation_config.json").read_text() == '{"eos_token_id": 1}'
    assert not (saved / "training_args.bin").exists()
    values = json.loads((saved / "config.json").read_text())
    assert values.pop("dtype") == "bfloat16" and "torch_dtype" not in values
    assert values | {"dtype": "float32"} == json.loads((folder / "config.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["saved"]  # nothing unfinished is left


def test_dtype_is_written_under_the_key_that_the_source_has(folder, tmp_path):
    edit_config(folder, dtype=..., torch_dtype="float32")
    weights.save(load(folder), weights.read_config(folder), tmp_path / "saved", folder)
    values = json.loads((tmp_path / "saved/config.json").read_text())
    assert values["torch_dtype"] == "bfloat16" and "dtype" not in values


def test_a_saved_folder_is_replaced(folder, tmp_path):
    config, saved = weights.read_config(folder), tmp_path / "saved"
    first = load(folder, jnp.bfloat16)
    weights.save(first, config, saved, folder, max_shard_bytes=10_000)
    (tmp_path / "saved.unfinished").mkdir()  # what a killed save leaves
    second = jax.tree.map(lambda x: x + 1, first)
    weights.save(second, config, saved, folder)
    assert_same(load(saved, jnp.bfloat16), second)
    assert not list(saved.glob("model-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


def test_a_foreign_folder_is_not_replaced(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos exists and is not a model folder"):
        weights.save(load(folder), weights.read_config(folder), tmp_path / "photos", folder)


def test_source_of_another_shape(folder, tmp_path):
    with pytest.raises(InputError, match="config.json describes another model"):
        weights.save(load(folder), weights.read_config(folder), tmp_path / "saved", GOLDENS / "qwen3")


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
    with pytest.raises(InputError, match="model folder Qwen/Qwen2.5-7B does not exist; expected a local"):
        weights.read_config("Qwen/Qwen2.5-7B")


# --- bad weights ---

NORM = "model.layers.1.input_layernorm.weight"


def bad_weights(folder: Path, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load(folder)
    assert sentence in str(error.value) and str(folder) in str(error.value)


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


def test_half_precision_is_read(folder):
    x = np.linspace(-2, 2, 64).astype(np.float16)
    edit_tensors(folder, **{NORM: x})
    np.testing.assert_array_equal(load(folder)["layers"]["attention_norm"]["scale"][1], x.astype(np.float32))


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    bad_weights(folder, 'model.safetensors is truncated: tensor "')
    bad_weights(folder, f"of {len(content) - 4}")
    for size in (0, 7, 100):
        file.write_bytes(content[:size])
        bad_weights(folder, f"truncated or not a safetensors file: it has {size} bytes")


def test_file_that_is_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    bad_weights(folder, "model.safetensors is not a safetensors file: its header is not valid JSON")


def test_bytes_that_do_not_fit_the_shape(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    bad_weights(folder, 'tensor "x" of shape (3,) has 8 bytes')


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    bad_weights(folder, "has no model weights; expected model.safetensors or model.safetensors.index.json")


def test_missing_file_of_an_index(folder, tmp_path):
    saved = tmp_path / "saved"
    weights.save(load(folder), weights.read_config(folder), saved, folder, max_shard_bytes=50_000)
    lost = sorted(saved.glob("model-*.safetensors"))[1]
    lost.unlink()
    bad_weights(saved, f"{lost.name} does not exist")
    (saved / "model.safetensors.index.json").write_text("{}")
    bad_weights(saved, 'model.safetensors.index.json: key "weight_map" is missing')


def test_bad_tokenizer(folder):
    with pytest.raises(InputError, match=r"tokenizer_config.json does not exist"):
        weights.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json does not exist"):
        weights.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("half a fi")
    with pytest.raises(InputError, match=r"tokenizer.json is not valid JSON"):
        weights.load_tokenizer(folder)
