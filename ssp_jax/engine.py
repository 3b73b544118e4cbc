"""The host side of generation: one pool of slots for episodes of all roles, no barriers between them.

One decode chunk is always in flight. While it runs the host reads the chunk before it, hands that chunk's searches to a
thread as one batch, and prepares what comes next; results are written into the slots before the next chunk. A search's
result is used exactly one chunk later, however fast it was: the schedule is a function of the episodes alone, so the
same seed gives the same run, bit for bit. The engine knows nothing of the game: a `Player` says what follows a stop.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from ssp_jax import model, sampler
from ssp_jax.stops import Automaton

Search = Callable[[list[str]], Sequence[Any]]


class Player(Protocol):
    """One episode in play. tokens[: prompt] is the prompt; the engine only reads it."""

    uid: int
    tokens: list[int]
    temperature: float
    stop_reason: str  # "" while playing

    @property
    def stop_set(self) -> int:
        """Which of the engine's automata this player listens to."""
        ...

    def token_limit(self) -> int:
        """Total number of tokens at which the coming turn must end."""
        ...

    def stopped(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        """Takes the turn's last tokens and why it stopped; returns a search query, or None when the episode ended."""
        ...

    def going_on(self, tokens: list[int], logprobs: list[float]) -> None:
        """Takes tokens of a turn that has not stopped yet."""
        ...

    def observe(self, result: Any) -> None:
        """Takes the result of the search; may end the episode."""
        ...


@dataclasses.dataclass
class Stats:
    """What a call of `play` cost. occupancy = busy_steps / slot_steps."""

    seconds: float = 0.0
    sampled_tokens: int = 0
    written_tokens: int = 0  # prompt and observation tokens computed
    shared_tokens: int = 0  # prompt tokens copied from another slot instead
    searches: int = 0
    busy_steps: int = 0
    slot_steps: int = 0
    finished: int = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Fixed shapes of the compiled programs, config section `engine`."""

    slots: int
    chunk: int
    cache_tokens: int
    cache_buckets: tuple[int, ...]
    extend_buckets: tuple[int, ...]
    extend_rows: int

    def cache_len(self, tokens: int) -> int:
        return next((b for b in sorted(self.cache_buckets) if tokens <= b < self.cache_tokens), self.cache_tokens)

    def extend_len(self, tokens: int) -> int:
        return next((b for b in sorted(self.extend_buckets) if tokens <= b), max(self.extend_buckets))

    def cache_lens(self) -> list[int]:
        return sorted({self.cache_len(b) for b in self.cache_buckets} | {self.cache_tokens})


class Engine:
    """Owns the sampler state between calls; `play` runs a set of players, and those they lead to, to their ends."""

    def __init__(
        self,
        config: model.ModelConfig,
        sizes: Sizes,
        automata: Sequence[Automaton],
        eos: tuple[int, ...],
        dtype: Any,
        search: Search,
        state_sharding: Callable[[sampler.SamplerState], Any] | None = None,
    ):
        self._config, self._sizes, self._eos, self._dtype, self._search = config, sizes, eos, dtype, search
        offsets = np.cumsum([0] + [len(a.stop_S) for a in automata[:-1]])
        self._roots = [int(o) for o in offsets]
        table = np.concatenate([a.table_SV.astype(np.int16) + o for a, o in zip(automata, offsets, strict=True)])
        self._table = jax.numpy.asarray(table.astype(np.int8) if len(table) <= 127 else table)
        self._found = jax.numpy.asarray(np.concatenate([a.stop_S for a in automata]))
        self._state = sampler.init_state(config, sizes.slots, sizes.cache_tokens, dtype)
        if state_sharding is not None:
            self._state = jax.device_put(self._state, state_sharding(self._state))

    def warm_up(self, params: model.Params, key: jax.Array) -> None:
        """Runs every program once on rows that write nothing; after this nothing compiles."""
        sizes = self._sizes
        for cache_len in sizes.cache_lens():
            for length in sorted(set(sizes.extend_buckets)):
                if length <= cache_len:
                    self._extend(params, [], length, cache_len)
            self._share([], cache_len)
            self._decode(params, key, cache_len)

    def play(
        self,
        params: model.Params,
        key: jax.Array,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]] = lambda player: (),
        progress: Callable[[Stats], None] = lambda stats: None,
    ) -> Stats:
        """Plays all players and whatever `finished(player)` adds after each of them.

        params: the sampler's unstacked copy. key: with a player's uid and a position it makes the key of a token.
        """
        start = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            table = _Table(self._sizes, players, finished, lambda queries: threads.submit(self._search, queries))
            in_flight: tuple[sampler.Chunk, dict[int, int]] | None = None
            while True:
                table.take_results()
                self._write(params, table)
                running = table.running()
                chunk = self._decode(params, key, self._sizes.cache_len(table.longest(running))) if running else None
                if in_flight is not None:
                    table.take_chunk(*in_flight)
                    table.stats.seconds = time.monotonic() - start
                    progress(table.stats)
                in_flight = (chunk, running) if chunk is not None else None
                if in_flight is None and table.idle():
                    return table.stats

    def _decode(self, params: model.Params, key: jax.Array, cache_len: int) -> sampler.Chunk:
        self._state, chunk = sampler.decode_chunk(
            self._config,
            params,
            self._state,
            self._table,
            self._found,
            key,
            eos=self._eos,
            steps=self._sizes.chunk,
            cache_len=cache_len,
            dtype=self._dtype,
        )
        return chunk

    def _write(self, params: model.Params, table: "_Table") -> None:
        """Brings every slot that is not up to date up to date: prompts, copies of prompts, observations."""
        rows = sorted(table.to_extend(), key=lambda row: -row.count)
        longest = max(self._sizes.extend_buckets)
        while rows:
            # A row longer than the largest bucket is written in pieces; its last piece starts the turn.
            batch, rest = rows[: self._sizes.extend_rows], rows[self._sizes.extend_rows :]
            pieces = [row.first(longest) for row in batch]
            cache_len = self._sizes.cache_len(max(p.filled + p.count for p in pieces))
            self._extend(params, pieces, self._sizes.extend_len(max(p.count for p in pieces)), cache_len)
            rows = [row.after(longest) for row in batch if row.count > longest] + rest
        copies = table.to_share()
        for i in range(0, len(copies), self._sizes.extend_rows):
            batch = copies[i : i + self._sizes.extend_rows]
            self._share(batch, self._sizes.cache_len(max(row.filled + row.count for row in batch)))

    def _extend(self, params: model.Params, rows: Sequence["_Row"], length: int, cache_len: int) -> None:
        N = self._sizes.extend_rows
        tokens_NT = np.zeros((N, length), np.int32)
        count_N = np.zeros((N,), np.int32)
        for i, row in enumerate(rows):
            tokens_NT[i, : row.count] = row.tokens[row.filled : row.filled + row.count]
            count_N[i] = row.count
        self._state = sampler.extend(
            self._config,
            params,
            self._state,
            self._starts(rows),
            tokens_NT,
            count_N,
            cache_len=min(cache_len, self._sizes.cache_tokens),
            dtype=self._dtype,
        )

    def _share(self, rows: Sequence["_Row"], cache_len: int) -> None:
        source_N = np.zeros((self._sizes.extend_rows,), np.int32)
        source_N[: len(rows)] = [row.source for row in rows]
        self._state = sampler.share(self._state, source_N, self._starts(rows), cache_len=cache_len)

    def _starts(self, rows: Sequence["_Row"]) -> sampler.Starts:
        N = self._sizes.extend_rows

        def column(values: list[Any], fill: Any, dtype: Any = np.int32) -> np.ndarray:
            return np.array(values + [fill] * (N - len(values)), dtype)

        return sampler.Starts(
            slot_N=column([r.slot for r in rows], self._sizes.slots),
            length_N=column([r.filled + r.count for r in rows], 0),
            token_N=column([r.tokens[r.filled + r.count] for r in rows], 0),
            limit_N=column([r.limit for r in rows], 0),
            match_N=column([self._roots[r.stop_set] for r in rows], 0),
            uid_N=column([r.uid for r in rows], 0),
            temperature_N=column([r.temperature for r in rows], 0.0, np.float32),
        )


@dataclasses.dataclass(frozen=True)
class _Row:
    """Tokens that one slot's cache lacks: tokens[filled : filled + count], and what its next turn needs."""

    slot: int
    tokens: list[int]
    filled: int
    count: int
    limit: int
    stop_set: int
    uid: int
    temperature: float
    source: int = -1  # the slot to copy from, for shared prompts

    def first(self, longest: int) -> "_Row":
        return dataclasses.replace(self, count=min(self.count, longest))

    def after(self, longest: int) -> "_Row":
        return dataclasses.replace(self, filled=self.filled + longest, count=self.count - longest)


class _Table:
    """Who sits where during one call of `play`, and what each slot waits for. Pure host bookkeeping."""

    def __init__(
        self,
        sizes: Sizes,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]],
        submit: Callable[[list[str]], Future[Sequence[Any]]],
    ):
        self.stats = Stats()
        self._sizes, self._finished, self._submit = sizes, finished, submit
        self._waiting = collections.deque(players)
        self._seats: list[Player | None] = [None] * sizes.slots
        self._filled = [0] * sizes.slots  # tokens in the cache, as far as the host has seen
        self._turn = [0] * sizes.slots  # counts stops: tells a slot's old turn from its new one
        self._playing: set[int] = set()  # slots in the middle of a turn
        self._stale: list[int] = []  # seated slots whose cache lacks tokens
        self._prompt_in: dict[int, tuple[int, ...]] = {}  # slot -> prompt that its cache begins with
        self._copies: list[_Row] = []
        self._search: tuple[Future[Sequence[Any]], list[int]] | None = None

    def idle(self) -> bool:
        return not (self._waiting or self._playing or self._stale or self._search)

    def running(self) -> dict[int, int]:
        return {slot: self._turn[slot] for slot in sorted(self._playing)}

    def longest(self, running: Iterable[int]) -> int:
        """Tokens that the coming chunk may reach; the host's view is up to one chunk old."""
        return max(self._filled[slot] for slot in running) + 1 + 2 * self._sizes.chunk

    def take_results(self) -> None:
        """Results of the searches handed out after the chunk before."""
        if self._search is None:
            return
        future, slots = self._search
        self._search = None
        for slot, result in zip(slots, future.result(), strict=True):
            player = self._seats[slot]
            assert player is not None
            player.observe(result)
            if player.stop_reason:
                self._leave(slot)
            else:
                self._stale.append(slot)

    def take_chunk(self, chunk: sampler.Chunk, running: dict[int, int]) -> None:
        """New tokens and stops of a chunk; turns that ended in the chunk before are passed over."""
        tokens_CB, logprobs_CB, count_B, stop_B = jax.device_get(
            (chunk.tokens_CB, chunk.logprobs_CB, chunk.count_B, chunk.stop_B)
        )
        self.stats.slot_steps += tokens_CB.size
        queries: list[str] = []
        slots: list[int] = []
        for slot, turn in running.items():
            if self._turn[slot] != turn:
                continue
            player, count = self._seats[slot], int(count_B[slot])
            assert player is not None
            tokens, logprobs = tokens_CB[:count, slot].tolist(), logprobs_CB[:count, slot].tolist()
            self._filled[slot] += count
            self.stats.busy_steps += count
            self.stats.sampled_tokens += count
            if stop_B[slot] == sampler.RUNNING:
                player.going_on(tokens, logprobs)
                continue
            self._turn[slot] += 1
            self._playing.discard(slot)
            query = player.stopped(tokens, logprobs, int(stop_B[slot]))
            if query is None:
                self._leave(slot)
            else:
                queries.append(query)
                slots.append(slot)
        if queries:
            self.stats.searches += len(queries)
            self._search = (self._submit(queries), slots)

    def to_extend(self) -> list[_Row]:
        """Seats waiting players and lists all rows to compute; those that can copy a prompt are kept for to_share."""
        rows = [self._row(slot) for slot in self._stale]
        self._stale = []
        free = [slot for slot, player in enumerate(self._seats) if player is None]
        while free and (player := self._next_waiting()) is not None:
            prompt = tuple(player.tokens)
            holders = [slot for slot, held in self._prompt_in.items() if held == prompt]
            # A free slot that holds the prompt is taken itself: another player must not overwrite it before the copy.
            slot = next((s for s in holders if s in free), free[0])
            source = slot if slot in holders else next(iter(holders), -1)
            free.remove(slot)
            self._seats[slot], self._filled[slot] = player, 0
            row = dataclasses.replace(self._row(slot), source=source)
            if source < 0 or source == slot:
                self._prompt_in[slot] = prompt
            else:
                self._prompt_in.pop(slot, None)  # nobody may copy from a copy that is not made yet: see to_share
            if source >= 0:
                self._copies.append(row)
                self.stats.shared_tokens += row.count
            else:
                rows.append(row)
        for row in rows:
            self.stats.written_tokens += row.count
        return rows

    def to_share(self) -> list[_Row]:
        copies, self._copies = self._copies, []
        self._prompt_in |= {row.slot: tuple(row.tokens) for row in copies}
        return copies

    def _next_waiting(self) -> Player | None:
        """The next player that has something to play; one whose prompt was refused ends at once."""
        while self._waiting:
            player = self._waiting.popleft()
            if not player.stop_reason:
                return player
            self._end(player)
        return None

    def _row(self, slot: int) -> _Row:
        player, filled = self._seats[slot], self._filled[slot]
        assert player is not None
        count = len(player.tokens) - 1 - filled
        self._filled[slot] += count
        self._playing.add(slot)
        return _Row(
            slot,
            list(player.tokens),
            filled,
            count,
            player.token_limit(),
            player.stop_set,
            player.uid,
            player.temperature,
        )

    def _leave(self, slot: int) -> None:
        player, self._seats[slot] = self._seats[slot], None
        assert player is not None
        self._end(player)

    def _end(self, player: Player) -> None:
        self.stats.finished += 1
        self._waiting.extend(self._finished(player))
