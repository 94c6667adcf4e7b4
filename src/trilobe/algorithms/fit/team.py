"""Several workers that train as one: each takes its rows of every batch, and all take the step that one would take.

What depends on the whole batch is made of the whole batch: gradients and losses are weighted by how much each worker
had, the statistics of batch normalization are those of all rows, and random numbers that a module draws (dropout,
words to hide) are drawn for all rows by everybody, who then takes its own. So the number of workers is no part of the
result, but for rounding; a hook that compresses gradients is one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trilobe.algorithms.parallel import PRESETS, State, compressed_hook
from trilobe.errors import TrainingError

if TYPE_CHECKING:
    from trilobe.algorithms.workers import Place

PATIENCE = timedelta(minutes=10)  # after which a worker that says nothing counts as lost
SIZED = {torch.rand, torch.randn}
SHAPED = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
          torch.dropout, torch.rand_like, torch.randn_like, torch.bernoulli}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's rows ``start`` to ``stop`` of the ``n`` of a batch. One that gets none borrows the first, and its
    ``real`` is False: what comes of it counts nothing."""

    n: int
    start: int
    stop: int
    real: bool = True

    @classmethod
    def of(cls, n: int, rank: int, size: int) -> "Share":
        """The share of worker ``rank`` of ``size``; all of them follow one another, as even as can be.

        >>> [Share.of(5, rank, 2).rows for rank in (0, 1)], Share.of(1, 0, 2)
        ([slice(0, 2, None), slice(2, 5, None)], Share(n=1, start=0, stop=1, real=False))
        """
        start, stop = n * rank // size, n * (rank + 1) // size
        return cls(n, start, stop) if start < stop else cls(n, 0, 1, real=False)

    @property
    def rows(self) -> slice:
        """Where they stand in the batch."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Team:
    """This worker's number among how many; alone, it exchanges nothing."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    def joined(self, objective: nn.Module) -> nn.Module:
        """``objective`` with gradients that are averaged over all workers."""
        if self.size == 1:
            return objective
        return nn.parallel.DistributedDataParallel(objective, forward_sync_buffers=False, find_unused_parameters=True)

    def hooked(self, parallel: Any, module: nn.Module, hook: str, seed: int) -> State | None:
        """Let gradients travel as the preset ``hook`` says; what the hook remembers, where it remembers."""
        if self.size == 1 or hook == "plain":
            return None
        state = State(PRESETS[hook], seed=seed).attach(module)
        parallel.register_comm_hook(state, compressed_hook)
        return state

    def loss(self, objective: nn.Module, x: Tensor, told: Tensor, sizes: Tensor) -> Tensor:
        """The objective of this worker's rows of a batch, times what makes the mean over workers that of the batch.

        ``sizes`` ``(n,)``: how many things each example adds to the mean that an objective is.
        """
        if self.size == 1:
            out: Tensor = objective(x, told)
            return out
        share = Share.of(len(x), self.rank, self.size)
        with _AsOne(share, self.group):
            loss: Tensor = objective(x[share.rows], told[share.rows])
        return loss * (share.real * self.size * float(sizes[share.rows].sum() / sizes.sum()))

    def total(self, loss: Tensor, wanted: bool) -> Callable[[], tuple[float, bool]]:
        """A promise of the batch's loss, and of whether the first worker ``wanted``. It travels while others work."""
        if self.size == 1:
            return lambda: (float(loss.detach()), wanted)
        both = torch.stack([loss.detach().double() / self.size, torch.tensor(float(wanted and not self.rank)).double()])
        work = dist.all_reduce(both, group=self.group, async_op=True)

        def promised() -> tuple[float, bool]:
            if work is not None:
                work.wait()
            return float(both[0]), bool(both[1] > 0)

        return promised

    def agreed(self, first: bool) -> bool:
        """What the first worker says."""
        if self.size == 1:
            return first
        said = torch.tensor(float(first))
        dist.broadcast(said, 0, group=self.group)
        return bool(said)

    def collected(self, mine: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Everybody's tensors, at the first worker; elsewhere nothing."""
        if self.size == 1:
            return [mine]
        every: list[Any] | None = None if self.rank else [None] * self.size
        dist.gather_object(mine, every, group=self.group)
        return every or []


ALONE = Team()


@contextlib.contextmanager
def together(place: "Place") -> Iterator[Team]:
    """The team of all workers that were started with this one."""
    if place.size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", store=place.store(), rank=place.rank, world_size=place.size, timeout=PATIENCE)
    yield Team(place.rank, place.size, dist.new_group(timeout=PATIENCE))
    dist.destroy_process_group()  # not after an error: the others may be waiting, and this process is about to end


class _AsOne(TorchFunctionMode):
    """Inside, a module that sees this worker's rows does with them what it would do with the whole batch."""

    def __init__(self, share: Share, group: "dist.ProcessGroup | None") -> None:
        super().__init__()
        self.share, self.group = share, group

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs.get("training"):
            return _batch_norm(self, *args, **kwargs)
        if func in SHAPED and self._times(args[0].shape):
            return self._of_all(args[0], lambda whole: func(whole, *args[1:], **kwargs))
        if func in SIZED:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if times := self._times(size):
                named = {k: v for k, v in kwargs.items() if k != "size"}
                return func((times * self.share.n, *size[1:]), **named)[self._mine(times)]
        return func(*args, **kwargs)

    def _times(self, size: Any) -> int:
        """How many rows of a tensor of this size belong to each row of the batch; 0 where it is not made of them."""
        times, rest = divmod(size[0], self.share.stop - self.share.start) if len(size) else (0, 0)
        return 0 if rest else times

    def _mine(self, times: int) -> slice:
        return slice(times * self.share.start, times * self.share.stop)

    def _of_all(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        times = self._times(x.shape)
        size, memory = [times * self.share.n, *x.shape[1:]], sorted(range(x.ndim), key=x.stride, reverse=True)
        whole = x.new_zeros([size[d] for d in memory])  # random numbers come in the order of memory
        whole = whole.permute([memory.index(d) for d in range(x.ndim)])
        whole[self._mine(times)] = x
        return function(whole)[self._mine(times)]


def _batch_norm(
    one: _AsOne,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` in training, over the rows of all workers."""
    ones = torch.ones(x.shape[1], dtype=torch.float32)
    weight = ones if weight is None else weight
    bias = torch.zeros_like(ones) if bias is None else bias
    normal: tuple[Tensor, ...] = _BatchNorm.apply(x, weight, bias, eps, one)  # type: ignore[no-untyped-call]
    out, mean, var, n = normal
    if int(n) < 2:
        raise TrainingError(
            "batch normalization of one value", expected="at least two in a batch", hint="raise train.batch_size"
        )
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    return out


class _BatchNorm(torch.autograd.Function):
    """Normalization by the mean and variance over all workers, in which a borrowed row has no say.

    Means and squares of the workers are put together by Chan, Golub and LeVeque (1983), equation 1.5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: _AsOne) -> tuple[Tensor, ...]:
        real, channels = float(one.share.real), x.shape[1]
        mean, var = torch.batch_norm_update_stats(x.float(), None, None, 0.0)
        own = torch.cat([mean, var, torch.tensor([real * x.numel() / channels])])
        rows = torch.stack([torch.empty_like(own) for _ in range(dist.get_world_size(one.group))])
        try:
            dist.all_gather(list(rows), own, group=one.group)
        except RuntimeError as e:  # not to be taken for an error of the network, in which it happens
            raise ConnectionError(f"another worker is gone: {e}") from e
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        n = counts.sum()
        mean = (counts * means).sum(0) / n
        var = (counts * (variances + (means - mean).square())).sum(0) / n
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.pull, ctx.group = eps, real / float(n), one.group
        ctx.mark_non_differentiable(mean, var, n)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var, n

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        straight, *own = torch.ops.aten.native_batch_norm_backward(
            above[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )  # as if mean and variance were constants
        every = torch.stack(own)
        dist.all_reduce(every, group=ctx.group)
        shape, scale = (1, -1, *[1] * (x.ndim - 2)), torch.rsqrt(var + ctx.eps)
        slope = -ctx.pull * weight * scale.square() * every[0]
        offset = -ctx.pull * weight * scale * every[1] - slope * mean
        through = torch.addcmul(offset.view(shape), x, slope.view(shape))
        return (straight + through).to(above[0].dtype), own[0], own[1], None, None
