"""Encoders: a field of a sample → features. One row of the dict per kind."""

from stages.parts.encoders.clip import ClipTextConfig, ClipVitConfig, Features

EncoderConfig = ClipVitConfig | ClipTextConfig

ENCODERS: dict[str, type[ClipVitConfig] | type[ClipTextConfig]] = {"clip-vit": ClipVitConfig, "clip-text": ClipTextConfig}

__all__ = ["ENCODERS", "ClipTextConfig", "ClipVitConfig", "EncoderConfig", "Features"]
