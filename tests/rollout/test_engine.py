"""Engine: every episode gets what it would get alone, whatever the slots, chunks and neighbours."""

import dataclasses
import functools
import re
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.game import roles
from ssp_jax.game.prompts import STYLES
from ssp_jax.model import decoder, hf_load, sharding
from ssp_jax.rollout import engine, kv_cache, sampler
from ssp_jax.rollout.engine import Sizes
from ssp_jax.rollout.scheduler import Scheduler, Stats
from ssp_jax.runtime import device_memory
from ssp_jax.runtime.logger import CompileCounter
from tests.random_params import random_params

TOKENIZER = hf_load.load_tokenizer(Path("assets/tiny/model"))
pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = decoder.ModelConfig(2048, 1, 32, 4, 2, 8, 48)  # one layer: the programs unroll them
PARAMS = jax.device_put(decoder.unstack(random_params(CONFIG), np.float32))
KEY = jax.random.key(7)
LIMITS = roles.Limits(64, 200, 120, 12, 4, 3, 60)
CONTEXT = roles.EpisodeContext(TOKENIZER, STYLES["brief"], "chat", LIMITS)
SIZES = Sizes(
    slots=8, chunk=4, cache_tokens=256, cache_buckets=(64,), extend_buckets=(16, 64), extend_rows=4
)
# 4 programs to compile and not 10: one piece of the cache, one bucket.
FEW = dataclasses.replace(SIZES, cache_buckets=(), extend_buckets=(64,))


def search(queries):
    return [[Document("1", '"T"', f"about {query}")] for query in queries]


class Searcher(roles.EpisodePlayer):
    """Ends its first turns with a search, as if the model had written one: a random model never
    does.
    """

    def end_turn(self, tokens, logprobs, stop):
        if stop != sampler.FULL and len(self.queries) < 2:
            self.append(tokens, logprobs)
            self.turns.append((self.role.name, ""))
            self.queries.append(f"{self.uid} {len(self.queries)}")
            return self.queries[-1]
        return super().end_turn(tokens, logprobs, stop)


def make_engine(sizes, config=CONFIG, search=search, **options):
    automata = roles.role_automata(TOKENIZER, config.vocab_size)
    return engine.Engine(
        config, sizes, automata, (TOKENIZER.eos_token_id,), jnp.float32, search, **options
    )


def make_players(kind=Searcher, groups=4, attempts=3, temperature=1.0):
    return [
        kind(
            CONTEXT,
            roles.SOLVER,
            roles.episode_id(roles.SOLVER, row, attempt),
            temperature,
            CONTEXT.encode(f"Question: number {row} " + "and so on " * row),
        )
        for row in range(groups)
        for attempt in range(attempts)
    ]


def collect(follow=lambda player: ()):
    """The episodes by uid as they end, and what Engine.play calls for each; follow: who is next."""
    ended = {}

    def finished(player):
        ended[player.uid] = player.episode()
        return follow(player)

    return ended, finished


def play(sizes, players=None, **options):
    players = make_players() if players is None else players
    ended, finished = collect()
    stats = make_engine(sizes, **options).play(PARAMS, KEY, players, finished)
    return ended, stats


