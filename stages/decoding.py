"""Writing with a trained model: a batch of samples goes on from its prompts, token by token, code by code, or picture by picture.

A `Session` holds the rows of the key/value cache. Guidance runs as more rows of the same batch, one copy of each sample for each
pass. Every block the model writes is laid out by the same planner and `pack` as in training, so masks,
positions, markers and experts cannot differ. Denoising steps and rounds of masked decoding run over the cached prefix and leave no
trace; the finished block is then committed clean, by a pass of its own, before anything is written after it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stages.errors import GuardError, RecipeError
from stages.model import Model
from stages.parts.backbones import Arrangement, KeyValueCache, Transformer
from stages.parts.heads.linear import LinearHead
from stages.parts.layers import unpatchify
from stages.parts.packed import pack_linears
from stages.parts.samplers import (
    AutoregressiveConfig,
    DenoiseSamplerConfig,
    Guide,
    MaskedConfig,
    MaskedDenoiseSamplerConfig,
    NextScaleSamplerConfig,
    RegressSamplerConfig,
    SamplerConfig,
    sample_denoised,
    sample_masked_latents,
)
from stages.parts.samplers.noise import sample_generator, sample_normals, sample_uniforms
from stages.parts.schedules import NOISE_SCHEDULES
from stages.recipe import SegmentSpec
from stages.sequence.pack import Cursor, continue_rows
from stages.sequence.plan import PLACEHOLDER, Planner
from stages.sequence.segment import Batch, Layout, PortRows, Segment

UNIFORMS = 64  # random numbers drawn ahead for each sample, so that a decode step draws none
FEW_ROWS = 8  # so few rows are decoded by one thread
LARGEST_PACKED = 2**30  # bytes of weights
WINDOW = 32  # columns whose masks and rotations are made at once, so that a decode step makes none


@dataclass
class Prompt:
    """One sample to be written: `passes` are its contexts, one for each guidance pass; its key and stream decide its random numbers."""

    key: str
    stream: str
    passes: list[list[Segment]]
    joins: str | None = None  # in whose table what is written first belongs to the block before it, which sees itself whole


@dataclass
class Stand:
    """How far the rows of one network have come: its cache, a cursor a row, and the hidden row after each row's last token."""

    cache: KeyValueCache
    cursors: list[Cursor]
    last: Tensor


