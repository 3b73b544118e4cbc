"""Builds the parts of a run from its config. Below this module only typed sections are read.

First the inputs, before anything is compiled: files, search, mesh; what takes long comes last. All
processes of a run read them together: an error of one is raised by all, and they must be about to
do the same.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax import data, stamps, trackers
from ssp_jax.config import Origin, check_values, export_kind, flatten_config
from ssp_jax.data import Task
from ssp_jax.errors import InputError, printable
from ssp_jax.evaluation import conditions, scores
from ssp_jax.evaluation.evaluate import EvalContext
from ssp_jax.game import judge, prompts, roles, rules
from ssp_jax.game.examples import example_sets
from ssp_jax.game.rounds import ReplayState
from ssp_jax.game.selfplay import SelfPlay
from ssp_jax.learner.batches import Batch
from ssp_jax.learner.state import LearnerConfig, TrainState, init_state
from ssp_jax.learner.update import MEMORY_REMEDY, Learner, check_attention
from ssp_jax.model import attention, decoder, hf_adapter, hf_load, hf_save, sharding
from ssp_jax.model.decoder import Params
from ssp_jax.model.linear import Lora
from ssp_jax.model.weights import FullWeights, LoraWeights, Weights
from ssp_jax.retriever import dense, encoder_files
from ssp_jax.retriever.build import ensure_index
from ssp_jax.retriever.dense_build import ensure_vectors
from ssp_jax.retriever.remote import RemoteRetriever
from ssp_jax.retriever.search import Searcher
from ssp_jax.retriever.settings import KINDS, DenseSettings, EncoderKeys
from ssp_jax.rollout.engine import Engine, SearchFn, Sizes
from ssp_jax.rollout.sampling import ALL_TOKENS, Truncation
from ssp_jax.runtime import device_memory, processes
from ssp_jax.runtime.checkpoint import Checkpoints, Damaged, Restored
from ssp_jax.runtime.logger import CompileCounter, Logger
from ssp_jax.user_code import load as user_code
from ssp_jax.user_code.metric import Function
from ssp_jax.user_code.search import UserRetriever
from ssp_jax.workdir import (
    Change,
    changes_of,
    changes_since,
    check_origin,
    check_unchanged,
    check_workdir,
    copy_metrics,
    keep_compiled,
    keep_config,
    lock_workdir,
    made_workdir,
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the files say, the judge's server, and the search."""

    tasks: list[Task]  # none in an evaluation
    eval_sets: dict[str, list[Task]]
    retriever: Searcher
    model_config: decoder.ModelConfig
    weights: str  # digest of the initial ones
    tokenizer: Any
    context: roles.EpisodeContext
    eos: tuple[int, ...]
    judges: dict[str, judge.Judge]  # those that need no engine, by metric
    stamps: dict[str, str]  # digests of the files that training depends on

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Short digests of what the files say and of what is searched, by names for people.

        The processes of a run compare these, and so does a repeated evaluation. A resumed run
        compares files (stamps.py), before the index is built: it names the one that has changed.
        """
        backend = self.tokenizer.backend_tokenizer.to_str()
        tokenizer = (
            backend,
            self.tokenizer.chat_template,
            self.tokenizer.special_tokens_map,
            self.eos,
        )
        context = self.context
        asked = prompts.solver_messages(context.style, "Who?", context.example_sets[0])
        values = {
            "data.answers": self.tasks,
            "data.eval_sets": self.eval_sets,
            "the model's shape": self.model_config,
            "the tokenizer": tokenizer,
            "the prompts": (context.style, context.template, asked, context.tell_repeats),
            "the search": self.retriever.source,
        }
        digests = {name: processes.digest(value) for name, value in values.items()}
        return digests | {"the weights": self.weights}


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the files of the model and of its adapter say."""

    config: decoder.ModelConfig
    tokenizer: Any
    context: roles.EpisodeContext
    eos: tuple[int, ...]
    weights: str  # digest of the initial ones
    stamps: dict[str, str]  # digests of the files of weights, by name


