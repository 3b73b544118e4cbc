"""Saving params as a Hugging Face folder, or an adapter as PEFT's. hf_load.py is the way back.

Tensors are assigned to the devices, and each process writes files with those of its own devices:
nothing is gathered on one host, and no host holds more than a few tensors at a time.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model import hf_adapter, hf_files, hf_load, hf_table, linear
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.model.hf_files import Folder
from ssp_jax.model.hf_table import Name
from ssp_jax.model.linear import LORA_LEAVES
from ssp_jax.runtime import folder_swap, processes
from ssp_jax.runtime.files import sync
from ssp_jax.runtime.folder_swap import FolderSwap

FOLDER = "export"  # in a workdir: where a run writes its model
# Names the files that an export wrote: a later one may replace these and no others.
MANIFEST = "ssp_jax_export.json"
# Files of the source folder that are copied where they exist.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Gives texts by the names of their files; only the process that writes small files calls it.
Texts = Callable[[], Mapping[str, str]]
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # dtype -> name in safetensors


def save(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    source_folder: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
    texts: Texts = dict,
) -> None:
    """Writes a complete Hugging Face folder, which appears only once it is whole.

    Adapters in params are merged into their layers. Tokenizer and config come from `source_folder`;
    texts: gives further files, or others in their place. Several processes call this together. Each
    one writes files of its own, so the folder must be on a file system that they share. Raises
    InputError if another folder is in the way, or the source has another shape.
    """
    source = hf_files.find(source_folder)
    if hf_load.read_config(source_folder) != config.base:
        raise InputError(
            f"{source.place('config.json')} describes another model than the one to be saved"
        )

    names = hf_table.table(config)
    tensors = _Tensors(names, params, config, dtype)
    plan = tensors.plan(max_shard_bytes)

    def write_small_files(work: Path) -> None:
        _write_small_files(work, source, plan, dtype, config.tie_embeddings)
        _write_texts(work, texts())

    _write(Path(folder), tensors, plan, write_small_files)


def save_adapter(
    adapter: Params, config: ModelConfig, folder: str | Path, base: str, texts: Texts = dict
) -> None:
    """Writes an adapter as PEFT's folder, in float32, which appears only once it is whole.

    base: name or folder of its base, for the readers of adapter_config.json. texts: gives further
    files. Several processes call this together; the first one writes, for PEFT reads a single file.
    Raises InputError if another folder is in the way.
    """
    assert config.lora is not None
    document = hf_adapter.document(config.lora, base)
    names = hf_table.adapter_table(config)
    tensors = _Tensors(names, adapter, config, "float32", only_process=0)
    plan = tensors.plan(math.inf, hf_files.ADAPTER_FILE)

    def write_config(work: Path) -> None:
        (work / hf_files.ADAPTER_CONFIG).write_text(json.dumps(document, indent=2))
        _write_texts(work, texts())

    _write(Path(folder), tensors, plan, write_config)


def _write(
    folder: Path,
    tensors: "_Tensors",
    plan: hf_files.FilePlan,
    write_small_files: Callable[[Path], None],
) -> None:
    """Writes the files of a plan and some small files; all of them appear together."""
    # One process makes the folder, after all have checked that nothing is in the way.
    swap = _swap(folder)
    is_first = jax.process_index() == 0
    swap.check()
    multihost_utils.sync_global_devices("ssp_jax: all have seen that nothing is in the way")
    if is_first:
        swap.begin()
    multihost_utils.sync_global_devices("ssp_jax: a folder to write to")
    processes.check_shared(swap.work)

    # All processes write weights.
    arrays = tensors.own()
    for file, (owner, shapes) in plan.items():
        if owner == jax.process_index():
            hf_files.write_file(swap.work / file, shapes, arrays, _TAGS[tensors.dtype])
            sync(swap.work / file)
    for _ in arrays:  # takes part in the collectives for other processes' tensors
        pass
    multihost_utils.sync_global_devices("ssp_jax: all weights are written")

    # One process writes everything else and puts the folder into its place.
    if is_first:
        write_small_files(swap.work)
        files = folder_swap.written_names(swap.work)
        (swap.work / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        swap.commit()
    multihost_utils.sync_global_devices("ssp_jax: the folder is complete")


def check_place(folder: Path) -> None:
    """Raises InputError unless an export can be written there: it replaces only an earlier one."""
    _swap(folder).check()


def _swap(folder: Path) -> FolderSwap:
    owned = functools.partial(folder_swap.listed_names, manifest=MANIFEST)
    return FolderSwap(folder, "a model folder", owned, ".unfinished", ".replaced")


def _write_small_files(
    folder: Path, source: Folder, plan: hf_files.FilePlan, dtype: str, tied: bool
) -> None:
    """Writes the index, where there are several files, the config, and the tokenizer."""
    if len(plan) > 1:
        itemsize = np.dtype(dtype).itemsize
        total_size = 0
        weight_map = {}
        for file, (_, shapes) in plan.items():
            for tensor, shape in shapes.items():
                total_size += math.prod(shape) * itemsize
                weight_map[tensor] = file
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / hf_files.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    values = source.read_json("config.json")
    # transformers 5 writes "dtype" and 4 "torch_dtype"; both read either.
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
    values |= dict.fromkeys(keys, dtype)
    # They differ where the source's weights have a head of their own that its config ties.
    if values.get("tie_word_embeddings", False) != tied:
        values["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """How the tensors of a parameter are assigned to the devices that hold it, one to each."""

    mesh: Mesh
    split: tuple[tuple[int, str], ...]  # axis of the parameter, mesh axis that splits it
    replicated: tuple[str, ...]  # mesh axes along which devices hold the same

    @property
    def order(self) -> tuple[str, ...]:
        """Mesh axes, the slowest first, in which the devices get their tensor."""
        return (*self.replicated, *(axis for _, axis in self.split))

    @property
    def devices(self) -> list[Any]:
        """All devices in this order."""
        axes = [self.mesh.axis_names.index(axis) for axis in self.order]
        return list(self.mesh.devices.transpose(axes).flat)


def _assign(name: Name, sharding: jax.sharding.Sharding) -> _Assignment:
    if not isinstance(sharding, NamedSharding):  # all of it on one device
        sharding = NamedSharding(Mesh(np.array(list(sharding.device_set)), ("device",)), P())
    split = []
    for i, axes in enumerate(sharding.spec):
        if axes is None or (name.layered and i == 0):
            continue
        mesh_axes = (axes,) if isinstance(axes, str) else axes
        split += [(i, axis) for axis in mesh_axes]
    # Of two mesh axes that split one axis the later one divides neighbours, so it comes first here.
    split.reverse()
    mesh = cast(Mesh, sharding.mesh)  # of devices: params are arrays
    splitting = {axis for _, axis in split}
    replicated = tuple(axis for axis in mesh.axis_names if axis not in splitting)
    return _Assignment(mesh, tuple(split), replicated)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors that are written, each by a process that has the device that it is assigned to.

    Each tensor of the table goes to the next device.
    """

    names: list[Name]
    params: Params
    config: ModelConfig
    dtype: str  # of the files
    only_process: int | None = None  # writes all, where it is given

    def plan(
        self, max_shard_bytes: float, single_file: str = hf_files.SINGLE_FILE
    ) -> hf_files.FilePlan:
        """Which file has which tensors, and which process writes it."""
        owners: dict[str, int] = {}
        for name in self.names:
            assignment = _assign(name, name.leaf(self.params).sharding)
            receivers = self._receivers(assignment)
            for tensor in hf_table.tensors(name, self.config):
                device = assignment.devices[receivers[len(owners) % len(receivers)]]
                owners[tensor] = device.process_index
        shapes = hf_table.file_shapes(self.names, self.config)
        dtype = hf_files.DTYPES[_TAGS[self.dtype]]
        return hf_files.plan_files(owners, shapes, dtype, max_shard_bytes, single_file)

    def own(self) -> Iterator[np.ndarray]:
        """The tensors of this process in the order of the table.

        In each round every device gets one layer. So hosts fetch and write at the same time, and a
        device needs memory for a few tensors beside params.
        """
        dtype = hf_files.DTYPES[_TAGS[self.dtype]]
        num_assigned = 0
        for name in self.names:
            leaf = _merged(name, self.params, self.config, dtype)
            assignment = _assign(name, leaf.sharding)
            receivers = self._receivers(assignment)
            convert = _converter(name, self.config, dtype, assignment)
            num_layers = len(hf_table.tensors(name, self.config))
            # The layer of each device; those that exceed num_layers are dropped.
            layers = np.full(assignment.mesh.size, num_layers, np.int32)
            turns = (np.arange(len(receivers)) - num_assigned) % len(receivers)
            for begin in range(0, num_layers, len(receivers)):
                layers[receivers] = begin + turns
                shards = convert(leaf, np.minimum(layers, num_layers - 1)).addressable_shards
                own = {int(layers[shard.index[0].start or 0]): shard.data for shard in shards}
                for layer in sorted(own):
                    if layer < num_layers:
                        yield np.asarray(own[layer])[0]
            num_assigned += num_layers

    def _receivers(self, assignment: _Assignment) -> list[int]:
        """Positions of the devices that may get a tensor, in the order of the assignment."""
        return [
            position
            for position, device in enumerate(assignment.devices)
            if self.only_process in (None, device.process_index)
        ]


