"""Values over the steps of a run, in bounded memory: in a long run a point covers many steps.

No step is left out: a point has the mean of its steps, and their lowest and highest value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# A long line has from so many points to twice as many; a chart is 1,000 pixels wide.
MOST_POINTS = 500


class Point(NamedTuple):
    """Some consecutive steps of a line."""

    step: float  # the mean of its steps
    rows: int  # steps that have a value
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
    """Some consecutive steps: the values of all names."""

    rows: int = 0
    steps: float = 0.0  # their sum
    ranges: dict[str, _Range] = field(default_factory=dict)

    def add(self, name: str, values: _Range) -> None:
        if name in self.ranges:
            self.ranges[name].add(values)
        else:
            self.ranges[name] = values


class Curves:
    """Lines by name; rows are added in the order of steps."""

    def __init__(self, points: int = MOST_POINTS) -> None:
        self.each = 1  # rows of a point
        self._points = points
        self._bins: list[_Bin] = []

    def add(self, step: float, values: Mapping[str, float]) -> None:
        """One row: the values of a step, by name."""
        if not self._bins or self._bins[-1].rows == self.each:
            if len(self._bins) == 2 * self._points:
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
        """In the order in which they first had a value."""
        return list(dict.fromkeys(name for bin_ in self._bins for name in bin_.ranges))

    def line(self, name: str) -> list[Point]:
        """The points of a name that have a value."""
        points = []
        for bin_ in self._bins:
            if values := bin_.ranges.get(name):
                mean = values.total / values.rows
                step = bin_.steps / bin_.rows
                points.append(Point(step, values.rows, mean, values.low, values.high))
        return points
