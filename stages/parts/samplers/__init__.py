"""Samplers: how a trained network is turned into samples. One row of the dict per kind; a recipe writes the kind as `sampler`."""

from stages.parts.samplers.denoise import DdimConfig, DenoiseSamplerConfig, EulerConfig, HeunConfig, sample_denoised
from stages.parts.samplers.guidance import Guide, SamplerConfig
from stages.parts.samplers.logits import AutoregressiveConfig
from stages.parts.samplers.masked import MaskedConfig
from stages.parts.samplers.masked_denoise import MaskedDenoiseSamplerConfig, sample_masked_latents
from stages.parts.samplers.next_scale import NextScaleSamplerConfig
from stages.parts.samplers.regress import RegressSamplerConfig

SAMPLERS: dict[str, type[SamplerConfig]] = {
    "autoregressive": AutoregressiveConfig,
    "masked": MaskedConfig,
    "next-scale": NextScaleSamplerConfig,
    "masked-denoise": MaskedDenoiseSamplerConfig,
    "euler": EulerConfig,
    "ddim": DdimConfig,
    "heun": HeunConfig,
    "regress": RegressSamplerConfig,
}

__all__ = [
    "SAMPLERS",
    "AutoregressiveConfig",
    "DdimConfig",
    "DenoiseSamplerConfig",
    "EulerConfig",
    "Guide",
    "HeunConfig",
    "MaskedConfig",
    "MaskedDenoiseSamplerConfig",
    "NextScaleSamplerConfig",
    "RegressSamplerConfig",
    "SamplerConfig",
    "sample_denoised",
    "sample_masked_latents",
]
