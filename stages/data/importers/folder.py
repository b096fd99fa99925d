"""A folder of pictures, with or without captions, as a data set.

Captions come from one table (`captions.csv`, `.tsv` or `.jsonl`, also under the name `metadata`, or the table itself as SOURCE), or from a file
beside each picture: `cat.txt`, or `cat.json` with a caption. Where one picture has a caption, one without is a bad file; with none, the data set
is pictures only. Pictures that all have one format keep their bytes unless they are resized; of a moving one the first frame is the picture.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.data.importers.raw import (
    BadFile,
    RawData,
    check_fit,
    check_fraction,
    fit_square,
    picture_format,
    read_bytes,
    share_of,
)
from stages.data.sample import IMAGE_FORMATS, Encoded, Sample, decode_image, decode_value
from stages.errors import DataError, UsageError
from stages.escape import code_span

TABLE_FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # and what separates their columns
TABLE_NAMES = ("captions", "metadata")
OTHER_PICTURES = ("bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")  # told of, not passed over in silence
FILE_COLUMNS = ("file", "image", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "text")

Row = BadFile | tuple[Path, str | None]  # a picture, and its caption if a table gives it


def samples(source: str, *, size: int = 0, fit: str = "crop", val_fraction: float = 0.05) -> RawData:
    """Pictures in a folder, captioned by a .txt or .json beside each, or by one captions.csv, .tsv or .jsonl; or not at all.

    A table has a column file (or image, file_name) and a column caption (or text). Pictures are PNG, JPEG, WebP or GIF (its first frame); others count as bad samples, as damaged ones do.

    size: resize to this many pixels square; 0 keeps the pictures as they are
    fit: crop (fill the square) or pad (keep all of the picture, on white)
    val_fraction: share of the pictures, chosen by the hash of their name, that becomes the split val

    Example:
      mmgen import folder ~/pictures --size 64 --out data
    """
    check_fit(size, fit)
    check_fraction("--val-fraction", val_fraction)
    root = Path(os.path.expanduser(source))
    table = root if root.is_file() and root.suffix in TABLE_FORMATS else None
    if table is not None:
        root = table.parent
    if not root.is_dir():
        raise UsageError(f"{root}: expected a folder of pictures, or a table ({', '.join(TABLE_FORMATS)}) beside them")
    found = sorted(
        path for path in root.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    tables = [path for path in found if path.parent == root and path.stem in TABLE_NAMES and path.suffix in TABLE_FORMATS]
    if table is None and len(tables) > 1:
        raise UsageError(
            f"{root}: holds {len(tables)} tables, {', '.join(path.name for path in tables)}", hint="name the one to use as SOURCE"
        )
    table = table or (tables[0] if tables else None)

    rows = list(_read_table(table)) if table is not None else list(_pair_pictures(found))
    if not rows:
        raise DataError(f"{source}: holds no pictures ({', '.join('.' + name for name in IMAGE_FORMATS)})")

    paths = [row[0] for row in rows if not isinstance(row, BadFile)]
    keys = _keys(root, paths)
    suffixes = {path.suffix.lower().lstrip(".").replace("jpeg", "jpg") for path in paths}
    kept_format = suffixes.pop() if not size and len(suffixes) == 1 else ""

    def read(chosen: Iterable[Row]) -> Iterator[Sample | BadFile]:
        for row in chosen:
            if isinstance(row, BadFile):
                yield row
                continue
            path, caption = row
            try:
                picture = _picture(read_bytes(path), kept_format, size, fit)
                if caption is None and (beside := _caption_file(path)):
                    caption = _read_caption(beside)
            except (DataError, OSError) as error:
                yield BadFile(str(path), error.message if isinstance(error, DataError) else (error.strerror or str(error)))
                continue
            words = {} if caption is None else {"caption": caption}
            yield Sample(keys[path], {"image": picture, **words, "meta": {"file": path.relative_to(root).as_posix()}}, str(path))

    def is_val(row: Row) -> bool:
        return not isinstance(row, BadFile) and share_of(path_of(row[0], root)) < val_fraction

    val = [row for row in rows if is_val(row)]
    train = [row for row in rows if not is_val(row)] if 0 < len(val) < len(rows) else rows
    splits = {"train": read(train), **({"val": read(val)} if train is not rows else {})}
    listing = "\n".join(f"{path_of(path, root)} {path.stat().st_size}" for path in found)
    return RawData(
        splits=splits,
        fingerprint=hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        licence="unknown",
        notes=f"Pictures of the folder {code_span(root.name)}. `val` was chosen by the hash of the file name.",
    )


def _pair_pictures(found: list[Path]) -> Iterator[Row]:
    """The pictures among some files, each to be captioned by the file beside it, or none of them; bad ones where mmgen lacks the format."""
    pictures = [path for path in found if path.suffix.lower().lstrip(".") in IMAGE_FORMATS]
    captioned = any(_caption_file(path) for path in pictures)
    for path in pictures:
        yield BadFile(str(path), "no caption (.txt or .json) beside it") if captioned and not _caption_file(path) else (path, None)
    for path in found:
        if (form := path.suffix.lower().lstrip(".")) in OTHER_PICTURES:
            yield BadFile(str(path), f"a .{form} picture; mmgen reads {', '.join(IMAGE_FORMATS)}")


def path_of(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _picture(data: bytes, kept_format: str, size: int, fit: str) -> Any:
    """The picture as a field's value; decoded in any case, so that a damaged one is found now."""
    image = decode_image(data)
    if size:
        return fit_square(image, size, fit)
    if not kept_format:
        return image
    form = picture_format(data)
    if form != kept_format:
        raise DataError(f"a {form} picture in a file named .{kept_format}; with --size all pictures are written anew")
    return Encoded(form, data)


