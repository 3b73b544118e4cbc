"""Files as a crash, a bad disk or another program leaves them: each reader of the product either
reads them or says that it can't, in one sentence. No other exception, no warning, and no end of
the process.
"""

import dataclasses
import gzip
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import default
from ssp_jax import data
from ssp_jax.config.checks import check_numbers
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.config.files import load_config
from ssp_jax.config.keys import flatten_config
from ssp_jax.errors import InputError
from ssp_jax.evaluation import evaluate
from ssp_jax.generate import ask
from ssp_jax.model import hf_adapter, hf_load
from ssp_jax.report import page as report
from ssp_jax.retriever import build
from ssp_jax.retriever.index import write_meta
from ssp_jax.retriever.search import Retriever
from ssp_jax.runtime.checkpoint import Checkpoints
from ssp_jax.runtime.logger import Logger
from ssp_jax.workdir import check_workdir
from tests.conftest import ROOT
from tests.mutations import mutate
from tests.report.test_report import game, run_folder

TINY = ROOT / "assets/tiny"


@dataclass(frozen=True)
class Reader:
    """One file of a whole folder, and what reads it."""

    name: str
    make: Callable[[Path], object]  # fills an empty folder
    file: str  # that is changed; of several that match the first
    read: Callable[[Path], object]  # of the folder, as a command does
    kind: str = "json"  # of file: a key of mutations.KINDS, or gzip
    examples: int = 40


# --- answers, questions, corpora ------------------------------------------------------------------


