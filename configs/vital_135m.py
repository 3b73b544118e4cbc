"""A pretrained model for two cores: SmolLM2-135M-Instruct on real text, shown the game first.

command    python -m ssp_jax.main --config=configs/vital_135m.py
hardware   any CPU; made for 2 cores
memory     about 6 GiB
time       36 and 12 minutes for the two warm starts, then 104 to 242 s a step, and 2 to 3 minutes
           an evaluation of 100 questions, alone on 2 cores of an AMD EPYC server
score      exact match of 2 x 50 questions: 44 before, 73 after 12 steps (one hop 84 to 74, two hops
           4 to 72), seed 0; 60 steps were not run

Before it, games of scripted players teach the form (docs/warm_start.md): first of all fields, then
of six, which this model learns to ask for without mistaking one for another. The third command of
these gives self-play answers to which a search leads. Games and answers are about countries, and
about none that the question sets have in an answer or name; nor do they ask for what these ask for,
but which country something belongs to. docs/results.md has a run.

    python assets/vital/build.py
    FEW="--fields=lowest point,currency,independence,national holiday,legislature name,\\
    local short form"
    HOW="--index=runs/index --kinds=country --style=brief --top_k=1 --noise=1 \\
        --without=data/vital/qa/dev_1hop.jsonl --without=data/vital/qa/dev_2hop.jsonl"
    python -m ssp_jax.warm_start script --corpus=data/vital/corpus.jsonl.gz $HOW \\
        --games=600 --out=runs/games.jsonl
    python -m ssp_jax.warm_start script $HOW "$FEW" --seed=2 --games=500 --one_hop_fields=0.3 \\
        --out=runs/few.jsonl
    python -m ssp_jax.warm_start script $HOW "$FEW" --seed=1 --games=500 --one_hop=0.4 \\
        --one_hop_fields=0 --out=runs/more_games.jsonl --answers=runs/answers.jsonl
    python -m ssp_jax.warm_start --config=configs/vital_135m.py --episodes=runs/games.jsonl \\
        --model=models/smollm2-135m-instruct --out=runs/warm --config.warm_start.steps=170
    python -m ssp_jax.warm_start --config=configs/vital_135m.py --episodes=runs/few.jsonl \\
        --model=models/smollm2-135m-instruct --config.model.adapter=runs/warm/export --out=runs/few
    python -m ssp_jax.main --config=configs/vital_135m.py --config.model.adapter=runs/few/export

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

    c.game.answers_per_step = 10
    c.game.noise_documents = 1
    c.game.pool_reuse = 1
    c.rules.distinct_searches = True
    # "The currency of the country of Peru" is such a question. Where a third of the questions were,
    # four updates taught the solver to search once, whatever it is asked.
    c.rules.forbid_found_at_once = True
    c.sampling.temperature = 0.9
    c.reward.metric = "cover_em"
    # The usual reward is 1 for a question that nobody solves: of a small model's those are the
    # ambiguous ones.
    c.reward.proposer = "intermediate"

    # Of all weights, 5e-5 without KL moved the share of second searches from 35 to 100 % in four
    # updates of a trial, of one-hop questions too, and roles that earn nothing drifted.
    c.learner.learning_rate = 1e-4
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
    c.warm_start.stop_loss = 0.03
    c.warm_start.held_out = 0.03
    c.warm_start.look_every = 30
    c.warm_start.form_prompts = 8

    c.eval.every = 20
    c.eval.max_questions = 50
    c.checkpoint.every = 2
    return c.lock()
