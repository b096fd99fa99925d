"""One row of a shard, and how each of its fields becomes a file in the tar and back.

A sample is a key and named fields. Field `image.codes` of the sample `000017` is the member `000017.image.codes.npy`: the key ends at
the first dot, the format is what follows the last one, the field's name is in between. Four kinds of value exist:

    picture   .png .jpg .jpeg .webp .gif    uint8 array (H, W, 3), RGB; written as PNG
    text      .txt                          str, UTF-8
    data      .json                         list, dict, number or bool
    array     .npy                          array of numbers (bool, int, uint, float), little-endian, never pickled

Members written by others often have no field name (`000017.jpg`, `000017.txt`); they get the name in `BARE_FIELDS`.
Nothing in a sample is trusted: every size is compared with a cap, or with the bytes that are really there, before memory is taken,
and nothing is ever unpickled.
"""

import ast
import functools
import io
import json
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from stages.errors import DataError

IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "gif")
FORMATS = (*IMAGE_FORMATS, "txt", "json", "npy")
BARE_FIELDS = {**dict.fromkeys(IMAGE_FORMATS, "image"), "txt": "caption", "json": "meta", "npy": "array"}
# the last word of a field that is always an array, even where its shape could be a picture's
ARRAY_WORDS = ("codes", "latents", "features", "ids")

MAX_PIXELS = 64 * 1024 * 1024
MAX_CHARACTERS = 1_000_000
MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_JSON_DEPTH = 64
MAX_ARRAY_BYTES = 512 * 1024 * 1024
MAX_PICTURE_BYTES = 8 * MAX_PIXELS  # sixteen bits in each of four channels, not compressed
MAX_BYTES = {  # of a member, by its format: what is larger is refused by what its header says, before it is read
    **dict.fromkeys(IMAGE_FORMATS, MAX_PICTURE_BYTES),
    "txt": 4 * MAX_CHARACTERS,
    "json": MAX_JSON_BYTES,
    "npy": MAX_ARRAY_BYTES,
}
MAX_KEY_CHARACTERS = 1024

FIELD_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_SIMPLE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # nearly every key: nothing more to ask
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Sample:
    """One row of a shard. `source` says where it was read (the tar's path), for messages."""

    key: str
    fields: dict[str, Any]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A field's bytes as they are (or shall be) in the tar, so that a JPEG can pass through a stage untouched."""

    suffix: str
    data: bytes


def check_key(key: str) -> None:
    """DataError unless `key` can be a sample's key: a name without dots, or one behind folders (`cats/0001`), that is safe as a path."""
    if isinstance(key, str) and _SIMPLE_KEY.fullmatch(key):
        return
    if not isinstance(key, str) or not key:
        raise DataError(f"key {key!r}: expected a non-empty string")
    *folders, name = key.split("/")
    if "." in name:
        hint = f"for example '{key.replace('.', '-')}'"
        raise DataError(f"key {key!r}: a key has no dots, webdataset ends it at the first one", hint=hint)
    if not name or not all(folder.strip(".") for folder in folders):
        raise DataError(f"key {key!r}: an empty part, or one made of dots, around a slash")
    if not key.isprintable() or "\\" in key:
        raise DataError(f"key {key!r}: unprintable characters, or a backslash")
    if key.startswith("__") and key.endswith("__"):
        raise DataError(f"key {key!r}: webdataset skips names between double underscores")
    if len(key) > MAX_KEY_CHARACTERS:
        raise DataError(f"key '{key[:40]}…': {len(key)} characters, the cap is {MAX_KEY_CHARACTERS}")


@functools.lru_cache(maxsize=4096)
def split_suffix(suffix: str) -> tuple[str, str] | None:
    """(field name, format) of what follows the key in a member's name; None where mmgen does not read that format.

    `image.codes.npy` is ("image.codes", "npy"), the bare `jpg` is ("image", "jpg"), `pyd` is None.
    """
    name, _, form = suffix.lower().rpartition(".")
    if form not in FORMATS or (name and not FIELD_NAME.fullmatch(name)):
        return None
    return name or BARE_FIELDS[form], form


