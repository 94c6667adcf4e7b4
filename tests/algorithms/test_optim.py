"""The optimizers against transcriptions of their algorithms in numpy, against closed forms, and with bad input."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trilobe.algorithms import optim
from trilobe.algorithms.optim import EFSignSGD, Lion, SignSGD, Signum
from trilobe.errors import TrainingError, UsageError

SHAPES = [(), (7,), (3, 5), (2, 3, 4), (1, 1), (40,)]
Array = np.ndarray[Any, Any]
Slow = Callable[[list[Array], Callable[[list[Array]], list[Array]], int], list[Array]]


# ---------------------------------------------------------------- the algorithms, line by line from the papers


def slow_signsgd(lr: float, wd: float) -> Slow:
    def run(xs: list[Array], gradients: Callable[[list[Array]], list[Array]], steps: int) -> list[Array]:
        for _ in range(steps):
            gs = gradients(xs)
            xs = [(1 - lr * wd) * x - lr * np.sign(g) for x, g in zip(xs, gs, strict=True)]
        return xs

    return run


def slow_signum(lr: float, beta: float, wd: float) -> Slow:
    def run(xs: list[Array], gradients: Callable[[list[Array]], list[Array]], steps: int) -> list[Array]:
        ms = [np.zeros_like(x) for x in xs]
        for _ in range(steps):
            gs = gradients(xs)
            ms = [beta * m + (1 - beta) * g for m, g in zip(ms, gs, strict=True)]
            xs = [(1 - lr * wd) * x - lr * np.sign(m) for x, m in zip(xs, ms, strict=True)]
        return xs

    return run


def slow_ef(lr: float, wd: float) -> Slow:
    def run(xs: list[Array], gradients: Callable[[list[Array]], list[Array]], steps: int) -> list[Array]:
        es = [np.zeros_like(x) for x in xs]
        for _ in range(steps):
            ps = [lr * g + e for g, e in zip(gradients(xs), es, strict=True)]
            deltas = [np.abs(p).sum() / p.size * np.sign(p) for p in ps]
            xs = [(1 - lr * wd) * x - delta for x, delta in zip(xs, deltas, strict=True)]
            es = [p - delta for p, delta in zip(ps, deltas, strict=True)]
        return xs

    return run


def slow_lion(lr: float, b1: float, b2: float, wd: float) -> Slow:
    def run(xs: list[Array], gradients: Callable[[list[Array]], list[Array]], steps: int) -> list[Array]:
        ms = [np.zeros_like(x) for x in xs]
        for _ in range(steps):
            gs = gradients(xs)
            cs = [b1 * m + (1 - b1) * g for m, g in zip(ms, gs, strict=True)]
            xs = [x - lr * (np.sign(c) + wd * x) for x, c in zip(xs, cs, strict=True)]
            ms = [b2 * m + (1 - b2) * g for m, g in zip(ms, gs, strict=True)]
        return xs

    return run


CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any], Slow]] = [
    (SignSGD, {"lr": 0.03}, slow_signsgd(0.03, 0)),
    (SignSGD, {"lr": 0.03, "weight_decay": 0.4}, slow_signsgd(0.03, 0.4)),
    (Signum, {"lr": 0.03, "momentum": 0.8}, slow_signum(0.03, 0.8, 0)),
    (Signum, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.4}, slow_signum(0.03, 0.9, 0.4)),
    (EFSignSGD, {"lr": 0.05}, slow_ef(0.05, 0)),
    (EFSignSGD, {"lr": 0.05, "weight_decay": 0.4}, slow_ef(0.05, 0.4)),
    (Lion, {"lr": 0.03}, slow_lion(0.03, 0.9, 0.99, 0)),
    (Lion, {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.4}, slow_lion(0.03, 0.8, 0.95, 0.4)),
]


def quadratics(seed: int) -> tuple[list[Array], list[Array]]:
    """Curvatures and starting points of one quadratic 1/2 sum a x^2 for each shape."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1, 2, s) for s in SHAPES], [rng.normal(size=s) for s in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], a: list[Array], steps: int) -> None:
    curvatures = [torch.as_tensor(c, dtype=p.dtype) for c, p in zip(a, params, strict=True)]
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([(c * p.square()).sum() / 2 for c, p in zip(curvatures, params, strict=True)]).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(("kind", "options", "slow"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_each_is_its_algorithm(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], slow: Slow, foreach: bool | None
) -> None:
    for seed in range(3):
        a, start = quadratics(seed)
        params = [nn.Parameter(torch.tensor(x)) for x in start]
        train(kind(params, **options, foreach=foreach), params, a, 50)
        wanted = slow(start, lambda xs, a=a: [c * x for c, x in zip(a, xs, strict=True)], 50)
        for p, x in zip(params, wanted, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [c[:2] for c in CASES], ids=lambda v: getattr(v, "__name__", ""))
def test_at_once_is_one_by_one_is_in_chunks(
    kind: type[torch.optim.Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim, "_CACHED", 30)  # the shapes hold 1, 7, 15, 24, 1 and 40 entries
    a, start = quadratics(9)
    ends = []
    for foreach in (True, False, None):
        params = [nn.Parameter(torch.tensor(x, dtype=dtype)) for x in start]
        train(kind(params, **options, foreach=foreach), params, a, 30)
        ends.append(params)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(*ends, strict=True))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=15), st.sampled_from([0, 1, 10, 30, float("inf")]))
