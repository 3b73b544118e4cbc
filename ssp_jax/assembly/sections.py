"""Sections of the config as the typed parts that lower rooms take. Reads no file."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax.config.derived import longest_episode
from ssp_jax.errors import InputError
from ssp_jax.game import prompts, roles, rules
from ssp_jax.game.examples import example_sets
from ssp_jax.learner.state import LearnerConfig
from ssp_jax.model import attention, decoder, sharding
from ssp_jax.model.linear import Lora
from ssp_jax.rollout.engine import Sizes

_SLOT_STEP = 128  # tokens; kernels take positions in powers of 2


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config; what is split over it must divide."""
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.playing_meshes(mesh)
    sharding.check_rows(mesh, learner_rows=config.learner.rows, slots=config.engine.slots)
    return mesh


def make_lora(config: ConfigDict) -> Lora | None:
    """Section lora; None for full fine-tuning."""
    return lora_section(config.lora) if config.lora.rank else None


def lora_section(c: ConfigDict) -> Lora:
    """c: section lora."""
    targets = tuple(name for name in decoder.PROJECTIONS if name in c.targets)
    return Lora(c.rank, c.alpha, targets, c.rank_stabilized)


def make_context(config: ConfigDict, tokenizer: Any) -> roles.EpisodeContext:
    """Sections prompt and limits, with the tokenizer."""
    p = config.prompt
    limits = roles.Limits(**config.limits)
    style = prompts.STYLES[p.style]
    shown = example_sets(p.worked_examples)
    context = roles.EpisodeContext(tokenizer, style, p.template, limits, shown, p.tell_repeats)
    minimum = len(context.encode(style.observation_text.format(documents="")))
    if limits.observation_tokens <= minimum:
        raise InputError(
            f"config key limits.observation_tokens is {limits.observation_tokens}; expected more "
            f"than the {minimum} tokens of the tags around a result"
        )
    return context


def make_game_config(config: ConfigDict) -> rules.GameConfig:
    """The sections of the config that a round of the game depends on."""
    return rules.GameConfig(
        seed=config.seed,
        game=rules.GameSection(**config.game),
        rules=rules.QuestionRules(**config.rules),
        reward=rules.RewardSection(**config.reward),
        top_k=config.retriever.top_k,
        temperature=config.sampling.temperature,
        verify_temperature=config.sampling.verify_temperature,
        grpo_std=config.learner.grpo_std,
        proposer_baseline=config.learner.proposer_baseline,
    )


def make_sizes(config: ConfigDict, hosts: int) -> Sizes:
    """Section engine for one of the hosts; the config's slots are those of all."""
    return Sizes(**{**config.engine, "slots": config.engine.slots // hosts})


def evaluation_sizes(config: ConfigDict, hosts: int) -> Sizes:
    """make_sizes where only solvers play: slots are no longer than what they fill.

    The policy as a judge takes the length of a slot for that of its prompts.
    """
    sizes = make_sizes(config, hosts)
    if config.eval.judge == "policy":
        return sizes
    solver_tokens = -(-longest_episode(config) // _SLOT_STEP) * _SLOT_STEP
    return dataclasses.replace(sizes, cache_tokens=min(sizes.cache_tokens, solver_tokens))


def make_learner_config(
    config: ConfigDict,
    model_config: decoder.ModelConfig,
    mesh: Any = None,
    platform: str = "cpu",
    gpu: tuple[int, int] | None = None,
) -> LearnerConfig:
    """Section learner, and the keys of others that the update depends on.

    mesh: None for a single device; it may be abstract. platform: of its devices. gpu: compute
    capability of NVIDIA GPUs.
    """
    names = {field.name for field in dataclasses.fields(LearnerConfig)}
    return LearnerConfig(
        model=model_config,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        temperature=config.sampling.temperature,
        response_tokens=config.limits.response_tokens,
        rows_sharding=None if mesh is None else sharding.rows_sharding(mesh),
        attention=attention.select_kernel(config.model.attention, platform, gpu),
        **{name: value for name, value in config.learner.items() if name in names},
    )


def updates(config: ConfigDict) -> dict[str, int]:
    """The updates of a step in order: role, or "both" -> number of optimizer steps."""
    c = config.learner
    steps = {"solver": c.solver_mini_batches, "proposer": c.proposer_mini_batches}
    if config.game.train != "both":
        return {config.game.train: steps[config.game.train]}
    if c.update_order == "combined":
        return {"both": max(steps.values())}
    if c.update_order == "proposer_first":
        return dict(reversed(steps.items()))
    return steps
