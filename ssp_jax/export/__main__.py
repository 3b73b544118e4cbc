"""Writes a checkpoint of a run as a Hugging Face folder, or its adapter as PEFT's.

    python -m ssp_jax.export WORKDIR [--step=N | --best] [--out=FOLDER] [--kind=model|adapter]
                             [--push=USER/NAME]

Without --step it is the newest checkpoint. --best takes the one with the highest score among those
that are there and were evaluated; checkpoint.keep_best has a run keep it. The run may go on
meanwhile. --push uploads the folder to the Hugging Face hub, where a new repository is private.
"""

import argparse
from collections.abc import Sequence

from ssp_jax.config.values import Range
from ssp_jax.errors import InputError, printable
from ssp_jax.export import push
from ssp_jax.runtime import command, platform, signals

_PROG = "python -m ssp_jax.export"
_STEPS = Range(0, (1 << 31) - 1)


def parse_flags(arguments: Sequence[str] | None, prog: str = _PROG) -> argparse.Namespace:
    """The checked flags. Raises InputError."""
    parser = command.Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="of a run")
    add("--step", default=None, type=int, metavar="N", help="of the checkpoint; else the newest")
    add("--best", action="store_true", help="the checkpoint with the highest score")
    out = "to write; WORKDIR/export_step_N if not given"
    add("--out", default="", metavar="FOLDER", help=out)
    kind = "as checkpoint.export of the run if not given"
    add("--kind", default="", choices=("", "model", "adapter"), help=kind)
    add("--push", default="", metavar="USER/NAME", help="on the Hugging Face hub")
    flags = parser.parse(arguments)
    if flags.step is not None:
        _STEPS.check("flag --step", flags.step)
        if flags.best:
            raise InputError("flags --step and --best name two checkpoints; expected one of them")
    if flags.push:
        push.check_name(flags.push)
    flags.workdir = command.user_path(flags.workdir, "WORKDIR")
    flags.out = command.user_path(flags.out, "--out")
    return flags


def main(arguments: Sequence[str] | None = None, prog: str = _PROG) -> int:
    return command.exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    flags = parse_flags(arguments, prog)
    if flags.push:
        push.check_access(flags.push)

    # From here on JAX is needed: mistakes above are reported before the seconds that it takes.
    platform.prepare_once()
    from ssp_jax.export import write
    from ssp_jax.lifecycle import next_steps
    from ssp_jax.workdir import config_of

    written = write.write_checkpoint(
        flags.workdir, flags.step, flags.out, flags.kind, best=flags.best
    )
    folder, step, kind = written
    print(printable(f"{folder}: the {kind} after step {step}, with its card in README.md"))
    asked = next_steps.to_ask(config_of(flags.workdir), flags.workdir, folder, kind)
    print(printable(f"ask the model: {asked}"))
    if flags.push:
        print(printable(f"uploaded to {push.upload(folder, flags.push)}"))


if __name__ == "__main__":
    signals.leave(main())
