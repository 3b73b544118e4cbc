"""Export: Hugging Face's own library reads the same bits, written by one process or by several."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ssp_jax.errors import InputError
from ssp_jax.model import hf_load, hf_save
from tests.model_folders import GOLDENS, NAMES, assert_same, edit_config, load
from tests.random_params import random_params


@pytest.mark.parametrize("name", NAMES)
def test_load_save_load_is_exact_in_bfloat16(name, tmp_path):
    config = hf_load.read_config(GOLDENS / name)
    params = load(GOLDENS / name, jnp.bfloat16)
    hf_save.save(params, config, tmp_path / "saved", GOLDENS / name)
    assert_same(load(tmp_path / "saved", jnp.bfloat16), params)
    written = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    assert {x.dtype for x in written.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_saved_file_is_the_one_that_was_loaded(name, tmp_path):
    """Names, shapes and values, read by Hugging Face's own library."""
    hf_save.save(
        load(GOLDENS / name),
        hf_load.read_config(GOLDENS / name),
        tmp_path / "saved",
        GOLDENS / name,
        "float32",
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
    config = hf_load.read_config(GOLDENS / "qwen3")
    params = load(GOLDENS / "qwen3")
    limit = 40_000
    hf_save.save(
        params, config, tmp_path / "saved", GOLDENS / "qwen3", "float32", max_shard_bytes=limit
    )
    files = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
    assert max(sizes) <= limit
    # well filled
    assert all(size + following > limit for size, following in zip(sizes, sizes[1:], strict=False))
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    names = {file.name: set(safetensors.numpy.load_file(file)) for file in files}
    assert all(tensor in names[file] for tensor, file in index["weight_map"].items())
    assert not (tmp_path / "saved/model.safetensors").exists()
    assert_same(load(tmp_path / "saved"), params)


def test_shards_hold_the_same_values(tmp_path):
    """Every axis of every parameter is split in turn over 8 devices; then it is saved again."""
    source = Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "source"))
    edit_config(
        source,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    config = hf_load.read_config(source)
    whole = jax.device_put(random_params(config))
    hf_save.save(whole, config, tmp_path / "saved", source, "float32")
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    for axis in range(4):

        def cut(x: jax.Array, axis: int = axis) -> NamedSharding:
            names: list[str | None] = [None] * x.ndim
            names[axis % x.ndim] = "fsdp"
            if x.ndim > 1:
                names[(axis + 1) % x.ndim] = "tensor"
            return NamedSharding(mesh, PartitionSpec(*names))

        shardings = jax.tree.map(cut, whole)
        params = hf_load.load(tmp_path / "saved", config, shardings, jnp.float32)
        assert_same(params, whole)
        for x, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
            assert x.sharding == sharding
    hf_save.save(params, config, tmp_path / "again", source, "float32")
    assert_same(load(tmp_path / "again"), whole)


# --- the folder that is written ---


def test_a_head_of_its_own_is_kept(tmp_path):
    """The source's config.json ties the head, its weights do not: the export's config must not."""
    source = Path(shutil.copytree(GOLDENS / "qwen2_untied", tmp_path / "source"))
    edit_config(source, tie_word_embeddings=True)
    config = hf_load.read_config(source)
    params = load(source)
    hf_save.save(params, config, tmp_path / "saved", source, "float32")
    original = safetensors.numpy.load_file(source / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], original["lm_head.weight"])
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    assert hf_load.read_config(tmp_path / "saved") == config
    assert_same(load(tmp_path / "saved"), params)


def test_folder_has_config_and_tokenizer(folder, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "training_args.bin").write_text("not ours to copy")
    config = hf_load.read_config(folder)
    hf_save.save(load(folder), config, tmp_path / "out/saved", folder)
    saved = tmp_path / "out/saved"
    assert hf_load.load_tokenizer(saved).encode("b") == [1]
    assert hf_load.load_tokenizer(saved).chat_template == "{{ messages }}"
    assert (saved / "generation_config.json").read_text() == '{"eos_token_id": 1}'
    assert not (saved / "training_args.bin").exists()
    values = json.loads((saved / "config.json").read_text())
    assert values.pop("dtype") == "bfloat16" and "torch_dtype" not in values
    assert values | {"dtype": "float32"} == json.loads((folder / "config.json").read_text())
    # nothing unfinished is left
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["saved"]


def test_dtype_is_written_under_the_key_that_the_source_has(folder, tmp_path):
    edit_config(folder, dtype=..., torch_dtype="float32")
    hf_save.save(load(folder), hf_load.read_config(folder), tmp_path / "saved", folder)
    values = json.loads((tmp_path / "saved/config.json").read_text())
    assert values["torch_dtype"] == "bfloat16" and "dtype" not in values


