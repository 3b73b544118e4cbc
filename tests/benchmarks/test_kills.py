"""The loop of benchmarks/kills.py, a short one: 200 kills take an hour."""

from pathlib import Path

import pytest

from benchmarks import kills


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, 20), (2, 4)])
def test_killed_runs_end_as_the_unbroken_one(tmp_path: Path, processes: int, number: int) -> None:
    assert kills.main([f"--out={tmp_path}", f"--kills={number}", f"--processes={processes}"]) == 0