def encode_field(name: str, value: Any) -> tuple[str, bytes]:
    """(what follows the key in the member's name, its bytes). Equal values give equal bytes.

    A uint8 array (H, W, 3) is written as PNG unless the field's last word is one of ARRAY_WORDS; other arrays as NPY, strings as
    text, lists, dicts and numbers as JSON; `Encoded` bytes stay as they are. Raises DataError naming the field.
    """
    if not FIELD_NAME.fullmatch(name):
        raise DataError(f"field {name!r}: expected lower-case words joined by dots, such as 'image.codes'")
    if isinstance(value, Encoded):
        if value.suffix not in FORMATS:
            raise DataError(f"field '{name}': format '{value.suffix}' is none of {', '.join(FORMATS)}")
        if reason := too_large(value.suffix, len(value.data)):
            raise DataError(f"field '{name}': {reason}")
        return f"{name}.{value.suffix}", bytes(value.data)
    if isinstance(value, str):
        return f"{name}.txt", _encode_text(name, value)
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3 and name.rpartition(".")[2] not in ARRAY_WORDS:
            return f"{name}.png", _encode_png(name, value)
        return f"{name}.npy", _encode_array(name, value)
    if isinstance(value, dict | list | tuple | bool | int | float):
        return f"{name}.json", _encode_json(name, value)
    raise DataError(f"field '{name}': found a {type(value).__name__}, expected str, numpy array, list, dict, number or Encoded")


def decode_field(suffix: str, data: bytes) -> tuple[str, Any]:
    """(field name, value) of a member whose name goes on with `suffix` after the key. Raises DataError with the reason."""
    found = split_suffix(suffix)
    if found is None:
        raise DataError(f"'{suffix}': not a format mmgen reads ({', '.join(FORMATS)})")
    name, form = found
    return name, decode_value(form, data)


def too_large(form: str, size: int) -> str:
    """Why a member of this format and size is not read; empty where it may be."""
    return f".{form} of {size:,} bytes, the cap is {MAX_BYTES[form]:,}" if size > MAX_BYTES[form] else ""


def decode_value(form: str, data: bytes) -> Any:
    """The value of bytes in one of FORMATS. Raises DataError with the reason, taking no more memory than the caps allow."""
    if form == "txt":
        return _decode_text(data)
    if form == "npy":
        return decode_array(data)
    if form == "json":
        return _decode_json(data)
    return decode_image(data)


# --- text and JSON ----------------------------------------------------------------------------------------------------------------


def _encode_text(name: str, value: str) -> bytes:
    if len(value) > MAX_CHARACTERS:
        raise DataError(f"field '{name}': {len(value):,} characters, the cap is {MAX_CHARACTERS:,}")
    if "\0" in value:
        raise DataError(f"field '{name}': NUL at character {value.index(chr(0))}, not text")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"field '{name}': {error.reason} at character {error.start}, not valid as UTF-8") from None


def _decode_text(data: bytes) -> str:
    if len(data) > 4 * MAX_CHARACTERS:
        raise DataError(f"text of {len(data):,} bytes, the cap is {MAX_CHARACTERS:,} characters")
    if b"\0" in data:  # what tars have between members, and no text has in it
        raise DataError(f"text with NUL at byte {data.index(0)}: not text, or overwritten with zeroes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8: {error.reason} at byte {error.start}") from None
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"text of {len(text):,} characters, the cap is {MAX_CHARACTERS:,}")
    return text


def _encode_json(name: str, value: Any) -> bytes:
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"field '{name}': cannot be written as JSON: {error}") from None
    if len(data) > MAX_JSON_BYTES or _depth(data, value) > MAX_JSON_DEPTH:
        raise DataError(f"field '{name}': {len(data):,} bytes of JSON, the caps are {MAX_JSON_BYTES:,} bytes and {MAX_JSON_DEPTH} levels")
    return data


def _decode_json(data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"JSON of {len(data):,} bytes, the cap is {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise DataError(f"JSON nested too deeply, the cap is {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise DataError(f"not valid JSON: {error}") from None
    if _depth(data, value) > MAX_JSON_DEPTH:
        raise DataError(f"JSON nested too deeply, the cap is {MAX_JSON_DEPTH} levels")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _depth(data: bytes, value: Any) -> int:
    """Levels of lists and dicts. Few brackets cannot nest deeply, so that most values are not walked."""
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return 0
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list | tuple)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


# --- arrays -----------------------------------------------------------------------------------------------------------------------


def _encode_array(name: str, value: np.ndarray) -> bytes:
    if value.dtype.kind not in "biuf":
        raise DataError(f"field '{name}': array of dtype {value.dtype}, expected bool, int, uint or float")
    if reason := too_large("npy", value.nbytes + 10_000):  # with the largest header that is read
        raise DataError(f"field '{name}': {reason}")
    little = value.astype(value.dtype.newbyteorder("<"), order="C", copy=False)
    return _npy_header(little.dtype.str, little.shape) + little.tobytes()


@functools.lru_cache(maxsize=4096)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """The array of an NPY file, in memory of its own. Raises DataError where it is not one, or holds anything but numbers."""
    dtype, fortran, shape, start = npy_header(data)
    flat = np.frombuffer(data, dtype, offset=start) if start < len(data) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), order="C")


