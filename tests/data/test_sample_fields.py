import contextlib
import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from stages.data import sample as fields
from stages.data.sample import Encoded, check_key, decode_array, decode_field, decode_image, encode_field, image_shape, split_suffix
from stages.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def picture_bytes(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


json_values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_comes_back(text):
    suffix, data = encode_field("caption", text)
    assert suffix == "caption.txt"
    assert decode_field(suffix, data) == ("caption", text)


def test_text_has_no_nul():
    with pytest.raises(DataError, match="NUL at character 3"):
        encode_field("caption", "cat\0")
    with pytest.raises(DataError, match="NUL at byte 3"):
        decode_field("caption.txt", b"cat\0")


@given(
    st.one_of(
        st.lists(json_values, max_size=5), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=5)
    )
)
def test_json_comes_back(value):
    suffix, data = encode_field("meta", value)
    assert suffix == "meta.json"
    assert decode_field(suffix, data) == ("meta", value)


@given(
    st_numpy.arrays(
        st.one_of(
            st_numpy.boolean_dtypes(),
            st_numpy.integer_dtypes(endianness="="),
            st_numpy.unsigned_integer_dtypes(),
            st_numpy.floating_dtypes(),
        ).filter(lambda dtype: dtype.itemsize <= 8),
        st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_arrays_come_back_with_dtype_and_shape(array):
    suffix, data = encode_field("image.latents", array)
    assert suffix == "image.latents.npy"
    name, back = decode_field(suffix, data)
    assert name == "image.latents"
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), array)


@given(st_numpy.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_pictures_come_back_pixel_for_pixel(pixels):
    suffix, data = encode_field("image", pixels)
    assert suffix == "image.png"
    assert image_shape(data) == pixels.shape
    np.testing.assert_array_equal(decode_field(suffix, data)[1], pixels)


def test_codes_are_an_array_even_in_the_shape_of_a_picture():
    assert encode_field("image.codes", COLOURS)[0] == "image.codes.npy"


def test_fortran_order_and_big_endian_arrays_are_read_and_written_in_one_form():
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    same = np.asfortranarray(array.astype("<i4"))
    assert encode_field("image.codes", array) == encode_field("image.codes", same)
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array))
    np.testing.assert_array_equal(decode_array(buffer.getvalue()), array)


def test_encoded_bytes_pass_through_untouched():
    data = picture_bytes(Image.fromarray(COLOURS), "JPEG")
    assert encode_field("image", Encoded("jpg", data)) == ("image.jpg", data)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("jpg", ("image", "jpg")),
        ("JPEG", ("image", "jpeg")),
        ("txt", ("caption", "txt")),
        ("json", ("meta", "json")),
        ("image.codes.npy", ("image.codes", "npy")),
        ("sample.image.png", ("sample.image", "png")),
        ("pyd", None),
        ("pickle", None),
        ("npz", None),
    ],
)
def test_names_in_the_tar_mean_these_fields(suffix, expected):
    assert split_suffix(suffix) == expected


@pytest.mark.parametrize("key", ["a.b", "", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "a\\b", "a\nb", "a\0b", "__meta__", "x" * 2000])
def test_keys_that_could_hurt_are_refused(key):
    with pytest.raises(DataError, match="key"):
        check_key(key)


@pytest.mark.parametrize("key", ["000017", "a b", "ключ-é", "v1.0/0001", "cats/0001", "_x"])
def test_ordinary_keys_are_fine(key):
    check_key(key)


# --- pictures as a viewer shows them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the white corner: top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    # how a camera stores the scene so that the tag brings it upright: rows and columns exchanged from 5 on, then mirrored as listed
    stored = upright.transpose(1, 0, 2) if orientation >= 5 else upright
    stored = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored,
        6: stored[::-1],
        7: stored[::-1, ::-1],
        8: stored[:, ::-1],
    }[orientation]
    data = picture_bytes(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
    shown = decode_image(data)
    assert shown.shape == upright.shape == image_shape(data)
    assert np.abs(shown.astype(int) - upright).max() < 40


def test_a_broken_exif_block_does_not_lose_the_picture():
    data = picture_bytes(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0II*\0garbage!" + bytes(20))
    assert decode_image(data).shape == (5, 7, 3)


def test_transparency_is_shown_on_white():
    pixels = np.dstack([COLOURS, np.zeros((5, 7), np.uint8)])
    assert (decode_image(picture_bytes(Image.fromarray(pixels), "PNG")) == 255).all()
    palette = Image.fromarray(COLOURS).quantize(8)
    transparent = picture_bytes(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert (decode_image(transparent)[0, 0] == 255).all()
    keyed = picture_bytes(Image.fromarray(COLOURS), "PNG", transparency=tuple(int(c) for c in COLOURS[2, 3]))
    assert (decode_image(keyed)[2, 3] == 255).all()
    assert (decode_image(keyed)[0, 0] == COLOURS[0, 0]).all()


def png_bytes(row: np.ndarray | bytes, width: int, depth: int, colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of one row, for what Pillow does not write. Colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"\0" + bytes(row)))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, body, png_chunk(b"IEND", b"")])


