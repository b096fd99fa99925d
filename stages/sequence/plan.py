"""Sample + task → Sequence: the only place that knows how a row of a shard becomes what a network reads.

A task of the recipe lists segments; the planner fills them with a sample's fields, puts markers around pictures, drops
conditions (training draws that, guidance asks for it by group) and gives each segment its port's mask, positions and expert.
The unconditional branch of guidance is planned by the very same path, so training and sampling cannot disagree about it.
"""

import random
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.data.sample import Sample
from stages.errors import DataError
from stages.parts.layers import patchify
from stages.parts.tokenizers import TextTokenizer
from stages.parts.tokenizers.text import PAD
from stages.parts.views.square import to_tensor
from stages.recipe import FIELD, EachSpec, Port, Recipe, SegmentSpec, Task, backbone_of
from stages.sequence.positions import positions_of
from stages.sequence.segment import Content, MaskKind, PositionKind, Role, Segment, Sequence

TEXTS_KEPT, LONG_TEXT = 200_000, 200
PLACEHOLDER = re.compile(f"({FIELD})")


class MissingField(DataError):
    """A sample lacks a field that a task needs."""


class Planner:
    """Plans samples for one recipe. `encoders` are asked how many tokens they make of a picture (`out_grid`), never run."""

    def __init__(self, recipe: Recipe, tokenizers: Mapping[str, TextTokenizer], encoders: Mapping[str, Any] | None = None) -> None:
        self.recipe, self.tokenizers, self.encoders = recipe, tokenizers, encoders or {}
        self._texts: dict[tuple[TextTokenizer, str], list[int]] = {}  # short texts come again in every epoch
        self._literals: dict[tuple[str, str], list[int]] = {}
        self.written_ids: dict[str, str] = {}  # field → tokenizer
        self._turn = 0
        self._numbers = {name: number for number, name in enumerate(recipe.ports)}
        self.features: dict[tuple[str, str, str], Tensor] = {}  # (key, port, field) → what a frozen encoder said, computed once

    # which fields

    def field_of(self, spec: SegmentSpec) -> str:
        """The field of a shard that fills a segment: codes and latents stand beside the picture they were made from."""
        port = self.recipe.ports[spec.port]
        if port.content == Content.CODES:
            return f"{spec.field}.{self.recipe.autoencoders[port.autoencoder].store}"
        if port.content == Content.LATENTS and port.autoencoder:
            return f"{spec.field}.{self.recipe.autoencoders[port.autoencoder].store}"
        return spec.field

    def fields_needed(self, tasks: Collection[str]) -> set[str]:
        """Every field the reader must decode for these tasks, lists by the name of the list."""
        needed: set[str] = set()
        for name in tasks:
            for entry in self.recipe.tasks[name].segments:
                if isinstance(entry, EachSpec):
                    needed.add(entry.each)
                elif entry.field:
                    needed.add(self.field_of(entry))
                else:
                    needed |= {name for field in entry.fields for name in (field, f"{field}.ids")}
        return needed

    def can_plan(self, task: str, fields: Collection[str]) -> bool:
        """Whether samples with these fields can be trained on in this task."""
        spec = self.recipe.tasks[task]
        each = [entry.each for entry in spec.segments if isinstance(entry, EachSpec)]
        plain = [s for s in spec.segments if isinstance(s, SegmentSpec) and not s.optional]
        needed = {self.field_of(s) if s.field else f for s in plain for f in s.fields}
        return needed.union(each) <= set(fields)

    def trust_ids(self, wrote: Mapping[str, str | None]) -> None:
        """Fields `NAME.ids` of the shards that a tokenizer of this recipe wrote, by fingerprint: read instead of tokenizing again."""
        own = {tokenizer.fingerprint: name for name, tokenizer in self.tokenizers.items()}
        self.written_ids = {field: own[wrote_it] for field, wrote_it in wrote.items() if field.endswith(".ids") and wrote_it in own}

    # training

    def plan(self, sample: Sample, task: str, rng: random.Random | None) -> Sequence:
        """One training example: conditions dropped by chance, list fields drawn from; without `rng` nothing is dropped and every
        record is there in order. Raises MissingField."""
        spec = self.recipe.tasks[task]
        dropped = self._draw_dropped(spec, rng) if rng is not None else set()
        segments = self._laid_out(self._filled(spec.segments, sample, rng), dropped, sample)
        return Sequence(key=sample.key, task=task, segments=tuple(segments))

    def _laid_out(
        self,
        filled: Iterable[tuple[SegmentSpec, Mapping[str, Any]]],
        dropped: set[str],
        sample: Sample,
        held: dict[str, int] | None = None,
    ) -> list[Segment]:
        """The segments of some specs, one after the other; what a dropped condition holds of a network's time, its next segment waits.
        `held` is left with the time that no segment has waited yet."""
        segments: list[Segment] = []
        held = {} if held is None else held
        for spec, values in filled:
            made = self._segments(spec, values, dropped, sample)
            network = self._network(self.recipe.ports[spec.port])
            if made:
                made[0] = replace(made[0], advance=held.pop(network, 0) + made[0].advance)
            else:
                held[network] = held.get(network, 0) + self._ticks(spec, values, dropped, sample)
            for segment in made:
                complete = counted(segment, segments) if segment.of else segment
                segments += [complete] if len(complete) else []
        return segments

    # sampling

    def prompt(
        self, sample: Sample, task: str, *, drop: Collection[str] = (), record: int | None = None
    ) -> tuple[list[Segment], list[SegmentSpec]]:
        """What stands before the first thing the model is to write, and the specs that come from there on.

        The last target that has a field is always written, earlier ones only where the sample lacks their fields: a caption that
        carries loss in training is given when it is there. Literals after it are left out. `record` picks one entry of the task's
        list field, `drop` leaves out groups.
        """
        filled = list(self._filled(self.recipe.tasks[task].segments, sample, None, record=record, lenient=True))
        targets = [place for place, (spec, _) in enumerate(filled) if spec.role == Role.TARGET and spec.fields]
        first = next(
            place
            for place, (spec, values) in enumerate(filled)
            if place == targets[-1] or (spec.role == Role.TARGET and any(self._lacks(spec, name, values) for name in spec.fields))
        )
        rest = [spec for spec, _ in filled[first : targets[-1] + 1]]
        seen = [entry for entry in filled[:first] if not self._is_noised_copy(entry[0])]
        held: dict[str, int] = {}
        return opened(self._laid_out(seen, set(drop), sample, held), rest) + self._pauses(held), rest

    def given(self, spec: SegmentSpec, values: Mapping[str, Any], sample: Sample, *, drop: Collection[str] = ()) -> list[Segment]:
        """A context segment that follows something the model wrote; where it is dropped, the time it holds."""
        held: dict[str, int] = {}
        return self._laid_out([(spec, values)], set(drop), sample, held) + self._pauses(held)

    def _is_noised_copy(self, spec: SegmentSpec) -> bool:
        """Whether a target is there for its loss only, since nobody else sees it."""
        return spec.role == Role.TARGET and (spec.mask or self.recipe.ports[spec.port].mask) == MaskKind.ISOLATED

    def _pauses(self, held: Mapping[str, int]) -> list[Segment]:
        """No rows, and the clock of each network moves: what a dropped condition leaves where nothing given follows it."""
        nothing = torch.zeros(0, dtype=torch.int64)
        texts = {self._network(port): name for name, port in reversed(self.recipe.ports.items()) if port.content == Content.TOKEN_IDS}
        return [
            Segment(port=texts[network], payload=nothing, grid=(0,), advance=ticks, network=network)
            for network, ticks in held.items()
            if ticks
        ]

    def joined(self, spec: SegmentSpec) -> str | None:
        """In whose table a segment belongs to the block before it, where that block sees all of itself: neither is known without the other."""
        port = self.recipe.ports[spec.port]
        return self._network(port) if spec.merge and (spec.mask or port.mask).sees_whole else None

    def prompt_of(self, specs: list[SegmentSpec], sample: Sample) -> list[Segment]:
        """The segments of a prompt that no task describes."""
        return self._laid_out(self._filled(specs, sample, None), set(), sample)

    # how

    def _filled(
        self,
        entries: Iterable[SegmentSpec | EachSpec],
        sample: Sample,
        rng: random.Random | None,
        *,
        record: int | None = None,
        lenient: bool = False,
    ) -> Iterator[tuple[SegmentSpec, Mapping[str, Any]]]:
        """The task's segments in order, each with the values its fields take: the sample's own, or those of a list's record."""
        for entry in entries:
            if isinstance(entry, SegmentSpec):
                if entry.optional and any(self._lacks(entry, name, sample.fields) for name in entry.fields):
                    continue
                yield entry, sample.fields
                continue
            records = sample.fields.get(entry.each)
            if not isinstance(records, list):
                raise MissingField(f"{sample.source or sample.key}: the task repeats over '{entry.each}', which is not a list here")
            chosen = list(range(len(records))) if record is None else [record]
            if rng is not None:
                rng.shuffle(chosen)
                chosen = chosen[: entry.limit or None]
            for number in chosen:
                for segment in entry.segments:
                    if lenient or all(name in records[number] for name in segment.fields):
                        yield segment, records[number]

    def _lacks(self, spec: SegmentSpec, name: str, fields: Mapping[str, Any]) -> bool:
        return (self.field_of(spec) if spec.field else name) not in fields

    def _draw_dropped(self, task: Task, rng: random.Random) -> set[str]:
        probabilities = {s.group: s.cond_dropout_prob for s in task.flat() if s.cond_dropout_prob > 0}
        return {group for group, probability in sorted(probabilities.items()) if rng.random() < probability}

    def _segments(self, spec: SegmentSpec, values: Mapping[str, Any], dropped: set[str], sample: Sample) -> list[Segment]:
        """The segment with its markers, or nothing where it is dropped without a trace."""
        port = self.recipe.ports[spec.port]
        out = bool(spec.cond_dropout_prob) and spec.group in dropped
        if out and not (port.null_condition in ("empty", "pad") and port.content == Content.TOKEN_IDS):
            return []
        payload, grid = self._payload(spec, port, values, sample, empty=out and port.null_condition == "empty")
        if not len(payload) and not port.of:
            return []
        if out and port.null_condition == "pad":  # as many tokens at the same places, which say nothing (Janus)
            payload = torch.full_like(payload, self.tokenizers[port.tokenizer].special_id(PAD))
        return self._wrap(spec, port, payload, grid)

    def _ticks(self, spec: SegmentSpec, values: Mapping[str, Any], dropped: set[str], sample: Sample) -> int:
        """How far the clock moves for a dropped condition that holds its time."""
        port = self.recipe.ports[spec.port]
        if port.null_condition != "hold" or spec.group not in dropped:
            return 0
        payload, grid = self._payload(spec, port, values, sample, empty=False)
        return positions_of(self._wrap(spec, port, payload, grid))[1]

    def block(self, spec: SegmentSpec, payload: Tensor, grid: tuple[int, ...]) -> list[Segment]:
        """A picture's segments as the model will see them, markers included, for a payload made while sampling."""
        return self._wrap(spec, self.recipe.ports[spec.port], payload, grid)

    def _wrap(self, spec: SegmentSpec, port: Port, payload: Tensor, grid: tuple[int, ...]) -> list[Segment]:
        mask = spec.mask or port.mask
        segment = Segment(
            port=spec.port,
            payload=payload,
            grid=grid,
            role=spec.role,
            mask=mask,
            positions=port.positions,
            expert=self._expert(port),
            merge=spec.merge,
            weight=1.0 if spec.weight is None else spec.weight,
            timestep_range=spec.timestep_range,
            field=spec.field or spec.text,
            group=spec.group if spec.cond_dropout_prob else "",
            in_table=port.enters == "sequence",
            timed=port.timestep == "token",
            port_number=self.port_number(spec.port),
            hidden_from=self._hidden_from(spec.port),
            network=self._network(port),
            of=port.of,
            skip=port.skip_rows,
        )
        before, after = self.marker(port, spec, "before"), self.marker(port, spec, "after")
        if before is not None:
            segment = replace(segment, merge=port.markers.inside)
        end_of_row = self.marker(port, spec, "row")
        rows = [segment] if end_of_row is None else with_ends(segment, end_of_row)
        if port.by_scale:
            quantizer: Any = self.recipe.autoencoders[port.autoencoder].quantizer  # type: ignore[attr-defined]
            rows = split_scales(segment, quantizer)
        return [part for part in (before, *rows, after) if part is not None]

    def _hidden_from(self, name: str) -> int:
        """The ports that never see a port's rows, a bit for each."""
        return sum(1 << self._numbers[other] for other in self.recipe.ports[name].hidden_from)

    def port_number(self, name: str) -> int:
        """A port's place in the recipe, by which rows are hidden from it."""
        return self._numbers[name]

    def marker(self, port: Port, spec: SegmentSpec, side: str) -> Segment | None:
        """The one-token segment before or after a picture. It belongs to the text port: its embedding, expert and loss."""
        name = getattr(port.markers, side)
        if not name:
            return None
        text = self.text_port(port)
        text_port = self.recipe.ports[text]
        token = self.tokenizers[text_port.tokenizer].special_id(name)
        inside = port.markers.inside
        return Segment(
            port=text,
            payload=torch.tensor([token]),
            grid=(1,),
            role=Role.TARGET if port.markers.supervised and spec.role == Role.TARGET else Role.CONTEXT,
            mask=(spec.mask or port.mask) if inside else MaskKind.CAUSAL,
            positions=port.positions if inside and port.positions == PositionKind.SHARED else PositionKind.SEQUENTIAL,
            expert=self._expert(text_port),
            merge=(spec.merge if side == "before" else True) if inside else False,
            field=name,
            port_number=self.port_number(text),
            hidden_from=self._hidden_from(text),
            network=self._network(port),
        )

    def text_port(self, port: Port) -> str:
        """The port whose tokens mark where a picture begins and ends: the first text port of the same network."""
        network = backbone_of(self.recipe, port)
        for name, other in self.recipe.ports.items():
            if other.content == Content.TOKEN_IDS and other.enters == "sequence" and backbone_of(self.recipe, other) == network:
                return name
        raise DataError("markers need a port of token ids on the same backbone")

    def expert_of(self, port: str) -> int:
        """Which expert's weights a port's tokens pass through, by number."""
        return self._expert(self.recipe.ports[port])

    def _network(self, port: Port) -> str:
        """Whose table a port's tokens stand in; "" where there is only one."""
        return port.backbone if len(self.recipe.backbones) > 1 else ""

    def _expert(self, port: Port) -> int:
        if port.enters != "sequence" or not port.expert:
            return 0
        return self.recipe.backbones[backbone_of(self.recipe, port)].experts.index(port.expert)

    def _payload(
        self, spec: SegmentSpec, port: Port, values: Mapping[str, Any], sample: Sample, *, empty: bool
    ) -> tuple[Tensor, tuple[int, ...]]:
        if port.content == Content.TOKEN_IDS or (port.content == Content.FEATURES and port.tokenizer):
            ids = self._ids(spec, port, values, sample, empty=empty)
            return torch.tensor(ids, dtype=torch.int64), (len(ids),)
        if port.content == Content.QUERIES:
            return torch.arange(port.count), (port.count,)
        if port.content == Content.HIDDEN:
            return torch.zeros(0, 0), (0,)  # as many as stand before it, see `counted`
        name = self.field_of(spec)
        if port.content == Content.CODES:
            codes = self._array(name, values, sample)
            return torch.from_numpy(codes.astype(np.int64)).reshape(-1), tuple(codes.shape)
        if port.content == Content.LATENTS:
            if port.autoencoder:
                latents = torch.from_numpy(self._array(name, values, sample).astype(np.float32))
            else:
                latents = to_tensor(self._picture(port, self._array(name, values, sample)))
            grid = (latents.shape[1] // port.patch_size, latents.shape[2] // port.patch_size)
            return patchify(latents, port.patch_size), grid
        encoder = self.encoders[port.encoder]
        if features_field(spec.field, port.encoder) in values:  # another task of the recipe wrote them
            features = torch.from_numpy(values[features_field(spec.field, port.encoder)])
            return features, (features.shape[0],)
        if values is sample.fields and (sample.key, spec.port, spec.field) in self.features:
            features = self.features[sample.key, spec.port, spec.field]
            return features, (features.shape[0],)
        picture = self.picture(spec.port, self._array(spec.field, values, sample))
        return picture, (encoder.config.num_tokens(picture.shape[1], picture.shape[2]),)

    def picture(self, port: str, image: np.ndarray) -> Tensor:
        """A uint8 picture through a port's view: float (3, H, W) in [-1, 1], as the port's encoder is shown it."""
        return to_tensor(self._picture(self.recipe.ports[port], image))

    def _picture(self, port: Port, image: np.ndarray) -> np.ndarray:
        return port.view.apply(image) if port.view is not None else image

    def _array(self, name: str, values: Mapping[str, Any], sample: Sample) -> np.ndarray:
        if name not in values:
            base = name.split(".")[0]
            hint = (
                f"`mmgen tokenize` writes '{name}' from '{base}'"
                if "." in name and base in values
                else f"this sample has: {', '.join(sorted(values))}"
            )
            raise MissingField(f"{sample.source or sample.key}: the field '{name}' is missing", hint=hint)
        return values[name]

    def _ids(self, spec: SegmentSpec, port: Port, values: Mapping[str, Any], sample: Sample, *, empty: bool) -> list[int]:
        """Literals may hold special tokens, fields never do; each piece is tokenized on its own, so a mask can never be off by one."""
        tokenizer = self.tokenizers[port.tokenizer]
        ids: list[int] = []
        for place, piece in enumerate(PLACEHOLDER.split(spec.text) if spec.text else ("", f"{{{spec.field}}}")):
            if not piece:
                continue
            if place % 2:
                name = piece[1:-1]
                if empty:
                    continue
                if values is sample.fields and f"{name}.ids" in values and self.written_ids.get(f"{name}.ids") == port.tokenizer:
                    ids += self._written(tokenizer, name, values, sample)
                else:
                    ids += self._field_ids(tokenizer, name, values, sample)
                continue
            known = (port.tokenizer, piece)
            if known not in self._literals:
                self._literals[known] = tokenizer.encode(piece, special=True)
            ids += self._literals[known]
        return ids

    def _written(self, tokenizer: TextTokenizer, name: str, values: Mapping[str, Any], sample: Sample) -> list[int]:
        """The ids that stand in the shards. The text, where it is there too, is tokenized again if they are none of a text."""
        ids: list[int] = values[f"{name}.ids"].tolist()
        if tokenizer.is_text(ids):
            return ids
        if name not in values:
            raise DataError(
                f"{sample.source or sample.key}: '{name}.ids' holds ids of special tokens or outside the vocabulary, which no text has",
                hint=f"`mmgen tokenize` writes it anew from '{name}'",
            )
        return self._field_ids(tokenizer, name, values, sample)

    def _field_ids(self, tokenizer: TextTokenizer, name: str, values: Mapping[str, Any], sample: Sample) -> list[int]:
        if name not in values:
            raise MissingField(
                f"{sample.source or sample.key}: the field '{name}' is missing", hint=f"this sample has: {', '.join(sorted(values))}"
            )
        value = values[name]
        if isinstance(value, list):
            if not value:
                raise MissingField(f"{sample.source or sample.key}: the list '{name}' is empty")
            value = value[(self._turn + zlib.crc32(sample.key.encode())) % len(value)]
        if not isinstance(value, str):
            raise MissingField(f"{sample.source or sample.key}: '{name}' holds {type(value).__name__}, expected text")
        known = self._texts.get((tokenizer, value))
        if known is None:
            known = tokenizer.encode(value)
            if len(self._texts) < TEXTS_KEPT and len(value) <= LONG_TEXT:
                self._texts[tokenizer, value] = known
        return known

    def at_epoch(self, epoch: int) -> None:
        """List fields give one entry an epoch, each in its turn, beginning where the sample's key says."""
        self._turn = epoch


def features_field(field: str, encoder: str) -> str:
    """The name of the features that a task writes for another to go on with."""
    return f"{field}.{encoder}-features"


def counted(hidden: Segment, before: Iterable[Segment]) -> Segment:
    """A segment of hidden rows with as many tokens as there are rows before it that it reads."""
    length = max(0, sum(len(segment) for segment in before if segment.port in hidden.of) - hidden.skip)
    return replace(hidden, payload=torch.zeros(length, 0), grid=(length,))


def with_ends(picture: Segment, end: Segment) -> list[Segment]:
    """A picture's codes row by row, each row with the marker of its end."""
    width = picture.grid[-1]
    rows = [replace(picture, payload=row, grid=(width,), merge=end.merge) for row in picture.payload.split(width)]
    rows[0] = replace(rows[0], merge=picture.merge)
    return [part for row in rows for part in (row, end)]


def split_scales(picture: Segment, quantizer: Any) -> list[Segment]:
    """A square picture's codes scale by scale, coarse to fine: blocks of their own, each sees itself and all before it (VAR, section 3.2)."""
    grids = quantizer.grids(*quantizer.square_grid(len(picture)))
    payloads = picture.payload.split([rows * columns for rows, columns in grids])
    scales = enumerate(zip(payloads, grids, strict=True))
    return [replace(picture, payload=payload, grid=grid, scale=number) for number, (payload, grid) in scales]


def opened(segments: list[Segment], rest: list[SegmentSpec]) -> list[Segment]:
    """The segments of a prompt, with its last block plain causal where what is to be written belongs to it: nothing comes after, so
    there is nobody to be isolated from, and what is written may be laid out as a block of its own."""
    place = len(segments)
    if rest and rest[0].merge:
        while place and segments[place - 1].mask == MaskKind.ISOLATED_CAUSAL:
            place -= 1
            if not segments[place].merge:
                break
    return segments[:place] + [replace(segment, mask=MaskKind.CAUSAL) for segment in segments[place:]]
