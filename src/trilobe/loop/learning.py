"""``train`` and ``evaluate``: beliefs become a calibrated model, and the model meets the held-out part."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from trilobe.config import as_dict
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.believing import aggregate, unpack_beliefs
from trilobe.loop.choosing import control_ids
from trilobe.loop.project import Project, calibrated, digest, opened, seed_of, tell
from trilobe.rows import as_rows, flat
from trilobe.types import NO_PERSON, Belief, Evidence, Example, FloatArray, Model

if TYPE_CHECKING:
    from torch import nn

    from trilobe.algorithms.fit import Plan, Profile


ENOUGH = 30  # examples picked at random from which on they are the better estimate of accuracy


@overload
def train(project: "Project | Path | str" = ".", seed: int | None = None, profile: Literal[False] = False) -> Model: ...
@overload
def train(project: "Project | Path | str" = ".", seed: int | None = None, *, profile: Literal[True]) -> "Profile": ...
def train(project: "Project | Path | str" = ".", seed: int | None = None, profile: bool = False) -> Any:
    """Train on all beliefs, calibrate on out-of-fold predictions, and keep the model.

    Every example is first predicted by a network that did not see its answers (train.folds networks); the temperature
    is fitted on those predictions, and they are the honest estimate where there is no test part. The same answers,
    settings and seed give the same model; training that was interrupted goes on where it was. With train.workers
    several networks are trained side by side.

    Args:
        project: the project's folder.
        seed: overrides the project's.
        profile: only measure where the time goes, and what more workers would bring; nothing is kept.

    Raises:
        NotEnoughData: no answers, or all of them for one class.
        TrainingError: NaN in the loss or the weights.

    Example:
        trilobe train
        trilobe train --profile
    """
    with opened(project) as p:
        seed = p.seed if seed is None else seed
        told = aggregate(p)
        beliefs = unpack_beliefs(p.store.blobs.get(told.beliefs))
        _check_classes(p, beliefs)
        beliefs += _repeated(p, beliefs) if p.config.query.propagate else []
        settings, spec = as_dict(p.config.train), p.preprocessing()
        if profile:
            return _profiled(p, beliefs, spec, seed)
        key = digest("train", told.beliefs, len(beliefs), settings, seed, spec, p.space.names, p.config.project.task)
        if kept := p.store.recorded(f"train/{key}"):
            tell("already trained on exactly this")
            return p.store.model(kept)
        work = p.state / "work" / key[:16]
        learned = _learn(p, beliefs, spec, seed, work)
        weights = p.store.blobs.put(learned.weights)
        believed = flat(as_rows([b.proba for b in beliefs]))
        agrees = flat(learned.out_of_fold).argmax(1) == believed.argmax(1)
        model = Model(
            id=digest("model", weights, key)[:12],
            task=p.config.project.task,
            space=p.space,
            weights=weights,
            preprocessing=spec,
            network={"name": spec.get("network", p.task.architecture), "width": p.config.train.width},
            temperature=learned.temperature,
            origin={**p.origin(train=settings, beliefs=told.beliefs, n_examples=len(beliefs), n_answers=told.n_answers,
                               annotators=list(told.annotators), aggregate=told.method, **learned.settled),
                    "seed": seed},
            metrics={"out_of_fold_accuracy": float(agrees.mean())},
            created_at=time.time(),
        )  # fmt: skip
        with p.store.transaction():
            p.store.add_model(model)
            p.store.record(f"train/{key}", model.id)
            p.store.record(f"out_of_fold/{model.id}", _rows(learned, beliefs))
        shutil.rmtree(work, ignore_errors=True)
        return model


@dataclass(frozen=True)
class _Learned:
    weights: bytes
    temperature: float
    out_of_fold: FloatArray
    settled: Mapping[str, Any]  # what the settings left to be measured, and what came out


def _learn(p: Project, beliefs: list[Belief], spec: Mapping[str, Any], seed: int, work: Path) -> _Learned:
    """Networks for the out-of-fold predictions and one on everything, side by side; what is done of them is in
    ``work``."""
    from trilobe.algorithms.calibrate import fit_temperature
    from trilobe.algorithms.fit import fit_and_cross_fit
    from trilobe.algorithms.weights import to_safetensors

    X, likelihood = p.encode(examples_of(p, beliefs)), as_rows([b.likelihood for b in beliefs])
    proba, vary, settings = as_rows([b.proba for b in beliefs]), p.task.augment(p.config), p.config.train
    plan, settled = _settled(p, (X, likelihood), spec, seed, work.name)
    module, out_of_fold = fit_and_cross_fit(
        _network(p, spec, seed), X, likelihood, plan, settings.folds, vary,
        lambda step, total, loss: tell("training", step, total), work, settings.workers, settings.engine,
    )  # fmt: skip
    temperature = fit_temperature(flat(out_of_fold), flat(proba))
    return _Learned(to_safetensors(module.state_dict()), temperature, out_of_fold, settled)


def _network(p: Project, spec: Mapping[str, Any], seed: int) -> "Callable[[], nn.Module]":
    """What makes the network to be trained, always with the same first weights."""
    return lambda: p.task.network(spec, p.space, p.config.train.width, seed_of(seed, "network"))


def _settled(
    p: Project, data: tuple[FloatArray, FloatArray], spec: Mapping[str, Any], seed: int, key: str
) -> "tuple[Plan, dict[str, Any]]":
    """The plan without "auto", and what took its place: measured once, then kept, so that a crash changes nothing."""
    from trilobe.algorithms.fit import settle

    plan = plan_of(p, seed)
    if plan.settled:
        return plan, {}
    if (kept := p.store.recorded(f"settled/{key}")) is None:
        found = settle(_network(p, spec, seed)(), *data, plan, p.task.augment(p.config))
        kept = {k: getattr(found, k) for k in ("lr", "precision") if getattr(plan, k) == "auto"}
        p.store.record(f"settled/{key}", kept)
        tell(
            "measured: "
            + ", ".join(f"train.{k} = {v:.2g}" if k == "lr" else f"train.{k} = {v}" for k, v in kept.items())
        )
    return replace(plan, **kept), {"settled": kept}


def _profiled(p: Project, beliefs: list[Belief], spec: Mapping[str, Any], seed: int) -> "Profile":
    """Where the time of one worker goes, reading the examples included."""
    from trilobe.algorithms.fit import profile

    began = time.perf_counter()
    X = p.encode(examples_of(p, beliefs))
    encode_s, likelihood = time.perf_counter() - began, as_rows([b.likelihood for b in beliefs])
    networks = min(p.config.train.folds, len(beliefs)) + 1
    module, vary = _network(p, spec, seed)(), p.task.augment(p.config)
    return profile(module, X, likelihood, plan_of(p, seed), vary, networks, encode_s)


def plan_of(p: Project, seed: int) -> "Plan":
    """How this project trains, with the random numbers of ``seed``."""
    from trilobe.algorithms.fit import Plan

    apart = ("width", "folds", "augment", "workers", "engine")  # of the network, or of where and how often
    numbers = {k: v for k, v in as_dict(p.config.train).items() if k not in apart}
    return Plan(**numbers, seed=seed_of(seed, "train"))


def _repeated(p: Project, beliefs: Sequence[Belief]) -> list[Belief]:
    """What is believed of unanswered examples that repeat an answered one (``query.propagate``)."""
    from trilobe.data.duplicates import near_duplicates

    answered = examples_of(p, beliefs)
    rest = [e for e in p.store.examples("pool") if e.id not in {a.id for a in answered}]
    if not rest or p.space.scheme:
        return []
    features = [np.reshape(p.task.features(None, p.encode(part)), (len(part), -1)) for part in (rest, answered)]
    repeats = near_duplicates(features[0], p.config.query.duplicates, known=features[1])
    return [replace(beliefs[~r], example_id=rest[i].id, n_answers=0) for i, r in enumerate(repeats) if r < 0]


def examples_of(p: Project, beliefs: Sequence[Belief]) -> list[Example]:
    """The examples that beliefs are about, in their order."""
    found = {e.id: e for e in p.store.examples(ids=[b.example_id for b in beliefs])}
    return [found[b.example_id] for b in beliefs]


def _rows(learned: _Learned, beliefs: list[Belief]) -> dict[str, list[float]]:
    rows = calibrated(learned.out_of_fold, learned.temperature)
    return {b.example_id: row.round(6).tolist() for b, row in zip(beliefs, rows, strict=True)}


def _check_classes(p: Project, beliefs: list[Belief]) -> None:
    if len(beliefs) < 2:
        raise NotEnoughData(f"{len(beliefs)} answered example", expected="at least 2", hint="trilobe query")
    likely = {*flat(as_rows([b.proba for b in beliefs])).argmax(axis=-1).tolist()}
    if len(likely) == 1:
        only = p.space.names[next(iter(likely))]
        raise NotEnoughData(
            f"all {len(beliefs)} answered examples are {only!r}",
            expected="answers for at least two classes",
            hint="trilobe query --strategy random, or add other examples",
        )


def evaluate(project: "Project | Path | str" = ".", model: str = "") -> list[Evidence]:
    """Measure a model on the held-out test part, with 95% intervals.

    Without a test part the figures are estimated on out-of-fold predictions against beliefs, and say so: of the
    examples left to chance (query.control) once there are 30 of them, of all before. Those that a strategy chose are
    harder than typical ones, so that first estimate is cautious.

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
    answers = sum(a["n"] for a in model.origin["annotators"] if a["name"] not in NO_PERSON)
    point = {
        "round": max((q.round for q in p.store.questions()), default=0),
        "answers": answers, "accuracy": accuracy.figure, "figure": accuracy.check,
        "low": accuracy.low, "high": accuracy.high, "n": accuracy.n, "model": model.id, "on": accuracy.detail["on"],
    }  # fmt: skip
    p.store.record(f"curve/{answers:07d}", point)


def held_out(p: Project, model: Model, fair: bool = True) -> tuple[FloatArray, NDArray[Any], str]:
    """Predictions the model did not train for, the labels to hold them against, and what they are.

    They are those of the test part; where there is none, out-of-fold predictions against beliefs, if ``fair`` only of
    the examples that were picked at random, as soon as those are :data:`ENOUGH`.
    """
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
    chance = [id_ for id_ in control_ids(p) if id_ in kept] if fair else []
    used, of = (chance, "examples picked at random") if len(chance) >= ENOUGH else (list(kept), "no test part")
    truth = as_rows([beliefs[id_].proba.argmax(axis=-1) for id_ in used])
    return as_rows([np.array(kept[id_]) for id_ in used]), truth, f"out-of-fold predictions against beliefs ({of})"