def read_inputs(
    config: ConfigDict, workdir: str, origin: Origin | None = None, *, evaluating: bool = False
) -> Inputs:
    """Checks and reads all inputs, on all processes together. Raises InputError.

    origin: the run that a new one starts from. The search index comes last: it may be built, for
    hours, and then takes the place of the one before. A command that is refused must not come so
    far.
    """

    def of_search() -> dict[str, str]:
        c = config.retriever
        if user_code.is_one(c.kind):
            corpus = stamps.of_index(c.corpus, "") if c.corpus else {}
            return corpus | stamps.of_code(c.kind)
        return {} if c.kind == "http" else stamps.of_index(c.corpus, index_folder(c, workdir))

    def files() -> dict[str, Any]:
        check_values(config, evaluating=evaluating)
        _check_eval_sets(config, evaluating)
        check_workdir(workdir, config, evaluating=evaluating)
        if export_kind(config) != "none" and not evaluating:
            hf_save.check_place(Path(workdir) / hf_save.FOLDER)
        found = _read_files(config, evaluating)
        if processes.is_coordinator() and not evaluating:
            # Before the index of a changed corpus is built, for hours, and takes the place of the
            # one before.
            check_unchanged(workdir, lambda: found["stamps"] | of_search(), config)
            if origin is not None:
                check_origin(origin, workdir, config, found["stamps"])
        return found

    found = processes.run_on_all(files, _settings(config))
    processes.run_on_all(lambda: make_mesh(config))
    judges = processes.run_on_all(lambda: _open_judges(config, found, evaluating))
    asked = found["tasks"] or next(iter(found["eval_sets"].values()))
    search = open_search(config.retriever, workdir, asked)
    if not evaluating:
        found["stamps"] |= of_search()
    return Inputs(**found, judges=judges, retriever=search)


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


def _read_files(config: ConfigDict, evaluating: bool) -> dict[str, Any]:
    """The fields of Inputs, but for the servers."""
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
    return {
        "tasks": tasks,
        "eval_sets": sets,
        "model_config": model.config,
        "weights": model.weights,
        "tokenizer": model.tokenizer,
        "context": model.context,
        "eos": model.eos,
        "stamps": training_files,
    }


def read_model(config: ConfigDict, *, evaluating: bool = False) -> decoder.ModelConfig:
    """The shape of the model of section model, with its adapter. Raises InputError."""
    base = hf_load.read_config(config.model.path)
    lora = _read_lora(config, base, evaluating) if config.model.adapter else make_lora(config)
    return dataclasses.replace(base, lora=lora)


def read_model_files(config: ConfigDict, *, evaluating: bool = False) -> ModelInputs:
    """Checks and reads what the files of the model say. Raises InputError."""
    folder = config.model.path
    model_config = read_model(config, evaluating=evaluating)
    tokenizer = hf_load.load_tokenizer(folder)
    context = make_context(config, tokenizer)
    roles.check_context(context)
    if config.mesh.tensor > 0:  # not -1, which takes what is left
        sharding.check_kv_heads(model_config.num_kv_heads, config.mesh.tensor)
    weights, weight_files = _check_weights(config, model_config)
    eos = roles.eos_tokens(tokenizer, hf_load.read_generation_config(folder))
    return ModelInputs(model_config, tokenizer, context, eos, weights, weight_files)


def _read_lora(config: ConfigDict, base: decoder.ModelConfig, evaluating: bool) -> Lora:
    """What the adapter of model.adapter is; in training section lora must say the same.

    Raises InputError.
    """
    adapter = hf_adapter.read(config.model.adapter, base)
    if evaluating:
        return adapter.lora
    found = dataclasses.asdict(adapter.lora)
    asked = dataclasses.asdict(_of_section(config.lora))
    changes = [
        f"lora.{key} is {asked[key]!r}; expected {found[key]!r}"
        for key in found
        if asked[key] != found[key]
    ]
    if changes:
        raise InputError(
            f"config section lora is not that of model.adapter={config.model.adapter}: "
            f"{', '.join(changes)}"
        )
    if adapter.dropout and processes.is_coordinator():
        print(
            f"ssp_jax: {printable(config.model.adapter)} was trained with lora_dropout "
            f"{adapter.dropout:g}; this run drops nothing",
            file=sys.stderr,
        )
    return adapter.lora


