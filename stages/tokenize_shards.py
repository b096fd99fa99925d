"""tokenize: run each tokenizer once over the shards, and write its codes, latents or token ids beside what is there.

Every field passes through byte for byte; each picture gets `<field>.codes` in the tokenizer's own shape, (h, w), (depth, h, w) or a row
(n,), or `<field>.latents` (c, h, w); each plain text `<field>.ids` (n,). Latents are float16 and scaled: the mean of the posterior, shifted and scaled to unit variance as the autoencoder
was measured, which is what `decode` takes. The index says by fingerprint which tokenizer wrote a field, and the tokenizers travel with
the data. Splits are mirrored. Samples are encoded in fixed groups of the index, so a run that was killed goes on to the same bytes;
the next group is read and decoded while one is encoded.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages import ranks
from stages.ahead import ahead
from stages.data.index import META, checked_index
from stages.data.sample import IMAGE_FORMATS, Sample
from stages.data.shards import Shards, ShardWriter, finished_set, open_shards, shard_names, split_folders, stream_shards
from stages.data.stream import spool_folder
from stages.errors import DataError, UsageError
from stages.escape import code_span, markdown, yaml_text
from stages.files import write_atomic
from stages.metrics.psnr import psnr
from stages.options import RunOptions
from stages.parts.autoencoders import Autoencoder
from stages.parts.tokenizers import TextTokenizer
from stages.parts.views.square import to_batch, to_pixels
from stages.run import Run
from stages.training.checkpoint import checkpoint_input, fingerprint, load_any_tokenizer, open_checkpoint
from stages.training.loop import resolve_device

GROUP = 64  # samples encoded at once, and fewer where
PIXELS = 64 * 128 * 128  # their pictures together have as many, which bounds the memory


@dataclass(frozen=True)
class Loaded:
    """A tokenizer ready to run. `view` is how its recipe shows it pictures, None if as they are."""

    name: str
    folder: Path
    fingerprint: str
    part: TextTokenizer | Autoencoder
    view: Any = None

    @property
    def travelling_name(self) -> str:
        return f"{self.name}-{self.fingerprint[:8]}"

    def output(self, field: str) -> str:
        """The field it writes for a field it reads."""
        return f"{field}.ids" if isinstance(self.part, TextTokenizer) else f"{field}.{self.part.config.store}"

    def look(self, sample: Sample, field: str) -> Any:
        """What it encodes of a sample: the text, or the picture as its recipe shows it.

        DataError names the sample whose picture does not divide into the autoencoder's grid.
        """
        value = sample.fields[field]
        if isinstance(self.part, TextTokenizer):
            return value
        try:
            picture = value if self.view is None else self.view.apply(value)
            self.part.grid(*picture.shape[:2])
        except DataError as error:
            raise DataError(f"{sample.source}: {sample.key}: field '{field}': {error.message}", hint=error.hint) from None
        return picture

    def reads(self, shards: Shards) -> list[str]:
        """The fields of these shards that it encodes. UsageError where there are none."""
        fields = shards.fields
        if isinstance(self.part, TextTokenizer):
            found = [field for field in self.part.config.fields if field in fields and fields[field]["suffix"] == "txt"]
            what = f"a text tokenizer for plain texts called {', '.join(self.part.config.fields)}"
        else:
            found = [field for field in fields if fields[field]["suffix"] in IMAGE_FORMATS]
            what = "an image tokenizer"
        if not found:
            raise UsageError(f"{self.folder} is {what}, and {shards.spec} has nothing for it", hint=f"its fields are {', '.join(fields)}")
        return found


@ranks.joined(patience=ranks.FOREVER)
def tokenize_shards(shards: str, tokenizers: Sequence[Path], out: Path, options: RunOptions, check: int = 0) -> Path:
    """Write shards with the fields every tokenizer adds, one folder a split where the input has splits. Returns `out`.

    check: decode the first N samples of each split again, as they were written, and report the PSNR (or that texts came back exact).
    """
    device = resolve_device(options.device)
    loaded = [load_tokenizer_folder(Path(folder), str(device)) for folder in tokenizers]
    if not loaded:
        raise UsageError("tokenize: no tokenizer", hint="name one with --tokenizer DIR; `mmgen pretrain-tokenizer` trains them")
    splits = split_folders(shards) or {"": shards}
    if str(out) == "-" and len(splits) > 1:
        raise UsageError(
            f"--out -: {shards} holds several splits ({', '.join(splits)}), a stream holds one",
            hint=f"for example {next(iter(splits.values()))}",
        )
    spool = spool_folder(out, tokenizers)
    opened = {
        split: open_shards(spec, on_bad_sample=options.on_bad_sample, max_bad_fraction=options.max_bad_fraction, spool=spool)
        for split, spec in splits.items()
    }
    for data in opened.values():
        plan_outputs(loaded, data)  # before anything is written
    inputs = [
        {"path": splits[split], "role": split or "data", "fingerprint": data.fingerprint, "provenance": data.provenance}
        for split, data in opened.items()
    ]
    inputs += [checkpoint_input(str(tokenizer.folder), tokenizer.folder, role=f"tokenizer {tokenizer.name}") for tokenizer in loaded]
    with Run(
        out, stage="tokenize", options=options, kind="shards", inputs=inputs, reads=[shards, *tokenizers], writes=shard_names(opened)
    ) as run:
        if run.complete:
            return out
        counts = {split: _tokenize_split(data, loaded, run.out / split, split, run, options) for split, data in opened.items()}
        for split in opened:
            if check and run.rank == 0:
                _report_check(run.out / split, loaded, check, split, run)
        if run.streaming:
            stream_shards(run.out, sys.stdout.buffer)
        elif "" not in opened and run.rank == 0:
            write_atomic(out / "README.md", _readme(out.resolve().name, opened, counts, loaded, options))
        names = sorted({output for data in opened.values() for output in plan_outputs(loaded, data)})
        run.finish(message=f"{sum(counts.values()):,} samples, each with {', '.join(names)}")
    return out


def load_tokenizer_folder(folder: Path, device: str) -> Loaded:
    """A checkpoint of pretrain-tokenizer, ready to run. UsageError if it is none, or holds more than one tokenizer."""
    recipe = open_checkpoint(folder).recipe
    names = list(recipe.autoencoders) or list(recipe.tokenizers)
    if len(names) != 1 or recipe.backbones:
        raise UsageError(
            f"{folder}: expected a checkpoint of one tokenizer, found one of recipe '{recipe.name}'",
            hint="`mmgen pretrain-tokenizer` writes them",
        )
    views = [port.view for port in recipe.ports.values() if port.autoencoder == names[0] and port.view is not None]
    part = load_any_tokenizer(folder, device)
    if isinstance(part, Autoencoder):
        part.to(memory_format=torch.channels_last)  # up to 1.4 times as fast on a CPU
    return Loaded(names[0], folder, fingerprint(folder), part, views[0] if views else None)


def plan_outputs(loaded: Sequence[Loaded], shards: Shards) -> dict[str, tuple[Loaded, str]]:
    """New field → (the tokenizer that writes it, the field it reads). UsageError where two write the same, or it is there already."""
    plan: dict[str, tuple[Loaded, str]] = {}
    for tokenizer in loaded:
        for field in tokenizer.reads(shards):
            output = tokenizer.output(field)
            if output in plan:
                raise UsageError(
                    f"two tokenizers would write '{output}': {plan[output][0].folder} and {tokenizer.folder}",
                    hint=f'train one with --set autoencoders.{tokenizer.name}.store="codes-2"',
                )
            if output in shards.fields:
                raise UsageError(
                    f"{shards.spec} has the field '{output}' already, written by tokenizer {str(shards.fields[output]['tokenizer'])[:8]}",
                    hint="tokenize the shards without it",
                )
            plan[output] = (tokenizer, field)
    return plan


def _tokenize_split(data: Shards, loaded: Sequence[Loaded], folder: Path, split: str, run: Run, options: RunOptions) -> int:
    """Write one split, unless an earlier launch of this run has; returns how many samples it has."""
    finished = finished_set(folder) if run.resuming else None
    if finished is not None:
        return sum(entry.nsamples for entry in finished.shardlist)
    plan, before = plan_outputs(loaded, data), data.fields
    own = {output: tokenizer for output, (tokenizer, _) in plan.items()}
    travelling = data.tokenizers | {tokenizer.travelling_name: tokenizer.folder for tokenizer in loaded}
    with ShardWriter(
        folder,
        name=data.index["name"],
        samples_per_shard=max(entry["nsamples"] for entry in data.index["shardlist"]),
        split=split or data.index["split"],
        provenance={
            "stage": "tokenize",
            "licence": data.provenance.get("licence"),
            "tokenizers": {tokenizer.name: tokenizer.fingerprint for tokenizer in loaded},
            "input": {"fingerprint": data.fingerprint, "provenance": data.provenance},
        },
        tokenizers=travelling,
        field_tokenizers={name: entry["tokenizer"] for name, entry in before.items() if entry["tokenizer"]}
        | {output: tokenizer.fingerprint for output, tokenizer in own.items()},
        codebook_sizes={name: entry["codebook_size"] for name, entry in before.items() if entry.get("codebook_size")}
        | {output: size for output, tokenizer in own.items() if (size := _codebook_size(tokenizer.part)) is not None},
        resume=run.resuming,
        rank=ranks.rank(),
        ranks=ranks.size(),
        wait=ranks.wait,
    ) as writer:
        size = min(len(data), options.limit or len(data))
        for part in writer.parts(size, writer.samples_per_shard):
            with closing(ahead(read_groups(data, plan, part))) as groups:
                for group in groups:
                    for sample in _encoded(group, plan):
                        writer.write(sample)
                    run.status(step=group.stop, of=size, message=split)
    data.note_left_out(ranks.gathered(data.left_out))
    if run.rank == 0:
        run.say(f"{split + ': ' if split else ''}{data.write_bad_samples(folder / META)}")
    return sum(entry.nsamples for entry in checked_index(folder).shardlist)


def _codebook_size(part: TextTokenizer | Autoencoder) -> int | None:
    return None if isinstance(part, TextTokenizer) else part.codebook_size


@dataclass(frozen=True)
class Group:
    """Samples that are encoded at once, as they are in the tar; what is shown of them for each new field; and where in the index they end."""

    samples: list[Sample]
    shown: dict[str, list[Any]]
    stop: int


def read_groups(data: Shards, plan: Mapping[str, tuple[Loaded, str]], part: range) -> Iterator[Group]:
    """A stretch of the index, read and decoded. Bad samples are left out and accounted for."""
    reads = sorted({field for _, field in plan.values()})
    samples: list[Sample] = []
    shown: dict[str, list[Any]] = {output: [] for output in plan}
    pixels = 0
    for i in part:
        decoded = data.read_or_skip(i, reads)
        if decoded is not None:
            samples.append(data.read_encoded(i))
            for output, (tokenizer, field) in plan.items():
                shown[output].append(tokenizer.look(decoded, field))
            pixels += max((look[-1].size // 3 for look in shown.values() if isinstance(look[-1], np.ndarray)), default=0)
        if len(samples) == GROUP or pixels >= PIXELS or i + 1 == part.stop:
            yield Group(samples, shown, i + 1)
            samples, shown, pixels = [], {output: [] for output in plan}, 0


def _encoded(group: Group, plan: Mapping[str, tuple[Loaded, str]]) -> Iterator[Sample]:
    """The samples of a group with their new fields."""
    outputs = {output: encode(tokenizer, group.shown[output]) for output, (tokenizer, _) in plan.items()}
    for place, sample in enumerate(group.samples):
        yield Sample(sample.key, sample.fields | {output: values[place] for output, values in outputs.items()}, sample.source)


@torch.inference_mode()
def encode(tokenizer: Loaded, shown: Sequence[Any]) -> list[np.ndarray]:
    """What a tokenizer makes of texts or of pictures (H, W, 3) of any sizes: int32 ids or codes, or float16 latents (c, h, w), of each."""
    part = tokenizer.part
    if isinstance(part, TextTokenizer):
        return [np.array(ids, np.int32) for ids in part.encode_batch(list(shown))]
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(shown):
        by_size.setdefault(picture.shape, []).append(place)
    outputs: list[np.ndarray] = [np.empty(0)] * len(shown)
    for places in by_size.values():
        images = to_batch([shown[place] for place in places]).to(part.last_layer.device)
        discrete = part.codebook_size is not None
        found = part.encode_codes(images).to(torch.int32) if discrete else part.encode(images).to(torch.float16)
        for place, value in zip(places, found.cpu().numpy(), strict=True):
            outputs[place] = value
    return outputs


@torch.inference_mode()
def _report_check(folder: Path, loaded: Sequence[Loaded], count: int, split: str, run: Run) -> None:
    """Decode the first samples again, from the shards as they are on the disk."""
    written = open_shards(str(folder))
    where = f"{split}: " if split else ""
    for tokenizer in loaded:
        for field in tokenizer.reads(written):
            output, part = tokenizer.output(field), tokenizer.part
            samples = [written.read(i, [field, output]) for i in range(min(count, len(written)))]
            if isinstance(part, TextTokenizer):
                wrong = [
                    sample.key for sample in samples if part.decode(sample.fields[output].tolist(), special=True) != sample.fields[field]
                ]
                if wrong:
                    raise DataError(f"{folder}: '{output}' of {wrong[0]} (and {len(wrong) - 1} more) does not decode to its text")
                run.say(f"check {where}{output}: {len(samples)} texts came back exact")
                run.log(split=split, field=output, checked=len(samples), exact=len(samples))
                continue
            scores = []
            for sample in samples:
                value = torch.from_numpy(sample.fields[output]).unsqueeze(0).to(part.last_layer.device)
                picture = tokenizer.look(sample, field)
                grid = part.grid(*picture.shape[:2])
                image = part.decode_codes(value.long(), grid) if part.codebook_size is not None else part.decode(value.float())
                scores.append(psnr(to_pixels(image[0]), picture))
            run.say(f"check {where}{output}: PSNR {np.mean(scores):.2f} dB over {len(scores)} pictures")
            run.log(split=split, field=output, checked=len(scores), psnr=float(np.mean(scores)))


def _readme(title: str, opened: Mapping[str, Shards], counts: Mapping[str, int], loaded: Sequence[Loaded], options: RunOptions) -> str:
    """The data card, with the splits as `datasets` reads them from it."""
    first = next(iter(opened.values()))
    licence = first.provenance.get("licence")
    files = "\n".join(f"  - split: {yaml_text(split)}\n    path: {yaml_text(f'{split}/*.tar')}" for split in counts)
    rows = "\n".join(f"| {markdown(split)} | {count} |" for split, count in counts.items())
    wrote = "\n".join(
        f"- {code_span(output)} from {code_span(field)} by {code_span(tokenizer.travelling_name)}"
        for output, (tokenizer, field) in plan_outputs(loaded, first).items()
    )
    return f"""---
{f"license: {yaml_text(licence)}" if licence else "tags: [mmgen]"}
configs:
- config_name: default
  data_files:
{files}
---

# {markdown(title)}

The shards {code_span(str(Path(first.spec).parent))} with what tokenizers made of them:

{wrote}

| split | samples |
|---|---|
{rows}

Written by {code_span(" ".join(options.command) or "mmgen tokenize")}; the tokenizers are in `.mmgen/tokenizers/` of each split.
"""
