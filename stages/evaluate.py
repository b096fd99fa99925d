"""eval: every number the samples allow, each with its interval, its protocol and two controls.

What is scored are samples: outputs as `sample.<field>` beside the prompt they answer. A checkpoint is first asked for them, on the
shards given, and so is the same network with its initial weights (the *untrained* control); an image tokenizer is asked to
reconstruct. Which metrics apply follows from the fields alone. The second control holds every output against the prompt of another
sample (*shuffled*): what a model scores that draws good pictures of the wrong thing.

    out/results.json   out/samples   out/controls/untrained      (the folders only for checkpoints)
    out/metrics.jsonl  how fast an image tokenizer is here, which is no result: it is another number every time

Samples from elsewhere are renamed with field_map, and their truth is found in SHARDS by key. A folder `controls/untrained` beside
the samples is used as their control; without it those results are null.
"""

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stages import ranks
from stages.data.sample import Sample
from stages.data.shards import Shards, ShardWriter, open_shards, shard_names, split_folders
from stages.documents import read_object_if_any
from stages.errors import DataError, UsageError
from stages.escape import json_text
from stages.files import write_atomic
from stages.hub import resolve
from stages.metrics import METRICS
from stages.metrics.features import feature_network
from stages.metrics.score import Fields, Metric, Reference, Score, Setting, about, check_fields, prompt_key
from stages.metrics.speed import per_second
from stages.options import RunOptions
from stages.parts.autoencoders import Autoencoder
from stages.parts.views.square import to_pixels, to_tensor
from stages.recipe import Recipe
from stages.records import Record, recipe_tables
from stages.run import Run
from stages.sample import sample
from stages.training.checkpoint import checkpoint_input, is_unfinished, load_autoencoder, open_checkpoint
from stages.training.loop import resolve_device

Control = Literal["untrained", "shuffled"]
RECONSTRUCT_BATCH = 32


@dataclass(frozen=True)
class Part:
    """Samples of one split, their truth where that lies elsewhere, and the samples of the untrained control."""

    split: str
    samples: Shards
    truth: Shards | None
    untrained: Shards | None


@ranks.joined(patience=ranks.FOREVER)
def evaluate(
    target: str,
    shards: str | None,
    out: Path,
    options: RunOptions,
    reference: str | None = None,
    field_map: Mapping[str, str] | None = None,
) -> Path:
    """Score samples, or a checkpoint on shards; writes `out/results.json` and returns `out`.

    target: shards of samples, or the folder (or hf:// address) of a checkpoint, which then needs `shards`; beside samples, `shards`
    may hold the truth they lack. reference: shards of real pictures for the Fréchet distance. field_map: {"sample.image": "image"}
    for samples whose fields have other names. Of a parent of splits everything but `train` is scored.
    """
    field_map = dict(field_map or {})
    folder = checkpoint_folder(target)
    if folder is not None and shards is None:
        raise UsageError(f"{target} is a checkpoint: evaluating it needs prompts", hint=f"mmgen eval {target} SHARDS --out {out}")
    data = [open_shards(spec) for spec in splits_of(target if folder is None else str(shards)).values()]
    inputs = [checkpoint_input(target, folder)] if folder is not None else []
    inputs += [describe_shards("samples" if folder is None else "prompts", part) for part in data]
    if folder is None and shards is not None:
        inputs += [describe_shards("truth", open_shards(spec)) for spec in splits_of(shards).values()]
    real = open_shards(reference, split="val") if reference is not None else None
    inputs += [describe_shards("reference", real)] if real is not None else []
    identity = {f"map {name}": field for name, field in field_map.items()}
    reads = [target, folder, shards, reference] + ([] if folder is not None else [control_of(target)])
    writes = ["results.json"]
    if folder is not None:
        places = [place for split in splits_of(str(shards)) for place in sample_places(Path(), split)]
        writes += [(glob.escape(str(place)) + f"/{name}") for place in places for name in shard_names([""])]
    with Run(out, stage="eval", options=options, kind="checkpoint", identity=identity, inputs=inputs, reads=reads, writes=writes) as run:
        if run.complete:
            return out
        if folder is not None:
            parts = list(make_samples(folder, str(shards), out, options, run))
        else:
            parts = list(open_samples(target, shards))
        if run.rank != 0:  # the answers were the work; to score them is for one
            return out
        setting = Setting(seed=options.seed, reference=reference_features(real, run) if real is not None else None)
        rows: list[dict[str, Any]] = []
        for part in parts:
            rows += score_part(part, setting, field_map, options, run)
        if not rows:
            raise nothing_to_score(parts[0].samples)
        write_atomic(out / "results.json", json_text({"inputs": inputs, "results": rows}, indent=1) + "\n")
        for line in table(rows):
            run.say(line)
        run.finish("done", f"{sum(row['control'] is None for row in rows)} numbers in {out / 'results.json'}")
    return out


