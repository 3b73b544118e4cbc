"""One GRPO update, ours beside Tunix's learner and a PyTorch loop; and the gain of packing.

    python benchmarks/update.py --out=runs/bench_update [--shapes=1m,15m,0.5b]
        [--contenders=ssp_jax,lora,tunix,torch]

Runs on whatever JAX (and PyTorch) find, float32 on CPU and bfloat16 compute elsewhere, each
contender and shape in a process of its own, so that peak memory is its own. The peers get virtual
environments with pinned versions under --out; Tunix needs Python 3.12 and is left out, with a line
that says so, where there is none. Compare within one run only.

The update: a batch of episodes of 128 prompt and 384 sampled tokens (8; 1 for 0.5b and 1.5b),
on-policy clipped surrogate without KL, no reference model, AdamW and clipping by the global norm.
Tokens a second count all tokens. lora: ours with an adapter of rank 32 on all projections, its base
frozen. And, for the first of the shapes, with log-normal lengths (mean
400, at most 2,048), ours packed against ours with one episode a row.
"""

import argparse
import dataclasses
import itertools
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
from benchmarks.peers import PACKAGES, interpreter  # noqa: E402

PROMPT, RESPONSE = 128, 384
CLIP_LOW, CLIP_HIGH, RATE = 0.2, 0.28, 1e-6
RANK = 32  # of lora
TIME_LIMIT = 120.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen2 with tied embeddings."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    batch: int
    # ours, as `rows`; the peers keep everything and take the whole batch, as they do by default
    remat: str
    rows: int  # of a micro-batch

    @property
    def params(self) -> int:
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.vocab * self.width + self.layers * (attention + 3 * self.width * self.mlp)

    def flops(self, tokens: int, length: int, frozen: bool = False) -> float:
        """Forward and backward, causal attention counted once, recomputation not at all.

        frozen: of these weights there are no gradients; what trains beside them is not counted.
        """
        attention = self.layers * self.heads * self.head * length
        return tokens * (self.params * (4.0 if frozen else 6.0) + 6.0 * attention)


