"""What a run wrote, and so what may be deleted for it: the list `OUT/.mmgen/written.jsonl`.

One line for each file, written and flushed before the file gets its name; other ranks write `written-<rank>.jsonl` beside it.

    {"path": "model.safetensors", "size": 912, "sha256": "…"}   a file with this content (large ones that were streamed: without sha256)
    {"path": "status.json", "is": "rewritten"}                  a file that the run rewrites or appends to all the time
    {"path": "train", "is": "folder"}                           a folder that the run made
    {"path": ".a.tar.4711.tmp", "is": "scratch"}                a name that something has until it is whole; of a folder, all that is in it

While a run writes, its list is among `_open`, and whatever gives a file its name (`stages/files.py`) goes by it: every name is listed,
and no file is replaced or deleted that is not on the list, or that is no longer as it is described there.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from stages.errors import UsageError

META = ".mmgen"
HASHED_BYTES = 16 * 1024 * 1024  # files up to this size are known by their sha256, whoever writes them
Kind = Literal["file", "rewritten", "scratch", "folder"]
Content = tuple[int, str | None]  # size, sha256
LIST = re.compile(r"written(-\d+)?\.jsonl")
_MOVE_AWAY = "move it away, or name another --out"


@dataclass
class Entry:
    """What is known of a path. contents: what a file may hold; two while one replaces the other."""

    kind: Kind
    contents: list[Content] = field(default_factory=list)

    def lines(self, path: str) -> list[str]:
        if self.kind != "file":
            return [json.dumps({"path": path, "is": self.kind}) + "\n"]
        known = ({"path": path, "size": size} | ({"sha256": digest} if digest else {}) for size, digest in self.contents)
        return [json.dumps(line) + "\n" for line in known]


class Written:
    """The list of one run folder. Paths in it are relative to the folder; nothing is followed that is a link."""

    def __init__(self, root: Path, rank: int = 0) -> None:
        self.root = Path(os.path.abspath(root))
        self.rank = rank
        self.file = self.root / META / (f"written-{rank}.jsonl" if rank else "written.jsonl")
        self.entries: dict[str, Entry] = {}
        self.before_first_write: Callable[[], None] | None = None
        self._num_lines = 0
        self._read: dict[Path, int] = {}  # bytes read of the list of each rank

    # the file

    def read(self) -> None:
        """Read what the lists of all ranks say that was not read yet. Raises UsageError for a line that mmgen cannot have written."""
        for file in self._lists():
            if file.is_symlink() or (self.root / META).is_symlink() or not file.is_file():
                raise UsageError(f"{file}: expected the list of what a run wrote, found something else", hint="name another --out")
            with file.open("rb") as lines:
                lines.seek(self._read.get(file, 0))
                for line in lines:
                    if line.endswith(b"\n"):  # else it was cut by a kill, or is being written
                        path, kind, content = _parse(line, str(file))
                        self._merge(path, kind, content)
                        self._read[file] = self._read.get(file, 0) + len(line)

    def _lists(self) -> list[Path]:
        with suppress(OSError):
            return sorted(path for path in (self.root / META).iterdir() if LIST.fullmatch(path.name))
        return []

    def tidy(self) -> None:
        """Bring the list into its shortest form, one file for all ranks, and clear away what a kill left half-made. For rank 0."""
        temporary, made = self._temporary(), not (self.root / META).exists()
        for outer in covering(self.file):
            if outer is not self:
                outer.note([(self.root / META, "folder", None)] if made else [])
                outer.note([(self.file, "rewritten", None), (temporary, "scratch", None)])
        (self.root / META).mkdir(exist_ok=True)
        if self.file.exists():
            os.truncate(self.file, self._read.get(self.file, 0))  # a line that a kill cut
        self.note([(self.root / META, "folder", None)] if made else [])
        self.note([(temporary, "scratch", None)])
        self._settle()
        self.rewrite()
        for other in self._lists():
            if other != self.file:
                other.unlink()

    def attach(self) -> None:
        """From now on `stages/files.py` goes by this list."""
        if self not in _open:
            _open.append(self)

    def detach(self) -> None:
        if self in _open:
            _open.remove(self)

    def rewrite(self) -> None:
        """Write the list anew, without what is no longer true."""
        temporary = self._temporary()
        gone = [path for path, entry in self.entries.items() if entry.kind == "scratch" and not os.path.lexists(self.root / path)]
        for path in gone:
            if path != self._relative(temporary):
                del self.entries[path]
        lines = [line for path, entry in self.entries.items() for line in entry.lines(path)]
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.file)
        self._num_lines = len(lines)
        self._read[self.file] = self.file.stat().st_size

    def _temporary(self) -> Path:
        return self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")

    def _settle(self) -> None:
        """Of a file that was about to be replaced, keep what it really is; clear away what a kill left under a name for the time being."""
        for path, entry in list(self.entries.items()):
            if len(entry.contents) > 1:
                entry.contents = [content for content in entry.contents if _is(self.root / path, content)] or entry.contents
            if entry.kind == "scratch" and not self.behind_link(path):
                _delete(self.root / path)

    # what is on it

    def _relative(self, path: Path) -> str | None:
        whole = os.path.abspath(path)
        prefix = str(self.root).rstrip("/") + "/"
        return whole.removeprefix(prefix) if whole.startswith(prefix) else None

    def _merge(self, path: str, kind: Kind, content: Content | None) -> None:
        known = self.entries.get(path)
        if known is None or known.kind != kind:
            known = self.entries[path] = Entry(kind)
        if content is not None and content not in known.contents:
            known.contents.append(content)

    def note(self, named: Iterable[tuple[Path, Kind, Content | None]]) -> None:
        """List paths that are about to be made; those that are listed as they are already cost nothing."""
        lines = []
        for path, kind, content in named:
            relative = self._relative(path)
            if relative is None:
                continue
            if self._in_scratch(relative):
                continue
            known = self.entries.get(relative)
            if known is None or known.kind != kind:
                known = self.entries[relative] = Entry(kind)
            elif content is None or known.contents[-1:] == [content]:
                continue
            if content is not None:
                known.contents = [*(entry for entry in known.contents[-1:]), content]
            lines.append(Entry(kind, known.contents[-1:]).lines(relative)[0])
        if not lines:
            return
        if self._num_lines > 1000 + 4 * len(self.entries) and self.rank == 0:
            self.rewrite()  # which has the new lines already, so that none is missing if it is killed here
        self.file.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            self._read[self.file] = file.tell()
        self._num_lines += len(lines)

    def adopt(self, path: Path, content: Content | None) -> None:
        """Take a file that is there for one of the run's, in memory; None: whatever it holds."""
        if (relative := self._relative(path)) is not None:
            self._merge(relative, "rewritten" if content is None else "file", content)

    def forget(self, path: Path) -> None:
        """The run deleted this."""
        self.entries.pop(self._relative(path) or "", None)

    def lists(self, path: Path) -> bool:
        """Whether this path, or something below it, is on the list."""
        relative = self._relative(path)
        if relative is not None and relative not in self.entries:
            self.read()  # another rank may have written it since
        return relative is not None and (
            relative in self.entries or self._in_scratch(relative) or any(entry.startswith(relative + "/") for entry in self.entries)
        )

    def holds(self, path: Path) -> bool:
        """Whether this file is on the list and still as described there."""
        relative = self._relative(path)
        if relative is not None and self._in_scratch(relative):
            return True
        if relative is not None and relative not in self.entries:
            self.read()  # another rank may have written it since
        if relative is None or relative not in self.entries or self.behind_link(relative) or path.is_symlink():
            return False
        entry = self.entries[relative]
        return path.is_file() and (entry.kind != "file" or any(_is(path, content) for content in entry.contents))

    def _in_scratch(self, relative: str) -> bool:
        parts = relative.split("/")[:-1]
        return any((entry := self.entries.get("/".join(parts[: n + 1]))) and entry.kind == "scratch" for n in range(len(parts)))

    def behind_link(self, relative: str) -> bool:
        """Whether a folder between the run folder and this path is a link."""
        parts = relative.split("/")[:-1]
        return any((self.root / "/".join(parts[: n + 1])).is_symlink() for n in range(len(parts)))

    # deleting

    def doomed(self, *, keep: str | None = None, scratch: bool = True) -> list[Path]:
        """The files (and what has a name for the time being) that are listed and there, without those below the folder `keep`.

        Raises UsageError where one is not what the run wrote: edited, replaced, made a link, or behind one.
        """
        found = []
        for relative, entry in self.entries.items():
            path = self.root / relative
            if (
                entry.kind == "folder"
                or (entry.kind == "scratch" and not scratch)
                or (keep is not None and f"{relative}/".startswith(f"{keep}/"))
            ):
                continue
            try:
                mode = os.lstat(path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if self.behind_link(relative) or stat.S_ISLNK(mode):
                raise UsageError(f"{path}: the run wrote a file here, and now there is a link on the way", hint=_MOVE_AWAY)
            if entry.kind == "file" and not self.holds(path):
                raise UsageError(f"{path} was changed since the run wrote it, and would be lost", hint=_MOVE_AWAY)
            if entry.kind == "rewritten" and not stat.S_ISREG(mode):
                raise UsageError(f"{path}: the run wrote a file here, and now there is something else", hint=_MOVE_AWAY)
            found.append(path)
        return found

    def delete(self, first: Iterable[Path] = (), *, keep: str | None = None) -> None:
        """Delete what `doomed` says, beginning with `first`, and the folders that the run made and that are empty then.

        The list itself goes last; what is kept stays on it. A kill on the way leaves a list of all that is left.
        """
        paths = self.doomed(keep=keep)
        early = [path for path in map(Path, map(os.path.abspath, first)) if path in paths]
        for path in dict.fromkeys([*early, *paths]):
            if path != self.file:
                _delete(path)
        kept = {path: entry for path, entry in self.entries.items() if keep is not None and f"{path}/".startswith(f"{keep}/")}
        folders = [path for path, entry in self.entries.items() if entry.kind == "folder"]
        for relative in sorted(folders, key=len, reverse=True):  # children before parents
            if relative != META and not self.behind_link(relative) and not (self.root / relative).is_symlink():
                with suppress(OSError):
                    (self.root / relative).rmdir()
        self.entries = {path: Entry("folder") for path in folders if (self.root / path).is_dir()} | kept


_open: list[Written] = []


def covering(path: Path) -> list[Written]:
    """The lists of the runs that are being written and that have `path` below their folder. A run that has not begun begins."""
    lists = [one for one in _open if one._relative(path) is not None]
    for one in lists:
        if one.before_first_write is not None:
            begin, one.before_first_write = one.before_first_write, None
            begin()
    return lists


def begin(path: Path) -> None:
    """A run that has `path` in its folder and was to replace another one clears that away now."""
    covering(path)


def note(path: Path, kind: Kind, content: Content | None = None) -> None:
    """List a path that is about to be made, wherever a run is being written."""
    for one in covering(path):
        one.note([(path, kind, content)])


def check_name(path: Path) -> None:
    """Raises UsageError where `path` is in a run folder and holds something that the run did not write, or that was changed since."""
    lists = covering(path)
    if lists and os.path.lexists(path) and not any(one.holds(path) for one in lists):
        changed = any(one.lists(path) for one in lists)
        what = "was changed since this run wrote it" if changed else "is in the way: this run did not write it"
        raise UsageError(f"{path} {what}", hint="move it away; the same command goes on from there")


def content_of(path: Path, digest: str | None = None) -> Content:
    """By what a file is known again: its size, and its sha256 where the writer has it or the file is small."""
    size = path.stat().st_size
    return size, digest or (_sha256(path) if size <= HASHED_BYTES else None)


def _is(path: Path, content: Content) -> bool:
    size, digest = content
    try:
        return path.stat().st_size == size and (digest is None or _sha256(path) == digest)
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _parse(line: bytes, where: str) -> tuple[str, Kind, Content | None]:
    """One line of a list. UsageError unless it names a path below the folder, and what is known of it."""
    try:
        entry: Any = json.loads(line)
        path, kind = entry["path"], entry.get("is", "file")
        size, digest = entry.get("size"), entry.get("sha256")
        good = isinstance(path, str) and "\0" not in path and not {"", ".", ".."} & set(path.split("/")) and kind in get_args(Kind)
        os.fsencode(path)
        if kind == "file":
            good = good and type(size) is int and size >= 0 and (digest is None or re.fullmatch("[0-9a-f]{64}", digest) is not None)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        shown = line[:80].decode("utf-8", "replace")
        raise UsageError(
            f"{where}: no line that mmgen wrote, found {shown!r}", hint="delete what the run left by yourself, or name another --out"
        )
    return path, kind, (size, digest) if kind == "file" else None


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and every link; links are not followed."""
    for base, folders, names in os.walk(folder):
        yield from (Path(base, name) for name in names)
        yield from (Path(base, name) for name in folders if os.path.islink(os.path.join(base, name)))
