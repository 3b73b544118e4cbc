"""The scores of an evaluation, as numbers with intervals. Arrays have one value an episode. Without
JAX.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssp_jax.runtime.figures import difference, interval, percent

RESAMPLES = 2000  # draws of the bootstrap
_DRAWN = 1 << 20  # questions at a time
AVERAGE = "average"  # plain mean over the sets, as in the paper's tables
# Percent, with intervals; "right" is by config key eval.judge. Then plain means.
SHARES = ("right", "em", "cover_em", "f1")
MEANS = ("searches", "tokens")
COLUMNS = (*SHARES, *MEANS)
RULES = {"em": "EM", "cover_em": "cover EM"}  # of SHARES: their titles

Values = dict[str, dict[str, np.ndarray]]  # set -> name of COLUMNS -> values_E


def bounds(means_Z: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of bootstrap draws."""
    low, high = np.percentile(means_Z, (2.5, 97.5))
    return float(low), float(high)


def resampled(name: str, values_E: np.ndarray) -> np.ndarray:
    """Means over RESAMPLES draws of the set's questions.

    The name is the seed, so that the evaluations before and after draw the same questions.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    total = len(values_E)
    starts = np.arange(0, RESAMPLES, max(1, _DRAWN // total))
    means = []
    for size in np.diff(np.append(starts, RESAMPLES)):
        rows = rng.integers(total, size=(size, total))
        means.append(values_E[rows].mean(axis=1))
    return np.concatenate(means)


def _with_average(
    found: dict[str, tuple[float, np.ndarray]],
) -> dict[str, tuple[float, np.ndarray]]:
    """Means and draws of each set, and those of the average where there are several sets."""
    if len(found) < 2:
        return found
    means, draws_of_sets = zip(*found.values(), strict=True)
    draws_Z = np.mean(draws_of_sets, axis=0)
    return found | {AVERAGE: (float(np.mean(means)), draws_Z)}


def summarize(values: Values) -> dict[str, dict[str, float]]:
    """Set, and average where there are several -> numbers.

    X_low and X_high bound the 95 % interval of X; n is the number of questions. Without a set there
    is nothing.
    """
    table: dict[str, dict[str, float]] = {}
    for column in SHARES:
        found = {}
        for name, columns in values.items():
            values_E = columns[column]
            mean = float(100 * values_E.mean())
            found[name] = (mean, 100 * resampled(name, values_E))
        for name, (mean, draws_Z) in _with_average(found).items():
            low, high = bounds(draws_Z)
            row = table.setdefault(name, {})
            row |= {column: mean, f"{column}_low": low, f"{column}_high": high}
    for column in MEANS:
        means = {name: float(columns[column].mean()) for name, columns in values.items()}
        for name in table:
            of_set = [means[name]] if name in means else list(means.values())
            table[name][column] = float(np.mean(of_set))
    sizes = {name: len(columns["right"]) for name, columns in values.items()}
    all_questions = sum(sizes.values())
    for name in table:
        table[name]["n"] = sizes.get(name, all_questions)
    return table


@dataclass(frozen=True)
class Gain:
    """Percent right before and after on the same questions, and the interval of the difference."""

    before: float
    after: float
    low: float
    high: float
    paper: tuple[float, float] | None  # its before and after

    @property
    def gain(self) -> float:
        return self.after - self.before


def other_rules(judge: str) -> dict[str, str]:
    """The RULES that stand beside what is right by a judge."""
    return {column: title for column, title in RULES.items() if column != judge}


def gains(
    before: Values,
    after: Values,
    paper: Mapping[str, tuple[float, float]],
    column: str = "right",
) -> dict[str, Gain]:
    """The gain of each set, and of their average where there are several, in a column of SHARES.

    paper: figures of its sets by their own names; a set here may have a file's name before that.
    """
    differences = {}
    ends = {}
    for name in before:
        old_E = 100 * before[name][column]
        new_E = 100 * after[name][column]
        difference_E = new_E - old_E
        differences[name] = (float(difference_E.mean()), resampled(name, difference_E))
        ends[name] = (float(old_E.mean()), float(new_E.mean()))
    found = {}
    for name, (old, new) in ends.items():
        low, high = bounds(differences[name][1])
        theirs = paper.get(_own_name(name))
        found[name] = Gain(old, new, low, high, theirs)
    whole = _with_average(differences)
    if AVERAGE in whole:
        all_old, all_new = zip(*ends.values(), strict=True)
        old = float(np.mean(all_old))
        new = float(np.mean(all_new))
        low, high = bounds(whole[AVERAGE][1])
        # A mean over other sets is another one.
        theirs = None
        if sorted(map(_own_name, found)) == sorted(paper):
            theirs = tuple(np.mean(list(paper.values()), axis=0).tolist())
        found[AVERAGE] = Gain(old, new, low, high, theirs)
    return found


def _own_name(name: str) -> str:
    """The name of a set without that of its file."""
    return name.rpartition("/")[2]


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names for a table: without the file's name where all sets are of one file."""
    sets = [name for name in names if name != AVERAGE]
    files = {name.partition("/")[0] for name in sets}
    of_one_file = len(files) == 1 and all("/" in name for name in sets)
    if not of_one_file:
        return {name: name for name in names}
    return {name: name.partition("/")[2] or name for name in names}


