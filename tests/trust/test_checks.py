"""Gates: they point the right way, compare the figure, and never pass by absence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trilobe.errors import CheckFailed, ConfigError, NotEnoughData, UsageError
from trilobe.trust.attacks import robust_accuracy
from trilobe.trust.checks import gate, in_words, parity, require, verdict
from trilobe.trust.metrics import accuracy, brier, expected_calibration_error, log_loss
from trilobe.types import Evidence


def made(check: str, figure: float, **more) -> Evidence:
    return Evidence(check, figure, figure - 0.05, figure + 0.05, n=100, **more)


def test_parity_is_the_largest_difference() -> None:
    rng = np.random.default_rng(0)
    reference = rng.dirichlet(np.ones(3), 50)
    assert parity(reference, reference).figure == 0
    exported = reference + rng.normal(0, 1e-4, reference.shape)
    found = parity(reference, exported)
    assert found.figure == abs(reference - exported).max() == found.low == found.high
    assert found.detail["label_flips"] == (reference.argmax(1) != exported.argmax(1)).sum()
    flipped = reference[:, ::-1]
    assert parity(reference, flipped).detail["label_flips"] == (reference.argmax(1) != flipped.argmax(1)).sum() > 0


def test_an_export_that_gives_nan_is_as_far_off_as_can_be() -> None:
    found = parity([[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [np.nan, 0.1]])
    assert (found.figure, found.detail["not_finite"]) == (1.0, 1)
    assert not verdict(gate([found], {"parity": 1e-4}))


@pytest.mark.parametrize(
    ("reference", "exported", "error"),
    [
        ([[0.5, 0.5]], [[0.5, 0.5]] * 2, UsageError),
        ([0.5, 0.5], [0.5, 0.5], UsageError),
        ([[np.nan, 0.5]], [[0.5, 0.5]], UsageError),
        (np.zeros((0, 2)), np.zeros((0, 2)), NotEnoughData),
    ],
)
def test_what_cannot_be_compared_is_refused(reference, exported, error) -> None:
    with pytest.raises(error):
        parity(reference, exported)


@pytest.mark.parametrize(
    ("check", "figure", "threshold", "passed"),
    [
        ("accuracy", 0.9, 0.9, True),
        ("accuracy", 0.9, 0.92, False),  # the interval reaches 0.95, the figure does not reach 0.92
        ("robust_accuracy@0.05", 0.5, 0.4, True),
        ("robust_accuracy@0.05", 0.5, 0.6, False),
        ("ece", 0.1, 0.1, True),
        ("ece", 0.1, 0.09, False),
        ("parity", 1e-6, 1e-4, True),
        ("parity", 1e-3, 1e-4, False),
        ("brier", 1.2, 1.5, True),
        ("log_loss", 3.0, 2.0, False),
        ("accuracy", float("nan"), 0.0, False),
    ],
)
def test_a_gate_points_its_checks_way(check: str, figure: float, threshold: float, passed: bool) -> None:
    [found] = gate([made(check, figure)], {check: threshold})
    assert found.passed is passed is verdict([found])
    assert found.threshold == threshold
    assert found.direction == ("at_least" if "accuracy" in check else "at_most")


def test_no_gate_no_verdict_and_foreign_evidence_passes_through() -> None:
    foreign = made("latency", 3.0)
    assert gate([made("accuracy", 0.9), foreign], {}) == [made("accuracy", 0.9), foreign]
    assert verdict([]) and verdict([foreign])
    require([foreign])


def test_every_measure_here_can_be_gated() -> None:
    proba, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    figures = [m(proba, labels) for m in (accuracy, expected_calibration_error, brier, log_loss)]
    figures += [parity(proba, proba), *robust_accuracy(net, torch.rand(2, 1, 1, 1), labels, [0.05])]
    found = gate(figures, {e.check: e.figure for e in figures})
    assert len(found) == len(figures) == 6
    assert all(e.passed for e in found)


def test_a_gate_never_passes_by_absence() -> None:
    found = gate([made("accuracy", 0.9)], {"accuracy": 0.5, "ece": 0.5, "robust_accuracy@0.1": 0.0})
    assert [(e.check, e.passed, e.n) for e in found[1:]] == [("ece", False, 0), ("robust_accuracy@0.1", False, 0)]
    assert all(
        e.detail == {"status": "not measured"} and np.isfinite([e.figure, e.low, e.high]).all() for e in found[1:]
    )
    assert not verdict(found)
    assert not verdict(gate([], {"accuracy": 0.0}))
    assert not verdict(gate(found, {"ece": 1.0}))  # judged again, it is still not measured


def test_a_gate_does_not_pass_on_what_proved_nothing() -> None:
    blind = made("robust_accuracy@0.1", 1.0, detail={"status": "inconclusive: zero gradients"})
    [found] = gate([blind], {"robust_accuracy@0.1": 0.5})
    assert found.passed is False
    with pytest.raises(CheckFailed, match="inconclusive: zero gradients"):
        require([found])


def test_one_attack_size_has_one_name() -> None:
    [found] = gate([made("robust_accuracy@0.05", 0.5)], {"robust_accuracy@0.050": 0.4})
    assert found.passed and found.check == "robust_accuracy@0.05"


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ({"acuracy": 0.9}, "'acuracy'; expected one of: accuracy, f1, .*\n.*did you mean 'accuracy'"),
        ({"robust_acc@0.05": 0.9}, "did you mean 'robust_accuracy@0.05'"),
        ({"robust_accuracy": 0.9}, "robust_accuracy@<eps>"),
        ({"robust_accuracy@high": 0.9}, "unknown check 'robust_accuracy@high'"),
        ({"robust_accuracy@8": 0.9}, "unknown check"),
        ({"zzz": 0.9}, "zzz.*\n.*trilobe.toml"),
        ({"accuracy": 90}, "accuracy = 90; expected a number from 0 to 1\n.*percents"),
        ({"ece": -0.1}, "ece = -0.1"),
        ({"ece": float("nan")}, "ece = nan"),
        ({"ece": True}, "ece = True"),
        ({"ece": "low"}, "ece = 'low'"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(gates: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        gate([], gates)


def test_what_failed_is_said_with_figure_interval_and_threshold() -> None:
    found = gate([made("accuracy", 0.8), made("ece", 0.05)], {"accuracy": 0.9, "ece": 0.1, "parity": 1e-4})
    with pytest.raises(CheckFailed) as caught:
        require(found)
    assert caught.value.exit_code == 3
    assert caught.value.problem == (
        "2 of 3 gates failed: accuracy is 0.8 (95%: 0.75 to 0.85, n = 100), not at least 0.9; "
        "parity was not measured, and should be at most 0.0001"
    )
    assert in_words(found[1]) == "ece is 0.05 (95%: 0 to 0.1, n = 100), at most 0.1 as wanted"


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["accuracy", "ece", "robust_accuracy@0.1"]))
def test_a_better_figure_never_fails_where_a_worse_one_passed(a: float, b: float, check: str) -> None:
    worse, better = (min(a, b), max(a, b)) if "accuracy" in check else (max(a, b), min(a, b))
    for threshold in (0.0, 0.3, 0.7, 1.0):
        one, other = (gate([made(check, f)], {check: threshold})[0].passed for f in (worse, better))
        assert other or not one
