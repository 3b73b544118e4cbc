"""What the evaluations of a run share, and what their episodes depend on."""

from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ssp_jax.assembly.inputs import Inputs
from ssp_jax.evaluation import conditions
from ssp_jax.evaluation.evaluate import EvalContext
from ssp_jax.game import judge
from ssp_jax.rollout.engine import Engine
from ssp_jax.runtime import processes
from ssp_jax.runtime.logger import Logger


def evaluation_inputs(config: ConfigDict, inputs: Inputs) -> dict[str, str]:
    """Digests of the inputs and config keys that an evaluation's episodes depend on."""
    sampling = config.sampling
    settings = {
        "limits": config.limits.to_dict(),
        "retriever.top_k": config.retriever.top_k,
        "model.dtype": config.model.dtype,
        "sampling": (sampling.eval_temperature, sampling.top_k, sampling.top_p),
        "seed": config.seed,
    }
    # An episode's line has its question itself.
    without = ("data.answers", "data.eval_sets")
    digests = {name: digest for name, digest in inputs.digests.items() if name not in without}
    return digests | {"the settings": processes.digest(settings)}


def make_eval_context(
    config: ConfigDict,
    workdir: Path,
    inputs: Inputs,
    engine: Engine,
    judges: Callable[[str], judge.Judge | None],
    logger: Logger,
    stop: Callable[[], None],
    training: str,
) -> EvalContext:
    """What the evaluations of a run share.

    stop: called often; may raise. training: of workdir.trained_with.
    """
    metric = config.eval.judge
    retriever = inputs.retriever
    template = inputs.model.tokenizer.chat_template
    return EvalContext(
        folder=workdir / "eval",
        inputs=evaluation_inputs(config, inputs),
        training=training,
        conditions=conditions.of(config, len(retriever), retriever.source, template),
        sets=inputs.eval_sets,
        retriever=retriever,
        engine=engine,
        episodes=inputs.model.context,
        key=jax.random.key(config.seed),
        temperature=config.sampling.eval_temperature,
        metric=metric,
        judge=judges(metric),
        logger=logger,
        stop=stop,
    )
