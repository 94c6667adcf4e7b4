"""What to ask next, for a whole project: candidates meet a strategy, a part is left to chance, and each pick says why.

Of every round after the first a share (``query.control``) is left to chance: the *control arm*. It is the beginning of
one random order of the pool, so examples in it are a fair sample of the pool whatever else is asked, and one the
strategy has asked already is in it at no cost. What the strategy saves is measured on it, and where no part of the data
was held out for testing, so is the model.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilobe.data.partial import Asked, choose, measured_seconds, tree_questions
from trilobe.data.query import Selection, find, select
from trilobe.data.trees import confusion_points, tree
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.believing import believed
from trilobe.loop.project import UNASKED, Project, tell
from trilobe.types import LISTED, Belief, BoolArray, Example, Finding, FloatArray, LabelSpace, Model, Question

Strategy = str | Callable[[FloatArray], FloatArray]
CONTROL = "control.v1"
COVERING = ("random", "typical", "k_center", "badge", "facility_location")  # they ask for other reasons than doubt
SURE = 0.99  # probability from which an answered example is not asked about again


@dataclass(frozen=True)
class Pick:
    """One thing to ask: of which example, about which classes (all: no ``choices``), chosen how and why."""

    example: Example
    strategy: str
    score: float
    reason: str
    choices: tuple[str, ...] = ()


def from_pool(p: Project, n: int | None, strategy: Strategy, seed: int, partial: bool) -> list[Pick]:
    """Picks among what was never asked; with ``partial`` also among what is still in doubt.

    Raises :class:`~trilobe.errors.NotEnoughData` where everything has been asked, or there is nothing.
    """
    pool, asked = p.store.examples("pool"), _asked(p)
    rest = [e for e in pool if e.id not in asked]
    model, wanted = p.newest_model(), strategy or p.strategy
    if partial and model is None:
        tell("the first questions ask for the class: a yes/no question needs a model that has an opinion")
    if partial and model is not None:
        return _partial(p, model, rest, n or p.config.query.n, seed)
    if not rest:
        raise NotEnoughData(
            "every example of the pool has been asked" if pool else "the pool is empty",
            expected="examples to ask about",
            hint="trilobe add FOLDER",
        )
    count = n or (p.config.query.n if model else p.config.query.first)
    chance: list[Pick] = []
    if model is not None and wanted != "random":
        chance = _control(p, pool, asked, count, seed)
        taken = {c.example.id for c in chance}
        rest = [e for e in rest if e.id not in taken] or rest
        count -= len(chance)
    return (_chosen(p, model, rest, wanted, count, seed) if count else []) + chance


def from_finding(p: Project, finding: Finding, n: int, strategy: Strategy, seed: int) -> list[Pick]:
    """Captures that caused a finding, made examples, and the chosen ones among them."""
    from trilobe.infrastructure.capture import read_captures

    wanted = set(finding.capture_ids)
    captures = [c for c in read_captures(p.captures, finding.endpoint) if c.id in wanted]
    asked = _asked(p)
    made: dict[str, tuple[Example, str, Any]] = {}
    for c in captures:
        item = p.task.captured(c.input)
        id_ = p.store.blobs.put(p.task.to_bytes(item))
        example = Example(id_, f"{c.endpoint}/{c.id}", "pool", f"finding:{finding.id}", {}, c.at)
        made.setdefault(id_, (example, p.task.content(item), c))
    p.store.add_examples([m[0] for m in made.values()], {id_: m[1] for id_, m in made.items()})
    known = {e.id: e for e in p.store.examples("pool", ids=list(made))}  # an example of the test part stays out
    rest = [e for id_, e in known.items() if id_ not in asked]
    if not rest:
        raise NotEnoughData(
            f"all captures of finding {finding.id} have been asked about, or are gone", hint="trilobe monitor"
        )
    model, X = p.newest_model(), p.encode(rest)
    features = p.task.features(p.module(model) if model else None, X)
    proba = np.stack([made[e.id][2].proba for e in rest])
    chosen = select(strategy or "typical", n, proba, features, p.config.query.diversity, seed)
    why = finding.kind.replace("_", " ")
    return [
        Pick(rest[i], chosen.strategy, float(score), f"{why}: {chosen.reason}")
        for i, score in zip(chosen.index, chosen.score, strict=True)
    ]


def control_ids(p: Project) -> list[str]:
    """The answered beginning of the control arm's random order: examples that are a fair sample of the pool."""
    size = int(p.store.recorded("control", 0))
    order = _random_order(p, p.store.examples("pool"))[:size]
    answered = {a.example_id for a in p.store.answers() if a.annotator != LISTED}
    return [e.id for e in order if e.id in answered]