def _caption_file(path: Path) -> Path | None:
    return next((beside for beside in (path.with_suffix(".txt"), path.with_suffix(".json")) if beside.is_file()), None)


def _read_caption(path: Path) -> str:
    value = decode_value(path.suffix[1:], read_bytes(path))
    text = _first(value, CAPTION_COLUMNS) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise DataError(f"{path.name}: expected a caption under one of {', '.join(CAPTION_COLUMNS)}")
    return text.strip()


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _keys(root: Path, paths: list[Path]) -> dict[Path, str]:
    """A key for each picture: its path in the folder in letters, digits, - and _; with a hash where two would be the same."""
    slugs = {
        path: re.sub(r"[^A-Za-z0-9_-]+", "-", path.relative_to(root).with_suffix("").as_posix()).strip("-") or "picture" for path in paths
    }
    times = Counter(slug.lower() for slug in slugs.values())
    return {
        path: slug if times[slug.lower()] == 1 else f"{slug}-{hashlib.sha256(path_of(path, root).encode()).hexdigest()[:8]}"
        for path, slug in slugs.items()
    }


def _read_table(table: Path) -> Iterator[Row]:
    """(picture, caption) of every row. A row that names no picture inside the folder is bad; a table without the columns is a DataError."""
    try:
        text = read_bytes(table).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: {error}") from None
    seen: set[Path] = set()
    for number, row in _rows(table, text):
        if isinstance(row, str):
            yield BadFile(f"{table}:{number}", row)
            continue
        name, caption = _first(row, FILE_COLUMNS), _first(row, CAPTION_COLUMNS)
        path = table.parent / name if isinstance(name, str) and name else None
        if path is None or not isinstance(caption, str):
            yield BadFile(f"{table}:{number}", f"no {'file' if path is None else 'caption'} in this row")
        elif not path.resolve().is_relative_to(table.parent.resolve()):
            yield BadFile(f"{table}:{number}", f"{name} lies outside the folder of the table")
        elif path in seen:
            yield BadFile(f"{table}:{number}", f"{name} came in an earlier row")
        else:
            seen.add(path)
            yield path, caption.strip()


def _rows(table: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """(line number, row) of a table; a line of JSON that cannot be read is the reason why, a table that cannot is a DataError."""
    separator = TABLE_FORMATS[table.suffix]
    if not separator:
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: in a string of JSON U+2028 is a letter like others
            if line.strip():
                try:
                    row = decode_value("json", line.encode())
                except DataError as error:
                    yield number, error.message
                    continue
                yield number, row if isinstance(row, Mapping) else "expected an object"
        return
    csv.field_size_limit(max(len(text), 1))  # the caps say of one sample that it is too long; this would end the table there
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begin = 1
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        for names in (FILE_COLUMNS, CAPTION_COLUMNS):
            if not set(names) & set(columns):
                raise DataError(f"{table}: has the columns {', '.join(columns) or '(none)'}; expected one of {', '.join(names)}")
        reader.fieldnames = columns
        begin = reader.line_num + 1
        for row in reader:
            surplus = row.get(None, [])  # what csv makes of a comma that should have stood in quotes
            yield begin, f"{len(columns) + len(surplus)} fields, the table has {len(columns)} columns" if surplus else row
            begin = reader.line_num + 1
    except csv.Error as error:  # where this row ends is unknown, and so is how many are in it
        hint = 'a field that holds quotes stands in quotes, its own doubled: "a ""red"" circle"'
        raise DataError(f"{table}:{begin}: the row that begins here cannot be read: {error}", hint=hint) from None
