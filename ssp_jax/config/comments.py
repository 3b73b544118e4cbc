"""What configs/default.py says of its keys: the comments beside and above each of them."""

import ast
import functools
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from configs import default


@dataclass(frozen=True)
class Key:
    """One key: its full name, its default as a command line takes it, and its comment."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Section:
    """The keys of a section, in the order of the file; name: "" for keys outside any section."""

    name: str
    comment: str
    keys: tuple[Key, ...]


@functools.cache
def read_sections() -> tuple[Section, ...]:
    """The sections of configs/default.py, in its order."""
    source = inspect.getsource(default)
    comments = _Comments(source)
    heads = {"": ""}
    keys: dict[str, list[Key]] = {"": []}
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Assign):
            continue
        name = ast.unparse(statement.targets[0]).partition(".")[2]  # without the config itself
        section = name.rpartition(".")[0]
        if not name:
            continue
        comment = comments.of(statement)
        if _is_section(statement.value) and not section:
            heads[name] = comment
            keys[name] = []
        else:
            keys[section].append(Key(name, _default(statement.value), comment))
    return tuple(Section(name, heads[name], tuple(found)) for name, found in keys.items())


class _Comments:
    """The comments of a file, by the statements that they belong to."""

    def __init__(self, source: str) -> None:
        self._beside: dict[int, str] = {}  # line -> comment behind a statement
        self._alone: dict[int, str] = {}  # line -> comment on a line of its own
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                lines = self._alone if alone else self._beside
                lines[token.start[0]] = token.string.lstrip("# ")

    def of(self, statement: ast.stmt) -> str:
        """The lines right above a statement, and what stands behind it."""
        above = list(self._above(statement.lineno))[::-1]
        beside = self._beside.get(statement.end_lineno or statement.lineno)
        return " ".join([*above, beside] if beside else above)

    def _above(self, line: int) -> Iterator[str]:
        while (line := line - 1) in self._alone:
            yield self._alone[line]


def _is_section(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "ConfigDict"


def _default(value: ast.expr) -> str:
    """A default as a command line takes it; of one that follows another key, that key's name."""
    if isinstance(value, ast.Call):
        return str(ast.literal_eval(value.args[0])) if value.args else "{}"
    literal = ast.literal_eval(value)
    return str(literal) if literal != "" else '""'
