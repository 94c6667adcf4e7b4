"""Workers that exist one after another in one process: what ``trilobe.algorithms.parallel`` makes of their gradients.

Messages and votes are the library's own (``codec``, ``compressors``); what is left is who votes, who breaks a tie
and what is remembered, as its hook has it with ``communicator="all_gather"`` and one bucket. For an odd number of
workers and no scale ``two_phase`` gives the same. The peer PowerSGD is written out. ``run.py --child check`` compares
this file with the real hooks, torch's included, among real processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median_low

import numpy as np
import torch
from torch import Tensor, nn

from trilobe.algorithms.parallel import PLAIN, Choices
from trilobe.algorithms.parallel.codec import majority
from trilobe.algorithms.parallel.compressors import COMPRESSORS, SIGNS, Encoding

Losses = Callable[[nn.Module, int, int], Tensor]  # (network, worker, step) -> loss of that worker's batch
Message = tuple[int, Tensor, list[float]]  # of which worker, its row of bytes, its scales


class Exchange:
    """One vector of gradients per worker in, the one that all apply out; ``choices`` None is the plain mean.

    ``sizes``: how many coordinates each parameter has.
    """

    def __init__(self, choices: Choices | None, workers: int, sizes: Sequence[int], seed: int = 0) -> None:
        self.choices, self.sizes, self.step = choices or PLAIN, list(sizes), 0
        self.average, self.errors = torch.zeros(2, workers, sum(sizes))
        self.pieces = self.sizes if self.choices.compressor in SIGNS else [sum(sizes)]
        self.generators = [torch.Generator().manual_seed(seed * 1_000_003 + rank) for rank in range(workers)]

    def __call__(self, gradients: Tensor) -> Tensor:
        """``gradients`` ``(workers, n)`` to ``(n,)``."""
        c, sent = self.choices, gradients
        if c.has_momentum:
            sent = gradients.lerp(self.average.lerp_(gradients, 1 - c.beta), c.nu)
        if c.has_errors:
            sent = self.errors.add_(sent)
        if c.compressor == "none":
            return sent.mean(dim=0)
        messages = [(k, *self._encode(k, x)) for k, x in enumerate(sent) if bool(x.any())]  # only zeros: abstains
        out = self._combine(messages, *gradients.shape) if messages else torch.zeros_like(gradients[0])
        if c.has_errors:
            for k, row, scales in messages:
                sent[k].sub_(self._decode(row, scales))
        self.step += 1
        return out

    def _encoding(self, worker: int) -> Encoding:
        c = self.choices
        return Encoding(self.generators[worker], self.step % 2 == 1, c.scaled, c.levels, c.ratio)

    def _encode(self, worker: int, x: Tensor) -> tuple[Tensor, list[float]]:
        compressor, encoding = COMPRESSORS[self.choices.compressor], self._encoding(worker)
        row = torch.zeros(compressor.size(len(x), encoding), dtype=torch.uint8)
        return row, compressor.encode(x, row, self.pieces, encoding)

    def _decode(self, row: Tensor, scales: Sequence[float]) -> Tensor:
        out = torch.empty(sum(self.sizes))
        COMPRESSORS[self.choices.compressor].decode(row, scales, out, self.pieces, self._encoding(0))
        return out

    def _combine(self, messages: Sequence[Message], workers: int, n: int) -> Tensor:
        if self.choices.aggregate == "mean":
            return torch.stack([self._decode(row, scales) for _, row, scales in messages]).sum(dim=0) / workers
        first = self.step % workers % len(messages)  # who breaks a tie; exact where nobody abstains
        votes = [row for _, row, _ in (*messages[first:], *messages[:first])]
        scales = [median_low(of_all) for of_all in zip(*(scales for _, _, scales in messages), strict=True)]
        return self._decode(majority(votes if len(votes) % 2 else [*votes, votes[0]]), scales)


class PowerSGD:
    """The peer: torch's ``powerSGD_hook`` of rank 1 with one bucket (Vogels et al. 2019, arXiv 1905.13727, algorithms
    1 and 2), compressing from its third call as ``start_powerSGD_iter=2`` has it. ``shapes``: of each parameter."""

    def __init__(self, workers: int, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes, self.sizes, self.step = shapes, [math.prod(shape) for shape in shapes], 0
        self.errors = torch.zeros(workers, sum(self.sizes))
        self.q: dict[int, Tensor] = {}
        rng = torch.Generator().manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
        for k, shape in reversed(list(enumerate(shapes))):  # DDP's order of arrival, and torch's seed
            n, m = shape[0], math.prod(shape[1:])
            if 2 * (n + m) < n * m:  # torch's rule; what is smaller travels as it is
                q = torch.randn(1, m, 1, generator=rng)[0]
                self.q[k] = q / q.norm()

    def __call__(self, gradients: Tensor) -> Tensor:
        """``gradients`` ``(workers, n)`` to ``(n,)``."""
        self.step += 1
        if self.step <= 2:
            return gradients.mean(dim=0)
        sent = gradients + self.errors
        out = [x.mean(dim=0) for x in sent.split(self.sizes, dim=1)]
        for k, q in self.q.items():
            matrices = sent.split(self.sizes, dim=1)[k].view(len(sent), self.shapes[k][0], -1)
            p = (matrices @ (q / q.norm())).sum(dim=0)
            p = p / p.norm()
            self.q[k] = (matrices.transpose(1, 2) @ p).mean(dim=0)
            out[k] = (p @ self.q[k].T).flatten()
        self.errors = sent - torch.cat(out)
        return torch.cat(out)


def steps(
    net: nn.Module,
    loss: Losses,
    optimizer: torch.optim.Optimizer,
    exchange: Exchange | PowerSGD,
    workers: int,
    total: int,
) -> Iterator[float]:
    """Train ``net`` in place for ``total`` steps; the mean loss of each step. Stops where a loss is not finite."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for step in range(total):
        rows, losses = [], 0.0
        for worker in range(workers):
            value = loss(net, worker, step)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
            losses += float(value.detach()) / workers
        for p, g in zip(parameters, exchange(torch.stack(rows)).split(exchange.sizes), strict=True):
            p.grad = g.view_as(p).clone()
        optimizer.step()
        yield losses
        if not losses < float("inf"):
            return
