"""Keys that change in the middle of a run: what of them is kept, and what depends on them."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import default
from ssp_jax.errors import InputError
from ssp_jax.runtime.checkpoint import Checkpoints
from ssp_jax.workdir import (
    Change,
    as_read,
    changes_of,
    changes_since,
    check_unchanged,
    check_workdir,
    keep_config,
    trained_with,
)

RATE = "learner.learning_rate"


def config_of(**changes: object) -> ConfigDict:
    config = default.get_config()
    values = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(values)
    return config


def saved(config: ConfigDict, *changes: Change) -> dict[str, object]:
    """`game` of a checkpoint, as far as this counts."""
    return {"config": as_read(config), "changes": [change.to_json() for change in changes]}


def test_a_run_that_goes_on_knows_what_has_changed_since_its_checkpoint() -> None:
    earlier = Change(10, RATE, 1e-6, 2e-6)
    game = saved(config_of(learner__learning_rate=2e-6), earlier)
    assert changes_of(game) == [earlier]
    assert changes_since(game, 30, config_of(learner__learning_rate=2e-6)) == []
    halved = config_of(learner__learning_rate=1e-6, steps=300)
    assert changes_since(game, 30, halved) == [
        Change(30, RATE, 2e-6, 1e-6),
        Change(30, "steps", 200, 300),
    ]
    assert str(Change(30, RATE, 2e-6, 1e-6)) == f"from step 31 on {RATE} is 1e-06 and was 2e-06"


def test_what_is_computed_twice_may_change_where_a_run_goes_on_or_is_evaluated(
    tmp_path: Path,
) -> None:
    keep_config(str(tmp_path), config_of(model__remat="full"))
    with Checkpoints(str(tmp_path), every=1, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, saved(config_of(model__remat="full")))
    for evaluating in (False, True):
        check_workdir(str(tmp_path), config_of(model__remat="dots"), evaluating=evaluating)
        with pytest.raises(InputError, match='model.dtype was "bfloat16" and is "float32"'):
            other = config_of(model__dtype="float32")
            check_workdir(str(tmp_path), other, evaluating=evaluating)


def test_weights_depend_on_the_keys_of_their_steps_alone() -> None:
    """So an evaluation of a step stays that of its weights, whatever changes after it."""

    def training(step: int, changes: list[Change], **values: object) -> str:
        return trained_with(as_read(config_of(**values)), changes, step)

    first = training(30, [])
    changed = [Change(30, RATE, 1e-6, 5e-6)]
    assert training(30, changed, learner__learning_rate=5e-6) == first
    assert training(31, changed, learner__learning_rate=5e-6) != first
    assert training(31, []) == first
    assert training(31, [], learner__learning_rate=5e-6) != first
    # There and back is not the run that stayed.
    back = [*changed, Change(35, RATE, 5e-6, 1e-6)]
    assert training(36, back) not in (first, training(36, changed, learner__learning_rate=5e-6))
    assert training(35, back) == training(35, changed, learner__learning_rate=5e-6)


def test_the_file_of_a_metric_must_be_the_same_unless_the_run_takes_another_one(
    tmp_path: Path,
) -> None:
    own = config_of(reward__metric="own.py:f")
    game = {**saved(own), "stamps": {"own.py": "1", "answers.txt": "2"}}
    with Checkpoints(str(tmp_path), every=1, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, game)

    def check(config: ConfigDict, **stamps: str) -> None:
        now = {"answers.txt": "2"} | {f"{name}.py": digest for name, digest in stamps.items()}
        check_unchanged(str(tmp_path), lambda: now, config)

    check(own, own="1")
    with pytest.raises(InputError, match="own.py has changed since step 1"):
        check(own, own="3")
    check(config_of(reward__metric="em"))
    check(config_of(reward__metric="other.py:f"), other="4")
    with pytest.raises(InputError, match="more.py is new"):
        check(config_of(reward__metric="em"), more="5")


def test_weights_do_not_depend_on_how_a_run_is_watched() -> None:
    watched = [Change(10, "steps", 200, 300), Change(10, "eval.every", 0, 5)]
    values = as_read(config_of(steps=300, eval__every=5))
    assert trained_with(values, watched, 20) == trained_with(as_read(config_of()), [], 20)
