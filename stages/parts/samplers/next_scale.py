"""Drawing scale by scale (VAR, arXiv:2404.02905): one pass a scale, all of its codes drawn at once from that pass."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from stages.parts.config import Entries, Temperature
from stages.parts.samplers.guidance import SamplerConfig
from stages.parts.samplers.logits import sample_logits


class NextScaleSamplerConfig(SamplerConfig):
    """`guidance_schedule` linear: guidance grows from none at the first scale to the whole at the last. In VAR's code, which writes
    (1 + s) · cond - s · uncond, s grows to 1.5: that is guidance_scale = 2.5 here."""

    kind: Literal["next-scale"] = "next-scale"
    temperature: Temperature = 1.0
    top_k: Entries | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    guidance_schedule: Literal["constant", "linear"] = "constant"

    def strength(self, scale: int, scales: int) -> float:
        """How much of the guidance scale number `scale` of `scales` gets: 0 is the condition alone, 1 all of it."""
        return scale / max(1, scales - 1) if self.guidance_schedule == "linear" else 1.0

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Codes (b, n) from logits (b, n, v) and uniforms (b, n) in [0, 1)."""
        drawn = sample_logits(logits.flatten(0, 1), uniforms.flatten(), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return drawn.view(uniforms.shape)
