"""Losses between a picture and its reconstruction that are networks or filters of their own."""

from stages.parts.losses.discriminator import DiscriminatorConfig, PatchConfig
from stages.parts.losses.perceptual import EfficientNetLite0Config, LaplacianConfig, LPIPSConfig, PerceptualConfig

PERCEPTUAL: dict[str, type[PerceptualConfig]] = {
    "laplacian": LaplacianConfig,
    "efficientnet-lite0": EfficientNetLite0Config,
    "lpips": LPIPSConfig,
}

DISCRIMINATORS: dict[str, type[DiscriminatorConfig]] = {
    "patch": PatchConfig,
}

__all__ = [
    "DISCRIMINATORS",
    "PERCEPTUAL",
    "DiscriminatorConfig",
    "EfficientNetLite0Config",
    "LPIPSConfig",
    "LaplacianConfig",
    "PatchConfig",
    "PerceptualConfig",
]
