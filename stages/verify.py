"""Is every byte of these shards what it claims to be? Reads all of them, and lists what is wrong instead of stopping at the first.

Checked: every tar whole (header checksums, sizes inside the file, end-of-archive blocks) and equal to the sha256 its index gives; every
key without dots and unique over the set; members of a sample side by side; the same fields in every sample; every field decodable
within the caps; numbers finite; codes below the size of their codebook. What the index says is held against all of it: how many samples
each tar has, from which key to which, what the fields are, and that the tokenizers that came along are those that wrote them. Nothing
beside the tars is a link, which would lead out of the folder.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.data.index import INDEX, META, FieldInfo, FieldTable, ShardEntry, ShardIndex, read_index
from stages.data.locate import Place, locate, split_folders
from stages.data.sample import decode_value
from stages.data.shards import UNFINISHED, SampleMembers, group_members, sha256_file, uneven
from stages.data.stream import spool_folder
from stages.data.tar_format import Archive, walk
from stages.errors import MmgenError
from stages.escape import lines_of
from stages.files import files_inside, inside


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where (offset is a byte of the file), of what kind, and in words."""

    path: str
    offset: int
    kind: str
    message: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.path}: byte {self.offset:,}: {self.message} [{self.kind}]"


@dataclass
class Verification:
    """What `verify` found, and how much it looked at."""

    findings: list[Finding] = field(default_factory=list)
    samples: int = 0
    tars: int = 0
    bytes: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    written: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "findings": [asdict(finding) for finding in self.findings], "unread": dict(self.unread), "ok": self.ok}

    def text(self) -> str:
        lines = [str(finding) for finding in self.findings]
        for suffix, count in self.unread.most_common():
            pickled = " (pickled objects are never loaded)" if suffix in ("pyd", "pickle", "pkl", "pth", "pt") else ""
            lines.append(f"note: {count} members end in .{suffix}, which mmgen does not read{pickled}")
        lines += [f"wrote {path}" for path in self.written]
        result = "all well" if self.ok else f"{len(self.findings)} findings"
        return lines_of([*lines, f"{self.samples:,} good samples in {self.tars:,} tars, {self.bytes:,} bytes: {result}"])


def verify(spec: str, *, index: bool = False) -> Verification:
    """Read everything SHARDS holds; of a parent of splits, every split; of a stream (`-`), what comes through it.

    With `index`, a folder in whose tars nothing is wrong gets a new `.mmgen/shardindex.json` from what is really there. Raises nothing:
    a path that does not exist is a finding too.
    """
    result = Verification()
    try:
        folders = split_folders(spec)
        spool = spool_folder("-") if spec == "-" else None
        places = [place for part in folders.values() for place in locate(part)] if folders else locate(spec, spool=spool)
    except MmgenError as error:
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        result.findings.append(Finding(spec, 0, "unreadable", message))
        return result
    for place in places:
        _verify_place(place, result, write_index=index)
    return result


