"""The question sets alone, as a run of its own (main --mode=eval).

Played are the initial weights and those of the workdir's newest checkpoint.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ssp_jax.assembly import sections
from ssp_jax.assembly.engine import run_engine
from ssp_jax.assembly.evaluation import make_eval_context
from ssp_jax.assembly.inputs import Inputs, check_same_inputs, read_inputs
from ssp_jax.assembly.judges import make_judges
from ssp_jax.assembly.weights import initial_name, make_weights, restore_trained
from ssp_jax.evaluation import evaluate, paper_table
from ssp_jax.evaluation.evaluate import EvalContext
from ssp_jax.lifecycle import next_steps
from ssp_jax.model.decoder import Params
from ssp_jax.model.weights import Weights
from ssp_jax.runtime import checkpoint, device_memory, processes
from ssp_jax.runtime.checkpoint import Checkpoints, Damaged
from ssp_jax.runtime.logger import Logger
from ssp_jax.workdir import (
    changes_of,
    keep_compiled,
    keep_config,
    lock_workdir,
    made_workdir,
    trained_with,
)

LoadParams = Callable[[], Params]  # gives the sampler's copy of weights


def evaluate_workdir(config: ConfigDict, workdir: str) -> None:
    """Plays, judges and scores what is not in the workdir yet; shows and compares the tables.

    The weights of model.path are the ones before. Those of the newest checkpoint, where there is
    one, are the ones after; then eval.before says whether the former are played at all.
    """
    with _evaluation_run(config, workdir) as (context, weights):
        names = " and ".join(name for name, _ in weights.values())
        context.logger.say(
            f"evaluating {names}; jax {jax.__version__}; attention of decoding: "
            f"{context.engine.attend_by}"
        )
        results = []
        for step, (name, load) in weights.items():
            params = functools.partial(_warmed, context, load)
            results.append(evaluate.evaluate(context, step, name, params))
        for result in results:
            evaluate.show(context.logger, result)
        if len(results) == 2:
            figures = paper_table.table_1(config.model.path)
            before, after = results
            evaluate.compare(context.logger, context.folder, before, after, figures)
        logger = context.logger
        processes.run_on_coordinator(lambda: next_steps.write_report(Path(workdir), logger))


@contextlib.contextmanager
def _evaluation_run(
    config: ConfigDict, workdir: str
) -> Iterator[tuple[EvalContext, dict[int, tuple[str, LoadParams]]]]:
    """The context of the evaluations, and by step the weights to evaluate, with their names.

    A signal ends it between decode chunks.
    """
    keep_compiled(workdir)
    with made_workdir(workdir):
        inputs = read_inputs(config, workdir, evaluating=True)
        keep_config(workdir, config, evaluating=True)
    mesh = sections.make_mesh(config)
    engine = run_engine(config, inputs, mesh, sections.evaluation_sizes)
    weights = make_weights(config, inputs.model.config, mesh)
    initial = weights.initial_for_sampler
    episodes = inputs.model.context
    judges = make_judges(config, engine, episodes, inputs.digests, inputs.judges, initial)
    folder = Path(workdir) / "eval"
    folder.mkdir(exist_ok=True)
    processes.check_shared(folder)
    with (
        lock_workdir(str(folder)),
        processes.Stop() as stop,
        Logger(str(folder), 0, tensorboard=False, mute=not processes.is_coordinator()) as logger,
        Checkpoints(workdir, every=0, keep=0, read_only=True) as checkpoints,
    ):
        training = processes.all_gather_objects(lambda: _training(workdir))[0]
        context = make_eval_context(
            config, Path(workdir), inputs, engine, judges, logger, stop, training
        )
        newest = next(reversed(checkpoints.steps()), None)
        check_same_inputs(inputs, {"the newest checkpoint": newest})
        to_evaluate: dict[int, tuple[str, LoadParams]] = {}
        if config.eval.before or not newest:
            to_evaluate[0] = initial_name(config), initial
        if newest:
            restore = _restorer(workdir, inputs, weights, mesh, checkpoints, newest)
            to_evaluate[newest] = f"checkpoint of step {newest} in {workdir}", restore
        try:
            yield context, to_evaluate
        except processes.Terminated:
            logger.say(
                f"{stop.cause}: all that has ended is on disk; the same command goes on from there"
            )
            sys.exit(stop.code)


def _training(workdir: str) -> str:
    """What the weights of the newest checkpoint depend on, as the coordinator sees it."""
    newest = checkpoint.newest_game(workdir) if processes.is_coordinator() else None
    if newest is None:
        return ""
    step, game = newest
    return trained_with(game["config"], changes_of(game), step)


def _warmed(context: EvalContext, load: LoadParams) -> Params:
    """The weights, once all programs are compiled: that takes long, and is not play."""
    with device_memory.must_fit("the model", "more devices for mesh.tensor or a smaller model"):
        params = load()
    with context.logger.phase("compiling"):
        processes.run_on_all(lambda: context.engine.warm_up(params, context.key, context.stop))
    return params


def _restorer(
    workdir: str,
    inputs: Inputs,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    step: int,
) -> LoadParams:
    """Gives the sampler's copy of a checkpoint's weights."""

    def restore() -> Params:
        try:
            params = restore_trained(checkpoints, step, inputs.model.config, mesh, weights.dtype)
        except Damaged as error:
            raise processes.CollectiveInputError(
                f"checkpoint {step} in {workdir} is damaged ({error}); without that folder the "
                "same command evaluates the step before"
            ) from None
        return weights.to_sampler(params)

    return restore
