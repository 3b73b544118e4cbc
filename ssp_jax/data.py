"""Files of given answers, question sets and corpora; and the order in which tasks are played.

Every reader streams, opens `.gz` and `.parquet` files by their name, and checks each line: the
first wrong one raises InputError with file, line number, field and what was expected. The formats
are those that users have (Search-R1, FlashRAG, SSP / veRL, PopQA).
"""

import ast
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import re
import reprlib
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssp_jax.errors import InputError

PLAIN_SEARCHES = 2  # requested where a file of answers does not say how many
MAX_SEARCHES = 1000  # that an answer may ask for
SHOWN_CHARS = 60  # of a value in a message
PIECE_BYTES = 1 << 16  # that are read at a time
LINE_BYTES = 1 << 26  # of a line; a longer one is another kind of file, such as one JSON array
GOLD_COLUMNS = ("golden_answers", "possible_answers")  # of FlashRAG, of PopQA
# Columns of a parquet file that are read; others may hold what has no form in Python.
_COLUMNS = frozenset(
    (
        "ground_truth",
        "search_turns",
        "sys_question_example",
        "question",
        *GOLD_COLUMNS,
        "aliases",
        "data_source",
        "prompt",
        "reward_model",
        "extra_info",
    )
)
QUESTION_MARK = "Question: "  # before the question in the prompts of Search-R1, ZeroSearch and SSP
_OTHER_FILES = {  # kinds, by their first bytes
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip file, whose name must end in .gz",
    b"PAR1\x15": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ": "an xz file",
}


@dataclass(frozen=True)
class Document:
    """A passage. `title` is the first line of a corpus entry, with its quotes, as in Search-R1."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Task:
    """A given answer for the proposer (answers[0]), or a question of a question set."""

    uid: int  # row number in the file, from 0
    answers: tuple[str, ...]  # each of them is right: the golds, or the given one, and aliases
    question: str = ""
    searches: int = 1  # requested number of searches [C], a wish and not a rule
    examples: str = ""  # example questions for the proposer's system turn
    source: str = ""  # data_source of the row


@dataclass(frozen=True)
class Row:
    """A parsed line of a file, or row of a table, with its place for the messages of checks."""

    path: str
    line: int
    values: dict[str, Any]
    unit: str = "line"

    def error(self, field: str, expected: str) -> InputError:
        return InputError(
            f'{self.path} {self.unit} {self.line}: field "{field}" expected {expected}'
        )

    def text(self, field: str, value: object) -> str:
        """The value, stripped. Raises InputError unless it is text with a visible character."""
        if not isinstance(value, str) or not _visible(self.unicode(field, value)):
            raise self.error(field, f"non-empty text, found {_shown(value)}")
        if "\0" in value:  # nothing that is asked or answered has one
            raise self.error(field, f"text without NUL characters, found {_shown(value)}")
        return value.strip()

    def unicode(self, field: str, value: str) -> str:
        """The text as it is. Raises InputError for a lone surrogate, which breaks tokenizers."""
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, f"valid Unicode text, found {_shown(value)}") from None
        return value

    def optional(self, field: str) -> str:
        """The text of a field that a row may lack."""
        value = self.values.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(field, f"text, found {_shown(value)}")
        return self.unicode(field, value)

    def texts(self, field: str, value: object) -> tuple[str, ...]:
        """A list of texts, which is not empty; one bare text counts as a list of one.

        A text that is itself a list, as PopQA keeps its answers, counts as that list: as it stands
        no answer would ever equal it.
        """
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(values, str):
            values = [values]
        if not isinstance(values, list) or not values:
            raise self.error(field, f"text or a non-empty list of texts, found {_shown(value)}")
        found: list[str] = []
        for item in values:
            text = self.text(field, item)
            listed = self._listed(field, text)
            found += [text] if listed is None else self.texts(field, listed)
        return tuple(found)

    def aliases(self) -> tuple[str, ...]:
        """Other names of the answer, which count like it; a row may have none."""
        values = self.values.get("aliases")
        if values is not None and not isinstance(values, list):
            raise self.error("aliases", f"a list of texts, found {_shown(values)}")
        return self.texts("aliases", values) if values else ()

    def one(self, field: str, value: object) -> str:
        """One text. Raises InputError where it is a list of several, written as text."""
        text = self.text(field, value)
        if self._listed(field, text) is not None:
            raise self.error(field, f"one text, found a list of them: {_shown(text)}")
        return text

    def _listed(self, field: str, text: str) -> list[Any] | None:
        try:
            return written_list(text)
        except ValueError as error:
            found = f"{error}: {_shown(text)}"
            raise self.error(field, f"text or a list of texts, found {found}") from None


_FOUND = reprlib.Repr()  # neither deep nor long, whatever a file holds
_FOUND.maxstring = _FOUND.maxlong = _FOUND.maxother = SHOWN_CHARS


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    shown = _FOUND.repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= SHOWN_CHARS else shown[:SHOWN_CHARS] + "..."


def _visible(text: str) -> bool:
    """True where a reader sees anything: not only spaces, controls, characters of no width."""
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


# --- lists that are written as text ---------------------------------------------------------------

_QUOTED = r"""(?:[uU]?'(?:[^'\\]|\\.)*'|[uU]?"(?:[^"\\]|\\.)*")"""
_ONE_QUOTED = re.compile(_QUOTED, re.DOTALL)
# As Python writes lists, tuples and sets of texts, and as NumPy writes arrays, without commas.
_COMMAS = re.compile(rf"[\[({{]\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*[\])}}]", re.DOTALL)
_SPACES = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]", re.DOTALL)
_ARRAY = re.compile(r"array\((.*?)(?:,\s*dtype=[^\s,()]+)?\)", re.DOTALL)
# What begins as a list or an object of texts. ["Weird Al"] Yankovic does not: its bracket ends
# after one text.
_BEGUN = re.compile(rf"\[\s*{_QUOTED}\s*,|\[\s*[\[({{]\s*['\"]|{{\s*{_QUOTED}\s*:", re.DOTALL)
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def written_list(text: str) -> list[Any] | None:
    """The items of a text that is a list in JSON's, Python's or NumPy's form; None for other text.

    Raises ValueError, which says what was found, for a text that begins as a list and is none. A
    single number in brackets may be either: None.
    """
    array = _ARRAY.fullmatch(text)
    inner = array[1].strip() if array else text
    if inner[:1] not in _BRACKETS:
        return None
    try:
        found = json.loads(inner)
    except (ValueError, RecursionError):
        return _quoted_list(inner)
    if isinstance(found, dict):
        raise ValueError("an object that is written as text")
    number = len(found) == 1 and isinstance(found[0], int | float)
    return None if number else found


