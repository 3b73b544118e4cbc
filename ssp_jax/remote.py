"""Search by somebody's retrieval server, in the protocol of Search-R1: an E5 index that is already running.

POST {"queries": [text, ...], "topk": 3, "return_scores": true} to /retrieve gives
{"result": [[{"document": {"id", "contents"}, "score": x}, ...], ...]}; servers that know no scores give the documents
themselves.
"""

import json
from collections.abc import Sequence
from typing import Any

import urllib3
from urllib3.util import parse_url

from ssp_jax.data import Document, Row, parse_document
from ssp_jax.errors import InputError, masked
from ssp_jax.retriever import CACHED_QUERIES, Cache

BUSY = (429, 500, 502, 503, 504)  # answers of a server that may do better in a moment
PAUSE_SECONDS = 0.5  # doubles with each retry; the first comes at once


def check_address(key: str, url: str) -> None:
    """InputError that names the config key, unless url is a whole address of a server."""
    try:
        parts = parse_url(url)
        whole = parts.scheme in ("http", "https") and bool(parts.host) and url.isprintable()
    except ValueError:  # such as a port that is no number
        whole = False
    if not whole:
        raise InputError(f"config key {key} is {url!r}; expected http://HOST:PORT/... or https://...")


class RemoteRetriever:
    """Threads may search at the same time. A server that stays away ends the run with one sentence."""

    def __init__(self, url: str, probes: Sequence[str], *, top_k: int, timeout_s: float, retries: int) -> None:
        """Asks for `probes` at once, so that a wrong address is told before anything is compiled.

        A server cannot be asked for a row: what it finds for the probes stands for its corpus. Only the noise documents
        of the first round are drawn from there.
        """
        check_address("retriever.url", url)
        self._url = url
        self.source = masked(url)  # what stands behind an address is not known; a new key changes nothing
        again = urllib3.Retry(
            retries, backoff_factor=PAUSE_SECONDS, backoff_jitter=PAUSE_SECONDS, status_forcelist=BUSY,
            allowed_methods=None, raise_on_status=False, redirect=0,
            respect_retry_after_header=False,  # a server may ask for hours
        )  # fmt: skip
        self._http = urllib3.PoolManager(maxsize=8, timeout=timeout_s, retries=again)
        self._cache: Cache[tuple[Document, ...]] = Cache(CACHED_QUERIES)
        found = {d.id: d for documents in self.search(probes, top_k) for d in documents}
        self._known = list(found.values())
        if not self._known:
            raise self._error(f"that finds something for {len(probes)} queries", "no document")

    def __len__(self) -> int:
        return len(self._known)

    def document(self, row: int) -> Document:
        return self._known[row]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """At most top_k passages for each query, as the server orders them."""
        return [list(documents) for documents in self._cache.get(queries, top_k, self._ask)]

    def _ask(self, queries: list[str], top_k: int) -> list[tuple[Document, ...]]:
        try:
            asked = {"queries": queries, "topk": top_k, "return_scores": True}
            response = self._http.request("POST", self._url, json=asked)
        except urllib3.exceptions.HTTPError as error:
            raise self._error("that answers", getattr(error, "reason", None) or error) from None
        if response.status != 200:
            raise self._error("that answers with status 200", f"{response.status}: {response.data[:200]!r}")
        try:
            results = json.loads(response.data)["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error('that answers {"result": [...]}', repr(response.data[:200])) from None
        if not isinstance(results, list) or [type(r) for r in results] != [list] * len(queries):
            raise self._error(f"that gives a list for each of {len(queries)} queries", repr(response.data[:200]))
        return [tuple(map(self._document, result[:top_k])) for result in results]

    def _document(self, item: Any) -> Document:
        values = item.get("document", item) if isinstance(item, dict) else item
        if not isinstance(values, dict):
            raise self._error("that gives documents", repr(item)[:200])
        contents = values.get("contents")
        if isinstance(contents, str) and "\n" not in contents:
            values = values | {"contents": contents + "\n"}  # to the protocol's own client one line is a title alone
        return parse_document(Row(self._url, 1, values))

    def _error(self, expected: str, found: object) -> InputError:
        return InputError(f"config key retriever.url: {self._url}: expected a search server {expected}, found {found}")
