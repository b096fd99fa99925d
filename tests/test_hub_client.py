"""The Hub's own client against a small Hub on this machine: what is whole arrives, everything else is one message."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
from huggingface_hub.utils import _http as client_http
from worlds import mixed_recipe

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import MmgenError, UsageError
from stages.hub import push, resolve
from stages.inspect_path import describe
from stages.model import build_model
from stages.training.checkpoint import save_checkpoint

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """One repository of each kind, org/name, with the files of `files`; `wrong` says what it does wrong."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}  # noqa: RUF012 (a test's)
    listed: dict[str, bytes] = {}  # noqa: RUF012
    uploaded: dict[str, bytes] = {}  # noqa: RUF012
    wrong = ""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if self.wrong.isdigit():
            return self.answer(int(self.wrong), b"no", Retry_After="0")
        if self.wrong == "not json" and path.startswith("/api/"):
            return self.answer(200, b"<html>log in</html>", Content_Type="text/html")
        if self.wrong == "other json" and path.startswith("/api/"):
            return self.json(["x", 3])
        if path.startswith("/api/") and "/tree/" in path:
            return self.json([self.entry(name, data) for name, data in (self.listed or self.files).items()])
        if path.startswith("/api/"):
            return self.json({"id": "org/name", "sha": SHA, "siblings": [], "private": False, "disabled": False, "gated": False})
        name = path.partition(f"/resolve/{SHA}/")[2]
        data = (self.listed or self.files).get(name)
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{self.blob(data)}"', "X-Repo-Commit": SHA, "Content_Type": "application/octet-stream"}
        if self.wrong == "no commit":
            del headers["X-Repo-Commit"]
        if self.command == "GET" and self.wrong == "cut":
            return self.answer(200, data[: len(data) // 2], Content_Length=str(len(data)), **headers)
        if self.command == "GET" and self.wrong == "shorter":
            return self.answer(200, data[: len(data) // 2], **headers)
        self.answer(200, data, **headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.wrong.isdigit():
            return self.answer(int(self.wrong), b"no", Retry_After="0")
        if self.path.startswith("/api/repos/create"):
            return self.json({"url": constants.ENDPOINT + "/org/name", "name": "name"})
        if self.path.startswith("/api/validate-yaml"):
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.uploaded[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.json({"commitUrl": f"{constants.ENDPOINT}/org/name/commit/{SHA}", "commitOid": SHA, "success": True})
        self.answer(404)

    def blob(self, data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": self.blob(data)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    made = type("Hub", (FakeHub,), {"files": {}, "listed": {}, "uploaded": {}, "wrong": ""})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(client_http.time, "sleep", lambda seconds: None)  # it waits between tries
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def data(tmp_path: Path, hub: type[FakeHub]) -> type[FakeHub]:
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(3):
            writer.write(Sample(f"{number}", {"caption": f"picture {number}"}))
    hub.files = {
        path.relative_to(tmp_path / "set").as_posix(): path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()
    }
    return hub


@pytest.fixture
def model(tmp_path: Path, hub: type[FakeHub]) -> type[FakeHub]:
    recipe = mixed_recipe()
    save_checkpoint(tmp_path / "model", recipe, build_model(recipe, 0).state_dict())
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    return hub


def test_a_data_set_and_a_model_arrive_whole(data: type[FakeHub], tmp_path: Path) -> None:
    for spec in ("hf://datasets/org/name", "hf://datasets/org/name/data-000000.tar"):
        assert [sample.fields["caption"] for sample in open_shards(spec)] == [f"picture {number}" for number in range(3)]
    assert describe("hf://datasets/org/name").data["samples"] == 3


def test_a_model_arrives_and_is_pushed(model: type[FakeHub], tmp_path: Path) -> None:
    assert describe(str(resolve("hf://org/name"))).data["kind"] == "checkpoint"
    (tmp_path / "model" / "state").mkdir()
    (tmp_path / "model" / "state" / "state.json").write_text("{}")
    push(tmp_path / "model", "hf://org/name")
    assert model.uploaded == model.files


@pytest.mark.parametrize(
    "wrong", ["401", "403", "404", "429", "500", "503", "204", "302", "418", "not json", "other json", "no commit", "cut", "shorter"]
)
@pytest.mark.parametrize("spec", ["hf://datasets/org/name", "hf://org/name"])
def test_what_the_hub_does_wrong_is_one_message(data: type[FakeHub], tmp_path: Path, wrong: str, spec: str) -> None:
    data.wrong = wrong
    use: Callable[[], object] = (lambda: open_shards(spec)) if "datasets" in spec else lambda: resolve(spec)
    started = time.monotonic()
    with pytest.raises(UsageError, match="hf://") as caught:
        use()
    assert time.monotonic() - started < 20
    assert "hf_secret" not in caught.value.message + caught.value.hint and "\n" not in caught.value.message
    data.wrong = ""
    assert use()  # nothing half is left behind


@pytest.mark.parametrize("wrong", ["401", "403", "404", "429", "500"])
def test_a_push_that_is_refused_is_one_message(model: type[FakeHub], tmp_path: Path, wrong: str) -> None:
    model.wrong = wrong
    with pytest.raises(UsageError, match=r"hf://org/name: "):
        push(tmp_path / "model", "hf://org/name")
    assert model.uploaded == {}


@pytest.mark.parametrize(
    "name", ["../outside.tar", "/outside.tar", "a/../../../outside.tar", "..\\outside.tar", "x/./../../outside.tar", "", "a\0.tar"]
)
def test_names_in_a_listing_stay_in_the_cache(data: type[FakeHub], tmp_path: Path, name: str) -> None:
    data.listed = {**data.files, name: b"x"}
    for spec in ("hf://datasets/org/name", "hf://org/name"):
        with contextlib.suppress(MmgenError):
            open_shards(spec) if "datasets" in spec else resolve(spec)
        outside = [path for path in tmp_path.rglob("*outside*") if not path.is_relative_to(tmp_path / "hub")]
        assert outside == [] and not Path("/outside.tar").exists()


def test_offline_is_one_message_and_what_is_there_is_used(data: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    client_http.close_session()
    with pytest.raises(UsageError, match="hf://"):
        open_shards("hf://datasets/org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client_http.close_session()
    assert len(open_shards("hf://datasets/org/name")) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    client_http.close_session()
    assert len(open_shards("hf://datasets/org/name")) == 3
    client_http.close_session()
