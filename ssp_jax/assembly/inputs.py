"""What a run reads before anything is compiled: files, search, mesh; what takes long comes last.

All processes of a run read together: an error of one is raised by all, and they must be about to
do the same.
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
from ssp_jax.assembly.judges import open_judges
from ssp_jax.assembly.model_files import ModelInputs, read_model_files
from ssp_jax.assembly.search import open_search, stamps_of_search
from ssp_jax.assembly.sections import make_mesh
from ssp_jax.config.checks import check_values
from ssp_jax.config.command_line import Origin
from ssp_jax.config.derived import export_kind
from ssp_jax.config.keys import flatten_config
from ssp_jax.data import Task
from ssp_jax.errors import InputError
from ssp_jax.evaluation import scores
from ssp_jax.game import judge, prompts, roles
from ssp_jax.model import hf_save
from ssp_jax.retriever.search import Searcher
from ssp_jax.runtime import device_memory, processes
from ssp_jax.user_code import load as user_code
from ssp_jax.workdir import check_origin, check_unchanged, check_workdir


@dataclasses.dataclass(frozen=True)
class Files:
    """What the files say."""

    model: ModelInputs
    tasks: list[Task]  # none in an evaluation
    eval_sets: dict[str, list[Task]]
    stamps: dict[str, str]  # digests of the files that training depends on


@dataclasses.dataclass(frozen=True)
class Inputs(Files):
    """What the files say, the judge's server, and the search."""

    judges: dict[str, judge.Judge]  # those that need no engine, by metric
    retriever: Searcher

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Short digests of what the files say and of what is searched, by names for people.

        The processes of a run compare these, and so does a repeated evaluation. A resumed run
        compares files (stamps.py), before the index is built: it names the one that has changed.
        """
        tokenizer = self.model.tokenizer
        backend = tokenizer.backend_tokenizer.to_str()
        template = tokenizer.chat_template
        context = self.model.context
        asked = prompts.solver_messages(context.style, "Who?", context.example_sets[0])
        values = {
            "data.answers": self.tasks,
            "data.eval_sets": self.eval_sets,
            "the model's shape": self.model.config,
            "the tokenizer": (backend, template, tokenizer.special_tokens_map, self.model.eos),
            "the prompts": (context.style, context.template, asked, context.tell_repeats),
            "the search": self.retriever.source,
        }
        digests = {name: processes.digest(value) for name, value in values.items()}
        return digests | {"the weights": self.model.weights_digest}


def read_inputs(
    config: ConfigDict, workdir: str, origin: Origin | None = None, *, evaluating: bool = False
) -> Inputs:
    """Checks and reads all inputs, on all processes together. Raises InputError.

    origin: the run that a new one starts from. The search index comes last: it may be built, for
    hours, and then takes the place of the one before. A command that is refused must not come so
    far.
    """

    def of_search() -> dict[str, str]:
        return stamps_of_search(config.retriever, workdir)

    def files() -> Files:
        check_values(config, evaluating=evaluating)
        _check_eval_sets(config, evaluating)
        check_workdir(workdir, config, evaluating=evaluating)
        if export_kind(config) != "none" and not evaluating:
            hf_save.check_place(Path(workdir) / hf_save.FOLDER)
        found = _read_files(config, evaluating)
        if processes.is_coordinator() and not evaluating:
            # Before the index of a changed corpus is built, for hours, and takes the place of the
            # one before.
            check_unchanged(workdir, lambda: found.stamps | of_search(), config)
            if origin is not None:
                check_origin(origin, workdir, config, found.stamps)
        return found

    found = processes.run_on_all(files, _shared_facts(config))
    processes.run_on_all(lambda: _check_devices(config))
    judges = processes.run_on_all(
        lambda: open_judges(config, found.model.context, found.eval_sets, evaluating)
    )
    asked = found.tasks or next(iter(found.eval_sets.values()))
    search = open_search(config.retriever, workdir, asked)
    if not evaluating:
        found = dataclasses.replace(found, stamps=found.stamps | of_search())
    return Inputs(**vars(found), judges=judges, retriever=search)


def _check_devices(config: ConfigDict) -> None:
    make_mesh(config)
    check_cache(config.engine.kv_cache_gib, jax.default_backend(), device_memory.free_bytes())


def check_cache(gib: float, platform: str, free: int | None) -> None:
    """Raises InputError where the cache shall take what is free, and nobody knows how much is.

    gib: engine.kv_cache_gib. free: bytes of a device, None where devices do not report it. On CPUs
    the cache takes what all slots can need.
    """
    if not gib and platform != "cpu" and free is None:
        raise InputError(
            "config key engine.kv_cache_gib is 0; expected GiB of keys and values on a device, as "
            "plan prints them, for these devices do not report what is free"
        )


def _check_eval_sets(config: ConfigDict, evaluating: bool) -> None:
    names = config.data.eval_sets
    if evaluating and not names:
        raise InputError(
            "config section data.eval_sets is empty; expected --config.data.eval_sets.NAME=FILE"
        )
    if scores.AVERAGE in names:
        raise InputError(
            f"config key data.eval_sets.{scores.AVERAGE}: expected a name that no other row has"
        )


def _check_best(config: ConfigDict, sets: list[str]) -> None:
    """Raises InputError where checkpoint.keep_best names no set, or none is ever evaluated."""
    name = config.checkpoint.keep_best
    if name and name not in (*sets, scores.AVERAGE):
        known = ", ".join((scores.AVERAGE, *sets))
        raise InputError(f"config key checkpoint.keep_best is {name!r}; expected one of {known}")
    if name and not (sets and config.eval.every):
        raise InputError(
            f"config key checkpoint.keep_best is {name!r}; expected question sets, and an "
            "eval.every that is not 0, for it needs scores"
        )


def _read_files(config: ConfigDict, evaluating: bool) -> Files:
    model = read_model_files(config, evaluating=evaluating)
    sets = data.load_question_sets(config.data.eval_sets)
    for name, questions in sets.items():
        sets[name] = data.subsample(questions, config.eval.max_questions)
    roles.check_rows("questions of data.eval_sets", sum(map(len, sets.values())))
    if not evaluating:
        _check_best(config, list(sets))
    tasks: list[Task] = []
    training_files: dict[str, str] = {}
    if not evaluating:
        tasks = data.load_answers(config.data.answers)
        training_files = model.stamps | stamps.of_files(config.model.path, config.data.answers)
        if user_code.is_one(config.reward.metric):
            training_files |= stamps.of_code(config.reward.metric)
    return Files(model, tasks, sets, training_files)


def _shared_facts(config: ConfigDict) -> dict[str, Any]:
    """Facts that must be the same on all processes before any of them does anything."""
    if not processes.is_multiprocess():
        return {}
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "bm25s")
    facts = {f"config key {key}": value for key, value in flatten_config(config).items()}
    facts |= {f"version of {name}": importlib.metadata.version(name) for name in packages}
    facts["version of Python"] = sys.version.split()[0]
    facts["number of devices"] = jax.local_device_count()
    return facts


def check_same_inputs(inputs: Inputs, more: dict[str, Any]) -> None:
    """Raises InputError unless all processes are about to do the same. more: further facts."""
    if not processes.is_multiprocess():
        return
    facts: dict[str, Any] = {
        f"{name} (a digest)": digest for name, digest in inputs.digests.items()
    }
    facts["the number of passages"] = len(inputs.retriever)
    processes.all_gather_objects(lambda: None, facts | more)
