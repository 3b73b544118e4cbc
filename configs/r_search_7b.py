"""R-Search 7B goes on with SSP, in its own tags.

command    python -m ssp_jax.main --config=configs/r_search_7b.py --workdir=runs/r_search_7b
hardware   8 x H100 80 GB
memory     gpu:h100x8  51 GiB playing, 64 updating of 73, from shapes; with
                       --config.model.path=Qwen/Qwen2.5-7B
time       not measured
score      average of seven sets, pass@1 by a judge: 52.8 before, 54.6 after (paper, Table 1);
           ours not measured

The paper names the checkpoint R-Search-7b-grpo without its owner.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "qingfei1/R-Search-7b-grpo"

    # observation and original_evidence; the question alone is the user turn
    c.prompt.style = "r_search"
    return c.lock()
