"""Attacks on image classifiers, and what is left of the accuracy under them.

A module takes ``(n, channels, height, width)`` float32 images with values 0 to 1 and gives ``(n, n_classes)`` logits;
whatever normalization it needs happens inside it, so that the size of an attack is measured on the image itself. A
module is left as it was found: its mode, its parameters and their gradients. Thresholds live in ``checks.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trilobe.errors import NotEnoughData, TrainingError, UsageError
from trilobe.statistics import wilson
from trilobe.trust.metrics import check_labels
from trilobe.types import Evidence

Images = NDArray[np.float32]
MAX_RANGE = 30.0  # logits further apart than this round a softmax in float64 to zeros and ones, and hide the gradient
BLIND_SHARE = 0.1  # with more attacked examples than this without any gradient, surviving proves nothing


@contextmanager
def evaluating(module: nn.Module) -> Iterator[torch.device]:
    """``module`` in evaluation mode for the length of a ``with``, then each part in the mode it was found in.

    Gives the device that the module's parameters are on.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with evaluating(net) as device:
    ...     net.training, device.type
    (False, 'cpu')
    >>> net.training
    True
    """
    modes = [(part, part.training) for part in module.modules()]
    parameter = next(module.parameters(), None)
    module.eval()
    try:
        yield parameter.device if parameter is not None else torch.device("cpu")
    finally:
        for part, training in modes:
            part.training = training


def check_images(X: ArrayLike | Tensor, *, unit: bool = True) -> Tensor:
    """``X`` as ``(n, channels, height, width)`` float32, finite, and within 0 to 1 where ``unit``.

    Raises:
        UsageError: another shape, a NaN, or a value outside 0 to 1.
        NotEnoughData: no images.

    >>> check_images(np.zeros((2, 3, 4, 4))).shape
    torch.Size([2, 3, 4, 4])
    """
    x = X.detach().to("cpu", torch.float32) if isinstance(X, Tensor) else torch.from_numpy(np.array(X, np.float32))
    if x.ndim != 4:
        raise UsageError(f"images of shape {tuple(x.shape)}", expected="(n, channels, height, width)")
    if x.numel() == 0:
        raise NotEnoughData("there are no images to attack or to explain", expected="at least one")
    if not bool(torch.isfinite(x).all()):
        raise UsageError("images with a NaN or an infinite value", expected="finite numbers")
    low, high = float(x.min()), float(x.max())
    if unit and not 0 <= low <= high <= 1:
        raise UsageError(f"images with values from {low:g} to {high:g}", expected="0 to 1", hint="divide bytes by 255")
    return x


def projected_gradient_descent(
    module: nn.Module,
    X: ArrayLike | Tensor,
    labels: ArrayLike,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    targets: ArrayLike | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> Images:
    """Images within ``eps`` of ``X`` (every channel of every pixel) that ``module`` gets wrong, where it finds them.

    Projected gradient descent with a random start (Madry et al. 2018, equation after 2.1) on the cross-entropy: away
    from ``labels``, or toward ``targets`` where given. Two deviations, which only make it stronger: the image returned
    is the best of all iterates of all restarts and of ``X`` itself (by the margin of its logits), and logits that span
    more than 30 are scaled down first, since a saturated softmax hides its gradient. Deterministic for one ``seed``
    and ``batch_size``.

    Args:
        module: gives logits for images with values 0 to 1.
        X: ``(n, channels, height, width)``, values 0 to 1.
        labels: ``(n,)`` the true classes.
        eps: largest change of a value, 0 to 1.
        steps: gradient steps a restart, at least 1.
        step_size: change a step; 2.5 * eps / steps where None, so that any corner of the ball can be reached.
        targets: ``(n,)`` the classes to reach, or None for any class but the label.
        restarts: random starts, at least 1.

    Returns:
        ``(n, channels, height, width)`` float32, values 0 to 1.

    Raises:
        UsageError: shapes, values or settings out of range.
        TrainingError: the module gives NaN.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> image = torch.full((1, 1, 2, 2), 0.5)
    >>> moved = projected_gradient_descent(net, image, [0], eps=0.1)
    >>> moved.shape, round(float(abs(moved - 0.5).max()), 6)
    ((1, 1, 2, 2), 0.1)
    """
    found, _ = _attack(module, X, labels, eps, steps, step_size, targets, restarts, seed, batch_size)
    return found


def robust_accuracy(
    module: nn.Module,
    X: ArrayLike | Tensor,
    labels: ArrayLike,
    eps_list: Sequence[float],
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Evidence]:
    """Accuracy under :func:`projected_gradient_descent` at each ``eps``, smallest first, as ``robust_accuracy@<eps>``.

    An example counts at ``eps`` only if it is right on the clean image and under the attack at every smaller listed
    ``eps`` too, so the figures never rise with ``eps``; only the survivors of one ``eps`` are attacked at the next.
    At ``eps`` 0 the figure is the clean accuracy. Higher = better; the interval is Wilson's. Each figure bounds the
    true one from above: a stronger attack can only lower it.

    Where more than a tenth of the attacked examples never showed a gradient, the attack was blind, and the detail's
    ``status`` says ``"inconclusive: zero gradients"`` (Athalye et al. 2018): a gate does not pass on it. Arguments and
    errors are those of :func:`projected_gradient_descent`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> with torch.no_grad():
    ...     _ = net[1].weight.copy_(torch.tensor([[1.0], [-1.0]])), net[1].bias.copy_(torch.tensor([-0.5, 0.5]))
    >>> X = torch.tensor([0.55, 0.9]).reshape(2, 1, 1, 1)
    >>> [(e.check, e.figure) for e in robust_accuracy(net, X, [0, 0], [0.1, 0])]
    [('robust_accuracy@0', 1.0), ('robust_accuracy@0.1', 0.5)]
    """
    x = check_images(X)
    y = _check_classes(labels, len(x))
    if not eps_list:
        raise UsageError("no attack sizes", expected="at least one eps, as [0.01, 0.03]")
    alive = _predict(module, x, batch_size) == y
    settings = {
        "attack": "pgd",
        "steps": steps,
        "restarts": restarts,
        "seed": seed,
        "clean_accuracy": float(alive.mean()),
    }
    evidence = []
    for eps in sorted({float(e) for e in eps_list}):
        blind, attacked = 0, int(alive.sum())
        if eps != 0 and attacked:
            rows = np.flatnonzero(alive)
            moved, saw = _attack(module, x[rows], y[rows], eps, steps, step_size, None, restarts, seed, batch_size)
            alive[rows] = _predict(module, torch.from_numpy(moved), batch_size) == y[rows]
            blind = int((~saw).sum())
        kept = int(alive.sum())
        low, high = wilson(kept, len(y))
        status = "inconclusive: zero gradients" if blind > BLIND_SHARE * attacked else "measured"
        detail = {**settings, "eps": eps, "status": status, "attacked": attacked, "zero_gradients": blind}
        evidence.append(Evidence(f"robust_accuracy@{eps:g}", kept / len(y), low, high, n=len(y), detail=detail))
    return evidence


def quantize_to_pixels(X: ArrayLike | Tensor) -> NDArray[np.uint8]:
    """The nearest images that a file can hold: bytes 0 to 255 for values 0 to 1, of the same shape.

    Divided by 255 they are what a client would really send, so an attack that dies of this rounding was none.

    >>> quantize_to_pixels([[[[0.0, 0.5, 1.0]]]])
    array([[[[  0, 128, 255]]]], dtype=uint8)
    """
    return np.rint(check_images(X).numpy().astype(np.float64) * 255).astype(np.uint8)


def _attack(
    module: nn.Module,
    X: ArrayLike | Tensor,
    labels: ArrayLike,
    eps: float,
    steps: int,
    step_size: float | None,
    targets: ArrayLike | None,
    restarts: int,
    seed: int,
    batch_size: int,
) -> tuple[Images, NDArray[np.bool_]]:
    """The attacked images, and which examples ever showed a gradient ``(n,)``."""
    x = check_images(X)
    goal = _check_classes(labels if targets is None else targets, len(x))
    if not 0 <= eps <= 1:
        raise UsageError(f"an attack of size {eps}", expected="eps from 0 to 1, the range of a value of an image")
    if min(steps, restarts, batch_size) < 1 or (step_size is not None and not step_size > 0):
        raise UsageError(
            f"steps={steps}, restarts={restarts}, batch_size={batch_size}, step_size={step_size}",
            expected="at least 1 of each, and a positive step size (or None)",
        )
    size = 2.5 * eps / steps if step_size is None else step_size
    dice = torch.Generator().manual_seed(seed)
    images, saw = [], []
    with evaluating(module) as device, torch.enable_grad():
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            batch = _Batch(module, x[part].to(device), torch.from_numpy(goal[part]).to(device), targets is not None)
            if eps > 0:
                for _ in range(restarts):
                    batch.descend(eps, steps, size, dice)
            images.append(batch.best.cpu())
            saw.append(batch.saw_gradient.cpu())
    return torch.cat(images).numpy(), torch.cat(saw).numpy()


class _Batch:
    """The images of one batch, the best attack on each so far, and whether each ever showed a gradient."""

    def __init__(self, module: nn.Module, x: Tensor, goal: Tensor, targeted: bool) -> None:
        self.module, self.x, self.goal, self.sign = module, x, goal, -1.0 if targeted else 1.0
        self.best = x.clone()
        self.best_margin = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        self.saw_gradient = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._consider(x, self._logits(x))

    def descend(self, eps: float, steps: int, step_size: float, dice: torch.Generator) -> None:
        low, high = (self.x - eps).clamp(min=0), (self.x + eps).clamp(max=1)
        noise = torch.rand(self.x.shape, generator=dice).to(self.x.device)
        moved = low + (high - low) * noise
        for _ in range(steps):
            moved = (moved + step_size * self.sign * self._gradient(moved).sign()).clamp(low, high)
        with torch.no_grad():
            self._consider(moved, self._logits(moved))

    def _gradient(self, moved: Tensor) -> Tensor:
        moved = moved.detach().requires_grad_()
        logits = self._logits(moved)
        self._consider(moved.detach(), logits)
        spread = (logits.amax(1) - logits.amin(1)).detach()
        loss = cross_entropy(logits / (spread / MAX_RANGE).clamp(min=1)[:, None], self.goal, reduction="sum")
        if not loss.requires_grad:  # the module cuts the graph (rounding through numpy, detach): the attack is blind
            return torch.zeros_like(moved)
        (gradient,) = torch.autograd.grad(loss, moved, materialize_grads=True)
        gradient = gradient.nan_to_num(0.0)
        self.saw_gradient |= gradient.flatten(1).ne(0).any(1)
        return gradient

    def _logits(self, x: Tensor) -> Tensor:
        logits = check_logits(self.module(x), len(x))
        if int(self.goal.max()) >= logits.shape[1]:
            raise UsageError(f"class {int(self.goal.max())} to attack", expected=f"0 to {logits.shape[1] - 1}")
        return logits.double()

    def _consider(self, moved: Tensor, logits: Tensor) -> None:
        """Keep what is the furthest over the border: by the goal's logit minus the best other one."""
        logits = logits.detach()
        goal = logits.gather(1, self.goal[:, None])[:, 0]
        others = logits.scatter(1, self.goal[:, None], -torch.inf).amax(1)
        margin = self.sign * (others - goal)
        better = margin > self.best_margin
        self.best_margin = torch.where(better, margin, self.best_margin)
        self.best = torch.where(better[:, None, None, None], moved, self.best)


def check_logits(logits: Any, n: int) -> Tensor:
    """``logits`` if they are ``(n, n_classes)`` finite numbers.

    Raises:
        UsageError: the module gave something else.
        TrainingError: it gave a NaN or an infinite value.

    >>> check_logits(torch.zeros(1, 2), 1).shape
    torch.Size([1, 2])
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"a module that gives {came} for {n} images", expected="logits (n, n_classes)")
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError("the module gives NaN or infinite logits", hint="train it again with a smaller rate")
    return logits


def _check_classes(labels: ArrayLike, n: int) -> NDArray[np.int64]:
    y = check_labels(labels)
    if len(y) != n:
        raise UsageError(f"{n} images and {len(y)} labels", expected="one label an image")
    return y


def _predict(module: nn.Module, x: Tensor, batch_size: int) -> NDArray[np.int64]:
    with evaluating(module) as device, torch.no_grad():
        parts = [
            check_logits(module(part.to(device)), len(part)).argmax(1).cpu() for part in torch.split(x, batch_size)
        ]
    return torch.cat(parts).numpy()
