"""Search-R1 7B, trained to search by PPO, goes on with SSP.

command    python -m ssp_jax.main --config=configs/search_r1_7b.py --workdir=runs/search_r1_7b
hardware   8 x H100 80 GB
memory     gpu:h100x8  51 GiB playing, 64 updating of 73, from shapes
time       not measured
score      average of seven sets, pass@1 by a judge: 53.9 before, 55.7 after (paper, Table 1);
           ours not measured

The hub writes 2.5 and v0.2 where the paper writes 2p5 and v0p2.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo-v0.2"
    return c.lock()
