"""Published shapes of models, for planning without the weights."""

from ssp_jax.errors import InputError
from ssp_jax.model.decoder import ModelConfig


def _qwen25(
    layers: int, width: int, heads: int, kv_heads: int, head: int, ffn: int, vocab: int, tied: bool
) -> ModelConfig:
    sizes = (vocab, layers, width, heads, kv_heads, head, ffn)
    return ModelConfig(*sizes, rope_theta=1e6, tie_embeddings=tied, qkv_bias=True)


def _qwen3(layers: int, width: int, heads: int, ffn: int, tied: bool) -> ModelConfig:
    sizes = (151936, layers, width, heads, 8, 128, ffn)
    return ModelConfig(*sizes, rope_theta=1e6, tie_embeddings=tied, qk_norm=True)


def _llama3(layers: int, width: int, heads: int, head: int, ffn: int, tied: bool) -> ModelConfig:
    sizes = (128256, layers, width, heads, 8, head, ffn)
    return ModelConfig(*sizes, rope_theta=5e5, norm_eps=1e-5, tie_embeddings=tied)


# From the config.json of each model on the Hugging Face hub. Fine-tuned models (-Instruct, -Coder)
# have the same shapes.
ARCHITECTURES = {
    "Qwen2.5-0.5B": _qwen25(24, 896, 14, 2, 64, 4864, 151936, True),
    "Qwen2.5-1.5B": _qwen25(28, 1536, 12, 2, 128, 8960, 151936, True),
    "Qwen2.5-3B": _qwen25(36, 2048, 16, 2, 128, 11008, 151936, True),
    "Qwen2.5-7B": _qwen25(28, 3584, 28, 4, 128, 18944, 152064, False),
    "Qwen2.5-14B": _qwen25(48, 5120, 40, 8, 128, 13824, 152064, False),
    "Qwen2.5-32B": _qwen25(64, 5120, 40, 8, 128, 27648, 152064, False),
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
    "SmolLM2-135M": ModelConfig(
        49152, 30, 576, 9, 3, 64, 1536, 1e5, norm_eps=1e-5, tie_embeddings=True
    ),
    "Llama-3.2-1B": _llama3(16, 2048, 32, 64, 8192, True),
    "Llama-3.2-3B": _llama3(28, 3072, 24, 128, 8192, True),
    "Llama-3.1-8B": _llama3(32, 4096, 32, 128, 14336, False),
}


def architecture(name: str) -> ModelConfig:
    """The published shape that a model's name, on the hub or of its folder, contains.

    Raises InputError if the name contains none.
    """
    last = name.rstrip("/").rsplit("/", 1)[-1]
    words = last.lower().replace("_", "-").replace("-coder", "")
    found = [known for known in ARCHITECTURES if f"-{known.lower()}-" in f"-{words}-"]
    if not found:
        raise InputError(
            f"config key model.path is {name!r}: no config.json is there; "
            f"expected a Hugging Face folder, or for planning one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[max(found, key=len)]