def _quoted_list(text: str) -> list[str] | None:
    """Python's and NumPy's forms."""
    whole = _SPACES.fullmatch(text) or _COMMAS.fullmatch(text)
    if whole and text[-1] == _BRACKETS[text[0]]:
        items = _ONE_QUOTED.findall(text)
        comma = text[:-1].rstrip().endswith(",")
        # no tuple, but a quotation in brackets
        if text[0] == "(" and len(items) == 1 and not comma:
            return None
        return [_unquoted(item) for item in items]
    open_or_quoted = "]" not in text or re.search(r"['\"]\s*\]$", text)
    if _BEGUN.match(text) or (re.match(r"\[\s*['\"]", text) and open_or_quoted):
        raise ValueError("what begins as a list and is none")
    return None


def _unquoted(literal: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that Python does not know
            return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError, Warning):
        raise ValueError("a list with a broken text") from None


# --- reading lines and rows -----------------------------------------------------------------------


@dataclass
class Position:
    """How far a reader has come: the bytes of the file as it lies on disk, and their digest."""

    bytes: int = 0
    sha256: Any = dataclass_field(default_factory=hashlib.sha256)


class _Followed(io.RawIOBase):
    """A file whose reads a Position follows. It may be a pipe, which can be read only once."""

    def __init__(self, raw: IO[bytes], position: Position) -> None:
        self._raw = raw
        self._position = position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._raw.read(len(buffer))
        buffer[: len(piece)] = piece
        self._position.bytes += len(piece)
        self._position.sha256.update(piece)
        return len(piece)


def read_lines(
    path: str | Path, position: Position | None = None
) -> Generator[tuple[int, bytes], None, None]:
    """The lines of a file, gzipped or not, that are not blank, with their numbers from 1.

    Lines end with LF, CR LF or CR. A byte order mark before one, as in files that were joined, is
    dropped.
    """
    name = str(path)
    number = 0
    try:
        with open(name, "rb") as raw, _unpacked(name, raw, position or Position()) as file:
            while piece := file.readline(LINE_BYTES + 1):
                if number == 0:
                    _refuse_other_files(name, piece)
                if len(piece) > LINE_BYTES:
                    where = f"{name} line {number + 1}"
                    raise InputError(f"{where}: expected at most {LINE_BYTES:,} bytes in a line")
                for line in piece.splitlines():  # of bytes: at LF, CR LF and CR alone
                    number += 1
                    if b"\0" in line:
                        expected = "expected UTF-8 text, found NUL bytes; is it UTF-16, or damaged?"
                        raise InputError(f"{name} line {number}: {expected}")
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if line.strip():
                        yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{name} after line {number}: expected a whole gzip file ({error})"
        ) from None
    except OSError as error:
        raise InputError(f"{name}: expected a readable file ({error.strerror})") from None