def same(a, b):
    assert a.keys() == b.keys()
    for uid in a:
        assert a[uid].tokens == b[uid].tokens
        assert a[uid].turns == b[uid].turns
        assert a[uid].stop_reason == b[uid].stop_reason
        np.testing.assert_allclose(a[uid].logprobs, b[uid].logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def expected():
    return play(SIZES)[0]


@pytest.mark.parametrize(
    "sizes,changes",
    [
        (FEW, {"slots": 1}),
        pytest.param(FEW, {"slots": 3, "chunk": 5}, marks=pytest.mark.ci),
        pytest.param(FEW, {"slots": 16, "extend_rows": 1}, marks=pytest.mark.ci),
        pytest.param(SIZES, {"extend_buckets": (8,)}, marks=pytest.mark.ci),
    ],
)
def test_episodes_do_not_depend_on_the_schedule(expected, sizes, changes):
    same(expected, play(dataclasses.replace(sizes, **changes))[0])


@pytest.mark.ci
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_4_16_and_64_slots_play_the_same_tokens(temperature):
    """Greedy, and sampled with the same keys, in float32."""
    played = [
        play(
            dataclasses.replace(FEW, slots=slots), make_players(groups=6, temperature=temperature)
        )[0]
        for slots in (4, 16, 64)
    ]
    same(played[0], played[1])
    same(played[0], played[2])


def test_reading_few_rows_of_a_piece_plays_the_same_episodes(expected, monkeypatch):
    """And many chunks do: the slots that have grown into it hold its lowest rows."""
    read = []
    decode = engine.Device._decode_call

    def noted(device, memory, depth, rows):
        read.append((depth, rows))
        return decode(device, memory, depth, rows)

    monkeypatch.setattr(engine.Device, "_decode_call", noted)
    same(expected, play(dataclasses.replace(SIZES, row_shares=(0.25, 0.5)))[0])
    assert min(rows for depth, rows in read if depth > 1) < SIZES.slots


@pytest.mark.ci
def test_slots_that_just_hold_the_longest_episode_play_the_same(expected):
    longest = LIMITS.prompt_tokens + LIMITS.response_tokens
    same(expected, play(dataclasses.replace(SIZES, cache_tokens=longest))[0])


def followers():
    """The first attempts of two groups, each with two more that follow when it has ended."""
    players = make_players(groups=2)
    first = [players[0], players[3]]
    rest = {players[0].uid: players[1:3], players[3].uid: players[4:6]}
    return first, lambda player: rest.get(player.uid, ())


@pytest.mark.parametrize("schedule", engine.SCHEDULES)
def test_both_schedules_play_the_same_episodes(expected, schedule):
    """With barriers the followers of one player wait for the other player too."""
    first, follow = followers()
    ended, finished = collect(follow)

    # One slot: pipelined or not, a queue. The second of the first wave comes before all followers
    # in both.
    make_engine(dataclasses.replace(SIZES, schedule=schedule)).play(PARAMS, KEY, first, finished)
    same({uid: expected[uid] for uid in ended}, ended)
    assert len(ended) == 6
    if schedule == "barrier":
        assert set(list(ended)[:2]) == {player.uid for player in first}


def test_barriers_wait_for_the_whole_wave():
    """A short player's follower starts at once in a pipeline; with barriers, after the long one."""
    orders = {}
    for schedule in engine.SCHEDULES:
        long = make_players(groups=1, attempts=1)[0]
        short, follower = (
            roles.EpisodePlayer(CONTEXT, roles.VERIFIER, uid, 1.0, [7, 8, uid])
            for uid in (901, 902)
        )
        following = {short.uid: [follower]}
        ended, finished = collect(lambda player, next_=following: next_.get(player.uid, ()))
        one = make_engine(dataclasses.replace(SIZES, schedule=schedule))
        one.play(PARAMS, KEY, [long, short], finished)
        orders[schedule] = list(ended)
    assert orders == {"pipelined": [901, 902, 0], "barrier": [901, 0, 902]}


TOKEN_BYTES = kv_cache.token_bytes(CONFIG, jnp.float32)


def memory_for(tokens, cache_buckets=(48, 96)):
    """Sizes with three pieces, or others, and a budget of so many tokens."""
    gib = tokens * TOKEN_BYTES / 2**30
    return dataclasses.replace(FEW, cache_buckets=cache_buckets, kv_cache_gib=gib)


def on_mesh(sizes, **axes):
    """An engine on a mesh of these axes, and params that lie there."""
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | axes)
    one = make_engine(sizes, state_sharding=lambda state: sharding.state_shardings(state, mesh))
    return one, jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh, drop=("fsdp",)))


