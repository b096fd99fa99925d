"""One small sample through the real planner, packer and mask rule, so that what is drawn is what would run.

The recipe is the real one; only its sample is made up: a few words, two questions, a picture of 3 x 4 tokens whatever the pixels a
model is used to. Text tokenizers are trained on the made-up words, so that a word is a token.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stages.data.sample import Sample
from stages.model import meta_model, vocabulary_slices
from stages.parts.tokenizers import TextTokenizer
from stages.recipe import EachSpec, Recipe, SegmentSpec
from stages.sequence.masks import may_attend
from stages.sequence.pack import pack
from stages.sequence.plan import PLACEHOLDER, Planner
from stages.sequence.segment import Batch, Content, PositionKind, Role, Segment, Sequence

GRID = (3, 4)  # rows and columns of a picture's tokens: legible, and not square, so that no axis can be swapped unseen
TEXTS: dict[str, Any] = {
    "caption": "a red circle above a blue square",
    "captions": ["a red circle above a blue square"],
    "qa": [
        {"question": "what is red?", "answer": "a circle", "type": "shape"},
        {"question": "what is below?", "answer": "a square", "type": "relation"},
    ],
    "question": "what is red?",
    "answer": "a circle",
    "instruction": "make the circle green",
    "text": "a circle is round",
}


class NothingDrawn(random.Random):
    """Chance that never strikes: no condition is dropped, and a list keeps its order."""

    def random(self) -> float:
        return 1.0

    def shuffle(self, x: Any) -> None:
        pass


@dataclass(frozen=True)
class DrawnSegment:
    """One segment of the example, with its place in the table.

    labels: a word a token, empty for picture tokens. supervised: which tokens this example is judged on; `reads` is the row that
    predicts each, -1 for the others. cond_dropout_prob: how often training leaves the segment out. A segment outside the table (the
    towers of a contrastive pair) has block -1 and owns no row.
    """

    segment: Segment
    start: int
    block: int
    labels: tuple[str, ...]
    supervised: tuple[bool, ...]
    reads: tuple[int, ...]
    positions: tuple[tuple[int, int, int], ...]
    expert: str
    objective: str
    cond_dropout_prob: float

    @property
    def port(self) -> str:
        return self.segment.port

    @property
    def is_target(self) -> bool:
        return self.segment.role == Role.TARGET

    @property
    def in_table(self) -> bool:
        return self.segment.in_table

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a sample it is filled from; a literal text has none."""
        held = tuple(piece[1:-1] for piece in PLACEHOLDER.findall(self.segment.field))
        return held or (() if any(self.labels) or not self.segment.field else (self.segment.field,))

    @property
    def origin(self) -> str:
        """Where its content comes from, in words: its fields, another network's rows, or nothing but training."""
        if self.segment.of:
            return f"rows of {', '.join(self.segment.of)}"
        return ", ".join(self.fields) or ("" if any(self.labels) else "learned")

    @property
    def clock(self) -> str:
        """Where it stands for the rotary embedding: "8", "0-7", or ranges of (t, h, w) for a grid."""
        ranges = [(min(axis), max(axis)) for axis in zip(*self.positions, strict=True)]
        spans = [f"{low}" if low == high else f"{low}-{high}" for low, high in ranges]
        if not spans:
            return ""
        return f"t {spans[0]}, h {spans[1]}, w {spans[2]}" if self.segment.positions == PositionKind.GRID else spans[0]


@dataclass(frozen=True)
class Example:
    """A task of a recipe, as one network sees the example: its segments in table order and who may attend to whom (l, l).

    network: its name, where the recipe has several."""

    task: str
    network: str
    segments: tuple[DrawnSegment, ...]
    mask: tuple[tuple[bool, ...], ...]
    objectives: tuple[str, ...]

    @property
    def length(self) -> int:
        return len(self.mask)

    @property
    def title(self) -> str:
        return f"{self.task} in {self.network}" if self.network else self.task


