"""Builds a BM25 index of a corpus, or searches one.

    python -m ssp_jax.retriever build --corpus=wiki-18.jsonl.gz --out=wiki-18.index
    python -m ssp_jax.retriever search --index=wiki-18.index "capital of France"

Exit codes: 0 for success, 2 for bad input, 130 for Ctrl-C.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ssp_jax.config import BOUNDS
from ssp_jax.errors import printable
from ssp_jax.retriever import index
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.search import Retriever
from ssp_jax.runtime import figures, signals
from ssp_jax.runtime.command import Parser, exit_code, user_path

_PROG = "python -m ssp_jax.retriever"


def main(arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Runs the command; its exit code.

    prog: what the user has typed, verb included; "" for python -m ssp_jax.retriever.
    """
    # bm25s starts JAX when it is imported, and an index needs no device: on the CPU no memory of a
    # GPU is reserved, and no TPU is looked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog=_PROG, description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    build = verbs.add_parser("build", help="index a corpus", prog=prog or f"{_PROG} build")
    corpus_help = 'jsonl or jsonl.gz of {"id", "contents"}, Search-R1\'s format'
    build.add_argument("--corpus", required=True, help=corpus_help)
    out_help = "folder of the index: config key retriever.index"
    build.add_argument("--out", required=True, help=out_help)
    build.add_argument("--stemmer", default="english", choices=index.STEMMERS)
    build.add_argument("--stopwords", default="en", choices=index.STOPWORDS)
    build.add_argument("--k1", default=1.5, type=float)
    build.add_argument("--b", default=0.75, type=float)

    search_prog = prog or f"{_PROG} search"
    search_help = "show the best passages of a query"
    search = verbs.add_parser("search", help=search_help, prog=search_prog)
    search.add_argument("--index", required=True)
    search.add_argument("--top_k", default=3, type=int)
    search.add_argument("query")

    args = parser.parse(arguments)
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
    cost = f"{size / 1e9:.2f} GB, built in {figures.seconds(time.monotonic() - start)}"
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
    signals.leave(main())
