"""The catalogue of refused input: for each command, everything that it refuses and the sentence that it says.

A case makes its files in an empty folder, which is the current one, and gives a command line. It must end with exit
code 2 and one sentence on stderr, compile nothing, and leave every file that was there as it was.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from model_folders import edit_config, edit_tensors

from ssp_jax import audit, generate, main, plan, report, retriever
from ssp_jax.metrics import CompileCounter

Make = Callable[[Path], list[str]]  # an empty folder -> a command line; its first word is a key of COMMANDS
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "main": lambda argv: main.main(["main", *argv]),
    "generate": lambda argv: generate.main(["generate", *argv]),
    "plan": lambda argv: plan.main(["plan", *argv]),
    "retriever": retriever.main,
    "report": report.main,
    "audit": audit.main,
}


@dataclass(frozen=True)
class Case:
    name: str  # of the test
    make: Make
    says: str  # a regular expression in the sentence: the file or key, and what was expected


TINY = ROOT / "assets/tiny"
FILES = (
    f"model.path={TINY}/model",
    f"data.answers={TINY}/answers.jsonl",
    f"data.eval_sets.one_hop={TINY}/qa/one_hop.jsonl",
    f"data.eval_sets.two_hop={TINY}/qa/two_hop.jsonl",
    f"retriever.corpus={TINY}/corpus.jsonl",
)


def tiny(*overrides: str) -> Make:
    """A training run of the tiny config with these overrides."""
    return lambda folder: [
        "main",
        f"--config={ROOT}/configs/tiny.py",
        f"--workdir={folder}/run",
        *(f"--config.{override}" for override in (*FILES, *overrides)),
    ]


def model(damage: Callable[[Path], Any]) -> Make:
    """generate with a damaged copy of a model folder."""

    def make(folder: Path) -> list[str]:
        damage(Path(shutil.copytree(TINY / "model", folder / "model")))
        (folder / "in.jsonl").write_text('{"prompt": "The capital of France is"}\n')
        return ["generate", "--model=model", "--prompts=in.jsonl", "--out=out.jsonl"]

    return make


def data(key: str, content: str | bytes, name: str = "rows.jsonl") -> Make:
    """A training run whose config key `key` is a file with this content."""

    def make(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        return tiny(f"{key}={folder / name}")(folder)

    return make


MODEL_FOLDERS = [
    Case("a config.json that is no object", model(lambda f: (f / "config.json").write_text("[]")), "config.json"),
    Case("a model type that is not ours", model(lambda f: edit_config(f, model_type="gpt2")), "config.json.*gpt2"),
    Case("a tensor is missing", model(lambda f: edit_tensors(f, **{"model.norm.weight": None})), "model.norm.weight"),
]

TOKENIZERS: list[Case] = []

CONFIGS_AND_FLAGS = [
    Case("an unknown key", tiny("step=1"), "there is no key step; the nearest is steps"),
    Case("a wrong type", tiny("steps=many"), "key steps must be int"),
]

CORPORA_AND_INDEXES: list[Case] = []

ANSWERS_AND_QUESTIONS = [
    Case("answers that are no JSON", data("data.answers", "{not json"), r"rows\.jsonl line 1: .*JSON object"),
]

SERVERS_AND_JUDGES: list[Case] = []

WORKDIRS: list[Case] = []

SECTIONS = {
    "model folder": MODEL_FOLDERS,
    "tokenizer": TOKENIZERS,
    "config": CONFIGS_AND_FLAGS,
    "index": CORPORA_AND_INDEXES,
    "data": ANSWERS_AND_QUESTIONS,
    "server": SERVERS_AND_JUDGES,
    "workdir": WORKDIRS,
}
CASES = [pytest.param(case, id=f"{section}: {case.name}") for section, cases in SECTIONS.items() for case in cases]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *arguments = case.make(tmp_path)
    before = contents(tmp_path)
    compiles = CompileCounter()
    code = COMMANDS[command](arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    *progress, sentence = said.splitlines()  # what was being done, and why it ended
    assert sentence.startswith("ssp_jax: ") and re.search(case.says, sentence), said
    assert not [line for line in progress if re.search("ssp_jax: |Traceback", line)], said
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert compiles.count == 0
