"""Uploading: one commit in a private repository of the hub; what fails is one sentence."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ssp_jax.errors import InputError
from ssp_jax.export import push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; it keeps what was sent."""

    requests: list[tuple[str, bytes]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.requests.append((f"{self.command} {self.path}", body))
        reply = json.dumps(self.reply(body)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(reply)

    def reply(self, body: bytes) -> object:
        host = f"http://{self.headers['host']}"
        if self.path.endswith("/whoami-v2"):
            return {"name": "me", "type": "user", "auth": {}}
        if self.path.endswith("/repos/create"):
            return {"url": f"{host}/me/mine", "name": "me/mine"}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kinds = [{"path": x["path"], "uploadMode": "regular"} for x in files]
            return {"files": [kind | {"shouldIgnore": False} for kind in kinds]}
        if "/commit/" in self.path:
            return {"commitUrl": f"{host}/me/mine/commit/1", "commitOid": "1"}
        return {"id": "me/mine", "sha": "0", "siblings": [], "errors": []}

    do_GET = do_POST = answer  # noqa: N815


UPLOAD = """
import sys
from pathlib import Path
from ssp_jax.export import push
from ssp_jax.runtime import command

def upload():
    push.check_access("me/mine")
    print(push.upload(Path(sys.argv[1]), "me/mine"))

sys.exit(command.exit_code(upload))
"""


def upload(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Uploads in a process of its own: the hub's client reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", UPLOAD, str(folder)],
        env=os.environ | {"HF_HOME": str(folder / ".hf")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a stand-in for the hub."""
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_upload_is_one_commit_in_a_private_repository(hub: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A search agent\n")
    (tmp_path / "config.json").write_text("{}")
    done = upload(tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_TOKEN="hf_of_the_test")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub}/me/mine\n"
    sent = dict(Hub.requests)
    created = json.loads(sent["POST /api/repos/create"])
    is_private = created.get("private") or created["visibility"] == "private"  # by version
    assert is_private and created["name"] == "mine"
    (commit,) = (body for path, body in Hub.requests if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert {"README.md", "config.json"} <= files


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_of_the_test"},
    ],
)
def test_without_the_hub_an_upload_ends_in_one_sentence(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = upload(tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("ssp_jax: --push=me/mine: expected the Hugging Face hub to take")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "me/mine/more", "../mine", "me/my model"])
def test_a_name_that_is_none_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected USER/NAME"):
        push.check_name(name)