def npy_header(data: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """(dtype, Fortran order, shape, where the numbers start) of an NPY file.

    The header must describe exactly the bytes that follow it, so that a lie costs no memory. Raises DataError.
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise DataError(f"not an NPY array: starts with {bytes(data[:8])!r}")
    first = 10 if data[6] == 1 else 12
    start = first + int.from_bytes(data[8:first], "little")
    if start > min(len(data), 10_000):
        raise DataError(f"NPY header of {start:,} bytes in a member of {len(data):,}")
    dtype, fortran, shape = _parse_npy_header(bytes(data[first:start]))
    declared = dtype.itemsize * math.prod(shape)
    if declared != len(data) - start:
        raise DataError(f"array header promises {dtype} {shape} = {declared:,} bytes, the member holds {len(data) - start:,}")
    return dtype, fortran, shape, start


@functools.lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    try:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
        dtype = np.dtype(descr) if isinstance(descr, str) else None
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise DataError("NPY header cannot be read") from None
    if dtype is None or dtype.kind not in "biuf":
        raise DataError(f"array of dtype {descr!r}, expected bool, int, uint or float (objects would be pickled: never loaded)")
    sizes = isinstance(shape, tuple) and len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(fortran, bool):
        raise DataError(f"NPY header with shape {shape!r}, fortran_order {fortran!r}")
    return dtype, fortran, shape


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def _encode_png(name: str, value: np.ndarray) -> bytes:
    height, width = value.shape[:2]
    if not height or not width or height * width > MAX_PIXELS:
        raise DataError(f"field '{name}': a picture of {width} x {height} pixels, expected at least one and at most {MAX_PIXELS:,}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(value)).save(buffer, "PNG")
    return buffer.getvalue()


class _PictureHeader(NamedTuple):
    """What the first bytes of a picture declare. plain: there is nothing to interpret, such as an EXIF orientation, behind the pixels."""

    form: str
    width: int
    height: int
    plain: bool


def _picture_header(data: bytes) -> _PictureHeader:
    """Format and size, with nothing decoded and no memory taken. The file's own signature counts, not the member's suffix."""
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_header(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return _PictureHeader("png", width, height, b"eXIf" not in data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        chunk = data[12:16]
        if chunk == b"VP8X":
            width, height = int.from_bytes(data[24:27], "little"), int.from_bytes(data[27:30], "little")
            return _PictureHeader("webp", width + 1, height + 1, False)
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return _PictureHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, True)
        if chunk == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return _PictureHeader("webp", width & 0x3FFF, height & 0x3FFF, True)
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        return _PictureHeader("gif", width, height, True)
    raise DataError(f"not a PNG, JPEG, WebP or GIF picture: {'it is empty' if not data else f'starts with {bytes(data[:12])!r}'}")


def _jpeg_header(data: bytes) -> _PictureHeader:
    """From the frame header; plain: one or three 8-bit components, and no EXIF or Adobe segment."""
    plain, at, last = True, 2, len(data) - 10
    while at <= last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            return _PictureHeader("jpg", width, height, plain and precision == 8 and components in (1, 3))
        if marker in (0xE1, 0xEE):
            plain = False
        elif marker in (0xD9, 0xDA):  # the end, or pixels, without a frame
            break
        # between segments there may be any number of fill bytes 0xFF
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8) + data[at + 3]
    raise DataError("JPEG without a baseline or progressive frame header")


def image_shape(data: bytes) -> tuple[int, int, int]:
    """The shape `decode_image` will return, (H, W, 3), without decoding. Raises DataError where the header cannot be read."""
    form, width, height, plain = _picture_header(data)
    if not plain:
        try:
            with _open_picture(form, data) as picture:
                if _orientation(picture) >= 5:  # a quarter turn, with or without a mirror
                    width, height = height, width
        except _DECODER_ERRORS as error:
            raise DataError(f"{form} picture of {width} x {height} pixels cannot be opened: {str(error) or 'it is damaged'}") from None
    return height, width, 3


def decode_image(data: bytes) -> np.ndarray:
    """The picture as a viewer shows it: uint8 (H, W, 3), RGB, turned by its EXIF orientation, on white where it is transparent,
    the first frame where it moves, 16 bits a channel as the nearest of 256 levels (in colour and beside an alpha channel as the high byte).
    Colour profiles are left aside: numbers are taken for sRGB. Raises DataError, before decoding where the declared size exceeds
    MAX_PIXELS.
    """
    form, width, height, plain = _picture_header(data)
    if width * height > MAX_PIXELS:
        raise DataError(f"picture of {width:,} x {height:,} pixels, the cap is {MAX_PIXELS:,} pixels")
    try:
        if form == "jpg" and plain and (decode_jpeg := _fast_jpeg_decoder()):
            return decode_jpeg(data)
        with _open_picture(form, data) as picture:
            picture.load()
            return np.array(_as_shown(picture, turned=not plain))
    except _DECODER_ERRORS as error:
        raise DataError(f"{form} picture of {width} x {height} pixels cannot be decoded: {str(error) or 'it is damaged'}") from None


# decoders meet hostile bytes with whatever their parsers raise
_DECODER_ERRORS = (
    OSError,
    AssertionError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


def _open_picture(form: str, data: bytes) -> Image.Image:
    # by class, because Image.open would offer the bytes to some forty formats that are no part of a shard
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of a broken EXIF block, which a viewer ignores
        if form == "png":
            return _png(data)
        if form == "webp":
            if len(data) < 8 + int.from_bytes(data[4:8], "little"):
                raise OSError("image file is truncated")
            return WebPImageFile(io.BytesIO(data))
        return JpegImageFile(io.BytesIO(data)) if form == "jpg" else GifImageFile(io.BytesIO(data))


def _png(data: bytes) -> PngImageFile:
    """Pillow scales grey of 2 and 4 bits to 8, and colour of 16, but leaves the value that means transparent in the file's own bits."""
    picture, depth = PngImageFile(io.BytesIO(data)), data[24]
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int) and picture.mode == "L":
        picture.info["transparency"] = transparent * 255 // (2**depth - 1)
    elif isinstance(transparent, tuple) and depth == 16:
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    return picture


