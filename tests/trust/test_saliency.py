"""Full gradients: that they add up to the logit, and that the map is the authors', written here slowly."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from trilobe.errors import NotEnoughData, TrainingError, UsageError
from trilobe.trust.saliency import colors, full_gradient, fullgrad, overlay


class Reusing(nn.Module):
    """Convolution, normalization, in-place rectifiers, both poolings, a shortcut, and one block that is used twice."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 4, 5)  # defined before it is called: order of definition is not order of calls
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.act = activation or nn.ReLU(inplace=True)
        self.largest, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.side = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.largest(self.block(x) + x)
        x = self.plain(self.mean(self.block(x)))
        self.side(x.flatten(1))  # no part of the logits
        return self.head(x.flatten(1))


def prepared(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that no term can hide behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return net.eval()


def images(n: int = 6, side: int = 8) -> Tensor:
    return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(1))


def reference_map(net: nn.Module, image: Tensor, target: int) -> np.ndarray:
    """The authors' algorithm on one image: every channel upsampled, layer after layer.

    Each output is copied as it is called, so a gradient belongs to its own call.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []

    def copy(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        outputs.append((layer, output))
        return output.clone()

    hooks = [m.register_forward_hook(copy) for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    x = image[None].clone().requires_grad_()
    logit = net(x)[0, target]
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(logit, [x, *(o for _, o in outputs)])

    def rescaled(t: Tensor) -> Tensor:
        t = t.abs()
        t = t - t.min()
        return t / (t.max() + 1e-6)

    total = rescaled(gradients[0] * x.detach()).sum(1)[0]
    for (layer, _), gradient in zip(outputs, gradients[1:], strict=True):
        bias = layer.bias.detach() if layer.bias is not None else torch.zeros(gradient.shape[1])
        if isinstance(layer, nn.BatchNorm2d):
            weight = layer.weight.detach() if layer.weight is not None else 1
            bias = bias - layer.running_mean / torch.sqrt(layer.running_var + layer.eps) * weight
        elif layer.bias is None:
            continue
        share = rescaled(gradient * bias[None, :, None, None])
        for channel in range(share.shape[1]):
            part = share[:, channel : channel + 1]
            total = total + interpolate(part, image.shape[1:], mode="bilinear", align_corners=True)[0, 0]
    total = total.detach()
    return ((total - total.min()) / (total.max() - total.min())).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_counted_adds_up_to_the_logit(seed: int) -> None:
    net, X = prepared(Reusing(), seed), images()
    parts = full_gradient(net, X)
    with torch.no_grad():
        logits = net(X)
    assert (parts.targets == logits.argmax(1).numpy()).all()
    np.testing.assert_allclose(parts.logits, logits.amax(1).numpy())
    total = parts.input_term.sum((1, 2, 3)) + sum(term.reshape(6, -1).sum(1) for _, term in parts.bias_terms)
    np.testing.assert_allclose(total, parts.logits, rtol=1e-4, atol=1e-4)
    assert parts.residual.max() < 1e-4


def test_a_layer_called_twice_counts_twice_in_the_order_of_the_calls() -> None:
    names = [name for name, _ in full_gradient(prepared(Reusing()), images()).bias_terms]
    assert names == ["norm", "block.0", "block.1", "block.0", "block.1", "plain", "head"]


def test_one_term_against_its_definition() -> None:
    """For one linear layer after one convolution, bias times gradient is known in closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    parts = full_gradient(net, images(4, side=2), targets=[0, 1, 2, 0])
    weights = net[2].weight.detach()[[0, 1, 2, 0]].reshape(4, 2, 2, 2).numpy()
    (_, convolution), (_, last) = parts.bias_terms
    np.testing.assert_allclose(convolution, weights * net[0].bias.detach().numpy()[None, :, None, None], atol=1e-6)
    np.testing.assert_allclose(last, np.eye(3)[[0, 1, 2, 0]] * net[2].bias.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_maps_are_the_authors(seed: int) -> None:
    net, X = prepared(Reusing(), seed), images()
    targets = [0, 1, 2, 3, 4, 0]
    maps, residual = fullgrad(net, X, targets, batch_size=4)
    slow = [reference_map(net, image, target) for image, target in zip(X, targets, strict=True)]
    np.testing.assert_allclose(maps, np.stack(slow), atol=1e-5)
    assert residual.shape == (6,) and residual.max() < 1e-4
    assert maps.min() == 0 and maps.max() == 1


def test_other_nonlinearities_show_in_the_residual() -> None:
    assert fullgrad(prepared(Reusing(nn.Sigmoid())), images()).residual.min() > 1e-3


def test_the_map_points_at_what_matters() -> None:
    """A network that looks at one corner only."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(0.1)
        net[3].weight[1].reshape(8, 8)[:2, :2] = 1.0
    [found], _ = fullgrad(net, torch.ones(1, 1, 8, 8), targets=[1])
    assert (found[:2, :2] == 1).all() and found[2:].max() == 0 == found[:, 2:].max()


def test_an_indifferent_network_has_an_empty_map() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(net[1].weight)
    maps, residual = fullgrad(net, images())
    assert (maps == 0).all() and residual.max() < 1e-4


def test_the_module_and_the_images_are_left_as_found() -> None:
    net, X = prepared(Reusing()).train(), images()
    net.norm.eval()
    net.stem.weight.requires_grad_(False)
    modes = [p.training for p in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kept = X.clone()
    with torch.no_grad():
        first = fullgrad(net, X)
    second = fullgrad(net, X.numpy())
    with pytest.raises(UsageError):
        fullgrad(net, X, targets=[9] * 6)
    assert (first.maps == second.maps).all() and (first.residual == second.residual).all()
    assert modes == [p.training for p in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p is not net.stem.weight) for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.equal(X, kept) and not X.requires_grad


@pytest.mark.parametrize("explain", [full_gradient, fullgrad])
def test_bad_input_is_refused(explain) -> None:
    net = prepared(Reusing())
    with pytest.raises(UsageError, match=r"shape \(3, 8, 8\)"):
        explain(net, images()[0])
    with pytest.raises(UsageError, match="6 images and 1 targets"):
        explain(net, images(), [0])
    with pytest.raises(UsageError, match="class 5 among the targets; expected 0 to 4"):
        explain(net, images(), [5] * 6)
    with pytest.raises(NotEnoughData, match="no images"):
        explain(net, images()[:0])
    with pytest.raises(UsageError, match="expected logits"):
        explain(nn.Identity(), images())
    net.head.bias.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        explain(net, images())


def test_an_overlay_is_a_picture_of_both() -> None:
    image = np.full((6, 4, 3), 100, np.uint8)
    heat = np.zeros((6, 4))
    heat[:3] = 1
    found = Image.open(io.BytesIO(overlay(image, heat, scale=2)))
    assert found.format == "PNG" and found.size == (8, 12) and found.mode == "RGB"
    pixels = np.asarray(found).astype(int)
    assert pixels[0, 0].tolist() == pytest.approx([(100 + c) / 2 for c in (252, 255, 164)], abs=1)
    assert pixels[-1, 0].tolist() == pytest.approx([(100 + c) / 2 for c in (0, 0, 4)], abs=1)
    assert overlay(image, heat) == overlay(image, heat)
    gray = np.asarray(Image.open(io.BytesIO(overlay(image[:, :, :1], heat, alpha=0.0))))
    assert (gray == 100).all()


def test_the_colors_grow_lighter_all_the_way() -> None:
    lightness = colors(np.linspace(0, 1, 64)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": np.zeros((4, 4, 3))}, "float64"),
        ({"image": np.zeros((4, 4, 2), np.uint8)}, r"\(4, 4, 2\)"),
        ({"saliency": np.full((4, 4), 2.0)}, "values 0 to 1"),
        ({"saliency": np.full((4, 4), np.nan)}, "values 0 to 1"),
        ({"saliency": np.zeros(4)}, r"shape \(4,\)"),
        ({"scale": 0}, "scale=0"),
        ({"alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_an_impossible_overlay_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        overlay(**({"image": np.zeros((4, 4, 3), np.uint8), "saliency": np.zeros((4, 4))} | change))
