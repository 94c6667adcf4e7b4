"""What a figure must reach: gates over evidence, and the verdict that packaging obeys.

A gate is a number for the name of a check (``accuracy = 0.9``, ``"robust_accuracy@0.05" = 0.5``); which way it points
follows from the name. A gate never passes by absence: a check that was not made, or that proved nothing, fails it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from trilobe.errors import CheckFailed, ConfigError, NotEnoughData, UsageError
from trilobe.types import Direction, Evidence


class _Rule(NamedTuple):
    check: str
    direction: Direction
    largest: float  # figure that the check can give


RULES = {
    rule.check: rule
    for rule in (
        _Rule("accuracy", "at_least", 1.0),
        _Rule("f1", "at_least", 1.0),
        _Rule("precision", "at_least", 1.0),
        _Rule("recall", "at_least", 1.0),
        _Rule("token_accuracy", "at_least", 1.0),
        _Rule("ece", "at_most", 1.0),
        _Rule("brier", "at_most", 2.0),
        _Rule("log_loss", "at_most", 35.0),
        _Rule("parity", "at_most", 1.0),
    )
}
ROBUST = "robust_accuracy"


def parity(reference_proba: ArrayLike, exported_proba: ArrayLike) -> Evidence:
    """Largest difference between the probabilities of the trained and the exported model: 0 to 1. Lower = better.

    The figure is exact on these examples (no interval); ``detail["label_flips"]`` counts examples whose most probable
    class changed. An export that gives NaN or an infinite value counts as the largest possible difference, 1.

    Args:
        reference_proba: ``(n, n_classes)``, of the model as trained.
        exported_proba: ``(n, n_classes)``, of the same examples by the runtime that serves.

    Raises:
        UsageError: shapes that differ or are not of that form, or a reference with NaN.
        NotEnoughData: no examples.

    >>> found = parity([[0.9, 0.1], [0.4, 0.6]], [[0.9, 0.1], [0.55, 0.45]])
    >>> round(found.figure, 3), found.detail["label_flips"]
    (0.15, 1)
    """
    reference, exported = np.asarray(reference_proba, np.float64), np.asarray(exported_proba, np.float64)
    if reference.ndim != 2 or reference.shape != exported.shape:
        raise UsageError(
            f"probabilities of shapes {reference.shape} and {exported.shape}", expected="twice the same (n, n_classes)"
        )
    if reference.size == 0:
        raise NotEnoughData("there are no examples to compare the export on", expected="at least one")
    if not np.isfinite(reference).all():
        raise UsageError("reference probabilities with a NaN or an infinite value", expected="finite numbers")
    broken = int((~np.isfinite(exported)).any(axis=1).sum())
    figure = 1.0 if broken else float(np.abs(reference - exported).max())
    flips = int((reference.argmax(axis=1) != np.nan_to_num(exported, nan=-np.inf).argmax(axis=1)).sum())
    detail = {"label_flips": flips, "not_finite": broken}
    return Evidence("parity", figure, figure, figure, n=len(reference), direction="at_most", detail=detail)


def gate(evidence: Sequence[Evidence], gates: Mapping[str, float]) -> list[Evidence]:
    """The evidence in its order, each held against the gate of its name; then one failure for each gate without any.

    The figure is compared, not the end of its interval. A check that a gate names but nobody made becomes evidence
    with the worst figure, n = 0 and the status ``"not measured"``, failed; an inconclusive one (see
    :func:`~trilobe.trust.attacks.robust_accuracy`) fails too. Without a gate, ``passed`` stays None.

    Raises:
        ConfigError: a gate of an unknown name, or out of its check's range.

    >>> made = [Evidence("accuracy", 0.93, 0.9, 0.95, n=400)]
    >>> [(e.check, e.passed) for e in gate(made, {"accuracy": 0.9, "parity": 1e-4})]
    [('accuracy', True), ('parity', False)]
    """
    wanted = dict(_wanted(name, value) for name, value in gates.items())
    held = [_held(e, wanted) for e in evidence]
    made = {e.check for e in held}
    return held + [_not_measured(rule, threshold) for rule, threshold in wanted.items() if rule.check not in made]


def verdict(evidence: Sequence[Evidence]) -> bool:
    """Whether no gate failed (also where none was set).

    >>> verdict(gate([Evidence("ece", 0.2, 0.1, 0.3, n=50)], {"ece": 0.1}))
    False
    """
    return all(e.passed is not False for e in evidence)


def require(evidence: Sequence[Evidence]) -> None:
    """Raise :class:`~trilobe.errors.CheckFailed` if a gate failed: each with its figure, interval and threshold.

    >>> require(gate([Evidence("ece", 0.2, 0.1, 0.3, n=50)], {"ece": 0.1}))
    Traceback (most recent call last):
    trilobe.errors.CheckFailed: 1 of 1 gate failed: ece is 0.2 (95%: 0.1 to 0.3, n = 50), not at most 0.1 ...
    """
    failed = [in_words(e) for e in evidence if e.passed is False]
    if failed:
        gated = sum(e.passed is not None for e in evidence)
        raise CheckFailed(
            f"{len(failed)} of {gated} gate{'s' * (gated > 1)} failed: " + "; ".join(failed),
            hint="label more of what it gets wrong and train again, or change the gates under [check] in trilobe.toml",
        )


def in_words(e: Evidence) -> str:
    """One gated check as a clause.

    >>> in_words(gate([Evidence("ece", 0.2, 0.1, 0.3, n=50)], {"ece": 0.3})[0])
    'ece is 0.2 (95%: 0.1 to 0.3, n = 50), at most 0.3 as wanted'
    """
    status = str(e.detail.get("status", ""))
    bound = f"{e.direction.replace('_', ' ')} {e.threshold:.4g}" if e.threshold is not None else "no gate"
    if status == "not measured":
        return f"{e.check} was not measured, and should be {bound}"
    interval = f"95%: {e.low:.4g} to {e.high:.4g}, n = {e.n}" if e.low < e.high else f"n = {e.n}"
    figure = f"{e.check} is {e.figure:.4g} ({interval})"
    if status.startswith("inconclusive"):
        return f"{figure}, {status}"
    return f"{figure}, not {bound}" if e.passed is False else f"{figure}, {bound} as wanted"


def _held(e: Evidence, wanted: Mapping[_Rule, float]) -> Evidence:
    rule = _rule(e.check)
    if rule is None:
        return e
    threshold, passed = wanted.get(rule), None
    if threshold is not None:
        reached = e.figure >= threshold if rule.direction == "at_least" else e.figure <= threshold
        passed = bool(reached) and not str(e.detail.get("status", "")).startswith(("inconclusive", "not measured"))
    return replace(e, check=rule.check, direction=rule.direction, threshold=threshold, passed=passed)


def _not_measured(rule: _Rule, threshold: float) -> Evidence:
    worst = 0.0 if rule.direction == "at_least" else rule.largest
    detail = {"status": "not measured"}
    return Evidence(rule.check, worst, worst, worst, 0, threshold, rule.direction, passed=False, detail=detail)


def _wanted(name: str, value: float) -> tuple[_Rule, float]:
    rule = _rule(name)
    if rule is None:
        near = get_close_matches(name, [*RULES, f"{ROBUST}@0.05"], n=1)
        raise ConfigError(
            f"a gate on the unknown check {name!r}",
            expected="one of: " + ", ".join([*RULES, f"{ROBUST}@<eps>"]),
            hint=f"did you mean {near[0]!r}?" if near else "see gates under [check] in trilobe.toml",
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= rule.largest:
        raise ConfigError(
            f"the gate {name} = {value!r}",
            expected=f"a number from 0 to {rule.largest:g}",
            hint="shares are meant, not percents: 0.9 for 90%",
        )
    return rule, float(value)


def _rule(name: str) -> _Rule | None:
    """What is known of a check of that name, under its one spelling: ``robust_accuracy@0.050`` is ``...@0.05``."""
    head, _, size = name.partition("@")
    if head != ROBUST:
        return RULES.get(name)
    try:
        eps = float(size)
    except ValueError:
        return None
    return _Rule(f"{ROBUST}@{eps:g}", "at_least", 1.0) if 0 <= eps <= 1 else None
