"""A file behind an http(s) address. Whatever a server answers, or does not, ends in one sentence with the address in it.

Everything that is read, from the first byte of the answer to the last of its body, must come at `LEAST_SPEED` over every `PATIENCE` seconds:
a timeout of the socket alone would wait for ever for a server that sends a byte a minute.
"""

import http
import http.client
import io
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.errors import DataError, MmgenError, UsageError
from stages.files import open_atomic

PATIENCE = 60.0  # seconds
LEAST_SPEED = 1000.0  # bytes a second
MAX_HEAD_BYTES = 1024 * 1024  # of status and headers; http.client would follow "100 Continue" without end


def fetch(address: str, path: Path, problem: Callable[..., str]) -> Path:
    """Write what is behind `address` to `path`, whole or not at all.

    problem: asked of the finished file (`problem(path, maybe_cut=...)`, true where the server did not say how long it is) before it gets its
    name; what it answers is why the file is not the one that is wanted, "" where it is.

    Raises UsageError where there is no answer, or an error, DataError where the answer is cut or contradicts itself.
    """
    try:
        with _opener().open(address, timeout=PATIENCE) as response, open_atomic(path) as file:
            if response.status != http.HTTPStatus.OK:  # such as 204, no content, and 206, a part of the file
                raise DataError(f"{address}: the server answered {response.status} {response.reason}, expected 200 and a file")
            promised = response.headers.get("Content-Length")
            chunked = getattr(response, "chunked", False)  # then a length, if any, means nothing
            if promised is not None and not chunked and not (promised.isascii() and promised.strip().isdigit()):
                raise DataError(f"{address}: the answer says Content-Length {promised:.40}, expected a number of bytes")
            shutil.copyfileobj(response, file, 1024 * 1024)
            if promised is not None and not chunked and file.tell() != int(promised[:20]):
                raise DataError(f"{address}: the download ended at {file.tell():,} of {int(promised[:20]):,} bytes")
            if not file.tell():
                raise DataError(f"{address}: the answer is empty")
            file.flush()
            if reason := problem(Path(file.name), maybe_cut=promised is None):
                kind = response.headers.get("Content-Type", "no type")
                raise DataError(f"{address}: what came is no whole tar: {reason} ({file.tell():,} bytes, {kind}); it was not kept")
    except MmgenError:
        raise
    except http.client.IncompleteRead:
        raise DataError(f"{address}: the download was cut") from None
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:  # the last two for addresses that are none
        if isinstance(error, OSError) and error.filename and not isinstance(error, urllib.error.URLError):
            raise  # of the file that is written
        raise UsageError(f"{address}: cannot be fetched: {_reason(error)}") from None
    return path


def _reason(error: Exception) -> str:
    """What went wrong, in one line that can be printed: part of it may be what the server sent."""
    told = str(error) or type(error).__name__
    if isinstance(error, http.client.BadStatusLine):
        told = f"the answer does not begin as HTTP does: {told[:80]}"
    elif isinstance(error, urllib.error.HTTPError):
        told = f"the server says {error.code} {error.reason}"
    return " ".join("".join(letter if letter.isprintable() else " " for letter in told).split())[:300]


class _Paced(io.RawIOBase):
    """The bytes of a socket, as long as they come fast enough; `left`: how many may come, None for any number."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.left: int | None = MAX_HEAD_BYTES
        self._since, self._count = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._count += count
        now = time.monotonic()
        if now - self._since >= PATIENCE:
            if self._count < LEAST_SPEED * PATIENCE and count:
                raise TimeoutError(f"slower than {LEAST_SPEED:,.0f} bytes a second over {PATIENCE:,.0f} seconds")
            self._since, self._count = now, 0
        if self.left is not None:
            self.left -= count
            if self.left < 0:
                raise http.client.HTTPException(f"the head of the answer is longer than {MAX_HEAD_BYTES:,} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(sock, *arguments, **keywords)
        self._paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        self._paced.left = None


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request)


def _opener() -> urllib.request.OpenerDirector:
    """What opens http and https, directly or through the proxy that the environment names, and nothing else: no redirect leads to ftp or to a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Http(),
        _Https(),
    ):
        opener.add_handler(handler)
    return opener


def cache_folder() -> Path:
    """$MMGEN_CACHE, by default ~/.cache/mmgen."""
    return Path(os.path.expanduser(os.environ.get("MMGEN_CACHE") or "~/.cache/mmgen"))
