"""What a config keeps in memory and has to do, on each device, from shapes alone: nothing is allocated or compiled.

What is kept is exact, from the very shapes and shardings of a run. Temporaries are estimates (the compiler decides);
operations and bytes are lower bounds. Letters as in ssp_jax/__init__.py.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ssp_jax import attention, cache, learner, model, sampler, sharding, train
from ssp_jax.config import RL_PAIRS
from ssp_jax.data import InputError
from ssp_jax.engine import Sizes, choose_layout
from ssp_jax.published import Chip

# What lies in memory while a phase runs. The sampler's copy is dropped before the update, its cache is not.
_ALWAYS = ("parameters", "optimizer", "reference", "key/value cache")
KEEPS = {
    "prefill": (*_ALWAYS, "sampler copy"),
    "decode": (*_ALWAYS, "sampler copy"),
    "reshard": (*_ALWAYS, "sampler copy"),
    "update": (*_ALWAYS, "gradients"),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config for a mesh of devices; the mesh may be abstract."""

    config: ConfigDict
    model: model.ModelConfig
    mesh: Any

    def __post_init__(self) -> None:
        for key, number in (("learner.rows", self.config.learner.rows), ("engine.slots", self.config.engine.slots)):
            if number % self.parts:
                raise InputError(f"config key {key} is {number}; expected a multiple of {self.parts} for this mesh")
        if self.model.num_kv_heads % self.tensor:
            heads = self.model.num_kv_heads
            raise InputError(f"config key mesh.tensor is {self.tensor}; expected a divisor of {heads} key/value heads")

    @property
    def parts(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @property
    def sizes(self) -> Sizes:
        return Sizes(**self.config.engine)

    @property
    def learner(self) -> learner.LearnerConfig:
        c = train.make_learner_config(self.config, self.model)
        return dataclasses.replace(c, rows_sharding=sharding.rows_sharding(self.mesh))

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)


