"""The convolutional autoencoder with continuous latents, kept near a standard Gaussian by a small KL term.

Latent diffusion, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3.1 and appendix G. The
encoder gives a mean and a log variance for each latent; training decodes a sample, everything after training uses the mean. Latents
leave shifted and scaled, (mean - latent_shift) · latent_scale for each channel, so that those of the training pictures have mean 0 and
variance 1: diffusion models assume it. The two numbers are measured at the end of training, or given where published weights define them.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from stages.parts.autoencoders.autoencoder import Autoencoder, Reconstruction
from stages.parts.autoencoders.cnn import ConvolutionalConfig, Decoder, Encoder
from stages.parts.config import Count, Pixels, Positive, Scale, Size

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as published: keeps exp() finite in float32


class KLCNNConfig(ConvolutionalConfig):
    """Convolutional encoder and decoder with Gaussian latents (arXiv:2112.10752). The defaults are Stable Diffusion's KL-f8.

    `pointwise` is the 1 x 1 convolution around the latents, which 16-channel successors left out. `latent_shift` and `latent_scale`
    are measured when not given.
    """

    kind: Literal["kl-cnn"] = "kl-cnn"
    downsample: Pixels = 8
    multipliers: tuple[Count, ...] = Field(default=(1, 2, 4, 4), max_length=16)
    attention: bool = False
    latent_channels: Size = 4
    pointwise: bool = True
    latent_shift: Scale = 0.0
    latent_scale: Positive | None = None
    store: str = "latents"

    def build(self) -> "KLAutoencoder":
        return KLAutoencoder(self)


class KLAutoencoder(Autoencoder):
    """Pictures ↔ continuous latents of about unit variance."""

    latent_shift: Tensor
    latent_scale: Tensor

    def __init__(self, config: KLCNNConfig) -> None:
        super().__init__()
        self.config: KLCNNConfig = config
        channels = config.latent_channels
        self.encoder = Encoder(config, 2 * channels)
        self.decoder = Decoder(config)
        self.to_moments = nn.Conv2d(2 * channels, 2 * channels, 1) if config.pointwise else nn.Identity()
        self.from_latents = nn.Conv2d(channels, channels, 1) if config.pointwise else nn.Identity()
        self.register_buffer("latent_shift", torch.full((channels,), config.latent_shift))
        self.register_buffer("latent_scale", torch.full((channels,), config.latent_scale or 1.0))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each (b, c, h, w), before shift and scale."""
        self.grid(*images.shape[2:])
        mean, log_variance = self.to_moments(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def encode(self, images: Tensor) -> Tensor:
        return (self.moments(images)[0] - self.latent_shift.view(1, -1, 1, 1)) * self.latent_scale.view(1, -1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self._decode_unscaled(latents / self.latent_scale.view(1, -1, 1, 1) + self.latent_shift.view(1, -1, 1, 1))

    def _decode_unscaled(self, latents: Tensor) -> Tensor:
        return self.decoder(self.from_latents(latents))

    def reconstruct(self, images: Tensor, generator: Generator) -> Reconstruction:
        """Decodes a sample of the posterior. `kl` is summed over the latents of a picture and divided by its 3·H·W numbers.

        Published losses sum the pixel errors of a picture and add kl_weight times the summed KL; here pixel errors are averaged, and
        the same division of the KL keeps the published weight's meaning at any picture size.
        """
        mean, log_variance = self.moments(images)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / images.numel()
        return Reconstruction(self._decode_unscaled(mean + (0.5 * log_variance).exp() * noise), {"kl": kl})

    @torch.no_grad()
    def fit_latent_scale(self, batches: Iterable[Tensor]) -> None:
        """Measure shift and scale of each channel on pictures, so that `encode` gives mean 0 and variance 1. Configured values stay."""
        if self.config.latent_scale is not None:
            return
        count, total, squares = (
            0,
            torch.zeros(self.latent_channels, dtype=torch.float64),
            torch.zeros(self.latent_channels, dtype=torch.float64),
        )
        for images in batches:
            mean = self.moments(images)[0].double().cpu()
            count += mean.numel() // self.latent_channels
            total += mean.sum((0, 2, 3))
            squares += mean.square().sum((0, 2, 3))
        shift = total / count
        self.latent_shift.copy_(shift)
        self.latent_scale.copy_((squares / count - shift.square()).clamp(min=1e-12).rsqrt())
