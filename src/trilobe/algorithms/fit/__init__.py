"""Training a torch module from beliefs, and predicting with it.

One loss takes any belief: certain labels, soft beliefs from noisy answers, sets from partial ones, a row per token in
sequences. The module is given from outside; what it looks like is the task's business. Two methods are used where a
module has them: ``loss(x, likelihood, bootstrap)``, a loss of its own (a tagger's, over whole sequences of tags), and
``log_proba(x)``, what it predicts where that is not ``module(x)``. A loss is the mean over the tokens of a batch whose
examples are rows of unequal length (see :mod:`trilobe.rows`), over its examples otherwise. Such a batch is filled up
with zeros, its beliefs with ones.
"""

from trilobe.algorithms.fit.checkpoint import _Resumable as _Resumable
from trilobe.algorithms.fit.fitting import cross_fit, fit, fit_and_cross_fit
from trilobe.algorithms.fit.measuring import range_test, settle
from trilobe.algorithms.fit.plan import Plan
from trilobe.algorithms.fit.predicting import predict_logits, predict_samples
from trilobe.algorithms.fit.profiling import Forecast, Profile, profile
from trilobe.algorithms.fit.training import Augment, Progress, belief_loss, check_finite

__all__ = [
    "Augment",
    "Forecast",
    "Plan",
    "Profile",
    "Progress",
    "belief_loss",
    "check_finite",
    "cross_fit",
    "fit",
    "fit_and_cross_fit",
    "predict_logits",
    "predict_samples",
    "profile",
    "range_test",
    "settle",
]
