"""The tar format, as much of it as shards need: one header per member from a template, and a walk over a whole archive that
believes nothing.

Headers are ustar, with a pax header before names that are long or not ASCII: byte for byte what Python's `tarfile` writes in its
pax format for a regular file of mode 0444 whose time and owner are zero (POSIX.1-2017, pax, "ustar Interchange Format").
The walk reads ustar, pax and GNU long names, whoever wrote them. It checks each header's checksum, that each member lies inside the
file, and that the archive ends as it should: a tar that was cut says so instead of looking like a shorter one.
"""

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stages.errors import DataError
from stages.files import open_descriptor

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
_MAX_EXTENDED_HEADER = 1024 * 1024  # a name of a megabyte is no name
_MAX_NAME = 8192  # bytes; a key and the names of its fields are far shorter
_MAX_DIGITS = 20  # of a size
_SPARSE = "GNU.sparse"
_WINDOW = 32 * 1024
_GZIP, _COMPRESSED = b"\x1f\x8b", "compressed with gzip; shards are read in place: run gunzip on it first"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


# --- writing ----------------------------------------------------------------------------------------------------------------------

_OWNER = b"0000000\0" * 2  # uid, gid
_MTIME = b"00000000000\0"
_AFTER_TYPE = bytes(100) + b"ustar\x0000" + bytes(247)  # no link, owner, device or prefix
_SUM_FIELD = 8 * ord(" ")  # the checksum counts itself as eight spaces


class _Template:
    """The header of one kind of member: what is the same in all of them, around name, size and checksum."""

    def __init__(self, mode: bytes, kind: bytes) -> None:
        self.before_size, self.after_sum = mode + _OWNER, kind + _AFTER_TYPE
        self.total = sum(self.before_size) + sum(_MTIME) + _SUM_FIELD + sum(self.after_sum)

    def fill(self, name: bytes, size: int) -> bytes:
        digits = b"%011o\0" % size
        checksum = b"%06o\0 " % (self.total + sum(name) + sum(digits))
        return b"".join((name.ljust(100, b"\0"), self.before_size, digits, _MTIME, checksum, self.after_sum))


_FILE = _Template(b"0000444\0", b"0")
_EXTENDED = _Template(b"0000000\0", b"x")
_MAX_OCTAL = 8**11 - 1


def member_bytes(name: str, data: bytes) -> bytes:
    """A whole member: header, `data`, and zeros up to the next block."""
    return b"".join((member_header(name, len(data)), data, bytes(-len(data) % BLOCK)))


def member_header(name: str, size: int) -> bytes:
    """The header of a regular file of `size` bytes: one block, or three and more where the name or size needs a pax header."""
    if size <= _MAX_OCTAL and len(name) <= 100 and name.isascii():
        return _FILE.fill(name.encode("ascii"), size)
    records = b""
    if not name.isascii() or len(name) > 100:
        records += _pax_record("path", name.encode("utf-8"))
    if size > _MAX_OCTAL:
        records += _pax_record("size", b"%d" % size)
        size = 0
    extended = _EXTENDED.fill(b"././@PaxHeader", len(records))
    return extended + records + bytes(-len(records) % BLOCK) + _FILE.fill(name.encode("ascii", "replace")[:100], size)


def _pax_record(keyword: str, value: bytes) -> bytes:
    """`LENGTH keyword=value\\n`, where LENGTH counts itself."""
    rest = b" " + keyword.encode() + b"=" + value + b"\n"
    length = len(rest)
    while length != (grown := len(rest) + len(str(length))):
        length = grown
    return b"%d" % length + rest


# --- reading ----------------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A regular file of the archive: its header (with a pax header, if any, in front) begins at `offset`, its bytes at `start`."""

    name: str
    offset: int
    start: int
    size: int


class Archive:
    """The bytes of a tar, read where they are asked for.

    They are not mapped: where a file is cut while it is read, mapped memory ends the process with a bus error, here it is a DataError.
    Pieces that follow on each other, such as headers and the samples of an epoch in order, come from one read of `_WINDOW` bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_descriptor(path)
        self.status = os.fstat(self._descriptor)
        self._length = self.status.st_size
        self._window, self._at, self._next = b"", 0, 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, piece: slice) -> bytes:
        start, stop, _ = piece.indices(self._length)
        begin = start - self._at
        if begin < 0 or stop > self._at + len(self._window):
            return self._fill(start, stop - start)
        return self._window[begin : begin + stop - start]

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`. DataError where the file no longer has them."""
        begin = start - self._at
        if begin >= 0 and begin + size <= len(self._window):
            return self._window[begin : begin + size]
        follows, self._next = start == self._next, start + size
        return self._fill(start, size) if follows and size < _WINDOW else self._pread(start, size)

    def _fill(self, start: int, size: int) -> bytes:
        self._window, self._at = self._pread(start, max(size, min(_WINDOW, self._length - start))), start
        self._next = start + len(self._window)
        return self._window[:size]

    def _pread(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), start + len(data))
            if not more:
                raise DataError(f"{self.path}: was cut while it was read: it had {self._length:,} bytes, it ends before {start + size:,}")
            data += more
        return data

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass
class Walk:
    """What an archive holds. `damage` is (offset, reason) where the walk had to stop before the end-of-archive blocks;
    `rejected` are members that are no regular files (name, offset, reason); `end` is where the last member's blocks end."""

    members: list[Member] = field(default_factory=list)
    rejected: list[tuple[str, int, str]] = field(default_factory=list)
    damage: tuple[int, str] | None = None
    end: int = 0


