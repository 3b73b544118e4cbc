"""Run or resume self-play:

    python -m ssp_jax.main --config=configs/tiny.py [--workdir=runs/tiny] [--mode=eval]
                           [--config.KEY=VALUE ...]
                           [--coordinator=HOST:PORT --processes=N --process=I]

--config is a file in the form of configs/default.py, which lists every KEY. The same command in the
same workdir goes on where it stopped. --mode=eval plays the question sets alone: with the model's
own weights, and with those of the workdir's newest checkpoint. On several hosts the same command
runs on each, with a workdir that all see. Slurm, Open MPI, GKE and Cloud TPU number the processes;
elsewhere the last three flags do (process 0 is at HOST; --processes=1 asks nobody). Exit codes: 0
done, or saved after SIGTERM or SIGHUP; 2 unusable input, reported in one sentence; 130 Ctrl-C,
which saves too (the second one leaves at once); else 1 or a signal's.
"""

import os
import sys

from absl import logging

from ssp_jax.config import parse_command_line
from ssp_jax.runtime import command, launchers, platform, signals


def main(argv: list[str]) -> int:
    # Orbax logs each of its steps through absl, and traces of what fails, which it also raises.
    logging.set_verbosity(logging.FATAL)
    interrupted = "interrupted; the same command goes on from what is saved"
    return command.run_command(_run, argv, help=__doc__, interrupted=interrupted)


def _run(argv: list[str]) -> None:
    rest, spec = launchers.parse_process_flags(argv)
    given = parse_command_line(rest)
    # Imported here, so that mistakes above are reported before the seconds that JAX takes to load.
    from ssp_jax import train
    from ssp_jax.evaluation.run import evaluate_workdir
    from ssp_jax.runtime import processes

    processes.start(spec, os.environ)
    run = evaluate_workdir if given.mode == "eval" else train.train
    with processes.fail_fast(given.workdir):
        run(given.config, given.workdir)


if __name__ == "__main__":
    platform.prepare()
    signals.leave(main(sys.argv))
