"""Packing against numpy's signs, voting against counting, the torch path against the numpy path."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trilobe.algorithms.parallel.codec import (
    at_least,
    majority,
    pack,
    pack_by_torch,
    packed_size,
    unpack,
    unpack_by_torch,
    unpack_each,
)
from trilobe.errors import UsageError

vectors = arrays(np.float32, st.integers(1, 200), elements=st.floats(-10, 10, width=32))


@given(vectors, st.booleans())
def test_round_trip_gives_the_sign_with_the_stated_rule_for_zero(x: np.ndarray, zero_negative: bool) -> None:
    bits = pack(torch.from_numpy(x), zero_negative=zero_negative)
    assert len(bits) == packed_size(len(x))
    wanted = np.where(x == 0, -1 if zero_negative else 1, np.sign(x))
    assert (unpack(bits, len(x), scale=2.5).numpy() == 2.5 * wanted).all()


@given(vectors, st.booleans())
def test_both_paths_give_the_same_bits(x: np.ndarray, zero_negative: bool) -> None:
    values = torch.from_numpy(x)
    bits = pack(values, zero_negative=zero_negative)
    assert torch.equal(bits, pack_by_torch(values, zero_negative))
    assert torch.equal(unpack(bits, len(x), 0.3), unpack_by_torch(bits, len(x), 0.3))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**32))
def test_pieces_with_scales_of_their_own_are_unpacked_as_one_by_one(pieces: list[int], seed: int) -> None:
    rng, n = np.random.default_rng(seed), sum(pieces)
    bits = torch.from_numpy(rng.integers(0, 256, packed_size(n), dtype=np.uint8))
    scales = rng.normal(size=len(pieces)).astype(np.float32)
    signs = unpack(bits, n).split(pieces)
    wanted = torch.cat([float(scale) * piece for scale, piece in zip(scales, signs, strict=True)])
    assert torch.equal(unpack_each(bits, scales.tolist(), pieces, torch.full((n,), np.nan)), wanted)


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="one for each"):
        unpack_each(torch.zeros(1, dtype=torch.uint8), [1.0], [4, 4], torch.empty(8))


@given(st.integers(0, 8), st.integers(0, 2**32))
def test_majority_is_what_counting_gives(half: int, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (2 * half + 1, 192), dtype=np.uint8)
    words = np.packbits(bits, axis=1).view(np.int64)
    wanted = np.packbits(bits.sum(axis=0) > half).view(np.int64)
    assert (majority(list(words)) == wanted).all()
    assert (majority(list(torch.from_numpy(words))).numpy() == wanted).all()


@given(st.integers(1, 17), st.data())
def test_any_threshold_is_what_counting_gives(voters: int, more: st.DataObject) -> None:
    threshold, seed = more.draw(st.integers(1, voters)), more.draw(st.integers(0, 2**32))
    bits = np.random.default_rng(seed).integers(0, 2, (voters, 192), dtype=np.uint8)
    wanted = np.packbits(bits.sum(axis=0) >= threshold).view(np.int64)
    assert (at_least(list(np.packbits(bits, axis=1).view(np.int64)), threshold) == wanted).all()


@pytest.mark.parametrize("threshold", [0, 3])
def test_a_threshold_that_cannot_be_is_refused(threshold: int) -> None:
    with pytest.raises(UsageError, match="of 2 votes"):
        at_least([np.zeros(1, np.int64)] * 2, threshold)


def test_an_even_number_of_votes_is_refused() -> None:
    with pytest.raises(UsageError, match="odd number"):
        majority([np.zeros(1, np.int64)] * 2)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(4)[::2]],
    ids=["matrix", "double", "strided"],
)
def test_only_contiguous_float32_vectors_are_packed(x: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="contiguous vector"):
        pack(x)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="2 bytes"):
        unpack(torch.zeros(1, dtype=torch.uint8), 9)
