import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import default
from ssp_jax.errors import InputError
from ssp_jax.runtime.checkpoint import Checkpoints, leaf_digests
from ssp_jax.workdir import check_workdir, keep_config, lock_workdir, made_workdir
from tests.conftest import files_of_at_most

GAME = {
    "position": 7,
    "pool": [{"question": "Où est São Paulo?", "answers": ["Brazil"], "uid": None}],
    "rate": 0.1,
}


def train_state(seed: int) -> dict[str, Any]:
    """Leaves of each dtype that a train state has, two of them sharded over a 4 x 2 mesh."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((48, 66), np.float32)
    moment = rng.standard_normal((16, 3), np.float32).astype(jnp.bfloat16)
    return {
        "params": {"kernel": jax.device_put(kernel, _on(mesh, "fsdp", "tensor"))},
        "adam": [jax.device_put(moment, _on(mesh, ("fsdp", "tensor")))],
        "step": jax.device_put(np.int32(seed), _on(mesh)),
    }


def _on(mesh: jax.sharding.Mesh, *axes: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise(one: Any, other: Any) -> None:
    def same(a: jax.Array, b: jax.Array) -> bool:
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        )

    assert jax.tree.all(jax.tree.map(same, one, other))  # raises where the structures differ


def test_restores_bitwise_on_the_same_shardings(tmp_path: Path) -> None:
    state = train_state(3)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, state, GAME)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        assert checkpoints.steps() == [3]
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
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, moved
    )
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
from ssp_jax.runtime.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], 1, 2)
for step in range(1, 1000):
    checkpoints.save(step, {"weight": jnp.full((16, 2**20), step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.ci
@pytest.mark.parametrize("seconds", [0.0, 0.15, 0.5])
def test_kill_9_leaves_only_whole_steps(tmp_path: Path, seconds: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_SAVING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
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
    assert seconds > 0 or any(not name.isdigit() for name in left), (
        f"killed too late to catch it writing: {left}"
    )
    like = {
        "weight": jax.ShapeDtypeStruct(
            (16, 2**20), jnp.float32, sharding=_on(jax.make_mesh((8,), ("x",)), "x")
        )
    }
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        step = checkpoints.steps()[-1]
        assert step is not None and step >= 2
        restored, game = checkpoints.restore(step, like)
        assert game == {"step": step}
        np.testing.assert_array_equal(restored["weight"], step)
        assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
        checkpoints.save(step + 1, restored, {})
    assert str(step + 1) in os.listdir(tmp_path / "checkpoints")


def test_a_full_disk_is_told_in_a_line_after_the_next_step_and_costs_no_older_one(
    tmp_path: Path,
) -> None:
    weight = np.random.default_rng(0).standard_normal(2**18, np.float32)
    state = {"weight": jax.device_put(weight)}
    with Checkpoints(str(tmp_path), every=10, keep=2) as checkpoints:
        checkpoints.save(10, state, GAME)
        checkpoints.wait()
        message = r"^a checkpoint cannot be written \(.*File too large.*\)$"
        with pytest.raises(OSError, match=message), files_of_at_most(2**17):
            checkpoints.save(20, state, GAME)
            # it is written in the background, while steps are played that are not saved
            for _ in range(600):
                assert not checkpoints.due(21)
                time.sleep(0.1)
    with Checkpoints(str(tmp_path), every=10, keep=2) as checkpoints:
        assert checkpoints.steps() == [10]
        assert_bitwise(checkpoints.restore(10, abstract(state))[0], state)


# --- damage ---


def two_steps(workdir: Path) -> dict[str, Any]:
    """Saves steps 1 and 2; the state of 1."""
    with Checkpoints(str(workdir), every=1, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, train_state(step), {"step": step})
    return train_state(1)


def flip(path: Path) -> None:
    """A bit in the middle, where an array is."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def nothing_but_nul(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


