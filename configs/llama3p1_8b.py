"""Llama-3.1-8B with the paper's data.

command    python -m ssp_jax.main --config=configs/llama3p1_8b.py --workdir=runs/llama3p1_8b
hardware   8 x H100 80 GB
memory     56 GB a device while playing, 31 GB while updating, plus temporaries (estimate)
time       not measured
score      average of seven sets, pass@1 by a judge: 36.7 before, 46.3 after (paper, Table 1); ours not measured

The paper writes LLaMA-3.1-8B. The base release has no chat template, so this is the instruct one.

The estimate's formula stands in configs/qwen7b.py; here P = 8.03e9 and 131,072 bytes a token.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"

    c.engine.slots = 64
    return c.lock()