def _check_weights(
    config: ConfigDict, model_config: decoder.ModelConfig
) -> tuple[str, dict[str, str]]:
    """Checks the files of the initial weights; their digest, and one of each file by its name.

    Raises InputError.
    """
    rows = hf_load.check_tensors(config.model.path, model_config.base)
    files = stamps.of_weights(config.model.path)
    facts: tuple[Any, ...] = (rows, sorted(files.values()))
    if config.model.adapter:
        adapter_rows = hf_adapter.check_tensors(config.model.adapter, model_config)
        adapter_files = stamps.of_adapter(config.model.adapter)
        facts += (adapter_rows, sorted(adapter_files.values()))
        files |= adapter_files
    return processes.digest(facts), files


def _open_judges(
    config: ConfigDict, found: dict[str, Any], evaluating: bool
) -> dict[str, judge.Judge]:
    """The server that judges, and functions of the user's, by metric.

    Raises InputError where a judge could not judge.
    """
    c = config.eval
    kinds = {}  # metric -> the key that has it
    if evaluating or (found["eval_sets"] and (c.before or c.every or c.after)):
        kinds[c.judge] = "eval.judge"
    if not evaluating:
        kinds[config.reward.metric] = "reward.metric"
    judges: dict[str, judge.Judge] = {}
    for metric, key in kinds.items():
        if metric == "policy":
            judge.check_policy(found["context"])
        elif metric == "openai":
            judges[metric] = judge.OpenAI(**config.judge)
        elif user_code.is_one(metric):
            judges[metric] = Function(key, metric)
    return judges


def index_folder(c: ConfigDict, workdir: str) -> str:
    """The folder of the search index. c: section retriever."""
    return c.index or str(Path(workdir) / "index")


def open_search(c: ConfigDict, workdir: str, tasks: list[Task]) -> Searcher:
    """Opens the search of section retriever on all processes; builds a missing index.

    The coordinator builds: a file lock does not keep another host out. tasks: of the run, which a
    search server, or a class of the user's, is tried with.
    """
    probes = [task.question or task.answers[0] for task in tasks[:64]]
    if user_code.is_one(c.kind):
        return processes.run_on_all(
            lambda: UserRetriever(c.kind, c.corpus, c.index, probes, top_k=c.top_k)
        )
    if c.kind == "http":
        remote = functools.partial(
            RemoteRetriever, top_k=c.top_k, timeout_s=c.timeout_s, retries=c.retries
        )
        return processes.run_on_all(lambda: remote(c.url, probes))
    index = index_folder(c, workdir)
    keys = EncoderKeys(c.pooling, c.normalize, c.query_prefix, c.passage_prefix)
    settings = DenseSettings(c.encoder, keys, c.device_gib, c.device_dtype)

    def build() -> None:
        if c.kind in KINDS:
            encoder_files.load(c.encoder, keys)  # what is wrong with it is said before long work
        ensure_index(c.corpus, index, stemmer=c.stemmer, stopwords=c.stopwords, k1=c.k1, b=c.b)
        if c.kind in KINDS:
            ensure_vectors(index, c.encoder, keys)

    def load() -> Searcher:
        if not processes.is_multiprocess():
            build()
        return dense.load_local(c.kind, index, threads=c.threads, top_k=c.top_k, settings=settings)

    if processes.is_multiprocess():
        processes.run_on_coordinator(build)
    return processes.run_on_all(load)


def _settings(config: ConfigDict) -> dict[str, Any]:
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


