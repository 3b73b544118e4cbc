"""The notebook's cells run on a CPU, one after the other, and end with an answer."""

import json
import os
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ssp_jax import main
from ssp_jax.config.checks import check_values
from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_no_cell_was_saved_with_what_it_printed() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_cells_play_show_the_report_and_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    display: Any = types.ModuleType("IPython.display")  # a notebook brings it
    display.HTML = str
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for name in ("ssp_jax", "configs", "assets", "notebooks", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(cell.replace("STEPS = 40", "STEPS = 1"), names)
    out = capfd.readouterr().out
    assert "average" in out and "question: What is the capital" in out
    assert "[answer: " in out and "1/1" in out
    assert len(shown) == 1 and "srcdoc=" in shown[0]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_larger_model_plays_on_the_files_of_the_demo(has_bfloat16: bool) -> None:
    """Its run is that of the config for 16 GB, with the keys of its page for a T4."""
    (cell,) = (cell for cell in code_cells() if "ssp_jax.main" in cell)
    ran: list[tuple[Any, ...]] = []
    names = {"MODEL": "0.5B", "STEPS": 40, "has_bfloat16": has_bfloat16, "sys": sys, "Path": Path}
    exec(cell, names | {"run": lambda *words: ran.append(words)})
    config = main.parse(ran[0][3:])[0].config
    check_values(config)
    read = (config.data.answers, config.retriever.corpus, *config.data.eval_sets.values())
    assert len(read) == 4 and all((ROOT / file).is_file() for file in read)
    page = runpy.run_path(str(ROOT / "configs/qwen0p5b_16gb.py"))["__doc__"]
    for_t4 = re.findall(r"^ +(--config\.\S+)(?: (--config\.\S+))?$", page, re.MULTILINE)
    keys = {key for line in for_t4 for key in line if key}
    assert len(keys) == 4 and (keys <= {*ran[0]}) is not has_bfloat16
