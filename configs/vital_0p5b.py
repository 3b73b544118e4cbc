"""Real text, a real model: Qwen2.5-Coder-0.5B-Instruct on 31,677 passages.

command    python -m ssp_jax.main --config=configs/vital_0p5b.py --workdir=runs/vital_0p5b
hardware   1 x H100 80 GB, or a CPU for single steps (below)
memory     gpu:h100x1  14 GiB playing, 17 updating of 73, from shapes
time       not measured
score      not measured on these sets; greedy with one long example shown the plain model answers
           4 of 8 one-hop and 3 of 8 two-hop questions (a small trial, not the whole sets)

The passages are Wikipedia leads and the World Factbook. `python assets/vital/build.py` makes them
and questions, `python -m ssp_jax.answers` a list of answers; the model is expected as models/...
here, or anywhere else by --config.model.path=... Each prompt shows two worked examples; without any
this model almost never uses a tag.

One step on a CPU, 16 answers x 4 solver episodes, in float32 and without the reference model.
Measured on 2 cores of an AMD EPYC server, with one long example in place of two short ones: 299 s
(play 198 s, 14.5 sampled and 72 written tokens/s; update 99 s), peak 16.4 GiB; 7 of 16 questions
well-formed, 2 verified, of whose 8 solver episodes 2 were right; log-probs of sampler and trainer
1.3e-6 apart (mean). Before the example said plainly which answer it leads to, none of 56 proposals
was verified. With the two short ones, 8 answers and turns of 80 tokens: no name of an example in
any episode, but 6 of 8 proposals were cut at the end of a turn, one was well-formed and none
verified, so turns have 128 tokens below, which was not measured.

    python -m ssp_jax.main --config=configs/vital_0p5b.py --workdir=runs/vital_cpu \\
        --config.steps=1 --config.game.answers_per_step=16 --config.game.group_size=4 \\
        --config.game.noise_documents=2 --config.reward.metric=cover_em \\
        --config.sampling.temperature=0.4 --config.retriever.top_k=1 \\
        --config.model.dtype=float32 --config.learner.kl_coef=0 \\
        --config.learner.solver_mini_batches=1 --config.learner.rows=1 \\
        --config.learner.row_tokens=1152 --config.learner.logprob_chunk=128 \\
        --config.learner.drop_no_advantage=True --config.limits.response_tokens=512 \\
        --config.limits.turn_tokens=128 --config.limits.observation_tokens=128 \\
        --config.limits.verify_prompt_tokens=1024 --config.engine.slots=8 \\
        --config.engine.cache_tokens=1152 --config.engine.cache_buckets='()' \\
        --config.engine.extend_buckets='(128, 512)' --config.engine.extend_rows=1 \\
        --noconfig.eval.before --noconfig.eval.after --config.checkpoint.export=none \\
        --config.log.episodes_every=1
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.model.path = "models/qwen2.5-coder-0.5b-instruct"

    c.data.answers = "data/vital/answers.jsonl"
    with c.unlocked():
        c.data.eval_sets.one_hop = "data/vital/qa/dev_1hop.jsonl"
        c.data.eval_sets.two_hop = "data/vital/qa/dev_2hop.jsonl"
    c.retriever.corpus = "data/vital/corpus.jsonl.gz"
    c.prompt.style = "short"
    c.prompt.worked_examples = 2
    c.prompt.tell_repeats = True

    # The usual reward is 1 for a question that nobody solves: of a small model's those are the
    # ambiguous ones. This is highest where half of the attempts are right, and 0 at both ends.
    c.reward.proposer = "intermediate"
    # With few verified questions the pool would replay the same ones many times in a step.
    c.game.pool_reuse = 1

    c.game.answers_per_step = 64
    # Leads are short: three passages are some 270 tokens. A proposer's prompt with its worked
    # examples has up to 510.
    c.limits.prompt_tokens = 640
    c.limits.verify_prompt_tokens = 3072
    c.limits.response_tokens = 1920
    c.limits.turn_tokens = 256
    c.limits.turns = 6
    c.limits.searches = 5
    c.limits.observation_tokens = 512

    c.engine.slots = 128
    c.engine.cache_tokens = 3328
    c.engine.cache_buckets = (1024, 2048)
    c.engine.extend_buckets = (256, 1024)

    c.learner.row_tokens = 2560
    return c.lock()
