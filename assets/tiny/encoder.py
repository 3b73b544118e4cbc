"""Makes the tiny encoder again: `python assets/tiny/encoder.py --out=assets/tiny/encoder`.

One layer of BERT and 0.5 million parameters, in a Hugging Face folder with the files of
sentence-transformers. It learns from assets/tiny/corpus.jsonl alone: some words of a passage are to
find that passage among those of a batch (the inverse cloze task, arXiv 1906.00300). It knows no
other words, and is for demos and tests.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from ssp_jax.data import Document, iterate_corpus
from ssp_jax.model import decoder, hf_files
from ssp_jax.retriever import encoder, encoder_files
from ssp_jax.retriever.encoder import EncoderConfig, Pooling

SEED = 0
CORPUS = Path(__file__).parent / "corpus.jsonl"
CONFIG = EncoderConfig(
    vocab_size=4096, num_layers=1, embed_dim=96, num_heads=4, mlp_dim=192, positions=64
)
POOLING = Pooling("mean", normalize=True)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
STEPS, BATCH, TOKENS = 300, 96, 24
LEARNING_RATE = 2e-3
SCALE = 20.0  # of cosines, in the loss
TITLE_SHARE = 0.85  # of queries that have the passage's title
# Words that say nothing of a passage.
STOP = {"a", "among", "and", "are", "by", "for", "from", "has", "in", "is", "its", "lies", "of"}
STOP |= {"on", "one", "that", "the", "to", "with"}


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator((f"{d.title}\n{d.text}" for d in documents), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    tokenizer.enable_truncation(TOKENS)
    return tokenizer


def query(document: Document, rng: random.Random) -> str:
    """Its title, mostly, and one to three of its other words, in any order."""
    title = document.title.strip('"')
    words = [word.strip(".,") for word in document.text.replace(title, "").split()]
    others = [word for word in words if word.lower() not in STOP]
    chosen = rng.sample(others, min(len(others), rng.randint(1, 3)))
    if rng.random() < TITLE_SHARE or not chosen:
        chosen.insert(rng.randrange(len(chosen) + 1), title)
    return " ".join(chosen)


def batches(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Any, ...]]:
    """Tokens and lengths of queries, and of their passages."""
    rng = random.Random(SEED)
    for _ in range(STEPS):
        some = rng.sample(documents, BATCH)
        for_queries = [query(document, rng) for document in some]
        for_passages = [f"{document.title}\n{document.text}" for document in some]
        arrays = []
        for texts in (for_queries, for_passages):
            tokens = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
            arrays.append(encoder_files.padded(tokens, BATCH, TOKENS))
        yield tuple(arrays)


def train(documents: list[Document], tokenizer: Tokenizer) -> decoder.Params:
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def loss(params: decoder.Params, queries: Any, passages: Any) -> jax.Array:
        def vectors(tokens_BT: Any, lengths_B: Any) -> jax.Array:
            return encoder.encode(CONFIG, POOLING, params, tokens_BT, lengths_B, jnp.float32)

        cosines = vectors(*queries) @ vectors(*passages).T
        return optax.softmax_cross_entropy_with_integer_labels(
            SCALE * cosines, jnp.arange(BATCH)
        ).mean()

    @jax.jit
    def step(params: decoder.Params, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params = encoder.init_params(CONFIG, jax.random.key(SEED))
    params["embed"]["positions"] *= 0.1
    state = optimizer.init(params)
    for number, batch in enumerate(batches(documents, tokenizer), 1):
        params, state, value = step(params, state, batch)
        if number % 100 == 0:
            print(f"step {number}: loss {value:.3f}", flush=True)
    return jax.device_get(params)


def write(params: decoder.Params, tokenizer: Tokenizer, out: Path) -> None:
    """The folder: weights in bfloat16, shape, tokenizer, and what sentence-transformers adds."""
    (out / "1_Pooling").mkdir(parents=True, exist_ok=True)
    sizes = encoder_files.axis_sizes(CONFIG)
    arrays = {}
    for name in encoder_files.TABLE:
        leaf = name.leaf(params)
        for layer in range(CONFIG.num_layers if name.layered else 1):
            own = leaf[layer] if name.layered else leaf
            in_file = own.transpose(name.as_in_file(range(own.ndim)))
            arrays[name.tensor.format(layer)] = in_file.reshape(name.file_shape(sizes))
    # Those of positions have it already.
    arrays[encoder_files.TOKEN_TYPES] = np.zeros((1, CONFIG.embed_dim), np.float32)
    shapes = {name: array.shape for name, array in arrays.items()}
    cast = (np.ascontiguousarray(x.astype(ml_dtypes.bfloat16)) for x in arrays.values())
    hf_files.write_file(out / hf_files.SINGLE_FILE, shapes, cast, "BF16")

    tokenizer.save(str(out / "tokenizer.json"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(
            (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        )
    ]
    files = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": CONFIG.vocab_size,
            "hidden_size": CONFIG.embed_dim,
            "num_hidden_layers": CONFIG.num_layers,
            "num_attention_heads": CONFIG.num_heads,
            "intermediate_size": CONFIG.mlp_dim,
            "max_position_embeddings": CONFIG.positions,
            "type_vocab_size": 1,
            "layer_norm_eps": CONFIG.norm_eps,
            "hidden_act": "gelu",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "mask_token": "[MASK]",
            "model_max_length": CONFIG.positions,
        },
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": CONFIG.embed_dim,
            "pooling_mode_mean_tokens": True,
        },
    }
    for file, values in files.items():
        (out / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    documents = list(iterate_corpus(CORPUS))
    tokenizer = train_tokenizer(documents)
    write(train(documents, tokenizer), tokenizer, out)


if __name__ == "__main__":
    main()
