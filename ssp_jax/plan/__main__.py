"""Does a config fit on hardware that you don't have, and how long must a step take there at least?

    python -m ssp_jax.plan --config=configs/qwen7b.py --topology=v5p:2x2x2 [--config.KEY=VALUE ...]
    python -m ssp_jax.plan --config=configs/own_data.py --hardware=this

The second prints keys with which the config fits on the machine that it runs on.

The run's programs are compiled ahead of time by the hardware's own compiler, which needs a CPU only
and reports the memory that they take, and for TPUs what time it expects them to take: for TPUs
pip install '.[plan]', for GPUs '.[plan-gpu]'. Without it temporaries are estimates. Exit codes: 0
it fits; 1 it does not; 2 bad input.
"""

from collections.abc import Sequence

from ssp_jax.config.checks import check_numbers
from ssp_jax.config.command_line import add_flags, command_line
from ssp_jax.config.help import find_keys
from ssp_jax.config.values import BOUNDS, Range
from ssp_jax.errors import InputError
from ssp_jax.runtime import command, platform, signals


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssp_jax.plan") -> int:
    return command.exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> int:
    parser = _parser(prog)
    own, overrides = parser.parse_known_args(arguments)
    BOUNDS["engine.cache_tokens"].check("flag --tokens", own.tokens)
    Range(0, own.tokens, above=True).check("flag --sampled", own.sampled)
    if own.hardware and own.topology:
        raise InputError("flags --hardware and --topology name two machines; expected one of them")
    given = command_line(own, overrides)
    check_numbers(given.config)

    # From here on JAX is needed: mistakes above are reported before the seconds that it takes.
    if own.hardware:
        platform.prepare_once()  # the machine that plans is the one that runs
    from ssp_jax.plan import planner

    if own.hardware:
        return planner.show_this_machine(given.config)
    return planner.show(
        given.config, own.topology, shapes=own.shapes, tokens=own.tokens, sampled=own.sampled
    )


def _parser(prog: str) -> command.Parser:
    parser = command.Parser(prog=prog, description=__doc__, find=find_keys)
    topology = (
        "v5e:4x4, v6e-8 (a host of 8 chips), v5p:2x2x2, tpu7x:2x2x1, gpu:h100x8, ...; without it: "
        "the smallest slice of each TPU generation and number of each GPU that fits, from shapes"
    )
    hardware = "keys with which the config fits on this machine, from shapes"
    parser.add_argument("--hardware", choices=("this",), help=hardware)
    shapes = "no compiler: estimates from shapes alone, in a second"
    parser.add_argument("--topology", metavar="CHIPS", help=topology)
    parser.add_argument("--shapes", action="store_true", help=shapes)
    tokens = "tokens of a mean episode (3000)"
    parser.add_argument("--tokens", default=3000, type=int, metavar="N", help=tokens)
    sampled = "of these, written by the model (1000)"
    parser.add_argument("--sampled", default=1000, type=int, metavar="N", help=sampled)
    add_flags(parser)
    return parser


if __name__ == "__main__":
    signals.leave(main())
