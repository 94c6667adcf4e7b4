"""What is measured of an entity recognizer: whole entities first, words second."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.data.tags import tags_to_spans
from trilobe.errors import NotEnoughData, UsageError
from trilobe.rows import as_rows, flat
from trilobe.statistics import softmax
from trilobe.tasks.entity_recognition.data import best_tags, legal
from trilobe.tasks.hiding import hidden, shares
from trilobe.trust.metrics import accuracy, expected_calibration_error
from trilobe.types import Evidence, FloatArray, LabelSpace

if TYPE_CHECKING:
    from torch import nn

N_BOOT = 1000
Counts = NDArray[np.int64]


def measure(proba: FloatArray, labels: Any, space: LabelSpace) -> list[Evidence]:
    """Entity F1, precision and recall, then the share of right tags and their calibration error.

    An entity counts only with exactly its words and its label (seqeval's strict mode, micro average: 0 where nothing
    is there to find and nothing is found). Intervals of entities are percentile bootstraps over texts.

    Args:
        proba: rows ``(T_i, n_tags)``, or ``(n, T, n_tags)``.
        labels: of each text the indices of its tags, ``(T_i,)``.
        space: the tags.

    >>> space = LabelSpace(("O", "B-X", "I-X"), scheme="BIO")
    >>> figures = measure(np.eye(3)[[[0, 1, 2]]], np.array([[0, 1, 2]]), space)
    >>> [(e.check, round(e.figure, 3)) for e in figures]
    [('f1', 1.0), ('precision', 1.0), ('recall', 1.0), ('token_accuracy', 1.0), ('ece', 0.0)]
    """
    if len(proba) != len(labels):
        raise UsageError(f"{len(proba)} predictions and {len(labels)} texts", expected="as many of each")
    if not len(labels):
        raise NotEnoughData("there are no texts to measure on", expected="at least one", hint="set test examples aside")
    counts = entity_counts(proba, labels, space)
    tokens, tags = flat(proba), np.concatenate([np.asarray(row) for row in labels])
    right = accuracy(tokens, tags)
    by_token = Evidence("token_accuracy", right.figure, right.low, right.high, n=right.n, detail=right.detail)
    return [*scores(counts), by_token, expected_calibration_error(tokens, tags)]


def entity_counts(proba: FloatArray, labels: Any, space: LabelSpace) -> Counts:
    """Of each text how many entities are right, predicted and true, ``(n, 3)``.

    >>> space = LabelSpace(("O", "B-X", "I-X"), scheme="BIO")
    >>> entity_counts(np.eye(3)[[[1, 0, 1]]], [[1, 0, 0]], space).tolist()
    [[1, 2, 1]]
    """
    rule, counts = legal(space), []
    for i, (p, truth) in enumerate(zip(proba, labels, strict=True)):
        if len(p) != len(truth):
            raise UsageError(f"text {i} has {len(p)} predictions and {len(truth)} tags", expected="as many of each")
        said, true = _entities(best_tags(p, space, rule), space), _entities(truth, space)
        counts.append((len(said & true), len(said), len(true)))
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def scores(counts: Counts, seed: int = 0) -> list[Evidence]:
    """F1, precision and recall of :func:`entity_counts`, over all entities, with intervals over texts.

    >>> [(e.check, round(e.figure, 2)) for e in scores(np.array([[1, 2, 1], [1, 1, 3]]))]
    [('f1', 0.57), ('precision', 0.67), ('recall', 0.5)]
    """
    dice = np.random.default_rng(seed)
    n = len(counts)
    sums = np.stack([counts[dice.integers(0, n, n)].sum(axis=0) for _ in range(N_BOOT)])
    total, found = counts.sum(axis=0), []
    for name, f in (("f1", _f1), ("precision", _precision), ("recall", _recall)):
        figure, draws = float(f(total)), f(sums)
        low, high = np.quantile(draws, [0.025, 0.975])
        detail = {"right": int(total[0]), "predicted": int(total[1]), "entities": int(total[2])}
        found.append(Evidence(name, figure, min(float(low), figure), max(float(high), figure), n=n, detail=detail))
    return found


def attack(module: "nn.Module", X: FloatArray, labels: Any, config: Config, space: LabelSpace) -> list[Evidence]:
    """Entity F1 when a share of every text's words is hidden, the worst of several draws for each text.

    One figure for each share of ``check.eps``, named ``robust_accuracy@<share>``. Of ``check.attack_steps`` draws the
    one that makes most entities wrong counts, text by text; what a smaller share did counts for larger ones too. It
    bounds the F1 under the worst choice of words from above. It says how much rests on single words (names nobody
    has seen, typing errors, a broken font); it is no defense against somebody who writes other words in their place.
    """
    from trilobe.algorithms.fit import predict_logits

    n, found = config.check.attack_examples, list[Evidence]()
    X, labels = X[:n], labels[:n]

    def counted(inputs: FloatArray) -> Counts:
        logits = predict_logits(module, inputs)
        return entity_counts(as_rows([softmax(row) for row in logits]), labels, space)

    worst = counted(X)
    for eps in shares(config.check.eps):
        for version in hidden(X, eps, config.check.attack_steps if eps else 0, config.project.seed):
            now = counted(version)
            wrong = (now[:, 1] + now[:, 2] - 2 * now[:, 0]) - (worst[:, 1] + worst[:, 2] - 2 * worst[:, 0])
            worse = (wrong > 0) & (now[:, 0] <= worst[:, 0])  # then F1 can only fall
            worst[worse] = now[worse]
        f1 = scores(worst)[0]
        detail = {**f1.detail, "measure": "entity F1", "draws": config.check.attack_steps}
        found.append(Evidence(f"robust_accuracy@{eps:g}", f1.figure, f1.low, f1.high, n=f1.n, detail=detail))
    return found


def _entities(tags: Any, space: LabelSpace) -> set[tuple[int, int, str]]:
    names = [space.names[int(t)] for t in tags]
    return {(s.start, s.end, s.label) for s in tags_to_spans(names, [(i, i + 1) for i in range(len(names))])}


def _f1(c: Counts) -> FloatArray:
    return np.asarray(2 * c[..., 0] / np.maximum(c[..., 1] + c[..., 2], 1))


def _precision(c: Counts) -> FloatArray:
    return np.asarray(c[..., 0] / np.maximum(c[..., 1], 1))


def _recall(c: Counts) -> FloatArray:
    return np.asarray(c[..., 0] / np.maximum(c[..., 2], 1))
