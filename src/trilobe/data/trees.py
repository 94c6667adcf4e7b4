"""A tree of the classes for those who have none: alike classes under one node, so that a yes or no halves them.

Every class becomes a point; classes whose points lie close are joined first, small clusters before large ones, so that
the tree stays about as deep as a balanced one. Where the points come from is the only choice:
what a model takes for what (:func:`confusion_points`), the names (:func:`name_points`), or the features of the examples
(:func:`mean_points`). A node is named by its classes, ``cat|dog``: that is also how people write "one of these" as an
answer. Questions are made from a tree in :mod:`trilobe.data.partial`.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from trilobe.errors import UsageError
from trilobe.types import FloatArray, LabelSpace


def tree(names: Sequence[str], points: FloatArray) -> dict[str, str]:
    """A binary tree of the classes, as the ``parents`` of :class:`~trilobe.types.LabelSpace`.

    The two clusters are merged, again and again, for which the squared distance of their means times the product of
    their sizes is least. That is Ward's cost (1963) times the size of the union: where nothing tells classes apart,
    Ward's is indifferent to size, and this one halves.

    Args:
        names: the classes.
        points: ``(n_classes, n_dimensions)``, finite; close = alike.

    Returns:
        node or class -> its parent; the root is the node of all classes. Nothing for fewer than two classes.

    Raises:
        UsageError: not one finite point for each class, or a class named twice.

    >>> tree(("cat", "car", "dog"), np.array([[0.0], [9.0], [1.0]]))
    {'cat': 'cat|dog', 'dog': 'cat|dog', 'cat|dog': 'cat|car|dog', 'car': 'cat|car|dog'}
    """
    points = np.asarray(points, dtype=float)
    if points.ndim != 2 or len(points) != len(names) or not np.isfinite(points).all():
        raise UsageError(
            f"points of shape {points.shape} for {len(names)} classes", expected="(n_classes, n_dimensions), finite"
        )
    if len(names) < 2:
        return {}
    members, means, size = [[i] for i in range(len(names))], points.copy(), np.ones(len(names))
    cost = ((points[:, None] - points) ** 2).sum(axis=2)
    np.fill_diagonal(cost, np.inf)
    parents: dict[str, str] = {}
    for _ in range(len(names) - 1):
        a, b = np.unravel_index(cost.argmin(), cost.shape)  # a < b: the first of equals
        above = "|".join(names[i] for i in sorted(members[a] + members[b]))
        parents.update({"|".join(names[i] for i in members[child]): above for child in (a, b)})
        means[a] = (size[a] * means[a] + size[b] * means[b]) / (size[a] + size[b])
        members[a], size[a] = sorted(members[a] + members[b]), size[a] + size[b]
        cost[b] = cost[:, b] = np.inf
        now = np.where(np.isfinite(cost[a]), size * size[a] * ((means - means[a]) ** 2).sum(axis=1), np.inf)
        cost[a] = cost[:, a] = now
    LabelSpace(tuple(names), parents)  # says so where a class is named twice
    return parents


def confusion_points(confusion: ArrayLike) -> FloatArray:
    """Classes that a model (or people) take for one another, close together: the square roots of the rows' shares.

    Half the squared distance of two points is 1 minus the overlap of what the two classes are taken for (the
    Bhattacharyya coefficient), so it does not matter which of two classes is taken for the other.

    Args:
        confusion: ``(n_classes, n_classes)``, at least 0: counts of truth (rows) taken for a class (columns), or mean
            probabilities, ``belief.T @ proba``; before any answer, a model's ``proba.T @ proba``. A class without
            any is taken for all alike.

    Raises:
        UsageError: not a square of finite numbers of at least 0.

    >>> tree(("cat", "car", "dog"), confusion_points([[6, 0, 4], [0, 9, 1], [3, 1, 6]]))["dog"]
    'cat|dog'
    """
    counts = np.asarray(confusion, dtype=float)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not np.isfinite(counts).all() or (counts < 0).any():
        raise UsageError(f"a confusion matrix of shape {counts.shape}", expected="a square of numbers of at least 0")
    counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1.0)
    return np.asarray(np.sqrt(counts / counts.sum(axis=1, keepdims=True)))


def mean_points(features: FloatArray, belief: FloatArray) -> FloatArray:
    """The mean features of each class, each example weighed by how much it is believed to be of it.

    Args:
        features: ``(n, n_features)``.
        belief: ``(n, n_classes)``. A class that nothing is believed to be of lies in the middle.

    Raises:
        UsageError: not as many beliefs as features.

    >>> mean_points(np.array([[0.0], [2.0], [8.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0], [8.0]]
    """
    if features.ndim != 2 or belief.ndim != 2 or len(features) != len(belief) or not len(features):
        raise UsageError(
            f"features of shape {features.shape} with beliefs of shape {belief.shape}",
            expected="(n, n_features) and (n, n_classes)",
        )
    mass = belief.sum(axis=0)[:, None]
    middle = np.broadcast_to(features.mean(axis=0), (belief.shape[1], features.shape[1])).astype(float)
    return np.asarray(np.divide(belief.T @ features, mass, out=middle, where=mass > 0))


def name_points(names: Sequence[str]) -> FloatArray:
    """Names with words, or beginnings and other pieces of words, in common lie close together.

    A name is the bag of its words and of the pieces of three letters in them (``^ca``, ``cat``, ``at$``), each
    weighed by the logarithm of how rare it is; what only one name has tells nothing about likeness and is left out.
    The first word counts double: ``animal:cat``, ``animal_cat`` and ``AnimalCat`` say what a cat is.

    Returns:
        ``(n_classes, n_pieces)``, rows of length 1; zero for a name that shares nothing.

    >>> tree(("fire truck", "tom cat", "tow truck"), name_points(["fire truck", "tom cat", "tow truck"]))["tow truck"]
    'fire truck|tow truck'
    """
    bags = [_pieces(name) for name in names]
    spread = Counter(piece for bag in bags for piece in bag)
    column = {piece: i for i, piece in enumerate(p for p, n in spread.items() if n > 1)}
    points = np.zeros((len(bags), max(len(column), 1)))
    for row, bag in zip(points, bags, strict=True):
        for piece, weight in bag.items():
            if piece in column:
                row[column[piece]] = weight * np.log(1 + len(bags) / spread[piece])
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(length > 0, length, 1.0))


def _pieces(name: str) -> Counter[str]:
    words = [w.lower() for w in re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]
    bag = Counter({f" {word} ": 3.0 for word in words})
    bag.update({f" {word} ": 3.0 for word in words[:1] if len(words) > 1})
    bag.update(f"^{word}$"[i : i + 3] for word in words for i in range(len(word)))
    return bag


def check_tree(space: LabelSpace) -> None:
    """That every question about the tree of ``space`` has one meaning, and every class is found in it.

    Cycles, and nodes that no class lies under, :class:`~trilobe.types.LabelSpace` itself refuses.

    Raises:
        UsageError: a class that other classes lie under, or a class that is missing from the tree.

    >>> check_tree(LabelSpace(("cat", "dog"), {"cat": "animal"}))
    Traceback (most recent call last):
        ...
    trilobe.errors.UsageError: the label tree lacks ['dog']; expected every class in it, or no tree
      next: give each a parent in labels.parents, for instance dog = "other"
    """
    if inner := sorted(set(space.names) & set(space.parents.values())):
        raise UsageError(
            f"the label tree has {inner} both as a class and as a node above others",
            expected="classes as its leaves only",
            hint=f'rename the node, for instance "any {inner[0]}"',
        )
    if space.parents and (missing := [name for name in space.names if name not in space.parents]):
        raise UsageError(
            f"the label tree lacks {missing[:8]}",
            expected="every class in it, or no tree",
            hint=f'give each a parent in labels.parents, for instance {missing[0]} = "other"',
        )
