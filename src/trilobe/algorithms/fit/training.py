"""The one training function, which every engine calls, and the step it is made of."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trilobe.algorithms.fit.batches import Batches, shuffled
from trilobe.algorithms.fit.plan import Plan, optimizer_of, schedule_of
from trilobe.algorithms.fit.team import ALONE, Team
from trilobe.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from trilobe.algorithms.fit.checkpoint import _Resumable

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


class Objective(nn.Module):
    """What is minimized, as a module: of a batch and what is believed of it, the module's own loss or the one loss."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.module, self.bootstrap, self.reduced = module, plan.bootstrap, plan.precision == "bfloat16"
        self.own: Callable[..., Tensor] | None = getattr(module, "loss", None)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.reduced):
            if self.own:
                return self.own(x, told, self.bootstrap)
            logits = logits_of(self.module, x)
        return belief_loss(logits.float() if self.reduced else logits, told, self.bootstrap)


def logits_of(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, or a :class:`~trilobe.errors.TrainingError` that says it does not take such input."""
    try:
        out: Tensor = module(x)
    except (RuntimeError, ValueError) as e:
        raise TrainingError(
            f"the network does not take an input of shape {tuple(x.shape[1:])}: {e}",
            expected="a network made for this preprocessing",
        ) from e
    return out


class Training:
    """A training in pieces: what a step consists of, and what changes from step to step.

    Args:
        module: trained in place.
        x, told: the examples and what is believed of them.
        plan: settled.
        augment: changes a batch at random, given a generator.
        team: who else trains it.
    """

    def __init__(
        self, module: nn.Module, x: Batches, told: Batches, plan: Plan, augment: Augment | None, team: Team = ALONE
    ) -> None:
        self.module, self.x, self.told, self.plan, self.augment, self.team = module, x, told, plan, augment, team
        self.total, self.batches = plan.total_steps(len(x)), -(-len(x) // plan.batch_size)
        self.optimizer = optimizer_of(plan, module)
        self.schedule = schedule_of(plan, self.optimizer, self.total)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.order = torch.arange(len(x))
        objective = Objective(module, plan)
        self.sizes = x.sizes() if objective.own else torch.ones(len(x))
        self.parallel = team.joined(objective)
        self.hook = team.hooked(self.parallel, module, plan.hook, plan.seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The examples of a step, varied; what is believed of them; what each adds to the loss's mean."""
        at = step % self.batches
        if at == 0:
            self.order.copy_(shuffled(self.x, self.plan.batch_size, self.generator))
        index = self.order.tensor_split(self.batches)[at]  # of even size: a last batch of two would be noise
        if len(index) == 1:
            index = torch.cat([index, self.order[:1]])  # batch normalization needs two
        xb, told = self.x[index], self.told[index]
        return (self.augment(xb, self.generator) if self.augment else xb), told, self.sizes[index]

    def loss(self, xb: Tensor, told: Tensor, sizes: Tensor) -> Tensor:
        """The loss of this worker's part of a batch."""
        return self.team.loss(self.parallel, xb, told, sizes)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the whole batch, at every worker."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, loss: float, step: int) -> None:
        """Move the weights; a :class:`~trilobe.errors.TrainingError` instead where that would spoil them."""
        where = f"at step {step + 1} of {self.total}"
        hint = f"lower train.lr (now {self.plan.lr}), and look for extreme values in the input"
        if not np.isfinite(loss):
            raise TrainingError(f"the loss became {loss} {where}", expected="a finite loss", hint=hint)
        if name := broken_gradient(self.module):
            raise TrainingError(
                f"NaN or infinity in the gradient of {name!r} {where}; the weights are those before it",
                expected="finite gradients",
                hint=hint,
            )
        self.optimizer.step()
        self.schedule.step()

    def mean_loss(self, x: Batches, told: Batches) -> float:
        """The loss of other examples, in eval mode."""
        objective, sums, sizes = Objective(self.module, self.plan), 0.0, 0.0
        of = x.sizes() if objective.own else torch.ones(len(x))
        objective.eval()
        with torch.no_grad():
            for index in torch.split(torch.arange(len(x)), 4 * self.plan.batch_size):
                size = float(of[index].sum())
                sums, sizes = sums + size * float(objective(x[index], told[index])), sizes + size
        self.module.train()
        return sums / sizes


def require_trainable(module: nn.Module) -> None:
    """Raise :class:`~trilobe.errors.UsageError` for a module without free parameters, or with sparse gradients.

    >>> require_trainable(nn.Linear(1, 1))
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise UsageError("a network in which nothing can be trained", expected="a parameter with requires_grad=True")
    for name, part in module.named_modules():
        if getattr(part, "sparse", False) and isinstance(part, nn.Embedding | nn.EmbeddingBag):
            raise UsageError(
                f"the gradient of {name + '.weight' if name else 'weight'!r} is sparse",
                expected="dense gradients: momentum would be dense anyway",
                hint="Embedding(..., sparse=False)",
            )


def broken_gradient(module: nn.Module) -> str:
    """The first parameter whose gradient has NaN or infinity, or nothing.

    The norms settle the usual case; a norm may also overflow where every entry is finite.

    >>> broken_gradient(nn.Linear(1, 1))
    ''
    """
    found = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([g for _, g in found]) if found else []
    if math.isfinite(sum(norm.item() for norm in norms)):
        return ""
    return next((name for name, g in found if not bool(torch.isfinite(g).all())), "")


def check_finite(module: nn.Module) -> None:
    """Raise :class:`~trilobe.errors.TrainingError` naming the first weight tensor with NaN or infinity.

    >>> check_finite(nn.Linear(1, 1))
    """
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"NaN or infinity in the weights {name!r}", expected="finite weights", hint="train again"
            )


class Patience:
    """Whether training may go on: it has to become better now and then, ``plan.patience`` epochs apart at most."""

    def __init__(self, training: Training, held: tuple[Batches, Batches]) -> None:
        self.training, self.held = training, held
        self.best, self.waited, self.sum = np.inf, 0.0, 0.0
        self.weights: dict[str, Tensor] = {}

    def over(self, loss: float, step: int) -> bool:
        """Note the loss of the step just done, the ``step``-th; at the end of an epoch, judge."""
        training = self.training
        self.sum += loss
        if not training.plan.patience or step % training.batches:
            return False
        over = training.team.rank == 0 and self._judged(self.sum / training.batches)
        self.sum = 0.0
        return training.team.agreed(over)

    def _judged(self, loss: float) -> bool:
        if len(self.held[0]):
            loss = self.training.mean_loss(*self.held)
        if not loss < self.best:  # nor is NaN
            self.waited += 1
            return self.waited >= self.training.plan.patience
        self.best, self.waited = loss, 0
        if len(self.held[0]):
            self.weights = {k: v.clone() for k, v in self.training.module.state_dict().items()}
        return False

    def finish(self) -> None:
        """Put the best weights back, where they were judged on what is held out."""
        if self.weights:
            self.training.module.load_state_dict(self.weights)


@contextlib.contextmanager
def conditions(plan: Plan, x: Batches) -> Iterator[None]:
    """The random numbers of ``plan``, threads as the work wants them, and everything as it was afterwards.

    Small examples get one thread: two wait for each other longer than they work, five times so on a busy machine.
    """
    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if plan.deterministic or np.size(x.rows[0]) <= SMALL:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(strict or plan.deterministic)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)  # for dropout inside the module
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict)


def train(
    training: Training, held: tuple[Batches, Batches], state: "_Resumable", say: Progress, every: float
) -> list[float]:
    """Take all the steps that are left and return their losses: what every engine calls.

    Args:
        training: what a step is.
        held: examples and beliefs kept back to judge progress by; may be none.
        state: finds the step to begin with, and is saved.
        say: called with (step, total steps, loss) every ten steps and at the end.
        every: seconds between checkpoints.
    """
    team, patience, losses = training.team, Patience(training, held), list[float]()
    training.module.train()
    with conditions(training.plan, training.x):
        step = state.restore(training, patience)
        over = 0 < training.plan.patience <= patience.waited
        while step < training.total and not over:
            loss = training.loss(*training.batch(step))
            promise = team.total(loss, state.due())
            training.backward(loss)
            value, due = promise()
            training.update(value, step)
            losses.append(value)
            step += 1
            over = patience.over(value, step)
            if due:
                state.save(step, every)
            if step % 10 == 0 or step == training.total or over:
                say(step, step if over else training.total, value)
    patience.finish()
    training.module.eval()
    check_finite(training.module)
    return losses
