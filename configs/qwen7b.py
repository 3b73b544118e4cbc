"""Qwen2.5-7B-Instruct on the paper's data: the setting of its ablations.

Other configs of the paper's size start here.

command    python -m ssp_jax.main --config=configs/qwen7b.py --workdir=runs/qwen7b
hardware   8 x H100 80 GB, v5p:2x2x2 or v6e:4x4
memory     gpu:h100x8  51 GiB playing, 57 updating of 73, compiled
           v5p:2x2x2   50 GiB playing, 61 updating of 96, compiled
           v6e:4x4     28 GiB playing, 18 updating of 31, from shapes; with
                       --config.mesh.tensor=2 --config.model.remat=attention
time       not measured; the paper reports 83.4 s a step, 4.6 hours for 200 steps, on hardware
           that it does not name
score      average of seven sets, pass@1 by a judge: 41.5 before, 49.5 after (paper, Table 1);
           ours not measured

Files under data/ are those of the Hugging Face data set Quark-LLM/SSP and Search-R1's corpus of
Wikipedia 2018.

memory: of a device, as `python -m ssp_jax.plan --config=configs/qwen7b.py --topology=...` prints
it, for each kind of hardware. The cache of keys and values takes free memory, up to the longest
episode in all slots. `from shapes` estimates temporaries, `compiled` has them from the hardware's
own compiler.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.model.path = "Qwen/Qwen2.5-7B-Instruct"
    # Computes least twice of those whose update leaves a tenth of an H100 free.
    c.model.remat = "dots"

    c.data.answers = "data/ssp/train_answers_random_hop_50000_proposer.jsonl"
    with c.unlocked():
        c.data.eval_sets.ssp = "data/ssp/test.jsonl"  # 3,125 questions of seven sets
    c.retriever.corpus = "data/wiki-18.jsonl"
    c.retriever.index = "data/wiki-18.index"  # some 30 GB, so not one in each workdir

    c.engine.slots = 256
    # Scores of a prefill are float32 numbers, one for each head, query and key: 4 GiB a row for
    # these, and a device has one or two of these rows.
    c.engine.extend_rows = 4
    c.engine.extend_buckets = (64, 256, 1024, 2048)
    # 5 in [C], where the 3,125 questions would take two fifths of the time of play
    c.eval.every = 20
    return c.lock()
