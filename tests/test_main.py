import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, RunMain

UNTOUCHED = """
import sys
import ssp_jax.train
import jax
if "again" in sys.argv:
    jax.devices()
jax.config.update("jax_num_cpu_devices", 3)  # JAX refuses this once its backends exist
assert jax.device_count() == 3
"""


def import_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", UNTOUCHED, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_importing_train_leaves_the_backend_uninitialised() -> None:
    """Otherwise jax.distributed.initialize() raises on many hosts (importing bm25s alone would be
    enough).
    """
    done = import_train()
    assert done.returncode == 0, done.stderr


@pytest.mark.ci
def test_the_check_above_can_fail() -> None:
    done = import_train("again")
    assert done.returncode != 0 and "jax_num_cpu_devices" in done.stderr


def test_mistakes_are_told_without_loading_jax(run_main: RunMain, tmp_path: Path) -> None:
    # found before the real one
    (tmp_path / "jax.py").write_text("raise SystemExit('JAX was loaded')")
    done = run_main("--config=configs/default.py", "--config.step=1", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and "the nearest is steps" in done.stderr


def test_help_tells_how_to_start(run_main: RunMain) -> None:
    done = run_main("--help")
    assert done.returncode == 0 and "--config=configs/tiny.py" in done.stdout and done.stderr == ""


@pytest.mark.ci
def test_bad_input_inside_the_run_is_one_line_and_code_2(run_main: RunMain, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"seed": 5}')
    done = run_main("--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith("ssp_jax: ")
        and "seed was 5" in done.stderr
    )
