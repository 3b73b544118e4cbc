"""Seconds until the engine's programs are compiled: one after the other, and all together.

    python benchmarks/warm_up.py [--configs=tiny,qwen0p5b] [--repeats=3]

Each measurement is a process of its own without a cache on disk, both ways in turns, on all cores.
Programs are compiled for the shapes of the config, with the compute dtype float32 where this is a
CPU: no weights are read and none of the programs runs. Prints a table of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WAYS = ("one by one", "together")


def compile_all(name: str, way: str) -> dict[str, float]:
    """Seconds of lowering and compiling, and the number of programs."""
    import jax
    import jax.numpy as jnp

    from ssp_jax.assembly import sections
    from ssp_jax.assembly.engine import make_engine
    from ssp_jax.config.files import load_config
    from ssp_jax.model import decoder, hf_load, sharding
    from ssp_jax.plan.planner import read_model
    from ssp_jax.runtime import platform
    from ssp_jax.runtime.dispatch import compile_together

    platform.prepare()

    config = load_config(ROOT / "configs" / f"{name}.py")
    tokenizer = hf_load.load_tokenizer(ROOT / "assets/tiny/model")
    model = read_model(config.model.path)
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else config.model.dtype)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    sizes = sections.make_sizes(config, 1)
    engine = make_engine(model, tokenizer, (0,), sizes, dtype, lambda _: [], mesh)
    copy = sharding.sampler_copy(model, mesh, dtype)
    params = jax.eval_shape(copy, decoder.abstract_params(model))
    device = engine.abstract_device(params, jax.random.key(0))

    start = time.perf_counter()
    programs = [call.lower() for call in device.empty_calls(sorted(set(sizes.extend_buckets)))]
    lowered = time.perf_counter()
    if way == "together":
        compile_together(programs)
    else:
        for program in programs:
            program.compile()
    compiled = time.perf_counter()
    return {
        "programs": len(programs),
        "lowering": lowered - start,
        "compiling": compiled - lowered,
    }


def measure(name: str, way: str) -> dict[str, float]:
    """One measurement, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, f"--configs={name}", f"--child={way}"],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, found: dict[str, list[dict[str, float]]]) -> str:
    def median(way: str, key: str) -> float:
        return statistics.median(one[key] for one in found[way])

    slow, quick = (median(way, "compiling") for way in WAYS)
    programs, lowering = (median(WAYS[0], key) for key in ("programs", "lowering"))
    return (
        f"| {name} | {programs:.0f} | {lowering:.1f} s | {slow:.1f} s | {quick:.1f} s "
        f"| {slow / quick:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", default="tiny,qwen0p5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_all(args.configs, args.child)))
        return
    print("| config | programs | lowering | one by one | together | ratio |")
    print("|---" * 6 + "|")
    for name in args.configs.split(","):
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                found[way].append(measure(name, way))
        print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
