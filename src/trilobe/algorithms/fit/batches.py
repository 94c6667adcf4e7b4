"""Examples and beliefs as training takes them: checked once, cut into batches of even size, in a random order."""

import numpy as np
import torch
from torch import Tensor

from trilobe.errors import TrainingError, UsageError
from trilobe.rows import apply, flat, is_ragged, lengths, pad
from trilobe.types import BoolArray, FloatArray


class Batches:
    """Examples on which to train, dense or rows; what is taken by a batch of indices is a tensor.

    >>> Batches(np.zeros((3, 2)), 0.0)[torch.tensor([2, 0])].shape
    torch.Size([2, 2])
    """

    def __init__(self, array: FloatArray, fill: float) -> None:
        self.fill, self.dense, self.rows = fill, None, array
        if not is_ragged(array):
            self.dense = as_tensor(array)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense[batch]
        return torch.from_numpy(pad(self.rows[batch.numpy()], self.fill)[0])

    def sizes(self) -> Tensor:
        """How many rows each example has: its length, or 1 in a dense array."""
        return torch.ones(len(self)) if self.dense is not None else torch.from_numpy(lengths(self.rows)).float()

    def tobytes(self) -> bytes:
        """The content, for a digest."""
        flat_rows = flat(self.rows) if len(self) else self.rows
        return repr(lengths(self.rows).tolist() if is_ragged(self.rows) else self.rows.shape).encode() + (
            np.ascontiguousarray(flat_rows, dtype=np.float32).tobytes()
        )


def checked(X: FloatArray, likelihood: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``X`` and ``likelihood`` with every row's largest entry 1: only ratios count.

    Raises :class:`~trilobe.errors.UsageError` for none or another number of beliefs,
    :class:`~trilobe.errors.TrainingError` for NaN, infinity and beliefs that leave nothing possible.

    >>> checked(np.zeros((1, 2)), np.array([[2.0, 1.0]]))[1].tolist()
    [[1.0, 0.5]]
    """
    if len(X) != len(likelihood) or not len(X):
        raise UsageError(f"{len(X)} examples with {len(likelihood)} beliefs", expected="as many, at least one")
    for name, array in (("X", X), ("likelihood", likelihood)):
        if not np.isfinite(flat(array)).all():
            raise TrainingError(f"NaN or infinity in {name}", expected="finite numbers")
    told = flat(likelihood)
    if (told < 0).any() or (told.sum(axis=-1) <= 0).any():
        raise TrainingError("a belief that is negative, or zero for every class", expected="a class left possible")
    return X, apply(lambda row: row / row.max(axis=-1, keepdims=True), likelihood)


def shuffled(x: Batches, batch_size: int, generator: torch.Generator) -> Tensor:
    """A random order; of rows one in which neighbors are about equally long, so that little is filled up in vain.

    >>> sorted(shuffled(Batches(np.zeros((3, 2)), 0.0), 2, torch.Generator()).tolist())
    [0, 1, 2]
    """
    order = torch.randperm(len(x), generator=generator)
    if x.dense is not None:
        return order
    size = torch.from_numpy(lengths(x.rows))
    parts = torch.tensor_split(order, -(-len(order) // (16 * batch_size)))
    return torch.cat([part[size[part].argsort(stable=True)] for part in parts])


def held_back(n: int, share: float, seed: int) -> BoolArray:
    """Which of ``n`` examples are kept from training, ``(n,)``: ``share`` of them, at least one if any and not all.

    >>> int(held_back(10, 0.25, seed=0).sum()), int(held_back(10, 0.0, seed=0).sum())
    (2, 0)
    """
    if not share:
        return np.zeros(n, dtype=bool)
    if n < 2:
        raise UsageError(f"{n} example, of which {share:.0%} are to be held out", expected="at least 2")
    kept = min(max(1, round(share * n)), n - 1)
    return np.random.default_rng(seed).permutation(n) < kept


def as_tensor(array: FloatArray) -> Tensor:
    """A float32 tensor on the same memory where that is possible.

    >>> as_tensor(np.zeros(2)).dtype
    torch.float32
    """
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
