"""Small tokenizers of each kind that models of the supported families have, made here."""

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The capital of France is Paris. <search> Paris </search> <answer> Zürich, São Paulo </answer>",
    "user assistant system <think> 東京 </think> 1976 im_start im_end\n\nend",
]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _finished(backend: Tokenizer, unknown: str | None = None) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(
        ["<|im_start|>", AddedToken("<|im_end|>", special=True, normalized=False)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", unk_token=unknown
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
    )
    return _finished(backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: sentencepiece's space, a prefix space only at the start, bytes as fallback."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(pieces)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    backend.train_from_iterator(TEXTS * 9, trainer)
    return _finished(_without_added_bytes(backend), "<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: its vocabulary itself has the control token, as a piece that costs nothing."""
    pieces = sorted({c for text in TEXTS for c in text.replace(" ", "▁")})
    costs = [("<unk>", 0.0), ("</s>", 0.0), ("<|im_end|>", 0.0)]
    costs += [(piece, -5.0) for piece in pieces]
    backend = Tokenizer(models.Unigram([*costs, ("▁Paris", -3.0)], unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>"])
    return _finished(backend, "<unk>")


def _without_added_bytes(backend: Tokenizer) -> Tokenizer:
    """The trainer calls the bytes special; in a real file they are only pieces."""
    import json

    values = json.loads(backend.to_str())
    added = values["added_tokens"]
    values["added_tokens"] = [token for token in added if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(values))


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
}
