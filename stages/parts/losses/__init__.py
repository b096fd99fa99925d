"""Losses between a picture and its reconstruction that are networks or filters of their own."""

from stages.parts.losses.discriminator import DiscriminatorConfig, PatchConfig
from stages.parts.losses.perceptual import LaplacianConfig, PerceptualConfig

PERCEPTUAL: dict[str, type[PerceptualConfig]] = {
    "laplacian": LaplacianConfig,
}

DISCRIMINATORS: dict[str, type[DiscriminatorConfig]] = {
    "patch": PatchConfig,
}

__all__ = ["DISCRIMINATORS", "PERCEPTUAL", "DiscriminatorConfig", "LaplacianConfig", "PatchConfig", "PerceptualConfig"]
