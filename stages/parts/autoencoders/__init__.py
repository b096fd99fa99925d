"""Autoencoders: pictures ↔ latents or codes."""

from stages.parts.autoencoders.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction
from stages.parts.autoencoders.cnn import CNNConfig
from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.autoencoders.kl_cnn import KLCNNConfig

AUTOENCODERS: dict[str, type[AutoencoderConfig]] = {
    "cnn": CNNConfig,
    "kl-cnn": KLCNNConfig,
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
]
