"""Choices that work but are seldom meant."""

from pathlib import Path

from ml_collections import ConfigDict

from ssp_jax.retriever import settings

# GRPO with rank 64 fell from 73.1 to 8.7 % at batch 128, and with 128 stayed near the floor; ranks
# 8 and 16 trained ("Structure over Scale", ICML 2026 workshop).
_HIGHEST_RANK = 64


def advice(config: ConfigDict, platform: str) -> list[str]:
    """Sentences for the start of a run on choices that work but are seldom meant.

    platform: of the devices, in JAX's words.
    """
    sentences = []
    truncated = config.sampling.top_k or config.sampling.top_p < 1
    if truncated and config.learner.old_logprobs == "sampler":
        sentences.append(
            "sampling.top_k and top_p leave tokens out that the trainer counts, so ratios to the "
            "sampler's log-probs are too small and clipped for nothing; "
            "learner.old_logprobs=recompute corrects it"
        )
    if config.lora.rank > _HIGHEST_RANK:
        sentences.append(
            f"lora.rank is {config.lora.rank}: ranks above {_HIGHEST_RANK} can collapse under "
            "GRPO; 16 or 32 are enough"
        )
    c = config.retriever
    is_e5 = "e5" in Path(c.encoder).name.lower()
    if c.kind in settings.VECTOR_KINDS and is_e5 and not c.query_prefix:
        sentences.append(
            "retriever.query_prefix is empty: E5 encoders were trained with query_prefix "
            "'query: ' and passage_prefix 'passage: ', and find less without, unless the "
            "encoder's folder has prompts of its own"
        )
    if platform == "cpu" and config.model.dtype == "bfloat16":
        # A decode step of Qwen2.5-0.5B: 450 ms and not 120, on 2 cores.
        sentences.append(
            "model.dtype is bfloat16, which CPUs compute three to four times slower than float32; "
            "--config.model.dtype=float32 is faster here"
        )
    return sentences
