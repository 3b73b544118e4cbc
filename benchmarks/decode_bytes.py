"""Bytes that decoding reads over a step of self-play, against weights and the tokens in use alone.

    python benchmarks/decode_bytes.py [--configs=qwen7b:8,qwen1p5b_lora:1,qwen0p5b:1] [--seed=0]

CONFIG:DEVICES, each with the config's engine on one of the devices that share its slots. Games with
the paper's numbers (256 answers, 5 attempts) go through the engine's own scheduler, without a
model: a player knows how long its turns and observations will be. For each chunk the table adds up
the bytes of one of its steps: the weights, and the rows of keys and values in the shapes of the
program that the engine would call. "flash": by the kernel for NVIDIA GPUs from Ampere on, "splash":
by that for TPUs, each with whole blocks of keys up to the length of each slot that decodes, and its
results, written and read. "buckets": elsewhere, with engine.row_shares. "all rows": each piece of
the cache is read whole, as without them. What a compiled chunk reads is held to these shapes by
tests/rollout.

The lengths are drawn, for no run of such a model is at hand: 1 to 10 searches (geometric, mean 3
for a proposer and 2.5 for a solver), turns of 80 to 100 tokens and observations of 450 (medians,
lognormal), prompts of 450 to 500; half of the questions pass the verifier.
"""

import argparse
import collections
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ssp_jax.assembly import sections  # noqa: E402
from ssp_jax.config.files import load_config  # noqa: E402
from ssp_jax.model import decoder  # noqa: E402
from ssp_jax.plan.planner import read_model  # noqa: E402
from ssp_jax.rollout import (  # noqa: E402
    decode_kernel,
    decode_mosaic,
    decode_triton,
    kv_cache,
    sampler,
)
from ssp_jax.rollout.scheduler import Scheduler  # noqa: E402

Turn = tuple[int, int]  # tokens sampled, and of the observation behind them
ANSWERS, ATTEMPTS, NOISE_TOKENS, VERIFIED = 256, 5, 4 * 150, 0.5
KERNELS = ("flash", "splash")
WAYS = ("in use", *KERNELS, "buckets", "all rows")


