"""The last lines of a run: what they name is there, and their command is one that is taken."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ssp_jax.config.command_line import parse_command_line
from ssp_jax.generate.__main__ import parse_flags
from ssp_jax.lifecycle import next_steps
from ssp_jax.runtime.logger import Logger
from tests.conftest import ROOT
from tests.report.test_report import run_folder


def config_of(*overrides: str) -> ConfigDict:
    keys = [f"--config.{override}" for override in overrides]
    return parse_command_line([f"--config={ROOT}/configs/tiny.py", *keys]).config


def last_lines(
    workdir: Path, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[str, str, str]:
    with Logger(str(workdir), 3, tensorboard=False, resume_step=3) as logger:
        capsys.readouterr()
        next_steps.show(config_of(*overrides), workdir, logger)
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    report, ask, own = (line for line in lines if not line.startswith("reporting"))
    return report, ask, own


def test_a_run_ends_with_three_lines_that_lead_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, ask, own = last_lines(run_folder(tmp_path), capsys)
    assert report == f"report: {tmp_path}/report.html, for a browser"
    assert "nq" in (tmp_path / "report.html").read_text()

    _, *words = shlex.split(ask.removeprefix("ask the model: "))
    assert words[:2] == ["-m", "ssp_jax.generate"]
    flags = parse_flags(words[2:])
    assert (flags.model, flags.adapter) == (f"{tmp_path}/export", "")
    assert flags.index == f"{tmp_path}/index"

    keys = [word for word in own.split() if word.startswith("--config.")]
    config = config_of(*(key.removeprefix("--config.") for key in keys))
    assert config.data.answers == "answers.jsonl" and config.retriever.corpus == "FOLDER"
    assert not config.data.eval_sets  # of other passages
    commands = own.partition(" -m ssp_jax.")[2].partition(",")[0]
    assert commands == "answers --corpus=FOLDER --out=answers.jsonl"
    (page,) = re.findall(r"docs/\w+\.md", own)
    assert (ROOT / page).is_file()


def test_an_adapter_is_asked_beside_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("lora.rank=2", "retriever.kind=http")
    _, ask, _ = last_lines(run_folder(tmp_path), capsys, *overrides)
    flags = parse_flags(shlex.split(ask.removeprefix("ask the model: "))[3:])
    assert flags.model == "assets/tiny/model" and flags.adapter == f"{tmp_path}/export"
    assert not flags.index


def test_what_searched_by_vectors_is_asked_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("retriever.kind=hybrid", "retriever.encoder=assets/tiny/encoder")
    _, ask, _ = last_lines(run_folder(tmp_path), capsys, *overrides)
    flags = parse_flags(shlex.split(ask.removeprefix("ask the model: "))[3:])
    assert (flags.kind, flags.encoder) == ("hybrid", "assets/tiny/encoder")


def test_a_run_without_an_export_or_a_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path)
    (tmp_path / "config.json").write_text("[")
    report, ask, _ = last_lines(tmp_path, capsys, "checkpoint.export=none")
    assert report.startswith("report: none could be written (") and "config.json" in report
    assert f"-m ssp_jax.export {tmp_path} exports it" in ask and "generate" not in ask


def test_the_interpreter_is_named_as_a_shell_here_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "my env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert next_steps._python() == "'my env/bin/python'"
    monkeypatch.setenv("PATH", str(python.parent))
    assert next_steps._python() == "python"
