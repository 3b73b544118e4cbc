"""SmolLM2-135M-Instruct: real weights of another family, small enough to try every part of a run.

command    python -m ssp_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
hardware   1 x L4 24 GB
memory     gpu:l4x1    10 GiB playing, 6 updating of 20, from shapes
time       not measured
score      not measured; plain, this model does not follow the tags at all
"""

from ml_collections import ConfigDict

from configs import qwen7b


def get_config() -> ConfigDict:
    c = qwen7b.get_config()
    c.model.path = "models/smollm2-135m-instruct"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.prompt.tell_repeats = True

    # The usual reward is 1 for a question that nobody solves: of a small model's those are the
    # ambiguous ones. This is highest where half of the attempts are right, and 0 at both ends.
    c.reward.proposer = "intermediate"
    # With few verified questions the pool would replay the same ones many times in a step.
    c.game.pool_reuse = 1

    # The model was trained on at most 8,192 tokens.
    c.limits.prompt_tokens = 2048
    c.limits.verify_prompt_tokens = 6144
    c.limits.response_tokens = 6144
    c.limits.verify_response_tokens = 2048

    c.engine.slots = 32
    c.engine.cache_tokens = 8192
    c.learner.rows = 1
    c.learner.row_tokens = 8192
    return c.lock()
