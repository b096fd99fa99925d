"""Autoencoders: pictures ↔ latents or codes."""

from stages.parts.autoencoders.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction
from stages.parts.autoencoders.cnn import CNNConfig
from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.autoencoders.kl_cnn import KLCNNConfig
from stages.parts.autoencoders.strided_cnn import StridedCNNConfig
from stages.parts.autoencoders.vit import ViTConfig
from stages.parts.autoencoders.vit_1d import ViT1DConfig

AUTOENCODERS: dict[str, type[AutoencoderConfig]] = {
    "cnn": CNNConfig,
    "kl-cnn": KLCNNConfig,
    "strided-cnn": StridedCNNConfig,
    "vit": ViTConfig,
    "vit-1d": ViT1DConfig,
}

__all__ = [
    "AUTOENCODERS",
    "Autoencoder",
    "AutoencoderConfig",
    "CNNConfig",
    "DiscreteAutoencoder",
    "DiscreteConfig",
    "KLCNNConfig",
    "Reconstruction",
    "StridedCNNConfig",
    "ViT1DConfig",
    "ViTConfig",
]
