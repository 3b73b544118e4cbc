"""The mesh and one table: which axis of which parameter is split over which mesh axis.

Model code knows nothing of meshes; XLA derives the rest from the shardings of arguments. Only two
loops are split explicitly (`shard_map_rows`): the sampler's, whose slots have nothing to do with
each other, and that over the logits of packed rows, where XLA would send the head's weight around
in every iteration.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model import decoder

AXES = ("data", "fsdp", "tensor")

# Path of a parameter -> spec of its last axes; the stacked layer axis in front is never split.
PARAM_RULES = (
    (r"(embed|head)/weight", ("tensor", "fsdp")),  # V, D
    (r"attention/[qkv]/kernel", ("fsdp", "tensor", None)),  # D, N, H
    (r"attention/[qkv]/bias", ("tensor", None)),  # N, H
    (r"attention/o/kernel", ("tensor", None, "fsdp")),  # N, H, D
    (r"mlp/(gate|up)/kernel", ("fsdp", "tensor")),  # D, F
    (r"mlp/down/kernel", ("tensor", "fsdp")),  # F, D
    (r"attention/[qkv]/transposed", ("tensor", None, "fsdp")),  # N, H, D
    (r"attention/o/transposed", ("fsdp", "tensor", None)),  # D, N, H
    (r"mlp/(gate|up)/transposed", ("tensor", "fsdp")),  # F, D
    (r"mlp/down/transposed", ("fsdp", "tensor")),  # D, F
    # LoRA: A is split like the inputs of its layer, B like the outputs.
    (r"(attention/[qkv]|mlp/(gate|up))/lora_a", ("fsdp", None)),  # D, Y
    (r"attention/[qkv]/lora_b", (None, "tensor", None)),  # Y, N, H
    (r"mlp/(gate|up)/lora_b", (None, "tensor")),  # Y, F
    (r"attention/o/lora_a", ("tensor", None, None)),  # N, H, Y
    (r"mlp/down/lora_a", ("tensor", None)),  # F, Y
    (r"(attention/o|mlp/down)/lora_b", (None, "fsdp")),  # Y, D
    (r"norm/scale", (None,)),
)
# Model width. Kernels of narrower models stay in a core's cache, and are faster as they are
# (measured).
_TRANSPOSED_FROM = 256
BROKEN_SHARDY = "0.11.2"  # a version of JAX
HOST = "pinned_host"  # JAX's name of page-locked host memory
# of packed rows and slots
ROWS = P(("data", "fsdp"))


def mesh_sizes(axis_sizes: dict[str, int], devices: int) -> list[int]:
    """Axis sizes in the order of AXES. One may be given as -1, and takes what is left.

    Raises InputError where so many devices do not make such a mesh.
    """
    sizes = [axis_sizes[name] for name in AXES]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise InputError(
            f"config section mesh has sizes {sizes}; expected positive numbers and at most one -1"
        )
    known = math.prod(size for size in sizes if size != -1)
    if known > devices or (-1 in sizes and devices % known):
        raise InputError(f"config section mesh asks for {sizes} but there are {devices} devices")
    return [devices // known if size == -1 else size for size in sizes]


def abstract_mesh(axis_sizes: dict[str, int], devices: int) -> AbstractMesh:
    """The mesh of so many devices, which need not exist."""
    return AbstractMesh(tuple(mesh_sizes(axis_sizes, devices)), AXES)


def make_mesh(axis_sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
    """Over these devices, or over all of the run, sorted so that `tensor` stays inside a host."""
    if devices is None:
        devices = by_host(jax.devices())
    sizes = mesh_sizes(axis_sizes, len(devices))
    devices = devices[: math.prod(sizes)]  # sizes that are all given may leave devices unused
    if len(devices) > 1:
        _avoid_broken_shardy()
    return Mesh(np.array(devices).reshape(sizes), AXES)


def by_host(devices: Sequence[Any]) -> list[Any]:
    """Devices sorted so that those of a host, and hosts of a slice, follow each other.

    Through Pathways' proxy all devices belong to process 0; the task says whose chip one is.
    """

    def place(device: Any) -> tuple[int, int, int, int]:
        slice_index = getattr(device, "slice_index", None) or 0
        task = getattr(device, "virtual_task_index", None) or 0
        return device.process_index, slice_index, task, device.id

    return sorted(devices, key=place)


def _avoid_broken_shardy() -> None:
    """Turns Shardy off in the version of JAX where it crashes; the older partitioner does not.

    It ends the process (SIGSEGV) as it compiles the sampler for several devices in bfloat16.
    """
    options: Any = jax.config  # which makes its attributes at import, unseen by a type checker
    if jax.__version__ == BROKEN_SHARDY and options.jax_use_shardy_partitioner:
        jax.config.update("jax_use_shardy_partitioner", False)
        print(
            f"ssp_jax: jax {BROKEN_SHARDY} on several devices: Shardy, which crashes there, is off",
            file=sys.stderr,
        )


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Shards of packed rows and of slots: devices that share no rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS[0])


def check_rows(mesh: Mesh | AbstractMesh, *, learner_rows: int, slots: int) -> None:
    """Raises InputError where rows or slots do not divide over the mesh."""
    shards = row_shards(mesh)
    for key, number in (("learner.rows", learner_rows), ("engine.slots", slots)):
        if number % shards:
            raise InputError(
                f"config key {key} is {number}; expected a multiple of mesh.data * mesh.fsdp = "
                f"{shards}"
            )


def tensor_divides(kv_heads: int, tensor: int) -> bool:
    """True where each device of `tensor` gets whole key/value heads, as many as the others."""
    return kv_heads % tensor == 0


def check_kv_heads(kv_heads: int, tensor: int) -> None:
    """Raises InputError where the key/value heads do not divide over `tensor`."""
    if not tensor_divides(kv_heads, tensor):
        raise InputError(
            f"config key mesh.tensor is {tensor}; expected a divisor of {kv_heads} key/value heads"
        )


def playing_sizes(devices: int, tensor: int) -> tuple[int, int, int]:
    """Axis sizes of a mesh on which hosts play: replicas of the model, split over `tensor` only."""
    return (devices // tensor, 1, tensor)


def check_host_devices(per_host: int, tensor: int) -> None:
    """Raises InputError where a replica would span two hosts."""
    if per_host % tensor:
        raise InputError(
            f"config key mesh.tensor is {tensor}; expected a divisor of the {per_host} devices of "
            "a process, for each process plays on its own"
        )


def playing_mesh(devices: Any, tensor: int) -> Mesh:
    """The playing mesh of these devices, a list or array in the order of the learner's mesh."""
    array = np.asarray(devices)
    return Mesh(array.reshape(playing_sizes(array.size, tensor)), AXES)


