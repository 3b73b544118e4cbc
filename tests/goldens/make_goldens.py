"""Writes tests/goldens/<name>/ (a tiny random Hugging Face model) and <name>.npz (its numbers),
with torch.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/goldens/make_goldens.py

Not imported by any test: tests compare with the files, so they need no torch. float32 throughout.
Norm scales and biases are random too, else a model that forgets them would pass.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

SHAPE = dict(
    **dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3),
    **dict(
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, dtype="float32"
    ),
)
SMALL = dict(num_hidden_layers=2, num_key_value_heads=1)
# With theta 100 and 16 trained positions all three regimes of the scaling occur among the 8
# frequencies of a head.
LLAMA3_ROPE = dict(
    **dict(
        rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0
    ),
    original_max_position_embeddings=16,
)
MODELS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=20, tie_word_embeddings=False)),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    ),
    "qwen2_untied": (Qwen2ForCausalLM, Qwen2Config(**SHAPE | SMALL, tie_word_embeddings=False)),
    "llama3_tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE | SMALL, tie_word_embeddings=True, head_dim=32, rope_parameters=LLAMA3_ROPE
        ),
    ),
}
PROMPT_LENGTHS = {"short": 12, "long": 40}


@torch.no_grad()
def right_padded(model: PreTrainedModel, short: torch.Tensor, long: torch.Tensor) -> np.ndarray:
    """Logits of the short prompt, padded, beside the long one."""
    padding = torch.zeros_like(long[:, short.shape[1] :])
    batch = torch.cat([torch.cat([short, padding], 1), long])
    mask = torch.ones_like(batch)
    mask[0, short.shape[1] :] = 0
    return model(batch, attention_mask=mask).logits[0, : short.shape[1]].numpy()


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokens: torch.Tensor, number: int = 24
) -> tuple[np.ndarray, np.ndarray]:
    """The next tokens and their log-probs, by the reference's own cache."""
    cache, ids, logprobs = None, [], []
    for _ in range(number):
        out = model(tokens, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        tokens = logits.argmax()[None, None]
        ids.append(tokens.item())
        logprobs.append(logits.log_softmax(-1)[tokens.item()].item())
    return np.array(ids, np.int32), np.array(logprobs, np.float32)


def main() -> None:
    folder = Path(__file__).parent
    for seed, (name, (model_class, config)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter_name, x in model.named_parameters():
                if "norm" in parameter_name:
                    x.uniform_(0.5, 1.5)
                else:
                    # Strong enough that attention is far from uniform, so that wrong positions
                    # show.
                    x.normal_(std=0.5 if x.ndim == 1 else 2.0 * x.shape[1] ** -0.5)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        arrays: dict[str, np.ndarray] = {}
        prompts = []
        for prompt, length in PROMPT_LENGTHS.items():
            tokens = torch.randint(0, config.vocab_size, (1, length))
            with torch.no_grad():
                arrays[f"{prompt}_logits"] = model(tokens).logits[0].numpy()
            arrays[f"{prompt}_tokens"] = tokens[0].numpy().astype(np.int32)
            prompts.append(tokens)
        arrays["padded_logits"] = right_padded(model, *prompts)
        arrays["greedy_tokens"], arrays["greedy_logprobs"] = greedy(model, prompts[0])
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
