"""Records and files: given answers, question sets, corpora; and the order in which rows are played.

Every reader streams, opens `.gz` and `.parquet` files by their name, and checks each line: the first wrong one raises
InputError with file, line number, field and what was expected. The formats are those that users have (Search-R1,
FlashRAG, SSP / veRL).
"""

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ssp_jax.errors import InputError

PLAIN_SEARCHES = 2  # requested where a file of answers does not say how many
_COLUMNS = frozenset(  # of a parquet file: what other ones hold may have no form in Python
    ("ground_truth", "search_turns", "sys_question_example", "question", "golden_answers")
    + ("data_source", "prompt", "reward_model", "extra_info")
)


@dataclass(frozen=True)
class Document:
    """One passage. `title` is the first line of a corpus entry as it stands, with its quotes, as Search-R1 shows it."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Task:
    """One row of a file. For the proposer answers[0] is the given answer; a question set has question and answers."""

    uid: int  # row number in the file, from 0
    answers: tuple[str, ...]
    question: str = ""
    searches: int = 1  # requested number of searches [C], a wish and not a rule
    examples: str = ""  # example questions for the proposer's system turn
    source: str = ""  # data_source of the row


@dataclass(frozen=True)
class Row:
    """A parsed line that remembers where it stands, so that each check can name the place."""

    path: str
    line: int
    values: dict[str, Any]
    unit: str = "line"

    def error(self, field: str, expected: str) -> InputError:
        return InputError(f'{self.path} {self.unit} {self.line}: field "{field}" expected {expected}')

    def text(self, field: str, value: object) -> str:
        """The value, stripped, when it is text with at least one visible character."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"non-empty text, found {_shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate passes the JSON parser and breaks tokenizers much later
            raise self.error(field, f"valid Unicode text, found {_shown(value)}") from None
        return value.strip()

    def texts(self, field: str, value: object) -> tuple[str, ...]:
        """A non-empty list of texts; one bare text counts as a list of one."""
        values = [value] if isinstance(value, str) else value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list) or not values:
            raise self.error(field, f"text or a non-empty list of texts, found {_shown(value)}")
        return tuple(self.text(field, item) for item in values)


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


@dataclass
class Position:
    """How far a reader has come, in bytes of the file as it lies on disk."""

    bytes: int = 0


def _lines(path: str | Path, position: Position | None = None) -> Generator[tuple[int, bytes], None, None]:
    """The lines of a file, or of a file in a .gz, that are not blank, with their numbers from 1; without a BOM."""
    name, number = str(path), 0
    try:
        with open(name, "rb") as raw, gzip.open(raw) if name.endswith(".gz") else raw as file:
            for number, line in enumerate(cast(IO[bytes], file), 1):
                if position and number % 1024 == 0:
                    position.bytes = raw.tell()
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} after line {number}: expected a whole gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{name}: expected a readable file ({error.strerror})") from None


def read_rows(path: str | Path, position: Position | None = None) -> Generator[Row, None, None]:
    """The JSON objects of a .jsonl or .jsonl.gz file, line by line."""
    with contextlib.closing(_lines(path, position)) as lines:
        for number, line in lines:
            yield parse_row(str(path), number, line)


def read_parquet(path: str | Path) -> Generator[Row, None, None]:
    """The rows of a .parquet file, a thousand in memory at a time."""
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            for batch in file.iter_batches(1024, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, values, "row")
    except OSError as error:
        raise InputError(f"{path}: expected a readable file ({error.strerror or error})") from None
    except (ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} after row {number}: expected a whole parquet file ({reason})") from None