def examples_of(recipe: Recipe) -> list[Example]:
    """Every task of the recipe, in file order, in each network it passes through."""
    shown = without_views(recipe)
    planner = Planner(shown, stand_in_tokenizers(shown), dict(meta_model(recipe).encoders.items()))
    return [example for task in shown.tasks for example in plan_example(shown, planner, task)]


def without_views(recipe: Recipe) -> Recipe:
    """Views would scale the example's few patches up to the hundreds a model is used to; of as many queries, a picture's worth is shown."""
    most = GRID[0] * GRID[1]
    ports = {name: port.model_copy(update={"view": None, "count": min(port.count, most)}) for name, port in recipe.ports.items()}
    return recipe.model_copy(update={"ports": ports})


def stand_in_tokenizers(recipe: Recipe) -> dict[str, TextTokenizer]:
    """A text tokenizer of each config, trained on the example and the recipe's own literals: a word is a token."""
    words = [text for value in TEXTS.values() for text in _strings(value)]
    words += [segment.text for task in recipe.tasks.values() for segment in task.flat() if segment.text]
    return {name: config.train(words * 3) for name, config in recipe.tokenizers.items()}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for entry in value for text in _strings(list(entry.values()) if isinstance(entry, dict) else entry)]


def example_sample(recipe: Recipe, planner: Planner, task: str) -> Sample:
    """A sample with every field the task reads: text for text ports, 3 x 4 tokens' worth of codes, latents or pixels for the others."""
    fields: dict[str, Any] = {}
    for entry in recipe.tasks[task].segments:
        if isinstance(entry, EachSpec):
            names = dict.fromkeys(name for segment in entry.segments for name in segment.fields)
            default = [{name: TEXTS.get(name, f"a {name}") for name in names}]
            fields[entry.each] = TEXTS.get(entry.each, default)
            continue
        port = recipe.ports[entry.port]
        if port.tokenizer:
            fields |= {name: TEXTS.get(name, f"a {name}") for name in entry.fields}
        elif entry.field:
            fields[planner.field_of(entry)] = _picture(recipe, planner, entry)
    return Sample("example", fields)


def _picture(recipe: Recipe, planner: Planner, spec: SegmentSpec) -> np.ndarray:
    """What GRID tokens of a picture are made from, as the port finds it in a shard."""
    port = recipe.ports[spec.port]
    rows, columns = (side * port.patch_size for side in GRID)
    if port.by_scale:
        return np.zeros(recipe.autoencoders[port.autoencoder].quantizer.code_shape(columns, columns), dtype=np.int64)  # type: ignore[attr-defined]
    if port.content == Content.CODES:
        return np.zeros((rows, columns), dtype=np.int64)
    if port.content == Content.LATENTS and port.autoencoder:
        return np.zeros((recipe.autoencoders[port.autoencoder].latent_channels, rows, columns), dtype=np.float32)
    if port.encoder:
        rows, columns = (side * getattr(recipe.encoders[port.encoder], "patch_size", 1) for side in GRID)
    return np.zeros((rows, columns, 3), dtype=np.uint8)


def plan_example(recipe: Recipe, planner: Planner, task: str) -> list[Example]:
    """Plan the example of one task as a training step plans a sample."""
    return laid_open(recipe, planner, planner.plan(example_sample(recipe, planner, task), task, NothingDrawn()))


def laid_open(recipe: Recipe, planner: Planner, sequence: Sequence) -> list[Example]:
    """A planned sample, packed and corrupted as in a training step, with everything that follows from its segments written down."""
    batch = pack([sequence])
    return [_in_network(recipe, planner, sequence, batch, network) for network in batch.layouts]


