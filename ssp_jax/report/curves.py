"""Values over the steps of a run, in bounded memory: of a long run a point stands for many steps.

Nothing is left out by this: a point has the mean of its steps, the lowest and the highest value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_POINTS = 500  # of a line at the least, twice as many at the most; a chart is 1,000 pixels wide


class Point(NamedTuple):
    step: float  # the middle of its steps
    rows: int  # of these, the ones that have a value
    mean: float
    low: float
    high: float


@dataclass(slots=True)
class _Range:
    """The values of one name in a bin."""

    rows: int
    total: float
    low: float
    high: float

    def add(self, other: "_Range") -> None:
        self.rows += other.rows
        self.total += other.total
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)


@dataclass(slots=True)
class _Bin:
    rows: int = 0
    steps: float = 0.0  # their sum
    ranges: dict[str, _Range] = field(default_factory=dict)

    def add(self, name: str, values: _Range) -> None:
        if name in self.ranges:
            self.ranges[name].add(values)
        else:
            self.ranges[name] = values


class Curves:
    """Hears the rows of a run one after the other."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self.each = 1  # rows that a point stands for
        self._most = most
        self._bins: list[_Bin] = []

    def add(self, step: float, values: Mapping[str, float]) -> None:
        if not self._bins or self._bins[-1].rows == self.each:
            if len(self._bins) == 2 * self._most:
                self._halve()
            self._bins.append(_Bin())
        last = self._bins[-1]
        last.rows += 1
        last.steps += step
        for name, value in values.items():
            last.add(name, _Range(1, value, value, value))

    def _halve(self) -> None:
        for first, second in zip(self._bins[::2], self._bins[1::2], strict=True):
            first.rows += second.rows
            first.steps += second.steps
            for name, values in second.ranges.items():
                first.add(name, values)
        self._bins = self._bins[::2]
        self.each *= 2

    @property
    def names(self) -> list[str]:
        """In the order in which they came up."""
        return list(dict.fromkeys(name for each in self._bins for name in each.ranges))

    def line(self, name: str) -> list[Point]:
        found = []
        for each in self._bins:
            if values := each.ranges.get(name):
                mean = values.total / values.rows
                step = each.steps / each.rows
                found.append(Point(step, values.rows, mean, values.low, values.high))
        return found