def rows(
    table: Mapping[str, Mapping[str, float]], judge: str
) -> tuple[list[list[object]], list[str]]:
    """Cells and heads of the table for people."""
    titles = {"right": judge.split()[0], **RULES, "f1": "F1"}
    # The own column of a rule has the same numbers as "right".
    shares = [column for column in SHARES if not (judge in RULES and column == "right")]
    names = _short(list(table))
    cells = []
    for name, numbers in table.items():
        row: list[object] = [names[name]]
        for column in shares:
            ends = (percent(numbers[f"{column}_low"]), percent(numbers[f"{column}_high"]))
            row.append(f"{percent(numbers[column])} ({interval(*ends)})")
        row.append(f"{numbers['searches']:.1f}")
        row.append(f"{numbers['tokens']:.0f}")
        row.append(numbers["n"])
        cells.append(row)
    heads = [titles[column] for column in shares]
    return cells, ["set", *heads, "searches", "tokens", "n"]


def gain_rows(
    found: Mapping[str, Gain], by_rule: Mapping[str, Mapping[str, Gain]]
) -> tuple[list[list[object]], list[str]]:
    """Cells and heads of the table of gains. by_rule: gains by other rules, by column."""
    compared = any(gain.paper for gain in found.values())
    names = _short(list(found))
    cells = []
    for name, gain in found.items():
        row: list[object] = [names[name]]
        row += [percent(gain.before), percent(gain.after)]
        row += [difference(gain.gain), _interval(gain)]
        for gains_of in by_rule.values():
            other = gains_of[name]
            row.append(f"{difference(other.gain)} ({_interval(other)})")
        if gain.paper:
            before, after = gain.paper
            row += [percent(before), percent(after), difference(after - before)]
        elif compared:
            row += ["", "", ""]
        cells.append(row)
    heads = ["set", "before %", "after %", "gain", "95 % of gain"]
    heads += [f"{RULES[column]} gain" for column in by_rule]
    if compared:
        heads += ["paper (LLM judge) before", "after", "gain"]
    return cells, heads


def _interval(gain: Gain) -> str:
    return interval(difference(gain.low), difference(gain.high))


def gains_json(found: Mapping[str, Gain]) -> dict[str, Any]:
    document: dict[str, dict[str, float]] = {}
    for name, gain in found.items():
        document[name] = {
            "before": gain.before,
            "after": gain.after,
            "gain": gain.gain,
            "gain_low": gain.low,
            "gain_high": gain.high,
        }
        if gain.paper:
            document[name]["paper_before"] = gain.paper[0]
            document[name]["paper_after"] = gain.paper[1]
    return document