ARRAYS = "state/ocdbt.process_0/d/*"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a bit of the arrays": (ARRAYS, flip),
    "arrays cut": (ARRAYS, halve),
    "arrays of zeros": (ARRAYS, nothing_but_nul),
    "arrays gone": (ARRAYS, os.remove),
    "the folder of arrays gone": ("state", shutil.rmtree),
    "list of arrays cut": ("state/manifest.ocdbt", halve),
    "list of arrays gone": ("state/manifest.ocdbt", os.remove),
    "a bit of the game": ("game/metadata", flip),
    "the game cut": ("game/metadata", halve),
    "the game empty": ("game/metadata", lambda path: path.write_text("")),
    "the game is a list": ("game/metadata", lambda path: path.write_text("[]")),
    "the game nested": ("game/metadata", lambda path: path.write_text("[" * 100_000)),
    "a rename that a preemption ended": (
        "*",
        lambda path: None if path.name == "game" else remove(path),
    ),
    "all of it": ("", lambda path: [remove(inner) for inner in path.iterdir()]),
}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_set_aside_for_the_one_before(tmp_path: Path, damage: str) -> None:
    state = two_steps(tmp_path)
    pattern, act = DAMAGES[damage]
    step = tmp_path / "checkpoints" / "2"
    for path in list(step.glob(pattern)) if pattern else [step]:
        act(path)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        restored = checkpoints.restore_newest(abstract(state))
        assert restored is not None and restored.step == 1 and restored.game == {"step": 1}
        assert_bitwise(restored.state, state)
        assert list(restored.damaged) == [2] and len(restored.damaged[2]) <= 300
        assert checkpoints.steps() == [1]
        checkpoints.save(2, train_state(5), {"step": 2})  # it is played again, and kept
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        again = checkpoints.restore_newest(abstract(state))
        assert again is not None and (again.step, again.damaged) == (2, {})
        assert_bitwise(again.state, train_state(5))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "1",
        "2",
        "2.damaged",
    ]


def test_where_no_step_is_good_that_is_told_and_nothing_is_moved(tmp_path: Path) -> None:
    state = two_steps(tmp_path)
    for path in (tmp_path / "checkpoints").glob(f"*/{ARRAYS}"):
        halve(path)
    message = (
        rf"^no checkpoint in {tmp_path}/checkpoints can be read \(2: .+; 1: .+\); "
        "without that folder .* anew$"
    )
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        with pytest.raises(InputError, match=message) as caught:
            checkpoints.restore_newest(abstract(state))
        assert "spec" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_a_digest_is_of_values_and_places_and_not_of_shardings(dtype: Any) -> None:
    values = np.arange(8 * 6).reshape(8, 6).astype(dtype)

    def digest(x: np.ndarray, *axes: Any, mesh: Any = (4, 2)) -> str:
        devices = jax.make_mesh(
            mesh, ("fsdp", "tensor"), devices=jax.devices()[: mesh[0] * mesh[1]]
        )
        return leaf_digests({"x": jax.device_put(x, _on(devices, *axes))})["x"]

    whole = digest(values)
    assert whole == digest(values, "fsdp", "tensor") == digest(values, None, "tensor")
    assert (
        whole
        == digest(values, ("fsdp", "tensor"), mesh=(2, 1))
        == digest(values, None, "fsdp", mesh=(3, 1))
    )
    bits = values.view(f"u{values.itemsize}")
    for place in ((0, 0), (3, 1), (7, 5)):
        for bit in (0, 8 * values.itemsize - 1):
            changed = bits.copy()
            changed[place] ^= np.array(1 << bit, bits.dtype)
            assert digest(changed.view(values.dtype)) != whole
    signs = bits.copy()
    # changes whose plain sum is zero
    signs[:2] ^= np.array(1 << (8 * values.itemsize - 1), bits.dtype)
    assert digest(signs.view(values.dtype)) != whole
    assert digest(np.roll(values, 1, axis=0)) != whole and digest(values[:, ::-1].copy()) != whole


def test_a_save_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    with Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
        checkpoints.save(1, train_state(1), GAME)
    names = [Path(path).relative_to(tmp_path / "checkpoints") for path in synced]
    assert all(name.parts[0].startswith("1.orbax-checkpoint-tmp") for name in names)
    below = {str(Path(*name.parts[1:])) for name in names}
    written = {
        path.relative_to(tmp_path / "checkpoints" / "1")
        for path in (tmp_path / "checkpoints/1").rglob("*")
    }
    assert {str(path) for path in written if path.name != "commit_success.txt"} <= below


