"""Loading a Hugging Face folder: shape, tokenizer and params. hf_save.py is the way back.

Loading fills one destination buffer per parameter and device, layer by layer, with only the bytes
that this process needs: so a second copy of the model is never in host memory.
"""

import dataclasses
import hashlib
import itertools
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
from ssp_jax.model import decoder, hf_config, hf_files, hf_table, hf_tokenizer
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.model.hf_files import Bounds, Folder, Tensor
from ssp_jax.model.hf_table import EMBEDDING, HEAD, Name


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a folder, as transformers would run it. Raises InputError."""
    found = hf_files.find(folder)
    config = hf_config.read(found)
    if config.tie_embeddings and _has_own_head(found):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def _has_own_head(folder: Folder) -> bool:
    """Whether the weights have a head that differs from the embedding.

    Merging LoRA weights into one of the two leaves such folders, whose config.json still ties them.
    transformers then uses both.
    """
    if not {EMBEDDING, HEAD} <= hf_files.tensor_names(folder):
        return False
    tensors = hf_files.open_tensors(folder)
    embedding = tensors[EMBEDDING]
    head = tensors[HEAD]
    if embedding.shape != head.shape or len(head.shape) != 2:
        return True  # loading reports what is wrong with them
    vocab_size, width = head.shape
    step = max(1, head.file.chunk // max(1, width * head.dtype.itemsize))

    def is_same(begin: int) -> bool:
        box = [(begin, min(begin + step, vocab_size)), (0, width)]
        a = embedding.read(embedding.shape, box).astype(np.float32)
        b = head.read(head.shape, box).astype(np.float32)
        return a.tobytes() == b.tobytes()

    with ThreadPoolExecutor() as pool:
        return not all(pool.map(is_same, range(0, vocab_size, step)))


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json, or {} for a model without one. Raises InputError.

    As in transformers, `eos_token_id` is that of config.json where the generation config has none:
    an id, or a list of ids, of the vocabulary.
    """
    found = hf_files.find(folder)
    file = "generation_config.json"
    values = found.read_json(file) if found.has(file) else {}
    eos_ids = values.get("eos_token_id")
    if eos_ids is None:
        file = hf_config.FILE
        eos_ids = found.read_json(file).get("eos_token_id")
    vocab_size = hf_config.read(found).vocab_size
    for token_id in eos_ids if isinstance(eos_ids, list) else [eos_ids]:
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InputError(
                f'{found.place(file)}: key "eos_token_id" '
                f"expected ids from 0 to {vocab_size - 1}, found {token_id!r}"
            )
    return values if eos_ids is None else {**values, "eos_token_id": eos_ids}


def context_tokens(folder: str | Path) -> int:
    """The longest context, in tokens, for which the model has positions."""
    return hf_config.context_tokens(hf_files.find(folder))


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's own tokenizer (a transformers fast tokenizer). Raises InputError."""
    found = hf_files.find(folder)
    # First the configs: transformers reads them too, and its errors would name other files.
    vocab_size = hf_config.read(found).vocab_size
    read_generation_config(folder)
    return hf_tokenizer.load(found, vocab_size)


def check_tensors(folder: str | Path, config: ModelConfig) -> str:
    """Checks the files' headers, and one row of each tensor, as `load` would. Raises InputError.

    Returns a digest of these rows, which changes when the model is trained: that moves all tensors.
    A model that has diverged is NaN in all rows; one that is NaN in a few is refused by `load`.
    """
    return digest_rows(_open_tensors(hf_files.find(folder), config))


def digest_rows(tensors: dict[str, Tensor]) -> str:
    """A digest of the middle row of each tensor. Raises InputError where one is not finite."""

    def middle_row(name: str) -> bytes:
        tensor = tensors[name]
        middle = tensor.shape[0] // 2
        box = [(middle, middle + 1), *((0, size) for size in tensor.shape[1:])]
        values = tensor.read(tensor.shape, box)
        _check_finite(tensor, values.view(f"u{values.itemsize}"), tensor.dtype)
        return values.tobytes()

    with ThreadPoolExecutor() as pool:
        rows = b"".join(pool.map(middle_row, sorted(tensors)))
    return hashlib.blake2b(rows, digest_size=8).hexdigest()


