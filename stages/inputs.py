"""What a run reads, and where its --out may not be: a run that replaces another deletes, and no input may be what is deleted.

Refused is an --out that is one of the inputs, or holds one. An --out inside an input is allowed (`mmgen eval M data --out M/scores`),
because nothing of the input is touched there, with two exceptions: in what belongs to mmgen (`.mmgen`, `state`, `tokenizers`), and
where new tars would be one more split of the input (`--out data/samples`, where `data` has data/train and data/val).
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from braceexpand import braceexpand

from stages.errors import UsageError

_WEIGHT = re.compile(r"\d+(?:\.\d+)?\*")
_OURS = (".mmgen", "state", "tokenizers")
Place = tuple[int, int]  # device and inode: one folder under all its names


def refuse_overlap(out: Path, reads: Iterable[str | Path | None], *, adds_tars: bool = False) -> None:
    """Raises UsageError where `out` is one of the inputs or holds one, also behind links, or lies where it would change one.

    reads: as a person writes them: folders, files, SHARDS, `DIR#part`; what is not on this machine is passed over.
    adds_tars: the run writes tars to `out` itself or one folder below.
    """
    there, own = _way_to(out), _place(out)
    for spec in dict.fromkeys(str(spec) for spec in reads if spec):
        for path in _local(spec):
            for target in _with_targets(path):
                if own is not None and own in _way_to(target):
                    what = "is" if _place(target) == own else "holds"
                    raise _refused(out, what, spec, target)
            place = _place(path)
            if place in there and path.is_dir():
                below = there[place]
                if below and (below[0] in _OURS or (adds_tars and len(below) == 1 and _is_parent_of_splits(path))):
                    raise _refused(out, "lies inside", spec, path)


def _refused(out: Path, what: str, spec: str, path: Path) -> UsageError:
    named = spec if str(path) == spec else f"{spec} ({path})"
    return UsageError(f"--out {out} {what} an input of this run: {named}", hint="name another folder with --out")


def _local(spec: str) -> Iterator[Path]:
    """The files and folders on this machine that an input may mean."""
    texts = {spec, spec.partition("#")[0]}
    for part in spec.split("::"):
        texts |= {part, _WEIGHT.sub("", part, count=1)}
    for text in sorted(texts):
        if text in ("", "-") or "\0" in text:
            continue
        try:
            names = list(braceexpand(text)) if "{" in text else []
        except ValueError:
            names = []
        for name in dict.fromkeys([text, *names]):
            path = Path(name).expanduser() if name.startswith("~") else Path(name)
            if _place(path) is not None:
                yield path


def _with_targets(path: Path) -> Iterator[Path]:
    """An input, where it stands if it is a link, and what the links below it lead to: a folder of links is as good as what they name."""
    queue, seen = [path], set()
    while queue:
        path = queue.pop()
        place = _place(path)
        if place is None or place in seen:
            continue
        seen.add(place)
        yield path
        for base, folders, names in os.walk(os.path.realpath(path)):
            queue += [Path(base, name) for name in (*folders, *names) if os.path.islink(os.path.join(base, name))]


def _place(path: Path) -> Place | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _way_to(path: Path) -> dict[Place, tuple[str, ...]]:
    """Every folder on the way to `path`, itself included, as it is written and as it is behind links: place → the names that follow."""
    found: dict[Place, tuple[str, ...]] = {}
    for whole in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name):
        for number, folder in enumerate((whole, *whole.parents)):
            place = _place(folder)
            if place is not None:
                found.setdefault(place, whole.parts[len(whole.parts) - number :])
    return found


def _is_parent_of_splits(folder: Path) -> bool:
    return not any(folder.glob("*.tar")) and any(folder.glob("*/*.tar"))
