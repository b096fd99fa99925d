"""Pictures inside the page: PNG as data: URIs, small ones kept to the pixel, large ones shrunk, all within one budget of bytes."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stages.report.html import Markup, el

LARGEST = 128  # pixels of the longer side of a picture in the page
PIXELATED = 96  # below this, pixels are shown as the squares they are


@dataclass
class Pictures:
    """Turns arrays into <img> until `budget` bytes are used up; a report stays a page one can send."""

    budget: int = 1_800_000

    def img(self, picture: np.ndarray, alt: str) -> Markup | None:
        """uint8 (H, W, 3) -> <img>, or None when the budget is exhausted."""
        height, width = picture.shape[:2]
        image = Image.fromarray(picture)
        if max(height, width) > LARGEST:
            shrink = LARGEST / max(height, width)
            image = image.resize((max(1, round(width * shrink)), max(1, round(height * shrink))), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(data) > self.budget:
            return None
        self.budget -= len(data)
        kind = "pixelated" if max(height, width) <= PIXELATED else None
        source = f"data:image/png;base64,{data}"
        return el("img", {"src": source, "alt": alt, "width": image.width, "height": image.height, "class": kind, "loading": "lazy"})
