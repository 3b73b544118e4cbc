"""Writes a run folder as one HTML page, with curves and games to read.

    python -m ssp_jax.report WORKDIR [--out=report.html] [--games=300]
    python -m ssp_jax.report RUN1 RUN2 ... [--out=compare.html]

Several runs are compared on one page: their gains, with intervals question by question, and their
curves.
The page needs no network and no other file, and may be made while the run goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from ssp_jax.errors import printable
from ssp_jax.report import compare, page
from ssp_jax.runtime import signals
from ssp_jax.runtime.command import Parser, exit_code, user_path


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssp_jax.report") -> int:
    return exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog=prog, description=__doc__)
    workdirs_help = "of a run or an evaluation; several are compared"
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help=workdirs_help)
    out_help = f"WORKDIR/{page.FILE} if not given, of several runs {compare.FILE} in this folder"
    parser.add_argument("--out", default="", metavar="FILE", help=out_help)
    games_help = f"shown at most ({page.GAMES})"
    parser.add_argument("--games", default=page.GAMES, type=int, metavar="N", help=games_help)
    args = parser.parse(arguments)
    if args.games < 0:
        parser.error(f"--games: expected 0 or more, got {args.games}")
    workdirs = [Path(user_path(workdir, "WORKDIR")) for workdir in args.workdirs]
    given = user_path(args.out, "--out")
    if len(workdirs) > 1:
        out = Path(given or compare.FILE)
        size = compare.write(workdirs, out)
    else:
        out = Path(given) if given else workdirs[0] / page.FILE
        size = page.write(workdirs[0], out, args.games)
    print(f"{printable(str(out))}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    signals.leave(main())
