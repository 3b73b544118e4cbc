"""The game with a scripted policy: every outcome of a question gets its written reward, and the
batch is filled.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import default
from ssp_jax.assembly.sections import make_game_config
from ssp_jax.data import Document, Task
from ssp_jax.game import metrics, prompts, roles, rules
from ssp_jax.game.causes import CAUSES
from ssp_jax.game.examples import EXAMPLES, example_sets
from ssp_jax.game.judge import Verdict
from ssp_jax.game.rounds import Question, ReplayState, readable
from ssp_jax.game.rules import RL_PAIRS
from ssp_jax.game.selfplay import SelfPlay
from ssp_jax.model import hf_load
from ssp_jax.rollout import sampler
from ssp_jax.rollout.engine import Stats

CONTEXT = roles.EpisodeContext(
    hf_load.load_tokenizer(Path("assets/tiny/model")),
    prompts.STYLES["brief"],
    "chat",
    roles.Limits(200, 900, 900, 200, 5, 4, 200),
)
ROOMY = roles.Limits(2000, 4000, 900, 200, 5, 4, 200)
GOOD = "Which city is the capital of Mongolia?"
LONG = "Ulaanbaatar" + " and so on" * 100
TASKS = [
    Task(i, (answer,), searches=1 + i % 2)
    for i, answer in enumerate(("Ulaanbaatar", "Lhasa", "Oslo", "Rome"))
]


class Corpus:
    """Documents 0..9, as the retriever gives them."""

    def __len__(self):
        return 10

    def document(self, row):
        return Document(f"corpus {row}", f'"{row}"', "noise")


class ScriptedEngine:
    """The engine's interface with a script in place of the model: script(player) is the text of the
    coming turn.
    """

    def __init__(self, script, last_first=False, result=None):
        self.script, self.last_first, self.prompts = script, last_first, {}
        self.result = result or (lambda query: Document(query, f'"{query}"', "found"))

    def play(self, params, key, players, finished, progress):
        waiting, stats = list(players), Stats()
        while waiting:
            player = waiting.pop(-1 if self.last_first else 0)
            self.prompts[player.uid] = CONTEXT.decode(player.tokens)
            while not player.stop_reason:
                text = self.script(player)
                found = [i for i, stop in enumerate(player.role.stops) if text.endswith(stop)]
                tokens = CONTEXT.encode(text)
                stop = found[0] if found else sampler.EOS
                if len(player.tokens) + len(tokens) > player.token_limit():
                    stop = sampler.LIMIT
                query = player.end_turn(tokens, [-1.0] * len(tokens), stop)
                if query is not None:
                    player.insert_result([self.result(query)])
            stats.finished += 1
            waiting += finished(player)
        return stats


def answer_of(player):
    return player.tag.task.answers[0]


def script(question=GOOD, verified=True, solved=(True, False, False, False, True)):
    """A policy that searches for the given answer and asks `question`.

    verified, solved: whether its verifier and its attempts are right.
    """

    def turn(player):
        answer = answer_of(player)
        if player.role is roles.PROPOSER:
            return (
                f"<question> {question} </question>"
                if player.queries
                else f"<search> {answer} </search>"
            )
        right = verified if player.role is roles.VERIFIER else solved[player.uid & 511]
        return f"<answer> {answer if right else 'wrong'} </answer>"

    return turn


def config(**changes):
    c = default.get_config()
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return c


def play(turn, memory=None, step=0, tasks=TASKS, last_first=False, **changes):
    engine = ScriptedEngine(turn, last_first)
    game = SelfPlay(make_game_config(config(**changes)), CONTEXT, engine, Corpus())
    round_, after = game.play(step, tasks, memory or ReplayState(), None, None)
    return round_, after, engine


def test_a_verified_question_is_played_and_shares_the_reward():
    round_, _, _ = play(script())
    for game in round_.games:
        assert (game.fault, game.scores) == ("", [1.0, 0.0, 0.0, 0.0, 1.0])
        assert game.proposer_reward == pytest.approx(0.6)
        assert game.proposer_reward + np.mean(game.scores) == pytest.approx(1.0)
    assert len(round_.solver.episodes) == 20 and len(round_.proposer.episodes) == 4
    assert round_.metrics["funnel/verified"] == 4 and round_.metrics[
        "funnel/solved"
    ] == pytest.approx(0.4)
    assert round_.metrics["reward/proposer"] == pytest.approx(0.6)


def test_an_alias_is_right_for_verifier_and_solver_and_must_not_stand_in_the_question():
    tasks = [Task(0, ("Ulaanbaatar", "Urga"))]

    def turn(player):
        return script()(player).replace("<answer> Ulaanbaatar", "<answer> Urga")

    round_, _, engine = play(turn, tasks=tasks)
    assert round_.games[0].scores == [1.0, 0.0, 0.0, 0.0, 1.0]
    asked = engine.prompts[roles.episode_id(roles.PROPOSER, 0, 0)]
    assert "Ulaanbaatar" in asked and "Urga" not in asked
    revealed, _, _ = play(script(question="Which city was called Urga before?"), tasks=tasks)
    assert revealed.games[0].fault == "answer_in_question"


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (script(question=""), "empty"),
        (script(question="Is it Ulaanbaatar or Lhasa or Oslo or Rome?"), "answer_in_question"),
        (script(verified=False), "unverified"),
        (lambda player: f"<question> {GOOD} </question>", "too_few_searches"),
        (lambda player: "I give up", "no_question"),
    ],
)
def test_a_failed_question_is_an_outcome_with_its_own_reward(turn, fault):
    round_, _, _ = play(turn, reward__invalid_question=-0.25)
    assert [game.fault for game in round_.games] == [fault] * 4
    assert round_.proposer.rewards.tolist() == [-0.25] * 4
    assert not round_.solver.episodes
    assert round_.metrics[f"fault/{fault}"] == 4
    causes = [f"cause/{fault}/{cause}" for cause in CAUSES.get(fault, ())]
    assert sum(round_.metrics[name] for name in causes) == (4 if causes else 0)


class Finding(Corpus):
    """A corpus in which every search finds this text first, and then nothing of use."""

    def __init__(self, text):
        self.found = [Document("1", '"A page"', text), Document("2", '"Another"', "nothing")]

    def search(self, queries, top_k):
        assert queries == [GOOD] and top_k == 1
        return [self.found[:top_k]]


@pytest.mark.parametrize(
    ("text", "forbidden", "fault"),
    [
        ("Its capital is Lhasa, it says.", True, "found_at_once"),
        ("Its capital is Lhasa, it says.", False, ""),
        ("Its capital is Lhasas.", True, ""),  # whole words
        ("and so on " * 200 + "Lhasa", True, ""),  # players do not see so much
    ],
)
def test_a_question_for_two_searches_is_not_answered_by_one_for_itself(text, forbidden, fault):
    tasks = [Task(0, ("Ulaanbaatar",), searches=1), Task(1, ("Lhasa",), searches=2)]
    found = f"Ulaanbaatar. {text}"  # which one search may find
    changed = config(rules__forbid_found_at_once=forbidden, retriever__top_k=1)
    game = SelfPlay(make_game_config(changed), CONTEXT, ScriptedEngine(script()), Finding(found))
    round_, _ = game.play(0, tasks, ReplayState(), None, None)
    assert [game.fault for game in round_.games] == ["", fault]
    assert round_.metrics["funnel/well_formed"] == (1 if fault else 2)


def test_a_verifier_without_room_for_its_documents_has_a_fault_of_its_own():
    """The question is well-formed: what is too short is limits.verify_prompt_tokens."""
    context = dataclasses.replace(
        CONTEXT, limits=dataclasses.replace(CONTEXT.limits, verify_prompt_tokens=20)
    )
    round_, _ = SelfPlay(
        make_game_config(config()), context, ScriptedEngine(script()), Corpus()
    ).play(0, TASKS, ReplayState(), None, None)
    assert [game.fault for game in round_.games] == ["too_long_to_verify"] * 4
    counts = [
        round_.metrics[name]
        for name in ("fault/too_long_to_verify", "fault/unverified", "funnel/well_formed")
    ]
    assert counts == [4, 0, 4]


CUTS = {
    "cut/results": {"observation_tokens": 60},
    "cut/prompts": {"prompt_tokens": 20},
    "cut/verifier_prompts": {"verify_prompt_tokens": 20},
    "cut/turns": {"turn_tokens": 1},
    "cut/responses": {"response_tokens": 1},
}


@pytest.mark.parametrize("name", CUTS)
def test_what_a_limit_cuts_is_counted_and_told_with_the_key_to_raise(name):
    context = dataclasses.replace(CONTEXT, limits=dataclasses.replace(ROOMY, **CUTS[name]))
    turn = (lambda player: "I look") if name in ("cut/turns", "cut/responses") else script()
    result = LONG if name == "cut/results" else "found"
    engine = ScriptedEngine(turn, result=lambda query: Document(query, f'"{query}"', result))
    game = SelfPlay(make_game_config(config()), context, engine, Corpus())
    round_, _ = game.play(0, TASKS, ReplayState(), None, None)
    shares = {key: round_.metrics[key] for key in metrics.CUTS}
    assert shares == {key: float(key == name) for key in metrics.CUTS}
    ((told, sentence),) = metrics.cut_sentences(round_.metrics).items()
    assert told == name and f"limits.{next(iter(CUTS[name]))}" in sentence and "100 %" in sentence


def test_a_tenth_may_be_cut_without_a_word():
    shares = {name: 0.0 for name in metrics.CUTS}
    assert metrics.cut_sentences(shares | {"cut/turns": 0.1}) == {}
    assert set(metrics.cut_sentences(shares | {"cut/turns": 0.11})) == {"cut/turns"}


@pytest.mark.parametrize(("solved", "reward"), [((True,) * 5, 0.0), ((False,) * 5, 1.0)])
def test_the_extremes(solved, reward):
    round_, _, _ = play(script(solved=solved))
    assert round_.proposer.rewards.tolist() == [reward] * 4
    assert not round_.solver.advantages.any()  # an all-equal group teaches nothing


def test_advantages_of_the_default_pair():
    """Solver: reward minus the group's mean [P eq.4]. Proposer: its reward [P eq.5]."""
    round_, _, _ = play(script())
    np.testing.assert_allclose(
        round_.solver.advantages, [0.6, -0.4, -0.4, -0.4, 0.6] * 4, atol=1e-6
    )
    np.testing.assert_allclose(round_.proposer.advantages, [0.6] * 4, atol=1e-6)