def _verify_place(place: Place, result: Verification, *, write_index: bool) -> None:
    known: ShardIndex | None = None
    found_before = len(result.findings)
    try:
        known = read_index(place.folder)
    except MmgenError as error:
        result.findings.append(Finding(str(place.folder / META / INDEX), 0, "index", error.message))
    result.findings += [Finding(str(path), 0, "link", reason) for path, reason in files_inside(place.folder / META)[1]]
    paths = list(place.tars) if place.tars is not None else sorted(place.folder.glob("*.tar"))
    if known is None and (place.folder / META / UNFINISHED).is_dir():
        result.findings.append(
            Finding(str(place.folder), 0, "unreadable", "the stage that writes these shards has not finished; run it again")
        )
    if not paths:
        result.findings.append(Finding(str(place.folder), 0, "unreadable", "no tars here"))
    listed = {entry.name: entry for entry in known.shardlist} if known else {}
    if place.tars is None and not write_index:
        for name in sorted(listed.keys() - {path.name for path in paths}):
            result.findings.append(Finding(str(place.folder / name), 0, "index", "missing, though the index lists it"))

    expected = frozenset(known.fields) if known and not write_index else None
    fields = FieldTable(
        {name: info.tokenizer for name, info in known.fields.items() if info.tokenizer} if known else {},
        {name: info.codebook_size for name, info in known.fields.items() if info.codebook_size} if known else {},
    )
    keys: dict[str, str] = {}
    entries = []
    for path in paths:
        try:
            archive, digest = Archive(path), sha256_file(path)
            groups, damage, unread = _read_tar(archive)
            result.tars += 1
            result.bytes += len(archive)
            result.unread += unread
            if damage:
                result.findings.append(Finding(str(path), damage[0], "damaged", damage[1]))
            if expected is None:
                sets = Counter(frozenset(group.fields) for group in groups if not group.problem and group.fields)
                expected = sets.most_common(1)[0][0] if sets else None
            if known and not write_index:
                result.findings += _compare(path, _entry(archive, digest, _whole(groups, expected)), listed.get(path.name))
            good = _verify_samples(archive, groups, expected or frozenset(), keys, fields, result)
        except MmgenError as error:  # it is no file, or was cut meanwhile
            result.findings.append(Finding(str(path), 0, "unreadable", error.message))
            continue
        result.samples += len(good)
        if good:
            entries.append(_entry(archive, digest, good))
    if write_index:
        _write_index(place, known, entries, fields, result, found_before)
    elif known:
        result.findings += _compare_fields(place.folder, known.fields, fields.fields)
        result.findings += _compare_tokenizers(place.folder, known)


def _entry(archive: Archive, digest: str, keys: list[str]) -> ShardEntry:
    """What the index should say of a tar that holds these samples."""
    first, last = (keys[0], keys[-1]) if keys else ("", "")
    size = len(archive)
    return ShardEntry(url=f"../{archive.path.name}", nsamples=len(keys), bytes=size, sha256=digest, first_key=first, last_key=last)


def _whole(groups: list[SampleMembers], expected: frozenset[str] | None) -> list[str]:
    """The keys of the samples that are what the index counts: in one piece, whatever their bytes are worth."""
    return [group.key for group in groups if group.problem is None and group.fields and group.fields.keys() == expected]


def _compare(path: Path, found: ShardEntry, entry: ShardEntry | None) -> Iterator[Finding]:
    if entry is None:
        yield Finding(str(path), 0, "index", "not in the folder's index")
    elif found.sha256 != entry.sha256:
        yield Finding(str(path), 0, "sha256", f"its sha256 is {found.sha256}, the index says {entry.sha256}")
    else:
        for name in ("bytes", "nsamples", "first_key", "last_key"):
            is_, says = getattr(found, name), getattr(entry, name)
            if is_ != says:
                yield Finding(str(path), 0, "index", f"{name} is {is_!r}, the index says {says!r}")


def _read_tar(archive: Archive) -> tuple[list[SampleMembers], tuple[int, str] | None, Counter[str]]:
    walked = walk(archive)
    groups, unread = group_members(walked)
    return groups, walked.damage, unread


def _verify_samples(
    archive: Archive, groups: list[SampleMembers], expected: frozenset[str], keys: dict[str, str], fields: FieldTable, result: Verification
) -> list[str]:
    """The keys of the good samples of a tar."""
    good = []
    path = str(archive.path)
    for group in groups:
        before = len(result.findings)
        if group.problem is not None:
            member, offset, reason = group.problem
            result.findings.append(Finding(path, offset, "misplaced", f"{member}: {reason}", group.key))
        elif not group.fields or group.fields.keys() != expected:
            message = f"{group.key}: {uneven(group.fields, expected)}"
            result.findings.append(Finding(path, group.span[0], "uneven", message, group.key))
        if (first := keys.setdefault(group.key, path)) != path:
            result.findings.append(Finding(path, group.span[0], "repeated-key", f"{group.key}: this key is also in {first}", group.key))
        for name, (suffix, start, size) in group.fields.items():
            problem = _verify_value(name, suffix.rpartition(".")[2].lower(), archive.read(start, size), fields)
            if problem is not None:
                result.findings.append(Finding(path, start, problem[0], f"{group.key}.{suffix}: {problem[1]}", group.key))
        if len(result.findings) == before:
            good.append(group.key)
    return good


