"""Shows a model the game: supervised training on episodes of all roles.

    python -m ssp_jax.warm_start --config=configs/tiny.py --model=FOLDER --episodes=FILES \\
        --out=FOLDER [--config.KEY=VALUE ...]
    python -m ssp_jax.warm_start script --corpus=PASSAGES.jsonl --index=FOLDER \\
        --out=EPISODES.jsonl --games=300 [--without=QUESTIONS.jsonl ...]

The first is python -m ssp_jax.main --mode=warm_start with --workdir=OUT, --config.model.path=MODEL
and --config.warm_start.episodes=EPISODES: files or folders of runs, between commas. It trains on
what the players wrote themselves, with the prompts of the config; the same command goes on where it
stopped. What it leaves in OUT/export is a model for --config.model.path, or with LoRA an adapter.

script writes games of scripted players over a corpus with titles, played through the real search.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ssp_jax.config.values import BOUNDS, CHOICES, Range
from ssp_jax.errors import InputError
from ssp_jax.runtime import command, signals
from ssp_jax.runtime.command import user_path

_PROG = "python -m ssp_jax.warm_start"
SCRIPT = "script"
# Flag of this command -> what it is for python -m ssp_jax.main.
_FLAGS = {
    "model": "config.model.path",
    "episodes": "config.warm_start.episodes",
    "out": "workdir",
}
_SHARE = Range(0, 1)
_BOUNDS = {  # of flags
    "games": BOUNDS["game.answers_per_step"],
    "seed": BOUNDS["seed"],
    "top_k": BOUNDS["retriever.top_k"],
    "noise": BOUNDS["game.noise_documents"],
    "one_hop": _SHARE,
    "one_hop_fields": _SHARE,
    "stop_early": _SHARE,
    "search_again": _SHARE,
}


def main(arguments: Sequence[str] | None = None, prog: str = _PROG) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [SCRIPT]:
        return command.exit_code(lambda: _script(given[1:], f"{prog} {SCRIPT}"))
    return command.exit_code(lambda: _train(given, prog))


def _train(arguments: Sequence[str], prog: str) -> int:
    from ssp_jax import main as run

    return run.main(translated(arguments, prog), prog)


def translated(arguments: Sequence[str], prog: str = _PROG) -> list[str]:
    """The arguments of python -m ssp_jax.main that do the same. Raises InputError."""
    parser = command.Parser(prog=prog, description=__doc__)
    config = "limits, rows and prompts (configs/default.py)"
    parser.add_argument("--config", default="configs/default.py", metavar="FILE", help=config)
    parser.add_argument("--model", default="", metavar="FOLDER", help="config key model.path")
    episodes = "config key warm_start.episodes"
    parser.add_argument("--episodes", default="", metavar="FILES", help=episodes)
    out = "of the run; the model will be in its export"
    parser.add_argument("--out", default="", metavar="FOLDER", help=out)
    given, rest = parser.parse_known_args(arguments)
    if not given.out:
        raise InputError("flag --out is missing; expected a folder")
    found = ["--mode=warm_start", f"--config={given.config}"]
    for name, flag in _FLAGS.items():
        if value := getattr(given, name):
            found.append(f"--{flag}={value}")
    return [*found, *rest]


def script_flags(arguments: Sequence[str], prog: str = f"{_PROG} {SCRIPT}") -> argparse.Namespace:
    """The checked flags of the command that writes games. Raises InputError."""
    parser = command.Parser(prog=prog, description=__doc__)
    corpus = "of passages with titles; not needed where the index is there"
    parser.add_argument("--corpus", default="", metavar="FILE", help=corpus)
    index = "of the search; built if it is missing"
    parser.add_argument("--index", required=True, metavar="FOLDER", help=index)
    parser.add_argument("--out", required=True, metavar="FILE", help="of games, one a line")
    answers = "the games' answers, for data.answers: self-play has something to find for each"
    parser.add_argument("--answers", default="", metavar="FILE", help=answers)
    without = "a question set; no game is about what it names; may be repeated"
    parser.add_argument("--without", action="append", default=[], metavar="FILE", help=without)
    kinds = "of what games are about, as its passage calls it: country,city; all if not given"
    parser.add_argument("--kinds", default="", metavar="WORDS", help=kinds)
    fields = "that games ask for: lowest point,currency; all if not given"
    parser.add_argument("--fields", default="", metavar="WORDS", help=fields)
    styles = tuple(CHOICES["prompt.style"])
    style = f"config key prompt.style ({styles[0]})"
    parser.add_argument("--style", default=styles[0], choices=styles, help=style)
    _add_numbers(parser)
    flags = parser.parse(arguments)
    for name, bound in _BOUNDS.items():
        bound.check(f"flag --{name}", getattr(flags, name))
    for name in ("corpus", "index", "out", "answers"):
        setattr(flags, name, user_path(getattr(flags, name), f"--{name}"))
    for name in ("kinds", "fields"):
        given = getattr(flags, name).split(",")
        setattr(flags, name, [word.strip() for word in given if word.strip()])
    flags.without = [user_path(path, "--without") for path in flags.without]
    return flags


def _add_numbers(parser: command.Parser) -> None:
    parser.add_argument("--games", default=300, type=int, metavar="N", help="(300)")
    seed = "of the random numbers (0)"
    parser.add_argument("--seed", default=0, type=int, metavar="N", help=seed)
    top_k = "passages per search (3)"
    parser.add_argument("--top_k", default=3, type=int, metavar="N", help=top_k)
    noise = "other passages for a verifier (4)"
    parser.add_argument("--noise", default=4, type=int, metavar="N", help=noise)
    one_hop = "share of games whose question one search answers (0.5)"
    parser.add_argument("--one_hop", default=0.5, type=float, metavar="X", help=one_hop)
    fields = "share of these that ask for a field (0.5)"
    parser.add_argument("--one_hop_fields", default=0.5, type=float, metavar="X", help=fields)
    early = "share of two-hop solvers that answer after one search (0.35)"
    parser.add_argument("--stop_early", default=0.35, type=float, metavar="X", help=early)
    again = "share of one-hop solvers that search once too often (0.2)"
    parser.add_argument("--search_again", default=0.2, type=float, metavar="X", help=again)


def _script(arguments: Sequence[str], prog: str) -> None:
    flags = script_flags(arguments, prog)

    # The search starts JAX, and needs no device.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ssp_jax.warm_start import scripting

    scripting.write(flags)


if __name__ == "__main__":
    signals.leave(main())
