"""The engine that plays, on the devices of one process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax.assembly.inputs import Inputs
from ssp_jax.assembly.sections import make_sizes
from ssp_jax.game import roles
from ssp_jax.model import attention, decoder, sharding
from ssp_jax.rollout.engine import Engine, SearchFn, Sizes
from ssp_jax.rollout.sampling import ALL_TOKENS, Truncation
from ssp_jax.runtime import device_memory, processes


def make_engine(
    config: decoder.ModelConfig,
    tokenizer: Any,
    eos: tuple[int, ...],
    sizes: Sizes,
    dtype: Any,
    search: SearchFn,
    mesh: jax.sharding.Mesh,
    truncation: Truncation = ALL_TOKENS,
    search_bytes: int = 0,
    attention_key: str = "xla",
) -> Engine:
    """The engine that plays all roles, on the devices of `mesh`.

    search_bytes: of a device, that a search takes while the engine plays. attention_key: of config
    key model.attention. Raises InputError for a kernel that the devices lack, or that is wrong.
    """
    automata = roles.role_automata(tokenizer, config.vocab_size)
    shardings = functools.partial(sharding.state_shardings, mesh=mesh)

    def free_bytes() -> int | None:
        free = device_memory.free_bytes()
        return None if free is None else free - search_bytes

    device = mesh.devices.flat[0]
    chosen = attention.select_kernel(attention_key, device.platform, attention.capability(device))
    engine = Engine(
        config, sizes, automata, eos, dtype, search, shardings, truncation, free_bytes, chosen
    )
    processes.run_on_all(lambda: engine.check_attention(mesh.shape["tensor"]))
    return engine


def run_engine(
    config: ConfigDict,
    inputs: Inputs,
    mesh: jax.sharding.Mesh,
    sizes_of: Callable[[ConfigDict, int], Sizes] = make_sizes,
) -> Engine:
    """The engine of a run. mesh: of the learner; each process plays on its own part of it."""
    _, own = sharding.playing_meshes(mesh)
    model = inputs.model
    return make_engine(
        model.config,
        model.tokenizer,
        model.eos,
        sizes_of(config, jax.process_count()),
        jnp.dtype(config.model.dtype),
        functools.partial(inputs.retriever.search, top_k=config.retriever.top_k),
        own,
        Truncation(config.sampling.top_k, config.sampling.top_p),
        inputs.retriever.program_bytes,
        config.model.attention,
    )