def test_chunks_hold_everything_once_in_order(sizes: list[int], limit: float) -> None:
    tensors = [torch.zeros(n) for n in sizes]
    chunks = [params for params, _ in optim._Batch({}, [], tensors, tensors).chunks(limit)]
    assert [id(p) for chunk in chunks for p in chunk] == [id(p) for p in tensors]
    assert all(chunk for chunk in chunks)
    assert all(len(chunk) == 1 or sum(p.numel() for p in chunk) <= limit for chunk in chunks)


# ---------------------------------------------------------------- relations that must hold exactly


def same_path(one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> bool:
    """Whether both, each with one parameter of the same value, walk the same way down the same bowl."""
    (p,), (q,) = one.param_groups[0]["params"], two.param_groups[0]["params"]
    a = [np.linspace(0.2, 2, p.numel())]
    for _ in range(40):
        train(one, [p], a, 1)
        train(two, [q], a, 1)
    return torch.equal(p, q)


def twins() -> Iterator[nn.Parameter]:
    start = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    while True:
        yield nn.Parameter(start.clone())


def test_signum_without_momentum_is_signsgd() -> None:
    p = twins()
    assert same_path(Signum([next(p)], lr=0.02, momentum=0), SignSGD([next(p)], lr=0.02))
    assert not same_path(Signum([next(p)], lr=0.02, momentum=0.9), SignSGD([next(p)], lr=0.02))


def test_lion_with_equal_betas_is_signum() -> None:
    p = twins()
    assert same_path(Lion([next(p)], lr=0.02, betas=(0.9, 0.9)), Signum([next(p)], lr=0.02, momentum=0.9))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=12),
    st.floats(1e-4, 1.0),
)
def test_error_feedback_loses_nothing(gradients: list[list[float]], lr: float) -> None:
    """x - e is where SGD would be with the same gradients, whatever they are; no step is lost, only delayed."""
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = EFSignSGD([x], lr=lr)
    for g in gradients:
        x.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    sgd = -lr * np.sum(gradients, axis=0)
    scale = lr * np.abs(gradients).sum() + 1e-12
    np.testing.assert_allclose((x.detach() - optimizer.state[x]["error"]).numpy(), sgd, atol=1e-12 * scale, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30).filter(any))
def test_error_feedback_keeps_a_share(p: list[float]) -> None:
    """The assumption of its theorem: ||p - delta||^2 <= (1 - q) ||p||^2, q = ||p||_1^2 / (d ||p||_2^2)."""
    x = nn.Parameter(torch.zeros(len(p), dtype=torch.float64))
    optimizer = EFSignSGD([x], lr=1.0)
    x.grad = torch.tensor(p, dtype=torch.float64)
    optimizer.step()
    left, norm = float(optimizer.state[x]["error"].square().sum()), float(np.square(p).sum())
    q = np.abs(p).sum() ** 2 / (len(p) * norm) if norm else 1.0
    assert left <= (1 - q) * norm * (1 + 1e-9) + 1e-9 * norm
    assert q >= 1 / len(p) * (1 - 1e-9) or not norm


def test_error_feedback_converges_where_signs_alone_do_not() -> None:
    """Karimireddy et al. 2019, section 3: every sample's gradient has the signs of +-(1, -1), so SignSGD can only
    move along that line, and the optimum lies off it."""
    rows = torch.tensor([[1.5, -0.5], [-0.5, 1.5]], dtype=torch.float64)
    ends = {}
    for kind in (SignSGD, EFSignSGD):
        x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        optimizer = kind([x], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k / 50) ** 0.5)
        order = torch.randint(0, 2, (1500,), generator=torch.Generator().manual_seed(0))
        for i in order:
            optimizer.zero_grad()
            (rows[i] @ x).square().div(2).backward()
            optimizer.step()
            schedule.step()
        ends[kind] = x.detach()
    assert abs(float(ends[SignSGD].sum()) - 2) < 1e-9, "it left the line"
    assert float(ends[EFSignSGD].abs().max()) < 1e-2


