"""The central types: what a sample looks like to a model.

A *port* (a table of the recipe) says how one network reads or writes one representation; a *segment* is one instance of it
in one sample. A `Sequence` is a list of segments. `pack` lays several sequences out as a `Batch`, a table with one line per
token, and everything that depends on places (who sees whom, positions, experts, losses) is a pure function of that table.

Shape letters: b rows of the batch, l row length, n tokens of one port, s segments, d width, c channels, h w grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Self, TypeVar

import torch
from torch import Tensor


class Content(StrEnum):
    """How a port represents what it carries."""

    TOKEN_IDS = "token-ids"
    CODES = "codes"
    LATENTS = "latents"
    FEATURES = "features"
    QUERIES = "queries"  # learned rows, from no field
    HIDDEN = "hidden"  # rows that another network made of what stands before


class Role(StrEnum):
    """A segment is given, or it is to be predicted."""

    CONTEXT = "context"
    TARGET = "target"


class MaskKind(StrEnum):
    """How a segment sees itself (its past, or all of itself), and whether later blocks may see it.

    isolated: all of itself, and later blocks do not (noised copies of a picture). isolated-causal: its past, and later blocks do not
    (several questions about one picture, each as if it were the only one).
    """

    CAUSAL = "causal"
    FULL = "full"
    ISOLATED = "isolated"
    ISOLATED_CAUSAL = "isolated-causal"

    @property
    def sees_whole(self) -> bool:
        return self in (MaskKind.FULL, MaskKind.ISOLATED)

    @property
    def is_isolated(self) -> bool:
        return self in (MaskKind.ISOLATED, MaskKind.ISOLATED_CAUSAL)


class PositionKind(StrEnum):
    """One tick a token, one tick a segment, or rows and columns from the current tick."""

    SEQUENTIAL = "sequential"
    SHARED = "shared"
    GRID = "grid"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A span of one sample's sequence.

    payload: ids, codes or numbers of queries int64 (l,) · latents float (l, c) · features float (l, d), or pixels float (3, H, W) when
    the encoder runs inside the model · hidden rows float (l, 0): what another network makes of the ports it is `of`.
    `grid` has product l and is known before any encoder runs.
    """

    port: str
    payload: Tensor
    grid: tuple[int, ...]
    role: Role = Role.CONTEXT
    mask: MaskKind = MaskKind.CAUSAL
    positions: PositionKind = PositionKind.SEQUENTIAL
    expert: int = 0
    merge: bool = False  # same attention block as the previous segment
    weight: float = 1.0  # of each token's loss
    timestep_range: tuple[float, float] = (0.0, 1.0)
    field: str = ""  # where the payload came from, for drawings and reports
    group: str = ""  # condition-dropout group
    network: str = ""  # whose table its tokens stand in, where a recipe has several
    of: tuple[str, ...] = ()  # hidden rows: of every segment of these ports that stands before it
    skip: int = 0  # of those, so many at the front are left out
    advance: int = 0  # ticks the clock moves before this segment: a dropped condition that holds its time
    scale: int = 0  # which of the grids of a picture that is drawn scale by scale
    in_table: bool = True  # False: read by objectives only (contrastive towers), owns no row of the table
    timed: bool = False  # a row before its content says its noise level
    port_number: int = 0  # its port's place in the recipe
    hidden_from: int = 0  # bit n: rows of port n never see it

    def __len__(self) -> int:
        length = 1
        for side in self.grid:
            length *= side
        return length + self.timed


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sample as one task sees it."""

    key: str
    task: str
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments if segment.in_table)

    @property
    def num_targets(self) -> int:
        """Tokens that may be judged."""
        return sum(len(segment) - segment.timed for segment in self.segments if segment.role == Role.TARGET)


Table = TypeVar("Table", bound="TensorTable")


@dataclass
class TensorTable:
    """A dataclass of tensors: moved, pinned and printed by one loop over its fields."""

    def to(self: Table, device: torch.device | str) -> Table:
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return [(name, value) for name, value in pairs if isinstance(value, Tensor)]

    def __str__(self) -> str:
        return f"{type(self).__name__}(" + ", ".join(f"{name} {tuple(value.shape)}" for name, value in self._tensors()) + ")"


@dataclass
class Layout(TensorTable):
    """Where every token stands. All (b, l) but positions."""

    sample_id: Tensor  # int; which packed sample, -1 is padding
    block_id: Tensor  # int; attention block within the sample
    index: Tensor  # int; place within the sample, the order that `causal` means
    full: Tensor  # bool; sees its whole block
    isolated: Tensor  # bool; invisible to other blocks
    positions: Tensor  # int (b, l, 3); (t, h, w) for the rotary embedding
    expert_id: Tensor  # int; whose weights
    port_number: Tensor = field(default_factory=lambda: torch.zeros(0))  # int; whose rows, as `hidden_from` counts ports
    hidden_from: Tensor = field(default_factory=lambda: torch.zeros(0))  # int; bit n: rows of port n never see it

    def __post_init__(self) -> None:
        """Left out, the last two columns are zero: nothing is hidden from anybody."""
        if self.port_number.shape[:2] != self.sample_id.shape:
            self.port_number, self.hidden_from = torch.zeros_like(self.sample_id), torch.zeros_like(self.sample_id)

    @classmethod
    def padding(cls, b: int, length: int) -> Self:
        """A table (b, l) without any token."""
        return cls(
            sample_id=torch.full((b, length), -1),
            block_id=torch.full((b, length), -1),
            index=torch.arange(length).expand(b, length).clone(),  # padding has an index of its own, to see itself by
            full=torch.zeros(b, length, dtype=torch.bool),
            isolated=torch.zeros(b, length, dtype=torch.bool),
            positions=torch.zeros(b, length, 3, dtype=torch.int64),
            expert_id=torch.zeros(b, length, dtype=torch.int64),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.sample_id.shape[0], self.sample_id.shape[1]

    def columns(self, start: int, stop: int) -> Layout:
        """The same rows, columns [start, stop)."""
        return Layout(**{name: value[:, start:stop] for name, value in self._tensors()})

    def append(self, other: Layout) -> Layout:
        """The columns of `other` to the right of these."""
        theirs = dict(other._tensors())
        return Layout(**{name: torch.cat([value, theirs[name]], dim=1) for name, value in self._tensors()})


@dataclass
class PortRows(TensorTable):
    """Everything one port owns in a batch: n tokens of s segments, in table order.

    `values` are what the network is shown, `goal` what the loss compares its prediction with; an objective's `corrupt`
    turns the clean ones into both and says in `supervised` which tokens are judged. Token i is read at table row `read[i]`:
    the row before it for next-token prediction (-1 where there is none), its own row otherwise.
    """

    rows: Tensor  # int64 (n,); flat index into b·l
    previous: Tensor  # int64 (n,); flat index of the row before it in the same sample, -1 at the start
    values: Tensor  # (n,) ids · (n, c) vectors · (s, 3, H, W) pixels for the port's encoder · (s, l) ids outside the table
    target: Tensor  # bool (n,)
    weight: Tensor  # float (n,)
    segment: Tensor  # int64 (n,); which of the port's segments, 0..s-1
    timestep_range: Tensor  # float (s, 2)
    sample: Tensor  # int64 (s,); which sequence of the batch
    grids: list[tuple[int, ...]] = field(default_factory=list)
    scales: list[int] = field(default_factory=list)  # of each segment
    read: Tensor | None = None  # int64 (n,)
    goal: Tensor | None = None  # (n,) or (n, c)
    supervised: Tensor | None = None  # bool (n,)
    timestep: Tensor | None = None  # float (n,); 0 clean, 1 noise
    source: Tensor | None = None  # int64 (n,); hidden rows: the flat index in the other network's table that token i is
    hidden: Tensor | None = None  # bool (n,); shown as a learned vector
    memory: Tensor | None = None  # (n, w); what a connector keeps of each token for the head of its port
    lengths: Tensor | None = None  # int64 (s,); for ragged ids outside the table
    time_rows: Tensor | None = None  # int64 (s,); flat index of the row that says a segment's noise level

    def segment_sizes(self) -> Tensor:
        """Tokens in each segment, int64 (s,)."""
        return torch.bincount(self.segment, minlength=len(self.grids))

    def segment_times(self) -> Tensor:
        """The noise level of each segment, float (s,): that of its first token, 0 where none is said."""
        if self.timestep is None:
            return torch.zeros(len(self.grids), device=self.rows.device)
        sizes = self.segment_sizes()
        return self.timestep.index_select(0, sizes.cumsum(0) - sizes)

    def grids_of(self, picked: Tensor) -> list[tuple[int, ...]]:
        """The grids of the segments that the tokens `picked` belong to, in order."""
        return [self.grids[number] for number in torch.unique_consecutive(self.segment.index_select(0, picked)).tolist()]


@dataclass
class Batch:
    """Packed sequences: a table for each network (the only one is called ""), what each port owns of its network's, and which
    samples these are."""

    layouts: dict[str, Layout]
    ports: dict[str, PortRows]
    keys: tuple[str, ...]
    tasks: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        layouts = {name: layout.to(device) for name, layout in self.layouts.items()}
        return Batch(layouts, {name: rows.to(device) for name, rows in self.ports.items()}, self.keys, self.tasks)

    @property
    def layout(self) -> Layout:
        """The table of the first network, which of most recipes is the only one."""
        return next(iter(self.layouts.values()))

    @property
    def num_tokens(self) -> int:
        return sum(int((layout.sample_id >= 0).sum()) for layout in self.layouts.values())

    @property
    def padding(self) -> float:
        """Fraction of the tables' rows that hold no token."""
        total = sum(layout.sample_id.numel() for layout in self.layouts.values())
        return 1.0 - self.num_tokens / total if total else 0.0

    @property
    def num_supervised(self) -> int:
        return sum(int(rows.target.sum()) for rows in self.ports.values())
