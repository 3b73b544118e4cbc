"""Seconds and peak memory of loading a model folder in bfloat16: ssp_jax and transformers.

    python benchmarks/weights.py --folder=FOLDER [--repeats=5] [--torch_python=PYTHON]

Each load is a process of its own, in turns, with the files in the system's cache. Seconds are wall
time and the processor time of all threads, for the load call, until every page of the weights has
been touched: transformers only maps the file, and reads it at the first use. Memory is resident
memory of the whole process. Without --torch_python an environment with PyTorch for CPUs and
transformers is made in .venv-torch.
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
sys.path.insert(0, str(ROOT))
from benchmarks.peers import interpreter  # noqa: E402

MIB = 2**20


def load_ssp_jax(folder: str) -> dict[str, float]:
    """Loads all of it on one device."""
    import jax
    import jax.numpy as jnp

    from ssp_jax.model import hf_load

    jax.devices()
    before = peak()
    clock = Clock()
    params = hf_load.load(folder, hf_load.read_config(folder), None, jnp.bfloat16)
    jax.block_until_ready(params)
    times = clock.read()
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / MIB
    return times | {"before": before, "size": size}


def load_transformers(folder: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    before = peak()
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    for x in model.parameters():
        x.detach().view(torch.int16).view(-1)[::2048].sum()  # a value of each page of 4 KiB
    times = clock.read()
    size = sum(x.nbytes for x in model.parameters()) / MIB
    return times | {"before": before, "size": size}


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


LOADERS = {"ssp_jax": load_ssp_jax, "transformers": load_transformers}


def measure(python: str, loader: str, folder: Path) -> dict[str, float]:
    command = [python, __file__, f"--folder={folder}", f"--loader={loader}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch_python", help="a Python with torch and transformers")
    parser.add_argument(
        "--loader", choices=LOADERS, help="load once in this process, print one line of JSON"
    )
    args = parser.parse_args()
    if args.loader:
        figures = LOADERS[args.loader](str(args.folder))
        print(json.dumps(figures | {"peak": peak()}))
        return
    # Transformers loads models only where PyTorch is.
    torch_python = args.torch_python or str(interpreter("torch", ROOT / ".venv-torch"))
    pythons = {"ssp_jax": sys.executable, "transformers": torch_python}
    for file in args.folder.glob("*.safetensors"):
        # Into the system's cache. In pieces, for a child starts with its parent's peak memory.
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    runs: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for _ in range(args.repeats):
        for loader in LOADERS:
            runs[loader].append(measure(pythons[loader], loader, args.folder))
    print(
        "| loader | wall seconds: median | least | most | processor seconds | weights MiB "
        "| before MiB | peak MiB | peak / weights |"
    )
    print("|" + "---|" * 9)
    for loader, numbers in runs.items():
        median = {key: statistics.median(run[key] for run in numbers) for key in numbers[0]}
        walls = [run["wall"] for run in numbers]
        seconds = [median["wall"], min(walls), max(walls), median["cpu"]]
        mebibytes = [median["size"], median["before"], median["peak"]]
        cells = [f"{x:.2f}" for x in seconds] + [f"{x:.0f}" for x in mebibytes]
        cells.append(f"{median['peak'] / median['size']:.2f}")
        print(f"| {loader} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
