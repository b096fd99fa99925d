"""Files that are either whole or absent, and files of others that are what they seem.

Everything mmgen leaves behind is written under a temporary name, flushed to the disk and then renamed, so that a kill at any moment
leaves no half-written file under a final name.

What lies beside data and inside checkpoints may be somebody else's work. It is reached through `inside` and `read_inside`: no name
leads out of its folder, no link is followed, no pipe is waited for, and the size is judged before a byte is read.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stages import written
from stages.errors import DataError, UsageError

_MIB = 1024 * 1024
# files that are read whole: by name, the most bytes they may have
CAPS = {
    "shardindex.json": 256 * _MIB,
    "config.json": 16 * _MIB,
    "recipe.toml": _MIB,
    "README.md": 16 * _MIB,
    "tokenizer.json": 256 * _MIB,
    "tokenizer_config.json": 64 * _MIB,
    "run.json": 64 * _MIB,
    "status.json": _MIB,
    "results.json": 256 * _MIB,
    "metrics.jsonl": 1024 * _MIB,
    "index of weights": 64 * _MIB,  # *.safetensors.index.json
}
_PLAIN_NAME = re.compile(r"(?!\.\.?\Z)[^/\\\0]+")
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}
# of a tokenizer's checkpoint, what its users need
TOKENIZER_FILES = ("model.safetensors", "config.json", "recipe.toml", "README.md", "tokenizer.json", "tokenizer_config.json")


def write_atomic(path: Path, content: bytes | str, *, rewritten: bool = False) -> None:
    """Make `path` hold exactly `content` (text as UTF-8), or leave it as it was. Missing parent folders are made.

    Half a surrogate pair, which a name that is no UTF-8 brings along, is written as `\\udc80`, as JSON writes it.
    rewritten: a run writes this file again and again, so what it holds is not listed (see stages/written.py).
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with open_atomic(path, rewritten=rewritten, content=data) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path, *, rewritten: bool = False, content: bytes | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` when the block ends without an exception, and disappears otherwise.

    content: what will be written, where that is known. Raises UsageError where a run is being written and something that is not its own
    has the name.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written.note(temporary, "scratch")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        name_file(temporary, path, rewritten=rewritten, content=content)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def name_file(temporary: Path, final: Path, *, digest: str | None = None, content: bytes | None = None, rewritten: bool = False) -> None:
    """Give a file that is whole and on the disk its name. digest: its sha256, where that is known, or follows from `content`."""
    if written.covering(final):
        written.check_name(final)
        if rewritten:
            written.note(final, "rewritten")
        else:
            digest = digest or (hashlib.sha256(content).hexdigest() if content is not None else None)
            written.note(final, "file", written.content_of(temporary, digest))
    temporary.replace(final)
    sync_folder(final.parent)


def append_line(path: Path, line: str) -> None:
    """Append to a file of the run that is being written."""
    if not path.exists():
        make_folder(path.parent)
    written.check_name(path)
    written.note(path, "rewritten")
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        if folder.is_symlink():
            raise UsageError(f"{folder}: a link to nothing, expected a folder", hint="mend or remove the link")
        written.note(folder, "folder")
        folder.mkdir(exist_ok=True)


def make_scratch(folder: Path) -> None:
    """Make an empty folder with a name for the time being; one that an earlier launch left there goes."""
    clear_scratch(folder)
    make_folder(folder.parent)
    written.note(folder, "scratch")
    folder.mkdir()


def clear_scratch(folder: Path) -> None:
    """Remove a folder or file that was being made when its maker was killed. UsageError where the run did not make it."""
    lists = written.covering(folder)
    if os.path.lexists(folder) and lists and (folder.is_symlink() or not any(one.lists(folder) for one in lists)):
        raise UsageError(f"{folder} is in the way: this run did not make it", hint="move it away; the same command goes on from there")
    shutil.rmtree(folder, ignore_errors=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename `temporary`, with all it holds safely on the disk, to `final`; a folder already there gives way.

    A folder cannot be replaced in one step: the old one steps aside to `.<name>.old` first, and a kill between the two renames
    leaves it there, whole. Both must be on the same file system. Raises UsageError where `final` holds what the run did not write.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    old = final.with_name(f".{final.name}.old")
    clear_scratch(old)
    for path in written.files_below(final):
        written.check_name(path)
    for one in written.covering(final):
        folders = [Path(folder) for folder, _, _ in os.walk(temporary)]
        one.note((final / folder.relative_to(temporary), "folder", None) for folder in folders)
        files = list(written.files_below(temporary))
        one.note((final / path.relative_to(temporary), "file", written.content_of(path)) for path in files)
    if final.exists():
        written.note(old, "scratch")
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Delete a file if it is there. Raises UsageError where a run is being written and this is not its own."""
    written.check_name(path)
    path.unlink(missing_ok=True)
    for one in written.covering(path):
        one.forget(path)


def remove_tree(folder: Path) -> None:
    """Delete a folder; of a folder in a run that is being written, what the run wrote, and what else is there stays."""
    lists = written.covering(folder)
    if not lists:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for base, _, names in os.walk(folder, topdown=False):
        for path in [Path(base, name) for name in names]:
            if any(one.holds(path) for one in lists):
                path.unlink(missing_ok=True)
                for one in lists:
                    one.forget(path)
        if any(one.lists(Path(base)) for one in lists):
            with suppress(OSError):
                os.rmdir(base)


def replace_own(path: Path, content: str, marker: str) -> None:
    """Write a file that is no run's, such as a report. UsageError where there is one that mmgen did not make, known by its `marker`."""
    if os.path.lexists(path):
        try:
            with path.open("rb") as file:
                own = path.is_file() and marker.encode() in file.read(4096)
        except OSError:
            own = False
        if not own:
            raise UsageError(f"{path} exists, and this command did not write it", hint="name another file, or move that one away")
    write_atomic(path, content)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer's checkpoint that its users need, into another folder, whole or not at all. DataError as in `inside`."""
    partial = target.with_name(target.name + ".partial")
    make_scratch(partial)
    for name in TOKENIZER_FILES:
        path = inside(source, name)
        if path is not None:
            with open_regular(path, CAPS.get(name)) as file, (partial / name).open("wb") as copy:
                shutil.copyfileobj(file, copy, _MIB)
    replace_folder(partial, target)


def inside(folder: Path, *names: str) -> Path | None:
    """The regular file or the folder that `names`, one path component each, lead to below `folder`; None where there is none.

    `folder` is as a person named it and may be a link. DataError for a name that is no plain one, and for a link, a pipe, a socket or a
    device on the way. Only the links of the Hub's cache, from a snapshot to the blobs of the same repository, are followed. (A hard link
    cannot be told from the file itself.)
    """
    path = folder
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise DataError(f"{folder}: names {name!r}, expected the plain name of something in this folder")
        path = path / name
        try:
            reason = _refusal(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise DataError(f"{path}: {error.strerror or error}") from None
        except ValueError:  # half a surrogate pair
            raise DataError(f"{folder}: names {name!r}, which no file can be called") from None
        if reason:
            raise DataError(f"{path}: {reason}", hint="put the file itself there")
    return path


def files_inside(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every file below `folder`, sorted, and what is there but must not be followed or read, each with the reason."""
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            with suppress(FileNotFoundError):  # somebody else's temporary file, gone by now
                if reason := _refusal(path):
                    refused.append((path, reason))
                elif not path.is_dir():
                    files.append(path)
    return sorted(files), sorted(refused)


def _refusal(path: Path) -> str:
    """Why what is at `path` is not followed or read; empty for a folder, a regular file and a link of the Hub's cache."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "" if _is_hub_blob(path) else f"a link (to {os.readlink(path)}), which is not followed inside data and checkpoints"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"{_SPECIAL.get(stat.S_IFMT(mode), 'no file')}, expected a file"


def _is_hub_blob(link: Path) -> bool:
    """Whether a link is one of the Hub's cache: REPOSITORY/snapshots/REVISION/…/NAME to a file in REPOSITORY/blobs."""
    target, parents = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent), link.name).parents
    homes = {snapshots.parent / "blobs" for snapshots in parents if snapshots.name == "snapshots"}
    return target.parent in homes and stat.S_ISREG(target.lstat().st_mode)


@contextmanager
def open_regular(path: Path, cap: int | None = None) -> Iterator[BinaryIO]:
    """A regular file, or a link to one, of at most `cap` bytes, to read. DataError for anything else, which is not waited for."""
    with os.fdopen(open_descriptor(path, cap), "rb") as file:
        yield file


def open_descriptor(path: Path, cap: int | None = None) -> int:
    """The descriptor of what `open_regular` opens."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes would block
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from None
    status = os.fstat(descriptor)
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = f"{_SPECIAL.get(stat.S_IFMT(status.st_mode), 'no file')}, expected a file"
    elif cap is not None and status.st_size > cap:
        reason = f"{status.st_size:,} bytes, the cap for such a file is {cap:,}"
    if reason:
        os.close(descriptor)
        raise DataError(f"{path}: {reason}")
    return descriptor


def read_inside(folder: Path, *names: str, kind: str = "") -> bytes | None:
    """The bytes of the file that `names` lead to below `folder` (see `inside`), None where there is none.

    kind: its key in CAPS, where that is not its name.
    """
    path = inside(folder, *names)
    if path is None:
        return None
    cap = CAPS[kind or path.name]
    with open_regular(path, cap) as file:
        data = file.read(cap + 1)
    if len(data) > cap:
        raise DataError(f"{path}: it grew beyond {cap:,} bytes, the cap for such a file, while it was read")
    return data


def read_text_inside(folder: Path, *names: str, kind: str = "") -> str | None:
    """The same as text. DataError where it is not UTF-8."""
    data = read_inside(folder, *names, kind=kind)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{folder.joinpath(*names)}: not UTF-8 at byte {error.start:,}") from None


def read_json_inside(folder: Path, *names: str, kind: str = "") -> dict[str, Any]:
    """The JSON object in such a file, empty where there is none. DataError where it holds anything else."""
    text = read_text_inside(folder, *names, kind=kind)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder.joinpath(*names)}: expected a JSON object, found {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{folder.joinpath(*names)}: expected a JSON object, found a {type(value).__name__}")
    return value


def sync(file: BinaryIO) -> None:
    """Wait until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (after a rename) are on the disk, where the system can do that."""
    with suppress(OSError):  # some network file systems refuse to sync a folder; the rename has happened all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
