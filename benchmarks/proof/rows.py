"""What a check says: rows of a table, each with a verdict. Without JAX."""

from dataclasses import dataclass
from pathlib import Path

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NOTED = "noted"  # a figure of which nothing is expected


@dataclass(frozen=True)
class Row:
    """One thing that was looked at. measured: where it was skipped, the reason."""

    name: str
    measured: str
    expected: str = ""
    verdict: str = NOTED


@dataclass(frozen=True)
class Setting:
    """How a check runs. small: shapes that a CPU computes in seconds."""

    small: bool
    out: Path  # an existing folder for files of results


def noted(name: str, measured: str) -> Row:
    return Row(name, measured)


def skipped(name: str, reason: str) -> Row:
    return Row(name, reason, "", SKIPPED)


def verdict(name: str, measured: str, expected: str, is_ok: bool) -> Row:
    return Row(name, measured, expected, OK if is_ok else FAILED)


def at_most(name: str, value: float, limit: float, unit: str = "") -> Row:
    """NaN is never ok."""
    return verdict(name, f"{value:.3g}{unit}", f"<= {limit:.3g}{unit}", value <= limit)


def at_least(name: str, value: float, minimum: float, unit: str = "") -> Row:
    return verdict(name, f"{value:.3g}{unit}", f">= {minimum:.3g}{unit}", value >= minimum)


def near(name: str, value: float, expected: float, share: float, unit: str = "") -> Row:
    """share: by which the value may differ from what is expected."""
    is_ok = abs(value - expected) <= share * abs(expected)
    return verdict(
        name, f"{value:.3g}{unit}", f"{expected:.3g}{unit}, by {share:.0%} at most", is_ok
    )


def bound(setting: Setting, name: str, value: float, minimum: float, unit: str = "") -> Row:
    """A speed that is expected of the full shapes; of small ones it is noted."""
    if setting.small:
        return noted(name, f"{value:.3g}{unit}")
    return at_least(name, value, minimum, unit)
