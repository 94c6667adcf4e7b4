"""The one loss against autograd and torch; training that repeats, resumes and refuses; folds that do not leak."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trilobe.algorithms.fit import Plan, belief_loss, check_finite, cross_fit, fit, predict_logits
from trilobe.algorithms.fit.plan import optimizer_of, schedule_of
from trilobe.errors import TrainingError, UsageError
from trilobe.tasks.image_classification.model import network, vary

QUICK = Plan(steps=25, epochs=1, batch_size=4, lr=1e-2, seed=1)
SPEC = {"channels": 1, "height": 8, "width": 8}


def cases(k: int = 4, n: int = 6) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Logits and likelihoods, with zeros in some rows, a positive entry in each."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seed)
        likelihood = rng.random((n, k)) * (rng.random((n, k)) < 0.6)
        likelihood[np.arange(n), rng.integers(0, k, n)] = rng.random(n) + 0.1
        return torch.from_numpy(rng.normal(0, 3, (n, k))), torch.from_numpy(likelihood)

    return st.integers(0, 10_000).map(make)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


# ---- the loss ----


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_gradient_is_that_of_the_answers_probability(case: tuple[Tensor, Tensor]) -> None:
    """-log sum_k l_k p_k, differentiated by torch."""
    logits, likelihood = case
    logits.requires_grad_()
    direct = -torch.log((likelihood * torch.softmax(logits, -1)).sum(-1)).mean()
    torch.testing.assert_close(gradient(belief_loss(logits, likelihood), logits), gradient(direct, logits))


@settings(max_examples=20, deadline=None)
@given(cases())
def test_a_set_has_the_gradient_of_its_probability(case: tuple[Tensor, Tensor]) -> None:
    logits, likelihood = case
    logits.requires_grad_()
    possible = (likelihood > 0).double()
    direct = -torch.log((possible * torch.softmax(logits, -1)).sum(-1)).mean()
    torch.testing.assert_close(gradient(belief_loss(logits, possible), logits), gradient(direct, logits))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_a_certain_label_gives_cross_entropy(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(7, 5, generator=rng), torch.randint(5, (7,), generator=rng)
    for bootstrap in (0.0, 0.5, 1.0):
        ours = belief_loss(logits, F.one_hot(labels, 5).float(), bootstrap)
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels))


@settings(max_examples=20, deadline=None)
@given(cases())
def test_without_bootstrap_targets_are_soft(case: tuple[Tensor, Tensor]) -> None:
    logits, likelihood = case
    want = F.cross_entropy(logits, likelihood / likelihood.sum(-1, keepdim=True))
    torch.testing.assert_close(belief_loss(logits, likelihood, bootstrap=0.0), want)


@settings(max_examples=20, deadline=None)
@given(cases(), st.floats(0, 1))
def test_between_the_two_the_belief_is_the_formula(case: tuple[Tensor, Tensor], bootstrap: float) -> None:
    logits, likelihood = case
    logits.requires_grad_()
    p = torch.softmax(logits, -1)
    q = likelihood * p**bootstrap
    q = q / q.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient(belief_loss(logits, likelihood, bootstrap), logits), (p - q) / len(p))


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from([1e-30, 1e-3, 7.0, 1e30]))
def test_only_ratios_of_likelihoods_count(case: tuple[Tensor, Tensor], factor: float) -> None:
    logits, likelihood = case
    scale = torch.full((len(logits), 1), factor, dtype=torch.float64)
    scale[::2] = 1.0
    torch.testing.assert_close(belief_loss(logits, likelihood * scale), belief_loss(logits, likelihood))


@pytest.mark.parametrize("gap", [50.0, 80.0, 150.0, 1e4])
def test_a_model_sure_of_the_impossible_is_still_pulled_back(gap: float) -> None:
    """In single precision p underflows on everything the answers leave possible; the gradient must not."""
    logits = torch.tensor([[gap, 0.0, 1.0]], requires_grad=True)
    pull = gradient(belief_loss(logits, torch.tensor([[0.0, 1.0, 1.0]])), logits)
    e = float(np.e)
    torch.testing.assert_close(pull, torch.tensor([[1.0, -1 / (1 + e), -e / (1 + e)]]))


def test_masked_rows_do_not_count_whatever_is_in_them() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    likelihood = torch.ones(2, 3, 4)
    likelihood[..., 0] = 0.2
    mask = torch.tensor([[True, True, False], [True, False, False]])
    likelihood[~mask] = 0.0  # padding has no belief
    loss = belief_loss(logits, likelihood, mask=mask)
    torch.testing.assert_close(loss, belief_loss(logits[mask], likelihood[mask]))
    grad = gradient(loss, logits)
    assert torch.isfinite(grad).all() and (grad[~mask] == 0).all() and (grad[mask] != 0).all()
    nothing = belief_loss(logits, likelihood, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert float(nothing.detach()) == 0 and (gradient(nothing, logits) == 0).all()


def test_logits_that_are_not_one_per_class() -> None:
    for shape in ((2, 1), (2, 4), (3, 3), (2, 3, 1)):
        with pytest.raises(TrainingError, match=r"for beliefs of shape \(2, 3\)"):
            belief_loss(torch.zeros(shape), torch.ones(2, 3))


# ---- training ----


def images(n: int, k: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bright rows: class c lights row 2c."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    X = rng.random((n, 1, 8, 8), dtype=np.float32) * 0.3
    X[np.arange(n), 0, 2 * y] += 0.7
    return X, np.eye(k)[y], y


def net(seed: int = 0) -> nn.Module:
    return network(SPEC, 3, width=4, seed=seed)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_from_labels_sets_and_noise() -> None:
    X, certain, y = images(200)
    rng = np.random.default_rng(0)
    sets = np.maximum(certain, np.eye(3)[rng.integers(0, 3, 200)])
    noisy = np.where(np.eye(3)[np.where(rng.random(200) < 0.8, y, rng.integers(0, 3, 200))] > 0, 0.8, 0.1)
    for likelihood, least in ((certain, 0.99), (sets, 0.97), (noisy, 0.93)):
        module = linear()
        losses = fit(module, X, likelihood, Plan(steps=150, epochs=0, lr=0.1))
        assert (predict_logits(module, X).argmax(1) == y).mean() > least and not module.training
        assert len(losses) == 150 and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_it_learns_sequences_row_by_row() -> None:
    X = np.random.default_rng(0).normal(size=(40, 5, 3)).astype(np.float32)
    module = nn.Linear(3, 3)
    fit(module, X, np.eye(3)[X.argmax(-1)], Plan(steps=200, lr=0.05))
    assert (predict_logits(module, X).argmax(-1) == X.argmax(-1)).mean() > 0.95


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone() -> None:
    X, likelihood, _ = images(20)
    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        module = net()
        fit(module, X, likelihood, replace(QUICK, seed=seed), vary)
        results.append(weights(module))
        torch.rand(3) if seed == 2 else None
    assert same(results[0], results[1]) and not same(results[1], results[2])
    torch.set_rng_state(before)
    fit(net(), X, likelihood, QUICK, vary)
    assert torch.equal(torch.get_rng_state(), before)


class Stop(Exception):
    """As if somebody pulled the plug."""


def stop_at(limit: int):  # type: ignore[no-untyped-def]
    def progress(step: int, total: int, loss: float) -> None:
        if step >= limit:
            raise Stop

    return progress


@pytest.mark.parametrize("stops", [[10], [20], [10, 20]])
def test_interrupted_and_resumed_is_as_if_uninterrupted(tmp_path: Path, stops: list[int]) -> None:
    """Augmentation, dropout, the order of the batches and the schedule all go on where they were, bit for bit."""
    X, likelihood, _ = images(13)
    whole = net()
    losses = fit(whole, X, likelihood, QUICK, vary)
    file = tmp_path / "work" / "checkpoint"
    for limit in stops:
        with pytest.raises(Stop):
            fit(net(), X, likelihood, QUICK, vary, file, stop_at(limit), every=0.0)
        assert file.exists()
    resumed = net()
    rest = fit(resumed, X, likelihood, QUICK, vary, file)
    assert rest == losses[stops[-1] :]
    assert same(weights(resumed), weights(whole)) and not file.exists()


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import numpy as np
from trilobe.algorithms.fit import Plan, fit
from trilobe.tasks.image_classification.model import network, vary
X, likelihood = np.load(sys.argv[2]), np.load(sys.argv[3])
def slow(step, total, loss):
    print(step, flush=True)
    time.sleep(30)
net = network({"channels": 1, "height": 8, "width": 8}, 3, width=4)
fit(net, X, likelihood, Plan(steps=25, epochs=1, batch_size=4, lr=1e-2, seed=1), vary, Path(sys.argv[1]), slow, 0.0)
"""


