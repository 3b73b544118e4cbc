"""Qwen2.5-14B-Instruct with the paper's data.

command    python -m ssp_jax.main --config=configs/qwen14b.py --workdir=runs/qwen14b
hardware   8 x H100 80 GB, v5p:2x2x2 or v6e:4x8
memory     gpu:h100x8  68 GiB playing, 52 updating of 73, compiled
           v5p:2x2x2   86 GiB playing, 78 updating of 96, from shapes; with
                       --config.model.remat=dots
           v6e:4x8     29 GiB playing, 19 updating of 31, from shapes; with
                       --config.mesh.tensor=4 --config.learner.rows=8
time       not measured
score      average of seven sets, pass@1 by a judge: 54.8 before, 56.9 after (paper, Table 1);
           ours not measured

memory: on the H100 the update's peak is the optimizer step. Its gradients take 47 GiB, from shapes.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-14B-Instruct"
    # On 8 x H100 `dots` does not fit.
    c.model.remat = "attention"
    c.mesh.tensor = 2

    c.engine.slots = 192
    c.engine.extend_rows = 2
    c.learner.rows = 4
    return c.lock()