def sixteen(*levels: int) -> bytes:
    return np.array(levels, ">u2").tobytes()


def transparent(*levels: int) -> bytes:
    return png_chunk(b"tRNS", sixteen(*levels))


PALETTE = png_chunk(b"PLTE", bytes([200, 0, 0, 0, 100, 0]))


def test_sixteen_bit_grey_keeps_its_range():
    """Level v of 65,536 is v / 257 of 256, rounded (the PNG specification, 13.12), not clipped to white."""
    levels = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    shown = decode_image(picture_bytes(Image.fromarray(levels), "PNG"))
    np.testing.assert_array_equal(shown, np.repeat(np.round(levels / 257)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        pytest.param(png_bytes(sixteen(0, 0x80FF, 0xFFFF), 1, 16, 2), [[0, 0x80, 255]], id="16-bit RGB"),
        pytest.param(png_bytes(sixteen(0, 0xFFFF, 0, 0, 0x8080, 0xFFFF), 3, 16, 4), [[0] * 3, [255] * 3, [128] * 3], id="16-bit grey, alpha"),
        pytest.param(png_bytes(sixteen(0, 0, 0, 0x8000), 1, 16, 6), [[127] * 3], id="16-bit RGBA"),
        pytest.param(png_bytes(sixteen(0, 7, 300), 3, 16, 0, transparent(7)), [[0] * 3, [255] * 3, [1] * 3], id="16-bit grey, one transparent"),
        pytest.param(
            png_bytes(sixteen(0, 0xFF, 0x8000, 0xFFFF, 0, 0), 2, 16, 2, transparent(0, 0xFF, 0x8000)),
            [[255] * 3, [255, 0, 0]],
            id="16-bit RGB, one transparent",
        ),
        pytest.param(png_bytes(b"\x50", 4, 1, 0), [[0] * 3, [255] * 3, [0] * 3, [255] * 3], id="1-bit"),
        pytest.param(png_bytes(b"\x50", 4, 1, 0, transparent(0)), [[255] * 3] * 4, id="1-bit, black transparent"),
        pytest.param(png_bytes(b"\x1b", 4, 2, 0), [[0] * 3, [85] * 3, [170] * 3, [255] * 3], id="2-bit grey"),
        pytest.param(png_bytes(b"\x1b", 4, 2, 0, transparent(1)), [[0] * 3, [255] * 3, [170] * 3, [255] * 3], id="2-bit, one transparent"),
        pytest.param(png_bytes(b"\x12", 2, 4, 0, transparent(1)), [[255] * 3, [34] * 3], id="4-bit, one transparent"),
        pytest.param(png_bytes(b"\x00\x01", 2, 8, 3, PALETTE, png_chunk(b"tRNS", b"\x80\x00")), [[227, 127, 127], [255] * 3], id="palette, alpha"),
    ],
)  # fmt: skip
def test_rare_kinds_of_png_are_shown_as_a_viewer_shows_them(data, shown):
    np.testing.assert_array_equal(decode_image(data)[0], shown)


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")]
)
def test_every_colour_mode_becomes_rgb(mode, form):
    flat = Image.new("RGB", (17, 9), (204, 204, 204)).convert(mode, dither=Image.Dither.NONE)
    shown = decode_image(picture_bytes(flat, form))
    assert shown.shape == (9, 17, 3)
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - (255 if mode == "1" else 204)).max() <= 3


