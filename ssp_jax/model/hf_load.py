"""Hugging Face folders → shapes, tokenizers and params. The way back is export.py.

Reading fills one destination buffer per parameter and device, layer by layer, with only the bytes
that this process needs: so a second copy of the model is never in host memory.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from ssp_jax.errors import InputError, shown
from ssp_jax.model import hf_config, hf_files, hf_table, hf_tokenizer
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.model.hf_files import Bounds, Folder, Tensor
from ssp_jax.model.hf_table import EMBEDDING, HEAD, Name

ADAPTER = "adapter_config.json"  # of LoRA: transformers would add it to the weights


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, as transformers would run it."""
    found = hf_files.find(folder)
    config = hf_config.read(found)
    if config.tie_embeddings and _has_own_head(found):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def _has_own_head(folder: Folder) -> bool:
    """Whether the weights have a head that differs from the embedding, though config.json ties
    them.

    Merging LoRA weights into one of the two leaves such folders. transformers then uses both.
    """
    if not {EMBEDDING, HEAD} <= hf_files.tensor_names(folder):
        return False
    tensors = hf_files.open_tensors(folder)
    embedding, head = tensors[EMBEDDING], tensors[HEAD]
    if embedding.shape != head.shape or len(head.shape) != 2:
        return True  # what is wrong with them is told when they are loaded
    rows, width = head.shape
    step = max(1, head.file.chunk // max(1, width * head.dtype.itemsize))

    def is_same(begin: int) -> bool:
        box = [(begin, min(begin + step, rows)), (0, width)]
        parts = [tensor.read(tensor.shape, box).astype(np.float32) for tensor in (embedding, head)]
        return parts[0].tobytes() == parts[1].tobytes()

    with ThreadPoolExecutor() as pool:
        return not all(pool.map(is_same, range(0, rows, step)))


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json, or nothing: not every model has one. As in transformers
    `eos_token_id` is that of config.json where no generation config names one; an id or a list
    of ids, each of which the model has.
    """
    found = hf_files.find(folder)
    file, values = "generation_config.json", {}
    if found.has(file):
        values = found.read_json(file)
    ids = values.get("eos_token_id")
    if ids is None:
        file = "config.json"
        ids = found.read_json(file).get("eos_token_id")
    rows = hf_config.read(found).vocab_size
    for index in ids if isinstance(ids, list) else [ids]:
        if index is not None and (type(index) is not int or not 0 <= index < rows):
            raise InputError(
                f'{found.place(file)}: key "eos_token_id" expected ids from 0 to {rows - 1}, found {index!r}'
            )
    return values if ids is None else {**values, "eos_token_id": ids}


def context_tokens(folder: str | Path) -> int:
    """Tokens that the model can tell apart by their positions."""
    return hf_config.context_tokens(hf_files.find(folder))


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's own tokenizer (a transformers fast tokenizer)."""
    # First, for transformers reads both files too, and would blame others.
    found = hf_files.find(folder)
    rows = hf_config.read(found).vocab_size
    read_generation_config(folder)
    return hf_tokenizer.load(found, rows)


def check_tensors(folder: str | Path, config: ModelConfig) -> str:
    """What `load` would refuse of the files' headers, and of a row of each tensor, in an instant.

    Gives a digest of these rows: training moves all tensors. A model that has diverged is NaN in
    all rows; one that is so in few is refused when it is loaded.
    """
    tensors = _open_tensors(hf_files.find(folder), config)

    def row(name: str) -> bytes:
        tensor, middle = tensors[name], tensors[name].shape[0] // 2
        box = [(middle, middle + 1), *((0, size) for size in tensor.shape[1:])]
        values = tensor.read(tensor.shape, box)
        _check_finite(tensor, values.view(f"u{values.itemsize}"), tensor.dtype)
        return values.tobytes()

    with ThreadPoolExecutor() as pool:
        return hashlib.blake2b(b"".join(pool.map(row, sorted(tensors))), digest_size=8).hexdigest()


def _open_tensors(folder: Folder, config: ModelConfig) -> dict[str, Tensor]:
    """Exactly the tensors of this shape, each of its own shape; before anything is read.

    A tensor that the model would not use is refused, or is known by name to say nothing new.
    """
    if folder.has(ADAPTER):
        raise InputError(
            f"{folder.place(ADAPTER)} asks for an adapter beside the weights; expected weights that "
            "it is merged into, and no such file"
        )
    tensors = hf_files.open_tensors(folder)
    # equal, as read_config saw, or the only one of the two
    if config.tie_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        tensors.setdefault(EMBEDDING, head)
    expected = hf_table.file_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            place = folder.place(
                hf_files.SINGLE_FILE if folder.has(hf_files.SINGLE_FILE) else hf_files.INDEX_FILE
            )
            raise InputError(f'{place}: tensor "{name}" is missing')
        if tensors[name].shape != shape:
            found = shown(tensors[name].shape)
            raise InputError(
                f"{tensors[name].place} has shape {found}; config.json asks for {shape}"
            )
    for name in sorted(tensors.keys() - expected.keys()):
        if not name.endswith("rotary_emb.inv_freq"):  # old Llama files carry these tables
            raise InputError(f"{tensors[name].place} is not part of the model in config.json")
    return {name: tensors[name] for name in expected}


def load(folder: str | Path, config: ModelConfig, shardings: Params | None, dtype: Any) -> Params:
    """Params of a folder. `shardings` is shaped like params, or None for all of it on the default
    device.

    Threads read and lay out one parameter while the one before it goes to the devices; no more of
    the model than these two is in host memory (beside the params themselves, where the device is
    the host).
    """
    tensors = _open_tensors(hf_files.find(folder), config)
    params: Params = {}
    before: Any = ()
    with ThreadPoolExecutor() as pool:
        for name in hf_table.table(config):
            *parents, last = name.path.split("/")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)
            sharding = (
                SingleDeviceSharding(jax.local_devices()[0])
                if shardings is None
                else name.leaf(shardings)
            )
            layers = [tensors[tensor] for tensor in hf_table.tensors(name, config)]
            node[last] = _load_leaf(
                name, layers, hf_table.sizes(config), sharding, np.dtype(dtype), pool.map
            )
            jax.block_until_ready(before)
            before = node[last]
    return params


