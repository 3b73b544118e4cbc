"""Retriever against plain bm25s, on a real corpus and on synthetic passages, in one run.

    python benchmarks/retriever.py --out=runs/bench_retriever [--passages=1000000]
        [--corpus=corpus.jsonl.gz]

Prints, as tables for docs/retrieval.md: seconds and peak memory of building, seconds and memory of
loading, and queries a second in batches of 64 with k = 3. bm25s searches the very same arrays, held
in memory, with the best of its backends and thread counts. Synthetic passages have 100 words of a
Zipf law without its 50 most frequent words, which would be stop words; a query has 3 to 9 words of
one passage. A line through a half and all of --passages gives the numbers for 21M passages; with
--passages=0 only the real corpus is measured. Plain bm25s builds corpora of at most PLAIN_BUILD
passages here: it holds all their words in memory.
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

SearchBatch = Callable[[Sequence[str]], Any]
BATCH = 64  # queries
TOP_K = 3
BATCHES = 32
VOCABULARY = 200_000  # words of the synthetic passages
STOP_RANKS = 50
WORDS = 100  # of a synthetic passage
WIKI = 21_015_324  # passages of wiki-18
PLAIN_BUILD = 500_000
PLAIN_CODE = """
import json, sys, bm25s, Stemmer
from ssp_jax.data import iterate_corpus
texts = [f"{d.title}\\n{d.text}" for d in iterate_corpus(sys.argv[1])]
stemmer = Stemmer.Stemmer("english")
tokens = bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)
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
    """Writes a corpus, once. A smaller one is the beginning of a larger one."""
    if path.exists():
        return
    ranks = np.arange(STOP_RANKS + 1, STOP_RANKS + 1 + VOCABULARY)
    cumulated = np.cumsum(1 / ranks) / np.sum(1 / ranks)
    names = np.array([f"w{i}" for i in range(VOCABULARY)])
    rng = np.random.default_rng(0)
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for first in range(0, passages, 10_000):
            texts = names[np.searchsorted(cumulated, rng.random((10_000, WORDS)))]
            for corpus_row, words in enumerate(texts[: passages - first], first):
                contents = f'"{words[0]}"\n{" ".join(words)}'
                file.write(json.dumps({"id": str(corpus_row), "contents": contents}) + "\n")
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
    """Queries of 3 to 9 words of a passage each."""
    rng = random.Random(0)
    chosen = set(rng.sample(range(passages), min(number, passages)))
    words_of_passages = []
    for corpus_row, document in enumerate(iterate_corpus(corpus)):
        if corpus_row in chosen:
            words_of_passages.append(document.text.split())
    found = []
    for i in range(number):
        words = words_of_passages[i % len(words_of_passages)] or ["x"]
        found.append(" ".join(rng.choices(words, k=rng.randint(3, 9))))
    return found


def rates(searches: dict[str, SearchBatch], asked: list[str]) -> dict[str, float]:
    """Queries a second of each: medians over batches, in turns. The first batch warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for first in range(0, len(asked), BATCH):
        for name, search in searches.items():
            start = time.monotonic()
            search(asked[first : first + BATCH])
            seconds[name].append(time.monotonic() - start)
    return {name: BATCH / float(np.median(taken[1:])) for name, taken in seconds.items()}


def plain_searches(index: Path) -> dict[str, SearchBatch]:
    """bm25s in all of its settings."""
    stemmer = Stemmer.Stemmer("english")
    searches: dict[str, SearchBatch] = {}
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
    """Ours, and the best of bm25s's settings. Each must give our scores for every query."""
    plain = plain_searches(index)
    measured = rates({"ssp_jax": lambda batch: retriever.hits(batch, TOP_K)} | plain, asked)
    shown = ", ".join(f"{name} {value:.0f}" for name, value in measured.items())
    print(f"  queries/s: {shown}", flush=True)
    ours = [[score for _, score in hits] for hits in retriever.hits(asked, TOP_K)]
    for name, search in plain.items():
        found = search(asked).scores.tolist()
        if [[score for score in scores if score > 0] for scores in found] != ours:
            sys.exit(f"{index}: the scores of {name} are not ours")
    best = max(measured[name] for name in plain)
    return {
        "queries/s": measured["ssp_jax"],
        "bm25s queries/s": best,
        "times": measured["ssp_jax"] / best,
    }


def build(corpus: Path, out: Path) -> dict[str, float]:
    """Seconds and memory of building an index.

    To be called before this process grows: Linux reports a child's peak memory as at least what its
    parent had when it started the child.
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
    before = resident()
    start = time.monotonic()
    retriever = Retriever.load(out)
    numbers = built | {"load s": time.monotonic() - start, "load GB": resident() - before}
    numbers |= compare(out, retriever, queries(corpus, BATCH * (BATCHES + 1), len(retriever)))
    return Measured(name, len(retriever), numbers)


def slope(small: Measured, large: Measured) -> Measured:
    """A straight line through both sizes, at the size of wiki-18.

    It is a line of seconds a query, not of queries a second. Loading is left out: it depends on the
    vocabulary, which is the same for both.
    """
    share = (WIKI - large.passages) / (large.passages - small.passages)
    numbers = {}
    for key in set(small.numbers) & set(large.numbers) - {"times", "load s", "load GB"}:
        a = small.numbers[key]
        b = large.numbers[key]
        if key.endswith("queries/s"):
            numbers[key] = 1 / (1 / b + (1 / b - 1 / a) * share)
        else:
            numbers[key] = b + (b - a) * share
    return Measured("wiki-18, by the slope", WIKI, numbers)


def user_path(path: str) -> Path:
    return Path(path).expanduser()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder for all files")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=user_path, help="a real one, jsonl or jsonl.gz")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    asked = [(args.corpus.name, args.corpus.resolve(), out / "real")] if args.corpus else []
    sizes = (args.passages // 2, args.passages) if args.passages else ()
    for passages in sizes:
        corpus = out / f"zipf_{passages}.jsonl"
        synthetic(corpus, passages)
        asked.append((f"Zipf, {passages:,}", corpus, corpus.with_suffix("")))
    built = [build(corpus, index) for _, corpus, index in asked]
    measured = [measure(*names, numbers) for names, numbers in zip(asked, built, strict=True)]
    if sizes:
        measured.append(slope(*measured[-2:]))
    columns = list(dict.fromkeys(key for one in measured for key in one.numbers))
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, bm25s {bm25s.__version__}, batches of {BATCH}, k = {TOP_K}\n")
    print("| corpus | passages | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for one in measured:
        cells = [f"{one.numbers[key]:.3g}" if key in one.numbers else "" for key in columns]
        print(f"| {one.name} | {one.passages:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
