"""sample: a trained checkpoint answers prompts. Shards in, shards out, with the answers as fields `sample.<field>`.

A prompt is a sample that has the context fields of a task; the task's last target is written. Every output keeps the key and the
fields of its prompt, so `eval` needs nothing else. The random numbers of an answer depend on (seed, key, task, number) alone, and
prompts are taken in fixed groups of the index, so the same answers come out whatever else is asked.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages import ranks
from stages.data.sample import Sample, decode_image
from stages.data.shards import Shards, ShardWriter, open_shards, shard_names, stream_shards
from stages.data.stream import spool_folder
from stages.decoding import Prompt, Session, prepare
from stages.errors import DataError, RecipeError, UsageError, nearest
from stages.escape import file_name
from stages.files import open_atomic, write_atomic
from stages.hub import resolve
from stages.options import RunOptions
from stages.parts.samplers import AutoregressiveConfig
from stages.parts.tokenizers import TextTokenizer
from stages.parts.views.square import to_pixels
from stages.recipe import EachSpec, Recipe, SegmentSpec, load_recipe
from stages.run import Run
from stages.sequence.pack import pack
from stages.sequence.plan import Planner, features_field
from stages.sequence.segment import Content, MaskKind, Role
from stages.tools.controller import STEPS, Controller, planning_task, tally
from stages.tools.toolbox import Toolbox, open_tools
from stages.training.checkpoint import checkpoint_input, fingerprint, load_model, sides_in
from stages.training.loop import deterministic, resolve_device
from stages.travelling import encode_picture, load_travelling

GROUP = 64  # prompts that are answered together, one tar of them; fixed, so that a batch never depends on ranks or limits
PROMPT_KEY = "prompt"
FREE = "free"  # the task without a recipe's task: the model decides where words end and pictures begin
FREE_PARTS = 6
MAX_TOKENS = 2**16  # of one picture: what attention over it costs grows with their square


@dataclass(frozen=True)
class Job:
    """One thing to write: a task asked of one prompt (of one record of its list field), for the number-th time."""

    sample: Sample
    task: str
    number: int
    record: int | None = None

    @property
    def stream(self) -> str:
        return f"{self.task}/{self.number}" + (f"/{self.record}" if self.record is not None else "")


@ranks.joined(patience=ranks.FOREVER)
def sample(
    model: Path,
    prompts: str | None,
    out: Path | str,
    options: RunOptions,
    tasks: Sequence[str] = (),
    sets: Sequence[str] = (),
    prompt: str | None = None,
    image: Path | None = None,
    save_files: bool = False,
    num_samples: int = 1,
    untrained: bool = False,
    likelihood: bool = False,
    tools: Path | None = None,
) -> Path:
    """Write the answers of one checkpoint. Returns the folder of shards.

    tasks: default all that fit the prompts. sets: `sample.PORT.key=value`, how to sample; nothing else of a trained recipe can
    change. untrained: the same network with its initial weights, as a control. likelihood: also how well the model predicts the
    true texts of the prompts, as `sample.likelihood`.
    tools: a file of tools (`stages.tools.toolbox`) that carry out the calls the model writes.
    """
    deterministic()
    device = resolve_device(options.device)
    folder = resolve(str(model))
    box = open_tools(tools) if tools is not None else None
    reads = (
        [model, folder, prompts, image, tools, *(tool.folder for tool in box.tools.values())] if box else [model, folder, prompts, image]
    )
    writer = Writer(folder, str(device), options, tasks, sets, untrained=untrained, likelihood=likelihood)
    source = single_prompt(writer, prompt, image) if prompts is None else open_prompts(prompts, options, out, reads)
    first = source[0]
    if box is not None:
        writer.asked = [planning_task(writer.recipe, tasks)]
    history = {STEPS} if box is not None else set()  # is not given: it happens
    writer.choose_tasks(set(first.fields) | history, given_prompt=prompts is None)
    names = ", ".join(writer.tasks)
    identity = {
        "model": fingerprint(folder),
        "untrained": untrained,
        "tasks": names,
        "num_samples": num_samples,
        "prompt": prompt or "",
    }
    inputs = [checkpoint_input(str(model), folder)]
    inputs += [{"path": prompts, "fingerprint": source.fingerprint, "provenance": source.provenance}] if isinstance(source, Shards) else []
    tool_inputs = inputs_of_tools(box) if box is not None else []
    if box is not None:
        identity |= {"tools": box.fingerprint}
    inputs += tool_inputs
    with Run(
        out,
        stage="sample",
        options=options,
        kind="shards",
        identity=identity,
        resolved_recipe=writer.recipe.to_toml(),
        inputs=inputs,
        reads=reads,
        writes=shard_names([""]),
    ) as run:
        if run.complete:
            return Path(out)
        count = min(len(source), options.limit or len(source))
        run.say(f"{writer.recipe.name}: {names} for {count:,} prompts" + (f", {num_samples} each" if num_samples > 1 else ""))

        answer = writer.answer if box is None else Controller(writer, box, open_writers(box, str(device), options)).answer
        given = [entry for entry in inputs[1:] if entry not in tool_inputs]
        provenance = {"stage": "sample", "model": inputs[0], "prompts": given, "seed": options.seed}
        provenance |= {"tools": tool_inputs} if box is not None else {}
        with ShardWriter(
            run.out,
            name="samples",
            samples_per_shard=GROUP * num_samples,
            provenance=provenance,
            resume=run.resuming,
            rank=ranks.rank(),
            ranks=ranks.size(),
            wait=ranks.wait,
        ) as shards:
            for part in shards.parts(count, GROUP):
                for entry in answer(list(good(source, part)), num_samples):
                    shards.write(entry)
                    if save_files:
                        save_pictures(entry, run.out / "files")
                run.status(step=part.stop, of=count)
        if isinstance(source, Shards):
            source.note_left_out(ranks.gathered(source.left_out))
            if source.bad and run.rank == 0:
                run.say(source.write_bad_samples(run.meta))
        if run.streaming:
            stream_shards(run.out, sys.stdout.buffer)
        carried_out = f", {tally(open_shards(str(run.out)))}" if box is not None and run.rank == 0 else ""
        run.finish("done", f"{count * num_samples:,} samples{carried_out}")
    return Path(out)


def inputs_of_tools(box: Toolbox) -> list[dict[str, Any]]:
    """The checkpoints of the tools as inputs of a run, one for each tool."""
    return [checkpoint_input(tool.model, tool.folder, role=f"tool {name}") for name, tool in box.tools.items()]


def open_writers(box: Toolbox, device: str, options: RunOptions) -> dict[str, "Writer"]:
    """A writer for every tool; tools of the same checkpoint share one."""
    opened = {folder: Writer(folder, device, options) for folder in dict.fromkeys(tool.folder for tool in box.tools.values())}
    return {name: opened[tool.folder] for name, tool in box.tools.items()}


def good(source: Shards | Sequence[Sample], part: range) -> Iterator[Sample]:
    """The prompts of a stretch that can be read."""
    for i in part:
        prompt = source.read_or_skip(i) if isinstance(source, Shards) else source[i]
        if prompt is not None:
            yield prompt


class Writer:
    """A loaded checkpoint that can be asked things: its model, its tokenizers, its planner, and how each port is sampled."""

    def __init__(
        self,
        folder: Path,
        device: str,
        options: RunOptions,
        tasks: Sequence[str] = (),
        sets: Sequence[str] = (),
        *,
        untrained: bool = False,
        likelihood: bool = False,
    ) -> None:
        for assignment in sets:
            if not assignment.startswith("sample."):
                raise UsageError(f"--set {assignment}: only sample.* can change after training", hint="train again to change anything else")
        checkpoint, self.model = load_model(folder, device, untrained=untrained, seed=options.seed)
        if device == "cpu":
            prepare(self.model)
        self.config = checkpoint.config
        recipe, self.travelling = load_travelling(load_recipe(folder, sets=list(sets)), checkpoint.tokenizers, device)
        self.recipe: Recipe = recipe
        self.model.quantizers = self.travelling.quantizers(recipe)
        self.planner = Planner(recipe, self.travelling.text, dict(self.model.encoders.items()))
        self.options, self.asked, self.likelihood = options, list(tasks), likelihood
        self.tasks: list[str] = []

    # which tasks

    def choose_tasks(self, fields: set[str], *, given_prompt: bool = False) -> None:
        """The tasks asked for, or all that the prompts fit and the model learned."""
        if self.asked == [FREE]:
            if not given_prompt:
                raise UsageError("--task free answers one --prompt, not shards")
            self.tasks = [FREE]
            return
        for task in self.asked:
            if task not in self.recipe.tasks:
                raise UsageError(f"--task {task}: recipe '{self.recipe.name}' has no such task", hint=nearest(task, self.recipe.tasks))
        stores = [f".{autoencoder.store}" for autoencoder in self.recipe.autoencoders.values()]
        fields = fields | {name.removesuffix(store) for name in fields for store in stores if name.endswith(store)}  # codes will do
        learned = {task for phase in self.recipe.phases for task, weight in phase.tasks.items() if weight > 0}
        follow = {task.then for task in self.recipe.tasks.values()}
        candidates = self.asked or [name for name in self.recipe.tasks if name in learned and name not in follow and self.writes(name)]
        self.tasks = []
        for name in candidates:
            lacking = sorted(self.needs(name) - fields - (self.writes_first(name) if self.asked else set()))
            if not lacking:
                self.tasks.append(name)
            elif self.asked:
                raise DataError(f"the task '{name}' needs the field {', '.join(lacking)}; these prompts have {', '.join(sorted(fields))}")
        if not self.tasks:
            wanted = "; ".join(f"'{name}' needs {', '.join(sorted(self.needs(name))) or 'nothing'}" for name in candidates)
            raise DataError(f"these prompts fit no task of '{self.recipe.name}' ({wanted}); they have {', '.join(sorted(fields))}")

    def needs(self, name: str) -> set[str]:
        """The fields a prompt must have for a task."""
        return set(self.recipe.tasks[name].prompt_fields)

    def writes_first(self, name: str) -> set[str]:
        """The fields of a task that it can write itself where a prompt lacks them: those of the targets before its last one."""
        targets = [
            segment for segment in self.recipe.tasks[name].segments if isinstance(segment, SegmentSpec) and segment.role == Role.TARGET
        ]
        return {field for segment in targets[:-1] for field in segment.fields if segment.port in self.recipe.sample}

    def writes(self, name: str) -> bool:
        """Whether the last target of a task has a sampler, and a field to write."""
        targets = [segment for segment in self.recipe.tasks[name].flat() if segment.role == Role.TARGET and segment.fields]
        return bool(targets) and bool(self.needs(name)) and targets[-1].port in self.recipe.sample

    # asking

    def answer(self, group: Sequence[Sample], num_samples: int = 1) -> Iterator[Sample]:
        """Each prompt of a group with its answers, `num_samples` times."""
        if self.tasks == [FREE]:
            for entry in group:
                written = self.write_freely(self.with_contents(entry))
                yield Sample(entry.key, {**entry.fields, **{f"sample.{name}": value for name, value in written.items()}})
            return
        ready = [self.with_contents(entry) for entry in group]
        outputs: dict[tuple[int, int], dict[str, Any]] = {}
        for task in self.tasks:
            for (place, number), fields in self._ask(ready, task, num_samples).items():
                outputs.setdefault((place, number), {}).update(fields)
        for place, entry in enumerate(group):
            for number in range(num_samples):
                written = {f"sample.{name}": value for name, value in outputs[place, number].items()}
                if self.likelihood:
                    written["sample.likelihood"] = self.likelihood_of(ready[place])
                yield self.beside(entry, written, number, num_samples)

    def beside(self, entry: Sample, written: dict[str, Any], number: int, num_samples: int) -> Sample:
        """What was written for a prompt the number-th time, beside the prompt."""
        key = entry.key if num_samples == 1 else f"{entry.key}-s{number + 1}"
        meta = entry.fields.get("meta", {})
        about = {"prompt_key": entry.key, "seed": self.options.seed, "tasks": self.tasks, "number": number}
        return Sample(key, {**entry.fields, **written, "meta": {**(meta if isinstance(meta, dict) else {"prompt": meta}), **about}})

    @torch.inference_mode()
    def ask(self, prompts: Sequence[tuple[Sample, int]], task: str, *, record: int | None = None) -> list[dict[str, Any]]:
        """What the model writes for each prompt (with its contents), the so-manieth time: field → text or picture."""
        jobs = [Job(entry, task, number, record) for entry, number in prompts]
        return [fields for start in range(0, len(jobs), GROUP) for fields in self.write(jobs[start : start + GROUP])]

    def with_contents(self, entry: Sample, tasks: Sequence[str] | None = None) -> Sample:
        """A prompt with the codes or latents its tasks read, encoded here where the shards did not bring them."""
        fields = dict(entry.fields)
        asked = self.recipe.tasks if self.tasks == [FREE] else tasks or self.tasks
        for task in asked:
            for segment in self.recipe.tasks[task].flat():
                port = self.recipe.ports[segment.port]
                name = self.planner.field_of(segment) if segment.field else ""
                if port.autoencoder and name not in fields and segment.field in fields:
                    fields[name] = encode_picture(self.recipe, self.travelling, port.autoencoder, fields[segment.field])
        return replace(entry, fields=fields)

    @torch.inference_mode()
    def _ask(self, group: Sequence[Sample], task: str, num_samples: int) -> dict[tuple[int, int], dict[str, Any]]:
        """(place in the group, number) → fields, for one task."""
        spec = self.recipe.tasks[task]
        each = next((entry.each for entry in spec.segments if isinstance(entry, EachSpec)), None)
        jobs: list[tuple[int, Job]] = []
        for place, entry in enumerate(group):
            records: Sequence[int | None] = range(len(entry.fields[each])) if each else [None]
            jobs += [(place, Job(entry, task, number, record)) for number in range(num_samples) for record in records]
        results: dict[tuple[int, int], dict[str, Any]] = {}
        if each is not None:  # also for prompts whose list is empty
            results = {(place, number): {each: []} for place in range(len(group)) for number in range(num_samples)}
        for start in range(0, len(jobs), GROUP):
            part = jobs[start : start + GROUP]
            for (place, job), fields in zip(part, self.write([job for _, job in part]), strict=True):
                if each is None:
                    results[place, job.number] = fields
                    continue
                assert job.record is not None
                record = job.sample.fields[each][job.record]
                written = next(iter(fields))
                told = {name: value for name, value in record.items() if name != written}
                answered = {**told, **fields, "truth": record.get(written, "")}
                results[place, job.number][each].append(answered)
        return results

    def write(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What the model writes for some jobs of one task: field → text or picture (uint8), one dict a job."""
        task = self.recipe.tasks[jobs[0].task]
        contexts = [self.planner.prompt(job.sample, job.task, record=job.record) for job in jobs]
        rest = contexts[0][1]
        groups = {segment.group for segment in task.flat() if segment.cond_dropout_prob > 0}
        guide = self.sampler(rest[-1].port).guide(groups)
        prompts = []
        for job, (segments, _) in zip(jobs, contexts, strict=True):
            passes = [segments] + [self.planner.prompt(job.sample, job.task, record=job.record, drop=drop)[0] for drop in guide.drops[1:]]
            prompts.append(Prompt(job.sample.key, job.stream, passes, self.planner.joined(rest[0])))
        session = Session(self.model, self.planner, prompts, guide, self.capacity(rest, jobs), self.options.seed)
        fields: list[dict[str, Any]] = [{} for _ in jobs]
        stored: list[dict[str, Any]] = [{} for _ in jobs]  # the same as codes and latents, for what reads them again
        everyone, flat = [True] * len(jobs), list(task.flat())
        for place, segment in enumerate(rest):
            more = place + 1 < len(rest)
            if segment.role == Role.CONTEXT:
                self._write_given(session, segment, jobs, [{**own, **kept} for own, kept in zip(fields, stored, strict=True)])
                continue
            port = self.recipe.ports[segment.port]
            sampler = self.sampler(segment.port)
            if port.content == Content.TOKEN_IDS:
                sampler = sampler.model_copy(update={"max_tokens": self.most_tokens(segment)})
                assert isinstance(sampler, AutoregressiveConfig)
                stop = session.stop_token(segment)
                switch = [] if stop is not None else self._marker_ids(rest[place + 1 : place + 2])
                ids, _ = session.write_text(segment, sampler, stop=[] if stop is None else [stop], switch=switch, guide=not more)
                for entry, own in zip(fields, ids, strict=True):
                    entry[segment.fields[0]] = readable(self.travelling.text[port.tokenizer], own)
                continue
            session.guide = guide.after({spec.group for spec in flat[: flat.index(segment)]})
            content = session.write_picture(segment, sampler, self.grid(segment), everyone, commit=more)
            if port.content == Content.FEATURES:
                name, written = features_field(segment.field, port.encoder), list(content.float().cpu().numpy())
            else:
                name, written = segment.field, self.decode(port.autoencoder, content)
                for kept, latents in zip(stored, content, strict=True):
                    kept[self.planner.field_of(segment)] = latents.cpu().numpy()
            for entry, own in zip(fields, written, strict=True):
                entry[name] = own
        return self._go_on(task.then, jobs, fields) if task.then else fields

    def _go_on(self, task: str, jobs: Sequence[Job], fields: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The task that makes something of features: what it writes, beside all else that was written."""
        following = [
            replace(job, sample=replace(job.sample, fields={**job.sample.fields, **own}), task=task, record=None)
            for job, own in zip(jobs, fields, strict=True)
        ]
        told = [
            {name: value for name, value in own.items() if not isinstance(value, np.ndarray) or value.dtype == np.uint8} for own in fields
        ]
        return [{**own, **more} for own, more in zip(told, self.write(following), strict=True)]

    def _write_given(self, session: Session, segment: SegmentSpec, jobs: Sequence[Job], written: Sequence[dict[str, Any]]) -> None:
        """What stands between two things the model writes: a literal, a field of the prompt, or what it just wrote, to be read again."""
        rows = []
        for drop in session.guide.drops:
            for job, own in zip(jobs, written, strict=True):
                values = {**job.sample.fields, **own} if own or segment.fields else {}
                rows.append(self.planner.given(segment, values, job.sample, drop=drop))
        session.write(rows)

    @torch.inference_mode()
    def likelihood_of(self, entry: Sample) -> list[dict[str, Any]]:
        """The cross-entropy of the prompt's true texts, for each task the model learned that predicts text and that the prompt fits.

        One dict a task: nats over all supervised text tokens, and the bytes of the texts they spell.
        """
        found = []
        for name in dict.fromkeys(task for phase in self.recipe.phases for task in phase.tasks):
            spec = self.recipe.tasks[name]
            texts = [segment for segment in spec.flat() if segment.role == Role.TARGET and segment.fields]
            if not texts or any(self.recipe.ports[segment.port].content != Content.TOKEN_IDS for segment in texts):
                continue
            if not self.planner.can_plan(name, entry.fields):
                continue
            sequence = self.planner.plan(entry, name, None)
            records = [record for part in spec.segments if isinstance(part, EachSpec) for record in entry.fields[part.each]] or [
                entry.fields
            ]
            size = sum(len(record[field].encode()) for record in records for segment in texts for field in segment.fields)
            losses = self.model.losses(pack([sequence]).to(next(self.model.parameters()).device), torch.Generator().manual_seed(0))
            nats = sum(float(loss.total) for port, loss in losses.items() if port in {segment.port for segment in texts})
            found.append({"task": name, "nats": round(nats, 4), "bytes": size})
        return found

    @torch.inference_mode()
    def write_freely(self, prompt: Sample) -> dict[str, Any]:
        """One answer in which the model itself decides what comes: words, and a picture wherever it predicts that one begins.

        `reply` lists the parts in order, {"text": ...} or {"picture": "picture1"}; the pictures stand beside it. Only for networks
        whose pictures have a supervised start marker.
        """
        pictures = {name: port for name, port in self.recipe.ports.items() if port.markers.supervised and name in self.recipe.sample}
        pictures = {
            name: port
            for name, port in pictures.items()
            if port.markers.before and (port.mask == MaskKind.CAUSAL or not port.markers.inside)
        }
        if not pictures:
            raise UsageError(f"'{self.recipe.name}' never learned to begin a picture by itself", hint="name a task with --task")
        name, port = next(iter(pictures.items()))
        text = self.planner.text_port(port)
        picture = SegmentSpec(port=name, field="image", role=Role.TARGET)
        tokenizer = self.travelling.text[self.recipe.ports[text].tokenizer]
        opening = self.planner.prompt_of([SegmentSpec(port=text, text="<bos>")], prompt)
        given = [SegmentSpec(port=name, field="image")] if "image" in prompt.fields else []
        context = self.planner.prompt_of([SegmentSpec(port=text, text="<bos>"), *given, SegmentSpec(port=text, field="prompt")], prompt)
        sampler = self.sampler(name)
        guide = sampler.guide({"prompt"})
        capacity = FREE_PARTS * (self.sampler(text).max_tokens + self.columns_of(picture))
        passes = [context, *([opening] * (len(guide.drops) - 1))]
        session = Session(self.model, self.planner, [Prompt(prompt.key, "free", passes)], guide, capacity, self.options.seed)
        words = SegmentSpec(port=text, field="prompt", role=Role.TARGET, drop_group="prompt")
        fields: dict[str, Any] = {"reply": []}
        for _ in range(FREE_PARTS):
            ids, ended = session.write_text(
                words, self.sampler(text), stop=[tokenizer.special_id("<eos>")], switch=self._marker_ids([picture]), guide=False
            )
            if ids[0]:
                fields["reply"].append({"text": readable(tokenizer, ids[0])})
            if ended[0] not in self._marker_ids([picture]):
                break
            content = session.write_picture(picture, sampler, self.grid(picture), [True], commit=True)
            label = f"picture{sum('picture' in part for part in fields['reply']) + 1}"
            fields["reply"].append({"picture": label})
            fields[label] = self.decode(port.autoencoder, content)[0]
        return fields

    def _marker_ids(self, following: Sequence[SegmentSpec]) -> list[int]:
        """The token that says a picture begins, for the picture segments among `following`."""
        markers = [self.planner.marker(self.recipe.ports[spec.port], spec, "before") for spec in following]
        return [int(marker.payload[0]) for marker in markers if marker is not None]

    def sampler(self, port: str) -> Any:
        """How a port is sampled: as the recipe says, or greedily for text it says nothing about."""
        if port in self.recipe.sample:
            return self.recipe.sample[port]
        if self.recipe.ports[port].content == Content.TOKEN_IDS:
            return AutoregressiveConfig(temperature=0.0)
        raise RecipeError(f"recipe '{self.recipe.name}' does not say how to sample '{port}'", hint=f"add a [sample.{port}] table")

    def most_tokens(self, segment: SegmentSpec) -> int:
        """How many tokens a text may have: what its sampler allows, or less where its segment says so."""
        allowed: int = self.sampler(segment.port).max_tokens
        return min(allowed, segment.max_tokens or allowed)

    def capacity(self, rest: Sequence[SegmentSpec], jobs: Sequence[Job]) -> int:
        """Columns of the cache that writing `rest` may take."""
        columns = 0
        for segment in rest:
            port = self.recipe.ports[segment.port]
            if port.content == Content.TOKEN_IDS and segment.role == Role.TARGET:
                columns += self.most_tokens(segment)
            elif port.content == Content.TOKEN_IDS:
                given = [job for job in jobs if set(segment.fields) <= job.sample.fields.keys()]
                told = [sum(map(len, self.planner.given(segment, job.sample.fields, job.sample))) for job in given]
                columns += max([64 if len(given) < len(jobs) else 0, *told])
            elif port.encoder:
                columns += self.planner.encoders[port.encoder].config.num_tokens(port.view.size, port.view.size) + 2
            else:
                columns += self.columns_of(segment)
        return columns + 2

    def columns_of(self, picture: SegmentSpec) -> int:
        """Tokens of a picture with its markers."""
        grid = self.grid(picture)
        return prod(grid) + 3 + (prod(grid[:-1]) if self.recipe.ports[picture.port].markers.row else 0)

    def grid(self, segment: SegmentSpec) -> tuple[int, ...]:
        """The shape of a picture's tokens, mostly rows and columns: what the model was trained on."""
        grids = self.config.get("grids", {})
        if not isinstance(grids, dict) or segment.port not in grids:
            raise RecipeError(f"the checkpoint does not say how large the pictures of '{segment.port}' are")
        port = self.recipe.ports[segment.port]
        axes = (2,) if port.content == Content.LATENTS and port.autoencoder else (1, 2, 3)
        return sides_in(grids[segment.port], f"config.json: grids.{segment.port}", axes, MAX_TOKENS)

    def decode(self, name: str, content: Tensor) -> list[np.ndarray]:
        """Codes or latents → uint8 pictures (H, W, 3)."""
        if not name:
            return [to_pixels(picture) for picture in content]
        autoencoder = self.travelling.autoencoder(name)
        decode: Callable[[Tensor], Tensor] = autoencoder.decode_codes if autoencoder.codebook_size is not None else autoencoder.decode
        return [to_pixels(picture) for picture in decode(content)]


def readable(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """The text a model wrote. NUL, which it may write like any byte and no text holds, becomes U+FFFD as bytes do that are no UTF-8."""
    return tokenizer.decode(ids).strip().replace("\0", "\ufffd")


def open_prompts(spec: str, options: RunOptions, out: Path | str, reads: Sequence[str | Path | None] = ()) -> Shards:
    """Prompt shards; of a parent of splits, `val`. reads: what else is read, see `spool_folder`."""
    spool = spool_folder(out, reads)
    return open_shards(spec, split="val", on_bad_sample=options.on_bad_sample, max_bad_fraction=options.max_bad_fraction, spool=spool)


def single_prompt(writer: Writer, prompt: str | None, image: Path | None) -> list[Sample]:
    """--prompt and --image as one sample: the text fills whatever text the tasks ask for."""
    if prompt is None and image is None:
        raise UsageError("nothing to answer", hint="give PROMPT-SHARDS, or --prompt TEXT, or --image FILE")
    fields: dict[str, Any] = {}
    if image is not None:
        try:
            fields["image"] = decode_image(image.read_bytes())
        except (DataError, OSError) as error:
            reason = error.message if isinstance(error, DataError) else (error.strerror or str(error))
            raise DataError(f"{image}: {reason}") from None
    if prompt is not None and writer.asked == [FREE]:
        fields["prompt"] = prompt
    elif prompt is not None:
        for name in writer.asked or writer.recipe.tasks:
            if name not in writer.recipe.tasks:
                continue
            for entry in writer.recipe.tasks[name].segments:
                inner = entry.segments if isinstance(entry, EachSpec) else (entry,)
                asked = writer.recipe.tasks[name].prompt_fields  # a caption that was a target in training too, where a picture follows it
                words = [s for s in inner if writer.recipe.ports[s.port].content == Content.TOKEN_IDS]
                given = [s for s in words if s.role == Role.CONTEXT or asked.issuperset(s.fields)]
                texts = {f: prompt for s in given for f in s.fields}
                if isinstance(entry, EachSpec):
                    targets = {f: "" for s in inner if s.role == Role.TARGET for f in s.fields}
                    fields[entry.each] = [{**texts, **targets}]
                else:
                    fields |= texts
    return [Sample(PROMPT_KEY, fields, "--prompt")]


def save_pictures(entry: Sample, folder: Path) -> None:
    """The images and texts of one output sample as ordinary files, side by side in one folder whatever the key is."""
    for name, value in entry.fields.items():
        if not name.startswith("sample."):
            continue
        path = folder / file_name(f"{entry.key}.{name.removeprefix('sample.')}")
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
            with open_atomic(path.with_name(path.name + ".png")) as file:
                Image.fromarray(value).save(file, format="PNG")
        elif isinstance(value, str):
            write_atomic(path.with_name(path.name + ".txt"), value + "\n")
