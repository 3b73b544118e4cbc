"""How long a compiled TPU program takes by its compiler's own estimates, which its text has.

They serve the compiler to choose between ways to do one operation. As times they are rough: each
operation has a floor of about a microsecond, the sum of two large arrays counts four times what
memory needs for it, and nothing overlaps. A Pallas kernel and a plain copy have no estimate.
"""

import re
from collections.abc import Iterator

_START = re.compile(r"(ENTRY )?%?([\w.-]+) \(")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_WHILE = re.compile(r" while\(.* condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALL = re.compile(r" call\(.* to_apply=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{|(?:true|false)_computation=)([^,}]+(?:, %[^,}]+)*)"
)
_CONSTANT = re.compile(r"%([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")


def estimated_cycles(text: str, turns: float) -> float:
    """Cycles of all operations of a program, one after the other, on one core.

    text: of the compiled program. turns: of each loop whose number of turns depends on data.
    """
    program = dict(_computations(text))
    return _cycles(program, program[""], turns)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of each computation by its name; the entry goes by "", too."""
    lines: list[str] = []
    for line in text.splitlines():
        start = _START.match(line)
        if start and line.endswith("{"):
            lines = []
            yield start[2], lines
            if start[1]:
                yield "", lines
        lines.append(line)


def _cycles(program: dict[str, list[str]], lines: list[str], turns: float) -> float:
    """Of these lines of a computation, and of the computations that they run.

    Inside a fusion nothing has an estimate of its own.
    """

    def of(name: str) -> float:
        return _cycles(program, program[name], turns)

    total = 0.0
    for line in lines:
        if estimate := _ESTIMATE.search(line):
            total += int(estimate[1])
        if loop := _WHILE.search(line):
            condition, body = loop.groups()
            total += _turns(program[condition], turns) * (of(condition) + of(body))
        elif call := _CALL.search(line):
            total += of(call[1])
        elif " conditional(" in line:
            names = re.findall(r"[\w.-]+", ",".join(_BRANCHES.findall(line)))
            total += max(map(of, names))
    return total


def _turns(condition: list[str], turns: float) -> float:
    """Of a loop that counts up from zero to a constant, else `turns`."""
    text = "\n".join(condition)
    constants = dict(_CONSTANT.findall(text))
    below = _BELOW.search(text)
    return int(constants.get(below[1], 0)) or turns if below else turns
