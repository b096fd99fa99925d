"""Encoders: a field of a sample → features. One row of the dict per kind."""

from stages.parts.encoders.clip import ClipTextConfig, ClipVitConfig, Features
from stages.parts.encoders.siglip import SiglipVitConfig

EncoderConfig = ClipVitConfig | ClipTextConfig | SiglipVitConfig

ENCODERS: dict[str, type[ClipVitConfig] | type[ClipTextConfig] | type[SiglipVitConfig]] = {
    "clip-vit": ClipVitConfig,
    "clip-text": ClipTextConfig,
    "siglip-vit": SiglipVitConfig,
}

__all__ = ["ENCODERS", "ClipTextConfig", "ClipVitConfig", "EncoderConfig", "Features", "SiglipVitConfig"]