def test_killed_by_the_system_and_resumed_is_as_if_uninterrupted(tmp_path: Path) -> None:
    X, likelihood, _ = images(13)
    whole = net()
    losses = fit(whole, X, likelihood, QUICK, vary)
    file = tmp_path / "checkpoint"
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "l.npy", likelihood)
    command = [sys.executable, "-c", CHILD, file, tmp_path / "X.npy", tmp_path / "l.npy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "10\n"
        child.kill()
    assert child.returncode == -9
    resumed = net()
    assert fit(resumed, X, likelihood, QUICK, vary, file) == losses[10:]
    assert same(weights(resumed), weights(whole))


def checkpoint_of(file: Path, **changes: object) -> None:
    X, likelihood, _ = images(13)
    given = {"module": net(), "X": X, "likelihood": likelihood, "plan": QUICK, "augment": vary} | changes
    with pytest.raises(Stop):
        fit(**given, checkpoint=file, progress=stop_at(10), every=0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"plan": replace(QUICK, lr=2e-2)}, "plan"),
        ({"plan": replace(QUICK, seed=9)}, "plan"),
        ({"X": images(13, seed=3)[0]}, "examples"),
        ({"likelihood": images(13, seed=3)[1]}, "examples"),
        ({"module": net(seed=5)}, "network"),
        ({"module": network(SPEC, 3, width=8)}, "network"),
        ({"augment": None}, "plan"),
    ],
    ids=["lr", "seed", "examples", "beliefs", "first weights", "another network", "augmentation"],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(
    tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    X, likelihood, _ = images(13)
    file = tmp_path / "checkpoint"
    checkpoint_of(file, **changes)
    before = file.read_bytes()
    with pytest.raises(TrainingError, match=rf"(?s)is of another {what}\b.*delete the file to begin anew"):
        fit(net(), X, likelihood, QUICK, vary, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b[:200] + b"\xff" * 50])
