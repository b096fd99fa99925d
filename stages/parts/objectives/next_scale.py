"""Next-scale prediction (VAR, arXiv:2404.02905, section 3.2): all codes of a scale at once, from the scales before it.

Every code is predicted at its own row. What stands there is not the code but the sum of the coarser scales, which the port's connector
makes of the codes; and a scale sees itself and what comes before it, which the segments say. So nothing is left to hide.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from torch import Generator, Tensor

from stages.parts.config import PartConfig
from stages.parts.objectives.next_token import cross_entropy
from stages.sequence.segment import PortRows


class NextScaleConfig(PartConfig):
    """Cross-entropy of every code of every scale, all alike."""

    kind: Literal["next-scale"] = "next-scale"
    samplers: ClassVar[tuple[str, ...]] = ("next-scale",)

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        """Targets are read where they stand, and judged all."""
        return replace(clean, goal=clean.values, read=clean.rows, supervised=clean.target)

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """Cross-entropy (n,) of logits (n, v) with codes (n,), in nats."""
        return cross_entropy(prediction, goal)
