"""The host's books during one call of `Engine.play`: who sits where, what each slot waits for,
whose memory is whose.

Pure bookkeeping: it computes nothing. Rows of the cache's later pieces are taken in order, first
piece first, and a slot that finds none keeps what it has and waits. So whoever holds a row of the
last piece never waits, and the game goes on.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Protocol

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
        """Which of the engine's automata this player listens to."""
        ...

    def token_limit(self) -> int:
        """Total number of tokens at which the coming turn must end."""
        ...

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        """Takes the turn's last tokens and why it stopped; returns a search query, or None when the
        episode ended.
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
    """What a call of `play` cost. occupancy = busy_steps / slot_steps."""

    seconds: float = 0.0
    sampled_tokens: int = 0
    written_tokens: int = 0  # prompt and observation tokens computed
    shared_tokens: int = 0  # prompt tokens copied from another slot instead
    searches: int = 0
    busy_steps: int = 0
    slot_steps: int = 0
    known: int = 0  # players so far; one that finishes may bring more
    finished: int = 0
    stalled_steps: int = 0  # steps that slots in play waited for memory


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens that one slot's cache lacks: tokens[filled : filled + count], and what its next turn
    needs.
    """

    slot: int
    tokens: list[int]
    filled: int
    count: int
    limit: int
    stop_automaton: int
    uid: int
    temperature: float
    source: int = -1  # the slot to copy from, for shared prompts

    def first(self, longest: int) -> "Row":
        return dataclasses.replace(self, count=min(self.count, longest))

    def after(self, longest: int) -> "Row":
        return dataclasses.replace(self, filled=self.filled + longest, count=self.count - longest)