def test_a_damaged_checkpoint_costs_the_work_but_not_the_run(tmp_path: Path, damage: object) -> None:
    X, likelihood, _ = images(13)
    file = tmp_path / "checkpoint"
    checkpoint_of(file)
    damaged = damage(file.read_bytes())  # type: ignore[operator]
    file.write_bytes(damaged)
    assert len(fit(net(), X, likelihood, QUICK, vary, file)) == 25
    assert not file.exists() and (tmp_path / "checkpoint.damaged").read_bytes() == damaged


def test_checkpoints_are_rare_unless_asked_for(tmp_path: Path) -> None:
    X, likelihood, _ = images(13)
    file = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        fit(net(), X, likelihood, QUICK, checkpoint=file, progress=stop_at(20))
    assert not file.exists()


def test_progress_comes_up_to_the_total() -> None:
    X, likelihood, _ = images(9)
    seen: list[tuple[int, int, float]] = []
    losses = fit(net(), X, likelihood, QUICK, progress=lambda *a: seen.append(a))
    assert [s[:2] for s in seen] == [(10, 25), (20, 25), (25, 25)] and [s[2] for s in seen] == [
        losses[i] for i in (9, 19, 24)
    ]


@pytest.mark.parametrize(
    ("n", "plan", "total"),
    [(1, Plan(steps=3, epochs=0), 3), (65, Plan(steps=3, epochs=4), 12), (64, Plan(epochs=200), 400)],
)
def test_the_number_of_steps(n: int, plan: Plan, total: int) -> None:
    assert plan.total_steps(n) == total


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_any_number_of_steps_can_be_taken(steps: int) -> None:
    X, likelihood, _ = images(5)
    assert len(fit(net(), X, likelihood, Plan(steps=steps, epochs=0))) == steps


