"""One request: whatever a server sends, and however slowly, it ends in time, within bounds, with a
reason.
"""

import gzip
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from ssp_jax.errors import InputError
from ssp_jax.runtime.request import Reply, RequestError, check_address, post

Answer = Callable[[socket.socket], object]
OK = b"HTTP/1.1 200 OK\r\n"
LIMIT = 1 << 20


def packed(body: bytes) -> bytes:
    """The same at each call, for it is part of a test's name."""
    return gzip.compress(body, mtime=0)


def read(connection: socket.socket) -> bytes:
    """The whole request: a connection that is closed before is reset, and the reply is lost."""
    sent = b""
    while not sent.endswith(b"}"):
        sent += connection.recv(1 << 16)
    return sent


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server that answers one connection by whatever `answer` does with it."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # whoever asked has hung up
            read(connection)
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        thread.join()


def sends(raw: bytes) -> Answer:
    return lambda connection: connection.sendall(raw)


def trickles(head: bytes, piece: bytes) -> Answer:
    """Sends something every few milliseconds, for ever."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(0.005)

    return answer


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"Content-Length: 2\r\n\r\n{}",
        OK + b"\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        OK + b"Content-Encoding: gzip\r\n\r\n" + packed(b"{}"),
        OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(b"{}"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n{}",
    ],
)
def test_whole_replies(raw):
    with serving(sends(raw)) as url:
        assert post(url, {}, 10.0) == Reply(200, b"{}")


def test_what_is_sent():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        port = listener.getsockname()[1]
        asked = threading.Thread(
            target=lambda: suppressed(f"http://me:pass%20word@127.0.0.1:{port}/a b/ü?q=é&k=1")
        )
        asked.start()
        connection, _ = listener.accept()
        with connection:
            sent = read(connection)
        asked.join()
    head, _, body = sent.partition(b"\r\n\r\n")
    assert (
        head.startswith(b"POST /a%20b/%C3%BC?q=%C3%A9&k=1 HTTP/1.1\r\n")
        and body == b'{"a": "\\ud800"}'
    )
    assert b"Authorization: Basic bWU6cGFzcyB3b3Jk" in head and b"pass%20word" not in head


def suppressed(url: str) -> None:
    with suppress(RequestError):
        post(url, {"a": "\ud800"}, 10.0)


@pytest.mark.parametrize(
    "answer",
    [
        trickles(b"HTT", b"P"),
        trickles(OK, b"A"),
        trickles(OK + b"A: ", b"a\r\nA: "),
        trickles(OK + b"Content-Length: 100000\r\n\r\n", b"a"),
        trickles(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        trickles(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        trickles(
            OK + b"Content-Encoding: gzip\r\n\r\n" + packed(b"")[:10], bytes.fromhex("000000ffff")
        ),
        trickles(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda connection: connection.recv(1),
    ],
)
def test_the_deadline_is_of_the_whole_request(answer):
    with serving(answer) as url:
        began = time.monotonic()
        with pytest.raises(
            RequestError, match=r"no whole reply in 0\.2 seconds|more than 100 headers"
        ):
            post(url, {}, 0.2)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (OK + b"\r\n" + bytes(LIMIT + 1), "a reply of more than 1,048,576 bytes"),
        (
            OK + b"Content-Encoding: gzip\r\n\r\n" + packed(bytes(1 << 27)),
            "more than 1,048,576 bytes",
        ),
        (
            OK + b"Content-Encoding: gzip\r\n\r\n" + packed(b"{}")[:-4],
            "a reply in gzip that is cut off",
        ),
        (OK + b"Content-Encoding: gzip\r\n\r\nno gzip", "header check"),
        (OK + b"Content-Encoding: br\r\n\r\n{}", "content encoding 'br'"),
        (OK + b"Content-Length: 20\r\n\r\n{}", "IncompleteRead"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", "IncompleteRead"),
        (OK + b"A: b\r\n" * 101 + b"\r\n", "more than 100 headers"),
        (OK + b"A: " + b"b" * 99_999, "LineTooLong"),
        (b"\0\1\2" * 99, "BadStatusLine"),
        (b"", "closed connection"),
    ],
)
def test_replies_that_are_none(raw, said):
    with serving(sends(raw)) as url, pytest.raises(RequestError, match=said) as caught:
        post(url, {}, 10.0, LIMIT)
    assert len(str(caught.value)) < 1000


def test_a_packed_reply_is_not_unpacked_beyond_the_limit():
    bomb = gzip.compress(bytes(1 << 26))  # which one read brings
    with serving(sends(OK + b"Content-Encoding: gzip\r\n\r\n" + bomb)) as url:
        tracemalloc.start()
        with pytest.raises(RequestError, match="more than"):
            post(url, {}, 10.0, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * LIMIT


def test_a_reply_of_just_the_limit_is_taken():
    with serving(sends(OK + b"Content-Encoding: gzip\r\n\r\n" + packed(bytes(LIMIT)))) as url:
        assert len(post(url, {}, 10.0, LIMIT).body) == LIMIT


def test_a_redirection_is_not_followed():
    with serving(
        sends(
            b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
        )
    ) as url:
        assert post(url, {}, 10.0) == Reply(307, b"")


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RequestError, match="refused"):
        post(f"http://127.0.0.1:{port}/", {}, 10.0)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80/retrieve",
        "localhost:80/x",
        "ftp://host/x",
        "http:///x",
        "http://host:80x/",
        "http://host:70000/",
        "http://host:0/",
        "http://[::1/",
        "http://x/\n",
        "http://x y/",
        f"http://{'x' * 70}.org/",
    ],
)
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(InputError, match=r"retriever\.url is .*; expected http://") as caught:
        check_address("retriever.url", url)
    assert repr(url) in str(caught.value)


def test_a_wrong_address_is_told_without_its_secrets():
    with pytest.raises(InputError) as caught:
        check_address("retriever.url", "ftp://me:hunter2@host/x?api_key=hunter3")
    assert "hunter" not in str(caught.value) and "ftp://***@host/x?api_key=***" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000/retrieve", "HTTPS://host", "http://[::1]:80/v1", "http://bücher.de"],
)
def test_whole_addresses(url):
    check_address("retriever.url", url)