def test_a_gif_is_its_first_frame_on_white():
    frames = [Image.new("RGBA", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].paste((0, 0, 0, 0), (0, 0, 2, 3))
    data = picture_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert image_shape(data) == (3, 4, 3)
    np.testing.assert_array_equal(decode_image(data), [[[255, 255, 255]] * 2 + [[255, 0, 0]] * 2] * 3)
    assert decode_field("gif", data)[0] == "image"


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_first_frame_of_a_moving_picture_is_shown(form):
    frames = [Image.fromarray(np.roll(COLOURS, shift, axis=1)) for shift in range(3)]
    data = picture_bytes(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode_image(data), COLOURS)


def test_both_jpeg_decoders_give_the_same_pixels(monkeypatch):
    smooth = Image.fromarray(COLOURS).resize((37, 50), Image.Resampling.BICUBIC)
    pictures = [picture_bytes(smooth, "JPEG", quality=quality, subsampling=sub) for quality in (30, 95) for sub in (0, 1, 2)]
    pictures += [picture_bytes(smooth.convert("L"), "JPEG"), picture_bytes(smooth, "JPEG", progressive=True)]
    assert fields._fast_jpeg_decoder() is not None
    fast = [decode_image(data) for data in pictures]
    monkeypatch.setattr(fields, "_fast_jpeg_decoder", lambda: None)
    for data, pixels in zip(pictures, fast, strict=True):
        np.testing.assert_array_equal(decode_image(data), pixels)


def test_a_picture_under_the_wrong_suffix_is_read_by_its_signature():
    assert decode_field("jpg", picture_bytes(Image.fromarray(COLOURS), "PNG"))[1].shape == (5, 7, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_half_a_picture_is_one_clear_message(form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = picture_bytes(Image.fromarray(noise), form)
    with pytest.raises(DataError, match=r"^\w+ picture of 64 x 64 pixels cannot be decoded: [\w ,()]*truncated[\w ,()]*$"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a PNG, JPEG, WebP or GIF picture: it is empty"),
        (picture_bytes(Image.fromarray(COLOURS), "BMP"), "not a PNG, JPEG, WebP or GIF picture: starts with b'BM"),
        (
            png_bytes(b"\x00\x09", 2, 8, 3),
            "png picture of 2 x 1 pixels cannot be decoded: it is damaged",
        ),  # a palette picture without palette
    ],
)
def test_what_is_no_picture_is_one_clear_message(data, said):
    with pytest.raises(DataError) as caught:
        decode_image(data)
    assert caught.value.message.startswith(said)


# --- hostile bytes ----------------------------------------------------------------------------------------------------------------


def test_a_decompression_bomb_is_refused_by_its_header():
    row = zlib.compressobj()
    body = b"".join([*(row.compress(bytes(1 + 20_000 * 3)) for _ in range(20)), row.flush()])  # the rest would be as cheap
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own bomb warning would mean that it had opened the picture
        with pytest.raises(DataError, match=r"20,000 x 20,000 pixels, the cap is 67,108,864"):
            decode_image(bomb)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF"])
def test_declared_sizes_of_other_formats_are_capped_too(form, monkeypatch):
    monkeypatch.setattr(fields, "MAX_PIXELS", 34)
    with pytest.raises(DataError, match="7 x 5 pixels, the cap is 34"):
        decode_image(picture_bytes(Image.fromarray(COLOURS), form))


def test_an_array_that_promises_a_petabyte_takes_no_memory():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (250000000000000,), }".ljust(117) + b"\n"
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    with pytest.raises(DataError, match=r"promises float32 \(250000000000000,\) = 1,000,000,000,000,000 bytes, the member holds 64"):
        decode_array(lie)


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="never loaded"):
        decode_array(buffer.getvalue())


@pytest.mark.parametrize(
    "header",
    [
        b"__import__('os').system('true')",
        b"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': ()}",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}",
        b"[" * 5000,
        b"{}",
        b"\xff\xfe",
    ],
)
def test_odd_array_headers_are_refused(header):
    with pytest.raises(DataError):
        decode_array(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16))


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1', "", "[" * 100_000, "9" * 10_000, "[" * 65 + "]" * 65])
def test_json_that_is_not_plain_data_is_refused(text):
    with pytest.raises(DataError, match="JSON"):
        decode_field("json", text.encode())


def test_text_has_a_cap_and_an_encoding():
    with pytest.raises(DataError, match="1,000,001 characters"):
        decode_field("txt", b"x" * 1_000_001)
    with pytest.raises(DataError, match="not UTF-8"):
        decode_field("txt", b"caf\xe9")
    with pytest.raises(DataError, match="surrogates"):
        encode_field("caption", "\ud800")


@pytest.mark.parametrize("value", [None, b"bytes", {"a": np.int64(1)}, {"a": float("nan")}, np.array(["a"]), np.zeros(3, complex), {1, 2}])
def test_values_that_cannot_be_stored_are_named(value):
    with pytest.raises(DataError, match="'extra'"):
        encode_field("extra", value)


@given(st.binary(max_size=300), st.sampled_from(["", "\x89PNG\r\n\x1a\n", "\xff\xd8\xff\xe0", "RIFF0000WEBPVP8 ", "\x93NUMPY\x01\x00"]))
def test_any_bytes_give_a_value_or_a_data_error(data, start):
    for form in ("png", "npy", "json", "txt"):
        with contextlib.suppress(DataError):  # anything else fails the test
            fields.decode_value(form, start.encode("latin-1") + data)


@given(st.data())
def test_a_damaged_picture_never_raises_anything_else(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
    whole = bytearray(picture_bytes(Image.fromarray(COLOURS), form))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert decode_image(bytes(whole)).dtype == np.uint8


def test_equal_values_give_equal_bytes():
    assert encode_field("image", COLOURS) == encode_field("image", COLOURS.copy(order="F"))
    assert json.loads(encode_field("meta", {"b": 1, "a": [1.5, "é"]})[1]) == {"b": 1, "a": [1.5, "é"]}
