"""Scheduler: what is to be written leaves in each slot the tokens of its player, whoever plays."""

import random
from concurrent.futures import Future

import numpy as np
import pytest

from ssp_jax.rollout import kv_cache, sampler
from ssp_jax.rollout.scheduler import Scheduler

CHUNK = 4
PREFIXES = [[10] * 6, [20] * 9, []]  # of roles
EOS, SEARCH = 1, 0  # what a turn ends with


class Scripted:
    """A player of some turns; its sampled tokens are its own, so that no two caches are alike."""

    stop_automaton, temperature = 0, 1.0

    def __init__(self, uid, rng):
        prefix = PREFIXES[rng.randrange(len(PREFIXES))]
        self.uid = uid
        self.shared_prefix = len(prefix)
        # Few questions, so that some prompts are the same.
        self.tokens = prefix + [rng.randrange(100, 103)] * 3
        self.searches = rng.randrange(3)
        self.stop_reason = ""

    def token_limit(self):
        return 1000

    def append(self, tokens, logprobs):
        self.tokens += tokens

    def end_turn(self, tokens, logprobs, stop):
        self.tokens += tokens
        if stop == SEARCH and self.searches:
            self.searches -= 1
            return "query"
        self.stop_reason = "done"
        return None

    def insert_result(self, result):
        self.tokens += [1000 + self.uid] * 3


def searched(queries):
    future = Future()
    future.set_result(queries)
    return future


class Caches:
    """What a device holds when it does as it is told."""

    def __init__(self, layout):
        self.layout = layout
        self.held = [[] for _ in range(layout.rows[0])]

    def write(self, pending, active):
        for slot, held in enumerate(self.held):
            if slot not in active:
                del held[self.layout.ends[0] :]  # later pieces are another's now
        for name, writes in pending._asdict().items():
            for write in writes:
                if name.endswith("copies"):
                    self._copy(write)
                else:
                    self._put(write)

    def _copy(self, write):
        assert self.layout.shard_of(write.source) == self.layout.shard_of(write.slot)
        self.held[write.slot] = self.held[write.source][: write.count]

    def _put(self, write):
        last = write.filled + write.count
        self.held[write.slot][write.filled :] = write.tokens[write.filled : last]

    def chunk(self, turns, room_B, rng):
        """Some tokens for each turn, of which some end."""
        slots = len(self.held)
        count_B = np.zeros(slots, int)
        stop_B = np.full(slots, sampler.RUNNING)
        tokens_CB = np.zeros((CHUNK, slots), int)
        for slot in turns:
            room = int(room_B[slot]) - len(self.held[slot])
            count_B[slot] = max(0, min(room, rng.randrange(1, CHUNK + 1)))
            tokens_CB[:, slot] = rng.randrange(5000, 9000)
            if count_B[slot] and rng.random() < 0.5:
                stop_B[slot] = rng.choice([SEARCH, EOS])
        return sampler.Chunk(tokens_CB, np.zeros((CHUNK, slots)), count_B, stop_B)


@pytest.mark.parametrize("ends", [(64,), (8, 64), (16, 24, 64)])
@pytest.mark.parametrize("slots,shards", [(1, 1), (3, 1), (8, 1), (8, 4)])
def test_each_slot_holds_its_players_tokens(slots, shards, ends):
    for seed in range(20):
        rng = random.Random(seed)
        players = [Scripted(uid, rng) for uid in range(30)]
        layout = kv_cache.full_layout(ends, slots, shards)
        scheduler = Scheduler(layout, CHUNK, players, lambda player: (), searched, False)
        caches = Caches(layout)
        while not scheduler.is_done():
            scheduler.take_results(lambda: None)
            caches.write(scheduler.pending(), scheduler._active)
            for slot, player in scheduler._active.items():
                assert caches.held[slot] == player.tokens[:-1]
            turns = scheduler.running()
            chunk = caches.chunk(turns, scheduler.memory.room_B, rng)
            for slot in turns:
                # The pending token is fed, and all that are sampled but the last.
                fed = [scheduler._active[slot].tokens[-1], *chunk.tokens_CB[:, slot]]
                caches.held[slot] += fed[: chunk.count_B[slot]]
            scheduler.take_chunk(chunk, turns)
        assert scheduler.stats.finished == 30 and all(p.stop_reason for p in players)