@pytest.mark.parametrize("pair", sorted(RL_PAIRS))
def test_group_sizes_follow_the_pair(pair):
    proposer, solver = RL_PAIRS[pair]
    proposals = 5 if proposer == "grpo" else 1
    round_, _, _ = play(script(), game__rl_pair=pair)
    assert len(round_.proposer.episodes) == 4 * proposals
    assert len(round_.solver.episodes) == 4 * proposals * (5 if solver == "grpo" else 1)
    if proposer == "grpo":  # proposals for one answer are compared with each other
        assert not round_.proposer.advantages.any()
    ids = [e.uid for e in round_.solver.episodes + round_.proposer.episodes]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [0.6, 0.6, 0.0, 0.0]),
        ("batch_mean", [0.3, 0.3, -0.3, -0.3]),
        ("leave_one_out", [0.4, 0.4, -0.4, -0.4]),
        # searches 1 and 2 each have one good and one bad
        ("hop_grouped", [0.7071, 0.7071, -0.7071, -0.7071]),
    ],
)
def test_proposer_baselines(baseline, expected):
    def turn(player):
        good = answer_of(player) in ("Ulaanbaatar", "Lhasa")
        return script(verified=good)(player)

    round_, _, _ = play(turn, learner__proposer_baseline=baseline)
    np.testing.assert_allclose(round_.proposer.advantages, expected, atol=1e-3)