# Three pieces; then two, which are fewer programs.
ONE_LATER_ROW = memory_for(8 * 48 + 2 * 48 + 160)
TWO_LATER_ROWS = memory_for(8 * 48 + 4 * 48 + 2 * 160)
FEWER_SLOTS = memory_for(2 * 64 + 192, cache_buckets=(64,))


@dataclasses.dataclass
class Played:
    ended: dict
    stats: Stats
    compiled: int = 0  # programs, after the warm-up


def warm_play(sizes, **axes):
    """Two runs of varied lengths on a mesh, after a warm-up; what the second one played."""
    one, params = on_mesh(sizes, **axes)
    one.warm_up(params, KEY)
    counter = CompileCounter()
    one.play(params, KEY, make_players(groups=1))
    ended, finished = collect()
    stats = one.play(params, KEY, make_players(), finished)
    return Played(ended, stats, counter.count)


@pytest.fixture(scope="module")
def one_later_row():
    return warm_play(ONE_LATER_ROW)


@pytest.fixture(scope="module")
def eight_devices():
    """Each of four shards has one row of the later piece for its two slots."""
    tokens = 8 * 64 + 4 * 192
    return warm_play(memory_for(tokens / 8, cache_buckets=(64,)), data=2, fsdp=2, tensor=2)


@pytest.mark.ci
@pytest.mark.parametrize(
    "sizes",
    [
        ONE_LATER_ROW,
        pytest.param(TWO_LATER_ROWS, marks=pytest.mark.slow),
        pytest.param(FEWER_SLOTS, marks=pytest.mark.slow),
    ],
)
def test_little_memory_only_makes_episodes_wait(expected, one_later_row, sizes):
    """Down to a single row of the last piece, or less than all slots: the same episodes, and no
    deadlock.
    """
    played = one_later_row if sizes is ONE_LATER_ROW else Played(*play(sizes))
    same(expected, played.ended)
    assert played.stats.known == played.stats.finished == len(expected)


@pytest.mark.ci
def test_memory_that_is_short_is_waited_for(one_later_row):
    _, rich = play(SIZES)
    assert rich.stalled_steps == 0 < one_later_row.stats.stalled_steps


def test_what_the_engine_chose_is_told_and_fits():
    one = make_engine(memory_for(1000))
    one.device(PARAMS, KEY)
    assert one.memory.startswith("8 slots; keys and values ")
    sizes = memory_for(1000)
    layout = engine.choose_layout(CONFIG, sizes, jnp.float32, None, int(sizes.kv_cache_gib * 2**30))
    assert layout.rows[0] == 8 and layout.tokens <= 1000


ALL_KV_BYTES = 8 * 256 * TOKEN_BYTES  # the longest episode in every slot


def with_free(free, **changes):
    """An engine on a device with so many bytes free."""
    return make_engine(dataclasses.replace(SIZES, **changes), free_bytes=lambda: free)


@functools.cache
def needed(**changes):
    """Bytes that its programs take beside keys and values."""
    one = with_free(None, **changes)
    device = one.device(PARAMS, KEY)
    return max(device.program_bytes(max(one._sizes.extend_buckets)).values())


def layout_of(one):
    return one.device(PARAMS, KEY).layout


def test_keys_and_values_take_what_the_programs_leave():
    """On a device that has just too little for all rows there are fewer, and they fit beside the
    temporaries.
    """
    enough = int((ALL_KV_BYTES + needed()) / (1 - device_memory.RESERVE)) + 2
    free = enough - (ALL_KV_BYTES >> 2)
    assert layout_of(with_free(max(enough, 2 * ALL_KV_BYTES))).rows == (8, 8)
    layout = layout_of(with_free(free))
    taken = layout.tokens * TOKEN_BYTES
    assert layout.rows[0] == 8 and layout.rows[1] < 8
    assert 0.6 * ALL_KV_BYTES < taken <= (1 - device_memory.RESERVE) * free - needed()


