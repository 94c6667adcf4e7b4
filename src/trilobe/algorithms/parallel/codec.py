"""Signs as bits: packed eight to a byte, voted on without unpacking, unpacked again. No process group lives here.

A set bit is a negative sign. On the CPU the work is done by numpy's vectorized ``less``, ``packbits`` and ``take``,
which run near the rate of a copy, so nothing has to be compiled; other devices use the same arithmetic in torch
operations. Both give the same bits (tested).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trilobe.errors import UsageError

Words = TypeVar("Words", Tensor, np.ndarray[Any, Any])
GATHER = 0x0102040810204080  # multiplying eight 0/1 bytes by it collects them in the top byte, first byte lowest


def packed_size(n: int) -> int:
    """Bytes that hold ``n`` signs.

    >>> packed_size(9)
    2
    """
    return -(-n // 8)


def pack(x: Tensor, out: Tensor | None = None, zero_negative: bool = False) -> Tensor:
    """The signs of ``x`` ``(n,)`` float32, eight to a byte: ``(ceil(n / 8),)`` uint8, the first in the lowest bit.

    A zero of either sign counts as positive, or as negative with ``zero_negative``: who alternates the two from step
    to step moves a parameter without gradient to and fro instead of away. NaN counts as positive. ``out`` takes the
    bytes where given. Source: Bernstein et al. 2018 (arXiv 1802.04434), algorithm 3; the tie rule is ours.

    >>> pack(torch.tensor([1.0, -2.0, 0.0, -0.0, -3.0])).tolist()
    [18]
    >>> pack(torch.tensor([1.0, -2.0, 0.0, -0.0, -3.0]), zero_negative=True).tolist()
    [30]
    """
    _check(x, torch.float32)
    out = torch.empty(packed_size(len(x)), dtype=torch.uint8, device=x.device) if out is None else out
    if x.device.type == "cpu":
        values = x.numpy()
        negative = np.less_equal(values, 0) if zero_negative else np.less(values, 0)
        out.numpy()[:] = np.packbits(negative, bitorder="little")
    else:
        out.copy_(pack_by_torch(x, zero_negative))
    return out


def pack_by_torch(x: Tensor, zero_negative: bool = False) -> Tensor:
    """What :func:`pack` gives, by torch operations alone: the path of every device but the CPU.

    >>> pack_by_torch(torch.tensor([1.0, -2.0, 0.0, -0.0, -3.0])).tolist()
    [18]
    """
    negative = x <= 0 if zero_negative else x < 0
    if len(x) % 8:
        negative = torch.nn.functional.pad(negative, (0, -len(x) % 8))
    return ((negative.view(torch.int64) * GATHER) >> 56).to(torch.uint8)


def unpack(bits: Tensor, n: int, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """The ``n`` signs in ``bits`` ``(ceil(n / 8),)`` uint8 as ``scale`` and ``-scale``: ``(n,)`` float32.

    >>> unpack(torch.tensor([18], dtype=torch.uint8), 5, scale=0.5).tolist()
    [0.5, -0.5, 0.5, 0.5, -0.5]
    """
    _check(bits, torch.uint8)
    if len(bits) != packed_size(n):
        raise UsageError(f"{len(bits)} bytes for {n} signs", expected=f"{packed_size(n)} bytes")
    out = torch.empty(n, dtype=torch.float32, device=bits.device) if out is None else out
    if bits.device.type != "cpu":
        return out.copy_(unpack_by_torch(bits, n, scale))
    whole, values = n // 8, out.numpy()
    table = _signs() * np.float32(scale)
    np.take(table, bits.numpy()[:whole], axis=0, out=values[: whole * 8].reshape(whole, 8), mode="clip")
    if n % 8:
        values[whole * 8 :] = table[int(bits[-1])][: n % 8]
    return out


def unpack_each(bits: Tensor, scales: Sequence[float], pieces: Sequence[int], out: Tensor) -> Tensor:
    """The signs in ``bits`` ``(ceil(n / 8),)`` into ``out`` ``(n,)`` float32, each of its pieces (``n`` coordinates
    together) with a scale of its own; in one pass, since the scale is in the table that is looked up.

    >>> unpack_each(torch.tensor([18], dtype=torch.uint8), [0.5, 2.0], [2, 3], torch.empty(5)).tolist()
    [0.5, -0.5, 2.0, 2.0, -2.0]
    """
    if sum(pieces) != len(out) or len(scales) != len(pieces):
        came = f"{len(scales)} scales for pieces of {sum(pieces)} coordinates"
        raise UsageError(came, expected=f"one for each of the pieces of {len(out)} coordinates")
    if bits.device.type != "cpu":
        unpack(bits, len(out), 1.0, out)
        torch._foreach_mul_(list(torch.split(out, list(pieces))), list(scales))
        return out
    start, values, octets = 0, out.numpy(), bits.numpy()
    for scale, length in zip(scales, pieces, strict=True):
        stop, table = start + length, _signs() * np.float32(scale)
        first, last = -(-start // 8), stop // 8  # bytes first to last are all in this piece
        if first < last:
            whole = values[first * 8 : last * 8].reshape(last - first, 8)
            np.take(table, octets[first:last], axis=0, out=whole, mode="clip")
        for i in {start // 8, last}:  # those that it shares
            low, high = max(start, 8 * i), min(stop, 8 * i + 8)
            if low < high and not first <= i < last:
                values[low:high] = table[octets[i]][low - 8 * i : high - 8 * i]
        start = stop
    return out


def unpack_by_torch(bits: Tensor, n: int, scale: float = 1.0) -> Tensor:
    """What :func:`unpack` gives, by torch operations alone.

    >>> unpack_by_torch(torch.tensor([18], dtype=torch.uint8), 3).tolist()
    [1.0, -1.0, 1.0]
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    set_bits = (bits[:, None] >> shifts).bitwise_and_(1).view(-1)[:n]
    return set_bits.to(torch.float32).mul_(-2 * scale).add_(scale)


