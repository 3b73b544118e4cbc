import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import files_of_at_most
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import default
from ssp_jax.checkpoint import Checkpoints, check_workdir, held, keep_config
from ssp_jax.errors import InputError

GAME = {"position": 7, "pool": [{"question": "Où est São Paulo?", "answers": ["Brazil"], "uid": None}], "rate": 0.1}


def train_state(seed: int) -> dict[str, Any]:
    """Leaves of each dtype that a train state has, two of them sharded over a 4 x 2 mesh."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    kernel_key, moment_key = jax.random.split(jax.random.key(seed))
    return {
        "params": {"kernel": jax.device_put(jax.random.normal(kernel_key, (8, 6)), _on(mesh, "fsdp", "tensor"))},
        "adam": [jax.device_put(jax.random.normal(moment_key, (16, 3), jnp.bfloat16), _on(mesh, ("fsdp", "tensor")))],
        "step": jax.device_put(jnp.int32(seed), _on(mesh)),
    }


def _on(mesh: jax.sharding.Mesh, *axes: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_bitwise(one: Any, other: Any) -> None:
    def same(a: jax.Array, b: jax.Array) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    assert jax.tree.all(jax.tree.map(same, one, other))  # raises where the structures differ


def test_restores_bitwise_on_the_same_shardings(tmp_path: Path) -> None:
    state = train_state(3)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, GAME)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, game = checkpoints.restore(3, abstract(state))
    assert_bitwise(restored, state)
    assert game == GAME
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_restores_bitwise_on_other_shardings(tmp_path: Path) -> None:
    state = train_state(3)
    mesh = jax.make_mesh((2, 3), ("fsdp", "tensor"), devices=jax.devices()[:6])
    moved = {
        "params": {"kernel": _on(mesh, "fsdp", "tensor")},
        "adam": [_on(mesh, None, "tensor")],
        "step": _on(mesh),
    }
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, moved)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        checkpoints.save(1, state, GAME)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, wanted)
    assert_bitwise(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == moved


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    update = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    state = {"weight": jnp.arange(2**21, dtype=jnp.float32)}
    expected = np.arange(2**21, dtype=np.float32)
    with Checkpoints(str(tmp_path), every=1, keep=1) as checkpoints:
        checkpoints.save(1, state, GAME)
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract(state))
    np.testing.assert_array_equal(restored["weight"], expected)


def test_keeps_the_newest_and_never_writes_a_step_twice(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path), every=2, keep=2) as checkpoints:
        assert [step for step in range(1, 7) if checkpoints.due(step)] == [2, 4, 6]
        for step in (2, 4, 5, 5):  # 5 is not due, and comes again as the last of the run
            checkpoints.save(step, train_state(step), {"step": step})
        checkpoints.save(5, train_state(0), {"step": 0})
        checkpoints.wait()
        restored, game = checkpoints.restore(5, abstract(train_state(5)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert game == {"step": 5} and int(restored["step"]) == 5
    with Checkpoints(str(tmp_path), every=0, keep=2) as checkpoints:
        assert not any(checkpoints.due(step) for step in range(9))


ENDLESS_SAVING = """
import sys, jax.numpy as jnp
from ssp_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], 1, 2)
for step in range(1, 1000):
    checkpoints.save(step, {"weight": jnp.full((16, 2**20), step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.15, 0.5])
def test_kill_9_leaves_only_whole_steps(tmp_path: Path, seconds: float) -> None:
    child = subprocess.Popen([sys.executable, "-c", ENDLESS_SAVING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    begun = 0
    while begun < 3:
        begun = int(child.stdout.readline())
    while all(name.isdigit() for name in os.listdir(tmp_path / "checkpoints")):
        pass  # until it is writing
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = set(os.listdir(tmp_path / "checkpoints"))
    assert seconds > 0 or any(not name.isdigit() for name in left), f"killed too late to catch it writing: {left}"
    like = {"weight": jax.ShapeDtypeStruct((16, 2**20), jnp.float32, sharding=_on(jax.make_mesh((8,), ("x",)), "x"))}
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        step = checkpoints.latest_step()
        assert step is not None and step >= 2
        restored, game = checkpoints.restore(step, like)
        assert game == {"step": step}
        np.testing.assert_array_equal(restored["weight"], step)
        assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
        checkpoints.save(step + 1, restored, {})
    assert str(step + 1) in os.listdir(tmp_path / "checkpoints")


def test_a_full_disk_is_told_in_a_line_after_the_next_step_and_costs_no_older_one(tmp_path: Path) -> None:
    state = {"weight": jax.random.normal(jax.random.key(0), (2**18,))}
    with Checkpoints(str(tmp_path), every=10, keep=2) as checkpoints:
        checkpoints.save(10, state, GAME)
        checkpoints.wait()
        told = pytest.raises(OSError, match=r"^a checkpoint cannot be written \(.*File too large.*\)$")
        with told, files_of_at_most(2**17):
            checkpoints.save(20, state, GAME)
            for _ in range(600):  # it is written in the background, while steps are played that are not saved
                assert not checkpoints.due(21)
                time.sleep(0.1)
    with Checkpoints(str(tmp_path), every=10, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 10
        assert_bitwise(checkpoints.restore(10, abstract(state))[0], state)


@pytest.mark.parametrize("broken", ["state/d/*", "state/manifest.ocdbt", "game/metadata"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, broken: str) -> None:
    state = {"params": {"weight": jax.random.normal(jax.random.key(0), (2**10,))}}
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        checkpoints.save(1, state, GAME)
        checkpoints.wait()
        for file in (tmp_path / "checkpoints" / "1").glob(broken):
            os.truncate(file, file.stat().st_size // 2)
        told = rf"^checkpoint {tmp_path}/checkpoints/1 cannot be read \(.+\); without that folder .* goes on"
        with pytest.raises(InputError, match=told) as caught:
            checkpoints.restore(1, abstract(state))
        assert "spec" not in str(caught.value) and len(str(caught.value)) < 3 * len(str(tmp_path)) + 300


def test_a_workdir_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):
        with held(str(tmp_path)), pytest.raises(InputError, match="in use by another run"), held(str(tmp_path)):
            pass
    assert not list(tmp_path.iterdir())


def test_workdir_belongs_to_one_config(tmp_path: Path) -> None:
    config = default.get_config()
    check_workdir(str(tmp_path / "run"), config)
    assert not (tmp_path / "run" / "config.json").exists()
    keep_config(str(tmp_path / "run"), config)
    (tmp_path / "run" / "metrics.jsonl").touch()  # as a run's logger does
    check_workdir(str(tmp_path / "run"), config)
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "steps": 7,
                "eval.every": 3,
                "checkpoint.keep": 9,
                "log.tensorboard": False,
                "eval.max_questions": 1,
                "retriever.url": "http://elsewhere:80/retrieve",
                "retriever.threads": 3,
            }
        )
    check_workdir(str(tmp_path / "run"), config)
    keep_config(str(tmp_path / "run"), config, evaluating=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 200
    keep_config(str(tmp_path / "run"), config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 7
    config.learner.kl_coef = 0.0
    config.engine.cache_buckets = (64,)
    with pytest.raises(InputError) as caught:
        check_workdir(str(tmp_path / "run"), config)
    message = str(caught.value)
    assert "learner.kl_coef was 0.01 and is 0.0" in message
    assert "engine.cache_buckets was [1024, 4096] and is [64]" in message
    assert "\n" not in message and "steps" not in message
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learner.kl_coef"] == 0.01


def test_a_config_on_disk_holds_no_secrets_and_still_tells_another_config(tmp_path: Path) -> None:
    def config(secret: str, host: str = "host") -> ConfigDict:
        c = default.get_config()
        c.retriever.kind = "http"
        c.retriever.url = f"https://me:{secret}@{host}/retrieve?api_key={secret}&topk=3"
        c.judge.url = f"https://{secret}@judge/v1"
        c.model.path = f"https://me:{secret}@{host}/model"  # no key that may change
        return c

    keep_config(str(tmp_path), config("hush"))
    (tmp_path / "metrics.jsonl").touch()
    kept = (tmp_path / "config.json").read_text()
    assert "hush" not in kept and json.loads(kept)["model.path"] == "https://***@host/model"
    check_workdir(str(tmp_path), config("hush"))
    check_workdir(str(tmp_path), config("another-password"))
    with pytest.raises(InputError, match="model.path was .*@host/model. and is .*@other/model") as caught:
        check_workdir(str(tmp_path), config("hush", "other"))
    assert "hush" not in str(caught.value)
    (tmp_path / "config.json").write_text(kept.replace("***", "hush"))  # as an earlier version wrote it
    check_workdir(str(tmp_path), config("hush"))


def test_a_workdir_of_evaluations_only_may_be_trained_in_with_another_game(tmp_path: Path) -> None:
    config = default.get_config()
    keep_config(str(tmp_path), config, evaluating=True)
    config.game.group_size += 1
    check_workdir(str(tmp_path), config)
    config.limits.turns += 1  # its episodes would count as this run's
    with pytest.raises(InputError, match="limits.turns"):
        check_workdir(str(tmp_path), config)


def test_unusable_workdir_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        check_workdir(str(tmp_path / "file"), default.get_config())
    for text in ("{", "[1]", "7"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match="config.json is not the config of a run"):
            check_workdir(str(tmp_path), default.get_config())
