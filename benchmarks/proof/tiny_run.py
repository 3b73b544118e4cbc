"""Check 4: steps of configs/tiny.py, with its save, its restart and its export."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.proof.rows import Row, Setting, at_most, noted, verdict
from benchmarks.proof.tokens import ROOT
from configs import tiny
from ssp_jax.assembly.training_run import training_run
from ssp_jax.model import decoder, hf_load, hf_save
from ssp_jax.train import train

# Mean distance of the log-probs of sampler and learner, by the dtype of both.
GAPS = {"float32": 1e-3, "bfloat16": 2e-2}
STEPS = {"float32": 3, "bfloat16": 1}
# Fewer programs to compile than the config has, and larger chunks, which suit a GPU.
CHANGES: dict[str, Any] = {
    "eval.before": False,
    "eval.after": False,
    "engine.chunk": 8,
    "engine.slots": 32,
    "engine.extend_rows": 8,
    "engine.extend_buckets": (64, 448),
    "learner.rows": 4,
    "log.episodes_every": 0,
}
SMALL: dict[str, Any] = {
    "game.answers_per_step": 2,
    "game.group_size": 2,
    "engine.slots": 8,
    "engine.cache_buckets": (),
    "engine.extend_buckets": (448,),
    "learner.rows": 1,
}
PATHS = ("model.path", "data.answers", "retriever.corpus")
# Rewards of the first step as a CPU plays it. Its random numbers are the same everywhere; where
# rounding changes a token, the rest of that episode is another one, and the means hardly move.
REWARDS = ("reward/solver", "reward/proposer")
GOLDEN = ROOT / "benchmarks/goldens/rewards_tiny.json"
REWARD_LIMIT = 0.1


def check(setting: Setting) -> Iterator[Row]:
    for dtype, steps in STEPS.items():
        config = make_config(setting, dtype, 1 if setting.small else steps)
        # In float32 a GPU would round to TF32; in bfloat16 it computes as any run does.
        precision = "highest" if dtype == "float32" else None
        jax.config.update("jax_default_matmul_precision", precision)
        with tempfile.TemporaryDirectory(prefix="ssp_jax_proof_") as folder:
            workdir = Path(folder)
            train(config, folder)
            steps_of_run = metrics(workdir)
            yield from of_steps(steps_of_run, dtype)
            if dtype == "float32" and not setting.small:
                yield from of_rewards(steps_of_run[0])
            if dtype == "float32":
                yield from of_files(config, workdir)


def make_config(setting: Setting, dtype: str, steps: int) -> ConfigDict:
    config = tiny.get_config()
    values = CHANGES | {"steps": steps, "model.dtype": dtype} | (SMALL if setting.small else {})
    values |= {path: str(ROOT / config[path]) for path in PATHS}
    with config.unlocked():
        config.update_from_flattened_dict(values)
        config.data.eval_sets = ConfigDict()
    return config


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Of each step."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write() -> None:
    """Makes the golden, on this CPU."""
    with tempfile.TemporaryDirectory(prefix="ssp_jax_proof_") as folder:
        train(make_config(Setting(False, Path(folder)), "float32", 1), folder)
        first = metrics(Path(folder))[0]
    document = {"made_by": f"jax {jax.__version__} on {jax.default_backend()}, float32"}
    document |= {name: first[name] for name in REWARDS}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def of_rewards(first: dict[str, Any]) -> Iterator[Row]:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name in REWARDS:
        measured = f"{first[name]:.3f}"
        is_ok = abs(first[name] - golden[name]) <= REWARD_LIMIT
        expected = f"{golden[name]:.3f}, by {REWARD_LIMIT} at most"
        yield verdict(f"{name} of the first step, as on a CPU", measured, expected, is_ok)


def of_steps(rows: list[dict[str, Any]], dtype: str) -> Iterator[Row]:
    """What the metrics of the steps say."""
    gap = max(row["update/logprob_gap"] for row in rows)
    yield at_most(f"{dtype}: log-probs of sampler and learner differ by", gap, GAPS[dtype])
    compiles = [row["compiles"] for row in rows]
    name = f"{dtype}: programs compiled after each step"
    if len(compiles) > 1:
        # The first step compiles what is too short for the warm-up.
        yield verdict(name, str(compiles), "none after the first", len(set(compiles)) == 1)
    last = rows[-1]
    seconds = f"{last['seconds']:.1f}, of these {last['update/seconds']:.1f} in the update"
    yield noted(f"{dtype}: seconds of the last step", seconds)
    names = ("reward/solver", "reward/proposer", "update/solver/grad_norm")
    figures = ", ".join(f"{name} {rows[0].get(name, float('nan')):.4g}" for name in names)
    yield noted(f"{dtype}: the first step", figures)
    norms = [row[key] for row in rows for key in row if key.endswith("/grad_norm")]
    finite = bool(np.isfinite(norms).all())
    yield verdict(f"{dtype}: gradients are finite", str(finite), "True", finite)


def of_files(config: ConfigDict, workdir: Path) -> Iterator[Row]:
    """A second start goes on from the save, and the export is what was trained."""
    # Restoring compares the digest of each array with the one that was taken on the device.
    with training_run(config, str(workdir)) as (_, now):
        measured = f"step {now.step}, {len(now.damaged)} damaged"
        whole = now.step == config.steps and not now.damaged
        yield verdict("a save is restored bit for bit", measured, f"step {config.steps}", whole)
        params = jax.device_get(now.state.params)
    folder = workdir / hf_save.FOLDER
    model = hf_load.read_config(folder)
    exported = decoder.flatten(jax.device_get(hf_load.load(folder, model, None, jnp.bfloat16)))
    differing = [
        name
        for name, value in decoder.flatten(params).items()
        if not np.array_equal(exported[name], value.astype(jnp.bfloat16))
    ]
    measured = f"{len(exported) - len(differing)} of {len(exported)} arrays"
    yield verdict("the export loads as the weights", measured, "all equal", not differing)