# --- what to score ----------------------------------------------------------------------------------------------------------------


def checkpoint_folder(target: str) -> Path | None:
    """The local folder of a checkpoint, None when the target is something else (shards, then)."""
    if target.startswith("hf://datasets/") or "::" in target:
        return None
    if target.startswith("hf://"):
        return resolve(target)
    folder = Path(target)
    return folder if (folder / "config.json").is_file() or is_unfinished(folder) else None  # open_checkpoint says that it is


def splits_of(spec: str) -> dict[str, str]:
    """{split: shards} of what is to be scored: all splits but `train`, unless there is no other; "" names shards without splits."""
    splits = split_folders(spec)
    return {name: folder for name, folder in splits.items() if name != "train"} or splits or {"": spec}


def open_samples(target: str, truth: str | None) -> Iterator[Part]:
    """The parts of samples that exist already, each beside its truth and its untrained control."""
    truths = splits_of(truth) if truth is not None else {}
    for split, spec in splits_of(target).items():
        samples = open_shards(spec)
        beside = open_shards(truths.get(split) or next(iter(truths.values()))) if truths else None
        control = control_of(target) / split
        untrained = open_shards(str(control)) if control.is_dir() else None
        if untrained is not None and {samples.key(i) for i in range(len(samples))} - {untrained.key(i) for i in range(len(untrained))}:
            untrained = None  # the control of other samples
        yield Part(split or split_name(samples), samples, beside, untrained)


def control_of(target: str) -> Path:
    """Where the untrained control of samples lies, if there is one."""
    return Path(target).parent / "controls" / "untrained"


def split_name(shards: Shards) -> str:
    """The split of samples, as their folder says or as the samples themselves do."""
    splits = shards.splits()
    return splits[0] if len(splits) == 1 else str(about(shards[0].fields).get("split", ""))


def sample_places(out: Path, split: str) -> tuple[Path, Path]:
    """Where the samples of a split go, and those of the untrained control."""
    return out / "samples" / split, out / "controls" / "untrained" / split


def make_samples(folder: Path, shards: str, out: Path, options: RunOptions, run: Run) -> Iterator[Part]:
    """Ask a checkpoint, and its untrained twin, for samples on every split of `shards`, into folders of `out`."""
    recipe = open_checkpoint(folder).recipe
    for split, spec in splits_of(shards).items():
        made = []
        for place in sample_places(out, split):
            untrained = "controls" in place.parts[len(out.parts) :]
            run.say(f"{'untrained control' if untrained else 'samples'}: {place}")
            if recipe.backbones:
                sample(folder, spec, place, options, untrained=untrained, likelihood=True)
            elif recipe.autoencoders:
                reconstruct(folder, recipe, spec, place, options, untrained=untrained)
            else:
                raise UsageError(f"{folder}: a text tokenizer makes nothing that could be scored", hint="evaluate the model that uses it")
            made.append(open_shards(str(place)))
        if not recipe.backbones and run.rank == 0:
            log_speed(folder, recipe, spec, split, options, run)
        yield Part(split or split_name(made[0]), made[0], None, made[1])


@torch.no_grad()
def reconstruct(folder: Path, recipe: Recipe, shards: str, out: Path, options: RunOptions, *, untrained: bool) -> None:
    """Shards with `sample.image`, what an image tokenizer gives back, and what that was made of: `sample.image.codes` or `.latents`."""
    device = resolve_device(options.device)
    tokenizer = fresh_autoencoder(recipe, options.seed).to(device) if untrained else load_autoencoder(folder, str(device))
    source = open_shards(shards)
    inputs = [checkpoint_input(str(folder), folder), describe_shards("prompts", source)]
    identity = {"untrained": untrained}
    with Run(out, stage="reconstruct", options=options, kind="shards", identity=identity, inputs=inputs, writes=shard_names([""])) as run:
        if run.complete:
            return
        sizes = {"sample.image.codes": tokenizer.codebook_size} if tokenizer.codebook_size is not None else {}
        provenance = {"stage": "reconstruct", "inputs": inputs}
        with ShardWriter(
            out,
            name="samples",
            samples_per_shard=RECONSTRUCT_BATCH,
            provenance=provenance,
            codebook_sizes=sizes,
            resume=run.resuming,
            rank=ranks.rank(),
            ranks=ranks.size(),
            wait=ranks.wait,
        ) as writer:
            count = min(len(source), options.limit or len(source))
            view = view_of(recipe)
            for part in writer.parts(count, RECONSTRUCT_BATCH):
                group = [through_view(sample, view) for i in part if (sample := source.read_or_skip(i)) is not None]
                for made in round_trip(tokenizer, group, device):
                    writer.write(made)
                run.status(step=part.stop, of=count)


