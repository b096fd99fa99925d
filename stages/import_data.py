"""mmgen import: raw data -> one folder of shards per split, and a README.md by which `datasets.load_dataset(DIR)` finds them.

The importer (`stages.data.importers`) reads, this stage writes. What is wrong with the raw data arrives as a value: it is counted, written to
`bad_samples.jsonl` of its split with the reason, and fails the run when there is too much of it. The raw files stay where they are, so
`quarantine` is the same as `skip` here. A split appears when it is complete; a run that was stopped goes on at the first split that is not.
"""

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.data.importers import IMPORTERS
from stages.data.importers.raw import BadFile, RawData
from stages.data.index import META, read_index
from stages.data.sample import Sample
from stages.data.shards import ON_BAD_SAMPLE, ShardWriter, finished_set, shard_names, stream_shards
from stages.errors import DataError, UsageError, nearest
from stages.escape import code_span, json_text, markdown, yaml_text
from stages.files import remove_tree, write_atomic
from stages.options import RunOptions
from stages.run import Run

BAD_SAMPLES = "bad_samples.jsonl"


@dataclass(frozen=True)
class Written:
    """What became of a split."""

    kept: int
    skipped: int
    fields: tuple[str, ...]


def import_data(name: str, source: str | None, out: Path, options: RunOptions, **keywords: Any) -> Path:
    """Write the data set that importer `name` reads from `source` to `out/<split>/data-000000.tar` and on. Returns `out`.

    keywords are the importer's own arguments. `options.limit` bounds the samples of each split. With `out` = "-" the split `train` goes to
    stdout as one tar. Raises UsageError for a wrong name, argument or source, DataError where there is nothing, or too much of it is bad.
    """
    if name not in IMPORTERS:
        raise UsageError(f"import: there is no importer '{name}'", hint=nearest(name, IMPORTERS))
    if options.on_bad_sample not in ON_BAD_SAMPLE:
        raise UsageError(f"--on-bad-sample: there is no '{options.on_bad_sample}'", hint=nearest(options.on_bad_sample, ON_BAD_SAMPLE))
    arguments = _arguments(name, source, options, keywords)
    raw = IMPORTERS[name](**arguments)
    origin = {
        "importer": name,
        "mmgen": version("mmgen-cli"),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()},
        "fingerprint": raw.fingerprint,
        "licence": raw.licence,
    }
    inputs = [] if source is None else [{"path": source, "fingerprint": raw.fingerprint, "provenance": None}]
    identity = {"importer": name, **{key: value for key, value in arguments.items() if key not in ("seed", "source")}}

    reads = [value for value in arguments.values() if isinstance(value, Path)]
    writes = shard_names(["train"] if str(out) == "-" else raw.splits)
    with Run(out, stage="import", options=options, kind="shards", identity=identity, inputs=inputs, reads=reads, writes=writes) as run:
        if run.complete:
            return out
        splits = {"train": raw.splits["train"]} if run.streaming else raw.splits
        written = {split: _write_split(run, split, samples, origin) for split, samples in splits.items()}
        if run.streaming:
            stream_shards(run.out / "train", sys.stdout.buffer)
        else:
            write_atomic(run.out / "README.md", _readme(run.out.resolve().name, raw, written, options))
        kept, skipped = sum(result.kept for result in written.values()), sum(result.skipped for result in written.values())
        run.finish(message=f"kept {kept}, skipped {skipped}" + (f" ({BAD_SAMPLES})" if skipped else ""))
    return out


def _arguments(name: str, source: str | None, options: RunOptions, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument the importer is called with, defaults filled in; a UsageError for one it does not take, or lacks."""
    parameters = inspect.signature(IMPORTERS[name]).parameters
    for key in keywords:
        if key not in parameters or key in ("source", "seed"):
            raise UsageError(f"import {name}: there is no argument '{key}'", hint=nearest(key, parameters.keys() - {"source", "seed"}))
    given = dict(keywords)
    if "seed" in parameters:
        given["seed"] = options.seed
    if "source" in parameters:
        if source is None and parameters["source"].default is inspect.Parameter.empty:
            raise UsageError(f"import {name}: needs a SOURCE", hint=f"mmgen import {name} SOURCE --out DIR")
        if source is not None:
            given["source"] = source
    elif source is not None:
        raise UsageError(f"import {name}: takes no SOURCE, found '{source}'")
    return {key: given.get(key, parameter.default) for key, parameter in parameters.items()}


def _write_split(run: Run, split: str, samples: Iterable[Sample | BadFile], origin: Mapping[str, Any]) -> Written:
    """Write one split, unless an earlier launch of this run has."""
    folder, options = run.out / split, run.options
    bad_path = folder / META / BAD_SAMPLES
    if run.resuming and (finished := finished_set(folder)):
        skipped = len(bad_path.read_text("utf-8").splitlines()) if bad_path.exists() else 0
        return Written(sum(entry.nsamples for entry in finished.shardlist), skipped, tuple(finished.fields))

    bad: list[BadFile] = []
    remove_tree(folder)  # what a stopped launch left of this split
    try:
        with ShardWriter(folder, split=split, provenance={**origin, "split": split}) as writer:
            for found in samples:
                if options.limit is not None and writer.num_written >= options.limit:
                    break
                if isinstance(found, Sample):
                    try:
                        writer.write(found)
                    except DataError as error:
                        found = BadFile(found.source, error.message)
                if isinstance(found, BadFile):
                    bad.append(found)
                    if options.on_bad_sample == "fail":
                        raise DataError(str(found), hint="--on-bad-sample skip leaves bad samples out")
                run.status(step=writer.num_written, of=options.limit, message=split)
            _check_bad(split, writer.num_written, bad, options)
            if bad:
                lines = (json_text({"path": entry.path, "reason": entry.reason}) for entry in bad)
                write_atomic(bad_path, "".join(line + "\n" for line in lines))
    except BaseException:
        remove_tree(folder)  # nothing incomplete stays in the open
        raise
    index = read_index(folder)
    assert index is not None
    return Written(writer.num_written, len(bad), tuple(index.fields))


def _check_bad(split: str, kept: int, bad: list[BadFile], options: RunOptions) -> None:
    total = kept + len(bad)
    if len(bad) > options.max_bad_fraction * total or not kept:
        raise DataError(
            f"{split}: {len(bad)} of {total} samples are bad, at most {options.max_bad_fraction:.2%} may be" + (":" if bad else ""),
            details=map(str, bad[:5]),
            hint="--max-bad-fraction accepts more" if kept else "",
        )


def _readme(title: str, raw: RawData, written: Mapping[str, Written], options: RunOptions) -> str:
    """The data card. Its front matter tells `datasets` which files are which split: left alone it drops names it does not know."""
    splits = "\n".join(f"  - split: {yaml_text(split)}\n    path: {yaml_text(f'{split}/*.tar')}" for split in written)
    rows = "\n".join(f"| {markdown(split)} | {result.kept} |" for split, result in written.items())
    fields = ", ".join(code_span(name) for name in next(iter(written.values())).fields)
    return f"""---
license: {yaml_text(raw.licence)}
configs:
- config_name: default
  data_files:
{splits}
---

# {markdown(title)}

{raw.notes}

| split | samples |
|---|---|
{rows}

Fields: {fields}.

Written by {code_span(" ".join(options.command) or "mmgen import")}; where every sample comes from stands in `.mmgen/` of each split.
Load with {code_span(f'datasets.load_dataset("{title}")')}, or each split with `webdataset` from its tars.
"""
