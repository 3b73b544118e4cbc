"""Progress of long work on an index: lines on stderr."""

import sys
import time
from collections.abc import Callable

from ssp_jax.errors import printable

PROGRESS_SECONDS = 10.0


class Progress:
    """Prints at most one line in PROGRESS_SECONDS, so that quick work is silent."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last = self._start

    def __call__(self, describe: Callable[[float], str]) -> None:
        """Prints what `describe` gives for the seconds since the start, if a line is due."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            line = printable(describe(now - self._start))
            print(f"ssp_jax: {line}", file=sys.stderr, flush=True)

    def share(self, what: str, done: float) -> None:
        """Prints the share of the work that is done, if a line is due."""
        self(lambda seconds: f"{what}: {done:.0%}, {seconds:.0f} s")
