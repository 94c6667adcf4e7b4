"""``fit`` and ``cross_fit``: one network, or one for each fold, on as many workers as wanted."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trilobe.algorithms.fit.batches import Batches, checked, held_back
from trilobe.algorithms.fit.checkpoint import Key, _Resumable, found, key_of
from trilobe.algorithms.fit.measuring import settle
from trilobe.algorithms.fit.plan import Plan
from trilobe.algorithms.fit.predicting import predict_logits
from trilobe.algorithms.fit.team import together
from trilobe.algorithms.fit.training import Augment, Progress, Training, require_trainable, train
from trilobe.algorithms.workers import Engine, Place, Work, WorkerLost, run
from trilobe.errors import UsageError
from trilobe.files import write_atomically
from trilobe.rows import as_rows
from trilobe.types import BoolArray, FloatArray

logger = logging.getLogger(__name__)
EVERY = 3.0  # seconds between checkpoints


@dataclass(frozen=True)
class Job:
    """A network to train, and all that it takes: what is sent to workers. Called, it trains.

    Args:
        module: the network.
        X, likelihood: checked examples and beliefs, of which ``part`` ``(n,)`` is for training.
        plan: settled.
        augment: see :func:`fit`.
        key: see :func:`~trilobe.algorithms.fit.checkpoint.key_of`; empty where nothing is to be saved.
        saved: the checkpoint to go on from.
        every: seconds between checkpoints.
        last: whether to save the end as well.
    """

    module: nn.Module
    X: FloatArray
    likelihood: FloatArray
    part: BoolArray
    plan: Plan
    augment: Augment | None
    key: Key
    saved: bytes | None
    every: float
    last: bool

    def __call__(self, place: Place) -> tuple[list[float], Mapping[str, Tensor]]:
        """Train as one of a team; says ("step", step, total, loss) and ("saved", bytes). The losses and weights."""
        held = held_back(int(self.part.sum()), self.plan.held_out, self.plan.seed)
        trained, judged = (np.flatnonzero(self.part)[rows] for rows in (~held, held))
        keep = (lambda data: place.say(("saved", data))) if self.key else None
        with together(place) as team:
            training = Training(self.module, *self._batches(trained), self.plan, self.augment, team)
            state = _Resumable(self.key, self.saved, keep, self.every)
            say = (lambda *step: place.say(("step", *step))) if team.rank == 0 else (lambda *step: None)
            losses = train(training, self._batches(judged), state, say, self.every)
            if self.last:
                state.save(training.total, self.every)
        return losses, self.module.state_dict() if team.rank == 0 else {}

    def _batches(self, rows: NDArray[np.intp]) -> tuple[Batches, Batches]:
        whole = len(rows) == len(self.X)  # nothing is copied then
        X, likelihood = (self.X, self.likelihood) if whole else (self.X[rows], self.likelihood[rows])
        return Batches(X, 0.0), Batches(likelihood, 1.0)


def _job(
    module: nn.Module,
    data: tuple[FloatArray, FloatArray],
    part: BoolArray | None,
    plan: Plan,
    augment: Augment | None,
    checkpoint: Path | None,
    every: float,
    workers: int,
) -> Job:
    """The job, with what was saved of it at ``checkpoint``; of a ``part`` of the data the end is saved, too."""
    require_trainable(module)
    every_one = np.ones(len(data[0]), dtype=bool)
    rows = every_one if part is None else part
    batches = [Batches(array[rows], 0.0) for array in data] if checkpoint else []
    key = key_of(module, batches, plan, augment, workers) if checkpoint else {}
    return Job(module, *data, rows, plan, augment, key, found(checkpoint, key), every, part is not None)


def fit(
    module: nn.Module,
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan = Plan(),  # noqa: B008  # it is frozen
    augment: Augment | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    every: float = EVERY,
    workers: int = 1,
    engine: Engine = "here",
) -> list[float]:
    """Train ``module`` in place on ``X`` ``(n, ...)`` float32 (or rows) and ``likelihood`` ``(n, ..., n_classes)``.

    The same arguments give the same weights, also when the process was killed in between: with ``checkpoint`` the
    whole state (weights, moments, random numbers, step) is written every few seconds and found again. A file that
    belongs to another run, or is damaged, is not used, with a warning in the log.

    With ``workers``, each takes its rows of every batch, and gradients are exchanged as ``plan.hook`` says. The result
    is that of one worker but for rounding, if the hook is "plain". When a worker is lost, all begin again from the last
    checkpoint, ``plan.restarts`` times at most.

    Args:
        module: maps ``X`` to logits; left in eval mode.
        X, likelihood: the examples and what is believed of them.
        plan: the numbers.
        augment: changes a batch at random, given a generator.
        checkpoint: a file to resume from and to write; removed at the end.
        progress: called with (step, total steps, loss) every ten steps and at the end.
        every: seconds between checkpoints.
        workers: how many processes.
        engine: "here" or "ray", see :func:`trilobe.algorithms.workers.run`.

    Returns:
        The training loss per step (of this call's steps; after a lost worker, of those since the last checkpoint).

    Raises:
        TrainingError: NaN in the input, the loss, a gradient or the weights, a module that does not fit its input or
            the classes; a worker lost once too often; a checkpoint of another training.
        UsageError: nothing to train on, not as many examples as beliefs, a network that cannot be trained, or one that
            cannot be sent to other processes.
        MissingExtra: Ray is not installed.

    >>> net = nn.Linear(2, 2)
    >>> losses = fit(net, np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), Plan(steps=50, lr=0.1))
    >>> losses[-1] < losses[0]
    True
    """
    data = checked(X, likelihood)
    plan = settle(module, *data, plan, augment)
    require_hook(plan, workers)

    def job() -> Job:
        return _job(module, data, None, plan, augment, checkpoint, every, workers)

    def heard(said: tuple[Any, ...]) -> None:
        if said[0] == "saved" and checkpoint:
            write_atomically(checkpoint, said[1])
        elif progress:
            progress(*said[1:])

    losses, weights = _run(job, [checkpoint], plan.restarts, workers, engine, heard)[0]
    module.load_state_dict(weights)
    module.eval()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return list(losses)


def require_hook(plan: Plan, workers: int) -> None:
    """Raise :class:`~trilobe.errors.UsageError` where a worker alone is to compress what it sends.

    >>> require_hook(Plan(hook="majority_vote"), 2)
    """
    if plan.hook != "plain" and workers == 1:
        raise UsageError(
            f"the hook {plan.hook!r} with one worker, which sends nothing",
            expected="at least two workers",
            hint="hook = 'plain'; for steps by signs alone, optimizer = 'signsgd' or 'signum'",
        )


def _run(
    work: Callable[[], Work],
    checkpoints: Sequence[Path | None],
    restarts: int,
    workers: int,
    engine: Engine,
    heard: Callable[[tuple[Any, ...]], None],
) -> list[Any]:
    """:func:`~trilobe.algorithms.workers.run`, again where a worker was lost and something had been saved."""
    try:
        return run(work(), workers, engine, heard)
    except WorkerLost as e:
        if not restarts or not any(c and c.exists() for c in checkpoints):
            raise
        logger.warning("%s; training goes on from the last checkpoint", e.problem.splitlines()[0])
    return _run(work, checkpoints, restarts - 1, workers, engine, heard)


@dataclass(frozen=True)
class SideBySide:
    """Networks to train: each worker has some of them to itself, and nothing is exchanged."""

    jobs: tuple[Job, ...]

    def __call__(self, place: Place) -> dict[int, tuple[Mapping[str, Tensor], list[FloatArray]]]:
        """Train those of this worker: their weights, and what each says of the examples that it did not see.

        Says what a job says, after its number, and then (number, "done").
        """
        out = {}
        for i in range(place.rank, len(self.jobs), place.size):
            job = self.jobs[i]
            _, weights = job(Place(say=lambda said, i=i: place.say((i, *said))))  # type: ignore[misc]
            place.say((i, "done"))
            out[i] = weights, [] if job.part.all() else [*predict_logits(job.module, job.X[~job.part])]
        return out


def cross_fit(
    make: Callable[[], nn.Module],
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan,
    folds: int = 3,
    augment: Augment | None = None,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    workers: int = 1,
    engine: Engine = "here",
) -> FloatArray:
    """Out-of-fold logits ``(n, n_classes)``: each example judged by a module that never saw its answers.

    What calibration, model-bootstrapped aggregation and an estimate without a test set all need. ``folds`` shrinks to
    ``n`` when there are fewer examples. ``workers`` train whole networks side by side: the numbers stay the same.

    Args:
        make: a fresh module.
        X, likelihood, plan, augment: see :func:`fit`. ``plan.hook`` must be "plain": nothing is exchanged.
        folds: how many, at least 2.
        progress: called with (steps of all networks so far, their total, loss).
        checkpoints: a folder for what is done of each network; called again, it is not done again. It is the caller's
            to remove.
        workers, engine: see :func:`fit`.

    >>> cross_fit(lambda: nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan(steps=2), folds=2).shape
    (2, 2)
    """
    parts = _parts(len(X), folds, plan.seed)
    return _side_by_side(make, (X, likelihood), parts, plan, augment, progress, checkpoints, (workers, engine))[1]


def fit_and_cross_fit(
    make: Callable[[], nn.Module],
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan,
    folds: int = 3,
    augment: Augment | None = None,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    workers: int = 1,
    engine: Engine = "here",
) -> tuple[nn.Module, FloatArray]:
    """A module trained on everything, and the logits of :func:`cross_fit`, whose arguments these are.

    All ``folds + 1`` networks are trained side by side.

    >>> make = lambda: nn.Linear(2, 2)
    >>> module, logits = fit_and_cross_fit(make, np.eye(2, dtype=np.float32), np.eye(2), Plan(steps=2), folds=2)
    >>> module.training, logits.shape
    (False, (2, 2))
    """
    parts = [*_parts(len(X), folds, plan.seed), np.ones(len(X), dtype=bool)]
    return _side_by_side(make, (X, likelihood), parts, plan, augment, progress, checkpoints, (workers, engine))


def _parts(n: int, folds: int, seed: int) -> list[BoolArray]:
    """Which examples the network of each fold is trained on."""
    if n < 2:
        raise UsageError(f"cross-fitting on {n} example(s)", expected="at least 2")
    folds = max(2, min(folds, n))
    part = np.random.default_rng(seed).permutation(n) % folds
    return [part != fold for fold in range(folds)]


def _side_by_side(
    make: Callable[[], nn.Module],
    data: tuple[FloatArray, FloatArray],
    parts: Sequence[BoolArray],
    plan: Plan,
    augment: Augment | None,
    progress: Progress | None,
    folder: Path | None,
    where: tuple[int, Engine],
) -> tuple[nn.Module, FloatArray]:
    """The network of the last of ``parts``, and what each of them says of the examples outside of its part."""
    data, modules = checked(*data), [make() for _ in parts]
    plan = settle(modules[0], *data, plan, augment)
    require_hook(plan, 1)
    files = [folder / f"network-{i}" if folder else None for i in range(len(parts))]
    done, totals = [0] * len(parts), [plan.total_steps(int(part.sum())) for part in parts]

    def work() -> SideBySide:
        each = zip(modules, parts, files, strict=True)
        return SideBySide(tuple(_job(m, data, part, plan, augment, file, EVERY, 1) for m, part, file in each))

    def heard(said: tuple[Any, ...]) -> None:
        i, kind, *rest = said
        if kind == "saved" and (file := files[i]):
            write_atomically(file, rest[0])
        elif kind == "done":  # where it was found done, nothing else was said
            done[i] = totals[i]
        elif kind == "step" and progress:
            done[i] = totals[i] if rest[0] == rest[1] else rest[0]
            progress(sum(done), sum(totals), rest[2])

    workers, engine = where
    logits: list[FloatArray] = [np.empty(0)] * len(data[0])
    for trained in _run(work, files, plan.restarts, min(workers, len(parts)), engine, heard):
        for i, (weights, rows) in trained.items():
            modules[i].load_state_dict(weights)
            for at, row in zip(np.flatnonzero(~parts[i]), rows, strict=True):
                logits[at] = row
    return modules[-1].eval(), as_rows(logits)