def normalized() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (5, 4), (3, 1), (1, 1)])
def test_batch_normalization_survives_a_batch_of_one(n: int, batch_size: int) -> None:
    X, likelihood, _ = images(n)
    losses = fit(normalized(), X, likelihood, Plan(steps=6, epochs=0, batch_size=batch_size))
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_every_example_is_seen_once_per_epoch() -> None:
    seen: list[float] = []

    def note(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.extend(x[:, 0].tolist())
        return x

    X = np.stack([np.arange(10), np.ones(10)], axis=1).astype(np.float32)
    fit(nn.Linear(2, 2), X, np.ones((10, 2)), Plan(steps=1, epochs=4, batch_size=5), note)
    epochs = np.array(seen).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all() and len({tuple(e) for e in epochs}) == 4


# ---- refusals ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite(value: float) -> None:
    X, likelihood, _ = images(6)
    X[2, 0, 1, 1] = value
    with pytest.raises(TrainingError, match="NaN or infinity in X"):
        fit(net(), X, likelihood, QUICK)
    X, likelihood, _ = images(6)
    likelihood[3, 1] = value
    with pytest.raises(TrainingError, match="NaN or infinity in likelihood"):
        fit(net(), X, likelihood, QUICK)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1.0, -0.1, 0.0]])
def test_beliefs_that_are_none(row: list[float]) -> None:
    X, likelihood, _ = images(6)
    likelihood[3] = row
    with pytest.raises(TrainingError, match="negative, or zero for every class"):
        fit(net(), X, likelihood, QUICK)


def test_likelihoods_too_small_for_single_precision() -> None:
    X, likelihood, _ = images(6)
    tiny, plain = net(), net()
    assert fit(tiny, X, likelihood * 1e-60, QUICK) == fit(plain, X, likelihood, QUICK)


def test_a_step_that_is_far_too_large() -> None:
    X, likelihood, _ = images(12)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(TrainingError, match=r"the loss became|NaN or infinity in the weights") as caught:
        fit(module, X * 1e6, likelihood, replace(QUICK, lr=1e30, steps=100))
    assert caught.value.hint


def test_the_image_network_with_a_step_that_is_far_too_large() -> None:
    """Either it says so, or its weights are finite; never NaN in silence."""
    X, likelihood, _ = images(12)
    for lr in (1e9, 1e20, 1e38):
        module = net()
        try:
            fit(module, X, likelihood, replace(QUICK, lr=lr))
        except TrainingError as e:
            assert "train.lr" in e.hint or "train again" in e.hint
        else:
            check_finite(module)


def test_not_as_many_beliefs_as_examples_and_none_at_all() -> None:
    X, likelihood, _ = images(6)
    with pytest.raises(UsageError, match="6 examples with 5 beliefs"):
        fit(net(), X, likelihood[:5], QUICK)
    with pytest.raises(UsageError, match="0 examples with 0 beliefs"):
        fit(net(), X[:0], likelihood[:0], QUICK)


def test_a_network_for_other_input_or_other_classes() -> None:
    X, likelihood, _ = images(6)
    for module in (nn.Linear(7, 3), nn.Conv2d(3, 3, 3), nn.Sequential(nn.Flatten(), nn.BatchNorm2d(64))):
        for use in (lambda m: fit(m, X, likelihood, QUICK), lambda m: predict_logits(m, X)):
            with pytest.raises(TrainingError, match=r"does not take an input of shape \(1, 8, 8\)"):
                use(module)
    for k in (1, 2, 4):
        with pytest.raises(TrainingError, match=rf"logits of shape \(\d, 3\) for beliefs of shape \(\d, {k}\)"):
            fit(net(), X, np.ones((6, k)), QUICK)


