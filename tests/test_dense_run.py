"""Commands and whole runs that search by the vectors of the tiny encoder."""

import json

import pytest

from ssp_jax import train
from ssp_jax.data import iterate_corpus, load_questions
from ssp_jax.generate import __main__ as generate
from ssp_jax.retriever import __main__ as command
from tests.conftest import ROOT
from tests.test_train import NO_EVALUATION, rows_of, small, steps_of

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("quick_compile")]

TINY = ROOT / "assets/tiny"
ENCODER = str(TINY / "encoder")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "index"
    flags = ["--kind=dense", f"--encoder={ENCODER}", f"--corpus={TINY}/corpus.jsonl"]
    assert command.main(["build", *flags, f"--out={folder}"]) == 0
    assert command.main(["build", *flags, f"--out={folder}"]) == 0  # it is there
    return folder


def test_the_command_finds_a_passage_by_its_words_in_another_order(index, capsys):
    document = next(iterate_corpus(TINY / "corpus.jsonl"))
    query = " ".join(reversed(document.text.split()))
    for kind in ("dense", "hybrid"):
        flags = [f"--kind={kind}", f"--encoder={ENCODER}", f"--index={index}", "--top_k=1"]
        assert command.main(["search", *flags, query]) == 0
        assert document.text in capsys.readouterr().out


def test_the_solver_searches_by_vectors(index, tmp_path):
    questions = load_questions(TINY / "qa" / "one_hop.jsonl")[:5]
    rows = "".join(json.dumps({"question": task.question}) + "\n" for task in questions)
    (tmp_path / "in.jsonl").write_text(rows)
    argv = [f"--model={TINY}/model", "--style=brief", "--dtype=float32"]
    argv += [f"--prompts={tmp_path}/in.jsonl", f"--out={tmp_path}/out.jsonl", "--max_tokens=200"]
    argv += [f"--index={index}", "--kind=dense", f"--encoder={ENCODER}"]
    assert generate.main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [turn["text"] for line in lines for turn in line["turns"] if "engine" in turn["who"]]
    assert found and all(text.count("Doc ") == 3 for text in found)


@pytest.mark.slow
def test_a_run_that_searches_by_vectors_goes_on_as_the_unbroken_one(tmp_path):
    """The resumed run has an empty cache of queries, so that its batches are others."""
    values = {"retriever__kind": "dense", "retriever__encoder": ENCODER, **NO_EVALUATION}
    train.train(small(steps=2, **values), str(tmp_path / "whole"))
    for steps in (1, 2):
        train.train(small(steps=steps, **values), str(tmp_path / "parts"))
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert all(row["proposer/searches"] > 0 for row in steps_of(tmp_path / "whole"))