def test_the_verifier_sees_own_and_noise_documents_and_cannot_search():
    others = [[Document(f"other {i}{j}", '"o"', "x") for j in range(3)] for i in range(4)]
    _, _, engine = play(script(), ReplayState(documents=others))
    for game in range(4):
        prompt = engine.prompts[roles.episode_id(roles.VERIFIER, game, 0)]
        assert prompt.count("Doc ") == 1 + 4
        assert TASKS[game].answers[0] in prompt
        assert "corpus" not in prompt


def test_the_verifier_reads_no_more_of_a_document_than_players_do():
    """Of its proposer's, of other games' and of the corpus's."""

    class Long(Corpus):
        def document(self, row):
            return Document(f"corpus {row}", f'"{row}"', LONG)

    limits = dataclasses.replace(ROOMY, observation_tokens=60)
    context = dataclasses.replace(CONTEXT, limits=limits)
    turn = script()
    engine = ScriptedEngine(turn, result=lambda query: Document(query, f'"{query}"', LONG))
    game = SelfPlay(make_game_config(config()), context, engine, Long())
    memory = ReplayState(documents=[[Document("other", '"o"', LONG)]], answers=[("other",)])
    round_, after = game.play(0, TASKS, memory, None, None)
    for each in round_.games:
        prompt = engine.prompts[roles.episode_id(roles.VERIFIER, each.index, 0)]
        assert prompt.count("Doc ") == 1 + 4 and LONG not in prompt
        read = [*each.proposer.documents, *each.noise]
        assert all(0 < len(document.text) < len(LONG) for document in read)
        assert all(document.text in prompt for document in read)
    assert all(len(d.text) < len(LONG) for of_game in after.documents for d in of_game)


