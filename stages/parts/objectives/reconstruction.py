"""Reconstruction: an autoencoder learns to give pictures back; a discriminator may learn against it.

The loss of VQGAN (arXiv:2012.09841, equations 4 to 7) and of latent diffusion's first stage (arXiv:2112.10752, appendix G): a sum of
pixel, perceptual and adversarial terms and of what the autoencoder itself has to pay (commitment, codebook, KL). Every term is a
mean over pixels; the published KL recipes sum over a picture instead, which multiplies all of their terms, KL included, by 3·H·W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import SerializeAsAny, field_validator, model_validator
from torch import Generator, Tensor, nn
from torch.func import functional_call

from stages.parts.autoencoders import Autoencoder
from stages.parts.config import PartConfig, Strict, Weight, parse_part
from stages.parts.losses import DISCRIMINATORS, PERCEPTUAL, DiscriminatorConfig, LaplacianConfig, PerceptualConfig
from stages.parts.losses.discriminator import LOSSES, LeCam, adaptive_weight


class Terms(Strict):
    """Weights; 0 leaves a term out. `kl` weights the KL of continuous latents, a codebook's losses carry their own weights."""

    l1: Weight = 0.0
    l2: Weight = 0.0
    perceptual: Weight = 0.0
    adversarial: Weight = 0.0
    kl: Weight = 1e-6


class ReconstructionConfig(PartConfig):
    """Give the pictures of a port back (VQGAN, arXiv:2012.09841). A discriminator is needed exactly when `terms.adversarial` is."""

    kind: Literal["reconstruction"] = "reconstruction"
    weight: Weight = 1.0
    port: str
    terms: Terms = Terms(l1=1.0)
    perceptual: SerializeAsAny[PerceptualConfig] = LaplacianConfig()
    discriminator: SerializeAsAny[DiscriminatorConfig] | None = None

    @field_validator("perceptual", mode="before")
    @classmethod
    def _parse_perceptual(cls, table: Any) -> Any:
        return parse_part(PERCEPTUAL, table, "perceptual") if isinstance(table, Mapping) else table

    @field_validator("discriminator", mode="before")
    @classmethod
    def _parse_discriminator(cls, table: Any) -> Any:
        return parse_part(DISCRIMINATORS, table, "discriminator") if isinstance(table, Mapping) else table

    @model_validator(mode="after")
    def _terms_have_their_parts(self) -> "ReconstructionConfig":
        if not (self.terms.l1 or self.terms.l2):
            raise ValueError("terms: l1 or l2 must have a weight, or nothing ties a reconstruction to its picture")
        if self.terms.adversarial and self.discriminator is None:
            raise ValueError('terms.adversarial has a weight, but there is no discriminator; add discriminator = { kind = "patch" }')
        return self

    def build(self) -> "Reconstruct":
        return Reconstruct(self)


@dataclass(frozen=True)
class ReconstructionLosses:
    """`main` trains the autoencoder, `discriminator` (from its start step on) the discriminator. `parts` are for the log, unweighted."""

    main: Tensor
    discriminator: Tensor | None
    parts: dict[str, Tensor]
    codes: Tensor | None


class Reconstruct(nn.Module):
    """The loss as a module, because it owns a discriminator."""

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = config.perceptual.build() if config.terms.perceptual else None
        self.discriminator = config.discriminator.build() if config.discriminator is not None and config.terms.adversarial else None
        self.lecam = LeCam() if self.discriminator is not None and config.discriminator is not None and config.discriminator.lecam else None

    def forward(self, autoencoder: Autoencoder, images: Tensor, step: int, generator: Generator) -> ReconstructionLosses:
        """Losses of one step on (b, 3, H, W) pictures; backward of `main` leaves no gradient in the discriminator, nor the other way."""
        terms = self.config.terms
        result = autoencoder.reconstruct(images, generator)
        parts: dict[str, Tensor] = {}
        rebuilt = images.new_zeros(())
        if terms.l1:
            parts["l1"] = F.l1_loss(result.images, images)
            rebuilt = rebuilt + terms.l1 * parts["l1"]
        if terms.l2:
            parts["l2"] = F.mse_loss(result.images, images)
            rebuilt = rebuilt + terms.l2 * parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, result.images)
            rebuilt = rebuilt + terms.perceptual * parts["perceptual"]
        main = rebuilt
        for name, loss in result.losses.items():
            parts[name] = loss
            main = main + (terms.kl * loss if name == "kl" else loss)
        against = None
        settings = self.config.discriminator
        if self.discriminator is not None and settings is not None and step >= settings.start_step:
            game = LOSSES[settings.loss]
            constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            parts["adversarial"] = game.generator(functional_call(self.discriminator, constant, (result.images,)))
            factor = torch.ones(())
            if settings.adaptive and torch.is_grad_enabled():
                factor = adaptive_weight(rebuilt, parts["adversarial"], autoencoder.last_layer)
            parts["adversarial_weight"] = factor
            main = main + terms.adversarial * factor * parts["adversarial"]
            real, fake = self.discriminator(images), self.discriminator(result.images.detach())
            parts["discriminator"] = against = game.discriminator(real, fake)
            if self.lecam is not None:
                parts["lecam"] = self.lecam(real, fake)
                against = against + settings.lecam * parts["lecam"]
            against = self.config.weight * against
        return ReconstructionLosses(self.config.weight * main, against, {name: loss.detach() for name, loss in parts.items()}, result.codes)
