"""The parts of every run that trains a model, and how far its checkpoints are."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from ssp_jax import trackers
from ssp_jax.assembly.sections import make_learner_config
from ssp_jax.assembly.weights import make_weights
from ssp_jax.config.command_line import Origin
from ssp_jax.game.rounds import ReplayState
from ssp_jax.learner.batches import Batch
from ssp_jax.learner.state import LearnerConfig, TrainState, init_state
from ssp_jax.learner.update import MEMORY_REMEDY, Learner, check_attention
from ssp_jax.model import attention, decoder, sharding
from ssp_jax.model.weights import Weights
from ssp_jax.runtime import device_memory, processes
from ssp_jax.runtime.checkpoint import Checkpoints, Damaged, Restored
from ssp_jax.runtime.logger import CompileCounter, Logger
from ssp_jax.workdir import Change, changes_of, changes_since


@dataclasses.dataclass(frozen=True)
class ModelRun:
    """The parts of every run that trains. What changes from step to step is in Progress."""

    mode: ClassVar[str] = "train"  # of command_line.MODES

    config: ConfigDict
    workdir: Path
    model_config: decoder.ModelConfig
    stamps: dict[str, str]  # digests of the files that training depends on
    mesh: jax.sharding.Mesh
    key: jax.Array  # of random numbers
    attention: str  # of the update, in the words of attention.select_kernel
    weights: Weights
    learner: Learner
    checkpoints: Checkpoints
    compiles: CompileCounter
    stop: processes.Stop
    steps: int  # of the whole run
    resumed: int  # the step that it goes on from

    @functools.cached_property
    def logger(self) -> Logger:
        """Made when it is first asked for: a run that is refused before leaves no file of steps."""
        mute = not processes.is_coordinator()
        opened = processes.run_on_all(
            lambda: [] if mute else trackers.open_trackers(self.config, self.workdir)
        )
        return Logger(
            str(self.workdir),
            self.steps,
            self.config.log.tensorboard,
            self.resumed,
            mute=mute,
            trackers=opened,
        )


@dataclasses.dataclass
class Progress:
    """What a run has after its newest finished step: what a checkpoint holds."""

    step: int
    state: TrainState
    replay: ReplayState
    seconds: float  # that all steps took
    damaged: dict[int, str]  # step -> reason, of checkpoints that were set aside at the start
    changes: list[Change] = dataclasses.field(default_factory=list)  # of keys, since its start
    origin: str = ""  # WORKDIR@STEP of the run that it was forked from
    is_forked: bool = False  # just now: none of this is saved in its own workdir yet


def make_model_run(
    config: ConfigDict,
    workdir: str,
    model: decoder.ModelConfig,
    stamps: dict[str, str],
    mesh: jax.sharding.Mesh,
    steps: int,
    origin: Origin | None = None,
    **learner_keys: Any,
) -> tuple[ModelRun, Progress]:
    """The parts of a run in its locked workdir, and how far it is.

    steps: of the whole run. origin: where it starts, if it has no checkpoint of its own.
    learner_keys: fields of LearnerConfig that are not the config's.
    """
    compiles = CompileCounter()
    c = config.checkpoint
    checkpoints = Checkpoints(workdir, c.every, c.keep, minutes=c.minutes)

    device = mesh.devices.flat[0]
    gpu = attention.capability(device)
    learner_config = make_learner_config(config, model, mesh, device.platform, gpu)
    learner_config = dataclasses.replace(learner_config, **learner_keys)
    processes.run_on_all(lambda: check_attention(learner_config))
    with device_memory.must_fit("the train state", MEMORY_REMEDY):
        weights = make_weights(config, model, mesh)
        weights.frozen()  # read here, where a model that does not fit gets a sentence
        learner, state = _make_learner(learner_config, weights, mesh)
        progress = _restore(checkpoints, state, config, origin)
        del state  # another one where a checkpoint was found

    run = ModelRun(
        config=config,
        workdir=Path(workdir),
        model_config=model,
        stamps=stamps,
        mesh=mesh,
        key=jax.random.key(config.seed),
        attention=learner_config.attention,
        weights=weights,
        learner=learner,
        checkpoints=checkpoints,
        compiles=compiles,
        stop=processes.Stop(),
        steps=steps,
        resumed=progress.step,
    )
    return run, progress


def _make_learner(
    c: LearnerConfig, weights: Weights, mesh: jax.sharding.Mesh
) -> tuple[Learner, TrainState]:
    """The learner, and its state before the first step."""
    initial = weights.initial()
    shardings = jax.tree.map(lambda x: x.sharding, initial)
    cast = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(c.dtype), p), out_shardings=shardings)
    reference = cast(initial) if c.kl_coef else None
    state = init_state(c, initial)
    rows = sharding.rows_sharding(mesh)

    def put(batch: Batch) -> Batch:
        return sharding.put_rows(batch, rows)

    return Learner(c, state, reference, put, weights.frozen), state


def _restore(
    checkpoints: Checkpoints, state: TrainState, config: ConfigDict, origin: Origin | None
) -> Progress:
    """How far the newest checkpoint is, or else the origin; `state` at step 0 without either."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    forked_from = ""
    restored = checkpoints.restore_newest(like)
    if restored is None and origin is not None:
        restored = _restore_origin(origin, like)
        forked_from = f"{origin.workdir}@{restored.step}"
    if restored is None:
        return Progress(0, state, ReplayState(), 0.0, {})
    game = restored.game
    return Progress(
        step=restored.step,
        state=restored.state,
        replay=ReplayState.from_json(game["memory"]),
        seconds=game["seconds"],
        damaged=restored.damaged,
        changes=[*changes_of(game), *changes_since(game, restored.step, config)],
        origin=forked_from or game.get("origin", ""),  # earlier versions kept none
        is_forked=bool(forked_from),
    )


def _restore_origin(origin: Origin, like: TrainState) -> Restored:
    """The checkpoint of another run. Raises CollectiveInputError where it cannot be read."""
    with Checkpoints(origin.workdir, every=0, keep=0, read_only=True) as checkpoints:
        step = checkpoints.steps()[-1] if origin.step is None else origin.step
        try:
            state, game = checkpoints.restore(step, like)
        except Damaged as error:
            raise processes.CollectiveInputError(
                f"--from={origin}: checkpoint {step} cannot be read ({error})"
            ) from None
    return Restored(step, state, game, {})
