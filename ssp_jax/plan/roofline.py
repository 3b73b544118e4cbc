"""Lower bounds of a step's operations, bytes and seconds, from shapes alone."""

import dataclasses
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from ssp_jax.assembly import sections
from ssp_jax.config.derived import longest_episode
from ssp_jax.game import rules
from ssp_jax.model import decoder
from ssp_jax.plan.hardware import Chip
from ssp_jax.plan.memory import Target, cache_layout, persistent_bytes
from ssp_jax.plan.search import QUERIES, DenseSearch
from ssp_jax.retriever.dense import QUERY_TOKENS
from ssp_jax.rollout.kv_cache import Layout, token_bytes

SEARCHES = 4  # of an episode that searches [H]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Episodes of a step."""

    tokens: int  # of an episode
    sampled: int  # of these, written by the model
    played: int  # episodes of all roles
    trained: int  # of these, in the update
    searches: int  # of all episodes


def workload(config: ConfigDict, tokens: int, sampled: int) -> Workload:
    """Upper bound of the episodes in a step: every question is well-formed and verified."""
    proposer, solver = rules.group_sizes(config.game.rl_pair, config.game.group_size)
    proposed = config.game.answers_per_step * proposer
    verified = proposed if config.game.verify else 0
    solved = proposed * solver
    trained = {"both": proposed + solved, "solver": solved, "proposer": proposed}[config.game.train]
    sampled = min(sampled, tokens, config.limits.response_tokens)
    tokens = min(tokens, longest_episode(config))
    searches = SEARCHES * (proposed + solved)
    return Workload(tokens, sampled, proposed + verified + solved, trained, searches)


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one device in one step, or in a phase of it."""

    flops: float = 0.0
    hbm: float = 0.0  # bytes read and written
    link: float = 0.0  # bytes received over links

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds, by what limits them."""
        return {
            "FLOPs": self.flops / chip.flops,
            "HBM": self.hbm / chip.bandwidth,
            "links": self.link / chip.link,
        }


def work(target: Target, load: Workload) -> dict[str, Work]:
    """Minimum of operations and bytes on each device, by phase; all that can overlap does."""
    bytes_ = persistent_bytes(target)
    costs = _token_costs(target, load)
    copy = bytes_["sampler copy"]
    frozen = bytes_.get("frozen base", 0.0)
    # Each device of fsdp receives the other devices' shards. A frozen base is moved there and back.
    moved = bytes_["parameters"] + copy + (2 * frozen + copy if frozen else 0.0)
    reshard = Work(hbm=moved, link=copy * _received(target))
    search = {} if target.search is None else {"search": _search(target, target.search, load)}
    return {
        "prefill": _prefill(target, load, costs),
        "decode": _decode(target, load, costs, copy),
        **search,
        "reshard": reshard,
        "update": _update(target, load, costs, bytes_["parameters"], frozen),
    }


def calls(target: Target, load: Workload) -> dict[str, float]:
    """How often a step calls the largest program of a phase of play or update, on each device."""
    given = load.played * (load.tokens - load.sampled)
    micro_batches = _micro_batches(target, load)
    return {
        "prefill": given / (target.row_shards * target.extend_rows * target.extend_tokens),
        "decode": _decode_steps(target, cache_layout(target), load) / target.sizes.chunk,
        "scores": micro_batches,
        "gradients": micro_batches,
        "optimizer": _optimizer_steps(target),
    }


def _micro_batches(target: Target, load: Workload) -> int:
    c = target.config.learner
    return math.ceil(load.trained * load.tokens / (c.rows * c.row_tokens))


def _optimizer_steps(target: Target) -> int:
    return sum(sections.updates(target.config).values())


@dataclasses.dataclass(frozen=True)
class _TokenCosts:
    """Parameters of a model, and FLOPs of a token."""

    parameters: int  # all
    trained: int  # of these
    table: int  # of one embedding table
    layers: int  # of the layers
    attention: int  # FLOPs of a token's scores and values, on average over an episode

    @property
    def forward(self) -> int:
        """FLOPs of a token whose logits are computed."""
        return 2 * (self.layers + self.table) + self.attention

    @property
    def weight_gradients(self) -> int:
        """FLOPs of a token for the gradients of the weights that it meets."""
        is_frozen = self.trained < self.parameters
        return 2 * (self.trained if is_frozen else self.layers + self.table)


