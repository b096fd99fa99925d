"""Distances between pictures that look further than a pixel, each named for what it is wherever a result is printed.

`lpips` is the one the published tokenizers use: distances of VGG-16 features, weighted as people judge. Its weights come from elsewhere.
`efficientnet-lite0` is the same idea in a smaller network whose weights a package carries, without the weighting: it is not LPIPS.
`laplacian` needs no weights: it compares two pictures octave by octave, so blur and lost edges cost as much at every scale, and it
knows nothing about objects.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.errors import DataError, UsageError
from stages.parts.config import PartConfig
from stages.parts.losses.efficientnet import INSTALL, lite0_weights, load_lite0
from stages.parts.losses.vgg import VGG16, WIDTHS


class PerceptualConfig(PartConfig):
    """Settings of a perceptual distance; the module maps two (b, 3, H, W) pictures in [-1, 1] to a scalar, the mean over pictures.

    Gradients go to the second picture, the reconstruction. `smallest`: pixels along the shorter side that it needs.
    """

    smallest: ClassVar[int] = 1

    def missing(self) -> str | None:
        """What has to be there before it can be built, None when everything is."""
        return None

    def build(self) -> nn.Module:
        raise NotImplementedError


# --- without weights --------------------------------------------------------------------------------------------------------------


class LaplacianConfig(PerceptualConfig):
    """L1 distance of Laplacian pyramids (Lap1 of arXiv:1707.05776, section 3): the sum over octaves of the mean absolute difference."""

    kind: Literal["laplacian"] = "laplacian"
    levels: int = Field(default=3, ge=1, le=12)

    def build(self) -> nn.Module:
        return Laplacian(self)


class Laplacian(nn.Module):
    """Sum over the bands of a Laplacian pyramid, the low-pass remainder included, of the mean absolute difference.

    The paper's weight 4^j on the sum over band j, which has 4^-j as many pixels, is this equal weight on means.
    """

    binomial: Tensor

    def __init__(self, config: LaplacianConfig) -> None:
        super().__init__()
        self.levels = config.levels
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("binomial", taps.outer(taps).expand(3, 1, 5, 5).contiguous(), persistent=False)

    def forward(self, images: Tensor, reconstructed: Tensor) -> Tensor:
        remainder = images - reconstructed  # the pyramid is linear: that of a difference is the difference of the pyramids
        distance = remainder.new_zeros(())
        for _ in range(self.levels):
            if min(remainder.shape[2:]) < 2:  # nothing left to halve
                break
            smooth = self._blur(remainder)
            distance = distance + (remainder - smooth).abs().mean()
            remainder = smooth[:, :, ::2, ::2]
        return distance + remainder.abs().mean()

    def _blur(self, difference: Tensor) -> Tensor:
        return F.conv2d(difference, self.binomial, padding=2, groups=3)  # beyond the picture there is no difference


# --- distances of features --------------------------------------------------------------------------------------------------------


class FeatureDistance(nn.Module):
    """Compares the maps of a network that looks and never learns. The network stands outside the tree of modules, where neither
    `train()` nor an optimizer, a training state or a checkpoint finds it; only to another device does it come along."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._outside = (network.eval().requires_grad_(False),)  # torch registers modules, not tuples of them

    @property
    def network(self) -> nn.Module:
        return self._outside[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The network's maps (b, c, h, w) of (b, 3, H, W) pictures in [-1, 1]."""
        raise NotImplementedError

    def differences(self, images: Tensor, reconstructed: Tensor) -> list[Tensor]:
        """For each map, the squared differences of the features scaled to length 1 at each place (arXiv:1801.03924, eq. 1)."""
        with torch.no_grad():  # the pictures are given; only the reconstruction can change
            true = [unit(maps) for maps in self.maps(images)]
        return [(one - unit(other)).square() for one, other in zip(true, self.maps(reconstructed), strict=True)]


def unit(maps: Tensor) -> Tensor:
    """(b, c, h, w) with the features of each place scaled to length 1; those that are all zero stay zero."""
    maps = maps.float()
    return maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10)


class EfficientNetLite0Config(PerceptualConfig):
    """Distance of ImageNet features at five resolutions of EfficientNet-Lite0, made as LPIPS is made (arXiv:1801.03924, eq. 1) but
    with equal weights: 2 - 2 cos of the features' angle, the mean over places, then over resolutions. Between 0 and 4."""

    kind: Literal["efficientnet-lite0"] = "efficientnet-lite0"

    def missing(self) -> str | None:
        return None if lite0_weights() else INSTALL

    def build(self) -> nn.Module:
        file = lite0_weights()
        if file is None:
            raise not_there(self)
        return EfficientNetLite0Distance(load_lite0(file))


