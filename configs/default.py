"""Every key of a run, with unit and source; other configs hold differences only.

Sources: [P] the paper, arXiv 2510.18821v1; [C] its reference code; [H] this project's choice. Where
paper and code differ the paper is the default and the comment names the other. The result is
locked: a wrong key or type fails at once.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # one integer fixes the whole run
    c.steps = 200  # self-play steps; 150-200 [P s4.1]

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder: config.json, *.safetensors, tokenizer
    c.model.dtype = "bfloat16"  # compute and sampler dtype; master weights are always float32
    # full | attention | dots | none: what a layer computes again when training, model.REMAT
    c.model.remat = "full"
    # of the update: auto: the splash kernel on TPUs, XLA elsewhere | xla: XLA everywhere
    c.model.attention = "auto"

    c.mesh = ConfigDict()  # devices per axis; at most one -1 takes what is left
    c.mesh.data = 1  # replicas
    c.mesh.fsdp = -1  # shards of parameters and optimizer
    # shards of heads and feed-forward width; must divide the model's key/value heads
    c.mesh.tensor = 1

    c.data = ConfigDict()
    # the proposer's given answers: jsonl or parquet in SSP's training format, or txt, one a line
    c.data.answers = ""
    # name -> jsonl or parquet of questions; mixed sources give name/source each
    c.data.eval_sets = ConfigDict()

    c.retriever = ConfigDict()
    # bm25: an index in this process | http: a server that speaks Search-R1's /retrieve
    c.retriever.kind = "bm25"
    # jsonl or jsonl.gz of Search-R1 or FlashRAG; "" takes the index as it is (bm25)
    c.retriever.corpus = ""
    # folder of the bm25s index, "" for workdir/index; built where it is missing or differs
    c.retriever.index = ""
    # that search a batch (bm25), 0 for all cores; each holds 8 bytes a passage
    c.retriever.threads = 0
    c.retriever.url = ""  # http://HOST:PORT/retrieve (http)
    # seconds for one request as a whole, until it counts as failed (http) [H]
    c.retriever.timeout_s = 30.0
    # of a failed request: at once, then after 1, 2, 4, ... seconds (http) [H]
    c.retriever.retries = 5
    c.retriever.top_k = 3  # passages per search [P s4.1]
    c.retriever.stemmer = "english"  # Snowball language, "" for none [H]
    c.retriever.stopwords = "en"  # bm25s stop-word list, "" for none [H]
    c.retriever.k1 = 1.5  # term saturation; bm25s default
    c.retriever.b = 0.75  # length normalisation; bm25s default

    c.prompt = ConfigDict()
    c.prompt.style = "search_r1"  # search_r1 | r_search | brief
    # play an example before each task [H]: a plain 0.5B model needs it
    c.prompt.worked_example = False
    # chat: the tokenizer's own template | raw_chatml: the reference's, no <|im_end|> [C]
    c.prompt.template = "chat"

    c.game = ConfigDict()
    c.game.answers_per_step = 256  # given answers a step [P T4]
    # rollouts per question (or answer) of a role trained with GRPO; others play 1 [P T4]
    c.game.group_size = 5
    # proposer_solver algorithm, a row of [P T6]; see rules.RL_PAIRS
    c.game.rl_pair = "reinforce_grpo"
    c.game.train = "both"  # both | solver | proposer: which roles are updated [P T2]
    c.game.verify = True  # a question must be answered from its proposer's documents first [P s3.3]
    # Distinct documents that games of other answers have found, mixed in at verification [P T4].
    # Where those are too few, as in the first step, passages of the corpus [H].
    c.game.noise_documents = 4
    c.game.noise_unit = "passage"  # passage [P] | trajectory: all documents of one other game [C]
    # previous_step [H] | same_step: waits for all proposers [C]
    c.game.noise_source = "previous_step"
    # dummy | resample | full_reuse | periodic_reset [P T5].
    # Where the pool is empty, in the first step and after a reset, the slot of a failed question is
    # not played, and the same optimizer steps have fewer episodes [H]; [C] plays a dummy there.
    # A reused question is not added to the pool once more [H]; in [C] it is.
    c.game.batch_fill = "periodic_reset"
    # steps between clearings of the replay pool (periodic_reset) [P B.1]
    c.game.reset_interval = 10
    # further proposals for an answer whose question failed (resample) [C]
    c.game.resample_rounds = 5

    c.rules = ConfigDict()  # what makes a question well-formed [P s3.3]; the code is stricter
    c.rules.min_searches = 1  # [P]; 2 in [C]
    c.rules.distinct_searches = False  # True in [C]
    c.rules.min_chars = 10  # [C]
    c.rules.max_chars = 1000  # [C]
    c.rules.min_words = 1  # [H]; 10 in [C]
    c.rules.forbid_answer_in_search = False  # use_search_terms_filter, off [C]

    c.reward = ConfigDict()
    # em | cover_em | policy | openai: when an answer counts as right [H]; LLM judge in [P]
    c.reward.metric = "em"
    c.reward.proposer = "one_minus_mean"  # [P eq.5]; see rewards.PROPOSER_REWARDS
    # proposer's reward for a question that fails [P]; -1 in [C] unless overridden
    c.reward.invalid_question = 0.0

    # asked where exact match fails, if reward.metric or eval.judge is policy or openai [C]
    c.judge = ConfigDict()
    # of an OpenAI-compatible server, http://HOST:PORT/v1; its key: OPENAI_API_KEY (openai)
    c.judge.url = ""
    c.judge.model = ""  # its name there (openai); Qwen2.5-32B-Instruct [P]
    c.judge.concurrency = 32  # requests at the same time (openai); 32 to 50 in [C]
    c.judge.timeout_s = 30.0  # seconds until a request counts as failed (openai) [C]
    # of a failed request, after pauses that grow from half a second (openai) [H]
    c.judge.retries = 5
    c.judge.max_tokens = 16  # of a verdict; more for models that think first [H]; 10 in [C]

    c.limits = ConfigDict()  # each ends an episode with its own stop reason
    c.limits.prompt_tokens = 4096  # longest prompt of a proposer or solver [P T4]
    c.limits.verify_prompt_tokens = 8192  # longest prompt of a verifier, documents included [H]
    c.limits.response_tokens = 8192  # sampled and inserted tokens of an episode [P T4]
    # Sampled tokens of a verifier [H]; 70 in [C], where another model verifies.
    c.limits.verify_response_tokens = 4096
    # Sampled tokens between two insertions; one more ends the episode. As many as response_tokens,
    # also where that is changed, unless set: paper and code limit the response only [P T4, C].
    c.limits.turn_tokens = c.limits.get_oneway_ref("response_tokens")
    # Stretches of sampled tokens: 10 searches and the answer [H]. 10 in [C], of which the last must
    # answer, so that 9 searches are left.
    c.limits.turns = 11
    c.limits.searches = 10  # [P B.2]; 9 in [C], see turns
    c.limits.observation_tokens = 2048  # an inserted result is cut to this many tokens [H]

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # both players while training, so more than 0 [P T4]
    c.sampling.verify_temperature = 0.1  # 0 is greedy [C]
    # draw from the likeliest so many tokens, 0 for all; see sampler.Truncation [H]
    c.sampling.top_k = 0
    # and of these from the likeliest that reach this probability together [H]
    c.sampling.top_p = 1.0
    c.sampling.eval_temperature = 0.0  # 0 is greedy [P T4]

    c.engine = ConfigDict()
    c.engine.slots = 64  # episodes decoded at the same time
    c.engine.chunk = 16  # tokens decoded per dispatch
    # pipelined | barrier: a role starts when all of the one before have ended
    c.engine.schedule = "pipelined"
    c.engine.cache_tokens = 12288  # tokens that a slot can grow to; at least the longest episode
    # tokens after which a slot takes more memory, and a chunk reads more
    c.engine.cache_buckets = (1024, 4096)
    # keys and values, GiB a device; 0: what is free, all that slots can need on CPU [H]
    c.engine.kv_cache_gib = 0.0
    c.engine.extend_buckets = (64, 256, 1024, 4096)  # padded lengths of prompts and insertions
    # prompts or insertions written in one call, split like the slots: at least one a part
    c.engine.extend_rows = 8

    c.learner = ConfigDict()
    c.learner.learning_rate = 1e-6  # after warm-up [P T4]
    # Optimizer steps [H], so it ends in the second step of self-play. "Steps" in [P T4], which may
    # mean those of self-play; [C] counts updates of a role, of which a step has two.
    c.learner.warmup_steps = 5
    c.learner.schedule = "constant"  # constant [P T4] | cosine | linear: down over decay_steps
    # optimizer steps after warm-up: 200 steps x (2 solver + 1 proposer)
    c.learner.decay_steps = 600
    c.learner.final_rate = 0.1  # share of learning_rate where cosine and linear end [H]
    c.learner.adam_b1 = 0.9  # verl default
    c.learner.adam_b2 = 0.999  # verl default
    c.learner.weight_decay = 0.01  # verl default
    c.learner.max_grad_norm = 1.0  # verl default
    # float32 | bfloat16: Adam's first moment; the second is always float32 [H]
    c.learner.momentum_dtype = "float32"
    # Adam's moments in host memory between optimizer steps [H]; True in [C]
    c.learner.offload_moments = False
    # the reference model in host memory while it does not score [H]; True in [C]
    c.learner.offload_reference = False
    # Optimizer steps of a role's update. [P T4] has a batch of 256 and a mini-batch of 128 and does
    # not say of what. [C] counts trajectories, 128 x 5 = 640 in a mini-batch: the solver's 1,280
    # make two, the proposer's 256 one. learner.update_order=combined takes the larger number.
    c.learner.solver_mini_batches = 2
    c.learner.proposer_mini_batches = 1
    c.learner.row_tokens = 12288  # packed row length; at least the longest episode
    c.learner.rows = 8  # packed rows of one micro-batch, over all devices
    c.learner.logprob_chunk = 512  # sampled tokens of a row whose logits exist at the same time
    # leave out what has advantage 0, with its KL term, but not out of means (DAPO)
    c.learner.drop_no_advantage = False
    c.learner.clip_low = 0.2  # verl default
    c.learner.clip_high = 0.285  # [C]
    # Dual clip (arXiv 1912.09729): a token with a negative advantage costs at most so many times
    # that advantage, however much likelier it has become; 0 for none. Verl default [C], not in the
    # paper.
    c.learner.clip_dual = 3.0
    c.learner.kl_coef = 0.01  # 0 keeps no reference model [P T4]
    c.learner.kl_type = "k3"  # k1 | k2 | k3 (low_var_kl) [C]
    # Largest KL of a token in nats (k3), 0 for none. Fixed in verl [C], not in the paper.
    c.learner.kl_bound = 10.0
    c.learner.grpo_std = False  # [P eq.4]; the reference code runs with True
    # none [P eq.5] | batch_mean | leave_one_out | hop_grouped (Dr. Zero)
    c.learner.proposer_baseline = "none"
    # [P eq.4] | token_mean: verl default, so [C] | constant: Dr. GRPO
    c.learner.aggregation = "sequence_mean"
    c.learner.update_order = "solver_first"  # [P Alg.1] | proposer_first [C] | combined: one update
    # sampler: no extra pass, biased with top_k or top_p | recompute [C]
    c.learner.old_logprobs = "sampler"
    c.learner.importance_cap = 2.0  # cap of the trainer/sampler ratio when recomputing [H]
    c.learner.max_bad_updates = 3  # non-finite updates in a row that stop the run [H]

    c.eval = ConfigDict()
    c.eval.before = True  # evaluate before the first step
    c.eval.after = True  # and after the last
    c.eval.every = 0  # steps between evaluations, 0 for never; 5 in [C]
    # per set, drawn by chance and always the same ones, 0 for all; 500 in [P]
    c.eval.max_questions = 0
    # em | cover_em | policy: the initial model | openai: when an answer counts as right [H]
    c.eval.judge = "em"

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 5  # steps between saves, 0 for never [C]
    # and after the step that ends so many minutes after the last save; 0 for never [H]
    c.checkpoint.minutes = 0.0
    c.checkpoint.keep = 2  # newest kept
    c.checkpoint.export = True  # write a Hugging Face folder at the end

    c.log = ConfigDict()
    c.log.episodes_every = 10  # steps between dumps of readable episodes, 0 for never
    c.log.tensorboard = True
    return c.lock()
