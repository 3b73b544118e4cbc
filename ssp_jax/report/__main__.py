"""A run folder as one HTML page, with curves and games to read.

    python -m ssp_jax.report WORKDIR [--out=report.html] [--games=300]

The page needs no network and no other file, and may be made while the run goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ssp_jax.errors import printable
from ssp_jax.report import page
from ssp_jax.runtime.command import Parser, run_command, user_path


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m ssp_jax.report", description=__doc__.partition("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--out", default="", help="WORKDIR/report.html if not given")
    parser.add_argument("--games", type=int, default=page.GAMES, help="shown at most")
    args = parser.parse_args(arguments)
    if args.games < 0:
        parser.error(f"--games: expected 0 or more, got {args.games}")
    workdir = Path(user_path(args.workdir, "WORKDIR"))
    out = Path(user_path(args.out, "--out")) if args.out else workdir / "report.html"
    size = page.write(workdir, out, args.games)
    print(f"{printable(str(out))}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
