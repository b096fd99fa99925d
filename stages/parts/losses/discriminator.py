"""A network that tells pictures from reconstructions, and the losses that set the two against each other.

The patch discriminator judges overlapping patches (70 pixels wide with three layers), so it cares about texture and not about
layout (pix2pix, arXiv:1611.07004, section 3.2.2). How VQGAN joins it to the other losses is arXiv:2012.09841, equations 6 and 7.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages import ranks
from stages.parts.config import PartConfig, Updates, Weight


class DiscriminatorConfig(PartConfig):
    """Settings of a discriminator: (b, 3, H, W) pictures → real-or-not logits. It stays out until `start_step`.

    `adaptive`: balance its gradient against that of the reconstruction, at the decoder's last layer. `loss` is one of LOSSES;
    `lecam`: weight of the regularisation that keeps it from getting too sure of few pictures, 0 leaves it out.
    """

    start_step: Updates = 0
    adaptive: bool = True
    loss: Literal["hinge", "non-saturating"] = "hinge"
    lecam: Weight = 0.0

    def build(self) -> nn.Module:
        raise NotImplementedError


class PatchConfig(DiscriminatorConfig):
    """PatchGAN. The published norm is `batch`; `group` does not depend on the other pictures of a small batch."""

    kind: Literal["patch"] = "patch"
    channels: int = Field(default=64, ge=8, le=65_536, multiple_of=8)
    layers: int = Field(default=3, ge=1, le=12)
    norm: Literal["batch", "group"] = "batch"

    def build(self) -> nn.Module:
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """Pictures → one logit for each patch, (b, 1, h, w)."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**index, 8) for index in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, config.layers + 1):
            stride = 2 if index < config.layers else 1
            norm = nn.BatchNorm2d(widths[index]) if config.norm == "batch" else nn.GroupNorm(8, widths[index])
            layers += [nn.Conv2d(widths[index - 1], widths[index], 4, stride, padding=1, bias=False), norm, nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:  # as published: N(0, 0.02) for convolutions, N(1, 0.02) for the norms
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


# --- the game ---------------------------------------------------------------------------------------------------------------------


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½ E max(0, 1 - D(real)) + ½ E max(0, 1 + D(fake)): 1 when the logits are 0, 0 when both are a margin away."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """-E D(fake)."""
    return -fake.mean()


def discriminator_cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log σ(D(real)) - E log(1 - σ(D(fake))), minus the value of the game (arXiv:1406.2661, eq. 1): log 4 when the logits are 0."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_non_saturating(fake: Tensor) -> Tensor:
    """-E log σ(D(fake)) instead of E log(1 - σ(D(fake))): a gradient where the discriminator is sure (arXiv:1406.2661, section 3)."""
    return F.softplus(-fake).mean()


@dataclass(frozen=True)
class Game:
    """What each side pays, of logits about (b, ...) real and reconstructed pictures."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


LOSSES = {
    "hinge": Game(discriminator_hinge, generator_hinge),
    "non-saturating": Game(discriminator_cross_entropy, generator_non_saturating),
}


class LeCam(nn.Module):
    """E max(0, D(real) - a_fake)² + E max(0, a_real - D(fake))², with running means a of the logits (arXiv:2104.03310, section 3).

    The paper squares without the maximum; its released code, like Open-MAGVIT2's, has it, with decay 0.999 and a from 0, as here.
    """

    anchors: Tensor  # (2,): real, fake

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("anchors", torch.zeros(2))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The anchors move first, with the logits of all ranks; unless a logit is not finite and the step will be refused."""
        means = ranks.summed(torch.stack([real.detach().mean(), fake.detach().mean()]).float()) / ranks.size()
        if self.training and torch.isfinite(means).all():
            self.anchors.lerp_(means, 1 - self.decay)
        anchors = self.anchors.clone()  # the graph keeps these, the buffer moves on
        return F.relu(real - anchors[1]).square().mean() + F.relu(anchors[0] - fake).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ = |∇ reconstruction| / (|∇ adversarial| + 1e-4), at most 1e4, with gradients at the last layer (arXiv:2012.09841, eq. 7)."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (found.norm() + 1e-4)).clamp(0.0, 1e4).detach()