def _token_costs(target: Target, load: Workload) -> _TokenCosts:
    m = target.model
    trained, parameters = decoder.parameter_counts(m)
    table = m.vocab_size * m.embed_dim
    layers = parameters - table * (1 if m.tie_embeddings else 2)
    # 4 FLOPs for each head's number and each key, of which there are half an episode on average.
    attention = 2 * m.num_layers * m.num_heads * m.head_dim * load.tokens
    return _TokenCosts(parameters, trained, table, layers, attention)


def _received(target: Target) -> float:
    """The share of a gathered array that a device of `fsdp` does not have."""
    return 1 - 1 / target.mesh.shape["fsdp"]


def _prefill(target: Target, load: Workload, costs: _TokenCosts) -> Work:
    given = load.played * (load.tokens - load.sampled)
    devices = target.row_shards * target.tensor
    return Work(flops=given * (2 * costs.layers + costs.attention) / devices)


def _decode(target: Target, load: Workload, costs: _TokenCosts, copy: float) -> Work:
    """copy: bytes of the sampler's copy."""
    m = target.model
    item = target.dtype.itemsize
    layout = cache_layout(target)
    slots = _busy_slots(layout, load) / layout.shards
    steps = _decode_steps(target, layout, load)
    tokens = slots * load.tokens / 2
    if target.attend_by == "xla":
        tokens = tokens_read(layout, target.sizes.row_shares, load.tokens, slots)
    cache = tokens * token_bytes(m, target.dtype) / target.tensor
    # All weights are read but an embedding table that is not the head, of which a row is.
    weights = copy - (0 if m.tie_embeddings else costs.table * item / target.tensor)
    return Work(flops=steps * slots * costs.forward / target.tensor, hbm=steps * (weights + cache))


def _busy_slots(layout: Layout, load: Workload) -> float:
    """Slots of a host that decode: an episode has half of its tokens on average.

    Where memory is short, they are fewer than all.
    """
    return min(layout.rows[0], layout.tokens / (load.tokens / 2))


def _decode_steps(target: Target, layout: Layout, load: Workload) -> int:
    busy = target.hosts * _busy_slots(layout, load)
    return math.ceil(load.played * load.sampled / busy)


def tokens_read(layout: Layout, shares: Sequence[float], tokens: int, slots: float) -> int:
    """Tokens whose keys and values a decode step by XLA reads in each shard of the slots.

    It reads whole pieces of the cache, and of the deepest a share of the rows. tokens: of each
    episode when it ends; slots: of a shard, as many at any length.
    """
    depth = layout.depth(tokens)
    *earlier, deepest = zip(layout.per_shard.rows[:depth], layout.lengths[:depth], strict=True)
    in_deepest = slots * (1 - layout.starts[depth - 1] / tokens)
    buckets = layout.row_buckets(depth, shares)
    rows = min(bucket for bucket in buckets if bucket >= min(in_deepest, buckets[-1]))
    return rows * deepest[1] + sum(n * length for n, length in earlier)


def _search(target: Target, search: DenseSearch, load: Workload) -> Work:
    """Each device of a host searches its own rows for all queries of that host."""
    queries = load.searches / target.hosts
    of_query = 2 * search.rows * search.encoder.embed_dim + 2 * search.parameters * QUERY_TOKENS[0]
    return Work(flops=queries * of_query, hbm=queries / QUERIES * search.index_bytes)


def _update(
    target: Target, load: Workload, costs: _TokenCosts, parameters: float, frozen: float
) -> Work:
    """parameters, frozen: bytes on a device, of what is trained and of LoRA's base."""
    c = target.config.learner
    forwards = (
        1
        + (target.config.model.remat in ("full", "attention"))
        + (c.kl_coef > 0)
        + (c.old_logprobs == "recompute")
    )
    # As much as forward for the gradients of activations; attention is twice of that kind.
    backward = costs.forward + costs.attention + costs.weight_gradients
    tokens = load.trained * load.tokens
    micro_batches = _micro_batches(target, load)
    optimizer_steps = _optimizer_steps(target)
    # Bytes over links: weights in each forward pass, gradients once.
    sent = costs.parameters * forwards * target.dtype.itemsize + costs.trained * 4
    return Work(
        flops=tokens * (forwards * costs.forward + backward) / (target.row_shards * target.tensor),
        hbm=7 * parameters * optimizer_steps + micro_batches * (3 * parameters + frozen),
        link=micro_batches * sent / target.tensor * _received(target),
    )