def _unpacked(name: str, raw: IO[bytes], position: Position) -> Any:
    file = io.BufferedReader(_Followed(raw, position), PIECE_BYTES)
    return io.BufferedReader(gzip.open(file)) if name.endswith(".gz") else file


def _refuse_other_files(name: str, start: bytes) -> None:
    for magic, kind in _OTHER_FILES.items():
        if start.startswith(magic):
            raise InputError(f"{name}: expected lines of UTF-8 text, found {kind}")


def read_rows(path: str | Path, position: Position | None = None) -> Generator[Row, None, None]:
    """The JSON objects of a .jsonl or .jsonl.gz file, line by line."""
    with contextlib.closing(read_lines(path, position)) as lines:
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
    except (ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, and not pyarrow's
            raise InputError(f"{path}: expected a readable file ({error.strerror})") from None
        reason = " ".join(str(error).split())
        expected = f"expected a whole parquet file ({reason})"
        raise InputError(f"{path} after row {number}: {expected}") from None


def parse_row(path: str, number: int, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    # ValueError covers broken JSON, broken UTF-8 and endless numbers
    except (ValueError, RecursionError) as error:
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
    """The proposer's answers: rows of SSP's training file.

    Their fields are ground_truth, search_turns and, optional, aliases and sys_question_example. A
    .txt or .txt.gz file has one answer a line; its answers request PLAIN_SEARCHES searches.
    """
    if not str(path).removesuffix(".gz").endswith(".txt"):
        return _all_tasks(path, _answer_task)
    tasks: list[Task] = []
    with contextlib.closing(read_lines(path)) as lines:
        for number, line in lines:
            row = Row(str(path), number, {})
            text = line.decode("utf-8", "surrogateescape")  # broken UTF-8 is reported as such
            answer = row.one("answer", text)
            tasks.append(Task(len(tasks), (answer,), searches=PLAIN_SEARCHES))
    return _not_empty(path, tasks)


def _answer_task(uid: int, row: Row) -> Task:
    searches = row.values.get("search_turns")
    # `type`, because a bool is an int in Python
    if type(searches) is not int or not 1 <= searches <= MAX_SEARCHES:
        expected = f"a whole number from 1 to {MAX_SEARCHES}"
        raise row.error("search_turns", f"{expected}, found {_shown(searches)}")
    answer = row.one("ground_truth", row.values.get("ground_truth"))
    answers = (answer, *row.aliases())
    return Task(uid, answers, searches=searches, examples=row.optional("sys_question_example"))


def load_questions(path: str | Path) -> list[Task]:
    """A question set of FlashRAG or PopQA, or of SSP, veRL or Search-R1 (with reward_model)."""
    return _all_tasks(path, _question_task)


def load_question_sets(files: Mapping[str, str]) -> dict[str, list[Task]]:
    """Name -> questions. A file of several sources, as SSP's, gives a set NAME/SOURCE for each."""
    sets: dict[str, list[Task]] = {}
    for name, path in sorted(files.items()):
        tasks = load_questions(path)
        mixed = len({task.source for task in tasks}) > 1
        for task in tasks:
            source = task.source.removeprefix("searchR1_") or "other"
            sets.setdefault(f"{name}/{source}" if mixed else name, []).append(task)
    return sets


def subsample(questions: Sequence[Task], limit: int) -> list[Task]:
    """At most `limit` of the questions in their order, 0 for all.

    They are drawn at random, for files are often sorted by kind; each run draws the same ones, and
    a larger limit adds to those of a smaller one.
    """
    drawn = np.random.Generator(np.random.Philox(len(questions))).permutation(len(questions))
    return [questions[i] for i in sorted(drawn[: limit or None].tolist())]


def _question_task(uid: int, row: Row) -> Task:
    source = row.optional("data_source")
    for column in GOLD_COLUMNS:
        golds = row.values.get(column)
        if golds is not None:
            question = row.text("question", row.values.get("question"))
            answers = row.texts(column, golds) + row.aliases()
            return Task(uid, answers, question, source=source)
    if "reward_model" not in row.values:
        raise row.error(
            "golden_answers", 'text or a list of texts (or an SSP / veRL row with "reward_model")'
        )
    rewarded = row.values["reward_model"]
    if not isinstance(rewarded, dict):
        raise row.error("reward_model", f"an object with a ground_truth, found {_shown(rewarded)}")
    field = "reward_model.ground_truth"
    target = rewarded.get("ground_truth")
    if isinstance(target, dict):  # of SSP and Search-R1; veRL's own rows have texts here
        field = f"{field}.target"
        target = target.get("target")
    answers = row.texts(field, target) + row.aliases()
    return Task(uid, answers, _verl_question(row), source=source)


def _verl_question(row: Row) -> str:
    """extra_info.question (SSP) or question where the row has one, else the last user turn's."""
    extra = row.values.get("extra_info")
    for field, values in (("extra_info.question", extra), ("question", row.values)):
        if isinstance(values, dict) and values.get("question"):
            return row.text(field, values["question"])
    prompt = row.values.get("prompt")
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    user = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    if not user:
        expected = "turns of a user (or a text in extra_info.question)"
        raise row.error("prompt", f"{expected}, found {_shown(prompt)}")
    return row.text("prompt", _asked(row, _content(row, user[-1])))


def _content(row: Row, content: object) -> str:
    """The text of a turn's content: a text, or a list of parts that are all text."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    whole = ""
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            raise row.error("prompt", f"a user turn of text, found {_shown(content)}")
        whole += text
    return whole


def _asked(row: Row, content: str) -> str:
    """The text after the first mark, for a question may contain the mark's words itself.

    Raises InputError where a later mark can be another question, as in a prompt with examples.
    """
    _, mark, question = content.partition(QUESTION_MARK)
    if not mark:
        expected = f'a last user turn with "{QUESTION_MARK}" (or a text in extra_info.question)'
        raise row.error("prompt", expected)
    while question.startswith(QUESTION_MARK):
        question = question.removeprefix(QUESTION_MARK)
    before, again, _ = question.rpartition(QUESTION_MARK)
    if again and ("\n" in before or "Answer:" in before):
        expected = f'one "{QUESTION_MARK}" in the last user turn (or a text in extra_info.question)'
        raise row.error("prompt", f"{expected}, found several")
    return question


def iterate_corpus(
    path: str | Path, position: Position | None = None
) -> Generator[Document, None, None]:
    """The passages of a file of rows: see title_and_text.

    Rows without ids are known by their numbers, from 0.
    """
    with_ids = True
    with contextlib.closing(read_rows(path, position)) as rows:
        for number, row in enumerate(rows):
            has_id = row.values.get("id") is not None
            if number == 0:
                with_ids = has_id
            if has_id != with_ids:
                found = "has one" if with_ids else "has none"
                raise row.error("id", f"in all rows or in none; the first row {found}")
            yield parse_document(row, str(number))


def parse_document(row: Row, default: str | None = None) -> Document:
    """The passage of a row. default: the id of a row without one, which needs one if None."""
    name = row.values.get("id")
    if name is None:
        name = default
    if type(name) is int:
        name = str(name)
    return Document(row.text("id", name), *title_and_text(row))


def title_and_text(row: Row) -> tuple[str, str]:
    """From {"contents": "\\"Title\\"\\ntext"} of Search-R1, or {"title", "text"} of FlashRAG.

    Contents of one line are a title alone, as they are to Search-R1's own client. A text may have
    no title.
    """
    contents = row.values.get("contents")
    if contents is None and "text" in row.values:
        title = row.optional("title").replace("\n", " ")
        contents = f"{title}\n{row.optional('text')}"
    if not isinstance(contents, str) or not _visible(contents):
        found = "nothing" if contents is None else _shown(contents)
        raise row.error("contents", f"non-empty text (or in text, and a title), found {found}")
    title, _, text = row.unicode("contents", contents).partition("\n")
    return title, text


def batch_indices(num_rows: int, batch: int, seed: int, step: int) -> list[int]:
    """The rows of a file that a step plays: a pure function of (seed, step).

    So a resumed run needs only its step. Steps take consecutive pieces of an endless stream of
    permutations, one per epoch and each drawn from (seed, epoch): every row is played once before
    any is played twice, also where a batch crosses an epoch or exceeds the file.
    """
    positions = range(step * batch, (step + 1) * batch)
    epochs = range(positions.start // num_rows, (positions.stop - 1) // num_rows + 1)
    permutations = {}
    for epoch in epochs:
        bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
        permutations[epoch] = np.random.Generator(bits).permutation(num_rows)
    return [int(permutations[p // num_rows][p % num_rows]) for p in positions]
