"""Qwen2.5-7B-Base with the paper's own retriever and judge: the largest gain of its Table 1.

command    python -m ssp_jax.main --config=configs/paper_7b_base.py --workdir=runs/paper_7b_base
           --config.judge.url=http://HOST:PORT/v1
hardware   8 x H100 80 GB, and a server of Qwen2.5-32B-Instruct
memory     gpu:h100x8  56 GiB playing, 68 updating of 73, from shapes; with
                       --config.judge.url=http://HOST:PORT/v1
time       not measured; the paper reports 83.4 s a step, 4.6 hours for 200 steps, on hardware
           that it does not name
score      average of seven sets, pass@1 by a judge: 22.3 before, 48.7 after (paper, Table 1);
           ours not measured
"""

from ml_collections import ConfigDict

from configs import paper_7b, qwen7b_base


def get_config() -> ConfigDict:
    c = paper_7b.get_config()
    c.model.path = qwen7b_base.get_config().model.path
    return c.lock()