def playing_meshes(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """The sampler's mesh over all devices, and that of this process's devices, where it plays.

    A single process plays on the learner's mesh. Of several, each plays on replicas of its own.
    """
    if jax.process_count() == 1:
        return mesh, mesh
    if mesh.size != jax.device_count():
        raise InputError(
            f"config section mesh takes {mesh.size} of {jax.device_count()} devices; expected all "
            "of them with several processes, such as -1 for one axis"
        )
    per_host = jax.local_device_count()
    tensor = mesh.shape["tensor"]
    check_host_devices(per_host, tensor)
    devices = mesh.devices.ravel()
    begin = jax.process_index() * per_host
    return playing_mesh(devices, tensor), playing_mesh(devices[begin : begin + per_host], tensor)


def local_view(tree: Any, mesh: Mesh) -> Any:
    """The shards on this process's devices, as arrays of their own on `mesh`.

    Together these shards must be whole arrays.
    """

    def local(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, x.sharding.spec)  # type: ignore[attr-defined]
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(local, tree)


def put_rows(batch: Any, sharding: NamedSharding) -> Any:
    """Host arrays to devices; every process holds all rows and sends those of its own devices."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def param_sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, drop: tuple[str, ...] = ()
) -> NamedSharding:
    """The sharding of one parameter, by its path in params, such as layers/mlp/up/kernel.

    drop: mesh axes over which each device keeps the whole (the sampler drops fsdp).
    """
    axes = next((axes for pattern, axes in PARAM_RULES if re.search(pattern + "$", path)), None)
    if axes is None:
        raise ValueError(f"no sharding rule for parameter {path}")
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(spec) :], axes, strict=True):
        # a size that does not divide stays whole
        is_split = axis is not None and axis not in drop and size % mesh.shape[axis] == 0
        spec.append(axis if is_split else None)
    return NamedSharding(mesh, P(*spec))


def param_shardings(params: Any, mesh: Mesh, drop: tuple[str, ...] = ()) -> Any:
    """Shardings shaped like params. drop: as in param_sharding."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
        return param_sharding(name, leaf.shape, mesh, drop)

    return jax.tree_util.tree_map_with_path(sharding, params)


def plays_transposed(config: decoder.ModelConfig, mesh: Mesh) -> bool:
    """True where the sampler's kernels are transposed: on CPUs, of models that are wide enough."""
    return mesh.devices.flat[0].platform == "cpu" and config.embed_dim >= _TRANSPOSED_FROM


def sampler_copy(
    config: decoder.ModelConfig, mesh: Mesh, dtype: Any
) -> Callable[[decoder.Params], decoder.Params]:
    """One jitted cast and reshard: what the learner trains, as the sampler has it.

    From stacked and split over fsdp to unstacked and whole there. Where all params are trained,
    kernels may also be transposed (plays_transposed).
    """
    transposed = config.lora is None and plays_transposed(config, mesh)

    def copy(params: decoder.Params) -> decoder.Params:
        copied = decoder.unstack(params, dtype)
        if transposed:
            copied = decoder.transpose_kernels(config, copied)
        return copied

    copied = jax.eval_shape(copy, decoder.abstract_trainable(config))
    return jax.jit(copy, out_shardings=param_shardings(copied, mesh, drop=("fsdp",)))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is packed rows or slots."""
    return NamedSharding(mesh, ROWS)


def embed_rows(
    rows: NamedSharding, params: decoder.Params, tokens_BT: jax.Array, dtype: Any
) -> jax.Array:
    """decoder.embed of packed rows; each device looks up its columns for all that share its `data`.

    So tokens go to the other devices, and columns back. Left alone, XLA gathers the table over
    `tensor`, and where `data` splits rows, too, all rows' states.
    """
    mesh = rows.mesh
    columns = param_sharding("embed/weight", params["embed"]["weight"].shape, mesh).spec[1]
    tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, NamedSharding(mesh, P("data")))
    x_BTD = decoder.embed(params, tokens_BT, dtype)
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, P("data", None, columns)))


def to_host(tree: Any, key: str) -> Any:
    """The arrays in the host memory of their devices, each shard where it was.

    key: the config key that asks for it; InputError names it where there is no such memory.
    """
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if HOST not in kinds:
        raise InputError(
            f"config key {key} is True; expected False, for {jax.default_backend()} has no {HOST} "
            "memory in this JAX"
        )
    on_host = jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), tree)
    return jax.device_put(tree, on_host)


def commit(tree: Any, like: Any) -> Any:
    """The arrays, committed to where they are, and scalars to all devices of `like`.

    So a program that takes them compiles once: for arrays that nobody placed JAX compiles one
    program, and another for its results.
    """
    everywhere = jax.tree.leaves(like)[0].sharding
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, P())
    places = jax.tree.map(lambda x: x.sharding if x.ndim else everywhere, tree)
    # From the host: a scalar that JAX 0.10.2 sends from one device to those of several processes
    # has no shards, and Orbax cannot save it.
    tree = jax.tree.map(lambda x: x if x.ndim else np.asarray(x), tree)
    return jax.device_put(tree, places)


def device_layout(tree: Any) -> Any:
    """Shardings of the arrays in device memory, wherever they are now."""
    kind = jax.local_devices()[0].default_memory().kind
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)


def to_device(tree: Any) -> Any:
    return jax.device_put(tree, device_layout(tree))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sampler's state: slots over data and fsdp, key/value heads over tensor."""

    def sharding(leaf: Any) -> NamedSharding:
        split = leaf.ndim == 4 and tensor_divides(leaf.shape[1], mesh.shape["tensor"])
        return NamedSharding(mesh, P(ROWS[0], "tensor") if split else ROWS)

    return jax.tree.map(sharding, state)


def shard_map_rows_and_heads(
    run: Callable[..., Any], rows: NamedSharding | None
) -> Callable[..., Any]:
    """`run(q, k, v, segments)` on each device with its own packed rows and heads.

    XLA would not split a Pallas kernel. rows: of the rows; None for a single device. `tensor`
    divides the key/value heads (check_kv_heads), so a query's head and its keys are on the same
    device.
    """
    if rows is None:
        return run
    heads = P(ROWS[0], None, "tensor")
    return jax.shard_map(
        run, mesh=rows.mesh, in_specs=(heads, heads, heads, ROWS), out_specs=heads, check_vma=False
    )


def shard_map_rows(
    run: Callable[..., Any], slots: Any, inputs: tuple[int | None, ...], out: Any
) -> Callable[..., Any]:
    """`run` on each shard of slots or rows by itself: nothing is sent, nothing computed twice.

    slots: the NamedSharding of an array of them, None for a single device. inputs, out: the axis of
    each argument and result that is split over the shards; out is a tree of axes; None, only in
    inputs: each shard has the whole. Other axes of the mesh (`tensor`) are the compiler's.
    """
    axes = slots.spec[0] if slots is not None else ()
    if all(slots.mesh.shape[axis] == 1 for axis in axes):
        return run

    def spec(axis: int | None) -> P:
        return P() if axis is None else P(*[None] * axis, axes)

    in_specs = tuple(spec(axis) for axis in inputs)
    out_specs = jax.tree.map(spec, out)
    # check_vma would ask for a mark on each constant that meets a shard's own values.
    return jax.shard_map(
        run,
        mesh=slots.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(axes),
        check_vma=False,
    )
