"""Runs with LoRA: one leaves an adapter, another starts from it, on the embedded default."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax import train
from ssp_jax.assembly import sections
from ssp_jax.evaluation.run import evaluate_workdir
from ssp_jax.model import decoder, hf_adapter, hf_load, hf_save
from tests.model_folders import load
from tests.test_train import NO_EVALUATION, TINY, small

# A whole run with LoRA of the second set: test_lora_run.py.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]
LORA = {"lora__rank": 2, "lora__targets": ("v_proj", "q_proj"), "learner__learning_rate": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run of one step."""
    workdir = tmp_path_factory.mktemp("trained")
    train.train(small(steps=1, **LORA, **NO_EVALUATION), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def exported(trained):
    """config and params of its export, with its base."""
    base = hf_load.read_config(TINY)
    config = dataclasses.replace(base, lora=hf_adapter.read(trained / "export", base).lora)
    adapter = hf_adapter.load(trained / "export", config, None, jnp.float32)
    return config, decoder.join(load(TINY), adapter)


def test_a_run_leaves_the_adapter_that_it_trained(trained, exported):
    config, params = exported
    assert config.lora == sections.make_lora(small(**LORA))
    _, adapter = decoder.split_adapter(params)
    moved = [np.abs(x).max() for path, x in decoder.flatten(adapter).items() if "lora_b" in path]
    assert len(moved) == 2 and min(moved) > 0  # from the zeros with which a new one begins
    document = json.loads((trained / "export/adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == str(small().model.path)


def test_a_run_that_starts_from_it_and_makes_no_step_leaves_it_merged(trained, exported, tmp_path):
    config, params = exported
    start = {"model__adapter": str(trained / "export"), "checkpoint__export": "model"}
    train.train(small(steps=0, **LORA, **start, **NO_EVALUATION), str(tmp_path / "run"))
    hf_save.save(params, config, tmp_path / "expected", TINY)
    merged = load(tmp_path / "run/export")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-6),
        merged,
        load(tmp_path / "expected"),
    )
    kernels = (
        merged["layers"]["attention"]["v"]["kernel"],
        params["layers"]["attention"]["v"]["kernel"],
    )
    assert (kernels[0] != kernels[1].astype(jnp.bfloat16)).any()


def test_an_evaluation_takes_the_adapter_as_it_is_whatever_section_lora_says(trained, tmp_path):
    adapter = trained / "export"
    evaluate_workdir(small(model__adapter=str(adapter), eval__max_questions=2), str(tmp_path))
    found = json.loads((tmp_path / "eval/step_000000.json").read_text())
    assert found["weights"] == f"initial weights of {small().model.path} with {adapter}"