def test_noise_of_the_first_round_comes_from_the_corpus_and_of_the_same_step_from_the_others():
    _, _, first = play(script())
    _, _, same = play(script(), game__noise_source="same_step", game__noise_documents=2)
    uid = roles.episode_id(roles.VERIFIER, 0, 0)
    assert first.prompts[uid].count("noise") == 4
    assert same.prompts[uid].count("found") == 3 and "noise" not in same.prompts[uid]


def test_noise_by_trajectory_takes_all_documents_of_a_game():
    others = [[Document(f"{i} {j}", '"o"', f"game{i}") for j in range(3)] for i in range(4)]
    memory = ReplayState(documents=others, answers=[task.answers for task in TASKS])
    _, _, engine = play(script(), memory, game__noise_unit="trajectory", game__noise_documents=1)
    for game in range(4):
        prompt = engine.prompts[roles.episode_id(roles.VERIFIER, game, 0)]
        assert sorted(prompt.count(f"game{i}") for i in range(4)) == [0, 0, 0, 3]
        assert f"game{game}" not in prompt  # what was found for the same answer


@pytest.mark.parametrize("source", ["previous_step", "same_step"])
@pytest.mark.parametrize("unit", ["passage", "trajectory"])
def test_proposals_for_one_answer_are_no_noise_for_each_other(source, unit):
    """With GRPO five games share an answer, and each finds a document of its own about it."""

    def turn(player):
        if player.role is roles.PROPOSER and not player.queries:
            return f"<search> {answer_of(player)} by {player.tag.index} </search>"
        return script()(player)

    changes = {"game__rl_pair": "grpo_grpo", "game__noise_source": source, "game__noise_unit": unit}
    _, memory, _ = play(turn, **changes)
    round_, _, _ = play(turn, memory, step=1, game__noise_documents=15, **changes)
    for game in round_.games:
        about = {document.id.split(" by ")[0] for document in game.noise}
        assert about == {task.answers[0] for task in TASKS} - {game.task.answers[0]}
    assert round_.metrics["verifier/noise"] == 15


@pytest.mark.parametrize("source", ["previous_step", "same_step"])
def test_every_verifier_reads_as_many_noise_documents_as_asked_for(source):
    """All games have found the same few passages, each several times."""
    few = [[Document(name, f'"{name}"', "old") for name in ("Oslo", "Rome", "Oslo", "x")]] * 4
    memory = ReplayState(documents=few, answers=[("Paris",)] * 4)
    round_, _, engine = play(script(), memory, game__noise_source=source)
    for game in round_.games:
        ids = [document.id for document in (*game.proposer.documents, *game.noise)]
        assert len(game.noise) == 4 and len(set(ids)) == len(ids) == 5
        assert engine.prompts[roles.episode_id(roles.VERIFIER, game.index, 0)].count("Doc ") == 5
        assert [shown["id"] for shown in readable(game)["noise"]] == ids[1:]


def test_a_round_is_the_same_after_its_memory_was_on_disk():
    _, memory, _ = play(script())
    restored = ReplayState.from_json(json.loads(json.dumps(memory.to_json())))
    a, b = (play(script(), before, step=1)[0] for before in (memory, restored))
    assert [readable(game) for game in a.games] == [readable(game) for game in b.games]


def test_the_memory_of_an_earlier_version_has_no_answers():
    _, memory, _ = play(script())
    saved = memory.to_json()
    del saved["answers"]
    assert ReplayState.from_json(saved) == dataclasses.replace(memory, answers=[])


