"""The host side of generation: one pool of slots for episodes of all roles, and no barriers.

One decode chunk is always in flight. While it runs the host reads the chunk before it, hands that
chunk's searches to a thread as one batch, and prepares the next chunk; results are written into
the slots before that chunk starts. A search's result is used exactly one chunk later, however fast
it was: the schedule is a function of the episodes alone, so the same seed gives the same run, bit
for bit. The engine knows nothing of the game: a `Player` says what follows a stop.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.model import decoder
from ssp_jax.rollout import kv_cache, sampler, sampling
from ssp_jax.rollout.scheduler import PendingWrite, Player, RowAllocator, Scheduler, Stats
from ssp_jax.rollout.stops import Automaton
from ssp_jax.runtime import device_memory
from ssp_jax.runtime.dispatch import compile_together

__all__ = ["Engine", "Player", "Sizes", "Stats"]

SearchFn = Callable[[list[str]], Sequence[Any]]
StateSharding = Callable[[sampler.SamplerState], Any]
SCHEDULES = ("pipelined", "barrier")
# The most that keys and values take of measured free memory: programs' temporaries need some too.
_FREE_SHARE = 0.8
_REMEDY = (
    "less of engine.slots, engine.extend_rows, the largest of engine.extend_buckets, "
    "engine.cache_tokens or engine.kv_cache_gib, or more devices for mesh.tensor"
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
    row_shares: tuple[float, ...] = ()
    kv_cache_gib: float = 0.0
    schedule: str = "pipelined"

    def extend_len(self, tokens: int) -> int:
        """The smallest bucket that holds so many tokens, else the largest bucket."""
        fitting = [bucket for bucket in self.extend_buckets if tokens <= bucket]
        return min(fitting, default=max(self.extend_buckets))

    def rows_per_shard(self, shards: int) -> int:
        """Rows of an extend call that each shard of the slots writes."""
        return -(-self.extend_rows // shards)

    def cache_ends(self) -> tuple[int, ...]:
        """Exclusive last position of each piece of the cache."""
        inner = {bucket for bucket in self.cache_buckets if bucket < self.cache_tokens}
        return (*sorted(inner), self.cache_tokens)


def choose_layout(
    config: decoder.ModelConfig,
    sizes: Sizes,
    dtype: Any,
    state_sharding: StateSharding | None,
    budget: int | None,
) -> kv_cache.Layout:
    """Rows of the cache's pieces for a budget in bytes a device.

    Without a budget (None) every slot has memory for the longest episode.
    """
    full = kv_cache.full_layout(sizes.cache_ends(), sizes.slots)
    shards, token_bytes = _shards(config, full, dtype, state_sharding)
    if budget is None:
        return dataclasses.replace(full, shards=shards)
    tokens = int(shards * budget / token_bytes)
    return kv_cache.layout_for(full.ends, sizes.slots, tokens, shards)


def _shards(
    config: decoder.ModelConfig,
    layout: kv_cache.Layout,
    dtype: Any,
    state_sharding: StateSharding | None,
) -> tuple[int, float]:
    """The number of shards of the slots, and the bytes of a token on each device of its shard."""
    token_bytes = kv_cache.token_bytes(config, dtype)
    if state_sharding is None:
        return 1, token_bytes
    layer = dataclasses.replace(config, num_layers=1)  # all are alike
    state = jax.eval_shape(lambda: sampler.init_state(layer, layout, dtype))
    shape = state.caches[0].k[0].shape
    sharding = state_sharding(state).caches[0].k[0]
    slots, heads, *_ = shape
    own_slots, own_heads, *_ = sharding.shard_shape(shape)
    return slots // own_slots, token_bytes * own_heads / heads


def cache_budget(sizes: Sizes, free: int | None) -> int | None:
    """Bytes a device for keys and values, of `free` ones; None where the device does not say."""
    if asked := int(sizes.kv_cache_gib * device_memory.GIB):
        return asked
    return free and int(_FREE_SHARE * free)


def attend_by(chosen: str, config: decoder.ModelConfig, sizes: Sizes, dtype: Any) -> str:
    """How decoding attends to the cache: by the kernel that was chosen, else "xla".

    chosen: by attention.select_kernel. Heads and pieces of the cache must have sizes for it.
    """
    if chosen == "xla":
        return "xla"
    # Here: only accelerators need it.
    from ssp_jax.rollout import decode_kernel

    ends = sizes.cache_ends()
    lengths = kv_cache.full_layout(ends, sizes.slots).lengths
    heads = (config.num_kv_heads, config.head_dim)
    return chosen if decode_kernel.keys_read_together(chosen, *heads, dtype, lengths) else "xla"


def _too_large(
    sizes: Sizes, free: int, needs: dict[str, int], room: int, wanted: int, minimum: int
) -> str:
    """What a device has, what the engine asks for, and what of it would fit. All in bytes.

    needs: of each program while it runs. room: left for keys and values. wanted: keys and values of
    the layout. minimum: keys and values of one longest episode.
    """

    def gib(size: float) -> str:
        return f"{size / device_memory.GIB:.3g} GiB"

    program = max(needs, key=lambda name: needs[name])
    key = "slots" if program == "decode" else "extend_rows"
    value = getattr(sizes, key)
    if room >= minimum:
        fits_gib = 0.99 * room / device_memory.GIB  # less by more than what three digits round
        advice = f"engine.kv_cache_gib={fits_gib:.3g} or 0, which takes what is left"
    else:
        # Temporaries grow with the rows of a call.
        left = (1 - device_memory.RESERVE) * free - minimum
        fits = int(value * left / needs[program])
        advice = f"engine.{key}={fits} instead of {value}" if fits > 0 else _REMEDY
    asked = wanted if sizes.kv_cache_gib else minimum
    return (
        "config section engine does not fit into a device's memory: "
        f"{gib(free)} are free, {program} takes {gib(needs[program])} while it runs, "
        f"and keys and values {gib(asked)}; expected {advice}"
    )


def _join(automata: Sequence[Automaton]) -> tuple[sampler.Stops, list[int]]:
    """One table of all automata's states on the device, and the root state of each automaton."""
    sizes = [len(automaton.stop_A) for automaton in automata]
    roots = [sum(sizes[:i]) for i in range(len(sizes))]
    tables = []
    for automaton, root in zip(automata, roots, strict=True):
        states_AV = automaton.table_AV.astype(np.int16)
        tables.append(states_AV + root)
    table_AV = np.concatenate(tables)
    if len(table_AV) <= 127:
        table_AV = table_AV.astype(np.int8)
    found_A = np.concatenate([automaton.stop_A for automaton in automata])
    return sampler.Stops(jnp.asarray(table_AV), jnp.asarray(found_A)), roots


