"""Whole warm starts of the tiny model: the loss falls, resuming changes nothing; what is left."""

import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ssp_jax.config.command_line import parse_command_line
from ssp_jax.errors import InputError
from ssp_jax.export import __main__ as export
from ssp_jax.model import hf_load
from ssp_jax.runtime import checkpoint
from ssp_jax.warm_start import __main__ as command
from ssp_jax.warm_start.run import warm_start
from tests.conftest import ROOT
from tests.test_train import TINY, load_params, rows_of, small
from tests.warm_start.corpora import write_corpus

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("quick_compile")]

STEPS = 4
SETTINGS = {
    "warm_start__steps": STEPS,
    "warm_start__look_every": 2,
    "warm_start__episodes_per_step": 4,
    "warm_start__learning_rate": 1e-3,
    "warm_start__form_prompts": 0,
    "learner__rows": 1,
    "learner__row_tokens": 512,
    "engine__extend_buckets": (448,),
    "engine__slots": 4,
}


def scripted(folder):
    """Games in the form of the tiny model."""
    corpus = write_corpus(folder / "corpus.jsonl")
    flags = [f"--corpus={corpus}", f"--index={folder}/index", f"--out={folder}/games.jsonl"]
    assert command.main(["script", *flags, "--games=12", "--style=brief", "--top_k=1"]) == 0
    return folder / "games.jsonl"


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return scripted(tmp_path_factory.mktemp("games"))


def config_of(episodes, **changes):
    values = {"warm_start__episodes": str(episodes), **SETTINGS, **changes}
    return small(**values)


def run(workdir, episodes, **changes):
    warm_start(config_of(episodes, **changes), str(workdir), f"{ROOT}/configs/tiny.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, episodes):
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir, episodes)
    return workdir


def leaves_of(workdir, step=STEPS):
    return checkpoint.read_document(Path(workdir) / checkpoint.FOLDER / str(step))["leaves"]


def looks_of(workdir):
    rows = rows_of(workdir)
    return {row["step"]: row for row in rows if "warm_start/held_out_loss" in row}


def test_the_held_out_loss_falls_step_by_step(whole):
    losses = [look["warm_start/held_out_loss"] for look in looks_of(whole).values()]
    assert list(looks_of(whole)) == [0, 2, 4]
    assert losses[0] > losses[1] > losses[2] > 0
    steps = [row for row in rows_of(whole) if "warm_start/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["warm_start/loss"] > steps[-1]["warm_start/loss"]


def test_the_export_is_a_model_that_has_moved(whole):
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()),
        load_params(whole / "export"),
        load_params(TINY),
    )
    assert max(jax.tree.leaves(moved)) > 0
    assert hf_load.load_tokenizer(whole / "export").eos_token_id == 2


def test_each_export_says_by_what_the_weights_were_trained(whole, tmp_path):
    said = (whole / "export/README.md").read_text()
    assert "supervised training" in said and "Self-Play" not in said
    assert export.main([str(whole), f"--out={tmp_path}/again"]) == 0
    assert (tmp_path / "again/README.md").read_text() == said


def test_a_run_that_lost_its_last_step_makes_it_again_bitwise(whole, episodes, tmp_path):
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(workdir / checkpoint.FOLDER / "4")
    run(workdir, episodes)
    assert leaves_of(workdir) == leaves_of(whole)
    assert looks_of(workdir) == looks_of(whole)


def test_it_ends_by_its_loss_and_says_what_comes_next(episodes, tmp_path, capsys):
    run(tmp_path, episodes, warm_start__stop_loss=100.0, warm_start__form_prompts=3)
    said = capsys.readouterr().out
    assert "ended after step 0: the held-out loss is at most warm_start.stop_loss=100" in said
    assert looks_of(tmp_path)[0].keys() == {
        "step",
        "warm_start/held_out_loss",
        "warm_start/form",
    }
    (line,) = (line for line in said.splitlines() if "self-play from it: " in line)
    words = shlex.split(line.partition("self-play from it: ")[2])
    assert words[1:3] == ["-m", "ssp_jax.main"]
    given = parse_command_line(words[3:])
    assert (given.config.model.path, given.mode) == (f"{tmp_path}/export", "train")
    assert given.workdir == f"{tmp_path}_play" and given.config.engine.slots == 4


def test_with_lora_only_the_adapter_moves(episodes, tmp_path, capsys):
    lora = {"lora__rank": 2, "warm_start__steps": 1, "warm_start__look_every": 1}
    run(tmp_path, episodes, **lora)
    arrays = [n for n in leaves_of(tmp_path, 1) if not n.endswith(("updates", "count"))]
    assert arrays and all(name.endswith(("lora_a", "lora_b")) for name in arrays)
    looks = [look["warm_start/held_out_loss"] for look in looks_of(tmp_path).values()]
    assert looks[1] < looks[0]
    assert (tmp_path / "export/adapter_config.json").exists()
    said = capsys.readouterr().out
    words = shlex.split(said.rpartition("self-play from it: ")[2])
    given = parse_command_line(words[3:])
    assert given.config.model.adapter == f"{tmp_path}/export" and given.config.lora.rank == 2


def test_changed_episodes_or_another_rate_make_another_run(whole, episodes, tmp_path):
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(InputError, match="learning_rate was 0.001 and is 0.002"):
        run(workdir, episodes, warm_start__learning_rate=2e-3)
    lines = episodes.read_text().splitlines(keepends=True)
    changed = tmp_path / "games.jsonl"
    changed.write_text("".join(lines[:-1]))
    document = json.loads((workdir / "config.json").read_text())
    document["warm_start.episodes"] = str(changed)
    (workdir / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"games.jsonl (is gone|is new|has changed) since ste"):
        run(workdir, changed)
