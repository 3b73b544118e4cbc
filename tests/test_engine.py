"""Engine: every episode gets what it would get alone, whatever the slots, chunks and neighbours."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax import engine, episodes, model, prompts, sharding, weights
from ssp_jax.data import Document
from ssp_jax.engine import Sizes
from ssp_jax.metrics import CompileCounter

TOKENIZER = weights.load_tokenizer(Path("assets/tiny/model"))
CONFIG = model.ModelConfig(2048, 2, 32, 4, 2, 8, 48)
PARAMS = model.unstack(model.init_params(CONFIG, jax.random.key(0)), jnp.float32)
KEY = jax.random.key(7)
LIMITS = episodes.Limits(64, 200, 120, 12, 4, 3, 60)
STAGE = episodes.Stage(TOKENIZER, prompts.STYLES["brief"], "chat", LIMITS)
SIZES = Sizes(slots=8, chunk=4, cache_tokens=256, cache_buckets=(64,), extend_buckets=(16, 64), extend_rows=4)
SEARCH_TAG = TOKENIZER.encode("<search> lake </search>", add_special_tokens=False)


def search(queries):
    return [[Document("1", '"T"', f"about {query}")] for query in queries]


class Searcher(episodes.Player):
    """Ends its first turns with a search, as if the model had written one: a random model never does."""

    def stopped(self, tokens, logprobs, stop):
        if len(self.queries) < 2:
            self.going_on(tokens, logprobs)
            self.turns.append((self.role.name, ""))
            self.queries.append(f"{self.uid} {len(self.queries)}")
            return self.queries[-1]
        return super().stopped(tokens, logprobs, stop)


def make_engine(sizes, **options):
    automata = episodes.role_automata(TOKENIZER, CONFIG.vocab_size)
    return engine.Engine(CONFIG, sizes, automata, (TOKENIZER.eos_token_id,), jnp.float32, search, **options)


def make_players(kind=Searcher, groups=4, attempts=3, temperature=1.0):
    return [
        kind(
            STAGE,
            episodes.SOLVER,
            episodes.episode_id(episodes.SOLVER, row, attempt),
            temperature,
            STAGE.encode(f"Question: number {row} " + "and so on " * row),
        )
        for row in range(groups)
        for attempt in range(attempts)
    ]


def play(sizes, players=None, **options):
    ended = {}

    def finished(player):
        ended[player.uid] = player.episode()
        return []

    stats = make_engine(sizes, **options).play(PARAMS, KEY, make_players() if players is None else players, finished)
    return ended, stats


def same(a, b):
    assert a.keys() == b.keys()
    for uid in a:
        assert a[uid].tokens == b[uid].tokens
        assert a[uid].turns == b[uid].turns
        np.testing.assert_allclose(a[uid].logprobs, b[uid].logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def expected():
    return play(SIZES)[0]


@pytest.mark.parametrize(
    "changes", [{"slots": 1}, {"slots": 3, "chunk": 5}, {"slots": 16, "extend_rows": 1}, {"extend_buckets": (8,)}]
)
def test_episodes_do_not_depend_on_the_schedule(expected, changes):
    same(expected, play(dataclasses.replace(SIZES, **changes))[0])


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


def test_attempts_of_a_group_share_its_prompt_and_differ():
    ended, stats = play(SIZES, make_players(groups=1, attempts=6))
    prompt = len(make_players(groups=1)[0].tokens)
    assert stats.shared_tokens == 5 * (prompt - 1)
    assert len({tuple(e.tokens) for e in ended.values()}) == 6


def test_late_attempts_share_the_prompt_of_one_that_plays(expected):
    """Several copies of one prompt in one call, none from another copy."""
    first, *rest = make_players(groups=1, attempts=3)
    short = episodes.Player(STAGE, episodes.SOLVER, 9999, 1.0, STAGE.encode("Question: short"))
    ended = {}

    def finished(player):
        ended[player.uid] = player.episode()
        return rest if player is short else []

    stats = make_engine(SIZES).play(PARAMS, KEY, [short, first], finished)
    assert stats.shared_tokens == 2 * (len(first.episode().tokens[: first.prompt_length]) - 1)
    del ended[short.uid]
    same({uid: expected[uid] for uid in ended}, ended)


def test_players_that_follow_from_others_are_played():
    first, *rest = make_players(episodes.Player, groups=2, attempts=2)
    order = []

    def finished(player):
        order.append(player.uid)
        return rest if player is first else []

    make_engine(SIZES).play(PARAMS, KEY, [first], finished)
    assert order[0] == first.uid and sorted(order[1:]) == sorted(p.uid for p in rest)


def test_a_refused_prompt_ends_without_playing():
    refused = episodes.Player(STAGE, episodes.SOLVER, 1, 1.0, [5] * 65)
    ended, stats = play(SIZES, [refused, *make_players(groups=1, attempts=1)])
    assert ended[1].stop_reason == "prompt_tokens" and ended[1].num_sampled == 0
    assert stats.finished == 2


def test_nothing_compiles_after_warm_up():
    one = make_engine(SIZES)
    one.warm_up(PARAMS, KEY)
    counter = CompileCounter()
    for groups in (1, 5):
        one.play(PARAMS, KEY, make_players(groups=groups))
    assert counter.count == 0


def test_counts_add_up(expected):
    _, stats = play(SIZES)
    assert stats.sampled_tokens == stats.busy_steps == sum(e.num_sampled for e in expected.values())
    assert stats.searches == 2 * len(expected)
    assert stats.slot_steps >= stats.busy_steps


def test_eight_devices_play_the_same_episodes(expected):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh, drop=("fsdp",)))
    ended = {}

    def finished(player):
        ended[player.uid] = player.episode()
        return []

    many = make_engine(SIZES, state_sharding=lambda state: sharding.state_shardings(state, mesh))
    many.play(params, KEY, make_players(), finished)
    same(expected, ended)
