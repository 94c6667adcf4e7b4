"""``plan``: how many answers a goal will take, whether more will pay, and what choosing them has saved so far.

The statistics are those of :mod:`trilobe.data.curves`; here are the models they need. The curve is that of the rounds
so far, or, where answers came all at once, of networks trained on nested parts of them. What choosing saves is measured
on the control arm (see :mod:`.choosing`), with networks trained on parts of it and on as many chosen answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilobe.data.curves import Curve, Told, compare_arms, fit_curve, saving, worth
from trilobe.data.curves import plan as plan_answers
from trilobe.data.partial import measured_seconds
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.believing import unpack_beliefs
from trilobe.loop.choosing import control_ids
from trilobe.loop.learning import examples_of, plan_of
from trilobe.loop.project import Project, calibrated, digest, opened, seed_of, tell
from trilobe.rows import as_rows
from trilobe.types import Belief, FloatArray, Model

PARTS = 10  # leave-one-part-out models of each arm
LEAST = 20  # examples of the control arm from which on arms are compared


@dataclass(frozen=True)
class Planned:
    """What may be expected: answers to the ``target``, the gain of 100 more, and what choosing has brought.

    ``saved`` and ``choosing`` are None while too few examples were left to chance; ``why`` says so.
    """

    target: float
    answers: int
    points: tuple[Mapping[str, float], ...]
    needed: Told
    gain: Told
    saved: Told | None = None
    choosing: Told | None = None
    why: str = ""


def plan(
    what: Literal["labels"] = "labels",
    project: "Project | Path | str" = ".",
    target: float | None = None,
    more: int = 100,
) -> Planned:
    """Estimate how many answers a goal takes, whether more will pay, and what choosing them has saved.

    A learning curve with a limit is laid through what the rounds so far reached; every figure comes with the interval
    that the few points leave open. What choosing saves is measured on the examples that were left to chance
    (query.control), and on a held-out test part where there is one.

    Args:
        what: labels, the one thing there is to plan.
        project: the project's folder.
        target: the accuracy (or F1) to reach, 0 to 1; run.goal by default.
        more: of how many more answers the gain is estimated.

    Raises:
        NotEnoughData: no model yet, or too few answers for a curve.

    Example:
        trilobe plan labels --target 0.95
    """
    with opened(project) as p:
        target = min(p.config.run.goal, 0.999) if target is None else target
        if not 0 < target < 1:
            raise UsageError(f"target = {target}", expected="between 0 and 1")
        model = p.newest_model()
        if model is None:
            raise NotEnoughData("there is no model yet", expected="one", hint="trilobe run, or trilobe train")
        points = curve_points(p, model)
        curve, answers = _curve(points), int(points[-1]["answers"])
        seconds = {**measured_seconds(p.store.answers(), p.store.questions()), **p.config.query.seconds}
        needed = plan_answers(curve, target, answers, seconds["full"])
        gain = worth(curve, answers, more, p.config.run.worth or 0.01)
        arms = compare(p, model)
        return Planned(target, answers, tuple(points), needed, gain, arms.saved, arms.choosing, arms.why)


def curve_points(p: Project, model: Model) -> list[dict[str, float]]:
    """Scores after so many answers: of the rounds so far, or of parts of the answers where there were no rounds."""
    kept = [c for c in p.store.journal("curve/").values() if c["on"] == _newest_yardstick(p)]
    points = [{k: float(c[k]) for k in ("answers", "accuracy", "low", "high")} for c in kept]
    if len(points) >= 3 and points[-1]["answers"] >= 2 * points[0]["answers"]:
        return points
    beliefs, yard = _beliefs(p, model), _yardstick(p, [])
    if yard is None:
        raise NotEnoughData(
            f"{len(points)} measured rounds", expected="at least 3, the last with twice the answers of the first, or a "
            "held-out test part", hint="trilobe run, or trilobe add FOLDER --split test --labels folders"
        )  # fmt: skip
    order = [beliefs[i] for i in np.random.default_rng(p.seed).permutation(len(beliefs))]
    sizes = sorted({max(4, round(len(order) * share)) for share in (0.125, 0.25, 0.5, 1.0)})
    out = []
    for at, size in enumerate(sizes):
        tell("training on parts of the answers", at, len(sizes))
        proba = calibrated(_predicted(p, order[:size], yard, seed_of(p.seed, "curve")), 1.0)
        score = p.task.measure(proba, yard.labels, p.space)[0]
        out.append({"answers": float(size), "accuracy": score.figure, "low": score.low, "high": score.high})
    tell("training on parts of the answers", len(sizes), len(sizes))
    return out


def _newest_yardstick(p: Project) -> str:
    """On what the newest point of the curve was measured; older ones measured on something else do not compare."""
    points = list(p.store.journal("curve/").values())
    return str(points[-1]["on"]) if points else ""


def _curve(points: Sequence[Mapping[str, float]]) -> Curve:
    spread = [max(p["high"] - p["low"], 1e-3) / 3.92 for p in points]
    return fit_curve([p["answers"] for p in points], [p["accuracy"] for p in points], stderr=spread)


@dataclass(frozen=True)
class Arms:
    """Chosen against random answers: which teach more, and how many random ones the chosen were worth."""

    choosing: Told | None = None
    saved: Told | None = None
    why: str = ""


def compare(p: Project, model: Model) -> Arms:
    """Train on the control arm and on as many chosen answers, and hold them against the same examples; kept."""
    control = control_ids(p)
    beliefs = {b.example_id: b for b in _beliefs(p, model)}
    chance = [beliefs[id_] for id_ in control if id_ in beliefs]
    chosen = [b for id_, b in beliefs.items() if id_ not in set(control)]
    n = min(len(chance), len(chosen))
    if n < LEAST:
        return Arms(why=f"{len(chance)} answered examples were left to chance; from {LEAST} on arms are compared")
    yard = _yardstick(p, chance)
    if yard is None:
        return Arms(why="arms are compared on a held-out test part, or on 60 examples left to chance")
    chance = [b for b in chance if b.example_id not in yard.ids]
    n = min(len(chance), len(chosen))
    key = f"arms/{digest(model.id, n, len(yard.labels))[:16]}"
    if (kept := p.store.recorded(key)) is None:
        rng = np.random.default_rng(p.seed)
        spread = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:n])]
        right = {name: _left_out(p, name, arm, yard) for name, arm in (("chosen", spread), ("random", chance[:n]))}
        points = [(size, float(_right(p, chance[:size], yard, seed_of(p.seed, size)).mean()))
                  for size in sorted({max(4, n // 4), max(4, n // 2), n})]  # fmt: skip
        reached = float(_score(p, model, yard).mean())
        kept = {"right": {k: v.astype(int).tolist() for k, v in right.items()}, "points": points, "reached": reached,
                "n": len(beliefs)}  # fmt: skip
        p.store.record(key, kept)
    choosing = compare_arms(np.array(kept["right"]["chosen"], bool), np.array(kept["right"]["random"], bool))
    try:
        sizes, scores = np.array(kept["points"]).T
        curve = fit_curve(sizes, scores, n_test=len(yard.labels))
        return Arms(choosing, saving(curve, kept["reached"], kept["n"]))
    except NotEnoughData as e:
        return Arms(choosing, None, str(e))


def notice(p: Project, model: Model) -> bool:
    """Say what a user of the loop should know by now; True where more answers will not pay by ``run.worth``.

    The arms are compared whenever the control arm has doubled. Where random answers prove better, and
    ``query.switch`` allows it, the questions are random from then on.
    """
    size = len(control_ids(p))
    if size >= LEAST and size >= 2 * int(p.store.recorded("compared_at", 0)):
        p.store.record("compared_at", size)
        arms = compare(p, model)
        if arms.choosing and arms.choosing.verdict != "cannot tell yet":
            tell(arms.choosing.sentence)
        if arms.choosing and arms.choosing.verdict == "random is better here" and p.strategy != "random":
            switch = p.config.query.switch
            p.store.record("switched", switch)
            tell(
                "from now on questions are random" if switch else 'consider query.strategy = "random", or query.switch'
            )
    try:
        points = curve_points(p, model) if len(p.store.journal("curve/")) >= 4 else []
        if points and points[-1]["accuracy"] < p.config.run.goal / 2:
            return False  # a curve that has not begun to rise is flat, too
        gain = worth(_curve(points), int(points[-1]["answers"]), 100, p.config.run.worth or 0.005) if points else None
    except NotEnoughData:
        return False
    if gain and gain.verdict == "stop":
        tell(gain.sentence)
        return p.config.run.worth > 0
    return False


@dataclass(frozen=True)
class _Yardstick:
    """Examples on which both arms are scored; ``ids`` of those that no arm may train on."""

    X: FloatArray
    labels: NDArray[Any]
    ids: frozenset[str] = frozenset()


def _yardstick(p: Project, chance: Sequence[Belief]) -> _Yardstick | None:
    examples, labels = p.truth("test")
    if examples:
        return _Yardstick(p.encode(examples), labels)
    if len(chance) < 3 * LEAST:
        return None
    held = chance[::3]
    labels = as_rows([b.proba.argmax(axis=-1) for b in held])
    return _Yardstick(p.encode(examples_of(p, held)), labels, frozenset(b.example_id for b in held))


def _beliefs(p: Project, model: Model) -> list[Belief]:
    return [b for b in unpack_beliefs(p.store.blobs.get(model.origin["beliefs"])) if b.n_answers]


def _left_out(p: Project, name: str, arm: Sequence[Belief], yard: _Yardstick) -> NDArray[np.bool_]:
    """Whether each of the models that miss one part of ``arm`` is right on each example: ``(PARTS, n)``."""
    rows = []
    for part in range(PARTS):
        tell(f"comparing: {name} answers", part, PARTS)
        kept = [b for i, b in enumerate(arm) if i % PARTS != part]
        rows.append(_right(p, kept, yard, seed_of(p.seed, name, part)))
    tell(f"comparing: {name} answers", PARTS, PARTS)
    return np.stack(rows)


def _right(p: Project, beliefs: Sequence[Belief], yard: _Yardstick, seed: int) -> NDArray[np.bool_]:
    """Whether a network trained on ``beliefs`` alone is right on each example (of texts with tags: on all of it)."""
    return _agree(_predicted(p, beliefs, yard, seed), yard.labels)


def _predicted(p: Project, beliefs: Sequence[Belief], yard: _Yardstick, seed: int) -> FloatArray:
    """The logits on the yardstick of a network trained on ``beliefs`` alone."""
    from trilobe.algorithms.fit import fit, predict_logits

    module = p.task.network(p.preprocessing(), p.space, p.config.train.width, seed)
    likelihood = as_rows([b.likelihood for b in beliefs])
    fit(module, p.encode(examples_of(p, beliefs)), likelihood, plan_of(p, seed), p.task.augment(p.config))
    return predict_logits(module, yard.X)


def _score(p: Project, model: Model, yard: _Yardstick) -> NDArray[np.bool_]:
    return _agree(p.predict(model, yard.X), yard.labels)


def _agree(scores: FloatArray, labels: NDArray[Any]) -> NDArray[np.bool_]:
    pairs = zip(scores, labels, strict=True)
    return np.array([bool(np.all(row.argmax(axis=-1) == label)) for row, label in pairs])
