"""What self-play brings on the embedded default, over seeds, beside two of the paper's ablations.

    python benchmarks/tiny.py --out=runs/bench_tiny [--seeds=0,1,2] [--variants=full,solver_only,no_verification]

Runs `python -m ssp_jax.main --config=configs/tiny.py` once per variant and seed (a finished run is not repeated) and
prints exact match on the held-out sets before and after, as a table for the README. One run takes about as long as
`make demo`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "full": [],
    "solver_only": ["--config.game.train=solver"],  # [P Table 2]
    "no_verification": ["--config.game.verify=False"],  # [P Table 3]
}


def run(variant: str, seed: int, out: Path) -> dict:
    """The summary of one run; started, or resumed, if it is not there yet."""
    workdir = out / f"{variant}_{seed}"
    summary = workdir / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "ssp_jax.main", "--config=configs/tiny.py", f"--workdir={workdir}"]
        subprocess.run([*command, f"--config.seed={seed}", *VARIANTS[variant]], cwd=ROOT, check=True)
    return json.loads(summary.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    args = parser.parse_args()
    out, seeds = args.out.resolve(), [int(seed) for seed in args.seeds.split(",")]
    lines = [
        "| run | seed | " + "one hop before → after | two hop before → after | average gain | seconds |",
        "|" + "---|" * 6,
    ]
    for variant in args.variants.split(","):
        gains = []
        for seed in seeds:
            summary = run(variant, seed, out)
            before, after = summary["eval"]["before"], summary["eval"]["after"]
            gains.append(np.mean([after[name]["em"] - before[name]["em"] for name in before]))
            cells = [f"{before[name]['em']:.1f} → {after[name]['em']:.1f}" for name in ("one_hop", "two_hop")]
            lines.append(f"| {variant} | {seed} | {' | '.join(cells)} | {gains[-1]:+.1f} | {summary['seconds']:.0f} |")
        lines.append(f"| **{variant}, mean of {len(seeds)}** | | | | **{np.mean(gains):+.1f}** | |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
