"""Files that are either whole or absent: everything mmgen leaves behind is written under a temporary name, flushed to the disk
and then renamed, so that a kill at any moment leaves no half-written file under a final name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# of a tokenizer's checkpoint, what its users need
TOKENIZER_FILES = ("model.safetensors", "config.json", "recipe.toml", "README.md", "tokenizer.json", "tokenizer_config.json")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Make `path` hold exactly `content` (text as UTF-8), or leave it as it was. Missing parent folders are made.

    Half a surrogate pair, which a name that is no UTF-8 brings along, is written as `\\udc80`, as JSON writes it.
    """
    with open_atomic(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` when the block ends without an exception, and disappears otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename `temporary`, with all it holds safely on the disk, to `final`; a folder already there gives way.

    A folder cannot be replaced in one step: the old one steps aside to `.<name>.old` first, and a kill between the two renames
    leaves it there, whole. Both must be on the same file system.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer's checkpoint that its users need, into another folder, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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
