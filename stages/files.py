"""Files that are either whole or absent: everything mmgen leaves behind is written under a temporary name, flushed to the disk
and then renamed, so that a kill at any moment leaves no half-written file under a final name."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stages import written
from stages.errors import UsageError

# of a tokenizer's checkpoint, what its users need
TOKENIZER_FILES = ("model.safetensors", "config.json", "recipe.toml", "README.md", "tokenizer.json", "tokenizer_config.json")


def write_atomic(path: Path, content: bytes | str, *, rewritten: bool = False) -> None:
    """Make `path` hold exactly `content` (text as UTF-8), or leave it as it was. Missing parent folders are made.

    rewritten: a run writes this file again and again, so what it holds is not listed (see stages/written.py).
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
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
    """The files of a tokenizer's checkpoint that its users need, into another folder, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    make_scratch(partial)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    replace_folder(partial, target)


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
