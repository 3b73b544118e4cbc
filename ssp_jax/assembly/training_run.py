"""The parts of a run of self-play."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ssp_jax import data, trackers
from ssp_jax.assembly.engine import run_engine
from ssp_jax.assembly.inputs import Inputs, check_same_inputs, read_inputs
from ssp_jax.assembly.judges import make_judges
from ssp_jax.assembly.model_run import ModelRun, Progress, make_model_run
from ssp_jax.assembly.sections import make_game_config, make_mesh
from ssp_jax.config.command_line import Origin
from ssp_jax.data import Task
from ssp_jax.game import judge
from ssp_jax.game.selfplay import SelfPlay
from ssp_jax.learner.update import MEMORY_REMEDY
from ssp_jax.model.decoder import Params
from ssp_jax.rollout.engine import Engine
from ssp_jax.runtime import device_memory, processes
from ssp_jax.workdir import copy_metrics, keep_compiled, keep_config, lock_workdir, made_workdir


@dataclasses.dataclass(frozen=True)
class TrainingRun(ModelRun):
    """The parts of a run of self-play."""

    inputs: Inputs
    engine: Engine
    game: SelfPlay
    judges: Callable[[str], judge.Judge | None]  # by metric
    initial: Callable[[], Params]  # gives the sampler's copy of the initial weights

    def tasks(self, step: int) -> list[Task]:
        """The given answers of a step."""
        tasks = self.inputs.tasks
        number = self.config.game.answers_per_step
        rows = data.batch_indices(len(tasks), number, self.config.seed, step)
        return [tasks[row] for row in rows]


@contextlib.contextmanager
def training_run(
    config: ConfigDict, workdir: str, origin: Origin | None = None
) -> Iterator[tuple[TrainingRun, Progress]]:
    """The parts of a run in its locked workdir, and how far it is; all is closed at the end.

    origin: where it starts, if it has no checkpoint of its own. In the context a signal only sets
    run.stop, so that what is being saved gets onto the disk.
    """
    keep_compiled(workdir)
    processes.run_on_all(
        lambda: trackers.check_installed(config) if processes.is_coordinator() else None
    )
    with made_workdir(workdir), lock_workdir(workdir):
        inputs = read_inputs(config, workdir, origin)
        mesh = make_mesh(config)
        # After the inputs: a mistyped path must not become the workdir's config.
        keep_config(workdir, config)
        processes.check_shared(Path(workdir))
        run, progress = _make_run(config, workdir, inputs, mesh, origin)
        if progress.is_forked and origin:
            copy_metrics(origin.workdir, workdir)
        facts = {
            "the newest checkpoint": progress.step,
            "the memory": processes.digest(progress.replay),
        }
        check_same_inputs(inputs, facts)
        with run.stop, run.logger, run.checkpoints:
            yield run, progress


def _make_run(
    config: ConfigDict,
    workdir: str,
    inputs: Inputs,
    mesh: jax.sharding.Mesh,
    origin: Origin | None,
) -> tuple[TrainingRun, Progress]:
    model = inputs.model.config
    context = inputs.model.context
    base, progress = make_model_run(
        config, workdir, model, inputs.stamps, mesh, config.steps, origin
    )
    # While it judges what is trained, the initial model is in memory beside the player, and the
    # slots leave it room. With LoRA both have one base, which must be free to move.
    judges_always = config.reward.metric == "policy" and model.lora is None
    with device_memory.must_fit("the train state", MEMORY_REMEDY):
        judging = base.weights.initial_for_sampler() if judges_always else None

    def initial() -> Params:
        return judging or base.weights.initial_for_sampler()

    engine = run_engine(config, inputs, mesh)
    judges = make_judges(config, engine, context, inputs.digests, inputs.judges, initial)
    reward_judge = judges(config.reward.metric)
    game = SelfPlay(make_game_config(config), context, engine, inputs.retriever, reward_judge)
    run = TrainingRun(
        **vars(base), inputs=inputs, engine=engine, game=game, judges=judges, initial=initial
    )
    return run, progress
