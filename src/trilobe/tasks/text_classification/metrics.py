"""What is measured of a text classifier."""

from typing import TYPE_CHECKING, Any

import numpy as np

from trilobe.config import Config
from trilobe.statistics import wilson
from trilobe.tasks.hiding import hidden, shares
from trilobe.trust.metrics import accuracy, brier, check_labels, expected_calibration_error, log_loss
from trilobe.types import Evidence, FloatArray

if TYPE_CHECKING:
    from torch import nn


def measure(proba: FloatArray, labels: Any) -> list[Evidence]:
    """Accuracy (with Wilson's interval), calibration error, Brier score and log loss of ``proba`` ``(n, n_classes)``.

    >>> [(e.check, round(e.figure, 2)) for e in measure(np.eye(2), np.array([0, 1]))]
    [('accuracy', 1.0), ('ece', 0.0), ('brier', 0.0), ('log_loss', 0.0)]
    """
    return [f(proba, labels) for f in (accuracy, expected_calibration_error, brier, log_loss)]


def attack(module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
    """Accuracy when a share of every text's words is hidden: a text counts if no draw makes it wrong.

    One figure for each share of ``check.eps``, named ``robust_accuracy@<share>``, over ``check.attack_steps`` random
    draws; who fell at a smaller share stays so. It bounds the accuracy under the worst choice of words from above. It
    says how much rests on single words (typing errors, words nobody has seen); it is no defense against somebody who
    writes other words in their place.
    """
    from trilobe.algorithms.fit import predict_logits

    n = config.check.attack_examples
    X, y = X[:n], check_labels(labels[:n])
    right = np.asarray(predict_logits(module, X)).argmax(axis=1) == y
    found = []
    for eps in shares(config.check.eps):
        alive = np.flatnonzero(right)
        draws = config.check.attack_steps if eps and len(alive) else 0
        for version in hidden(X[alive], eps, draws, config.project.seed):
            right[alive] &= np.asarray(predict_logits(module, version)).argmax(axis=1) == y[alive]
        k = int(right.sum())
        low, high = wilson(k, len(y))
        detail = {"correct": k, "draws": config.check.attack_steps}
        found.append(Evidence(f"robust_accuracy@{eps:g}", k / len(y), low, high, n=len(y), detail=detail))
    return found
