"""From what a person writes for SHARDS to folders and tars on this machine.

SHARDS is a folder, a tar, a brace pattern (`data-{000000..000003}.tar`), `-` for a tar on standard input, `hf://datasets/org/name`, an
http(s) address of a tar, or several of these joined by `::`, for training also with weights (`3*data/scenes::1*data/emoji`). A folder that holds no tars but `train`, `val` ... with tars is the parent
of splits. Commands (`pipe:`), which webdataset would run, are refused.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from braceexpand import braceexpand

from stages.data.download import cache_folder, fetch
from stages.data.index import INDEX, META
from stages.data.stream import receive_stream
from stages.data.tar_format import BLOCK, Archive, no_tar, walk
from stages.errors import DataError, UsageError, nearest
from stages.hub import hub_errors

SPLITS = ("train", "val", "heldout", "test")
MAX_PATTERN, MAX_EXPANDED = 4096, 100_000  # characters of a brace pattern, names that it may stand for
_WEIGHTED = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\*(.+)")
_HUB_ADDRESS = re.compile(r"hf://(?:(datasets|models|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


@dataclass(frozen=True)
class Place:
    """A folder of shards, or (tars not None) only these tars of it."""

    folder: Path
    tars: tuple[Path, ...] | None = None
    part: int = 0  # which of the parts that `::` joins
    weight: float | None = None  # and how often training takes from it, beside the others


def locate(spec: str, *, split: str | None = None, spool: Path | None = None) -> list[Place]:
    """The folders and tars that `spec` means, downloaded or spooled where they are not local.

    `split` chooses among the subfolders of a parent of splits. `spool` is the folder where standard input is kept.
    Raises UsageError where something is missing, DataError where there are several splits and none was chosen.
    """
    places = []
    for number, part in enumerate(spec.split("::")):
        matched = _WEIGHTED.fullmatch(part)
        weight, path = (float(matched[1]), matched[2]) if matched else (None, part)
        places += [replace(place, part=number, weight=weight) for place in _locate_part(path, spool)]
    weights = {place.weight for place in places}
    if 0.0 in weights or (None in weights and len(weights) > 1):
        raise UsageError(f"SHARDS: {spec}: give every part a weight above 0, or none", hint="for example 3*data/scenes::1*data/emoji")
    return [_choose_split(place, split) if place.tars is None else place for place in places]


def split_folders(spec: str) -> dict[str, str]:
    """{split: folder} of a parent of splits, train first; empty for anything else."""
    if "::" in spec or spec == "-":
        return {}
    (place, *others) = _locate_part(spec, None)
    return {} if others or place.tars is not None else {name: str(folder) for name, folder in _splits(place.folder).items()}


def _splits(folder: Path) -> dict[str, Path]:
    if holds_tars(folder):
        return {}
    found = {child.name: child for child in sorted(folder.iterdir()) if child.is_dir() and holds_tars(child)}
    order = {name: rank for rank, name in enumerate(SPLITS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def holds_tars(folder: Path) -> bool:
    return any(folder.glob("*.tar"))


def _choose_split(place: Place, split: str | None) -> Place:
    if holds_tars(place.folder) or (place.folder / META / INDEX).exists():
        return place
    splits = _splits(place.folder)
    if not splits:
        compressed = sorted(place.folder.glob("*.tar.*")) + sorted(place.folder.glob("*.tgz"))
        if compressed:
            raise DataError(
                f"{place.folder}: {compressed[0].name} is compressed; shards are read in place, unpack it to a plain .tar first"
            )
        raise DataError(f"{place.folder}: no tars here, nor in folders such as train or val")
    if split is not None:
        if split not in splits:
            raise DataError(f"{place.folder}: there is no split '{split}'", hint=nearest(split, splits))
        return replace(place, folder=splits[split])
    if len(splits) > 1:
        hint = f"for example {place.folder / next(iter(splits))}"
        raise DataError(f"{place.folder}: holds several splits ({', '.join(splits)}); name one", hint=hint)
    return replace(place, folder=next(iter(splits.values())))


def _locate_part(part: str, spool: Path | None) -> list[Place]:
    if not part:
        raise UsageError("SHARDS: an empty path")
    if part == "-":
        if spool is None:
            raise UsageError("SHARDS: standard input ('-') cannot be read here; write the shards to a folder first")
        return [Place(receive_stream(sys.stdin.buffer, spool))]
    if part.startswith("pipe:"):
        raise UsageError(f"SHARDS: '{part}' would run a command; mmgen reads data and never runs it. Pipe the tar into `-` instead")
    if part.startswith("hf://"):
        return _hub(part)
    if part.startswith(("http://", "https://")):
        return _group([download(address) for address in _expand(part)])
    path = _path(part)
    if path.is_dir():
        return [Place(path)]
    if path.is_file():
        return _group([path])
    if "{" not in part:
        raise UsageError(f"SHARDS: {path} does not exist", hint=_nearest_path(path))
    paths = [_path(name) for name in _expand(part)]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"SHARDS: {path}, one of {len(paths)} that '{part}' stands for, is not a file", hint=_nearest_path(path))
    return _group(paths)


def _path(name: str) -> Path:
    """The path a person means, which need not be there. UsageError for what can be no path."""
    try:
        path = Path(os.path.expanduser(name))
        path.exists()
    except OSError as error:  # too long a name, say
        raise UsageError(f"SHARDS: {name:.200}: {(error.strerror or str(error)).lower()}") from None
    return path


def _group(tars: Sequence[Path]) -> list[Place]:
    """Tars by folder, in order, so that each folder's index can speak for them."""
    places: list[Place] = []
    for tar in tars:
        if places and places[-1].folder == tar.parent:
            places[-1] = Place(tar.parent, (*(places[-1].tars or ()), tar))
        else:
            places.append(Place(tar.parent, (tar,)))
    return places


