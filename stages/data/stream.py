"""Shards through a pipe: a folder of shards as one tar on standard output, and back into the same folder at the other end.

The stream is a tar that plain webdataset and datasets can read. Its first member, `__mmgen__` (no dot, so that they skip it), holds the
folder's index; a second one, `__mmgen_files__`, the tokenizers that travel with the data. The receiver writes the samples back into
the tars the index names and compares their sha256, so what arrives is byte for byte the folder that was sent.
"""

import atexit
import hashlib
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stages.data.index import INDEX, META, parse_index, read_index
from stages.data.tar_format import BLOCK, END_OF_ARCHIVE, Archive, member_bytes, member_header, walk
from stages.documents import parse_object
from stages.errors import DataError
from stages.files import CAPS, files_inside, inside, make_folder, make_scratch, open_atomic, open_regular, replace_folder
from stages.inputs import refuse_overlap
from stages.written import Written

INDEX_MEMBER = "__mmgen__"
FILES_MEMBER = "__mmgen_files__"
SPOOL = "input"  # .mmgen/input: what a stage read from stdin before its run began
_CHUNK = 1024 * 1024
_MAX_PADDING = 64 * 1024 * 1024  # zeroes behind the last member of a tar; archivers write some kB
_TRAVELLER = re.compile(r"tokenizers(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")


def stream_shards(folder: Path, file: BinaryIO) -> None:
    """Write the folder of shards to `file` as one tar. Raises DataError where it has no index, a tar is not the one indexed, or a link
    lies among the tokenizers."""
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: has no {META}/{INDEX}, needed to send it through a pipe", hint=f"mmgen verify {folder} --index")
    bodies = [_body_bytes(folder / entry.name) for entry in index.shardlist]
    travellers: list[Path] = []
    for name in index.tokenizers:
        files_of_one, refused = files_inside(inside(folder, META, "tokenizers", name) or folder / META / "tokenizers" / name)
        for path, reason in refused:
            raise DataError(f"{path}: {reason}", hint="put the file itself there")
        travellers += files_of_one
    travellers.sort()
    files = [[path.relative_to(folder / META).as_posix(), path.stat().st_size] for path in travellers]
    description = {**index.to_dict(), "stream": {"bodies": bodies, "files": files}}

    file.write(member_bytes(INDEX_MEMBER, json.dumps(description, ensure_ascii=False).encode("utf-8", "backslashreplace")))
    total = sum(path.stat().st_size for path in travellers)
    file.write(member_header(FILES_MEMBER, total))
    for path in travellers:
        with open_regular(path) as traveller:
            shutil.copyfileobj(traveller, file, _CHUNK)
    file.write(bytes(-total % BLOCK))
    for entry, body in zip(index.shardlist, bodies, strict=True):
        with open_regular(folder / entry.name) as tar:
            for _ in _copy(tar, file, body):
                pass
    file.write(END_OF_ARCHIVE)
    file.flush()


def _body_bytes(path: Path) -> int:
    """How much of a tar is members; what follows is the end of the archive, which a stream has only once."""
    walked = walk(Archive(path))
    if walked.damage:
        raise DataError(f"{path}: byte {walked.damage[0]:,}: {walked.damage[1]}")
    return walked.end


def spool_folder(out: Path | str, reads: Iterable[str | Path | None] = ()) -> Path:
    """Where a stage keeps what it reads from a pipe: with its result, or in a folder that ends with the process if that is a pipe too.

    reads: what else the stage reads. UsageError where `out` would take its place (see stages/inputs.py).
    """
    if str(out) != "-":
        refuse_overlap(Path(out), reads)
        return Path(out) / META / SPOOL
    spool = Path(tempfile.mkdtemp(prefix="mmgen-"))
    atexit.register(shutil.rmtree, spool, ignore_errors=True)
    return spool


def receive_stream(file: BinaryIO, spool: Path) -> Path:
    """Write what comes through the pipe to the folder `spool`, which replaces what was there once all of it has arrived.

    A tar that others made becomes the one tar of the folder. An empty stream stands for what was spooled before, so that a stage that
    was stopped can go on. Raises DataError where the stream is empty and nothing was spooled, was cut, or does not match its index.
    """
    block = file.read(BLOCK)
    if not block:
        if (spool / META).is_dir():
            return spool
        raise DataError("standard input is empty: expected a tar of samples")
    with _listed(spool):
        return _receive(file, block, spool)