@functools.cache
def _fast_jpeg_decoder() -> Callable[[bytes], np.ndarray] | None:
    """torchvision's JPEG decoder: Pillow's pixels (both are libjpeg-turbo) in less than half the time at 64 px; None without it.

    The operator is called directly because its Python wrapper is deprecated and warns at every picture.
    """
    try:
        import torch
        import torchvision  # noqa: F401  (registers the operator)

        operator = torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None

    def decode_jpeg(data: bytes) -> np.ndarray:
        try:
            pixels = operator(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3, False)  # 3 = RGB
        except RuntimeError as error:  # "decode_jpeg, FILE:LINE, REASON" and perhaps a stack
            raise OSError(str(error).partition("\n")[0].rpartition(", ")[2]) from None
        return pixels.permute(1, 2, 0).contiguous().numpy()

    return decode_jpeg


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; a viewer shows a picture with a broken EXIF block as it is."""
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = picture.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return orientation if orientation in range(1, 9) else 1


# how a picture of each orientation is brought upright (EXIF 2.3, 4.6.4, tag 0x0112)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _as_shown(picture: Image.Image, *, turned: bool) -> Image.Image:
    if turned and (orientation := _orientation(picture)) != 1:
        info = picture.info
        picture = picture.transpose(_UPRIGHT[orientation])
        picture.info = info  # the colour that means transparent stays with it
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        return _sixteen_bit_grey(picture)
    if picture.has_transparency_data:
        shown = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return picture.convert("RGB")


def _sixteen_bit_grey(picture: Image.Image) -> Image.Image:
    """The nearest of 256 levels, 65,535 / 257 = 255, where convert() would clip; the level that means transparent is white."""
    levels = np.asarray(picture).astype(np.uint32).clip(0, 65535)
    grey = ((levels * 255 + 32_895) >> 16).astype(np.uint8)  # levels / 257, rounded
    if "transparency" in picture.info:
        grey[levels == picture.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
