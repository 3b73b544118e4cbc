"""Qwen2.5-1.5B-Instruct with the paper's data.

command    python -m ssp_jax.main --config=configs/qwen1p5b.py --workdir=runs/qwen1p5b
hardware   1 x H100 80 GB
memory     gpu:h100x1  40 GiB playing, 48 updating of 73, from shapes
time       not measured
score      not measured; not in the paper
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.prompt.tell_repeats = True

    c.engine.slots = 32
    c.learner.rows = 1
    return c.lock()
