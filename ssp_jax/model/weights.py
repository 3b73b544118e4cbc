"""The weights of a run: what is trained, what is frozen, and both as the sampler plays with them.

There is one tree of params. Full fine-tuning trains all of it, and the sampler plays with a copy in
the compute dtype. With LoRA the adapter is trained, and the base is frozen and in memory once: the
learner, the reference and the sampler use the same arrays, the adapter beside them.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ssp_jax.model import decoder, hf_adapter, hf_load, sharding
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.model.linear import transpose, transpose_back


class Weights(Protocol):
    """Where the weights of a run come from, and how they get to the sampler.

    All processes call each method together.
    """

    dtype: Any  # of the arithmetic

    def initial(self) -> Params:
        """What the run trains, before its first step: float32, laid out as the learner has it."""

    def frozen(self) -> Params:
        """What it does not train, in the compute dtype, laid out as the learner has it."""

    def to_sampler(self, trained: Params) -> Params:
        """All params as this process plays with them. trained: laid out as the learner has it."""

    def initial_for_sampler(self) -> Params:
        """The params that the run starts from, as this process plays with them."""


class FullWeights:
    """All weights of a Hugging Face folder are trained."""

    def __init__(self, folder: str, config: ModelConfig, mesh: Mesh, dtype: Any):
        """mesh: the learner's. dtype: of the arithmetic."""
        self._folder = folder
        self._config = config
        self._shardings = sharding.param_shardings(decoder.abstract_params(config), mesh)
        self.dtype = dtype
        self.to_sampler = _sampler_copy(config, mesh, dtype)

    def initial(self) -> Params:
        return self._load(jnp.float32)

    def _load(self, dtype: Any) -> Params:
        return hf_load.load(self._folder, self._config, self._shardings, dtype)

    def frozen(self) -> Params:
        return {}

    def initial_for_sampler(self) -> Params:
        return self.to_sampler(self._load(self.dtype))


class LoraWeights:
    """An adapter is trained, beside the frozen weights of a Hugging Face folder."""

    def __init__(
        self, folder: str, config: ModelConfig, mesh: Mesh, dtype: Any, start: str | jax.Array
    ):
        """mesh: the learner's. dtype: of the arithmetic.

        start: the folder of an adapter, or a key for the random part of a new one. Weights are read
        when they are first asked for.
        """
        self._folder = folder
        self._config = config
        self._mesh = mesh
        self.dtype = dtype
        self._start = start
        self._shardings = sharding.param_shardings(decoder.abstract_trainable(config), mesh)
        self._adapter_to_sampler = _sampler_copy(config, mesh, dtype)

    @functools.cached_property
    def _base(self) -> "FrozenBase":
        config = self._config.base
        shardings = sharding.param_shardings(decoder.abstract_params(config), self._mesh)
        stacked = hf_load.load(self._folder, config, shardings, self.dtype)
        return FrozenBase(config, stacked, self._mesh)

    @functools.cached_property
    def _new(self) -> Any:
        """A jitted function: key -> adapter."""
        config = self._config

        def new(key: jax.Array) -> Params:
            return decoder.trainable(config, decoder.init_params(config, key))

        return jax.jit(new, out_shardings=self._shardings)

    def initial(self) -> Params:
        """The adapter of a folder, or a new one: its B is 0, so that the model is the base."""
        if isinstance(self._start, str):
            return hf_adapter.load(self._start, self._config, self._shardings, jnp.float32)
        return self._new(self._start)

    def frozen(self) -> Params:
        return self._base.for_learner()

    def to_sampler(self, trained: Params) -> Params:
        return decoder.join(self._base.for_sampler(), self._adapter_to_sampler(trained))

    def initial_for_sampler(self) -> Params:
        return self.to_sampler(self.initial())


def _sampler_copy(config: ModelConfig, mesh: Mesh, dtype: Any) -> Callable[[Params], Params]:
    """sharding.sampler_copy, as arrays of this process. mesh: the learner's."""
    everywhere, own = sharding.playing_meshes(mesh)
    copy = sharding.sampler_copy(config, everywhere, dtype)
    if jax.process_count() == 1:
        return copy
    return lambda params: sharding.local_view(copy(params), own)


# Of one parameter: the stacked array, or one array of each layer.
_Leaf = jax.Array | tuple[jax.Array, ...]


