"""One step of self-play: roles pipelined, with barriers between them, and as static batch loops.

    python benchmarks/selfplay.py --out=runs/bench_selfplay [--config=configs/tiny.py]
        [--repeats=3] [--answers=20] [--slots=8]

The static loop is how generators without slots play: a batch plays turn by turn, each turn computes
all its tokens again from the start in one call padded to the longest of the batch (the smallest of
our buckets that holds it), waits for the longest turn, and searches. Its second form pads nothing:
row by row, each in its own bucket. It runs on the same compiled programs. All play the same
episodes, which is checked. Occupancy is the share of slot steps that gave a token: over the whole
step, and until nine tenths of the episodes had ended. Medians over repeats, taken in turn; the
first round compiles.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ssp_jax import data
from ssp_jax.assemble import make_context, make_game_config  # noqa: E402
from ssp_jax.config import load_config  # noqa: E402
from ssp_jax.game import roles
from ssp_jax.game.rounds import ReplayState, Round  # noqa: E402
from ssp_jax.game.selfplay import SelfPlay  # noqa: E402
from ssp_jax.model import (
    decoder,
    hf_load,  # noqa: E402
    sharding,
)
from ssp_jax.retriever.search import (
    Retriever,
    open_retriever,  # noqa: E402
)
from ssp_jax.rollout import engine, sampler
from ssp_jax.rollout.scheduler import (
    PendingWrite,
    Player,
    Stats,  # noqa: E402
)
from ssp_jax.runtime import platform

Progress = Callable[[Stats], None]


class StaticLoop(engine.Engine):
    """Batches of as many players as there are slots, turn by turn; nothing stays in the cache
    between turns.
    """

    def play(
        self,
        params: decoder.Params,
        key: jax.Array,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]] = lambda player: (),
        progress: Progress = lambda stats: None,
    ) -> Stats:
        start, stats, device = time.monotonic(), Stats(), self.device(params, key)
        waiting, following = list(players), list[Player]()
        while waiting or following:
            if not waiting:
                waiting, following = following, []
            batch, waiting = waiting[: device.layout.rows[0]], waiting[device.layout.rows[0] :]
            active = [player for player in batch if not player.stop_reason]
            while active:
                active = self._turn(device, active, stats, lambda: progress(stats))
            for player in batch:
                stats.finished += 1
                following += finished(player)
            stats.seconds = time.monotonic() - start
            progress(stats)
        return stats

    def _turn(
        self, device: engine.Device, active: list[Player], stats: Stats, tick: Callable[[], None]
    ) -> list[Player]:
        """One turn of all, searches included; those that go on."""
        slots, none = device.layout.rows[0], np.zeros((0, device.layout.rows[0]), np.int32)
        room_B = np.full((slots,), device.layout.ends[-1], np.int32)
        rows = [
            PendingWrite(
                i,
                p.tokens,
                0,
                len(p.tokens) - 1,
                p.token_limit(),
                p.stop_automaton,
                p.uid,
                p.temperature,
            )
            for i, p in enumerate(active)
        ]
        stats.written_tokens += sum(row.count for row in rows)
        for i in range(0, len(rows), device.rows_per_shard):
            part = rows[i : i + device.rows_per_shard]
            device.extend(none, part, self._sizes.extend_len(max(row.count for row in part)), 0)
        stops: dict[int, int] = {}
        new: list[tuple[list[int], list[float]]] = [([], []) for _ in active]
        while len(stops) < len(active):
            chunk = jax.device_get(device.decode(none, room_B, 1))
            stats.slot_steps += chunk.tokens_CB.size
            for i in set(range(len(active))) - stops.keys():
                count = int(chunk.count_B[i])
                stats.busy_steps += count
                new[i][0].extend(chunk.tokens_CB[:count, i].tolist())
                new[i][1].extend(chunk.logprobs_CB[:count, i].tolist())
                if chunk.stop_B[i] != sampler.RUNNING:
                    stops[i] = int(chunk.stop_B[i])
            tick()
        searching, queries = [], []
        for i, player in enumerate(active):
            stats.sampled_tokens += len(new[i][0])
            query = player.end_turn(*new[i], stops[i])
            if query is not None:
                searching.append(player)
                queries.append(query)
        if queries:
            stats.searches += len(queries)
            for player, result in zip(searching, self._search(queries), strict=True):
                player.insert_result(result)
        return [player for player in searching if not player.stop_reason]


@dataclasses.dataclass
class Setting:
    config: ConfigDict
    tasks: list[data.Task]
    context: roles.EpisodeContext
    retriever: Retriever
    params: decoder.Params
    arguments: tuple[Any, ...]  # of Engine, but sizes

    def game(self, kind: type[engine.Engine], **changes: Any) -> SelfPlay:
        model_config, *others = self.arguments
        sizes = dataclasses.replace(engine.Sizes(**self.config.engine), **changes)
        player = kind(model_config, sizes, *others)
        return SelfPlay(make_game_config(self.config), self.context, player, self.retriever)


def prepare(config: ConfigDict, index: str) -> Setting:
    c, r = config, config.retriever
    model_config, tokenizer = (
        hf_load.read_config(c.model.path),
        hf_load.load_tokenizer(c.model.path),
    )
    dtype = jnp.dtype(c.model.dtype)
    retriever = open_retriever(
        r.corpus, index, stemmer=r.stemmer, stopwords=r.stopwords, k1=r.k1, b=r.b
    )
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    loaded = hf_load.load(c.model.path, model_config, None, jnp.float32)
    everything = data.load_answers(c.data.answers)
    rows = data.batch_indices(len(everything), c.game.answers_per_step, c.seed, 0)
    automata = roles.role_automata(tokenizer, model_config.vocab_size)
    eos = roles.eos_tokens(tokenizer, hf_load.read_generation_config(c.model.path))
    search = functools.partial(retriever.search, top_k=r.top_k)
    return Setting(
        c,
        [everything[row] for row in rows],
        make_context(c, tokenizer),
        retriever,
        sharding.sampler_copy(model_config, mesh, dtype)(loaded),
        (model_config, automata, eos, dtype, search),
    )


def play(setting: Setting, game: SelfPlay) -> tuple[dict[int, list[int]], dict[str, float]]:
    """Tokens of every episode, and what the step cost."""
    seen: list[tuple[int, int, int]] = []

    def progress(stats: Stats) -> None:
        seen.append((stats.finished, stats.busy_steps, stats.slot_steps))

    start = time.monotonic()
    round_, _ = game.play(
        0,
        setting.tasks,
        ReplayState(),
        setting.params,
        jax.random.key(setting.config.seed),
        progress,
    )
    seconds = time.monotonic() - start
    finished, busy, steps = np.array(seen).T
    most = int(np.searchsorted(finished, 0.9 * finished[-1]))
    cost = {
        "seconds": seconds,
        "occupancy": busy[-1] / steps[-1],
        "occupancy_until_90%": busy[most] / max(steps[most], 1),
        "decode_steps": steps[-1] / setting.config.engine.slots,
        "written_tokens": round_.stats.written_tokens,
        "episodes": round_.stats.finished,
    }
    return _tokens(round_), {key: float(value) for key, value in cost.items()}


def _tokens(round_: Round) -> dict[int, list[int]]:
    played = [
        e for g in round_.games for e in (g.proposer, g.verifier, *g.attempts) if e is not None
    ]
    return {episode.uid: episode.tokens for episode in played}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument(
        "--config", type=lambda path: Path(path).expanduser(), default=Path("configs/tiny.py")
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--answers", type=int, default=0, help="given answers in the step, 0: as configured"
    )
    parser.add_argument("--slots", type=int, default=0, help="0: as configured")
    args = parser.parse_args()
    platform.prepare()
    config = load_config(args.config)
    config.game.answers_per_step = args.answers or config.game.answers_per_step
    config.engine.slots = args.slots or config.engine.slots
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(config, folder)
        games = {
            "pipelined": setting.game(engine.Engine, schedule="pipelined"),
            "barrier": setting.game(engine.Engine, schedule="barrier"),
            "static loop": setting.game(
                StaticLoop, cache_buckets=(), extend_rows=config.engine.slots
            ),
            "static, unpadded": setting.game(StaticLoop, cache_buckets=(), extend_rows=1),
        }
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in games}
        for repeat in range(args.repeats + 1):
            expected: dict[int, list[int]] = {}
            for name, game in games.items():
                tokens, cost = play(setting, game)
                expected = expected or tokens
                differing = (
                    sum(tokens[uid] != expected[uid] for uid in expected)
                    if tokens.keys() == expected.keys()
                    else -1
                )
                costs[name] += [cost | {"differing_episodes": differing}] * (repeat > 0)
    median = {
        name: {key: statistics.median(c[key] for c in each) for key in each[0]}
        for name, each in costs.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    keys = list(median["pipelined"])
    print(f"| schedule | {' | '.join(keys)} | time / pipelined |")
    print("|---" * (len(keys) + 2) + "|")
    for name, row in median.items():
        cells = [f"{row[key]:.3g}" if row[key] < 1000 else f"{row[key]:,.0f}" for key in keys]
        times = row["seconds"] / median["pipelined"]["seconds"]
        print(f"| {name} | {' | '.join(cells)} | {times:.2f} |")


if __name__ == "__main__":
    main()
