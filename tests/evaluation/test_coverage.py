"""What a set could score at most: as cover exact match would find it in passages, one by one."""

import json
from pathlib import Path

import pytest

from ssp_jax import audit
from ssp_jax.data import Task
from ssp_jax.evaluation import coverage
from ssp_jax.game.rewards import cover_exact_match
from ssp_jax.retriever.search import Retriever, open_retriever

PASSAGES = (
    '"Ottawa"\nOttawa is the capital of Canada, on the Ottawa River.',
    '"The Nile"\nA river of Africa; it is 6,650 km long.',
    '"Oslo"\nThe capital of Norway. New Yorkers like it.',
)
SETS = {
    "nq": [
        Task(0, ("Nile", "River Nile"), "Which river is long?"),
        Task(1, ("6,650 km",), "How long is the river of Africa?"),
        Task(2, ("New York",), "Where is Broadway?"),
        Task(3, ("Oslo",), "Is Oslo a capital?"),
    ],
    "other": [Task(0, ("+", "CANADA!"), "Whose capital is it?")],
}


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": str(i), "contents": text} for i, text in enumerate(PASSAGES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_retriever(
        folder / "corpus.jsonl",
        folder / "index",
        stemmer="english",
        stopwords="en",
        k1=1.5,
        b=0.75,
        threads=1,
    )


def test_a_gold_is_in_the_corpus_where_cover_exact_match_finds_it(retriever: Retriever) -> None:
    found = coverage.measure(SETS, retriever)
    for name, tasks in SETS.items():
        by_hand = [
            any(cover_exact_match(text, task.answers) for text in PASSAGES) for task in tasks
        ]
        assert found[name]["in_corpus"] == sum(by_hand) / len(by_hand)
    assert found["nq"]["in_corpus"] == 3 / 4  # "New Yorkers" is not New York
    assert found["nq"]["in_titles"] == 2 / 4  # The Nile, Oslo
    assert found["nq"]["in_question"] == 1 / 4
    # No passage shares a word with the question of Broadway.
    assert found["nq"]["in_near"] == 3 / 4 and found["other"]["in_near"] == 1
    assert found["nq"]["questions"] == 4


def test_a_run_measures_once_and_again_when_questions_or_search_change(
    retriever: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = coverage.of_run(tmp_path, SETS, retriever)
    assert coverage.of_run(tmp_path, SETS, None) == {}

    # In a large corpus only what is there is taken.
    monkeypatch.setattr(coverage, "SMALL", 2)
    assert coverage.of_run(tmp_path, SETS, retriever) == first
    changed = SETS | {"other": SETS["nq"]}
    assert list(coverage.of_run(tmp_path, changed, retriever)) == ["nq"]
    (tmp_path / coverage.FILE).write_text("{")
    assert coverage.of_run(tmp_path, SETS, retriever) == {}

    coverage.write(tmp_path / coverage.FILE, first, retriever)
    monkeypatch.setattr(retriever, "source", "another")
    assert coverage.of_run(tmp_path, SETS, retriever) == {}


def test_the_audit_shows_it_and_leaves_it_for_a_run(
    retriever: Retriever, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"question": task.question, "golden_answers": list(task.answers)} for task in SETS["nq"]
    ]
    (tmp_path / "nq").write_text("".join(json.dumps(row) + "\n" for row in questions))
    index = retriever.passages.path.parent
    out = tmp_path / coverage.FILE
    flags = [f"--index={index}", f"--eval={tmp_path}/nq", f"--out={out}"]
    assert audit.main(flags) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["nq", "4", "75.0", "50.0", "75.0", "75.0", "25.0"] in shown
    assert coverage.of_run(tmp_path, {"nq": SETS["nq"]}, retriever)["nq"]["in_corpus"] == 0.75
