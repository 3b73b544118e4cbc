"""The embedded default: its files as they lie in assets/tiny and, where the build's packages are,
how they are made.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ssp_jax.data import iterate_corpus, load_answers, load_questions
from ssp_jax.game.chat import encode_prompt
from ssp_jax.game.prompts import STYLES, observation, solver_messages
from ssp_jax.game.rewards import normalize_answer

TINY = Path(__file__).parent.parent / "assets" / "tiny"
SETS = ("one_hop", "two_hop")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "model")


def question_rows(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (TINY / "qa" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def golden(name: str) -> list[str]:
    return [
        normalize_answer(task.answers[0]) for task in load_questions(TINY / "qa" / f"{name}.jsonl")
    ]


def test_corpus_is_large_and_short() -> None:
    documents = list(iterate_corpus(TINY / "corpus.jsonl"))
    assert len(documents) >= 2000
    assert [document.id for document in documents] == [str(row) for row in range(len(documents))]
    assert len({document.text for document in documents}) == len(documents)
    for document in documents:
        assert 6 <= len(document.text.split()) <= 16, document
        assert document.title.strip('"') in document.text


def test_answers_come_with_one_or_two_searches() -> None:
    tasks = load_answers(TINY / "answers.jsonl")
    assert len(tasks) >= 900
    counts = Counter((task.answers[0], task.searches) for task in tasks)
    assert set(counts.values()) == {1}
    assert {searches for _, searches in counts} == {1, 2}


@pytest.mark.parametrize("name", SETS)
def test_no_constant_answer_scores(name: str) -> None:
    answers = golden(name)
    assert len(answers) == 200
    assert max(Counter(answers).values()) <= 0.03 * len(answers)
    assert max(Counter(row["metadata"]["country"] for row in question_rows(name)).values()) <= 4


@pytest.mark.parametrize("name", SETS)
def test_questions_do_not_tell(name: str) -> None:
    for row in question_rows(name):
        text, country = row["question"].lower(), row["metadata"]["country"].lower()
        assert row["golden_answers"][0].lower() not in text
        assert (country in text) == (row["metadata"]["start"] == "country"), (
            "a bridge is never named"
        )
        assert (name == "one_hop") == (
            "country" in (row["metadata"]["start"], row["metadata"]["target"])
        )


def test_question_sets_are_held_out() -> None:
    given = {normalize_answer(task.answers[0]) for task in load_answers(TINY / "answers.jsonl")}
    assert given.isdisjoint(golden("one_hop") + golden("two_hop"))
    held_out = {row["metadata"]["country"] for name in SETS for row in question_rows(name)}
    for document in iterate_corpus(TINY / "corpus.jsonl"):
        neighbours = any(word in document.text for word in ("neighbours", "border", "next to"))
        if document.title.strip('"') in held_out and not neighbours:
            text = f" {normalize_answer(document.text)} "
            assert not [answer for answer in given if f" {answer} " in text], document


def test_tokenizer_is_qwens_kind(tokenizer: Any) -> None:
    assert len(tokenizer) == 2048
    for name, row in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert tokenizer.encode(name, add_special_tokens=False) == [row]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in ("</search>", "</answer>", "</question>", "<information>"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) > 1, "tags are ordinary text"
    assert [
        tokenizer.decode([t]) for t in tokenizer.encode("1976", add_special_tokens=False)
    ] == list("1976")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    style, documents = STYLES["brief"], list(iterate_corpus(TINY / "corpus.jsonl"))
    texts = [observation(style, documents[row : row + 3]) for row in range(0, len(documents), 3)]
    texts += [
        task.question for name in SETS for task in load_questions(TINY / "qa" / f"{name}.jsonl")
    ]
    texts += ["<search> Zürich 東京 \t </search>\n\n", "  two  spaces \r\n", "déjà vu"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_prompts_are_short(tokenizer: Any) -> None:
    for name in SETS:
        for task in load_questions(TINY / "qa" / f"{name}.jsonl"):
            assert (
                len(
                    encode_prompt(
                        tokenizer, solver_messages(STYLES["brief"], task.question), "chat"
                    )
                )
                <= 48
            )


def test_folder_is_small() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


# --- what needs the build's packages (requirements-dev.txt) ---------------------------------------


def test_build_makes_the_same_files(tmp_path: Path) -> None:
    from assets.tiny import build

    build.write_all(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert path.read_bytes() == (TINY / path.relative_to(tmp_path)).read_bytes(), path


def test_a_good_player_answers_everything(tmp_path: Path) -> None:
    """The data is not harder than the rules of the game: what self-play has to find is there to be
    found.
    """
    from assets.tiny import build, script

    data = build.make_data(build.SEED)
    search = script.index_passages(data.passages, tmp_path).search
    for questions, least in ((data.one_hop, 0.95), (data.two_hop, 0.9)):
        assert (
            script.success_rate(questions, data.world, data.passages, search, script.PERFECT)
            > least
        )
        assert (
            script.success_rate(questions, data.world, data.passages, search, script.MIXED)
            < 0.95 * least
        )


def test_scripted_episodes(tokenizer: Any) -> None:
    from assets.tiny import script
    from assets.tiny.facts import real_words
    from assets.tiny.worlds import template_words, words

    episodes = script.generate_episodes(3, 150, tokenizer, script.MIXED)
    assert episodes == script.generate_episodes(3, 150, tokenizer, script.MIXED)
    assert episodes != script.generate_episodes(4, 150, tokenizer, script.MIXED)
    assert {role for role, _, _ in episodes} == set(script.ROLE_SHARES)
    ends = {"proposer": "</question>"}
    for role, tokens, sampled in episodes:
        assert len(tokens) == len(sampled) and not sampled[0] and sampled[-1]
        text = tokenizer.decode(tokens)
        assert text.startswith("<|im_start|>user\n") and text.endswith(ends.get(role, "</answer>"))
        written = tokenizer.decode(
            [token for token, own in zip(tokens, sampled, strict=True) if own]
        )
        assert "<information>" not in written and "Doc" not in written
        assert ("<search>" in written) == (role != "verifier")
    for episode in script.scripted_episodes(5, 100, sorted(tokenizer.get_vocab()), script.PERFECT):
        assert episode.right, episode
        invented = words(episode.answer)
        assert not [w for w in invented if w in real_words() - template_words() and len(w) > 3], (
            "no real names"
        )