class EfficientNetLite0Distance(FeatureDistance):
    def maps(self, images: Tensor) -> list[Tensor]:
        grey = (images * 127.5 + 0.5) / 128  # (x - 127) / 128 of x in 0..255
        return self.network.maps(grey.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]

    def forward(self, images: Tensor, reconstructed: Tensor) -> Tensor:
        return torch.stack([difference.sum(1).mean() for difference in self.differences(images, reconstructed)]).mean()


class LPIPSConfig(PerceptualConfig):
    """LPIPS 0.1 with VGG-16 (arXiv:1801.03924): feature differences weighted by linear heads that were fitted to human judgements.

    vgg16: file of torchvision's ImageNet weights; if not given, where torch.hub keeps it. heads: file of the five linear heads; if
    not given, the one in the package `lpips`.
    """

    kind: Literal["lpips"] = "lpips"
    smallest: ClassVar[int] = 16
    vgg16: str = ""
    heads: str = ""

    def files(self) -> tuple[Path, Path | None]:
        """Where the weights of the network and of the heads should be."""
        heads = Path(self.heads) if self.heads else None
        if heads is None and (spec := importlib.util.find_spec("lpips")) is not None and spec.origin:
            heads = Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
        return Path(self.vgg16 or Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"), heads

    def missing(self) -> str | None:
        vgg16, heads = self.files()
        wanted = [] if vgg16.is_file() else [f"torchvision's vgg16-397923af.pth as {vgg16}, or vgg16 = PATH"]
        if heads is None or not heads.is_file():
            wanted.append("the heads: pip install lpips, or heads = PATH of its weights/v0.1/vgg.pth")
        return "; ".join(wanted) or None

    def build(self) -> nn.Module:
        vgg16, heads = self.files()
        if self.missing() or heads is None:
            raise not_there(self)
        module = LPIPS()
        module.load(vgg16, heads)
        return module


class LPIPS(FeatureDistance):
    """Sum over five maps of the mean over places of a weighted sum of squared differences."""

    shift: Tensor
    scale: Tensor
    heads: Tensor  # (64 + 128 + 256 + 512 + 512,), those of all maps in a row

    def __init__(self) -> None:
        super().__init__(VGG16())
        # ImageNet's mean and standard deviation, for pictures in [-1, 1], rounded as published
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("heads", torch.zeros(sum(self.widths)), persistent=False)

    @property
    def widths(self) -> list[int]:
        return [widths[-1] for widths in WIDTHS]

    def load(self, vgg16: Path, heads: Path) -> None:
        """Weights from torchvision's file and from that of the heads. DataError for a tensor that is missing or of another shape."""
        found = tensors_of(vgg16)
        for name, weights in self.network.named_parameters():
            copy_exactly(weights, found, name, tuple(weights.shape), vgg16)
        found = tensors_of(heads)
        for level, place in enumerate(self.heads.split(self.widths)):
            copy_exactly(place, found, f"lin{level}.model.1.weight", (1, len(place), 1, 1), heads)

    def maps(self, images: Tensor) -> list[Tensor]:
        return self.network.maps((images - self.shift) / self.scale)  # type: ignore[operator]

    def forward(self, images: Tensor, reconstructed: Tensor) -> Tensor:
        distance = reconstructed.new_zeros(())
        for difference, weights in zip(self.differences(images, reconstructed), self.heads.split(self.widths), strict=True):
            distance = distance + difference.mean((0, 2, 3)) @ weights
        return distance


# --- weights from elsewhere -------------------------------------------------------------------------------------------------------


def not_there(config: PerceptualConfig) -> UsageError:
    hint = f'{config.missing()}; or perceptual = {{ kind = "laplacian" }}, which needs no weights'
    return UsageError(f"perceptual distance '{config.kind}': its weights are not installed", hint=hint)


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The named tensors of a .pth file, read without running code of it."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch says in many ways that a file is damaged or something else
        raise DataError(f"{file}: expected named tensors as torch saves them, found {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected named tensors as torch saves them, found {type(found).__name__}")
    return found


def copy_exactly(place: Tensor, found: dict[str, Tensor], name: str, shape: tuple[int, ...], file: Path) -> None:
    """Copy the tensor of that name and shape. DataError if there is none."""
    if name not in found or tuple(found[name].shape) != shape:
        there = f"one of {tuple(found[name].shape)}" if name in found else "none"
        raise DataError(f"{file}: expected a tensor {name} of {shape}, found {there}")
    place.copy_(found[name].reshape(place.shape))
