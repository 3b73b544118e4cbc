"""The outer loop: play a round, update both roles, log, evaluate, save (SSP Algorithm 1).

The same command in the same workdir goes on where it stopped. SIGTERM, SIGHUP and Ctrl-C end the
run at the next decode chunk, with a checkpoint of the last finished step.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ssp_jax import data
from ssp_jax.assemble import Inputs, check_same_inputs, evaluation_inputs, make_mesh, read_inputs
from ssp_jax.config import advice
from ssp_jax.errors import InputError, sentence
from ssp_jax.evaluation import evaluate as evaluate
from ssp_jax.evaluation import paper_table
from ssp_jax.evaluation.evaluate import EvalContext, Result
from ssp_jax.game import judge, roles
from ssp_jax.game.selfplay import ReplayState, Round, SelfPlay, Training, readable
from ssp_jax.learner import state, update
from ssp_jax.model import attention, decoder, hf_load, hf_save, sharding
from ssp_jax.rollout.engine import Engine, Sizes, Stats
from ssp_jax.rollout.sampling import Truncation
from ssp_jax.runtime import device_memory, processes, records
from ssp_jax.runtime.checkpoint import Checkpoints, leaf_digests
from ssp_jax.runtime.logger import CompileCounter, Logger, peak_memory_gib
from ssp_jax.runtime.processes import Stop, Terminated
from ssp_jax.workdir import as_read, keep_config, lock_workdir, trained_with


def train(config: ConfigDict, workdir: str) -> None:
    """Runs or resumes self-play up to config.steps; leaves metrics, checkpoints, summary.json and
    an export there.
    """
    keep_compiled(workdir)
    with lock_workdir(workdir):
        inputs, mesh = read_inputs(config, workdir), make_mesh(config)
        # After the inputs: a mistyped path must not become the workdir's config.
        processes.run_on_all(
            lambda: keep_config(workdir, config) if processes.is_coordinator() else None
        )
        processes.check_shared(Path(workdir))
        run = _Run(config, workdir, inputs, mesh)
        check_same_inputs(
            inputs, {"the newest checkpoint": run.step, "the memory": processes.digest(run.memory)}
        )
        _to_the_end(run, config)


def _to_the_end(run: "_Run", config: ConfigDict) -> None:
    """From the step where the run is. A signal does not end it before what is being saved is on
    disk.
    """
    with Stop() as stop, run.logger, run.checkpoints:
        try:
            run.warm_up(stop)
            if config.eval.before:
                run.evaluate(0, stop)
            run.evaluate_if_due(stop)  # where a signal has ended it after the step was played
            while run.step < config.steps:
                run.play_and_update(stop)
                if run.checkpoints.due(run.step):
                    run.save()  # before the evaluation, which may take long, and may be killed
                run.evaluate_if_due(stop)
            run.save()
            run.finish(stop)
        except Terminated:
            run.save()
            run.logger.say(
                f"{stop.cause}: saved step {run.step}; the same command goes on from there"
            )
            run.checkpoints.wait()
            sys.exit(stop.code)
        except InputError as error:  # such as a search server that stays away; no update raises one
            if not processes.is_collective(error):
                raise
            if run.step:
                run.save()
                run.logger.say(f"saved step {run.step}; the same command goes on from there")
            # With code 1, for it was usable when the run began: a cluster that starts it again may
            # have more luck.
            sys.exit(f"ssp_jax: {sentence(error)}")


def keep_compiled(workdir: str) -> None:
    """A run that is resumed finds its programs in the workdir; a folder of the user's own choice
    stays.

    (Of several processes JAX lets only the first one write. On GPUs all find their programs; on
    TPUs the others compile those of play anew, which know their devices by name.)
    """
    options: Any = jax.config  # which makes its attributes at import, unseen by a type checker
    if options.jax_compilation_cache_dir is None:
        options.update("jax_compilation_cache_dir", str(Path(workdir) / "compiled"))
    # Programs that compile in less than a second are many, and are kept too.
    options.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    options.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # The folder of XLA's own caches would be a part of each program's key: none would be found in a
    # workdir that was moved or copied. They hold what autotuning on GPUs found, which is in the
    # programs too.
    options.update("jax_persistent_cache_enable_xla_caches", "")
    # so would be the paths of source files
    options.update("jax_compilation_cache_include_metadata_in_key", False)


def make_learner_config(
    config: ConfigDict, model_config: decoder.ModelConfig, mesh: Any = None, platform: str = "cpu"
) -> state.LearnerConfig:
    """mesh: None for a single device; it may be abstract, so `platform` says what its devices are."""
    names = {f.name for f in dataclasses.fields(state.LearnerConfig)}
    return state.LearnerConfig(
        model=model_config,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        temperature=config.sampling.temperature,
        response_tokens=config.limits.response_tokens,
        rows_sharding=None if mesh is None else sharding.rows_sharding(mesh),
        attention=attention.select_kernel(config.model.attention, platform),
        **{name: value for name, value in config.learner.items() if name in names},
    )


def updates(config: ConfigDict) -> dict[str, int]:
    """The updates of a step in order, and the optimizer steps of each; "both" is one for both
    roles.
    """
    c = config.learner
    steps = {"solver": c.solver_mini_batches, "proposer": c.proposer_mini_batches}
    if config.game.train != "both":
        return {config.game.train: steps[config.game.train]}
    if c.update_order == "combined":
        return {"both": max(steps.values())}
    return dict(reversed(steps.items())) if c.update_order == "proposer_first" else steps


def make_engine(config: ConfigDict, inputs: Inputs, mesh: jax.sharding.Mesh) -> Engine:
    """mesh: of the learner; each process plays on its own part of it."""
    return roles.make_engine(
        inputs.model_config,
        inputs.tokenizer,
        inputs.eos,
        Sizes(**{**config.engine, "slots": config.engine.slots // jax.process_count()}),
        jnp.dtype(config.model.dtype),
        functools.partial(inputs.retriever.search, top_k=config.retriever.top_k),
        functools.partial(sharding.state_shardings, mesh=sharding.playing_meshes(mesh)[1]),
        Truncation(config.sampling.top_k, config.sampling.top_p),
    )


def make_setting(
    config: ConfigDict,
    workdir: Path,
    inputs: Inputs,
    engine: Engine,
    judges: Callable[[str], judge.Judge | None],
    logger: Logger,
    stop: Callable[[], None],
) -> EvalContext:
    """Of the evaluations of a run."""
    metric = config.eval.judge
    return EvalContext(
        folder=workdir / "eval",
        inputs=evaluation_inputs(config, inputs),
        training=processes.all_gather_objects(
            lambda: trained_with(str(workdir)) if processes.is_coordinator() else ""
        )[0],
        sets=inputs.eval_sets,
        engine=engine,
        stage=inputs.stage,
        key=jax.random.key(config.seed),
        temperature=config.sampling.eval_temperature,
        metric=metric,
        judge=judges(metric),
        logger=logger,
        stop=stop,
    )


def sampler_copy(
    config: ConfigDict, model_config: decoder.ModelConfig, mesh: jax.sharding.Mesh
) -> Callable[[decoder.Params], decoder.Params]:
    """Params on the learner's mesh -> what this process plays with. All processes must call it
    together.
    """
    everywhere, own = sharding.playing_meshes(mesh)
    copy = sharding.sampler_copy(model_config, everywhere, jnp.dtype(config.model.dtype))
    return lambda params: (
        sharding.local_view(copy(params), own) if processes.is_multiprocess() else copy(params)
    )


def load_initial(
    config: ConfigDict, model_config: decoder.ModelConfig, mesh: jax.sharding.Mesh
) -> decoder.Params:
    """The sampler's copy of the weights that the run starts from, read anew."""
    shardings = sharding.param_shardings(decoder.abstract_params(model_config), mesh)
    stacked = hf_load.load(
        config.model.path, model_config, shardings, jnp.dtype(config.model.dtype)
    )
    return sampler_copy(config, model_config, mesh)(stacked)


