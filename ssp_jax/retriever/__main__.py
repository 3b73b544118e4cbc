"""Builds a search index of a corpus, or searches one.

    python -m ssp_jax.retriever build --corpus=wiki-18.jsonl.gz --out=wiki-18.index
    python -m ssp_jax.retriever search --index=wiki-18.index "capital of France"

And its vectors, for dense search, which are put into the same folder:

    python -m ssp_jax.retriever build --kind=dense --encoder=intfloat/e5-base-v2 \\
        --query_prefix="query: " --passage_prefix="passage: " --out=wiki-18.index
    python -m ssp_jax.retriever import-faiss --file=e5_Flat.index --encoder=... --out=wiki-18.index
    python -m ssp_jax.retriever search --kind=dense --encoder=... --index=wiki-18.index "..."

Exit codes: 0 for success, 2 for bad input, 130 for Ctrl-C.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ssp_jax.config.values import BOUNDS
from ssp_jax.errors import InputError, printable
from ssp_jax.retriever import settings
from ssp_jax.retriever.build import build_index, ensure_index
from ssp_jax.retriever.search import Retriever
from ssp_jax.retriever.settings import DenseSettings, EncoderKeys, check_flags
from ssp_jax.runtime import figures, signals
from ssp_jax.runtime.command import Parser, exit_code, user_path

_PROG = "python -m ssp_jax.retriever"


def main(arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Runs the command; its exit code.

    prog: what the user has typed, verb included; "" for python -m ssp_jax.retriever.
    """
    return exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog=_PROG, description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    build = verbs.add_parser("build", help="index a corpus", prog=prog or f"{_PROG} build")
    kind_help = "dense adds vectors to the index, which is built first where it is missing"
    build.add_argument("--kind", default="bm25", choices=("bm25", "dense"), help=kind_help)
    corpus_help = (
        "jsonl or jsonl.gz with a passage a row (contents, or title and text), a .txt or .md file, "
        "or a folder of such files"
    )
    build.add_argument("--corpus", default="", help=corpus_help)
    out_help = "folder of the index: config key retriever.index"
    build.add_argument("--out", required=True, help=out_help)
    build.add_argument("--stemmer", default="english", choices=settings.STEMMERS)
    build.add_argument("--stopwords", default="en", choices=tuple(settings.STOPWORDS))
    build.add_argument("--k1", default=1.5, type=float)
    build.add_argument("--b", default=0.75, type=float)
    _add_encoder(build)

    faiss_help = "take vectors from a flat index file of faiss"
    faiss = verbs.add_parser("import-faiss", help=faiss_help, prog=prog or f"{_PROG} import-faiss")
    faiss.add_argument("--file", required=True, help="of faiss's IndexFlatIP")
    faiss.add_argument("--out", required=True, help="folder of the index that they are of")
    _add_encoder(faiss)

    search_prog = prog or f"{_PROG} search"
    search_help = "show the best passages of a query"
    search = verbs.add_parser("search", help=search_help, prog=search_prog)
    search.add_argument("--kind", default="bm25", choices=settings.INDEX_KINDS)
    search.add_argument("--encoder", default="", help="Hugging Face folder, of dense and hybrid")
    search.add_argument("--index", required=True)
    search.add_argument("--top_k", default=3, type=int)
    search.add_argument("query")

    args = parser.parse(arguments)
    if args.verb == "build" and args.kind == "dense":
        _vectors_command(args)
        return
    # bm25s starts JAX when it is imported, and the rest needs no device: on the CPU no memory of a
    # GPU is reserved, and no TPU is looked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.verb == "build":
        _build_command(args)
    elif args.verb == "search":
        _search_command(args)
    else:
        _faiss_command(args)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="", help="Hugging Face folder of BERT architecture")
    dtype_help = "of the vectors on disk; int8 has a scale for each"
    parser.add_argument("--dtype", default="bfloat16", choices=settings.DTYPES, help=dtype_help)
    keys = EncoderKeys()
    parser.add_argument("--pooling", default=keys.pooling, choices=settings.POOLINGS)
    normalize = argparse.BooleanOptionalAction
    parser.add_argument("--normalize", default=keys.normalize, action=normalize)
    prefix_help = "where the folder's sentence-transformers files have none"
    parser.add_argument("--query_prefix", default=keys.query_prefix, help=prefix_help)
    parser.add_argument("--passage_prefix", default=keys.passage_prefix, help=prefix_help)


