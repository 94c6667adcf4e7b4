"""Training a torch module from beliefs, and predicting with it.

One loss takes any belief: certain labels, soft beliefs from noisy answers, sets from partial ones, a row per token in
sequences. The module is given from outside; what it looks like is the task's business. Two methods are used where a
module has them: ``loss(x, likelihood, bootstrap)``, a loss of its own (a tagger's, over whole sequences of tags), and
``log_proba(x)``, what it predicts where that is not ``module(x)``. Examples may be rows of unequal length (see
:mod:`trilobe.rows`): a batch is filled up with zeros, its beliefs with ones.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trilobe.algorithms.weights import from_safetensors, to_safetensors
from trilobe.errors import TrainingError, UsageError
from trilobe.files import write_atomically
from trilobe.rows import apply, as_rows, flat, is_ragged, lengths, pad
from trilobe.types import FloatArray

SMALL = 1024  # numbers an example, up to which training uses one thread
Augment = Callable[[Tensor, torch.Generator], Tensor]
Progress = Callable[[int, int, float], None]


def belief_loss(logits: Tensor, likelihood: Tensor, bootstrap: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The one loss: how surprising the answers are to the model.

    With ``likelihood`` l(k) = P(answers | class k) up to a factor, and p the model's softmax, the probability of the
    answers under the model is sum_k p(k) l(k). Its negative logarithm has the gradient p - q in the logits, where

        q(k)  ∝  l(k) p(k)^bootstrap ,   bootstrap = 1                                                        (1)

    is the belief with the model itself as the prior: training by this loss is the M-step of the engine in
    :mod:`trilobe.data.beliefs`. The loss returned is the cross-entropy from q, held fixed, to p: it has this gradient,
    and is larger than the negative logarithm by what q leaves open (the entropy of q, for a set). Special cases: a
    certain label gives the usual cross-entropy; a set S the gradient of -log sum_{k in S} p(k) (Hu et al. 2019);
    ``bootstrap`` = 0 leaves the model out and gives plain soft targets; values between trust the model's own opinion
    partly.

    Args:
        logits: ``(..., n_classes)``.
        likelihood: the same shape, at least 0, a positive entry in every row that counts.
        bootstrap: 0 to 1, see equation (1).
        mask: ``(...)`` booleans, False for rows that do not count (padding).

    Returns:
        The mean over rows that count (0 where none does), a scalar.

    Raises:
        TrainingError: shapes that differ.

    >>> certain = torch.tensor([[0.0, 1.0]])
    >>> round(float(belief_loss(torch.tensor([[0.0, 0.0]]), certain)), 4)
    0.6931
    """
    if logits.shape != likelihood.shape:
        raise TrainingError(
            f"logits of shape {tuple(logits.shape)} for beliefs of shape {tuple(likelihood.shape)}",
            expected="one logit per class",
        )
    if mask is not None:
        logits, likelihood = logits[mask], likelihood[mask]
    log_p = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():  # in logarithms: a model may all but exclude what the answers leave possible
        q = torch.softmax(likelihood.log() + bootstrap * log_p, dim=-1)
    rows = -(q * log_p).sum(dim=-1)
    return rows.sum() / max(rows.numel(), 1)


