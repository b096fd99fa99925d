"""Shards that cannot lie: tars of samples, written whole or not at all, and read back sample by sample.

A folder of shards holds tars in the open and their index in `.mmgen/`. `ShardWriter` gives equal samples equal bytes; each tar appears
under its name only when it is complete, and the index last. `open_shards` reads any webdataset tar. What webdataset's own grouping lets
pass is refused here: members of one sample that are not side by side, samples that lack a field, tars that were cut. A sample is
always the members of one key in one tar, so the picture of one can never meet the caption of another.

Nothing is read before it is needed: the headers of each tar are walked once, on first use, and a sample's bytes are read where they are.
"""

import glob
import hashlib
import json
import os
import re
import sys
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from stages.data.index import INDEX, META, TOKENIZER_FOLDER, FieldInfo, FieldTable, ShardEntry, ShardIndex, merge_field, read_index
from stages.data.locate import Place, locate, split_folders
from stages.data.sample import MAX_BYTES, Encoded, Sample, check_key, decode_value, encode_field, split_suffix, too_large
from stages.data.stream import stream_shards
from stages.data.tar_format import END_OF_ARCHIVE, Archive, Walk, member_bytes, walk
from stages.errors import DataError, UsageError, nearest
from stages.escape import json_text
from stages.files import (
    copy_tokenizer,
    inside,
    make_folder,
    name_file,
    open_atomic,
    open_regular,
    remove_file,
    remove_tree,
    sync,
    write_atomic,
)
from stages.written import begin, check_name, note

__all__ = ["BadSample", "BadSampleError", "ShardWriter", "Shards", "open_shards", "split_folders", "stream_shards"]

ON_BAD_SAMPLE = ("fail", "skip", "quarantine")
UNFINISHED = "unfinished"  # in .mmgen: the tar being written and a record of each finished one, until the index replaces them
_WRITE_BYTES = 4 * 1024 * 1024
_OPEN_ARCHIVES = 128
_AT_ONCE = 32 * 1024  # the fields of a sample that stand in so many bytes come from one read
_MAX_QUARANTINED = 1024 * 1024 * 1024  # bytes of one bad sample; a sparse file of some kB can claim any number


