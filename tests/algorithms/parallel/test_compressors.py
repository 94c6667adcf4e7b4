"""What each compressor promises: its size, its bias or lack of it, what it keeps."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilobe.algorithms.parallel.compressors import COMPRESSORS, Encoding, mean_absolute


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
    scale = mean_absolute if name == "sign" else lambda piece: float(piece.abs().max())
    for sent, piece in zip(out.split((77, 3, 50)), x.split((77, 3, 50)), strict=True):
        assert sent.abs().unique().tolist() == pytest.approx([scale(piece)])


@pytest.mark.parametrize(
    ("name", "levels"), [("stochastic_sign", 1), ("quantize", 1), ("quantize", 7), ("quantize", 50)]
)
def test_random_compressors_are_right_on_average(name: str, levels: int) -> None:
    x, e, n = torch.linspace(-1, 1, 40), encoding(scaled=True, levels=levels), 4000
    draws = torch.stack([through(name, x, e) for _ in range(n)])
    error = (draws.mean(dim=0) - x).abs()
    assert (error < 4.5 * draws.std(dim=0) / n**0.5 + 1e-6).all()


def test_quantize_lands_on_its_levels_next_to_the_value() -> None:
    x = torch.randn(512)
    step = float(x.norm()) / 7
    out = through("quantize", x, encoding(levels=7))
    assert torch.allclose(out / step, (out / step).round(), atol=1e-4)
    assert ((out - x).abs() <= step * 1.0001).all()


def test_top_k_keeps_the_largest_and_nothing_else() -> None:
    x = torch.randn(200)
    out = through("top_k", x, encoding(ratio=0.05))
    kept = set(np.argsort(-x.abs().numpy())[:10].tolist())
    assert set(torch.nonzero(out).view(-1).tolist()) == kept
    assert torch.equal(out[out != 0], x[out != 0])
