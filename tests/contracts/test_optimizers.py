"""What every optimizer here promises, found by looking into its room; torch's own run through it as peers."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trilobe.algorithms import optim

Make = Callable[..., Optimizer]
OURS: dict[str, Make] = {
    name: kind
    for name, kind in inspect.getmembers(optim, inspect.isclass)
    if issubclass(kind, Optimizer) and kind.__module__.startswith(optim.__name__) and not inspect.isabstract(kind)
}
PEERS: dict[str, Make] = {
    "torch.SGD": torch.optim.SGD,
    "torch.SGD+momentum": partial(torch.optim.SGD, momentum=0.9),
    "torch.AdamW": torch.optim.AdamW,
}
STEP_IGNORES_SCALE = {"SignSGD", "Signum", "Lion"}
every = pytest.mark.parametrize("make", [*OURS.values(), *PEERS.values()], ids=[*OURS, *PEERS])
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def bowl(params: list[nn.Parameter]) -> Tensor:
    """A convex quadratic with its minimum 0 at 0 and curvatures from 1/2 to 2."""
    return torch.stack([(torch.linspace(0.5, 2, p.numel()) * p.flatten().square()).sum() / 2 for p in params]).sum()


def start(seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g)) for s in [(5,), (3, 4), (1,)]]


def descend(optimizer: Optimizer, params: list[nn.Parameter], steps: int, schedule: Any = None) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        bowl(params).backward()
        optimizer.step()
        if schedule:
            schedule.step()
    return float(bowl(params).detach())


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_room_is_not_empty() -> None:
    assert {"EFSignSGD", "Lion", "SignSGD", "Signum"} <= set(OURS) == set(optim.__all__)


@every
def test_goes_down_a_bowl(make: Make) -> None:
    params = start()
    before = float(bowl(params).detach())
    assert descend(make(params, lr=0.02), params, 100) < 0.3 * before


@every
def test_the_scale_of_the_loss_matters_or_not(make: Make) -> None:
    """Exactly not for steps of fixed size; for a gradient scale of a power of two, so that rounding is no excuse."""
    ends = []
    for scale in (1.0, 1024.0):
        params = start()
        optimizer = make(params, lr=0.01, weight_decay=0.0)
        for p in params:
            g = torch.Generator().manual_seed(p.numel())
            for _ in range(20):
                p.grad = scale * torch.randn(p.shape, generator=g)
                optimizer.step()
                p.grad = None
        ends.append(params)
    name = getattr(make, "__name__", "")
    if name in STEP_IGNORES_SCALE:
        assert equal(*ends)
    elif name != "AdamW":  # up to its epsilon
        assert not equal(*ends)


@every
def test_weight_decay_shrinks_what_gets_no_push(make: Make) -> None:
    params = start()
    optimizer = make(params, lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * b)
    for _ in range(200):
        optimizer.step()
    assert all(float(p.detach().abs().max()) < 1e-3 for p in params)


@ours
def test_weight_decay_is_decoupled(make: Make) -> None:
    """One step with decay is the shrunk weights plus the same step without: the gradient never sees it."""
    plain, decayed = start(), start()
    for params, wd in ((plain, 0.0), (decayed, 0.5)):
        optimizer = make(params, lr=0.1, weight_decay=wd)
        for p in params:
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape)
        optimizer.step()
    for p, q, x in zip(plain, decayed, start(), strict=True):
        torch.testing.assert_close(q.detach() - 0.95 * x.detach(), p.detach() - x.detach(), atol=1e-6, rtol=1e-5)


@every
def test_zero_gradients_change_nothing(make: Make) -> None:
    params = start()
    optimizer = make(params, lr=0.1, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert equal(params, start())


@every
def test_parameters_without_gradient_are_left_alone(make: Make) -> None:
    params = start()
    optimizer = make(params, lr=0.1, weight_decay=0.5)
    optimizer.step()  # none has one
    assert equal(params, start())
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    changed = [not torch.equal(p, q) for p, q in zip(params, start(), strict=True)]
    assert changed == [False, True, False]
    assert [p in optimizer.state and bool(optimizer.state[p]) for p in (params[0], params[2])] == [False, False]


@every
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(make: Make) -> None:
    params = start()
    optimizer = make(params, lr=0.01)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bowl(params)
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert [float(loss.detach())] == calls
    assert not equal(params, start())
    assert optimizer.step() is None


@every
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_goes_on_as_if_never_stopped(make: Make, way: str, tmp_path: Any) -> None:
    whole = start()
    descend(make(whole, lr=0.02, weight_decay=0.1), whole, 12)

    params = start()
    optimizer = make(params, lr=0.02, weight_decay=0.1)
    descend(optimizer, params, 5)
    if way in ("state_dict", "file"):
        state = optimizer.state_dict()
        if way == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        params = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = make(params, lr=1.0)
        optimizer.load_state_dict(state)
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        params = optimizer.param_groups[0]["params"]
    descend(optimizer, params, 7)
    assert equal(whole, params)


@every
def test_groups_have_their_own_settings_and_can_be_added_later(make: Make) -> None:
    params = start()
    optimizer = make([{"params": params[:1], "lr": 0.0}, {"params": params[1:2]}], lr=0.05, weight_decay=0.0)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((p - q).detach().abs().max()) for p, q in zip(params, start(), strict=True)]
    assert moved[0] == 0
    assert moved[2] == pytest.approx(10 * moved[1], rel=1e-4)


@every
def test_schedules_drive_it(make: Make) -> None:
    for schedule in ("one cycle", "lambda"):
        params = start()
        before = float(bowl(params).detach())
        optimizer = make(params, lr=0.02)
        if schedule == "one cycle":
            cycled = bool({"momentum", "betas"} & optimizer.defaults.keys())
            steps: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.05, total_steps=101, cycle_momentum=cycled
            )
        else:
            steps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 101)
        assert descend(optimizer, params, 100, steps) < 0.3 * before
        assert optimizer.param_groups[0]["lr"] < 1e-3


@every
def test_names_are_kept(make: Make) -> None:
    model = nn.Linear(2, 1)
    optimizer = make(model.named_parameters(), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@every
def test_frozen_weights_and_clipping_go_with_it(make: Make) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    optimizer = make(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    head = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[1].weight, head)