class Session:
    """A batch of prompts being continued. Rows are pass-major: row p · b + i is pass p of sample i."""

    def __init__(self, model: Model, planner: Planner, prompts: Sequence[Prompt], guide: Guide, capacity: int, seed: int) -> None:
        self.model, self.planner, self.guide, self.prompts, self.seed = model, planner, guide, prompts, seed
        self.num_written = 0
        self.b, self.passes = len(prompts), len(guide.drops)
        self.device = next(model.parameters()).device
        rows = [prompts[i].passes[p] for p in range(self.passes) for i in range(self.b)]
        self.networks = list(model.recipe.backbones) if len(model.recipe.backbones) > 1 else [""]
        self.network = self.networks[0]  # the one that is being written with
        self.stands = {name: self._stand(name, rows, capacity) for name in self.networks}
        self.between = {port for other in model.recipe.ports.values() for port in other.of}
        self.kept: list[list[tuple[str, Tensor]]] = [[] for _ in rows]  # hidden rows that another network reads, by port
        closed, self.open = split_open(rows, prompts[0].joins)
        self.write(closed)

    # the networks

    def _stand(self, name: str, rows: Sequence[Sequence[Segment]], capacity: int) -> Stand:
        network = self.model.network(name)
        cursors = [Cursor() for _ in rows]
        width = max(sum(len(segment) for segment in row if segment.network == name) for row in rows)
        empty, _ = continue_rows([[] for _ in rows], cursors)
        dtype = next(network.parameters()).dtype
        cache = KeyValueCache(network.config, empty.layout.to(self.device), width + capacity, dtype)
        return Stand(cache, cursors, torch.zeros(len(rows), network.config.width, device=self.device))

    @property
    def backbone(self) -> Transformer:
        return self.model.network(self.network)

    @property
    def cache(self) -> KeyValueCache:
        return self.stands[self.network].cache

    @property
    def cursors(self) -> list[Cursor]:
        return self.stands[self.network].cursors

    @cursors.setter
    def cursors(self, cursors: list[Cursor]) -> None:
        self.stands[self.network].cursors = cursors

    @property
    def last(self) -> Tensor:
        return self.stands[self.network].last

    @last.setter
    def last(self, last: Tensor) -> None:
        self.stands[self.network].last = last

    def write(self, rows: Sequence[Sequence[Segment]]) -> None:
        """Append given segments, a list for each row, and remember the hidden row after them. Networks take their own, in their order."""
        writing = self.network
        for name in self.networks:
            self.network = name
            self._write_own([[segment for segment in row if segment.network == name] for row in rows])
        self.network = writing

    def _write_own(self, rows: Sequence[Sequence[Segment]]) -> None:
        batch, moved = self.lay_out(rows)
        if not batch.layout.shape[1]:
            return
        hidden = self.model.hidden(batch, self.cache, network=self.network)
        self.cache.commit(batch.layout)
        self.last = self._last_of(hidden, rows)
        self.cursors = moved
        self._keep(hidden, rows)

    def _last_of(self, hidden: Tensor, rows: Sequence[Sequence[Segment]]) -> Tensor:
        """The hidden row after each row's last token, of those that have any."""
        lengths = torch.tensor([sum(len(segment) for segment in row) for row in rows], device=self.device)
        ends = (lengths - 1).clamp_min(0)[:, None, None].expand(-1, 1, hidden.shape[2])
        return torch.where((lengths > 0)[:, None], hidden.gather(1, ends).squeeze(1), self.last)

    # between networks

    def lay_out(self, rows: Sequence[Sequence[Segment]]) -> tuple[Batch, list[Cursor]]:
        """Segments of the network at hand behind what it has; hidden rows of others are those that were kept."""
        read = [[self._filled(segment, kept) for segment in row] for row, kept in zip(rows, self.kept, strict=True)]
        batch, moved = continue_rows(read, self.cursors)
        return batch.to(self.device), moved

    def _filled(self, segment: Segment, kept: Sequence[tuple[str, Tensor]]) -> Segment:
        if not segment.of:
            return segment
        rows = torch.cat([rows for port, rows in kept if port in segment.of])[segment.skip :]
        rows = rows[: len(segment)] if len(segment) else rows  # a segment of the prompt reads what stood before it there
        return replace(segment, payload=rows, grid=(len(rows),))

    def _keep(self, hidden: Tensor, rows: Sequence[Sequence[Segment]]) -> None:
        for row, segments in enumerate(rows):
            start = 0
            for segment in segments:
                if segment.port in self.between:
                    self.kept[row].append((segment.port, hidden[row, start : start + len(segment)]))
                start += len(segment)

    def repeat(self, rows: Sequence[Sequence[Segment]]) -> list[Sequence[Segment]]:
        """One list a sample → one list a row: every guidance pass is given the same."""
        return list(rows) * self.passes

    def generators(self) -> list[Generator]:
        """Fresh random numbers for the next thing to be written, one stream a sample: no sample's depend on how long others were."""
        self.num_written += 1
        return [sample_generator(self.seed, prompt.key, prompt.stream, self.num_written) for prompt in self.prompts]

    def guided(self, output: Tensor, t: float | None = None) -> Tensor:
        """(passes · b, ...) predictions → (b, ...) guided ones. GuardError where they are not finite."""
        return finite(self.guide.combine(output.chunk(self.passes)[: len(self.guide.passes(t))]))

    # text

    def write_text(
        self, spec: SegmentSpec, sampler: AutoregressiveConfig, *, stop: Sequence[int], switch: Sequence[int] = (), guide: bool = True
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids for each sample until a token of `stop` or `switch`, or max_tokens; and the token each sample ended with, or -1.

        A stop token joins the context but is not returned; a switch token (the marker of a picture) does neither: who writes the
        picture writes its marker. Passes that drop the segment's group do not see it. Without `guide` the full condition decides.
        """
        self.network = self.model.table_of(spec.port)
        generators = self.generators()
        self.cache.reserve(self._text_layout(spec.port, sampler.max_tokens))
        columns = self._columns(sampler.max_tokens)
        sees = torch.tensor([spec.group not in drop for drop in self.guide.drops for _ in range(self.b)], device=self.device)
        written: list[list[int]] = [[] for _ in self.prompts]
        ended, steps = [-1] * self.b, [0] * self.b
        living = list(range(self.b))
        on = self._keep_rows(living, sees)
        with threads_for(self.b * self.passes):
            for place in range(sampler.max_tokens):
                if place % UNIFORMS == 0:
                    uniforms = sample_uniforms(generators, (UNIFORMS,), device=self.device)
                logits = self.model.predict(spec.port, self.last if guide else self.last[: self.b])
                ids = sampler.choose(self.guided(logits) if guide else finite(logits), uniforms[:, place % UNIFORMS])
                tokens = ids.tolist()
                stopping = [i for i in living if tokens[i] in stop or tokens[i] in switch]
                joining = [i for i in living if tokens[i] not in switch]
                for i in stopping:
                    ended[i] = tokens[i]
                if not joining:
                    break
                if len(joining) < len(living):
                    on = self._keep_rows(joining, sees)
                self._step(spec.port, ids, next(columns), on)
                for i in joining:
                    steps[i] += 1
                if stopping:
                    living = [i for i in living if i not in stopping]
                    on = self._keep_rows(living, sees)
                for i in living:
                    written[i].append(tokens[i])
                if not living:
                    break
        moved = [n if seen else 0 for n, seen in zip(steps * self.passes, sees.tolist(), strict=True)]
        self.cursors = [Cursor(c.index + n, c.block + (n > 0), c.clock + n) for c, n in zip(self.cursors, moved, strict=True)]
        return written, ended

    def _keep_rows(self, samples: Sequence[int], sees: Tensor) -> Tensor:
        """Bool (rows,): those of `samples`, in passes that see the text. From here on the columns of all others are padding."""
        on = torch.zeros(self.b, dtype=torch.bool)
        on[list(samples)] = True
        rows = on.to(self.device).repeat(self.passes) & sees
        self.cache.end_rows(~rows)
        return rows

    def _columns(self, count: int) -> Iterator[Arrangement]:
        """The next `count` reserved columns, to be passed one by one; prepared a window at a time."""
        for start in range(0, count, WINDOW):
            yield from self.backbone.arrange_columns(self.cache, min(WINDOW, count - start))

    def _step(self, name: str, ids: Tensor, column: Arrangement, on: Tensor, place: Tensor | None = None) -> None:
        """One more token of each sample joins every pass; rows that are not `on` keep their last hidden row. `place` (d,) is added."""
        ids = ids.repeat(self.passes) if self.passes > 1 else ids
        vectors = self.model.embed_ids(name, ids)
        self._join(vectors if place is None else vectors + place, column, on)

    def _join(self, vectors: Tensor, column: Arrangement, on: Tensor) -> None:
        """One more vector (rows, d) in every row."""
        hidden = self.backbone(vectors.unsqueeze(1), column, self.cache)
        self.cache.advance()
        self.last = torch.where(on[:, None], hidden.squeeze(1), self.last)

    def _text_layout(self, name: str, length: int) -> Layout:
        """Where `length` more tokens of text stand in every row: one causal block."""
        index, block, clock = (
            torch.tensor([getattr(c, name) for c in self.cursors], device=self.device)[:, None] for name in ("index", "block", "clock")
        )
        ahead = torch.arange(length, device=self.device)
        rows = torch.arange(len(self.cursors), device=self.device)  # as continue_rows numbers them
        shape = (len(self.cursors), length)
        return Layout(
            sample_id=rows[:, None].expand(shape),
            block_id=(block + 1).expand(shape),
            index=index + ahead,
            full=torch.zeros(shape, dtype=torch.bool, device=self.device),
            isolated=torch.zeros(shape, dtype=torch.bool, device=self.device),
            positions=(clock + ahead)[:, :, None].expand(*shape, 3),
            expert_id=torch.full(shape, self.planner.expert_of(name), device=self.device),
            port_number=torch.full(shape, self.planner.port_number(name), device=self.device),
            hidden_from=torch.zeros(shape, dtype=torch.int64, device=self.device),
        )

    def stop_token(self, spec: SegmentSpec) -> int | None:
        """The token that ends a text segment: the first of the literal after its last field, if there is one."""
        tokenizer = self.planner.tokenizers[self.model.recipe.ports[spec.port].tokenizer]
        tail = PLACEHOLDER.split(spec.text)[-1] if spec.text else ""
        return tokenizer.encode(tail, special=True)[0] if tail else None

    # pictures

    def write_picture(
        self, spec: SegmentSpec, sampler: SamplerConfig, grid: tuple[int, ...], active: Sequence[bool], *, commit: bool
    ) -> Tensor:
        """Codes int64 (b, *grid), latents (b, c, H, W) or features (b, l, d) for each sample; rows of inactive samples mean nothing.

        commit: something is written after it, so the clean block joins the context, unless later blocks do not see it.
        """
        self.network = self.model.table_of(spec.port)
        port = self.model.recipe.ports[spec.port]
        length = math.prod(grid)
        channels = None if port.is_ids else self.model.content_dim(port)
        payload = torch.zeros(length, dtype=torch.int64) if channels is None else torch.zeros(length, channels)
        parts = self.planner.block(spec, payload, grid)
        if port.markers.row and isinstance(sampler, AutoregressiveConfig):
            return self._codes_row_by_row(spec.port, sampler, parts, active, commit=commit).reshape(self.b, *grid)
        if isinstance(sampler, NextScaleSamplerConfig):
            return self._codes_by_scale(spec.port, sampler, parts, active, commit=commit).reshape(self.b, *grid)
        core = next(part for part in parts if part.port == spec.port)
        before, after = parts[: parts.index(core)], parts[parts.index(core) + 1 :]
        joint = any(self.open) or (bool(before) and core.merge and core.mask != "causal")  # inside a block that sees itself whole
        if before and not joint:
            self.write(self.repeat([before if on else [] for on in active]))
        block = [*before, core, *after] if joint else [core]
        rows = self.repeat([block if on else [] for on in active])
        rows, self.open = [[*given, *row] for given, row in zip(self.open, rows, strict=True)], [[] for _ in rows]
        batch, moved = self.lay_out(rows)
        if isinstance(sampler, AutoregressiveConfig) and channels is not None:
            content = self._features_in_order(spec.port, batch, length, active)
        elif isinstance(sampler, AutoregressiveConfig):
            content = self._codes_in_order(spec.port, sampler, batch, length, active)
        elif isinstance(sampler, MaskedDenoiseSamplerConfig):
            content = self._latents_in_rounds(spec.port, sampler, batch, length, active)
        elif isinstance(sampler, MaskedConfig):
            content = self._codes_in_rounds(spec.port, sampler, batch, length, active)
        elif isinstance(sampler, RegressSamplerConfig):
            content = self._features(spec.port, batch, length, active)
        elif isinstance(sampler, DenoiseSamplerConfig):
            content = self._latents(spec.port, sampler, batch, length, active)
        else:
            raise RecipeError(f"sample.{spec.port}.sampler: '{sampler.kind}' does not draw pictures")
        if commit:
            if isinstance(sampler, AutoregressiveConfig):
                self.cursors = moved
            elif not core.mask.is_isolated:
                self._commit(spec.port, batch, content, active, rows)
                self.cursors = moved
            if after and not joint:
                self.write(self.repeat([after if on else [] for on in active]))
        if channels is None:
            return content.reshape(self.b, *grid)
        finite(content)
        if port.encoder:
            return content.reshape(self.b, length, -1)
        return unpatchify(content.reshape(self.b, length, -1), (grid[0], grid[1]), port.patch_size)

    def _codes_in_order(self, name: str, sampler: AutoregressiveConfig, batch: Batch, length: int, active: Sequence[bool]) -> Tensor:
        """One code after another, each drawn from the port's own ids only."""
        on = torch.tensor(list(active), device=self.device).repeat(self.passes)
        uniforms = sample_uniforms(self.generators(), (length,), device=self.device)
        placed = self.model.recipe.ports[name].grid_embedding != "none"
        places = self.model.embed_places(name, batch.ports[name].grids[:1]).to(self.last) if placed else None
        self.cache.reserve(batch.layout)
        codes: list[Tensor] = []
        with threads_for(self.b * self.passes):
            for place, column in enumerate(self._columns(length)):
                logits = self.guided(self.model.predict(name, self.last))
                codes.append(sampler.choose(logits, uniforms[:, place]))
                self._step(name, codes[-1], column, on, None if places is None else places[place])
        return torch.stack(codes, dim=1)

    def _features_in_order(self, name: str, batch: Batch, length: int, active: Sequence[bool]) -> Tensor:
        """One feature after another (b, n, d), each fed back through the port's connector."""
        on = torch.tensor(list(active), device=self.device).repeat(self.passes)
        module: Any = self.model.ports[name]
        self.cache.reserve(batch.layout)
        features: list[Tensor] = []
        with threads_for(self.b * self.passes):
            for column in self._columns(length):
                features.append(self.guided(self.model.predict(name, self.last)))
                self._join(module.connector(features[-1].repeat(self.passes, 1)), column, on)
        return torch.stack(features, dim=1)

    def _codes_row_by_row(
        self, name: str, sampler: AutoregressiveConfig, parts: Sequence[Segment], active: Sequence[bool], *, commit: bool
    ) -> Tensor:
        """Codes (b, n) of a picture whose rows are known to end where they end: their markers are given, only codes are drawn."""
        last = max(place for place, part in enumerate(parts) if part.port == name)
        rows: list[Tensor] = []
        for part in parts if commit else parts[: last + 1]:
            given = self.repeat([[part] if on else [] for on in active])
            if part.port != name:
                self.write(given)
                continue
            batch, moved = continue_rows(given, self.cursors)
            rows.append(self._codes_in_order(name, sampler, batch.to(self.device), len(part), active))
            self.cursors = moved
        return torch.cat(rows, dim=1)

    def _codes_by_scale(
        self, name: str, sampler: NextScaleSamplerConfig, parts: Sequence[Segment], active: Sequence[bool], *, commit: bool
    ) -> Tensor:
        """Codes (b, n): one pass a scale, which reads the sum of the scales before it and is kept, for training reads the same."""
        quantizer = self.model.quantizer_of(name)
        scales = [part for part in parts if part.port == name]
        total = quantizer.codebook.new_zeros(self.b, quantizer.config.dim, *scales[-1].grid)
        uniforms = sample_uniforms(self.generators(), (sum(map(len, scales)),), device=self.device)
        uniforms_of = uniforms.split([len(scale) for scale in scales], dim=1)
        on = torch.tensor(list(active), device=self.device).repeat(self.passes)
        codes: list[Tensor] = []
        for part in parts:
            given = self.repeat([[part] if on else [] for on in active])
            if part.port != name:
                if commit or not codes:
                    self.write(given)
                continue
            batch, self.cursors = continue_rows(given, self.cursors)
            batch = batch.to(self.device)
            maps = self._rows_of(quantizer.map_for(total, (part.grid[0], part.grid[1])), active)
            rows = with_values(batch.ports[name], maps, None)
            hidden = self.model.hidden(replace(batch, ports={name: rows}), self.cache, network=self.network)
            self.cache.commit(batch.layout)
            self.last = torch.where(on[:, None], hidden[:, -1], self.last)
            logits = self.model.predict(name, hidden.flatten(0, 1).index_select(0, rows.rows))
            logits = logits.reshape(-1, len(part), logits.shape[1])
            guided = torch.lerp(logits.chunk(self.passes)[0], self.guided(logits), sampler.strength(part.scale, len(scales)))
            codes.append(sampler.choose(self._per_sample(guided, active), uniforms_of[part.scale]))
            total = total + quantizer.part(codes[-1], part.scale, (part.grid[0], part.grid[1]), (total.shape[2], total.shape[3]))
        return torch.cat(codes, dim=1)

    def _codes_in_rounds(self, name: str, sampler: MaskedConfig, batch: Batch, length: int, active: Sequence[bool]) -> Tensor:
        """Parallel decoding: each round sees the whole block over the cached prefix."""
        mask_id = self.model.slices[name].size
        places = self._places(batch)

        def predict(codes: Tensor, hidden: Tensor) -> Tensor:
            values = torch.where(hidden, torch.full_like(codes, mask_id), codes)
            output = self._run_block(name, batch, places, self._rows_of(values, active), None)
            return self._per_sample(self.guided(output.reshape(-1, length, output.shape[-1])), active)

        return sampler.sample(predict, length, self.generators(), device=self.device)

    def _latents(self, name: str, sampler: DenoiseSamplerConfig, batch: Batch, length: int, active: Sequence[bool]) -> Tensor:
        """Denoising: only the block runs, the prefix is read from the cache."""
        objective: Any = self.model.recipe.ports[name].objective
        channels = batch.ports[name].values.shape[1]
        generators = self.generators()
        noise = sample_normals(generators, (length, channels), like=self.last)
        places = self._places(batch)

        def denoise(noisy: Tensor, t: float) -> Tensor:
            output = self._run_block(name, batch, places, self._rows_of(noisy, active), t)
            return self._per_sample(self.guided(output.reshape(-1, length, channels), t), active)

        schedule = NOISE_SCHEDULES[objective.schedule]
        return sample_denoised(
            sampler, denoise, noise, schedule, objective.predict, timestep_shift=objective.timestep_shift, generators=generators
        )

    def _features(self, name: str, batch: Batch, length: int, active: Sequence[bool]) -> Tensor:
        """What stands at placeholders, in one pass."""
        numbers = torch.arange(length, device=self.device).repeat(self.b, 1)
        output = self._run_block(name, batch, self._places(batch), self._rows_of(numbers, active), None)
        return self._per_sample(self.guided(output.reshape(-1, length, output.shape[-1])), active)

    def _latents_in_rounds(
        self, name: str, sampler: MaskedDenoiseSamplerConfig, batch: Batch, length: int, active: Sequence[bool]
    ) -> Tensor:
        """Masked autoregression: each round sees the whole block over the cached prefix, then the port's head denoises alone."""
        objective: Any = self.model.recipe.ports[name].objective
        head: Any = self.model.ports[name].head
        places = self._places(batch)

        def condition(latents: Tensor, hidden: Tensor) -> Tensor:
            rows = replace(with_values(batch.ports[name], self._rows_of(latents, active), None), hidden=self._rows_of(hidden, active))
            z = self.model.conditions(name, rows, self._block_rows(batch, places, name, rows))
            each = z.reshape(self.passes, -1, length, z.shape[1]).unbind(0)
            return torch.stack([self._per_sample(own, active) for own in each])

        def denoise(noisy: Tensor, t: float, *, z: Tensor, share: float) -> Tensor:
            rows = noisy.flatten(0, 1).repeat(self.passes, 1)
            levels = torch.full((len(rows),), t, device=rows.device)
            output = head(rows, levels, z.flatten(0, 2)).reshape(-1, *noisy.shape[1:])
            return torch.lerp(output[: self.b], self.guided(output, t), share)

        return sample_masked_latents(
            sampler,
            condition,
            denoise,
            (length, batch.ports[name].values.shape[1]),
            NOISE_SCHEDULES[objective.schedule],
            objective.predict,
            self.generators(),
            like=self.last,
            timestep_shift=objective.timestep_shift,
        )

    def _rows_of(self, values: Tensor, active: Sequence[bool]) -> Tensor:
        """(b, n, ...) per sample → (rows that own tokens, ...) in table order, once for every pass."""
        on = values[torch.tensor(list(active), device=values.device)]
        return torch.cat([on.flatten(0, 1)] * self.passes)

    def _per_sample(self, output: Tensor, active: Sequence[bool]) -> Tensor:
        """(active samples, n, ...) → (b, n, ...); zeros where a sample does not take part."""
        if all(active):
            return output
        full = output.new_zeros(self.b, *output.shape[1:])
        full[torch.tensor(list(active), device=output.device)] = output
        return full

    def _places(self, batch: Batch) -> Arrangement:
        """What all passes over one block share."""
        return self.backbone.arrange(batch.layout, self.cache, self.cache.keys[0].dtype)

    def _run_block(self, name: str, batch: Batch, places: Arrangement, values: Tensor, t: float | None) -> Tensor:
        """One uncommitted pass over a block with other values in its port's rows: predictions (rows, ...) of that port."""
        rows = with_values(batch.ports[name], values, t)
        written = rows.target.nonzero().squeeze(1)  # a given picture of the same port may stand in the block
        hidden = self._block_rows(batch, places, name, rows).index_select(0, written)
        return self.model.predict(name, hidden, rows=rows, picked=written)

    def _block_rows(self, batch: Batch, places: Arrangement, name: str, rows: PortRows) -> Tensor:
        """The hidden rows (rows, d) of one port in an uncommitted pass over a block that shows these `rows` of it."""
        shown = replace(batch, ports={**batch.ports, name: rows})
        vectors, noise = self.model.embed(shown, self.network), self.model.noise(shown, self.network)
        hidden = self.backbone(vectors, places, self.cache, noise=noise)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.rows)

    def _commit(self, name: str, batch: Batch, content: Tensor, active: Sequence[bool], written: Sequence[Sequence[Segment]]) -> None:
        rows = with_values(batch.ports[name], self._rows_of(content.reshape(self.b, -1, *batch.ports[name].values.shape[1:]), active), 0.0)
        hidden = self.model.hidden(replace(batch, ports={**batch.ports, name: rows}), self.cache, network=self.network)
        self.cache.commit(batch.layout)
        self.last = self._last_of(hidden, written)


