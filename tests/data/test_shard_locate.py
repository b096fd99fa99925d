import http.server
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stages.data.locate import locate, split_folders
from stages.data.shards import open_shards
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.errors import DataError, UsageError


@pytest.fixture
def served(tmp_path, write_set, monkeypatch):
    """A folder of shards behind an http address."""
    folder = write_set(tmp_path / "served", 25)
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def end_headers(self) -> None:
            if self.path.startswith("/cut"):
                self.send_header("X-Ended-Early", "yes")
            super().end_headers()

        def do_GET(self) -> None:
            if not self.path.startswith("/cut"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(b"only this")
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_folders_tars_braces_and_joins(tmp_path, write_set):
    folder = write_set(tmp_path / "a set", 25)
    assert len(open_shards(str(folder))) == 25
    assert len(open_shards(str(folder / "data-000001.tar"))) == 10
    some = open_shards(str(folder / "data-{000001..000002}.tar"))
    assert [sample.key for sample in some] == [f"{number:06d}" for number in range(10, 25)]
    assert [entry["url"] for entry in some.index["shardlist"]] == ["../data-000001.tar", "../data-000002.tar"]
    listed = open_shards(str(folder / "data-00000{2,0}.tar"))
    assert listed[0].key == "000020"
    assert listed[5].key == "000000"
    assert len(open_shards(f"{folder}::{folder / 'data-000002.tar'}")) == 30


def test_a_folder_with_braces_in_its_name_is_itself(tmp_path, write_set):
    assert len(open_shards(str(write_set(tmp_path / "{odd}", 3)))) == 3


def test_a_parent_of_splits(tmp_path, write_set):
    for split, count in (("val", 3), ("train", 12), ("heldout", 4)):
        write_set(tmp_path / split, count, split=split)
    (tmp_path / "notes").mkdir()
    assert list(split_folders(str(tmp_path))) == ["train", "val", "heldout"]
    assert split_folders(str(tmp_path / "val")) == {}
    assert len(open_shards(str(tmp_path), split="train")) == 12
    assert open_shards(str(tmp_path), split="val").splits() == ["val"]
    assert len(open_shards(str(tmp_path / "val"), split="train")) == 3  # named outright: nothing to choose
    with pytest.raises(DataError, match=r"several splits \(train, val, heldout\)"):
        open_shards(str(tmp_path))
    with pytest.raises(DataError, match="no split 'vall'") as error:
        open_shards(str(tmp_path), split="vall")
    assert error.value.hint == "did you mean 'val'?"


def test_what_does_not_exist_is_named_with_what_does(tmp_path, write_set):
    write_set(tmp_path / "scenes" / "train", 3)
    with pytest.raises(UsageError, match="does not exist") as error:
        open_shards(str(tmp_path / "scenes" / "trian"))
    assert "did you mean 'train'?" in error.value.hint
    with pytest.raises(UsageError) as error:
        open_shards(str(tmp_path / "scnes" / "train"))
    assert "did you mean 'scenes'?" in error.value.hint
    with pytest.raises(UsageError, match=r"data-000001\.tar, one of 2"):
        open_shards(str(tmp_path / "scenes" / "train" / "data-{000000..000001}.tar"))


@pytest.mark.parametrize("spec", ["", "pipe:cat x.tar", "data-{000..tar", "hf://datasets/only-one-part", "-"])
def test_what_makes_no_sense_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        open_shards(spec)


def test_folders_without_samples_are_errors(tmp_path):
    with pytest.raises(DataError, match="no tars here"):
        open_shards(str(tmp_path))
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed"):
        open_shards(str(tmp_path))
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    with pytest.raises(DataError, match="no samples"):
        open_shards(str(tmp_path))


def test_tars_behind_an_address_are_fetched_once(served, tmp_path):
    shards = open_shards(f"{served}/data-{{000000..000002}}.tar")
    assert len(shards) == 25
    assert all(path.is_relative_to(tmp_path / "cache") for path in shards.paths)
    times = [path.stat().st_mtime_ns for path in shards.paths]
    assert [path.stat().st_mtime_ns for path in open_shards(f"{served}/data-{{000000..000002}}.tar").paths] == times
    with pytest.raises(UsageError, match="404"):
        open_shards(f"{served}/nothing.tar")


def test_a_download_that_ends_early_is_not_kept(served, tmp_path):
    with pytest.raises((DataError, UsageError), match=r"cut\.tar"):
        open_shards(f"{served}/cut.tar")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_hub_addresses_ask_for_tars_and_the_index_only(tmp_path, write_set, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "snapshot"
    write_set(snapshot / "train", 12)
    asked: list[tuple[object, ...]] = []

    def snapshot_download(repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, repo_type, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("hf://datasets/org/name@v1/train")[0].folder == snapshot / "train"
    assert len(open_shards("hf://datasets/org/name", split="train")) == 12
    assert [path.name for path in open_shards("hf://datasets/org/name/train/data-{000000..000001}.tar").paths] == [
        "data-000000.tar",
        "data-000001.tar",
    ]
    assert asked == [
        ("org/name", "dataset", "v1", ["train/*.tar", "train/*.mmgen/*"]),
        ("org/name", "dataset", None, ["*.tar", "*.mmgen/*"]),
        ("org/name", "dataset", None, ["train/data-000000.tar", "train/data-000001.tar", "train/.mmgen/shardindex.json"]),
    ]
    with pytest.raises(UsageError, match=r"no train/data-000007\.tar"):
        open_shards("hf://datasets/org/name/train/data-000007.tar")
    with pytest.raises(UsageError, match="no folder 'vall'"):
        open_shards("hf://datasets/org/name/vall")


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection, and nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UsageError, match="hf://datasets/org/name: the Hub did not answer as expected: no connection"):
        open_shards("hf://datasets/org/name")


def test_home_is_expanded(tmp_path, write_set, monkeypatch):
    write_set(tmp_path / "set", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_shards("~/set")) == 3
    assert Path("~/set").expanduser() == tmp_path / "set"


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """A server whose answer the test chooses: status, headers, body."""
    answer: dict[str, Any] = {"status": 200, "headers": {}, "body": b""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer["body"])

    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.tar", answer
    server.shutdown()
    server.server_close()


TAR = member_bytes("a.txt", b"x") + member_bytes("b.txt", b"y") + END_OF_ARCHIVE


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><title>Sign in</title>" + b" " * 2000, "text/html"),
        (200, {"Content-Type": "application/json"}, b'{"error": "quota"}', "18 bytes"),
        (200, {}, b"", ""),
        (204, {}, b"", "204"),
        (206, {"Content-Range": "bytes 0-511/4096"}, TAR, "206"),
        (203, {}, TAR, "203"),
        (200, {}, TAR[:1536], "1,536 bytes"),
        (200, {}, TAR[:-600], "end-of-archive"),
        (200, {}, b"\x1f\x8b" + bytes(600), "gzip"),
    ],
)
def test_an_answer_that_is_no_tar_is_not_kept_and_the_message_says_what_came(answered, tmp_path, status, headers, body, words):
    address, answer = answered
    answer.update(status=status, headers=headers, body=body)
    with pytest.raises(DataError, match=r"x\.tar") as raised:
        open_shards(address)
    assert words in raised.value.message
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    answer.update(status=200, headers={}, body=TAR)
    assert [sample.key for sample in open_shards(address)] == ["a", "b"]


def test_what_is_no_tar_in_the_cache_is_fetched_anew(answered, tmp_path):
    address, answer = answered
    answer["body"] = TAR
    (path,) = open_shards(address).paths
    path.write_bytes(b"<html>an older version kept this</html>")
    assert len(open_shards(address)) == 2
