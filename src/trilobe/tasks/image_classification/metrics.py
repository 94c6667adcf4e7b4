"""What is measured of an image classifier."""

from typing import TYPE_CHECKING, Any

from trilobe.config import Config
from trilobe.trust.metrics import accuracy, brier, expected_calibration_error, log_loss
from trilobe.types import Evidence, FloatArray

if TYPE_CHECKING:
    from torch import nn


def measure(proba: FloatArray, labels: Any) -> list[Evidence]:
    """Accuracy (with Wilson's interval), calibration error, Brier score and log loss of ``proba`` ``(n, n_classes)``.

    >>> import numpy as np
    >>> [(e.check, round(e.figure, 2)) for e in measure(np.eye(2), np.array([0, 1]))]
    [('accuracy', 1.0), ('ece', 0.0), ('brier', 0.0), ('log_loss', 0.0)]
    """
    return [f(proba, labels) for f in (accuracy, expected_calibration_error, brier, log_loss)]


def attack(module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
    """Accuracy under attack on the first ``check.attack_examples`` examples, one figure for each ``check.eps``."""
    from trilobe.trust.attacks import robust_accuracy

    n = config.check.attack_examples
    return robust_accuracy(
        module, X[:n], labels[:n], config.check.eps, steps=config.check.attack_steps, seed=config.project.seed
    )
