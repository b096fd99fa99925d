"""What an importer gives: raw data as splits of samples, with what is wrong told as values rather than raised.

An importer is a function of this shape, and a row in `IMPORTERS`:

    def samples(source: str, *, seed: int, size: int = 0, ...) -> RawData

`source` (a folder, a file, an address) may be optional or absent. Its keyword arguments (int, str, bool, float, Path or list[str]) become flags,
and the lines `name: text` of its docstring their help; `seed` is the shared flag. The call itself raises UsageError where the source is missing
and DataError where there is nothing in it; reading happens while the splits are iterated.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.data.sample import Sample
from stages.errors import DataError, UsageError, nearest
from stages.parts.config import MAX_PIXELS

MAX_FILE_BYTES = 256 * 1024 * 1024  # of one raw file; a larger one is told to be bad before it is read
MAX_SCALED_PIXELS = 256 * 1024 * 1024  # of a picture before it is cut; a strip of 1 x 60,000 pixels would fill the memory
FITS = ("crop", "pad")


@dataclass(frozen=True)
class BadFile:
    """A raw file, or member of one, that makes no sample, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class RawData:
    """The splits of a data set, in the order they are written.

    fingerprint  changes when the raw data does, as far as can be told without reading all of it
    licence      an identifier as the Hub uses them (`cc-by-sa-4.0`, `other`, `unknown`)
    notes        what a user of the data has to know: attribution, how the splits were made
    """

    splits: Mapping[str, Iterable[Sample | BadFile]]
    fingerprint: str
    licence: str
    notes: str


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, to split by."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32


def check_fraction(flag: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{flag} {value}: expected a share of the samples, at least 0 and less than 1")


def check_fit(size: int, fit: str) -> None:
    if not 0 <= size <= MAX_PIXELS:
        raise UsageError(f"--size {size}: expected a number of pixels up to {MAX_PIXELS}, or 0 to keep every picture's own size")
    if fit not in FITS:
        raise UsageError(f"--fit: there is no '{fit}'", hint=nearest(fit, FITS))


def fit_square(image: np.ndarray, size: int, fit: str) -> np.ndarray:
    """The picture as size x size pixels: scaled to cover the square and cut in the middle (`crop`), or scaled into it on white (`pad`).

    image: uint8 (H, W, 3). Lanczos filter, antialiased. DataError where it is so long and thin that covering the square takes too much memory.
    """
    height, width = image.shape[:2]
    scale = size / (min(height, width) if fit == "crop" else max(height, width))
    scaled_height, scaled_width = max(1, round(height * scale)), max(1, round(width * scale))
    if scaled_height * scaled_width > MAX_SCALED_PIXELS:
        raise DataError(f"a picture of {height} x {width} pixels is too long and thin to fill a square; --fit pad keeps all of it")
    scaled = np.asarray(Image.fromarray(image).resize((scaled_width, scaled_height), Image.Resampling.LANCZOS))
    if fit == "crop":
        top, left = (scaled_height - size) // 2, (scaled_width - size) // 2
        return scaled[top : top + size, left : left + size]
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - scaled_height) // 2, (size - scaled_width) // 2
    square[top : top + scaled_height, left : left + scaled_width] = scaled
    return square


def read_bytes(path: Path) -> bytes:
    """The content of a regular file within MAX_FILE_BYTES; OSError otherwise."""
    if not path.is_file():
        raise OSError("no such file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise OSError(f"{size:,} bytes, the cap is {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def picture_format(data: bytes) -> str:
    """`png`, `jpg`, `webp` or `gif`, by the first bytes of a picture that is one of these: names of files are not always right."""
    return {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}.get(data[:4], "jpg")