def test_a_given_answer_without_room_in_the_prompt_is_an_outcome_of_the_game():
    """Nobody played there, so nobody is trained on it; the others go on."""
    round_, memory, _ = play(
        script(), tasks=[Task(0, (LONG,), searches=1), *TASKS[1:]], reward__invalid_question=-1.0
    )
    assert [game.fault for game in round_.games] == ["too_long_to_propose", "", "", ""]
    assert [game.proposer_reward for game in round_.games][0] == -1.0
    assert (
        len(round_.proposer.episodes)
        == 3
        == len(round_.proposer.rewards)
        == len(round_.proposer.advantages)
    )
    assert (
        round_.metrics["fault/too_long_to_propose"] == 1
        and round_.metrics["funnel/well_formed"] == 3
    )
    assert readable(round_.games[0])["proposer"] == {"turns": [], "stop_reason": "prompt_tokens"}
    assert memory.documents[0] == [] and json.dumps(memory.to_json())


@pytest.mark.parametrize("fill", ["periodic_reset", "resample"])
@pytest.mark.parametrize("baseline", ["none", "batch_mean", "hop_grouped"])
def test_a_step_of_nothing_but_such_answers_trains_nobody(fill, baseline):
    changes = {"game__batch_fill": fill, "learner__proposer_baseline": baseline}
    round_, _, _ = play(script(), tasks=[Task(i, (LONG,), searches=1) for i in range(4)], **changes)
    assert [game.fault for game in round_.games] == ["too_long_to_propose"] * 4
    assert not round_.proposer.episodes and not round_.solver.episodes
    assert all(np.isfinite(value) for value in round_.metrics.values())