SHAPES = {
    "1m": Shape(2048, 4, 128, 4, 2, 32, 384, 8, "dots", 2),
    "15m": Shape(8192, 8, 384, 6, 2, 64, 1024, 8, "dots", 2),
    "0.5b": Shape(151936, 24, 896, 14, 2, 64, 4864, 1, "dots", 1),  # Qwen2.5-0.5B
    "1.5b": Shape(151936, 28, 1536, 12, 2, 128, 8960, 1, "attention", 1),  # Qwen2.5-1.5B
}


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` steps after two that compile and warm up; step() returns when
    its work is done.

    Two are enough where they take more than TIME_LIMIT seconds.
    """
    seconds: list[float] = []
    for _ in range(2 + repeats):
        if len(seconds) >= 4 and sum(seconds) > TIME_LIMIT:
            break
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        print(f"  step of {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds[2:]


def peak_gib(device_peak: int | None) -> float:
    import resource

    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return (device_peak or of_process) / 2**30


def jax_device() -> tuple[str, int | None]:
    import jax

    stats = jax.devices()[0].memory_stats()
    return jax.devices()[0].device_kind, stats and stats["peak_bytes_in_use"]


@dataclasses.dataclass
class Played:
    """An episode as the learner takes it."""

    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]


def episodes(shape: Shape, lengths: list[int], prompt: int) -> list[Played]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        Played(rng.integers(0, shape.vocab, n).tolist(), [i >= prompt for i in range(n)], [0.0] * n)
        for n in lengths
    ]


def our_learner(
    shape: Shape, rows: int, row_tokens: int, rank: int, attention: str = "auto", **changes: Any
) -> tuple[Any, Any]:
    """Learner and train state of the default config, with the objective that the peers have.

    No old log-probs are computed: the sampler's serve. attention: of config key model.attention.
    changes: other values of config section learner.
    """
    import jax

    from configs import default
    from ssp_jax.assembly.sections import make_learner_config
    from ssp_jax.learner import update
    from ssp_jax.learner.state import init_state
    from ssp_jax.model import attention as kernels
    from ssp_jax.model import decoder
    from ssp_jax.model.linear import Lora

    lora = Lora(rank, 32.0, tuple(decoder.PROJECTIONS)) if rank else None
    model_config = decoder.ModelConfig(
        shape.vocab, shape.layers, shape.width, shape.heads, shape.kv_heads, shape.head, shape.mlp,
        tie_embeddings=True, qkv_bias=True, lora=lora,
    )  # fmt: skip
    config = default.get_config()
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.model.remat = shape.remat
    config.model.attention = attention
    config.learner.update(
        learning_rate=RATE,
        warmup_steps=0,
        row_tokens=row_tokens,
        rows=rows,
        logprob_chunk=128 if row_tokens % 128 == 0 else row_tokens,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        clip_dual=0.0,
        kl_coef=0.0,
        kl_bound=0.0,
        aggregation="token_mean",
    )
    config.learner.update(changes)
    gpu = kernels.capability(jax.devices()[0])
    c = make_learner_config(config, model_config, platform=jax.default_backend(), gpu=gpu)
    init_params = jax.jit(decoder.init_params, static_argnums=0)
    params = init_params(model_config, jax.random.key(0))
    base, adapter = decoder.split_adapter(params)
    if lora is None:
        trained, frozen = base, {}
    else:
        trained = adapter
        frozen = jax.tree.map(lambda x: x.astype(c.dtype), base)
    del params, base
    state = init_state(c, trained)
    return update.Learner(c, state, None, jax.device_put, lambda: frozen), state


def our_seconds(
    shape: Shape,
    played: list[Played],
    rows: int,
    row_tokens: int,
    repeats: int,
    rank: int = 0,
    attention: str = "auto",
) -> list[float]:
    import jax
    import numpy as np

    learner, state = our_learner(shape, rows, row_tokens, rank, attention)
    states, advantages = [state], np.linspace(-1, 1, len(played) + 1)[1:].astype(np.float32)
    del state

    def step() -> None:
        new, _ = learner.update(states.pop(), played, advantages, np.random.default_rng(0))
        states.append(jax.block_until_ready(new))

    return timed(step, repeats)


def run_ssp_jax(shape: Shape, repeats: int, rank: int = 0) -> dict[str, Any]:
    played = episodes(shape, [PROMPT + RESPONSE] * shape.batch, PROMPT)
    seconds = our_seconds(shape, played, shape.rows, PROMPT + RESPONSE, repeats, rank)
    kind, peak = jax_device()
    return {"seconds": seconds, "peak_gib": peak_gib(peak), "device": kind}


def run_lora(shape: Shape, repeats: int) -> dict[str, Any]:
    return run_ssp_jax(shape, repeats, RANK)


def run_tunix(shape: Shape, repeats: int) -> dict[str, Any]:
    """The train step that its GRPO learner compiles, on a batch as that learner makes it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.rl import algo_core, trainer
    from tunix.rl.grpo import grpo_learner
    from tunix.sft import peft_trainer

    config = qwen2.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        embed_dim=shape.width,
        hidden_dim=shape.mlp,
        num_heads=shape.heads,
        head_dim=shape.head,
        num_kv_heads=shape.kv_heads,
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
    )
    algorithm = grpo_learner.GRPOConfig(beta=0.0, epsilon=CLIP_LOW, loss_agg_mode="token-mean")
    algorithm.epsilon_high = CLIP_HIGH
    algorithm.temperature = 1.0
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.01))
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
    one = trainer.Trainer(qwen2.Qwen2(config, rngs=nnx.Rngs(0)), optimizer, settings, dict)
    one.with_loss_fn(
        lambda m, train_example: algo_core.grpo_loss_fn(m, train_example, algorithm, 0, 1),
        has_aux=True,
    )
    one.with_gen_model_input_fn(lambda example: {"train_example": example})
    rng = np.random.default_rng(0)

    def tokens(length: int) -> jax.Array:
        # 0 is padding, 1 the end
        return jnp.asarray(rng.integers(2, shape.vocab, (shape.batch, length)))

    example = grpo_learner.TrainExample(
        prompt_ids=tokens(PROMPT),
        prompt_mask=jnp.ones((shape.batch, PROMPT), bool),
        completion_ids=tokens(RESPONSE),
        completion_mask=jnp.ones((shape.batch, RESPONSE), bool),
        ref_per_token_logps=None,
        advantages=jnp.linspace(-1, 1, shape.batch + 1)[1:],
        old_per_token_logps=None,
    )
    step = one.jit_train_and_eval_step(cache_nnx_graph=True)[0]
    seconds = timed(lambda: jax.block_until_ready((step(example), nnx.state(one.model))), repeats)
    kind, peak = jax_device()
    return {"seconds": seconds, "peak_gib": peak_gib(peak), "device": kind}


def run_torch(shape: Shape, repeats: int) -> dict[str, Any]:
    """A plain loop over a Hugging Face model, float32 weights, autocast to bfloat16 on a GPU."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    config = Qwen2Config(
        vocab_size=shape.vocab,
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).float().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    tokens = torch.randint(0, shape.vocab, (shape.batch, PROMPT + RESPONSE), device=device)
    advantage = torch.linspace(-1, 1, shape.batch + 1, device=device)[1:, None]

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            logits = model(input_ids=tokens, logits_to_keep=RESPONSE + 1, use_cache=False).logits[
                :, :-1
            ]
        targets = tokens[:, PROMPT:, None]
        logp = torch.gather(logits.float().log_softmax(-1), -1, targets)[..., 0]
        ratio = torch.exp(logp - logp.detach())
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits for the GPU

    seconds = timed(step, repeats)
    peak = torch.cuda.max_memory_allocated() if gpu else None
    name = torch.cuda.get_device_name() if gpu else "cpu"
    return {"seconds": seconds, "peak_gib": peak_gib(peak), "device": name}


def run_packing(shape: Shape, repeats: int) -> dict[str, Any]:
    """48 episodes in rows of 2,048 tokens: first-fit-decreasing, and one to a row; the same learner
    does both.
    """
    import numpy as np

    row_tokens, mean = 2048, 400
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.5 * 0.7**2, 0.7, 48)
    played = episodes(shape, np.clip(drawn, 32, row_tokens).astype(int).tolist(), 16)
    padded = [
        Played(e.tokens + [0] * (row_tokens - len(e.tokens)), e.sampled, e.logprobs) for e in played
    ]
    for e in padded:
        e.sampled = e.sampled + [False] * (row_tokens - len(e.sampled))
        e.logprobs = e.logprobs + [0.0] * (row_tokens - len(e.logprobs))
    useful, result = sum(len(e.tokens) for e in played), {}
    for name, batch in (("packed", played), ("padded", padded)):
        seconds = statistics.median(our_seconds(shape, batch, shape.rows, row_tokens, repeats))
        result[name] = {"useful_tokens_per_second": useful / seconds}
    from ssp_jax.learner import batches

    cells = (
        -(-len(batches.pack([len(e.tokens) for e in played], row_tokens)) // shape.rows)
        * shape.rows
        * row_tokens
    )
    result["packed"]["useful_share"] = useful / cells
    result["padded"]["useful_share"] = useful / (len(padded) * row_tokens)
    return result


WORKERS = {
    "ssp_jax": run_ssp_jax,
    "lora": run_lora,
    "tunix": run_tunix,
    "torch": run_torch,
    "packing": run_packing,
}


def measure(contender: str, shape: str, repeats: int, out: Path) -> dict[str, Any] | None:
    """What the worker process prints last; None if it fails. Its steps and errors go to stderr as
    they come.
    """
    python: str | None = sys.executable
    if contender in PACKAGES:
        python = interpreter(contender, out / "envs" / contender)
    if python is None:
        return None
    command = [
        python,
        __file__,
        f"--worker={contender}",
        f"--shapes={shape}",
        f"--repeats={repeats}",
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"{shape} {contender}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        print(f"{contender} {shape} failed with exit code {done.returncode}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def summarize(name: str, contender: str, result: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from ssp_jax.plan.hardware import peak_flops

    shape = SHAPES[name]
    seconds = statistics.median(result["seconds"])
    tokens = shape.batch * (PROMPT + RESPONSE)
    rate = shape.flops(tokens, PROMPT + RESPONSE, contender == "lora") / seconds
    peak = peak_flops(result["device"])
    return result | {
        "tokens_per_second": tokens / seconds,
        "gflops": rate / 1e9,
        "mfu": peak and rate / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(path).expanduser())
    parser.add_argument("--shapes", default="1m,15m,0.5b")
    parser.add_argument("--contenders", default="ssp_jax,lora,tunix,torch,packing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker in ("ssp_jax", "lora", "packing"):
            from ssp_jax.runtime import platform

            platform.prepare()
        print(json.dumps(WORKERS[args.worker](SHAPES[args.shapes], args.repeats)))
        return
    if args.out is None:
        parser.error("--out is missing: a folder for the results and the peers' environments")
    out, results = args.out.resolve(), {}
    out.mkdir(parents=True, exist_ok=True)
    shapes = args.shapes.split(",")
    for shape, contender in itertools.product(shapes, args.contenders.split(",")):
        if contender == "packing" and shape != shapes[0]:
            continue
        if result := measure(contender, shape, args.repeats, out):
            results[f"{shape} {contender}"] = (
                result if contender == "packing" else summarize(shape, contender, result)
            )
            (out / "update.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


def show(results: dict[str, dict[str, Any]]) -> None:
    print("| shape and contender | seconds | tokens/s | GFLOP/s | MFU | peak GiB |")
    print("|---|---|---|---|---|---|")
    packed = []
    for name, r in results.items():
        if name.endswith("packing"):
            packed.append((name, r))
            continue
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
        rates = f"{r['tokens_per_second']:,.0f} | {r['gflops']:,.1f}"
        seconds = statistics.median(r["seconds"])
        print(f"| {name} | {seconds:.3g} | {rates} | {mfu} | {r['peak_gib']:.2f} |")
    if packed:
        print("\n| log-normal lengths | useful tokens/s | useful share of rows |\n|---|---|---|")
    for name, result in packed:
        for kind, r in result.items():
            rate, share = r["useful_tokens_per_second"], r["useful_share"]
            print(f"| {name.removesuffix(' packing')} {kind} | {rate:,.0f} | {share:.1%} |")


if __name__ == "__main__":
    main()
