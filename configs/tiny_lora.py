"""The whole game on a laptop with LoRA; otherwise configs/tiny.py.

command    python -m ssp_jax.main --config=configs/tiny_lora.py
hardware   any CPU
time       not measured
memory     not measured
score      not measured; docs/lora.md has a place for it beside full fine-tuning
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.lora.rank = 16
    # Ten times that of full fine-tuning.
    c.learner.learning_rate = 3e-3
    return c.lock()
