"""How the package reads, counted: long statements and long lines come back unseen."""

import ast
from collections import Counter
from pathlib import Path

import ssp_jax

PACKAGE = Path(ssp_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SIMPLE = (ast.Assign, ast.Return, ast.Expr, ast.AugAssign, ast.AnnAssign)


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_one_thought_a_line():
    """The mean number of AST nodes of a simple statement, docstrings left out."""
    sizes = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, SIMPLE) and not is_docstring(node):
                sizes.append(sum(1 for _ in ast.walk(node)))
    assert len(sizes) > 3000
    assert sum(sizes) / len(sizes) <= 15


def test_lines_end_at_100_columns():
    found = []
    for file in FILES:
        for number, line in enumerate(file.read_text().split("\n"), 1):
            if len(line) > 100:
                found.append(f"{file.name}:{number}")
    assert found == []


def test_a_room_holds_a_dozen_files():
    assert max(Counter(file.parent for file in FILES).values()) <= 15
