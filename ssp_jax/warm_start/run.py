"""The warm start: supervised steps of the learner on episodes, stopped by their held-out loss.

A checkpoint, a resumed run and the end are those of self-play (ssp_jax.lifecycle). The episodes of
a step are a function of the seed and the step, so a resumed run is the unbroken one, bit for bit.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ssp_jax import data, stamps
from ssp_jax.assembly import sections
from ssp_jax.assembly.engine import make_engine
from ssp_jax.assembly.model_files import ModelInputs, read_model_files
from ssp_jax.assembly.model_run import ModelRun, Progress, make_model_run
from ssp_jax.config.checks import check_warm_start
from ssp_jax.config.derived import export_kind
from ssp_jax.game.rewards import METRICS
from ssp_jax.game.roles import EpisodeContext
from ssp_jax.learner.update import MEMORY_REMEDY
from ssp_jax.lifecycle import keeping, next_steps
from ssp_jax.model import hf_save, sharding
from ssp_jax.rollout.engine import Engine
from ssp_jax.runtime import device_memory, processes
from ssp_jax.warm_start import lessons, rows
from ssp_jax.warm_start.form import share_in_form
from ssp_jax.warm_start.lessons import Lesson, Lessons
from ssp_jax.workdir import (
    WARM_START_MAY_CHANGE,
    check_unchanged,
    check_workdir,
    keep_compiled,
    keep_config,
    lock_workdir,
    made_workdir,
)

# What the update of a warm start is, whatever section learner says of that of self-play.
SUPERVISED: dict[str, Any] = {
    "supervised": True,
    "aggregation": "token_mean",  # the loss is one of tokens, so that stop_loss means the same
    "temperature": 1.0,
    "kl_coef": 0.0,
    "old_logprobs": "sampler",  # which has not scored them: nothing is computed for them
    "schedule": "constant",
}


@dataclasses.dataclass(frozen=True)
class WarmStartRun(ModelRun):
    """The parts of a warm start."""

    mode: ClassVar[str] = "warm_start"

    lessons: Lessons
    context: EpisodeContext
    engine: Engine  # continues what is held out


def warm_start(config: ConfigDict, workdir: str, file: str) -> None:
    """Runs or resumes a warm start. file: of the config, for the command that comes next.

    Leaves metrics, checkpoints and an export in the workdir.
    """
    started = warm_start_run(config, workdir)
    with started as (run, now), keeping.saved_at_the_end(run, now):
        _warm_up(run, now)
        # A resumed run looks where an unbroken one does, so both end at the same step.
        loss = _look(run, now) if _is_due(run, now) else math.inf
        while now.step < run.steps and loss > config.warm_start.stop_loss:
            processes.run_on_all(run.stop)  # together, or not at all
            _step(run, now, time.monotonic())
            keeping.stop_if_diverged(run, now)
            if run.checkpoints.due(now.step):
                keeping.save(run, now)
            if _is_due(run, now):
                loss = _look(run, now)
        keeping.save(run, now)
        keeping.export(run, now)
        _finish(run, now, loss, file)


@contextlib.contextmanager
def warm_start_run(config: ConfigDict, workdir: str) -> Iterator[tuple[WarmStartRun, Progress]]:
    """The parts of a warm start in its locked workdir, and how far it is."""
    keep_compiled(workdir)
    with made_workdir(workdir), lock_workdir(workdir):
        read = processes.run_on_all(lambda: _read(config, workdir))
        mesh = processes.run_on_all(lambda: sections.make_mesh(config))
        keep_config(workdir, config)
        processes.check_shared(Path(workdir))
        base, now = make_model_run(
            config,
            workdir,
            read.model.config,
            read.stamps,
            mesh,
            config.warm_start.steps,
            learning_rate=config.warm_start.learning_rate,
            **SUPERVISED,
        )
        engine = _make_engine(config, read.model, mesh)
        run = WarmStartRun(
            **vars(base), lessons=read.lessons, context=read.model.context, engine=engine
        )
        facts = {
            "the newest checkpoint": now.step,
            "the episodes to learn from": processes.digest(read.lessons),
        }
        processes.all_gather_objects(lambda: None, facts)
        with run.stop, run.logger, run.checkpoints:
            yield run, now


@dataclasses.dataclass(frozen=True)
class _Read:
    model: ModelInputs
    lessons: Lessons
    stamps: dict[str, str]


def _read(config: ConfigDict, workdir: str) -> _Read:
    """Checks and reads all inputs. Raises InputError."""
    check_warm_start(config)
    check_workdir(workdir, config, WARM_START_MAY_CHANGE)
    if export_kind(config) != "none":
        hf_save.check_place(Path(workdir) / hf_save.FOLDER)
    model = read_model_files(config)
    c = config.warm_start
    files = rows.files(c.episodes)
    found = model.stamps | stamps.of_files(config.model.path, *map(str, files))
    if processes.is_coordinator():
        check_unchanged(workdir, lambda: found, config)
    metric = config.reward.metric if config.reward.metric in METRICS else "em"
    selection = rows.Selection(c.keep, metric)
    loaded = lessons.load(
        files, model.context, selection, config.learner.row_tokens, c.held_out, config.seed
    )
    return _Read(model, loaded, found)


def _make_engine(config: ConfigDict, model: ModelInputs, mesh: jax.sharding.Mesh) -> Engine:
    """The engine of a run, without a search. mesh: of the learner."""
    _, own = sharding.playing_meshes(mesh)
    sizes = sections.make_sizes(config, jax.process_count())
    dtype = jnp.dtype(config.model.dtype)
    return make_engine(
        model.config,
        model.tokenizer,
        model.eos,
        sizes,
        dtype,
        _no_search,
        own,
        attention_key=config.model.attention,
    )


def _no_search(queries: list[str]) -> list[list[data.Document]]:
    """A continuation ends with its first search."""
    return [[] for _ in queries]


def _warm_up(run: WarmStartRun, now: Progress) -> None:
    keeping.say_start(run, now)
    run.logger.say(run.lessons.summary)
    with (
        run.logger.phase("compiling", state=lambda: f"{run.compiles.count} programs"),
        device_memory.must_fit("the update", MEMORY_REMEDY),
    ):
        run.learner.warm_up(now.state)


def _batch(run: WarmStartRun, step: int) -> list[Lesson]:
    """The episodes of a step."""
    training = run.lessons.training
    number = run.config.warm_start.episodes_per_step
    drawn = data.batch_indices(len(training), number, run.config.seed, step)
    return [training[i] for i in drawn]


def _step(run: WarmStartRun, now: Progress, start: float) -> None:
    """One optimizer step, and its line."""
    with run.logger.phase("updating"), processes.watched():
        batch = _batch(run, now.step)
        advantages = np.ones(len(batch), np.float32)
        order = np.random.default_rng(0)  # of the episodes in the step, which are all packed
        now.state, report = run.learner.update(now.state, batch, advantages, order)
    seconds = time.monotonic() - start
    metrics = {f"warm_start/{key}": report[key] for key in ("loss", "entropy", "grad_norm")}
    metrics["update/tokens"] = report["tokens"]
    metrics |= keeping.cost(metrics, seconds) | keeping.about(run)
    now.step += 1
    now.seconds += seconds
    run.logger.step(now.step, metrics, seconds)


def _is_due(run: WarmStartRun, now: Progress) -> bool:
    return now.step % run.config.warm_start.look_every == 0 or now.step == run.steps


def _look(run: WarmStartRun, now: Progress) -> float:
    """The loss of held-out episodes, and how many of their continuations are in form."""
    held_out = run.lessons.held_out
    with run.logger.phase("looking") as phase, processes.watched():

        def progress(done: int, total: int) -> None:
            phase.advance(done, total=total)

        loss = run.learner.surprise(now.state.params, held_out, progress)
    metrics = {"warm_start/held_out_loss": loss}
    shown = f"held-out loss {loss:.3f}"
    if number := min(run.config.warm_start.form_prompts, len(held_out)):
        with run.logger.phase("continuing", number) as phase:
            params = run.weights.to_sampler(now.state.params)
            watched = held_out[:number]
            form = share_in_form(run.engine, run.context, params, watched, run.stop, phase)
            del params  # the update needs its memory
        metrics["warm_start/form"] = form
        shown += f"; {form:.0%} of {number} held-out continuations are in form"
    if run.logger.evaluation(now.step, metrics):
        run.logger.say(shown)
    return loss


def _finish(run: WarmStartRun, now: Progress, loss: float, file: str) -> None:
    """Says why it ended, and the command that comes next."""
    config = run.config
    c = config.warm_start
    why = f"warm_start.steps={c.steps} are done"
    if loss <= c.stop_loss:
        why = f"the held-out loss is at most warm_start.stop_loss={c.stop_loss:g}"
    run.logger.say(f"ended after step {now.step}: {why}")
    if export_kind(config) != "none":
        command = next_steps.to_play(config, run.workdir, file)
        run.logger.say(f"self-play from it: {command}")
