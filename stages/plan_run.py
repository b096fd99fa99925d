"""--dry-run of a training stage: everything that is decided before the first step, from configs, indexes and a few samples.

Weights exist on the meta device only, samples are read and planned but nothing is computed, and nothing is written. What cannot be known
yet (no shards, no tokenizer for them) is said in a note, the rest is told all the same.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.anatomy import active_size, count_words, model_size, parts_of, weights_of
from stages.data.sample import Sample
from stages.data.shards import Shards, open_shards
from stages.drawing.example import Example, laid_open
from stages.errors import MmgenError
from stages.escape import lines_of
from stages.flops import FlopCounter
from stages.footprint import footprint
from stages.hub import is_model
from stages.model import meta_model
from stages.recipe import Phase, Recipe, Stage
from stages.sequence.pack import pack
from stages.sequence.plan import MissingField, Planner
from stages.sequence.segment import Sequence as Planned
from stages.training.checkpoint import open_checkpoint
from stages.training.released import Start, fill, open_starts
from stages.training.stream import DEFAULT_BATCH_TOKENS, feasible_tasks, unused_tasks
from stages.travelling import find_tokenizers, load_travelling

NUM_SAMPLES = 64  # enough to know the mean length of a task's samples
Plan = dict[str, Any]


def plan_run(
    recipe: Recipe, stage: Stage, shards: str | None = None, tokenizers: Sequence[Path] = (), init: Mapping[str, str] | None = None
) -> Plan:
    """What a training stage would do with these shards, as one JSON object; `plan_text` makes it readable.

    tokenizers: folders given with --tokenizer, asked before those that came with the shards. init: what is given with --init. Raises what
    the run itself would raise for a recipe without a phase for this stage, for shards that do not exist or are no shards, and for starts
    that are not there or do not fit.
    """
    phases = recipe.phases_for(stage) if recipe.phases else ()
    notes: list[str] = []
    data = open_data(shards, notes)
    planner: Planner | None = None
    starts = (
        open_here({**({} if "model" in (init or {}) else recipe.init_from), **(init or {})}, notes) if stage != "pretrain-tokenizer" else []
    )
    if data is not None and stage != "pretrain-tokenizer":
        try:
            came_along = [path for start in starts if start.released is None for path in open_checkpoint(start.path).tokenizers.values()]
            recipe, travelling = load_travelling(recipe, find_tokenizers(recipe, tokenizers, came_along, data.tokenizers))
            planner = Planner(recipe, travelling.text, dict(meta_model(recipe).encoders.items()))
            phases = recipe.phases_for(stage)
        except MmgenError as problem:
            notes.append(f"{problem.message}; {problem.hint}" if problem.hint else problem.message)
    if starts and planner is None:
        notes.append("whether the weights of --init fit is not known without the shards' tokenizers")
    elif starts:
        model = meta_model(recipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*which is a no-op")  # shapes are compared, weights that were read go nowhere
            notes += [f"would start {fill(model, start, travelling.text)}" for start in starts]
    if stage == "pretrain-tokenizer" and not recipe.autoencoders:
        fields = [field for config in recipe.tokenizers.values() for field in config.fields if data is None or field in data.fields]
        notes.append(f"the text tokenizer learns from the fields {', '.join(fields) or '(these shards have none of its fields)'}")
    weights = weights_of(recipe)
    measured = {phase.name: measure(planner, data, phase, notes) for phase in phases} if planner is not None and data is not None else {}
    return {
        "stage": stage,
        "recipe": recipe.name,
        "size": recipe.size,
        "shards": describe_shards(shards, data),
        "parameters": describe_size(recipe),
        "parts": [
            {"address": p.address, "kind": p.kind, "sizes": p.sizes, "parameters": p.parameters, "trained": dict(p.trained)}
            for p in parts_of(recipe, weights)
        ],
        "first_sequences": first_sequences(recipe, planner, data, phases),
        "phases": [describe_phase(recipe, phase, weights, measured.get(phase.name), data) for phase in phases],
        "notes": list(dict.fromkeys(notes)),
        "resolved_recipe": recipe.to_toml(),
    }


def open_here(init: Mapping[str, str], notes: list[str]) -> list[Start]:
    """The starts that lie on this machine, shapes only; a dry run downloads nothing."""
    remote = [address for address, spec in init.items() if is_model(spec)]
    notes += [f"--init {address}={init[address]} is not looked at in a dry run" for address in remote]
    return open_starts({address: spec for address, spec in init.items() if address not in remote}, shapes_only=True)


# --- data -------------------------------------------------------------------------------------------------------------------------


def open_data(shards: str | None, notes: list[str]) -> Shards | None:
    """The training split, or a note that says why there is none."""
    if shards is None:
        notes.append("no shards are given, so lengths, epochs and activations are not known")
    elif shards == "-":
        notes.append("the shards come from stdin, which a dry run leaves untouched, so lengths, epochs and activations are not known")
    else:
        return open_shards(shards, split="train", mixing=True)
    return None


def describe_shards(spec: str | None, data: Shards | None) -> Plan | None:
    """The shard plan: tars, samples, fields, and which tokenizers came along."""
    if data is None:
        return None
    fields = {name: {key: entry.get(key) for key in ("dtype", "shape")} for name, entry in sorted(data.fields.items())}
    return {
        "spec": spec,
        "tars": len(data.paths),
        "samples": len(data),
        "fingerprint": data.fingerprint,
        "fields": fields,
        "tokenizers": sorted(data.tokenizers),
    }


def describe_size(recipe: Recipe) -> Plan:
    """Parameters as they are, as published, and how far the one is from the other where both are the same size."""
    total, paper = model_size(recipe), recipe.paper
    deviation = total / paper.parameters - 1 if paper.parameters and recipe.size == "paper" else None
    active = active_size(recipe) if recipe.backbones else total
    return {"model": total, "active": active, "published": paper.parameters, "nominal": paper.nominal or None, "deviation": deviation}


# --- sequences --------------------------------------------------------------------------------------------------------------------


def few(data: Shards) -> Iterator[Sample]:
    """Samples spread evenly over the shards, the first one among them."""
    for place in range(min(NUM_SAMPLES, len(data))):
        yield data[place * len(data) // min(NUM_SAMPLES, len(data))]


def measure(planner: Planner, data: Shards, phase: Phase, notes: list[str]) -> dict[str, list[Planned]]:
    """A few planned samples of every task of a phase. Tasks the shards have no fields for become a note."""
    try:
        tasks = feasible_tasks(planner, phase.tasks, data)
    except MissingField as problem:
        notes.append(
            f"phase '{phase.name}': {problem.message}; {problem.hint}" if problem.hint else f"phase '{phase.name}': {problem.message}"
        )
        return {}
    for task in unused_tasks(planner, phase.tasks, data):
        notes.append(f"phase '{phase.name}' leaves out the task '{task}': these shards lack its fields")
    rng = random.Random(0)
    samples = list(few(data))
    return {task: [planner.plan(sample, task, rng) for sample in samples] for task in tasks}


def first_sequences(recipe: Recipe, planner: Planner | None, data: Shards | None, phases: Sequence[Phase]) -> dict[str, Plan]:
    """For each task that is trained: the first sample of the shards as a table of segments."""
    if planner is None or data is None or not len(data):
        return {}
    tables: dict[str, Plan] = {}
    sample = data[0]
    for task in dict.fromkeys(task for phase in phases for task in phase.tasks):
        if planner.can_plan(task, data.fields):
            opened = laid_open(recipe, planner, planner.plan(sample, task, random.Random(0)))
            rows = [row for example in opened for row in segment_rows(example)]
            tables[task] = {"key": sample.key, "tokens": sum(example.length for example in opened), "segments": rows}
    return tables


def segment_rows(opened: Example) -> list[Plan]:
    """One line a segment, in table order."""
    return [
        {
            "port": drawn.port,
            "content": drawn.segment.field or drawn.origin,
            "tokens": len(drawn.segment),
            "grid": list(drawn.segment.grid),
            "mask": str(drawn.segment.mask) if drawn.in_table else "",
            "block": drawn.block,
            "positions": drawn.clock,
            "expert": drawn.expert,
            "role": str(drawn.segment.role),
            "objective": drawn.objective,
            "supervised": sum(drawn.supervised),
        }
        for drawn in opened.segments
    ]


# --- phases -----------------------------------------------------------------------------------------------------------------------


def describe_phase(
    recipe: Recipe, phase: Phase, weights: Mapping[str, int], planned: Mapping[str, list[Planned]] | None, data: Shards | None
) -> Plan:
    """Length, batch, what is seen, and the memory of one step."""
    told: Plan = {
        "name": phase.name,
        "tasks": dict(phase.tasks),
        "steps": phase.steps,
        "batch": {"samples": phase.batch_size} if phase.batch_size else {"tokens": phase.batch_tokens or DEFAULT_BATCH_TOKENS},
        "lr": phase.lr,
        "trainable": list(phase.trainable),
        "frozen": list(phase.frozen),
    }
    if phase.stage == "pretrain-tokenizer":
        return told | picture_phase(recipe, phase, weights, data)
    if planned is None or not planned or data is None:
        known = footprint(recipe, phase, weights, samples=0, tokens=0, row_length=0, supervised={})
        return told | {"memory": {**known, "activations": None, "total": known["total"]}}
    lengths = {task: [len(sequence) for sequence in sequences] for task, sequences in planned.items()}
    share = sum(phase.tasks[task] for task in lengths)
    equal = phase.mix == "every-step"
    weight = {task: 1 / len(lengths) if equal else phase.tasks[task] / share for task in lengths}
    mean = sum(weight[task] * sum(own) / len(own) for task, own in lengths.items())
    samples = float(phase.batch_size) if phase.batch_size else told["batch"]["tokens"] / mean if mean else 0.0
    batch = sample_batch(planned, weight, samples)
    packed = pack(batch)
    scale = samples / len(batch) if batch else 0.0
    supervised = {name: scale * int(rows.target.sum()) for name, rows in packed.ports.items() if recipe.ports[name].objective is not None}
    rows, length = packed.layout.shape
    flops = samples * flops_of_sample(recipe, phase, planned, weight)
    return told | {
        "tokens_per_sample": {task: {"mean": sum(own) / len(own), "max": max(own), "samples": len(own)} for task, own in lengths.items()},
        "samples_per_step": samples,
        "tokens_per_step": samples * mean,
        "supervised_per_step": supervised,
        "samples_seen": samples * phase.steps,
        "tokens_seen": samples * mean * phase.steps,
        "flops_per_step": flops,
        "flops": flops * phase.steps,
        "epochs": samples * phase.steps / len(data),
        "packing": {"rows": rows, "row_length": length, "padding": packed.padding, "sequences": len(batch)},
        "memory": footprint(
            recipe, phase, weights, samples=samples, tokens=samples * mean / max(1e-9, 1 - packed.padding), row_length=length, supervised=supervised
        ),
    }  # fmt: skip


def sample_batch(planned: Mapping[str, list[Planned]], weight: Mapping[str, float], samples: float) -> list[Planned]:
    """A batch in the phase's mix of tasks, of at most as many samples as were planned."""
    size = max(1, min(round(samples), max(len(own) for own in planned.values())))
    return [sequence for task, own in planned.items() for sequence in own[: max(1, round(weight[task] * size))]]


