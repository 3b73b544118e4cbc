"""Qwen2.5-3B-Instruct with the paper's data.

command    python -m ssp_jax.main --config=configs/qwen3b.py --workdir=runs/qwen3b
hardware   4 x H100 80 GB
memory     gpu:h100x4  28 GiB playing, 46 updating of 73, from shapes
time       not measured
score      not measured; not in the paper
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-3B-Instruct"

    c.engine.slots = 96
    c.learner.rows = 4
    return c.lock()
