"""Quantizers: continuous latents ↔ codes."""

from stages.parts.quantizers.bsq import BSQConfig
from stages.parts.quantizers.fsq import FSQConfig
from stages.parts.quantizers.ibq import IBQConfig
from stages.parts.quantizers.lfq import LFQConfig
from stages.parts.quantizers.multi_scale import MultiScaleConfig, MultiScaleVQ
from stages.parts.quantizers.quantizer import Quantized, Quantizer, QuantizerConfig
from stages.parts.quantizers.residual import ResidualConfig
from stages.parts.quantizers.vq import VQConfig

QUANTIZERS: dict[str, type[QuantizerConfig]] = {
    "vq": VQConfig,
    "residual": ResidualConfig,
    "multi-scale": MultiScaleConfig,
    "fsq": FSQConfig,
    "lfq": LFQConfig,
    "bsq": BSQConfig,
    "ibq": IBQConfig,
}

__all__ = [
    "QUANTIZERS",
    "BSQConfig",
    "FSQConfig",
    "IBQConfig",
    "LFQConfig",
    "MultiScaleConfig",
    "MultiScaleVQ",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualConfig",
    "VQConfig",
]
