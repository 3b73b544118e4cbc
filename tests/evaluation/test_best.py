"""The best checkpoint of a run, by the scores in its metrics."""

import json
from pathlib import Path

from ssp_jax.evaluation.best import best_step


def write(workdir: Path, *rows: dict[str, float | None]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)


def scored(step: int, one: float | None, two: float) -> dict[str, float | None]:
    return {"step": step, "eval/one/right": one, "eval/a/two/right": two, "eval/average/right": 0.0}


def test_the_best_step_has_the_highest_mean_over_the_sets_or_that_of_one(tmp_path: Path) -> None:
    write(tmp_path, scored(0, 50.0, 10.0), scored(5, 40.0, 30.0), scored(10, 45.0, 20.0))
    steps = range(11)
    assert best_step(tmp_path, "average", steps) == 5
    assert best_step(tmp_path, "one", steps) == 0
    assert best_step(tmp_path, "a/two", steps) == 5
    assert best_step(tmp_path, "three", steps) is None


def test_only_these_steps_count_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    write(tmp_path, scored(0, 90.0, 90.0), scored(5, 30.0, 30.0), scored(10, 30.0, 30.0))
    assert best_step(tmp_path, "average", (10, 5)) == 5
    assert best_step(tmp_path, "average", ()) is None
    assert best_step(tmp_path / "nowhere", "average", (5,)) is None


def test_an_evaluation_that_was_repeated_counts_once_and_one_without_a_number_not(
    tmp_path: Path,
) -> None:
    repeated = [scored(5, 90.0, 90.0), scored(10, 30.0, 30.0), scored(5, 10.0, 10.0)]
    write(tmp_path, *repeated, scored(15, None, 99.0))
    assert best_step(tmp_path, "average", (5, 10, 15)) == 10