def _asked(p: Project) -> set[str]:
    """Examples about which somebody was asked, or whose truth is known. What a list of names says settles nothing."""
    return {q.example_id for q in p.store.questions() if q.strategy != UNASKED[1]}


def _random_order(p: Project, pool: Sequence[Example]) -> list[Example]:
    """The pool in an order of ids and the seed alone, without what endpoints picked: that is no fair sample."""
    fair = [e for e in pool if not e.source.startswith(("finding:", "deferred:"))]
    return sorted(fair, key=lambda e: hashlib.sha256(f"control/{p.seed}/{e.id}".encode()).digest())


def _control(p: Project, pool: Sequence[Example], asked: set[str], n: int, seed: int) -> list[Pick]:
    """The next of the random order, for about a share ``query.control`` of ``n`` questions."""
    exact = p.config.query.control * n
    count = int(exact) + (np.random.default_rng(seed).random() < exact % 1)
    size = int(p.store.recorded("control", 0)) + count
    order = _random_order(p, pool)[:size]
    if count:
        p.store.record("control", size)
    why = "left to chance, so that what the strategy saves can be measured"
    return [Pick(e, CONTROL, 0.0, why) for e in order if e.id not in asked][:n]


def _chosen(p: Project, model: Model | None, rest: list[Example], wanted: Strategy, n: int, seed: int) -> list[Pick]:
    X = p.encode(rest)
    module = p.module(model) if model else None
    proba = p.predict(model, X, module) if model and wanted != "random" else None
    samples = p.samples(model, X, module, seed) if model and find(wanted).takes.get("samples") is not None else None
    if wanted == "random":
        chosen = select(wanted, n, None, np.zeros((len(rest), 1)), seed=seed)
    else:
        asked = _asked(p)
        before = p.store.examples("pool", ids=list(asked)) if asked else []
        known = p.task.features(module, p.encode(before)) if before else None
        query = p.config.query
        chosen = select(wanted, n, proba, p.task.features(module, X), query.diversity, seed, known, samples,
                        query.duplicates)  # fmt: skip
    return [
        Pick(rest[i], chosen.strategy, float(score), reason)
        for i, score, reason in zip(chosen.index, chosen.score, _reasons(p, chosen, proba), strict=True)
    ]


def _reasons(p: Project, chosen: Selection, proba: FloatArray | None) -> list[str]:
    """Why each was chosen: between which classes the model is torn, where that is why."""
    if proba is None or chosen.strategy.partition(".")[0] in COVERING:
        return [chosen.reason] * len(chosen.index)
    names = p.task.watched_space(p.space).names
    return [f"{chosen.reason}: {torn(row, names)}" for row in p.task.watched(proba[chosen.index], p.space)]


def torn(proba: FloatArray, names: Sequence[str]) -> str:
    """The two most probable classes, as people say it.

    >>> torn(np.array([0.1, 0.5, 0.4]), ["cat", "dog", "fox"])
    'dog (50%) or fox (40%)'
    """
    second, first = np.argsort(proba, kind="stable")[-2:]
    return f"{names[first]} ({proba[first]:.0%}) or {names[second]} ({proba[second]:.0%})"