@pytest.mark.ci
def test_a_budget_of_the_user_that_does_not_fit_is_told_with_one_that_does():
    free = int((ALL_KV_BYTES / 2 + needed()) / (1 - device_memory.RESERVE))
    with pytest.raises(
        InputError, match="does not fit into a device's memory: .* or 0, which takes what is"
    ) as caught:
        layout_of(with_free(free, kv_cache_gib=1.0))
    fits = float(re.search(r"kv_cache_gib=(\S+) or 0", str(caught.value))[1])
    taken = layout_of(with_free(free, kv_cache_gib=fits)).tokens * TOKEN_BYTES
    assert 0.7 * ALL_KV_BYTES / 2 < taken <= ALL_KV_BYTES / 2


@pytest.mark.ci
def test_programs_that_do_not_fit_are_told_with_what_would():
    changes = {"extend_buckets": (16, 256), "extend_rows": 8}
    free = needed(**changes) // 2 + ALL_KV_BYTES // 4
    with pytest.raises(
        InputError, match="extend takes .* expected engine.extend_rows=[1-9] instead of 8"
    ) as caught:
        layout_of(with_free(free, **changes))
    rows = int(re.search(r"extend_rows=(\d)", str(caught.value))[1])
    layout_of(with_free(free, **changes | {"extend_rows": rows}))


@pytest.mark.ci
def test_an_allocation_that_fails_is_one_sentence():
    """More than a process can address."""
    sizes = dataclasses.replace(SIZES, slots=1 << 12, cache_tokens=1 << 30, cache_buckets=())
    with pytest.raises(
        InputError, match="^the engine does not fit into a device's memory .*less of engine.slots"
    ):
        make_engine(sizes).warm_up(PARAMS, KEY)


def test_an_episode_longer_than_the_memory_ends_with_its_own_reason(expected):
    """cache_tokens below what the limits allow: by a turn, by an observation, and by a prompt."""
    ended, _ = play(dataclasses.replace(FEW, cache_tokens=70), make_players(attempts=1))
    assert {e.stop_reason for e in ended.values()} == {"cache_tokens"}
    for uid, episode in ended.items():
        assert np.flatnonzero(episode.sampled)[-1] < 70
        assert episode.tokens == expected[uid].tokens[: len(episode.tokens)]
    ended, _ = play(dataclasses.replace(FEW, cache_tokens=5), make_players(attempts=1))
    assert {(e.stop_reason, e.num_sampled) for e in ended.values()} == {("cache_tokens", 0)}


def test_an_episode_can_be_replayed_alone(expected):
    players = make_players()
    replayed, _ = play(SIZES, [players[7]])
    same({players[7].uid: expected[players[7].uid]}, replayed)


def test_the_same_run_twice_is_bitwise_the_same(expected):
    again, _ = play(SIZES)
    assert again == expected


def test_searches_come_back_to_their_own_episode(expected):
    for uid, episode in expected.items():
        assert [d.text for d in episode.documents] == [f"about {uid} 0", f"about {uid} 1"]
        assert [who for who, _ in episode.turns] == ["solver", "search engine"] * 2 + ["solver"]


def test_a_search_that_finds_nothing_is_told_and_play_goes_on():
    ended, _ = play(SIZES, make_players(attempts=1), search=lambda queries: [[] for _ in queries])
    nothing_found = CONTEXT.decode(CONTEXT.observation([]))
    assert CONTEXT.style.no_result_text in nothing_found
    for episode in ended.values():
        shown = [text for who, text in episode.turns if who == "search engine"]
        assert shown == [nothing_found] * 2
        assert episode.turns[-1][0] == "solver" and not episode.documents
        pairs = zip(episode.tokens, episode.sampled, strict=True)
        read = [token for token, is_sampled in pairs if not is_sampled]
        assert CONTEXT.decode(read).count(nothing_found) == 2


