"""Attacks against closed forms on linear networks, and the promises around them."""

import numpy as np
import pytest
import torch
from torch import nn

from trilobe.errors import NotEnoughData, TrainingError, UsageError
from trilobe.trust.attacks import projected_gradient_descent, quantize_to_pixels, robust_accuracy


def linear(n_classes: int = 2, seed: int = 0, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, n_classes))
    with torch.no_grad():
        net[1].weight.mul_(scale)
    return net


def convolutional(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(128, 4)
    )


def images(n: int = 16, side: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(seed))


def predicted(net: nn.Module, X) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(torch.as_tensor(X)).argmax(1).numpy()


def state(net: nn.Module) -> tuple:
    return (
        [part.training for part in net.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )


def same(a: tuple, b: tuple) -> bool:
    grads = all(
        x[0] == y[0] and ((x[1] is None and y[1] is None) or torch.equal(x[1], y[1]))
        for x, y in zip(a[1], b[1], strict=True)
    )
    return a[0] == b[0] and grads and all(torch.equal(a[2][k], b[2][k]) for k in a[2])


@pytest.mark.parametrize("eps", [0.03, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_best_attack_on_a_linear_network_is_reached(eps: float, scale: float) -> None:
    """Against class y the margin falls fastest along sign(w_other - w_y), to a corner of the ball or an edge of 0..1.

    Scaled weights saturate the softmax, which must not hide the gradient.
    """
    net, X = linear(scale=scale), images()
    labels = predicted(net, X)
    w = net[1].weight.detach()
    direction = (w[1 - labels] - w[labels]).sign().reshape(X.shape)
    best = (X + eps * direction).clamp(0, 1)
    found = projected_gradient_descent(net, X, labels, eps)
    np.testing.assert_allclose(found, best.numpy(), atol=1e-6)
    broken = predicted(net, best) != labels
    [evidence] = robust_accuracy(net, X, labels, [eps])
    assert evidence.figure == pytest.approx(1 - broken.mean())
    assert evidence.detail["status"] == "measured"


@pytest.mark.parametrize("targeted", [False, True])
def test_the_attack_stays_in_the_ball_and_in_the_image(targeted: bool) -> None:
    net, X = convolutional(), images(side=4)
    X[0], X[1] = 0.0, 1.0
    labels = predicted(net, X)
    targets = (labels + 1) % 4 if targeted else None
    found = projected_gradient_descent(net, X, labels, 0.1, targets=targets, restarts=2)
    assert found.dtype == np.float32 and found.shape == tuple(X.shape)
    assert abs(found - X.numpy()).max() <= 0.1 + 1e-6
    assert found.min() >= 0 and found.max() <= 1


def test_a_targeted_attack_moves_to_its_target() -> None:
    net, X = convolutional(), images(side=4)
    labels = predicted(net, X)
    targets = (labels + 2) % 4
    found = projected_gradient_descent(net, X, labels, 0.3, targets=targets)
    with torch.no_grad():
        before, after = (net(x).softmax(1)[range(16), targets] for x in (X, torch.from_numpy(found)))
    assert (after > before).all()
    assert (predicted(net, found) == targets).mean() > 0.5


def test_robust_accuracy_starts_at_clean_and_never_rises() -> None:
    net, X = convolutional(), images(64, side=4)
    labels = predicted(net, X)
    labels[:10] = (labels[:10] + 1) % 4
    found = robust_accuracy(net, X, labels, [0.2, 0, 0.01, 0.05], steps=5)
    assert [e.check for e in found] == [f"robust_accuracy@{eps}" for eps in ("0", "0.01", "0.05", "0.2")]
    figures = [e.figure for e in found]
    assert figures[0] == found[0].detail["clean_accuracy"] == 54 / 64
    assert figures == sorted(figures, reverse=True) and figures[-1] < figures[0]
    assert [e.detail["attacked"] for e in found[1:]] == [round(f * 64) for f in figures[:-1]]
    assert all(e.low <= e.figure <= e.high and e.n == 64 and e.passed is None for e in found)


def test_more_restarts_never_help_the_network() -> None:
    net, X = convolutional(), images(64, side=4)
    labels = predicted(net, X)
    [one], [five] = (robust_accuracy(net, X, labels, [0.05], steps=3, restarts=r, batch_size=64) for r in (1, 5))
    assert five.figure <= one.figure


def test_a_network_without_gradients_is_inconclusive() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((x * 255).round() / 255)

    class Cut(Rounded):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).detach()

    X = images()
    for net in (Rounded(), Cut()):
        [found] = robust_accuracy(net, X, predicted(net, X), [0.01])
        assert found.detail["status"] == "inconclusive: zero gradients"
        assert found.detail["zero_gradients"] == 16
        assert found.passed is None


def test_the_module_is_left_as_found_even_after_an_error() -> None:
    net, X = convolutional().train(), images(side=4)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net(X).sum().backward()
    before = state(net)
    projected_gradient_descent(net, X, np.zeros(16, int), 0.1)
    robust_accuracy(net, X, np.zeros(16, int), [0.1], steps=2)
    with pytest.raises(UsageError, match="class 9"):
        projected_gradient_descent(net, X, np.full(16, 9), 0.1)
    assert same(before, state(net))


def test_the_attack_depends_on_its_seed_only_and_works_without_grad() -> None:
    net, X = convolutional(), images(side=4)
    labels = predicted(net, X)
    kept = X.clone()
    torch.manual_seed(1)
    first = projected_gradient_descent(net, X, labels, 0.05, steps=2)
    torch.manual_seed(2)
    chance = torch.get_rng_state()
    with torch.no_grad():
        second = projected_gradient_descent(net, X.numpy(), labels, 0.05, steps=2)
    assert (first == second).all()
    assert torch.equal(chance, torch.get_rng_state())
    assert (first != projected_gradient_descent(net, X, labels, 0.05, steps=2, seed=1)).any()
    assert torch.equal(X, kept) and not X.requires_grad


def test_batches_cover_every_image() -> None:
    net, X = linear(), images(7)
    labels = predicted(net, X)
    whole, parts = (projected_gradient_descent(net, X, labels, 0.1, batch_size=b) for b in (7, 3))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_pixels_are_what_a_file_can_hold() -> None:
    X = images(side=4)
    pixels = quantize_to_pixels(X)
    assert pixels.dtype == np.uint8
    assert abs(pixels / 255 - X.numpy()).max() <= 0.5 / 255 + 1e-7
    assert (quantize_to_pixels(pixels / 255) == pixels).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"X": np.zeros((2, 4, 4))}, r"shape \(2, 4, 4\)"),
        ({"X": np.full((1, 3, 2, 2), 255.0)}, "255 to 255.*\n.*divide bytes"),
        ({"X": np.full((1, 3, 2, 2), np.nan)}, "NaN"),
        ({"labels": [0, 0]}, "1 images and 2 labels"),
        ({"labels": [5]}, "class 5 .* expected 0 to 1"),
        ({"labels": [-1]}, "class -1 .* expected 0 or more"),
        ({"eps": -0.1}, "size -0.1"),
        ({"eps": float("nan")}, "size nan"),
        ({"eps": 8}, "eps from 0 to 1"),
        ({"steps": 0}, "steps=0"),
        ({"step_size": 0.0}, "step_size=0"),
    ],
)
def test_bad_input_is_refused(change: dict, says: str) -> None:
    call = {"X": np.full((1, 3, 2, 2), 0.5), "labels": [0], "eps": 0.1} | change
    with pytest.raises(UsageError, match=says):
        projected_gradient_descent(linear(), **call)


def test_other_bad_input() -> None:
    with pytest.raises(NotEnoughData, match="no images"):
        projected_gradient_descent(linear(), np.zeros((0, 3, 2, 2)), [], 0.1)
    with pytest.raises(UsageError, match="no attack sizes"):
        robust_accuracy(linear(), images(1), [0], [])
    with pytest.raises(UsageError, match=r"gives \(1, 3, 2, 2\)"):
        robust_accuracy(nn.Identity(), images(1), [0], [0.1])
    with pytest.raises(TrainingError, match="NaN"):
        robust_accuracy(linear(scale=float("nan")), images(1), [0], [0.1])
