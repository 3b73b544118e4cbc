"""TODO retriever.__main__"""

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

# --- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m ssp_jax.retriever", description="Build a BM25 index, or ask one."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="index a corpus")
    build.add_argument(
        "--corpus",
        required=True,
        help='jsonl or jsonl.gz of {"id", "contents"}, Search-R1\'s format',
    )
    build.add_argument(
        "--out", required=True, help="folder of the index: config key retriever.index"
    )
    build.add_argument("--stemmer", default="english", choices=index.STEMMERS)
    build.add_argument("--stopwords", default="en", choices=index.STOPWORDS)
    build.add_argument("--k1", default=1.5, type=float)
    build.add_argument("--b", default=0.75, type=float)
    ask = verbs.add_parser("search", help="show the best passages of a query")
    ask.add_argument("--index", required=True)
    ask.add_argument("--top_k", default=3, type=int)
    ask.add_argument("query")
    args = parser.parse_args(arguments)
    _build_command(args) if args.verb == "build" else _search_command(args)


def _build_command(args: argparse.Namespace) -> None:
    start, folder = time.monotonic(), Path(user_path(args.out, "--out")).absolute()
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
    for row, score in hits:
        document = retriever.document(row)
        print(
            printable(f"{score:8.3f}  [{document.id}] {document.title}\n          {document.text}")
        )
    if not hits:
        print("no passage has a word of this query")


if __name__ == "__main__":
    # bm25s starts JAX as it is imported, and an index needs no device: no GPU's memory is taken, no
    # TPU is looked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
