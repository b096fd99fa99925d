"""Webdataset tars of others as a data set: img2dataset, datasets on the Hub, one's own.

What mmgen reads needs no import. This one writes it anew: fields under mmgen's names, keys without dots, pictures of one size, a `val` split, and
every sample checked once. Bare members get the names of `BARE_FIELDS` (jpg: image, txt: caption, json: meta); other fields keep theirs.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.data.importers.raw import BadFile, RawData, check_fit, check_fraction, fit_square, picture_format, share_of
from stages.data.locate import Place, locate, split_folders
from stages.data.sample import FORMATS, IMAGE_FORMATS, Encoded, Sample, decode_image, decode_value
from stages.data.shards import group_members
from stages.data.tar_format import Archive, Walk, walk
from stages.errors import DataError, UsageError


def samples(
    source: str,
    *,
    map: list[str] | None = None,
    drop: list[str] | None = None,
    dotted_keys: bool = False,
    size: int = 0,
    fit: str = "crop",
    val_fraction: float = 0.0,
) -> RawData:
    """Webdataset tars (img2dataset and others): fields renamed, keys without dots, pictures resized, every sample checked.

    map: OLD=NEW, a field under another name, for example cls=label; repeat for several
    drop: a field to leave out; repeat for several
    dotted_keys: keys contain dots (photo.001.jpg), so that a key ends at the last one; the dots become dashes
    size: resize pictures to this many pixels square; 0 keeps them as they are
    fit: crop (fill the square) or pad (keep all of the picture, on white)
    val_fraction: share of the samples of one folder, chosen by the hash of their key, that becomes the split val

    Example:
      mmgen import shards 'laion-{00000..00009}.tar' --size 256 --out data
    """
    check_fit(size, fit)
    check_fraction("--val-fraction", val_fraction)
    names = {}
    for entry in map or []:
        old, equals, new = entry.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--map {entry}: expected OLD=NEW, for example cls=label")
        names[old] = new
    folders = split_folders(source) or {"": source}
    tars = {split: [tar for place in locate(spec) for tar in _tars(place)] for split, spec in folders.items()}
    for split, paths in tars.items():
        if not paths:
            raise DataError(f"{folders[split]}: holds no tars")

    def read(paths: Iterable[Path], val: bool | None = None) -> Iterator[Sample | BadFile]:
        for path in paths:
            for found in _read_tar(path, dotted=dotted_keys):
                if val is not None and (share_of(found.key if isinstance(found, Sample) else found.path) < val_fraction) != val:
                    continue
                yield _checked(found, names, set(drop or []), size, fit) if isinstance(found, Sample) else found

    if "" not in tars:
        splits = {split: read(paths) for split, paths in tars.items()}
    elif val_fraction:
        splits = {"train": read(tars[""], val=False), "val": read(tars[""], val=True)}
    else:
        splits = {"train": read(tars[""])}
    listing = "\n".join(f"{split} {path.name} {path.stat().st_size}" for split, paths in tars.items() for path in paths)
    return RawData(
        splits=splits,
        fingerprint=hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        licence="unknown",
        notes=f"Samples of {sum(len(paths) for paths in tars.values())} webdataset tars.",
    )


def _tars(place: Place) -> list[Path]:
    return list(place.tars) if place.tars is not None else sorted(place.folder.glob("*.tar"))


def _read_tar(path: Path, *, dotted: bool) -> Iterator[Sample | BadFile]:
    """The samples of a tar with their fields as `Encoded`, and what is wrong with the others."""
    if path.stat().st_size == 0:
        yield BadFile(str(path), "an empty file")
        return
    archive = Archive(path)
    walked = walk(archive)
    if dotted:
        members = [member._replace(name=_undotted(member.name)) for member in walked.members]
        walked = Walk(members, walked.rejected, walked.damage, walked.end)
    for group in group_members(walked)[0]:
        if group.problem is not None:
            member, offset, reason = group.problem
            yield BadFile(f"{path}: {member} at byte {offset:,}", reason)
        elif group.fields:
            fields = {
                name: Encoded(suffix.rpartition(".")[2].lower(), archive[at : at + size])
                for name, (suffix, at, size) in group.fields.items()
            }
            yield Sample(group.key, fields, str(path))
    if walked.damage:
        yield BadFile(f"{path}: what follows byte {walked.damage[0]:,}", walked.damage[1])


def _undotted(name: str) -> str:
    """A member's name with dots only before its format and, where it is there, its field: `a.b/c.d.jpg` is `a.b/c-d.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    if suffix.lower() not in FORMATS:
        return name
    return folder + slash + stem.replace(".", "-") + dot + suffix


def _checked(sample: Sample, names: dict[str, str], dropped: set[str], size: int, fit: str) -> Sample | BadFile:
    """The sample as it is to be written. Bytes pass through where they can; each is decoded once, so that a damaged one is found now."""
    fields: dict[str, Any] = {}
    try:
        for name, encoded in sample.fields.items():
            if name in dropped:
                continue
            target = names.get(name, name)
            if target in fields:
                raise DataError(f"two fields would be '{target}'")
            fields[target] = _value(encoded, size, fit)
    except DataError as error:
        return BadFile(f"{sample.source}: {sample.key}", error.message)
    key = re.sub(r"[^A-Za-z0-9_/-]+", "-", sample.key)
    return Sample(key, fields, sample.source)


def _value(encoded: Encoded, size: int, fit: str) -> Any:
    if encoded.suffix in IMAGE_FORMATS:
        image = decode_image(encoded.data)
        return fit_square(image, size, fit) if size else Encoded(picture_format(encoded.data), encoded.data)
    value = decode_value(encoded.suffix, encoded.data)
    if isinstance(value, dict):  # a loader that infers types from the first samples cannot have null, and cannot lose a key
        return {name: "" if inner is None else inner for name, inner in value.items()}
    return value if encoded.suffix in ("txt", "json") else encoded