def walk(archive: bytes | Archive) -> Walk:
    """Every member of an archive, in order, from its headers alone. Never raises on bytes: what is wrong is in the result."""
    found = Walk()
    length = len(archive)
    at = entry = 0  # the block being read, and where the current entry began (its extended headers come first)
    extended: dict[str, bytes] = {}

    if archive[:2] == _GZIP:
        found.damage = (0, _COMPRESSED)
        return found
    while True:
        header = archive[at : at + BLOCK]
        if len(header) < BLOCK:
            found.damage = (at, f"the file ends here, at {length:,} bytes, without end-of-archive blocks: cut, or still being written")
            break
        if not header[0] and not any(header):
            found.damage = _check_end(archive, at)
            break
        reason, size = _check_header(header)
        if not reason and "size" in extended and header[156] in b"0\0":
            digits = extended["size"]
            if digits.isdigit() and len(digits) <= _MAX_DIGITS:
                size = int(digits)
            else:
                reason = f"member size {digits[: _MAX_DIGITS + 1]!r} is not a number"
        start = at + BLOCK
        after = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if not reason and (size < 0 or start + size > length):
            reason = f"the file ends inside this member: {size:,} bytes promised, {max(0, length - start):,} are there"
        if reason:
            found.damage = (entry, reason)
            break
        kind = header[156:157]
        if kind in b"xLgKX":
            if size > _MAX_EXTENDED_HEADER:
                found.damage = (entry, f"an extended header of {size:,} bytes")
                break
            body = archive[start : start + size]
            if kind == b"L":
                extended["path"] = body.rstrip(b"\0")
            elif kind in b"xX":
                records = _parse_pax(body)
                if records is None:
                    found.damage = (entry, "a pax header that cannot be read")
                    break
                extended |= records
            at = after
            continue
        raw = extended["path"] if "path" in extended else _short_name(header)
        try:
            name = raw[:_MAX_NAME].decode("utf-8")
        except UnicodeDecodeError:
            found.rejected.append((repr(raw[:_MAX_NAME]), entry, "its name is not UTF-8"))
        else:
            if kind in b"0\x007" and not name.endswith("/"):
                if len(raw) > _MAX_NAME:
                    found.rejected.append((name[:100], entry, f"a name of {len(raw):,} bytes"))
                elif _SPARSE in extended:
                    found.rejected.append((name, entry, f"{_KINDS[b'S']}, not a regular file"))
                elif archive[start + size : after].strip(b"\0"):  # every archiver fills the last block with zeroes
                    found.rejected.append((name, entry, "something stands in the rest of its last block: blocks are missing, or too many"))
                else:
                    found.members.append(Member(name, entry, start, size))
            elif kind not in b"0\x0075":
                found.rejected.append((name, entry, f"{_KINDS.get(kind, f'of type {kind!r}')}, not a regular file"))
        if extended:
            extended = {}
        at = entry = after
    found.end = min(entry, length)
    return found


def no_tar(block: bytes) -> str:
    """Why these bytes, the first BLOCK of a file, do not begin a tar; empty where they do."""
    if block[:2] == _GZIP:
        return _COMPRESSED
    if len(block) < BLOCK:
        return f"{len(block)} bytes in all" if block else "it is empty"
    return _check_header(block)[0] if any(block) else ""


def _check_header(header: bytes) -> tuple[str, int]:
    """(what is wrong or "", size) of one header block."""
    stored = _octal(header[148:156])
    # the low half of adler32 is 1 + the sum of all bytes, modulo 65521; the tar checksum is that sum with its own field as spaces
    if stored is None or (stored - 8 * ord(" ") + sum(header[148:156]) + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
        return "header checksum is wrong: not a tar, or damaged from here on", 0
    size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else _octal(header[124:136])
    return ("", size) if size is not None and size >= 0 else (f"member size {header[124:136]!r} is not a number", 0)


def _octal(digits: bytes) -> int | None:
    digits = digits.strip(b" \0")
    try:
        return int(digits or b"0", 8) if digits.isdigit() or not digits else None
    except ValueError:  # an 8 or a 9
        return None


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _parse_pax(body: bytes) -> dict[str, bytes] | None:
    """Of the records of a pax header, `LENGTH keyword=value\\n` each, those that say how a member is called, how large, and sparse."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        digits, blank, _ = body[at : at + 20].partition(b" ")
        end = at + int(digits) if blank and digits.isdigit() else 0
        keyword, equals, value = body[at + len(digits) + 1 : end].partition(b"=")
        if end > len(body) or not equals or value[-1:] != b"\n":
            return None
        if keyword in (b"path", b"size"):
            records[keyword.decode()] = value[:-1]
        elif keyword.startswith(_SPARSE.encode()):
            records[_SPARSE] = b""
        at = end
    return records


def _check_end(archive: bytes | Archive, at: int) -> tuple[int, str] | None:
    """What is wrong with the end of an archive whose first zero block is at `at`: two such blocks, and nothing behind them."""
    if len(archive) < at + len(END_OF_ARCHIVE):
        return at, "the file ends inside the end-of-archive blocks"
    for begin in range(at, len(archive), 1024 * 1024):
        chunk = archive[begin : begin + 1024 * 1024]
        if chunk.count(0) != len(chunk):
            return at, "data after the end of the archive (two tars in one file?): every other reader loses it silently"
    return None
