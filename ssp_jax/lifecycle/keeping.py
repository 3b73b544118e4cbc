"""How a run that trains starts, saves and ends, whatever it trains on."""

import contextlib
import sys
from collections.abc import Iterator, Mapping

import jax

from ssp_jax.assembly.model_run import ModelRun, Progress
from ssp_jax.config.advice import advice
from ssp_jax.config.derived import export_kind
from ssp_jax.errors import InputError, sentence
from ssp_jax.evaluation.best import best_step
from ssp_jax.export import write
from ssp_jax.model import decoder, hf_save
from ssp_jax.runtime import figures, processes
from ssp_jax.runtime.logger import pop_peak_memory_gib
from ssp_jax.workdir import as_read


def say_start(run: ModelRun, now: Progress) -> None:
    """Says where the run begins, on what devices, and what it trains."""
    say = run.logger.say
    for step, reason in now.damaged.items():
        say(
            f"checkpoint {step} is damaged ({reason}) and was set aside; going on from step "
            f"{now.step}"
        )
    start = f"resuming after step {now.step}" if now.step else "starting"
    if now.is_forked:
        start = f"starting from {now.origin}"
    devices = f"{run.mesh.devices.size} x {jax.devices()[0].device_kind}"
    if processes.is_multiprocess():
        devices += f" of {jax.process_count()} processes"
    say(f"{start} in {run.workdir} on {devices}; jax {jax.__version__}")
    changes = [change for change in now.changes if change.step == now.step]
    for change in changes:
        say(str(change))
    if changes:
        changed = {change.key: [change.before, change.now] for change in changes}
        run.logger.changes(now.step, changed)
    say(f"attention of the update: {run.attention}")
    model = run.model_config
    if model.lora is not None:
        trained, total = decoder.parameter_counts(model)
        say(
            f"LoRA of rank {model.lora.rank} on {len(model.lora.targets)} projections: "
            f"{figures.trained_parameters(trained, total)}"
        )
    for line in advice(run.config, run.mesh.devices.flat[0].platform):
        say(line)


@contextlib.contextmanager
def saved_at_the_end(run: ModelRun, now: Progress) -> Iterator[None]:
    """A signal, or input that becomes unusable, ends the run with a checkpoint of the last step."""
    goes_on = "the same command goes on from there"
    try:
        yield
    except processes.Terminated:
        save(run, now)
        run.logger.say(f"{run.stop.cause}: saved step {now.step}; {goes_on}")
        run.checkpoints.wait()
        sys.exit(run.stop.code)
    except InputError as error:  # such as a search server that stays away; no update raises one
        if not processes.is_collective(error):
            raise
        if now.step:
            save(run, now)
            run.logger.say(f"saved step {now.step}; {goes_on}")
        # Code 1 and not 2, for it was usable when the run began: a cluster that starts it again
        # may have more luck.
        sys.exit(f"ssp_jax: {sentence(error)}")


def cost(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What all updates of a step cost. metrics: of the step, with update/tokens if any."""
    return {
        "memory/update_gib": pop_peak_memory_gib(),
        "update/seconds": seconds,
        "update/tokens_per_second": metrics.get("update/tokens", 0.0) / seconds,
    }


def about(run: ModelRun) -> dict[str, float]:
    """What each step reports of the run itself."""
    metrics: dict[str, float] = {"compiles": run.compiles.count}
    model = run.model_config
    if model.lora is not None:
        trained, total = decoder.parameter_counts(model)
        metrics |= {"lora/parameters": trained, "lora/share": trained / total}
    return metrics


def save(run: ModelRun, now: Progress) -> None:
    """Saves the state of the newest finished step."""
    with run.logger.phase("saving"):
        run.logger.sync()  # a step that outlives a crash of the machine has its metrics
        game = {
            "memory": now.replay.to_json(),
            "seconds": now.seconds,
            "config": as_read(run.config),
            "mode": run.mode,
            "changes": [change.to_json() for change in now.changes],
            "origin": now.origin,
            "stamps": run.stamps,
        }
        run.checkpoints.save(now.step, now.state, game)


def keep_best(run: ModelRun, now: Progress) -> None:
    """Keeps the best step that was evaluated from the rotation, as checkpoint.keep_best says.

    The newest one is saved, if it is the best and no save was due.
    """
    name = run.config.checkpoint.keep_best
    if not name or not now.step:
        return
    saved = run.checkpoints.steps()
    best = processes.all_gather_objects(lambda: best_step(run.workdir, name, {*saved, now.step}))[0]
    run.checkpoints.keep_best(best)
    if best == now.step and best not in saved:
        save(run, now)


def stop_if_diverged(run: ModelRun, now: Progress) -> None:
    """Ends the process where too many updates in a row were not finite."""
    limit = run.config.learner.max_bad_updates
    if int(now.state.bad_updates) >= limit:
        sys.exit(
            f"ssp_jax: {limit} updates in a row were not finite; stopped after step {now.step}"
        )


def export(run: ModelRun, now: Progress) -> None:
    """Writes what was trained, as checkpoint.export says."""
    kind = export_kind(run.config)
    if kind == "none":
        return
    with run.logger.phase("exporting"):
        write.write(
            run.config,
            run.workdir,
            now.step,
            run.model_config,
            now.state.params,
            run.weights.frozen,
            run.workdir / hf_save.FOLDER,
            kind,
            run.mode,
        )
