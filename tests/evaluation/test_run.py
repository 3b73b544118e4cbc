"""main --mode=eval: whose weights, what it leaves, and that a killed evaluation goes on."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ssp_jax import train
from ssp_jax.errors import InputError
from ssp_jax.evaluation import run
from ssp_jax.workdir import lock_workdir
from tests.conftest import ROOT
from tests.test_train import arguments, small

# In the second set: the evaluation that a signal ends, in test_train.py.
pytestmark = pytest.mark.slow
QUESTIONS = {"eval__max_questions": 8}
PLAYED = 16  # in both question sets


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A step of training, judged by the initial model, and then the evaluation of both weights."""
    workdir = tmp_path_factory.mktemp("trained")
    changes = {
        "eval__before": False,
        "eval__after": False,
        "checkpoint__export": "none",
        "log__episodes_every": 1,
        "reward__metric": "policy",
        "learner__learning_rate": 0.02,
    }
    train.train(small(steps=1, **changes), str(workdir))
    run.evaluate_workdir(small(steps=1, **QUESTIONS), str(workdir))
    return workdir


def document(workdir, step):
    return json.loads((workdir / "eval" / f"step_{step:06d}.json").read_text())


def episodes(workdir, step=0):
    path = workdir / "eval" / f"step_{step:06d}" / "episodes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def answers(workdir, step=0):
    return sorted(
        (e["set"], e["row"], e["tokens"], str(e["turns"])) for e in episodes(workdir, step)
    )


def test_both_weights_are_evaluated_and_compared(trained):
    assert document(trained, 0)["weights"] == "initial weights of assets/tiny/model"
    assert document(trained, 1)["weights"] == f"checkpoint of step 1 in {trained}"
    assert len(episodes(trained, 0)) == len(episodes(trained, 1)) == PLAYED
    gain = json.loads((trained / "eval" / "gain.json").read_text())
    assert gain["sets"]["one_hop"]["before"] == document(trained, 0)["sets"]["one_hop"]["right"]
    assert gain["sets"]["average"]["after"] == pytest.approx(
        document(trained, 1)["sets"]["average"]["right"]
    )
    assert answers(trained, 0) != answers(trained, 1)  # a step at that rate moves the model


def test_a_killed_evaluation_goes_on(trained, tmp_path):
    """SIGKILL in the middle; the same command plays what is left.

    Together they play what a whole evaluation plays.
    """
    command = [sys.executable, "-m", "ssp_jax.main", "--mode=eval"]
    command += [f"--config={ROOT}/configs/tiny.py", f"--workdir={tmp_path}"]
    command += arguments(**QUESTIONS)
    command += ["--config.engine.slots=2", "--config.engine.extend_rows=2"]
    command += ["--config.data.answers="]  # which an evaluation does not need
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 300
    while len(episodes_so_far(tmp_path)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    before = episodes_so_far(tmp_path)
    assert process.returncode == -signal.SIGKILL and 2 <= len(before) < PLAYED, output
    # with more slots, which an evaluation may change
    run.evaluate_workdir(small(**QUESTIONS), str(tmp_path))
    after = episodes(tmp_path)
    assert after[: len(before)] == before and len(after) == PLAYED
    assert answers(tmp_path) == answers(trained)
    assert document(tmp_path, 0)["sets"] == document(trained, 0)["sets"]


def episodes_so_far(workdir):
    path = workdir / "eval" / "step_000000" / "episodes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def test_a_complete_evaluation_is_shown_again_without_playing(trained, capsys):
    before = {path: path.read_bytes() for path in (trained / "eval").rglob("*.json*")}
    run.evaluate_workdir(small(steps=1, eval__judge="cover_em", **QUESTIONS), str(trained))
    shown = capsys.readouterr().out
    assert (
        "Right by cover_em, 1 steps of self-play" in shown
        and "initial weights of assets/tiny/model" in shown
    )
    assert f"report: {trained}/report.html, for a browser" in shown
    assert "step 1" in (trained / "report.html").read_text()
    for path, text in before.items():
        assert (
            path.name in ("metrics.jsonl", "gain.json")
            or path.suffix == ".json"
            or path.read_bytes() == text
        )


def test_a_second_evaluation_of_a_workdir_is_refused(trained):
    with (
        lock_workdir(str(trained / "eval")),
        pytest.raises(InputError, match="eval is in use by another run"),
    ):
        run.evaluate_workdir(small(steps=1, **QUESTIONS), str(trained))


def test_the_initial_model_judges(trained, tmp_path):
    """A model of this size cannot judge: its replies are no verdicts, and make no answer right."""
    shutil.copytree(trained / "eval", tmp_path / "eval")
    run.evaluate_workdir(small(eval__judge="policy", **QUESTIONS), str(tmp_path))
    found = document(tmp_path, 0)
    wrong = [e for e in episodes(tmp_path) if e["answer"]]
    assert found["judge"] == "policy" and 0 < found["unjudged"] <= len(wrong)
    assert found["sets"]["average"]["right"] == document(trained, 0)["sets"]["average"]["em"]


def test_the_initial_model_judges_while_training(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["judge/asked"] > 0
    assert 0 <= rows[0]["judge/failed"] <= rows[0]["judge/asked"]


def test_a_damaged_checkpoint_is_not_evaluated(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for arrays in (workdir / "checkpoints/1/state").rglob("d/*"):
        arrays.write_bytes(bytes(arrays.stat().st_size))
    changes = {"eval__before": False, "limits__searches": 4, **QUESTIONS}
    shutil.rmtree(workdir / "eval")
    with pytest.raises(
        InputError, match="checkpoint 1 in .*run is damaged .* evaluates the step before"
    ):
        run.evaluate_workdir(small(steps=1, **changes), str(workdir))


def test_more_questions_than_episodes_have_ids_are_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("ssp_jax.game.roles.ID_ROWS", 3)
    with pytest.raises(
        InputError, match="questions of data.eval_sets: expected at most 3 at a time, found"
    ):
        run.evaluate_workdir(small(steps=1), str(tmp_path))