def fresh_autoencoder(recipe: Recipe, seed: int) -> Autoencoder:
    """The recipe's image tokenizer as it starts out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return next(iter(recipe.autoencoders.values())).build().eval()


def through_view(entry: Sample, view: Any) -> Sample:
    """A sample with its picture as the tokenizer was trained to see it (cut to a square, say); its meta says what was done."""
    if "image" not in entry.fields:
        raise DataError(f"{entry.source}: sample {entry.key} has no field 'image' to reconstruct; it has {', '.join(entry.fields)}")
    meta = entry.fields.get("meta", {})
    picture = entry.fields["image"] if view is None else view.apply(entry.fields["image"])
    resize = "none" if picture.shape == entry.fields["image"].shape else " ".join(str(value) for value in view.model_dump().values())
    about = {**(meta if isinstance(meta, dict) else {"prompt": meta}), "prompt_key": entry.key, "tasks": ["reconstruct"], "resize": resize}
    return Sample(entry.key, {**entry.fields, "image": picture, "meta": about}, entry.source)


def round_trip(tokenizer: Autoencoder, group: Sequence[Sample], device: torch.device) -> Iterator[Sample]:
    """Pictures through an autoencoder and back, in batches of equal size; latents as they are stored, in float16."""
    for entry in group:
        try:
            tokenizer.grid(*entry.fields["image"].shape[:2])
        except DataError as error:
            raise DataError(f"{entry.source}: {entry.key}: {error.message}", hint=error.hint) from None
    shapes = dict.fromkeys(entry.fields["image"].shape for entry in group)
    done: dict[str, Sample] = {}
    for shape in shapes:
        entries = [entry for entry in group if entry.fields["image"].shape == shape]
        pictures = torch.stack([to_tensor(entry.fields["image"]) for entry in entries]).to(device)
        stored = to_store(tokenizer, pictures)
        again = from_store(tokenizer, stored, pictures.shape[2:])
        name = "sample.image.codes" if tokenizer.codebook_size is not None else "sample.image.latents"
        for index, entry in enumerate(entries):
            fields = {**entry.fields, "sample.image": to_pixels(again[index]), name: stored[index].cpu().numpy()}
            done[entry.key] = Sample(entry.key, fields, entry.source)
    yield from (done[entry.key] for entry in group)


def to_store(tokenizer: Autoencoder, pictures: Tensor) -> Tensor:
    """(b, 3, H, W) pictures → what shards keep of them: int64 codes (b, *code_shape) or float16 latents (b, c, h, w)."""
    return tokenizer.encode_codes(pictures) if tokenizer.codebook_size is not None else tokenizer.encode(pictures).half()


def from_store(tokenizer: Autoencoder, stored: Tensor, size: Sequence[int]) -> Tensor:
    """The way back to (b, 3, H, W) pictures of that (H, W)."""
    if tokenizer.codebook_size is None:
        return tokenizer.decode(stored.float())
    return tokenizer.decode_codes(stored, tokenizer.grid(*size))


@torch.no_grad()
def log_speed(folder: Path, recipe: Recipe, shards: str, split: str, options: RunOptions, run: Run) -> None:
    """Pictures a second through encoder and decoder, into metrics.jsonl: how fast a machine was is no result."""
    device = resolve_device(options.device)
    tokenizer, source, view = load_autoencoder(folder, str(device)), open_shards(shards), view_of(recipe)
    read = (source.read_or_skip(i, ["image"]) for i in range(len(source)))
    first = next((through_view(entry, view).fields["image"] for entry in read if entry is not None), None)
    if first is None:
        return
    pictures = to_tensor(first).to(device).expand(RECONSTRUCT_BATCH, -1, -1, -1).contiguous()
    stored = to_store(tokenizer, pictures)
    encoded = per_second(lambda: to_store(tokenizer, pictures), len(pictures))
    decoded = per_second(lambda: from_store(tokenizer, stored, pictures.shape[2:]), len(pictures))
    speeds = {"encode_per_second": encoded, "decode_per_second": decoded}
    about = {"batch": len(pictures), "height": first.shape[0], "width": first.shape[1], "threads": torch.get_num_threads()}
    run.log(split=split, **speeds, **about, device=str(device))
    run.say(
        f"{encoded:,.0f} pictures a second encoded, {decoded:,.0f} decoded, {', '.join(f'{k} {v}' for k, v in about.items())}, {device}"
    )


def view_of(recipe: Recipe) -> Any:
    """How the port that the tokenizer was trained on sees pictures."""
    return next((port.view for port in recipe.ports.values() if port.autoencoder and port.view is not None), None)


def reference_features(real: Shards, run: Run) -> Reference:
    """The features of all real pictures, by the network that will see the drawn ones."""
    network = feature_network(Setting().features)
    features = []
    for index in range(len(real)):
        picture = real.read_or_skip(index, ["image"])
        if picture is not None:
            features.append(network([picture.fields["image"]]))
        run.status(step=index + 1, of=len(real), message=f"reference pictures, {network.name}")
    return Reference(real.fingerprint, torch.cat(features))


# --- scoring ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Looked:
    """What a metric kept of every sample it applies to."""

    metric: Metric
    seen: list[Any]
    expected: list[Any]
    prompts: list[str]  # their keys
    said: list[str]  # their words


def score_part(part: Part, setting: Setting, field_map: Mapping[str, str], options: RunOptions, run: Run) -> list[dict[str, Any]]:
    """The rows of results.json for one split: each number, then the same under each control."""
    own, about = look(part.samples, part.truth, setting, field_map, options, run)
    controls: dict[str, Looked] = {}
    if part.untrained is not None and own:
        controls, _ = look(part.untrained, part.truth, setting, field_map, options, run)
    rows = []
    for name, looked in own.items():
        scores = looked.metric.scores(looked.seen, looked.expected)
        others: dict[Control, list[Score]] = {"untrained": [], "shuffled": []}
        if name in controls:
            others["untrained"] = looked.metric.scores(controls[name].seen, controls[name].expected)
        order = derangement(looked.prompts, setting.seed) if looked.metric.paired else None
        if order is not None:
            others["shuffled"] = looked.metric.scores(looked.seen, [looked.expected[i] for i in order])
        for score in scores:
            protocol = {**about, "prompts": prompts_hash(looked), "samples": score.samples, **score.protocol}
            rows.append(row(name, score, part.split, protocol, None))
            for control, found in others.items():
                if control == "untrained" or order is not None:
                    match = next((other for other in found if other.category == score.category), None)
                    rows.append(row(name, match or absent(score), part.split, protocol, control))
    return rows


def look(
    samples: Shards, truth: Shards | None, setting: Setting, field_map: Mapping[str, str], options: RunOptions, run: Run
) -> tuple[dict[str, Looked], dict[str, Any]]:
    """One pass over the samples: what each metric that applies keeps of them, and how they were sampled."""
    size = samples.fields.get(field_map.get("sample.image.codes", "sample.image.codes"), {}).get("codebook_size")
    setting = Setting(setting.seed, setting.features, setting.reference, size)
    found: dict[str, Looked] = {}
    resized: set[str] = set()
    count = min(len(samples), options.limit or len(samples))
    for index in range(count):
        entry = samples.read_or_skip(index)
        if entry is None:
            continue
        fields = {**true_fields(entry, truth), **renamed(entry, field_map), "__key__": entry.key}
        check_fields(fields, entry)
        resized.add(str(about(fields).get("resize", "none")))
        for name, kind in METRICS.items():
            if kind.applies(fields, setting):
                looked = found.get(name) or found.setdefault(name, Looked(kind(setting), [], [], [], []))
                try:
                    looked.seen.append(looked.metric.look(fields))
                    looked.expected.append(looked.metric.expect(fields))
                except DataError as error:
                    raise DataError(f"{entry.source}: {entry.key}: {error.message}", hint=error.hint) from None
                looked.prompts.append(prompt_key(fields))
                looked.said.append(str(fields.get("caption", "")))
        run.status(step=index + 1, of=count, message="scoring")
    sampling = sampling_of(samples)
    return found, {**({"sampling": sampling} if sampling else {}), "resize": " and ".join(sorted(resized)) or "none"}


def renamed(entry: Sample, field_map: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a sample under the names metrics know. A renamed field is gone under its old name: an output is not its own truth."""
    for field in field_map.values():
        if field not in entry.fields:
            raise UsageError(f"--map: there is no field '{field}' in {entry.source}", hint=f"its fields are {', '.join(entry.fields)}")
    kept = {name: value for name, value in entry.fields.items() if name not in field_map.values()}
    return kept | {name: entry.fields[field] for name, field in field_map.items()}


