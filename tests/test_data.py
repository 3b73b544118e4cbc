"""Readers accept the formats that users have and name the place of every wrong line; row order is a
pure function.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssp_jax import data
from ssp_jax.data import (
    Document,
    InputError,
    Row,
    Task,
    batch_indices,
    iterate_corpus,
    load_answers,
    load_question_sets,
    load_questions,
    subsample,
    title_and_text,
    written_list,
)

ANSWER = {"ground_truth": "Paris", "search_turns": 2, "sys_question_example": "1. Who?"}
QUESTION = {
    "id": "7",
    "question": "Capital of France?",
    "golden_answers": ["Paris", "City of Paris"],
    "metadata": {},
}
PASSAGE = {"id": "0", "contents": '"Paris"\nParis is a city.'}


def verl_row(target=("Paris",), question="Capital of France?", content="Answer. Question: Who?\n"):
    return {
        "data_source": "searchR1_nq",
        "prompt": [
            {"role": "system", "content": "Question: no"},
            {"role": "user", "content": content},
        ],
        "reward_model": {"style": "rule", "ground_truth": {"target": target}},
        "extra_info": {"index": 3, "question": question},
        "metadata": None,
    }


def written(folder: Path, *rows, name="rows.jsonl") -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_bytes(
        gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    )
    return folder / name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_answers(tmp_path, name):
    path = written(tmp_path, ANSWER, "", {"ground_truth": " 1990 ", "search_turns": 1}, name=name)
    assert load_answers(path) == [
        Task(0, ("Paris",), searches=2, examples="1. Who?"),
        Task(1, ("1990",), searches=1),
    ]


def test_aliases_count_like_the_answer_that_is_given_or_golden(tmp_path):
    named = {"aliases": ["X (Y)", " Z "]}
    (given,) = load_answers(written(tmp_path, ANSWER | named))
    assert given.answers == ("Paris", "X (Y)", "Z")
    for write, row in ((written, QUESTION), (written, verl_row("Paris")), (parquet, verl_row("P"))):
        some = load_questions(write(tmp_path, row | named, row | {"aliases": []}))
        none = load_questions(write(tmp_path, row | {"aliases": None}))[0].answers
        assert [task.answers for task in some] == [(*none, "X (Y)", "Z"), none]


def test_questions(tmp_path):
    path = written(tmp_path, QUESTION, QUESTION | {"golden_answers": "Paris"})
    assert load_questions(path) == [
        Task(0, ("Paris", "City of Paris"), "Capital of France?"),
        Task(1, ("Paris",), "Capital of France?"),
    ]


def test_verl_rows(tmp_path):
    rows = load_questions(
        written(
            tmp_path, verl_row(["Paris", "P."]), verl_row("Paris", None), verl_row(content="none")
        )
    )
    assert [(row.answers, row.question) for row in rows] == [
        (("Paris", "P."), "Capital of France?"),
        (("Paris",), "Who?"),  # from the user turn, and not from the system turn
        (("Paris",), "Capital of France?"),
    ]
    assert {row.source for row in rows} == {"searchR1_nq"}
    turns = [
        ("user", "Question: first"),
        ("user", "Question: Question: second"),
        ("assistant", "Question: third"),
    ]
    top = load_questions(
        written(tmp_path, search_r1_row() | {"question": "Top?", "golden_answers": None})
    )[0]
    assert (top.question, top.answers) == ("Top?", ("Röntgen", "W. Röntgen"))
    several = verl_row(question="") | {
        "prompt": [{"role": role, "content": text} for role, text in turns]
    }
    # the last of the user
    assert load_questions(written(tmp_path, several))[0].question == "second"


def search_r1_row(
    source="nq", question="who got the first nobel prize?", target=("Röntgen", "W. Röntgen")
):
    """A row of Search-R1's parquet: one user turn, no question of its own."""
    return {
        "data_source": source,
        "prompt": [
            {"role": "user", "content": f"Answer the given question. Question: {question}\n"}
        ],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": target}},
        "extra_info": {"split": "test", "index": 0},
    }


def parquet(folder: Path, *rows, name="rows.parquet") -> Path:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), folder / name, row_group_size=700
    )
    return folder / name


