"""Plain rollout, no tools: tokens a second of the engine, Tunix's sampler and Hugging Face.

    python benchmarks/generate.py --out=runs/bench_generate [--repeats=3]
        [--cells=1M:8,1M:32,15M:8,15M:32,0.5B:8] [--contenders=ssp_jax,tunix,torch] [--cores=1]
        [--python312=python3.12] [--dtype=float32]

Prompts of 128 random tokens, fixed numbers of new tokens at temperature 1, random weights of Qwen2
shapes. Each cell is one process a contender, one after the other on the same cores; the first
rollout compiles and does not count, the median of the next counts. Log-probs of the sampled tokens
are returned by ssp_jax and Tunix; torch is spared them. Peers are installed here in environments of
their own, with pinned versions; without Python 3.12 Tunix is left out. Leaves a table on the screen
and results.json in --out. On a GPU: --dtype=bfloat16 --cells=0.5B:64:2048,0.5B:256:2048. A cell is
SHAPE:BATCH[:PROMPT], and --cores=0 leaves the processes where they are.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.peers import interpreter  # noqa: E402

Shape = tuple[int, int, int, int, int, int, int]
# Qwen2 shapes: vocabulary, layers, width, query heads, key/value heads, head size, feed-forward
# width; new tokens.
SHAPES = {
    "1M": ((2048, 4, 128, 4, 2, 32, 512), 128),
    "15M": ((8192, 8, 384, 6, 2, 64, 1536), 128),
    "0.5B": ((151936, 24, 896, 14, 2, 64, 4864), 32),
    "1.5B": ((151936, 28, 1536, 12, 2, 128, 8960), 32),
}
PROMPT, ROPE_THETA = 128, 1_000_000
CHUNK = 16  # decode steps that the engine dispatches at once


def prompts(vocab: int, batch: int, length: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(1, vocab - 1, (batch, length))


def timed(rollout: Callable[[], int], repeats: int, expected: int) -> dict[str, Any]:
    """Seconds of each rollout after the first; every one must give exactly the expected number of
    tokens.
    """
    seconds, cpu_seconds = [], []
    for _ in range(repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        given = rollout()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        assert given == expected, f"{given} tokens, expected {expected}"
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "tokens": expected,
    }


class Rollout:
    """A player of the engine that plays one turn of a fixed length."""

    stop_automaton, stop_reason, shared_prefix, temperature = 0, "", 0, 1.0

    def __init__(self, uid: int, prompt: list[int], new: int):
        self.uid, self.tokens, self._limit = uid, list(prompt), len(prompt) + new
        self.logprobs: list[float] = []

    def token_limit(self) -> int:
        return self._limit

    def append(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens
        self.logprobs += logprobs

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> None:
        self.append(tokens, logprobs)

    def insert_result(self, result: Any) -> None:
        raise AssertionError("nothing was searched for")


def run_ssp_jax(
    shape: Shape, batch: int, length: int, new: int, repeats: int, dtype: str
) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from ssp_jax.model import decoder, sharding
    from ssp_jax.rollout import engine, kv_cache, stops
    from ssp_jax.runtime import platform

    platform.prepare()
    kind = jnp.dtype(dtype)
    config = decoder.ModelConfig(*shape, rope_theta=ROPE_THETA, tie_embeddings=True, qkv_bias=True)
    vocab = config.vocab_size

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    init_params = jax.jit(functools.partial(decoder.init_params, config))
    params = sharding.sampler_copy(config, mesh, kind)(init_params(jax.random.key(0)))

    # Nothing ends a turn but its length.
    automaton = stops.build_automaton([], [b"x"] * vocab, vocab)
    sizes = engine.Sizes(
        slots=batch,
        chunk=CHUNK,
        cache_tokens=length + new,
        cache_buckets=(),
        extend_buckets=(length,),
        extend_rows=min(batch, 8),
    )
    one = engine.Engine(config, sizes, [automaton], (vocab,), kind, search=lambda queries: [])
    given = prompts(vocab, batch, length)

    def rollout(steps: int) -> int:
        players = [Rollout(uid, row.tolist(), steps) for uid, row in enumerate(given)]
        one.play(params, jax.random.key(1), players)
        return sum(len(player.logprobs) for player in players)

    result = timed(lambda: rollout(new), repeats, batch * new)
    # Prompts and one chunk: the rest is decode steps alone, where there is a rest.
    shortest = timed(lambda: rollout(1), repeats, batch)
    seconds = statistics.median(result["seconds"]) - statistics.median(shortest["seconds"])
    step_seconds = seconds / (new - CHUNK)

    # A decode step reads all weights, and the keys and values of half a rollout on average.
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    cache = batch * (length + new / 2) * kv_cache.token_bytes(config, kind)
    bandwidth = measure_bandwidth()
    return result | {
        "step_seconds": step_seconds,
        "gb_per_second": bandwidth / 1e9,
        "bandwidth_share": (weights + cache) / bandwidth / step_seconds,
    }


def measure_bandwidth(numbers: int = 1 << 28) -> float:
    """Bytes a second that a pass over so many float32 numbers reads and writes, best of 5."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros((numbers,), jnp.float32)).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x = step(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


