"""The small network: its shapes for any image, its seed, what it is made of; and how images are varied."""

import numpy as np
import pytest
import torch
from torch import nn

from trilobe.algorithms.fit import Plan, fit
from trilobe.errors import UsageError
from trilobe.tasks.image_classification.model import features, imported, network, vary


def spec(height: int, width: int, channels: int = 1) -> dict[str, int]:
    return {"height": height, "width": width, "channels": channels}


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 4, 1), (4, 64, 3), (8, 8, 1), (28, 28, 1), (31, 47, 3), (64, 64, 3)], ids=str
)
@pytest.mark.parametrize("k", [2, 11])
def test_any_image_gives_one_logit_per_class(shape: tuple[int, int, int], k: int) -> None:
    height, width, channels = shape
    net = network(spec(*shape), k, width=4).eval()
    assert net(torch.zeros(3, channels, height, width)).shape == (3, k)
    loss = net.train()(torch.rand(2, channels, height, width)).sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_first_weights_are_those_of_the_seed() -> None:
    before = torch.get_rng_state()
    a, b, c = (network(spec(8, 8), 3, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["0.weight"], c["0.weight"])
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are untouched"


def test_it_is_small_and_widens_with_width() -> None:
    sizes = [sum(p.numel() for p in network(spec(28, 28), 10, width=w).parameters()) for w in (8, 16, 32)]
    assert sizes == sorted(sizes) and sizes[1] < 200_000
    wide = network(spec(64, 64, 3), 10, width=16)
    assert max(m.out_channels for m in wide.modules() if isinstance(m, nn.Conv2d)) == 64


def test_it_is_piecewise_linear_so_that_fullgrad_is_complete() -> None:
    """Where no rectifier or maximum switches, the network is exactly its gradient times its input, plus biases."""
    net = network(spec(8, 8), 3, width=4).eval().double()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    y = net(x)[0, 0]
    (slope,) = torch.autograd.grad(y, x)
    step = 1e-7 * torch.randn_like(x)
    torch.testing.assert_close(net(x + step)[0, 0] - y, (slope * step).sum(), rtol=1e-5, atol=1e-13)
    linear = {nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Flatten, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Sequential}
    assert {type(m) for m in net.modules()} <= linear | {nn.ReLU, nn.MaxPool2d}


def test_a_network_for_fewer_than_two_classes() -> None:
    with pytest.raises(UsageError, match="a network for 1 class; expected at least 2"):
        network(spec(8, 8), 1)


def test_features_are_what_the_last_layer_sees_in_any_batches() -> None:
    net = network(spec(8, 8), 3, width=4).eval()
    x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = features(net, x)
    torch.testing.assert_close(net[-1](seen), net(x))
    for size in (1, 3, 7):
        torch.testing.assert_close(features(net, x, batch_size=size), seen)
    assert features(net, x[:0]).shape == (0, seen.shape[1]) and not seen.requires_grad
    assert not net[-1]._forward_pre_hooks, "nothing stays attached"


def test_a_hook_does_not_stay_when_the_network_fails() -> None:
    net = network(spec(8, 8), 3).eval()
    with pytest.raises(RuntimeError):
        features(net, torch.zeros(1, 2, 8, 8))
    assert not net[-1]._forward_pre_hooks


def test_variations_are_small_different_and_repeatable() -> None:
    x = torch.zeros(64, 1, 16, 16)
    x[:, :, 6:10, 6:10] = 1.0
    a, b, c = (vary(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == x.shape
    assert a.min() >= 0 and a.max() <= 1 + 1e-6
    at = torch.arange(16.0)
    mass = a.sum((1, 2, 3))
    centers = torch.stack([(a.sum((1, 3)) * at).sum(1) / mass, (a.sum((1, 2)) * at).sum(1) / mass])
    assert (centers - 7.5).abs().max() < 2.6, "moved by a tenth of the image, and a little by the turn"
    assert centers.std() > 0.5 and len({round(float(m), 3) for m in mass}) > 50, "each in its own way"
    assert (mass / 16).min() > 0.6 and (mass / 16).max() < 1.6
    assert abs(float(a.mean(0).sub(a.mean(0).flip(-1)).mean())) < 0.01


def test_variations_use_no_other_random_numbers() -> None:
    before = torch.get_rng_state()
    vary(torch.rand(2, 3, 5, 9, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constant_image_stays_constant() -> None:
    x = torch.full((5, 3, 8, 12), 0.3)
    np.testing.assert_allclose(vary(x, torch.Generator().manual_seed(0)).numpy(), 0.3, atol=1e-6)


def frozen_backbone(preprocessing: dict, n_classes: int) -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(preprocessing["channels"], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(backbone.requires_grad_(False), nn.Flatten(), nn.Linear(4, n_classes))


def no_network(preprocessing: dict, n_classes: int) -> str:
    return "a network"


def wrong_size(preprocessing: dict, n_classes: int) -> nn.Module:
    return nn.Flatten()


def test_a_network_of_ones_own() -> None:
    spec = {"channels": 1, "height": 8, "width": 8}
    where = f"{__name__}:frozen_backbone"
    net, again = imported(where, spec, 3, seed=1), imported(where, spec, 3, seed=1)
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the seed decides"
    kept = net[0][0].weight.clone()
    X = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32)
    fit(net, X, np.eye(3)[np.arange(20) % 3], Plan(steps=5, epochs=0))
    assert torch.equal(net[0][0].weight, kept), "what is frozen stays"


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("nowhere:net", "No module named 'nowhere'"),
        ("math:net", "has no attribute 'net'"),
        ("", "Empty module name"),
        (f"{__name__}:no_network", "gave a str"),
        (f"{__name__}:wrong_size", r"gives \(2, 64\) for 2 images; expected \(2, 3\)"),
    ],
)
def test_what_is_no_network(where: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        imported(where, {"channels": 1, "height": 8, "width": 8}, 3)
