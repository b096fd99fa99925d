"""VGG-16 as LPIPS looks through it: the convolutions of the ImageNet classifier (arXiv:1409.1556, configuration D) and their maps."""

from torch import Tensor, nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """(b, 3, H, W) pictures → the maps before each halving and the last ones, 1/1 to 1/16 of the picture. Layers are numbered as
    torchvision numbers them, so `features.0.weight` to `features.28.bias` of its files fit."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level, widths in enumerate(WIDTHS):
            if level:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        found, maps = [], pictures
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(maps)
            maps = layer(maps)
        return [*found, maps]
