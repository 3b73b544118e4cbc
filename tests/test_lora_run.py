"""Whole runs with LoRA on several devices: the adapter alone is kept; resuming changes nothing."""

import shutil
from pathlib import Path

import pytest
import safetensors.numpy

from ssp_jax import train
from ssp_jax.errors import InputError
from ssp_jax.export import __main__ as export
from ssp_jax.export import form
from ssp_jax.runtime import checkpoint
from tests.model_folders import edit_tensors
from tests.test_train import NO_EVALUATION, TINY, leaves_of, small, steps_of

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("quick_compile")]

NORM = "model.norm.weight"
# The base is split over fsdp while it is trained on, and whole there while it plays. The judge is
# the base too.
LORA = {
    "steps": 4,
    "lora__rank": 4,
    "learner__learning_rate": 3e-3,
    "mesh__data": 2,
    "mesh__fsdp": 2,
    "reward__metric": "policy",
    "checkpoint__export": "none",
    **NO_EVALUATION,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the tiny model, which a test may change."""
    return Path(shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    workdir = tmp_path_factory.mktemp("whole")
    train.train(small(**LORA, model__path=str(model)), str(workdir))
    return workdir


def test_sampler_and_trainer_use_one_adapter(whole):
    """A sampler that played the base would differ from the trainer as soon as the adapter moves."""
    rows = steps_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["update/logprob_gap"] < 1e-5 and row["update/logprob_gap_max"] < 1e-4
    assert rows[0]["update/solver/kl"] == 0.0
    assert rows[-1]["update/solver/kl"] > 1e-6


def test_a_checkpoint_holds_the_adapter_and_not_the_base(whole):
    arrays = [name for name in leaves_of(whole, 4) if not name.endswith(("updates", "count"))]
    assert len(arrays) > 14 and all(name.endswith(("lora_a", "lora_b")) for name in arrays)


def test_a_run_that_lost_its_last_step_plays_it_again_bitwise(whole, model, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / checkpoint.FOLDER / "4")
    train.train(small(**LORA, model__path=str(model)), str(workdir))
    assert steps_of(workdir) == steps_of(whole)
    assert leaves_of(workdir, 4) == leaves_of(whole, 4)


def test_its_adapter_is_exported_alone_or_merged_into_its_base(whole, tmp_path):
    written = {}
    for kind in ("adapter", "model"):
        folder = tmp_path / kind
        assert export.main([str(whole), f"--kind={kind}", f"--out={folder}"]) == 0
        assert form.read(str(folder))["prompt.style"] == "brief"
        (file,) = folder.glob("*.safetensors")
        written[kind] = safetensors.numpy.load_file(file)
    assert len(written["adapter"]) == 2 * 7 * 4 and "lora_A" in min(written["adapter"])
    assert written["model"].keys() == safetensors.numpy.load_file(TINY / "model.safetensors").keys()


@pytest.mark.slow
def test_two_and_two_steps_equal_four_bitwise(whole, model, tmp_path):
    settings = {**LORA, "model__path": str(model)}
    train.train(small(**{**settings, "steps": 2}), str(tmp_path))
    train.train(small(**settings), str(tmp_path))
    assert steps_of(tmp_path) == steps_of(whole)
    assert leaves_of(tmp_path, 4) == leaves_of(whole, 4)


def test_another_base_is_refused(whole, model, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    norm = safetensors.numpy.load_file(model / "model.safetensors")[NORM]
    edit_tensors(model, **{NORM: 2 * norm})
    with pytest.raises(InputError, match="model.safetensors has changed since step 4"):
        train.train(small(**{**LORA, "steps": 5}, model__path=str(model)), str(workdir))
