"""Qwen2.5-7B-Instruct on the paper's data: the setting of its ablations. Other paper-scale configs start here.

command    python -m ssp_jax.main --config=configs/qwen7b.py --workdir=runs/qwen7b
hardware   8 x H100 80 GB
memory     57 GB a device while playing, 31 GB while updating, plus temporaries (estimate)
time       not measured; the paper reports 83.4 s a step, 4.6 hours for 200 steps, on hardware it does not name
score      average of seven sets, pass@1 by a judge: 41.5 before, 49.5 after (paper, Table 1); ours not measured

Files under data/ are those of the Hugging Face data set Quark-LLM/SSP and Search-R1's corpus of Wikipedia 2018.

The estimate, per device, for P parameters on n devices, of which t share a copy of the sampler: float32 master weights
and Adam moments 12 P / n, bfloat16 reference 2 P / n, then while playing the sampler's copy 2 P / t and twice the
key/value cache (a decode chunk may hold a second one), while updating the gradients 4 P / n and the cache once. Here
P = 7.62e9, n = 8, t = 1, and the cache holds 160 / 8 slots of 12,288 tokens of 57,344 bytes.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.model.path = "Qwen/Qwen2.5-7B-Instruct"

    c.data.answers = "data/ssp/train_answers_random_hop_50000_proposer.jsonl"
    with c.unlocked():
        c.data.eval_sets.ssp = "data/ssp/test.jsonl"  # 3,125 questions of seven sets
    c.retriever.corpus = "data/wiki-18.jsonl"
    c.retriever.index = "data/wiki-18.index"  # some 25 GB (estimate), so not one in each workdir

    c.engine.slots = 160
    c.eval.every = 20  # 5 in [C], where the 3,125 questions would take two fifths of the time of play
    return c.lock()