class _Run:
    """The parts of a run and its state: train state, memory, step."""

    def __init__(self, config: ConfigDict, workdir: str, inputs: Inputs, mesh: jax.sharding.Mesh):
        self._config, self._workdir, self._inputs, self._mesh = config, Path(workdir), inputs, mesh
        self.compiles = CompileCounter()
        c = config.checkpoint
        self.checkpoints = Checkpoints(workdir, c.every, c.keep, minutes=c.minutes)
        self._key = jax.random.key(config.seed)
        with device_memory.must_fit("the train state", update.MEMORY_REMEDY):
            self._build_model()
        self._engine = make_engine(config, inputs, self._mesh)
        self._judges = judge.make_judges(
            config, self._engine, inputs.stage, inputs.digests, inputs.server, self._initial
        )
        judging = self._judges(config.reward.metric)
        self._game = SelfPlay(config, inputs.stage, self._engine, inputs.retriever, judging)
        self.logger = Logger(
            workdir,
            config.steps,
            config.log.tensorboard,
            self.step,
            mute=not processes.is_coordinator(),
        )

    def _build_model(self) -> None:
        """Initial weights from the model folder; the train state from them or from the newest
        checkpoint.
        """
        config, platform = self._inputs.model_config, self._mesh.devices.flat[0].platform
        c, rows = (
            make_learner_config(self._config, config, self._mesh, platform),
            sharding.rows_sharding(self._mesh),
        )
        self._attention = c.attention
        abstract = decoder.abstract_params(config)
        shardings = sharding.param_shardings(abstract, self._mesh)
        initial = hf_load.load(self._config.model.path, config, shardings, jnp.float32)
        cast = jax.jit(
            lambda p: jax.tree.map(lambda x: x.astype(c.dtype), p), out_shardings=shardings
        )
        reference = cast(initial) if c.kl_coef else None
        self._state = state.init_state(c, initial)
        self._learner = update.Learner(
            c, self._state, reference, lambda batch: sharding.put_rows(batch, rows)
        )
        self.step, self.memory, self._seconds = 0, ReplayState(), 0.0
        self._damaged: dict[int, str] = {}
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._state
        )
        if restored := self.checkpoints.restore_newest(like):
            self._state, game = restored.state, restored.game
            self.step, self._damaged = restored.step, restored.damaged
            self.memory, self._seconds = ReplayState.from_json(game["memory"]), game["seconds"]
        self._to_sampler = sampler_copy(self._config, config, self._mesh)
        # While it judges what is trained, the initial model is in memory beside the player, and the
        # slots leave room.
        judging = self._config.reward.metric == "policy"
        self._judging = load_initial(self._config, config, self._mesh) if judging else None

    def _initial(self) -> decoder.Params:
        """For the judge, and for questions of step 0 that are asked later."""
        return self._judging or load_initial(self._config, self._inputs.model_config, self._mesh)

    def warm_up(self, stop: Stop) -> None:
        devices = f"{self._mesh.devices.size} x {jax.devices()[0].device_kind}"
        if processes.is_multiprocess():
            devices += f" of {jax.process_count()} processes"
        start = f"resuming after step {self.step}" if self.step else "starting"
        for step, reason in self._damaged.items():
            self.logger.say(
                f"checkpoint {step} is damaged ({reason}) and was set aside; going on from step {self.step}"
            )
        self.logger.say(f"{start} in {self._workdir} on {devices}; jax {jax.__version__}")
        self.logger.say(f"attention of the update: {self._attention}")
        for line in advice(self._config):
            self.logger.say(line)
        began = time.monotonic()
        with self.logger.phase("compiling"):
            leaf_digests(self._state)
            # Together: one process may find in its cache what another compiles, or be told that it
            # does not fit.
            params = self._to_sampler(self._state.params)
            processes.run_on_all(functools.partial(self._engine.warm_up, params, self._key, stop))
            del params
            with device_memory.must_fit("the update", update.MEMORY_REMEDY):
                self._learner.warm_up(self._state.params)
        self.logger.say(
            f"{'each process: ' if processes.is_multiprocess() else ''}{self._engine.memory}"
        )
        took = time.monotonic() - began
        self.logger.say(
            f"warm-up took {took:.1f} s: {self.compiles.count} programs, {self.compiles.seconds:.1f} s"
        )

    def play_and_update(self, stop: Stop) -> None:
        """One step: the round of the game, then the update of both roles."""
        start, c = time.monotonic(), self._config
        rows = data.batch_indices(
            len(self._inputs.tasks), c.game.answers_per_step, c.seed, self.step
        )
        tasks = [self._inputs.tasks[row] for row in rows]
        key = jax.random.fold_in(self._key, self.step + 1)
        with self.logger.phase("playing") as phase:
            params = self._to_sampler(self._state.params)
            progress = functools.partial(_show_play, phase, stop)
            round_, memory = self._game.play(self.step, tasks, self.memory, params, key, progress)
            del params  # the sampler's copy: the update has its room
        with self.logger.phase("updating"):
            played = time.monotonic()
            metrics = round_.metrics | {"memory/play_gib": peak_memory_gib()}
            with processes.watched():
                metrics |= self._update(round_)
            seconds = time.monotonic() - played
            metrics["memory/update_gib"] = peak_memory_gib()
            metrics["update/seconds"] = seconds
            metrics["update/tokens_per_second"] = metrics.get("update/tokens", 0.0) / seconds
        self.memory, self.step = memory, self.step + 1
        self._seconds += time.monotonic() - start
        self.logger.step(
            self.step, metrics | {"compiles": self.compiles.count}, time.monotonic() - start
        )
        if (reply := round_.useless_reply) is not None:
            self.logger.say(
                f"no reply of the judge was a verdict, so all that it judged is wrong: {judge.shown(reply)}"
            )
        if c.log.episodes_every and self.step % c.log.episodes_every == 0:
            self.logger.episodes(self.step, [readable(game) for game in round_.games])
        if int(self._state.bad_updates) >= c.learner.max_bad_updates:
            sys.exit(
                f"ssp_jax: {c.learner.max_bad_updates} updates in a row were not finite; stopped after step {self.step}"
            )

    def _update(self, round_: Round) -> dict[str, float]:
        """Solver then proposer [P Alg.1], the other way round [C], or both in one update."""
        trained = {
            "solver": round_.solver,
            "proposer": round_.proposer,
            "both": _joined([round_.solver, round_.proposer]),
        }
        metrics: dict[str, float] = {}
        for name, mini_batches in updates(self._config).items():
            training = trained[name]
            if training.episodes:
                order = np.random.default_rng((self._config.seed, 4, self.step, len(metrics)))
                self._state, report = self._learner.update(
                    self._state, training.episodes, training.advantages, order, mini_batches
                )
                gaps = {key: report.pop(key) for key in ("logprob_gap", "logprob_gap_max")}
                # later updates see weights that have moved since sampling: no gap between programs
                if not metrics:
                    metrics |= {f"update/{key}": value for key, value in gaps.items()}
                metrics |= {f"update/{name}/{key}": value for key, value in report.items()}
                metrics["update/tokens"] = metrics.get("update/tokens", 0.0) + report["tokens"]
        return metrics

    def save(self) -> None:
        with self.logger.phase("saving"):
            self.logger.sync()  # a step that outlives a crash of the machine has its row
            game = {"memory": self.memory.to_json(), "seconds": self._seconds}
            game |= {"config": as_read(self._config), "stamps": self._inputs.stamps}
            self.checkpoints.save(self.step, self._state, game)

    def evaluate_if_due(self, stop: Stop) -> None:
        every = self._config.eval.every
        if every and self.step and self.step % every == 0:
            self.evaluate(self.step, stop)

    def evaluate(self, step: int, stop: Stop) -> Result:
        """Of the current weights, or, for step 0 of a run that has gone on, of the initial ones."""
        path = self._config.model.path
        setting = make_setting(
            self._config, self._workdir, self._inputs, self._engine, self._judges, self.logger, stop
        )
        name = f"after step {step}" if step else f"initial weights of {path}"
        current = (
            (lambda: self._to_sampler(self._state.params)) if step == self.step else self._initial
        )
        result = evaluate.evaluate(setting, step, name, current)
        found = {
            f"eval/{set_}/{key}": v
            for set_, row in result.document["sets"].items()
            for key, v in row.items()
        }
        if found and self.logger.evaluation(step, found):
            evaluate.show(self.logger, result)
        return result

    def finish(self, stop: Stop) -> None:
        """The last evaluation, the export, summary.json, and the table of before and after."""
        results: dict[str, Result] = {}
        if self._config.eval.before:
            results["before"] = self.evaluate(0, stop)
        if self._config.eval.after:
            results["after"] = self.evaluate(self.step, stop)
        if self._config.checkpoint.export:
            with self.logger.phase("exporting"):
                folder = self._workdir / hf_save.FOLDER
                hf_save.save(
                    self._state.params, self._inputs.model_config, folder, self._config.model.path
                )
        summary: dict[str, Any] = {"steps": self.step, "seconds": round(self._seconds, 1)}
        summary["eval"] = {
            when: {name: result.document["sets"][name] for name in self._inputs.eval_sets}
            for when, result in results.items()
        }
        if processes.is_coordinator():
            records.write_document(self._workdir / "summary.json", summary)
        if len(results) == 2 and self._inputs.eval_sets:
            figures = paper_table.table_1(self._config.model.path)
            evaluate.compare(
                self.logger, self._workdir / "eval", results["before"], results["after"], figures
            )


def _show_play(phase: Any, stop: Stop, stats: Stats) -> None:
    stop()
    phase.advance(
        stats.finished, total=stats.known, tokens=stats.sampled_tokens / max(stats.seconds, 1e-9)
    )


def _joined(parts: list[Training]) -> Training:
    return Training(
        [episode for part in parts for episode in part.episodes],
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.advantages for part in parts]),
    )
