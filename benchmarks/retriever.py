"""Retriever against plain bm25s, on a real corpus and on synthetic passages, in one run.

    python benchmarks/retriever.py --out=runs/bench_retriever [--passages=1000000] [--corpus=corpus.jsonl.gz]

Prints, as tables for the README: seconds and peak memory of building, seconds and memory of
loading, and queries a second in batches of 64 with k = 3. bm25s searches the very same arrays, held
in memory, with the best of its backends and thread counts. Synthetic passages have 100 words of a
Zipf law without its 50 most frequent words, which stop words take; a query has 3 to 9 words of one
passage. A half and all of --passages give the slope for 21M passages; with
--passages=0 only the real corpus is measured. Plain bm25s builds corpora of at most PLAIN_BUILD passages here: it holds
all their words.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ssp_jax.data import iterate_corpus  # noqa: E402
from ssp_jax.retriever.search import Retriever  # noqa: E402

Search = Callable[[Sequence[str]], Any]
BATCH, TOP_K, BATCHES = 64, 3, 32
VOCABULARY, STOP_RANKS, WORDS = 200_000, 50, 100
WIKI = 21_015_324  # passages of wiki-18
PLAIN_BUILD = 500_000
PLAIN_CODE = """
import json, sys, bm25s, Stemmer
from ssp_jax.data import iterate_corpus
texts = [f"{d.title}\\n{d.text}" for d in iterate_corpus(sys.argv[1])]
tokens = bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)
index = bm25s.BM25(backend="numba")
index.index(tokens, create_empty_token=False, show_progress=False)
index.save(sys.argv[2], show_progress=False)
"""


@dataclass
class Measured:
    name: str
    passages: int
    numbers: dict[str, float]  # seconds, GB, queries a second


def synthetic(path: Path, passages: int) -> None:
    """Written once; a passage depends on its number only, so a smaller corpus is the start of a
    larger one.
    """
    if path.exists():
        return
    ranks = np.arange(STOP_RANKS + 1, STOP_RANKS + 1 + VOCABULARY)
    cumulated = np.cumsum(1 / ranks) / np.sum(1 / ranks)
    names = np.array([f"w{i}" for i in range(VOCABULARY)])
    rng, partial = np.random.default_rng(0), path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for first in range(0, passages, 10_000):
            words = names[np.searchsorted(cumulated, rng.random((10_000, WORDS)))]
            for row, text in enumerate(words[: passages - first], first):
                file.write(
                    json.dumps({"id": str(row), "contents": f'"{text[0]}"\n{" ".join(text)}'})
                    + "\n"
                )
    partial.rename(path)


def run(*command: str) -> tuple[float, float]:
    """Wall seconds and peak GB of a process."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.monotonic() - start, usage.ru_maxrss / 1e6


def resident() -> float:
    """GB of this process that are its own, maps of files left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e6
    return 0.0


def queries(corpus: Path, number: int, passages: int) -> list[str]:
    rng = random.Random(0)
    chosen = set(rng.sample(range(passages), min(number, passages)))
    texts = [d.text.split() for row, d in enumerate(iterate_corpus(corpus)) if row in chosen]
    return [
        " ".join(rng.choices(texts[i % len(texts)] or ["x"], k=rng.randint(3, 9)))
        for i in range(number)
    ]


def rates(searches: dict[str, Search], asked: list[str]) -> dict[str, float]:
    """Queries a second of each, medians over batches that all take in turns; the first batch warms
    up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for first in range(0, len(asked), BATCH):
        for name, search in searches.items():
            start = time.monotonic()
            search(asked[first : first + BATCH])
            seconds[name].append(time.monotonic() - start)
    return {name: BATCH / float(np.median(taken[1:])) for name, taken in seconds.items()}


def plain_searches(index: Path) -> dict[str, Search]:
    """bm25s in all of its settings."""
    stemmer, searches = Stemmer.Stemmer("english"), dict[str, Search]()
    for backend in ("numba", "numpy"):
        plain = bm25s.BM25.load(index, backend=backend, show_progress=False)
        for threads in sorted({0, len(os.sched_getaffinity(0))}):

            def search(
                batch: Sequence[str], plain: bm25s.BM25 = plain, threads: int = threads
            ) -> bm25s.Results:
                tokens = bm25s.tokenize(
                    batch, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
                )
                return plain.retrieve(tokens, k=TOP_K, n_threads=threads, show_progress=False)

            searches[f"bm25s {backend}, {threads} threads"] = search
    return searches


