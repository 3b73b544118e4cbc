"""The outer loop: play a round, update both roles, log, save, evaluate (SSP Algorithm 1).

The same command in the same workdir goes on where it stopped. SIGTERM, SIGHUP and Ctrl-C end the
run at the next decode chunk, with a checkpoint of the last finished step.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ssp_jax import assemble, next_steps
from ssp_jax.assemble import Progress, TrainingRun
from ssp_jax.config import advice, export_kind
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.evaluation import evaluate, paper_table
from ssp_jax.evaluation.evaluate import Result
from ssp_jax.game import judge
from ssp_jax.game.rounds import Round, Training, readable
from ssp_jax.learner.update import MEMORY_REMEDY
from ssp_jax.model import decoder, hf_save
from ssp_jax.rollout.engine import Stats
from ssp_jax.runtime import device_memory, figures, processes, records
from ssp_jax.runtime.checkpoint import leaf_digests
from ssp_jax.runtime.logger import Phase, pop_peak_memory_gib
from ssp_jax.runtime.processes import Stop, Terminated
from ssp_jax.workdir import as_read


def train(config: ConfigDict, workdir: str) -> None:
    """Runs or resumes self-play up to config.steps.

    Leaves metrics, checkpoints, summary.json, an export and report.html in the workdir.
    """
    with assemble.training_run(config, workdir) as (run, now), _saved_at_the_end(run, now):
        _warm_up(run, now)
        if config.eval.before:
            _evaluate(run, now, 0)
        _evaluate_if_due(run, now)  # where a signal ended the run after the step was saved

        while now.step < config.steps:
            start = time.monotonic()

            # Play: propose, verify, solve, reward.
            with run.logger.phase("playing") as phase:
                tasks = run.tasks(now.step)
                params = run.weights.to_sampler(now.state.params)
                key = jax.random.fold_in(run.key, now.step + 1)
                show = functools.partial(_show_play, phase, run.stop)
                played, replay = run.game.play(now.step, tasks, now.replay, params, key, show)
                del params  # the update needs its memory

            # Update: the solver, then the proposer, or as learner.update_order has it.
            with run.logger.phase("updating"), processes.watched():
                start_of_update = time.monotonic()
                metrics = played.metrics | {"memory/play_gib": pop_peak_memory_gib()}
                for number, (role, training, steps) in enumerate(_trainings(config, played)):
                    order = _order(config, now.step, number)
                    now.state, report = run.learner.update(
                        now.state, training.episodes, training.advantages, order, steps
                    )
                    _add_report(metrics, role, report, first=number == 0)
                _add_cost(metrics, time.monotonic() - start_of_update)

            # The step is over.
            now.replay = replay
            now.step += 1
            now.seconds += time.monotonic() - start
            _log_step(run, now, played, metrics, time.monotonic() - start)
            _stop_if_diverged(run, now)

            # Save before the evaluation, which may take long and may be killed.
            if run.checkpoints.due(now.step):
                _save(run, now)
            _evaluate_if_due(run, now)

        _save(run, now)
        _finish(run, now)


@contextlib.contextmanager
def _saved_at_the_end(run: TrainingRun, now: Progress) -> Iterator[None]:
    """A signal, or input that becomes unusable, ends the run with a checkpoint of the last step."""
    goes_on = "the same command goes on from there"
    try:
        yield
    except Terminated:
        _save(run, now)
        run.logger.say(f"{run.stop.cause}: saved step {now.step}; {goes_on}")
        run.checkpoints.wait()
        sys.exit(run.stop.code)
    except InputError as error:  # such as a search server that stays away; no update raises one
        if not processes.is_collective(error):
            raise
        if now.step:
            _save(run, now)
            run.logger.say(f"saved step {now.step}; {goes_on}")
        # Code 1 and not 2, for it was usable when the run began: a cluster that starts it again
        # may have more luck.
        sys.exit(f"ssp_jax: {sentence(error)}")


def _warm_up(run: TrainingRun, now: Progress) -> None:
    """Says how the run begins, and compiles its programs."""
    say = run.logger.say
    for step, reason in now.damaged.items():
        say(
            f"checkpoint {step} is damaged ({reason}) and was set aside; going on from step "
            f"{now.step}"
        )
    start = f"resuming after step {now.step}" if now.step else "starting"
    devices = f"{run.mesh.devices.size} x {jax.devices()[0].device_kind}"
    if processes.is_multiprocess():
        devices += f" of {jax.process_count()} processes"
    say(f"{start} in {run.workdir} on {devices}; jax {jax.__version__}")
    say(f"attention of the update: {run.attention}")
    model = run.inputs.model_config
    if model.lora is not None:
        trained, total = decoder.parameter_counts(model)
        say(
            f"LoRA of rank {model.lora.rank} on {len(model.lora.targets)} projections: "
            f"{figures.trained_parameters(trained, total)}"
        )
    for line in advice(run.config, run.mesh.devices.flat[0].platform):
        say(line)

    began = time.monotonic()
    with run.logger.phase("compiling", state=lambda: f"{run.compiles.count} programs"):
        leaf_digests(now.state)
        # Together: one process may find in its cache what another compiles, or have no memory for
        # it.
        params = run.weights.to_sampler(now.state.params)
        processes.run_on_all(functools.partial(run.engine.warm_up, params, run.key, run.stop))
        del params
        with device_memory.must_fit("the update", MEMORY_REMEDY):
            run.learner.warm_up(now.state)
    say(f"{'each process: ' if processes.is_multiprocess() else ''}{run.engine.memory}")
    compiling = f"{figures.seconds(run.compiles.seconds)} of compiling"
    took = figures.seconds(time.monotonic() - began)
    say(f"warm-up took {took}: {run.compiles.count} programs, {compiling}")


# --- play and update ------------------------------------------------------------------------------


def _show_play(phase: Phase, stop: Stop, stats: Stats) -> None:
    """Called between decode chunks. Raises Terminated after a signal."""
    stop()
    phase.advance(stats.finished, total=stats.known, tokens=stats.tokens_per_second)


def _trainings(config: ConfigDict, played: Round) -> Iterator[tuple[str, Training, int]]:
    """The updates of a step in order: role, what it learns from, number of optimizer steps.

    Solver then proposer [P Alg.1], the other way round [C], or both in one update. A role without
    an episode has none.
    """
    trainings = {
        "solver": played.solver,
        "proposer": played.proposer,
        "both": _joined(played.solver, played.proposer),
    }
    for role, steps in assemble.updates(config).items():
        if trainings[role].episodes:
            yield role, trainings[role], steps


def _joined(a: Training, b: Training) -> Training:
    rewards = np.concatenate([a.rewards, b.rewards])
    advantages = np.concatenate([a.advantages, b.advantages])
    return Training([*a.episodes, *b.episodes], rewards, advantages)


def _order(config: ConfigDict, step: int, number: int) -> np.random.Generator:
    """Random numbers that shuffle the episodes of an update. number: of the update in its step."""
    # Updates of a step are 10 apart. Another spacing would shuffle resumed runs differently.
    return np.random.default_rng((config.seed, 4, step, 10 * number))


# --- metrics --------------------------------------------------------------------------------------


def _add_report(
    metrics: dict[str, float], role: str, report: Mapping[str, float], *, first: bool
) -> None:
    """Adds what an update reports of itself. first: of its step."""
    gaps = ("logprob_gap", "logprob_gap_max")
    if first:  # later updates see weights that have moved since sampling
        metrics |= {f"update/{key}": report[key] for key in gaps}
    metrics |= {f"update/{role}/{key}": report[key] for key in report if key not in gaps}
    metrics["update/tokens"] = metrics.get("update/tokens", 0.0) + report["tokens"]


def _add_cost(metrics: dict[str, float], seconds: float) -> None:
    """Adds what all updates of a step cost."""
    metrics["memory/update_gib"] = pop_peak_memory_gib()
    metrics["update/seconds"] = seconds
    metrics["update/tokens_per_second"] = metrics.get("update/tokens", 0.0) / seconds


def _log_step(
    run: TrainingRun, now: Progress, played: Round, metrics: dict[str, float], seconds: float
) -> None:
    metrics |= {"compiles": run.compiles.count}
    model = run.inputs.model_config
    if model.lora is not None:
        trained, total = decoder.parameter_counts(model)
        metrics |= {"lora/parameters": trained, "lora/share": trained / total}
    run.logger.step(now.step, metrics, seconds)
    if played.useless_reply is not None:
        reply = judge.shown(played.useless_reply)
        run.logger.say(
            f"no reply of the judge was a verdict, so all that it judged is wrong: {reply}"
        )
    every = run.config.log.episodes_every
    if every and now.step % every == 0:
        run.logger.episodes(now.step, [readable(game) for game in played.games])


def _stop_if_diverged(run: TrainingRun, now: Progress) -> None:
    limit = run.config.learner.max_bad_updates
    if int(now.state.bad_updates) >= limit:
        sys.exit(
            f"ssp_jax: {limit} updates in a row were not finite; stopped after step {now.step}"
        )


# --- save and evaluate ----------------------------------------------------------------------------


def _save(run: TrainingRun, now: Progress) -> None:
    with run.logger.phase("saving"):
        run.logger.sync()  # a step that outlives a crash of the machine has its metrics
        game = {
            "memory": now.replay.to_json(),
            "seconds": now.seconds,
            "config": as_read(run.config),
            "stamps": run.inputs.stamps,
        }
        run.checkpoints.save(now.step, now.state, game)


def _evaluate_if_due(run: TrainingRun, now: Progress) -> None:
    every = run.config.eval.every
    if every and now.step and now.step % every == 0:
        _evaluate(run, now, now.step)


def _evaluate(run: TrainingRun, now: Progress, step: int) -> Result:
    """Evaluates the current weights, or for step 0 of a run that has gone on the initial ones."""

    def current() -> Any:
        return run.weights.to_sampler(now.state.params)

    name = f"after step {step}" if step else assemble.initial_name(run.config)
    context = assemble.make_eval_context(
        run.config, run.workdir, run.inputs, run.engine, run.judges, run.logger, run.stop
    )
    params = current if step == now.step else run.initial
    result = evaluate.evaluate(context, step, name, params)
    metrics: dict[str, float] = {}
    for set_name, values in result.document["sets"].items():
        metrics |= {f"eval/{set_name}/{key}": value for key, value in values.items()}
    if metrics and run.logger.evaluation(step, metrics):
        evaluate.show(run.logger, result)
    return result


def _export(run: TrainingRun, now: Progress) -> None:
    """Writes what was trained, as checkpoint.export says."""
    kind = export_kind(run.config)
    if kind == "none":
        return
    base = run.config.model.path
    model = run.inputs.model_config
    folder = run.workdir / hf_save.FOLDER
    with run.logger.phase("exporting"):
        if kind == "adapter":
            hf_save.save_adapter(now.state.params, model, folder, masked(base))
        else:
            params = decoder.join(run.weights.frozen(), now.state.params)
            hf_save.save(params, model, folder, base)


def _finish(run: TrainingRun, now: Progress) -> None:
    """The last evaluation, export, summary, table of before and after, report and next steps."""
    config = run.config
    results: dict[str, Result] = {}
    if config.eval.before:
        results["before"] = _evaluate(run, now, 0)
    if config.eval.after:
        results["after"] = _evaluate(run, now, now.step)

    _export(run, now)

    names = list(run.inputs.eval_sets)
    scores = {}
    for when, result in results.items():
        scores[when] = {name: result.document["sets"][name] for name in names}
    summary = {"steps": now.step, "seconds": round(now.seconds, 1), "eval": scores}
    if processes.is_coordinator():
        records.write_document(run.workdir / "summary.json", summary)
    if len(results) == 2 and names:
        figures = paper_table.table_1(config.model.path)
        before = results["before"]
        after = results["after"]
        evaluate.compare(run.logger, run.workdir / "eval", before, after, figures)
    processes.run_on_coordinator(lambda: next_steps.show(config, run.workdir, run.logger))