def flops_of_sample(recipe: Recipe, phase: Phase, planned: Mapping[str, list[Planned]], weight: Mapping[str, float]) -> float:
    """What a sample of the phase's mix costs in training, on average; which samples share a row changes nothing."""
    counter = FlopCounter(meta_model(recipe), phase)
    return sum(weight[task] * sum(counter.of(pack(own)).values()) / len(own) for task, own in planned.items() if own)


def picture_phase(recipe: Recipe, phase: Phase, weights: Mapping[str, int], data: Shards | None) -> Plan:
    """A phase of pretrain-tokenizer counts pictures; the grid says what becomes of one."""
    samples = phase.batch_size or 0
    pictures = [
        (recipe.ports[segment.port], segment.field)
        for task in phase.tasks
        for segment in recipe.tasks[task].flat()
        if segment.field and recipe.ports[segment.port].autoencoder
    ]
    size: tuple[int, int] | None = None
    told: Plan = {"samples_per_step": samples, "samples_seen": samples * phase.steps}
    for port, field in pictures:
        shape = (data.fields.get(field, {}).get("shape") if data is not None else None) or [None, None]
        if port.view is not None:
            size = (port.view.size, port.view.size)
        elif None not in shape[:2]:
            size = (shape[0], shape[1])
        if size is not None:
            told |= {"picture": list(size), "grid": list(recipe.autoencoders[port.autoencoder].grid(*size))}
    if data is not None and pictures:
        told["epochs"] = samples * phase.steps / (len(data) * len(pictures))
    memory: Plan = footprint(recipe, phase, weights, samples=samples, tokens=0, row_length=0, supervised={}, picture=size)
    return told | {"memory": memory if size is not None else {**memory, "activations": None}}


