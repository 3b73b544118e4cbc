"""Writes tests/goldens/bert/ (a tiny random encoder in a Hugging Face folder) and bert.npz (its
numbers), with torch.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_encoder_goldens.py

Not imported by any test: tests compare with the files, so they need no torch. float32 throughout.
The vectors are computed as sentence-transformers does: mean of the tokens, or the first one, each
divided by its length.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "bert"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), ":", ".", ",", '"', "?"]
CONFIG = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=48,
    dtype="float32",
)
TEXTS = ("moon", "the moon and the sea, 1969", "a river: long, slow and far from any sea " * 4)
QUERY_PREFIX = "query: "


def write_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as pieces; it pads to 20 tokens, as some published folders do."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    tokenizer.enable_padding(length=20)
    names = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    fast.save_pretrained(FOLDER)
    return fast


def write_recipe() -> None:
    """The files of sentence-transformers."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(
            (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
        )
    ]
    pooling = {"word_embedding_dimension": CONFIG.hidden_size, "pooling_mode_mean_tokens": True}
    prompts = {"prompts": {"query": QUERY_PREFIX, "document": ""}}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling | {"pooling_mode_cls_token": False},
        "config_sentence_transformers.json": prompts,
        "sentence_bert_config.json": {"max_seq_length": 40},
    }
    for name, values in files.items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(json.dumps(values, indent=1) + "\n")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    model = BertModel(CONFIG).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "LayerNorm.weight" in name:
                x.uniform_(0.5, 1.5)
            else:
                x.normal_(std=0.5 if x.ndim == 1 else 2.0 * x.shape[1] ** -0.5)
    model.save_pretrained(FOLDER)
    tokenizer = write_tokenizer()
    write_recipe()

    texts = [QUERY_PREFIX + text for text in TEXTS]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    np.savez(
        FOLDER.with_suffix(".npz"),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        lengths=mask.sum(1).numpy().astype(np.int32),
        hidden=hidden.numpy(),
        mean=torch.nn.functional.normalize(mean).numpy(),
        cls=torch.nn.functional.normalize(hidden[:, 0]).numpy(),
    )


if __name__ == "__main__":
    main()
