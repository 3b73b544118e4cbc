"""Hugging Face folders ↔ params, one table of names for both directions.

Reading maps the safetensors files and copies, for each shard of each parameter, only the bytes that this shard needs;
writing takes one tensor of one layer at a time. So neither direction holds a second copy of the model in host memory.
The file format (8-byte header length, JSON header, raw tensors) is read and written here, without the safetensors
package: a mapped tensor can be viewed in our layout and sliced along any of our axes.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from ssp_jax.data import InputError
from ssp_jax.model import ModelConfig, Params, RopeScaling

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@dataclasses.dataclass(frozen=True)
class _Name:
    """One parameter. Axes in the letters of ssp_jax/__init__.py; the file merges the axes of a word ("NH D" is 2-D)."""

    path: str  # in params
    tensor: str  # in the file, {} is the layer
    file_axes: str
    axes: str  # in params, without the layer axis

    @property
    def layered(self) -> bool:
        return "{}" in self.tensor

    def file_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[a] for a in word) for word in self.file_axes.split())

    def from_file(self, x: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """A view of a file's tensor in our layout: nothing is read yet."""
        split = self.file_axes.replace(" ", "")
        return x.reshape([sizes[a] for a in split]).transpose([split.index(a) for a in self.axes])

    def to_file(self, x: jax.Array, sizes: dict[str, int]) -> jax.Array:
        split = self.file_axes.replace(" ", "")
        return x.transpose([self.axes.index(a) for a in split]).reshape(self.file_shape(sizes))


_LAYER = "model.layers.{}."
_NAMES = (
    _Name("embed/weight", "model.embed_tokens.weight", "V D", "VD"),
    _Name("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", "D", "D"),
    _Name("layers/attention/q/kernel", _LAYER + "self_attn.q_proj.weight", "NH D", "DNH"),
    _Name("layers/attention/q/bias", _LAYER + "self_attn.q_proj.bias", "NH", "NH"),
    _Name("layers/attention/q_norm/scale", _LAYER + "self_attn.q_norm.weight", "H", "H"),
    _Name("layers/attention/k/kernel", _LAYER + "self_attn.k_proj.weight", "KH D", "DKH"),
    _Name("layers/attention/k/bias", _LAYER + "self_attn.k_proj.bias", "KH", "KH"),
    _Name("layers/attention/k_norm/scale", _LAYER + "self_attn.k_norm.weight", "H", "H"),
    _Name("layers/attention/v/kernel", _LAYER + "self_attn.v_proj.weight", "KH D", "DKH"),
    _Name("layers/attention/v/bias", _LAYER + "self_attn.v_proj.bias", "KH", "KH"),
    _Name("layers/attention/o/kernel", _LAYER + "self_attn.o_proj.weight", "D NH", "NHD"),
    _Name("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D", "D"),
    _Name("layers/mlp/gate/kernel", _LAYER + "mlp.gate_proj.weight", "F D", "DF"),
    _Name("layers/mlp/up/kernel", _LAYER + "mlp.up_proj.weight", "F D", "DF"),
    _Name("layers/mlp/down/kernel", _LAYER + "mlp.down_proj.weight", "D F", "FD"),
    _Name("final_norm/scale", "model.norm.weight", "D", "D"),
    _Name("head/weight", "lm_head.weight", "V D", "VD"),
)


def _names(config: ModelConfig) -> list[_Name]:
    """The rows of the table that a model of this shape has."""
    absent = {"bias": not config.qkv_bias, "q_norm": not config.qk_norm, "k_norm": not config.qk_norm}
    absent["head"] = config.tie_embeddings
    return [name for name in _NAMES if not any(absent.get(part, False) for part in name.path.split("/"))]


def _sizes(c: ModelConfig) -> dict[str, int]:
    return dict(V=c.vocab_size, D=c.embed_dim, F=c.mlp_dim, N=c.num_heads, K=c.num_kv_heads, H=c.head_dim)


def _tensors(name: _Name, config: ModelConfig) -> list[str]:
    return [name.tensor.format(layer) for layer in range(config.num_layers)] if name.layered else [name.tensor]


def _file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of a model in the order in which they are written."""
    return {tensor: name.file_shape(_sizes(config)) for name in _names(config) for tensor in _tensors(name, config)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise InputError(f"model folder {path.parent} does not exist; expected a local Hugging Face folder")
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a Hugging Face folder with {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} expected a JSON object, found {type(values).__name__}")
    return values


def _number(path: Path, values: dict[str, Any], key: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number; an int will do where a float is asked for."""
    if key not in values:
        raise InputError(f'{path}: key "{key}" is missing')
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise InputError(f'{path}: key "{key}" expected a positive {kind.__name__}, found {value!r}')
    return kind(value)


