import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ssp_jax.evaluation import paper_table, scores
from ssp_jax.runtime import logger as metrics
from ssp_jax.runtime.logger import CompileCounter, Logger, clock, short_number
from tests.conftest import ROOT

STEP = {
    "funnel/proposed": 32,
    "funnel/well_formed": 28,
    "funnel/verified": 20,
    "funnel/solved": 0.625,
    "reward/proposer": -0.5,
    "play/tokens_per_second": 12345.6,
    "learner/nobody_shows_this": 1.0,
}


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_one_json_row_with_all_metrics(tmp_path: Path) -> None:
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        logger.record(0, {"eval/one_hop/em": 0.25})
        logger.step(1, {**STEP, "update/kl": float("nan"), "array": jnp.float32(0.5)}, 1.5)
    first, second = rows(tmp_path)
    assert first["step"] == 0 and first["eval/one_hop/em"] == 0.25
    assert second["time"] >= first["time"] > 1.7e9
    assert {k: v for k, v in second.items() if k != "time"} == STEP | {
        "step": 1, "seconds": 1.5, "update/kl": None, "array": 0.5,
    }  # fmt: skip


def test_resuming_drops_rows_that_come_again_and_a_torn_line(tmp_path: Path) -> None:
    with Logger(str(tmp_path), 9, tensorboard=False) as logger:
        for step in range(5):
            logger.record(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ti')
    with Logger(str(tmp_path), 9, tensorboard=False, resume_step=3) as logger:
        logger.record(4, {"x": 40.0})
    assert [(r["step"], r["x"]) for r in rows(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    # killed before its first checkpoint; evaluation 0 is kept
    with Logger(str(tmp_path), 9, tensorboard=False):
        assert [r["step"] for r in rows(tmp_path)] == [0]


def test_changes_of_keys_hold_from_a_step_and_are_said_anew_where_a_run_goes_on_from_it(
    tmp_path: Path,
) -> None:
    def changed() -> list[tuple[int, object]]:
        return [(row["step"], row["changes"]) for row in rows(tmp_path) if "changes" in row]

    with Logger(str(tmp_path), 9, tensorboard=False, resume_step=3) as logger:
        logger.record(3, {"x": 3})
        logger.changes(3, {"learner.kl_coef": [0.01, 0.1]})
        logger.record(4, {"x": 4})
    # killed before step 4 was saved, and started with the old value
    with Logger(str(tmp_path), 9, tensorboard=False, resume_step=3) as logger:
        assert changed() == [] and [row["step"] for row in rows(tmp_path)] == [3]
        logger.changes(3, {"learner.kl_coef": [0.01, 0.2]})
        logger.record(4, {"x": 4})
    with Logger(str(tmp_path), 9, tensorboard=False, resume_step=4):
        assert changed() == [(3, {"learner.kl_coef": [0.01, 0.2]})]


def test_spoilt_lines_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a machine that went down leaves them; each start would end there."""
    with Logger(str(tmp_path), 9, tensorboard=False) as logger:
        logger.evaluation(0, {"eval/nq/right": 20.0})
        logger.record(1, {"x": 1})
        logger.record(2, {"x": 2})
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    spoilt = [
        b"\0" * 30 + b"\n",
        b"\n",
        first.strip() + second,
        b'{"x": 1}\n',
        b'{"step": "a"}\n',
        b"\xff\xfe\n",
    ]
    path.write_bytes(
        first + spoilt[0] + spoilt[1] + second + b"".join(spoilt[2:]) + third + b'{"step": 3, "ti'
    )
    for dropped in (6, 0):
        with Logger(str(tmp_path), 9, tensorboard=False, resume_step=2) as logger:
            assert not logger.evaluation(0, {"eval/nq/right": 20.0})
        assert path.read_bytes() == first + second + third
        said = capsys.readouterr().out
        assert (f"{dropped} spoilt lines of {path} are dropped" in said) == bool(dropped)


def test_an_evaluation_has_one_row_however_often_the_run_is_killed(tmp_path: Path) -> None:
    before, after = {"eval/nq/right": 20.0, "eval/nq/n": 5}, {"eval/nq/right": 30.0, "eval/nq/n": 5}
    with Logger(str(tmp_path), 9, tensorboard=False) as logger:
        assert logger.evaluation(0, before) and not logger.evaluation(0, before)
        logger.step(3, STEP, 1.5)
        logger.step(4, STEP, 1.5)
        assert logger.evaluation(4, after)
    # killed before step 4 is saved: its row goes, and comes back with what is on disk
    for _ in range(2):
        with Logger(str(tmp_path), 9, tensorboard=False, resume_step=3) as logger:
            assert not logger.evaluation(0, before)
            logger.step(4, STEP, 1.5)
            assert logger.evaluation(4, after)
    with Logger(str(tmp_path), 9, tensorboard=False, resume_step=4) as logger:
        assert not logger.evaluation(4, after)
        assert logger.evaluation(4, after | {"eval/nq/right": 40.0})  # verdicts that had failed
    found = [
        (row["step"], row["eval/nq/right"]) for row in rows(tmp_path) if "eval/nq/right" in row
    ]
    assert found == [(0, 20), (4, 30), (4, 40)]


def test_tensorboard_file_grows_with_each_step(tmp_path: Path) -> None:
    def size() -> int:
        return sum(
            path.stat().st_size for path in (tmp_path / "tensorboard").glob("events.out.tfevents.*")
        )

    with Logger(str(tmp_path), 9, tensorboard=True):
        pass
    empty = size()
    with Logger(str(tmp_path), 9, tensorboard=True) as logger:
        for step in range(1, 4):
            logger.step(step, STEP, 1.0)
    written = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert size() - empty > 3 * len("".join(STEP)) and written.count(b"funnel/solved") == 3


FULL_DISK = """
import sys
from tests.conftest import files_of_at_most
from ssp_jax.runtime.logger import Logger
with Logger(sys.argv[1], 9, tensorboard=True) as logger, files_of_at_most(4096):
    for step in range(1000):
        logger.record(step, {f"name/{i}": 0.5 for i in range(20)})
"""


def test_a_disk_that_is_full_for_tensorboard_ends_the_run_and_does_not_hang_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")  # which is never full
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("OSError: "), (
        done.stderr
    )


def test_plain_output_is_dated_lines_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_others = ("update/both/", "warm_start/")  # lines of other runs than these
    everything = {c.metric: 0.25 for c in metrics.COLUMNS if not c.metric.startswith(of_others)}
    with Logger(str(tmp_path), 200, tensorboard=False) as logger:
        logger.say("a [bold] folder")
        logger.step(1, everything, 12.3)
        large = {"funnel/solved": 1.0, "solver/tokens": 8192, "play/tokens_per_second": 98765}
        logger.step(2, everything | large, 123.4)
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert lines[0].endswith(" a [bold] folder") and "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= 100
    table = [lines[1], *lines[-2:]]
    header, first, second = (line[9:].split() for line in table)
    titles = [c.title for c in metrics.COLUMNS if c.metric in everything]
    assert header == ["step", *titles, "s/step", "left"] and len(set(titles)) == len(titles)
    shown = dict(zip(header, second, strict=True))
    assert (shown["step"], shown["solved"], shown["tokens"], shown["tok/s"]) == (
        "2/200",
        "100.0%",
        "8192",
        "98.8k",
    )
    # columns stand below each other
    assert [len(line) for line in table] == [len(lines[1])] * 3
    explained = [line[9:].split()[0] for line in lines[2:-2]]
    assert explained == header[1:-1]  # not the step, and not the time that is left
    assert first[-1] == clock(199 * 12.3)


def test_what_is_said_once_is_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Logger(str(tmp_path), 3, tensorboard=False) as logger:
        for topic, text in (("turns", "a"), ("prompts", "b"), ("turns", "c")):
            logger.say_once(topic, text)
    assert [line[9:] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


def test_console_shows_only_metrics_that_the_run_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Logger(str(tmp_path), 3, tensorboard=False) as logger:
        logger.step(1, {"reward/solver": 0.5}, 1.0)
        # its first update
        logger.step(2, {"reward/solver": float("nan"), "update/both/kl": 0.1}, 1.0)
        logger.step(3, {"reward/solver": 0.5}, 1.0)
    shown = capsys.readouterr().out.splitlines()
    lines = [line.split()[1:-2] for line in shown if " = " not in line]
    assert lines[:2] == [["step", "solvR"], ["1/3", "0.50"]]
    assert lines[2:] == [["step", "solvR", "KL"], ["2/3", "nan", "0.1000"], ["3/3", "0.50", "-"]]


def test_a_column_is_explained_once_below_the_first_header_that_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Logger(str(tmp_path), 99, tensorboard=False) as logger:
        for step in range(1, 2 * metrics.HEADER_EVERY):
            late = {"update/both/kl": 0.1} if step > 2 else {}
            logger.step(step, {"reward/solver": 0.5} | late, 1.0)
    lines = [line[9:].strip() for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("step") for line in lines) == 3
    explained = [line for line in lines if " = " in line]
    assert [line.split()[0] for line in explained] == ["solvR", "s/step", "KL"]
    assert explained[0].endswith(
        "reward/solver: Mean over all attempts, reused questions included."
    )
    assert "update/both/kl: " in explained[2]


def test_a_phase_that_reports_nothing_is_told_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "BEAT_SECONDS", 0.01)
    said = ""
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        with logger.phase("compiling", state=lambda: "3 programs"):
            for _ in range(500):
                said += capsys.readouterr().out
                if "programs" in said:
                    break
                time.sleep(0.01)
        assert re.search(r"compiling 3 programs · 0:0\d\n", said)


def test_plain_progress_is_told_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        with logger.phase("playing", 100) as phase:
            for i in range(100):
                phase.advance(i)
        assert capsys.readouterr().out.count("playing") == 1
        monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
        with logger.phase("playing", 100) as phase:
            phase.advance(50, total=200, tokens=1234.0)
    assert re.search(
        r"playing 50/200 · \S+/s · 1.2k tokens/s · 0:00 left\n", capsys.readouterr().out
    )


def test_table_is_plain_text_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        logger.table("accuracy in [/b] :x:", [["one_hop [red]", 0.25, 200]], ["set", "em", "n"])
    shown = capsys.readouterr().out
    assert shown.isascii() and re.search(r"one_hop \[red\] \| 0.250 \| 200", shown)
    assert "accuracy in [/b] :x:" in shown


def in_a_terminal(script: str, workdir: Path, columns: int, steps: int = 4) -> str:
    """What a script with a `logger` shows in a terminal of this width."""
    start = "import sys, time; from ssp_jax.runtime.logger import Logger\n"
    start += f"with Logger(sys.argv[1], {steps}, False) as logger:\n    "
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    command = [sys.executable, "-c", start + script.replace("\n", "\n    "), str(workdir)]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert child.wait(60) == 0, shown
    return shown.decode()


def test_terminal_has_a_live_display_that_goes_away(tmp_path: Path) -> None:
    script = """with logger.phase("playing", 8) as phase:
    phase.advance(2, tokens=310.0); time.sleep(0.5)
logger.step(1, {"reward/solver": 0.5}, 1.0)"""
    text = in_a_terminal(script, tmp_path, 100)
    assert "playing" in text and "2/8" in text and "310 tokens/s" in text and "0/4 steps" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert "0.50" in text[text.rindex("solvR") :] and "\x1b[2K" in text
    evaluation = in_a_terminal(script.partition("\nlogger")[0], tmp_path, 100, steps=0)
    assert "2/8" in evaluation and "steps" not in evaluation


def test_no_number_of_a_table_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven sets with a judge are wider than 100 columns: whole in a file, and for a terminal,
    which breaks lines.
    """
    row = {f"{share}{end}": 44.6 for share in scores.SHARES for end in ("", "_low", "_high")}
    row |= {"searches": 2.1, "tokens": 8120.0, "n": 3125}
    table = scores.rows(
        {f"ssp/{name}": row for name in (*paper_table.SETS, scores.AVERAGE)}, "policy"
    )
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        logger.table("Held-out questions", *table)
    live = in_a_terminal(f"logger.table('Held-out questions', *{table!r})", tmp_path, 60)
    for shown in (capsys.readouterr().out, live):
        lines = [line.replace("|", " ") for line in shown.splitlines()]
        for cells in table[0]:
            assert sum(line.split() == " ".join(map(str, cells)).split() for line in lines) == 1, (
                shown
            )


def test_episodes_can_be_read(tmp_path: Path) -> None:
    record = {"role": "solver", "turns": [{"who": "model", "text": "<search> São Paulo </search>"}]}
    with Logger(str(tmp_path), 2, tensorboard=False) as logger:
        logger.episodes(10, [record, record])
    text = (tmp_path / "episodes" / "step_000010.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == [
        record,
        record,
    ] and "São Paulo" in text


def test_compile_counter_counts_compilations_only() -> None:
    double = jax.jit(lambda x: x * 2 + 1)
    inputs = [jnp.ones(3), jnp.ones(5)]
    counter = CompileCounter()
    double(inputs[0])
    assert counter.count == 1 and counter.seconds > 0
    double(inputs[0])
    assert counter.count == 1
    double(inputs[1])
    assert counter.count == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.345, "0.34"), (12.34, "12.3"), (310, "310"), (4200, "4.2k"), (1.26e6, "1.3M"), (0, "0.00")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "0:07"), (725, "12:05"), (10809, "3:00:09")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the peak starts again on Linux alone"
)
def test_the_peak_of_memory_is_that_since_the_last_call() -> None:
    metrics.pop_peak_memory_gib()
    block = bytearray(2**28)  # a quarter of a GiB, written to, comes and goes
    del block
    high, low = metrics.pop_peak_memory_gib(), metrics.pop_peak_memory_gib()
    assert 0.2 < high - low < 0.5
