"""The index beside a folder of shards: `.mmgen/shardindex.json`, written last, so that its presence says the folder is complete.

It is a `wids` index (wids_version 1, `shardlist` of `url` and `nsamples`) with what else a stage must know before it reads a byte:

    shardlist   url ("../data-000000.tar"), nsamples, bytes, sha256, first_key, last_key
    fields      {name: suffix, dtype, shape (null for an axis that varies, or where there is none), tokenizer (fingerprint or null),
                 and codebook_size where the field holds codes of a known codebook}
    split, tokenizers (folders in .mmgen/tokenizers that travel with the data), provenance
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.data.sample import IMAGE_FORMATS, image_shape, npy_header
from stages.data.tar_format import BLOCK
from stages.documents import MAX_DEPTH, check_value, shown
from stages.errors import DataError
from stages.files import read_text_inside, write_atomic

META = ".mmgen"
INDEX = "shardindex.json"
TAR_NAME = re.compile(r"[^/\\\0]+\.tar")
TOKENIZER_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SMALLEST_SAMPLE = 512  # bytes in a tar: the header of one empty member
_MAX = 2**48  # of bytes in a tar, codes in a codebook, the length of an axis: more than there can be, and far from overflowing


class ShardEntry(BaseModel):
    """One tar of the set."""

    model_config = ConfigDict(extra="allow")

    url: str
    nsamples: int = Field(ge=0, le=_MAX)
    bytes: int = Field(ge=0, le=_MAX)
    sha256: str
    first_key: str
    last_key: str

    @model_validator(mode="after")
    def _samples_fit(self) -> Self:
        if self.nsamples * SMALLEST_SAMPLE > self.bytes:
            raise ValueError(f"{self.nsamples:,} samples cannot be in {self.bytes:,} bytes of '{self.url[:80]}'")
        return self

    @property
    def name(self) -> str:
        return self.url.removeprefix("../")


class FieldInfo(BaseModel):
    """What one field holds in every sample of the set."""

    model_config = ConfigDict(extra="allow")

    suffix: str | None
    dtype: str | None
    shape: Annotated[list[Annotated[int, Field(ge=0, le=_MAX)] | None], Field(max_length=32)] | None
    tokenizer: str | None = None
    codebook_size: int | None = Field(default=None, ge=1, le=_MAX)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude={"codebook_size"} if self.codebook_size is None else None)


class ShardIndex(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="allow")

    wids_version: int = 1
    name: str = "data"
    split: str | None = None
    shardlist: list[ShardEntry]
    fields: dict[str, FieldInfo]
    tokenizers: list[str] = []
    provenance: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return {**self.model_dump(), "fields": {name: info.to_dict() for name, info in self.fields.items()}}

    def write(self, folder: Path) -> Path:
        path = folder / META / INDEX
        write_atomic(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        return path


def read_index(folder: Path) -> ShardIndex | None:
    """The index of a folder of shards, None where there is none. Raises DataError where it cannot be what mmgen wrote."""
    text = read_text_inside(folder, META, INDEX)
    return None if text is None else parse_index(text, str(folder / META / INDEX))


def checked_index(folder: Path) -> ShardIndex:
    """The index of a folder that must have one. Raises DataError."""
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: there is no index in {META}")
    return index


def parse_index(text: str, where: str) -> ShardIndex:
    """The index in `text`; `where` names it in the DataError of a wrong one."""
    try:
        index = ShardIndex.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    check_value(index.provenance, f"{where}: provenance", most=MAX_DEPTH // 2)  # it will be nested in that of others
    names = [entry.name for entry in index.shardlist]
    for entry in index.shardlist:
        if entry.nsamples * BLOCK > entry.bytes:  # the header of a member is a block, and a sample has at least one
            raise DataError(f"{where}: {entry.name:.100}: {shown(entry.nsamples)} samples in {shown(entry.bytes)} bytes")
    for entry in index.shardlist:
        if not entry.url.startswith("../") or not TAR_NAME.fullmatch(entry.name):
            raise DataError(f"{where}: shard url '{entry.url}', expected '../' and the name of a tar beside .mmgen")
    for name in index.tokenizers:
        if not TOKENIZER_FOLDER.fullmatch(name):
            raise DataError(f"{where}: tokenizer {name!r}, expected the plain name of a folder in {META}/tokenizers")
    if len(set(names)) != len(names):
        raise DataError(f"{where}: a tar is listed twice")
    return index


def describe_bytes(form: str, data: bytes) -> tuple[str, list[int | None] | None]:
    """(dtype, shape) of an encoded field, from its header alone; text and JSON have no shape. Raises DataError."""
    if form in IMAGE_FORMATS:
        return "uint8", [*image_shape(data)]
    if form == "npy":
        dtype, _, shape, _ = npy_header(data)
        return dtype.newbyteorder("=").name, [*shape]
    return ("str" if form == "txt" else "json"), None


def merge_field(name: str, one: FieldInfo, other: FieldInfo) -> FieldInfo:
    """What both descriptions of field `name` agree on: null for the axes, dtype or suffix that differ.

    Raises DataError where they come from two tokenizers: their codes share no meaning.
    """
    if one.tokenizer != other.tokenizer:
        raise DataError(f"field '{name}': written by tokenizer {one.tokenizer} in one place and by {other.tokenizer} in another")
    shape: list[int | None] | None = None
    if one.shape is not None and other.shape is not None and len(one.shape) == len(other.shape):
        shape = [a if a == b else None for a, b in zip(one.shape, other.shape, strict=True)]
    return one.model_copy(
        update={
            "shape": shape,
            "dtype": one.dtype if one.dtype == other.dtype else None,
            "suffix": one.suffix if one.suffix == other.suffix else None,
        }
    )


class FieldTable:
    """The field table of a set, grown one encoded value at a time."""

    def __init__(self, tokenizers: Mapping[str, str] | None = None, codebook_sizes: Mapping[str, int] | None = None) -> None:
        self.tokenizers = dict(tokenizers or {})
        self.codebook_sizes = dict(codebook_sizes or {})
        self.fields: dict[str, FieldInfo] = {}

    def add(self, name: str, form: str, data: bytes) -> None:
        """Take note of a value of field `name`, encoded as `form`. Raises DataError where its header is wrong."""
        self.fields[name] = self.merged(name, form, data)

    def note(self, name: str, info: FieldInfo) -> None:
        """Take note of what another table says of field `name`."""
        known = self.fields.get(name)
        self.fields[name] = info if known is None else merge_field(name, known, info)

    def merged(self, name: str, form: str, data: bytes) -> FieldInfo:
        """What `add` would note."""
        known = self.fields.get(name)
        if known is not None and known.suffix == form and form in ("txt", "json"):
            return known
        dtype, shape = describe_bytes(form, data)
        if known is None:
            tokenizer, codebook_size = self.tokenizers.get(name), self.codebook_sizes.get(name)
            return FieldInfo(suffix=form, dtype=dtype, shape=shape, tokenizer=tokenizer, codebook_size=codebook_size)
        if known.suffix == form and known.dtype == dtype and known.shape == shape:
            return known
        return merge_field(name, known, known.model_copy(update={"suffix": form, "dtype": dtype, "shape": shape}))
