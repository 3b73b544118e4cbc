"""Runs or resumes self-play, or evaluates its question sets.

    python -m ssp_jax.main --config=configs/tiny.py [--workdir=runs/tiny] [--mode=eval]
                           [--from=WORKDIR[@STEP]] [--config.KEY=VALUE ...]
                           [--coordinator=HOST:PORT --processes=N --process=I]

--config is a file in the form of configs/default.py, which lists every KEY; --help=WORD finds keys
by a word. The same command in the same workdir goes on where it stopped. --from starts a new run
from a checkpoint of another one. --mode=eval plays the question sets alone: with the model's own
weights, and with those of the workdir's newest checkpoint. --mode=warm_start trains on episodes
(warm_start.episodes), to show a model the game. On several hosts the same command runs on each,
with a workdir that all see. Slurm, Open MPI, GKE and Cloud TPU number the processes; elsewhere the
last three flags do (process 0 is at HOST; --processes=1 asks nobody).

Exit codes: 0 done, or saved after SIGTERM or SIGHUP; 2 unusable input, reported in one sentence;
130 Ctrl-C, which saves too (the second one leaves at once); else 1 or a signal's.
"""

import os
from collections.abc import Sequence

from absl import logging

from ssp_jax.config.command_line import CommandLine, add_flags, command_line
from ssp_jax.config.help import find_keys
from ssp_jax.runtime import command, launchers, platform, signals

_PROG = "python -m ssp_jax.main"


def main(arguments: Sequence[str] | None = None, prog: str = _PROG) -> int:
    # Orbax logs each of its steps through absl, and traces of what fails, which it also raises.
    logging.set_verbosity(logging.FATAL)
    interrupted = "interrupted; the same command goes on from what is saved"
    return command.exit_code(lambda: _run(arguments, prog), interrupted)


def parse(
    arguments: Sequence[str] | None, prog: str = _PROG
) -> tuple[CommandLine, launchers.ProcessSpec]:
    """What to run, and as which process. Raises InputError."""
    parser = command.Parser(prog=prog, description=__doc__, find=find_keys)
    add_flags(parser)
    launchers.add_flags(parser)
    flags, overrides = parser.parse_known_args(arguments)
    spec = launchers.process_spec(flags)
    return command_line(flags, overrides), spec


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    given, spec = parse(arguments, prog)

    # From here on JAX is needed: mistakes above are reported before the seconds that it takes.
    platform.prepare_once()
    from ssp_jax import train
    from ssp_jax.evaluation.run import evaluate_workdir
    from ssp_jax.runtime import processes
    from ssp_jax.warm_start.run import warm_start

    processes.start(spec, os.environ)
    with processes.fail_fast(given.workdir):
        if given.mode == "eval":
            evaluate_workdir(given.config, given.workdir)
        elif given.mode == "warm_start":
            warm_start(given.config, given.workdir, given.file)
        else:
            train.train(given.config, given.workdir, given.origin)


if __name__ == "__main__":
    signals.leave(main())
