"""Search by a retrieval server in the protocol of Search-R1, such as a running E5 index.

POST {"queries": [text, ...], "topk": 3, "return_scores": true} to /retrieve gives {"result":
[[{"document": {"id", "contents"}, "score": x}, ...], ...]}. Servers without scores give the
documents themselves; those that ask a web search or Anserini's BM25 give documents without an id,
or their contents alone.
"""

import abc
import hashlib
import itertools
import json
import random
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ssp_jax.data import Document, Row, title_and_text
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.retriever.search import CACHE_BYTES, QueryCache, shortened
from ssp_jax.runtime.request import Reply, RequestError, Secrets, check_address, post

BUSY = (429, 500, 502, 503, 504)  # statuses after which a later try may succeed
PAUSE_SECONDS = 0.5  # before the second retry, doubled with each further one; the first has none
LONGEST_PAUSE_SECONDS = 60.0
# A longer text is no passage; a model sees some hundred words of it.
PASSAGE_CHARACTERS = 1 << 20
# So many unusable passages in a row end the run: the server gives nothing to learn from.
BROKEN_IN_A_ROW = 100


class Probed(abc.ABC):
    """A search that cannot be asked for a row of its corpus: what it finds for some queries stands
    for it.

    Only the noise documents of the first round are drawn from there. Several threads may search at
    the same time.
    """

    program_bytes = 0  # on a device, that a search takes

    def __init__(self, source: str, probes: Sequence[str], top_k: int) -> None:
        """source: all that is known of what is searched. Searches for the probes."""
        self.source = source
        self._cache: QueryCache[tuple[Document, ...]] = QueryCache(CACHE_BYTES, _bytes)
        results = self.search(probes, top_k)
        documents = itertools.chain.from_iterable(results)
        self._known = list({document.id: document for document in documents}.values())

    def __len__(self) -> int:
        return len(self._known)

    def document(self, corpus_row: int) -> Document:
        """A passage that was found for the probes."""
        return self._known[corpus_row]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """At most top_k passages for each query, best first."""
        queries = [shortened(query) for query in queries]
        return [list(documents) for documents in self._cache.get(queries, top_k, self._ask)]

    @abc.abstractmethod
    def _ask(self, queries: list[str], top_k: int) -> list[tuple[Document, ...]]:
        """The passages of each of these queries."""


class RemoteRetriever(Probed):
    """A search server.

    Raises InputError, which ends the run, if the server does not answer after all retries.
    """

    def __init__(
        self, url: str, probes: Sequence[str], *, top_k: int, timeout_s: float, retries: int
    ) -> None:
        """Asks for `probes` at once, so that a wrong address is reported before all compiling."""
        check_address("retriever.url", url)
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries
        self._secrets = Secrets(url)
        self.left_out = 0  # passages that could not be used
        self._broken_in_a_row = 0
        super().__init__(masked(url), probes, top_k)  # a new key does not change what is searched
        if not self._known:
            broken = f" but {self.left_out} unusable ones" if self.left_out else ""
            raise self._error(
                f"that finds something for {len(probes)} queries", f"no document{broken}"
            )

    def _ask(self, queries: list[str], top_k: int) -> list[tuple[Document, ...]]:
        reply = self._post({"queries": queries, "topk": top_k, "return_scores": True})
        if reply.status != 200:
            found = f"{reply.status}: {reply.body[:200]!r}"
            raise self._error("that answers with status 200", found)
        try:
            results = json.loads(reply.body)["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error('that answers {"result": [...]}', repr(reply.body[:200])) from None
        if not isinstance(results, list) or [*map(type, results)] != [list] * len(queries):
            expected = f"that gives a list for each of {len(queries)} queries"
            raise self._error(expected, repr(reply.body[:200]))
        return [self._usable(result[:top_k]) for result in results]

    def _post(self, value: Any) -> Reply:
        """Repeats a try that fails or is refused by a busy server: at once, then with pauses."""
        pause = 0.0
        for retries_left in range(self._retries, -1, -1):
            try:
                reply = post(self._url, value, self._timeout_s)
                if not retries_left or reply.status not in BUSY:
                    return reply
            except RequestError as error:
                if not retries_left:
                    raise self._error("that answers", error) from None
            threading.Event().wait(pause * random.uniform(1.0, 2.0))
            pause = min(max(2 * pause, PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _usable(self, items: list[Any]) -> tuple[Document, ...]:
        """The passages without the empty or broken ones, which are counted: web pages often are."""
        found = []
        for item in items:
            try:
                found.append(self._document(item))
                self._broken_in_a_row = 0
            except InputError as error:
                self._leave_out(error)
        return tuple(found)

    def _document(self, item: Any) -> Document:
        """The passage of an item in any of the servers' forms. Raises InputError."""
        values = item.get("document", item) if isinstance(item, dict) else item
        if isinstance(values, str):
            values = {"contents": values}
        if not isinstance(values, dict):
            raise self._error("that gives documents", repr(item)[:200])
        title, text = title_and_text(Row(masked(self._url), 1, values, "document"))
        if len(title) + len(text) > PASSAGE_CHARACTERS:
            expected = f"that gives passages of at most {PASSAGE_CHARACTERS:,} characters"
            raise self._error(expected, f"{len(title) + len(text):,}")
        return Document(document_id(values.get("id"), title, text), title, text)

    def _leave_out(self, error: InputError) -> None:
        """Counts an unusable passage. Prints the 1st, 10th, 100th, ... of them."""
        self.left_out += 1
        self._broken_in_a_row += 1
        if self._broken_in_a_row >= BROKEN_IN_A_ROW:
            raise InputError(self._secrets.hidden(str(error)))
        if str(self.left_out).strip("0") == "1":
            last = self._secrets.hidden(sentence(error))
            message = f"search: {self.left_out} unusable passages left out so far; the last: {last}"
            print(message, file=sys.stderr, flush=True)

    def _error(self, expected: str, found: object) -> InputError:
        place = f"config key retriever.url: {self._url}"
        message = f"{place}: expected a search server {expected}, found {found}"
        return InputError(self._secrets.hidden(message))


def document_id(given: object, title: str, text: str) -> str:
    """The document's id, or a digest of its contents where the server gives none."""
    if type(given) is int:
        return str(given)
    if isinstance(given, str) and given.strip() and given.isprintable():
        return given.strip()
    return hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=8).hexdigest()


def _bytes(documents: tuple[Document, ...]) -> int:
    """Bytes of documents in memory."""
    return sum(
        sys.getsizeof(item)
        for document in documents
        for item in (document, document.id, document.title, document.text)
    )
