"""``train`` and ``evaluate``: beliefs become a calibrated model, and the model meets the held-out part."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trilobe.config import as_dict
from trilobe.errors import NotEnoughData
from trilobe.loop.asking import aggregate, unpack_beliefs
from trilobe.loop.project import Project, digest, opened, seed_of, tell
from trilobe.types import Belief, Evidence, Example, FloatArray, Model

if TYPE_CHECKING:
    from torch import nn


def train(project: "Project | Path | str" = ".", seed: int | None = None) -> Model:
    """Train on all beliefs, calibrate on out-of-fold predictions, and keep the model.

    Every example is first predicted by a network that did not see its answers (train.folds networks); the temperature
    is fitted on those predictions, and they are the honest estimate where there is no test part. The same answers,
    settings and seed give the same model, and an interrupted training goes on where it stopped.

    Args:
        project: the project's folder.
        seed: overrides the project's.

    Raises:
        NotEnoughData: no answers, or all of them for one class.
        TrainingError: NaN in the loss or the weights.

    Example:
        trilobe train
    """
    from trilobe.algorithms.calibrate import fit_temperature
    from trilobe.algorithms.fit import Plan, cross_fit, fit
    from trilobe.algorithms.weights import to_safetensors

    with opened(project) as p:
        told = aggregate(p)
        beliefs = unpack_beliefs(p.store.blobs.get(told.beliefs))
        _check_classes(p, beliefs)
        settings = as_dict(p.config.train)
        seed = p.seed if seed is None else seed
        spec, space = p.preprocessing(), p.space
        key = digest("train", told.beliefs, settings, seed, spec, space.names, p.config.project.task)
        if kept := p.store.recorded(f"train/{key}"):
            tell("already trained on exactly this")
            return p.store.model(kept)
        X = p.encode(_examples_of(p, beliefs))
        likelihood = np.stack([b.likelihood for b in beliefs])
        proba = np.stack([b.proba for b in beliefs])
        plan = Plan(
            **{k: v for k, v in settings.items() if k not in ("width", "folds", "augment")}, seed=seed_of(seed, "train")
        )
        vary, width = p.task.augment(p.config), p.config.train.width

        def fresh() -> "nn.Module":
            return p.task.network(spec, space, width, seed_of(seed, "network"))

        fits, done = p.config.train.folds + 1, [0]

        def progress(step: int, total: int, loss: float) -> None:
            tell("training", done[0] * total + step, fits * total)
            done[0] += step == total

        out_of_fold = cross_fit(fresh, X, likelihood, plan, p.config.train.folds, vary, progress)
        module = fresh()
        fit(
            module,
            X,
            likelihood,
            plan,
            vary,
            checkpoint=p.state / "work" / f"{key[:16]}.safetensors",
            progress=progress,
        )
        weights = p.store.blobs.put(to_safetensors(module.state_dict()))
        model = Model(
            id=digest("model", weights, key)[:12],
            task=p.config.project.task,
            space=space,
            weights=weights,
            preprocessing=spec,
            network={"name": "small_convnet.v1", "width": width},
            temperature=fit_temperature(out_of_fold, proba),
            origin=p.origin(train=settings, beliefs=told.beliefs, n_examples=len(beliefs), n_answers=told.n_answers,
                            annotators=list(told.annotators), aggregate=told.method) | {"seed": seed},
            metrics={"out_of_fold_accuracy": float((out_of_fold.argmax(1) == proba.argmax(1)).mean())},
            created_at=time.time(),
        )  # fmt: skip
        with p.store.transaction():
            p.store.add_model(model)
            p.store.record(f"train/{key}", model.id)
            p.store.record(f"out_of_fold/{model.id}", _rows(model, beliefs, out_of_fold))
        return model


def _examples_of(p: Project, beliefs: list[Belief]) -> list[Example]:
    found = {e.id: e for e in p.store.examples(ids=[b.example_id for b in beliefs])}
    return [found[b.example_id] for b in beliefs]


def _rows(model: Model, beliefs: list[Belief], logits: FloatArray) -> dict[str, list[float]]:
    from trilobe.statistics import softmax

    rows = softmax(logits, model.temperature).round(6)
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
    """Measure a model on the held-out test part (where the truth is known), with 95% intervals.

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
        return found


def held_out(p: Project, model: Model) -> tuple[FloatArray, NDArray[np.intp], str]:
    """Predictions the model did not train for, the labels to hold them against, and what they are."""
    examples, labels = p.truth("test")
    if examples:
        return p.predict(model, p.encode(examples)), labels, "held-out test part"
    kept = p.store.recorded(f"out_of_fold/{model.id}")
    beliefs = {b.example_id: b for b in unpack_beliefs(p.store.blobs.get(model.origin["beliefs"]))}
    truth = np.array([int(beliefs[id_].proba.argmax()) for id_ in kept], dtype=np.intp)
    return np.array(list(kept.values())), truth, "out-of-fold predictions against beliefs (no test part)"