def test_parquet_is_as_jsonl(tmp_path):
    for rows in (
        [verl_row(["Paris", "P."]), verl_row(["x"], None)],  # SSP
        [verl_row("Paris"), verl_row("x")],  # targets that are bare text
        [search_r1_row()] * 3000,
        [
            _without(QUESTION, "metadata"),
            _without(QUESTION, "metadata") | {"golden_answers": ["x"]},
        ],
    ):
        assert load_questions(parquet(tmp_path, *rows)) == load_questions(written(tmp_path, *rows))
    row = load_questions(parquet(tmp_path, search_r1_row()))[0]
    assert row == Task(0, ("Röntgen", "W. Röntgen"), "who got the first nobel prize?", source="nq")
    assert load_answers(parquet(tmp_path, ANSWER, ANSWER)) == load_answers(
        written(tmp_path, ANSWER, ANSWER)
    )


def test_columns_that_nobody_needs_do_not_matter(tmp_path):
    far = pyarrow.array([2**62], pyarrow.timestamp("ns"))  # has no form in Python
    table = pyarrow.Table.from_pylist([_without(QUESTION, "metadata")]).append_column(
        "crawled", far
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert load_questions(tmp_path / "rows.parquet") == load_questions(written(tmp_path, QUESTION))


def test_wrong_parquet_is_named(tmp_path):
    question = _without(QUESTION, "metadata")  # parquet has no empty structs
    path = parquet(tmp_path, *[question] * 1500, question | {"question": None})
    with pytest.raises(InputError, match=r'rows\.parquet row 1501: field "question"'):
        load_questions(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"rows\.parquet after row 0: expected a whole parquet file"
    ):
        load_questions(path)
    with pytest.raises(InputError, match=r"none\.parquet: expected a readable file"):
        load_questions(tmp_path / "none.parquet")


def test_numpy_targets():
    """What pandas makes of a list column."""
    assert Row("f", 1, {}).texts("target", np.array(["Paris", " P. "], object)) == ("Paris", "P.")


LISTS = {  # as they are written -> what they hold
    '["Paris", "City of Paris"]': ["Paris", "City of Paris"],
    "['Paris', 'City of Paris']": ["Paris", "City of Paris"],
    "['Paris' 'City of Paris']": ["Paris", "City of Paris"],  # NumPy; to Python it is one text
    "['Paris'\n 'City of Paris']": ["Paris", "City of Paris"],
    "array(['Paris', 'City of Paris'], dtype=object)": ["Paris", "City of Paris"],
    "('Paris', 'City of Paris')": ["Paris", "City of Paris"],
    "('Paris',)": ["Paris"],
    "{'Paris'}": ["Paris"],
    "['It\\'s', \"O'Brien\"]": ["It's", "O'Brien"],
    "[u'R\\xf6ntgen']": ["Röntgen"],
    "[1990, 1991]": [1990, 1991],
    "[]": [],
}
NO_LISTS = [
    *(
        "[PIAS] Recordings",
        "[REC]",
        '["Weird Al"] Yankovic',
        "['N Sync]",
        "[Untitled, 2001]",
        "[1990]",
    ),
    *('("Heroes")', "('90s) rock", "{braces}", "[" * 5000, "Paris, Texas", "array of hope"),
]
BROKEN_LISTS = [
    *(
        '["Paris", "City of',
        "['Paris', 'City",
        "['a' 'b' ... 'z']",
        "['a''b']",
        "[['Paris'], ['x']]",
        "['\\d']",
    ),
    *('["Paris", City]', "['Paris', None]", '{"target": ["Paris"]}', "{'target': ['Paris']}"),
]


@pytest.mark.parametrize("text", LISTS)
def test_a_list_that_is_written_as_text_is_that_list(text):
    assert written_list(text) == LISTS[text]


@pytest.mark.parametrize("text", NO_LISTS)
def test_an_answer_that_only_starts_with_a_bracket_stays_as_it_is(text):
    assert written_list(text) is None
    assert Row("f", 1, {}).texts("golden_answers", [text]) == (text,)


@pytest.mark.parametrize("text", BROKEN_LISTS)
def test_what_begins_as_a_list_and_is_none_is_refused(text):
    for read in (Row("f", 1, {}).texts, Row("f", 1, {}).one):
        with pytest.raises(
            InputError,
            match='line 1: field "golden_answers" expected text or a list of texts, found',
        ):
            read("golden_answers", text)


def test_popqa_rows(tmp_path):
    """Its answers are JSON in a text."""
    row = {"id": 4222362, "question": "What is George Rankin's occupation?"}
    golds = '["politician", "pol", "[PIAS] Recordings"]'
    path = written(tmp_path, row | {"possible_answers": golds}, row | {"golden_answers": [golds]})
    for tasks in (
        load_questions(path),
        load_questions(parquet(tmp_path, row | {"possible_answers": golds})),
    ):
        assert {task.answers for task in tasks} == {("politician", "pol", "[PIAS] Recordings")}
    (tmp_path / "a.txt").write_text("[PIAS] Recordings\n" + golds)
    with pytest.raises(InputError, match=r"a\.txt line 2.*one text, found a list"):
        load_answers(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("truth", "answers"),
    [
        ("Paris", ("Paris",)),
        (["Paris", "P."], ("Paris", "P.")),
        ("['Paris' 'P.']", ("Paris", "P.")),
        ({"target": '["Paris"]'}, ("Paris",)),
    ],
)
def test_a_standard_row_of_verl_has_its_answers_in_ground_truth(tmp_path, truth, answers):
    row = verl_row() | {"reward_model": {"style": "rule", "ground_truth": truth}}
    for path in (written(tmp_path, row), parquet(tmp_path, row)):
        assert [task.answers for task in load_questions(path)] == [answers]


ASK = "Answer the given question. For example, <answer> Beijing </answer>. Question: "


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ([{"type": "text", "text": f"{ASK}who?\n"}], "who?"),
        ([{"type": "text", "text": ASK}, {"type": "text", "text": "who?"}], "who?"),
        (f'{ASK}Who hosted "Question: Time"?\n', 'Who hosted "Question: Time"?'),
        (f"{ASK}Question: who?", "who?"),
        ([{"type": "image_url", "image_url": "x"}, {"type": "text", "text": f"{ASK}who?"}], None),
        ([f"{ASK}who?"], None),
        ([], None),
        (None, None),
        ({"text": f"{ASK}who?"}, None),
        ("Question: What is 1 + 1?\nAnswer: 2\nQuestion: What is 1 + 2?", None),
        ("Question: What is 1 + 1? Answer: 2. Question: What is 1 + 2?", None),
    ],
)
def test_the_question_of_a_prompt(tmp_path, content, question):
    path = written(tmp_path, search_r1_row() | {"prompt": [{"role": "user", "content": content}]})
    if question is None:
        with pytest.raises(InputError, match=r'rows\.jsonl line 1: field "prompt" expected'):
            load_questions(path)
    else:
        assert load_questions(path)[0].question == question