TOGETHER = """
import sys, time
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ssp_jax.runtime import checkpoint
from ssp_jax.runtime import processes
from ssp_jax.runtime.launchers import ProcessSpec
workdir, coordinator, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.start(ProcessSpec(coordinator, 2, process), {})
processes.run_on_all(lambda: None)
processes.check_shared(workdir)
processes.SHARED_SECONDS = 2
try:
    processes.check_shared(workdir / str(process))
    print("shared")
except processes.CollectiveInputError as error:
    print(error)
place = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
values = np.arange(4096, dtype=np.float32).reshape(64, 64)
def put(step):
    x = jax.make_array_from_callback(values.shape, place, lambda index: values[index] + step)
    return {"x": x}
with checkpoint.Checkpoints(str(workdir), 1, 3) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, put(step), {"step": step})
    checkpoints.wait()
    if process == 0:
        (workdir / "checkpoints/3/game/metadata").unlink()
        paths = (workdir / "checkpoints/2/state").rglob("*")
        files = [path for path in paths if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(bytes(largest.stat().st_size))
    processes.barrier()
    if process == 1:  # an old list of the folder
        checkpoint.finished_steps = lambda workdir: [1]
    like = {"x": jax.ShapeDtypeStruct(values.shape, np.float32, sharding=place)}
    found = checkpoints.restore_newest(like)
    assert found.step == 1, found
    for shard in found.state["x"].addressable_shards:
        assert np.array_equal(shard.data, values[shard.index] + 1)
    print(found.step, found.game, sorted(found.damaged), checkpoint.leaf_digests(found.state)["x"])
    checkpoints.save(2, put(2), {"step": 2})
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.ci
def test_several_processes_fall_back_together_to_the_step_that_the_first_one_sees(
    tmp_path: Path,
) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path), f"127.0.0.1:{free_port()}"]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*command, i], env=environment, stdout=pipe, stderr=pipe, text=True)
        for i in "01"
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    values = np.arange(4096, dtype=np.float32).reshape(64, 64) + 1
    restored = f"1 {{'step': 1}} [2, 3] {leaf_digests({'x': jnp.asarray(values)})['x']}"
    for output, _ in said:
        lines = output.splitlines()
        assert lines[-1] == restored
        assert (
            sum(f"{tmp_path}/1 is not the same folder on all hosts" in line for line in lines) == 1
        )
    names = ["1", "2", "2.damaged", "3.damaged"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert not list(tmp_path.glob("**/.shared_*"))


def test_a_gpu_saves_without_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which XLA gives a process 64 GiB, and Orbax by itself would take a copy of the whole
    state.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level("INFO", logger="absl"), Checkpoints(str(tmp_path), every=1, keep=2):
        pass
    logged = re.findall(r"enable_pinned_host_transfer=(\w+)", caplog.text)
    assert logged and set(logged) == {"False"}


def test_minutes_count_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("ssp_jax.runtime.checkpoint.time.monotonic", lambda: now[0])
    with Checkpoints(str(tmp_path), every=4, keep=2, minutes=1.5) as checkpoints:
        due = []
        for step in range(1, 9):
            now[0] += 40
            if checkpoints.due(step):
                due.append(step)
                checkpoints.save(step, {"x": jnp.float32(step)}, {})
        assert due == [3, 4, 7, 8]


def test_a_workdir_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            lock_workdir(str(tmp_path)),
            pytest.raises(InputError, match="in use by another run"),
            lock_workdir(str(tmp_path)),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_a_workdir_stays_only_with_something_in_it(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with pytest.raises(InputError, match="refused"), made_workdir(str(deep)):
        assert deep.is_dir()
        raise InputError("refused")
    assert not (tmp_path / "a").exists()

    with made_workdir(str(deep)):
        (tmp_path / "a" / "theirs").touch()  # such as another run's workdir
    assert not deep.exists() and (tmp_path / "a").is_dir()

    deep.mkdir()
    with made_workdir(str(deep)):
        pass
    assert deep.is_dir()  # was there before


def test_workdir_belongs_to_one_config(tmp_path: Path) -> None:
    config = default.get_config()
    check_workdir(str(tmp_path / "run"), config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
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
                "learner.learning_rate": 3e-6,
                "reward.metric": "cover_em",
                "game.noise_documents": 2,
            }
        )
    check_workdir(str(tmp_path / "run"), config)
    keep_config(str(tmp_path / "run"), config, evaluating=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 200
    keep_config(str(tmp_path / "run"), config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 7
    config.learner.adam_b1 = 0.5
    config.engine.cache_buckets = (64,)
    with pytest.raises(InputError) as caught:
        check_workdir(str(tmp_path / "run"), config)
    message = str(caught.value)
    assert "learner.adam_b1 was 0.9 and is 0.5" in message
    assert "engine.cache_buckets was [1024, 4096] and is [64]" in message
    assert "\n" not in message and "steps" not in message and "learning_rate" not in message
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learner.adam_b1"] == 0.9


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
    with pytest.raises(
        InputError, match="model.path was .*@host/model. and is .*@other/model"
    ) as caught:
        check_workdir(str(tmp_path), config("hush", "other"))
    assert "hush" not in str(caught.value)
    # as an earlier version wrote it
    (tmp_path / "config.json").write_text(kept.replace("***", "hush"))
    check_workdir(str(tmp_path), config("hush"))


def test_a_workdir_of_evaluations_only_may_be_trained_in_with_another_game(tmp_path: Path) -> None:
    config = default.get_config()
    keep_config(str(tmp_path), config, evaluating=True)
    config.game.group_size += 1
    check_workdir(str(tmp_path), config)
    config.limits.turns += 1  # its episodes would count as this run's
    with pytest.raises(InputError, match="limits.turns"):
        check_workdir(str(tmp_path), config)
