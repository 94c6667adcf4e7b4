"""``train`` and ``evaluate``: beliefs become a calibrated model, and the model meets the held-out part."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.config import as_dict
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.asking import aggregate, unpack_beliefs
from trilobe.loop.project import Project, digest, opened, seed_of, tell
from trilobe.statistics import softmax
from trilobe.types import GOLD, Belief, Evidence, Example, FloatArray, Model

if TYPE_CHECKING:
    from torch import nn


def train(project: "Project | Path | str" = ".", seed: int | None = None) -> Model:
    """Train on all beliefs, calibrate on out-of-fold predictions, and keep the model.

    Every example is first predicted by a network that did not see its answers (train.folds networks); the temperature
    is fitted on those predictions, and they are the honest estimate where there is no test part. The same answers,
    settings and seed give the same model; the last and longest of the trainings goes on where it was interrupted.

    Args:
        project: the project's folder.
        seed: overrides the project's.

    Raises:
        NotEnoughData: no answers, or all of them for one class.
        TrainingError: NaN in the loss or the weights.

    Example:
        trilobe train
    """
    with opened(project) as p:
        seed = p.seed if seed is None else seed
        told = aggregate(p)
        beliefs = unpack_beliefs(p.store.blobs.get(told.beliefs))
        _check_classes(p, beliefs)
        settings, spec = as_dict(p.config.train), p.preprocessing()
        key = digest("train", told.beliefs, settings, seed, spec, p.space.names, p.config.project.task)
        if kept := p.store.recorded(f"train/{key}"):
            tell("already trained on exactly this")
            return p.store.model(kept)
        learned = _learn(p, beliefs, spec, seed, p.state / "work" / f"{key[:16]}.safetensors")
        weights = p.store.blobs.put(learned.weights)
        agrees = learned.out_of_fold.argmax(1) == np.stack([b.proba for b in beliefs]).argmax(1)
        model = Model(
            id=digest("model", weights, key)[:12],
            task=p.config.project.task,
            space=p.space,
            weights=weights,
            preprocessing=spec,
            network={"name": "small_convnet.v1", "width": p.config.train.width},
            temperature=learned.temperature,
            origin={**p.origin(train=settings, beliefs=told.beliefs, n_examples=len(beliefs), n_answers=told.n_answers,
                               annotators=list(told.annotators), aggregate=told.method), "seed": seed},
            metrics={"out_of_fold_accuracy": float(agrees.mean())},
            created_at=time.time(),
        )  # fmt: skip
        with p.store.transaction():
            p.store.add_model(model)
            p.store.record(f"train/{key}", model.id)
            p.store.record(f"out_of_fold/{model.id}", _rows(learned, beliefs))
        return model


@dataclass(frozen=True)
class _Learned:
    weights: bytes
    temperature: float
    out_of_fold: FloatArray


def _learn(p: Project, beliefs: list[Belief], spec: Mapping[str, Any], seed: int, checkpoint: Path) -> _Learned:
    """Networks for the out-of-fold predictions, then the one on everything."""
    from trilobe.algorithms.calibrate import fit_temperature
    from trilobe.algorithms.fit import Plan, cross_fit, fit
    from trilobe.algorithms.weights import to_safetensors

    X = p.encode(_examples_of(p, beliefs))
    likelihood, proba = np.stack([b.likelihood for b in beliefs]), np.stack([b.proba for b in beliefs])
    train = p.config.train
    numbers = {k: v for k, v in as_dict(train).items() if k not in ("width", "folds", "augment")}
    plan, vary = Plan(**numbers, seed=seed_of(seed, "train")), p.task.augment(p.config)
    done = [0]

    def fresh() -> "nn.Module":
        return p.task.network(spec, p.space, train.width, seed_of(seed, "network"))

    def progress(step: int, total: int, loss: float) -> None:
        tell("training", done[0] * total + step, (train.folds + 1) * total)
        done[0] += step == total

    out_of_fold = cross_fit(fresh, X, likelihood, plan, train.folds, vary, progress)
    module = fresh()
    fit(module, X, likelihood, plan, vary, checkpoint, progress)
    return _Learned(to_safetensors(module.state_dict()), fit_temperature(out_of_fold, proba), out_of_fold)


def _examples_of(p: Project, beliefs: list[Belief]) -> list[Example]:
    found = {e.id: e for e in p.store.examples(ids=[b.example_id for b in beliefs])}
    return [found[b.example_id] for b in beliefs]


def _rows(learned: _Learned, beliefs: list[Belief]) -> dict[str, list[float]]:
    rows = softmax(learned.out_of_fold, learned.temperature).round(6)
    return {b.example_id: row.tolist() for b, row in zip(beliefs, rows, strict=True)}


def _check_classes(p: Project, beliefs: list[Belief]) -> None:
    if len(beliefs) < 2:
        raise NotEnoughData(f"{len(beliefs)} answered example", expected="at least 2", hint="trilobe query")
    likely = {int(b.proba.argmax(axis=-1)) for b in beliefs if b.proba.ndim == 1}
    if len(likely) == 1:
        only = p.space.names[next(iter(likely))]
        raise NotEnoughData(
            f"all {len(beliefs)} answered examples are {only!r}",
            expected="answers for at least two classes",
            hint="trilobe query --strategy random, or add other examples",
        )


def evaluate(project: "Project | Path | str" = ".", model: str = "") -> list[Evidence]:
    """Measure a model on the held-out test part, with 95% intervals.

    Without a test part the figures are estimated on out-of-fold predictions against beliefs, and say so: examples that
    a strategy chose are harder than typical ones, so the estimate is cautious.

    Args:
        project: the project's folder.
        model: its id or first letters; the newest by default.

    Example:
        trilobe evaluate --json
    """
    with opened(project) as p:
        chosen = p.store.model(model or None)
        proba, labels, on = held_out(p, chosen)
        found = [
            Evidence(
                **{f: getattr(e, f) for f in ("check", "figure", "low", "high", "n")}, detail={**e.detail, "on": on}
            )
            for e in p.task.measure(proba, labels, p.space)
        ]
        p.store.add_evidence(chosen.id, found)
        if chosen == p.newest_model():
            _keep_point(p, chosen, found[0])
        return found


def _keep_point(p: Project, model: Model, accuracy: Evidence) -> None:
    """A point of the learning curve: what so many answers of people have brought."""
    answers = sum(a["n"] for a in model.origin["annotators"] if a["name"] != GOLD)
    point = {
        "round": max((q.round for q in p.store.questions()), default=0),
        "answers": answers, "accuracy": accuracy.figure,
        "low": accuracy.low, "high": accuracy.high, "n": accuracy.n, "model": model.id, "on": accuracy.detail["on"],
    }  # fmt: skip
    p.store.record(f"curve/{answers:07d}", point)


def held_out(p: Project, model: Model) -> tuple[FloatArray, NDArray[np.intp], str]:
    """Predictions the model did not train for, the labels to hold them against, and what they are."""
    if model.space.names != p.space.names:
        raise UsageError(
            f"model {model.id} knows the classes {list(model.space.names)}",
            expected=f"those of labels.names, {list(p.space.names)}",
            hint="trilobe train, or restore labels.names",
        )
    examples, labels = p.truth("test")
    if examples:
        return p.predict(model, p.encode(examples)), labels, "held-out test part"
    kept = p.store.recorded(f"out_of_fold/{model.id}")
    beliefs = {b.example_id: b for b in unpack_beliefs(p.store.blobs.get(model.origin["beliefs"]))}
    truth = np.array([int(beliefs[id_].proba.argmax()) for id_ in kept], dtype=np.intp)
    return np.array(list(kept.values())), truth, "out-of-fold predictions against beliefs (no test part)"
