"""Whole runs of the embedded default: resuming equals never stopping, signals, files of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import default
from ssp_jax import data, train
from ssp_jax.assembly import sections
from ssp_jax.config.advice import advice
from ssp_jax.config.command_line import Origin
from ssp_jax.config.files import load_config
from ssp_jax.config.keys import default_values
from ssp_jax.config.values import CHOICES
from ssp_jax.export import __main__ as export
from ssp_jax.export import form
from ssp_jax.metric_table import METRICS
from ssp_jax.model import hf_load
from ssp_jax.runtime.checkpoint import Checkpoints, finished_steps, read_document
from ssp_jax.workdir import check_origin, keep_compiled
from tests.model_folders import edit_tensors
from tests.test_docs import TABLE, table_name

ROOT = Path(__file__).parent.parent
SMALL = {
    "steps": 4,
    "game.answers_per_step": 4,
    "game.group_size": 2,
    "engine.slots": 8,
    "engine.extend_rows": 4,
    # 6 programs to compile instead of 19; test_engine.py plays with more.
    "engine.cache_buckets": (),
    "engine.extend_buckets": (128, 448),
    "learner.rows": 4,
    "eval.max_questions": 4,
    "checkpoint.every": 1,
    "log.episodes_every": 2,
}


NO_EVALUATION = {"eval__before": False, "eval__after": False}
TINY = ROOT / "assets/tiny/model"


def small(**changes):
    c = load_config(ROOT / "configs" / "tiny.py").copy_and_resolve_references()
    with c.unlocked():
        c.update_from_flattened_dict(SMALL | {k.replace("__", "."): v for k, v in changes.items()})
    return c


def arguments(**changes):
    values = SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config.{key}={value}" for key, value in values.items()]


def load_params(folder):
    return hf_load.load(folder, hf_load.read_config(folder), None, np.float32)


def params_of(workdir):
    return load_params(workdir / "export")


def steps_of(workdir):
    """What the steps wrote; a run that ends in the middle also evaluates there."""
    return [row for row in rows_of(workdir) if "funnel/proposed" in row]


def leaves_of(workdir, step):
    """Name -> digest of all arrays of a checkpoint."""
    return read_document(workdir / "checkpoints" / str(step))["leaves"]


def all_rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def rows_of(workdir):
    """What another run with the same seed writes too."""
    of_the_machine = ("seconds", "time", "per_second", "compiles", "_gib")
    return [
        {k: v for k, v in row.items() if not k.endswith(of_the_machine)}
        for row in all_rows_of(workdir)
    ]


def test_compiled_programs_stay_in_the_workdir_unless_the_user_has_a_folder(tmp_path):
    users = jax.config.jax_compilation_cache_dir
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == users != ""
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", users)


COMPILES = """
import sys
import jax
from ssp_jax.workdir import keep_compiled
keep_compiled(sys.argv[1])
hits = []
def listen(event, **_):
    if "cache_hits" in event:
        hits.append(event)