def finite(predicted: Tensor) -> Tensor:
    """The same, for nothing is drawn from NaN or infinity: GuardError."""
    if not predicted.sum(dtype=torch.float32).isfinite() and not predicted.isfinite().all():  # a sum takes a tenth of the time
        raise GuardError(
            "the model predicts NaN or infinity, and nothing can be drawn from that",
            hint="a lower guidance_scale or --dtype fp32 may help; else the training has failed, and an earlier checkpoint is needed",
        )
    return predicted


def split_open(rows: Sequence[Sequence[Segment]], network: str | None) -> tuple[list[list[Segment]], list[list[Segment]]]:
    """Each row's segments without the last block of one network, and that block: it cannot be run before the rest of it is there."""
    closed, last = [], []
    for row in rows:
        own = [place for place, segment in enumerate(row) if segment.network == network]
        count = next((n + 1 for n, place in enumerate(reversed(own)) if not row[place].merge), len(own))
        block = own[len(own) - count :]
        closed.append([segment for place, segment in enumerate(row) if place not in block])
        last.append([row[place] for place in block])
    return closed, last


def with_values(rows: PortRows, values: Tensor, t: float | None) -> PortRows:
    """The same tokens, those that are written showing other values, at noise level t. What is given stays as it is, and clean."""
    written = rows.target.nonzero().squeeze(1)
    if len(written) < len(rows.rows):
        values = rows.values.index_copy(0, written, values.to(rows.values.dtype))
    timestep = None if t is None else torch.zeros(len(rows.rows), device=values.device).index_fill(0, written, t)
    return replace(rows, values=values, timestep=timestep)


