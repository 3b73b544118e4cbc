"""The host side of generation: one pool of slots for episodes of all roles, no barriers between
them.

One decode chunk is always in flight. While it runs the host reads the chunk before it, hands that
chunk's searches to a thread as one batch, and prepares what comes next; results are written into
the slots before the next chunk. A search's result is used exactly one chunk later, however fast it
was: the schedule is a function of the episodes alone, so the same seed gives the same run, bit for
bit. The engine knows nothing of the game: a `Player` says what follows a stop.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.model import decoder
from ssp_jax.rollout import kv_cache, sampler, sampling
from ssp_jax.rollout.scheduler import Player, Row, RowAllocator, Scheduler, Stats
from ssp_jax.rollout.stops import Automaton
from ssp_jax.runtime import device_memory

__all__ = ["Engine", "Player", "Sizes", "Stats"]

Search = Callable[[list[str]], Sequence[Any]]
SCHEDULES = ("pipelined", "barrier")
# of measured free memory, for keys and values at most; the programs' temporaries need some too
_FREE_SHARE = 0.8
_REMEDY = (
    "less of engine.slots, engine.extend_rows, the largest of engine.extend_buckets, engine.cache_tokens or "
    "engine.kv_cache_gib, or more devices for mesh.tensor"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Fixed shapes of the compiled programs and memory, config section `engine`."""

    slots: int
    chunk: int
    cache_tokens: int
    cache_buckets: tuple[int, ...]
    extend_buckets: tuple[int, ...]
    extend_rows: int
    kv_cache_gib: float = 0.0
    schedule: str = "pipelined"

    def extend_len(self, tokens: int) -> int:
        return next(
            (b for b in sorted(self.extend_buckets) if tokens <= b), max(self.extend_buckets)
        )

    def rows_per_shard(self, parts: int) -> int:
        """Rows of an extend call that each part of the slots writes."""
        return -(-self.extend_rows // parts)

    def cache_ends(self) -> tuple[int, ...]:
        return (
            *sorted({b for b in self.cache_buckets if b < self.cache_tokens}),
            self.cache_tokens,
        )


def choose_layout(
    config: decoder.ModelConfig,
    sizes: Sizes,
    dtype: Any,
    state_sharding: Callable[[sampler.SamplerState], Any] | None,
    budget: int | None,
) -> kv_cache.Layout:
    """Rows of the cache's pieces for a budget in bytes a device; None: the longest episode in every
    slot.
    """
    full = kv_cache.full_layout(sizes.cache_ends(), sizes.slots)
    parts, token_bytes = _split(config, full, dtype, state_sharding)
    if budget is None:
        return dataclasses.replace(full, parts=parts)
    return kv_cache.layout_for(full.ends, sizes.slots, int(parts * budget / token_bytes), parts)


def _split(
    config: decoder.ModelConfig,
    layout: kv_cache.Layout,
    dtype: Any,
    state_sharding: Callable[[sampler.SamplerState], Any] | None,
) -> tuple[int, float]:
    """Into how many parts the slots are split, and the bytes that a token of a part takes on a
    device of it.
    """
    token_bytes = kv_cache.token_bytes(config, dtype)
    if state_sharding is None:
        return 1, token_bytes
    layer = dataclasses.replace(config, num_layers=1)  # all are alike
    state = jax.eval_shape(lambda: sampler.init_state(layer, layout, dtype))
    shape = state.caches[0].k[0].shape
    shard = state_sharding(state).caches[0].k[0].shard_shape(shape)
    return shape[0] // shard[0], token_bytes * shard[1] / shape[1]


def cache_budget(sizes: Sizes, free: int | None) -> int | None:
    """Bytes a device for keys and values where so many are free; None where nobody knows."""
    return int(sizes.kv_cache_gib * device_memory.GIB) or (free and int(_FREE_SHARE * free))


def _too_large(
    sizes: Sizes, free: int, needs: dict[str, int], room: int, wanted: int, least: int
) -> str:
    """What a device has, what the engine asks for, and what of it would fit."""

    def gib(size: float) -> str:
        return f"{size / device_memory.GIB:.3g} GiB"

    program = max(needs, key=lambda name: needs[name])
    key = "slots" if program == "decode" else "extend_rows"
    value = getattr(sizes, key)
    if room >= least:
        fits_gib = 0.99 * room / device_memory.GIB  # less by more than what three digits round
        advice = f"engine.kv_cache_gib={fits_gib:.3g} or 0, which takes what is left"
    else:
        # Temporaries grow with the rows of a call.
        fits = int(value * ((1 - device_memory.RESERVE) * free - least) / needs[program])
        advice = f"engine.{key}={fits} instead of {value}" if fits > 0 else _REMEDY
    asked = wanted if sizes.kv_cache_gib else least
    return (
        f"config section engine does not fit into a device's memory: {gib(free)} are free, {program} takes "
        f"{gib(needs[program])} while it runs, and keys and values {gib(asked)}; expected {advice}"
    )


class Engine:
    """`play` runs a set of players, and those they lead to, to their ends. Between calls it holds
    no device memory but the stop tables: keys and values are made when a call starts and are
    gone when it ends, so the update has the room.
    """

    def __init__(
        self,
        config: decoder.ModelConfig,
        sizes: Sizes,
        automata: Sequence[Automaton],
        eos: tuple[int, ...],
        dtype: Any,
        search: Search,
        state_sharding: Callable[[sampler.SamplerState], Any] | None = None,
        truncation: sampling.Truncation = sampling.ALL_TOKENS,
        free_bytes: Callable[[], int | None] = device_memory.free_bytes,
    ):
        self._config, self._sizes, self._eos, self._dtype, self._search = (
            config,
            sizes,
            eos,
            dtype,
            search,
        )
        self._state_sharding, self._truncation = state_sharding, truncation
        self._free_bytes = free_bytes
        offsets = np.cumsum([0] + [len(a.stop_S) for a in automata[:-1]])
        self._roots = [int(o) for o in offsets]
        scheduler = np.concatenate(
            [a.table_SV.astype(np.int16) + o for a, o in zip(automata, offsets, strict=True)]
        )
        self._stops = sampler.Stops(
            jax.numpy.asarray(scheduler.astype(np.int8) if len(scheduler) <= 127 else scheduler),
            jax.numpy.asarray(np.concatenate([a.stop_S for a in automata])),
        )
        self._layout: kv_cache.Layout | None = None

    @property
    def memory(self) -> str:
        """What the engine chose, for people; known from the first call on."""
        assert self._layout is not None
        size = (
            self._layout.tokens
            * kv_cache.token_bytes(self._config, self._dtype)
            / device_memory.GIB
        )
        pieces = zip(self._layout.rows, self._layout.starts, self._layout.ends, strict=True)
        rows = ", ".join(f"{n} of tokens {start} to {end}" for n, start, end in pieces)
        return f"{self._layout.rows[0]} slots; keys and values {size:.3g} GiB, rows: {rows}"

    def warm_up(
        self, params: decoder.Params, key: jax.Array, stop: Callable[[], None] = lambda: None
    ) -> None:
        """Runs every program once on rows that write nothing; after this nothing compiles.

        stop: called between programs; may raise.
        """
        with device_memory.must_fit("the engine", _REMEDY):
            device = self.device(params, key)
            rows = RowAllocator(device.layout)
            for depth in range(len(device.layout.ends) + 1):
                for length in sorted(set(self._sizes.extend_buckets)):
                    stop()
                    device.extend(rows.rows_JB, [], length, depth)
                if depth:
                    stop()
                    device.share(rows.rows_JB, [], depth)
                    device.decode(rows.rows_JB, rows.room_B, depth)
            jax.block_until_ready(device.state)  # what fails on the device, fails here

    def play(
        self,
        params: decoder.Params,
        key: jax.Array,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]] = lambda player: (),
        progress: Callable[[Stats], None] = lambda stats: None,
    ) -> Stats:
        """Plays all players and whatever `finished(player)` adds after each of them.

        params: the sampler's unstacked copy. key: with a player's uid and a position it makes the
        key of a token.
        """
        start = time.monotonic()
        device, barrier = self.device(params, key), self._sizes.schedule == "barrier"
        scheduler = Scheduler(
            device.layout, self._sizes.chunk, players, finished, self._submit, barrier
        )
        in_flight: tuple[sampler.Chunk, dict[int, int]] | None = None
        while True:
            scheduler.take_results(lambda: progress(scheduler.stats))
            self._write(device, scheduler)
            turns, chunk = scheduler.running(), None
            if turns and not scheduler.ending(turns, in_flight[1] if in_flight else {}):
                chunk = device.decode(
                    scheduler.memory.rows_JB, scheduler.memory.room_B, scheduler.depth(turns)
                )
            if in_flight is not None:
                scheduler.take_chunk(jax.device_get(in_flight[0]), in_flight[1])
                scheduler.stats.seconds = time.monotonic() - start
                progress(scheduler.stats)
            in_flight = (chunk, turns) if chunk is not None else None
            if in_flight is None and scheduler.is_done():
                return scheduler.stats

    def _submit(self, queries: list[str]) -> Future[Sequence[Any]]:
        """Searches in a daemon thread: a run that ends does not wait for a server that keeps it
        waiting.
        """
        future: Future[Sequence[Any]] = Future()

        def search() -> None:
            try:
                future.set_result(self._search(queries))
            except BaseException as error:  # raised where the result is taken
                future.set_exception(error)

        threading.Thread(target=search, daemon=True, name="searches").start()
        return future

    def device(self, params: decoder.Params, key: jax.Array) -> "Device":
        """Slots on the device; the first call chooses their layout, once the sampler's params are
        in memory.
        """
        if self._layout is None:
            self._layout = self._fitting_layout(params, key)
        device = self._device(self._layout, params, key)
        device.state = sampler.new_state(layout=device.layout, **device.common)
        return device

    def _device(self, layout: kv_cache.Layout, params: decoder.Params, key: jax.Array) -> "Device":
        """With the shapes of its state alone: enough to compile programs, and no memory is taken."""
        state = jax.eval_shape(lambda: sampler.init_state(self._config, layout, self._dtype))
        shardings = None
        if self._state_sharding is not None:
            shardings = self._state_sharding(state)
            state = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                state,
                shardings,
            )
        common: dict[str, Any] = dict(config=self._config, dtype=self._dtype, shardings=shardings)
        decode: dict[str, Any] = dict(
            stops=self._stops,
            key=key,
            eos=self._eos,
            steps=self._sizes.chunk,
            truncation=self._truncation,
        )
        return Device(
            layout,
            self._sizes.rows_per_shard(layout.parts),
            self._roots,
            params,
            state,
            common,
            decode,
        )

    def _layout_for(self, budget: int | None) -> kv_cache.Layout:
        return choose_layout(self._config, self._sizes, self._dtype, self._state_sharding, budget)

    def _fitting_layout(self, params: decoder.Params, key: jax.Array) -> kv_cache.Layout:
        """Rows that leave room for what the programs take while they run, which their compiler
        knows.

        Fewer rows need no more than many, so what is measured with too many rows holds for those
        that fit.
        """
        sizes = self._sizes
        free = self._free_bytes()
        layout = self._layout_for(cache_budget(sizes, free))
        if free is None:
            return layout
        needs = self._device(layout, params, key).program_bytes(max(sizes.extend_buckets))
        room = int((1 - device_memory.RESERVE) * free) - max(needs.values())
        parts, token_bytes = _split(self._config, layout, self._dtype, self._state_sharding)
        wanted = layout.tokens * token_bytes / parts
        if wanted <= room:
            return layout
        least = sizes.cache_tokens * token_bytes
        if sizes.kv_cache_gib or room < least:
            raise InputError(_too_large(sizes, free, needs, room, int(wanted), int(least)))
        return self._layout_for(room)

    def _write(self, device: "Device", scheduler: Scheduler) -> None:
        """Brings every slot that is not up to date up to date: prompts, copies of prompts,
        observations.
        """
        sizes, rows_JB = self._sizes, scheduler.memory.rows_JB
        longest = max(sizes.extend_buckets)

        def needs(row: Row) -> tuple[int, int]:
            return sizes.extend_len(row.count), device.layout.depth(row.filled)

        rows = scheduler.pending_prefills()
        while rows:
            # The cost of a call is that of its bucket and depth, full or not. So the row that needs
            # the longest bucket takes along what fits beside it, and nothing that asks for more: a
            # few long prompts and a few observations are two calls. A row longer than the largest
            # bucket is written in pieces; its last piece starts the turn.
            rows.sort(key=needs, reverse=True)
            length, depth = needs(rows[0])
            batch = device.batch(row for row in rows if needs(row)[1] <= depth)
            device.extend(rows_JB, [row.first(longest) for row in batch], length, depth)
            taken = {row.slot for row in batch}
            rows = [row for row in rows if row.slot not in taken]
            rows += [row.after(longest) for row in batch if row.count > longest]
        copies = scheduler.pending_prefix_copies()
        while copies:
            batch = device.batch(copies)
            device.share(
                rows_JB, batch, max(1, device.layout.depth(max(row.count for row in batch)))
            )
            taken = {row.slot for row in batch}
            copies = [row for row in copies if row.slot not in taken]