def _merged(name: Name, params: Params, config: ModelConfig, dtype: np.dtype) -> jax.Array:
    """A parameter, with the adapter of its layer merged into it where there is one.

    dtype: of what is merged.
    """
    leaf = name.leaf(params)
    module = name.module(params)
    if not name.path.endswith("kernel") or LORA_LEAVES[0] not in module:
        return leaf
    a, b = (module[key] for key in LORA_LEAVES)
    assert config.lora is not None
    return _merger(config.lora.scale, dtype, leaf.sharding)(leaf, a, b)


@functools.cache
def _merger(scale: float, dtype: np.dtype, sharding: jax.sharding.Sharding) -> Any:
    """A jitted function: (kernel, A, B), stacked, -> the merged kernel, one layer at a time."""

    def merge(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = layer
        return linear.merge(kernel, a, b, scale).astype(dtype)

    def merge_stacked(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.map(merge, (kernel, a, b))

    return jax.jit(merge_stacked, out_shardings=sharding)


@functools.cache
def _converter(name: Name, config: ModelConfig, dtype: np.dtype, assignment: _Assignment) -> Any:
    """A jitted function: (leaf, one layer per device) -> these layers as tensors of the file.

    Its collectives are explicit: where two mesh axes split a parameter XLA by itself would gather
    all layers on all devices.
    """

    def convert(leaf: jax.Array, layers: jax.Array) -> jax.Array:
        x = leaf[layers] if name.layered else jnp.broadcast_to(leaf, (len(layers), *leaf.shape))
        x = x.astype(dtype)
        for i, axis in assignment.split:
            concat_axis = i if name.layered else i + 1
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=concat_axis, tiled=True)
        x = x.transpose(0, *name.as_in_file(range(1, x.ndim)))
        return x.reshape(-1, *name.file_shape(hf_table.sizes(config)))

    spec: list[Any] = [None] * (len(name.axes) + name.layered)
    for i, axis in reversed(assignment.split):
        spec[i] = (*(spec[i] or ()), axis)
    in_specs = (P(*spec), P(assignment.replicated))
    sharded = jax.shard_map(
        convert, mesh=assignment.mesh, in_specs=in_specs, out_specs=P(assignment.order)
    )
    return jax.jit(sharded)
