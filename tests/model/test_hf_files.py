"""Folders: a bucket and the hub's local copy load like a disk; errors name the folder."""

import shutil
import sys
import types
from pathlib import Path

import fsspec
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssp_jax.errors import InputError
from ssp_jax.model import hf_files, hf_load, hf_save
from tests.model_folders import GOLDENS, NAMES, assert_same, load


@pytest.fixture
def bucket():
    """An empty bucket: fsspec's own in memory."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    hf_files._in_bucket.cache_clear()


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_bucket_gives_what_the_disk_gives(name, bucket, tmp_path):
    """In several files, whole and cut along the columns of the files."""
    config = hf_load.read_config(GOLDENS / name)
    whole = load(GOLDENS / name)
    hf_save.save(
        whole, config, tmp_path / "saved", GOLDENS / name, "float32", max_shard_bytes=50_000
    )
    bucket.put(str(tmp_path / "saved"), f"/saved_{name}", recursive=True)
    url = f"memory://saved_{name}"
    assert hf_load.read_config(url) == config
    assert hf_load.read_generation_config(url) == hf_load.read_generation_config(GOLDENS / name)
    assert_same(load(url), whole)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "x")), whole
    )
    assert_same(hf_load.load(url, config, shardings, jnp.float32), whole)


def test_bad_buckets(bucket):
    bucket.put(str(GOLDENS / "qwen2"), "/models/qwen2", recursive=True)
    bucket.rm("/models/qwen2/model.safetensors")
    with pytest.raises(
        InputError,
        match="memory://models/qwen2 has no model weights; expected model.safetensors or",
    ):
        load("memory://models/qwen2")
    with pytest.raises(
        InputError, match="memory://models/qwen2/tokenizer_config.json does not exist"
    ):
        hf_load.load_tokenizer("memory://models/qwen2")
    with pytest.raises(InputError, match="model folder memory://nowhere does not exist"):
        hf_load.read_config("memory://nowhere")
    with pytest.raises(InputError, match="model folder gs://b/model cannot be reached: .*gcsfs"):
        hf_load.read_config("gs://b/model")
    with pytest.raises(
        InputError, match="model folder zz://b/model cannot be reached: Protocol not known: zz"
    ):
        hf_load.read_config("zz://b/model")


def test_a_store_that_wants_credentials(bucket, monkeypatch):
    """Its client's own kind of error, which is no OSError; here as Amazon's has it."""

    class BotoCoreError(Exception):
        pass

    def refuse(*_, **__):
        raise BotoCoreError("Unable to locate credentials.\nRead the manual.")

    monkeypatch.setitem(
        sys.modules, "botocore.exceptions", types.SimpleNamespace(BotoCoreError=BotoCoreError)
    )
    monkeypatch.setattr(type(bucket), "ls", refuse)
    with pytest.raises(
        InputError, match=r"model folder memory://a/b cannot be read: Unable to locate credentials$"
    ):
        hf_load.read_config("memory://a/b")


def test_hub_names(tmp_path, monkeypatch):
    """Without a network: an earlier download is found, a missing model is one sentence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError,
        match="model Org/Tiny-1.0 is neither a local folder nor to be had from the Hugging",
    ) as e:
        hf_load.read_config("Org/Tiny-1.0")
    assert "\n" not in str(e.value)
    copy = tmp_path / "models--Org--Tiny-1.0"
    shutil.copytree(GOLDENS / "qwen2", copy / "snapshots" / "0123")
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("0123")
    assert_same(load(Path("Org/Tiny-1.0")), load(GOLDENS / "qwen2"))
    hf_files._from_hub.cache_clear()


def test_a_part_of_a_file_is_all_that_is_read(folder):
    """Pages that were copied are released, so a mapped file does not stay in memory."""
    with (folder / "big.bin").open("wb") as file:
        file.truncate(2**26)
    with hf_files.find(folder).open("big.bin").read(0, 2**26) as raw:
        assert raw.sum() == 0
        mapped = resident(folder / "big.bin")
    assert mapped > 2**15 and resident(folder / "big.bin") == 0


def resident(path: Path) -> int:
    """KiB of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
