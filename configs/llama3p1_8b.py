"""Llama-3.1-8B with the paper's data.

command    python -m ssp_jax.main --config=configs/llama3p1_8b.py --workdir=runs/llama3p1_8b
hardware   8 x H100 80 GB
memory     gpu:h100x8  44 GiB playing, 65 updating of 73, from shapes
time       not measured
score      average of seven sets, pass@1 by a judge: 36.7 before, 46.3 after (paper, Table 1);
           ours not measured

The paper writes LLaMA-3.1-8B. The base release has no chat template, so this is the instruct one.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"

    c.engine.slots = 64
    return c.lock()
