"""A class of the user's that searches."""

from collections.abc import Sequence
from typing import Any

from ssp_jax.data import Document
from ssp_jax.errors import InputError, shown
from ssp_jax.retriever.remote import Probed, document_id
from ssp_jax.user_code import load

_KIND = "retriever.kind"


class UserRetriever(Probed):
    """A class of the user's, FILE.py:NAME, whose objects have search(queries, top_k).

    It is called with the values of retriever.corpus and retriever.index. A search gives a list for
    each query, of (title, text), best first.
    """

    def __init__(
        self, value: str, corpus: str, index: str, probes: Sequence[str], *, top_k: int
    ) -> None:
        """Raises InputError where there is no such class, or it finds nothing for the probes."""
        self._value = value
        made = load.load(_KIND, value)
        with load.running(_KIND, value):
            self._own = made(corpus, index)
        if not callable(getattr(self._own, "search", None)):
            raise InputError(
                f"config key {_KIND}: objects of {value} expected a method search(queries, top_k)"
            )
        super().__init__(f"{value} {load.digest(value)}", probes, top_k)
        if not self._known:
            raise InputError(
                f"config key {_KIND}: {value} found nothing for {len(probes)} queries; expected "
                "passages"
            )

    def _ask(self, queries: list[str], top_k: int) -> list[tuple[Document, ...]]:
        with load.running(_KIND, self._value):
            results = self._own.search(list(queries), top_k)
        if not isinstance(results, list) or len(results) != len(queries):
            raise self._unusable(f"a list of {len(queries)} lists, one a query", results)
        return [tuple(map(self._document, self._checked(result)[:top_k])) for result in results]

    def _checked(self, result: Any) -> list[Any]:
        if not isinstance(result, list):
            raise self._unusable("a list of (title, text) for each query", result)
        return result

    def _document(self, passage: Any) -> Document:
        is_pair = isinstance(passage, tuple | list) and list(map(type, passage)) == [str, str]
        if not is_pair or not passage[1].strip():
            raise self._unusable("passages (title, text) with a text", passage)
        title, text = (part.encode("utf-8", "replace").decode() for part in passage)
        return Document(document_id(None, title, text), title, text)

    def _unusable(self, expected: str, found: Any) -> InputError:
        return InputError(
            f"config key {_KIND}: search() of {self._value} gives {shown(found)}; expected "
            f"{expected}"
        )
