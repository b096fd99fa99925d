"""One pass over placeholders, and every feature is there (SEED-X, arXiv:2404.14396)."""

from typing import Literal

from stages.parts.samplers.guidance import SamplerConfig


class RegressSamplerConfig(SamplerConfig):
    """Nothing is drawn: what the network says of each place is the feature there."""

    kind: Literal["regress"] = "regress"
