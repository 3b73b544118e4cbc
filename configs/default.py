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
    # Hugging Face folder: config.json, *.safetensors, tokenizer.
    c.model.path = ""
    # Folder of PEFT with the adapter to start from, "" for none; in training section lora must say
    # what it is. In an evaluation it says itself.
    c.model.adapter = ""
    # bfloat16 | float32: compute and sampler; master weights are always float32.
    c.model.dtype = "bfloat16"
    # full | attention | dots | none: activations that the update recomputes; see model.REMAT.
    c.model.remat = "full"
    # auto: the best of the devices | splash: on TPUs, of the update JAX's kernel, of decoding this
    # project's | flash: this project's of both for NVIDIA GPUs from Ampere on | xla: einsums of
    # XLA, anywhere.
    c.model.attention = "auto"

    # LoRA (arXiv 2106.09685): only low-rank matrices beside the frozen weights are trained. Not in
    # the paper; a config with LoRA needs a learning_rate of its own, about ten times higher.
    c.lora = ConfigDict()
    # Of the matrices, 0 for full fine-tuning. 16 or 32 [H]: more than 64 can collapse under GRPO.
    c.lora.rank = 0
    # What they compute is multiplied by alpha / rank; 32 as in "LoRA Without Regret" (2025).
    c.lora.alpha = 32.0
    # The layers that have them, by their names in PEFT's folders: all linear ones (ibid.).
    c.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # Divide alpha by the root of the rank instead: rsLoRA, arXiv 2312.03732 [H].
    c.lora.rank_stabilized = False

    c.mesh = ConfigDict()  # devices per axis; at most one is -1 and takes the rest
    c.mesh.data = 1  # replicas
    c.mesh.fsdp = -1  # shards of parameters and optimizer
    c.mesh.tensor = 1  # shards of heads and feed-forward width; must divide key/value heads

    c.data = ConfigDict()
    # Given answers of the proposer: jsonl or parquet in SSP's training format, or txt, one a line.
    c.data.answers = ""
    # Name -> jsonl or parquet of questions; of mixed sources each is a set name/source. On the
    # command line an empty file removes a set.
    c.data.eval_sets = ConfigDict()

    c.retriever = ConfigDict()
    # bm25: an index in this process | dense: vectors beside it, of an encoder such as the paper's
    # E5 [P s4.1] | hybrid: both, fused by rank | http: a server with Search-R1's /retrieve |
    # FILE.py:CLASS of your own, called with corpus and index.
    c.retriever.kind = "bm25"
    # All but http: jsonl or jsonl.gz of Search-R1 or FlashRAG, or a folder of .txt and .md files.
    # "" uses the index as it is.
    c.retriever.corpus = ""
    # All but http: folder of the bm25s index, "" for workdir/index; built if it is missing or
    # differs. Missing vectors are built too, and others than those of the encoder are refused.
    c.retriever.index = ""
    # dense, hybrid: Hugging Face folder of BERT architecture (E5, BGE, GTE, MiniLM).
    c.retriever.encoder = ""
    # dense, hybrid: mean | cls: of the hidden states, where the folder has no modules.json.
    c.retriever.pooling = "mean"
    # dense, hybrid: divide vectors by their length; likewise.
    c.retriever.normalize = True
    # dense, hybrid: before each query, where the folder's config_sentence_transformers.json has no
    # prompt; "query: " for E5.
    c.retriever.query_prefix = ""
    # dense, hybrid: before each passage, likewise; "passage: " for E5.
    c.retriever.passage_prefix = ""
    # dense, hybrid: GiB of vectors on each device; what does not fit is searched in host memory.
    # -1: all vectors, on CPUs none.
    c.retriever.device_gib = -1.0
    # dense, hybrid: bfloat16 | int8, half the memory: vectors on devices. An index of int8 is int8.
    c.retriever.device_dtype = "bfloat16"
    # bm25: threads that search a batch, 0 for all cores; each needs 8 bytes a passage.
    c.retriever.threads = 0
    # http: http://HOST:PORT/retrieve.
    c.retriever.url = ""
    # http: seconds of a try, from the look-up of the host to the last byte of the reply [H].
    c.retriever.timeout_s = 30.0
    # http: further tries after one that fails: at once, then after 1, 2, 4, ... seconds [H].
    c.retriever.retries = 5
    # Passages per search [P s4.1].
    c.retriever.top_k = 3
    # bm25: Snowball language, such as french or hindi, "" for none [H].
    c.retriever.stemmer = "english"
    # bm25: stop words of bm25s: en, or a language such as french; "" for none [H].
    c.retriever.stopwords = "en"
    # bm25: term saturation; bm25s default.
    c.retriever.k1 = 1.5
    # bm25: length normalisation; bm25s default.
    c.retriever.b = 0.75

    c.prompt = ConfigDict()
    # search_r1 | r_search | brief | short: search_r1's in few words, for small models [H].
    c.prompt.style = "search_r1"
    # Played examples before each task, at most 3; see game/examples.py. None in [P] and [C]; plain
    # models of 0.5B need them [H].
    c.prompt.worked_examples = 0
    # A search that finds what the episode has shown already gets a sentence that says so [H]; the
    # same documents again in [P] and [C], where a greedy small model repeats it for ever.
    c.prompt.tell_repeats = False
    # chat: the tokenizer's own template | raw_chatml: the reference's, no <|im_end|> [C].
    c.prompt.template = "chat"

    c.game = ConfigDict()
    # Given answers a step [P T4].
    c.game.answers_per_step = 256
    # Rollouts per question (or answer) of a role trained with GRPO; others play 1 [P T4].
    c.game.group_size = 5
    # proposer_solver algorithm, a row of [P T6]; see rules.RL_PAIRS.
    c.game.rl_pair = "reinforce_grpo"
    # both | solver | proposer: roles that are updated [P T2].
    c.game.train = "both"
    # A question must first be answered from its proposer's documents [P s3.3].
    c.game.verify = True
    # Distinct documents that games of other answers have found, mixed in at verification [P T4].
    # Where those are too few, as in the first step, passages of the corpus [H].
    c.game.noise_documents = 4
    # passage [P] | trajectory: all documents of one other game [C].
    c.game.noise_unit = "passage"
    # previous_step [H] | same_step: waits for all proposers [C].
    c.game.noise_source = "previous_step"
    # dummy | resample | full_reuse | periodic_reset [P T5]. Where the pool is empty, in the first
    # step and after a reset, the slot of a failed question is not played, and the same optimizer
    # steps have fewer episodes [H]; [C] plays a dummy there. A reused question is not added to the
    # pool once more [H]; in [C] it is.
    c.game.batch_fill = "periodic_reset"
    # periodic_reset: steps between clearings of the replay pool [P B.1].
    c.game.reset_interval = 10
    # full_reuse, periodic_reset: slots that a question of the pool may fill in one step, 0 for any
    # number [P, C]. Where few are verified, a step of the same two questions fits these [H].
    c.game.pool_reuse = 0
    # resample: further proposals for an answer whose question failed [C].
    c.game.resample_rounds = 5

    c.rules = ConfigDict()  # of a well-formed question [P s3.3]; the code is stricter
    c.rules.min_searches = 1  # [P]; 2 in [C]
    c.rules.distinct_searches = False  # True in [C]
    c.rules.min_chars = 10  # [C]
    c.rules.max_chars = 1000  # [C]
    c.rules.min_words = 1  # [H]; 10 in [C]
    c.rules.forbid_answer_in_search = False  # use_search_terms_filter, off [C]
    # Of answers asked for with two searches or more: the question itself as a query must not find
    # the answer [H].
    c.rules.forbid_found_at_once = False

    c.reward = ConfigDict()
    # em | cover_em | policy | openai | FILE.py:FUNCTION of your own, (question, answers, answer) ->
    # bool: how an answer is judged [H]; LLM judge in [P].
    c.reward.metric = "em"
    # [P eq.5]; see rewards.PROPOSER_REWARDS.
    c.reward.proposer = "one_minus_mean"
    # Proposer's reward for a question that fails [P]; -1 in [C] unless overridden.
    c.reward.invalid_question = 0.0

    # Asked where exact match fails, if reward.metric or eval.judge is policy or openai [C].
    c.judge = ConfigDict()
    # openai: http://HOST:PORT/v1 of an OpenAI-compatible server; its key: OPENAI_API_KEY.
    c.judge.url = ""
    # openai: its name there; Qwen2.5-32B-Instruct [P].
    c.judge.model = ""
    # openai: requests at the same time; 32 to 50 in [C].
    c.judge.concurrency = 32
    # openai: seconds of a try, up to the last byte of the reply [C].
    c.judge.timeout_s = 30.0
    # openai: further tries after one that fails, after pauses from half a second up [H].
    c.judge.retries = 5
    # Tokens of a verdict; more for models that think first [H]; 10 in [C].
    c.judge.max_tokens = 16

    c.limits = ConfigDict()  # tokens, if not said otherwise; each ends an episode with its reason
    # Longest prompt of a proposer or solver [P T4].
    c.limits.prompt_tokens = 4096
    # Longest prompt of a verifier, documents included [H].
    c.limits.verify_prompt_tokens = 8192
    # Sampled and inserted tokens of an episode [P T4].
    c.limits.response_tokens = 8192
    # Sampled tokens of a verifier [H]; 70 in [C], where another model verifies.
    c.limits.verify_response_tokens = 4096
    # Sampled tokens between two insertions; one more ends the episode. As many as response_tokens,
    # also where that is changed, unless set: paper and code limit the response only [P T4, C].
    c.limits.turn_tokens = c.limits.get_oneway_ref("response_tokens")
    # Stretches of sampled tokens: 10 searches and the answer [H]. 10 in [C], of which the last must
    # answer, so that 9 searches are left.
    c.limits.turns = 11
    # Searches of an episode [P B.2]; 9 in [C], see turns.
    c.limits.searches = 10
    # An inserted result is cut to this many tokens [H].
    c.limits.observation_tokens = 2048

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # of both players while training, more than 0 [P T4]
    c.sampling.verify_temperature = 0.1  # 0 is greedy [C]
    c.sampling.top_k = 0  # likeliest tokens to draw from, 0 for all; see sampler.Truncation [H]
    c.sampling.top_p = 1.0  # and of these the likeliest with this probability together [H]
    c.sampling.eval_temperature = 0.0  # 0 is greedy [P T4]

    c.engine = ConfigDict()
    # Episodes decoded at the same time.
    c.engine.slots = 64
    # Tokens decoded per dispatch.
    c.engine.chunk = 16
    # pipelined | barrier: a role starts when all of the one before have ended.
    c.engine.schedule = "pipelined"
    # Tokens that a slot can grow to; at least the longest episode.
    c.engine.cache_tokens = 12288
    # Tokens after which a slot takes more memory, and a chunk reads more.
    c.engine.cache_buckets = (1024, 4096)
    # Shares of the rows of the cache's last piece in use: a chunk reads the smallest that holds the
    # slots in play, or all rows. Each share is one more program to compile for each piece; where
    # decoding has a kernel, none is [H].
    c.engine.row_shares = (0.125, 0.25, 0.5)
    # Keys and values, GiB a device; 0: the free memory, all that slots can need on CPU [H].
    c.engine.kv_cache_gib = 0.0
    # Padded lengths of prompts and insertions, tokens.
    c.engine.extend_buckets = (64, 256, 1024, 4096)
    # Prompts or insertions written in one call, sharded like the slots: at least one a shard.
    c.engine.extend_rows = 8

    c.learner = ConfigDict()
    # After warm-up [P T4].
    c.learner.learning_rate = 1e-6
    # Optimizer steps [H], so it ends in the second step of self-play. "Steps" in [P T4], which may
    # mean those of self-play; [C] counts updates of a role, of which a step has two.
    c.learner.warmup_steps = 5
    # constant [P T4] | cosine | linear: down over decay_steps.
    c.learner.schedule = "constant"
    # Optimizer steps after warm-up: 200 steps x (2 solver + 1 proposer).
    c.learner.decay_steps = 600
    # Share of learning_rate where cosine and linear end [H].
    c.learner.final_rate = 0.1
    # Decay of Adam's first moment; this and the next three are defaults of verl.
    c.learner.adam_b1 = 0.9
    c.learner.adam_b2 = 0.999  # of its second moment
    c.learner.weight_decay = 0.01  # decoupled, as in AdamW
    c.learner.max_grad_norm = 1.0  # a larger gradient is scaled down to this norm
    # float32 | bfloat16: Adam's first moment; the second is always float32 [H].
    c.learner.momentum_dtype = "float32"
    # Adam's moments in host memory between optimizer steps [H]; True in [C].
    c.learner.offload_moments = False
    # The reference model in host memory while it does not score [H]; True in [C].
    c.learner.offload_reference = False
    # Optimizer steps of a role's update. [P T4] has a batch of 256 and a mini-batch of 128 and does
    # not say of what. [C] counts trajectories, 128 x 5 = 640 in a mini-batch: the solver's 1,280
    # make two, the proposer's 256 one. learner.update_order=combined takes the larger number.
    c.learner.solver_mini_batches = 2
    c.learner.proposer_mini_batches = 1  # see solver_mini_batches
    # Packed row length, tokens; at least the longest episode.
    c.learner.row_tokens = 12288
    # Packed rows of one micro-batch, over all devices.
    c.learner.rows = 8
    # Sampled tokens of a row whose logits exist at the same time.
    c.learner.logprob_chunk = 512
    # Leave out episodes with advantage 0, with their KL term, but not out of means (DAPO).
    c.learner.drop_no_advantage = False
    # Verl default.
    c.learner.clip_low = 0.2
    # [C].
    c.learner.clip_high = 0.285
    # Dual clip (arXiv 1912.09729): a token with a negative advantage costs at most so many times
    # that advantage, however much likelier it has become; 0 for none. Verl default [C], not in the
    # paper.
    c.learner.clip_dual = 3.0
    # 0 keeps no reference model [P T4].
    c.learner.kl_coef = 0.01
    # k1 | k2 | k3 (low_var_kl) [C].
    c.learner.kl_type = "k3"
    # Largest KL of a token in nats (k3), 0 for none. Fixed in verl [C], not in the paper.
    c.learner.kl_bound = 10.0
    # [P eq.4]; the reference code runs with True.
    c.learner.grpo_std = False
    # none [P eq.5] | batch_mean | leave_one_out | hop_grouped (Dr. Zero).
    c.learner.proposer_baseline = "none"
    # sequence_mean [P eq.4] | token_mean: verl default, so [C] | constant: Dr. GRPO.
    c.learner.aggregation = "sequence_mean"
    # solver_first [P Alg.1] | proposer_first [C] | combined: one update.
    c.learner.update_order = "solver_first"
    # sampler: no extra pass, biased with top_k or top_p | recompute [C].
    c.learner.old_logprobs = "sampler"
    # Cap of the trainer/sampler ratio when recomputing [H].
    c.learner.importance_cap = 2.0
    # Non-finite updates in a row that stop the run [H].
    c.learner.max_bad_updates = 3

    c.eval = ConfigDict()
    # Evaluate before the first step.
    c.eval.before = True
    # And after the last.
    c.eval.after = True
    # Steps between evaluations, 0 for never; 5 in [C].
    c.eval.every = 0
    # Per set, drawn by chance and always the same ones, 0 for all; 500 in [P].
    c.eval.max_questions = 0
    # em | cover_em | policy: the initial model | openai | FILE.py:FUNCTION: how an answer is judged
    # [H].
    c.eval.judge = "em"

    # Before self-play, with --mode=warm_start: supervised training on episodes of all roles. The
    # update is that of section learner, but for the keys here.
    c.warm_start = ConfigDict()
    # Files of episodes, or folders of runs that dumped some (log.episodes_every), between commas.
    c.warm_start.episodes = ""
    # right: solvers that were right, proposers and verifiers of verified questions (rejection
    # sampling), by reward.metric, or by em where that is no rule of words; scripted games are kept
    # whole | all [H].
    c.warm_start.keep = "right"
    # Share of the games that is not trained on, and watched instead [H].
    c.warm_start.held_out = 0.1
    # Optimizer steps at most [H].
    c.warm_start.steps = 200
    # Episodes of an optimizer step [H].
    c.warm_start.episodes_per_step = 8
    # After learner.warmup_steps; for 135 million parameters. About ten times less for 7 billion,
    # ten times more with LoRA [H].
    c.warm_start.learning_rate = 1e-4
    # It ends where the held-out loss is as low, in nats a token of the players' own; 0 for never.
    # 0.01 leaves a player that does the same each time, and self-play no signal; about 0.3 leaves
    # entropy to learn from [H].
    c.warm_start.stop_loss = 0.3
    # Steps between looks at the held-out loss [H].
    c.warm_start.look_every = 5
    # Held-out episodes that are continued by one turn at each look, to see whether it is in form;
    # 0 for none [H].
    c.warm_start.form_prompts = 16

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 5  # steps between saves, 0 for never [C]
    c.checkpoint.minutes = 0.0  # and after a step that ends so long after a save; 0 for never [H]
    c.checkpoint.keep = 2  # newest kept
    # A set of data.eval_sets, or average for the mean of all: the step with most right answers is
    # kept besides, of those that eval.every evaluates; "" for none [H].
    c.checkpoint.keep_best = ""
    # Written at the end. auto: adapter with LoRA, else model | model: a Hugging Face folder, with
    # LoRA of the merged weights | adapter: PEFT's folder | none.
    c.checkpoint.export = "auto"

    c.log = ConfigDict()
    c.log.episodes_every = 10  # steps between dumps of readable episodes, 0 for never
    c.log.tensorboard = True  # event files in workdir/tensorboard
    # Project, or ENTITY/PROJECT, at Weights & Biases, "" for none; needs the package wandb [H].
    c.log.wandb = ""
    # Project of trackio, "" for none; needs that package [H].
    c.log.trackio = ""
    return c.lock()
