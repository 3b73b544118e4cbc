"""What a config keeps in memory and has to do, on each device, from shapes alone: nothing is
allocated or compiled.

What is kept is exact, from the very shapes and shardings of a run. Temporaries are estimates (the
compiler decides); operations and bytes are lower bounds. Letters as in ssp_jax/__init__.py.
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

from ssp_jax import assemble
from ssp_jax.learner.state import LearnerConfig, TrainState, optimizer
from ssp_jax.model import decoder, sharding
from ssp_jax.model.attention import LANES, spans, splash_keys
from ssp_jax.rollout import kv_cache, sampler
from ssp_jax.rollout.engine import Sizes, cache_budget, choose_layout

# What lies in memory while a program runs, by phase. The sampler's copy and its keys and values are
# made for play and gone after it; the reference scores before there are gradients. What is
# offloaded lies there only where it is used.
PLAY = {
    "reshard": ("parameters", "optimizer", "reference", "sampler copy"),
    "prefill": ("parameters", "optimizer", "reference", "sampler copy", "key/value cache"),
    "decode": ("parameters", "optimizer", "reference", "sampler copy", "key/value cache"),
}
UPDATE = {
    "scores": ("parameters", "optimizer", "reference"),
    "gradients": ("parameters", "optimizer", "reference", "gradients"),
    "optimizer": ("parameters", "optimizer", "reference", "gradients"),
}
PHASES = PLAY | UPDATE
CACHED = ("prefill", "decode")
# what may be offloaded -> the phase that needs it
_USED = {"optimizer": "optimizer", "reference": "scores"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A config for a mesh of devices; the mesh may be abstract. Each host plays alone, on its own
    devices.
    """

    config: ConfigDict
    model: decoder.ModelConfig
    mesh: Any
    hbm: float | None = None  # bytes of a device, None where it is unknown
    per_host: int = 0  # devices of a host, 0: there is one host
    host: Any = None  # the devices of one host, where they are not the first of the mesh
    platform: str = "cpu"  # of the devices

    def __post_init__(self) -> None:
        sharding.check_rows(
            self.mesh,
            learner_rows=self.config.learner.rows,
            slots=self.config.engine.slots,
        )
        sharding.check_kv_heads(self.model.num_kv_heads, self.tensor)
        sharding.check_host_devices(self.per_host, self.tensor)

    @property
    def parts(self) -> int:
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
        """Of one host."""
        return assemble.make_sizes(self.config, self.hosts)

    @property
    def extend_rows(self) -> int:
        """Rows of a prefill on each device: those of its own slots."""
        return self.sizes.rows_per_shard(self.parts // self.hosts)

    @property
    def learner(self) -> LearnerConfig:
        return assemble.make_learner_config(self.config, self.model, self.mesh, self.platform)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)


