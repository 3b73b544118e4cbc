"""Vectors of a real encoder in float32: ours against torch, number by number.

    python benchmarks/encoder_parity.py --encoder=FOLDER            # needs what the project needs
    python benchmarks/encoder_parity.py --encoder=FOLDER --write    # makes the golden; needs torch
                                                                    # and transformers, not JAX

The golden lies in benchmarks/goldens under the folder's name, or --name. Vectors are means of the
last hidden states, divided by their length, as sentence-transformers computes them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "benchmarks" / "goldens"
MAX_TOKENS = 256
TEXTS = (
    "moon",
    "Which country is the author of The Tin Drum from?",
    "Zürich is the largest city in Switzerland; it lies at the north-western tip of Lake Zürich. "
    "Its airport is the country's busiest, and about 440,000 people live in the municipality.",
    "def quicksort(numbers): return numbers if len(numbers) < 2 else None  # 東京 🙂 " * 20,
)


def by_torch(folder: str) -> list[list[float]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    cut = dict(truncation=True, max_length=MAX_TOKENS)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt", **cut)
    mask = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return [[float(f"{x:.7g}") for x in vector] for vector in vectors.tolist()]


def by_jax(folder: str) -> np.ndarray:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from ssp_jax.retriever import dense, encoder_files, settings

    found = encoder_files.load(folder, settings.EncoderKeys())
    tokens = found.passage_tokens(TEXTS)
    batch = encoder_files.padded(tokens, dense.GROUP, MAX_TOKENS)
    shape = dense.Shape(found.config, found.recipe.pooling, "float32")
    [vectors] = dense.encode_queries(shape, found.params, *batch)
    return np.asarray(vectors)[0, : len(TEXTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--name", help="of the golden; by default the folder's name")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    path = GOLDENS / f"encoder_{args.name or Path(args.encoder).name.lower()}.json"
    if args.write:
        lines = ",\n".join(json.dumps(vector) for vector in by_torch(args.encoder))
        path.write_text(f"[\n{lines}\n]\n")
        return
    expected = np.array(json.loads(path.read_text()))
    found = by_jax(args.encoder)
    print(f"{args.encoder}: {found.shape[0]} vectors of {found.shape[1]} numbers")
    print(f"largest difference of a number: {np.abs(found - expected).max():.2g}")
    print(f"smallest cosine: {(found * expected).sum(axis=1).min():.8f}")


if __name__ == "__main__":
    main()