def test_a_search_that_does_not_come_back_does_not_keep_a_signal_from_being_heard():
    """Nor do other errors wait for it, nor is one that the search itself raises lost."""
    gate = threading.Event()

    def never(queries):
        gate.wait(60)
        raise ValueError("too late")

    def broken(queries):
        raise ValueError("no server")

    def signalled(stats):
        if stats.searches:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        make_engine(SIZES, search=never).play(
            PARAMS, KEY, make_players(groups=1, attempts=1), progress=signalled
        )
    assert time.monotonic() - began < 30
    gate.set()
    with pytest.raises(ValueError, match="no server"):
        make_engine(SIZES, search=broken).play(PARAMS, KEY, make_players(groups=1, attempts=1))


def test_attempts_of_a_group_share_its_prompt_and_differ():
    ended, stats = play(SIZES, make_players(groups=1, attempts=6))
    prompt = len(make_players(groups=1)[0].tokens)
    assert stats.shared_tokens == 5 * (prompt - 1)
    assert len({tuple(e.tokens) for e in ended.values()}) == 6


INSTRUCTIONS = [
    CONTEXT.encode(text)
    for text in ("Everybody reads these same words. ", "To others a second role is given. ")
]


def instructed(number, roles_=1):
    """Players whose prompts begin with the instruction of one of so many roles."""
    players = []
    for row in range(number):
        instruction = INSTRUCTIONS[row % roles_]
        uid = roles.episode_id(roles.SOLVER, row, 0)
        own = CONTEXT.encode(f"Question {row}?" + " again" * row)
        player = Searcher(CONTEXT, roles.SOLVER, uid, 1.0, instruction + own)
        player.shared_prefix = len(instruction)
        players.append(player)
    return players


@functools.cache
def played_alone(number, roles_):
    one = make_engine(FEW)
    ended, finished = collect()
    for player in instructed(number, roles_):
        stats = one.play(PARAMS, KEY, [player], finished)
        assert stats.shared_tokens == 0
    return ended


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.ci), 3, 8])
def test_a_prefix_of_many_prompts_is_computed_once(slots):
    """A slot keeps it for the player that comes next."""
    players = instructed(8)
    prompts = sum(player.prompt_length - 1 for player in players)
    ended, stats = play(dataclasses.replace(FEW, slots=slots), players)
    same(played_alone(8, 1), ended)
    assert stats.shared_tokens == 7 * len(INSTRUCTIONS[0])
    results = sum(len(CONTEXT.observation([d])) for e in ended.values() for d in e.documents)
    assert stats.written_tokens == prompts - stats.shared_tokens + results


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_prefixes_of_two_roles_do_not_mix(slots):
    ended, stats = play(dataclasses.replace(FEW, slots=slots), instructed(8, 2))
    same(played_alone(8, 2), ended)
    assert stats.shared_tokens == {1: 0}.get(slots, stats.shared_tokens)


@pytest.mark.ci
def test_each_part_computes_a_prefix_for_its_own():
    many, params = on_mesh(FEW, data=2, fsdp=2)
    ended, finished = collect()
    stats = many.play(params, KEY, instructed(8), finished)
    same(played_alone(8, 1), ended)
    assert stats.shared_tokens == (8 - 4) * len(INSTRUCTIONS[0])


@pytest.mark.ci
def test_a_prefix_longer_than_the_first_piece_is_shared_as_far_as_a_slot_keeps_it():
    ended, stats = play(dataclasses.replace(FEW, cache_buckets=(16,)), instructed(8))
    same(played_alone(8, 1), ended)
    assert stats.shared_tokens == 7 * 16