def _open_tensors(folder: Folder, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a model of this shape, by name, of which only headers are read.

    Raises InputError if one is missing, has another shape, or would not be used by the model.
    """
    if folder.has(hf_files.ADAPTER_CONFIG):  # transformers would add it to the weights
        raise InputError(
            f"{folder.place(hf_files.ADAPTER_CONFIG)} asks for an adapter beside the weights; "
            "expected it in another folder, given as model.adapter (--adapter of generate)"
        )
    tensors = hf_files.open_tensors(folder)
    # Of a tied model, whose head is equal (read_config has compared) or all that the file has.
    if config.tie_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        tensors.setdefault(EMBEDDING, head)
    expected = hf_table.file_shapes(hf_table.table(config), config)
    for name, shape in expected.items():
        if name not in tensors:
            is_single = folder.has(hf_files.SINGLE_FILE)
            file = hf_files.SINGLE_FILE if is_single else hf_files.INDEX_FILE
            raise InputError(f'{folder.place(file)}: tensor "{name}" is missing')
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
    """Params of a folder without an adapter, of `dtype`. Raises InputError.

    shardings: shaped like params, or None for all of them on the default device.
    """
    tensors = _open_tensors(hf_files.find(folder), config)
    return read_params(hf_table.table(config), tensors, config, shardings, dtype)


def read_params(
    names: Sequence[Name],
    tensors: dict[str, Tensor],
    config: ModelConfig,
    shardings: Params | None,
    dtype: Any,
) -> Params:
    """The parameters of these names, from tensors of the right shapes. Raises InputError.

    shardings: as in `load`.

    Threads read one parameter and transpose it while the one before it goes to the devices. No more
    of the model than these two is in host memory, besides the params on a CPU.
    """
    sizes = hf_table.sizes(config)
    leaves: dict[str, jax.Array] = {}
    previous: Any = ()
    with ThreadPoolExecutor() as pool:
        for name in names:
            if shardings is None:
                sharding = SingleDeviceSharding(jax.local_devices()[0])
            else:
                sharding = name.leaf(shardings)
            layers = [tensors[tensor] for tensor in hf_table.tensors(name, config)]
            leaf = _load_leaf(name, layers, sizes, sharding, np.dtype(dtype), pool.map)
            jax.block_until_ready(previous)
            previous = leaf
            leaves[name.path] = leaf
    return decoder.unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What a device holds of a parameter, with the file's axes."""

    layers: Bounds
    box: list[Bounds]
    # A view [layers of the shard, ...] of the device's array, as unsigned integers.
    bits_L: np.ndarray

    def put(self, layer: int, box: list[Bounds], bits: np.ndarray) -> None:
        """Copies this shard's share of a box of a layer."""
        if not self.layers[0] <= layer < self.layers[1]:
            return
        target = []
        source = []
        for (own_begin, own_end), (box_begin, box_end) in zip(self.box, box, strict=True):
            begin = max(own_begin, box_begin)
            end = min(own_end, box_end)
            if begin >= end:
                return
            target.append(slice(begin - own_begin, end - own_begin))
            source.append(slice(begin - box_begin, end - box_begin))
        self.bits_L[layer - self.layers[0]][tuple(target)] = bits[tuple(source)]


def _load_leaf(
    name: Name,
    layers: list[Tensor],
    sizes: dict[str, int],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
    parallel_map: Callable[..., Iterator[None]],
) -> jax.Array:
    """One parameter. The shards of this process's devices are buffers, filled chunk by chunk."""
    shape = [sizes[letter] for letter in name.axes]
    if name.layered:
        shape.insert(0, len(layers))

    def bounds(index: Any) -> tuple[Bounds, ...]:
        return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))

    # One buffer for each distinct shard: devices may hold the same one.
    arrays = {}
    for index in sharding.addressable_devices_indices_map(tuple(shape)).values():
        if bounds(index) not in arrays:
            arrays[bounds(index)] = _empty([end - begin for begin, end in bounds(index)], dtype)
    shards = [_shard(name, shard_bounds, array) for shard_bounds, array in arrays.items()]

    # All of a layer that these shards need: nothing else is read.
    box = _bounding_box(shards)
    file_shape = [sizes[letter] for letter in name.split]

    def fill(job: tuple[int, Bounds]) -> None:
        layer, rows = job
        chunk = [rows, *box[1:]]
        bits = _bits(layers[layer].read(file_shape, chunk), dtype)
        _check_finite(layers[layer], bits, dtype)
        for shard in shards:
            shard.put(layer, chunk, bits)

    # Each job reads a chunk of rows of one layer, and copies it into the shards that need it.
    jobs = []
    needed = itertools.chain.from_iterable(range(*shard.layers) for shard in shards)
    for layer in sorted(set(needed)):
        row_bytes = math.prod(file_shape[1:]) * layers[layer].dtype.itemsize
        step = max(1, layers[layer].file.chunk // row_bytes)
        first, last = box[0]
        for begin in range(first, last, step):
            jobs.append((layer, (begin, min(begin + step, last))))
    for _ in parallel_map(fill, jobs):
        pass
    return jax.make_array_from_callback(tuple(shape), sharding, lambda index: arrays[bounds(index)])


def _bounding_box(shards: list[_Shard]) -> list[Bounds]:
    """The box that the shards together need of a layer, with the file's axes."""
    box = []
    for bounds_of_axis in zip(*(shard.box for shard in shards), strict=True):
        begins, ends = zip(*bounds_of_axis, strict=True)
        box.append((min(begins), max(ends)))
    return box


def _shard(name: Name, bounds: tuple[Bounds, ...], x: np.ndarray) -> _Shard:
    """The shard that fills x, which has these bounds in the parameter."""
    bits = x.view(f"u{x.itemsize}")
    if name.layered:
        layers, *own = bounds
    else:
        layers = (0, 1)
        own = list(bounds)
        bits = bits[None]
    axes = name.as_in_file(range(1, bits.ndim))
    return _Shard(layers, name.as_in_file(own), bits.transpose(0, *axes))


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that is aligned so that JAX on a CPU uses it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    align = 64
    memory = np.empty(size + align, np.uint8)
    start = -memory.ctypes.data % align
    return memory[start : start + size].view(dtype).reshape(shape)


def _bits(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x cast to dtype, as unsigned integers.

    NumPy copies integers without holding Python's lock, bfloat16 it does not.
    """
    if x.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return x.view(np.uint16).astype(np.uint32) << 16
    return x.astype(dtype, copy=False).view(f"u{dtype.itemsize}")


def _check_finite(tensor: Tensor, bits: np.ndarray, dtype: np.dtype) -> None:
    """Raises InputError if one of these numbers is NaN or infinite.

    bits: numbers of this dtype, as unsigned integers. NaN and infinity are the largest integers of
    either sign. Unlike isfinite, two reductions need no memory, and are as fast for bfloat16 as for
    other dtypes.
    """
    if not bits.size:
        return
    infinity = np.array([np.inf, -np.inf], dtype).view(bits.dtype)
    signed = bits.view(f"i{bits.itemsize}")
    if signed.max() >= infinity[0] or bits.max() >= infinity[1]:
        raise InputError(f"{tensor.place} has values that are not finite (NaN or infinity)")
