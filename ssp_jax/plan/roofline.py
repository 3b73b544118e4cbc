"""What a step has to compute and to read, and how long that takes at least, from shapes alone."""

import dataclasses
import math

import jax
from ml_collections import ConfigDict

from ssp_jax import assemble
from ssp_jax.config import longest_episode
from ssp_jax.game import rules
from ssp_jax.plan.hardware import Chip
from ssp_jax.plan.memory import Target, abstract_params, cache_layout, persistent_bytes


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step plays. tokens: of an episode, sampled or given; sampled: those that the model
    wrote.
    """

    tokens: int
    sampled: int
    played: int  # episodes of all roles
    trained: int


def workload(config: ConfigDict, tokens: int, sampled: int) -> Workload:
    """Upper bound of the episodes in a step: every question is well-formed and verified."""
    proposer, solver = rules.group_sizes(config.game.rl_pair, config.game.group_size)
    answers = config.game.answers_per_step
    proposed, solved = answers * proposer, answers * proposer * solver
    trained = {"both": proposed + solved, "solver": solved, "proposer": proposed}[config.game.train]
    longest = longest_episode(config)
    tokens, sampled = min(tokens, longest), min(sampled, tokens, config.limits.response_tokens)
    return Workload(tokens, sampled, proposed * (2 if config.game.verify else 1) + solved, trained)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in one step."""

    flops: float = 0.0
    hbm: float = 0.0  # bytes
    link: float = 0.0  # bytes that it receives

    def seconds(self, chip: Chip) -> dict[str, float]:
        return {
            "FLOPs": self.flops / chip.flops,
            "HBM": self.hbm / chip.bandwidth,
            "links": self.link / chip.link,
        }


def work(target: Target, load: Workload) -> dict[str, Work]:
    """Least operations and bytes of a step's phases on each device; whatever can overlap is taken
    to overlap.
    """
    m, c, item = target.model, target.config.learner, target.dtype.itemsize
    devices = target.parts * target.tensor
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(m)))
    table = m.vocab_size * m.embed_dim
    body = total - table * (1 if m.tie_embeddings else 2)  # parameters of the layers
    # FLOPs a token: 4 x half the episode
    attention = 2 * m.num_layers * m.num_heads * m.head_dim * load.tokens
    forward = 2 * (body + table) + attention
    bytes_ = persistent_bytes(target)

    given = load.played * (load.tokens - load.sampled)
    prefill = Work(flops=given * (2 * body + attention) / devices)
    # An episode holds half of its tokens on average; where memory is short fewer slots are busy.
    layout = cache_layout(target)
    busy = target.hosts * min(layout.rows[0], layout.tokens / (load.tokens / 2))
    steps, slots = math.ceil(load.played * load.sampled / busy), busy / target.parts
    half = (
        slots
        * load.tokens
        / 2
        * 2
        * m.num_layers
        * m.num_kv_heads
        / target.tensor
        * m.head_dim
        * item
    )
    read = bytes_["sampler copy"] - (0 if m.tie_embeddings else table * item / target.tensor)
    decode = Work(flops=steps * slots * forward / target.tensor, hbm=steps * (read + half))

    copy = bytes_["sampler copy"]
    reshard = Work(hbm=bytes_["parameters"] + copy, link=copy * (1 - 1 / target.mesh.shape["fsdp"]))

    passes = (
        3
        + (target.config.model.remat in ("full", "attention"))
        + (c.kl_coef > 0)
        + (c.old_logprobs == "recompute")
    )
    tokens = load.trained * load.tokens
    batches = math.ceil(tokens / (c.rows * c.row_tokens))
    f = target.mesh.shape["fsdp"]
    gathered = (passes - 2) * item + 4  # of a parameter: weights in each forward, gradients once
    optimizer_steps = sum(assemble.updates(target.config).values())
    update = Work(
        flops=tokens * passes * forward / devices,
        hbm=7 * bytes_["parameters"] * optimizer_steps + 3 * batches * bytes_["parameters"],
        link=batches * total / target.tensor * gathered * (1 - 1 / f),
    )
    return {"prefill": prefill, "decode": decode, "reshard": reshard, "update": update}
