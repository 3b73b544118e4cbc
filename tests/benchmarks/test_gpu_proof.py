"""benchmarks/gpu_proof.py: no check can stop the others, and each can fail. On a CPU."""

import dataclasses
import json

import numpy as np
import pytest
from jax.profiler import ProfileData

from benchmarks import gpu_proof
from benchmarks.gpu_proof import Check
from benchmarks.proof import attention, device, golden, tiny_run, tokens, trace
from benchmarks.proof.rows import FAILED, NOTED, OK, SKIPPED, Setting, at_most, near
from ssp_jax.plan.hardware import GPUS

pytestmark = pytest.mark.usefixtures("quick_compile")
BAD = "tests.benchmarks.bad_checks"


def run(checks, tmp_path, seconds=300.0):
    report = gpu_proof.run(checks, Setting(True, tmp_path), tmp_path / "cache", seconds, {})
    assert json.loads((tmp_path / "gpu_proof.json").read_text())["rows"] == report.rows
    return [(row["check"], row["name"], row["measured"], row["verdict"]) for row in report.rows]


def test_a_check_that_raises_leaves_hangs_or_dies_is_reported_and_the_next_begins(tmp_path):
    found = run(
        [
            Check(1, "", f"{BAD}:raises", 60),
            Check(2, "", f"{BAD}:leaves", 60),
            Check(3, "", f"{BAD}:hangs", 4),
            Check(4, "", f"{BAD}:dies", 60),
            Check(5, "", f"{BAD}:good", 60),
        ],
        tmp_path,
    )
    # A slow machine may not come so far in its budget.
    found = [row for row in found if row[1] != "before it hangs"]
    assert found == [
        (1, "before it raises", "1", NOTED),
        (1, "it raised", "RuntimeError: RESOURCE_EXHAUSTED: out of memory", FAILED),
        (2, "before it leaves", "1", NOTED),
        (2, "it raised", "SystemExit: not usable", FAILED),
        (3, "it was stopped", "after 4 s", FAILED),
        (4, "before it dies", "1", NOTED),
        (4, "it ended", "signal SIGSEGV: the last line that it wrote", FAILED),
        (5, "good", "1", NOTED),
    ]


def test_a_check_without_its_packages_or_without_time_is_skipped(tmp_path):
    lacking = Check(1, "a", f"{BAD}:good", 60, needs=("json", "no_such_module"))
    assert run([lacking], tmp_path) == [
        (1, "a", "needs no_such_module, which this Python lacks", SKIPPED)
    ]
    late = Check(2, "b", f"{BAD}:good", 60)
    assert run([late], tmp_path, seconds=1.0) == [(2, "b", "no time is left for it", SKIPPED)]


def test_nan_and_what_is_far_off_are_not_ok():
    assert at_most("", float("nan"), 1.0).verdict == FAILED
    assert near("", float("nan"), 1.0, 0.1).verdict == FAILED
    assert near("", 1.05, 1.0, 0.1).verdict == OK
    assert near("", 0.85, 1.0, 0.1).verdict == FAILED


@pytest.mark.ci
def test_the_cheap_checks_pass_on_this_cpu(tmp_path, capsys):
    assert gpu_proof.main([f"--out={tmp_path}", "--checks=1,2"]) == 0
    document = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert document["device"] == "cpu" and document["shapes"] == "small"
    verdicts = [row["verdict"] for row in document["rows"] if row["check"] == 2]
    assert verdicts == [OK] * len(attention.LIMITS)
    table = (tmp_path / "gpu_proof.md").read_text()
    printed = capsys.readouterr().out
    for row in document["rows"]:
        assert f"| {row['name']} |" in table and row["name"] in printed


@pytest.mark.slow
def test_all_checks_pass_on_this_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    assert gpu_proof.main([f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "gpu_proof.json").read_text())["rows"]
    assert {row["check"] for row in rows} == {check.number for check in gpu_proof.CHECKS}


