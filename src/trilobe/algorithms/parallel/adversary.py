"""Workers that lie, to find out what training survives: wraps any DDP hook, torch's own included. Nothing is defended
here."""

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from trilobe.errors import UsageError

Lie = Literal["flip", "random", "scaled"]
Hook = Callable[[Any, GradBucket], Future[Tensor]]


def corrupt(x: Tensor, lie: Lie, factor: float = 100.0, generator: torch.Generator | None = None) -> Tensor:
    """Change a gradient ``x`` in place to what a lying worker claims.

    ``flip``: ``-x`` (Bernstein et al. 2019, arXiv 1810.05291). ``random``: normal noise of the same size.
    ``scaled``: ``-factor * x``, which drags a mean along but weighs no more than any other in a vote.

    >>> corrupt(torch.tensor([1.0, -2.0]), "scaled", factor=10).tolist()
    [-10.0, 20.0]
    """
    if lie == "flip":
        return x.neg_()
    if lie == "scaled":
        return x.mul_(-factor)
    if lie == "random":
        size = x.float().square().mean().sqrt().to(x.dtype)
        return x.copy_(torch.randn(x.shape, generator=generator, device=x.device)).mul_(size)
    raise UsageError(f"a lie named {lie!r}", expected="flip, random or scaled")


def with_adversaries(
    hook: Hook, lie: Lie, ranks: Collection[int], factor: float = 100.0, group: "dist.ProcessGroup | None" = None
) -> Hook:
    """``hook`` with the workers in ``ranks`` lying: ``register_comm_hook(state, with_adversaries(hook, "flip", {1}))``.

    >>> with_adversaries(lambda state, bucket: None, "flip", {1}).__name__
    'lying'
    """

    def lying(state: Any, bucket: GradBucket) -> Future[Tensor]:
        if dist.get_rank(group) in ranks:
            corrupt(bucket.buffer(), lie, factor)
        return hook(state, bucket)

    lying.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}  # DDP checks them
    return lying
