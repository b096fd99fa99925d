"""Quantizers: continuous latents ↔ codes."""

from stages.parts.quantizers.quantizer import Quantized, Quantizer, QuantizerConfig
from stages.parts.quantizers.vq import VQConfig

QUANTIZERS: dict[str, type[QuantizerConfig]] = {
    "vq": VQConfig,
}

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerConfig", "VQConfig"]