@dataclass(frozen=True)
class Plan:
    """How to train: every number that changes the result, so that it can be recorded and repeated.

    Training takes ``max(steps, epochs * batches)`` steps of AdamW under a one-cycle schedule (Smith and Topin 2018).
    """

    steps: int = 300
    epochs: int = 20
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 1e-2
    bootstrap: float = 1.0
    seed: int = 0

    def total_steps(self, n: int) -> int:
        """Optimizer steps for ``n`` examples."""
        return max(self.steps, self.epochs * -(-n // self.batch_size))


def fit(
    module: nn.Module,
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan = Plan(),
    augment: Augment | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    every: float = 3.0,
) -> list[float]:
    """Train ``module`` in place on ``X`` ``(n, ...)`` float32 (or rows) and ``likelihood`` ``(n, ..., n_classes)``.

    The same arguments give the same weights, also when the process was killed in between: with ``checkpoint`` the
    whole state (weights, moments, random numbers, step) is written every few seconds and found again. A file that
    belongs to another run, or is damaged, is ignored.

    Args:
        module: maps ``X`` to logits; left in eval mode.
        X, likelihood: the examples and what is believed of them.
        plan: the numbers.
        augment: changes a batch at random, given a generator.
        checkpoint: a file to resume from and to write; removed at the end.
        progress: called with (step, total steps, loss) every ten steps and at the end.
        every: seconds between checkpoints.

    Returns:
        The training loss per step (of this call's steps).

    Raises:
        TrainingError: NaN in the input, the loss or the weights, a module that does not fit its input or the classes.
        UsageError: nothing to train on, or not as many examples as beliefs.

    >>> net = nn.Linear(2, 2)
    >>> losses = fit(net, np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), Plan(steps=50, lr=0.1))
    >>> losses[-1] < losses[0]
    True
    """
    x, target = _checked(X, likelihood)
    own: Callable[..., Tensor] | None = getattr(module, "loss", None)
    total = plan.total_steps(len(x))
    optimizer = torch.optim.AdamW(module.parameters(), lr=plan.lr, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, total_steps=total)
    run = repr((plan, str(module), getattr(augment, "__qualname__", None)))
    state = _Resumable(module, optimizer, plan.seed, (x, target), run, checkpoint)
    generator, order, losses = state.generator, state.order, []
    module.train()
    with torch.random.fork_rng(devices=[]), _few_threads(x):
        torch.manual_seed(plan.seed)  # for dropout inside the module
        start, batches = state.restore(schedule), -(-len(x) // plan.batch_size)
        for step in range(start, total):
            at = step % batches
            if at == 0:
                order.copy_(_shuffled(x, plan.batch_size, generator))
            batch = order.tensor_split(batches)[at]  # of even size: a last batch of two would be noise
            if len(batch) == 1:
                batch = torch.cat([batch, order[:1]])  # batch normalization needs two
            xb, told = x[batch], target[batch]
            xb = augment(xb, generator) if augment else xb
            loss = own(xb, told, plan.bootstrap) if own else belief_loss(_logits(module, xb), told, plan.bootstrap)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss became {losses[-1]} at step {step + 1} of {total}",
                    expected="a finite loss",
                    hint=f"lower train.lr (now {plan.lr}), and look for extreme values in the input",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            state.save(step + 1, every)
            if progress and (step % 10 == 9 or step + 1 == total):
                progress(step + 1, total, losses[-1])
    module.eval()
    check_finite(module)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return losses


def predict_logits(module: nn.Module, X: FloatArray, batch_size: int = 1024) -> FloatArray:
    """Logits of ``X`` ``(n, ...)`` in eval mode, ``(n, n_classes)`` float32 (any shape the module gives).

    For rows of unequal length those of each token are rows too, ``(T_i, n_classes)``; batches are then of texts of
    about one length.

    >>> predict_logits(nn.Linear(2, 3), np.zeros((5, 2), dtype=np.float32)).shape
    (5, 3)
    """
    module.eval()
    predict = getattr(module, "log_proba", None) or (lambda x: _logits(module, x))
    with torch.no_grad():
        if not is_ragged(X):
            parts = [predict(_tensor(X[i : i + batch_size])) for i in range(0, max(len(X), 1), batch_size)]
            return np.asarray(torch.cat(parts).numpy())
        out: list[FloatArray] = [np.empty(0)] * len(X)
        size = lengths(X)
        for index in np.array_split(np.argsort(size, kind="stable"), -(-len(X) // min(batch_size, 128))):
            logits = predict(_tensor(pad(X[index])[0])).numpy()
            for i, row in zip(index, logits, strict=True):
                out[i] = row[: size[i]].copy() if row.ndim > 1 else row
        return as_rows(out)


def predict_samples(module: nn.Module, X: FloatArray, n_samples: int = 10, seed: int = 0) -> list[FloatArray]:
    """Logits of ``n_samples`` passes in which dropout stays on: a committee (Gal and Ghahramani 2016).

    Returns:
        ``n_samples`` arrays as :func:`predict_logits` gives them; all alike where the module has no dropout.

    >>> len(predict_samples(nn.Dropout(0.5), np.ones((5, 2), dtype=np.float32), 3))
    3
    """
    dropped = [m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    handles = [m.register_forward_pre_hook(_left_on) for m in dropped]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [predict_logits(module, X) for _ in range(n_samples)]
    finally:
        for handle in handles:
            handle.remove()
        module.eval()


def _left_on(module: nn.Module, _: object) -> None:
    module.train()


def cross_fit(
    make: Callable[[], nn.Module],
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan,
    folds: int = 3,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> FloatArray:
    """Out-of-fold logits ``(n, n_classes)``: each example judged by a module that never saw its answers.

    What calibration, model-bootstrapped aggregation and an estimate without a test set all need. ``folds`` shrinks to
    ``n`` when there are fewer examples.

    >>> cross_fit(lambda: nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan(steps=2), folds=2).shape
    (2, 2)
    """
    n = len(X)
    folds = max(2, min(folds, n))
    if n < 2:
        raise UsageError(f"cross-fitting on {n} example(s)", expected="at least 2")
    part = np.random.default_rng(plan.seed).permutation(n) % folds
    out: list[FloatArray] = [np.empty(0)] * n
    for fold in range(folds):
        held = part == fold
        module = make()
        fit(module, X[~held], likelihood[~held], plan, augment, progress=progress)
        for i, logits in zip(np.flatnonzero(held), predict_logits(module, X[held]), strict=True):
            out[i] = logits
    return as_rows(out)


def check_finite(module: nn.Module) -> None:
    """Raise :class:`~trilobe.errors.TrainingError` naming the first weight tensor with NaN or infinity.

    >>> check_finite(nn.Linear(1, 1))
    """
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"NaN or infinity in the weights {name!r}", expected="finite weights", hint="train again"
            )


class _Batches:
    """Examples on which to train, dense or rows; what is taken by a batch of indices is a tensor."""

    def __init__(self, array: FloatArray, fill: float) -> None:
        self.fill, self.dense, self.rows = fill, None, array
        if not is_ragged(array):
            self.dense = _tensor(array)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense[batch]
        return torch.from_numpy(pad(self.rows[batch.numpy()], self.fill)[0])

    def tobytes(self) -> bytes:
        """The content, for a digest."""
        flat_rows = flat(self.rows) if len(self) else self.rows
        return repr(lengths(self.rows).tolist() if is_ragged(self.rows) else self.rows.shape).encode() + (
            np.ascontiguousarray(flat_rows, dtype=np.float32).tobytes()
        )


def _checked(X: FloatArray, likelihood: FloatArray) -> tuple[_Batches, _Batches]:
    if len(X) != len(likelihood) or not len(X):
        raise UsageError(f"{len(X)} examples with {len(likelihood)} beliefs", expected="as many, at least one")
    for name, array in (("X", X), ("likelihood", likelihood)):
        if not np.isfinite(flat(array)).all():
            raise TrainingError(f"NaN or infinity in {name}", expected="finite numbers")
    told = flat(likelihood)
    if (told < 0).any() or (told.sum(axis=-1) <= 0).any():
        raise TrainingError("a belief that is negative, or zero for every class", expected="a class left possible")
    ratios = apply(lambda row: row / row.max(axis=-1, keepdims=True), likelihood)  # only ratios count
    return _Batches(X, 0.0), _Batches(ratios, 1.0)


@contextlib.contextmanager
def _few_threads(x: _Batches) -> Iterator[None]:
    """One thread for small examples: two wait for each other longer than they work, five times so on a busy machine."""
    before = torch.get_num_threads()
    if np.size(x.rows[0]) <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shuffled(x: _Batches, batch_size: int, generator: torch.Generator) -> Tensor:
    """A random order; of rows one in which neighbors are about equally long, so that little is filled up in vain."""
    order = torch.randperm(len(x), generator=generator)
    if x.dense is not None:
        return order
    size = torch.from_numpy(lengths(x.rows))
    parts = torch.tensor_split(order, -(-len(order) // (16 * batch_size)))
    return torch.cat([part[size[part].argsort(stable=True)] for part in parts])


def _tensor(array: FloatArray) -> Tensor:
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _logits(module: nn.Module, x: Tensor) -> Tensor:
    try:
        out: Tensor = module(x)
    except (RuntimeError, ValueError) as e:
        raise TrainingError(
            f"the network does not take an input of shape {tuple(x.shape[1:])}: {e}",
            expected="a network made for this preprocessing",
        ) from e
    return out


class _Resumable:
    """The state of a training run, as one safetensors file whose ``key`` says what run it belongs to."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        seed: int,
        data: "tuple[_Batches, _Batches]",
        run: str,
        path: Path | None,
    ) -> None:
        self.module, self.optimizer, self.path = module, optimizer, path
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.arange(len(data[0]))
        self.saved_at = time.monotonic()
        digest = hashlib.sha256(run.encode())
        for part in (*data, *(v.numpy() for v in module.state_dict().values())) if path else ():
            digest.update(part.tobytes())
        self.key = digest.hexdigest()

    def save(self, step: int, every: float) -> None:
        if self.path is None or time.monotonic() - self.saved_at < every:
            return
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors |= {"order": self.order, "generator": self.generator.get_state(), "rng": torch.get_rng_state()}
        write_atomically(self.path, to_safetensors(tensors, {"key": self.key, "step": str(step)}))
        self.saved_at = time.monotonic()

    def restore(self, schedule: torch.optim.lr_scheduler.LRScheduler) -> int:
        """Load the file if it is whole and belongs to this very run; the step to go on from."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            tensors, meta = from_safetensors(self.path.read_bytes())
        except TrainingError:
            return 0
        if meta.get("key") != self.key:
            return 0
        step = int(meta["step"])
        self.module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        for _ in range(step):
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # the schedule is a function of the step
            schedule.step()
        state = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                moments.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**state, "state": moments})
        self.order.copy_(tensors["order"])
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["rng"])
        return step