def _check_supported(path: Path, values: dict[str, Any], architecture: str) -> None:
    """Whatever would silently give other numbers than Hugging Face's is refused."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,) if architecture != "Qwen2ForCausalLM" else (False, True),  # Qwen2 ignores the key
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1.0),
    }
    for key, good in allowed.items():
        if key in values and values[key] not in good:
            raise InputError(f'{path}: key "{key}" is {values[key]!r}; only {good[0]!r} is supported')
    for kind in set(values.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f'{path}: key "layer_types" contains {kind!r}; only "full_attention" is supported')


def _rope(path: Path, values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling: rope_parameters (transformers 5), or rope_theta and rope_scaling (transformers 4)."""
    rope = values.get("rope_parameters")
    if rope is None:
        top_level = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
        rope = {**(values.get("rope_scaling") or {}), **top_level}
    theta = _number(path, rope, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f'{path}: key "rope_type" is {kind!r}; only "default" and "llama3" are supported')
    factors = {key: _number(path, rope, key, float) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    key = "original_max_position_embeddings"
    return theta, RopeScaling(**factors, original_max_position_embeddings=_number(path, rope, key))


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder. Defaults are those of the Hugging Face classes."""
    path = Path(folder) / "config.json"
    values = _read_json(path)
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(f'{path}: key "architectures" is {architecture!r}; supported are {", ".join(ARCHITECTURES)}')
    _check_supported(path, values, architecture)
    number = functools.partial(_number, path, values)
    embed_dim, heads, kv_heads = number("hidden_size"), number("num_attention_heads"), number("num_key_value_heads")
    if heads % kv_heads:
        raise InputError(f'{path}: key "num_key_value_heads" is {kv_heads}, which does not divide {heads} heads')
    if values.get("head_dim") is not None:
        head_dim = number("head_dim")
    elif embed_dim % heads == 0:
        head_dim = embed_dim // heads
    else:
        raise InputError(f'{path}: key "head_dim" is missing and {heads} heads do not divide hidden_size {embed_dim}')
    theta, scaling = _rope(path, values)
    return ModelConfig(
        vocab_size=number("vocab_size"),
        num_layers=number("num_hidden_layers"),
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=number("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", float),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json as it is (eos_token_id and so on), or nothing: not every model has one."""
    path = Path(folder) / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's own tokenizer (a transformers fast tokenizer); nothing is ever downloaded."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        _read_json(Path(folder) / name)  # a broken file gets our sentence, not the tokenizers library's
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell us that there is no PyTorch
    from transformers import AutoTokenizer  # slow to import, and only needed here

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _map_file(path: Path) -> dict[str, np.memmap]:
    """Tensors by name, mapped: their bytes are read from disk when they are used."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; it should hold model weights")
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if size < 8 or start > size:
        raise InputError(f"{path} is truncated or not a safetensors file: it has {size} bytes")
    try:
        header = json.loads(data[8:start].tobytes())
    except ValueError:
        raise InputError(f"{path} is not a safetensors file: its header is not valid JSON") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        if end > size:
            raise InputError(f'{path} is truncated: tensor "{name}" ends at byte {end} of {size}')
        if entry["dtype"] not in _DTYPES:
            raise InputError(f'{path}: tensor "{name}" has dtype {entry["dtype"]}; expected {", ".join(_DTYPES)}')
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise InputError(f'{path}: tensor "{name}" of shape {shape} has {end - begin} bytes')
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors


def _map_folder(folder: Path) -> dict[str, np.memmap]:
    """All tensors of a folder: from its single file, or from the files that the index names."""
    if (folder / SINGLE_FILE).is_file():
        return _map_file(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise InputError(f"{folder} has no model weights; expected {SINGLE_FILE} or {INDEX_FILE}")
    weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f'{folder / INDEX_FILE}: key "weight_map" is missing')
    files = sorted(set(weight_map.values()))
    return {name: tensor for file in files for name, tensor in _map_file(folder / file).items()}


def _check_tensors(folder: Path, tensors: dict[str, np.memmap], config: ModelConfig) -> None:
    """Exactly the tensors of this shape, each of its own shape; before anything is read."""
    expected = _file_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f'{folder}: tensor "{name}" is missing from the safetensors files')
        if tensors[name].shape != shape:
            place = f'{tensors[name].filename}: tensor "{name}"'
            raise InputError(f"{place} has shape {tensors[name].shape}; config.json asks for {shape}")
    for name in tensors.keys() - expected.keys():
        # Old Llama files carry rotary tables; some tied models carry the embedding twice.
        if not (name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")):
            raise InputError(f'{tensors[name].filename}: tensor "{name}" is not part of the model in config.json')


def load(folder: str | Path, config: ModelConfig, shardings: Params | None, dtype: Any) -> Params:
    """Params of a folder. `shardings` is shaped like params, or None for all of it on the default device."""
    tensors = _map_folder(Path(folder))
    _check_tensors(Path(folder), tensors, config)
    params: Params = {}
    for name in _names(config):
        *parents, last = name.path.split("/")
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)
        sharding = SingleDeviceSharding(jax.local_devices()[0]) if shardings is None else _at(shardings, name.path)
        arrays = [name.from_file(np.asarray(tensors[tensor]), _sizes(config)) for tensor in _tensors(name, config)]
        node[last] = _load_leaf(arrays, name.layered, sharding, np.dtype(dtype))
    return params


def _at(tree: Params, path: str) -> Any:
    return functools.reduce(lambda node, part: node[part], path.split("/"), tree)


def _load_leaf(views: list[np.ndarray], layered: bool, sharding: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    """One parameter from the views of its layers (or its only one); each shard copies and casts just its slice."""

    def read(index: Any) -> np.ndarray:
        if not layered:
            return views[0][index].astype(dtype)
        parts = [view[index[1:]] for view in views[index[0]]]
        return np.stack(parts, dtype=dtype, casting="unsafe")

    shape = (len(views), *views[0].shape) if layered else views[0].shape
    return jax.make_array_from_callback(shape, sharding, read)


def save(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    source_folder: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """A complete Hugging Face folder, there whole or not at all; tokenizer and config come from `source_folder`.

    With several hosts all of them call this together (tensors are gathered one by one) and the first one writes.
    """
    folder, source = Path(folder), Path(source_folder)
    if read_config(source) != config:
        raise InputError(f"{source / 'config.json'} describes another model than the one to be saved")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} exists and is not a model folder; it will not be replaced")
    tag = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    arrays = _file_tensors(params, config, _DTYPES[tag])
    if jax.process_index() != 0:
        for _ in arrays:  # takes part in gathering
            pass
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_weights(unfinished, config, arrays, tag, max_shard_bytes)
    values = _read_json(source / "config.json")
    # transformers 5 writes "dtype" and 4 "torch_dtype"; both read either.
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
    (unfinished / "config.json").write_text(json.dumps(values | dict.fromkeys(keys, dtype), indent=2) + "\n")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, unfinished / name)
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _file_tensors(params: Params, config: ModelConfig, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors in the order of the table, each cast and laid out on the device and then brought to the host."""
    for name in _names(config):
        leaf = _at(params, name.path)
        convert = _converter(name, leaf.sharding, _sizes(config), dtype)
        for layer in range(len(_tensors(name, config))):
            yield np.ascontiguousarray(convert(leaf, layer))


def _converter(name: _Name, sharding: jax.sharding.Sharding, sizes: dict[str, int], dtype: np.dtype) -> Any:
    """(leaf, layer) → the file's tensor, compiled once for all layers; every host gets all of it."""

    def convert(leaf: jax.Array, layer: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if name.layered else leaf
        return name.to_file(x.astype(dtype), sizes)

    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return jax.jit(convert, out_shardings=whole)


def _write_weights(folder: Path, config: ModelConfig, arrays: Iterator[np.ndarray], tag: str, max_bytes: int) -> None:
    """One file, or numbered ones of at most `max_bytes` (a larger tensor has its own) and their index."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = total = 0
    for tensor, shape in _file_shapes(config).items():
        size = math.prod(shape) * _DTYPES[tag].itemsize
        if files[-1] and filled + size > max_bytes:
            files.append({})
            filled = 0
        files[-1][tensor] = shape
        filled, total = filled + size, total + size
    if len(files) == 1:
        return _write_file(folder / SINGLE_FILE, files[0], arrays, tag)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, shapes, arrays, tag)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterator[np.ndarray], tag: str) -> None:
    """One safetensors file with the next arrays."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for tensor, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * _DTYPES[tag].itemsize
        header[tensor] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in shapes:
            file.write(next(arrays).view(np.uint8).data)
