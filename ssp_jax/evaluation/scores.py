"""What an evaluation found, as numbers with their intervals. Arrays of one value a question; knows
nothing of JAX.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000  # of the bootstrap
_DRAWN = 1 << 20  # questions at a time
AVERAGE = "average"  # plain mean over the sets, as in the paper's tables
# "right" is by config key eval.judge. Percent, with intervals; then plain means.
SHARES, MEANS = ("right", "em", "cover_em", "f1"), ("searches", "tokens")

Values = dict[str, dict[str, np.ndarray]]  # set -> name of SHARES and MEANS -> one value a question


def interval(means_S: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means_S, (2.5, 97.5))
    return float(low), float(high)


def resampled(name: str, values_Q: np.ndarray) -> np.ndarray:
    """Means over RESAMPLES draws of the set's questions. The name is the seed: before and after
    draw the same ones.
    """
    rng, total = np.random.default_rng(zlib.crc32(name.encode())), len(values_Q)
    sizes = np.diff(np.append(np.arange(0, RESAMPLES, max(1, _DRAWN // total)), RESAMPLES))
    return np.concatenate(
        [values_Q[rng.integers(total, size=(size, total))].mean(axis=1) for size in sizes]
    )


def _with_average(
    found: dict[str, tuple[float, np.ndarray]],
) -> dict[str, tuple[float, np.ndarray]]:
    if len(found) < 2:
        return found
    middle = float(np.mean([mean for mean, _ in found.values()]))
    return found | {AVERAGE: (middle, np.mean([draws for _, draws in found.values()], axis=0))}


def summarize(values: Values) -> dict[str, dict[str, float]]:
    """Set, and average where there are several -> numbers; X_low and X_high bound the 95 % interval
    of X.
    """
    table: dict[str, dict[str, float]] = {}
    for column in SHARES:
        found = {
            name: (float(100 * v[column].mean()), 100 * resampled(name, v[column]))
            for name, v in values.items()
        }
        for name, (mean, draws) in _with_average(found).items():
            low, high = interval(draws)
            table.setdefault(name, {}).update(
                {column: mean, f"{column}_low": low, f"{column}_high": high}
            )
    for column in MEANS:
        means = {name: float(v[column].mean()) for name, v in values.items()}
        for name in table:
            table[name][column] = means.get(name, float(np.mean(list(means.values()))))
    sizes = {name: len(v["right"]) for name, v in values.items()}
    for name in table:
        table[name]["n"] = sizes.get(name, sum(sizes.values()))
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


def gains(
    before: Values, after: Values, paper: Mapping[str, tuple[float, float]]
) -> dict[str, Gain]:
    """paper: of its sets by their own names; a set here may carry a file's name in front of that."""
    differences, ends = {}, {}
    for name in before:
        old, new = 100 * before[name]["right"], 100 * after[name]["right"]
        differences[name] = (float((new - old).mean()), resampled(name, new - old))
        ends[name] = (float(old.mean()), float(new.mean()), paper.get(name.rpartition("/")[2]))
    found = {n: Gain(*ends[n][:2], *interval(differences[n][1]), ends[n][2]) for n in before}
    whole = _with_average(differences)
    if AVERAGE in whole:
        old_mean, new_mean = (float(np.mean([end[i] for end in ends.values()])) for i in (0, 1))
        # a mean over other sets is another
        same = sorted(name.rpartition("/")[2] for name in found) == sorted(paper)
        theirs = tuple(np.mean(list(paper.values()), axis=0).tolist()) if same else None
        found[AVERAGE] = Gain(old_mean, new_mean, *interval(whole[AVERAGE][1]), theirs)
    return found


def _short(names: Sequence[str]) -> dict[str, str]:
    """Without the file's name where all sets are of one file."""
    heads = {name.partition("/")[0] for name in names if name != AVERAGE and "/" in name}
    one = len(heads) == 1 and all("/" in name or name == AVERAGE for name in names)
    return {name: name.partition("/")[2] if one and "/" in name else name for name in names}


def rows(
    table: Mapping[str, Mapping[str, float]], judge: str
) -> tuple[list[list[object]], list[str]]:
    """Cells and heads of the table for people."""
    titles = {"right": judge.split()[0], "em": "EM", "cover_em": "cover EM", "f1": "F1"}
    shares = [column for column in SHARES if column != "right" or judge not in ("em", "cover_em")]
    names, cells = _short(list(table)), []
    for name, numbers in table.items():
        shown = [
            f"{numbers[c]:.1f} ({numbers[c + '_low']:.0f}-{numbers[c + '_high']:.0f})"
            for c in shares
        ]
        cells.append(
            [
                names[name],
                *shown,
                f"{numbers['searches']:.1f}",
                f"{numbers['tokens']:.0f}",
                numbers["n"],
            ]
        )
    return cells, ["set", *(titles[c] for c in shares), "searches", "tokens", "n"]


def gain_rows(found: Mapping[str, Gain]) -> tuple[list[list[object]], list[str]]:
    compared = any(gain.paper for gain in found.values())
    names, cells = _short(list(found)), []
    for name, g in found.items():
        row: list[object] = [names[name], f"{g.before:.1f}", f"{g.after:.1f}", f"{g.gain:+.1f}"]
        row.append(f"{g.low:+.1f} to {g.high:+.1f}")
        if compared:
            row += (
                [f"{g.paper[0]:.1f}", f"{g.paper[1]:.1f}", f"{g.paper[1] - g.paper[0]:+.1f}"]
                if g.paper
                else [""] * 3
            )
        cells.append(row)
    heads = ["set", "before %", "after %", "gain", "95 % of gain"]
    return cells, heads + (["paper (LLM judge) before", "after", "gain"] if compared else [])


def gains_json(found: Mapping[str, Gain]) -> dict[str, Any]:
    return {
        name: {
            "before": g.before,
            "after": g.after,
            "gain": g.gain,
            "gain_low": g.low,
            "gain_high": g.high,
        }
        | ({"paper_before": g.paper[0], "paper_after": g.paper[1]} if g.paper else {})
        for name, g in found.items()
    }
