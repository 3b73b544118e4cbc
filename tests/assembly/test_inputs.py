"""What a run reads: each file that changes has another digest, for runs and evaluations."""

import json
import shutil

import pytest
import safetensors.numpy

from ssp_jax.assembly.evaluation import evaluation_inputs, make_eval_context
from ssp_jax.assembly.inputs import read_inputs
from ssp_jax.workdir import keep_config
from tests.conftest import ROOT
from tests.model_folders import edit_config, edit_tensors
from tests.test_train import small

TINY = ROOT / "assets/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Copies of the tiny model, a few passages, answers and questions; and their digests."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(TINY / "model", folder / "model")
    lines = (TINY / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:20]))
    shutil.copy(TINY / "answers.jsonl", folder)
    shutil.copy(TINY / "qa/one_hop.jsonl", folder)
    return folder, digests(folder)


def digests(folder, **changes):
    keys = {
        "model__path": f"{folder}/model",
        "retriever__corpus": f"{folder}/corpus.jsonl",
        "data__answers": f"{folder}/answers.jsonl",
        "data__eval_sets__one_hop": f"{folder}/one_hop.jsonl",
    }
    config = small(**keys | changes)
    inputs = read_inputs(config, str(folder / "run"))
    return inputs.digests, evaluation_inputs(config, inputs)


def chat_template(folder):
    path = folder / "model/tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | {"chat_template": values["chat_template"] + "{# another #}"})
    )


def one_more_line(name):
    def change(folder):
        path = folder / name
        path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")

    return change


def one_weight(folder):
    """A single number of a tensor, neither its first nor one in the middle."""
    path = folder / "model/model.safetensors"
    embedding = safetensors.numpy.load_file(path)["model.embed_tokens.weight"].copy()
    embedding[3, 3] += 1
    edit_tensors(folder / "model", **{"model.embed_tokens.weight": embedding})


CHANGES = {
    "the weights": one_weight,
    "the search": one_more_line("corpus.jsonl"),
    "data.answers": one_more_line("answers.jsonl"),
    "data.eval_sets": one_more_line("one_hop.jsonl"),
    "the tokenizer": chat_template,
    "the model's shape": lambda folder: edit_config(folder / "model", rope_theta=12345.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_changed_in_place_has_another_digest(files, tmp_path, name):
    folder, (before, evaluated) = files
    copy = shutil.copytree(folder, tmp_path / "files")
    CHANGES[name](copy)
    after, evaluated_after = digests(copy)
    assert {key for key in before if before[key] != after[key]} == {name}
    changed = {key for key in evaluated if evaluated[key] != evaluated_after[key]}
    assert changed == ({name} if not name.startswith("data.") else set())


def test_moved_files_have_the_same_digests(files, tmp_path):
    folder, before = files
    assert digests(shutil.copytree(folder, tmp_path / "elsewhere")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt__style": "search_r1"},
        {"prompt__worked_examples": 1},
        {"prompt__tell_repeats": True},
        {"limits__searches": 2},
        {"retriever__top_k": 2},
        {"retriever__b": 0.5},
        {"sampling__eval_temperature": 0.5},
        {"seed": 5},
    ],
)
def test_keys_that_an_evaluation_depends_on(files, tmp_path, changes):
    folder, (_, evaluated) = files
    copy = shutil.copytree(folder, tmp_path / "files")
    shutil.rmtree(copy / "run")  # which belongs to the other config
    assert digests(copy, **changes)[1] != evaluated


def test_keys_that_it_does_not_depend_on(files, tmp_path):
    folder, (_, evaluated) = files
    copy = shutil.copytree(folder, tmp_path / "files")
    assert (
        digests(copy, engine__slots=32, eval__max_questions=2, game__group_size=3)[1] == evaluated
    )


def test_an_evaluation_is_told_what_it_depends_on(files, tmp_path):
    """Of the inputs, and with the weights of later steps of what they were trained with."""
    folder, (_, evaluated) = files
    copy = shutil.copytree(folder, tmp_path / "files")

    def setting(**changes):
        config = small(
            model__path=f"{copy}/model", retriever__corpus=f"{copy}/corpus.jsonl", **changes
        )
        inputs = read_inputs(config, str(copy / "run"), evaluating=True)
        keep_config(str(copy / "run"), config)
        return make_eval_context(
            config, copy / "run", inputs, None, lambda metric: None, None, lambda: None, "t"
        )

    first = setting()
    assert first.inputs == first.depends_on(0) == evaluated
    assert first.depends_on(5) == evaluated | {"the training": "t"}
