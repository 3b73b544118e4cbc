"""The host's books during one call of `Engine.play`: players, their slots, and the slots' memory.

Pure bookkeeping: it computes nothing. Rows of the cache's later pieces are taken in order, first
piece first, and a slot that finds none keeps what it has and waits. So whoever holds a row of the
last piece never waits, and the game goes on.
"""

import collections
import dataclasses
import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from ssp_jax.rollout.kv_cache import Layout
from ssp_jax.rollout.sampler import FULL, LIMIT, RUNNING, Chunk

_TICK_SECONDS = 0.5  # between two looks at a search that keeps everybody waiting


class Player(Protocol):
    """One episode in play. tokens[: prompt] is the prompt; the engine only reads it."""

    uid: int
    tokens: list[int]
    temperature: float
    stop_reason: str  # "" while playing

    @property
    def stop_automaton(self) -> int:
        """Index of the engine's automaton that finds this player's stop strings."""
        ...

    @property
    def shared_prefix(self) -> int:
        """How many tokens the prompt begins with that stand before many prompts; 0 for none.

        A property of the prompt alone, and less than the prompt.
        """
        ...

    def token_limit(self) -> int:
        """Total number of tokens at which the coming turn must end."""
        ...

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        """Takes the turn's last tokens and why it stopped (a value of SamplerState.stop_B).

        Returns a search query, or None when the episode ended.
        """
        ...

    def append(self, tokens: list[int], logprobs: list[float]) -> None:
        """Takes tokens of a turn that has not stopped yet."""
        ...

    def insert_result(self, result: Any) -> None:
        """Takes the result of the search; may end the episode."""
        ...


