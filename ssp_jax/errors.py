"""Bad input, and foreign text in messages: one sentence that a terminal can show."""

import contextlib
import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

# Characters that act instead of being shown: control characters but newline and tab, those that
# turn the direction of writing or break a line, half surrogates, and invisible tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SECRET_NAMES = "api[_-]?key|key|token|access[_-]?token|password|passwd|secret|signature|sig|auth"
_USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#'\"]*@", re.IGNORECASE)
# The value ends before the punctuation of the sentence that it stands in.
_SECRET_PARAMETER = re.compile(
    rf"([?&;](?:{_SECRET_NAMES})=)[^\s&;#'\"]+?(?=[:,.)]*(?:[\s&;#'\"]|$))", re.IGNORECASE
)


class InputError(ValueError):
    """Unusable input of the user. The message is one sentence: what, where, what was expected."""


def printable(text: str) -> str:
    """Foreign text for a terminal or a log: characters that act on a terminal become escapes.

    Newlines and tabs stay. Models, passages, servers and file names can hold anything.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_line(value: Any) -> str:
    """JSON on one line, with characters that act on a terminal as escapes."""
    return _UNPRINTABLE.sub(_json_escape, json.dumps(value, ensure_ascii=False))


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


def masked(text: str) -> str:
    """The text without secrets of URLs: user and password, and parameters such as api_key."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def sentence(error: BaseException | str) -> str:
    """An error as the one line that a user sees."""
    return printable(masked(" ".join(str(error).split())))


def shown(value: object) -> str:
    """A value of a file as a message quotes it: short, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = 60
    return short.repr(value)


def first_line(error: BaseException) -> str:
    """What an error says, without what libraries append to it (traces, advice), or its kind."""
    lines = str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads a file into an InputError that names `place`.

    Only for calls of libraries on files of the user. Their parsers raise everything: ValueError,
    TypeError, KeyError, RecursionError, and tokenizers (in Rust) a bare Exception. So the net is as
    wide as that, and is spread here only.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        # Where Rust panics, the error is of a class that is no Exception and has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if type(error) is Exception else f"{type(error).__name__}: "
        raise InputError(f"{place} cannot be read: {kind}{first_line(error)}") from None
