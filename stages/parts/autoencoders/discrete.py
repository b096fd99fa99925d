"""An autoencoder with a quantizer between encoder and decoder, whatever the two networks are."""

from collections.abc import Mapping
from typing import Any

from pydantic import SerializeAsAny, field_validator
from torch import Generator, Tensor, nn

from stages.parts.autoencoders.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction
from stages.parts.config import parse_part
from stages.parts.quantizers import QUANTIZERS, Quantizer, QuantizerConfig, VQConfig


class DiscreteConfig(AutoencoderConfig):
    """Settings of an autoencoder whose latents pass through a quantizer."""

    quantizer: SerializeAsAny[QuantizerConfig] = VQConfig()
    store: str = "codes"

    @field_validator("quantizer", mode="before")
    @classmethod
    def _parse_quantizer(cls, table: Any) -> Any:
        return parse_part(QUANTIZERS, table, "quantizer") if isinstance(table, Mapping) else table

    @property
    def codebook_size(self) -> int:
        return self.quantizer.size

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.quantizer.code_shape(*self.grid(height, width))


class DiscreteAutoencoder(Autoencoder):
    """Pictures ↔ codes. Its latents are the quantized ones, as the decoder takes them.

    encoder: (b, 3, H, W) → (b, latent_channels, h, w) with (h, w) = grid(H, W); decoder: the way back.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: DiscreteConfig, encoder: nn.Module, decoder: nn.Module, quantizer: Quantizer | None = None) -> None:
        super().__init__()
        self.config: DiscreteConfig = config
        self.encoder = encoder
        self.quantizer = quantizer or config.quantizer.build(config.latent_channels)
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.lookup(self.encode_codes(images), self.grid(*images.shape[2:]))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def encode_codes(self, images: Tensor) -> Tensor:
        self.grid(*images.shape[2:])
        return self.quantizer.quantize(self.encoder(images)).codes

    def decode_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.decoder(self.quantizer.lookup(codes, grid))

    def reconstruct(self, images: Tensor, generator: Generator) -> Reconstruction:
        self.grid(*images.shape[2:])
        quantized = self.quantizer.quantize(self.encoder(images), generator)
        return Reconstruction(self.decoder(quantized.quantized), quantized.losses, quantized.codes)
