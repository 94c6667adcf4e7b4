"""Workers that exist one after another in one process: what ``trilobe.algorithms.parallel`` makes of their gradients.

Signs, scales and votes are the library's own (``codec``, ``compressors``); what is left is who votes, who breaks a tie
and what is remembered, as its hook has it with ``communicator="all_gather"`` and one bucket. For an odd number of
workers and no scale ``two_phase`` gives the same. ``run.py --child check`` compares this file with the real hook among
real processes.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import median_low

import torch
from torch import Tensor, nn

from trilobe.algorithms.parallel import Choices
from trilobe.algorithms.parallel.codec import majority, pack, unpack
from trilobe.algorithms.parallel.compressors import mean_absolute

Losses = Callable[[nn.Module, int, int], Tensor]  # (network, worker, step) -> loss of that worker's batch
Message = tuple[Tensor, Tensor]  # packed signs, and the scale of each coordinate (n,)


class Exchange:
    """One vector of gradients per worker in, the one that all apply out; ``choices`` None is the plain mean.

    ``sizes``: how many coordinates each parameter has.
    """

    def __init__(self, choices: Choices | None, workers: int, sizes: Sequence[int]) -> None:
        self.choices, self.sizes, self.step = choices, list(sizes), 0
        self.memory = torch.zeros(workers, sum(sizes))

    def __call__(self, gradients: Tensor) -> Tensor:
        """``gradients`` ``(workers, n)`` to ``(n,)``."""
        c, sent = self.choices, gradients
        if c is None:
            return gradients.mean(dim=0)
        if c.memory == "momentum":
            sent = self.memory.lerp_(gradients, 1 - c.beta)
        if c.memory == "error_feedback":
            sent = self.memory.add_(gradients)
        messages = [self._message(x) for x in sent if bool(x.any())]  # who has only zeros abstains
        out = self._combine(messages, *gradients.shape) if messages else torch.zeros_like(gradients[0])
        if c.memory == "error_feedback":
            for x, (bits, scale) in zip((x for x in sent if bool(x.any())), messages, strict=True):
                x.sub_(unpack(bits, len(x)) * scale)
        self.step += 1
        return out

    def _message(self, x: Tensor) -> Message:
        scaled = self.choices is not None and self.choices.scaled
        scales = [mean_absolute(piece) if scaled else 1.0 for piece in x.split(self.sizes)]
        return pack(x, zero_negative=self.step % 2 == 1), torch.repeat_interleave(
            torch.tensor(scales), torch.tensor(self.sizes)
        )

    def _combine(self, messages: Sequence[Message], workers: int, n: int) -> Tensor:
        if self.choices is not None and self.choices.aggregate == "mean":
            return torch.stack([unpack(bits, n) * scale for bits, scale in messages]).sum(dim=0) / workers
        first = self.step % workers % len(messages)  # who breaks a tie; exact where nobody abstains
        votes = [bits for bits, _ in (*messages[first:], *messages[:first])]
        firsts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        scales = [median_low([float(scale[at]) for _, scale in messages]) for at in firsts]
        elected = unpack(majority(votes if len(votes) % 2 else [*votes, votes[0]]), n)
        return elected * torch.repeat_interleave(torch.tensor(scales), torch.tensor(self.sizes))


def steps(
    net: nn.Module, loss: Losses, optimizer: torch.optim.Optimizer, exchange: Exchange, workers: int, total: int
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
