"""Scripted games: by the real search, true to the rules of the game, imperfect by their shares."""

import json
from pathlib import Path

import pytest

from configs import default
from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.game import prompts, rewards, rules
from ssp_jax.game.rounds import Game, readable
from ssp_jax.warm_start import __main__ as command
from ssp_jax.warm_start.links import Links, title_of
from ssp_jax.warm_start.script import Manner, Script
from ssp_jax.warm_start.scripting import usable
from tests.warm_start.corpora import LANDS, RIVERS, TOWNS, indexed, told, write_corpus

STYLE = prompts.STYLES["r_search"]
RULES = rules.QuestionRules(**default.get_config().rules)
PERFECT = Manner(stop_early=0.0, search_again=0.0)
NOISE = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The search of a small corpus, and its links."""
    return indexed(tmp_path_factory.mktemp("world"))


def games_of(world, number=12, manner=PERFECT, facts=None, seed=0):
    retriever, links = world
    script = Script(
        retriever,
        links,
        links.facts if facts is None else facts,
        STYLE,
        RULES,
        top_k=2,
        noise=NOISE,
        manner=manner,
        seed=seed,
    )
    return list(script.games(number, lambda done: None))


@pytest.fixture(scope="module")
def lands(tmp_path_factory):
    """The same with what fields tell of the lands."""
    return indexed(tmp_path_factory.mktemp("lands"), told())


@pytest.fixture(scope="module")
def perfect(world):
    return games_of(world)


def own_text(episode):
    return "".join(text for who, text in episode.turns if who == episode.role)


def document(title, text):
    return Document(title, f'"{title}"', text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("He left New York for York.", ["New York", "York"]),
        ("From New York City to Yorkshire, by York-Minster.", []),
        ("the newt and the Newt (Triturus), in York.", ["Newt", "York"]),
    ],
)
def test_a_name_counts_whole_and_as_its_title_writes_it(text, names):
    titles = ("New York", "York", "Newt (animal)")
    links = Links([document(title, "") for title in titles])
    assert [name for _, name in links.named(text)] == names


def test_a_fact_is_what_a_sentence_says_before_a_name():
    links = Links(
        [
            document("Rome", "It is old. Rome is the capital and largest city of Italy, on Tiber."),
            document("Italy - Location", "Italy. Location: Southern Europe, south of Alps"),
            document("Alps", "In the Alps it snows."),
            document("Bach", "Johann Sebastian Bach was a composer of a city near Rome, in Italy."),
        ]
    )
    facts = {(fact.subject, fact.object): fact for fact in links.facts}
    assert facts["Rome", "Italy"].statement == "Rome is the capital and largest city of"
    assert facts["Italy", "Southern Europe"].noun == "location"
    assert {subject for subject, name in facts if name == "Rome"} == {"Bach"}


def test_what_a_thing_belongs_to_is_asked_for_by_its_kind_also_where_an_adjective_tells():
    links = Links(
        [
            document("Italy", "Italy is a country in the south. It has the Alps."),
            document("Italy - Climate", "Italy. Climate: mild"),
            document("Italian language", "It is a language."),
            document("Rome", "Rome is an old city of northern Italy."),
            document("War", "The War was fought by a few against Italy."),
            document("Dante", "Dante Alighieri was an Italian poet, writer and philosopher."),
            document("Romania - Climate", "Romania. Climate: mild"),
            document("Romania", "Romania is a country in the east."),
            document("Ovid", "Ovid was a Roman poet."),
        ]
    )
    facts = {fact.subject: fact for fact in links.facts if fact.object == "Italy"}
    assert facts["Rome"].asked == "the country of Rome"
    assert facts["Rome"].read == "Rome is an old city of northern Italy. The country is Italy."
    assert facts["Dante"].asked == "the country of Dante"
    assert facts["Dante"].read == "Dante Alighieri was an Italian poet. The country is Italy."
    assert facts["War"].noun == ""
    assert not any(fact.subject == "Ovid" for fact in links.facts)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Bray is a coastal town in Ireland. It is a port.", "town"),
        ("Sudan, officially so, is one of the largest countries of Africa.", "countries"),
        ("The Sea is a landlocked salt lake bordered by Jordan to the east.", "lake"),
        ("Bach was a German composer and organist of the Baroque.", "composer"),
        ("France, primarily seen, has much. It is a country in Europe.", ""),
        ("Glass is a type of solid.", ""),
    ],
)
def test_a_kind_is_what_the_first_sentence_calls_a_thing(text, kind):
    assert Links([document("Bray", text)]).kind("Bray") == kind


def test_a_thing_that_only_aspects_are_told_of_has_no_kind():
    links = Links([document("Italy - Location", "Its location is a place in Europe")])
    assert links.kind("Italy") == ""


def test_facts_of_other_kinds_are_left_out_and_a_kind_that_nothing_has_is_refused(lands):
    _, links = lands
    facts = list(usable(links, (), ["country", "town"]))
    assert {fact.object for fact in facts if not fact.is_field} == set(LANDS)
    assert {fact.subject for fact in facts} == {*LANDS, *TOWNS}
    assert list(usable(links, (), ())) == links.facts
    with pytest.raises(InputError, match="--kinds: .* 'moon', which no passage uses so"):
        list(usable(links, (), ["town", "moon"]))


def test_other_fields_are_left_out_and_one_that_nothing_has_is_refused():
    links = Links(
        [
            document("Rome", "Rome is an old city of Italy."),
            document("Italy - Location", "Italy. Location: Southern Europe, south of Alps"),
            document("Italy - Climate", "Italy. Climate: Mediterranean; hot in the south"),
        ]
    )
    facts = list(usable(links, (), (), ["climate"]))
    left_out = [fact.noun for fact in links.facts if fact not in facts]
    assert left_out == ["location"]
    assert {fact.object for fact in facts} == {"Italy", "Mediterranean"}
    with pytest.raises(InputError, match="--fields: .* 'moons', which too few tell"):
        list(usable(links, (), (), ["climate", "moons"]))


def test_a_nested_question_names_no_unknown_and_its_solver_says_what_it_needs(world):
    games = games_of(world, number=16, manner=Manner(one_hop=0.0, stop_early=0.0))
    nested = [game for game in games if "the town that" in game.question.text]
    assert nested and len(nested) < len(games)
    for game in nested:
        (attempt,) = game.attempts
        assert "X" not in game.question.text.split()
        assert attempt.turns[0][1].startswith("<think> First I need the town. I look for ")
        assert attempt.turns[2][1].startswith("<think> The town is ")
        assert len(attempt.queries) == 2 and game.scores == [1.0]


def test_fields_are_asked_for_by_their_names_and_through_what_leads_to_their_things(lands):
    facts = [fact for fact in lands[1].facts if fact.noun in ("highest hill", "country")]
    games = games_of(lands, number=16, manner=PERFECT, facts=facts)
    assert [game.task.searches for game in games].count(2) == 8
    for game in games:
        (attempt,) = game.attempts
        assert game.scores == [1.0] and len(attempt.queries) == game.task.searches
        if game.task.searches == 2:
            town, land = attempt.queries[0], attempt.queries[1].removesuffix(" highest hill")
            assert f"the highest hill of the country of {town}" in game.question.text
            assert game.task.answers == (f"Mount {land[:3]}",)
            first, second = attempt.turns[0][1], attempt.turns[2][1]
            assert f"First I need the country of {town}." in first
            assert f"The country is {land}. I look for the highest hill of {land}." in second
            assert town not in own_text(game.verifier) or land in own_text(game.verifier)


@pytest.mark.parametrize("share", [0, 1])
def test_one_hop_asks_for_fields_as_often_as_asked(lands, share):
    facts = [fact for fact in lands[1].facts if fact.noun in ("highest hill", "country")]
    manner = Manner(one_hop=1.0, one_hop_fields=share)
    games = games_of(lands, number=8, manner=manner, facts=facts)
    assert sum("highest hill" in game.question.text for game in games) == 8 * share


def test_scripted_games_keep_the_rules_of_the_game_and_its_judge_finds_them_right(perfect):
    assert [game.task.searches for game in perfect].count(1) == 6 and len(perfect) == 12
    for game in perfect:
        answer = game.task.answers[0]
        proposer = game.proposer
        asked = prompts.first_question(proposer.text)
        assert asked == game.question.text
        fault = rules.question_fault(
            asked, answer, proposer.queries, len(proposer.documents), RULES
        )
        assert fault is None
        for episode in (game.verifier, *game.attempts):
            assert rewards.solver_reward(episode.text, [answer], "em") == 1.0
        assert game.scores == [1.0] and len(game.attempts[0].queries) == game.task.searches


def test_a_verifier_reads_the_proposers_own_documents_and_noise(perfect):
    for game in perfect:
        own = {found.id for found in game.proposer.documents}
        noise = {found.id for found in game.noise}
        assert len(noise) == NOISE and not own & noise
        assert sorted(game.verifier_order) == sorted(own | noise)
    assert any(game.verifier_order != sorted(game.verifier_order) for game in perfect)


def test_what_a_player_is_shown_is_what_the_search_finds(world, perfect):
    retriever, _ = world
    for game in perfect:
        for episode in (game.proposer, *game.attempts):
            shown = [text for who, text in episode.turns if who != episode.role]
            found = retriever.search(list(episode.queries), 2)
            assert shown == [prompts.observation(STYLE, documents) for documents in found]
            assert len(set(episode.queries)) == len(episode.queries)


def test_the_answer_stands_in_what_its_players_have_read(perfect):
    for game in perfect:
        answer = game.task.answers[0]
        for episode in (game.proposer, *game.attempts):
            assert any(answer in found.text for found in episode.documents)


def test_two_hop_solvers_stop_early_and_one_hop_solvers_search_again_as_often_as_asked(world):
    manner = Manner(stop_early=1.0, search_again=1.0)
    for game in games_of(world, manner=manner):
        (attempt,) = game.attempts
        if game.task.searches == 2:
            assert len(attempt.queries) == 1 and game.scores == [0.0]
            assert game.proposer_reward == 1.0
        else:
            assert len(attempt.queries) == 2 and game.scores == [1.0]


def test_the_same_seed_makes_the_same_games(world, perfect):
    def lines(games):
        return [json.dumps(readable(game)) for game in games]

    assert lines(games_of(world)) == lines(perfect)
    assert lines(games_of(world, seed=1)) != lines(perfect)


def test_no_game_is_about_what_a_question_set_touches(world, tmp_path):
    _, links = world
    questions = tmp_path / "dev.jsonl"
    row = {"question": f"Where does {RIVERS[0]} flow?", "golden_answers": [TOWNS[1].upper()]}
    questions.write_text(json.dumps(row) + "\n")
    facts = list(usable(links, [str(questions)], ()))
    held_out = {RIVERS[0], TOWNS[1]}
    games = games_of(world, 40, facts=facts)
    assert len(games) > 10

    def about(game: Game) -> set[str]:
        names = {name for _, name in links.named(game.question.text)}
        return {
            *names,
            game.task.answers[0],
            *(title_of(d).name for d in game.attempts[0].documents[:1]),
        }

    for game in games:
        assert not about(game) & held_out
        assert TOWNS[1] not in own_text(game.proposer)
    assert any(LANDS[1] in own_text(game.proposer) for game in games_of(world, 40))

    row["question"] = "What is the Location of the Moon?"
    questions.write_text(json.dumps(row) + "\n")
    assert not any(fact.noun == "location" for fact in usable(links, [str(questions)], ()))


def run(*arguments: str) -> int:
    return command.main(["script", *arguments])


def test_the_command_writes_lines_and_says_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    questions = tmp_path / "dev.jsonl"
    questions.write_text(json.dumps({"question": "Who?", "golden_answers": [LANDS[0]]}) + "\n")
    out = tmp_path / "games.jsonl"
    flags = [f"--corpus={corpus}", f"--index={tmp_path / 'index'}", f"--out={out}", "--games=3"]
    assert run(*flags, f"--without={questions}", "--one_hop=1") == 0
    said = capsys.readouterr().out
    assert "32 names are titles; of 24 facts 22 are used" in said
    assert "3 games, 3 of one hop and 0 of two" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 and {row["player"] for row in rows} == {"script"}

    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": 1, "contents": "\\"Alone\\"\\nNothing else is named."}\n')
    assert run(f"--corpus={bare}", f"--index={tmp_path / 'bare'}", f"--out={out}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "expected passages with titles that name each other" in said
    assert len(out.read_text().splitlines()) == 3
    assert run("--index=none", f"--out={out}", "--one_hop=2") == 2
    assert "flag --one_hop is 2.0; expected at most 1" in capsys.readouterr().err