def _partial(p: Project, model: Model, rest: list[Example], n: int, seed: int) -> list[Pick]:
    """Full and yes/no questions, about new examples and about those in doubt, by what they teach per second."""
    if p.space.scheme:
        raise UsageError("yes/no questions about entities", expected="a task whose answers are classes")
    known = {b.example_id: b for b in believed(p, model)} if p.store.answers() else {}
    certain = {q.example_id for q in p.store.questions() if q.strategy == "truth.v1"}
    doubted = [e for e in p.store.examples(ids=list(known)) if known[e.id].proba.max() < SURE and e.id not in certain]
    new = p.predict(model, p.encode(rest)) if rest else np.empty((0, len(p.space)))
    proba = np.concatenate([new, *[known[e.id].proba[None] for e in doubted]])
    left = _left(p, known) if doubted else {}
    possible = np.concatenate([np.ones(new.shape, bool), *[left[e.id][None] for e in doubted]])
    candidates = [*rest, *doubted]
    names, sets = _questions(p, proba)
    seconds = {**measured_seconds(p.store.answers(), p.store.questions()), **p.config.query.seconds}
    asked = choose(proba, sets, n, seconds, seed=seed, possible=possible) if candidates else None
    if asked is None or not len(asked.index):
        raise NotEnoughData("every example of the pool is known", hint="trilobe add FOLDER")
    return [_pick(p, candidates[i], names, proba[i], asked, at) for at, i in enumerate(asked.index)]


def _left(p: Project, known: Mapping[str, Belief]) -> dict[str, BoolArray]:
    """What may still be asked of answered examples: with several people all that is believed possible.

    A single one who is asked the same again will answer the same, so there what was answered counts as settled.
    """
    left = {id_: b.possible for id_, b in known.items()}
    if len(p.config.query.annotators) < 2:
        for a in p.store.answers(example_ids=list(known)):
            narrowed = left[a.example_id] & p.possible(a.response, a.example_id)
            left[a.example_id] = narrowed if narrowed.any() else left[a.example_id]
    return left


def _questions(p: Project, proba: FloatArray) -> tuple[list[str], BoolArray]:
    """The yes/no questions of the label tree; without one, of the tree of what the model takes for what."""
    if p.space.parents or len(p.space) < 4:
        return tree_questions(p.space)
    names = p.space.names
    return tree_questions(LabelSpace(names, tree(names, confusion_points(proba.T @ proba))))


def _pick(p: Project, e: Example, names: Sequence[str], proba: FloatArray, asked: Asked, at: int) -> Pick:
    question, rate = int(asked.question[at]), float(asked.rate[at])
    choices = () if question < 0 else tuple(names[question].split("|"))
    return Pick(e, "closing.v1", rate, f"teaches most per second: {torn(proba, p.space.names)}", choices)


def told_of(p: Project, questions: Sequence[Question]) -> list[str]:
    """How a round came about, in sentences."""
    said = [q for q in questions if q.strategy != CONTROL]
    model, pool = p.newest_model(), len(p.store.examples("pool"))
    out = [f"{len(questions)} questions of a pool of {pool} examples"]
    for strategy in dict.fromkeys(q.strategy for q in said):
        scores = [q.score for q in said if q.strategy == strategy]
        by = f" with model {model.id} (temperature {model.temperature:.2f})" if model else ", before there is a model"
        out.append(f"{len(scores)} by {strategy}{by}: scores {max(scores):.3f} to {min(scores):.3f}")
    if chance := len(questions) - len(said):
        out.append(f"{chance} left to chance: what the strategy saves is measured on them")
    seconds = {**measured_seconds(p.store.answers(), p.store.questions()), **p.config.query.seconds}
    cost = sum(seconds["partial" if q.choices else "full"] * max(1, len(q.assignees)) for q in questions)
    out.append(f"about {cost:.0f} seconds of people's time ({seconds['full']:.1f} for a class, "
               f"{seconds['partial']:.1f} for yes or no)")  # fmt: skip
    return out + [f"{q.example_id[:10]}: {asks(q)} because {q.reason}" for q in questions]


def asks(q: Question) -> str:
    """A question as people read it.

    >>> asks(Question("q", "x", ("animal",)))
    'is it animal?'
    """
    return f"is it {' or '.join(q.choices)}?" if q.choices else "what is it?"
