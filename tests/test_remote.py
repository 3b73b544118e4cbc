"""Search-R1's /retrieve protocol against a real local server: both answer forms, failures that pass and that stay."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_train import small, steps_of

from configs import default
from ssp_jax import inputs, remote, train
from ssp_jax.config import check_values
from ssp_jax.data import Document, Task
from ssp_jax.errors import InputError
from ssp_jax.remote import RemoteRetriever

PARIS = {"id": "7", "contents": '"Paris"\nA city.'}
ROME = {"id": 8, "contents": '"Rome"\nAnother.'}


class Server(ThreadingHTTPServer):
    """Answers with `replies`, in turn, then with Paris and Rome for each query; remembers what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.replies, self.with_scores, self.headers = [], [], True, {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/retrieve"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        status, body = self.server.replies.pop(0) if self.server.replies else (200, self.found(asked))
        if status == "slow":
            time.sleep(0.5)
            status = 200
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(payload))), *self.server.headers.items()):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

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
    return RemoteRetriever(server.url, ["probe"], **{"top_k": 3, "timeout_s": 5.0, "retries": 2} | changes)


def test_search(server):
    retriever = opened(server)
    paris, rome = Document("7", '"Paris"', "A city."), Document("8", '"Rome"', "Another.")
    assert [retriever.document(row) for row in range(len(retriever))] == [paris, rome]  # what the probe has found
    assert retriever.search(["a", "b", "a"], 2) == [[paris, rome]] * 3
    assert retriever.search(["c", "b"], 2) == [[paris, rome]] * 2
    sent = [(["probe"], 3), (["a", "b"], 2), (["c"], 2)]  # each query once
    assert server.asked == [("/retrieve", {"queries": q, "topk": k, "return_scores": True}) for q, k in sent]
    server.with_scores = False  # the other form of the answer, and more than was asked for
    assert retriever.search(["d"], 1) == [[paris]]


def test_one_line_is_a_title_without_a_text(server):
    """As Search-R1's own client has it."""
    retriever = opened(server)
    server.replies = [(200, {"result": [[{"id": "7", "contents": '"Paris"'}]]})]
    assert retriever.search(["a"], 3) == [[Document("7", '"Paris"', "")]]


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
        ((200, {"result": [["x"]]}), "that gives documents"),
        ((200, {"result": [[{"document": {"id": "1"}}]]}), "contents"),
    ],
)
def test_failure_that_stays(server, reply, said):
    retriever = opened(server)
    server.replies = [reply] * 3
    with pytest.raises(InputError, match=said) as caught:
        retriever.search(["a"], 3)
    assert server.url in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80/retrieve",
        "localhost:80/x",
        "ftp://host/x",
        "http:///x",
        "http://host:80x/",
        "http://[::1/",
        "http://x/\n",
    ],
)
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(InputError, match=r"retriever\.url is .*; expected http://") as caught:
        RemoteRetriever(url, ["probe"], top_k=3, timeout_s=5.0, retries=0)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/retrieve", "HTTPS://host", "http://[::1]:80/v1"])
def test_whole_addresses(url):
    remote.check_address("retriever.url", url)


def test_no_server(server):
    retriever = opened(server, retries=1)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"retriever\.url.*expected a search server that answers.*refused"):
        retriever.search(["a"], 3)


def test_a_server_that_is_lost_costs_no_finished_step(server, tmp_path, capsys):
    class Failing(Handler):
        def found(self, asked):
            stepped = (tmp_path / "metrics.jsonl").exists() and steps_of(tmp_path)
            return {"detail": "out of order"} if stepped else super().found(asked)

    server.RequestHandlerClass = Failing
    changes = {"eval__before": False, "eval__after": False, "checkpoint__export": False, "checkpoint__every": 0}
    changes |= {"engine__cache_buckets": (), "engine__extend_buckets": (448,), "limits__searches": 1, "mesh__fsdp": 1}
    changes |= {"game__answers_per_step": 2, "engine__slots": 4, "learner__rows": 1, "log__tensorboard": False}
    config = small(steps=2, retriever__kind="http", retriever__url=server.url, **changes)
    with pytest.raises(SystemExit, match=r"^ssp_jax: .*retriever\.url.*out of order"):  # as text: code 1
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
    search = inputs.open_search(config.retriever, "unused", [Task(0, ("Paris",)), Task(1, ("Rome",))])
    assert len(search) == 2 and server.asked[0][1]["queries"] == ["Paris", "Rome"]