class FrozenBase:
    """The base of an adapter, laid out as whoever asks needs it, and in memory once.

    The learner scans over stacked layers, split over fsdp; the sampler unrolls them, whole there,
    and on CPUs with transposed kernels. Both layouts at the same time were two copies, so asking
    for one moves the weights into it, one parameter after the other, and deletes the other.
    """

    def __init__(self, config: ModelConfig, stacked: Params, mesh: Mesh):
        """stacked: the params as the learner has them, which this object may delete from now on."""
        self._playing, self._own = sharding.playing_meshes(mesh)
        self._leaves: dict[str, _Leaf] = decoder.flatten(stacked)
        self._shardings = {path: leaf.sharding for path, leaf in decoder.flatten(stacked).items()}
        self._is_stacked = True
        transposed = sharding.plays_transposed(config, mesh)
        self._kernel_inputs = decoder.kernel_inputs(config) if transposed else {}

    def for_learner(self) -> Params:
        """The stacked params."""
        if not self._is_stacked:
            for path in self._leaves:
                self._move(path, self._stack)
            self._is_stacked = True
        return decoder.unflatten(self._leaves)

    def for_sampler(self) -> Params:
        """The unstacked params on this process's devices."""
        if self._is_stacked:
            for path in self._leaves:
                self._move(path, self._unstack)
            self._is_stacked = False
        params = {}
        layers: dict[str, tuple[jax.Array, ...]] = {}
        for path, leaf in self._leaves.items():
            name = self._sampler_path(path)
            if isinstance(leaf, tuple):
                layers[name.removeprefix("layers/")] = leaf
            else:
                params[name] = leaf
        nested = decoder.unflatten(params)
        nested["layers"] = tuple(
            decoder.unflatten(dict(zip(layers, of_layer, strict=True)))
            for of_layer in zip(*layers.values(), strict=True)
        )
        if jax.process_count() > 1:
            return sharding.local_view(nested, self._own)
        return nested

    def _num_in(self, path: str) -> int:
        """Contracted axes of a kernel that the sampler has transposed; 0 for all other leaves."""
        layer = path.removeprefix("layers/").removesuffix("/kernel")
        return self._kernel_inputs.get(layer, 0) if path.endswith("/kernel") else 0

    def _sampler_path(self, path: str) -> str:
        return path.removesuffix("kernel") + "transposed" if self._num_in(path) else path

    def _move(self, path: str, convert: Callable[[str, _Leaf], _Leaf]) -> None:
        old = self._leaves[path]
        new = jax.block_until_ready(convert(path, old))
        if new is not old:
            jax.tree.map(lambda x: x.delete(), old)
        self._leaves[path] = new

    def _unstack(self, path: str, leaf: Any) -> _Leaf:
        is_stacked = path.startswith("layers/")
        num_in = self._num_in(path)
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        shape = shape[num_in:] + shape[:num_in]
        name = self._sampler_path(path)
        target = sharding.param_sharding(name, shape, self._playing, drop=("fsdp",))
        if is_stacked:
            return unstacker(len(leaf), num_in, target)(leaf)
        return _resharded(leaf, target)

    def _stack(self, path: str, leaf: Any) -> _Leaf:
        target = self._shardings[path]
        if isinstance(leaf, tuple):
            return stacker(self._num_in(path), target)(leaf)
        return _resharded(leaf, target)


@functools.cache
def unstacker(num_layers: int, num_in: int, target: NamedSharding) -> Any:
    """A jitted function: stacked parameter -> that of each layer, num_in axes transposed."""

    def unstack(stacked: jax.Array) -> tuple[jax.Array, ...]:
        layers = [stacked[i] for i in range(num_layers)]
        return tuple(transpose(x, num_in) if num_in else x for x in layers)

    return jax.jit(unstack, out_shardings=target)


@functools.cache
def stacker(num_in: int, target: NamedSharding) -> Any:
    """A jitted function: the way back from what `unstacker` made."""

    def stack(layers: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([transpose_back(x, num_in) if num_in else x for x in layers])

    return jax.jit(stack, out_shardings=target)


def _resharded(x: jax.Array, target: NamedSharding) -> jax.Array:
    """x itself where it is laid out so already."""
    if x.sharding.is_equivalent_to(target, x.ndim):
        return x
    return jax.jit(lambda y: y, out_shardings=target)(x)