def test_attention_that_forgets_segments_or_the_share_of_a_head_fails():
    case = attention.make_case(attention.Heads(4, 2, 8), 64, "float32")
    expected = attention.reference(case)

    def errors(kernel):
        found = attention.compute(kernel, case)
        return {name: attention.relative_error(found[name], expected[name]) for name in found}

    kernel = attention.KERNELS["xla"]
    limit = attention.LIMITS["float32"]
    assert attention.row("", errors(kernel), limit).verdict == OK

    def without_segments(q, k, v, segments):
        return kernel(q, k, v, np.ones_like(segments))

    def of_the_wrong_head(q, k, v, segments):
        return kernel(q, k[:, :, ::-1], v, segments)

    for wrong in (without_segments, of_the_wrong_head):
        assert attention.row("", errors(wrong), limit).verdict == FAILED


def golden_rows():
    return json.loads(tokens.GOLDEN.read_text(encoding="utf-8"))["rows"]


@pytest.mark.ci
def test_this_cpu_writes_the_tokens_of_the_golden():
    """Of the episodes in one piece of the cache: that the schedule changes none is tested there."""
    rows = golden_rows()
    prompts = [(tokens.ROLES[row["role"]], row["prompt_ids"]) for row in rows]
    search = tokens.Overlap()
    episodes, _ = tokens.play(tokens.load_model(), tokens.ONE_PIECE, prompts, search)
    assert tokens.compare("", episodes, rows).verdict == OK
    episodes[3] = dataclasses.replace(episodes[3], tokens=[*episodes[3].tokens[:-1], 1])
    row = tokens.compare("", episodes, rows)
    assert row.verdict == FAILED and "episode 3 differs first at" in row.measured


def test_no_rounding_changes_the_golden():
    rows = golden_rows()
    assert min(row["gap"] for row in rows) > golden.MINIMUM_GAP
    prompts = [(tokens.ROLES[row["role"]], row["prompt_ids"]) for row in rows]
    measured, expected, is_ok = tokens.depths(tokens.SIZES, prompts)
    assert is_ok, (measured, expected)
    assert {row["stop_reason"] for row in rows} >= {"answer", "question"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA L4", "l4"), ("cpu", "")],
)
def test_a_device_is_known_by_jaxs_name_of_it(kind, name):
    assert device.published(kind) is (GPUS[name] if name else None)


# Two streams of a GPU; lines that repeat their kernels as operations; and the host.
XSPACE = """
planes { name: "/host:CPU" lines { name: "Stream #1" events { metadata_id: 1 duration_ps: 9000 } } }
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #14(Compute)" timestamp_ns: 100
    events { metadata_id: 1 offset_ps: 4000 duration_ps: 2000 }
    events { metadata_id: 1 duration_ps: 3000 } }
  lines { name: "Stream #15(MemcpyD2H)" timestamp_ns: 102
    events { metadata_id: 1 duration_ps: 3000 } }
  lines { name: "XLA Ops" timestamp_ns: 100 events { metadata_id: 1 duration_ps: 9000 } }
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
}
"""


def test_kernels_are_those_of_the_streams_of_a_gpu(tmp_path):
    file = tmp_path / "trace.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(XSPACE))
    assert trace.kernels(file) == [(100, 103), (102, 105), (104, 106)]


def test_kernels_that_overlap_are_not_counted_twice():
    assert trace.spans([(0, 4), (1, 3), (2, 6), (8, 10)]) == (8, 10)


def test_the_first_steps_rewards_are_committed():
    document = json.loads(tiny_run.GOLDEN.read_text(encoding="utf-8"))
    assert all(0 < document[name] < 1 for name in tiny_run.REWARDS)
    assert {row.verdict for row in tiny_run.of_rewards(document)} == {OK}
    moved = {name: document[name] + 1.1 * tiny_run.REWARD_LIMIT for name in tiny_run.REWARDS}
    assert {row.verdict for row in tiny_run.of_rewards(moved)} == {FAILED}
