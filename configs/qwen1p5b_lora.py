"""Qwen2.5-1.5B-Instruct on the paper's data with LoRA, on one chip of 16 GB.

command    python -m ssp_jax.main --config=configs/qwen1p5b_lora.py --workdir=runs/qwen1p5b_lora
hardware   v5e:1x1
memory     v5e:1x1  14 GiB playing, 8 updating of 16, from shapes
time       not measured
score      not measured; not in the paper
"""

from ml_collections import ConfigDict

from configs import qwen7b_lora


def get_config() -> ConfigDict:
    c = qwen7b_lora.get_config()
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.model.remat = "attention"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.prompt.tell_repeats = True

    c.engine.slots = 64
    c.engine.extend_rows = 1
    c.engine.extend_buckets = (64, 256, 1024)
    return c.lock()
