"""Qwen2.5-32B-Instruct with the paper's data.

command    python -m ssp_jax.main --config=configs/qwen32b.py --workdir=runs/qwen32b
hardware   32 x H100 80 GB (4 hosts of 8), v5p:4x4x2 or v6e:8x8
memory     gpu:h100x32 54 GiB playing, 31 updating of 73, from shapes
           v5p:4x4x2   55 GiB playing, 69 updating of 96, from shapes; with
                       --config.model.remat=dots
           v6e:8x8     30 GiB playing, 22 updating of 31, from shapes; with
                       --config.learner.rows=16 --config.learner.offload_reference=True
time       not measured
score      average of seven sets, pass@1 by a judge: 55.1 before, 58.5 after (paper, Table 1);
           ours not measured

The paper's seven values after SSP average 59.1; it prints 58.5.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "Qwen/Qwen2.5-32B-Instruct"
    # From shapes `dots` takes 69 GiB of an H100.
    c.model.remat = "attention"
    c.mesh.tensor = 4  # inside one host of a TPU

    c.engine.extend_rows = 2
    return c.lock()
