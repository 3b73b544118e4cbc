"""The notebook's cells run on a CPU, one after the other, and end with an answer."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

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
