"""Images as people see them: never larger than a report can bear, recognizable in a terminal, explained in color."""

import re

import numpy as np
import pytest

from trilobe.tasks.image_classification.data import decode, encode
from trilobe.tasks.image_classification.model import network
from trilobe.tasks.image_classification.report import SIDE, explain, picture, terminal

SHAPES = [(1, 1, 1), (8, 8, 1), (28, 28, 1), (100, 30, 3), (30, 100, 1), (96, 96, 3), (97, 12, 1)]
SHAPES += [(500, 700, 3), (1, 5000, 1)]
CELL = re.compile(r"\x1b\[38;5;(\d+)m\x1b\[48;5;(\d+)m▀")


def pixels(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_picture_fits_its_frame_and_fills_half_of_it(shape: tuple[int, int, int]) -> None:
    shown = decode(picture(pixels(shape)))
    assert max(shown.shape[:2]) <= SIDE and max(shown.shape[:2]) > SIDE / 2 and shown.shape[2] == shape[2]


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    image = pixels((8, 6, 3))
    shown = decode(picture(image))
    assert shown.shape == (96, 72, 3)
    np.testing.assert_array_equal(shown[::12, ::12], image)
    np.testing.assert_array_equal(shown[11::12, 5::12], image)


def cells(text: str) -> np.ndarray:
    """Gray levels 0 to 23, two rows per line."""
    rows = []
    for line in text.split("\n"):
        found = CELL.findall(line)
        assert line == "".join(f"\x1b[38;5;{a}m\x1b[48;5;{b}m▀" for a, b in found) + "\x1b[0m", (
            "nothing else, and reset"
        )
        rows += [[int(a) for a, _ in found], [int(b) for _, b in found]]
    return np.array(rows) - 232


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [1, 32, 80])
def test_a_terminal_drawing_is_neither_wide_nor_long(shape: tuple[int, int, int], width: int) -> None:
    drawn = cells(terminal(pixels(shape), width))
    assert 1 <= drawn.shape[1] <= width and 2 <= drawn.shape[0] <= 2 * width
    assert drawn.min() >= 0 and drawn.max() <= 23


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ((8, 8, 1), (16, 16)),
        ((28, 28, 1), (32, 32)),
        ((100, 30, 1), (64, 19)),
        ((30, 100, 3), (10, 32)),
        ((1, 1, 1), (2, 2)),
    ],
)
def test_proportions_are_kept(shape: tuple[int, int, int], drawn: tuple[int, int]) -> None:
    assert cells(terminal(pixels(shape))).shape == drawn


def test_what_is_drawn_is_the_picture() -> None:
    half = np.zeros((8, 8, 1), np.uint8)
    half[:, 4:] = 255
    drawn = cells(terminal(half))
    assert (drawn[:, :8] == 0).all() and (drawn[:, 8:] == 23).all()
    assert (cells(terminal(half.transpose(1, 0, 2)))[8:] == 23).all()
    assert (cells(terminal(np.full((9, 9, 3), 128, np.uint8))) == 128 * 23 // 255).all()


@pytest.mark.parametrize("shape", [(8, 8, 1), (20, 31, 3), (300, 200, 3)], ids=str)
def test_an_explanation_lies_over_the_same_picture(shape: tuple[int, int, int]) -> None:
    spec = {"version": "resize.v1", "height": 12, "width": 10, "channels": shape[2]}
    items = [pixels(shape, seed) for seed in range(2)]
    found = explain(network(spec, 3, width=4).eval(), items, encode(items, spec))
    assert len(found) == 2
    for item, (shown, why, residual) in zip(items, found, strict=True):
        assert shown == picture(item)
        assert decode(why).shape == (*decode(shown).shape[:2], 3) and 0 <= residual < 1e-3
    assert found[0][1] != found[1][1]
