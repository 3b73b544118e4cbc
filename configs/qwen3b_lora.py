"""Qwen2.5-3B-Instruct on the paper's data with LoRA, on one GPU of 24 GB.

command    python -m ssp_jax.main --config=configs/qwen3b_lora.py --workdir=runs/qwen3b_lora
hardware   1 x L4 24 GB
memory     gpu:l4x1  19 GiB playing, 13 updating of 20, from shapes
time       not measured
score      not measured; not in the paper
"""

from ml_collections import ConfigDict

from configs import qwen7b_lora


def get_config() -> ConfigDict:
    c = qwen7b_lora.get_config()
    c.model.path = "Qwen/Qwen2.5-3B-Instruct"
    c.model.remat = "attention"

    c.engine.slots = 64
    c.engine.extend_rows = 1
    c.engine.extend_buckets = (64, 256, 1024)
    return c.lock()