def _keys(args: argparse.Namespace) -> EncoderKeys:
    return EncoderKeys(args.pooling, args.normalize, args.query_prefix, args.passage_prefix)


def _build_command(args: argparse.Namespace) -> None:
    start = time.monotonic()
    folder = Path(user_path(args.out, "--out")).absolute()
    if not args.corpus:
        raise InputError("flag --corpus is missing; expected a file or folder of passages")
    corpus = user_path(args.corpus, "--corpus")
    build_index(
        corpus, folder, stemmer=args.stemmer, stopwords=args.stopwords, k1=args.k1, b=args.b
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    passages = len(Retriever.load(folder, threads=1))
    cost = f"{size / 1e9:.2f} GB, built in {figures.seconds(time.monotonic() - start)}"
    print(printable(f"{folder}: {passages:,} passages, {cost}"))


# What needs JAX is imported below, so that mistakes in flags are reported before it is loaded.


def _vectors_command(args: argparse.Namespace) -> None:
    from ssp_jax.retriever import encoder_files
    from ssp_jax.retriever.dense_build import ensure_vectors

    start = time.monotonic()
    folder = Path(user_path(args.out, "--out")).absolute()
    check_flags(args.kind, args.encoder, top_k=1)
    encoder = user_path(args.encoder, "--encoder")
    encoder_files.load(encoder, _keys(args))  # what is wrong with it is said before hours of work
    corpus = user_path(args.corpus, "--corpus")
    ensure_index(
        corpus, folder, stemmer=args.stemmer, stopwords=args.stopwords, k1=args.k1, b=args.b
    )
    ensure_vectors(folder, encoder, _keys(args), args.dtype)
    _show_vectors(folder, start)


def _faiss_command(args: argparse.Namespace) -> None:
    from ssp_jax.retriever.dense_build import import_faiss

    start = time.monotonic()
    folder = Path(user_path(args.out, "--out")).absolute()
    check_flags("dense", args.encoder, top_k=1)
    encoder = user_path(args.encoder, "--encoder")
    import_faiss(user_path(args.file, "--file"), folder, encoder, _keys(args), args.dtype)
    _show_vectors(folder, start)


def _show_vectors(index_dir: Path, start: float) -> None:
    """Says what was made, so that a wrong pooling or prefix is seen."""
    from ssp_jax.retriever import vectors

    folder = index_dir / vectors.FOLDER
    about = vectors.about_of(folder)
    recipe = about.recipe
    size = sum(path.stat().st_size for path in folder.iterdir())
    normalized = "normalized" if recipe.pooling.normalize else "not normalized"
    print(
        printable(
            f"{folder}: {about.passages:,} vectors of {about.width} x {about.dtype}, "
            f"{size / 1e9:.2f} GB, in {figures.seconds(time.monotonic() - start)}; pooling "
            f"{recipe.pooling.kind}, {normalized}, query prefix {recipe.query_prefix!r}, "
            f"passage prefix {recipe.passage_prefix!r}"
        )
    )


def _search_command(args: argparse.Namespace) -> None:
    BOUNDS["retriever.top_k"].check("flag --top_k", args.top_k)
    check_flags(args.kind, args.encoder, args.top_k)
    from ssp_jax.retriever.dense import load_local

    retriever = load_local(
        args.kind,
        user_path(args.index, "--index"),
        threads=1,
        top_k=args.top_k,
        settings=DenseSettings(user_path(args.encoder, "--encoder")),
    )
    hits = retriever.hits([args.query], args.top_k)[0]
    for corpus_row, score in hits:
        document = retriever.document(corpus_row)
        heading = f"{score:8.3f}  [{document.id}] {document.title}"
        print(printable(f"{heading}\n          {document.text}"))
    if not hits:
        print("no passage has a word of this query")


if __name__ == "__main__":
    signals.leave(main())
