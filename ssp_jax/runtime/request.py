"""One request to somebody's server: bounded in time and in size, whatever the server does.

A socket's timeout bounds the wait for the next byte, so a server that sends one now and then is
waited for without end; and no timeout bounds the look-up of a name. So each request has a thread of
its own, and who asks waits for it no longer than until the deadline. The thread is a daemon: a
process that ends does not wait for it.
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

# of a reply, as it comes and once unpacked: a thousand queries with ten passages of 6 KB
REPLY_BYTES = 1 << 26
_PIECE = 1 << 16
_PATH = "/%:@!$&'()*+,;=~"  # characters that a path may hold; of others the bytes are escaped
_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "User-Agent": "ssp_jax",
}
# content encoding -> zlib's wbits
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
    """What an address holds that nobody must be shown, and that a server may echo in whatever form."""

    def __init__(self, url: str, *more: str) -> None:
        parts = urlsplit(url)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        plain = {password, *more} - {""}
        if password:
            plain.add(base64.b64encode(f"{user}:{password}".encode()).decode())
        plain |= {
            value
            for name, value in parse_qsl(parts.query)
            if masked(f"?{name}={value}") != f"?{name}={value}"
        }
        forms = (
            plain
            | {quote(secret, safe="") for secret in plain}
            | {json.dumps(secret)[1:-1] for secret in plain}
        )
        # What is shorter stands in many a word, and is no secret.
        self._forms = sorted((form for form in forms if len(form) > 3), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        """The text without them, and without those of other addresses in it."""
        for form in self._forms:
            text = text.replace(form, "***")
        return masked(text)


def post(url: str, value: Any, timeout_s: float, limit: int = REPLY_BYTES) -> Reply:
    """The reply to a JSON value, of whatever status; redirections are not followed.

    timeout_s is for all of it: to find the host, to connect, to send, and for the last byte of the
    reply.
    """
    exchange = _Exchange(url, value, timeout_s, limit)
    exchange.start()
    try:
        exchange.join(timeout_s)
        result = exchange.result  # before it is abandoned, for that makes one too
    finally:
        exchange.abandon()
    if isinstance(result, Reply):
        return result
    if result is None or isinstance(result, TimeoutError):
        raise RequestError(f"no whole reply in {timeout_s:g} seconds")
    text = str(result)
    speaks = isinstance(result, RequestError | OSError) and text
    raise RequestError(text if speaks else f"{type(result).__name__}: {text}")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=timeout_s, context=_tls()
        )
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)


class _Exchange(threading.Thread):
    """result: the reply, or what was raised; None until then."""

    def __init__(self, url: str, value: Any, timeout_s: float, limit: int) -> None:
        super().__init__(daemon=True)
        self._url, self._body, self._timeout_s, self._limit = (
            url,
            json.dumps(value).encode(),
            timeout_s,
            limit,
        )
        self._socket: socket.socket | None = None
        self._is_abandoned = False
        self.result: Reply | Exception | None = None

    def run(self) -> None:
        connection = _connection(self._url, self._timeout_s)
        try:
            connection.connect()
            # the connection itself forgets it when the server says that it will close
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
        """Ends it, where it still waits for the server."""
        self._is_abandoned = True
        if self._socket is not None and self.is_alive():
            with suppress(OSError):  # it may be closed by now
                self._socket.shutdown(socket.SHUT_RDWR)


def _target(url: str) -> str:
    parts = urlsplit(url)
    return quote(parts.path or "/", _PATH) + (
        f"?{quote(parts.query, _PATH + '?')}" if parts.query else ""
    )


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
        # One byte beyond the limit tells that there is more, and no more than that is ever made.
        body += unpack.decompress(piece, limit + 1 - len(body)) if unpack else piece
        if max(received, len(body)) > limit:
            raise RequestError(f"a reply of more than {limit:,} bytes")
    if unpack and not unpack.eof:
        raise RequestError(f"a reply in {packing} that is cut off")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)
