"""Qwen2.5-7B-Base, the paper's largest gain.

command    python -m ssp_jax.main --config=configs/qwen7b_base.py --workdir=runs/qwen7b_base
hardware   8 x H100 80 GB
memory     gpu:h100x8  51 GiB playing, 64 updating of 73, from shapes
time       not measured; the paper reports 83.4 s a step, 4.6 hours for 200 steps, on hardware
           that it does not name
score      average of seven sets, pass@1 by a judge: 22.3 before, 48.7 after (paper, Table 1);
           ours not measured

The tokenizer of the base model has the same chat template, and the paper uses the same prompts.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-7B"
    return c.lock()
