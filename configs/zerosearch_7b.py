"""ZeroSearch 7B, trained on simulated searches, goes on with SSP.

command    python -m ssp_jax.main --config=configs/zerosearch_7b.py --workdir=runs/zerosearch_7b
hardware   8 x H100 80 GB
memory     gpu:h100x8  51 GiB playing, 64 updating of 73, from shapes
time       not measured
score      average of seven sets, pass@1 by a judge: 43.6 before, 45.9 after (paper, Table 1);
           ours not measured
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Alibaba-NLP/ZeroSearch_wiki_V2_Qwen2.5_7B"
    return c.lock()