def test_late_attempts_share_the_prompt_of_one_that_plays(expected):
    """Several copies of one prompt in one call, none from another copy."""
    first, *rest = make_players(groups=1, attempts=3)
    short = roles.EpisodePlayer(CONTEXT, roles.SOLVER, 9999, 1.0, CONTEXT.encode("Question: short"))
    ended, finished = collect(lambda player: rest if player is short else ())
    stats = make_engine(SIZES).play(PARAMS, KEY, [short, first], finished)
    assert stats.shared_tokens == 2 * (len(first.episode().tokens[: first.prompt_length]) - 1)
    del ended[short.uid]
    same({uid: expected[uid] for uid in ended}, ended)


def test_players_that_follow_from_others_are_played():
    first, *rest = make_players(roles.EpisodePlayer, groups=2, attempts=2)
    ended, finished = collect(lambda player: rest if player is first else ())
    stats = make_engine(SIZES).play(PARAMS, KEY, [first], finished)
    assert list(ended)[0] == first.uid
    assert ended.keys() == {player.uid for player in [first, *rest]}
    assert stats.finished == len(ended)


def test_a_refused_prompt_ends_without_playing():
    refused = roles.EpisodePlayer(CONTEXT, roles.SOLVER, 1, 1.0, [5] * 65)
    ended, stats = play(SIZES, [refused, *make_players(groups=1, attempts=1)])
    assert ended[1].stop_reason == "prompt_tokens" and ended[1].num_sampled == 0
    assert stats.finished == 2


@pytest.mark.ci
@pytest.mark.parametrize("devices", [1, 8])
def test_nothing_compiles_after_warm_up(devices, request):
    """Over runs of varied lengths, with little memory; on a mesh too, where what a program gives
    back must lie as the next one expects it.
    """
    fixture = {1: "one_later_row", 8: "eight_devices"}[devices]
    assert request.getfixturevalue(fixture).compiled == 0


def test_no_chunk_is_decoded_when_all_turns_reach_their_limits_in_the_one_before():
    players = [
        roles.EpisodePlayer(CONTEXT, roles.VERIFIER, uid, 1.0, [7, 8, uid]) for uid in (901, 902)
    ]
    ended, stats = play(SIZES, players)
    assert [episode.num_sampled for episode in ended.values()] == [LIMITS.turn_tokens] * 2
    assert stats.slot_steps == LIMITS.turn_tokens * SIZES.slots  # 12 steps: three chunks of 4


def test_counts_add_up(expected):
    _, stats = play(SIZES)
    assert stats.sampled_tokens == stats.busy_steps == sum(e.num_sampled for e in expected.values())
    assert stats.searches == 2 * len(expected)
    assert stats.slot_steps >= stats.busy_steps


@pytest.mark.ci
def test_eight_devices_play_the_same_episodes(expected, eight_devices):
    same(expected, eight_devices.ended)


def test_different_prompts_go_to_different_parts_in_one_call():
    layout = kv_cache.full_layout((256,), 8, shards=4)
    scheduler = Scheduler(
        layout, 4, make_players(attempts=1), lambda player: (), lambda queries: None, False
    )
    writes = scheduler.pending().tokens
    assert {layout.shard_of(write.slot) for write in writes} == {0, 1, 2, 3}
    state = jax.eval_shape(lambda: sampler.init_state(CONFIG, layout, jnp.float32))
    device = engine.Device(1, (), None, [], PARAMS, KEY, state, {}, {})
    assert device.batch([*writes, *writes]) == writes


@pytest.mark.ci
@pytest.mark.parametrize("groups,attempts", [(4, 2), (2, 3)])
def test_parts_share_prompts_inside_themselves(expected, groups, attempts):
    """Four shards of two slots: a group's second attempt copies the first one's prompt, a third
    computes it again.
    """
    many, params = on_mesh(FEW, data=2, fsdp=2)
    players = make_players(groups=groups, attempts=attempts)
    prompts = [player.prompt_length - 1 for player in players[::attempts]]
    ended, finished = collect()
    stats = many.play(params, KEY, players, finished)
    assert stats.shared_tokens == sum(prompts)
    same({uid: expected[uid] for uid in ended}, ended)
    assert len(ended) == groups * attempts
