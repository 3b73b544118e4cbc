"""benchmarks/ablations.py: variants that the trainer accepts, and tables of finished runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import ablations
from configs import tiny
from ssp_jax.config.checks import check_values

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_a_variant_is_a_config(variant):
    config = tiny.get_config()
    for change in filter(None, [ablations.VARIANTS[variant]]):
        key, text = change.split("=")
        before = config
        for part in key.split("."):
            before = before[part]
        value = {"False": False}.get(text, text)
        config.update_from_flattened_dict(
            {key: value if isinstance(before, str | bool) else type(before)(value)}
        )
        assert before != value
    check_values(config)


@pytest.fixture
def finished(tmp_path):
    """Configs and summaries as runs leave them, of all variants."""
    plan = ablations.Plan(tmp_path, 40)
    for variant in ablations.VARIANTS:
        for seed in SEEDS:
            folder = plan.workdir(variant, seed)
            folder.mkdir()
            sets = [
                {"one_hop": {"em": first + seed}, "two_hop": {"em": 2.0 * seed}}
                for first in (50, 60)
            ]
            summary = {
                "eval": dict(zip(("before", "after"), sets, strict=True)),
                "seconds": 80.0,
                "steps": 40,
            }
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "config.json").write_text(json.dumps(plan.config(variant, seed)))
    return plan


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments])
    ablations.main()
    return capsys.readouterr().out.splitlines()


def test_finished_runs_are_not_repeated_and_each_row_has_mean_and_deviation(
    finished, monkeypatch, capsys
):
    shown = run(monkeypatch, capsys, f"--out={finished.out}", "--seeds=0,1,2")
    assert not list(finished.out.glob("*/log.txt"))  # nothing was started
    for row in (
        "| before | 51.0 ± 1.0 | 2.0 ± 2.0 | 26.5 ± 1.5 | 41.5 |",
        "| SSP | 61.0 ± 1.0 | 2.0 ± 2.0 | 31.5 ± 1.5 | 49.5 |",
        "| 4 noise documents (SSP) | 61.0 ± 1.0 | 2.0 ± 2.0 | 31.5 ± 1.5 | 60.0 | 41.6 |",
        "| GRPO / GRPO | 61.0 ± 1.0 | 2.0 ± 2.0 | 31.5 ± 1.5 | 2.0 ± 0.0 | 50.9 | 504.4 |",
    ):
        assert row in shown, row
    assert (
        sum(row.startswith("| ") and not row.startswith("|  |") for row in shown) == 4 + 5 + 4 + 6
    )
    assert "| SSP | 60.0 | 0.0 | 30.0 | 49.5 |" in run(
        monkeypatch, capsys, f"--out={finished.out}", "--seeds=0"
    )


@pytest.mark.parametrize(
    ("file", "change"),
    [("summary.json", {"steps": 39}), ("config.json", {"learner.kl_coef": 0.5})],
)
def test_a_run_of_another_length_or_config_is_not_finished(finished, file, change):
    path = finished.workdir("solver only", 1) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert finished.finished("solver only", 0)
    assert not finished.finished("solver only", 1)


def test_a_run_that_fails_is_named_and_the_others_count(finished, monkeypatch, capsys):
    """It is started in the workdir of its variant and seed, with all that was there."""
    folder = finished.workdir("solver only", 1)
    (folder / "summary.json").unlink()
    (folder / "config.json").write_text("{}")  # of another run
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, f"--out={finished.out}", "--tables=2", "--seeds=0,1,2")
    assert (
        f"not finished: solver only, seed 1; its last words in {folder}/log.txt"
        in capsys.readouterr().err
    )
    assert "seed was not there and is 1" in (folder / "log.txt").read_text()


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(time.sleep(0.5) or print("saved")))
print("ready", flush=True)
time.sleep(100)
"""


def start(folder, program):
    """The runner in a folder where this is the trainer, as in a terminal; and the log of its first
    run.
    """
    (folder / "benchmarks").mkdir()
    (folder / "ssp_jax").mkdir()
    (folder / "ssp_jax" / "__init__.py").write_text("")
    (folder / "ssp_jax" / "main.py").write_text(program)
    script = shutil.copy(ablations.__file__, folder / "benchmarks")
    command = [sys.executable, script, f"--out={folder}", "--tables=2", "--seeds=0"]
    log = ablations.Plan(folder, 40).workdir(ablations.SSP, 0) / "log.txt"
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0), log


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_at_work_which_saves_and_no_other_is_started(tmp_path, sent, code):
    runner, log = start(tmp_path, SAVES)
    with runner:
        while not (log.exists() and "ready" in log.read_text()):
            assert runner.poll() is None
            time.sleep(0.05)
        os.killpg(runner.pid, sent)
        assert (
            runner.communicate(timeout=50)[1]
            == "stopped; the same command goes on from what is saved\n"
        )
    assert runner.returncode == code and log.read_text() == "ready\nsaved\n"
    assert list(tmp_path.glob("*/log.txt")) == [log]


def test_a_run_that_saved_and_ended_is_not_finished(tmp_path):
    """Its exit code is 0, as main.py says."""
    runner, log = start(tmp_path, "")
    with runner:
        said = runner.communicate(timeout=50)[1]
    assert (
        runner.returncode == 1 and f"not finished: SSP, seed 0; its last words in {log}\n" in said
    )
    assert said.endswith("3 of 3 runs are not finished; the same command takes them up again\n")
