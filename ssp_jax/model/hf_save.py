"""Params → Hugging Face folders. The way in is weights.py.

Tensors are dealt out to the devices, and each host writes files of those that its own devices got:
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

FOLDER = "export"  # of a workdir: where a run writes its model
# names the files that an export wrote: a later one may replace these and no others
MANIFEST = "ssp_jax_export.json"
COPIED = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *(
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
    ),
)


def save(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    source_folder: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """A complete Hugging Face folder, there whole or not at all; tokenizer and config come from
    `source_folder`.

    With several hosts all of them call this together. Each one writes files of its own, so the
    folder must be on a file system that they share.
    """
    folder, source = Path(folder), hf_files.find(source_folder)
    if hf_load.read_config(source_folder) != config:
        raise InputError(
            f"{source.place('config.json')} describes another model than the one to be saved"
        )
    swap = _swap(folder)
    tag = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    first = jax.process_index() == 0
    swap.check()
    multihost_utils.sync_global_devices("ssp_jax: all have seen that nothing is in the way")
    if first:
        swap.begin()
    multihost_utils.sync_global_devices("ssp_jax: a folder to write to")
    processes.check_shared(swap.work)
    file_dtype = hf_files.DTYPES[tag]
    plan = hf_files.plan_files(
        _owners(params, config), hf_table.file_shapes(config), file_dtype, max_shard_bytes
    )
    arrays = _own_tensors(params, config, file_dtype)
    for file, (owner, shapes) in plan.items():
        if owner == jax.process_index():
            hf_files.write_file(swap.work / file, shapes, arrays, tag)
            durable.sync(swap.work / file)
    for _ in arrays:  # takes part in dealing out what is left
        pass
    multihost_utils.sync_global_devices("ssp_jax: all weights are written")
    if first:
        _write_small_files(swap.work, source, plan, dtype, config.tie_embeddings)
        files = sorted(path.name for path in swap.work.iterdir() if path.name != folder_swap.MARKER)
        (swap.work / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        swap.commit()
    multihost_utils.sync_global_devices("ssp_jax: the folder is complete")


def check_place(folder: Path) -> None:
    """An export takes the place of an earlier one, of other things it does not."""
    _swap(folder).check()


def _swap(folder: Path) -> FolderSwap:
    return FolderSwap(folder, "a model folder", _written, ".unfinished", ".replaced")


def _written(folder: Path) -> list[str]:
    """The files of an earlier export, as its manifest names them."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [MANIFEST, *map(str, files)] if isinstance(files, list) else []


def _write_small_files(
    folder: Path, source: Folder, plan: hf_files.Plan, dtype: str, tied: bool
) -> None:
    """The index where there are several files, the config, the tokenizer."""
    if len(plan) > 1:
        itemsize = np.dtype(dtype).itemsize
        total = sum(
            math.prod(shape) * itemsize for _, shapes in plan.values() for shape in shapes.values()
        )
        weight_map = {tensor: file for file, (_, shapes) in plan.items() for tensor in shapes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / hf_files.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    values = source.read_json("config.json")
    # transformers 5 writes "dtype" and 4 "torch_dtype"; both read either.
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
    values |= dict.fromkeys(keys, dtype)
    # the source has a head of its own all the same
    if values.get("tie_word_embeddings", False) != tied:
        values["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)


@dataclasses.dataclass(frozen=True)
class _Deal:
    """Dealing out the tensors of one parameter to the devices that hold it: each in turn gets one."""

    mesh: Mesh
    split: tuple[tuple[int, str], ...]  # axis of the parameter, mesh axis that splits it
    whole: tuple[str, ...]  # mesh axes along which devices hold the same

    @property
    def order(self) -> tuple[str, ...]:
        """Mesh axes, the slowest first, in which the devices get their tensor."""
        return (*self.whole, *(axis for _, axis in self.split))

    @property
    def devices(self) -> list[Any]:
        return list(
            self.mesh.devices.transpose(
                [self.mesh.axis_names.index(axis) for axis in self.order]
            ).flat
        )


def _deal(name: Name, sharding: jax.sharding.Sharding) -> _Deal:
    if not isinstance(sharding, NamedSharding):  # all of it on one device
        sharding = NamedSharding(Mesh(np.array(list(sharding.device_set)), ("device",)), P())
    split = [
        (i, axis)
        for i, axes in enumerate(sharding.spec)
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
        if not (name.layered and i == 0)
    ]
    splitting = {axis for _, axis in split}
    # Backwards: of two mesh axes that split the same axis the later one has the neighbouring parts.
    mesh = cast(Mesh, sharding.mesh)  # of devices: params are arrays
    whole = tuple(axis for axis in mesh.axis_names if axis not in splitting)
    return _Deal(mesh, tuple(reversed(split)), whole)


def _owners(params: Params, config: ModelConfig) -> dict[str, int]:
    """The process that writes each tensor. The next tensor of the table always goes to the next
    device.
    """
    owners: dict[str, int] = {}
    for name in hf_table.table(config):
        devices = _deal(name, name.leaf(params).sharding).devices
        for tensor in hf_table.tensors(name, config):
            owners[tensor] = devices[len(owners) % len(devices)].process_index
    return owners


def _own_tensors(params: Params, config: ModelConfig, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of this process in the order of the table.

    In each round as many layers as there are devices go each to one device. So hosts fetch and
    write at the same time, and a device needs room for a few tensors beside params.
    """
    dealt = 0
    for name in hf_table.table(config):
        leaf = name.leaf(params)
        deal = _deal(name, leaf.sharding)
        convert = _converter(name, config, dtype, deal)
        number, count = len(hf_table.tensors(name, config)), deal.mesh.size
        for begin in range(0, number, count):
            layers = begin + (np.arange(count, dtype=np.int32) - dealt) % count
            items = convert(leaf, np.minimum(layers, number - 1)).addressable_shards
            own = {int(layers[item.index[0].start or 0]): item.data for item in items}
            for layer in sorted(own):
                if layer < number:
                    yield np.asarray(own[layer])[0]
        dealt += number


@functools.cache
def _converter(name: Name, config: ModelConfig, dtype: np.dtype, deal: _Deal) -> Any:
    """(leaf, one layer per device) -> these layers as tensors of the file, stacked; compiled once
    and for all.

    Collectives are written out: where two mesh axes split a parameter XLA by itself gathers all
    layers everywhere.
    """

    def convert(leaf: jax.Array, layers: jax.Array) -> jax.Array:
        x = leaf[layers] if name.layered else jnp.broadcast_to(leaf, (len(layers), *leaf.shape))
        x = x.astype(dtype)
        for i, axis in deal.split:
            x = jax.lax.all_to_all(
                x, axis, split_axis=0, concat_axis=i + (not name.layered), tiled=True
            )
        x = x.transpose(0, *name.as_in_file(range(1, x.ndim)))
        return x.reshape(-1, *name.file_shape(hf_table.sizes(config)))

    spec: list[Any] = [None] * (len(name.axes) + name.layered)
    for i, axis in reversed(deal.split):
        spec[i] = (*(spec[i] or ()), axis)
    specs = (P(*spec), P(deal.whole))
    return jax.jit(jax.shard_map(convert, mesh=deal.mesh, in_specs=specs, out_specs=P(deal.order)))
