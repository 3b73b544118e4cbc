"""Helpers for tests of model folders: damage a copy, load it, compare it bit by bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ssp_jax.model import hf_adapter, hf_load, hf_table
from ssp_jax.model.linear import Lora

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ["qwen2", "qwen3", "llama3", "qwen2_untied", "llama3_tied"]


def edit_config(folder: Path, **changes: Any) -> Path:
    """Sets keys of config.json; the value `...` removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    present = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(present))
    return folder


def edit_tensors(folder: Path, **changes: Any) -> Path:
    """Sets tensors of model.safetensors by Hugging Face's own library; None removes one."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors") | changes
    present = {name: x for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(present, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path, dtype: Any = jnp.float32) -> Any:
    return hf_load.load(folder, hf_load.read_config(folder), None, dtype)


def assert_same(a: Any, b: Any) -> None:
    """Same tree, dtypes and bits."""
    leaves_a = jax.tree.leaves_with_path(a)
    leaves_b = jax.tree.leaves_with_path(b)
    for (path_a, x), (path_b, y) in zip(leaves_a, leaves_b, strict=True):
        assert path_a == path_b and x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any], after: bytes = b"") -> Path:
    """Writes model.safetensors again with a changed header, and more bytes after its tensors."""
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    changed = change(header)
    text = json.dumps(header if changed is None else changed)
    return write_header(folder, text, content[start:] + after)


def write_header(folder: Path, header: str, data: bytes = b"") -> Path:
    raw = header.encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return folder


def split(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda weight_map: None) -> Path:
    """Two files and their index in place of model.safetensors, with a changed weight map."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part{'embed' in name}.safetensors" for name in tensors}
    for file in set(files.values()):
        held = {name: x for name, x in tensors.items() if files[name] == file}
        safetensors.numpy.save_file(held, folder / file)
    changed = change(files)
    weight_map = files if changed is None else changed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, base: Path, lora: Lora, **changes: Any) -> Path:
    """A random adapter of a base, as PEFT has it, with changed keys in its config."""
    config = dataclasses.replace(hf_load.read_config(base), lora=lora)
    names = hf_table.adapter_table(config)
    chance = np.random.default_rng(0)
    tensors = {
        name: 0.1 * chance.standard_normal(shape, np.float32)
        for name, shape in hf_table.file_shapes(names, config).items()
    }
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    document = hf_adapter.document(lora, base.name) | changes
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder
