"""Images as people send them: every mode and damage; and the one way from pixels to input."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from trilobe.errors import UnreadableExample, UsageError
from trilobe.tasks.image_classification.data import (
    FORMATS,
    SUFFIXES,
    choose_preprocessing,
    content_digest,
    decode,
    encode,
    encode_png,
)

pixels_of_any_size = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])).flatmap(
    lambda shape: hnp.arrays(np.uint8, shape)
)


def file(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def picture(height: int = 5, width: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    """Something JPEG keeps: brighter to the right, redder downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(x, 90)], axis=2).astype(np.uint8)


def png_header(width: int, height: int, depth: int = 8, kind: int = 0) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- every mode ----


@settings(max_examples=40, deadline=None)
@given(pixels_of_any_size)
def test_png_round_trip(pixels: np.ndarray) -> None:
    back = decode(encode_png(pixels))
    assert back.dtype == np.uint8 and back.flags.c_contiguous
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_gray(format_: str) -> None:
    gray = picture(channels=1)
    np.testing.assert_array_equal(decode(file(Image.fromarray(gray[..., 0]), format_)), gray)


@pytest.mark.parametrize(
    ("format_", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]
)
def test_color(format_: str, options: dict[str, bool]) -> None:
    np.testing.assert_array_equal(decode(file(Image.fromarray(picture()), format_, **options)), picture())


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_black_and_white(format_: str) -> None:
    bits = picture(channels=1)[..., 0] > 127
    np.testing.assert_array_equal(decode(file(Image.fromarray(bits), format_))[..., 0], bits * np.uint8(255))


def test_palette() -> None:
    image = Image.fromarray(smooth()).quantize(16)
    np.testing.assert_array_equal(decode(file(image)), np.asarray(image.convert("RGB")))


def test_palette_with_a_transparent_color() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 30, 0, 0, 0])
    image.putdata([0, 1])
    assert decode(file(image, transparency=1)).tolist() == [[[200, 10, 30], [255, 255, 255]]]


def test_transparency_is_laid_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    assert decode(file(Image.fromarray(rgba))).tolist() == [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]


def test_gray_with_transparency_stays_gray() -> None:
    la = np.array([[[100, 255], [100, 0], [0, 51]]], dtype=np.uint8)
    assert decode(file(Image.fromarray(la))).tolist() == [[[100], [255], [204]]]
    gray = Image.fromarray(np.array([[7, 8]], dtype=np.uint8))
    assert decode(file(gray, transparency=8)).tolist() == [[[7], [255]]]
    bits = Image.fromarray(np.array([[False, True]]))
    assert decode(file(bits, transparency=0)).tolist() == [[[255], [255]]]


