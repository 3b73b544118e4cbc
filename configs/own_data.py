"""A template for your own passages: Qwen2.5-1.5B-Instruct with LoRA, on one GPU of 24 GB.

command    python -m ssp_jax.main --config=configs/own_data.py --workdir=runs/own
hardware   1 x L4 24 GB; python -m ssp_jax.plan --config=configs/own_data.py --hardware=this
           prints the keys for the machine that you have, a CPU included
memory     gpu:l4x1    11 GiB playing, 5 updating of 20, from shapes
time       not measured
score      not measured; your own questions say it, as data.eval_sets.mine

    python -m ssp_jax.answers --corpus=own/passages --out=own/answers.jsonl

comes first, and gives the answers that questions are written for: docs/own_data.md.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 50

    # A folder of .txt and .md files, or a .jsonl file with a passage a row.
    c.retriever.corpus = "own/passages"
    c.data.answers = "own/answers.jsonl"
    # With questions of your own, even 50 of them, a run says what it gains:
    # with c.unlocked():
    #     c.data.eval_sets.mine = "own/questions.jsonl"
    # Passages in another language than English: retriever.stemmer and stopwords, docs/retrieval.md.

    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.lora.rank = 32
    c.learner.learning_rate = 1e-5
    c.learner.warmup_steps = 15

    c.game.answers_per_step = 64
    # Three passages of 100 words are some 450 tokens in English.
    c.limits.prompt_tokens = 640
    c.limits.verify_prompt_tokens = 3072
    c.limits.response_tokens = 2816
    c.limits.turn_tokens = 384
    c.limits.turns = 6
    c.limits.searches = 5
    c.limits.observation_tokens = 768

    c.engine.cache_tokens = 3584
    c.engine.cache_buckets = (1024, 2048)
    c.engine.extend_buckets = (256, 1024)

    c.learner.rows = 1
    c.learner.row_tokens = 3584
    return c.lock()
