"""The card of an export: what a reader needs, from the files of its run, and always the same."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ssp_jax.config.command_line import MODES, parse_command_line
from ssp_jax.evaluation.scores import MEANS, SHARES
from ssp_jax.export import card
from tests.conftest import ROOT


def config_of(*overrides: str) -> ConfigDict:
    keys = [f"--config.{override}" for override in overrides]
    return parse_command_line([f"--config={ROOT}/configs/tiny.py", *keys]).config


def evaluated(workdir: Path, step: int, right: float) -> None:
    row = {name: 30.0 for name in (*SHARES, *MEANS)} | {"right": right, "n": 200}
    row |= {"right_low": right - 4, "right_high": right + 4}
    (workdir / "eval").mkdir(exist_ok=True)
    document = {"step": step, "judge": "em", "sets": {"nq": row}}
    (workdir / "eval" / f"step_{step:06d}.json").write_text(json.dumps(document))


def test_a_card_has_the_scores_before_and_after_and_the_interval_of_their_gain(
    tmp_path: Path,
) -> None:
    evaluated(tmp_path, 0, 28.75)
    evaluated(tmp_path, 40, 50.75)
    gain = {"before": 28.75, "after": 50.75, "gain": 22.0, "gain_low": 18.04, "gain_high": 26.0}
    document = {"before": 0, "after": 40, "judge": "em", "sets": {"nq": gain}}
    (tmp_path / "eval" / "gain.json").write_text(json.dumps(document))
    text = card.text(config_of(), tmp_path, 40, "model", "train")
    assert "| nq | 50.8 | 46.8 to 54.8 | 30.0 | 200 | 28.8 | +22.0 (+18.0 to +26.0) |" in text
    assert "| set | right by em, % | 95 % interval | cover EM, % | questions |" in text
    # The gain of the end of the run is none of an earlier step.
    evaluated(tmp_path, 20, 40.0)
    earlier = card.text(config_of(), tmp_path, 20, "model", "train")
    assert "| nq | 40.0 | 36.0 to 44.0 | 30.0 | 200 | 28.8 | +11.2 |" in earlier
    assert "after 20 steps" in earlier


def test_a_card_without_evaluations_has_no_scores(tmp_path: Path) -> None:
    assert "Held-out" not in card.text(config_of(), tmp_path, 3, "model", "train")


def test_a_card_says_how_it_is_asked_and_how_it_was_trained_and_not_where(tmp_path: Path) -> None:
    config = config_of("learner.kl_coef=0.5", "judge.url=http://host/v1")
    text = card.text(config, tmp_path, 3, "model", "train")
    assert "--model=THIS_FOLDER" in text and "style `brief`" in text and "QUESTION" in text
    assert "| `learner.kl_coef` | `0.5` |" in text
    assert "`data.answers`" not in text and str(tmp_path) not in text and "host" not in text
    assert card.text(config, tmp_path, 3, "model", "train") == text


@pytest.mark.parametrize(
    ("kind", "library", "asked"),
    [
        ("model", "transformers", "--model=THIS_FOLDER"),
        ("adapter", "peft", "--adapter=THIS_FOLDER"),
    ],
)
def test_the_hub_finds_the_base_of_a_card_where_it_is_one_of_its_own(
    tmp_path: Path, kind: str, library: str, asked: str
) -> None:
    local = card.text(config_of(), tmp_path, 3, kind, "train")
    assert local.startswith(f"---\nlibrary_name: {library}\n") and "base_model" not in local
    assert asked in local
    of_hub = card.text(config_of("model.path=Qwen/Qwen2.5-0.5B"), tmp_path, 3, kind, "train")
    assert "\nbase_model: Qwen/Qwen2.5-0.5B\n" in of_hub.split("---")[1]


def test_a_card_says_by_what_the_weights_were_trained(tmp_path: Path) -> None:
    played = card.text(config_of(), tmp_path, 3, "model", "train")
    shown = card.text(config_of(), tmp_path, 3, "model", "warm_start")
    assert "after 3 steps of Search Self-Play" in played
    assert "after 3 steps of supervised training" in shown and "Self-Play" not in shown
    assert set(card.TRAINING) == set(MODES) - {"eval"}