# --- text -------------------------------------------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """The plan for people: a few aligned tables, the resolved recipe at the end. A caller may add `out` and what is in its `folder`."""
    size = plan["parameters"]
    published = (
        f", published {size['published']:,.0f}" if size["published"] else f", published as {size['nominal']}" if size["nominal"] else ""
    )
    deviation = f" ({size['deviation']:+.2%})" if size["deviation"] is not None else ""
    active = f", {size['active']:,} of them for one token" if size["active"] < size["model"] else ""
    lines = [f"{plan['stage']} {plan['recipe']}, size {plan['size']}: {size['model']:,} parameters{active}{published}{deviation}"]
    data = plan["shards"]
    if data is not None:
        lines.append(
            f"{data['spec']}: {data['samples']:,} samples in {data['tars']} tar{'s' * (data['tars'] != 1)}, fields {', '.join(data['fields'])}"
        )
    lines += [f"--out {plan['out']}: {plan['folder']}"] if "out" in plan else []
    lines += [f"note: {note}" for note in plan["notes"]]
    names = [phase["name"] for phase in plan["phases"]]
    rows = [["part", "kind", "parameters", *(f"in {name}" for name in names), "sizes"]]
    for part in plan["parts"]:
        marks = [trained_words(part, name) for name in names]
        rows.append([part["address"], part["kind"], f"{part['parameters']:,}" if part["parameters"] else "-", *marks, part["sizes"]])
    lines += ["", *aligned(rows, right={2})]
    for task, first in plan["first_sequences"].items():
        keys = ["port", "content", "tokens", "mask", "block", "positions", "expert", "role", "objective", "supervised"]
        keys = [key for key in keys if key != "expert" or any(row["expert"] for row in first["segments"])]
        table = [keys, *([str(row[key]) or "-" for key in keys] for row in first["segments"])]
        lines += ["", f"task {task}, sample {first['key']}: {first['tokens']} tokens", *aligned(table, right={2})]
    for phase in plan["phases"]:
        lines += ["", *phase_lines(phase)]
    return lines_of([*lines, "", "resolved recipe:", "", *plan["resolved_recipe"].rstrip().split("\n")])