jax.monitoring.register_event_listener(listen)
jax.jit(lambda x: x + 1)(jax.numpy.arange(3))
print(len(hits))
"""


@pytest.mark.ci
def test_a_workdir_that_was_moved_has_its_programs_the_short_ones_too(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}

    def found(workdir, code=COMPILES):
        command = [sys.executable, "-c", code, str(workdir)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert found(tmp_path / "run") == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert found(tmp_path / "moved", "\n\n" + COMPILES) > 0  # another line of the source file, too


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps. A signal comes while its last step is written, and is not `missed`: the
    run holds signals until then.
    """
    workdir = tmp_path_factory.mktemp("whole")
    missed = []
    close = Checkpoints.close

    def signalled(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        close(checkpoints)

    before = signal.signal(signal.SIGTERM, lambda *_: missed.append(True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "close", signalled)
        train.train(small(), str(workdir))
    signal.signal(signal.SIGTERM, before)
    assert not missed
    return workdir


@pytest.mark.ci
def test_a_run_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["seconds"] > 0
    for when in ("before", "after"):
        scores = summary["eval"][when]
        assert scores.keys() == {"one_hop", "two_hop"} and all(
            row["n"] == 4 and "f1" in row for row in scores.values()
        )
        assert all(row["em_low"] <= row["em"] <= row["em_high"] for row in scores.values())
    recorded = [row for row in rows_of(whole) if "eval/average/right_high" in row]
    assert [row["step"] for row in recorded] == [0, 4]
    steps = steps_of(whole)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        faults = sum(v for k, v in row.items() if k.startswith("fault/"))
        assert row["funnel/proposed"] == 4 == row["funnel/verified"] + faults
        # sampler and trainer agree
        assert row["update/logprob_gap"] < 1e-5 and row["update/logprob_gap_max"] < 1e-4
    costs = [row for row in all_rows_of(whole) if "compiles" in row]
    assert all(row["memory/play_gib"] > 0 and row["memory/update_gib"] > 0 for row in costs)
    # lengths vary, programs do not
    assert len(costs) == 4 and costs[1]["compiles"] == costs[-1]["compiles"]
    lines = (whole / "episodes" / "step_000002.jsonl").read_text().splitlines()
    games = [json.loads(line) for line in lines]
    assert len(games) == 4 and all(game["proposer"]["turns"] for game in games)
    assert list((whole / "tensorboard").iterdir())
    assert "held-out questions" in (whole / "report.html").read_text()


@pytest.mark.ci
def test_what_a_run_writes_is_in_the_table_of_metrics(whole):
    written = {table_name(name) for row in all_rows_of(whole) for name in row}
    assert written <= TABLE
    # What is left says when it would be written, or is of a warm start.
    conditions = {metric.name: metric.written for group in METRICS.values() for metric in group}
    left = [name for name in TABLE - written if not name.startswith("warm_start/")]
    assert all(conditions[name] for name in left)


def test_the_export_is_a_model_folder_that_is_not_the_initial_one(whole):
    initial = load_params(TINY)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params_of(whole), initial)
    assert max(jax.tree.leaves(moved)) > 0
    assert hf_load.load_tokenizer(whole / "export").eos_token_id == 2


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.ci
def test_an_exported_checkpoint_is_what_the_run_itself_wrote(whole, tmp_path, capsys):
    """From its files alone, on a mesh of other devices, with the same card."""
    assert export.main([str(whole), f"--out={tmp_path}/last"]) == 0
    assert files_of(tmp_path / "last") == files_of(whole / "export")
    said = capsys.readouterr().out
    assert "the model after step 4" in said and f"--model={tmp_path}/last" in said

    steps = finished_steps(whole)
    assert steps == [3, 4]
    assert export.main([str(whole), "--step=3", f"--out={tmp_path}/3"]) == 0
    saved = files_of(tmp_path / "3")
    assert saved["model.safetensors"] != files_of(whole / "export")["model.safetensors"]
    assert b"after 3 steps" in saved["README.md"]
    # The run has evaluated its last step.
    assert export.main([str(whole), "--best", f"--out={tmp_path}/best"]) == 0
    assert files_of(tmp_path / "best") == files_of(whole / "export")


def test_an_export_says_how_it_is_asked_and_sampled_and_has_its_scores(whole):
    generation = json.loads((whole / "export/generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "do_sample": False}
    assert form.read(str(whole / "export"))["prompt.style"] == "brief"
    card = (whole / "export/README.md").read_text()
    assert "| one_hop | " in card and "gain (95 % interval)" in card
    scores = json.loads((whole / "summary.json").read_text())["eval"]["after"]
    assert f"| one_hop | {scores['one_hop']['right']:.1f} |" in card


@pytest.mark.slow  # the run that Ctrl-C stops, below, is resumed in the fast set
def test_two_and_two_steps_equal_four_bitwise(whole, tmp_path):
    train.train(small(steps=2, **NO_EVALUATION), str(tmp_path))
    train.train(small(), str(tmp_path))
    assert steps_of(tmp_path) == steps_of(whole)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(whole))


def start(workdir, **changes):
    command = [
        sys.executable,
        "-m",
        "ssp_jax.main",
        f"--config={ROOT}/configs/tiny.py",
        f"--workdir={workdir}",
    ]
    return subprocess.Popen(
        [*command, *arguments(**changes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_step(workdir, process, step, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in steps_of(workdir)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: exit code {process.poll()}")


# SIGKILL at all moments: benchmarks/kills.py, which the slow set runs.
@pytest.mark.ci
@pytest.mark.parametrize(
    "kill", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_where_it_was(whole, tmp_path, capsys, kill):
    """Ctrl-C saves and exits 130; after SIGKILL the steps since the last save are played again.

    The result is that of a run that never stopped.
    """
    process = start(tmp_path, eval__before=False)
    wait_for_step(tmp_path, process, 1)
    process.send_signal(kill)
    output, _ = process.communicate(timeout=120)
    if kill == signal.SIGINT:
        assert process.returncode == 130 and "interrupted: saved step" in output
    else:
        assert process.returncode == -kill

    train.train(small(), str(tmp_path))
    output = capsys.readouterr().out
    assert "resuming after step" in output and "attention of the update: xla" in output
    assert steps_of(tmp_path) == steps_of(whole)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(whole))


def without_step_4(whole, tmp_path):
    """A run of 4 steps as it was after 3, with no evaluation of step 4."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.rmtree(workdir / "eval" / "step_000004")
    return workdir


@pytest.mark.ci
def test_a_damaged_newest_checkpoint_costs_a_step_and_not_the_run(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    paths = (workdir / "checkpoints/4/state").rglob("*")
    files = [path for path in paths if path.is_file()]
    arrays = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(arrays.read_bytes())
    raw[len(raw) // 2] ^= 1
    arrays.write_bytes(raw)
    train.train(small(**NO_EVALUATION), str(workdir))
    said = capsys.readouterr().out
    assert "checkpoint 4 is damaged (" in said and "resuming after step 3" in said
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        "3",
        "4",
        "4.damaged",
    ]
    assert steps_of(workdir) == steps_of(whole)
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir), params_of(whole))


@pytest.mark.slow  # of the second set: a run that Ctrl-C stops goes on
def test_a_run_is_steered_in_its_middle_and_a_fork_is_the_run_steered_so(whole, tmp_path, capsys):
    workdir = without_step_4(whole, tmp_path)
    changes = {"learner__learning_rate": 1e-3, "game__noise_documents": 2, "learner__kl_coef": 0.0}
    config = small(**changes, **NO_EVALUATION, checkpoint__export="none")
    train.train(config, str(workdir))
    assert "from step 4 on learner.learning_rate is 0.001 and was 0.0003" in capsys.readouterr().out
    (changed,) = (row for row in all_rows_of(workdir) if "changes" in row)
    assert changed["step"] == 3 and changed["changes"]["learner.learning_rate"] == [3e-4, 1e-3]
    assert steps_of(workdir)[:3] == steps_of(whole)[:3]
    assert leaves_of(workdir, 4) != leaves_of(whole, 4)

    fork = tmp_path / "fork"
    train.train(config, str(fork), Origin(str(whole), 3))
    said = capsys.readouterr().out
    assert f"starting from {whole}@3" in said and "from step 4 on learner.kl_coef is 0.0" in said
    assert finished_steps(fork) == [3, 4]
    assert leaves_of(fork, 3) == leaves_of(whole, 3) and leaves_of(fork, 4) == leaves_of(workdir, 4)
    assert steps_of(fork) == steps_of(workdir)
    assert json.loads((fork / "config.json").read_text())["learner.kl_coef"] == 0.0
    # The same command finds its own run, another origin does not.
    check_origin(Origin(str(whole), None), str(fork), config, {})
    with pytest.raises(data.InputError, match=f"comes from {whole}@3; take another --workdir"):
        check_origin(Origin(str(whole), 4), str(fork), config, {})


def evaluated(workdir):
    return [row["step"] for row in rows_of(workdir) if "eval/average/right" in row]


@pytest.mark.ci
def test_an_evaluation_that_a_signal_ends_is_finished_when_the_run_goes_on(whole, tmp_path):
    workdir = without_step_4(whole, tmp_path)
    folder = workdir / "eval" / "step_000004"
    begun = []

    def interrupt():
        while not folder.exists():
            time.sleep(0.001)
        begun.extend(path.name.split(".")[0] for path in (workdir / "checkpoints").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    config = small(eval__every=4, eval__after=False, checkpoint__every=4, checkpoint__export="none")
    with pytest.raises(SystemExit, match="^0$"):
        train.train(config, str(workdir))
    thread.join()
    assert "4" in begun  # it is saved, or being saved, before it is evaluated
    assert (workdir / "checkpoints" / "4").exists() and evaluated(workdir) == [0]
    train.train(config, str(workdir))
    assert (
        evaluated(workdir) == [0, 4]
        and len((folder / "episodes.jsonl").read_text().splitlines()) == 8
    )
    # killed after the evaluation, before its step was saved
    shutil.rmtree(workdir / "checkpoints" / "4")
    train.train(config, str(workdir))
    assert (
        evaluated(workdir) == [0, 4]
        and len((folder / "episodes.jsonl").read_text().splitlines()) == 8
    )


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("proposer_first", marks=pytest.mark.slow),
        pytest.param("combined", marks=pytest.mark.ci),
    ],
)
def test_update_orders(tmp_path, order):
    changes = NO_EVALUATION | {"learner__update_order": order, "checkpoint__export": "none"}
    train.train(small(steps=1, **changes), str(tmp_path))
    (metrics,) = rows_of(tmp_path)
    assert any(key.startswith("update/both/") for key in metrics) == (order == "combined")


OWN = """
import json
from pathlib import Path

def given(question, answers, answer):
    return answer in answers or len(answer) > 2

class Search:
    def __init__(self, corpus, index):
        rows = map(json.loads, Path(corpus).read_text().splitlines())
        self.texts = [row["contents"] for row in rows]
        self.words = [set(text.lower().split()) for text in self.texts]

    def search(self, queries, top_k):
        return [self.best(set(query.lower().split()))[:top_k] for query in queries]

    def best(self, asked):
        rows = sorted(range(len(self.texts)), key=lambda row: -len(asked & self.words[row]))
        return [("own", self.texts[row]) for row in rows]
"""


@pytest.mark.ci
def test_a_metric_and_a_search_of_the_users_own_play_the_game(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    metric = f"{tmp_path}/own.py:given"
    own = {"reward__metric": metric, "eval__judge": metric, "log__episodes_every": 1}
    own |= {"retriever__kind": f"{tmp_path}/own.py:Search", "checkpoint__export": "none"}
    workdir = tmp_path / "run"
    train.train(small(steps=1, eval__before=False, **own), str(workdir))
    scores = json.loads((workdir / "eval/step_000001.json").read_text())
    assert scores["judge"] == "own.py:given" and scores["unjudged"] == 0
    lines = (workdir / "episodes/step_000001.jsonl").read_text().splitlines()
    games = [json.loads(line) for line in lines]
    found = [document for game in games for document in game["documents"]]
    assert found and {document["title"] for document in found} == {"own"}
    assert not (workdir / "index").exists()
    game = read_document(workdir / "checkpoints/1")["game"]
    assert f"{tmp_path}/own.py" in game["stamps"]


@pytest.mark.parametrize(
    ("order", "trained", "expected"),
    [
        ("solver_first", "both", [("solver", 2), ("proposer", 1)]),
        ("proposer_first", "both", [("proposer", 1), ("solver", 2)]),
        ("combined", "both", [("both", 2)]),
        ("solver_first", "proposer", [("proposer", 1)]),
        ("combined", "solver", [("solver", 2)]),
    ],
)
def test_updates_of_a_step_and_their_optimizer_steps(order, trained, expected):
    config = default.get_config()
    config.learner.update_order = order
    config.game.train = trained
    assert list(sections.updates(config).items()) == expected


@pytest.mark.ci
def test_roles_that_are_not_trained_do_not_move(tmp_path):
    """Solver-only with questions nobody verifies: no update at all."""
    changes = NO_EVALUATION | {"game__train": "solver", "rules__min_chars": 999}
    train.train(small(steps=1, **changes), str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), load_params(TINY))


@pytest.mark.ci
def test_updates_that_are_never_finite_stop_the_run(tmp_path):
    diverging = {
        "learner__learning_rate": 1.0,
        "learner__weight_decay": 100.0,
        "learner__warmup_steps": 0,
    }
    changes = {"eval__before": False, "learner__max_bad_updates": 1, **diverging}
    with pytest.raises(SystemExit, match="not finite"):
        train.train(small(**changes), str(tmp_path))


BROKEN = {
    "model.path": ("nowhere", "nowhere"),
    "data.answers": ("answers.jsonl", 'line 2: field "search_turns"'),
    "retriever.corpus": ("corpus.jsonl", "line 1"),
    "data.eval_sets.one_hop": ("qa.jsonl", "line 1"),
}


@pytest.mark.parametrize("key", sorted(BROKEN))
def test_bad_input_is_told_before_anything_compiles(tmp_path, key):
    (tmp_path / "answers.jsonl").write_text(
        '{"ground_truth": "x", "search_turns": 1}\n{"ground_truth": "y"}\n'
    )
    (tmp_path / "corpus.jsonl").write_text('{"id": "0"}\n')
    (tmp_path / "qa.jsonl").write_text("not json\n")
    name, expected = BROKEN[key]
    c = small()
    with c.unlocked():
        c.update_from_flattened_dict({key: str(tmp_path / name)})
    with pytest.raises(data.InputError, match=expected):
        train.train(c, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("game.batch_fill", "full", "periodic_reset"),
        ("learner.row_tokens", 128, "limits.prompt_tokens"),
        ("engine.cache_tokens", 256, "limits.verify_prompt_tokens"),
        ("learner.logprob_chunk", 100, "multiple"),
        ("engine.slots", 0, "more than 0"),
        ("engine.schedule", "fast", "expected one of pipelined, barrier"),
        ("sampling.top_p", 0.0, "more than 0, up to 1"),
        ("game.group_size", 513, "game.group_size is 513; expected at most 512"),
        ("game.resample_rounds", 512, "game.resample_rounds is 512; expected at most 511"),
        (
            "game.answers_per_step",
            (1 << 18) + 1,
            "makes 524290 attempts a step; expected at most 524288",
        ),
        ("engine.extend_buckets", (), "engine.extend_buckets is empty"),
        (
            "limits.observation_tokens",
            6,
            "limits.observation_tokens is 6; expected more than the 6 tokens",
        ),
        (
            "judge.max_tokens",
            512,
            "judge.max_tokens is 512; expected less than engine.cache_tokens = 448",
        ),
        (
            "learner.learning_rate",
            float("nan"),
            "learner.learning_rate is nan; expected a finite number",
        ),
        (
            "reward.invalid_question",
            float("inf"),
            "reward.invalid_question is inf; expected a finite number",
        ),
        ("sampling.temperature", 0.0, "sampling.temperature is 0.0; expected at least 0.01"),
        ("model.path", "", "expected a path"),
        ("data.answers", "", "data.answers is empty; expected a path"),
        ("data.eval_sets.one_hop", "", "data.eval_sets.one_hop is empty; expected a path"),
        (
            "data.eval_sets.average",
            "questions.jsonl",
            "data.eval_sets.average: expected a name that no other row has",
        ),
        ("mesh.tensor", 3, "divisor of 2"),
        ("mesh.tensor", 2, "there are 8 devices"),
        ("learner.rows", 3, "rows"),
    ],
)
def test_values_that_cannot_work_are_told(tmp_path, key, value, expected):
    needed = {"learner.rows": {"mesh.data": 2}, "judge.max_tokens": {"eval.judge": "policy"}}
    changes = {key: value} | needed.get(key, {})
    changes |= {"mesh.data": 3, "mesh.fsdp": -1} if expected.endswith("8 devices") else {}
    c = small()
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    with pytest.raises(data.InputError, match=expected):
        train.train(c, str(tmp_path / "run"))
    # so that the mended command is not another config's
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "index").exists()  # which may take hours


def test_the_judge_of_evaluations_is_asked_before_anything_is_played(tmp_path):
    changes = {
        "eval.judge": "openai",
        "judge.url": "http://127.0.0.1:1/v1",
        "judge.model": "m",
        "judge.retries": 0,
    }
    c = small(eval__before=False)
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    with pytest.raises(data.InputError, match="judge.url"):
        train.train(c, str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_truncation_that_the_trainer_does_not_know_of_is_told():
    def advised(**changes):
        return advice(small(**changes), "cpu")

    assert advised() == []
    for key, value in (("top_k", 20), ("top_p", 0.9)):
        changes = {f"sampling__{key}": value}
        assert "learner.old_logprobs=recompute" in advised(**changes)[0]
        assert advised(**changes, learner__old_logprobs="recompute") == []


def test_an_e5_encoder_without_its_prefixes_is_told():
    values = {"retriever__kind": "dense", "retriever__encoder": "models/e5-base-v2"}
    assert "'query: '" in advice(small(**values), "cpu")[0]
    assert advice(small(**values, retriever__query_prefix="query: "), "cpu") == []


def test_a_cpu_is_advised_to_compute_in_float32():
    halves = small(model__dtype="bfloat16")
    assert "model.dtype=float32 is faster" in advice(halves, "cpu")[0]
    assert advice(halves, "gpu") == []


def test_a_model_that_cannot_be_used_is_told_before_the_index_is_built(tmp_path):
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    norm = "model.norm.weight"
    text = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(
        json.dumps(json.loads(text) | {"chat_template": None})
    )
    for expected in ("has no chat template", f'tensor "{norm}" has shape'):
        with pytest.raises(data.InputError, match=expected):
            train.train(small(model__path=str(model)), str(tmp_path / "run"))
        (model / "tokenizer_config.json").write_text(text)
        edit_tensors(model, **{norm: np.ones(5, np.float32)})
    assert not (tmp_path / "run" / "index").exists()


def test_every_choice_names_a_key():
    assert CHOICES.keys() <= default_values().keys()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
