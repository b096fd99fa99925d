"""Pictures of any size → one square picture."""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.parts.config import PartConfig


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) → float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_pixels(image: Tensor) -> np.ndarray:
    """float (3, H, W) in [-1, 1] → uint8 (H, W, 3), rounded and clipped."""
    return image.detach().float().add(1.0).mul(127.5).round().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class SquareConfig(PartConfig):
    """Shorter side to `size` (bicubic, antialiased), then the centre."""

    kind: Literal["square"] = "square"
    size: int

    def apply(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if (height, width) == (self.size, self.size):
            return image
        scale = self.size / min(height, width)
        h, w = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
        top, left = (h - self.size) // 2, (w - self.size) // 2
        return resized[top : top + self.size, left : left + self.size]


class PadConfig(PartConfig):
    """Padded to a square with middle grey, then resized to `size` (LLaVA 1.5, arXiv:2310.03744)."""

    kind: Literal["pad"] = "pad"
    size: int

    def apply(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if (height, width) == (self.size, self.size):
            return image
        side = max(height, width)
        canvas = np.full((side, side, 3), 127, dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = image
        return np.asarray(Image.fromarray(canvas).resize((self.size, self.size), Image.Resampling.BICUBIC))