@contextlib.contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """One thread for decode steps of few rows, all of them for more; the number is restored at the end.

    The work of such a step is shorter than waking a second thread: measured with two cores, one thread decodes one row as fast to
    1.5 times as fast as two, four rows up to 2.5 times (most where OMP_WAIT_POLICY is PASSIVE), and leaves the other core free.
    """
    before = torch.get_num_threads()
    if rows <= FEW_ROWS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def store_by_column(model: Model) -> Model:
    """Keep every wide matrix (more outputs than inputs) column by column in memory, for sampling on a CPU. Values do not change.

    A decode step multiplies few rows, so it waits for weights, and the products run along their memory: 1.2 to 2.4 times as fast
    for one row, the same for many.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | LinearHead) and isinstance(weight, nn.Parameter) and weight.shape[0] > weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()
    return model


def prepare(model: Model) -> Model:
    """Lay the weights of a model that will only answer on a CPU out for its products: by column for one row, packed for several.

    A packed weight is a second copy, so that only networks are packed whose copy is small beside what a machine has.
    """
    store_by_column(model)
    if sum(parameter.nbytes for parameter in model.parameters()) <= LARGEST_PACKED:
        for backbone in model.backbones.values():
            pack_linears(backbone)
        for module in model.modules():
            if isinstance(module, LinearHead):
                module.pack()
    return model