def place(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, in place of arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


# Tracing these takes most of a plan's time, and a search for what fits asks for them again and
# again.
abstract_params = functools.cache(decoder.abstract_params)


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
    return jax.eval_shape(optimizer(c).init, abstract_params(c.model))


def train_state(target: Target) -> TrainState:
    abstract = abstract_params(target.model)
    params = place(abstract, sharding.param_shardings(abstract, target.mesh))
    # What the optimizer does not read is made equal, so that a search over it traces once.
    c = dataclasses.replace(
        target.learner,
        rows=0,
        row_tokens=0,
        logprob_chunk=0,
        kl_coef=0.0,
        remat="none",
        rows_sharding=None,
    )
    whole = NamedSharding(target.mesh, P())
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    opt_state = optax.tree.map_params(
        optimizer(c),
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        _abstract_optimizer(c),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    return TrainState(params, opt_state, number, number)


def sampler_params(target: Target) -> decoder.Params:
    """The unstacked copy in the compute dtype, on one host."""
    copy = _abstract_copy(target.model, target.dtype)
    return place(copy, sharding.param_shardings(copy, target.playing, drop=("fsdp",)))


def longest_episode(target: Target) -> int:
    """Bytes per device of the keys and values of one slot."""
    return -(
        -target.sizes.cache_tokens
        * kv_cache.token_bytes(target.model, target.dtype)
        // target.tensor
    )


def _layout(target: Target, lasting: dict[str, float]) -> kv_cache.Layout:
    """As the engine chooses it when the sampler's copy is in memory; at least what it needs to play
    at all.
    """
    shardings = functools.partial(sharding.state_shardings, mesh=target.playing)
    free = None
    if target.hbm is not None:
        free = max(int(target.hbm - resident_bytes(target, lasting, "reshard")), 1)
    budget = cache_budget(target.sizes, free)
    if budget is not None:
        budget = max(budget, longest_episode(target))
    return choose_layout(target.model, target.sizes, target.dtype, shardings, budget)


def cache_layout(target: Target) -> kv_cache.Layout:
    return _layout(target, _lasting(target))


def _place_state(
    target: Target, layout: kv_cache.Layout, config: decoder.ModelConfig
) -> sampler.SamplerState:
    state = _abstract_slots(config, layout, target.dtype)
    return place(state, sharding.state_shardings(state, target.playing))


def sampler_state(target: Target) -> sampler.SamplerState:
    return _place_state(target, cache_layout(target), target.model)


def device_bytes(tree: Any) -> float:
    """Bytes of these shapes on the device that holds most."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def _lasting(target: Target) -> dict[str, float]:
    """kept() without the cache."""
    state = train_state(target)
    parameters = device_bytes(state.params)
    copy = sampler_params(dataclasses.replace(target, model=_one_layer(target.model)))
    return {
        "parameters": parameters,
        "optimizer": device_bytes(state.opt_state),
        "reference": device_bytes(cast(state.params, target.dtype))
        if target.config.learner.kl_coef
        else 0.0,
        "sampler copy": device_bytes(copy)
        + (target.model.num_layers - 1) * device_bytes(copy["layers"]),
        "gradients": parameters,  # float32, laid out like the parameters
    }


def _one_layer(config: decoder.ModelConfig) -> decoder.ModelConfig:
    """The sampler's trees have leaves for each layer, all alike: tracing one is much faster than
    tracing all.
    """
    return dataclasses.replace(config, num_layers=1)


def persistent_bytes(target: Target) -> dict[str, float]:
    """Bytes per device of everything that outlives one program."""
    lasting = _lasting(target)
    state = _place_state(target, _layout(target, lasting), _one_layer(target.model))
    cached = device_bytes(state) + (target.model.num_layers - 1) * device_bytes(state.caches)
    return lasting | {"key/value cache": cached}


def resident_bytes(target: Target, kept: dict[str, float], phase: str) -> float:
    """Bytes per device of what lies there while this phase runs, its own temporaries aside."""
    c = target.config.learner
    offloaded = {"optimizer": c.offload_moments, "reference": c.offload_reference}
    away = {
        name for name, phase_of_use in _USED.items() if offloaded[name] and phase != phase_of_use
    }
    return sum(kept[name] for name in PHASES[phase] if name not in away)


def _attending(target: Target) -> tuple[float, float]:
    """Bytes of attention in the update's forward and backward pass, beyond its inputs and outputs."""
    m, T = target.model, target.config.learner.row_tokens
    queries = target.config.learner.rows / target.parts * T * m.num_heads / target.tensor
    if target.learner.attention == "splash":  # a sum for each lane; dq for each block of keys
        blocks = -(-T // splash_keys(T))
        return queries * LANES * 4, queries * m.head_dim * target.dtype.itemsize * blocks
    size = max(end - start for start, end in spans(T))
    # on TPU the scores of several blocks are alive
    return 2 * queries * size * 4, 6 * queries * size * 4


def temporaries(target: Target, parameters: float) -> dict[str, float]:
    """Estimates by phase, bytes per device. parameters: persistent_bytes()'s. Scores are float32,
    in play and without splash.
    """
    m, c, sizes, t, item = (
        target.model,
        target.config.learner,
        target.sizes,
        target.tensor,
        target.dtype.itemsize,
    )
    D, L, V, N, K, H, F = (
        m.embed_dim,
        m.num_layers,
        m.vocab_size,
        m.num_heads,
        m.num_kv_heads,
        m.head_dim,
        m.mlp_dim,
    )
    layer = (D * (2 * N + 2 * K) * H + 3 * D * F) / t  # parameters of a layer, gathered over fsdp
    # activations of a token inside a layer and its gradient
    wide = 4 * D + ((4 * N + 4 * K) * H + 6 * F) / t

    held = {  # numbers that stay of a layer and token, by remat policy
        "full": D,
        "attention": D + N / t * H,
        "dots": 3 * D + ((2 * N + 2 * K) * H + 2 * F) / t,
        "none": wide,
    }

    def scores(rows: float, queries: int, keys: int, copies: int) -> float:
        return copies * rows * N / t * queries * keys * 4.0

    slots, written, longest = (
        target.config.engine.slots / target.parts,
        target.extend_rows,
        max(sizes.extend_buckets),
    )
    piece = max(
        end - start
        for start, end in zip((0, *sizes.cache_ends()), sizes.cache_ends(), strict=False)
    )
    layer_token = kv_cache.token_bytes(_one_layer(m), target.dtype) / t
    cache_rows = written * sizes.cache_tokens * layer_token
    prefill = (
        written * longest * wide / 2 * item + scores(written, longest, piece, 2) + 2 * cache_rows
    )
    copied = slots * sizes.chunk * L * layer_token  # the chunk's own keys and values
    decode = copied + scores(slots, 1, sizes.cache_tokens, 2) + 4 * slots * V / t * 4

    rows, T = c.rows / target.parts, c.row_tokens
    attending = _attending(target)
    forward = rows * T * wide / 2 * item + attending[0] + 2 * layer * item
    forward += V * D / t * item + 2 * rows * c.logprob_chunk * V / t * 4
    backward = rows * T * wide / 2 * item + attending[1] + layer * 4 + 2 * V * D / t * 4
    gradients = forward + backward + rows * T * L * held[target.config.model.remat] * item
    # A weight of all layers is gathered at a time, and another being cast.
    found = {"reshard": 2 * L * D * F / t * item, "prefill": prefill, "decode": decode}
    if c.kl_coef or c.old_logprobs == "recompute":
        found["scores"] = forward
    # This micro-batch's gradients exist before they are added. The optimizer step works in place,
    # number by number.
    return found | {"gradients": gradients + parameters, "optimizer": layer * 4}


def peaks(target: Target, kept: dict[str, float], temporary: dict[str, float]) -> dict[str, float]:
    """Bytes per device of each phase that the config has."""
    return {phase: resident_bytes(target, kept, phase) + size for phase, size in temporary.items()}
