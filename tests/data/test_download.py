"""Whatever a server answers, or does not, a download ends in a message with the address, and leaves no file behind."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.data import download as module
from stages.data.locate import download, locate
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.errors import DataError, MmgenError, UsageError

OK = b"HTTP/1.1 200 OK\r\n"
FOREVER = b"<forever>"

ANSWERS: dict[str, tuple[type[MmgenError], bytes]] = {
    "nothing": (UsageError, b""),
    "no-status": (UsageError, b"hello\r\n\r\n"),
    "binary": (UsageError, bytes(range(256)) * 4),
    "status-is-a-word": (UsageError, b"HTTP/1.1 two OK\r\n\r\n"),
    "status-too-long": (UsageError, b"HTTP/1.1 " + b"2" * 100_000),
    "status-99999": (UsageError, b"HTTP/1.1 99999 OK\r\n\r\n"),
    "status-cut": (UsageError, b"HTTP/1.1 2"),
    "other-version": (UsageError, b"HTTP/9.9 200 OK\r\n\r\nx"),
    "continue-without-end": (UsageError, b"HTTP/1.1 100 Continue\r\n\r\n" * 60_000),
    "many-headers": (UsageError, OK + b"a: b\r\n" * 500 + b"\r\n"),
    "long-header": (UsageError, OK + b"a: " + b"b" * 100_000 + b"\r\n\r\n"),
    "header-cut-in-length": (DataError, OK + b"Content-Le"),
    "not-found": (UsageError, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    "forbidden": (UsageError, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"),
    "busy": (UsageError, b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"),
    "login": (UsageError, b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"),
    "reason-no-latin": (UsageError, b"HTTP/1.1 404 \xff\xfe\x00\r\nContent-Length: 0\r\n\r\n"),
    "redirect-in-circles": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: /redirect-in-circles\r\nContent-Length: 0\r\n\r\n"),
    "redirect-to-file": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"),
    "redirect-to-ftp": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n"),
    "redirect-to-data": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: data:text/plain,x\r\nContent-Length: 0\r\n\r\n"),
    "redirect-to-nonsense": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n"),
    "redirect-to-bad-port": (UsageError, b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:99999/x\r\nContent-Length: 0\r\n\r\n"),
    "redirect-nowhere": (UsageError, b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "length-banana": (DataError, OK + b"Content-Length: banana\r\n\r\nxyz"),
    "length-negative": (DataError, OK + b"Content-Length: -5\r\n\r\nxyz"),
    "length-empty": (DataError, OK + b"Content-Length:\r\n\r\nxyz"),
    "length-float": (DataError, OK + b"Content-Length: 3.0\r\n\r\nxyz"),
    "length-too-large": (DataError, OK + b"Content-Length: 999\r\n\r\nxyz"),
    "length-astronomic": (DataError, OK + b"Content-Length: " + b"9" * 6000 + b"\r\n\r\nxyz"),
    "length-arabic": (DataError, OK + "Content-Length: ٣\r\n\r\nxyz".encode()),
    "two-lengths": (DataError, OK + b"Content-Length: 9\r\nContent-Length: 3\r\n\r\nxyz"),
    "chunk-cut": (DataError, OK + b"Transfer-Encoding: chunked\r\n\r\n20\r\nonly this"),
    "chunk-length-a-word": (DataError, OK + b"Transfer-Encoding: chunked\r\n\r\nbanana\r\nxyz\r\n0\r\n\r\n"),
    "chunk-length-negative": (UsageError, OK + b"Transfer-Encoding: chunked\r\n\r\n-3\r\nxyz\r\n0\r\n\r\n"),
    "chunk-length-too-long": (UsageError, OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 100_000),
    "chunks-without-end": (DataError, OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n"),
    "reset": (UsageError, b"<reset>"),
    "silence": (UsageError, FOREVER),
    "dripping-status": (UsageError, b"HTTP/1.1 200 OK\r\nX: " + FOREVER),
    "dripping-body": (UsageError, OK + b"\r\n" + FOREVER),
    "dripping-length": (UsageError, OK + b"Content-Length: 1000000\r\n\r\n" + FOREVER),
    "dripping-chunks": (UsageError, OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFF\r\n" + FOREVER),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Answers each path with the bytes of that name, and goes away."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                name = connection.recv(65536).split(b" ")[1].decode().lstrip("/")
                data = ANSWERS[name][1]
                if data == b"<reset>":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    return
                connection.sendall(data.replace(FOREVER, b""))
                while FOREVER in data and data != FOREVER:
                    connection.sendall(b"x")
                    time.sleep(0.02)
                if data == FOREVER:
                    time.sleep(2)
            except (OSError, IndexError):
                pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.fixture(autouse=True)
def _impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PATIENCE", 0.3)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_answer_is_one_message_with_the_address(server: str, tmp_path: Path, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(MmgenError) as caught:
        download(f"{server}/{name}")
    assert time.monotonic() - started < 5
    assert type(caught.value) is ANSWERS[name][0], caught.value
    assert f"{server}/{name}" in caught.value.message
    assert len(caught.value.message) < 600 and caught.value.message.isprintable()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "address",
    [
        "http://", "http://[", "http://[::1", "http://:80", "http://127.0.0.1:port/x", "http://127.0.0.1:99999/x", "http://127.0.0.1:-1/x",
        "http://127.0.0.1:1/a b", "http://127.0.0.1:1/a\nb", "http://127.0.0.1:1/\x00", "http://127.0.0.1:1/ü", "http://" + "a" * 300 + "/x",
        "http://a..b/x", "http://\udcff/x", "https://127.0.0.1:1/x", "http://127.0.0.1:1/" + "a" * 5000, "http://user:pass@/x",
        "http:///x", "http://127.0.0.1:1/x#y", "http://xn--/x",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_a_mistake_of_the_command(address: str) -> None:
    with pytest.raises(UsageError):
        locate(address)


def test_a_chunked_answer_with_a_length_and_a_slow_good_one_arrive(server: str, tmp_path: Path) -> None:
    tar = member_bytes("a.txt", b"xyz") + END_OF_ARCHIVE
    length = b"%d" % len(tar)
    chunks = b"%x\r\n" % len(tar) + tar + b"\r\n0\r\n\r\n"
    ANSWERS["good-chunked"] = (UsageError, OK + b"Transfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n" + chunks)
    ANSWERS["good"] = (UsageError, OK + b"Content-Length: " + length + b"\r\n\r\n" + tar)
    ANSWERS["good-open"] = (UsageError, OK + b"\r\n" + tar)
    for name in ("good-chunked", "good", "good-open"):
        assert download(f"{server}/{name}").read_bytes() == tar


@pytest.mark.parametrize(
    "pattern",
    ["{0..999999999}.tar", "{" * 3000, "{a,b}" * 40, "x{" + "{" * 2000 + "}" * 2000, "{{a,b}{1..9999999},c}", "{9..1}" * 30, "{a..z}" * 30],
)
def test_a_brace_pattern_for_too_many_tars_is_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        locate(pattern)
