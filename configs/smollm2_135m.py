"""SmolLM2-135M-Instruct: real weights of another family, small enough to try every part of a run.

command    python -m ssp_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
hardware   1 x GPU 24 GB
memory     14 GB a device while playing, 8 GB while updating, plus temporaries (estimate)
time       not measured
score      not measured; plain, this model does not follow the tags at all

The estimate's formula stands in configs/qwen7b.py; here P = 1.35e8, n = 1 and 8,192 tokens of 23,040 bytes a slot.
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "models/smollm2-135m-instruct"
    c.prompt.worked_example = True

    # The model was trained on at most 8,192 tokens.
    c.limits.prompt_tokens = 2048
    c.limits.verify_prompt_tokens = 6144
    c.limits.response_tokens = 6144

    c.engine.slots = 32
    c.engine.cache_tokens = 8192
    c.learner.rows = 1
    c.learner.row_tokens = 8192
    return c.lock()
