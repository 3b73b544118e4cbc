"""Answers of a corpus: what stands in it, spread over its passages, none of the evaluation's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ssp_jax import audit
from ssp_jax.answers import __main__ as answers
from ssp_jax.answers.candidates import QUOTAS, Frequencies, choose, forms
from ssp_jax.data import Document, load_answers
from ssp_jax.game.rewards import comparable, exact_match

ENGLISH = [
    ("Zurich office", "The office in Zurich was opened by Jane van der Berg on 5 March 2019."),
    ("Atlas 300", "The Atlas 300 is a delivery robot. Zurich's tram carries the Atlas 300 free."),
    ("Battery", "Each battery pack weighs 4,800 g and costs $1.2 million. A battery is safe."),
    ("Safety", "A battery pack lasts 35% longer since 2021. Jane van der Berg checks it."),
    ("J. K. Lee", "J. K. Lee wrote “A robot's life” in May 2020. Lee likes the Bank of England."),
]
CHINESE = [
    ("东方明珠塔", "东方明珠塔位于上海，1994年10月1日建成，高468米。"),
    ("上海日报", "《上海日报》写道，东方明珠塔的游客有2189万人。"),
    ("浦东", "浦东新区有东方明珠塔，也有很多公司。"),
    ("タワー", "東京スカイツリーは2012年に完成した。「東京タワー」は高い。"),
]
HINDI = [("आगरा", "ताजमहल आगरा में है। ताजमहल 1653 में बना।"), ("दिल्ली", "दिल्ली से ताजमहल दूर है।")]


def written(place: Path, passages: list[tuple[str, str]]) -> Path:
    rows = [{"title": title, "text": text} for title, text in passages]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (place / "corpus.jsonl").write_text("".join(lines))
    return place / "corpus.jsonl"


def candidates(passages: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """Kind and text of all candidates."""
    documents = [Document(str(i), *passage) for i, passage in enumerate(passages)]
    frequencies = Frequencies()
    for document in documents:
        frequencies.add(forms(document))
    found = [choice for document in documents for choice in choose(document, frequencies)]
    return {(choice.kind, choice.text) for choice in found}


@pytest.mark.parametrize(
    ("passages", "expected"),
    [
        (
            ENGLISH,
            {
                "title": {"Atlas 300", "Battery", "J. K. Lee"},
                "name": {"Zurich", "Jane van der Berg", "Atlas 300", "J. K. Lee", "Lee", "Each"}
                | {"A robot's life", "Bank of England"},
                "date": {"5 March 2019", "2021", "May 2020"},
                "number": {"300", "4,800", "$1.2 million", "35%"},
                "term": {"battery pack", "battery"},
            },
        ),
        (
            CHINESE,
            {
                "title": {"东方明珠塔", "上海日报", "浦东", "タワー"},
                "name": {"上海日报", "スカイツリー", "東京タワー", "タワー"},
                "date": {"1994年10月1日", "2012年"},
                "number": {"468", "2189万"},
                "term": {"东方明珠塔", "上海"},
            },
        ),
        (HINDI, {"title": {"आगरा", "दिल्ली"}, "date": {"1653"}, "term": {"ताजमहल"}}),
    ],
    ids=["English", "Chinese and Japanese", "Hindi"],
)
def test_candidates_of_passages(
    passages: list[tuple[str, str]], expected: dict[str, set[str]]
) -> None:
    found: dict[str, set[str]] = {}
    for kind, text in candidates(passages):
        found.setdefault(kind, set()).add(text)
    assert found == expected


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert answers.main(list(flags)) == 0
    return capsys.readouterr().out.splitlines()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_of_the_evaluation_are_left_out_as_exact_match_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = written(tmp_path, ENGLISH)
    out = tmp_path / "answers.jsonl"
    golds = ["the  zurich!", "Jane Van Der Berg", "nobody"]
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "Who?", "golden_answers": golds}) + "\n"
    )
    flags = (f"--corpus={corpus}", f"--out={out}")
    run(capsys, *flags)
    everything = {row["ground_truth"] for row in rows_of(out)}
    assert {"Zurich", "Jane van der Berg"} <= everything
    lines = run(capsys, *flags, f"--eval={tmp_path}/test.jsonl")
    kept = {row["ground_truth"] for row in rows_of(out)}
    assert kept and not any(exact_match(answer, golds) for answer in kept)
    assert {"Zurich", "Jane van der Berg"} == everything - kept
    assert any(line.endswith("evaluation: jane van der berg; zurich") for line in lines)
    assert audit.main([f"--answers={out}", f"--eval={tmp_path}/test.jsonl"]) == 0


def test_a_title_with_a_note_is_an_alias_of_what_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = [('"Mercury (planet)"', "The planet Mercury is near the Sun. It is small.")]
    corpus = written(tmp_path, [*passages, *ENGLISH])
    out = tmp_path / "answers.jsonl"
    run(capsys, f"--corpus={corpus}", f"--out={out}")
    named = {task.answers for task in load_answers(out) if len(task.answers) > 1}
    assert named == {("Mercury", "Mercury (planet)")}
    (tmp_path / "test.jsonl").write_text(
        '{"question": "Which is near?", "golden_answers": "Mercury (planet)"}'
    )
    run(capsys, f"--corpus={corpus}", f"--out={out}", f"--eval={tmp_path}/test.jsonl")
    assert "Mercury" not in {row["ground_truth"] for row in rows_of(out)}


def test_the_file_is_one_of_given_answers_and_says_where_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = written(tmp_path, ENGLISH + CHINESE)
    out = tmp_path / "answers.jsonl"
    lines = run(capsys, f"--corpus={corpus}", f"--out={out}")
    rows = rows_of(out)
    tasks = load_answers(out)
    assert [task.answers[0] for task in tasks] == [row["ground_truth"] for row in rows]
    assert {task.searches for task in tasks} == {1, 2, 3}
    texts = dict(enumerate(" ".join(passage) for passage in ENGLISH + CHINESE))
    assert all(row["ground_truth"] in texts[int(row["passage"])] for row in rows)
    forms = Counter(comparable(row["ground_truth"]) for row in rows)
    assert max(forms.values()) == 1
    of_passage = Counter((row["passage"], row["kind"]) for row in rows)
    assert all(number <= QUOTAS[kind] for (_, kind), number in of_passage.items())
    assert {passage for passage, _ in of_passage} == set(map(str, texts))
    assert lines[0] == f"{len(rows)} answers from 9 passages"
    counts = Counter(row["kind"] for row in rows)
    assert {line.split()[0]: int(line.split()[1]) for line in lines[1:6]} == counts


def test_the_answers_depend_on_corpus_and_seed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = written(tmp_path, ENGLISH + CHINESE + HINDI)

    def answers_of(*flags: str) -> list[str]:
        out = tmp_path / "answers.jsonl"
        run(capsys, f"--corpus={corpus}", f"--out={out}", *flags)
        return [row["ground_truth"] for row in rows_of(out)]

    everything = answers_of()
    assert answers_of() == everything
    some = answers_of("--limit=6")
    others = answers_of("--limit=6", "--seed=1")
    assert len(some) == len(others) == 6 and some != others
    assert set(some) | set(others) <= set(everything)
    more = answers_of("--limit=9")
    assert set(some) <= set(more)  # a larger file adds to a smaller one
    written(tmp_path, [*HINDI, *CHINESE, *reversed(ENGLISH)])
    assert set(answers_of("--limit=6")) <= set(answers_of())


def test_counts_are_bounded_and_what_is_frequent_stays() -> None:
    frequencies = Frequencies(limit=100)
    for i in range(1000):
        frequencies.add({"often", f"once {i}", f"twice {i // 2}"})
    assert frequencies["often"] == 1000 and frequencies.passages == 1000
    assert len(frequencies._counts) <= 100
