"""What a run checks and reads before anything is compiled: files, search, mesh. What takes long
comes last.

All processes of a run do it together: what one of them is told all are told, and they must be about
to do the same.
"""

import dataclasses
import functools
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssp_jax import data, stamps
from ssp_jax.config import check_values, flatten_config
from ssp_jax.data import Task
from ssp_jax.errors import InputError
from ssp_jax.evaluation import scores
from ssp_jax.game import judge, prompts, roles
from ssp_jax.model import decoder, hf_load, hf_save, sharding
from ssp_jax.retriever.build import ensure_index
from ssp_jax.retriever.remote import RemoteRetriever
from ssp_jax.retriever.search import Search, open_retriever
from ssp_jax.runtime import processes
from ssp_jax.workdir import check_unchanged, check_workdir


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the files say, the judge's server, and the search."""

    tasks: list[Task]  # none in an evaluation
    eval_sets: dict[str, list[Task]]
    retriever: Search
    model_config: decoder.ModelConfig
    weights: str  # digest of the initial ones
    tokenizer: Any
    stage: roles.EpisodeContext
    eos: tuple[int, ...]
    server: judge.OpenAI | None  # where one is asked
    stamps: dict[str, str]  # digests of the files that training depends on

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What the files say, and what is searched: a short digest of each, under a name for
        people.

        The processes of a run compare these, and a repeated evaluation. A resumed run compares
        files (stamps.py), before the index is built: it names the one that has changed.
        """
        backend = self.tokenizer.backend_tokenizer.to_str()
        tokenizer = (
            backend,
            self.tokenizer.chat_template,
            self.tokenizer.special_tokens_map,
            self.eos,
        )
        asked = prompts.solver_messages(self.stage.style, "Who?")  # worked example included
        found = {
            "data.answers": self.tasks,
            "data.eval_sets": self.eval_sets,
            "the model's shape": self.model_config,
            "the tokenizer": tokenizer,
            "the prompts": (self.stage.style, self.stage.template, asked),
            "the search": self.retriever.source,
        }
        return {name: processes.digest(value) for name, value in found.items()} | {
            "the weights": self.weights
        }


def read_inputs(config: ConfigDict, workdir: str, *, evaluating: bool = False) -> Inputs:
    """Checks and reads it all, the processes together. Last the search index, which may be built,
    for hours, and then takes the place of the one before: a command that is refused must not
    come so far.
    """

    def of_search() -> dict[str, str]:
        return stamps.of_search(config.retriever, index_folder(config.retriever, workdir))

    def files() -> dict[str, Any]:
        check_values(config, evaluating=evaluating)
        if evaluating and not config.data.eval_sets:
            raise InputError(
                "config section data.eval_sets is empty; expected --config.data.eval_sets.NAME=FILE"
            )
        if scores.AVERAGE in config.data.eval_sets:
            raise InputError(
                f"config key data.eval_sets.{scores.AVERAGE}: expected a name that no other row has"
            )
        check_workdir(workdir, config, evaluating=evaluating)
        if config.checkpoint.export and not evaluating:
            hf_save.check_place(Path(workdir) / hf_save.FOLDER)
        found = _read_files(config, evaluating)
        if processes.is_coordinator() and not evaluating:
            # Before the index of a changed corpus is built, for hours, and takes the place of the
            # one before.
            check_unchanged(workdir, lambda: found["stamps"] | of_search())
        return found

    found = processes.run_on_all(files, _settings(config))
    processes.run_on_all(lambda: make_mesh(config))
    server = processes.run_on_all(lambda: _open_judge(config, found, evaluating))
    asked = found["tasks"] or next(iter(found["eval_sets"].values()))
    search = open_search(config.retriever, workdir, asked)
    if not evaluating:
        found["stamps"] |= of_search()
    return Inputs(**found, server=server, retriever=search)


def _read_files(config: ConfigDict, evaluating: bool) -> dict[str, Any]:
    """The fields of Inputs, but for the servers."""
    model_config = hf_load.read_config(config.model.path)
    tokenizer = hf_load.load_tokenizer(config.model.path)
    stage = make_stage(config, tokenizer)
    roles.check_stage(stage)
    kv_heads = model_config.num_kv_heads
    if config.mesh.tensor > 0 and kv_heads % config.mesh.tensor:
        raise InputError(
            f"config key mesh.tensor is {config.mesh.tensor}; expected a divisor of {kv_heads} key/value heads"
        )
    sets = data.load_question_sets(config.data.eval_sets)
    sets = {
        name: data.sample(questions, config.eval.max_questions) for name, questions in sets.items()
    }
    roles.check_rows("questions of data.eval_sets", sum(map(len, sets.values())))
    rows = hf_load.check_tensors(config.model.path, model_config)
    weight_files = stamps.of_weights(config.model.path)
    return {
        "tasks": [] if evaluating else data.load_answers(config.data.answers),
        "eval_sets": sets,
        "model_config": model_config,
        "weights": processes.digest((rows, sorted(weight_files.values()))),
        "tokenizer": tokenizer,
        "stage": stage,
        "eos": roles.eos_tokens(tokenizer, hf_load.read_generation_config(config.model.path)),
        "stamps": {} if evaluating else weight_files | stamps.of_files(config),
    }


def _open_judge(config: ConfigDict, found: dict[str, Any], evaluating: bool) -> judge.OpenAI | None:
    """What would keep a judge from judging is told now."""
    c, kinds = config.eval, set()
    if evaluating or (found["eval_sets"] and (c.before or c.every or c.after)):
        kinds.add(c.judge)
    if not evaluating:
        kinds.add(config.reward.metric)
    if "policy" in kinds:
        judge.check_policy(found["stage"])
    return judge.open_server(config.judge) if "openai" in kinds else None


def index_folder(c: ConfigDict, workdir: str) -> str:
    """Of section retriever."""
    return c.index or str(Path(workdir) / "index")


def open_search(c: ConfigDict, workdir: str, tasks: list[Task]) -> Search:
    """Of several processes the first one builds a missing index: a lock file tells nothing to
    another host.
    """
    if c.kind == "http":
        probes = [task.question or task.answers[0] for task in tasks[:64]]
        remote = functools.partial(
            RemoteRetriever, top_k=c.top_k, timeout_s=c.timeout_s, retries=c.retries
        )
        return processes.run_on_all(lambda: remote(c.url, probes))
    index = index_folder(c, workdir)
    settings = {"stemmer": c.stemmer, "stopwords": c.stopwords, "k1": c.k1, "b": c.b}
    if processes.is_multiprocess():
        processes.run_on_coordinator(lambda: ensure_index(c.corpus, index, **settings))
    return processes.run_on_all(
        lambda: open_retriever(c.corpus, index, **settings, threads=c.threads)
    )


def _settings(config: ConfigDict) -> dict[str, Any]:
    """What must be the same on all processes before any of them does anything."""
    if not processes.is_multiprocess():
        return {}
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "bm25s")
    facts = {f"config key {key}": value for key, value in flatten_config(config).items()}
    facts |= {f"version of {name}": importlib.metadata.version(name) for name in packages}
    return facts | {
        "version of Python": sys.version.split()[0],
        "number of devices": jax.local_device_count(),
    }


def evaluation_inputs(config: ConfigDict, inputs: Inputs) -> dict[str, str]:
    """Of the digests, those that an evaluation's episodes depend on, and one of the config keys
    that they do.
    """
    sampling = config.sampling
    settings = {
        "limits": config.limits.to_dict(),
        "retriever.top_k": config.retriever.top_k,
        "model.dtype": config.model.dtype,
        "sampling": (sampling.eval_temperature, sampling.top_k, sampling.top_p),
        "seed": config.seed,
    }
    # of a question each episode knows the words itself
    unasked = ("data.answers", "data.eval_sets")
    found = {name: digest for name, digest in inputs.digests.items() if name not in unasked}
    return found | {"the settings": processes.digest(settings)}


def check_same_inputs(inputs: Inputs, more: dict[str, Any]) -> None:
    """Nothing begins before all processes have been found to be about to do the same."""
    if not processes.is_multiprocess():
        return
    facts = {f"{name} (a digest)": digest for name, digest in inputs.digests.items()}
    processes.all_gather_objects(
        lambda: None, facts | {"the number of passages": len(inputs.retriever)} | more
    )


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config; what is split over it must divide."""
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.playing_meshes(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, number in (
        ("learner.rows", config.learner.rows),
        ("engine.slots", config.engine.slots),
    ):
        if number % parts:
            raise InputError(
                f"config key {key} is {number}; expected a multiple of mesh.data * mesh.fsdp = {parts}"
            )
    return mesh


def make_stage(config: ConfigDict, tokenizer: Any) -> roles.EpisodeContext:
    p, limits = config.prompt, roles.Limits(**config.limits)
    style = dataclasses.replace(prompts.STYLES[p.style], worked_example=p.worked_example)
    stage = roles.EpisodeContext(tokenizer, style, p.template, limits)
    least = len(stage.encode(style.observation_text.format(documents="")))
    if limits.observation_tokens <= least:
        raise InputError(
            f"config key limits.observation_tokens is {limits.observation_tokens}; expected more than the {least} "
            "tokens of the tags around a result"
        )
    return stage