# --- writing ----------------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples to `out/name-000000.tar` and on, `samples_per_shard` each, and the index when the `with` block ends well.

    field_tokenizers: fingerprint of the tokenizer that wrote a field (`{"image.codes": fingerprint}`); codebook_sizes: how many codes
    there are in it, so that `verify` can check them. tokenizers: checkpoint folders to copy to `.mmgen/tokenizers/<key>`; the keys are
    `<name>-<first 8 of the fingerprint>`, as in `Shards.tokenizers`. provenance: where the samples come from, kept in the index.

    After an exception the whole tars stay. A new writer for the same folder starts afresh, or with `resume` goes on: the stage then
    skips the `num_written` samples that are there already (all of them where the set is `finished`). `overwrite` removes a finished set, of what mmgen wrote only.

    A stage that can say which input makes which tar asks for its `parts` instead. Then ranks share the work: each writes tars of its
    own, and when all have come to `wait` the first of them makes the index. What comes out does not depend on how many they are.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str = "data",
        samples_per_shard: int = 1000,
        split: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        tokenizers: Mapping[str, Path] | None = None,
        field_tokenizers: Mapping[str, str] | None = None,
        codebook_sizes: Mapping[str, int] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        rank: int = 0,
        ranks: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        if samples_per_shard < 1:
            raise UsageError(f"samples_per_shard = {samples_per_shard}: expected at least 1")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(f"shard name '{name}': expected letters, digits, - and _")
        for folder in tokenizers or {}:
            if not TOKENIZER_FOLDER.fullmatch(folder):
                raise UsageError(f"tokenizer folder '{folder}': expected a plain name such as vq-0a1b2c3d")
        self.out, self.name, self.split = Path(out), name, split
        self.samples_per_shard = samples_per_shard
        # fails now, not after hours, where it is no JSON; a path that is no UTF-8 becomes one, which an index can hold
        told = json.dumps(dict(provenance or {}), ensure_ascii=False)
        self.provenance = json.loads(told.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        self.tokenizers = dict(tokenizers or {})
        self.overwrite, self.resume = overwrite, resume
        self.rank, self.ranks, self.wait = rank, ranks, wait
        self.finished = False  # an earlier launch wrote the whole set: there is nothing left to do
        self.written: set[str] = set()  # the tars that are there
        self.num_written = 0
        self._number = 0  # of the tar being written
        self._unfinished = self.out / META / UNFINISHED
        self._table = FieldTable(field_tokenizers, codebook_sizes)
        self._all_keys: set[str] = set()
        self._keys: list[str] = []  # of the tar being written
        self._suffixes: list[str] | None = None
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._buffer: list[bytes] = []
        self._buffered = 0

    def __enter__(self) -> Self:
        begin(self.out / META)
        finished = finished_set(self.out) if self.resume else None
        if finished is not None:
            self.finished = True
            self.written = {entry.name for entry in finished.shardlist}
            self.num_written = sum(entry.nsamples for entry in finished.shardlist)
            return self
        if self.rank == 0:
            self._prepare()
        self.wait()
        for record in self._records():
            entry = ShardEntry.model_validate(record["entry"])
            self.written.add(entry.name)
            self.num_written += entry.nsamples
            self._all_keys.update(record["keys"])
            self._suffixes = record["suffixes"]
            for name, info in record["fields"].items():
                self._table.note(name, FieldInfo.model_validate(info))
        while self._tar_name() in self.written:
            self._number += 1
        return self

    def _prepare(self) -> None:
        """Keep the whole tars of an earlier launch if it is to be resumed; clear away everything else that mmgen wrote."""
        records = self._records()
        self._make_room({record["entry"]["url"].removeprefix("../") for record in records})
        for record in records:
            entry = ShardEntry.model_validate(record["entry"])
            if not (self.resume and _is_whole(self.out / entry.name, entry)):
                remove_file(self.out / entry.name)
                remove_file(self._record(entry.name))
        make_folder(self._unfinished)

    def _records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text("utf-8")) for path in sorted(self._unfinished.glob("*.json"))]

    def _make_room(self, own: set[str]) -> None:
        """Refuse a folder that holds other tars; with `overwrite`, remove the finished set of an earlier run."""
        index = read_index(self.out)
        finished = {entry.name for entry in index.shardlist} if index else set()
        if index and not self.overwrite:
            raise UsageError(f"{self.out}: holds a finished set of {len(finished)} tars", hint="--overwrite, or another --out")
        foreign = sorted(path.name for path in self.out.glob("*.tar") if path.name not in own | finished)
        if foreign:
            raise UsageError(f"{self.out}: holds {foreign[0]}, which mmgen did not write", hint="choose another --out")
        remove_file(self.out / META / INDEX)
        for name in finished:
            remove_file(self.out / name)

    def parts(self, count: int, per_tar: int) -> Iterator[range]:
        """Of `count` inputs, those of each tar that this rank is to write and that is not there yet; the tar ends where the next begins.

        Inputs that turn out to be bad leave their tar shorter, or out.
        """
        for number, start in enumerate(range(0, 0 if self.finished else count, per_tar)):
            self._number = number
            if number % self.ranks == self.rank and self._tar_name() not in self.written:
                yield range(start, min(start + per_tar, count))
                if self._keys:
                    self._finish_tar()

    def write(self, sample: Sample) -> None:
        """Append a sample. Raises DataError for a dotted or repeated key, for other fields than the first sample has, and for a value
        that cannot be stored or is not finite; nothing of that sample is written then."""
        key = sample.key
        check_key(key)
        if key in self._all_keys:
            raise DataError(f"key '{key}': written before; keys are unique over a set")
        members, infos = [], {}
        for name, value in sample.fields.items():
            try:
                suffix, data = encode_field(name, value)
                if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise DataError(f"field '{name}': {np.count_nonzero(~np.isfinite(value)):,} of {value.size:,} numbers are not finite")
                infos[name] = self._table.merged(name, suffix.rpartition(".")[2], data)
            except DataError as error:
                raise DataError(f"key '{key}': {error.message}", hint=error.hint) from None
            members.append((suffix, data))
        members.sort()
        self._check_fields(key, [suffix for suffix, _ in members])
        self._table.fields |= infos
        for suffix, data in members:
            member = member_bytes(f"{key}.{suffix}", data)
            self._buffer.append(member)
            self._buffered += len(member)
        self._all_keys.add(key)
        self._keys.append(key)
        self.num_written += 1
        if self._buffered > _WRITE_BYTES:
            self._flush()
        if len(self._keys) == self.samples_per_shard:
            self._finish_tar()

    def _check_fields(self, key: str, suffixes: list[str]) -> None:
        if not suffixes:
            raise DataError(f"key '{key}': a sample without fields")
        if self._suffixes is None:
            self._suffixes = suffixes
        elif suffixes != self._suffixes:
            raise DataError(f"key '{key}': has {', '.join(suffixes)}; the samples before it have {', '.join(self._suffixes)}")

    def _tar_name(self) -> str:
        return f"{self.name}-{self._number:06d}.tar"

    def _record(self, tar_name: str) -> Path:
        return self._unfinished / f"{tar_name}.json"

    def _flush(self) -> None:
        if self._file is None:
            part = self._unfinished / f"{self._tar_name()}.part"
            check_name(part)
            note(part, "scratch")
            self._file = part.open("wb")
        data = b"".join(self._buffer)
        self._buffer.clear()
        self._buffered = 0
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _finish_tar(self) -> None:
        self._buffer.append(END_OF_ARCHIVE)
        self._flush()
        assert self._file is not None
        sync(self._file)
        self._file.close()
        name = self._tar_name()
        entry = ShardEntry(
            url=f"../{name}",
            nsamples=len(self._keys),
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            first_key=self._keys[0],
            last_key=self._keys[-1],
        )
        # first the record, then the tar: whatever is in the open is on record as ours
        fields = {field_name: info.to_dict() for field_name, info in self._table.fields.items()}
        record = {"entry": entry.model_dump(), "fields": fields, "suffixes": self._suffixes, "keys": self._keys}
        write_atomic(self._record(name), json.dumps(record))
        name_file(self._unfinished / f"{name}.part", self.out / name, digest=entry.sha256)
        self.written.add(name)
        self._number += 1
        self._file, self._keys, self._bytes, self._digest = None, [], 0, hashlib.sha256()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
                (self._unfinished / f"{self._tar_name()}.part").unlink(missing_ok=True)
            return
        if self.finished:
            return
        if self._keys:
            self._finish_tar()
        self.wait()
        if self.rank == 0:
            self._finish_set()
        self.wait()

    def _finish_set(self) -> None:
        """What belongs to all tars: the tokenizers that travel with them, and the index, whose presence says that all is there."""
        records = self._records()
        if not records:
            raise DataError(f"{self.out}: there was no sample to write")
        table = FieldTable()
        seen: set[str] = set()
        for record in records:
            for name, info in record["fields"].items():
                table.note(name, FieldInfo.model_validate(info))
            if record["suffixes"] != records[0]["suffixes"]:
                raise DataError(f"{record['entry']['url']}: has {record['suffixes']}; the tars before it have {records[0]['suffixes']}")
            if twice := sorted(seen.intersection(record["keys"])):
                raise DataError(f"key '{twice[0]}': written in two tars; keys are unique over a set")
            seen.update(record["keys"])
        for folder, source in sorted(self.tokenizers.items()):
            copy_tokenizer(source, self.out / META / "tokenizers" / folder)
        entries = [ShardEntry.model_validate(record["entry"]) for record in records]
        self.num_written = sum(entry.nsamples for entry in entries)
        ShardIndex(
            name=self.name,
            split=self.split,
            shardlist=entries,
            fields=dict(sorted(table.fields.items())),
            tokenizers=sorted(self.tokenizers),
            provenance=self.provenance,
        ).write(self.out)
        remove_tree(self._unfinished)