def test_color_with_a_transparent_color() -> None:
    rgb = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8))
    assert decode(file(rgb, transparency=(1, 2, 3))).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_print_colors() -> None:
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    np.testing.assert_array_equal(decode(file(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    assert decode(file(cmyk, "JPEG")).shape == (24, 32, 3)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(format_: str) -> None:
    wide = np.array([[0, 256, 257, 32896, 65534, 65535]], dtype=np.uint16)
    assert decode(file(Image.fromarray(wide), format_))[..., 0].tolist() == [[0, 0, 1, 128, 254, 255]]
    every = (np.arange(256, dtype=np.uint16) * 257)[None]
    assert decode(file(Image.fromarray(every), format_))[0, :, 0].tolist() == list(range(256)), "8 bits survive"


def test_sixteen_bits_of_a_portable_graymap() -> None:
    assert decode(b"P5\n2 1\n65535\n\xff\xff\x80\x80").tolist() == [[[255], [128]]]


def test_thirty_two_bits_are_cut() -> None:
    wide = np.array([[-5, 0, 25700, 70000]], dtype=np.int32)
    assert decode(file(Image.fromarray(wide), "TIFF"))[..., 0].tolist() == [[0, 0, 100, 255]]
    real = np.array([[-5.0, 12.7, 300.0, np.inf]], dtype=np.float32)
    assert decode(file(Image.fromarray(real), "TIFF"))[..., 0].tolist() == [[0, 12, 255, 255]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_photographs_are_upright(turn: int) -> None:
    """All eight EXIF orientations, against numpy: 6 is a camera held on its side."""
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, -1)[:, ::-1][::-1, ::-1].transpose(0, 1, 2),
        8: lambda a: np.rot90(a),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.fromarray(smooth())
    plain = decode(file(image, "JPEG", quality=95))
    turned = decode(file(image, "JPEG", quality=95, exif=exif))
    np.testing.assert_array_equal(turned, upright(plain))
    np.testing.assert_array_equal(decode(file(Image.fromarray(picture()), "PNG", exif=exif)), upright(picture()))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(np.full((4, 6), v, dtype=np.uint8)) for v in (10, 200, 90)]
    pixels = decode(file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels.shape[:2] == (4, 6) and (pixels == 10).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (1, 20_000, 1), (3000, 1, 3)])
def test_extreme_shapes(shape: tuple[int, int, int]) -> None:
    pixels = picture(*shape)
    np.testing.assert_array_equal(decode(encode_png(pixels)), pixels)


def test_every_suffix_has_a_format_that_is_read() -> None:
    Image.init()
    assert {Image.EXTENSION[s] for s in SUFFIXES} == set(FORMATS)


# ---- what cannot be used ----


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "an empty file"),
        (b"hello, I am a cat", "not an image: it begins with 'hello, I am a cat'"),
        (b"first line\nsecond", "not an image: it begins with 'first line'"),
        (b"\x89PNG\r\n\x1a\n", "not an image|a damaged image"),
        (b"\0" * 100, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image: it begins"),
        (png_header(0, 5), "not an image|a damaged image"),
        (png_header(4, 4), "a damaged image"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_image(data: bytes, problem: str) -> None:
    with pytest.raises(UnreadableExample, match=problem):
        decode(data)


@pytest.mark.parametrize("format_", sorted(FORMATS))
def test_truncated_files_are_refused_or_whole(format_: str) -> None:
    """Never a picture that is partly there: wherever a file is cut, it is refused or nothing visible was lost."""
    data = file(Image.fromarray(smooth()), format_)
    whole, refused = decode(data), 0
    for cut in range(0, len(data), max(1, len(data) // 80)):
        try:
            np.testing.assert_array_equal(decode(data[:cut]), whole)
        except UnreadableExample:
            refused += 1
    assert refused > 60


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_damaged_files_are_refused_or_read_but_nothing_else(format_: str, at: int, noise: bytes) -> None:
    data = bytearray(file(Image.fromarray(smooth(6, 8)), format_))
    at %= len(data)
    data[at : at + len(noise)] = noise
    try:
        pixels = decode(bytes(data), max_pixels=10_000)
    except UnreadableExample as e:
        assert e.expected
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3)


@pytest.mark.parametrize("side", [8_000, 12_000, 100_000])
def test_an_image_bomb_is_refused_from_its_header(side: int) -> None:
    tracemalloc.start()
    with pytest.raises(UnreadableExample, match="expected at most 50,000,000 pixels") as caught:
        decode(png_header(side, side))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6 and "image.max_pixels" in caught.value.hint


def test_the_limit_is_exact() -> None:
    data = encode_png(picture(4, 5))
    assert decode(data, max_pixels=20).shape == (4, 5, 3)
    with pytest.raises(UnreadableExample, match="an image of 5 x 4 pixels; expected at most 19 pixels"):
        decode(data, max_pixels=19)


# ---- identity ----


def test_the_digest_is_of_the_picture_not_of_the_file() -> None:
    for pixels in (picture(), picture(channels=1)):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        digests = {content_digest(decode(file(image, f))) for f in ("PNG", "BMP", "TIFF", "PPM")}
        assert digests == {content_digest(pixels)}
    assert content_digest(picture()) != content_digest(picture(seed=1))
    assert content_digest(np.zeros((2, 3, 1), np.uint8)) != content_digest(np.zeros((3, 2, 1), np.uint8))
    assert content_digest(picture()[:, ::-1][:, ::-1]) == content_digest(picture()), "whatever its memory looks like"


# ---- pixels to input ----

SPEC = {"version": "resize.v1", "height": 4, "width": 6, "channels": 1}


def test_what_fits_is_only_scaled() -> None:
    pixels = picture(4, 6, 1)
    x = encode([pixels], SPEC)
    assert x.shape == (1, 1, 4, 6) and x.dtype == np.float32 and x.flags.c_contiguous
    np.testing.assert_array_equal(x[0, 0], pixels[..., 0].astype(np.float32) / np.float32(255))


@settings(max_examples=40, deadline=None)
@given(st.lists(pixels_of_any_size, max_size=4), st.sampled_from([1, 3]))
def test_any_image_becomes_input_between_0_and_1(images: list[np.ndarray], channels: int) -> None:
    x = encode(images, SPEC | {"channels": channels})
    assert x.shape == (len(images), channels, 4, 6) and x.dtype == np.float32
    assert x.size == 0 or (x.min() >= 0 and x.max() <= 1)
    for image, row in zip(images, x, strict=True):  # alone or in a batch: the same
        np.testing.assert_array_equal(encode([image], SPEC | {"channels": channels})[0], row)
        if (image == image[0, 0, 0]).all():
            assert np.allclose(row, image[0, 0, 0] / 255, atol=1 / 255)


def test_gray_becomes_color_and_color_gray() -> None:
    gray = picture(4, 6, 1)
    x = encode([gray], SPEC | {"channels": 3})
    assert (x[0, 0] == x[0, 1]).all() and (x[0, 1] == x[0, 2]).all() and (x[0, :1] == encode([gray], SPEC)[0]).all()
    color = picture(4, 6, 3)
    luma = color @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(encode([color], SPEC)[0, 0] * 255, luma, atol=1)


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    board = (np.indices((40, 60)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    np.testing.assert_allclose(encode([board], SPEC), 0.5, atol=0.02)
    ramp = encode([np.array([[[0], [255]]], dtype=np.uint8)], SPEC)[0, 0, 0]
    assert (np.diff(ramp) >= 0).all() and 0 < ramp[2] < ramp[3] < 1


def test_a_stack_is_as_good_as_a_list() -> None:
    stack = np.stack([picture(9, 8, 3, seed) for seed in range(3)])
    np.testing.assert_array_equal(encode(stack, SPEC), encode(list(stack), SPEC))
    before = stack.copy()
    encode(stack, SPEC)
    np.testing.assert_array_equal(stack, before)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 6), np.uint8),
        np.zeros((4, 6, 4), np.uint8),
        np.zeros((4, 6, 1), np.float32),
        np.zeros((1, 4, 6, 1), np.uint8),
    ],
)
def test_arrays_that_are_no_pixels(image: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"expected \(height, width, 1 or 3\) uint8"):
        encode([picture(4, 6, 1), image], SPEC)


def test_preprocessing_of_another_version() -> None:
    with pytest.raises(UsageError, match=r"preprocessing 'resize.v9'; expected 'resize.v1'"):
        encode([picture()], SPEC | {"version": "resize.v9"})


@pytest.mark.parametrize(
    ("shapes", "size", "want"),
    [
        ([(28, 28, 1)] * 3, 0, (28, 28, 1)),
        ([(8, 8, 1), (8, 8, 3), (8, 8, 1)], 0, (8, 8, 3)),
        ([(480, 640, 3)], 0, (48, 64, 3)),
        ([(10, 20, 1), (30, 20, 1), (1000, 20, 1)], 0, (30, 20, 1)),
        ([(480, 640, 3)], 32, (32, 32, 3)),
        ([(1, 1, 1)], 0, (4, 4, 1)),
        ([(1, 5000, 1)], 0, (4, 64, 1)),
    ],
)
def test_the_size_that_suits_the_pool(
    shapes: list[tuple[int, int, int]], size: int, want: tuple[int, int, int]
) -> None:
    chosen = choose_preprocessing(shapes, size)
    assert chosen == dict(zip(("version", "height", "width", "channels"), ("resize.v1", *want), strict=True))
    assert all(type(v) in (str, int) for v in chosen.values()), "plain values travel in the bundle"


def test_a_pool_of_nothing_has_no_size() -> None:
    with pytest.raises(UsageError, match="no images to choose a size from"):
        choose_preprocessing([])
