"""A run's numbers and games reach a tracker, without an account; a tracker never ends a run."""

import html
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from ssp_jax import trackers
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.errors import InputError
from ssp_jax.runtime.logger import Logger

PROPOSED = [{"who": "proposer", "text": "<search> Oslo </search>"}]
SOLVED = [{"who": "solver", "text": "<answer> Oslo & more"}]
GAME = {
    "answer": "Oslo",
    "proposer": {"turns": PROPOSED, "stop_reason": "x"},
    "fault": "",
    "question": {"text": "Which capital is on a fjord?", "answers": ["Oslo"], "reused": False},
    "attempts": [{"turns": SOLVED, "stop_reason": "y", "score": 0.0}],
    "proposer_reward": 0.25,
}
FAILED = GAME | {"question": None, "fault": "no_question", "attempts": [], "proposer": None}


def config(**keys: str) -> ConfigDict:
    words = [f"--config.log.{name}={value}" for name, value in keys.items()]
    return parse_command_line(["--config=configs/tiny.py", *words]).config


def test_a_game_says_what_was_asked_and_what_became_of_it() -> None:
    text = trackers.game_text(GAME)
    assert "question: Which capital is on a fjord?" in text and "scores: [0.0]" in text
    assert "[solver, ended by y]\n<answer> Oslo & more" in text
    assert "question: none (no_question)" in trackers.game_text(FAILED)


@pytest.mark.ci
def test_offline_runs_of_wandb_hold_numbers_games_and_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed in (0, 1):
        opened = trackers.open_trackers(config(wandb="us/ours"), tmp_path)
        with Logger(str(tmp_path), 2, False, resumed, trackers=opened) as logger:
            logger.step(resumed + 1, {"reward/solver": 0.5, "bad": float("nan")}, 1.0)
            logger.episodes(resumed + 1, [GAME, FAILED])
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert first.name.split("-")[-1] == second.name.split("-")[-1]  # one run, gone on with
    (sent,) = first.glob("*.wandb")
    data = sent.read_bytes()
    assert b"reward/solver" in data and b"learner.learning_rate" in data and b"ours" in data
    (games,) = first.glob("files/media/html/*")
    assert trackers.game_text(GAME) in html.unescape(games.read_text())


class Broken:
    """A package of the user's that cannot send."""

    __name__ = "trackio"
    asked = 0

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.asked += 1
        raise OSError("no route to host")

    finish = log


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken()
    opened = [trackers.PackageRun(broken, broken, (OSError,))]
    with Logger(str(tmp_path), 3, False, trackers=opened) as logger:
        for step in (1, 2):
            logger.step(step, {"reward/solver": 0.5}, 1.0)
    assert broken.asked == 1
    assert capsys.readouterr().out.count("trackio gets no more of this run: no route to host") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(InputError, match=r"log\.trackio needs the package trackio; pip install"):
        trackers.check_installed(config(trackio="ours"))
    trackers.check_installed(config())