def test_nan_in_weights_is_found_by_name() -> None:
    module = net()
    check_finite(module)
    name = list(module.state_dict())[3]
    with torch.no_grad():
        module.state_dict()[name].view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match=f"NaN or infinity in the weights '{name}'"):
        check_finite(module)


# ---- prediction and folds ----


def test_prediction_is_the_same_in_any_batches_and_of_any_array() -> None:
    X, _, _ = images(11)
    module = net().train()
    want = predict_logits(module, X)
    assert want.shape == (11, 3) and want.dtype == np.float32 and not module.training
    np.testing.assert_allclose(predict_logits(module, X, batch_size=3), want, atol=1e-6)
    for other in (
        X.astype(np.float64),
        np.asfortranarray(X),
        X[::-1][::-1],
        np.frombuffer(X.tobytes(), np.float32).reshape(X.shape),
    ):
        np.testing.assert_allclose(predict_logits(module, other), want, atol=1e-6)
    assert predict_logits(module, X[:0]).shape == (0, 3)


def test_training_takes_arrays_that_cannot_be_written() -> None:
    X, likelihood, _ = images(6)
    for array in (X, likelihood):
        array.setflags(write=False)
    assert len(fit(net(), X, likelihood, QUICK)) == 25


def test_an_examples_own_answers_do_not_reach_its_out_of_fold_logits() -> None:
    X, likelihood, _ = images(13)
    before = cross_fit(normalized, X, likelihood, QUICK, folds=3)
    changed = likelihood.copy()
    changed[4] = np.roll(changed[4], 1)
    after = cross_fit(normalized, X, changed, QUICK, folds=3)
    untouched = (before == after).all(axis=1)
    assert untouched[4], "its own fold did not see it"
    assert 4 <= untouched.sum() <= 5, "the other folds did"
    moved = X.copy()
    moved[4] = 0
    same_fold = (cross_fit(normalized, moved, likelihood, QUICK, folds=3) == before).all(axis=1)
    assert (same_fold == (untouched & (np.arange(13) != 4))).all()


@pytest.mark.parametrize(("n", "folds"), [(2, 5), (3, 3), (7, 10)])
def test_fewer_examples_than_folds(n: int, folds: int) -> None:
    X, likelihood, _ = images(n)
    seen: list[int] = []
    out = cross_fit(linear, X, likelihood, replace(QUICK, steps=2), folds, progress=lambda s, t, loss: seen.append(s))
    assert out.shape == (n, 3) and np.isfinite(out).all()
    assert len(seen) == min(n, folds)


def test_cross_fit_needs_two() -> None:
    X, likelihood, _ = images(1)
    with pytest.raises(UsageError, match=r"1 example\(s\); expected at least 2"):
        cross_fit(net, X, likelihood, QUICK)


def test_out_of_fold_logits_of_sequences() -> None:
    X = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    assert cross_fit(lambda: nn.Linear(3, 2), X, np.ones((6, 4, 2)), Plan(steps=2), folds=2).shape == (6, 4, 2)


@pytest.mark.parametrize(
    ("hook", "momentum"), [("plain", 0.9), ("majority_vote", 0.9), ("signum", 0.0), ("ef_sign", 0.0), ("qsgd", 0.0)]
)
def test_what_a_hook_averages_the_optimizer_does_not_average_again(hook: str, momentum: float) -> None:
    plan = Plan(optimizer="sgd", hook=hook)
    optimizer = optimizer_of(plan, torch.nn.Linear(2, 2))
    assert optimizer.defaults["momentum"] == momentum
    schedule_of(plan, optimizer, 10)
    assert bool(optimizer.param_groups[0]["momentum"]) == bool(momentum)