# --- typed sections of the config -----------------------------------------------------------------


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config; what is split over it must divide."""
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.playing_meshes(mesh)
    sharding.check_rows(mesh, learner_rows=config.learner.rows, slots=config.engine.slots)
    return mesh


def make_lora(config: ConfigDict) -> Lora | None:
    """Section lora; None for full fine-tuning."""
    return _of_section(config.lora) if config.lora.rank else None


def _of_section(c: ConfigDict) -> Lora:
    """c: section lora."""
    targets = tuple(name for name in decoder.PROJECTIONS if name in c.targets)
    return Lora(c.rank, c.alpha, targets, c.rank_stabilized)


def make_context(config: ConfigDict, tokenizer: Any) -> roles.EpisodeContext:
    """Sections prompt and limits, with the tokenizer."""
    p = config.prompt
    limits = roles.Limits(**config.limits)
    style = prompts.STYLES[p.style]
    shown = example_sets(p.worked_examples)
    context = roles.EpisodeContext(tokenizer, style, p.template, limits, shown, p.tell_repeats)
    minimum = len(context.encode(style.observation_text.format(documents="")))
    if limits.observation_tokens <= minimum:
        raise InputError(
            f"config key limits.observation_tokens is {limits.observation_tokens}; expected more "
            f"than the {minimum} tokens of the tags around a result"
        )
    return context


def make_game_config(config: ConfigDict) -> rules.GameConfig:
    """The sections of the config that a round of the game depends on."""
    return rules.GameConfig(
        seed=config.seed,
        game=rules.GameSection(**config.game),
        rules=rules.QuestionRules(**config.rules),
        reward=rules.RewardSection(**config.reward),
        temperature=config.sampling.temperature,
        verify_temperature=config.sampling.verify_temperature,
        grpo_std=config.learner.grpo_std,
        proposer_baseline=config.learner.proposer_baseline,
    )


def make_sizes(config: ConfigDict, hosts: int) -> Sizes:
    """Section engine for one of the hosts; the config's slots are those of all."""
    return Sizes(**{**config.engine, "slots": config.engine.slots // hosts})


def make_learner_config(
    config: ConfigDict,
    model_config: decoder.ModelConfig,
    mesh: Any = None,
    platform: str = "cpu",
    gpu: tuple[int, int] | None = None,
) -> LearnerConfig:
    """Section learner, and the keys of others that the update depends on.

    mesh: None for a single device; it may be abstract. platform: of its devices. gpu: compute
    capability of NVIDIA GPUs.
    """
    names = {field.name for field in dataclasses.fields(LearnerConfig)}
    return LearnerConfig(
        model=model_config,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        temperature=config.sampling.temperature,
        response_tokens=config.limits.response_tokens,
        rows_sharding=None if mesh is None else sharding.rows_sharding(mesh),
        attention=attention.select_kernel(config.model.attention, platform, gpu),
        **{name: value for name, value in config.learner.items() if name in names},
    )


def updates(config: ConfigDict) -> dict[str, int]:
    """The updates of a step in order: role, or "both" -> number of optimizer steps."""
    c = config.learner
    steps = {"solver": c.solver_mini_batches, "proposer": c.proposer_mini_batches}
    if config.game.train != "both":
        return {config.game.train: steps[config.game.train]}
    if c.update_order == "combined":
        return {"both": max(steps.values())}
    if c.update_order == "proposer_first":
        return dict(reversed(steps.items()))
    return steps


# --- parts that a run and an evaluation share -----------------------------------------------------


def make_engine(
    config: decoder.ModelConfig,
    tokenizer: Any,
    eos: tuple[int, ...],
    sizes: Sizes,
    dtype: Any,
    search: SearchFn,
    mesh: jax.sharding.Mesh,
    truncation: Truncation = ALL_TOKENS,
    search_bytes: int = 0,
) -> Engine:
    """The engine that plays all roles, on the devices of `mesh`.

    search_bytes: of a device, that a search takes while the engine plays.
    """
    automata = roles.role_automata(tokenizer, config.vocab_size)
    shardings = functools.partial(sharding.state_shardings, mesh=mesh)

    def free_bytes() -> int | None:
        free = device_memory.free_bytes()
        return None if free is None else free - search_bytes

    return Engine(config, sizes, automata, eos, dtype, search, shardings, truncation, free_bytes)


def make_judges(
    config: ConfigDict,
    engine: Engine,
    context: roles.EpisodeContext,
    digests: Mapping[str, str],
    ready: Mapping[str, judge.Judge],
    initial: Callable[[], Params],
) -> Callable[[str], judge.Judge | None]:
    """The judge of reward.metric or eval.judge, each made once; None for a metric without one.

    digests: of a run's inputs. ready: the judges that were found with them.
    initial: gives the sampler's copy of the initial weights.
    """
    names = ("the weights", "the model's shape", "the tokenizer")
    model = {name: digests[name] for name in names} | {"model.dtype": config.model.dtype}
    max_tokens = config.judge.max_tokens
    cache_tokens = config.engine.cache_tokens

    @functools.cache
    def of_metric(metric: str) -> judge.Judge | None:
        if metric == "policy":
            return judge.Policy(engine, context, model, initial, max_tokens, cache_tokens)
        return ready.get(metric)

    return of_metric


def run_engine(config: ConfigDict, inputs: Inputs, mesh: jax.sharding.Mesh) -> Engine:
    """The engine of a run. mesh: of the learner; each process plays on its own part of it."""
    _, own = sharding.playing_meshes(mesh)
    return make_engine(
        inputs.model_config,
        inputs.tokenizer,
        inputs.eos,
        make_sizes(config, jax.process_count()),
        jnp.dtype(config.model.dtype),
        functools.partial(inputs.retriever.search, top_k=config.retriever.top_k),
        own,
        Truncation(config.sampling.top_k, config.sampling.top_p),
        inputs.retriever.program_bytes,
    )


def make_weights(
    config: ConfigDict, model_config: decoder.ModelConfig, mesh: jax.sharding.Mesh
) -> Weights:
    """Where the weights of a run come from."""
    folder = config.model.path
    dtype = jnp.dtype(config.model.dtype)
    if model_config.lora is None:
        return FullWeights(folder, model_config, mesh, dtype)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # steps of play take 1, 2, ...
    return LoraWeights(folder, model_config, mesh, dtype, config.model.adapter or key)


def restore_trained(
    checkpoints: Checkpoints,
    step: int,
    model_config: decoder.ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> Params:
    """What a run trains, as it was after a step, laid out as the learner has it. Raises Damaged.

    The optimizer's state stays on disk.
    """

    def array_like(x: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)

    abstract = decoder.abstract_trainable(model_config)
    like = jax.tree.map(array_like, abstract, sharding.param_shardings(abstract, mesh))
    params: Params = checkpoints.restore_params(step, like)
    return params


def initial_name(config: ConfigDict) -> str:
    """How tables and logs name the weights that a run starts from."""
    name = f"initial weights of {config.model.path}"
    return f"{name} with {config.model.adapter}" if config.model.adapter else name


def evaluation_inputs(config: ConfigDict, inputs: Inputs) -> dict[str, str]:
    """Digests of the inputs and config keys that an evaluation's episodes depend on."""
    sampling = config.sampling
    settings = {
        "limits": config.limits.to_dict(),
        "retriever.top_k": config.retriever.top_k,
        "model.dtype": config.model.dtype,
        "sampling": (sampling.eval_temperature, sampling.top_k, sampling.top_p),
        "seed": config.seed,
    }
    # An episode's line has its question itself.
    without = ("data.answers", "data.eval_sets")
    digests = {name: digest for name, digest in inputs.digests.items() if name not in without}
    return digests | {"the settings": processes.digest(settings)}


def make_eval_context(
    config: ConfigDict,
    workdir: Path,
    inputs: Inputs,
    engine: Engine,
    judges: Callable[[str], judge.Judge | None],
    logger: Logger,
    stop: Callable[[], None],
    training: str,
) -> EvalContext:
    """What the evaluations of a run share.

    stop: called often; may raise. training: of workdir.trained_with.
    """
    metric = config.eval.judge
    return EvalContext(
        folder=workdir / "eval",
        inputs=evaluation_inputs(config, inputs),
        training=training,
        conditions=conditions.of(config, len(inputs.retriever)),
        sets=inputs.eval_sets,
        retriever=inputs.retriever,
        engine=engine,
        episodes=inputs.context,
        key=jax.random.key(config.seed),
        temperature=config.sampling.eval_temperature,
        metric=metric,
        judge=judges(metric),
        logger=logger,
        stop=stop,
    )


# --- a run that trains a model --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelRun:
    """The parts of every run that trains. What changes from step to step is in Progress."""

    mode: ClassVar[str] = "train"  # of config.MODES

    config: ConfigDict
    workdir: Path
    model_config: decoder.ModelConfig
    stamps: dict[str, str]  # digests of the files that training depends on
    mesh: jax.sharding.Mesh
    key: jax.Array  # of random numbers
    attention: str  # of the update, in the words of attention.select_kernel
    weights: Weights
    learner: Learner
    checkpoints: Checkpoints
    compiles: CompileCounter
    stop: processes.Stop
    steps: int  # of the whole run
    resumed: int  # the step that it goes on from

    @functools.cached_property
    def logger(self) -> Logger:
        """Made when it is first asked for: a run that is refused before leaves no file of steps."""
        mute = not processes.is_coordinator()
        opened = processes.run_on_all(
            lambda: [] if mute else trackers.open_trackers(self.config, self.workdir)
        )
        return Logger(
            str(self.workdir),
            self.steps,
            self.config.log.tensorboard,
            self.resumed,
            mute=mute,
            trackers=opened,
        )


@dataclasses.dataclass
class Progress:
    """What a run has after its newest finished step: what a checkpoint holds."""

    step: int
    state: TrainState
    replay: ReplayState
    seconds: float  # that all steps took
    damaged: dict[int, str]  # step -> reason, of checkpoints that were set aside at the start
    changes: list[Change] = dataclasses.field(default_factory=list)  # of keys, since its start
    origin: str = ""  # WORKDIR@STEP of the run that it was forked from
    is_forked: bool = False  # just now: none of this is saved in its own workdir yet


def make_model_run(
    config: ConfigDict,
    workdir: str,
    model: decoder.ModelConfig,
    stamps: dict[str, str],
    mesh: jax.sharding.Mesh,
    steps: int,
    origin: Origin | None = None,
    **learner_keys: Any,
) -> tuple[ModelRun, Progress]:
    """The parts of a run in its locked workdir, and how far it is.

    steps: of the whole run. origin: where it starts, if it has no checkpoint of its own.
    learner_keys: fields of LearnerConfig that are not the config's.
    """
    compiles = CompileCounter()
    c = config.checkpoint
    checkpoints = Checkpoints(workdir, c.every, c.keep, minutes=c.minutes)

    device = mesh.devices.flat[0]
    gpu = attention.capability(device)
    learner_config = make_learner_config(config, model, mesh, device.platform, gpu)
    learner_config = dataclasses.replace(learner_config, **learner_keys)
    processes.run_on_all(lambda: check_attention(learner_config))
    with device_memory.must_fit("the train state", MEMORY_REMEDY):
        weights = make_weights(config, model, mesh)
        weights.frozen()  # read here, where a model that does not fit gets a sentence
        learner, state = _make_learner(learner_config, weights, mesh)
        progress = _restore(checkpoints, state, config, origin)
        del state  # another one where a checkpoint was found

    run = ModelRun(
        config=config,
        workdir=Path(workdir),
        model_config=model,
        stamps=stamps,
        mesh=mesh,
        key=jax.random.key(config.seed),
        attention=learner_config.attention,
        weights=weights,
        learner=learner,
        checkpoints=checkpoints,
        compiles=compiles,
        stop=processes.Stop(),
        steps=steps,
        resumed=progress.step,
    )
    return run, progress


def _make_learner(
    c: LearnerConfig, weights: Weights, mesh: jax.sharding.Mesh
) -> tuple[Learner, TrainState]:
    """The learner, and its state before the first step."""
    initial = weights.initial()
    shardings = jax.tree.map(lambda x: x.sharding, initial)
    cast = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(c.dtype), p), out_shardings=shardings)
    reference = cast(initial) if c.kl_coef else None
    state = init_state(c, initial)
    rows = sharding.rows_sharding(mesh)

    def put(batch: Batch) -> Batch:
        return sharding.put_rows(batch, rows)

    return Learner(c, state, reference, put, weights.frozen), state


def _restore(
    checkpoints: Checkpoints, state: TrainState, config: ConfigDict, origin: Origin | None
) -> Progress:
    """How far the newest checkpoint is, or else the origin; `state` at step 0 without either."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    forked_from = ""
    restored = checkpoints.restore_newest(like)
    if restored is None and origin is not None:
        restored = _restore_origin(origin, like)
        forked_from = f"{origin.workdir}@{restored.step}"
    if restored is None:
        return Progress(0, state, ReplayState(), 0.0, {})
    game = restored.game
    return Progress(
        step=restored.step,
        state=restored.state,
        replay=ReplayState.from_json(game["memory"]),
        seconds=game["seconds"],
        damaged=restored.damaged,
        changes=[*changes_of(game), *changes_since(game, restored.step, config)],
        origin=forked_from or game.get("origin", ""),  # earlier versions kept none
        is_forked=bool(forked_from),
    )


def _restore_origin(origin: Origin, like: TrainState) -> Restored:
    """The checkpoint of another run. Raises CollectiveInputError where it cannot be read."""
    with Checkpoints(origin.workdir, every=0, keep=0, read_only=True) as checkpoints:
        step = checkpoints.steps()[-1] if origin.step is None else origin.step
        try:
            state, game = checkpoints.restore(step, like)
        except Damaged as error:
            raise processes.CollectiveInputError(
                f"--from={origin}: checkpoint {step} cannot be read ({error})"
            ) from None
    return Restored(step, state, game, {})


# --- a run of self-play ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingRun(ModelRun):
    """The parts of a run of self-play."""

    inputs: Inputs
    engine: Engine
    game: SelfPlay
    judges: Callable[[str], judge.Judge | None]  # by metric
    initial: Callable[[], Params]  # gives the sampler's copy of the initial weights

    def tasks(self, step: int) -> list[Task]:
        """The given answers of a step."""
        tasks = self.inputs.tasks
        number = self.config.game.answers_per_step
        rows = data.batch_indices(len(tasks), number, self.config.seed, step)
        return [tasks[row] for row in rows]


@contextlib.contextmanager
def training_run(
    config: ConfigDict, workdir: str, origin: Origin | None = None
) -> Iterator[tuple[TrainingRun, Progress]]:
    """The parts of a run in its locked workdir, and how far it is; all is closed at the end.

    origin: where it starts, if it has no checkpoint of its own. In the context a signal only sets
    run.stop, so that what is being saved gets onto the disk.
    """
    keep_compiled(workdir)
    processes.run_on_all(
        lambda: trackers.check_installed(config) if processes.is_coordinator() else None
    )
    with made_workdir(workdir), lock_workdir(workdir):
        inputs = read_inputs(config, workdir, origin)
        mesh = make_mesh(config)
        # After the inputs: a mistyped path must not become the workdir's config.
        keep_config(workdir, config)
        processes.check_shared(Path(workdir))
        run, progress = _make_run(config, workdir, inputs, mesh, origin)
        if progress.is_forked and origin:
            copy_metrics(origin.workdir, workdir)
        facts = {
            "the newest checkpoint": progress.step,
            "the memory": processes.digest(progress.replay),
        }
        check_same_inputs(inputs, facts)
        with run.stop, run.logger, run.checkpoints:
            yield run, progress


def _make_run(
    config: ConfigDict,
    workdir: str,
    inputs: Inputs,
    mesh: jax.sharding.Mesh,
    origin: Origin | None,
) -> tuple[TrainingRun, Progress]:
    model = inputs.model_config
    base, progress = make_model_run(
        config, workdir, model, inputs.stamps, mesh, config.steps, origin
    )
    # While it judges what is trained, the initial model is in memory beside the player, and the
    # slots leave it room. With LoRA both have one base, which must be free to move.
    judges_always = config.reward.metric == "policy" and model.lora is None
    with device_memory.must_fit("the train state", MEMORY_REMEDY):
        judging = base.weights.initial_for_sampler() if judges_always else None

    def initial() -> Params:
        return judging or base.weights.initial_for_sampler()

    engine = run_engine(config, inputs, mesh)
    judges = make_judges(config, engine, inputs.context, inputs.digests, inputs.judges, initial)
    reward_judge = judges(config.reward.metric)
    game = SelfPlay(
        make_game_config(config), inputs.context, engine, inputs.retriever, reward_judge
    )
    run = TrainingRun(
        **vars(base), inputs=inputs, engine=engine, game=game, judges=judges, initial=initial
    )
    return run, progress
