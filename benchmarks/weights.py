"""Seconds and peak memory of loading a Hugging Face folder in bfloat16: ssp_jax beside transformers.

    python benchmarks/weights.py --folder=FOLDER [--repeats=5] [--torch_python=PYTHON]

Each load is a process of its own, in turns, with the files in the system's cache. Seconds are those of the load call
alone, until all weights are in memory of their own. Memory is resident memory of the whole process. Without
--torch_python an environment with PyTorch for CPUs and transformers is made in .venv-torch.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("torch==2.13.0", "transformers==5.23.0")
MIB = 2**20


def load_ssp_jax(folder: str) -> dict[str, float]:
    """All of it on one device."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from ssp_jax import weights

    jax.devices()
    config, before, start = weights.read_config(folder), peak(), time.perf_counter()
    params = jax.block_until_ready(weights.load(folder, config, None, jnp.bfloat16))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before": before, "size": sum(x.nbytes for x in jax.tree.leaves(params)) / MIB}


def load_transformers(folder: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    before, start = peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before": before, "size": sum(x.nbytes for x in model.parameters()) / MIB}


def peak() -> float:
    """The most memory that this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


LOADERS = {"ssp_jax": load_ssp_jax, "transformers": load_transformers}


def torch_python() -> str:
    """An environment of the benchmark's own: transformers loads models only where PyTorch is."""
    python = ROOT / ".venv-torch" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TORCH], check=True)
    return str(python)


def measure(python: str, loader: str, folder: Path) -> dict[str, float]:
    command = [python, __file__, f"--folder={folder}", f"--loader={loader}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch_python", help="a Python with torch and transformers")
    parser.add_argument("--loader", choices=LOADERS, help="load once in this process, print one line of JSON")
    args = parser.parse_args()
    if args.loader:
        figures = LOADERS[args.loader](str(args.folder))
        print(json.dumps(figures | {"peak": peak()}))
        return
    pythons = {"ssp_jax": sys.executable, "transformers": args.torch_python or torch_python()}
    for file in args.folder.glob("*.safetensors"):
        file.read_bytes()  # into the system's cache
    runs = [{loader: measure(python, loader, args.folder) for loader, python in pythons.items()}]
    runs += [
        {loader: measure(python, loader, args.folder) for loader, python in pythons.items()}
        for _ in range(args.repeats - 1)
    ]
    print("| loader | seconds, median | least | most | weights MiB | process before MiB | peak MiB | peak / weights |")
    print("|" + "---|" * 8)
    for loader in pythons:
        seconds = [run[loader]["seconds"] for run in runs]
        size, before, most = (statistics.median(run[loader][key] for run in runs) for key in ("size", "before", "peak"))
        cells = [f"{x:.2f}" for x in (statistics.median(seconds), min(seconds), max(seconds))]
        print(f"| {loader} | {' | '.join(cells)} | {size:.0f} | {before:.0f} | {most:.0f} | {most / size:.2f} |")


if __name__ == "__main__":
    main()