class Engine:
    """Plays episodes to their ends, in slots of fixed shapes.

    Between calls of `play` it holds no device memory but the stop tables: keys and values are made
    when a call starts and are gone when it ends, so the update has the room.
    """

    def __init__(
        self,
        config: decoder.ModelConfig,
        sizes: Sizes,
        automata: Sequence[Automaton],
        eos: tuple[int, ...],
        dtype: Any,
        search: SearchFn,
        state_sharding: StateSharding | None = None,
        truncation: sampling.Truncation = sampling.ALL_TOKENS,
        free_bytes: Callable[[], int | None] = device_memory.free_bytes,
        attention: str = "xla",
    ):
        """attention: of decoding, in the words of attention.select_kernel; see `attend_by`."""
        self._config = config
        self._sizes = sizes
        self._eos = eos
        self._dtype = dtype
        self._search = search
        self._state_sharding = state_sharding
        self._truncation = truncation
        self._free_bytes = free_bytes
        self._attend_by = attend_by(attention, config, sizes, dtype)
        self._stops, self._roots = _join(automata)
        self._layout: kv_cache.Layout | None = None  # chosen by the first call of `device`

    @property
    def attend_by(self) -> str:
        """How decoding attends to the cache, in the words of attention.select_kernel."""
        return self._attend_by

    def check_attention(self, tensor: int) -> None:
        """Raises InputError where the kernel of decoding is wrong on this process's first device.

        tensor: devices that the heads are split over.
        """
        if self._attend_by == "xla":
            return
        # Here: only accelerators need it.
        from ssp_jax.rollout import decode_kernel

        c = self._config
        heads = (c.num_heads // tensor, c.num_kv_heads // tensor, c.head_dim)
        decode_kernel.check(self._attend_by, heads, self._dtype)

    @property
    def memory(self) -> str:
        """The layout of the cache, for people; known from the first call on."""
        layout = self._layout
        assert layout is not None
        token_bytes = kv_cache.token_bytes(self._config, self._dtype)
        size = layout.tokens * token_bytes / device_memory.GIB
        pieces = zip(layout.rows, layout.starts, layout.ends, strict=True)
        rows = ", ".join(f"{n} of tokens {start} to {end}" for n, start, end in pieces)
        return (
            f"{layout.rows[0]} slots; keys and values {size:.3g} GiB, rows: {rows}; "
            f"attention of decoding: {self._attend_by}"
        )

    def warm_up(
        self, params: decoder.Params, key: jax.Array, stop: Callable[[], None] = lambda: None
    ) -> None:
        """Compiles every program and runs it once on rows that write nothing.

        After this nothing compiles.

        stop: called between programs; may raise.
        """
        with device_memory.must_fit("the engine", _REMEDY):
            device = self.device(params, key)
            lengths = sorted(set(self._sizes.extend_buckets))
            compile_together([call.lower() for call in device.empty_calls(lengths)], stop)
            for call in device.empty_calls(lengths):
                stop()
                device.run(call)
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
        key of a token. progress: called after each chunk and while a search is waited for; may
        raise.
        """
        start = time.monotonic()
        device = self.device(params, key)
        barrier = self._sizes.schedule == "barrier"
        scheduler = Scheduler(
            device.layout, self._sizes.chunk, players, finished, self._submit, barrier
        )
        stats = scheduler.stats
        in_flight: sampler.Chunk | None = None
        in_flight_turns: dict[int, int] = {}
        while True:
            # The searches of the chunk read last have run beside the one in flight.
            scheduler.take_results(lambda: progress(stats))

            # Slots take what their caches lack: new prompts, copies of prompts, observations.
            pending = scheduler.pending()
            self._compute(device, scheduler, pending.prefixes)
            self._copy(device, scheduler, pending.prefix_copies)
            self._compute(device, scheduler, pending.tokens)
            self._copy(device, scheduler, pending.prompt_copies)

            # The next chunk starts behind the one in flight, unless no turn would go on in it.
            turns = scheduler.running()
            chunk = None
            if turns and not scheduler.ending(turns, in_flight_turns):
                chunk = device.decode(scheduler.memory, *scheduler.reach(turns))

            # The host reads the chunk before it, and hands out its searches.
            if in_flight is not None:
                scheduler.take_chunk(jax.device_get(in_flight), in_flight_turns)
                stats.seconds = time.monotonic() - start
                progress(stats)

            in_flight = chunk
            in_flight_turns = turns if chunk is not None else {}
            if in_flight is None and scheduler.is_done():
                return stats

    def _submit(self, queries: list[str]) -> Future[Sequence[Any]]:
        """Searches in a daemon thread: a run that ends does not wait for a server that hangs."""
        future: Future[Sequence[Any]] = Future()

        def search() -> None:
            try:
                future.set_result(self._search(queries))
            except BaseException as error:  # raised where the result is taken
                future.set_exception(error)

        threading.Thread(target=search, daemon=True, name="searches").start()
        return future

    def device(self, params: decoder.Params, key: jax.Array) -> "Device":
        """Slots on the device, none of them running.

        The sampler's params must be in memory: the first call measures what they leave, and chooses
        the layout of the cache.
        """
        if self._layout is None:
            self._layout = self._fitting_layout(params, key)
        shapes, shardings = self._shapes(self._layout)
        state = sampler.new_state(self._config, shapes.layout, self._dtype, shardings)
        return self._device(state, shardings, params, key)

    def abstract_device(
        self, params: decoder.Params, key: jax.Array, layout: kv_cache.Layout | None = None
    ) -> "Device":
        """Slots that take no memory, to compile programs for.

        params: may be shapes. layout: None is that of a device which does not say what is free.
        """
        shapes, shardings = self._shapes(layout or self._layout_for(None))
        return self._device(shapes, shardings, params, key)

    def _shapes(
        self, layout: kv_cache.Layout
    ) -> tuple[sampler.SamplerState, sampler.SamplerState | None]:
        """The state's shapes, which take no memory, and its shardings."""
        shapes = jax.eval_shape(lambda: sampler.init_state(self._config, layout, self._dtype))
        if self._state_sharding is None:
            return shapes, None
        shardings = self._state_sharding(shapes)

        def place(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, shapes, shardings), shardings

    def _device(
        self,
        state: sampler.SamplerState,
        shardings: sampler.SamplerState | None,
        params: decoder.Params,
        key: jax.Array,
    ) -> "Device":
        options = dict(config=self._config, dtype=self._dtype, shardings=shardings)
        chunk = dict(eos=self._eos, steps=self._sizes.chunk, truncation=self._truncation)
        chunk |= dict(attend_by=self._attend_by, mesh=sampler.kernel_mesh(shardings))
        return Device(
            rows_per_shard=self._sizes.rows_per_shard(state.layout.shards),
            row_shares=self._sizes.row_shares,
            stops=self._stops,
            roots=self._roots,
            params=params,
            key=key,
            state=state,
            options=options,
            decode_options=options | chunk,
        )

    def _layout_for(self, budget: int | None) -> kv_cache.Layout:
        return choose_layout(self._config, self._sizes, self._dtype, self._state_sharding, budget)

    def _fitting_layout(self, params: decoder.Params, key: jax.Array) -> kv_cache.Layout:
        """Rows that leave room for the temporaries of the programs, which their compiler knows.

        Fewer rows need no more than many, so what is measured with too many rows holds for those
        that fit.
        """
        sizes = self._sizes
        free = self._free_bytes()
        layout = self._layout_for(cache_budget(sizes, free))
        if free is None:
            return layout

        # The programs are compiled for shapes: no memory is taken.
        device = self.abstract_device(params, key, layout)
        needs = device.program_bytes(max(sizes.extend_buckets))
        room = int((1 - device_memory.RESERVE) * free) - max(needs.values())

        shards, token_bytes = _shards(self._config, layout, self._dtype, self._state_sharding)
        wanted = layout.tokens * token_bytes / shards
        if wanted <= room:
            return layout
        minimum = sizes.cache_tokens * token_bytes
        if sizes.kv_cache_gib or room < minimum:
            raise InputError(_too_large(sizes, free, needs, room, int(wanted), int(minimum)))
        return self._layout_for(room)

    def _compute(self, device: "Device", scheduler: Scheduler, pending: list[PendingWrite]) -> None:
        """Computes and writes tokens of prompts and observations.

        The cost of a call is that of its bucket and depth, full or not. So the write that needs the
        longest bucket takes along what fits beside it, and nothing that asks for more: a few long
        prompts and a few observations are two calls. A write longer than the largest bucket goes in
        pieces; its last piece starts the turn.
        """
        sizes = self._sizes
        longest = max(sizes.extend_buckets)

        def needs(write: PendingWrite) -> tuple[int, int]:
            return sizes.extend_len(write.count), device.layout.depth(write.filled)

        while pending:
            pending = sorted(pending, key=needs, reverse=True)
            length, depth = needs(pending[0])
            beside = [write for write in pending if needs(write)[1] <= depth]
            batch = device.batch(beside)
            pieces = [write.first(longest) for write in batch]
            device.extend(scheduler.memory.rows_JB, pieces, length, depth)
            pending = _without(batch, pending)
            pending += [write.after(longest) for write in batch if write.count > longest]

    def _copy(self, device: "Device", scheduler: Scheduler, pending: list[PendingWrite]) -> None:
        """Copies tokens to slots that share them with another slot; one that has them is right."""
        while pending:
            batch = device.batch(pending)
            longest = max(write.count for write in batch)
            depth = max(1, device.layout.depth(longest))
            device.copy_prefix(scheduler.memory.rows_JB, batch, depth)
            pending = _without(batch, pending)


def _without(done: list[PendingWrite], pending: list[PendingWrite]) -> list[PendingWrite]:
    """The writes for other slots than those that are done."""
    slots = {write.slot for write in done}
    return [write for write in pending if write.slot not in slots]


class Call(NamedTuple):
    """A program of the sampler and what it is called with."""

    program: Any
    arrays: tuple[Any, ...]
    options: dict[str, Any]  # static ones

    def lower(self) -> jax.stages.Lowered:
        lowered: jax.stages.Lowered = self.program.lower(*self.arrays, **self.options)
        return lowered


@dataclasses.dataclass
class Device:
    """The sampler's programs over one state, fed with the host's pending writes."""

    rows_per_shard: int  # in a call of extend or copy_prefix
    row_shares: tuple[float, ...]  # of a piece's rows, that a chunk may read
    stops: sampler.Stops
    roots: list[int]  # of each automaton in `stops`
    params: decoder.Params
    key: jax.Array
    state: sampler.SamplerState
    options: dict[str, Any]  # static ones of extend
    decode_options: dict[str, Any]

    def _chunks(self) -> list[tuple[int, int]]:
        """Depths, and rows of the deepest piece, that there is a program for; smallest first."""
        depths = range(1, len(self.layout.ends) + 1)
        chunks = [
            (depth, rows)
            for depth in depths
            for rows in self.layout.row_buckets(depth, self.row_shares)
        ]
        # A kernel that stops at each slot's length needs one program.
        return chunks if self.decode_options["attend_by"] == "xla" else chunks[-1:]

    @property
    def layout(self) -> kv_cache.Layout:
        return self.state.layout

    def program_bytes(self, longest: int) -> dict[str, int]:
        """Bytes that the programs which need most take on a device while they run.

        longest: a bucket of extend.
        """
        memory = RowAllocator(self.layout)
        depth = len(self.layout.ends)
        calls = {
            "extend": self._extend_call(memory.rows_JB, [], longest, depth),
            "decode": self._decode_call(memory, depth, self.layout.per_shard.rows[-1]),
            "share": self._copy_call(memory.rows_JB, [], depth),
        }
        compiled = compile_together([call.lower() for call in calls.values()])
        return dict(zip(calls, map(device_memory.program_bytes, compiled), strict=True))

    def empty_calls(self, lengths: Sequence[int]) -> Iterator[Call]:
        """A call of each program that writes nothing, with the state as it is when it is asked for.

        lengths: the buckets of extend.
        """
        memory = RowAllocator(self.layout)
        for depth in range(len(self.layout.ends) + 1):
            for length in lengths:
                yield self._extend_call(memory.rows_JB, [], length, depth)
            if depth:
                yield self._copy_call(memory.rows_JB, [], depth)
        for depth, rows in self._chunks():
            yield self._decode_call(memory, depth, rows)

    def run(self, call: Call) -> sampler.Chunk | None:
        """The chunk, of a call that decodes one."""
        result = call.program(*call.arrays, **call.options)
        if isinstance(result, sampler.SamplerState):
            self.state = result
            return None
        self.state, chunk = result
        return chunk

    def decode(self, memory: RowAllocator, depth: int, rows: int) -> sampler.Chunk:
        """The next chunk of all slots. rows: of the deepest piece that must be read, or more."""
        depth, rows = next(chunk for chunk in self._chunks() if chunk >= (depth, rows))
        chunk = self.run(self._decode_call(memory, depth, rows))
        assert chunk is not None
        return chunk

    def _decode_call(self, memory: RowAllocator, depth: int, rows: int) -> Call:
        # copies: the host goes on writing into its own
        own = (memory.rows_JB.copy(), memory.room_B.copy())
        arrays = (self.params, self.state, *own, self.stops, self.key)
        options = self.decode_options | {"depth": depth, "rows": rows}
        return Call(sampler.decode_chunk, arrays, options)

    def batch(self, writes: Iterable[PendingWrite]) -> list[PendingWrite]:
        """The first of these writes that go in one call."""
        found = []
        taken = [0] * self.layout.shards
        for write in writes:
            shard = self.layout.shard_of(write.slot)
            if taken[shard] < self.rows_per_shard:
                taken[shard] += 1
                found.append(write)
        return found

    def extend(
        self, rows_JB: np.ndarray, writes: Sequence[PendingWrite], length: int, depth: int
    ) -> None:
        self.run(self._extend_call(rows_JB, writes, length, depth))

    def _extend_call(
        self, rows_JB: np.ndarray, writes: Sequence[PendingWrite], length: int, depth: int
    ) -> Call:
        rows = self._call_rows(writes)
        tokens_MT = np.zeros((len(rows), length), np.int32)
        count_M = np.zeros((len(rows),), np.int32)
        for m, write in enumerate(rows):
            if write is not None:
                count_M[m] = write.count
                new = write.tokens[write.filled : write.filled + write.count]
                tokens_MT[m, : write.count] = new
        starts = self._starts(rows)
        arrays = (self.params, self.state, rows_JB.copy(), starts, tokens_MT, count_M)
        return Call(sampler.extend, arrays, self.options | {"depth": depth})

    def copy_prefix(self, rows_JB: np.ndarray, writes: Sequence[PendingWrite], depth: int) -> None:
        self.run(self._copy_call(rows_JB, writes, depth))

    def _copy_call(self, rows_JB: np.ndarray, writes: Sequence[PendingWrite], depth: int) -> Call:
        rows = self._call_rows(writes)
        slots = self.layout.per_shard.rows[0]
        sources = [write.source % slots if write else 0 for write in rows]
        source_M = np.array(sources, np.int32)
        arrays = (self.state, rows_JB.copy(), source_M, self._starts(rows))
        options = {"depth": depth, "shardings": self.options["shardings"]}
        return Call(sampler.copy_prefix, arrays, options)

    def _call_rows(self, writes: Sequence[PendingWrite]) -> list[PendingWrite | None]:
        """The rows of a call, those of the first shard first; None is padding."""
        rows: list[PendingWrite | None] = []
        for shard in range(self.layout.shards):
            own = [write for write in writes if self.layout.shard_of(write.slot) == shard]
            padding = self.rows_per_shard - len(own)
            rows += [*own, *[None] * padding]
        return rows

    def _starts(self, rows: Sequence[PendingWrite | None]) -> sampler.TurnStarts:
        slots = self.layout.per_shard.rows[0]

        def column(value: float, dtype: Any = np.int32) -> np.ndarray:
            return np.full((len(rows),), value, dtype)

        starts = sampler.TurnStarts(
            slot_M=column(slots),  # out of range: padding
            length_M=column(0),
            token_M=column(0),
            limit_M=column(0),
            match_M=column(0),
            uid_M=column(0),
            temperature_M=column(0.0, np.float32),
        )
        for m, write in enumerate(rows):
            if write is not None:
                length = write.filled + write.count
                starts.slot_M[m] = write.slot % slots
                starts.length_M[m] = length
                starts.token_M[m] = write.tokens[length]
                starts.limit_M[m] = write.limit
                starts.match_M[m] = self.roots[write.stop_automaton]
                starts.uid_M[m] = write.uid
                starts.temperature_M[m] = write.temperature
        return starts
