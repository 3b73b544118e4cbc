"""One HTTP request, bounded in time and in size whatever the server does.

The timeout of a socket bounds the wait for the next byte only, so a server that sends one now and
then could hold a client for ever; and no timeout bounds the look-up of a host name. So each request
runs in a thread of its own, and the caller waits for it until the deadline. The thread is a daemon:
a process that ends does not wait for it.
"""

import base64
import functools
import http.client
import json
import socket
import ssl
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ssp_jax.errors import InputError, masked

# Limit of a reply, packed and unpacked: a thousand queries with ten passages of 6 KB.
REPLY_BYTES = 1 << 26
_PIECE = 1 << 16
_PATH = "/%:@!$&'()*+,;=~"  # characters that a path may hold; others are escaped
_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "User-Agent": "ssp_jax",
}
# Content encoding -> zlib's wbits, 0 for none.
_PACKED = {"gzip": 31, "x-gzip": 31, "deflate": 47, "": 0, "identity": 0}


class RequestError(Exception):
    """There is no whole reply; the message says why."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


def check_address(key: str, url: str) -> None:
    """InputError that names the config key, unless url is a whole address of a server."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        whole = whole and url.isprintable() and " " not in url
        (parts.hostname or "").encode("idna")
    except ValueError:  # such as a port that is no number
        whole = False
    if not whole:
        raise InputError(
            f"config key {key} is {masked(repr(url))}; expected http://HOST:PORT/... or https://..."
        )


class Secrets:
    """The secrets of a URL, in every form in which a server may echo them."""

    def __init__(self, url: str, *more: str) -> None:
        """more: further secrets, such as a key that is sent in a header."""
        parts = urlsplit(url)
        user = unquote(parts.username or "")
        password = unquote(parts.password or "")
        secrets = {password, *more} - {""}
        if password:
            secrets.add(base64.b64encode(f"{user}:{password}".encode()).decode())
        for name, value in parse_qsl(parts.query):
            parameter = f"?{name}={value}"
            if masked(parameter) != parameter:
                secrets.add(value)
        forms = set(secrets)
        for secret in secrets:
            forms |= {quote(secret, safe=""), json.dumps(secret)[1:-1]}
        # A shorter string is part of many words, and is no secret.
        self._forms = sorted((form for form in forms if len(form) > 3), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        """The text with *** for these secrets, and for those of other URLs in it."""
        for form in self._forms:
            text = text.replace(form, "***")
        return masked(text)


def post(url: str, value: Any, timeout_s: float, limit: int = REPLY_BYTES) -> Reply:
    """Posts a JSON value; returns the reply, whatever its status. Redirections are not followed.

    timeout_s: of the whole request, from the look-up of the host to the last byte of the reply.
    limit: bytes of the reply. Raises RequestError.
    """
    exchange = _Exchange(url, value, timeout_s, limit)
    exchange.start()
    try:
        exchange.join(timeout_s)
        result = exchange.result  # before abandon(), which causes an error that would be stored
    finally:
        exchange.abandon()
    if isinstance(result, Reply):
        return result
    if result is None or isinstance(result, TimeoutError):
        raise RequestError(f"no whole reply in {timeout_s:g} seconds")
    text = str(result)
    if text and isinstance(result, RequestError | OSError):
        raise RequestError(text)
    raise RequestError(f"{type(result).__name__}: {text}")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=_tls())
    return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)


class _Exchange(threading.Thread):
    """The thread of one request. result: the reply, or the error; None until it has one."""

    def __init__(self, url: str, value: Any, timeout_s: float, limit: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = json.dumps(value).encode()
        self._timeout_s = timeout_s
        self._limit = limit
        self._socket: socket.socket | None = None
        self._is_abandoned = False
        self.result: Reply | Exception | None = None

    def run(self) -> None:
        connection = _connection(self._url, self._timeout_s)
        try:
            connection.connect()
            # The connection drops its socket when the server announces that it will close.
            self._socket = connection.sock
            if not self._is_abandoned:
                connection.request("POST", _target(self._url), self._body, _headers(self._url))
                with connection.getresponse() as response:
                    self.result = Reply(response.status, _read(response, self._limit))
        except (RequestError, OSError, http.client.HTTPException, ValueError, zlib.error) as error:
            self.result = error
        finally:
            connection.close()

    def abandon(self) -> None:
        """Ends the thread if it still waits for the server."""
        self._is_abandoned = True
        if self._socket is not None and self.is_alive():
            with suppress(OSError):  # it may be closed by now
                self._socket.shutdown(socket.SHUT_RDWR)


def _target(url: str) -> str:
    """Path and query, escaped."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", _PATH)
    query = quote(parts.query, _PATH + "?")
    return f"{path}?{query}" if query else path


def _headers(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if not parts.username:
        return _HEADERS
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return _HEADERS | {"Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    packing = (response.getheader("Content-Encoding") or "").strip().lower()
    if packing not in _PACKED:
        raise RequestError(f"a reply in content encoding {packing[:40]!r}")
    unpack = zlib.decompressobj(_PACKED[packing]) if _PACKED[packing] else None
    body = bytearray()
    received = 0
    while piece := response.read1(_PIECE):
        received += len(piece)
        # One byte beyond the limit shows that there is more; no more than that is unpacked.
        body += unpack.decompress(piece, limit + 1 - len(body)) if unpack else piece
        if max(received, len(body)) > limit:
            raise RequestError(f"a reply of more than {limit:,} bytes")
    if unpack and not unpack.eof:
        raise RequestError(f"a reply in {packing} that is cut off")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)