def _verify_value(name: str, form: str, data: bytes, fields: FieldTable) -> tuple[str, str] | None:
    """(kind, message) of what is wrong with one field of one sample."""
    try:
        value = decode_value(form, data)
        fields.add(name, form, data)
    except MmgenError as error:
        return "undecodable", error.message
    if not isinstance(value, np.ndarray):
        return None
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return "non-finite", f"{np.count_nonzero(~np.isfinite(value)):,} of {value.size:,} numbers are not finite"
    codes = fields.codebook_sizes.get(name)
    if codes is not None and value.size and not (value.min() >= 0 and value.max() < codes):
        return "code-range", f"codes from {value.min()} to {value.max()}, the codebook has {codes}"
    return None


def _compare_fields(folder: Path, indexed: dict[str, FieldInfo], found: dict[str, FieldInfo]) -> Iterator[Finding]:
    where = str(folder / META / INDEX)
    for name, info in indexed.items():
        real = found.get(name)
        if real is None:
            yield Finding(where, 0, "index", f"field '{name}' is listed, the tars hold no such field that can be read")
            continue
        kind = np.dtype(real.dtype or "O") if real.suffix == "npy" else None
        if info.codebook_size and (kind is None or kind.kind not in "iu" or info.codebook_size - 1 > np.iinfo(kind).max):
            yield Finding(where, 0, "index", f"field '{name}': a codebook of {info.codebook_size:,} codes, the tars hold {real.dtype}")
        if (real.dtype, real.shape, real.suffix) != (info.dtype, info.shape, info.suffix):
            says, is_ = f"{info.dtype} {info.shape} .{info.suffix}", f"{real.dtype} {real.shape} .{real.suffix}"
            yield Finding(where, 0, "index", f"field '{name}' is listed as {says}, the tars hold {is_}")


def _compare_tokenizers(folder: Path, index: ShardIndex) -> Iterator[Finding]:
    """Whether the tokenizers that the index lists are there, are what their names say, and agree with the fields they wrote."""
    from stages.training.checkpoint import fingerprint, open_checkpoint

    for name in index.tokenizers:
        where = str(folder / META / "tokenizers" / name)
        try:
            own = inside(folder, META, "tokenizers", name)
            if own is None:
                yield Finding(where, 0, "tokenizer", "missing, though the index lists it")
                continue
            computed = fingerprint(own)
            if name.rpartition("-")[2] != computed[:8]:
                yield Finding(where, 0, "tokenizer", f"its fingerprint is {computed[:8]}: not the tokenizer of this name")
            autoencoders = [] if (own / "tokenizer.json").exists() else list(open_checkpoint(own).recipe.autoencoders.values())
        except MmgenError as error:
            yield Finding(where, 0, "tokenizer", error.message)
            continue
        for field_name, info in index.fields.items():
            for autoencoder in autoencoders if info.tokenizer == computed else ():
                if info.codebook_size not in (None, autoencoder.codebook_size):
                    says = f"field '{field_name}': codebook_size is {info.codebook_size:,} in the index"
                    yield Finding(where, 0, "index", f"{says}, {autoencoder.codebook_size} in the tokenizer that wrote it")


def _write_index(
    place: Place, known: ShardIndex | None, entries: list[ShardEntry], fields: FieldTable, result: Verification, found_before: int
) -> None:
    # what is wrong with the old index does not matter: it is replaced
    wrong = Counter(finding.kind for finding in result.findings[found_before:] if finding.kind != "index")
    where = str(place.folder / META / INDEX)
    if place.tars is not None and {path.name for path in place.folder.glob("*.tar")} != {path.name for path in place.tars}:
        result.findings.append(
            Finding(where, 0, "not-written", "an index speaks for all tars of a folder; name the folder, not some of its tars")
        )
    elif wrong or not entries:
        what = ", ".join(f"{count} {kind}" for kind, count in wrong.items()) or "there are no samples"
        result.findings.append(Finding(where, 0, "not-written", f"no index is written for damaged shards ({what})"))
    else:
        base = known or ShardIndex(shardlist=[], fields={})
        there = [name for name in base.tokenizers if inside(place.folder, META, "tokenizers", name)]
        index = base.model_copy(update={"shardlist": entries, "fields": dict(sorted(fields.fields.items())), "tokenizers": there})
        result.written.append(str(index.write(place.folder)))
