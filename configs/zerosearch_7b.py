"""ZeroSearch 7B, trained on simulated searches, goes on with SSP.

command    python -m ssp_jax.main --config=configs/zerosearch_7b.py --workdir=runs/zerosearch_7b
hardware   8 x H100 80 GB
memory     57 GB a device while playing, 31 GB while updating, plus temporaries (estimate)
time       not measured
score      average of seven sets, pass@1 by a judge: 43.6 before, 45.9 after (paper, Table 1); ours not measured

Memory is that of configs/qwen7b.py.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Alibaba-NLP/ZeroSearch_wiki_V2_Qwen2.5_7B"
    return c.lock()