class Scripted:
    """A player whose turns have lengths that are known from the start."""

    stop_automaton, shared_prefix, temperature = 0, 0, 1.0

    def __init__(self, uid: int, prompt: int, turns: list[Turn], follow: Sequence["Scripted"] = ()):
        self.uid = uid
        self.tokens = [uid] * prompt
        self.turns = turns
        self.follow = follow
        self.turn = 0
        self.stop_reason = ""

    def token_limit(self) -> int:
        return len(self.tokens) + self.turns[self.turn][0] + 1

    def append(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        self.tokens += tokens
        self.turn += 1
        if stop == sampler.FULL or self.turn == len(self.turns):
            self.stop_reason = "end"
            return None
        return "query"

    def insert_result(self, result: Any) -> None:
        self.tokens += [self.uid] * self.turns[self.turn - 1][1]


def game(answers: int, seed: int) -> list[Scripted]:
    """The proposers of a step, each with the verifier and the solvers that follow from it."""
    rng = np.random.default_rng(seed)
    uids = iter(range(1 << 30))

    def drawn(median: float, spread: float) -> int:
        return max(8, int(rng.lognormal(np.log(median), spread)))

    def turns(searches: float) -> list[Turn]:
        number = min(10, int(rng.geometric(1 / searches)))
        return [*[(drawn(80, 0.6), drawn(450, 0.4)) for _ in range(number)], (drawn(100, 0.5), 0)]

    def proposer() -> Scripted:
        own = turns(3.0)
        passes = rng.random() < VERIFIED
        solvers = [Scripted(next(uids), 450, turns(2.5)) for _ in range(ATTEMPTS if passes else 0)]
        prompt = 400 + NOISE_TOKENS + sum(observed for _, observed in own)
        verifier = Scripted(next(uids), prompt, [(drawn(80, 0.5), 0)], solvers)
        return Scripted(next(uids), 500, own, [verifier])

    return [proposer() for _ in range(answers)]


class Slots:
    """What the device would hold: how far each slot is, and how far its turn goes."""

    def __init__(self, number: int, last: int):
        self.length_B = np.zeros(number, int)
        self._left_B = np.zeros(number, int)
        self._stop_B = np.full(number, sampler.EOS)
        self._last = last

    def start(self, slot: int, length: int, turn: int) -> None:
        self.length_B[slot] = length
        self._left_B[slot] = turn
        self._stop_B[slot] = sampler.RUNNING

    def decode(self, turns: Iterable[int], steps: int, room_B: np.ndarray) -> sampler.Chunk:
        B = len(self.length_B)
        count_B = np.zeros(B, int)
        for slot in turns:
            if self._stop_B[slot] != sampler.RUNNING:
                continue
            count = min(steps, self._left_B[slot], room_B[slot] - self.length_B[slot])
            count_B[slot] = max(0, count)
        self.length_B += count_B
        self._left_B -= count_B
        running_B = self._stop_B == sampler.RUNNING
        self._stop_B[running_B & (self._left_B == 0)] = sampler.EOS
        self._stop_B[running_B & (self.length_B + 1 >= self._last)] = sampler.LIMIT
        blank_CB = np.zeros((steps, B), int)
        return sampler.Chunk(blank_CB, blank_CB, count_B, self._stop_B.copy())


Seen = Callable[[Scheduler, Slots, dict[int, int]], None]


def replay(layout: kv_cache.Layout, steps: int, players: list[Scripted], seen: Seen) -> None:
    """Engine.play without its device. seen: called before each chunk."""

    def search(queries: list[str]) -> Future[Sequence[Any]]:
        found: Future[Sequence[Any]] = Future()
        found.set_result(queries)
        return found

    scheduler = Scheduler(layout, steps, players, lambda player: player.follow, search, False)
    slots = Slots(layout.rows[0], layout.ends[-1])
    in_flight: sampler.Chunk | None = None
    in_flight_turns: dict[int, int] = {}
    while in_flight is not None or not scheduler.is_done():
        scheduler.take_results(lambda: None)
        for write in itertools.chain(*scheduler.pending()):
            turn = write.limit - len(write.tokens) - 1
            slots.start(write.slot, write.filled + write.count, turn)
        turns = scheduler.running()
        chunk = None
        if turns and not scheduler.ending(turns, in_flight_turns):
            seen(scheduler, slots, turns)
            chunk = slots.decode(turns, steps, scheduler.memory.room_B)
        if in_flight is not None:
            scheduler.take_chunk(in_flight, in_flight_turns)
        in_flight = chunk
        in_flight_turns = turns


def measure(name: str, devices: int, seed: int) -> str:
    """The row of one config: bytes of a mean step each way, and their ratios to what is in use."""
    config = load_config(ROOT / "configs" / f"{name}.py")
    model = read_model(config.model.path)
    dtype = jnp.dtype(config.model.dtype)
    abstract = jax.tree.leaves(decoder.abstract_params(model.base if model.lora else model))
    weights = dtype.itemsize * sum(x.size for x in abstract)
    token = kv_cache.token_bytes(model, dtype)
    sizes = sections.make_sizes(config, devices)
    layout = kv_cache.full_layout(sizes.cache_ends(), sizes.slots)
    heads = (model.num_kv_heads, model.head_dim)
    blocks = {
        kernel: decode_kernel.keys_read_together(kernel, *heads, dtype, layout.lengths)
        for kernel in KERNELS
    }
    results = result_bytes(model, sizes.slots)
    read: collections.Counter[str] = collections.Counter()
    chunks = 0

    def seen(scheduler: Scheduler, slots: Slots, turns: dict[int, int]) -> None:
        nonlocal chunks
        chunks += 1
        depth, rows = scheduler.reach(turns)
        bucket = next(b for b in layout.row_buckets(depth, sizes.row_shares) if rows <= b)
        whole = sizes.slots * layout.ends[depth - 1]
        left_out = (sizes.slots - bucket) * layout.lengths[depth - 1]
        used_B = slots.length_B[list(turns)]
        tokens = {"in use": used_B.sum(), "buckets": whole - left_out, "all rows": whole}
        for kernel, block in blocks.items():
            tokens[kernel] = (-(-used_B // block) * block).sum() + results[kernel] / token
        read.update({way: weights + tokens[way] * token for way in WAYS})

    replay(layout, sizes.chunk, game(ANSWERS // devices, seed), seen)
    gb = {way: read[way] / chunks / 1e9 for way in WAYS}
    ideal = gb.pop("in use")
    cells = " | ".join(f"{size:.1f} ({size / ideal:.2f})" for size in gb.values())
    return f"| {name} on {devices} | {sizes.slots} | {chunks} | {ideal:.1f} | {cells} |"


def result_bytes(model: decoder.ModelConfig, slots: int) -> dict[str, int]:
    """What each kernel's programs write in a step, float32, and what of it is read again."""
    heads = model.num_kv_heads
    group = model.num_heads // heads
    row_bytes = 4 * (model.head_dim + 2)
    rows = {
        "flash": decode_triton.splits(slots, heads) * (group + decode_triton.padded_group(group)),
        "splash": group + decode_mosaic.padded_group(group),
    }
    return {name: model.num_layers * slots * heads * n * row_bytes for name, n in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", default="qwen7b:8,qwen1p5b_lora:1,qwen0p5b:1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("GB that a decode step reads on a device, mean (and times what is in use)")
    print("| config | slots | chunks | " + " | ".join(WAYS) + " |")
    print("|---" * (3 + len(WAYS)) + "|")
    for cell in args.configs.split(","):
        name, devices = cell.split(":")
        print(measure(name, int(devices), args.seed), flush=True)


if __name__ == "__main__":
    main()