class Numbers:
    """A tokenizer for Tunix whose text is numbers: prompts of exactly the same tokens."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return 0


def run_tunix(
    shape: Shape, batch: int, length: int, new: int, repeats: int, dtype: str
) -> dict[str, Any]:
    import jax.numpy as jnp
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2.model import ModelConfig, Qwen2

    vocab, layers, width, heads, kv_heads, head, hidden = shape
    kind = jnp.dtype(dtype)
    config = ModelConfig(
        num_layers=layers,
        vocab_size=vocab,
        embed_dim=width,
        hidden_dim=hidden,
        num_heads=heads,
        head_dim=head,
        num_kv_heads=kv_heads,
        rope_theta=ROPE_THETA,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=kind,
        param_dtype=kind,
    )
    network = Qwen2(config, rngs=nnx.Rngs(0))
    sampler = Sampler(network, Numbers(), CacheConfig(length + new, layers, kv_heads, head))
    texts = [" ".join(map(str, row)) for row in prompts(vocab, batch, length)]

    def rollout() -> int:
        out = sampler(
            texts,
            max_generation_steps=new,
            max_prompt_length=length,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[vocab],  # never sampled
            return_logprobs=True,
        )
        return sum(map(len, out.tokens))

    return timed(rollout, repeats, batch * new)


def run_torch(
    shape: Shape, batch: int, length: int, new: int, repeats: int, dtype: str
) -> dict[str, Any]:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vocab, layers, width, heads, kv_heads, _, hidden = shape
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = Qwen2ForCausalLM(config)
    network = network.to(device, getattr(torch, dtype)).eval()
    given = torch.tensor(prompts(vocab, batch, length), device=device)
    # generate's own default is top_k = 50.
    options = dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
    )

    def rollout() -> int:
        with torch.inference_mode():
            out = network.generate(
                given,
                attention_mask=torch.ones_like(given),
                min_new_tokens=new,
                max_new_tokens=new,
                **options,
            )
        return out[:, length:].numel()

    return timed(rollout, repeats, batch * new)


RUNS = {"ssp_jax": run_ssp_jax, "tunix": run_tunix, "torch": run_torch}


def contender_python(name: str, out: Path, python312: str) -> str | None:
    """The interpreter that runs a contender; None where a peer cannot be installed."""
    if name == "ssp_jax":
        return sys.executable
    return interpreter(name, out / "envs" / name, python312)


def measure(python: str, name: str, cell: str, args: argparse.Namespace) -> dict[str, Any]:
    """One cell of one contender in a process of its own."""
    command = [
        python,
        __file__,
        f"--child={name}",
        f"--cells={cell}",
        f"--repeats={args.repeats}",
        f"--out={args.out}",
    ]
    path = {"PYTHONPATH": str(ROOT)} if name == "ssp_jax" else {}
    done = subprocess.run(
        [*command, f"--dtype={args.dtype}", f"--cores={args.cores}"],
        env={**os.environ, **path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(args: argparse.Namespace) -> None:
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.cores :])
    name, batch, *length = args.cells.split(":")
    shape, new = SHAPES[name]
    given = int(length[0]) if length else PROMPT
    print(json.dumps(RUNS[args.child](shape, int(batch), given, new, args.repeats, args.dtype)))


def table(results: dict[str, dict[str, Any]], names: list[str]) -> str:
    lines = [
        f"| cell | {' | '.join(names)} | ssp_jax / best peer | share of bandwidth |",
        "|---" * (len(names) + 3) + "|",
    ]
    for cell, row in results.items():
        rate = {name: r["tokens"] / statistics.median(r["seconds"]) for name, r in row.items()}
        peers = [rate[name] for name in rate if name != "ssp_jax"]
        ratio = f"{rate['ssp_jax'] / max(peers):.2f}" if peers and "ssp_jax" in rate else ""
        share = f"{row['ssp_jax']['bandwidth_share']:.0%}" if "ssp_jax" in row else ""
        cells = [f"{rate[name]:,.0f}" if name in rate else "" for name in names]
        lines.append(f"| {cell} | {' | '.join(cells)} | {ratio} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument("--cells", default="1M:8,1M:32,15M:8,15M:32,0.5B:8")
    parser.add_argument("--contenders", default=",".join(RUNS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--python312", default="python3.12")
    parser.add_argument("--child", choices=tuple(RUNS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    contenders = args.contenders.split(",")
    pythons = {name: contender_python(name, out, args.python312) for name in contenders}
    names = [name for name, python in pythons.items() if python]
    results: dict[str, dict[str, Any]] = {}
    for cell in args.cells.split(","):
        results[cell] = {}
        for name in names:
            print(f"{cell} {name} ...", flush=True)
            results[cell][name] = measure(str(pythons[name]), name, cell, args)
            (out / "results.json").write_text(
                json.dumps(results, indent=1) + "\n", encoding="utf-8"
            )
    print("tokens a second, prompts included, medians\n" + table(results, names))


if __name__ == "__main__":
    main()
