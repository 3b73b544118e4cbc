"""Rooms import downwards only: which module may import which."""

import ast

import pytest

from tests.conftest import ROOT

# From the ground up. Rooms of one floor do not know each other. A module of a room that has a floor
# of its own is something that you type.
FLOORS = (
    ("errors", "metric_table"),
    ("runtime",),
    ("data",),
    ("corpus",),
    ("model",),
    ("retriever", "rollout", "learner"),
    ("game",),
    ("user_code",),
    ("config",),
    ("evaluation", "stamps", "workdir"),
    ("trackers",),
    ("assembly", "report"),
    ("export",),
    ("lifecycle",),
    (
        "train",
        "evaluation.run",
        "warm_start",
        "plan",
        "generate",
        "report.__main__",
        "export.__main__",
        "audit",
        "answers",
        "retriever.__main__",
    ),
    ("main",),
    ("__main__", "warm_start.__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "ssp_jax").rglob("*.py"))


def room_of(module):
    """The room of a module, whose name comes without the package's."""
    parts = module.split(".")
    own_floor = ".".join(parts[:2])
    return own_floor if own_floor in FLOOR_OF else parts[0]


def imports_of(file):
    """The modules of the package that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = (name.name for name in node.names)
            yield from (n.removeprefix("ssp_jax.") for n in names if n.startswith("ssp_jax."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssp_jax"):
            within = node.module.removeprefix("ssp_jax").removeprefix(".")
            yield from (f"{within}.{name.name}".removeprefix(".") for name in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_from_the_floors_below(file):
    module = ".".join(file.relative_to(ROOT / "ssp_jax").with_suffix("").parts)
    room = room_of(module.removesuffix(".__init__"))
    for imported in map(room_of, imports_of(file)):
        assert imported == room or FLOOR_OF[imported] < FLOOR_OF[room], imported
