"""``aggregate``: answers become beliefs, and how good each annotator is becomes known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trilobe.data.beliefs import AnswerTable, DawidSkene, log_likelihood, majority_vote, symmetric_confusion
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.project import Project, opened, tell
from trilobe.rows import as_rows, flat
from trilobe.types import GOLD, Answer, Belief, FloatArray, Model


@dataclass(frozen=True)
class Aggregated:
    """What the answers amount to: ``n`` beliefs (blob ``beliefs``), and each annotator's estimated quality."""

    n: int
    n_answers: int
    method: str
    annotators: tuple[Mapping[str, Any], ...]
    beliefs: str


def aggregate(project: "Project | Path | str" = ".", method: str = "") -> Aggregated:
    """Turn all answers on the pool into beliefs, and learn how good each annotator is.

    Args:
        project: the project's folder.
        method: for this call (training uses aggregate.method): dawid_skene (a confusion matrix for everyone), one_coin
            (an accuracy for everyone), majority_vote, or model (Dawid-Skene with the model's own out-of-fold
            predictions as the prior).

    Raises:
        NotEnoughData: no answers yet.
        AnswerError: certain answers contradict each other.

    Example:
        trilobe aggregate --method one_coin
    """
    with opened(project) as p:
        method = method or p.config.aggregate.method
        said, table = _answers(p)
        beliefs, quality = _believe(p, table, method)
        blob = p.store.blobs.put(pack_beliefs(beliefs))
        people = []
        for name, q in sorted(zip(table.annotators, quality.tolist(), strict=True)):
            mine = [a for a in said if a.annotator == name]
            people.append({"name": name, "quality": round(q, 4), "n": len(mine),
                           "seconds": float(np.median([a.seconds for a in mine]))})  # fmt: skip
        if method in ("dawid_skene", "one_coin") and len({*table.annotators} - {GOLD}) == 2:
            tell("two annotators cannot be told apart by their answers alone: ask a third, or use --method model")
        result = Aggregated(len(beliefs), len(said), method, tuple(people), blob)
        p.store.record("aggregate", vars(result))
        return result


def _answers(p: Project) -> tuple[list[Answer], AnswerTable]:
    """The current answers on the pool, and as a table."""
    pool = {e.id for e in p.store.examples("pool")}
    said = [a for a in p.store.answers() if a.example_id in pool]
    if not said:
        asked = p.store.questions(open_only=True)
        hint = "trilobe label: there are open questions" if asked else "trilobe query, then trilobe label"
        raise NotEnoughData("there are no answers yet", hint=hint)
    return said, AnswerTable.from_answers(said, p.space, lambda a: p.possible(a.response, a.example_id))


def _believe(p: Project, table: AnswerTable, method: str) -> tuple[list[Belief], FloatArray]:
    uniform = np.full(table.n_classes, 1 / table.n_classes)
    if method == "majority_vote":
        confusion = symmetric_confusion(len(table.annotators), table.n_classes, 0.8)
        for j, name in enumerate(table.annotators):
            confusion[j] = np.eye(table.n_classes) if name == GOLD else confusion[j]
        agreed = majority_vote(table)
        hit = (agreed[table.unit] * table.sets[table.response]).sum(axis=1)
        n = np.maximum(np.bincount(table.annotator, minlength=len(table.annotators)), 1)
        return table.beliefs(log_likelihood(table, confusion), uniform), np.bincount(table.annotator, hit) / n
    if method not in ("dawid_skene", "one_coin", "model"):
        raise UsageError(f"unknown method {method!r}", expected="dawid_skene, one_coin, majority_vote or model")
    engine = DawidSkene("one_coin" if method == "one_coin" else "annotator", p.config.aggregate.smoothing)
    engine.fit(table, _model_prior(p, table, p.newest_model()) if method == "model" else None)
    return table.beliefs(log_likelihood(table, engine.confusion_), engine.prior_), engine.quality()


def believed(p: Project, model: Model) -> list[Belief]:
    """What is believed of every answered example now, with the model's own opinion as the prior."""
    _, table = _answers(p)
    beliefs, _ = _believe(p, table, p.config.aggregate.method)
    prior = _model_prior(p, table, model)
    if prior is None or table.sequence:
        return beliefs
    return [replace(b, prior=row) for b, row in zip(beliefs, prior, strict=True)]


def _model_prior(p: Project, table: AnswerTable, model: Model | None) -> FloatArray | None:
    """The model's opinion on each example, never one it formed by training on that example's answers."""
    if model is None or model.space.names != p.space.names:
        return None
    X = p.encode(p.store.examples(ids=table.examples))
    order = [e.id for e in p.store.examples(ids=table.examples)]
    prior = dict(zip(order, p.predict(model, X), strict=True))
    kept = p.store.recorded(f"out_of_fold/{model.id}", {})
    prior.update({id_: np.array(row) for id_, row in kept.items() if id_ in prior})
    return np.asarray(flat(as_rows([prior[id_] for id_ in table.examples])))


def pack_beliefs(beliefs: Sequence[Belief]) -> bytes:
    """Beliefs as one safetensors blob: likelihood and prior rows, and which rows belong to which example."""
    import json

    from safetensors.numpy import save

    rows = [np.atleast_2d(b.likelihood) for b in beliefs]
    priors = [np.broadcast_to(b.prior, r.shape) for b, r in zip(beliefs, rows, strict=True)]
    starts = np.cumsum([0, *(len(r) for r in rows)])
    flat = np.array([b.likelihood.ndim == 1 for b in beliefs])
    # One key: safetensors writes several in random order, and the same beliefs must be the same bytes.
    meta = {"answers": json.dumps([[b.example_id, b.n_answers] for b in beliefs])}
    return save(
        {"likelihood": np.concatenate(rows), "prior": np.concatenate(priors).copy(), "starts": starts, "flat": flat},
        meta,
    )


def unpack_beliefs(data: bytes) -> list[Belief]:
    """The inverse of :func:`pack_beliefs`.

    >>> one = Belief("x", np.array([1.0, 0.0]), np.array([0.5, 0.5]), 1)
    >>> unpack_beliefs(pack_beliefs([one]))[0].proba.tolist()
    [1.0, 0.0]
    """
    import json

    from safetensors.numpy import load

    found = load(data)
    meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    beliefs = []
    for i, (id_, n) in enumerate(json.loads(meta["answers"])):
        lo, hi = found["starts"][i], found["starts"][i + 1]
        at = lo if found["flat"][i] else slice(lo, hi)
        beliefs.append(Belief(id_, found["likelihood"][at], found["prior"][at], n))
    return beliefs
