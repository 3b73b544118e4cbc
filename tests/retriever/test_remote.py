"""Search-R1's /retrieve protocol with a local server: both answer forms, failures and retries."""

import contextlib
import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs import default
from ssp_jax import train
from ssp_jax.assembly.search import open_search
from ssp_jax.config.checks import check_values
from ssp_jax.data import Document, Task
from ssp_jax.errors import InputError
from ssp_jax.retriever import remote
from ssp_jax.retriever.remote import RemoteRetriever
from ssp_jax.retriever.search import QUERY_CHARACTERS
from ssp_jax.runtime.request import REPLY_BYTES
from tests.test_train import small, steps_of

PARIS = {"id": "7", "contents": '"Paris"\nA city.'}
ROME = {"id": 8, "contents": '"Rome"\nAnother.'}


class Server(ThreadingHTTPServer):
    """Answers with `replies`, then with Paris and Rome for each query. Records the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.replies = []
        self.with_scores = True
        self.headers = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/retrieve"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if self.server.replies:
            status, body = self.server.replies.pop(0)
        else:
            status = 200
            body = self.found(asked)
        # before the reply, or before each byte of it
        pause = {"slow": 0.5, "trickle": 0.01}.get(status, 0)
        whole = status != "trickle"
        status = 200 if pause else status
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(payload))), *self.server.headers.items()):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has hung up
            for start in range(0, len(payload), len(payload) if whole else 1):
                time.sleep(pause)
                self.wfile.write(payload if whole else payload[start : start + 1])

    def found(self, asked):
        items = [PARIS, ROME]
        if self.server.with_scores:
            items = [{"document": document, "score": 1.5 - i} for i, document in enumerate(items)]
        return {"result": [items for _ in asked["queries"]]}

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def opened(server, **changes):
    settings = {"top_k": 3, "timeout_s": 5.0, "retries": 2} | changes
    return RemoteRetriever(server.url, ["probe"], **settings)


def test_search(server):
    retriever = opened(server)
    paris = Document("7", '"Paris"', "A city.")
    rome = Document("8", '"Rome"', "Another.")
    # what the probe has found
    assert [retriever.document(row) for row in range(len(retriever))] == [paris, rome]
    assert retriever.search(["a", "b", "a"], 2) == [[paris, rome]] * 3
    assert retriever.search(["c", "b"], 2) == [[paris, rome]] * 2
    sent = [(["probe"], 3), (["a", "b"], 2), (["c"], 2)]  # each query once
    assert server.asked == [
        ("/retrieve", {"queries": q, "topk": k, "return_scores": True}) for q, k in sent
    ]
    server.with_scores = False  # the other form of the answer, and more than was asked for
    assert retriever.search(["d"], 1) == [[paris]]


PARIS_ID = Document(remote.document_id(None, '"Paris"', "A city."), '"Paris"', "A city.")


@pytest.mark.parametrize(
    ("item", "found"),
    [
        # Search-R1's web searches
        ({"document": {"contents": '"Paris"\nA city.'}, "score": 3.5}, PARIS_ID),
        # its BM25, no scores
        ({"title": "Paris", "text": "A city.", "contents": '"Paris"\nA city.'}, PARIS_ID),
        ({"document": {"id": None, "contents": '"Paris"\nA city.'}}, PARIS_ID),
        ({"document": {"id": "", "contents": '"Paris"\nA city.'}}, PARIS_ID),
        ({"document": {"id": [7], "contents": '"Paris"\nA city.'}}, PARIS_ID),
        ({"document": {"id": "\ud800", "contents": '"Paris"\nA city.'}}, PARIS_ID),
        ('"Paris"\nA city.', PARIS_ID),  # the contents alone
        ({"document": '"Paris"\nA city.', "score": 1}, PARIS_ID),
        (
            {"document": {"id": 7, "title": "Paris", "text": "A city."}},
            Document("7", "Paris", "A city."),
        ),
        # one line, as Search-R1's client has it
        ({"id": "7", "contents": '"Paris"'}, Document("7", '"Paris"', "")),
    ],
)
def test_forms_of_a_document(server, item, found):
    retriever = opened(server)
    server.replies = [(200, {"result": [[item, item]]})]
    assert retriever.search(["a"], 1) == [[found]]


BROKEN = [
    None,
    3,
    [],
    {},
    {"document": {"id": "1"}},
    {"id": "1", "contents": " \n"},
    {"contents": "\ud800"},
    "",
]


def test_a_broken_passage_among_good_ones_is_left_out_and_counted(server, capsys):
    retriever = opened(server)
    for item in BROKEN:
        server.replies.append((200, {"result": [[item, PARIS]]}))
        assert [len(found) for found in retriever.search([f"query {item}"], 3)] == [1]
    assert retriever.left_out == len(BROKEN) and retriever.source == server.url
    lines = capsys.readouterr().err.splitlines()
    expected = "search: 1 unusable passages left out so far; the last: .*gives documents"
    assert len(lines) == 1 and re.match(expected, lines[0])
    items = [{"contents": "word " * 300_000}, {"contents": ""}, ROME]
    server.replies = [(200, {"result": [items]})]
    assert [len(found) for found in retriever.search(["long"], 3)] == [1]
    assert "search: 10 unusable passages" in capsys.readouterr().err


def test_a_server_of_nothing_but_broken_passages_ends_the_run(server, monkeypatch):
    monkeypatch.setattr(remote, "BROKEN_IN_A_ROW", 6)
    retriever = opened(server)
    for items in ([None] * 5 + [PARIS], [None] * 5):
        server.replies = [(200, {"result": [items]})]
        retriever.search([str(items)], 10)
    server.replies = [(200, {"result": [[{"id": "1"}]]})]
    with pytest.raises(InputError, match='document 1: field "contents" expected non-empty text'):
        retriever.search(["b"], 10)


def test_long_queries_are_cut(server):
    retriever = opened(server)
    retriever.search(["moon \ud800" + "a" * 10**7], 1)
    assert server.asked[-1][1]["queries"] == ["moon ?" + "a" * (QUERY_CHARACTERS - 6)]
    # The same query once it is cut, so it is cached.
    assert len(retriever.search(["moon \ud800" + "a" * 10**6], 1)[0]) == 1
    assert len(server.asked) == 2


def test_the_deadline_is_of_each_try_as_a_whole(server):
    """A server that sends a byte now and then has not answered."""
    retriever = opened(server, timeout_s=0.2, retries=1)
    server.replies = [("trickle", b"a" * 10_000)] * 2
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"retriever\.url.*that answers, found no whole reply in 0\.2 seconds"
    ):
        retriever.search(["a"], 3)
    assert time.monotonic() - began < 5 and len(server.asked) == 3
    server.replies = [("trickle", b"a" * 10_000)]
    assert len(retriever.search(["a"], 3)[0]) == 2


def test_a_reply_of_any_size_is_bounded(server, monkeypatch):
    retriever = opened(server, retries=0)
    body = gzip.compress(bytes(REPLY_BYTES + 1), 1)
    assert len(body) < 1_000_000
    server.replies, server.headers = [(200, body)], {"Content-Encoding": "gzip"}
    with pytest.raises(InputError, match="found a reply of more than 67,108,864 bytes"):
        retriever.search(["a"], 3)
    server.replies = [(200, gzip.compress(json.dumps({"result": [[PARIS]]}).encode()))]
    assert len(retriever.search(["b"], 3)[0]) == 1


def test_secrets_of_the_address_are_not_told(server, capsys):
    url = server.url.replace("http://", "http://me:hunter2@") + "?api_key=hunter3"
    retriever = RemoteRetriever(url, ["probe"], top_k=3, timeout_s=5.0, retries=0)
    assert "hunter" not in retriever.source
    for reply in (
        (404, b"no api_key=hunter3, me:hunter2"),
        (200, b"?"),
        (200, {"result": [["", "hunter3"]]}),
    ):
        server.replies = [reply]
        try:
            retriever.search([str(reply)], 3)
        except InputError as error:
            assert "hunter" not in str(error)
            assert url.partition("@")[2].partition("?")[0] in str(error)
    assert "hunter" not in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError) as refused:
        retriever.search(["gone"], 3)
    assert "hunter" not in str(refused.value)


def test_found_nothing(server):
    retriever = opened(server)
    server.replies = [(200, {"result": [[], [PARIS]]})]
    assert [len(found) for found in retriever.search(["a", "b"], 3)] == [0, 1]
    server.replies = [(200, {"result": [[]]})]
    with pytest.raises(InputError, match="finds something for 1 queries"):
        opened(server)


def test_failure_that_passes(server):
    retriever = opened(server)
    server.replies = [(503, b"starting"), (500, b"again")]
    assert len(retriever.search(["a"], 3)[0]) == 2 and len(server.asked) == 4
    server.replies, server.headers = [(503, b"ask again tomorrow")], {"Retry-After": "86400"}
    assert len(retriever.search(["b"], 3)[0]) == 2 and len(server.asked) == 6
    slow = opened(server, timeout_s=0.2)
    server.replies = [("slow", {"result": [[]]})]
    assert len(slow.search(["a"], 3)[0]) == 2


@pytest.mark.parametrize(
    "reply, said",
    [
        ((503, b"starting"), "503"),
        ((404, b"no such page"), "404.*no such page"),
        ((200, b"<html>"), "html"),
        ((200, b"[" * 100_000), r"\[\[\["),
        ((200, {"detail": "?"}), "detail"),
        ((200, {"result": []}), "a list for each of 1 queries"),
        ((200, {"result": ["x"]}), "a list for each of 1 queries"),
        ((200, {"result": [None]}), "a list for each of 1 queries"),
        ((307, b""), "status 200, found 307"),
    ],
)
def test_failure_that_stays(server, reply, said):
    retriever = opened(server)
    server.replies = [reply] * 3
    with pytest.raises(InputError, match=said) as caught:
        retriever.search(["a"], 3)
    assert server.url in str(caught.value) and "expected" in str(caught.value)


def test_no_server(server):
    retriever = opened(server, retries=1)
    server.shutdown()
    server.server_close()
    with pytest.raises(
        InputError, match=r"retriever\.url.*expected a search server that answers.*refused"
    ):
        retriever.search(["a"], 3)


@pytest.mark.ci
def test_a_server_that_is_lost_costs_no_finished_step(server, tmp_path, capsys):
    class Failing(Handler):
        def found(self, asked):
            stepped = (tmp_path / "metrics.jsonl").exists() and steps_of(tmp_path)
            return {"detail": "out of order"} if stepped else super().found(asked)

    server.RequestHandlerClass = Failing
    changes = {
        "eval__before": False,
        "eval__after": False,
        "checkpoint__export": "none",
        "checkpoint__every": 0,
        "limits__searches": 1,
        "game__answers_per_step": 2,
        "log__tensorboard": False,
    }
    config = small(steps=2, retriever__kind="http", retriever__url=server.url, **changes)
    # as text: code 1
    with pytest.raises(SystemExit, match=r"^ssp_jax: .*retriever\.url.*out of order"):
        train.train(config, str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert "saved step 1; the same command goes on from there" in capsys.readouterr().out


def test_a_run_opens_it(server):
    config = default.get_config()
    with config.unlocked():
        config.model.path, config.data.answers, config.retriever.kind = "model", "answers", "http"
    with pytest.raises(InputError, match=r"retriever\.url is empty"):
        check_values(config)
    config.retriever.url = server.url
    check_values(config)  # needs no corpus
    search = open_search(config.retriever, "unused", [Task(0, ("Paris",)), Task(1, ("Rome",))])
    assert len(search) == 2 and server.asked[0][1]["queries"] == ["Paris", "Rome"]