@dataclasses.dataclass
class Device:
    """The sampler's programs over one state, fed with the host's rows."""

    layout: kv_cache.Layout
    rows_per_shard: int  # in a call of extend or share
    roots: list[int]
    params: decoder.Params
    state: sampler.SamplerState
    common: dict[str, Any]  # what programs share
    for_decode: dict[str, Any]

    def program_bytes(self, longest: int) -> dict[str, int]:
        """What the programs that need most take on a device while they run; `longest` is a bucket
        of extend.
        """
        rows = RowAllocator(self.layout)
        depth = len(self.layout.ends)
        extend = sampler.extend.lower(**self._extend_arguments(rows.rows_JB, [], longest, depth))
        decode = sampler.decode_chunk.lower(
            **self._decode_arguments(rows.rows_JB, rows.room_B, depth)
        )
        share = sampler.copy_prefix.lower(**self._share_arguments(rows.rows_JB, [], depth))
        lowered = {"extend": extend, "decode": decode, "share": share}
        return {
            name: device_memory.program_bytes(program.compile())
            for name, program in lowered.items()
        }

    def decode(self, rows_JB: np.ndarray, room_B: np.ndarray, depth: int) -> sampler.Chunk:
        self.state, chunk = sampler.decode_chunk(**self._decode_arguments(rows_JB, room_B, depth))
        return chunk

    def _decode_arguments(
        self, rows_JB: np.ndarray, room_B: np.ndarray, depth: int
    ) -> dict[str, Any]:
        return dict(
            params=self.params,
            state=self.state,
            rows_JB=rows_JB.copy(),  # the host goes on writing into its own
            room_B=room_B.copy(),
            depth=depth,
            **self.for_decode,
            **self.common,
        )

    def batch(self, rows: Iterable[Row]) -> list[Row]:
        """The first of these rows that go in one call."""
        found, taken = [], [0] * self.layout.parts
        for row in rows:
            part = self.layout.part(row.slot)
            if taken[part] < self.rows_per_shard:
                taken[part] += 1
                found.append(row)
        return found

    def extend(self, rows_JB: np.ndarray, rows: Sequence[Row], length: int, depth: int) -> None:
        self.state = sampler.extend(**self._extend_arguments(rows_JB, rows, length, depth))

    def _extend_arguments(
        self, rows_JB: np.ndarray, rows: Sequence[Row], length: int, depth: int
    ) -> dict[str, Any]:
        lines = self._lines(rows)
        tokens_NT = np.zeros((len(lines), length), np.int32)
        for tokens_T, row in zip(tokens_NT, lines, strict=True):
            if row is not None:
                tokens_T[: row.count] = row.tokens[row.filled : row.filled + row.count]
        return dict(
            params=self.params,
            state=self.state,
            rows_JB=rows_JB.copy(),
            starts=self._starts(lines),
            tokens_NT=tokens_NT,
            count_N=np.array([row.count if row else 0 for row in lines], np.int32),
            depth=depth,
            **self.common,
        )

    def share(self, rows_JB: np.ndarray, rows: Sequence[Row], depth: int) -> None:
        self.state = sampler.copy_prefix(**self._share_arguments(rows_JB, rows, depth))

    def _share_arguments(
        self, rows_JB: np.ndarray, rows: Sequence[Row], depth: int
    ) -> dict[str, Any]:
        lines = self._lines(rows)
        slots = self.layout.per_shard.rows[0]
        return dict(
            state=self.state,
            rows_JB=rows_JB.copy(),
            source_N=np.array([row.source % slots if row else 0 for row in lines], np.int32),
            starts=self._starts(lines),
            depth=depth,
            shardings=self.common["shardings"],
        )

    def _lines(self, rows: Sequence[Row]) -> list[Row | None]:
        """The rows of a call where its programs expect them: those of the first part first, None is
        padding.
        """
        found: list[Row | None] = []
        for part in range(self.layout.parts):
            own = [row for row in rows if self.layout.part(row.slot) == part]
            found += [*own, *[None] * (self.rows_per_shard - len(own))]
        return found

    def _starts(self, lines: Sequence[Row | None]) -> sampler.TurnStarts:
        slots = self.layout.per_shard.rows[0]

        def column(
            value: Callable[[Row], Any], padding: Any = 0, dtype: Any = np.int32
        ) -> np.ndarray:
            return np.array([value(row) if row else padding for row in lines], dtype)

        return sampler.TurnStarts(
            slot_N=column(lambda row: row.slot % slots, slots),
            length_N=column(lambda row: row.filled + row.count),
            token_N=column(lambda row: row.tokens[row.filled + row.count]),
            limit_N=column(lambda row: row.limit),
            match_N=column(lambda row: self.roots[row.stop_automaton]),
            uid_N=column(lambda row: row.uid),
            temperature_N=column(lambda row: row.temperature, 0.0, np.float32),
        )