def compare(index: Path, retriever: Retriever, asked: list[str]) -> dict[str, float]:
    """Ours, and the best of bm25s's settings, each of which must give our scores for every query."""
    plain = plain_searches(index)
    measured = rates({"ssp_jax": lambda batch: retriever.hits(batch, TOP_K)} | plain, asked)
    print(
        "  queries/s: " + ", ".join(f"{name} {value:.0f}" for name, value in measured.items()),
        flush=True,
    )
    ours = [[score for _, score in hits] for hits in retriever.hits(asked, TOP_K)]
    for name, search in plain.items():
        if [[s for s in scores.tolist() if s > 0] for scores in search(asked).scores] != ours:
            sys.exit(f"{index}: the scores of {name} are not ours")
    best = max(measured[name] for name in plain)
    return {
        "queries/s": measured["ssp_jax"],
        "bm25s queries/s": best,
        "times": measured["ssp_jax"] / best,
    }


def build(corpus: Path, out: Path) -> dict[str, float]:
    """Before this process grows: what a child takes is never told as less than its parent had when
    it started.
    """
    print(f"building {out.name} ...", flush=True)
    seconds, gigabytes = run(
        "-m", "ssp_jax.retriever", "build", f"--corpus={corpus}", f"--out={out}"
    )
    numbers = {"build s": seconds, "build GB": gigabytes}
    numbers["disk GB"] = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    if json.loads((out / "meta.json").read_text())["passages"] <= PLAIN_BUILD:
        seconds, gigabytes = run("-c", PLAIN_CODE, str(corpus), str(out) + ".plain")
        numbers |= {"bm25s build s": seconds, "bm25s build GB": gigabytes}
    return numbers


def measure(name: str, corpus: Path, out: Path, built: dict[str, float]) -> Measured:
    print(f"searching {out.name} ...", flush=True)
    before, start = resident(), time.monotonic()
    retriever = Retriever.load(out)
    numbers = built | {"load s": time.monotonic() - start, "load GB": resident() - before}
    numbers |= compare(out, retriever, queries(corpus, BATCH * (BATCHES + 1), len(retriever)))
    return Measured(name, len(retriever), numbers)


def slope(small: Measured, large: Measured) -> Measured:
    """A straight line through both sizes (of seconds a query, not of queries a second), at the size
    of wiki-18.

    Loading hangs on the vocabulary, which is the same for both.
    """
    numbers = {}
    for key in set(small.numbers) & set(large.numbers) - {"times", "load s", "load GB"}:
        a, b = small.numbers[key], large.numbers[key]
        invert = key.endswith("queries/s")
        a, b = (1 / a, 1 / b) if invert else (a, b)
        value = b + (b - a) * (WIKI - large.passages) / (large.passages - small.passages)
        numbers[key] = 1 / value if invert else value
    return Measured("wiki-18, by the slope", WIKI, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="folder for all files",
    )
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument(
        "--corpus", type=lambda path: Path(path).expanduser(), help="a real one, jsonl or jsonl.gz"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    asked = [(args.corpus.name, args.corpus.resolve(), out / "real")] if args.corpus else []
    sizes = (args.passages // 2, args.passages) if args.passages else ()
    for passages in sizes:
        synthetic(out / f"zipf_{passages}.jsonl", passages)
        asked.append(
            (f"Zipf, {passages:,}", out / f"zipf_{passages}.jsonl", out / f"zipf_{passages}")
        )
    built = [build(corpus, index) for _, corpus, index in asked]
    rows = [measure(*names, numbers) for names, numbers in zip(asked, built, strict=True)]
    if sizes:
        rows.append(slope(*rows[-2:]))
    columns = list(dict.fromkeys(key for row in rows for key in row.numbers))
    print(
        f"\n{len(os.sched_getaffinity(0))} cores, bm25s {bm25s.__version__}, batches of {BATCH}, k = {TOP_K}\n"
    )
    print("| corpus | passages | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for row in rows:
        cells = [f"{row.numbers[key]:.3g}" if key in row.numbers else "" for key in columns]
        print(f"| {row.name} | {row.passages:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