def trained_words(part: Plan, phase: str) -> str:
    trained = part["trained"].get(phase)
    return "-" if trained is None else "frozen" if not trained else "learns" if trained == part["parameters"] else f"{trained:,} learn"


def phase_lines(phase: Plan) -> list[str]:
    """One phase, a line for each thing that is known."""
    (unit, batch), *_ = phase["batch"].items()
    tasks = ", ".join(f"{task} {weight:g}" for task, weight in phase["tasks"].items())
    lines = [f"phase {phase['name']}: {phase['steps']:,} steps of {batch:,} {unit} (tasks {tasks})" if batch else f"phase {phase['name']}"]
    for task, length in phase.get("tokens_per_sample", {}).items():
        if length["max"]:
            lines.append(
                f"  {task}: {length['mean']:.1f} tokens a sample on average, {length['max']} at most (of {length['samples']} samples)"
            )
    if "grid" in phase:
        (height, width), (h, w) = phase["picture"], phase["grid"]
        lines.append(f"  pictures of {height} x {width} become {h} x {w}")
    if phase.get("tokens_per_step"):
        packing = phase["packing"]
        lines.append(f"  a step: {phase['samples_per_step']:,.0f} samples, {phase['tokens_per_step']:,.0f} tokens, {packing['padding']:.1%} padding in rows of {packing['row_length']}")  # fmt: skip
    if "samples_seen" in phase:
        tokens = f", {count_words(phase['tokens_seen'])} tokens" if phase.get("tokens_seen") else ""
        epochs = f", {phase['epochs']:.3g} epochs" if "epochs" in phase else ""
        lines.append(f"  in all: {phase['samples_seen']:,.0f} samples{tokens}{epochs}")
    if phase.get("flops"):
        lines.append(
            f"  compute: {flops_words(phase['flops_per_step'])} a step, {flops_words(phase['flops'])} in all, forward and backward"
        )
    memory = {key.replace("_", " "): value for key, value in phase["memory"].items() if value}
    total = memory.pop("total", 0)
    unknown = "" if phase["memory"]["activations"] is not None else ", activations not known"
    held = ", ".join(f"{key} {bytes_words(value)}" + (" (estimate)" if key == "activations" else "") for key, value in memory.items())
    return [*lines, f"  memory: {bytes_words(total)} ({held}{unknown})"]


def flops_words(value: float) -> str:
    """1.23e12 → "1.23 TFLOP"."""
    for size, unit in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def bytes_words(value: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:,.0f} {unit}" if value >= 100 * size else f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Columns two spaces apart; the ones named in `right` hold numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
