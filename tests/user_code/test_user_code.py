"""Functions and classes of the user's own: what works, and the sentence for what does not."""

from pathlib import Path

import pytest

from ssp_jax.errors import InputError
from ssp_jax.game.judge import Case, Verdict
from ssp_jax.game.rewards import is_right, needs_judge
from ssp_jax.user_code import load
from ssp_jax.user_code.metric import Function
from ssp_jax.user_code.search import UserRetriever

METRIC = """
from dataclasses import dataclass

@dataclass
class Bound:
    characters: int = 5

def short(question, answers, answer):
    return len(answer) <= Bound().characters and answer in answers
"""

SEARCH = """
class Twice:
    def __init__(self, corpus, index):
        self.title = corpus
        self.asked = []

    def search(self, queries, top_k):
        self.asked += queries
        kinds = ("about", "more of", "nothing of")
        return [[(self.title, f"{kind} {query}") for kind in kinds] for query in queries]
"""


def file_of(folder: Path, content: str, name: str) -> str:
    (folder / "own.py").write_text(content)
    return f"{folder}/own.py:{name}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a/b.py:f", True), ("em", False), ("b.py:", False), ("b.py:2f", False), ("C:f", False)],
)
def test_a_value_names_code_where_it_is_a_file_and_a_name(value: str, expected: bool) -> None:
    assert load.is_one(value) == expected


# --- a metric ---


def verdicts(judge: Function, *cases: Case) -> dict[int, Verdict]:
    found: dict[int, Verdict] = {}
    judge.ask(cases, found.__setitem__, lambda: None)
    return found


def test_a_function_judges_every_answer_alone(tmp_path: Path) -> None:
    metric = file_of(tmp_path, METRIC, "short")
    judge = Function("reward.metric", metric)
    assert judge.name == "own.py:short"
    cases = (Case("Who?", ("Paris",), "Paris"), Case("Who?", ("Paris, France",), "Paris, France"))
    found = verdicts(judge, *cases)
    assert [found[0].right, found[1].right] == [True, False]
    # What equals a right answer is asked about too, and the function has the last word.
    assert needs_judge("Paris", ("Paris",), metric) and not needs_judge(
        "Paris", ("Paris",), "openai"
    )
    assert not is_right("Paris", ("Paris",), metric, False)
    assert is_right("Rome", ("Paris",), metric, True)
    assert not needs_judge(None, ("Paris",), metric) and not is_right(
        None, ("Paris",), metric, True
    )


def test_another_file_is_another_judge(tmp_path: Path) -> None:
    before = Function("eval.judge", file_of(tmp_path, METRIC, "short")).identity
    assert Function("eval.judge", file_of(tmp_path, METRIC, "short")).identity == before
    other = METRIC.replace("= 5", "= 6")
    assert Function("eval.judge", file_of(tmp_path, other, "short")).identity != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def g(a, b, c):\n    return True\n", "expected a function or class f .* it has g"),
        ("f = 3\n", "expected a function or class f in that file; it has none"),
        ("def f(a, b, c)\n", "own.py line 1: SyntaxError: expected ':'"),
        ("x = 1\ny = 1 / 0\n", "own.py line 2: ZeroDivisionError: division by zero"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError: No module named 'nowhere_at"),
        ("def f(answer):\n    return True\n", "expected three parameters: question, answers, answ"),
        ("def f(q, a, x):\n    return 0.5\n", "gives 0.5 for the answer 'seven'; expected True or"),
        ("def f(q, a, x):\n    return x[99]\n", "own.py line 2: IndexError: string index out of"),
    ],
)
def test_a_metric_that_cannot_judge_is_told_at_the_start(
    tmp_path: Path, content: str, says: str
) -> None:
    with pytest.raises(InputError, match=f"config key reward.metric.*{says}") as caught:
        Function("reward.metric", file_of(tmp_path, content, "f"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.py: expected a readable file of Python"):
        Function("reward.metric", f"{tmp_path}/none.py:f")


def test_a_metric_that_fails_later_says_where(tmp_path: Path) -> None:
    content = "def f(question, answers, answer):\n    assert answer == 'seven'\n    return True\n"
    judge = Function("reward.metric", file_of(tmp_path, content, "f"))
    with pytest.raises(InputError, match="own.py line 2: AssertionError"):
        verdicts(judge, Case("Who?", ("Paris",), "Paris"))


# --- a search ---


def test_a_class_searches(tmp_path: Path) -> None:
    value = file_of(tmp_path, SEARCH, "Twice")
    found = UserRetriever(value, "facts", "", ["Paris", "Rome"], top_k=2)
    (documents,) = found.search(["Paris"], 2)
    assert [(d.title, d.text) for d in documents] == [
        ("facts", "about Paris"),
        ("facts", "more of Paris"),
    ]
    assert len(found) == 4 and found.document(0) == documents[0]
    assert len({found.document(row).id for row in range(4)}) == 4
    assert found._own.asked == ["Paris", "Rome"]  # what was found once is not asked again
    source = found.source
    assert UserRetriever(value, "facts", "", ["Paris"], top_k=2).source == source
    file_of(tmp_path, SEARCH + "\n", "Twice")
    assert UserRetriever(value, "facts", "", ["Paris"], top_k=2).source != source


BODY = (
    "class F:\n    def __init__(self, corpus, index):\n        pass\n    def search(self, q, k):\n"
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("class F:\n    pass\n", "own.py: TypeError: F"),
        ("def F(corpus, index):\n    return 3\n", r"expected a method search\(queries, top_k\)"),
        (f"{BODY}        return []\n", r"gives \[\]; expected a list of 1 lists, one a query"),
        (f"{BODY}        return [3]\n", r"gives 3; expected a list of \(title, text\) for each"),
        (f"{BODY}        return [['a']]\n", "gives 'a'; expected passages"),
        (f"{BODY}        return [[('a', ' ')]]\n", "expected passages .* with a text"),
        (f"{BODY}        return [[]]\n", "found nothing for 1 queries; expected passages"),
        (f"{BODY}        return q[9]\n", "own.py line 5: IndexError"),
    ],
)
def test_a_search_that_cannot_be_used_is_told_at_the_start(
    tmp_path: Path, content: str, says: str
) -> None:
    with pytest.raises(InputError, match=f"config key retriever.kind: .*{says}"):
        UserRetriever(file_of(tmp_path, content, "F"), "", "", ["Paris"], top_k=2)
