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
from ssp_jax import data  # noqa: E402
from ssp_jax.assembly import sections  # noqa: E402
from ssp_jax.assembly.inputs import Inputs, read_inputs  # noqa: E402
from ssp_jax.assembly.weights import make_weights  # noqa: E402
from ssp_jax.config.files import load_config  # noqa: E402
from ssp_jax.game import roles  # noqa: E402
from ssp_jax.game.rounds import ReplayState, Round  # noqa: E402
from ssp_jax.game.selfplay import SelfPlay  # noqa: E402
from ssp_jax.model import decoder  # noqa: E402
from ssp_jax.rollout import engine, sampler  # noqa: E402
from ssp_jax.rollout.scheduler import PendingWrite, Player, RowAllocator, Stats  # noqa: E402
from ssp_jax.runtime import platform  # noqa: E402

Progress = Callable[[Stats], None]


class StaticLoop(engine.Engine):
    """Batches of as many players as there are slots, turn by turn.

    Nothing stays in the cache between turns.
    """

    def play(
        self,
        params: decoder.Params,
        key: jax.Array,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]] = lambda player: (),
        progress: Progress = lambda stats: None,
    ) -> Stats:
        start = time.monotonic()
        stats = Stats()
        device = self.device(params, key)
        slots = device.layout.rows[0]
        waiting = list(players)
        following: list[Player] = []
        while waiting or following:
            if not waiting:
                waiting = following
                following = []
            batch = waiting[:slots]
            waiting = waiting[slots:]
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
        memory = RowAllocator(device.layout)  # the cache has one piece

        # Everything is written from the start.
        writes = []
        for slot, player in enumerate(active):
            write = PendingWrite(
                slot,
                player.tokens,
                0,
                len(player.tokens) - 1,
                player.token_limit(),
                player.stop_automaton,
                player.uid,
                player.temperature,
            )
            writes.append(write)
        stats.written_tokens += sum(write.count for write in writes)
        for begin in range(0, len(writes), device.rows_per_shard):
            writes_of_call = writes[begin : begin + device.rows_per_shard]
            longest = max(write.count for write in writes_of_call)
            device.extend(memory.rows_JB, writes_of_call, self._sizes.extend_len(longest), 0)

        # All decode until the last one stops.
        stops: dict[int, int] = {}
        new: list[tuple[list[int], list[float]]] = [([], []) for _ in active]
        while len(stops) < len(active):
            chunk = jax.device_get(device.decode(memory, 1, device.layout.per_shard.rows[0]))
            stats.slot_steps += chunk.tokens_CB.size
            for i in set(range(len(active))) - stops.keys():
                count = int(chunk.count_B[i])
                stats.busy_steps += count
                new[i][0].extend(chunk.tokens_CB[:count, i].tolist())
                new[i][1].extend(chunk.logprobs_CB[:count, i].tolist())
                if chunk.stop_B[i] != sampler.RUNNING:
                    stops[i] = int(chunk.stop_B[i])
            tick()

        # All search at once.
        searching = []
        queries = []
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
    """What all schedules play with."""

    config: ConfigDict
    inputs: Inputs
    tasks: list[data.Task]
    params: decoder.Params

    def game(self, kind: type[engine.Engine], **changes: Any) -> SelfPlay:
        """changes: of the engine's sizes."""
        config = self.config
        inputs = self.inputs
        sizes = dataclasses.replace(sections.make_sizes(config, hosts=1), **changes)
        automata = roles.role_automata(inputs.model.tokenizer, inputs.model.config.vocab_size)
        dtype = jnp.dtype(config.model.dtype)
        search = functools.partial(inputs.retriever.search, top_k=config.retriever.top_k)
        player = kind(inputs.model.config, sizes, automata, inputs.model.eos, dtype, search)
        game_config = sections.make_game_config(config)
        return SelfPlay(game_config, inputs.model.context, player, inputs.retriever)


def prepare(config: ConfigDict, workdir: str) -> Setting:
    inputs = read_inputs(config, workdir)
    mesh = sections.make_mesh(config)
    number = config.game.answers_per_step
    rows = data.batch_indices(len(inputs.tasks), number, config.seed, 0)
    tasks = [inputs.tasks[row] for row in rows]
    params = make_weights(config, inputs.model.config, mesh).initial_for_sampler()
    return Setting(config, inputs, tasks, params)


def play(setting: Setting, game: SelfPlay) -> tuple[dict[int, list[int]], dict[str, float]]:
    """Tokens of every episode, and what the step cost."""
    seen: list[tuple[int, int, int]] = []

    def progress(stats: Stats) -> None:
        seen.append((stats.finished, stats.busy_steps, stats.slot_steps))

    start = time.monotonic()
    key = jax.random.key(setting.config.seed)
    round_, _ = game.play(0, setting.tasks, ReplayState(), setting.params, key, progress)
    seconds = time.monotonic() - start
    finished, busy, steps = np.array(seen).T
    nine_tenths = int(np.searchsorted(finished, 0.9 * finished[-1]))
    cost = {
        "seconds": seconds,
        "occupancy": busy[-1] / steps[-1],
        "occupancy_until_90%": busy[nine_tenths] / max(steps[nine_tenths], 1),
        "decode_steps": steps[-1] / setting.config.engine.slots,
        "written_tokens": round_.stats.written_tokens,
        "episodes": round_.stats.finished,
    }
    return _tokens(round_), {key: float(value) for key, value in cost.items()}


def shown(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _tokens(round_: Round) -> dict[int, list[int]]:
    tokens = {}
    for game in round_.games:
        for episode in (game.proposer, game.verifier, *game.attempts):
            if episode is not None:
                tokens[episode.uid] = episode.tokens
    return tokens


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
    config.mesh.update(data=1, fsdp=1, tensor=1)
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
                differing = -1  # other episodes
                if tokens.keys() == expected.keys():
                    differing = sum(tokens[uid] != expected[uid] for uid in expected)
                cost["differing_episodes"] = differing
                if repeat:
                    costs[name].append(cost)
    median: dict[str, dict[str, float]] = {}
    for name, each in costs.items():
        median[name] = {key: statistics.median(cost[key] for cost in each) for key in each[0]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    keys = list(median["pipelined"])
    print(f"| schedule | {' | '.join(keys)} | time / pipelined |")
    print("|---" * (len(keys) + 2) + "|")
    for name, row in median.items():
        cells = [shown(row[key]) for key in keys]
        times = row["seconds"] / median["pipelined"]["seconds"]
        print(f"| {name} | {' | '.join(cells)} | {times:.2f} |")


if __name__ == "__main__":
    main()
