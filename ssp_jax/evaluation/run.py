"""The question sets alone, as a run of its own (main --mode=eval): the initial weights, and those
of the workdir.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax import train
from ssp_jax.assemble import check_same_inputs, make_mesh, read_inputs
from ssp_jax.evaluation import evaluate, paper_table
from ssp_jax.game import judge
from ssp_jax.model import decoder, sharding
from ssp_jax.runtime import device_memory, processes
from ssp_jax.runtime.checkpoint import Checkpoints, Damaged
from ssp_jax.runtime.logger import Logger
from ssp_jax.workdir import keep_config, lock_workdir


def evaluate_workdir(config: ConfigDict, workdir: str) -> None:
    """Plays, judges and scores whatever of it is not in the workdir yet; shows the tables; compares
    before and after.

    The weights of model.path are the ones before. Those of the newest checkpoint, where there is
    one, are the ones after; then eval.before says whether the former are played at all.
    """
    train.keep_compiled(workdir)
    inputs = read_inputs(config, workdir, evaluating=True)
    processes.run_on_all(
        lambda: (
            keep_config(workdir, config, evaluating=True) if processes.is_coordinator() else None
        )
    )
    mesh = make_mesh(config)
    engine = train.make_engine(config, inputs, mesh)

    def initial() -> decoder.Params:
        return train.load_initial(config, inputs.model_config, mesh)

    judges = judge.make_judges(config, engine, inputs.stage, inputs.digests, inputs.server, initial)
    folder = Path(workdir) / "eval"
    folder.mkdir(exist_ok=True)
    processes.check_shared(folder)
    with (
        lock_workdir(str(folder)),
        processes.Stop() as stop,
        Logger(str(folder), 0, tensorboard=False, mute=not processes.is_coordinator()) as logger,
        Checkpoints(workdir, every=0, keep=0, read_only=True) as checkpoints,
    ):
        setting = train.make_setting(config, Path(workdir), inputs, engine, judges, logger, stop)
        newest = next(reversed(checkpoints.steps()), None)
        check_same_inputs(inputs, {"the newest checkpoint": newest})
        asked: dict[int, tuple[str, Callable[[], Any]]] = {}
        if config.eval.before or not newest:
            asked[0] = f"initial weights of {config.model.path}", initial
        if newest:
            restore = _restorer(config, workdir, inputs.model_config, mesh, checkpoints, newest)
            asked[newest] = f"checkpoint of step {newest} in {workdir}", restore
        logger.say(
            f"evaluating {' and '.join(name for name, _ in asked.values())}; jax {jax.__version__}"
        )
        try:
            results = [
                evaluate.evaluate(setting, step, name, functools.partial(_warmed, setting, load))
                for step, (name, load) in asked.items()
            ]
        except processes.Terminated:
            logger.say(
                f"{stop.cause}: all that has ended is on disk; the same command goes on from there"
            )
            sys.exit(stop.code)
        for result in results:
            evaluate.show(logger, result)
        if len(results) == 2:
            before, after = results
            evaluate.compare(
                logger, setting.folder, before, after, paper_table.table_1(config.model.path)
            )


def _warmed(setting: evaluate.EvalContext, load: Callable[[], decoder.Params]) -> decoder.Params:
    """The weights, once all programs are compiled: that takes long, and is not play."""
    with device_memory.must_fit("the model", "more devices for mesh.tensor or a smaller model"):
        params = load()
    with setting.logger.phase("compiling"):
        processes.run_on_all(lambda: setting.engine.warm_up(params, setting.key, setting.stop))
    return params


def _restorer(
    config: ConfigDict,
    workdir: str,
    model_config: decoder.ModelConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    step: int,
) -> Callable[[], decoder.Params]:
    """Gives the sampler's copy of a checkpoint's weights; the optimizer's state stays on disk."""
    dtype = jnp.dtype(config.model.dtype)

    def restore() -> decoder.Params:
        abstract = decoder.abstract_params(model_config)
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place),
            abstract,
            sharding.param_shardings(abstract, mesh),
        )
        try:
            params = checkpoints.restore_params(step, like)
        except Damaged as error:
            raise processes.CollectiveInputError(
                f"checkpoint {step} in {workdir} is damaged ({error}); without that folder the same command evaluates "
                "the step before"
            ) from None
        return train.sampler_copy(config, model_config, mesh)(params)

    return restore