def test_a_saved_folder_is_replaced(folder, tmp_path):
    config = hf_load.read_config(folder)
    saved = tmp_path / "saved"
    first = load(folder, jnp.bfloat16)
    hf_save.save(first, config, saved, folder, max_shard_bytes=10_000)
    (tmp_path / "saved.unfinished").mkdir()  # what a killed save leaves
    second = jax.tree.map(lambda x: x + 1, first)
    hf_save.save(second, config, saved, folder)
    assert_same(load(saved, jnp.bfloat16), second)
    assert not list(saved.glob("model-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


def test_a_foreign_folder_is_not_replaced(folder, tmp_path):
    """Neither a model of the user's own, nor an export in which something of the user's lies."""
    config = hf_load.read_config(folder)
    params = load(folder)
    hf_save.save(params, config, tmp_path / "saved", folder)
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    shutil.copytree(folder, tmp_path / "saved2")
    (tmp_path / "saved3.unfinished").mkdir()
    (tmp_path / "saved3.unfinished" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, said in (
        ("saved", "notes.txt"),
        ("saved2", "config.json"),
        ("saved3", "saved3.unfinished: expected no"),
    ):
        with pytest.raises(InputError, match=said):
            hf_save.save(params, config, tmp_path / name, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', "[" * 99_999])
def test_an_export_whose_manifest_is_damaged_is_not_replaced(folder, tmp_path, manifest):
    shutil.copytree(folder, tmp_path / "saved")
    (tmp_path / "saved" / hf_save.MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match="a model folder that ssp_jax wrote and nothing else"):
        hf_save.check_place(tmp_path / "saved")


def test_source_of_another_shape(folder, tmp_path):
    with pytest.raises(InputError, match="config.json describes another model"):
        hf_save.save(
            load(folder), hf_load.read_config(folder), tmp_path / "saved", GOLDENS / "qwen3"
        )


# --- several processes ---

WORKER = """
import dataclasses, os, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
os.umask(int(sys.argv[3], 8))  # so that a file tells who wrote it
import fsspec, fsspec.implementations.local, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ssp_jax.model import decoder, hf_adapter, hf_load, hf_save, hf_table, sharding

class Counting(fsspec.implementations.local.LocalFileSystem):
    protocol, bytes = "counting", 0
    def cat_file(self, path, start=None, end=None, **kwargs):
        type(self).bytes += end - start
        return super().cat_file(path, start, end, **kwargs)

fsspec.register_implementation("counting", Counting)
source, out, adapter = sys.argv[4:]
config = hf_load.read_config(source)
like = decoder.abstract_params(config)
mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
by_process = jax.sharding.Mesh(mesh.devices.reshape(2, 4), ("process", "local"))

def rows_by_process(path, leaf):
    name = next(n for n in hf_table.table(config) if n.path == "/".join(p.key for p in path))
    spec = [None] * leaf.ndim
    spec[name.layered + name.axes.index(name.split[0])] = "process"
    return NamedSharding(by_process, PartitionSpec(*spec))

shardings = jax.tree_util.tree_map_with_path(rows_by_process, like)
hf_load.load("counting://" + source, config, shardings, np.float32)
print("read", Counting.bytes)
params = hf_load.load(source, config, sharding.param_shardings(like, mesh), "bfloat16")
hf_save.save(params, config, out, source, max_shard_bytes=60_000)

config = dataclasses.replace(config, lora=hf_adapter.read(adapter, config).lora)
shardings = sharding.param_shardings(decoder.abstract_trainable(config), mesh)
params = hf_adapter.load(adapter, config, shardings, np.float32)
hf_save.save_adapter(params, config, out + "_adapter", "qwen2")
"""


@pytest.mark.slow
def test_two_processes_read_their_own_bytes_and_write_their_own_files(folder, tmp_path):
    """Two processes of four devices each, whose files differ in their permissions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    masks = ("022", "077")
    out = tmp_path / "out"
    folders = [str(path) for path in (folder, out, GOLDENS / "qwen2_lora")]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(process), mask, *folders],
            **dict(env=environment, stdout=subprocess.PIPE, text=True),
        )
        for process, mask in enumerate(masks)
    ]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    size = (folder / "model.safetensors").stat().st_size
    header = 8_000
    for text in printed:
        assert (size - header) / 2 <= int(text.split("read ")[1].split()[0]) <= size / 2 + header
    assert_same(load(out, jnp.bfloat16), load(folder, jnp.bfloat16))
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    written = []
    for mask in masks:
        mode = 0o666 & ~int(mask, 8)
        stats = [file.stat() for file in files]
        written.append(sum(stat.st_size for stat in stats if stat.st_mode & 0o777 == mode))
    assert min(written) > 0.3 * sum(written)
    assert sum(written) == sum(file.stat().st_size for file in files)
    # PEFT reads one file of an adapter: the first process writes all of it.
    for file in (GOLDENS / "qwen2_lora_written").iterdir():
        assert (tmp_path / "out_adapter" / file.name).read_bytes() == file.read_bytes()