def place(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, in place of arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


# Tracing these takes most of a plan's time, and a search for what fits asks for them again and again.
_abstract_params = functools.cache(model.abstract_params)


@functools.cache
def _abstract_copy(config: model.ModelConfig, dtype: Any) -> model.Params:
    return jax.eval_shape(functools.partial(model.unstack, dtype=dtype), _abstract_params(config))


@functools.cache
def _abstract_slots(config: model.ModelConfig, layout: cache.Layout, dtype: Any) -> sampler.SamplerState:
    return jax.eval_shape(functools.partial(sampler.init_state, config, layout, dtype))


@functools.cache
def _abstract_optimizer(c: learner.LearnerConfig) -> Any:
    return jax.eval_shape(learner.optimizer(c).init, _abstract_params(c.model))


def train_state(setup: Setup) -> learner.TrainState:
    abstract = _abstract_params(setup.model)
    params = place(abstract, sharding.param_shardings(abstract, setup.mesh))
    # What the optimizer does not read is made equal, so that a search over it traces once.
    c = dataclasses.replace(
        setup.learner, rows=0, row_tokens=0, logprob_chunk=0, kl_coef=0.0, remat="none", rows_sharding=None
    )
    whole = NamedSharding(setup.mesh, P())
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    opt_state = optax.tree.map_params(
        learner.optimizer(c),
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        _abstract_optimizer(c),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    return learner.TrainState(params, opt_state, number, number)


def sampler_params(setup: Setup) -> model.Params:
    """The unstacked copy in the compute dtype."""
    copy = _abstract_copy(setup.model, setup.dtype)
    return place(copy, sharding.param_shardings(copy, setup.mesh, drop=("fsdp",)))


def sampler_state(setup: Setup) -> sampler.SamplerState:
    """All slots; without engine.kv_cache_gib the longest episode in each of them."""
    shardings = functools.partial(sharding.state_shardings, mesh=setup.mesh)
    budget = int(setup.sizes.kv_cache_gib * 2**30) or None
    layout = choose_layout(setup.model, setup.sizes, setup.dtype, shardings, budget)
    state = _abstract_slots(setup.model, layout, setup.dtype)
    return place(state, shardings(state))


def device_bytes(tree: Any) -> float:
    """Bytes of these shapes on the device that holds most."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def kept(setup: Setup) -> dict[str, float]:
    """Bytes per device of everything that outlives one program."""
    state = train_state(setup)
    parameters = device_bytes(state.params)
    return {
        "parameters": parameters,
        "optimizer": device_bytes(state.opt_state),
        "reference": device_bytes(cast(state.params, setup.dtype)) if setup.config.learner.kl_coef else 0.0,
        "sampler copy": device_bytes(sampler_params(setup)),
        "key/value cache": device_bytes(sampler_state(setup)),
        "gradients": parameters,  # float32, laid out like the parameters
    }


def temporaries(setup: Setup, parameters: float) -> dict[str, float]:
    """Estimates, bytes per device. parameters: kept()'s. Attention is an einsum, so float32 scores of a block exist."""
    m, c, sizes, t, item = setup.model, setup.config.learner, setup.sizes, setup.tensor, setup.dtype.itemsize
    D, L, V, N, K, H, F = m.embed_dim, m.num_layers, m.vocab_size, m.num_heads, m.num_kv_heads, m.head_dim, m.mlp_dim
    layer = (D * (2 * N + 2 * K) * H + 3 * D * F) / t  # parameters of a layer, gathered over fsdp
    wide = 4 * D + ((4 * N + 4 * K) * H + 6 * F) / t  # activations of a token inside a layer and its gradient

    held = {  # numbers that stay of a layer and token, by remat policy
        "full": D,
        "attention": D + N / t * H,
        "dots": 3 * D + ((2 * N + 2 * K) * H + 2 * F) / t,
        "none": wide,
    }

    def scores(rows: float, queries: int, keys: int, copies: int) -> float:
        return copies * rows * N / t * queries * keys * 4.0

    slots = sizes.slots / setup.parts
    rows, T, chunk = c.rows / setup.parts, c.row_tokens, c.logprob_chunk
    longest = max(sizes.extend_buckets)
    update = (
        parameters  # this micro-batch's gradients, before they are added
        + rows * T * (wide + L * held[setup.config.model.remat]) * item
        + scores(rows, max(end - start for start, end in attention.spans(T)), T, 3)
        + 2 * layer * item
        + layer * 4
        + V * D / t * (item + 4)
        + 3 * rows * chunk * V / t * 4
    )
    N_rows = sizes.extend_rows
    cache_rows = N_rows * sizes.cache_tokens * 2 * K / t * H * item
    prefill = N_rows * longest * wide / 2 * item + scores(N_rows, longest, sizes.cache_tokens, 2) + 2 * cache_rows
    copied = slots * sizes.chunk * L * 2 * K / t * H * item  # the chunk's own keys and values
    decode = copied + scores(slots, 1, sizes.cache_tokens, 2) + 4 * slots * V / t * 4
    return {"prefill": prefill, "decode": decode, "reshard": 2 * layer * 4, "update": update}


def peaks(kept: dict[str, float], temporary: dict[str, float]) -> dict[str, float]:
    return {phase: sum(kept[name] for name in names) + temporary[phase] for phase, names in KEEPS.items()}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step plays. tokens: of an episode, sampled or given; sampled: those that the model wrote."""

    tokens: int
    sampled: int
    played: int  # episodes of all roles
    trained: int


def workload(config: ConfigDict, tokens: int, sampled: int) -> Workload:
    """Upper bound of the episodes in a step: every question is well-formed and verified."""
    proposer, solver = (config.game.group_size if a == "grpo" else 1 for a in RL_PAIRS[config.game.rl_pair])
    answers = config.game.answers_per_step
    proposed, solved = answers * proposer, answers * proposer * solver
    trained = {"both": proposed + solved, "solver": solved, "proposer": proposed}[config.game.train]
    longest = config.limits.prompt_tokens + config.limits.response_tokens
    tokens, sampled = min(tokens, longest), min(sampled, tokens, config.limits.response_tokens)
    return Workload(tokens, sampled, proposed * (2 if config.game.verify else 1) + solved, trained)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in one step."""

    flops: float = 0.0
    hbm: float = 0.0  # bytes
    link: float = 0.0  # bytes that it receives

    def seconds(self, chip: Chip) -> dict[str, float]:
        return {"FLOPs": self.flops / chip.flops, "HBM": self.hbm / chip.bandwidth, "links": self.link / chip.link}


def work(setup: Setup, load: Workload) -> dict[str, Work]:
    """Least operations and bytes of a step's phases on each device; whatever can overlap is taken to overlap."""
    m, c, sizes, item = setup.model, setup.config.learner, setup.sizes, setup.dtype.itemsize
    devices = setup.parts * setup.tensor
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(_abstract_params(m)))
    table = m.vocab_size * m.embed_dim
    body = total - table * (1 if m.tie_embeddings else 2)  # parameters of the layers
    attention = 2 * m.num_layers * m.num_heads * m.head_dim * load.tokens  # FLOPs a token: 4 x half the episode
    forward = 2 * (body + table) + attention
    bytes_ = kept(setup)

    given = load.played * (load.tokens - load.sampled)
    prefill = Work(flops=given * (2 * body + attention) / devices)
    steps = math.ceil(load.played * load.sampled / sizes.slots)
    slots = sizes.slots / setup.parts
    half = slots * load.tokens / 2 * 2 * m.num_layers * m.num_kv_heads / setup.tensor * m.head_dim * item
    read = bytes_["sampler copy"] - (0 if m.tie_embeddings else table * item / setup.tensor)
    decode = Work(flops=steps * slots * forward / setup.tensor, hbm=steps * (read + half))

    copy = bytes_["sampler copy"]
    reshard = Work(hbm=bytes_["parameters"] + copy, link=copy * (1 - 1 / setup.mesh.shape["fsdp"]))

    passes = 3 + (setup.config.model.remat in ("full", "attention")) + (c.kl_coef > 0) + (c.old_logprobs == "recompute")
    tokens = load.trained * load.tokens
    batches = math.ceil(tokens / (c.rows * c.row_tokens))
    f = setup.mesh.shape["fsdp"]
    gathered = (passes - 2) * item + 4  # of a parameter: weights in each forward, gradients once
    update = Work(
        flops=tokens * passes * forward / devices,
        hbm=7 * bytes_["parameters"] * c.mini_batches + 3 * batches * bytes_["parameters"],
        link=batches * total / setup.tensor * gathered * (1 - 1 / f),
    )
    return {"prefill": prefill, "decode": decode, "reshard": reshard, "update": update}