def majority(votes: Sequence[Words]) -> Words:
    """The bitwise majority of an odd number of words: every bit of the result is the more frequent one.

    ``votes`` are integer tensors or numpy arrays of one shape and dtype; each bit position is an election of its own.

    >>> votes = [np.array([v], dtype=np.uint8) for v in (0b1100, 0b1010, 0b1001)]
    >>> bin(int(majority(votes)[0]))
    '0b1000'
    """
    if len(votes) % 2 == 0:
        raise UsageError(
            f"a majority among {len(votes)} votes", expected="an odd number of votes", hint="count one of them twice"
        )
    return at_least(votes, (len(votes) + 1) // 2)


def at_least(votes: Sequence[Words], threshold: int) -> Words:
    """Where ``threshold`` or more of the words (1 to all of them) have their bit set, for every bit position.

    Bits are counted by full adders on whole words (carry-save addition): about ``5 n`` bit operations on each word for
    ``n`` voters and no unpacking. The counter's binary digits are then compared with the threshold.

    >>> votes = [np.array([v], dtype=np.uint8) for v in (0b1100, 0b1010)]
    >>> bin(int(at_least(votes, 1)[0])), bin(int(at_least(votes, 2)[0]))
    ('0b1110', '0b1000')
    """
    if not 1 <= threshold <= len(votes):
        raise UsageError(f"{threshold} of {len(votes)} votes", expected="at least one vote, and at most all")
    column, digits = list(votes), []
    while column:  # one column per binary digit of the count, lowest first
        carries = []
        while len(column) > 1:
            a, b = column.pop(), column.pop()
            half = a ^ b
            if column:
                c = column.pop()
                column.append(half ^ c)
                carries.append((a & b) | (half & c))
            else:
                column.append(half)
                carries.append(a & b)
        digits.append(column[0])
        column = carries
    return _reaches(digits, threshold)


def _reaches(digits: list[Words], threshold: int) -> Words:
    """Where the number with these binary digits (lowest first) reaches ``threshold``, for every bit position."""
    reached: Words | None = None  # None: certainly, so far
    for i, digit in enumerate(digits):
        if threshold >> i & 1:
            reached = digit if reached is None else digit & reached
        elif reached is not None:
            reached = digit | reached
    return digits[0] if reached is None else reached


@lru_cache(1)
def _signs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The eight signs in each of the 256 bytes: ``(256, 8)``, 8 KiB, so that it stays in the first cache."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return 1 - 2 * bits.astype(np.float32)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.dim() != 1 or not x.is_contiguous():
        came = f"a {'' if x.is_contiguous() else 'strided '}tensor of {x.dtype}, shape {tuple(x.shape)}"
        raise UsageError(came, expected=f"a contiguous vector of {dtype}", hint="x.flatten().float()")
