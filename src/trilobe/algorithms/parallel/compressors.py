"""What becomes of a vector before it is sent: signs, few levels, few coordinates, or nothing. Nobody is called here.

A compressor is three functions: how many bytes ``n`` numbers take (fixed by ``n``, so a receiver knows without asking),
how to write them into these bytes, and how to read them back. A vector comes with the lengths of its pieces (of one
parameter each), which differ in size: signs have a scale for each. All randomness comes from the generator handed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trilobe.algorithms.parallel.codec import pack, packed_size, unpack, unpack_each

GROUP = 512  # coordinates that share one norm in `quantize`: the bucket of Alistarh et al. 2017
BLOCK = 1 << 16  # coordinates among which two bytes tell a place in `top_k`


@dataclass(frozen=True, slots=True)
class Encoding:
    """What an encoder may need beside the vector.

    ``zero_negative``: the side a zero takes at this step; ``scaled``: send scales along with the signs; ``levels``:
    of ``quantize``, 1..127; ``ratio``: of ``top_k``, the share of coordinates kept, 0..1.
    """

    generator: torch.Generator
    zero_negative: bool = False
    scaled: bool = False
    levels: int = 7
    ratio: float = 0.01


@dataclass(frozen=True, slots=True)
class Compressor:
    """``size(n, encoding)`` bytes; ``encode(x, row, pieces, encoding)`` writes them and returns the scales to send, one
    for each piece or none at all; ``decode(row, scales, out, pieces, encoding)`` fills ``out``."""

    size: Callable[[int, Encoding], int]
    encode: Callable[[Tensor, Tensor, Sequence[int], Encoding], list[float]]
    decode: Callable[[Tensor, Sequence[float], Tensor, Sequence[int], Encoding], None]


def mean_absolute(x: Tensor) -> float:
    """The mean of ``|x|``: the scale at which ``scale * sign(x)`` is nearest to ``x`` (Karimireddy et al. 2019).

    >>> mean_absolute(torch.tensor([1.0, -3.0]))
    2.0
    """
    if x.device.type == "cpu":  # BLAS reads once, without a temporary; torch's own 1-norm is six times slower
        from scipy.linalg.blas import sasum

        return float(sasum(x.numpy())) / len(x)
    return float(x.abs().mean())


def _encode_sign(x: Tensor, row: Tensor, pieces: Sequence[int], e: Encoding) -> list[float]:
    pack(x, row[: packed_size(len(x))], e.zero_negative)
    return [mean_absolute(piece) for piece in torch.split(x, list(pieces))] if e.scaled else []


def _encode_stochastic_sign(x: Tensor, row: Tensor, pieces: Sequence[int], e: Encoding) -> list[float]:
    """Sign of ``x + u``, ``u`` uniform on ``[-B, B]``: its mean is ``x / B``, cut off at -1 and 1.

    With ``B`` at least ``max|x|`` nothing is cut off (Safaryan and Richtarik 2021, arXiv 1905.12938: the 2-norm; Jin et
    al. 2020, arXiv 2002.10940: a bound for all workers), but most bits are then noise. Here ``B`` is the mean of
    ``|x|`` in the piece: what is larger counts as ``B``, and every sign is still right more often than wrong. A bias is
    taken for less variance, as by Tang, Wang and Chang 2023 (arXiv 2302.02589). ``u`` has 256 values, so that eight
    come from one draw of 64 bits: numbers drawn one by one would take four fifths of all time here."""
    words = torch.empty(-(-len(x) // 8), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=e.generator)
    noise = words.view(torch.uint8)[: len(x)].to(torch.float32).sub_(127.5)
    bounds = [mean_absolute(piece) for piece in torch.split(x, list(pieces))]
    torch._foreach_mul_(list(torch.split(noise, list(pieces))), [bound / 127.5 for bound in bounds])
    pack(noise.add_(x), row[: packed_size(len(x))], e.zero_negative)
    return bounds if e.scaled else []


def _decode_sign(row: Tensor, scales: Sequence[float], out: Tensor, pieces: Sequence[int], e: Encoding) -> None:
    bits = row[: packed_size(len(out))]
    if scales:
        unpack_each(bits, scales, pieces, out)
    else:
        unpack(bits, len(out), 1.0, out)


def _quantized_sizes(n: int, e: Encoding) -> tuple[int, int]:
    """Bytes of the norms (one float32 for each group) and of the codes (four bits up to 7 levels, else eight)."""
    groups = -(-n // GROUP)
    return 4 * groups, groups * GROUP // (2 if e.levels <= 7 else 1)


def _encode_quantized(x: Tensor, row: Tensor, pieces: Sequence[int], e: Encoding) -> list[float]:
    """``norm * sign(x) * xi / s`` with ``xi`` one of the two levels around ``s |x| / norm``, at random so that the mean
    is ``x`` (Alistarh et al. 2017, arXiv 1610.02132, section 3.1), a fixed width for each code instead of
    Elias coding: the size must not depend on the data."""
    for_norms, for_codes = _quantized_sizes(len(x), e)
    groups = torch.nn.functional.pad(x, (0, -len(x) % GROUP)).view(-1, GROUP)
    norms = torch.linalg.vector_norm(groups, dim=1, keepdim=True)
    row[:for_norms].view(torch.float32).copy_(norms.view(-1))
    noise = torch.rand(groups.shape, generator=e.generator, device=x.device)
    scaled = groups * (e.levels / norms.clamp_min(torch.finfo(torch.float32).tiny))
    codes = (scaled.abs().add_(noise).floor_().clamp_(max=e.levels) * scaled.sign()).to(torch.int8).view(-1)
    out = row[for_norms : for_norms + for_codes].view(torch.int8)
    if e.levels <= 7:
        out.copy_((codes[::2] & 15) | (codes[1::2] << 4))
    else:
        out.copy_(codes)
    return []


def _decode_quantized(row: Tensor, scales: Sequence[float], out: Tensor, pieces: Sequence[int], e: Encoding) -> None:
    for_norms, for_codes = _quantized_sizes(len(out), e)
    norms = row[:for_norms].view(torch.float32)
    codes = row[for_norms : for_norms + for_codes].view(torch.int8)
    if e.levels <= 7:  # the left shift moves the low nibble's sign to the top, the right shift brings it back
        codes = torch.stack(((codes << 4) >> 4, codes >> 4), dim=1)
    values = codes.reshape(-1, GROUP).to(torch.float32) * (norms / e.levels)[:, None]
    out.copy_(values.view(-1)[: len(out)])


def _kept(n: int, e: Encoding) -> int:
    return min(n, max(1, round(n * e.ratio)))


def _kept_each(n: int, e: Encoding) -> list[int]:
    """How many of the :func:`_kept` fall to each block of coordinates."""
    return [b - a for a, b in pairwise([0, *(_kept(end, e) for end in (*range(BLOCK, n, BLOCK), n))])]


def _encode_top_k(x: Tensor, row: Tensor, pieces: Sequence[int], e: Encoding) -> list[float]:
    """The ``k`` coordinates largest in absolute value (Stich et al. 2018, arXiv 1809.07599), of every block its share:
    as bfloat16 values, whose rounding is an error like any other, and as places in their block, two bytes each."""
    k, blocks = _kept(len(x), e), torch.split(x, BLOCK)
    shares = zip(blocks, _kept_each(len(x), e), strict=True)
    chosen = [torch.topk(block.abs(), share, sorted=False).indices for block, share in shares]
    values = torch.cat([block[places] for block, places in zip(blocks, chosen, strict=True)])
    row[: 2 * k].view(torch.bfloat16).copy_(values)
    row[2 * k : 4 * k].view(torch.int16).copy_(torch.cat(chosen))
    return []


def _decode_top_k(row: Tensor, scales: Sequence[float], out: Tensor, pieces: Sequence[int], e: Encoding) -> None:
    k, shares = _kept(len(out), e), _kept_each(len(out), e)
    values = torch.split(row[: 2 * k].view(torch.bfloat16).float(), shares)
    places = torch.split(row[2 * k : 4 * k].view(torch.int16).long() & (BLOCK - 1), shares)  # as if without sign
    for block, at, came in zip(torch.split(out.zero_(), BLOCK), places, values, strict=True):
        block[at] = came


def _encode_none(x: Tensor, row: Tensor, pieces: Sequence[int], e: Encoding) -> list[float]:
    row[: 4 * len(x)].view(torch.float32).copy_(x)
    return []


def _decode_none(row: Tensor, scales: Sequence[float], out: Tensor, pieces: Sequence[int], e: Encoding) -> None:
    out.copy_(row[: 4 * len(out)].view(torch.float32))


COMPRESSORS = {
    "none": Compressor(lambda n, e: 4 * n, _encode_none, _decode_none),
    "sign": Compressor(lambda n, e: packed_size(n), _encode_sign, _decode_sign),
    "stochastic_sign": Compressor(lambda n, e: packed_size(n), _encode_stochastic_sign, _decode_sign),
    "quantize": Compressor(lambda n, e: sum(_quantized_sizes(n, e)), _encode_quantized, _decode_quantized),
    "top_k": Compressor(lambda n, e: 4 * _kept(n, e), _encode_top_k, _decode_top_k),
}
SIGNS = ("sign", "stochastic_sign")
