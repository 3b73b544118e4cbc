"""Lists the commands, or runs one of them: `python -m ssp_jax`, and `ssp-jax` once installed."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ssp_jax.errors import InputError
from ssp_jax.runtime import command, signals


@dataclass(frozen=True)
class Command:
    """A command: main(arguments, prog) of a module, with some arguments before the user's."""

    module: str
    does: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("ssp_jax.main", "play and train, or go on where a run stopped"),
    "eval": Command("ssp_jax.main", "score a model, or a run, on question sets", ("--mode=eval",)),
    "warm-start": Command("ssp_jax.warm_start.__main__", "show a model the game, by examples"),
    "generate": Command("ssp_jax.generate.__main__", "ask a model, with searches or without"),
    "report": Command("ssp_jax.report.__main__", "a run as one HTML page: curves and games"),
    "plan": Command("ssp_jax.plan.__main__", "memory and time on hardware that you don't have"),
    "index": Command("ssp_jax.retriever.__main__", "build a search index of a corpus", ("build",)),
    "import-faiss": Command(
        "ssp_jax.retriever.__main__",
        "take vectors from a flat index of faiss",
        ("import-faiss",),
    ),
    "search": Command("ssp_jax.retriever.__main__", "look a query up in an index", ("search",)),
    "export": Command("ssp_jax.export.__main__", "a checkpoint as a Hugging Face folder"),
    "answers": Command("ssp_jax.answers.__main__", "take given answers from a corpus"),
    "audit": Command("ssp_jax.audit", "overlap of given answers with those of an evaluation"),
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssp_jax") -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(listing(prog))
        return 0
    if name.startswith("--help="):
        name, rest = "train", [name]
    if name not in COMMANDS:
        return command.exit_code(lambda: _refuse(name))
    chosen = COMMANDS[name]
    module = importlib.import_module(chosen.module)
    code: int = module.main([*chosen.arguments, *rest], prog=f"{prog} {name}")
    return code


def listing(prog: str) -> str:
    """The commands with a line each."""
    lines = ["Search Self-Play (arXiv 2510.18821) as one JAX program.", ""]
    width = max(map(len, COMMANDS))
    for name, chosen in COMMANDS.items():
        lines.append(f"  {prog} {name:<{width}}  {chosen.does}")
    lines += ["", f"{prog} COMMAND --help has its flags; {prog} --help=WORD finds config keys."]
    return "\n".join(lines)


def _refuse(name: str) -> NoReturn:
    raise InputError(f"there is no command {name!r}; expected one of {', '.join(COMMANDS)}")


def run() -> NoReturn:
    """The console command."""
    signals.leave(main(prog="ssp-jax"))


if __name__ == "__main__":
    signals.leave(main())
