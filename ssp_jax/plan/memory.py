"""Memory of a config on each device, from shapes alone: nothing is allocated or compiled.

Bytes of persistent arrays are exact, from the shapes and shardings of a run. Temporaries are
estimates: the compiler decides.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ssp_jax.assembly import sections
from ssp_jax.learner.state import LearnerConfig, TrainState, optimizer
from ssp_jax.model import decoder, sharding
from ssp_jax.model.attention import LANES, spans, splash_keys
from ssp_jax.plan.search import DenseSearch, dense_search
from ssp_jax.rollout import kv_cache, sampler
from ssp_jax.rollout.engine import Sizes, attend_by, cache_budget, choose_layout

# Phase -> the arrays in memory while its program runs. The sampler's copy and its keys and values
# exist during play only; the reference scores before there are gradients. An offloaded array is
# there only in the phase that uses it. Dense search has its vectors and its encoder on the devices
# all the time. The frozen base of LoRA is in the sampler's copy, or, during
# the update, apart: model.weights moves it.
_PLAYING = ("parameters", "optimizer", "reference", "search index", "sampler copy")
_UPDATING = ("parameters", "optimizer", "reference", "search index", "frozen base")
PLAY = {
    "reshard": _PLAYING,
    "prefill": (*_PLAYING, "key/value cache"),
    "decode": (*_PLAYING, "key/value cache"),
    "search": (*_PLAYING, "key/value cache"),
}
UPDATE = {
    "scores": _UPDATING,
    "gradients": (*_UPDATING, "gradients"),
    "optimizer": (*_UPDATING, "gradients"),
}
PHASES = PLAY | UPDATE
CACHED = ("prefill", "decode", "search")  # phases with a key/value cache
# Arrays that may be offloaded -> the phase that uses them.
_USED_IN = {"optimizer": "optimizer", "reference": "scores"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A config for a mesh of devices. Each host plays alone, on its own devices.

    Raises InputError where rows, slots or heads do not divide over the mesh.
    """

    config: ConfigDict
    model: decoder.ModelConfig
    mesh: Any  # a Mesh or an AbstractMesh
    hbm: float | None = None  # bytes of a device, None where it is unknown
    cache_room: float = math.inf  # of these, what the programs leave to keys and values
    per_host: int = 0  # devices of a host, 0: there is one host
    host: Any = None  # the devices of one host, where they are not the first of the mesh
    platform: str = "cpu"  # of the devices
    gpu: tuple[int, int] | None = None  # compute capability of NVIDIA GPUs

    def __post_init__(self) -> None:
        sharding.check_rows(
            self.mesh,
            learner_rows=self.config.learner.rows,
            slots=self.config.engine.slots,
        )
        sharding.check_kv_heads(self.model.num_kv_heads, self.tensor)
        sharding.check_host_devices(self.per_host, self.tensor)

    @property
    def row_shards(self) -> int:
        """Shards of packed rows and of slots, of all hosts."""
        return sharding.row_shards(self.mesh)

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @property
    def hosts(self) -> int:
        return max(1, self.mesh.size // self.per_host) if self.per_host else 1

    @property
    def playing(self) -> Any:
        """The mesh of one host: replicas, split over `tensor` only."""
        if self.hosts == 1:
            return self.mesh
        if isinstance(self.mesh, AbstractMesh):
            sizes = sharding.playing_sizes(self.per_host, self.tensor)
            return AbstractMesh(sizes, sharding.AXES)
        devices = self.host or self.mesh.devices.ravel()[: self.per_host]
        return sharding.playing_mesh(devices, self.tensor)

    @property
    def sizes(self) -> Sizes:
        """The engine's sizes on one host."""
        return sections.make_sizes(self.config, self.hosts)

    @property
    def extend_rows(self) -> int:
        """Rows of a prefill on each device: those of its own slots."""
        return self.sizes.rows_per_shard(self.row_shards // self.hosts)

    @property
    def extend_tokens(self) -> int:
        """Tokens of each row of the longest prefill."""
        sizes = self.sizes
        return max(bucket for bucket in sizes.extend_buckets if bucket <= sizes.cache_tokens)

    @property
    def learner(self) -> LearnerConfig:
        return sections.make_learner_config(
            self.config, self.model, self.mesh, self.platform, self.gpu
        )

    @property
    def attend_by(self) -> str:
        """How decoding attends to the cache."""
        return attend_by(self.learner.attention, self.model, self.sizes, self.dtype)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def search(self) -> DenseSearch | None:
        """Dense search on the devices of a host; None for a config without it."""
        return dense_search(self.config, self.per_host or self.mesh.size)


def place(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree` with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def cast(tree: Any, dtype: Any) -> Any:
    """The shapes of `tree` in another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


# Tracing takes most of a plan's time, and a search for changes that fit needs each of these often.
abstract_params = functools.cache(decoder.abstract_params)
abstract_trainable = functools.cache(decoder.abstract_trainable)


@functools.cache
def _abstract_copy(config: decoder.ModelConfig, dtype: Any) -> decoder.Params:
    return jax.eval_shape(functools.partial(decoder.unstack, dtype=dtype), abstract_params(config))


@functools.cache
def _abstract_slots(
    config: decoder.ModelConfig, layout: kv_cache.Layout, dtype: Any
) -> sampler.SamplerState:
    return jax.eval_shape(functools.partial(sampler.init_state, config, layout, dtype))


@functools.cache
def _abstract_optimizer(c: LearnerConfig) -> Any:
    return jax.eval_shape(optimizer(c).init, abstract_trainable(c.model))


def train_state(target: Target) -> TrainState:
    """Shapes and shardings of the learner's state."""
    abstract = abstract_trainable(target.model)
    params = place(abstract, sharding.param_shardings(abstract, target.mesh))
    # Fields that the optimizer does not read are made equal: a search over them traces once.
    c = dataclasses.replace(
        target.learner,
        rows=0,
        row_tokens=0,
        logprob_chunk=0,
        kl_coef=0.0,
        remat="none",
        rows_sharding=None,
    )
    replicated = NamedSharding(target.mesh, P())
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    opt_state = optax.tree.map_params(
        optimizer(c),
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        _abstract_optimizer(c),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    )
    return TrainState(params, opt_state, number, number)


def frozen_base(target: Target) -> decoder.Params:
    """Shapes and shardings of what is not trained, as the learner has it; none without LoRA."""
    if target.model.lora is None:
        return {}
    base = abstract_params(target.model.base)
    return cast(place(base, sharding.param_shardings(base, target.mesh)), target.dtype)


def largest_moved(target: Target) -> tuple[str, Any, tuple[Any, ...]]:
    """The base's parameter that takes most memory: its path, stacked, and as the sampler's layers.

    While it moves to the sampler's layout, or back, it is in memory twice.
    """
    leaves = decoder.flatten(frozen_base(target))
    stacked = [path for path in leaves if path.startswith("layers/")]
    path = max(stacked, key=lambda path: device_bytes(leaves[path]))
    stacked = leaves[path]
    shape = stacked.shape[1:]
    place = sharding.param_sharding(path, shape, target.mesh, drop=("fsdp",))
    layer = jax.ShapeDtypeStruct(shape, stacked.dtype, sharding=place)
    return path, stacked, (layer,) * len(stacked)


def sampler_params(target: Target) -> decoder.Params:
    """The unstacked copy in the compute dtype, on one host."""
    copy = _abstract_copy(target.model, target.dtype)
    return place(copy, sharding.param_shardings(copy, target.playing, drop=("fsdp",)))


def longest_episode(target: Target) -> int:
    """Bytes per device of the keys and values of one slot."""
    bytes_ = target.sizes.cache_tokens * kv_cache.token_bytes(target.model, target.dtype)
    return -(-bytes_ // target.tensor)


def _layout(target: Target, without_cache: dict[str, float]) -> kv_cache.Layout:
    """The engine's choice when the sampler's copy is in memory; at least one episode a device.

    As the engine does, it gives up rows where the programs need the room.
    """
    shardings = functools.partial(sharding.state_shardings, mesh=target.playing)
    free = None
    if target.hbm is not None:
        free = max(int(target.hbm - resident_bytes(target, without_cache, "reshard")), 1)
    budget = cache_budget(target.sizes, free)
    if budget is not None:
        budget = max(int(min(budget, target.cache_room)), longest_episode(target))
    return choose_layout(target.model, target.sizes, target.dtype, shardings, budget)


def cache_layout(target: Target) -> kv_cache.Layout:
    """The layout of the key/value cache on one host."""
    return _layout(target, _bytes_without_cache(target))


def _place_state(
    target: Target, layout: kv_cache.Layout, config: decoder.ModelConfig
) -> sampler.SamplerState:
    state = _abstract_slots(config, layout, target.dtype)
    return place(state, sharding.state_shardings(state, target.playing))


def sampler_state(target: Target) -> sampler.SamplerState:
    """Shapes and shardings of the sampler's state, on one host."""
    return _place_state(target, cache_layout(target), target.model)


def device_bytes(tree: Any) -> float:
    """Bytes of these shapes on the device that holds most."""
    total = 0
    for x in jax.tree.leaves(tree):
        total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return float(total)


def _bytes_without_cache(target: Target) -> dict[str, float]:
    """persistent_bytes() without the cache."""
    state = train_state(target)
    parameters = device_bytes(state.params)
    reference = 0.0
    if target.config.learner.kl_coef:
        reference = device_bytes(cast(state.params, target.dtype))
    copy = sampler_params(dataclasses.replace(target, model=_one_layer(target.model)))
    more_layers = target.model.num_layers - 1
    found = {
        "parameters": parameters,
        "optimizer": device_bytes(state.opt_state),
        "reference": reference,
        "sampler copy": device_bytes(copy) + more_layers * device_bytes(copy["layers"]),
    }
    if target.model.lora is not None:
        found["frozen base"] = device_bytes(frozen_base(target))
    if target.search is not None:
        found["search index"] = target.search.bytes
    return found | {"gradients": parameters}  # float32, sharded like the parameters


def _one_layer(config: decoder.ModelConfig) -> decoder.ModelConfig:
    """The model with one layer, which is traced much faster.

    The sampler's trees have leaves for each layer, all of the same shapes.
    """
    return dataclasses.replace(config, num_layers=1)


def persistent_bytes(target: Target) -> dict[str, float]:
    """Bytes per device of all arrays that outlive one program, by kind."""
    without_cache = _bytes_without_cache(target)
    layout = _layout(target, without_cache)
    state = _place_state(target, layout, _one_layer(target.model))
    cache = device_bytes(state) + (target.model.num_layers - 1) * device_bytes(state.caches)
    return without_cache | {"key/value cache": cache}


def resident_bytes(target: Target, persistent: dict[str, float], phase: str) -> float:
    """Bytes per device of the persistent arrays in device memory during a phase."""
    c = target.config.learner
    offloaded = {"optimizer": c.offload_moments, "reference": c.offload_reference}
    total = 0.0
    for name in PHASES[phase]:
        if not offloaded.get(name) or _USED_IN[name] == phase:
            # only LoRA has a frozen base, and only dense search an index
            total += persistent.get(name, 0.0)
    return total


def _attention_bytes(target: Target) -> tuple[float, float]:
    """Bytes of attention in the update's forward and backward pass, beyond inputs and outputs."""
    m = target.model
    T = target.config.learner.row_tokens
    queries = target.config.learner.rows / target.row_shards * T * m.num_heads / target.tensor
    if target.learner.attention == "splash":
        # A sum for each lane; the gradient of the queries for each block of keys.
        blocks = -(-T // splash_keys(T))
        return queries * LANES * 4, queries * m.head_dim * target.dtype.itemsize * blocks
    if target.learner.attention == "flash":
        # A sum for each query, and what the softmax's gradient takes off.
        return queries * 4, queries * 4
    longest = max(end - start for start, end in spans(T))
    # On TPU the scores of several blocks exist at the same time.
    return 2 * queries * longest * 4, 6 * queries * longest * 4


def temporaries(target: Target, parameters: float) -> dict[str, float]:
    """Estimates by phase, bytes per device. parameters: of persistent_bytes()."""
    play = _play_temporaries(target)
    return play | _update_temporaries(target, parameters)


def _activations(target: Target) -> float:
    """Numbers of a token inside one layer and its gradient."""
    m = target.model
    heads = (4 * m.num_heads + 4 * m.num_kv_heads) * m.head_dim
    return 4 * m.embed_dim + (heads + 6 * m.mlp_dim) / target.tensor


def _play_temporaries(target: Target) -> dict[str, float]:
    """Of the sampler's programs. Scores of attention are float32."""
    m = target.model
    sizes = target.sizes
    t = target.tensor
    item = target.dtype.itemsize
    L, V, N = m.num_layers, m.vocab_size, m.num_heads
    # Bytes of a token's keys and values in one layer.
    layer_token = kv_cache.token_bytes(_one_layer(m), target.dtype) / t

    def scores(rows: float, queries: int, keys: int, copies: int) -> float:
        return copies * rows * N / t * queries * keys * 4.0

    slots = target.config.engine.slots / target.row_shards
    M = target.extend_rows
    T = max(sizes.extend_buckets)
    ends = sizes.cache_ends()
    bucket = max(end - start for start, end in zip((0, *ends), ends, strict=False))
    cache_rows = M * sizes.cache_tokens * layer_token
    prefill = M * T * _activations(target) / 2 * item + scores(M, T, bucket, 2) + 2 * cache_rows
    copied = slots * sizes.chunk * L * layer_token  # the chunk's own keys and values
    decode = copied + 4 * slots * V / t * 4
    if target.attend_by == "xla":
        decode += scores(slots, 1, sizes.cache_tokens, 2)
    if m.lora is None:
        # A weight of all layers is gathered at a time, while another is cast.
        reshard = 2 * L * m.embed_dim * m.mlp_dim / t * item
    else:
        # The shards of a parameter are gathered, or the whole is cut up, beside both layouts.
        _, stacked, layers = largest_moved(target)
        gathered = device_bytes(layers) if target.mesh.shape["fsdp"] > 1 else 0
        reshard = device_bytes(stacked) + gathered
    found = {"reshard": reshard, "prefill": prefill, "decode": decode}
    if target.search is not None and target.search.rows:
        found["search"] = target.search.temporaries
    return found


def _update_temporaries(target: Target, parameters: float) -> dict[str, float]:
    """Of the learner's programs."""
    m = target.model
    c = target.config.learner
    t = target.tensor
    item = target.dtype.itemsize
    D, V, N, K, H, F = (
        m.embed_dim,
        m.vocab_size,
        m.num_heads,
        m.num_kv_heads,
        m.head_dim,
        m.mlp_dim,
    )
    layer = (D * (2 * N + 2 * K) * H + 3 * D * F) / t  # parameters of a layer, gathered over fsdp
    activations = _activations(target)
    # Numbers of a token and layer that are stored for the backward pass, by remat policy.
    stored = {
        "full": D,
        "attention": D + N / t * H,
        "dots": 3 * D + ((2 * N + 2 * K) * H + 2 * F) / t,
        "none": activations,
    }[target.config.model.remat]

    rows = c.rows / target.row_shards
    T = c.row_tokens
    attention_forward, attention_backward = _attention_bytes(target)
    forward = rows * T * activations / 2 * item + attention_forward + 2 * layer * item
    forward += V * D / t * item + 2 * rows * c.logprob_chunk * V / t * 4
    backward = rows * T * activations / 2 * item + attention_backward
    # Gradients of weights, before they are added to others: of a layer, and of the head.
    if m.lora is None:
        of_layer = layer * 4
        of_head = 2 * V * D / t * 4
    else:
        of_layer = parameters / m.num_layers
        of_head = 0.0
    backward = backward + of_layer + of_head
    gradients = forward + backward + rows * T * m.num_layers * stored * item
    found = {}
    if c.kl_coef or c.old_logprobs == "recompute":
        found["scores"] = forward
    # Gradients of layers are added in place; the others exist before they are added.
    params = train_state(target).params
    others = [part for name, part in params.items() if name != "layers"]
    found["gradients"] = gradients + device_bytes(others)
    # The optimizer step works in place, number by number.
    found["optimizer"] = of_layer
    if target.platform == "gpu":
        # Not in JAX 0.10.2, where its branch has results of its own: parameters and both moments.
        found["optimizer"] = parameters * (2 + jnp.dtype(c.momentum_dtype).itemsize / 4)
    return found


def with_cache_room(
    target: Target, persistent: dict[str, float], temporary: dict[str, float], usable: float
) -> Target:
    """The target where the engine gives the programs of play the room that they need.

    usable: bytes of a device. A cache that the config sizes stays as it is.
    """
    if target.config.engine.kv_cache_gib:
        return target
    size = persistent["key/value cache"]
    found = peaks(target, persistent, temporary)
    room = size + usable - max(found[phase] for phase in CACHED if phase in found)
    if longest_episode(target) <= room < size:
        return dataclasses.replace(target, cache_room=room)
    return target


def peaks(
    target: Target, persistent: dict[str, float], temporary: dict[str, float]
) -> dict[str, float]:
    """Bytes per device of each phase that the config has."""
    found = {}
    for phase, size in temporary.items():
        found[phase] = resident_bytes(target, persistent, phase) + size
    return found