def lines(name: str, *rows: Any) -> Callable[[Path], object]:
    text = "".join(
        (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    ).encode()
    return lambda folder: (folder / name).write_bytes(
        gzip.compress(text, mtime=0) if name.endswith(".gz") else text
    )


def parquet(*rows: Any) -> Callable[[Path], object]:
    table = pyarrow.Table.from_pylist(list(rows))
    return lambda folder: pyarrow.parquet.write_table(table, folder / "f.parquet")


ANSWERS = ({"ground_truth": "Paris", "search_turns": 2, "sys_question_example": "1. Who?"},) * 3
PROMPT = [{"role": "user", "content": [{"type": "text", "text": "Answer. Question: who?"}]}]
QUESTIONS = (
    {"question": "Capital of France?", "golden_answers": ["Paris", "City of Paris"]},
    {"question": "Capital of France?", "possible_answers": '["Paris", "City of Paris"]'},
    {
        "data_source": "nq",
        "prompt": PROMPT,
        "reward_model": {"ground_truth": {"target": ["Paris"]}},
    },
    {
        "data_source": "hq",
        "reward_model": {"ground_truth": "Paris"},
        "extra_info": {"question": "Who?"},
    },
)
PASSAGES = (
    {"id": "0", "contents": '"Paris"\nParis is a city.'},
    {"id": 1, "title": "Rome", "text": "Rome is a city too."},
    {"id": "2", "contents": "Oslo, a city in Norway"},
)


def answers(name: str) -> Callable[[Path], object]:
    return lambda folder: data.load_answers(folder / name)


def questions(name: str) -> Callable[[Path], object]:
    return lambda folder: data.load_question_sets({"set": str(folder / name)})


def corpus(name: str) -> Callable[[Path], object]:
    return lambda folder: list(data.iterate_corpus(folder / name))


DATA = [
    Reader("answers", lines("f.jsonl", *ANSWERS), "f.jsonl", answers("f.jsonl"), "lines", 150),
    Reader(
        "answers in text", lines("f.txt", "Paris", "Röm", "[x]"), "f.txt", answers("f.txt"), "lines"
    ),
    Reader(
        "answers in parquet", parquet(*ANSWERS), "f.parquet", answers("f.parquet"), "bytes", 100
    ),
    Reader(
        "questions", lines("f.jsonl", *QUESTIONS), "f.jsonl", questions("f.jsonl"), "lines", 200
    ),
    Reader(
        "questions in parquet",
        parquet(QUESTIONS[2]),
        "f.parquet",
        questions("f.parquet"),
        "bytes",
        100,
    ),
    Reader("a corpus", lines("f.jsonl", *PASSAGES), "f.jsonl", corpus("f.jsonl"), "lines", 100),
    Reader(
        "a packed corpus",
        lines("f.jsonl.gz", *PASSAGES),
        "f.jsonl.gz",
        corpus("f.jsonl.gz"),
        "gzip",
        100,
    ),
]


# --- model folders --------------------------------------------------------------------------------


def golden(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/goldens/qwen2_untied", folder, dirs_exist_ok=True)
    ends = {"eos_token_id": [1, 2], "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(ends))


def sharded(folder: Path) -> None:
    golden(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    owners = {}
    for number, names in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        owners |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def tokenizer(folder: Path) -> None:
    shutil.copytree(TINY / "model", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()


def read_config(folder: Path) -> None:
    hf_load.read_config(folder)
    hf_load.context_tokens(folder)
    hf_load.read_generation_config(folder)


def read_weights(folder: Path) -> None:
    model = hf_load.read_config(folder)
    hf_load.check_tensors(folder, model)
    hf_load.load(folder, model, None, jnp.float32)


def read_tokenizer(folder: Path) -> None:
    context = ask.make_context(hf_load.load_tokenizer(folder), 10)
    context.prompt([{"role": "user", "content": "Who?"}])


def golden_adapter(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/goldens/qwen3_rslora", folder, dirs_exist_ok=True)


def read_adapter(folder: Path) -> None:
    base = hf_load.read_config(ROOT / "tests/goldens/qwen3")
    config = dataclasses.replace(base, lora=hf_adapter.read(folder, base).lora)
    hf_adapter.check_tensors(folder, config)
    params = hf_adapter.load(folder, config, None, jnp.float32)
    assert len(jax.tree.leaves(params)) == 4


MODELS = [
    Reader("adapter_config.json", golden_adapter, "adapter_config.json", read_adapter, "json", 150),
    Reader(
        "an adapter",
        golden_adapter,
        "adapter_model.safetensors",
        read_adapter,
        "safetensors",
        100,
    ),
    Reader("config.json", golden, "config.json", read_config, "json", 150),
    Reader("generation_config.json", golden, "generation_config.json", read_config, "json", 60),
    Reader("weights", golden, "model.safetensors", read_weights, "safetensors", 60),
    Reader(
        "an index of weights", sharded, "model.safetensors.index.json", read_weights, "json", 40
    ),
    Reader(
        "a part of the weights",
        sharded,
        "model-00002-of-00002.safetensors",
        read_weights,
        "safetensors",
        20,
    ),
    Reader("tokenizer.json", tokenizer, "tokenizer.json", read_tokenizer, "json", 12),
    Reader("tokenizer_config.json", tokenizer, "tokenizer_config.json", read_tokenizer, "json", 20),
]


# --- an index of passages -------------------------------------------------------------------------


def built(folder: Path) -> None:
    lines("corpus.jsonl", *PASSAGES * 3)(folder)
    where = folder / "corpus.jsonl", folder / "index"
    build.build_index(*where, stemmer="english", stopwords="en", k1=1.5, b=0.75)


def search(folder: Path) -> None:
    found = Retriever.load(folder / "index", threads=1)
    found.search(["city of Paris", "Rome", "", "nothing"], 5)


def search_signed(folder: Path) -> None:
    """The index of a stranger: sizes and sums agree with the files, only their content is wrong."""
    path = folder / "index/meta.json"
    meta = json.loads(path.read_text())
    if all(file.stat().st_size for file in path.parent.iterdir()):  # an empty one has no sum
        path.unlink()
        write_meta(path.parent, meta)
    search(folder)


ARRAYS = (
    "offsets",
    "line_sums",
    "highest",
    "data.csc.index",
    "indices.csc.index",
    "indptr.csc.index",
)
INDEX = [
    Reader("meta.json of an index", built, "index/meta.json", search, "json", 60),
    Reader("words of an index", built, "index/vocab.index.json", search_signed, "json", 30),
    Reader("passages of an index", built, "index/passages.jsonl", search_signed, "lines", 40),
    Reader("an index that changed", built, "index/passages.jsonl", search, "lines", 20),
    *(
        Reader(f"{name} of an index", built, f"index/{name}.npy", search_signed, "npy", 40)
        for name in ARRAYS
    ),
]


# --- what a run keeps -----------------------------------------------------------------------------

GAMES = [(1, [game(), game(fault="too_short")])]
KEPT = {
    "set": "nq",
    "row": 0,
    "question": "Who?",
    "answers": ["x"],
    "of": {},
    "answer": "y",
    "searches": ["z"],
}
KEPT |= {
    "tokens": 7,
    "length": 9,
    "stop_reason": "answer",
    "process": "episodes",
    "began": 1.0,
    "seconds": 2.0,
}


def run(folder: Path) -> None:
    run_folder(folder, games=GAMES)
    workdir(folder)


def read_report(folder: Path) -> None:
    report.read_metrics(folder)
    report.read_evaluations(folder)
    report.read_config(folder)
    report.read_games(folder, 10)


def go_on_logging(folder: Path) -> None:
    with Logger(str(folder), 3, tensorboard=False, resume_step=2) as logger:
        logger.say("goes on")


def play_again() -> None:
    raise InputError("an episode is played again")


def evaluate_again(folder: Path) -> None:
    with Logger(str(folder), 0, tensorboard=False) as logger:
        empty: dict[str, Any] = dict.fromkeys(
            f.name for f in dataclasses.fields(evaluate.EvalContext)
        )
        sets = {"nq": [data.Task(0, ("x",), "Who?")]}
        given_ = {
            "folder": folder / "eval",
            "inputs": {},
            "training": "",
            "sets": sets,
            "metric": "em",
            "logger": logger,
        }
        evaluate.evaluate(evaluate.EvalContext(**(empty | given_)), 0, "weights", play_again)


def evaluated(folder: Path) -> None:
    (folder / "eval/step_000000").mkdir(parents=True)
    lines("eval/step_000000/episodes.jsonl", KEPT, KEPT)(folder)


def workdir(folder: Path) -> None:
    flat = flatten_config(default.get_config())
    (folder / "config.json").write_text(json.dumps(flat, indent=1))


STATE = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "updates": jnp.zeros((), jnp.int32)}
GAME = {"memory": {"pool": [["Who?", ["x"]]]}, "seconds": 1.5}


def save(folder: Path) -> None:
    with Checkpoints(str(folder), every=1, keep=2) as checkpoints:
        checkpoints.save(1, STATE, GAME)


def restore(folder: Path) -> None:
    """Bitwise or not at all."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
    )
    with Checkpoints(str(folder), every=1, keep=2) as checkpoints:
        found = checkpoints.restore_newest(like)
    if found is not None:
        assert found.game == GAME
        jax.tree.map(np.testing.assert_array_equal, found.state, STATE)


STEP_FILES = {
    "game/metadata": "json",
    "state/_METADATA": "json",
    "state/manifest.ocdbt": "bytes",
    "state/d/*": "bytes",
    "state/ocdbt.process_0/d/*": "bytes",
}
RUNS = [
    *(
        Reader(f"a step's {file}", save, f"checkpoints/1/{file}", restore, kind, 10)
        for file, kind in STEP_FILES.items()
    ),
    Reader("metrics of a report", run, "metrics.jsonl", read_report, "lines", 80),
    Reader("metrics of a run that goes on", run, "metrics.jsonl", go_on_logging, "lines", 60),
    Reader("games", run, "episodes/step_000001.jsonl", read_report, "lines", 60),
    Reader("scores", run, "eval/step_000003.json", read_report, "json", 60),
    Reader("a run's config in a report", run, "config.json", read_report, "json", 40),
    Reader(
        "a run's config",
        workdir,
        "config.json",
        lambda f: check_workdir(str(f), default.get_config()),
        "json",
        60,
    ),
    Reader(
        "episodes of an evaluation",
        evaluated,
        "eval/step_000000/episodes.jsonl",
        evaluate_again,
        "lines",
        60,
    ),
]


# --- flags and config files -----------------------------------------------------------------------

FLAGS = (
    *(
        "--config=configs/default.py",
        "--workdir=run",
        "--mode=eval",
        "--config.steps=3",
        "--noconfig.eval.before",
    ),
    *(
        "--config.data.eval_sets.nq=f",
        "--config.engine.cache_buckets=(1, 2)",
        "--config.learner.clip_low",
        "0.5",
    ),
)


def parse_flags(folder: Path) -> None:
    argv = (folder / "flags").read_bytes().decode("utf-8", "surrogateescape").splitlines()
    check_numbers(parse_command_line(argv).config)


def config_file(folder: Path) -> None:
    shutil.copy(ROOT / "configs/tiny.py", folder / "mine.py")


COMMANDS = [
    Reader("flags", lines("flags", *FLAGS), "flags", parse_flags, "lines", 60),
    Reader(
        "a config file",
        config_file,
        "mine.py",
        lambda f: load_config(f / "mine.py"),
        "lines",
        60,
    ),
]

READERS: Sequence[Reader] = (*DATA, *MODELS, *INDEX, *RUNS, *COMMANDS)


def check(reader: Reader, folder: Path) -> None:
    """Reads the whole file, and then as many mutations of it as its reader has examples."""
    reader.make(folder)
    reader.read(folder)
    path = sorted(folder.glob(reader.file))[0]
    raw = path.read_bytes()

    @settings(max_examples=reader.examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def read_one(seed: int) -> None:
        path.write_bytes(mutate(random.Random(seed), raw, reader.kind))
        try:
            reader.read(folder)
        except InputError as error:
            assert str(error).strip()

    read_one()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_changed_file_is_read_or_told(reader: Reader, tmp_path: Path) -> None:
    check(reader, tmp_path)