def test_zero_gradients_do_not_move_a_weight() -> None:
    for kind in (SignSGD, Signum, EFSignSGD, Lion):
        x = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = kind([x], lr=0.5)
        x.grad = torch.tensor([0.0, -0.0])
        optimizer.step()
        assert x.tolist() == [1.0, 2.0]


# ---------------------------------------------------------------- bad input, odd input

KINDS = [SignSGD, Signum, EFSignSGD, Lion]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_is_named_and_changes_nothing(
    kind: type[torch.optim.Optimizer], bad: float, foreach: bool
) -> None:
    model = two_layers()
    optimizer = kind(model.named_parameters(), lr=0.1, weight_decay=0.1, foreach=foreach)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    model[1].weight.grad[0, 2] = bad
    with pytest.raises(TrainingError, match=r"NaN or infinity in 1 of the 4 gradients of '1\.weight'"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_bad_gradient_without_names_is_counted_over_groups() -> None:
    model = two_layers()
    optimizer = Signum([{"params": m.parameters()} for m in model], lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    model[1].bias.grad.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"parameter 3 of shape \(1,\) \(pass named_parameters\(\)"):
        optimizer.step()


def test_the_check_can_be_switched_off() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = SignSGD([x], lr=0.5, check_finite=False)
    x.grad = torch.tensor([float("inf"), -1.0])
    optimizer.step()
    assert x.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_huge_finite_gradients_are_no_error(dtype: torch.dtype) -> None:
    """Their norm overflows, they do not."""
    x = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = SignSGD([x], lr=0.5)
    x.grad = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    optimizer.step()
    assert x.tolist() == [0.5] * 64


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = kind(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"parameter 0 of shape \(5, 2\).*sparse"):
        optimizer.step()


def test_complex_parameters_are_refused() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SignSGD([x])
    x.grad = torch.ones_like(x)
    with pytest.raises(UsageError, match="complex"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SignSGD, {"lr": -1.0}),
        (SignSGD, {"lr": float("nan")}),
        (EFSignSGD, {"lr": float("inf")}),
        (Signum, {"weight_decay": -0.1}),
        (Signum, {"momentum": 1.0}),
        (Signum, {"momentum": -0.1}),
        (Lion, {"betas": (0.9, 1.0)}),
        (Lion, {"lr": torch.tensor(0.1)}),
    ],
)
def test_settings_out_of_range(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    x = nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match="expected"):
        kind([x], **options)
    with pytest.raises(UsageError, match="expected"):
        kind([{"params": [x], **options}])


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_types_empty_tensors_and_layouts_in_one_group(kind: type[torch.optim.Optimizer]) -> None:
    params = [
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(0)),
        nn.Parameter(torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.ones(6, 2).t()),
        nn.Parameter(torch.ones(3)),
    ]
    for foreach in (True, False):
        optimizer = kind(params, lr=0.25, foreach=foreach)
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, b in zip(params, before, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.25, rtol=0, atol=1e-6 if p.dtype != torch.bfloat16 else 1e-2)


def test_gradients_of_another_type_than_their_parameter() -> None:
    for kind in KINDS:
        x = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        if not hasattr(x, "grad_dtype"):
            pytest.skip("this torch keeps gradients in the type of their parameter")
        x.grad_dtype = torch.float32
        x.grad = torch.tensor([1.0, -1.0])
        kind([x], lr=0.5).step()
        assert x.tolist() == [0.5, 1.5]


def test_the_state_of_another_model_or_method_is_refused() -> None:
    def state(kind: type[torch.optim.Optimizer], n: int) -> dict[str, Any]:
        x = nn.Parameter(torch.ones(n))
        optimizer = kind([x])
        x.grad = torch.ones(n)
        optimizer.step()
        return optimizer.state_dict()

    target = Signum([nn.Parameter(torch.ones(3))])
    with pytest.raises(UsageError, match=r"(?s)momentum_buffer of parameter 0 has shape \(4,\).*another model"):
        target.load_state_dict(state(Signum, 4))
    with pytest.raises(UsageError, match="no momentum"):
        target.load_state_dict(state(SignSGD, 3))
    assert not target.state
    target.load_state_dict(state(Signum, 3))
    assert len(target.state) == 1


def test_two_lines_train_a_network() -> None:
    """Each separates two noisy half-planes; a method that does nothing, or walks uphill, does not."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) > 0.3).float()[:, None]
    rates = {SignSGD: 0.01, Signum: 0.01, EFSignSGD: 0.3, Lion: 0.01}
    for kind, lr in rates.items():
        model = two_layers()
        optimizer = kind(model.named_parameters(), lr=lr)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            loss.backward()
            return loss

        for _ in range(300):
            optimizer.step(closure)
        right = ((model(x) > 0) == (y > 0.5)).float().mean()
        assert right > 0.97, (kind, right)