def _alternatives(pattern: str) -> int:
    """How many names a brace pattern stands for, or more: the library makes all of them before the first is seen."""
    count, open_groups = 1, list[int]()
    for found in re.finditer(r"\{(-?\d+)\.\.(-?\d+)[^{}]*\}|\{\w\.\.\w[^{}]*\}|[{},]", pattern):
        if found[1]:
            count *= abs(int(found[1]) - int(found[2])) + 1
        elif len(found[0]) > 1:
            count *= 52
        elif found[0] == "{":
            open_groups.append(1)
        elif found[0] == "," and open_groups:
            open_groups[-1] += 1
        elif found[0] == "}" and open_groups:
            count *= open_groups.pop()
    return count


def _expand(pattern: str) -> list[str]:
    try:
        if len(pattern) > MAX_PATTERN or _alternatives(pattern) > MAX_EXPANDED:
            raise ValueError(f"it is longer than {MAX_PATTERN:,} characters, or stands for more than {MAX_EXPANDED:,} names")
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"SHARDS: '{pattern}' is no brace pattern: {error}", hint="for example 'data-{000000..000003}.tar'") from None


def _nearest_path(path: Path) -> str:
    """A hint that names what does exist on the way to `path`."""
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    names = [child.name for child in folder.iterdir() if child.name.endswith(".tar") or child.is_dir()]
    return f"in {folder}: {nearest(path.name, names)}"


def _hub(address: str) -> list[Place]:
    """A data set (or model) repository of the Hugging Face Hub, or a part of it; only tars and mmgen's own folder are fetched."""
    matched = _HUB_ADDRESS.fullmatch(address)
    if matched is None:
        raise UsageError(
            f"SHARDS: '{address}' is no Hub address", hint="for example hf://datasets/org/name or hf://datasets/org/name/train"
        )
    kind, repo, revision, inside = matched.group(1) or "models", matched.group(2), matched.group(3), (matched.group(4) or "").strip("/")
    from huggingface_hub import snapshot_download

    names = _expand(inside) if inside.endswith(".tar") else []
    prefix = f"{inside}/" if inside and not names else ""
    folder = inside.rpartition("/")[0]
    patterns = [*names, f"{folder}/{META}/{INDEX}".lstrip("/")] if names else [f"{prefix}*.tar", f"{prefix}*{META}/*"]
    with hub_errors(f"SHARDS: {address}"):
        root = snapshot_download(repo, repo_type=kind.removesuffix("s"), revision=revision, allow_patterns=patterns)
    if names:
        missing = [name for name in names if not Path(root, name).is_file()]
        if missing:
            raise UsageError(f"SHARDS: {address}: the repository has no {missing[0]}")
        return _group([Path(root, name) for name in names])
    if not Path(root, inside).is_dir():
        raise UsageError(f"SHARDS: {address}: the repository has no folder '{inside}' with tars")
    return [Place(Path(root, inside))]


def download(address: str) -> Path:
    """The file behind an http(s) address, kept in $MMGEN_CACHE (default ~/.cache/mmgen) and fetched once; remove it there to fetch anew."""
    cache = cache_folder() / "downloads"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.partition("?")[0].rpartition("/")[2]) or "download"
    path = cache / hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:16] / name[-100:]
    if path.exists() and not _no_tar(path):
        return path
    return fetch(address, path, problem=_no_tar)


def _no_tar(path: Path, *, maybe_cut: bool = False) -> str:
    """Why a downloaded file is no tar; empty where it is one, by its first header or, if it may be cut, by all of them to its end."""
    archive = Archive(path)
    if maybe_cut and (damage := walk(archive).damage):
        return f"byte {damage[0]:,}: {damage[1]}"
    return no_tar(archive[:BLOCK])