class RowAllocator:
    """Which rows of the cache's pieces belong to which slot."""

    def __init__(self, layout: Layout):
        self._layout = layout
        slots, self._each = layout.rows[0], [n // layout.parts for n in layout.rows]
        self._free = [[list(range(n)) for _ in range(layout.parts)] for n in self._each]
        none = np.array(self._each[1:], np.int32)[:, None]
        self.rows_JB = np.tile(none, (1, slots))
        # tokens that a slot has memory for
        self.room_B = np.full((slots,), layout.ends[0], np.int32)

    def grow(self, slot: int, tokens: int) -> None:
        """Takes the rows that so many tokens need, as far as they are free."""
        part = self._layout.part(slot)
        for piece in range(self._layout.depth(int(self.room_B[slot])), self._layout.depth(tokens)):
            if not self._free[piece][part]:
                return
            self.rows_JB[piece - 1, slot] = self._free[piece][part].pop()
            self.room_B[slot] = self._layout.ends[piece]

    def fits(self, slot: int, tokens: int) -> bool:
        """Whether a slot that holds nothing could grow to so many tokens."""
        part = self._layout.part(slot)
        return all(self._free[piece][part] for piece in range(1, self._layout.depth(tokens)))

    def release(self, slot: int) -> None:
        """Gives back all but the first piece, which is the slot's own."""
        part = self._layout.part(slot)
        for piece in range(1, self._layout.depth(int(self.room_B[slot]))):
            self._free[piece][part].append(int(self.rows_JB[piece - 1, slot]))
            self.rows_JB[piece - 1, slot] = self._each[piece]
        self.room_B[slot] = self._layout.ends[0]


class Scheduler:
    """Who sits where. barrier: players that follow from others wait until all of those have ended."""

    def __init__(
        self,
        layout: Layout,
        chunk: int,
        players: Iterable[Player],
        finished: Callable[[Any], Iterable[Player]],
        submit: Callable[[list[str]], Future[Sequence[Any]]],
        barrier: bool,
    ):
        self.stats, self.memory = Stats(), RowAllocator(layout)
        self._layout, self._chunk, self._finished, self._submit = layout, chunk, finished, submit
        self._barrier = barrier
        self._waiting = collections.deque(players)
        self.stats.known = len(self._waiting)
        self._next_wave: list[Player] = []
        # in the order of seating: who came first gets memory first
        self._active: dict[int, Player] = {}
        self._filled = [0] * layout.rows[0]  # tokens in the cache, as far as the host has seen
        self._turn = [0] * layout.rows[0]  # counts stops: tells a slot's old turn from its new one
        self._playing: set[int] = set()  # slots in the middle of a turn
        self._stale: list[int] = []  # seated slots whose cache lacks tokens
        # slot -> prompt that its cache begins with
        self._prompt_in: dict[int, tuple[int, ...]] = {}
        self._copies: list[Row] = []
        self._search: tuple[Future[Sequence[Any]], list[int]] | None = None

    def is_done(self) -> bool:
        """Nothing is left to play; with barriers, what followed from one wave is the next."""
        if self._waiting or self._playing or self._stale or self._search:
            return False
        self._waiting.extend(self._next_wave)
        self._next_wave = []
        return not self._waiting

    def running(self) -> dict[int, int]:
        """Slots of the coming chunk and their turns."""
        self._grow_seated()
        return {slot: self._turn[slot] for slot in sorted(self._playing)}

    def ending(self, turns: dict[int, int], in_flight: dict[int, int]) -> bool:
        """Whether all these turns reach their limits in the chunk in flight, so that another one
        would be for nothing.

        (One that waits for memory does not; then only the time of a chunk is lost.)
        """
        return all(
            in_flight.get(slot) == turn
            and self._filled[slot] + self._chunk + 1 >= self._limit(self._active[slot])
            for slot, turn in turns.items()
        )

    def _grow_seated(self) -> None:
        """Takes the memory that observations and the coming chunk need, as far as it is free."""
        for slot, player in self._active.items():
            if slot in self._playing:  # the host's view is one chunk old
                self.memory.grow(
                    slot, min(self._filled[slot] + 2 * self._chunk, self._limit(player))
                )
            else:
                self.memory.grow(slot, len(player.tokens) - 1)

    def depth(self, running: Iterable[int]) -> int:
        """Pieces of the cache that hold what these slots have when the coming chunk starts."""
        return self._layout.depth(
            min(self._layout.ends[-1], max(self._filled[s] for s in running) + self._chunk)
        )

    def take_results(self, waiting: Callable[[], None]) -> None:
        """Results of the searches handed out after the chunk before. `waiting`, which may raise,
        hears of each wait.
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
            if not player.stop_reason and len(player.tokens) >= self._layout.ends[-1]:
                player.end_turn([], [], FULL)
            if player.stop_reason:
                self._finish(slot)
            else:
                self._stale.append(slot)

    def take_chunk(self, chunk: Chunk, turns: dict[int, int]) -> None:
        """New tokens and stops of a chunk; turns that ended in the chunk before are passed over."""
        tokens_CB, logprobs_CB, count_B, stop_B = (
            chunk.tokens_CB,
            chunk.logprobs_CB,
            chunk.count_B,
            chunk.stop_B,
        )
        self.stats.slot_steps += tokens_CB.size
        queries: dict[int, str] = {}
        for slot, turn in turns.items():
            if self._turn[slot] != turn:
                continue
            player, count, stop = self._active[slot], int(count_B[slot]), int(stop_B[slot])
            tokens, logprobs = tokens_CB[:count, slot].tolist(), logprobs_CB[:count, slot].tolist()
            self._filled[slot] += count
            self.stats.busy_steps += count
            self.stats.sampled_tokens += count
            if stop == RUNNING:
                self.stats.stalled_steps += len(tokens_CB) - count
                player.append(tokens, logprobs)
                continue
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

    def pending_prefills(self) -> list[Row]:
        """Seats waiting players and lists all rows to compute; those that can copy a prompt are
        kept for pending_prefix_copies.
        """
        self._grow_seated()  # before anyone new sits down
        ready = [
            slot
            for slot in self._stale
            if self.memory.room_B[slot] >= len(self._active[slot].tokens) - 1
        ]
        self._stale = [slot for slot in self._stale if slot not in ready]
        rows = [self._row(slot) for slot in ready] + self._seat_waiting()
        for row in rows:
            self.stats.written_tokens += row.count
        return rows

    def _seat_waiting(self) -> list[Row]:
        rows = []
        free = [slot for slot in range(self._layout.rows[0]) if slot not in self._active]
        passed: list[Player] = []  # no memory for them now; shorter ones may go ahead
        while free and (player := self._next_waiting()) is not None:
            prompt = tuple(player.tokens)
            slot, source = self._place(prompt, free)
            if slot < 0:
                passed.append(player)
                continue
            free.remove(slot)
            self.memory.grow(slot, len(prompt) - 1)
            self._active[slot], self._filled[slot] = player, 0
            row = dataclasses.replace(self._row(slot), source=source)
            if source < 0 or source == slot:
                self._prompt_in[slot] = prompt
            else:
                # nobody may copy from a copy that is not made yet: see pending_prefix_copies
                self._prompt_in.pop(slot, None)
            if source >= 0:
                self._copies.append(row)
                self.stats.shared_tokens += row.count
            else:
                rows.append(row)
        self._waiting.extendleft(reversed(passed))
        return rows

    def _place(self, prompt: tuple[int, ...], free: list[int]) -> tuple[int, int]:
        """A free slot with memory for this prompt, and the slot of its part that holds it; -1 where
        there is none.
        """
        part = self._layout.part
        holders = [slot for slot, held in self._prompt_in.items() if held == prompt]
        near, room = {part(slot) for slot in holders}, collections.Counter(map(part, free))
        # A free slot that holds the prompt is taken itself: another player must not overwrite it
        # before the copy. Else one where the prompt need not be computed, or in the emptiest part:
        # parts compute prompts side by side.
        wanted = [slot for slot in holders if slot in free]
        wanted = wanted or sorted(
            free, key=lambda slot: (part(slot) not in near, -room[part(slot)])
        )
        slot = next((s for s in wanted if self.memory.fits(s, len(prompt) - 1)), -1)
        if slot in holders:
            return slot, slot
        return slot, next((s for s in holders if part(s) == part(slot)), -1)

    def pending_prefix_copies(self) -> list[Row]:
        copies, self._copies = self._copies, []
        self._prompt_in |= {row.slot: tuple(row.tokens) for row in copies}
        return copies

    def _next_waiting(self) -> Player | None:
        """The next player that has something to play; one whose prompt was refused, or cannot fit,
        ends at once.
        """
        while self._waiting:
            player = self._waiting.popleft()
            if not player.stop_reason and len(player.tokens) >= self._layout.ends[-1]:
                player.end_turn([], [], FULL)
            if not player.stop_reason:
                return player
            self._end(player)
        return None

    def _limit(self, player: Player) -> int:
        return min(player.token_limit(), self._layout.ends[-1])

    def _row(self, slot: int) -> Row:
        player, filled = self._active[slot], self._filled[slot]
        count = len(player.tokens) - 1 - filled
        self._filled[slot] += count
        self._playing.add(slot)
        return Row(
            slot,
            list(player.tokens),
            filled,
            count,
            self._limit(player),
            player.stop_automaton,
            player.uid,
            player.temperature,
        )

    def _finish(self, slot: int) -> None:
        player = self._active.pop(slot)
        self.memory.release(slot)
        if len(self._prompt_in.get(slot, ())) > self._layout.ends[0]:
            del self._prompt_in[slot]  # its later pieces are gone
        self._end(player)

    def _end(self, player: Player) -> None:
        followers = list(self._finished(player))
        self.stats.finished += 1
        self.stats.known += len(followers)
        (self._next_wave if self._barrier else self._waiting).extend(followers)