def plain(folder: Path, raw: bytes) -> list[str]:
    (folder / "a.txt").write_bytes(raw)
    return [task.answers[0] for task in load_answers(folder / "a.txt")]


def test_plain_answers(tmp_path):
    (tmp_path / "a.txt").write_text("Paris\n\n  City of Light \n", "utf-8")
    assert load_answers(tmp_path / "a.txt") == [
        Task(0, ("Paris",), searches=2),
        Task(1, ("City of Light",), searches=2),
    ]
    with pytest.raises(InputError, match="at least one row"):
        plain(tmp_path, b"\n")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_lines_end_as_on_any_system_and_a_byte_order_mark_is_no_text(tmp_path, name, end):
    lines = [
        b'{"ground_truth": "Paris", "search_turns": 2}',
        b'{"ground_truth": "R\xc3\xb6m", "search_turns": 2}',
    ]
    lines = lines if name == "a.jsonl" else [b"Paris", "Röm".encode()]
    # the second where two files were joined
    raw = end.join(b"\xef\xbb\xbf" + line for line in lines)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert load_answers(tmp_path / name) == [
        Task(0, ("Paris",), searches=2),
        Task(1, ("Röm",), searches=2),
    ]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("Paris\nRom\n".encode("utf-16"), "expected lines of UTF-8 text, found UTF-16 text"),
        ("Paris\nRom\n".encode("utf-16-le"), "line 1: expected UTF-8 text, found NUL bytes"),
        ("Paris\nRom\n".encode("utf-16-be"), "line 1: expected UTF-8 text, found NUL bytes"),
        ("Paris\nRom\n".encode("utf-32"), "found UTF-16 text|found NUL"),
        (b"Paris\nRo\0m\n", "line 2: expected UTF-8 text, found NUL bytes"),
        ("Paris\nRöm\n".encode("latin-1"), "line 2: .*valid Unicode text"),
        (b"Paris\n\xed\xa0\xbd\n", "line 2: .*valid Unicode text"),  # half an emoji
        ("Paris\n\u200b\n".encode(), "line 2: .*non-empty text"),
        (gzip.compress(b"Paris\n", mtime=0), "found a gzip file, whose name must end in .gz"),
    ],
)
def test_text_that_is_not_utf8_is_told(tmp_path, raw, said):
    with pytest.raises(InputError, match=rf"a\.txt.*{said}"):
        plain(tmp_path, raw)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LINE_BYTES", 1000)
    with pytest.raises(
        InputError, match=r"rows\.jsonl line 3: expected at most 1,000 bytes in a line"
    ):
        load_answers(written(tmp_path, ANSWER, ANSWER, ANSWER | {"ground_truth": "x" * 1000}))


