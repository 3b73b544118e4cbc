"""Qwen2.5-1.5B-Instruct with the paper's data.

command    python -m ssp_jax.main --config=configs/qwen1p5b.py --workdir=runs/qwen1p5b
hardware   1 x H100 80 GB
memory     47 GB a device while playing, 39 GB while updating, plus temporaries (estimate)
time       not measured
score      not measured; not in the paper

The estimate's formula stands in configs/qwen7b.py; here P = 1.54e9, n = 1 and 28,672 bytes a token.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.prompt.worked_example = True

    c.engine.slots = 32
    c.learner.rows = 1
    return c.lock()
