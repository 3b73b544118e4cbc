"""Qwen2.5-0.5B-Instruct with the paper's data, on one device.

command    python -m ssp_jax.main --config=configs/qwen0p5b.py --workdir=runs/qwen0p5b
hardware   1 x H100 80 GB
memory     gpu:h100x1  28 GiB playing, 20 updating of 73, from shapes
time       not measured
score      not measured; not in the paper
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.prompt.tell_repeats = True

    # The usual reward is 1 for a question that nobody solves: of a small model's those are the
    # ambiguous ones. This is highest where half of the attempts are right, and 0 at both ends.
    c.reward.proposer = "intermediate"
    # With few verified questions the pool would replay the same ones many times in a step.
    c.game.pool_reuse = 1

    c.engine.slots = 96
    c.learner.rows = 1
    return c.lock()
