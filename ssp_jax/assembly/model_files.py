"""What the files of the model and of its adapter say: shape, tokenizer, digests of weights."""

import dataclasses
import sys
from typing import Any

from ml_collections import ConfigDict

from ssp_jax import stamps
from ssp_jax.assembly.sections import lora_section, make_context, make_lora
from ssp_jax.errors import InputError, printable
from ssp_jax.game import roles
from ssp_jax.model import decoder, hf_adapter, hf_load, sharding
from ssp_jax.model.linear import Lora
from ssp_jax.runtime import processes


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the files of the model and of its adapter say."""

    config: decoder.ModelConfig
    tokenizer: Any
    context: roles.EpisodeContext
    eos: tuple[int, ...]
    weights_digest: str  # of the initial ones
    stamps: dict[str, str]  # digests of the files of weights, by name


def read_model_files(config: ConfigDict, *, evaluating: bool = False) -> ModelInputs:
    """Checks and reads what the files of the model say. Raises InputError."""
    folder = config.model.path
    model_config = read_model(config, evaluating=evaluating)
    tokenizer = hf_load.load_tokenizer(folder)
    context = make_context(config, tokenizer)
    roles.check_context(context)
    if config.mesh.tensor > 0:  # not -1, which takes what is left
        sharding.check_kv_heads(model_config.num_kv_heads, config.mesh.tensor)
    digest, weight_files = _check_weights(config, model_config)
    eos = roles.eos_tokens(tokenizer, hf_load.read_generation_config(folder))
    return ModelInputs(model_config, tokenizer, context, eos, digest, weight_files)


def read_model(config: ConfigDict, *, evaluating: bool = False) -> decoder.ModelConfig:
    """The shape of the model of section model, with its adapter. Raises InputError."""
    base = hf_load.read_config(config.model.path)
    lora = _read_lora(config, base, evaluating) if config.model.adapter else make_lora(config)
    return dataclasses.replace(base, lora=lora)


def _read_lora(config: ConfigDict, base: decoder.ModelConfig, evaluating: bool) -> Lora:
    """What the adapter of model.adapter is; in training section lora must say the same.

    Raises InputError.
    """
    adapter = hf_adapter.read(config.model.adapter, base)
    if evaluating:
        return adapter.lora
    found = dataclasses.asdict(adapter.lora)
    asked = dataclasses.asdict(lora_section(config.lora))
    changes = [
        f"lora.{key} is {asked[key]!r}; expected {found[key]!r}"
        for key in found
        if asked[key] != found[key]
    ]
    if changes:
        raise InputError(
            f"config section lora is not that of model.adapter={config.model.adapter}: "
            f"{', '.join(changes)}"
        )
    if adapter.dropout and processes.is_coordinator():
        print(
            f"ssp_jax: {printable(config.model.adapter)} was trained with lora_dropout "
            f"{adapter.dropout:g}; this run drops nothing",
            file=sys.stderr,
        )
    return adapter.lora


def _check_weights(
    config: ConfigDict, model_config: decoder.ModelConfig
) -> tuple[str, dict[str, str]]:
    """Checks the files of the initial weights; their digest, and one of each file by its name.

    Raises InputError.
    """
    rows = hf_load.check_tensors(config.model.path, model_config.base)
    files = stamps.of_weights(config.model.path)
    facts: tuple[Any, ...] = (rows, sorted(files.values()))
    if config.model.adapter:
        adapter_rows = hf_adapter.check_tensors(config.model.adapter, model_config)
        adapter_files = stamps.of_adapter(config.model.adapter)
        facts += (adapter_rows, sorted(adapter_files.values()))
        files |= adapter_files
    return processes.digest(facts), files