def shard_names(splits: Iterable[str]) -> list[str]:
    """What a run that writes these splits ("": its one folder) gives names to, for `Run`."""
    names = [name for split in splits for name in ((f"{glob.escape(split)}/*.tar", "README.md") if split else ("*.tar",))]
    return sorted({*names, *(f"{Path(name).parent / META / INDEX}" for name in names if name.endswith(".tar"))})


def finished_set(folder: Path) -> ShardIndex | None:
    """The index of a set that was written to its end, None before that. What a kill right after the index left behind is cleared away."""
    index = read_index(folder)
    if index is not None:
        remove_tree(folder / META / UNFINISHED)
    return index


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256


def sha256_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


# --- reading ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out: the first member that is wrong with it, where that begins in the tar, and why."""

    path: str
    key: str
    member: str
    offset: int
    reason: str
    span: tuple[int, int]  # the bytes of the tar that belong to the sample

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "member": self.member, "offset": self.offset, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.path}: {self.member} at byte {self.offset:,}: {self.reason}"


class BadSampleError(DataError):
    """A sample cannot be read; `bad` says which and why."""

    def __init__(self, bad: BadSample) -> None:
        super().__init__(str(bad))
        self.bad = bad


@dataclass(slots=True)
class SampleMembers:
    """The members of one key that stand side by side in a tar."""

    key: str
    span: tuple[int, int]
    fields: dict[str, tuple[str, int, int]]  # name: what follows the key, where the bytes start, how many
    problem: tuple[str, int, str] | None = None  # member, offset, reason