def test_a_question_without_room_in_the_solvers_prompt_earns_nothing():
    """No solver could answer it, which would be the highest reward."""
    round_, _, engine = play(script(question=GOOD + " really" * 130))
    assert [game.fault for game in round_.games] == ["too_long_to_solve"] * 4
    assert round_.proposer.rewards.tolist() == [0.0] * 4 and not round_.solver.episodes
    # none was verified
    assert not any(uid // rules.ID_ATTEMPTS >= 2 * rules.ID_ROWS for uid in engine.prompts)


def test_without_verification_questions_go_straight_to_the_solver():
    round_, _, engine = play(script(verified=False), game__verify=False)
    assert len(round_.solver.episodes) == 20
    assert roles.episode_id(roles.VERIFIER, 0, 0) not in engine.prompts


def test_the_players_of_a_game_are_shown_one_set_drawn_by_seed_step_and_game():
    sets = example_sets(2)
    context = dataclasses.replace(CONTEXT, example_sets=sets, limits=ROOMY)
    tasks = [Task(i, (f"answer {i}",)) for i in range(12)]

    def drawn(seed, step, tasks, last_first=False):
        c = config()
        c.seed = seed
        engine = ScriptedEngine(script(), last_first)
        game = SelfPlay(make_game_config(c), context, engine, Corpus())
        round_, _ = game.play(step, tasks, ReplayState(), None, None)
        for uid, prompt in engine.prompts.items():
            row = uid // rules.ID_ATTEMPTS % rules.ID_ROWS
            shown = [any(example.question in prompt for example in each) for each in sets]
            assert shown.count(True) == 1 and sets[shown.index(True)] == round_.games[row].shown
        return [sets.index(game.shown) for game in round_.games]

    first = drawn(0, 0, tasks)
    assert len(set(first)) == len(sets)
    assert drawn(0, 0, tasks[:5], last_first=True) == first[:5]
    assert drawn(1, 0, tasks) != first != drawn(0, 1, tasks)


def test_leaks_of_shown_examples_are_counted_where_they_begin():
    """The proposer makes the name up; its verifier and solver have read it in the question."""
    shown = example_sets(1)[0]
    context = dataclasses.replace(CONTEXT, example_sets=(shown,), limits=ROOMY)
    turn = script(question=f"Which city is far from the {shown[0].answer}?")
    solvers = {0: "Selby", 1: shown[0].answer}

    def leaking(player):
        name = solvers.get(player.uid & 511, "Oslo")
        return f"{name} {turn(player)}" if player.role is roles.SOLVER else turn(player)

    def shares(context):
        game = SelfPlay(make_game_config(config()), context, ScriptedEngine(leaking), Corpus())
        metrics_ = game.play(0, TASKS, ReplayState(), None, None)[0].metrics
        return {name: value for name, value in metrics_.items() if name.endswith("/leak")}

    assert shares(context) == {"proposer/leak": 1, "verifier/leak": 0, "solver/leak": 0}
    other = dataclasses.replace(context, example_sets=((EXAMPLES[1],),))
    assert shares(other) == {"proposer/leak": 0, "verifier/leak": 0, "solver/leak": 0.2}
    assert shares(CONTEXT) == {}


def test_failed_questions_are_filled_from_the_pool_and_their_proposer_still_fails():
    pool = ReplayState(pool=[Question("Which one is it?", ("wrong",))])
    round_, after, _ = play(
        script(verified=False, solved=(False,) * 5), pool, game__batch_fill="full_reuse"
    )
    for game in round_.games:
        assert game.question == Question("Which one is it?", ("wrong",), reused=True)
        assert (
            game.scores == [1.0] * 5 and game.proposer_reward == 0.0 and game.fault == "unverified"
        )
    assert after.pool == pool.pool  # reused questions are not added again
    assert round_.metrics["funnel/reused"] == 4 and round_.metrics["funnel/verified"] == 0


@pytest.mark.parametrize("fill", ["full_reuse", "periodic_reset"])
@pytest.mark.parametrize("reuse", [0, 1, 2, 9])
def test_a_question_of_the_pool_fills_no_more_slots_than_allowed(fill, reuse):
    """Two questions, one of them twice in the pool, for twelve games of which most fail."""
    pool = ReplayState(pool=[Question(f"Which {name}?", ("x",)) for name in "aba"])
    tasks = [Task(i, (f"answer {i}",)) for i in range(12)]

    def turn(player):
        return script(verified=player.tag.index in (3, 8))(player)

    def replayed(**more):
        changes = {"game__batch_fill": fill, "game__pool_reuse": reuse}
        round_, after, _ = play(turn, pool, 1, tasks, **changes, **more)
        return round_, after, [game.question.text for game in round_.games if game.is_reused]

    round_, after, played = replayed()
    counts = Counter(played)
    assert set(counts) <= {"Which a?", "Which b?"}
    if reuse == 0:
        assert counts.total() == 10 and max(counts.values()) > 2
    else:
        assert max(counts.values(), default=0) <= reuse
        # At most the two games that verify have theirs for nothing.
        assert counts.total() >= min(2 * reuse, 12) - 2
    assert round_.metrics["funnel/reused"] == counts.total()
    assert round_.metrics["funnel/distinct"] == len(counts) + 1  # GOOD, asked twice
    assert replayed(last_first=True)[2] == played
    assert after.pool[:3] == pool.pool


@pytest.mark.parametrize(
    ("fill", "step", "size"),
    [
        ("full_reuse", 9, 5),
        ("periodic_reset", 8, 5),
        ("periodic_reset", 9, 0),
        ("dummy", 3, 0),
        ("resample", 3, 0),
    ],
)
def test_what_the_pool_keeps(fill, step, size):
    _, after, _ = play(
        script(), ReplayState(pool=[Question("q?", ("a",))]), step, game__batch_fill=fill
    )
    assert len(after.pool) == size


def test_resampling_proposes_again_until_it_works_or_gives_up():
    def turn(player):
        third = player.uid & 511 >= 2
        return (
            script(verified=third)(player) if player.role is not roles.SOLVER else script()(player)
        )

    round_, _, _ = play(turn, game__batch_fill="resample")
    assert [g.proposals for g in round_.games] == [3] * 4 and len(round_.solver.episodes) == 20
    round_, _, _ = play(
        script(verified=False), game__batch_fill="resample", game__resample_rounds=2
    )
    assert [g.proposals for g in round_.games] == [3] * 4 and not round_.solver.episodes


def test_the_order_of_ends_changes_nothing():
    a, memory_a, _ = play(script(), game__rl_pair="grpo_grpo")
    b, memory_b, _ = play(script(), game__rl_pair="grpo_grpo", last_first=True)
    assert [readable(g) for g in a.games] == [readable(g) for g in b.games]
    assert a.solver.episodes == b.solver.episodes and memory_a == memory_b


def test_memory_and_games_survive_json():
    round_, memory, _ = play(script())
    assert ReplayState.from_json(json.loads(json.dumps(memory.to_json()))) == memory
    shown = json.loads(json.dumps(readable(round_.games[0])))
    assert shown["question"]["text"] == GOOD and shown["answer"] == "Ulaanbaatar"
    assert [turn["who"] for turn in shown["proposer"]["turns"]] == [
        "proposer",
        "search engine",
        "proposer",
    ]
    assert [a["score"] for a in shown["attempts"]] == [1.0, 0.0, 0.0, 0.0, 1.0]


class Judge:
    """Finds one answer right, fails at another, and remembers the batches that it was asked."""

    name = identity = "scripted"

    def __init__(self, right=(), fails=()):
        self.right, self.fails, self.batches = right, fails, []

    def ask(self, cases, on_verdict, progress):
        self.batches.append([case.answer for case in cases])
        for i in reversed(range(len(cases))):
            answer = cases[i].answer
            right = None if answer in self.fails else answer in self.right
            on_verdict(i, Verdict(right, "reply"))
            progress()


def judged_script(verifier, solver):
    def turn(player):
        answer = answer_of(player)
        if player.role is roles.PROPOSER:
            return script()(player)
        answers = verifier if player.role is roles.VERIFIER else solver
        return f"<answer> {answers.get(answer, answer)} </answer>"

    return turn


def play_judged(judge, turn, last_first=False, **changes):
    game = SelfPlay(
        make_game_config(config(reward__metric="policy", **changes)),
        CONTEXT,
        ScriptedEngine(turn, last_first),
        Corpus(),
        judge,
    )
    return game.play(0, TASKS, ReplayState(), None, None)[0]


@pytest.mark.parametrize("last_first", [False, True])
def test_a_judge_hears_what_exact_match_refuses(last_first):
    """Its word verifies a question and pays the solver; when it fails, that is counted and nothing
    is right.
    """
    verifier = {"Lhasa": "a capital in Tibet", "Oslo": "no idea", "Rome": "broken"}
    turn = judged_script(verifier, {"Ulaanbaatar": "the capital of Mongolia"})
    judge = Judge(right=("a capital in Tibet", "the capital of Mongolia"), fails=("broken",))
    round_ = play_judged(judge, turn, last_first)
    assert [game.fault for game in round_.games] == ["", "", "unverified", "unverified"]
    assert [game.scores for game in round_.games] == [[1.0] * 5, [1.0] * 5, [], []]
    # Of the first question, verified by exact match, the solvers play at once: one wave for all the
    # judge's cases.
    assert [sorted(batch) for batch in judge.batches] == [
        ["a capital in Tibet", "broken", "no idea", *["the capital of Mongolia"] * 5]
    ]
    assert (round_.metrics["judge/asked"], round_.metrics["judge/failed"]) == (8, 1)
    assert round_.useless_reply is None


def test_a_judge_that_says_nothing_is_heard_of():
    answers = {"Lhasa": "broken", "Oslo": "broken"}
    round_ = play_judged(Judge(fails=("broken",)), judged_script(answers, answers))
    assert (
        round_.metrics["judge/failed"] == round_.metrics["judge/asked"] > 0
        and round_.useless_reply == "reply"
    )


def test_a_judge_is_heard_again_after_its_word_lets_a_question_pass():
    judge = Judge(right=("mine",))
    round_ = play_judged(judge, judged_script({"Lhasa": "mine"}, {"Lhasa": "mine"}))
    assert judge.batches == [["mine"], ["mine"] * 5] and round_.games[1].scores == [1.0] * 5


def test_temperatures_reach_the_players():
    """In the reference the proposer's own setting goes nowhere."""
    seen = set()

    def turn(player):
        seen.add((player.role.name, player.temperature))
        return script()(player)

    play(turn, sampling__temperature=0.7, sampling__verify_temperature=0.3)
    assert seen == {("proposer", 0.7), ("verifier", 0.3), ("solver", 0.7)}


def test_without_a_judge_no_metric_of_one_is_written():
    round_ = play(script())[0]
    assert (
        not any(key.startswith("judge/") for key in round_.metrics) and round_.useless_reply is None
    )


def test_questions_proposed_again_are_verified_too_with_noise_of_the_same_step():
    """batch_fill=resample brings new questions while the first ones are verified; each must come to
    an end.
    """

    def turn(player):
        if player.role is roles.VERIFIER and (player.uid & 511) == 0:
            return "<answer> wrong </answer>"  # the first proposal of each game
        return script()(player)

    changes = {"game__noise_source": "same_step", "game__batch_fill": "resample"}
    round_, _, _ = play(turn, **changes)
    assert [(game.fault, game.proposals, len(game.scores)) for game in round_.games] == [
        ("", 2, 5)
    ] * 4
