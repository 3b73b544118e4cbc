"""Saving params as a Hugging Face folder. hf_load.py is the way back.

Tensors are assigned to the devices, and each process writes files with those of its own devices:
nothing is gathered on one host, and no host holds more than a few tensors at a time.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model import hf_files, hf_load, hf_table
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.model.hf_files import Folder
from ssp_jax.model.hf_table import Name
from ssp_jax.runtime import durable, folder_swap, processes
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
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # dtype -> name in safetensors


def save(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    source_folder: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a complete Hugging Face folder, which appears only once it is whole.

    Tokenizer and config come from `source_folder`. Several processes call this together. Each one
    writes files of its own, so the folder must be on a file system that they share. Raises
    InputError if another folder is in the way, or the source has another shape.
    """
    source = hf_files.find(source_folder)
    if hf_load.read_config(source_folder) != config:
        raise InputError(
            f"{source.place('config.json')} describes another model than the one to be saved"
        )

    tag = _TAGS[dtype]
    file_dtype = hf_files.DTYPES[tag]

    # One process makes the folder, after all have checked that nothing is in the way.
    swap = _swap(Path(folder))
    is_first = jax.process_index() == 0
    swap.check()
    multihost_utils.sync_global_devices("ssp_jax: all have seen that nothing is in the way")
    if is_first:
        swap.begin()
    multihost_utils.sync_global_devices("ssp_jax: a folder to write to")
    processes.check_shared(swap.work)

    # All processes write weights.
    shapes = hf_table.file_shapes(config)
    plan = hf_files.plan_files(_owners(params, config), shapes, file_dtype, max_shard_bytes)
    arrays = _own_tensors(params, config, file_dtype)
    for file, (owner, shapes_of_file) in plan.items():
        if owner == jax.process_index():
            hf_files.write_file(swap.work / file, shapes_of_file, arrays, tag)
            durable.sync(swap.work / file)
    for _ in arrays:  # takes part in the collectives for other processes' tensors
        pass
    multihost_utils.sync_global_devices("ssp_jax: all weights are written")

    # One process writes everything else and puts the folder into its place.
    if is_first:
        _write_small_files(swap.work, source, plan, dtype, config.tie_embeddings)
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


def _owners(params: Params, config: ModelConfig) -> dict[str, int]:
    """Tensor -> the process that writes it. Each tensor of the table goes to the next device."""
    owners: dict[str, int] = {}
    for name in hf_table.table(config):
        devices = _assign(name, name.leaf(params).sharding).devices
        for tensor in hf_table.tensors(name, config):
            owners[tensor] = devices[len(owners) % len(devices)].process_index
    return owners


def _own_tensors(params: Params, config: ModelConfig, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of this process in the order of the table.

    In each round every device gets one layer. So hosts fetch and write at the same time, and a
    device needs memory for a few tensors beside params.
    """
    num_assigned = 0
    for name in hf_table.table(config):
        leaf = name.leaf(params)
        assignment = _assign(name, leaf.sharding)
        convert = _converter(name, config, dtype, assignment)
        num_layers = len(hf_table.tensors(name, config))
        num_devices = assignment.mesh.size
        for begin in range(0, num_layers, num_devices):
            # The layer of each device; in the last round some exceed num_layers and are dropped.
            layers = begin + (np.arange(num_devices, dtype=np.int32) - num_assigned) % num_devices
            shards = convert(leaf, np.minimum(layers, num_layers - 1)).addressable_shards
            own = {int(layers[shard.index[0].start or 0]): shard.data for shard in shards}
            for layer in sorted(own):
                if layer < num_layers:
                    yield np.asarray(own[layer])[0]
        num_assigned += num_layers


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