def group_members(walked: Walk) -> tuple[list[SampleMembers], Counter[str]]:
    """The samples of a tar, good and bad, in order; and how many members have a suffix mmgen does not read.

    Members belong together when they stand side by side and share all of their name up to the first dot after the last slash, as in
    webdataset. Like there, members without a dot are no samples. The last sample of a damaged tar is bad: nothing shows it is complete.
    """
    groups: list[SampleMembers] = []
    seen: set[str] = set()
    unread: Counter[str] = Counter()
    group: SampleMembers | None = None
    rejected = ((name, offset, offset, 0, reason) for name, offset, reason in walked.rejected)
    entries = ((*member, "") for member in walked.members)
    for name, offset, start, size, reason in merge(entries, rejected, key=itemgetter(1)) if walked.rejected else entries:
        if name[:2] == "./":
            name = name[2:]
        begin = name.rfind("/") + 1
        dot = name.find(".", begin)
        if dot <= begin and not reason:
            continue
        key, suffix = name[:dot], name[dot + 1 :]
        if group is None or group.key != key:
            group = SampleMembers(key, (offset, offset), {})
            groups.append(group)
            if key in seen:
                group.problem = (name, offset, "the key came before, with others between: members of a sample must stand side by side")
            elif (invalid := _invalid_key(key)) is not None:
                group.problem = (name, offset, invalid)
            seen.add(key)
        group.span = (group.span[0], start + (size + 511) // 512 * 512)
        if reason:
            group.problem = (name, offset, reason)
            continue
        found = split_suffix(suffix)
        if found is None:
            unread[suffix.rpartition(".")[2].lower()] += 1
        elif found[0] in group.fields:
            group.problem = (name, offset, f"a second member for field '{found[0]}' (or a second sample of this key)")
        elif size > MAX_BYTES[found[1]]:
            group.problem = (name, offset, too_large(found[1], size))
        else:
            group.fields[found[0]] = (sys.intern(suffix), start, size)
    if walked.damage and groups:
        last = groups[-1]
        last.problem = last.problem or (last.key, last.span[0], f"last sample before the damage at byte {walked.damage[0]:,}")
    return groups, unread


def uneven(fields: Iterable[str], expected: Iterable[str]) -> str:
    """Why a sample with these fields does not go with the others."""
    has, wants = ", ".join(sorted(fields)) or "no field mmgen reads", ", ".join(sorted(expected))
    return f"has {has}; the other samples have {wants or 'none'}"


def _invalid_key(key: str) -> str | None:
    try:
        check_key(key)
    except DataError as error:
        return error.message
    return None


@dataclass
class _Column:
    """Where one field of every sample of a tar is."""

    suffixes: list[str] = field(default_factory=list)
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class _Table:
    """The good samples of a tar."""

    keys: list[str]
    spans: "array[int]"  # of the first sample its first byte and the one behind its last, of the second …
    columns: dict[str, _Column]

    def span(self, row: int) -> tuple[int, int]:
        return self.spans[2 * row], self.spans[2 * row + 1]


@dataclass
class _Tar:
    path: Path
    entry: ShardEntry
    declared: bool  # the entry was read from an index, to be held against the tar, and not made from it
    expected: frozenset[str] | None = None  # the fields that the index lists
    to_hash: bool = False  # the tar is younger than its index: is it still the tar that was indexed?
    table: _Table | None = None


@dataclass
class _Source:
    """One folder of shards."""

    folder: Path
    index: ShardIndex
    tars: list[_Tar]


def open_shards(
    spec: str,
    *,
    split: str | None = None,
    on_bad_sample: str = "skip",
    max_bad_fraction: float = 0.01,
    spool: Path | None = None,
    mixing: bool = False,
) -> "Shards":
    """The samples of SHARDS (see `stages.data.locate`), for random access.

    split: which subfolder of a parent of splits. on_bad_sample: `fail` at the first bad sample; `skip` them, up to `max_bad_fraction` of
    all; `quarantine` skips and keeps their bytes (see `Shards.write_bad_samples`). spool: where standard input (`-`) is kept. mixing:
    whether the parts may have weights.
    Raises UsageError for what does not exist, DataError for what is empty, cut, mixed up or not what its index says.
    """
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise UsageError(f"--on-bad-sample: there is no '{on_bad_sample}'", hint=nearest(on_bad_sample, ON_BAD_SAMPLE))
    places = locate(spec, split=split, spool=spool)
    if not mixing and any(place.weight is not None for place in places):
        raise UsageError(f"SHARDS: {spec}: weights say how training mixes data; nothing is mixed here", hint="leave them out")
    return Shards(spec, places, on_bad_sample, max_bad_fraction)


class Shards:
    """Samples of one or several folders of shards, in the order of their indexes.

    fields: {name: {"suffix", "dtype", "shape", "tokenizer", ...}} of the fields every sample has. tokenizers: {folder name: path} of the
    checkpoints that wrote some of them. bad: the samples left out so far. provenance, index: as in the folder's index. paths: the tars.
    unread: how many members have a suffix that mmgen does not read, among the tars opened so far.
    """

    def __init__(self, spec: str, places: Sequence[Place], on_bad_sample: str = "skip", max_bad_fraction: float = 0.01) -> None:
        self.spec = spec
        self.on_bad_sample, self.max_bad_fraction = on_bad_sample, max_bad_fraction
        self.bad: list[BadSample] = []
        self.unread: Counter[str] = Counter()
        self._bad_rows: set[int] = set()
        self._stamps: dict[Path, tuple[int, int]] = {}  # size and time of the tars, when they were first looked at
        self._archives: OrderedDict[Path, Archive] = OrderedDict()
        self._positions: dict[str, int] | None = None
        self._parts = [(place.part, place.weight) for place in places]
        self._sources = [self._open_place(place) for place in places]
        self._tars = [tar for source in self._sources for tar in source.tars]
        self._ends = list(accumulate(tar.entry.nsamples for tar in self._tars))
        self._check_bad_fraction()
        if not len(self):
            unread = ", ".join(f".{suffix} ({count})" for suffix, count in self.unread.most_common(5))
            reason = f"; {self.bad[0]}" if self.bad else f"; its members are {unread}, which mmgen does not read" if unread else ""
            raise DataError(f"{spec}: no samples{reason}")
        self._fields = self._common_fields()

    # what is in them

    @property
    def index(self) -> dict[str, Any]:
        """The folder's index; of several folders, one made of theirs."""
        if len(self._sources) == 1:
            return self._sources[0].index.to_dict()
        entries = [tar.entry.model_copy(update={"url": str(tar.path)}) for tar in self._tars]
        splits = {source.index.split for source in self._sources}
        return ShardIndex(
            split=splits.pop() if len(splits) == 1 else None,
            shardlist=entries,
            fields=self._fields,
            tokenizers=sorted(self.tokenizers),
            provenance=self.provenance,
        ).to_dict()

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        return {name: info.to_dict() for name, info in self._fields.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        if len(self._sources) == 1:
            return self._sources[0].index.provenance
        return {"joined": [source.index.provenance for source in self._sources]}

    @property
    def tokenizers(self) -> dict[str, Path]:
        folders = (inside(source.folder, META, "tokenizers", name) for source in self._sources for name in source.index.tokenizers)
        return {folder.name: folder for folder in folders if folder is not None and folder.is_dir()}

    @property
    def paths(self) -> list[Path]:
        return [tar.path for tar in self._tars]

    @property
    def fingerprint(self) -> str:
        """sha256 over the sha256 of every tar, in order, and the weights of a mixture. Tars without an index are read for it."""
        for tar in self._tars:
            if not tar.entry.sha256:
                tar.entry.sha256 = sha256_file(tar.path)
        weights = [f"{weight:g}" for _, weight in self.mixture] if len(self.mixture) > 1 else []
        return hashlib.sha256("".join([*(tar.entry.sha256 for tar in self._tars), *weights]).encode()).hexdigest()

    @property
    def mixture(self) -> list[tuple[range, float]]:
        """Of parts joined with weights: the numbers of each part's samples, and its weight. Everything else is one part."""
        if self._parts[0][1] is None:
            return [(range(len(self)), 1.0)]
        parts: dict[int, tuple[range, float]] = {}
        start = 0
        for (part, weight), source in zip(self._parts, self._sources, strict=True):
            stop = start + sum(tar.entry.nsamples for tar in source.tars)
            first = parts[part][0].start if part in parts else start
            parts[part] = (range(first, stop), weight or 1.0)
            start = stop
        return [(numbers, weight) for numbers, weight in parts.values() if numbers]

    def splits(self) -> list[str]:
        """The splits these samples are from, as far as their folders say."""
        return sorted({source.index.split for source in self._sources if source.index.split is not None})

    # samples

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def __iter__(self) -> Iterator[Sample]:
        """Every good sample, in index order; bad ones are skipped and noted, within the limits."""
        for i in range(len(self)):
            sample = self.read_or_skip(i)
            if sample is not None:
                yield sample

    def read(self, i: int, fields: Iterable[str] | None = None) -> Sample:
        """Sample `i` with `fields` (default: all), decoded. Raises BadSampleError where that cannot be done."""
        tar, row, table, archive = self._find(i)
        values = {}
        for name, suffix, start, data in self._members(table, row, archive, fields):
            try:
                values[name] = decode_value(suffix.rpartition(".")[2].lower(), data)
            except DataError as error:
                key = table.keys[row]
                bad = BadSample(str(tar.path), key, f"{key}.{suffix}", start, error.message, table.span(row))
                raise BadSampleError(bad) from None
        return Sample(table.keys[row], values, str(tar.path))

    def read_encoded(self, i: int, fields: Iterable[str] | None = None) -> Sample:
        """Sample `i` with `fields` as the `Encoded` bytes they are in the tar, to be written elsewhere unchanged."""
        tar, row, table, archive = self._find(i)
        members = self._members(table, row, archive, fields)
        values = {name: Encoded(suffix.rpartition(".")[2].lower(), data) for name, suffix, _, data in members}
        return Sample(table.keys[row], values, str(tar.path))

    def read_or_skip(self, i: int, fields: Iterable[str] | None = None) -> Sample | None:
        """Sample `i`, or None where it is bad: noted in `bad` once. Raises DataError under `fail`, or when too many are."""
        try:
            return self.read(i, fields)
        except BadSampleError as error:
            self.skip(i, error.bad)
            return None

    def skip(self, i: int, bad: BadSample) -> None:
        """Note that sample `i` is bad. Raises DataError under `fail`, or when too many are."""
        i = range(len(self))[i]
        if i not in self._bad_rows:
            self._bad_rows.add(i)
            self.bad.append(bad)
            self._check_bad_fraction()

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        _, row, table, _ = self._find(i)
        return table.keys[row]

    def find(self, key: str) -> int:
        """Where the sample of this key is. Raises UsageError, with the nearest key, where there is none."""
        if self._positions is None:
            keys = [key for tar in self._tars for key in self._table(tar).keys]
            self._positions = {key: i for i, key in reversed(list(enumerate(keys)))}
        if key not in self._positions:
            raise UsageError(
                f"{self.spec}: no sample has the key '{key}'", hint=nearest(key, self._positions) if len(self) < 10_000 else ""
            )
        return self._positions[key]

    @property
    def left_out(self) -> tuple[set[int], list[BadSample]]:
        """What `note_left_out` tells another reader of the same shards."""
        return self._bad_rows, self.bad

    def note_left_out(self, others: Iterable[tuple[set[int], list[BadSample]]]) -> None:
        """Note also what other readers, of other ranks, left out."""
        for rows, bad in others:
            self._bad_rows |= rows
            self.bad += [entry for entry in bad if entry not in self.bad]
        self._check_bad_fraction()

    def write_bad_samples(self, meta: Path) -> str:
        """The line that accounts for every sample, `kept 9987, skipped 13 (bad_samples.jsonl)`; the file lists the bad ones.

        Under `quarantine` their bytes go to `quarantine.tar` beside it, as they stand in the tars.
        """
        kept = len(self) - len(self._bad_rows)
        if not self.bad:
            return f"kept {kept}, skipped 0"
        lines = [json_text(bad.to_dict()) + "\n" for bad in self.bad]
        write_atomic(meta / "bad_samples.jsonl", "".join(lines))
        if self.on_bad_sample == "quarantine":
            with open_atomic(meta / "quarantine.tar") as kept_bytes:
                for bad in self.bad:
                    begin, end = bad.span
                    archive = self._archive(Path(bad.path))
                    end = min(end, len(archive))
                    for at in range(begin, end if end - begin <= _MAX_QUARANTINED else begin, _WRITE_BYTES):
                        kept_bytes.write(archive.read(at, min(_WRITE_BYTES, end - at)))
                kept_bytes.write(END_OF_ARCHIVE)
        return f"kept {kept}, skipped {len(self.bad)} (bad_samples.jsonl)"

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind when a data loader's worker gets a copy; it opens its own."""
        return {**self.__dict__, "_archives": OrderedDict()}

    # how they are found

    def _find(self, i: int) -> tuple[_Tar, int, _Table, Archive]:
        length = len(self)
        if not -length <= i < length:
            raise IndexError(f"sample {i} of {length}")
        i %= length
        number = bisect_right(self._ends, i)
        tar = self._tars[number]
        return tar, i - (self._ends[number] - tar.entry.nsamples), self._table(tar), self._archive(tar.path)

    def _members(self, table: _Table, row: int, archive: Archive, fields: Iterable[str] | None) -> Iterator[tuple[str, str, int, bytes]]:
        """(field, what follows the key, where its bytes start, its bytes) of each of `fields` (None: all)."""
        begin, end = table.spans[2 * row], table.spans[2 * row + 1]
        block = archive.read(begin, end - begin) if end - begin <= _AT_ONCE else None
        for name in self._fields if fields is None else fields:
            column = table.columns.get(name)
            if column is None or name not in self._fields:
                raise DataError(f"{self.spec}: there is no field '{name}'", hint=nearest(name, self._fields))
            start, size = column.starts[row], column.sizes[row]
            data = block[start - begin : start - begin + size] if block is not None else archive.read(start, size)
            yield name, column.suffixes[row], start, data

    def _archive(self, path: Path) -> Archive:
        """The tar, open; the least recently used are closed."""
        archive = self._archives.get(path)
        if archive is None:
            try:
                archive = Archive(path)
            except DataError as error:
                gone = DataError(f"{path}: gone since it was opened", hint="were these shards made anew meanwhile?")
                raise (error if path.exists() else gone) from None
            self._note_stamp(path, archive.status)
            self._archives[path] = archive
            if len(self._archives) > _OPEN_ARCHIVES:
                self._archives.popitem(last=False)
        elif len(self._archives) > 1:
            self._archives.move_to_end(path)
        return archive

    def _note_stamp(self, path: Path, status: os.stat_result) -> None:
        """Raises DataError where a tar is another than when it was first looked at: half a data set of each would be read."""
        stamp = (status.st_size, status.st_mtime_ns)
        if self._stamps.setdefault(path, stamp) != stamp:
            raise DataError(f"{path}: overwritten since it was opened", hint="run the command again")

    def _table(self, tar: _Tar) -> _Table:
        if tar.table is None:
            if tar.to_hash:
                digest = sha256_file(tar.path)
                if digest != tar.entry.sha256:
                    raise _changed(tar.path, f"its sha256 is {digest[:16]}…, the index says {tar.entry.sha256[:16]}…")
                tar.to_hash = False
            self._read_table(tar, tar.expected)
        assert tar.table is not None
        return tar.table

    def _read_table(self, tar: _Tar, expected: frozenset[str] | None) -> frozenset[str]:
        """Walk a tar: fill its table with the samples that have the `expected` fields (None: those most of them have), note the bad."""
        walked = walk(self._archive(tar.path))
        if tar.declared and walked.damage:
            raise _changed(tar.path, f"byte {walked.damage[0]:,}: {walked.damage[1]}")
        groups, unread = group_members(walked)
        self.unread += unread
        sets = Counter(frozenset(group.fields) for group in groups if not group.problem and group.fields)
        if expected is None:
            expected = sets.most_common(1)[0][0] if sets else frozenset()
        good = []
        path = str(tar.path)
        for group in groups:
            if group.problem is None and (not group.fields or group.fields.keys() != expected):
                group.problem = (group.key, group.span[0], uneven(group.fields, expected))
            if group.problem is None:
                good.append(group)
            else:
                member, offset, reason = group.problem
                self.bad.append(BadSample(path, group.key, member, offset, reason, group.span))
        if walked.damage:
            offset, reason = walked.damage
            self.bad.append(BadSample(path, "", "what follows", offset, reason, (offset, offset)))
        columns = {name: _Column() for name in sorted(expected)}
        for name, column in columns.items():
            for group in good:
                suffix, start, size = group.fields[name]
                column.suffixes.append(suffix)
                column.starts.append(start)
                column.sizes.append(size)
        spans = array("q", (end for group in good for end in group.span))
        tar.table = _Table([group.key for group in good], spans, columns)
        found = (len(good), good[0].key if good else "", good[-1].key if good else "")
        if tar.declared and found != (tar.entry.nsamples, tar.entry.first_key, tar.entry.last_key):
            indexed = f"{tar.entry.nsamples} samples, {tar.entry.first_key} to {tar.entry.last_key}"
            raise _changed(tar.path, f"holds {found[0]} good samples, {found[1]} to {found[2]}; the index says {indexed}")
        return expected

    # opening

    def _open_place(self, place: Place) -> _Source:
        index = read_index(place.folder)
        if index is not None:
            return self._open_indexed(place, index)
        if (place.folder / META / UNFINISHED).is_dir() and place.tars is None:
            raise DataError(f"{place.folder}: the stage that writes these shards has not finished", hint="run it again, it goes on")
        return self._open_foreign(place)

    def _open_indexed(self, place: Place, index: ShardIndex) -> _Source:
        """A folder whose index speaks for its tars, as far as they are the ones it was written for."""
        indexed_at = (place.folder / META / INDEX).stat().st_mtime_ns
        by_name = {entry.name: entry for entry in index.shardlist}
        names = [path.name for path in place.tars] if place.tars is not None else list(by_name)
        present = {path.name for path in place.folder.glob("*.tar")} if place.tars is None else set(names)
        for name in sorted(present - by_name.keys()):
            raise DataError(
                f"{place.folder / name}: not in the folder's index", hint=f"mmgen verify {place.folder} --index makes a new one"
            )
        tars, expected = [], frozenset(index.fields)
        for name in names:
            path, entry = place.folder / name, by_name[name]
            try:
                status = path.stat()
            except FileNotFoundError:
                raise DataError(f"{path}: missing, though the folder's index lists it") from None
            if status.st_size != entry.bytes:
                raise _changed(path, f"it has {status.st_size:,} bytes, the index says {entry.bytes:,}")
            self._note_stamp(path, status)
            tars.append(_Tar(path, entry, True, expected, to_hash=status.st_mtime_ns > indexed_at))
        if len(tars) < len(by_name):
            index = index.model_copy(update={"shardlist": [tar.entry for tar in tars]})
        return _Source(place.folder, index, tars)

    def _open_foreign(self, place: Place) -> _Source:
        """Tars without an index: all headers are walked now. Fields are those of most samples in the first tar; their dtypes and
        shapes are those of its first samples."""
        paths = list(place.tars) if place.tars is not None else sorted(place.folder.glob("*.tar"))
        expected: frozenset[str] | None = None
        tars = []
        for path in paths:
            size = len(self._archive(path))
            entry = ShardEntry(url=f"../{path.name}", nsamples=0, bytes=size, sha256="", first_key="", last_key="")
            tar = _Tar(path, entry, declared=False)
            expected = self._read_table(tar, expected) or None
            assert tar.table is not None
            if keys := tar.table.keys:
                tar.entry = tar.entry.model_copy(update={"nsamples": len(keys), "first_key": keys[0], "last_key": keys[-1]})
            tars.append(tar)
        fields = FieldTable()
        for tar in tars[:1]:
            self._describe(tar, fields, first=16)
        return _Source(place.folder, ShardIndex(shardlist=[tar.entry for tar in tars], fields=fields.fields), tars)

    def _describe(self, tar: _Tar, fields: FieldTable, first: int) -> None:
        assert tar.table is not None
        archive = self._archive(tar.path)
        for name, column in tar.table.columns.items():
            fields.fields[name] = FieldInfo(suffix=None, dtype=None, shape=None)
            described = FieldTable()
            for suffix, start, size in list(zip(column.suffixes, column.starts, column.sizes, strict=True))[:first]:
                try:
                    described.add(name, suffix.rpartition(".")[2].lower(), archive.read(start, size))
                except DataError:
                    continue  # met again, and accounted for, when the sample is read
            fields.fields |= described.fields

    def _common_fields(self) -> dict[str, FieldInfo]:
        first, *others = (source.index.fields for source in self._sources)
        common = dict(first)
        for fields in others:
            common = {name: merge_field(name, info, fields[name]) for name, info in common.items() if name in fields}
        if not common:
            sets = "; ".join(", ".join(source.index.fields) for source in self._sources)
            raise DataError(f"{self.spec}: the joined shards share no field: {sets}")
        return common

    def _check_bad_fraction(self) -> None:
        if not self.bad:
            return
        if self.on_bad_sample == "fail":
            raise BadSampleError(self.bad[0])
        total = len(self) + len(self.bad) - len(self._bad_rows)
        if len(self.bad) > self.max_bad_fraction * total:
            raise DataError(
                f"{self.spec}: {len(self.bad)} of {total} samples are bad, at most {self.max_bad_fraction:.2%} may be:",
                details=map(str, self.bad[:3]),
                hint="mmgen verify lists them all; --max-bad-fraction accepts more",
            )


def _changed(path: Path, what: str) -> DataError:
    hint = "restore the tar; or, if the change is meant, `mmgen verify --index` makes a new index"
    return DataError(f"{path}: not the tar its index describes: {what}", hint=hint)
