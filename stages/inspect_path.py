"""What is in these shards, or in this checkpoint, in one screen. (Not `inspect.py`: that name belongs to the standard library.)"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.data.locate import split_folders
from stages.data.shards import Shards, open_shards
from stages.data.stream import spool_folder
from stages.errors import UsageError
from stages.escape import lines_of, visible

_MAX_TEXT = 400


class Description(NamedTuple):
    """The same facts for programs and for people."""

    data: dict[str, Any]
    text: str


def describe(path: str, key: str | None = None) -> Description:
    """Shards: how many, which fields, tokenizers and provenance, and the first sample; with `key`, that sample. A checkpoint: its parts.

    Raises UsageError for a path that does not exist or a key that is not there, DataError for damaged shards.
    """
    folder = Path(os.path.expanduser(path))
    if (folder / "config.json").is_file() and (folder / "recipe.toml").is_file():
        if key is not None:
            raise UsageError(f"{path}: a checkpoint has no samples, so no key '{key}'")
        from stages.training.checkpoint import describe_checkpoint

        data = {"kind": "checkpoint", **describe_checkpoint(folder)}
        return Description(data, lines_of(_lines(data)))
    splits = split_folders(path) if key is None else {}
    if splits:
        parts = {split: _describe_shards(open_shards(part)) for split, part in splits.items()}
        text = "\n\n".join(f"[{visible(split)}]\n{part.text}" for split, part in parts.items())
        return Description({"kind": "splits", "splits": {split: part.data for split, part in parts.items()}}, text)
    if key is None:
        return _describe_shards(_open(path))
    return _describe_sample(*_find(path, key))


def _open(path: str) -> Shards:
    return open_shards(path, spool=spool_folder("-") if path == "-" else None)


def _find(path: str, key: str) -> tuple[Shards, int]:
    """The sample with this key, in whichever split it is."""
    last: UsageError | None = None
    for part in (split_folders(path) or {"": path}).values():
        shards = _open(part)
        try:
            return shards, shards.find(key)
        except UsageError as error:
            last = error
    assert last is not None
    raise last


def _describe_shards(shards: Shards) -> Description:
    sizes = [path.stat().st_size for path in shards.paths]
    data: dict[str, Any] = {
        "kind": "shards",
        "path": shards.spec,
        "samples": len(shards),
        "tars": len(shards.paths),
        "bytes": sum(sizes),
        "split": shards.splits(),
        "fields": shards.fields,
        "tokenizers": sorted(shards.tokenizers),
        "provenance": shards.provenance,
        "bad": [bad.to_dict() for bad in shards.bad],
        "unread": dict(shards.unread),
        "first": _summary(shards, 0),
    }
    width = max(map(len, shards.fields))
    lines = [f"{shards.spec}: {len(shards):,} samples in {len(sizes):,} tars, {_size(sum(sizes))}", "", "fields"]
    for name, info in shards.fields.items():
        shape = "" if info["shape"] is None else " x ".join("?" if size is None else str(size) for size in info["shape"])
        tokenizer = f"  by tokenizer {info['tokenizer'][:8]}" if info["tokenizer"] else ""
        vocabulary = f"  of {info['codebook_size']:,} codes" if info.get("codebook_size") else ""
        lines.append(f"  {name:<{width}}  .{info['suffix'] or '?':<5}{info['dtype'] or '?':<9}{shape}{vocabulary}{tokenizer}".rstrip())
    if shards.splits():
        lines.append(f"split       {', '.join(shards.splits())}")
    if shards.tokenizers:
        lines.append(f"tokenizers  {', '.join(sorted(shards.tokenizers))}")
    if shards.provenance:
        lines.append(f"provenance  {_shorten(json.dumps(shards.provenance, ensure_ascii=False))}")
    if shards.bad:
        lines.append(f"left out    {len(shards.bad)} bad samples, first {shards.bad[0]}")
    for suffix, count in shards.unread.items():
        lines.append(f"not read    {count} members ending in .{suffix}")
    return Description(data, lines_of([*lines, "", *_sample_lines(data["first"])]))


def _describe_sample(shards: Shards, position: int) -> Description:
    data = {"kind": "sample", **_summary(shards, position, whole=True)}
    return Description(data, lines_of(_sample_lines(data)))


def _summary(shards: Shards, position: int, *, whole: bool = False) -> dict[str, Any]:
    """One sample: text and JSON as they are (shortened unless `whole`), arrays by their shape and range, pictures by their size."""
    sample = shards.read(position)
    fields: dict[str, Any] = {}
    for name, value in sample.fields.items():
        if isinstance(value, np.ndarray) and shards.fields[name]["dtype"] == "uint8" and shards.fields[name]["suffix"] != "npy":
            fields[name] = {"picture": f"{value.shape[1]} x {value.shape[0]}"}
        elif isinstance(value, np.ndarray):
            fields[name] = {"dtype": str(value.dtype), "shape": list(value.shape)}
            if value.size:
                fields[name] |= {"min": value.min().item(), "max": value.max().item()}
        else:
            fields[name] = value if whole else _shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return {"key": sample.key, "source": sample.source, "fields": fields}


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    width = max(map(len, sample["fields"]))
    lines = [f"sample '{sample['key']}' in {sample['source']}"]
    for name, value in sample["fields"].items():
        if isinstance(value, dict) and value.keys() == {"picture"}:
            shown = f"picture, {value['picture']} pixels"
        elif isinstance(value, dict) and value.keys() >= {"dtype", "shape"}:
            spread = f", {value['min']} to {value['max']}" if "min" in value else ""
            shown = f"{value['dtype']} {' x '.join(map(str, value['shape']))}{spread}"
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"  {name:<{width}}  {shown}")
    return lines


def _lines(data: dict[str, Any], indent: str = "") -> list[str]:
    """A nested dict, a fact a line."""
    lines = []
    for name, value in data.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{name:<17}{_shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))}"
            )
    return lines


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text):,} characters)"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