def true_fields(entry: Sample, truth: Shards | None) -> Fields:
    """What the truth shards say about the prompt of a sample."""
    if truth is None:
        return {}
    key = prompt_key({**entry.fields, "__key__": entry.key})
    return truth[truth.find(key)].fields


def derangement(prompts: Sequence[str], seed: int) -> list[int] | None:
    """For each sample, the index of a sample of another prompt; every prompt is lent out once (Sattolo's cycle). None for one prompt."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        return None
    generator, cycle = np.random.default_rng(seed), list(range(len(distinct)))
    for i in range(len(cycle) - 1, 0, -1):
        j = int(generator.integers(0, i))  # never i itself: that is what makes it one cycle
        cycle[i], cycle[j] = cycle[j], cycle[i]
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    other = {distinct[i]: distinct[j] for i, j in enumerate(cycle)}
    return [first[other[prompt]] for prompt in prompts]


# --- what stands beside a number --------------------------------------------------------------------------------------------------


def row(metric: str, score: Score, split: str, protocol: Mapping[str, Any], control: Control | None) -> dict[str, Any]:
    return {
        "metric": metric,
        "category": score.category,
        "split": split,
        "n": score.n,
        "value": score.value if score.n else None,
        "interval": list(score.interval) if score.interval else None,
        "chance": score.chance,
        "protocol": dict(protocol),
        "control": control,
    }


def absent(score: Score) -> Score:
    """The place of a control that was not made: no value, nothing counted."""
    return Score(score.category, 0.0, 0, 0, chance=score.chance)


def prompts_hash(looked: Looked) -> str:
    """Equal for equal prompts, in whatever order; several samples of one prompt count."""
    lines = sorted(f"{key}\t{words}" for key, words in zip(looked.prompts, looked.said, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def sampling_of(samples: Shards) -> dict[str, Any]:
    """How the samples were made, as their run.json says: the recipe's [sample] tables and the seed. Empty for foreign samples."""
    record = run_record(samples)
    tables = recipe_tables(record).get("sample", {})
    return {**tables, "seed": record.get("seed")} if tables else {}


