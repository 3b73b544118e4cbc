"""Qwen2.5-0.5B-Instruct, all weights, on one chip of 16 GB: a v5e, or a T4 of Colab or Kaggle.

command    python -m ssp_jax.main --config=configs/qwen0p5b_16gb.py --workdir=runs/qwen0p5b_16gb
hardware   1 x T4 16 GB with keys of its own, or v5e:1x1
memory     v5e:1x1     13 GiB playing, 13 updating of 16, from shapes
           gpu:t4x1    12 GiB playing, 11 updating of 13, from shapes; with
           --config.model.dtype=float32 --config.learner.offload_reference=True
           --config.learner.momentum_dtype=bfloat16 --config.model.remat=attention
time       not measured; by plan at least 19 s a step on the v5e and 454 s on the T4, of 448
           episodes of 1,500 tokens, 500 of them sampled
score      not measured; not in the paper

A T4 has no matrix units for bfloat16, and this project's attention kernel is for later GPUs. So it
takes float32, in which XLA would compute anyway, attention of XLA, which model.attention=auto
chooses, and what makes room: the reference in host memory, Adam's first moment in bfloat16, and
more that is computed twice. With game.answers_per_step=16 a step takes a fourth of the time.

The paper's corpus has an index of 30 GB. notebooks/demo.ipynb runs this config on the demo's
corpus, and docs/own_data.md says how it runs on yours.
"""

from ml_collections import ConfigDict

from configs import qwen0p5b


def get_config() -> ConfigDict:
    c = qwen0p5b.get_config()
    c.game.answers_per_step = 64
    # Three passages of 100 words are some 450 tokens in English.
    c.limits.prompt_tokens = 640
    c.limits.verify_prompt_tokens = 3072
    c.limits.response_tokens = 2816
    c.limits.turn_tokens = 384
    c.limits.turns = 6
    c.limits.searches = 5
    c.limits.observation_tokens = 768

    c.engine.slots = 128
    c.engine.cache_tokens = 3584
    c.engine.cache_buckets = (1024, 2048)
    c.engine.extend_rows = 1
    c.engine.extend_buckets = (256, 1024)

    c.learner.row_tokens = 3584
    return c.lock()
