"""JSON and TOML that somebody else may have written: a file is read whole, or refused in one sentence that names it.

Every such file goes through `read_object` or `read_toml`, whatever it is called: a cap on its bytes and on its depth, one message for what
is no UTF-8, no JSON or no object, and for the pointer that Git LFS leaves where a file was not fetched. A `Document` says of which type the
entries are that mmgen uses; entries that it does not know pass, so that files of later versions and of other programs can be read. Of an
object's repeated keys the last one counts, as for every JSON parser.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.errors import DataError, MmgenError
from stages.files import inside, open_regular

MAX_BYTES = 64 * 1024 * 1024  # of JSON; released tokenizers have up to 35 MB
MAX_TOML_BYTES = 1024 * 1024  # the longest shipped recipe has 10 kB
MAX_DOTS = 1000  # in a line of TOML: the parser takes quadratic time for a dotted key
MAX_DEPTH = 200  # provenance nests by three levels with every stage
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Int = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what other code can be given without an OverflowError
Size = Annotated[int, Field(ge=1, lt=2**31)]
Real = Annotated[float, Field(gt=-1e30, lt=1e30)]  # neither infinite nor no number


class Document(BaseModel):
    """Of which types the entries of an object are that are used. It is only checked, never kept: readers get the object itself."""

    model_config = ConfigDict(extra="allow", strict=True)


def read_bytes(path: Path, *, most: int = MAX_BYTES, error: type[MmgenError] = DataError, linked: bool = False) -> bytes:
    """The bytes of a small file. Raises `error` for one that is larger than `most`, that is no regular file, that cannot be read, or that is
    only the pointer of Git LFS; also for a link (see `stages.files.inside`), unless `linked` says that a person named the file."""
    if not linked:
        _refuse_link(path, error)
    try:
        with open_regular(path) as file:
            data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # no more: a reader takes the memory it is asked for
    except DataError as problem:
        raise error(problem.message, hint=problem.hint) from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {(problem.strerror or str(problem)).lower()}") from None
    refuse_pointer(path, data[: len(LFS_POINTER)], error=error)
    if len(data) > most:
        raise error(f"{path}: larger than {most:,} bytes, which no such file is")
    return data


def refuse_pointer(path: Path, start: bytes | None = None, *, error: type[MmgenError] = DataError) -> None:
    """Raises `error` where a file is what Git LFS puts in its place. start: its first bytes, where they are known."""
    if start is None and path.is_file():
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise error(f"{path}: a pointer of Git LFS, not the file itself", hint="`git lfs pull` in the repository fetches it")


def parse_json(data: bytes | str, where: object, *, error: type[MmgenError] = DataError) -> Any:
    """The value of a JSON text. Raises `error`, whose message begins with `where`."""
    try:
        value = json.loads(_text(data))
    except RecursionError:
        raise error(f"{where}: nested too deeply, the cap is {MAX_DEPTH} levels") from None
    except ValueError as problem:  # also of a number with thousands of digits
        raise error(f"{where}: expected JSON, found {problem if data else 'nothing: the file is empty'}") from None
    check_value(value, where, error=error)
    return value


def parse_object(
    data: bytes | str, where: object, kind: type[Document] = Document, *, error: type[MmgenError] = DataError, hint: str = ""
) -> dict[str, Any]:
    """The object of a JSON text, its entries of the types that `kind` says. Raises `error`, whose message begins with `where`."""
    try:
        value = parse_json(data, where, error=error)
        check(value, where, kind, error=error)
    except MmgenError as problem:
        problem.hint = problem.hint or hint
        raise
    return value


def read_object(path: Path, kind: type[Document] = Document, *, error: type[MmgenError] = DataError, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file of a data, run or checkpoint folder, its entries of the types that `kind` says. Raises `error`, which
    names the file and what was found."""
    return parse_object(read_bytes(path, error=error), path, kind, error=error, hint=hint)


def read_object_if_any(
    path: Path, kind: type[Document] = Document, *, error: type[MmgenError] = DataError, hint: str = ""
) -> dict[str, Any]:
    """As `read_object`; empty where there is no such file."""
    return read_object(path, kind, error=error, hint=hint) if _refuse_link(path, error) else {}


def _refuse_link(path: Path, error: type[MmgenError]) -> Path | None:
    try:
        return inside(path.parent, path.name)
    except DataError as problem:
        raise error(problem.message, hint=problem.hint) from None


def check(value: Any, where: object, kind: type[BaseModel], *, error: type[MmgenError] = DataError) -> None:
    """Raises `error` where `value` is no object, or one whose entries are of other types than `kind` says."""
    if not isinstance(value, Mapping):
        raise error(f"{where}: expected an object {{...}}, found {shown(value)}")
    try:
        kind.model_validate(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
        said = "it is missing" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:]
        raise error(f"{where}: {'.'.join(map(str, first['loc']))}: {said}{found}") from None


def sound(value: Any, kind: type[Document]) -> dict[str, Any]:
    """The entries of an object that are of the types `kind` says; the others are as if they were not there, and so is what is no object."""
    if not isinstance(value, Mapping):
        return {}
    try:
        kind.model_validate(value)
    except ValidationError as problem:
        wrong = {entry["loc"][0] for entry in problem.errors()}
        return {key: inner for key, inner in value.items() if key not in wrong}
    return dict(value)


def parse_toml(data: bytes | str, where: object, *, error: type[MmgenError] = DataError) -> dict[str, Any]:
    """The tables of a TOML text. Raises `error`, whose message begins with `where`; also for integers of more than 64 bits."""
    if len(data) > MAX_TOML_BYTES:
        raise error(f"{where}: {len(data):,} bytes of TOML, the cap is {MAX_TOML_BYTES:,}")
    try:
        text = _text(data)
        if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a line with more than {MAX_DOTS} dots")
        tables = tomllib.loads(text)
    except RecursionError:
        raise error(f"{where}: nested too deeply, the cap is {MAX_DEPTH} levels") from None
    except ValueError as problem:
        raise error(f"{where}: this is not TOML: {problem}") from None
    check_value(tables, where, error=error, whole_numbers=True)
    return tables


def shown(value: object) -> str:
    """A value of a document inside a message: short, on one line."""
    text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 128 else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _text(data: bytes | str) -> str:
    if isinstance(data, bytes):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise ValueError(f"bytes that are no UTF-8 ({problem.reason} at byte {problem.start:,})") from None
    return data


def check_value(
    value: Any, where: object, *, error: type[MmgenError] = DataError, most: int = MAX_DEPTH, whole_numbers: bool = False
) -> None:
    """What no parser checks: depth, texts that no UTF-8 file can hold, and on demand how large integers are. Raises `error`."""
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > most + 1:
            raise error(f"{where}: nested too deeply, the cap is {most} levels")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                if not item.isascii() and re.search("[\ud800-\udfff]", item):
                    raise error(f"{where}: {shown(item)} holds half a surrogate pair, which is no text")
            elif whole_numbers and isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise error(f"{where}: {shown(item)}, integers have at most 64 bits")
        level = inner
