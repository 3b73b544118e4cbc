"""Search by somebody's retrieval server, in the protocol of Search-R1: an E5 index that is already
running.

POST {"queries": [text, ...], "topk": 3, "return_scores": true} to /retrieve gives {"result":
[[{"document": {"id", "contents"}, "score": x}, ...], ...]}; servers that know no scores give the
documents themselves, and those that ask a web search or Anserini's BM25 give documents without an
id, or their contents alone.
"""

import hashlib
import json
import random
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ssp_jax.data import Document, Row, title_and_text
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.retriever.search import CACHE_BYTES, Cache, shortened
from ssp_jax.runtime.request import Reply, RequestError, Secrets, check_address, post

BUSY = (429, 500, 502, 503, 504)  # answers of a server that may do better in a moment
PAUSE_SECONDS = 0.5  # doubles with each retry; the first comes at once
LONGEST_PAUSE_SECONDS = 60.0
# a longer one is no passage; a model is shown some hundreds of words of it
PASSAGE_CHARACTERS = 1 << 20
# passages without a usable one between them: such a server gives nothing to learn from
BROKEN_IN_A_ROW = 100


class RemoteRetriever:
    """Threads may search at the same time. A server that stays away ends the run with one sentence."""

    def __init__(
        self, url: str, probes: Sequence[str], *, top_k: int, timeout_s: float, retries: int
    ) -> None:
        """Asks for `probes` at once, so that a wrong address is told before anything is compiled.

        A server cannot be asked for a row: what it finds for the probes stands for its corpus. Only
        the noise documents of the first round are drawn from there.
        """
        check_address("retriever.url", url)
        self._url, self._timeout_s, self._retries = url, timeout_s, retries
        self._secrets = Secrets(url)
        # what stands behind an address is not known; a new key changes nothing
        self.source = masked(url)
        self._cache: Cache[tuple[Document, ...]] = Cache(CACHE_BYTES, _size)
        self.left_out = 0  # passages that could not be used
        self._broken_in_a_row = 0
        found = {d.id: d for documents in self.search(probes, top_k) for d in documents}
        self._known = list(found.values())
        if not self._known:
            broken = f" but {self.left_out} unusable ones" if self.left_out else ""
            raise self._error(
                f"that finds something for {len(probes)} queries", f"no document{broken}"
            )

    def __len__(self) -> int:
        return len(self._known)

    def document(self, row: int) -> Document:
        return self._known[row]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """At most top_k passages for each query, as the server orders them."""
        queries = [shortened(query) for query in queries]
        return [list(documents) for documents in self._cache.get(queries, top_k, self._ask)]

    def _ask(self, queries: list[str], top_k: int) -> list[tuple[Document, ...]]:
        reply = self._post({"queries": queries, "topk": top_k, "return_scores": True})
        if reply.status != 200:
            raise self._error(
                "that answers with status 200", f"{reply.status}: {reply.body[:200]!r}"
            )
        try:
            results = json.loads(reply.body)["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error('that answers {"result": [...]}', repr(reply.body[:200])) from None
        if not isinstance(results, list) or [type(r) for r in results] != [list] * len(queries):
            raise self._error(
                f"that gives a list for each of {len(queries)} queries", repr(reply.body[:200])
            )
        return [self._usable(result[:top_k]) for result in results]

    def _post(self, value: Any) -> Reply:
        """A try that fails, or that a busy server refuses, is repeated: at once, and then after
        pauses that double.
        """
        pause = 0.0
        for left in range(self._retries, -1, -1):
            try:
                reply = post(self._url, value, self._timeout_s)
                if not left or reply.status not in BUSY:
                    return reply
            except RequestError as error:
                if not left:
                    raise self._error("that answers", error) from None
            threading.Event().wait(pause * random.uniform(1.0, 2.0))
            pause = min(max(2 * pause, PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _usable(self, items: list[Any]) -> tuple[Document, ...]:
        """The passages but for those that are empty or broken, which are counted: web pages often
        are.
        """
        found = []
        for item in items:
            try:
                found.append(self._document(item))
                self._broken_in_a_row = 0
            except InputError as error:
                self._leave_out(error)
        return tuple(found)

    def _document(self, item: Any) -> Document:
        values = item.get("document", item) if isinstance(item, dict) else item
        if isinstance(values, str):
            values = {"contents": values}
        if not isinstance(values, dict):
            raise self._error("that gives documents", repr(item)[:200])
        title, text = title_and_text(Row(masked(self._url), 1, values, "document"))
        if len(title) + len(text) > PASSAGE_CHARACTERS:
            found = f"{len(title) + len(text):,}"
            raise self._error(
                f"that gives passages of at most {PASSAGE_CHARACTERS:,} characters", found
            )
        return Document(_name(values.get("id"), title, text), title, text)

    def _leave_out(self, error: InputError) -> None:
        """Says so at the 1st, 10th, 100th, ... of them."""
        self.left_out += 1
        self._broken_in_a_row += 1
        if self._broken_in_a_row >= BROKEN_IN_A_ROW:
            raise InputError(self._secrets.hidden(str(error)))
        if str(self.left_out).strip("0") == "1":
            last = self._secrets.hidden(sentence(error))
            print(
                f"search: {self.left_out} unusable passages left out so far; the last: {last}",
                file=sys.stderr,
                flush=True,
            )

    def _error(self, expected: str, found: object) -> InputError:
        said = f"config key retriever.url: {self._url}: expected a search server {expected}, found {found}"
        return InputError(self._secrets.hidden(said))


def _name(given: object, title: str, text: str) -> str:
    """The document's id, or a digest of its contents where the server gives none."""
    if type(given) is int:
        return str(given)
    if isinstance(given, str) and given.strip() and given.isprintable():
        return given.strip()
    return hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=8).hexdigest()


def _size(documents: tuple[Document, ...]) -> int:
    return sum(sys.getsizeof(part) for d in documents for part in (d, d.id, d.title, d.text))
