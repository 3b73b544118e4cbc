"""The search of a run: an index that is built where it is missing, a server, or the user's."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from ssp_jax import stamps
from ssp_jax.data import Task
from ssp_jax.retriever import dense, encoder_files
from ssp_jax.retriever.build import ensure_index
from ssp_jax.retriever.dense_build import ensure_vectors
from ssp_jax.retriever.remote import RemoteRetriever
from ssp_jax.retriever.search import Searcher
from ssp_jax.retriever.settings import VECTOR_KINDS, DenseSettings, EncoderKeys
from ssp_jax.runtime import processes
from ssp_jax.user_code import load as user_code
from ssp_jax.user_code.search import UserRetriever


def index_folder(c: ConfigDict, workdir: str) -> str:
    """The folder of the search index. c: section retriever."""
    return c.index or str(Path(workdir) / "index")


def open_search(c: ConfigDict, workdir: str, tasks: list[Task]) -> Searcher:
    """Opens the search of section retriever on all processes; builds a missing index.

    The coordinator builds: a file lock does not keep another host out. tasks: of the run, which a
    search server, or a class of the user's, is tried with.
    """
    probes = [task.question or task.answers[0] for task in tasks[:64]]
    if user_code.is_one(c.kind):
        return processes.run_on_all(
            lambda: UserRetriever(c.kind, c.corpus, c.index, probes, top_k=c.top_k)
        )
    if c.kind == "http":
        remote = functools.partial(
            RemoteRetriever, top_k=c.top_k, timeout_s=c.timeout_s, retries=c.retries
        )
        return processes.run_on_all(lambda: remote(c.url, probes))
    index = index_folder(c, workdir)
    keys = EncoderKeys(c.pooling, c.normalize, c.query_prefix, c.passage_prefix)
    settings = DenseSettings(c.encoder, keys, c.device_gib, c.device_dtype)

    def build() -> None:
        if c.kind in VECTOR_KINDS:
            encoder_files.load(c.encoder, keys)  # what is wrong with it is said before long work
        ensure_index(c.corpus, index, stemmer=c.stemmer, stopwords=c.stopwords, k1=c.k1, b=c.b)
        if c.kind in VECTOR_KINDS:
            ensure_vectors(index, c.encoder, keys)

    def load() -> Searcher:
        if not processes.is_multiprocess():
            build()
        return dense.load_local(c.kind, index, threads=c.threads, top_k=c.top_k, settings=settings)

    if processes.is_multiprocess():
        processes.run_on_coordinator(build)
    return processes.run_on_all(load)


def stamps_of_search(c: ConfigDict, workdir: str) -> dict[str, str]:
    """Digests of what is searched, by name; a server has none. c: section retriever."""
    if user_code.is_one(c.kind):
        corpus = stamps.of_index(c.corpus, "") if c.corpus else {}
        return corpus | stamps.of_code(c.kind)
    return {} if c.kind == "http" else stamps.of_index(c.corpus, index_folder(c, workdir))
