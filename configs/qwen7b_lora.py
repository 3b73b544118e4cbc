"""Qwen2.5-7B-Instruct on the paper's data with LoRA, on one GPU or one TPU host.

Other configs with LoRA start here.

command    python -m ssp_jax.main --config=configs/qwen7b_lora.py --workdir=runs/qwen7b_lora
hardware   1 x H100 80 GB, v5e:2x4 or v6e:2x4
memory     gpu:h100x1  67 GiB playing, 53 updating of 73, compiled
           v5e:2x4     15 GiB playing, 7 updating of 16, from shapes; with
                       --config.mesh.tensor=4 --config.learner.rows=2
                       --config.model.remat=attention
           v6e:2x4     22 GiB playing, 18 updating of 31, from shapes; with
                       --config.mesh.tensor=4 --config.learner.rows=2
time       not measured
score      not measured; not in the paper

memory: as in configs/qwen7b.py. Temporaries on the H100: prefill 6.0, decode 0.4, moving the base
3.5, scores 2.1, gradients 37.2 GiB.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.lora.rank = 32

    # On one H100, 125 of these can grow beyond 1,024 tokens, and 34 beyond 4,096.
    c.engine.slots = 192
    c.engine.extend_rows = 2

    # Ten times that of full fine-tuning, as for supervised and reinforcement learning in "LoRA
    # Without Regret" (Thinking Machines, 2025). Tinker's recipe of Search-R1 has 4e-5.
    c.learner.learning_rate = 1e-5
    # B starts at 0, so that only B moves at first: the first five steps of self-play [H].
    c.learner.warmup_steps = 15
    c.learner.rows = 1
    return c.lock()