@contextmanager
def _listed(spool: Path) -> Iterator[None]:
    """What is spooled into the folder of a run that has not begun stands on the run's list."""
    if spool.parts[-2:] != (META, SPOOL):
        yield
        return
    mine = Written(spool.parent.parent)
    make_folder(mine.root)
    mine.read()
    mine.attach()
    try:
        yield
    finally:
        mine.detach()


def _receive(file: BinaryIO, block: bytes, spool: Path) -> Path:
    temporary = spool.with_name(f"{spool.name}.incoming")
    make_scratch(temporary)
    (temporary / META).mkdir()
    try:
        first = _parse_header(block)
        if first.name == INDEX_MEMBER:
            _receive_indexed(file, first.size, temporary)
        else:
            with open_atomic(temporary / "stdin-000000.tar") as tar:
                tar.write(block)
                shutil.copyfileobj(file, tar, _CHUNK)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replace_folder(temporary, spool)
    return spool


def _receive_indexed(file: BinaryIO, size: int, folder: Path) -> None:
    if size > CAPS[INDEX]:
        raise DataError(f"standard input: an index of {size:,} bytes, the cap is {CAPS[INDEX]:,}")
    text = _read(file, size, padded=True)
    index = parse_index(text.decode("utf-8", "replace"), "standard input: index")
    bodies, files = _check_description(parse_object(text, "standard input: index"), len(index.shardlist))

    header = _parse_header(_read(file, BLOCK))
    if header.name != FILES_MEMBER or header.size != sum(size for _, size in files):
        raise DataError(f"standard input: found the member '{header.name}' of {header.size:,} bytes, expected {FILES_MEMBER}")
    for name, size in files:
        with open_atomic(folder / META / name) as traveller:
            for _ in _copy(file, traveller, size):
                pass
    _read(file, -header.size % BLOCK)
    for entry, body in zip(index.shardlist, bodies, strict=True):
        digest = hashlib.sha256()
        with open_atomic(folder / entry.name) as tar:
            for chunk in _copy(file, tar, body):
                digest.update(chunk)
            if entry.bytes - body > _MAX_PADDING:
                raise DataError(f"standard input: {entry.name} of {entry.bytes:,} bytes in the index, of which {body:,} are sent")
            end = bytes(max(0, entry.bytes - body))
            tar.write(end)
            digest.update(end)
        if digest.hexdigest() != entry.sha256:
            raise DataError(f"standard input: {entry.name} arrived with sha256 {digest.hexdigest()}, its index says {entry.sha256}")
    if _read(file, len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
        raise DataError("standard input: more members than the index lists")
    index.__pydantic_extra__.pop("stream", None)  # type: ignore[union-attr]
    index.write(folder)


def _parse_header(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"standard input: not a tar: {error}") from None
    if header.size < 0:
        raise DataError(f"standard input: not a tar: the member '{header.name}' has {header.size:,} bytes")
    return header


def _check_description(description: dict[str, Any], shards: int) -> tuple[list[int], list[tuple[str, int]]]:
    """(bytes of members per tar, files that travel along), refused unless each name is a plain path below `tokenizers`."""
    stream = description.get("stream")
    bodies = stream.get("bodies") if isinstance(stream, dict) else None
    files = stream.get("files") if isinstance(stream, dict) else None
    if not (isinstance(bodies, list) and len(bodies) == shards and all(type(size) is int and size >= 0 for size in bodies)):
        raise DataError("standard input: the index does not say how long each tar is")
    if not isinstance(files, list):
        raise DataError("standard input: the index does not list the files that travel along")
    for item in files:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and type(item[1]) is int and item[1] >= 0):
            raise DataError(f"standard input: {item!r} is no file and size")
        if not _TRAVELLER.fullmatch(item[0]):
            raise DataError(f"standard input: a file '{item[0]}' travels along, expected plain names below tokenizers/")
    return bodies, [(name, size) for name, size in files]


def _read(file: BinaryIO, size: int, *, padded: bool = False) -> bytes:
    data = file.read(size + (-size % BLOCK if padded else 0))
    if len(data) < size:
        raise DataError(f"standard input ended early: {len(data):,} of {size:,} bytes; the command before the pipe was stopped?")
    return data[:size]


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> Iterator[bytes]:
    """Copy exactly `size` bytes, yielding each chunk. Raises DataError where the source ends early."""
    left = size
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            raise DataError(f"the input ended early: {size - left:,} of {size:,} bytes; the command before the pipe was stopped?")
        target.write(chunk)
        left -= len(chunk)
        yield chunk
