"""Does a config fit on hardware that you don't have, and how long must a step take there at least?

    python -m ssp_jax.plan --config=configs/qwen7b.py --topology=v5p:2x2x2 [--config.KEY=VALUE ...]

--topology   v5e:4x4, v6e-8 (a host of 8 chips), v5p:2x2x2, tpu7x:2x2x1, gpu:h100x8, ...; without
             it: the smallest slice of each TPU generation and number of each GPU that fits, from
             shapes alone
--shapes     no compiler: estimates from shapes alone, in a second
--tokens     tokens of a mean episode (3000), of which the model writes --sampled (1000)

The run's programs are compiled ahead of time by the hardware's own compiler, which needs a CPU only
and reports the memory that they take: for TPUs pip install '.[plan]', for GPUs '.[plan-gpu]'.
Without it temporaries are estimates.
"""

import sys
from typing import Any

from absl import flags

from ssp_jax.config import BOUNDS, Range, check_numbers, parse_command_line
from ssp_jax.runtime.command import parse_known_flags, run_command


def main(argv: list[str]) -> int:
    return run_command(_run, argv, help=__doc__ or "")


def _run(argv: list[str]) -> int:
    own, rest = _parse(argv)
    config = parse_command_line(rest).config
    check_numbers(config)
    # Imported here, so that mistakes above are reported before the seconds that JAX takes to load.
    from ssp_jax.plan import planner

    return planner.show(
        config, own.topology, shapes=own.shapes, tokens=own.tokens, sampled=own.sampled
    )


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    """This command's own flags, and the rest, which is ssp_jax.main's."""
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "chips", flag_values=values)
    flags.DEFINE_bool("shapes", False, "do not compile", flag_values=values)
    flags.DEFINE_integer("tokens", 3000, "of a mean episode", flag_values=values)
    flags.DEFINE_integer("sampled", 1000, "of these, written by the model", flag_values=values)
    rest = parse_known_flags(values, argv)
    BOUNDS["engine.cache_tokens"].check("flag --tokens", values.tokens)
    Range(0, values.tokens, above=True).check("flag --sampled", values.sampled)
    return values, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv))