def describe_shards(role: str, shards: Shards) -> dict[str, Any]:
    """An input of a run: where it lies, what it holds, and the run that made it."""
    return {"role": role, "path": shards.spec, "fingerprint": shards.fingerprint, "provenance": run_record(shards) or shards.provenance}


def run_record(shards: Shards) -> dict[str, Any]:
    file = shards.paths[0].parent / ".mmgen" / "run.json"
    return read_object_if_any(file, Record)


def nothing_to_score(samples: Shards) -> UsageError:
    fields = sorted(samples.fields)
    hint = "outputs are fields such as sample.image, sample.caption or sample.qa; --map sample.image=FIELD renames one"
    return UsageError(f"{samples.spec}: no metric applies to these samples; their fields are {', '.join(fields)}", hint=hint)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The results as lines of text: a number, its interval, its controls, its chance, what it counts."""

    def number(value: float | None) -> str:
        return f"{value:10.4g}" if value is not None else " " * 9 + "-"

    name_width = max(len(f"{r['split']} {r['metric']} {r['category']}") for r in rows)
    yield f"{'':{name_width}} {'value':>10}  {'95 % interval':>19} {'untrained':>10} {'shuffled':>10} {'chance':>10} {'n':>8}"
    for own in rows:
        if own["control"] is not None:
            continue
        same = [r for r in rows if all(r[key] == own[key] for key in ("metric", "category", "split"))]
        controls = {r["control"]: r["value"] for r in same}
        interval = "[{:.4g}, {:.4g}]".format(*own["interval"]) if own["interval"] else ""
        name = f"{own['split']} {own['metric']} {own['category']}".strip()
        beside = " ".join(number(value) for value in (controls.get("untrained"), controls.get("shuffled"), own["chance"]))
        yield f"{name:{name_width}} {number(own['value'])}  {interval:>19} {beside} {own['n']:8,}"
