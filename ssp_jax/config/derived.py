"""What several keys say together."""

from ml_collections import ConfigDict


def longest_episode(config: ConfigDict) -> int:
    """Tokens of the longest episode that is trained on."""
    return int(config.limits.prompt_tokens + config.limits.response_tokens)


def export_kind(config: ConfigDict) -> str:
    """What a run writes at its end: "model", "adapter" or "none"."""
    kind = str(config.checkpoint.export)
    if kind == "auto":
        return "adapter" if config.lora.rank else "model"
    return kind
