"""A codebook that is learned: by gradient, or as the running mean of the latents each code won; codes that die are moved to new places.

Shared by `vq`, `residual` and `multi-scale`. With `decay` > 0 the codebook follows its latents (VQ-VAE, arXiv:1711.00937, appendix
A.1; exact k-means in the limit), otherwise a loss has to pull it. With `revive` (on unless it is 0), codes that win less than that
fraction of their fair share are moved onto latents of the batch that are badly served, drawn in proportion to their squared distance
as k-means++ draws its seeds; counts start at zero, so the first batches place the whole codebook.

Shape letters: n latents · d width · k codebook size.
"""

from types import EllipsisType

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from stages import ranks
from stages.parts.config import Below1, Size, Weight
from stages.parts.quantizers.quantizer import MAX_COUNTED, USAGE_DECAY, Quantizer, QuantizerConfig

BLOCK_NUMBERS = 1 << 21  # distances computed at once: 8 MB, which stay in the cache
MIN_BLOCK = 64  # latents, for the matrix product to be one
GROUP = 128  # codes among which the nearest is looked for together


class CodebookConfig(QuantizerConfig):
    """The settings of a learned codebook."""

    codebook_size: int = Field(default=1024, ge=2, le=MAX_COUNTED)
    codebook_dim: Size = 256
    commitment_weight: Weight = 0.25
    decay: Below1 = 0.0
    revive: Below1 = 0.01

    @property
    def size(self) -> int:
        return self.codebook_size

    @property
    def dim(self) -> int:
        return self.codebook_dim


class CodebookQuantizer(Quantizer):
    """Holds `codebook` (k, d), or (tables, k, d) where there are several, and lets it learn."""

    codebook: Tensor
    sums: Tensor

    def __init__(self, config: CodebookConfig, in_dim: int, tables: tuple[int, ...] = (), *, unit_length: bool = False) -> None:
        super().__init__(config, in_dim, tables)
        self.config: CodebookConfig = config
        self.unit_length = unit_length
        shape = (*tables, config.size, config.dim)
        codebook = (
            F.normalize(torch.randn(shape), dim=-1) if unit_length else torch.empty(shape).uniform_(-1 / config.size, 1 / config.size)
        )
        if config.decay:
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", torch.zeros(shape))  # running sum of the latents each code won
        else:
            self.codebook = nn.Parameter(codebook)

    @torch.no_grad()
    def learn(self, rows: Tensor, codes: Tensor, chosen: Tensor, generator: Generator | None, table: int | EllipsisType = ...) -> None:
        """Update the running counts, an EMA codebook, and codes that have died, from what one step moved (n, d) latents to, on all ranks."""
        won = self.won(rows, codes)
        if won is None:
            return
        size, decay = self.codebook_size, self.config.decay or USAGE_DECAY
        counts, codebook = self.counts[table], self.codebook[table]
        counts.lerp_(won, 1 - decay)
        if self.config.decay:
            sums = self.sums[table]
            sums.lerp_(ranks.summed(torch.zeros_like(sums).index_add_(0, codes, rows)), 1 - decay)
            # a code that wins nothing keeps its place: its sum and its count fade together
            mean = sums / counts.clamp(min=1e-12).unsqueeze(1)
            codebook.copy_(torch.where(counts.unsqueeze(1) > 1e-6, mean, codebook))
            if self.unit_length:
                codebook.copy_(F.normalize(codebook, dim=-1))
        if self.config.revive:
            if generator is None:
                raise ValueError("a codebook that revives dead codes draws them: quantize needs a generator while training")
            rows, badness = ranks.gathered_rows(rows), ranks.gathered_rows((rows - chosen).square().sum(1) + 1e-12)
            fair = won.sum() / size
            dead = (counts < self.config.revive * fair).unsqueeze(1)
            drawn = torch.multinomial(badness.to(generator.device), size, replacement=True, generator=generator)
            drawn = ranks.from_first(drawn)
            seeds = rows.index_select(0, drawn.to(rows.device))
            codebook.copy_(torch.where(dead, seeds, codebook))
            counts.copy_(torch.where(dead.squeeze(1), fair, counts))
            if self.config.decay:
                sums.copy_(torch.where(dead, seeds * fair, sums))


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """(n,) index of the nearest of (k, d) codes to each of (n, d) latents; of equally near ones, the first.

    |z - e|² = |z|² + 2 (|e|²/2 - z·e), and the first term does not matter, so one matrix product with a bias decides. It is done
    in blocks whose distances stay in the cache.
    """
    codes = len(codebook)
    group = min(GROUP, codes)
    padding = -codes % group  # codes at infinity fill up the last group
    bias = F.pad(codebook.square().sum(1) / 2, (0, padding), value=torch.inf)
    table = F.pad(codebook, (0, 0, 0, padding)).t()
    size = max(MIN_BLOCK, BLOCK_NUMBERS // len(bias))
    distances = latents.new_empty(min(size, len(latents)), len(bias))
    found = [_first_minimum(torch.addmm(bias, part, table, alpha=-1, out=distances[: len(part)]), group) for part in latents.split(size)]
    return torch.cat(found).clamp(max=codes - 1)  # nothing is nearest to a latent that is not a number


def _first_minimum(distances: Tensor, group: int) -> Tensor:
    """`argmin(1)` of (n, k) distances. Looking for the group that holds the minimum, then for its place there, is ten times as fast:
    a minimum is taken many numbers at a time, its place one by one."""
    groups = distances.view(len(distances), -1, group)
    holder = groups.amin(2).argmin(1)
    rows = torch.arange(len(distances), device=distances.device) * groups.shape[1] + holder
    return holder * group + groups.flatten(0, 1).index_select(0, rows).argmin(1)
