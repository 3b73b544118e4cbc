"""BM25, dense and hybrid search of one corpus by a real encoder: recall, cost, and what int8 loses.

    python benchmarks/dense.py --encoder=FOLDER --corpus=corpus.jsonl.gz --out=runs/bench_dense
        --questions=dev_1hop.jsonl --questions=dev_2hop.jsonl

Builds the index and its vectors (an unfinished build goes on), and prints tables for
docs/retrieval.md. The query is the raw question. A search is right at k if one of its first k
passages has a golden answer in it as whole words, and finds the subject if one has its title, where
the questions name it (metadata.subject). Queries a second are of batches of 64 with k = 3, without
the cache, by the median. The int8 rows say for how many queries the first three passages are those
of bfloat16, for the questions and for as many first sentences of passages: in the memory of a
device with a rescoring by the bfloat16 on disk, and on disk alone.
"""

import argparse
import json
import os
import resource
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ssp_jax.data import read_rows  # noqa: E402
from ssp_jax.game.rewards import cover_exact_match  # noqa: E402
from ssp_jax.retriever import dense, vectors  # noqa: E402
from ssp_jax.retriever.build import ensure_index  # noqa: E402
from ssp_jax.retriever.dense import load_local  # noqa: E402
from ssp_jax.retriever.dense_build import ensure_vectors, import_faiss  # noqa: E402
from ssp_jax.retriever.search import LocalRetriever  # noqa: E402
from ssp_jax.retriever.settings import INDEX_KINDS, DenseSettings, EncoderKeys  # noqa: E402

BATCH = 64  # queries
DEPTHS = (3, 10)
ON_DEVICE = 64.0  # GiB: all of a small corpus


def recall(retriever: LocalRetriever, rows: Sequence[dict]) -> list[str]:
    """Shares of questions, in percent: right at each depth, subject found at each depth."""
    found = retriever.search([row["question"] for row in rows], max(DEPTHS))
    shares = []
    for depth in DEPTHS:
        right = 0
        for row, documents in zip(rows, found, strict=True):
            texts = [f"{document.title} {document.text}" for document in documents[:depth]]
            right += any(cover_exact_match(text, row["golden_answers"]) for text in texts)
        shares.append(right / len(rows))
    for depth in DEPTHS:
        subjects = 0
        for row, documents in zip(rows, found, strict=True):
            titles = [document.title.strip('"') for document in documents[:depth]]
            subjects += row.get("metadata", {}).get("subject") in titles
        shares.append(subjects / len(rows))
    return [f"{share:.1%}" for share in shares]


def rate(retriever: LocalRetriever, queries: Sequence[str]) -> float:
    """Queries a second."""
    seconds = []
    for first in range(0, len(queries) - BATCH + 1, BATCH):
        start = time.monotonic()
        retriever._search(queries[first : first + BATCH], 3)
        seconds.append(time.monotonic() - start)
    return BATCH / float(np.median(seconds))


def same_top_3(a: LocalRetriever, b: LocalRetriever, queries: Sequence[str]) -> str:
    """For how many queries both find the same three passages, in the same order and in any."""
    ordered = 0
    unordered = 0
    for hits_a, hits_b in zip(a.hits(queries, 3), b.hits(queries, 3), strict=True):
        rows_a = [row for row, _ in hits_a]
        rows_b = [row for row, _ in hits_b]
        ordered += rows_a == rows_b
        unordered += set(rows_a) == set(rows_b)
    return f"{unordered / len(queries):.2%} ({ordered / len(queries):.2%} in the same order)"


def int8_index(index: Path, encoder: str, out: Path) -> Path:
    """The same passages with vectors of int8, by way of a file as faiss writes it."""
    if (out / vectors.FOLDER).exists():
        return out
    out.mkdir(exist_ok=True)
    for path in index.iterdir():
        if path.is_file() and not (out / path.name).exists():
            (out / path.name).hardlink_to(path)
    about = vectors.about_of(index / vectors.FOLDER)
    found = vectors.open_vectors(index, about.corpus, about.passages, dense.Progress())
    numbers = about.width * about.passages
    header = (b"IxFI", about.width, about.passages, 1 << 20, 1 << 20, True, 0, numbers)
    file = out.with_suffix(".faiss")
    with open(file, "wb") as opened:
        opened.write(struct.pack("<4siqqq?iQ", *header))
        opened.write(found.float32(slice(None)).tobytes())
    import_faiss(file, out, encoder, EncoderKeys(), "int8")
    file.unlink()
    return out


def resident_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--questions", action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    index = args.out.absolute() / "index"
    index.parent.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    ensure_index(args.corpus, index, stemmer="english", stopwords="en", k1=1.5, b=0.75)
    sparse_s = time.monotonic() - start
    ensure_vectors(index, args.encoder, EncoderKeys())
    dense_s = time.monotonic() - start - sparse_s
    built = resident_gb()
    sizes = {
        "bm25": sum(path.stat().st_size for path in index.iterdir() if path.is_file()),
        "dense": sum(path.stat().st_size for path in (index / vectors.FOLDER).iterdir()),
    }
    print(f"built in {sparse_s:.0f} s and {dense_s:.0f} s (if not there before), {built:.2f} GB")
    print(f"on disk: {json.dumps(sizes)} bytes")

    sets = {Path(path).stem: [row.values for row in read_rows(path)] for path in args.questions}
    queries = [row["question"] for rows in sets.values() for row in rows]
    settings = DenseSettings(args.encoder, EncoderKeys())
    print("\n| set | search | right at 3 | at 10 | subject at 3 | at 10 | queries/s |")
    print("|---|---|---|---|---|---|---|")
    for kind in INDEX_KINDS:
        retriever = load_local(kind, index, threads=0, top_k=10, settings=settings)
        per_second = rate(retriever, queries)
        for name, rows in sets.items():
            shares = " | ".join(recall(retriever, rows))
            print(f"| {name} | {kind} | {shares} | {per_second:,.0f} |", flush=True)
    print(f"\npeak memory of this process: {resident_gb():.2f} GB")

    exact = load_local("dense", index, threads=0, top_k=3, settings=settings)
    step = max(1, len(exact) // len(queries))
    passages = [exact.document(row).text.split(". ")[0] for row in range(0, len(exact), step)]
    asked = {"questions": queries, "first sentences": [text for text in passages if text.strip()]}
    on_device = DenseSettings(args.encoder, EncoderKeys(), ON_DEVICE, "int8")
    rescored = load_local("dense", index, threads=0, top_k=3, settings=on_device)
    on_disk = int8_index(index, args.encoder, args.out.absolute() / "int8")
    alone = load_local("dense", on_disk, threads=0, top_k=3, settings=settings)
    print("\n| queries | number | int8 rescored | int8 alone |\n|---|---|---|---|")
    for name, texts in asked.items():
        shares = f"{same_top_3(exact, rescored, texts)} | {same_top_3(exact, alone, texts)}"
        print(f"| {name} | {len(texts)} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