def test_mixed_sources_become_sets(tmp_path):
    mixed = written(
        tmp_path,
        verl_row(),
        search_r1_row("searchR1_musique"),
        verl_row(question="Who?"),
        name="m.jsonl",
    )
    plain = written(tmp_path, QUESTION)
    one = written(tmp_path, verl_row(), verl_row(), name="one.jsonl")
    sets = load_question_sets({"paper": str(mixed), "dev": str(plain), "nq": str(one)})
    assert {name: [task.uid for task in tasks] for name, tasks in sets.items()} == {
        "dev": [0],
        "nq": [0, 1],
        "paper/nq": [0, 2],
        "paper/musique": [1],
    }


def test_a_sample_keeps_order_grows_and_is_of_all_parts():
    tasks = [Task(i, ("x",), "?") for i in range(1000)]
    rows = {most: [task.uid for task in subsample(tasks, most)] for most in (10, 300, 1000, 5000)}
    assert (
        rows[300] == sorted(set(rows[300]))
        and len(rows[300]) == 300
        and set(rows[10]) < set(rows[300])
    )
    assert sum(row < 500 for row in rows[300]) == pytest.approx(150, abs=40)
    assert subsample(tasks, 0) == tasks and rows[1000] == rows[5000] == list(range(1000))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        # a title alone
        ({"contents": "Evan Morris was a lawyer."}, ("Evan Morris was a lawyer.", "")),
        (
            {"title": "Evan\nMorris", "text": " He was\na lawyer."},
            ("Evan Morris", " He was\na lawyer."),
        ),
        ({"title": "", "text": "He was a lawyer."}, ("", "He was a lawyer.")),
        ({"title": "no", "text": "no", "contents": "Evan\nHe was"}, ("Evan", "He was")),
    ],
)
def test_forms_of_a_passage(values, found):
    assert title_and_text(Row("f", 1, values)) == found


def test_corpus_streams(tmp_path):
    rows = [PASSAGE, {"id": 1, "contents": '"A\\"b"\n two\nlines \n'}]
    expected = [
        Document("0", '"Paris"', "Paris is a city."),
        Document("1", '"A\\"b"', " two\nlines \n"),
    ]
    documents = iterate_corpus(written(tmp_path, *rows, "broken"))
    # the broken third line has not been read yet
    assert [next(documents), next(documents)] == expected
    with pytest.raises(InputError, match=r"rows\.jsonl line 3"):
        next(documents)
    assert list(iterate_corpus(written(tmp_path, *rows, name="rows.jsonl.gz"))) == expected


def _without(row, key):
    return {k: v for k, v in row.items() if k != key}


def test_cut_gzip(tmp_path):
    path = written(tmp_path, *[PASSAGE | {"id": str(i)} for i in range(5000)], name="c.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"after line \d+: expected a whole gzip file"):
        list(iterate_corpus(path))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**40), st.integers(0, 20))
def test_each_epoch_is_a_permutation(num_rows, batch, seed, steps):
    stream = [i for step in range(steps) for i in batch_indices(num_rows, batch, seed, step)]
    assert len(stream) == steps * batch
    for start in range(0, len(stream), num_rows):
        epoch = stream[start : start + num_rows]
        assert len(set(epoch)) == len(epoch) and all(0 <= i < num_rows for i in epoch)


def test_order_depends_on_seed_and_epoch_only():
    first = batch_indices(50, 50, 0, 0)
    other = batch_indices(50, 50, 1, 0)
    assert first != other and first != batch_indices(50, 50, 0, 1)
    # the batch only cuts the stream
    assert [i for step in range(5) for i in batch_indices(50, 10, 0, step)] == first
    assert batch_indices(10, 10, 0, 0) == [
        8,
        0,
        3,
        7,
        6,
        4,
        1,
        5,
        2,
        9,
    ]  # a run that is resumed under another NumPy keeps its order
