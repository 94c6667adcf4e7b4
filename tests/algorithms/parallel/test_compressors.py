"""What each compressor promises: its size, its bias or lack of it, what it keeps."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilobe.algorithms.parallel.compressors import BLOCK, COMPRESSORS, Encoding, mean_absolute


def through(name: str, x: torch.Tensor, e: Encoding, pieces: Sequence[int] = ()) -> torch.Tensor:
    compressor, out = COMPRESSORS[name], torch.full_like(x, float("nan"))
    row = torch.zeros(compressor.size(len(x), e), dtype=torch.uint8)
    pieces = list(pieces or [len(x)])
    compressor.decode(row, compressor.encode(x, row, pieces, e), out, pieces, e)
    return out


def encoding(**changes: object) -> Encoding:
    return dataclasses.replace(Encoding(torch.Generator().manual_seed(0)), **changes)


@given(st.integers(1, 1500), st.sampled_from(sorted(COMPRESSORS)), st.integers(1, 127), st.booleans())
def test_every_compressor_fills_any_length_without_touching_its_input(
    n: int, name: str, levels: int, scaled: bool
) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    before = x.clone()
    out = through(name, x, encoding(levels=levels, scaled=scaled, ratio=0.1))
    assert torch.isfinite(out).all()
    assert torch.equal(x, before)
    assert (out * x >= 0).all() or name == "stochastic_sign"  # nobody turns a sign around


def test_none_loses_nothing() -> None:
    x = torch.randn(77)
    assert torch.equal(through("none", x, encoding()), x)


def test_scaled_sign_is_the_nearest_of_its_kind() -> None:
    x = torch.randn(1001)
    out = through("sign", x, encoding(scaled=True))
    assert out.abs().unique().tolist() == pytest.approx([float(x.abs().mean())])
    assert mean_absolute(x) == pytest.approx(float(np.abs(x.numpy().astype(float)).mean()), rel=1e-5)
    errors = [
        float((x - scale * x.sign()).square().sum()) for scale in (0.9 * mean_absolute(x), 1.1 * mean_absolute(x))
    ]
    assert float((x - out).square().sum()) < min(errors)


@pytest.mark.parametrize("name", ["sign", "stochastic_sign"])
def test_every_piece_has_a_scale_of_its_own(name: str) -> None:
    x = torch.cat([torch.randn(77), 1000 * torch.randn(3), 1e-6 * torch.randn(50)])
    out = through(name, x, encoding(scaled=True), (77, 3, 50))
    for sent, piece in zip(out.split((77, 3, 50)), x.split((77, 3, 50)), strict=True):
        assert sent.abs().unique().tolist() == pytest.approx([mean_absolute(piece)])


@pytest.mark.parametrize(
    ("name", "levels"), [("stochastic_sign", 1), ("quantize", 1), ("quantize", 7), ("quantize", 50)]
)
def test_random_compressors_are_right_on_average(name: str, levels: int) -> None:
    """Of signs with noise, what is beyond the noise's bound counts as the bound."""
    x, e, n = torch.linspace(-1, 1, 40), encoding(scaled=True, levels=levels), 4000
    bound = float(np.abs(x.numpy().astype(float)).mean()) if name == "stochastic_sign" else 1.0
    draws = torch.stack([through(name, x, e) for _ in range(n)])
    error = (draws.mean(dim=0) - x.clamp(-bound, bound)).abs()
    assert (error < 4.5 * draws.std(dim=0) / n**0.5 + 1e-6).all()


def test_quantize_lands_on_its_levels_next_to_the_value() -> None:
    x = torch.randn(512)
    step = float(x.norm()) / 7
    out = through("quantize", x, encoding(levels=7))
    assert torch.allclose(out / step, (out / step).round(), atol=1e-4)
    assert ((out - x).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("n", [1, 30, 200, BLOCK, BLOCK + 1, 3 * BLOCK + 70])
def test_top_k_keeps_the_largest_of_every_block_and_nothing_else(n: int) -> None:
    x, e = torch.randn(n, generator=torch.Generator().manual_seed(n)), encoding(ratio=0.05)
    out, whole = through("top_k", x, e), max(1, round(0.05 * n))
    assert int((out != 0).sum()) == whole
    assert COMPRESSORS["top_k"].size(n, e) == 4 * whole
    for block, sent in zip(x.split(BLOCK), out.split(BLOCK), strict=True):
        k = int((sent != 0).sum())
        assert abs(k - 0.05 * len(block)) <= 1
        assert set(torch.nonzero(sent).view(-1).tolist()) == set(np.argsort(-block.abs().numpy())[:k].tolist())
    assert torch.equal(out[out != 0], x[out != 0].bfloat16().float())


@given(st.integers(1, 5 * BLOCK), st.integers(0, 2 * BLOCK), st.floats(0, 1))
def test_a_shorter_vector_never_takes_more_bytes(n: int, more: int, ratio: float) -> None:
    """The last chunk of a message is shorter than the others and written into a row of the same size."""
    for compressor in COMPRESSORS.values():
        e = encoding(ratio=ratio)
        assert compressor.size(n, e) <= compressor.size(n + more, e)
