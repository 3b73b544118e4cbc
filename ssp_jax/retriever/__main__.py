"""Builds a BM25 index of a corpus, or searches one.

    python -m ssp_jax.retriever build --corpus=wiki-18.jsonl.gz --out=wiki-18.index
    python -m ssp_jax.retriever search --index=wiki-18.index "capital of France"

Exit codes: 0 for success, 2 for bad input, 130 for Ctrl-C.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ssp_jax.config import BOUNDS
from ssp_jax.errors import printable
from ssp_jax.retriever import index
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.search import Retriever
from ssp_jax.runtime.command import Parser, run_command, user_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m ssp_jax.retriever", description="Build a BM25 index, or ask one."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    build = verbs.add_parser("build", help="index a corpus")
    corpus_help = 'jsonl or jsonl.gz of {"id", "contents"}, Search-R1\'s format'
    build.add_argument("--corpus", required=True, help=corpus_help)
    out_help = "folder of the index: config key retriever.index"
    build.add_argument("--out", required=True, help=out_help)
    build.add_argument("--stemmer", default="english", choices=index.STEMMERS)
    build.add_argument("--stopwords", default="en", choices=index.STOPWORDS)
    build.add_argument("--k1", default=1.5, type=float)
    build.add_argument("--b", default=0.75, type=float)

    search = verbs.add_parser("search", help="show the best passages of a query")
    search.add_argument("--index", required=True)
    search.add_argument("--top_k", default=3, type=int)
    search.add_argument("query")

    args = parser.parse_args(arguments)
    if args.verb == "build":
        _build_command(args)
    else:
        _search_command(args)


def _build_command(args: argparse.Namespace) -> None:
    start = time.monotonic()
    folder = Path(user_path(args.out, "--out")).absolute()
    corpus = user_path(args.corpus, "--corpus")
    build_index(
        corpus, folder, stemmer=args.stemmer, stopwords=args.stopwords, k1=args.k1, b=args.b
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    passages = len(Retriever.load(folder, threads=1))
    cost = f"{size / 1e9:.2f} GB, built in {time.monotonic() - start:.0f} s"
    print(printable(f"{folder}: {passages:,} passages, {cost}"))


def _search_command(args: argparse.Namespace) -> None:
    BOUNDS["retriever.top_k"].check("flag --top_k", args.top_k)
    retriever = Retriever.load(user_path(args.index, "--index"), threads=1)
    hits = retriever.hits([args.query], args.top_k)[0]
    for corpus_row, score in hits:
        document = retriever.document(corpus_row)
        heading = f"{score:8.3f}  [{document.id}] {document.title}"
        print(printable(f"{heading}\n          {document.text}"))
    if not hits:
        print("no passage has a word of this query")


if __name__ == "__main__":
    # bm25s starts JAX when it is imported, and an index needs no device: on the CPU no memory of a
    # GPU is reserved, and no TPU is looked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
