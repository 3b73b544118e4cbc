"""The paper's ablations on the embedded default, over seeds, in its tables beside its numbers.

    python benchmarks/ablations.py --out=runs/ablations [--tables=2,3,5,6] [--seeds=0,1,2]
        [--steps=40] [--jobs=1]

Runs `python -m ssp_jax.main --config=configs/tiny.py` once per variant and seed and prints the
tables in Markdown, for docs/ablations.md. A variant of several tables is run once, a finished run
of the same config is not repeated, and one that was ended goes on. A run takes about as long as
`make demo`; all four tables are 15 runs for each seed. --jobs runs share the machine. At Ctrl-C,
SIGTERM or SIGHUP the runs at work save, and then all ends, after Ctrl-C with code 130.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SSP = "SSP"  # the default, a row of every table
VARIANTS = {
    SSP: "",
    "solver only": "game.train=solver",
    "proposer only": "game.train=proposer",
    "no verification": "game.verify=False",
    "0 noise documents": "game.noise_documents=0",
    "1 noise document": "game.noise_documents=1",
    "7 noise documents": "game.noise_documents=7",
    "dummy padding": "game.batch_fill=dummy",
    "dynamic resampling": "game.batch_fill=resample",
    "full reuse": "game.batch_fill=full_reuse",
    "REINFORCE / REINFORCE": "game.rl_pair=reinforce_reinforce",
    "REINFORCE++ / GRPO": "game.rl_pair=reinforcepp_grpo",
    "GRPO / REINFORCE": "game.rl_pair=grpo_reinforce",
    "GRPO / REINFORCE++": "game.rl_pair=grpo_reinforcepp",
    "GRPO / GRPO": "game.rl_pair=grpo_grpo",
}
BEFORE = "before"


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    columns: Sequence[str]
    rows: dict[str, Sequence[float]]  # variant -> the paper's figures, percent right by a judge
    titles: dict[str, str]  # of rows whose variant has another name
    seconds: bool = False  # with our seconds a step


TABLES = {
    2: Table(
        "opponents (paper: Qwen2.5-7B-Instruct, average of seven sets)",
        ["paper"],
        {BEFORE: [41.5], "solver only": [44.2], "proposer only": [41.7], SSP: [49.5]},
        {},
    ),
    3: Table(
        "verification (paper: Qwen2.5-7B-Instruct, mean of three sets of one hop and of four of "
        "several)",
        ["paper, general", "paper, multi-hop"],
        {
            "no verification": [49.5, 36.7],
            "0 noise documents": [58.5, 38.2],
            "1 noise document": [58.5, 36.9],
            SSP: [60.0, 41.6],
            "7 noise documents": [57.8, 35.9],
        },
        {SSP: "4 noise documents (SSP)"},
    ),
    5: Table(
        "filling the batch (paper: Qwen2.5-7B-Base, average of seven sets)",
        ["paper"],
        {"dummy padding": [41.4], "dynamic resampling": [42.4], "full reuse": [44.4], SSP: [48.7]},
        {SSP: "periodic reset (SSP)"},
    ),
    6: Table(
        "RL algorithms, proposer / solver (paper: Qwen2.5-7B-Instruct, average of seven sets)",
        ["paper", "paper, s a step"],
        {
            SSP: [49.5, 83.4],
            "REINFORCE / REINFORCE": [42.0, 9.1],
            "REINFORCE++ / GRPO": [48.1, 80.0],
            "GRPO / REINFORCE": [46.5, 50.1],
            "GRPO / REINFORCE++": [29.1, 66.7],
            "GRPO / GRPO": [50.9, 504.4],
        },
        {SSP: "REINFORCE / GRPO (SSP)"},
        seconds=True,
    ),
}
SETS = {"one hop": ("one_hop",), "two hop": ("two_hop",), "average": ("one_hop", "two_hop")}


@dataclass(frozen=True)
class Plan:
    out: Path
    steps: int

    def workdir(self, variant: str, seed: int) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in variant.replace("+", "p"))
        return self.out / f"{name}_seed{seed}_steps{self.steps}"

    def arguments(self, variant: str, seed: int) -> list[str]:
        """The arguments of a run."""
        arguments = [
            "--config=configs/tiny.py",
            f"--workdir={self.workdir(variant, seed)}",
            f"--config.seed={seed}",
            f"--config.steps={self.steps}",
            "--config.checkpoint.export=none",
        ]
        if VARIANTS[variant]:
            arguments.append(f"--config.{VARIANTS[variant]}")
        return arguments

    def config(self, variant: str, seed: int) -> dict[str, Any]:
        """The config of a run, as its workdir has it."""
        from ssp_jax.config.command_line import parse_command_line
        from ssp_jax.workdir import as_read

        return as_read(parse_command_line(self.arguments(variant, seed)).config)

    def finished(self, variant: str, seed: int) -> bool:
        """Whether the workdir has a summary of this config and number of steps.

        The exit code does not say it: a run that a signal has ended saves and ends with 0 too.
        """
        workdir = self.workdir(variant, seed)
        if not all((workdir / name).exists() for name in ("summary.json", "config.json")):
            return False
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        done = self.summary(variant, seed)["steps"]
        return done == self.steps and config == self.config(variant, seed)

    def start(self, variant: str, seed: int) -> subprocess.Popen[bytes]:
        """Starts or resumes a run; its output goes to log.txt in its workdir."""
        workdir = self.workdir(variant, seed)
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ssp_jax.main", *self.arguments(variant, seed)]
        # Runs of the same shapes share their programs.
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self.out / "compiled")} | os.environ
        with open(workdir / "log.txt", "a", encoding="utf-8") as log:
            # In a process group of its own, which does not get a terminal's Ctrl-C.
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0
            )

    def run(self, todo: Sequence[tuple[str, int]], jobs: int) -> None:
        """Runs each variant and seed that is not finished, `jobs` at a time.

        An error or a signal ends the runs at work first.
        """
        waiting = [pair for pair in todo if not self.finished(*pair)]
        running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    pair = waiting.pop(0)
                    running[pair] = self.start(*pair)
                time.sleep(0.2)
                ended = [pair for pair, process in running.items() if process.poll() is not None]
                for variant, seed in ended:
                    del running[variant, seed]
                    if self.finished(variant, seed):
                        print(f"finished: {variant}, seed {seed}", file=sys.stderr, flush=True)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()

    def summary(self, variant: str, seed: int) -> dict[str, Any]:
        path = self.workdir(variant, seed) / "summary.json"
        return json.loads(path.read_text(encoding="utf-8"))


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def table_lines(number: int, plan: Plan, seeds: Sequence[int]) -> list[str]:
    table = TABLES[number]
    heads = ["", *SETS]
    if table.seconds:
        heads.append("s a step")
    heads += table.columns
    lines = [
        f"Table {number}, {table.title}:",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for variant, figures in table.rows.items():
        when = "before" if variant == BEFORE else "after"
        played = SSP if variant == BEFORE else variant
        runs = [plan.summary(played, seed) for seed in seeds]
        cells = []
        for names in SETS.values():
            means = [exact_match(run["eval"][when], names) for run in runs]
            cells.append(spread(means))
        if table.seconds:
            seconds = [run["seconds"] / run["steps"] for run in runs]
            cells.append(spread(seconds))
        cells += [f"{figure:.1f}" for figure in figures]
        title = table.titles.get(variant, variant)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def exact_match(scores: dict[str, dict[str, float]], sets: Sequence[str]) -> float:
    """Mean over these sets, percent. scores: of an evaluation, by set."""
    return float(np.mean([scores[name]["em"] for name in sets]))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument("--tables", type=numbers, default=list(TABLES))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(
            f"--tables: the paper's Table {min(unknown)} is none of {', '.join(map(str, TABLES))}"
        )
    if args.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, got {args.jobs}")
    plan = Plan(args.out.resolve(), args.steps)
    wanted = {SSP}  # which "before" is a row of
    for number in args.tables:
        wanted |= TABLES[number].rows.keys()
    variants = [variant for variant in VARIANTS if variant in wanted]
    todo = [(variant, seed) for seed in args.seeds for variant in variants]
    plan.run(todo, args.jobs)
    left = [pair for pair in todo if not plan.finished(*pair)]
    for variant, seed in left:
        log = plan.workdir(variant, seed) / "log.txt"
        print(f"not finished: {variant}, seed {seed}; its last words in {log}", file=sys.stderr)
    if left:
        unfinished = f"{len(left)} of {len(todo)} runs are not finished"
        sys.exit(f"{unfinished}; the same command takes them up again")
    seeds = ", ".join(map(str, args.seeds))
    print(
        f"\nExact match in percent after {args.steps} steps of configs/tiny.py, "
        f"mean ± deviation over seeds {seeds}; the paper's figures are by an LLM judge.\n"
    )
    for number in args.tables:
        print("\n".join(table_lines(number, plan, args.seeds)))


class Stopped(KeyboardInterrupt):
    """By another signal than Ctrl-C."""


def _stop(*_: object) -> None:
    raise Stopped


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        main()
    except KeyboardInterrupt as error:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(1 if isinstance(error, Stopped) else 130)
