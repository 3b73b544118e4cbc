"""Writing what a run has trained: a Hugging Face folder, or an adapter as PEFT's."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax import stamps
from ssp_jax.assembly.model_files import read_model
from ssp_jax.assembly.weights import make_weights, restore_trained
from ssp_jax.config.derived import export_kind
from ssp_jax.errors import InputError, masked
from ssp_jax.evaluation.best import best_step
from ssp_jax.evaluation.scores import AVERAGE
from ssp_jax.export import card, form
from ssp_jax.model import decoder, hf_load, hf_save, sharding
from ssp_jax.model.decoder import ModelConfig, Params
from ssp_jax.runtime import checkpoint
from ssp_jax.runtime.checkpoint import Checkpoints, Damaged
from ssp_jax.workdir import check_same_files, config_of

GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(
    config: ConfigDict,
    workdir: Path,
    step: int,
    model: ModelConfig,
    trained: Params,
    frozen: Callable[[], Params],
    folder: Path,
    kind: str,
    mode: str,
) -> None:
    """Writes the weights after a step of a run, and what is to be known of them.

    trained, frozen: laid out as the learner has them; frozen is called where they are written too.
    kind: model or adapter. mode: of the run, for the card. Several processes call this together.
    Raises InputError.
    """

    def texts() -> dict[str, str]:
        found = {
            card.FILE: card.text(config, workdir, step, kind, mode),
            form.FILE: form.text(config, step),
        }
        if kind == "model":
            found[GENERATION_CONFIG] = _generation_config(config)
        return found

    base = config.model.path
    if kind == "adapter":
        hf_save.save_adapter(trained, model, folder, masked(base), texts)
    else:
        params = decoder.join(frozen(), trained)
        hf_save.save(params, model, folder, base, texts=texts)


def _generation_config(config: ConfigDict) -> str:
    """Token ids as the base has them, and sampling as in the run's evaluations.

    The base's own sampling, such as a repetition penalty, is not that of the training.
    """
    base = hf_load.read_generation_config(config.model.path)
    values = {name: base[name] for name in _TOKEN_IDS if name in base}
    c = config.sampling
    if c.eval_temperature:
        sampling = {"temperature": c.eval_temperature, "top_k": c.top_k, "top_p": c.top_p}
        values |= {"do_sample": True, **sampling}
    else:
        values["do_sample"] = False
    return json.dumps(values, indent=2) + "\n"


def write_checkpoint(
    workdir: str, step: int | None, folder: str, kind: str, *, best: bool = False
) -> tuple[Path, int, str]:
    """Writes the weights of a checkpoint; returns the folder, the step and the kind.

    step: None for the newest, or with `best` that of the highest score. folder: "" for one in the
    workdir. kind: "" for that of the run's config. Raises InputError.
    """
    config = config_of(workdir)
    step = _checked_step(workdir, _best(config, workdir) if best else step)
    model = read_model(config)
    kind = _checked_kind(config, workdir, kind)
    out = Path(folder or Path(workdir) / f"{hf_save.FOLDER}_step_{step}")
    hf_save.check_place(out)
    game = _game(workdir, step)
    _check_base(config, game, f"step {step} of {workdir}")

    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    weights = make_weights(config, model, mesh)
    with Checkpoints(workdir, every=0, keep=0, read_only=True) as checkpoints:
        try:
            trained = restore_trained(checkpoints, step, model, mesh, jnp.float32)
        except Damaged as error:
            raise InputError(f"checkpoint {step} in {workdir} is damaged ({error})") from None
    mode = game.get("mode", "train")  # earlier versions had no other
    write(config, Path(workdir), step, model, trained, weights.frozen, out, kind, mode)
    return out, step, kind


def _checked_step(workdir: str, step: int | None) -> int:
    steps = checkpoint.finished_steps(workdir)
    if not steps:
        raise InputError(f"{workdir}: expected a run with a checkpoint, found none")
    if step is not None and step not in steps:
        kept = ", ".join(map(str, steps))
        raise InputError(f"--step={step}: there is no such checkpoint in {workdir}; it has {kept}")
    return steps[-1] if step is None else step


def _best(config: ConfigDict, workdir: str) -> int:
    name = config.checkpoint.keep_best or AVERAGE
    step = best_step(workdir, name, checkpoint.finished_steps(workdir))
    if step is None:
        raise InputError(
            f"--best: no checkpoint in {workdir} was evaluated; eval.every evaluates, and "
            "checkpoint.keep_best keeps the best one"
        )
    return step


def _checked_kind(config: ConfigDict, workdir: str, kind: str) -> str:
    """What to write: `kind`, or where it is "" what the run writes at its end."""
    of_run = export_kind(config)
    if of_run == "none":
        of_run = "adapter" if config.lora.rank else "model"
    if kind == "adapter" and not config.lora.rank:
        raise InputError(f"--kind=adapter: the run in {workdir} has no adapter; expected model")
    return kind or of_run


def _game(workdir: str, step: int) -> dict[str, Any]:
    """What a checkpoint has beside arrays. Raises InputError."""
    try:
        return checkpoint.read_game(workdir, step)
    except Damaged as error:
        raise InputError(f"checkpoint {step} in {workdir} is damaged ({error})") from None


def _check_base(config: ConfigDict, game: Mapping[str, Any], since: str) -> None:
    """Raises InputError where the base is not the one that the run began with.

    since: where the game of the checkpoint is from, in words.
    """
    before = game["stamps"]
    now = stamps.of_weights(config.model.path)
    check_same_files({name: before.get(name, "") for name in now}, now, since)
