"""The outer loop: play a round, update both roles, log, save, evaluate (SSP Algorithm 1).

The same command in the same workdir goes on where it stopped. SIGTERM, SIGHUP and Ctrl-C end the
run at the next decode chunk, with a checkpoint of the last finished step.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ssp_jax.assembly import sections
from ssp_jax.assembly.evaluation import make_eval_context
from ssp_jax.assembly.model_run import Progress
from ssp_jax.assembly.training_run import TrainingRun, training_run
from ssp_jax.assembly.weights import initial_name
from ssp_jax.config.command_line import Origin
from ssp_jax.evaluation import evaluate, paper_table
from ssp_jax.evaluation.evaluate import Result
from ssp_jax.game import judge
from ssp_jax.game.metrics import cut_sentences
from ssp_jax.game.rounds import Round, Training, readable
from ssp_jax.learner.update import MEMORY_REMEDY
from ssp_jax.lifecycle import keeping, next_steps
from ssp_jax.rollout.engine import Stats
from ssp_jax.runtime import device_memory, figures, processes, records
from ssp_jax.runtime.checkpoint import leaf_digests
from ssp_jax.runtime.logger import Phase, pop_peak_memory_gib
from ssp_jax.runtime.processes import Stop
from ssp_jax.workdir import as_read, trained_with


def train(config: ConfigDict, workdir: str, origin: Origin | None = None) -> None:
    """Runs or resumes self-play up to config.steps.

    origin: what a run starts from that has no checkpoint of its own yet. Leaves metrics,
    checkpoints, summary.json, an export and report.html in the workdir.
    """
    started = training_run(config, workdir, origin)
    with started as (run, now), keeping.saved_at_the_end(run, now):
        _warm_up(run, now)
        if config.eval.before:
            _evaluate(run, now, 0)
        # Where a signal ended the run after the step was saved.
        _evaluate_if_due(run, now)
        keeping.keep_best(run, now)

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
                metrics |= keeping.cost(metrics, time.monotonic() - start_of_update)

            # The step is over.
            now.replay = replay
            now.step += 1
            now.seconds += time.monotonic() - start
            _log_step(run, now, played, metrics, time.monotonic() - start)
            keeping.stop_if_diverged(run, now)

            # Save before the evaluation, which may take long and may be killed.
            if run.checkpoints.due(now.step):
                keeping.save(run, now)
            _evaluate_if_due(run, now)

        keeping.save(run, now)
        _finish(run, now)


def _warm_up(run: TrainingRun, now: Progress) -> None:
    """Says how the run begins, and compiles its programs."""
    keeping.say_start(run, now)
    if now.is_forked:  # from here on it needs the other run no more
        keeping.save(run, now)
    say = run.logger.say
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
    for role, steps in sections.updates(config).items():
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
    gaps = {key for key in report if key.startswith("logprob_gap")}
    if first:  # later updates see weights that have moved since sampling
        metrics |= {f"update/{key}": report[key] for key in gaps}
    metrics |= {f"update/{role}/{key}": report[key] for key in report if key not in gaps}
    metrics["update/tokens"] = metrics.get("update/tokens", 0.0) + report["tokens"]


def _log_step(
    run: TrainingRun, now: Progress, played: Round, metrics: dict[str, float], seconds: float
) -> None:
    run.logger.step(now.step, metrics | keeping.about(run), seconds)
    for name, words in cut_sentences(metrics).items():
        run.logger.say_once(name, words)
    if played.useless_reply is not None:
        reply = judge.shown(played.useless_reply)
        run.logger.say(
            f"no reply of the judge was a verdict, so all that it judged is wrong: {reply}"
        )
    every = run.config.log.episodes_every
    if every and now.step % every == 0:
        run.logger.episodes(now.step, [readable(game) for game in played.games])


# --- evaluate -------------------------------------------------------------------------------------


def _evaluate_if_due(run: TrainingRun, now: Progress) -> None:
    every = run.config.eval.every
    if every and now.step and now.step % every == 0:
        _evaluate(run, now, now.step)
        keeping.keep_best(run, now)


def _evaluate(run: TrainingRun, now: Progress, step: int) -> Result:
    """Evaluates the current weights, or for step 0 of a run that has gone on the initial ones."""

    def current() -> Any:
        return run.weights.to_sampler(now.state.params)

    name = f"after step {step}" if step else initial_name(run.config)
    context = make_eval_context(
        run.config,
        run.workdir,
        run.inputs,
        run.engine,
        run.judges,
        run.logger,
        run.stop,
        trained_with(as_read(run.config), now.changes, step),
    )
    params = current if step == now.step else run.initial
    result = evaluate.evaluate(context, step, name, params)
    metrics: dict[str, float] = {}
    for set_name, values in result.document["sets"].items():
        metrics |= {f"eval/{set_name}/{key}": value for key, value in values.items()}
    if metrics and run.logger.evaluation(step, metrics):
        evaluate.show(run.logger, result)
    return result


def _finish(run: TrainingRun, now: Progress) -> None:
    """The last evaluation, summary, table of before and after, export, report and next steps."""
    config = run.config
    results: dict[str, Result] = {}
    if config.eval.before:
        results["before"] = _evaluate(run, now, 0)
    if config.eval.after:
        results["after"] = _evaluate(run, now, now.step)

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
    keeping.export(run, now)  # after the scores, which its card shows
    processes.run_on_coordinator(lambda: next_steps.show(config, run.workdir, run.logger))
