"""Which 40 of 1,200 digits to ask about: chosen in two rounds, beside 40 taken at random, five times each.

Any classifier with ``predict_proba`` will do; here it is scikit-learn's logistic regression.

Prints:

40 labels chosen  : ...% right (from ... to ...)
40 labels random  : ...% right (from ... to ...)
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from trilobe.data.query import select

X, y = load_digits(return_X_y=True)
X = X / 16
order = np.random.default_rng(0).permutation(len(X))
pool, test = order[:1200], order[1200:]


def learned(rows: np.ndarray) -> LogisticRegression:
    """A classifier that knows the labels of these rows only."""
    return LogisticRegression(C=3.0, max_iter=500).fit(X[rows], y[rows])


def chosen(seed: int) -> np.ndarray:
    """20 typical examples first, then 20 the model is torn about."""
    first = pool[select("typical", 20, None, X[pool], seed=seed).index]
    rest = np.setdiff1d(pool, first)
    model = learned(first)
    proba = np.zeros((len(rest), 10))
    proba[:, model.classes_] = model.predict_proba(X[rest])
    return np.concatenate([first, rest[select("margin", 20, proba, X[rest], seed=seed).index]])


def at_random(seed: int) -> np.ndarray:
    """The neutral baseline."""
    return pool[select("random", 40, None, X[pool], seed=seed).index]


for name, strategy in (("chosen", chosen), ("random", at_random)):
    right = [learned(strategy(seed)).score(X[test], y[test]) for seed in range(5)]
    print(f"40 labels {name:<8}: {np.mean(right):.1%} right (from {min(right):.1%} to {max(right):.1%})")