@dataclasses.dataclass(frozen=True)
class _Part:
    """What some device holds of a parameter, seen with the file's axes."""

    layers: Bounds
    box: list[Bounds]
    # a view [layers of the part, ...] of the device's array, as unsigned integers
    bits_L: np.ndarray

    def put(self, layer: int, box: list[Bounds], bits: np.ndarray) -> None:
        """Copies what this part wants of a box of a layer."""
        wanted = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(self.box, box, strict=True)]
        if self.layers[0] <= layer < self.layers[1] and all(begin < end for begin, end in wanted):
            here, there = (
                tuple(
                    slice(begin - first, end - first)
                    for (begin, end), (first, _) in zip(wanted, whole, strict=True)
                )
                for whole in (self.box, box)
            )
            self.bits_L[layer - self.layers[0]][here] = bits[there]


def _load_leaf(
    name: Name,
    layers: list[Tensor],
    sizes: dict[str, int],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
    parallel_map: Callable[..., Iterator[None]],
) -> jax.Array:
    """One parameter. Its parts for this process's devices are buffers that are filled chunk by
    chunk.
    """
    shape = (*((len(layers),) if name.layered else ()), *(sizes[a] for a in name.axes))

    def bounds(index: Any) -> tuple[Bounds, ...]:
        return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))

    arrays = {
        whole: _empty([end - begin for begin, end in whole], dtype)
        for whole in map(bounds, sharding.addressable_devices_indices_map(shape).values())
    }
    parts = [_part(name, whole, x) for whole, x in arrays.items()]
    axes = range(len(name.split))
    box = [
        (min(part.box[a][0] for part in parts), max(part.box[a][1] for part in parts)) for a in axes
    ]
    file_shape = [sizes[a] for a in name.split]

    def fill(job: tuple[int, Bounds]) -> None:
        layer, rows = job
        chunk = [rows, *box[1:]]
        bits = _bits(layers[layer].read(file_shape, chunk), dtype)
        _check_finite(layers[layer], bits, dtype)
        for part in parts:
            part.put(layer, chunk, bits)

    jobs = []
    for layer in sorted({layer for part in parts for layer in range(*part.layers)}):
        row = math.prod(file_shape[1:]) * layers[layer].dtype.itemsize
        step = max(1, layers[layer].file.chunk // row)
        jobs += [(layer, (begin, min(begin + step, box[0][1]))) for begin in range(*box[0], step)]
    for _ in parallel_map(fill, jobs):
        pass
    return jax.make_array_from_callback(shape, sharding, lambda index: arrays[bounds(index)])


def _part(name: Name, whole: tuple[Bounds, ...], x: np.ndarray) -> _Part:
    """The part that fills x, which has these bounds in the parameter."""
    bits = x.view(f"u{x.itemsize}")
    if name.layered:
        layers, *own = whole
    else:
        layers, own, bits = (0, 1), list(whole), bits[None]
    axes = name.as_in_file(range(1, bits.ndim))
    return _Part(layers, name.as_in_file(own), bits.transpose(0, *axes))


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that JAX takes as it is on a CPU, where it would copy
    another one.
    """
    size, align = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + align, np.uint8)
    start = -memory.ctypes.data % align
    return memory[start : start + size].view(dtype).reshape(shape)


def _bits(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x cast to dtype, as unsigned integers: those numpy copies without holding Python's lock,
    bfloat16 it does not.
    """
    if x.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return x.view(np.uint16).astype(np.uint32) << 16
    return x.astype(dtype, copy=False).view(f"u{dtype.itemsize}")


def _check_finite(tensor: Tensor, bits: np.ndarray, dtype: np.dtype) -> None:
    """Refuses numbers of this dtype, given as unsigned integers, of which one is NaN or infinite.

    Those are the largest integers of either sign. Two reductions need no memory, which isfinite
    does, and read bfloat16 as fast as other dtypes.
    """
    if not bits.size:
        return
    infinity = np.array([np.inf, -np.inf], dtype).view(bits.dtype)
    signed = bits.view(f"i{bits.itemsize}")
    if signed.max() >= infinity[0] or bits.max() >= infinity[1]:
        raise InputError(f"{tensor.place} has values that are not finite (NaN or infinity)")