@dataclasses.dataclass
class Stats:
    """The cost of a call of `play`."""

    seconds: float = 0.0
    sampled_tokens: int = 0
    written_tokens: int = 0  # prompt and observation tokens computed
    shared_tokens: int = 0  # prompt tokens taken from another prompt instead
    searches: int = 0
    busy_steps: int = 0  # of slots, in which a token was sampled
    slot_steps: int = 0  # of all slots
    known: int = 0  # players so far; one that finishes may bring more
    finished: int = 0
    stalled_steps: int = 0  # steps that slots in play waited for memory

    @property
    def tokens_per_second(self) -> float:
        return self.sampled_tokens / max(self.seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class PendingWrite:
    """Tokens that one slot's cache lacks, and what its next turn needs.

    The tokens are tokens[filled : filled + count].
    """

    slot: int
    tokens: list[int]
    filled: int
    count: int
    limit: int
    stop_automaton: int
    uid: int
    temperature: float
    source: int = -1  # the slot to copy from, for shared tokens

    def first(self, longest: int) -> "PendingWrite":
        return dataclasses.replace(self, count=min(self.count, longest))

    def after(self, longest: int) -> "PendingWrite":
        return dataclasses.replace(self, filled=self.filled + longest, count=self.count - longest)


class Pending(NamedTuple):
    """What the slots' caches lack, in the order in which it is to be written."""

    prefixes: list[PendingWrite]  # to compute
    prefix_copies: list[PendingWrite]
    tokens: list[PendingWrite]  # to compute: the rest of the prompts, and observations
    prompt_copies: list[PendingWrite]

    @property
    def computed(self) -> list[PendingWrite]:
        return self.prefixes + self.tokens


class _Seat(NamedTuple):
    """A free slot with memory for a prompt, and slots of its shard that hold parts of it.

    The slot itself may be one. -1 where there is none.
    """

    slot: int
    prompt_in: int
    prefix_in: int


class RowAllocator:
    """Which rows of the cache's pieces belong to which slot.

    rows_JB, int32: the row inside its shard that each slot has taken of each later piece; the
    number of rows where it has none. A slot takes the lowest that is free, so that the rows in use
    lie together. room_B, int32: tokens that a slot has memory for.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        slots = layout.rows[0]
        self._rows = layout.per_shard.rows  # of each piece in a shard
        self._free = [[list(range(n)) for _ in range(layout.shards)] for n in self._rows]
        none_J1 = np.array(self._rows[1:], np.int32)[:, None]
        self.rows_JB = np.tile(none_J1, (1, slots))
        self.room_B = np.full((slots,), layout.ends[0], np.int32)

    def grow(self, slot: int, tokens: int) -> None:
        """Takes the rows that so many tokens need, as far as they are free."""
        shard = self._layout.shard_of(slot)
        for piece in range(self._pieces(slot), self._layout.depth(tokens)):
            if not self._free[piece][shard]:
                return
            row = heapq.heappop(self._free[piece][shard])
            self.rows_JB[piece - 1, slot] = row
            self.room_B[slot] = self._layout.ends[piece]

    def rows_of(self, slots: Iterable[int], piece: int) -> int:
        """How many rows of a piece hold all of these slots' rows, counted from the lowest."""
        if piece == 0:
            return self._rows[0]
        rows = self.rows_JB[piece - 1, list(slots)]
        return 1 + int(rows[rows < self._rows[piece]].max(initial=0))

    def fits(self, slot: int, tokens: int) -> bool:
        """Whether a slot that holds nothing could grow to so many tokens."""
        shard = self._layout.shard_of(slot)
        later_pieces = range(1, self._layout.depth(tokens))
        return all(self._free[piece][shard] for piece in later_pieces)

    def release(self, slot: int) -> None:
        """Gives back all but the first piece, which is the slot's own."""
        shard = self._layout.shard_of(slot)
        for piece in range(1, self._pieces(slot)):
            row = int(self.rows_JB[piece - 1, slot])
            heapq.heappush(self._free[piece][shard], row)
            self.rows_JB[piece - 1, slot] = self._rows[piece]
        self.room_B[slot] = self._layout.ends[0]

    def _pieces(self, slot: int) -> int:
        """How many pieces the slot has memory of."""
        return self._layout.depth(int(self.room_B[slot]))


class Scheduler:
    """Which player has which slot, and what each slot waits for.

    barrier: players that follow from others wait until all of those have ended.
    """

    def __init__(
        self,
        layout: Layout,
        chunk: int,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]],
        submit: Callable[[list[str]], Future[Sequence[Any]]],
        barrier: bool,
    ):
        self._layout = layout
        self._chunk = chunk
        self._finished = finished
        self._submit = submit
        self._barrier = barrier
        self._waiting = collections.deque(players)
        self._next_wave: list[Player] = []
        self.stats = Stats(known=len(self._waiting))
        self.memory = RowAllocator(layout)
        # in the order of arrival: who came first gets memory first
        self._active: dict[int, Player] = {}
        self._filled = [0] * layout.rows[0]  # tokens in the cache, as far as the host has seen
        self._turn = [0] * layout.rows[0]  # counts stops: tells a slot's old turn from its new one
        self._playing: set[int] = set()  # slots in the middle of a turn
        self._stale: list[int] = []  # active slots whose cache lacks tokens
        # slot -> prompt that its cache begins with, and the shared prefix of one
        self._prompt_in: dict[int, tuple[int, ...]] = {}
        self._prefix_in: dict[int, tuple[int, ...]] = {}
        self._search: tuple[Future[Sequence[Any]], list[int]] | None = None

    def is_done(self) -> bool:
        """Whether nothing is left to play; with barriers, the followers of a wave are the next."""
        if self._waiting or self._playing or self._stale or self._search:
            return False
        self._waiting.extend(self._next_wave)
        self._next_wave = []
        return not self._waiting

    def running(self) -> dict[int, int]:
        """Slots of the coming chunk and their turns."""
        self._grow_active()
        return {slot: self._turn[slot] for slot in sorted(self._playing)}

    def ending(self, turns: dict[int, int], in_flight: dict[int, int]) -> bool:
        """Whether all these turns reach their limits in the chunk in flight.

        Another one would be for nothing then. (A turn that waits for memory does not reach its
        limit; then only the time of a chunk is lost.)
        """

        def ends(slot: int, turn: int) -> bool:
            tokens = self._filled[slot] + self._chunk + 1
            limit = self._limit(self._active[slot])
            return in_flight.get(slot) == turn and tokens >= limit

        return all(ends(slot, turn) for slot, turn in turns.items())

    def _grow_active(self) -> None:
        """Takes the memory that observations and the coming chunk need, as far as it is free."""
        for slot, player in self._active.items():
            if slot in self._playing:
                # The host's view is one chunk old.
                coming = self._filled[slot] + 2 * self._chunk
                self.memory.grow(slot, min(coming, self._limit(player)))
            else:
                self.memory.grow(slot, len(player.tokens) - 1)

    def reach(self, running: Collection[int]) -> tuple[int, int]:
        """What holds all that these slots have when the coming chunk starts.

        Pieces of the cache, and rows of the deepest of these.
        """
        longest = max(self._filled[slot] for slot in running) + self._chunk
        depth = self._layout.depth(min(self._layout.ends[-1], longest))
        return depth, self.memory.rows_of(running, depth - 1)

    def take_results(self, waiting: Callable[[], None]) -> None:
        """Gives the results of the searches that the last chunk asked for to their players.

        waiting: called while the search lasts; may raise.
        """
        if self._search is None:
            return
        future, slots = self._search
        self._search = None
        while not futures.wait([future], _TICK_SECONDS).done:
            waiting()
        for slot, result in zip(slots, future.result(), strict=True):
            player = self._active[slot]
            player.insert_result(result)
            self._end_if_full(player)
            if player.stop_reason:
                self._finish(slot)
            else:
                self._stale.append(slot)

    def take_chunk(self, chunk: Chunk, turns: dict[int, int]) -> None:
        """Gives the new tokens and stops of a chunk to their players; starts their searches.

        Turns that ended in the chunk before are passed over.
        """
        steps = len(chunk.tokens_CB)
        self.stats.slot_steps += chunk.tokens_CB.size
        queries: dict[int, str] = {}
        for slot, turn in turns.items():
            if self._turn[slot] != turn:
                continue

            # The slot's new tokens.
            player = self._active[slot]
            count = int(chunk.count_B[slot])
            tokens = chunk.tokens_CB[:count, slot].tolist()
            logprobs = chunk.logprobs_CB[:count, slot].tolist()
            self._filled[slot] += count
            self.stats.busy_steps += count
            self.stats.sampled_tokens += count

            # The turn goes on.
            stop = int(chunk.stop_B[slot])
            if stop == RUNNING:
                self.stats.stalled_steps += steps - count
                player.append(tokens, logprobs)
                continue

            # The turn has ended, by a search or with the episode.
            self._turn[slot] += 1
            self._playing.discard(slot)
            if stop == LIMIT and player.token_limit() > self._limit(player):
                stop = FULL
            query = player.end_turn(tokens, logprobs, stop)
            if query is None:
                self._finish(slot)
            else:
                queries[slot] = query
        if queries:
            self.stats.searches += len(queries)
            self._search = (self._submit(list(queries.values())), list(queries))

    def pending(self) -> Pending:
        """Gives free slots to waiting players, and lists all tokens that the caches lack.

        They must be written before the next call.
        """
        self._grow_active()  # before any new player gets a slot
        ready = [slot for slot in self._stale if self._has_room(slot)]
        self._stale = [slot for slot in self._stale if slot not in ready]
        found = Pending([], [], [self._start_turn(slot) for slot in ready], [])
        self._seat_waiting(found)

        # Counts, and what the slots hold when all this is written.
        copied = found.prefix_copies + found.prompt_copies
        self.stats.written_tokens += sum(write.count for write in found.computed)
        self.stats.shared_tokens += sum(write.count for write in copied)
        for write in found.prompt_copies:
            self._prompt_in[write.slot] = tuple(write.tokens)
        for write in copied:
            self._prefix_in[write.slot] = self._prefix(self._active[write.slot])
        return found

    def _has_room(self, slot: int) -> bool:
        cached = len(self._active[slot].tokens) - 1
        return cached <= int(self.memory.room_B[slot])

    def _seat_waiting(self, found: Pending) -> None:
        """Gives free slots to waiting players; adds what these lack to `found`."""
        free = [slot for slot in range(self._layout.rows[0]) if slot not in self._active]
        passed: list[Player] = []  # no memory for them now; shorter ones may go ahead
        while free and (player := self._next_waiting()) is not None:
            seat = self._place(player, free)
            if seat.slot < 0:
                passed.append(player)
                continue
            free.remove(seat.slot)
            self.memory.grow(seat.slot, len(player.tokens) - 1)
            self._active[seat.slot] = player
            self._filled[seat.slot] = 0
            self._share(player, seat, found)
        self._waiting.extendleft(reversed(passed))

    def _share(self, player: Player, seat: _Seat, found: Pending) -> None:
        """Adds to `found` what a new player's slot lacks, after what it takes from others.

        A prefix is always computed by itself, also where nobody shares it: so the numbers do not
        depend on who plays beside.
        """
        slot = seat.slot
        prefix = self._prefix(player)
        write = self._start_turn(slot)
        held = self._prefix_in.pop(slot, ())

        # The whole prompt. No other may copy from a copy that is not made yet: see `pending`.
        if seat.prompt_in >= 0:
            if seat.prompt_in != slot:
                self._prompt_in.pop(slot, None)
            found.prompt_copies.append(dataclasses.replace(write, source=seat.prompt_in))
            return

        # Its prefix: there already, or to be copied or computed.
        self._prompt_in[slot] = tuple(player.tokens)
        first = write.first(len(prefix))
        if seat.prefix_in == slot:
            self._prefix_in[slot] = held
            self.stats.shared_tokens += first.count
        elif seat.prefix_in >= 0:
            found.prefix_copies.append(dataclasses.replace(first, source=seat.prefix_in))
        elif prefix:
            self._prefix_in[slot] = prefix
            found.prefixes.append(first)

        # The rest.
        found.tokens.append(write.after(len(prefix)))

    def _prefix(self, player: Player) -> tuple[int, ...]:
        """The part of a prompt that prompts share, as far as a slot keeps it after an episode."""
        return tuple(player.tokens[: min(player.shared_prefix, self._layout.ends[0])])

    def _place(self, player: Player, free: list[int]) -> _Seat:
        shard_of = self._layout.shard_of
        prompt = tuple(player.tokens)
        holders = [slot for slot, held in self._prompt_in.items() if held == prompt]
        prefix = self._prefix(player)
        prefixed = [slot for slot, held in self._prefix_in.items() if prefix and held == prefix]
        near = {shard_of(slot) for slot in holders}
        room = collections.Counter(shard_of(slot) for slot in free)

        def preference(slot: int) -> tuple[bool, int, bool]:
            # A slot where the prompt need not be computed, else one in the emptiest shard: shards
            # compute prompts side by side.
            shard = shard_of(slot)
            return shard not in near, -room[shard], slot not in prefixed

        # A free slot that holds the prompt is taken itself, and so is one of the shard that holds
        # the prefix: another player must not overwrite it before the copy.
        free_holders = [slot for slot in holders if slot in free]
        wanted = free_holders or sorted(free, key=preference)
        fitting = (slot for slot in wanted if self.memory.fits(slot, len(prompt) - 1))
        slot = next(fitting, -1)

        def source(holding: list[int]) -> int:
            near = (holder for holder in holding if shard_of(holder) == shard_of(slot))
            return slot if slot in holding else next(near, -1)

        return _Seat(slot, source(holders), source(prefixed))

    def _next_waiting(self) -> Player | None:
        """The next player that has something to play.

        One whose prompt was refused, or cannot fit, ends at once.
        """
        while self._waiting:
            player = self._waiting.popleft()
            self._end_if_full(player)
            if not player.stop_reason:
                return player
            self._end(player)
        return None

    def _end_if_full(self, player: Player) -> None:
        """Ends a player in play for whose next token there is no memory."""
        if not player.stop_reason and len(player.tokens) >= self._layout.ends[-1]:
            player.end_turn([], [], FULL)

    def _limit(self, player: Player) -> int:
        return min(player.token_limit(), self._layout.ends[-1])

    def _start_turn(self, slot: int) -> PendingWrite:
        """Starts a turn in a slot; returns what its cache lacks."""
        player = self._active[slot]
        filled = self._filled[slot]
        count = len(player.tokens) - 1 - filled
        self._filled[slot] += count
        self._playing.add(slot)
        return PendingWrite(
            slot=slot,
            tokens=list(player.tokens),
            filled=filled,
            count=count,
            limit=self._limit(player),
            stop_automaton=player.stop_automaton,
            uid=player.uid,
            temperature=player.temperature,
        )

    def _finish(self, slot: int) -> None:
        """Ends the player of a slot, which gives back its memory."""
        player = self._active.pop(slot)
        self.memory.release(slot)
        if len(self._prompt_in.get(slot, ())) > self._layout.ends[0]:
            del self._prompt_in[slot]  # its later pieces are gone
        self._end(player)

    def _end(self, player: Player) -> None:
        """Counts a player that has ended, and takes up the players that follow from it."""
        followers = list(self._finished(player))
        self.stats.finished += 1
        self.stats.known += len(followers)
        following = self._next_wave if self._barrier else self._waiting
        following.extend(followers)
