"""The whole state of a training as one safetensors file, and whether a file is of this very training."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilobe.algorithms.fit.batches import Batches
from trilobe.algorithms.fit.plan import Plan
from trilobe.algorithms.fit.training import Augment, Patience, Training
from trilobe.algorithms.parallel import State
from trilobe.algorithms.weights import from_safetensors, to_safetensors
from trilobe.errors import TrainingError

logger = logging.getLogger(__name__)
Key = Mapping[str, str]


def key_of(module: nn.Module, data: Iterable[Batches], plan: Plan, augment: Augment | None, workers: int) -> Key:
    """Digests of what a training starts from: its network, its plan and its examples.

    The number of workers is part of it only where each of them remembers something of its own.
    """
    weights = [v.numpy() for v in module.state_dict().values()]
    how = (replace(plan, restarts=0), getattr(augment, "__qualname__", None), plan.hook != "plain" and workers)
    parts = {"network": [str(module).encode(), *weights], "plan": [repr(how).encode()], "examples": data}
    return {name: _digest(part) for name, part in parts.items()}


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()


def found(path: Path | None, key: Key) -> bytes | None:
    """The checkpoint at ``path`` if there is a whole one of this very training.

    What cannot be read is put aside, as ``<name>.damaged``, with a warning. Raises
    :class:`~trilobe.errors.TrainingError` where the checkpoint is of another training: it would be written over.

    >>> found(Path("none"), {})
    """
    if path is None or not path.exists():
        return None
    saved = path.read_bytes()
    try:
        meta = from_safetensors(saved)[1]
        theirs: Key = json.loads(meta["key"])
    except (TrainingError, KeyError, ValueError):
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        logger.warning("%s is no whole checkpoint: it is now %s, and training begins anew", path, aside.name)
        return None
    if other := [name for name in key if theirs.get(name) != key[name]]:
        raise TrainingError(
            f"the checkpoint {path} is of another {' and '.join(other)}",
            expected="the network, plan, examples and, with a hook, workers that it was begun with",
            hint="go on with those, give this training a file of its own, or delete the file to begin anew",
        )
    return saved


class _Resumable:
    """A training that can be gone on with: ``keep`` is handed all of its state from time to time.

    Args:
        key: of this training, see :func:`key_of`.
        saved: what was kept the last time, of a training with this key.
        keep: where the state goes; None keeps nothing.
        every: seconds until it is due for the first time.
    """

    def __init__(self, key: Key, saved: bytes | None, keep: Callable[[bytes], None] | None, every: float) -> None:
        self.key, self.saved, self.keep = key, saved, keep
        self.next_at = time.monotonic() + every

    def restore(self, training: Training, patience: Patience) -> int:
        """Put everything where it was; the step to go on from."""
        self.training, self.patience = training, patience
        if self.saved is None:
            return 0
        tensors, meta = from_safetensors(self.saved)
        step = int(meta["step"])
        training.module.load_state_dict(_below(tensors, "module"))
        for _ in range(step):
            training.optimizer._opt_called = True  # type: ignore[attr-defined]  # the schedule is a function of the step
            training.schedule.step()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer").items():
            i, what = name.split(".")
            moments.setdefault(int(i), {})[what] = value
        training.optimizer.load_state_dict({**training.optimizer.state_dict(), "state": moments})
        training.order.copy_(tensors["order"])
        training.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["rng"])
        patience.best, patience.waited, patience.sum = tensors["patience"].tolist()
        patience.weights = _below(tensors, "best")
        if training.hook:
            _remember(training.hook, _below(tensors, f"hook.{training.team.rank}"))
        return step

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.keep is not None and time.monotonic() >= self.next_at

    def save(self, step: int, every: float) -> None:
        """Hand over the state after ``step`` steps; the next time is ``every`` seconds from now.

        All workers call it together; the first hands over what all of them remember.
        """
        training = self.training
        remembered = training.team.collected(_memory(training.hook)) if training.hook else []
        if training.team.rank == 0 and self.keep:
            tensors = {f"module.{k}": v for k, v in training.module.state_dict().items()}
            for i, moments in training.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
            for rank, memory in enumerate(remembered):
                tensors |= {f"hook.{rank}.{k}": v for k, v in memory.items()}
            tensors |= {f"best.{k}": v for k, v in self.patience.weights.items()}
            patience = (self.patience.best, self.patience.waited, self.patience.sum)
            tensors |= {"order": training.order, "generator": training.generator.get_state(),
                        "rng": torch.get_rng_state(), "patience": torch.tensor(patience).double()}  # fmt: skip
            self.keep(to_safetensors(tensors, {"key": json.dumps(self.key), "step": str(step)}))
        self.next_at = time.monotonic() + every


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix`` and a dot, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _memory(hook: State) -> dict[str, Tensor]:
    """What one worker's hook remembers, as tensors alone: whichever memories it has."""
    saved = hook.state_dict()
    parts = {part: named for part, named in saved.items() if isinstance(named, dict)}
    out = {f"{part}.{k}": v for part, named in parts.items() for k, v in named.items() if isinstance(v, Tensor)}
    out["step"] = torch.tensor(saved["step"])
    return out | ({} if saved["generator"] is None else {"generator": saved["generator"]})


def _remember(hook: State, tensors: Mapping[str, Tensor]) -> None:
    fresh = hook.state_dict()  # its format and choices, and memories that are empty yet
    whole = {part: (isinstance(now, dict) and _below(tensors, part)) or now for part, now in fresh.items()}
    hook.load_state_dict(whole | {"step": int(tensors["step"]), "generator": tensors.get("generator")})
