"""Which checkpoints a run keeps."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ssp_jax.assembly.model_run import ModelRun, Progress
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.evaluation.best import best_step
from ssp_jax.game.rounds import ReplayState
from ssp_jax.lifecycle import keeping
from ssp_jax.runtime.checkpoint import Checkpoints, finished_steps
from ssp_jax.runtime.logger import CompileCounter
from ssp_jax.runtime.processes import Stop
from tests.conftest import ROOT

SCORES = {2: 30.0, 4: 50.0, 6: 40.0, 8: 20.0}  # percent right, by step


def run_of(workdir: Path, resumed: int, *overrides: str) -> ModelRun:
    """A run without a model, in its workdir."""
    keys = [f"--config.{override}" for override in overrides]
    config = parse_command_line([f"--config={ROOT}/configs/tiny.py", *keys]).config
    nothing: Any = None
    return ModelRun(
        config=config,
        workdir=workdir,
        model_config=nothing,
        stamps={},
        mesh=nothing,
        key=jax.random.key(0),
        attention="xla",
        weights=nothing,
        learner=nothing,
        checkpoints=Checkpoints(str(workdir), config.checkpoint.every, config.checkpoint.keep),
        compiles=CompileCounter(),
        stop=Stop(),
        steps=9,
        resumed=resumed,
    )


def go_on(run: ModelRun, last: int) -> None:
    """Steps in which nothing is played: saved where they are due, and scored."""
    state: Any = {"x": jnp.zeros(3)}
    now = Progress(run.resumed, state, ReplayState(), 0.0, {})
    with run.logger, run.checkpoints:
        keeping.keep_best(run, now)
        for step in range(run.resumed + 1, last + 1):
            now.step = step
            if run.checkpoints.due(step):
                keeping.save(run, now)
            if step in SCORES:
                run.logger.evaluation(step, {"eval/one_hop/right": SCORES[step]})
                keeping.keep_best(run, now)


@pytest.mark.parametrize(("name", "kept"), [("one_hop", [4, 9]), ("average", [4, 9]), ("", [9])])
def test_the_best_step_is_kept_beside_the_newest_also_where_no_save_was_due(
    tmp_path: Path, name: str, kept: list[int]
) -> None:
    overrides = ("checkpoint.every=3", "checkpoint.keep=1", f"checkpoint.keep_best={name}")
    go_on(run_of(tmp_path, 0, *overrides), 6)
    assert finished_steps(tmp_path) == ([4, 6] if name else [6])
    # As another process goes on.
    go_on(run_of(tmp_path, 6, *overrides), 9)
    assert finished_steps(tmp_path) == kept
    if name:
        assert best_step(tmp_path, name, kept) == 4
