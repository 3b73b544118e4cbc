"""A pretrained model for two cores: SmolLM2-135M-Instruct on real text, shown the game first.

command    python -m ssp_jax.main --config=configs/vital_135m.py
hardware   any CPU; made for 2 cores
memory     about 6 GiB
time       20 minutes for the 60 steps of the warm start, then 110 to 190 s a step, and 3 minutes an
           evaluation of 80 questions; all beside other work
score      not measured with these games; docs/warm_start.md has warm starts from similar ones,
           and docs/log.md what first steps of self-play were like

Before it, games of scripted players teach the form (docs/warm_start.md), and give self-play answers
to which a search leads. Games and answers are about countries, and about none that the question
sets have in an answer or name; nor do they ask for what these ask for, but which country something
belongs to.

    python assets/vital/build.py
    python -m ssp_jax.warm_start script --corpus=data/vital/corpus.jsonl.gz --index=runs/index \\
        --out=runs/games.jsonl --games=400 --kinds=country --style=brief --top_k=1 --noise=1 \\
        --without=data/vital/qa/dev_1hop.jsonl --without=data/vital/qa/dev_2hop.jsonl
    python -m ssp_jax.warm_start script --index=runs/index --out=runs/more_games.jsonl \\
        --answers=runs/answers.jsonl --seed=1 --games=500 --kinds=country --style=brief --top_k=1 \\
        --noise=1 --without=data/vital/qa/dev_1hop.jsonl --without=data/vital/qa/dev_2hop.jsonl
    python -m ssp_jax.warm_start --config=configs/vital_135m.py --episodes=runs/games.jsonl \\
        --model=models/smollm2-135m-instruct --out=runs/warm
    python -m ssp_jax.main --config=configs/vital_135m.py --config.model.adapter=runs/warm/export

The passages are Wikipedia leads and the World Factbook, the model is SmolLM2-135M-Instruct. Neither
is part of this repository.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 60
    c.model.path = "models/smollm2-135m-instruct"
    c.model.dtype = "float32"
    c.model.remat = "none"
    # The adapter of both stages is small enough to hand on.
    c.lora.rank = 8
    c.mesh.fsdp = 1

    c.data.answers = "runs/answers.jsonl"
    with c.unlocked():
        c.data.eval_sets.one_hop = "data/vital/qa/dev_1hop.jsonl"
        c.data.eval_sets.two_hop = "data/vital/qa/dev_2hop.jsonl"
    c.retriever.corpus = "data/vital/corpus.jsonl.gz"
    c.retriever.index = "runs/index"
    c.retriever.top_k = 1
    c.prompt.style = "brief"
    c.prompt.tell_repeats = True

    c.game.answers_per_step = 8
    c.game.noise_documents = 1
    c.game.pool_reuse = 1
    c.rules.distinct_searches = True
    c.reward.metric = "cover_em"
    # The usual reward is 1 for a question that nobody solves: of a small model's those are the
    # ambiguous ones.
    c.reward.proposer = "intermediate"

    # Of all weights, 5e-5 without KL moved the share of second searches from 35 to 100 % in four
    # updates of a trial, of one-hop questions too, and roles that earn nothing drifted.
    c.learner.learning_rate = 2e-4
    c.learner.kl_coef = 0.03
    c.learner.proposer_baseline = "batch_mean"
    c.learner.solver_mini_batches = 1
    c.learner.drop_no_advantage = True

    c.limits.prompt_tokens = 128
    c.limits.verify_prompt_tokens = 512
    c.limits.response_tokens = 512
    c.limits.turn_tokens = 96
    c.limits.turns = 6
    c.limits.searches = 5
    c.limits.observation_tokens = 80

    # A decode step reads all weights: of 16 slots it takes 1.27 times as long as of 8.
    c.engine.slots = 16
    c.engine.extend_rows = 1
    c.engine.cache_tokens = 640
    c.engine.cache_buckets = (256,)
    c.engine.row_shares = ()
    c.engine.extend_buckets = (32, 96, 128, 256, 384, 512)

    c.learner.rows = 1
    c.learner.row_tokens = 640
    c.learner.logprob_chunk = 128

    c.warm_start.learning_rate = 1e-3
    c.warm_start.episodes_per_step = 6
    c.warm_start.steps = 60
    c.warm_start.stop_loss = 0.1
    c.warm_start.held_out = 0.03
    c.warm_start.look_every = 20
    c.warm_start.form_prompts = 8

    c.eval.every = 20
    c.eval.max_questions = 50
    c.checkpoint.every = 2
    return c.lock()