def _in_network(recipe: Recipe, planner: Planner, sequence: Sequence, batch: Batch, network: str) -> Example:
    task, layout = sequence.task, batch.layouts[network]
    segments = [segment for segment in sequence.segments if segment.network == network]
    length = sum(len(segment) for segment in segments if segment.in_table)
    supervised, reads = [False] * length, [-1] * length
    slices = vocabulary_slices(recipe)
    generator = torch.Generator().manual_seed(0)
    for name in dict.fromkeys(segment.port for segment in segments):
        objective, rows = recipe.ports[name].objective, batch.ports[name]
        if objective is None:
            continue
        if rows.values.dim() == 4:  # what an encoder would say of them does not matter here
            rows = replace(rows, values=torch.zeros(len(rows.rows), 1))
        mask_id = {"mask_id": slices[name].size} if objective.kind == "masked-token" else {}
        judged = objective.corrupt(rows, generator, **mask_id)
        assert judged.supervised is not None and judged.read is not None
        for row, read, counts in zip(judged.rows.tolist(), judged.read.tolist(), judged.supervised.tolist(), strict=True):
            if counts:
                supervised[row], reads[row] = True, read
    chances = {spec.group: spec.cond_dropout_prob for spec in recipe.tasks[task].flat() if spec.cond_dropout_prob}
    blocks = layout.block_id.flatten().tolist()
    places = layout.positions.reshape(-1, 3).tolist()
    drawn, start = [], 0
    for segment in segments:
        stop = start + len(segment) if segment.in_table else start
        objective = recipe.ports[segment.port].objective
        drawn.append(
            DrawnSegment(
                segment=segment,
                start=start,
                block=blocks[start] if stop > start else -1,
                labels=_labels(recipe, planner, segment),
                supervised=tuple(supervised[start:stop]),
                reads=tuple(reads[start:stop]),
                positions=tuple((t, h, w) for t, h, w in places[start:stop]),
                expert=_expert_name(recipe, segment),
                objective=objective.kind if objective is not None and segment.role == Role.TARGET else "",
                cond_dropout_prob=chances.get(segment.group, 0.0) if segment.group else 0.0,
            )
        )
        if segment.timed:
            drawn[-1:] = apart(drawn[-1])
        start = stop
    visible = may_attend(layout, layout)[0].tolist() if length else []
    return Example(task, network, tuple(drawn), tuple(map(tuple, visible)), recipe.tasks[task].objectives)


def apart(drawn: DrawnSegment) -> list[DrawnSegment]:
    """A picture whose first row says its noise level, as that row and the picture."""
    time = replace(drawn.segment, grid=(1,), timed=False, field="")
    picture = replace(drawn.segment, timed=False)
    first = replace(drawn, segment=time, labels=("time",), supervised=(False,), reads=(-1,), positions=drawn.positions[:1], objective="")
    rows = {name: getattr(drawn, name)[1:] for name in ("labels", "supervised", "reads", "positions")}
    return [first, replace(drawn, segment=picture, start=drawn.start + 1, **rows)]


def _expert_name(recipe: Recipe, segment: Segment) -> str:
    """Whose weights a segment passes through; nothing to say where there is one expert."""
    name = recipe.ports[segment.port].expert
    networks = [network for network in recipe.backbones.values() if name in network.experts]
    return networks[0].experts[segment.expert] if networks and len(networks[0].experts) > 1 else ""


def _labels(recipe: Recipe, planner: Planner, segment: Segment) -> tuple[str, ...]:
    port = recipe.ports[segment.port]
    if not port.tokenizer:
        return ("",) * len(segment)
    tokenizer = planner.tokenizers[port.tokenizer]
    return tuple(tokenizer.decode([token], special=True).strip() for token in segment.payload.tolist())


def by_block(segments: Iterable[DrawnSegment]) -> list[list[DrawnSegment]]:
    """Segments grouped into attention blocks, in order; those outside the table stand alone."""
    blocks: list[list[DrawnSegment]] = []
    for drawn in segments:
        if blocks and drawn.block >= 0 and blocks[-1][-1].block == drawn.block:
            blocks[-1].append(drawn)
        else:
            blocks.append([drawn])
    return blocks
