"""Pictures of any size → one square picture."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.errors import DataError
from stages.parts.config import PartConfig, Pixels

MAX_PIXELS = 256 * 1024 * 1024  # of a picture on its way to a square: a strip of 1 x 60,000 pixels would fill the memory


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) → float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) of one size → float (b, 3, H, W) in [-1, 1], channels last in memory: convolutions are faster on it."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(image: Tensor) -> np.ndarray:
    """float (3, H, W) in [-1, 1] → uint8 (H, W, 3), rounded and clipped."""
    return image.detach().float().add(1.0).mul(127.5).round().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def check_strip(height: int, width: int, pixels: int) -> None:
    """DataError where a picture is so long and thin that it would need more than MAX_PIXELS on its way to a square."""
    if pixels > MAX_PIXELS:
        raise DataError(f"a picture of {height} x {width} pixels is too long and thin to be made a square", hint="crop it, or leave it out")


class SquareConfig(PartConfig):
    """Shorter side to `size` (bicubic, antialiased), then the centre."""

    kind: Literal["square"] = "square"
    size: Pixels

    def apply(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if (height, width) == (self.size, self.size):
            return image
        scale = self.size / min(height, width)
        h, w = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        check_strip(height, width, h * w)
        resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
        top, left = (h - self.size) // 2, (w - self.size) // 2
        return resized[top : top + self.size, left : left + self.size]


class PadConfig(PartConfig):
    """Padded to a square with middle grey, then resized to `size` (LLaVA 1.5, arXiv:2310.03744)."""

    kind: Literal["pad"] = "pad"
    size: Pixels

    def apply(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if (height, width) == (self.size, self.size):
            return image
        side = max(height, width)
        check_strip(height, width, side * side)
        canvas = np.full((side, side, 3), 127, dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = image
        return np.asarray(Image.fromarray(canvas).resize((self.size, self.size), Image.Resampling.BICUBIC))
