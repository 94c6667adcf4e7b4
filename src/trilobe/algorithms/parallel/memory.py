"""What a worker remembers of each parameter between steps: compression errors or momentum. It knows no compression.

DDP hands a hook flat buckets and rearranges them after the first step, so what is remembered belongs to parameters:
the flat vector of a bucket is cut up and put together anew when a bucket of another composition comes along.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trilobe.errors import TrainingError


class Memory:
    """One number for every coordinate of every parameter, handed out as the flat float32 vector of a bucket.

    >>> a, b = torch.zeros(2), torch.zeros(1)
    >>> memory = Memory()
    >>> memory.of([a, b])[0].copy_(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    >>> memory.of([b, a])[0].tolist()  # the bucket was rearranged: nothing is lost
    [3.0, 1.0, 2.0]
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, ...], Tensor] = {}
        self._sizes: dict[int, int] = {}
        self._pieces: dict[int, Tensor] = {}  # of parameters that are in no bucket yet, by identity

    def of(self, parameters: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """The vector ``(sum of sizes,)`` of these parameters in this order, to be changed in place, and whether it was
        put together just now; a parameter never seen before starts at zero."""
        key = tuple(map(id, parameters))
        if key in self._buckets:
            return self._buckets[key], False
        for other in [k for k in self._buckets if not set(k).isdisjoint(key)]:
            self._cut(other)
        self._sizes.update({id(p): p.numel() for p in parameters})
        pieces = [
            self._pieces.pop(id(p)).to(p.device)
            if id(p) in self._pieces
            else torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            for p in parameters
        ]
        self._buckets[key] = torch.cat(pieces)
        return self._buckets[key], True

    def _cut(self, key: tuple[int, ...]) -> None:
        flat = self._buckets.pop(key)
        self._pieces.update(zip(key, torch.split(flat, [self._sizes[i] for i in key]), strict=True))

    def named(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """A copy of everything, by the names that ``names`` gives to the identities of parameters."""
        pieces = dict(self._pieces)
        for key, flat in self._buckets.items():
            pieces.update(zip(key, torch.split(flat, [self._sizes[i] for i in key]), strict=True))
        return {names[i]: piece.detach().cpu().clone() for i, piece in pieces.items()}

    def load(self, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Put ``saved`` (as from :meth:`named`) in place of everything; ``parameters`` are the model's by name."""
        for name, piece in saved.items():
            if name not in parameters or parameters[name].numel() != piece.numel():
                here = f"{parameters[name].numel()} numbers" if name in parameters else "no such parameter"
                raise TrainingError(
                    f"the memory of {name!r} has {piece.numel()} numbers, the model {here}",
                    expected="a state of the same model",
                    hint="start without load_state_dict: memory of errors fills again within some steps",
                )
        self._buckets.clear()
        self._pieces = {id(parameters[name]): piece.to(torch.float32).clone() for name, piece in saved.items()}