def parse_row(path: str, number: int, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers broken JSON, broken UTF-8 and endless numbers
        raise InputError(f"{path} line {number}: expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} line {number}: expected a JSON object, found {_shown(values)}")
    return Row(path, number, values)


def _all_tasks(path: str | Path, parse: Callable[[int, Row], Task]) -> list[Task]:
    read = read_parquet if str(path).endswith(".parquet") else read_rows
    with contextlib.closing(read(path)) as rows:  # a wrong line must not leave the file open
        tasks = [parse(uid, row) for uid, row in enumerate(rows)]
    return _not_empty(path, tasks)


def _not_empty(path: str | Path, tasks: list[Task]) -> list[Task]:
    if not tasks:
        raise InputError(f"{path}: expected at least one row, found none")
    return tasks


def load_answers(path: str | Path) -> list[Task]:
    """The proposer's answers: SSP's training rows (ground_truth, search_turns, optional sys_question_example).

    A .txt or .txt.gz file has one answer a line; its answers are asked for with PLAIN_SEARCHES searches.
    """
    if not str(path).removesuffix(".gz").endswith(".txt"):
        return _all_tasks(path, _answer_task)
    tasks: list[Task] = []
    with contextlib.closing(_lines(path)) as lines:
        for number, line in lines:
            row = Row(str(path), number, {})
            answer = row.text("answer", line.decode("utf-8", "surrogateescape"))  # broken UTF-8 is told as such
            tasks.append(Task(len(tasks), (answer,), searches=PLAIN_SEARCHES))
    return _not_empty(path, tasks)


def _answer_task(uid: int, row: Row) -> Task:
    searches = row.values.get("search_turns")
    if type(searches) is not int or searches < 1:  # `type`, because a bool is an int in Python
        raise row.error("search_turns", f"a whole number >= 1, found {_shown(searches)}")
    examples = row.values.get("sys_question_example") or ""
    if not isinstance(examples, str):
        raise row.error("sys_question_example", f"text, found {_shown(examples)}")
    answer = row.text("ground_truth", row.values.get("ground_truth"))
    return Task(uid, (answer,), searches=searches, examples=examples)


def load_questions(path: str | Path) -> list[Task]:
    """A question set: FlashRAG lines (question, golden_answers) or SSP / veRL / Search-R1 rows (reward_model, ...)."""
    return _all_tasks(path, _question_task)


def load_question_sets(files: Mapping[str, str]) -> dict[str, list[Task]]:
    """Name -> questions. A file that mixes sources, as SSP's test file does, gives a set NAME/SOURCE for each."""
    sets: dict[str, list[Task]] = {}
    for name, path in sorted(files.items()):
        tasks = load_questions(path)
        mixed = len({task.source for task in tasks}) > 1
        for task in tasks:
            source = task.source.removeprefix("searchR1_") or "other"
            sets.setdefault(f"{name}/{source}" if mixed else name, []).append(task)
    return sets


def sample(questions: Sequence[Task], most: int) -> list[Task]:
    """`most` of the questions in their order, 0 for all; the same ones in each run, and more of them hold fewer.

    Chance draws them: files are often sorted by kind.
    """
    drawn = np.random.Generator(np.random.Philox(len(questions))).permutation(len(questions))
    return [questions[i] for i in sorted(drawn[: most or None].tolist())]


def _question_task(uid: int, row: Row) -> Task:
    source = row.values.get("data_source") or ""
    if not isinstance(source, str):
        raise row.error("data_source", f"text, found {_shown(source)}")
    golds = row.values.get("golden_answers")
    if golds is not None:
        question = row.text("question", row.values.get("question"))
        return Task(uid, row.texts("golden_answers", golds), question, source=source)
    if "reward_model" not in row.values:
        raise row.error("golden_answers", 'text or a list of texts (or an SSP / veRL row with "reward_model")')
    target: object = row.values["reward_model"]
    for key in ("ground_truth", "target"):
        target = target.get(key) if isinstance(target, dict) else None
    answers = row.texts("reward_model.ground_truth.target", target)
    return Task(uid, answers, _verl_question(row), source=source)


def _verl_question(row: Row) -> str:
    """extra_info.question (SSP) or question where the row has one, else what follows "Question: " in the last user
    turn.
    """
    extra = row.values.get("extra_info")
    for field, values in (("extra_info.question", extra), ("question", row.values)):
        if isinstance(values, dict) and values.get("question"):
            return row.text(field, values["question"])
    prompt = row.values.get("prompt")
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    user = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    _, mark, question = str(user[-1] if user else "").rpartition("Question: ")
    if not mark:
        raise row.error("prompt", 'a last user turn with "Question: " (or a text in extra_info.question)')
    return row.text("prompt", question)


def iterate_corpus(path: str | Path, position: Position | None = None) -> Generator[Document, None, None]:
    """The passages of a Search-R1 corpus: {"id", "contents": "\\"Title\\"\\ntext"}."""
    with contextlib.closing(read_rows(path, position)) as rows:
        yield from map(parse_document, rows)


def parse_document(row: Row) -> Document:
    name, contents = row.values.get("id"), row.values.get("contents")
    if type(name) is int:
        name = str(name)
    row.text("contents", contents)  # only the check: what is shown to a model keeps its outer spaces
    title, newline, text = str(contents).partition("\n")
    if not newline:
        raise row.error("contents", f"a title line, a newline and the text, found {_shown(contents)}")
    return Document(row.text("id", name), title, text)


def batch_indices(num_rows: int, batch: int, seed: int, step: int) -> list[int]:
    """The rows of one step, a pure function of (seed, step), so that a resumed run needs only its step.

    Steps take consecutive pieces of an endless stream of permutations, one per epoch and each drawn from (seed, epoch):
    every row is played once before any is played twice, also where a batch crosses an epoch or exceeds the file.
    """
    positions = range(step * batch, (step + 1) * batch)
    epochs = range(positions.start // num_rows, (positions.stop - 1) // num_rows + 1)
    orders = {e: np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, e)))) for e in epochs}
    permutations = {e: rng.permutation(num_rows) for e, rng in orders.items()}
    return [int(permutations[p // num_rows][p % num_rows]) for p in positions]
