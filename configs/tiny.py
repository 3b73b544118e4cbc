"""The whole game on a laptop, from what ships in assets/tiny. `make demo` runs it.

command    make demo, or python -m ssp_jax.main --config=configs/tiny.py
hardware   any CPU; measured on 2 cores of an AMD EPYC server
time       3.7 minutes of self-play (measured), and half a minute of evaluation and compiling
memory     1.2 GB (peak, measured)
score      exact match, average of the two held-out sets: 28.8 before, 50.8 after (seed 0,
           measured); README has other seeds
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 40

    c.model.path = "assets/tiny/model"
    c.model.dtype = "float32"
    c.mesh.fsdp = 1

    c.data.answers = "assets/tiny/answers.jsonl"
    with c.unlocked():
        c.data.eval_sets.one_hop = "assets/tiny/qa/one_hop.jsonl"
        c.data.eval_sets.two_hop = "assets/tiny/qa/two_hop.jsonl"
    c.retriever.corpus = "assets/tiny/corpus.jsonl"
    c.prompt.style = "brief"

    c.game.answers_per_step = 20
    c.limits.prompt_tokens = 64
    c.limits.verify_prompt_tokens = 400
    c.limits.response_tokens = 320
    c.limits.turn_tokens = 40
    c.limits.turns = 5
    c.limits.searches = 4
    c.limits.observation_tokens = 120

    # At 1.0 a model of this size writes too many stray tokens into the names that it copies.
    c.sampling.temperature = 0.8

    # A step has 56 episodes with turns of about 10 tokens: more slots or longer chunks would mostly
    # wait, and a CPU computes two rows in twice the time of one (measured).
    c.engine.slots = 8
    c.engine.chunk = 1
    c.engine.extend_rows = 1
    c.engine.cache_tokens = 448
    c.engine.cache_buckets = (256,)
    c.engine.row_shares = ()
    c.engine.extend_buckets = (32, 64, 128, 256, 448)

    c.learner.learning_rate = 3e-4
    c.learner.solver_mini_batches = 1
    c.learner.row_tokens = 384
    c.learner.logprob_chunk = 128

    c.checkpoint.every = 10
    return c.lock()
