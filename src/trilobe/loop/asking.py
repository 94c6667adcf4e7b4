"""``query``, ``label`` and ``aggregate``: questions go out, answers come in and become beliefs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trilobe.data.beliefs import AnswerTable, DawidSkene, log_likelihood, majority_vote, symmetric_confusion
from trilobe.data.query import Selection, select
from trilobe.errors import NotEnoughData, UsageError
from trilobe.loop.project import Project, annotators, digest, opened, positive, seed_of, tell
from trilobe.loop.tables import make_answer, take_answers
from trilobe.loop.terminal import AtTheTerminal
from trilobe.types import GOLD, Belief, Example, Finding, FloatArray, Question, Response

Answerer = Callable[[Question, Example, str], tuple[Response, float] | None]
"""Somebody who answers: (question, example, annotator) -> (response, seconds), or None to stop."""


@dataclass(frozen=True)
class Labeled:
    """What came in: ``new`` answers, ``known`` ones that were there already, ``superseded`` ones, rows ``refused``."""

    new: int
    known: int = 0
    superseded: int = 0
    refused: Mapping[str, str] | None = None
    open: int = 0


@dataclass(frozen=True)
class Aggregated:
    """What the answers amount to: ``n`` beliefs (blob ``beliefs``), and each annotator's estimated quality."""

    n: int
    n_answers: int
    method: str
    annotators: tuple[Mapping[str, Any], ...]
    beliefs: str


def query(
    project: "Project | Path | str" = ".",
    n: int | None = None,
    strategy: str | Callable[[FloatArray], FloatArray] = "",
    finding: str = "",
    answers: int | None = None,
    seed: int | None = None,
) -> list[Question]:
    """Choose what to ask next. While questions are open, those are returned and nothing new is asked.

    Without a model the first questions are examples typical of the pool; then the strategy chooses by the model's
    predictions, spread over unlike examples. With a finding, the captures that caused it become the questions, and
    those annotators are asked who have proved best.

    Args:
        project: the project's folder.
        n: how many; query.first or query.n by default. More than there is asks everything.
        strategy: margin, entropy, least_confidence, typical, random, or your own score function.
        finding: the id of a finding (or its first letters, or "newest").
        answers: how many people are asked each question; query.answers by default.
        seed: overrides the project's.

    Raises:
        NotEnoughData: the pool is empty, or everything in it has been asked.

    Example:
        trilobe query -n 30 --strategy entropy
        trilobe query --finding newest -n 60
    """
    positive(n=n, answers=answers)
    with opened(project) as p:
        if waiting := [q for q in p.store.questions(open_only=True) if q.strategy != "truth.v1"]:
            tell(f"{len(waiting)} questions are still open; answer them first (trilobe label)")
            return waiting
        round_ = 1 + max((q.round for q in p.store.questions()), default=0)
        seed = seed_of(p.seed if seed is None else seed, "query", round_)
        each = answers or p.config.query.answers
        if finding:
            found = p.finding(finding)
            candidates, chosen = _from_finding(p, found, n or p.config.query.n, strategy, seed)
            people = tuple(a["name"] for a in annotators(p) if a["name"] != GOLD)[:each]
        else:
            candidates, chosen = _from_pool(p, n, strategy, seed)
            people = ()
        if each > (n_people := len(people or p.config.query.annotators) or 1):
            tell(f"each question is asked of {n_people}, not of {each}: name the people in query.annotators")
        questions = []
        for at, score in zip(chosen.index, chosen.score, strict=True):
            id_ = digest("question", candidates[at].id, round_)[:16]
            who = people or _assign(p, id_, each)
            questions.append(
                Question(
                    id_, candidates[at].id, (), chosen.strategy, float(score), chosen.reason, round_, who, time.time()
                )
            )
        p.store.add_questions(questions)
        return questions


def _from_pool(
    p: Project, n: int | None, strategy: str | Callable[[FloatArray], FloatArray], seed: int
) -> tuple[list[Example], Selection]:
    asked = {q.example_id for q in p.store.questions()}
    pool = p.store.examples("pool")
    rest = [e for e in pool if e.id not in asked]
    if not rest:
        raise NotEnoughData(
            "every example of the pool has been asked" if pool else "the pool is empty",
            expected="examples to ask about",
            hint="trilobe add FOLDER",
        )
    model, wanted = p.newest_model(), strategy or p.config.query.strategy
    X = p.encode(rest)
    module = p.module(model) if model else None
    proba = p.predict(model, X, module) if model else None
    features = None if wanted == "random" else p.task.features(module, X)
    count = n or (p.config.query.n if model else p.config.query.first)
    chosen = select(wanted, count, proba if wanted != "random" else None, features if features is not None else X,
                    p.config.query.diversity, seed)  # fmt: skip
    return rest, chosen


def _from_finding(
    p: Project, finding: Finding, n: int, strategy: str | Callable[[FloatArray], FloatArray], seed: int
) -> tuple[list[Example], Selection]:
    """Captures that caused a finding, made examples, and the chosen ones among them."""
    from trilobe.infrastructure.capture import read_captures

    wanted = set(finding.capture_ids)
    captures = [c for c in read_captures(p.captures, finding.endpoint) if c.id in wanted]
    asked = {q.example_id for q in p.store.questions()}
    made: dict[str, tuple[Example, str, Any]] = {}
    for c in captures:
        data = p.task.to_bytes(c.input)
        id_ = p.store.blobs.put(data)
        example = Example(id_, f"{c.endpoint}/{c.id}", "pool", f"finding:{finding.id}", {}, c.at)
        made.setdefault(id_, (example, p.task.content(c.input), c))
    p.store.add_examples([m[0] for m in made.values()], {id_: m[1] for id_, m in made.items()})
    known = {e.id: e for e in p.store.examples("pool", ids=list(made))}  # a picture of the test part stays out
    rest = [e for id_, e in known.items() if id_ not in asked]
    if not rest:
        raise NotEnoughData(
            f"all captures of finding {finding.id} have been asked about, or are gone", hint="trilobe monitor"
        )
    model, X = p.newest_model(), p.encode(rest)
    features = p.task.features(p.module(model) if model else None, X)
    proba = np.stack([made[e.id][2].proba for e in rest])
    chosen = select(strategy or "typical", n, proba, features, p.config.query.diversity, seed)
    return rest, replace(chosen, reason=f"{finding.kind.replace('_', ' ')}: {chosen.reason}")


def _assign(p: Project, question_id: str, each: int) -> tuple[str, ...]:
    names = p.config.query.annotators
    order = np.random.default_rng(seed_of(p.seed, "assign", question_id)).permutation(len(names))
    return tuple(names[i] for i in order[:each])


def label(
    answers: "Path | str | Answerer" = "",
    project: "Project | Path | str" = ".",
    annotator: str = "me",
    n: int | None = None,
) -> Labeled:
    """Take answers: from a CSV file, or at the terminal.

    The file has the columns example (id, its first letters, or file name), annotator, label, and optionally seconds
    and answered_at (seconds since 1970). A label is a class ("cat"), a node of the label tree, several of them joined
    by "|" ("one of these"), any of that after "not:" ("none of these"), or "?" ("can't tell"). Nobody's answer is
    ever changed: a later, different one of the same person supersedes it. Without answered_at, lower rows are later.
    A file taken twice changes nothing. Rows that fit nothing are refused with a reason, the others go in.

    Args:
        answers: a CSV file; nothing for the terminal; in Python also a function.
        project: the project's folder.
        annotator: who answers at the terminal.
        n: at most so many new answers.

    Returns:
        How many answers were new, known, superseding, refused, and how many questions are open.

    Example:
        trilobe label answers.csv
        trilobe label --annotator ann
    """
    positive(n=n)
    with opened(project) as p:
        before = p.store.count_superseded()
        if answers and not callable(answers):
            new, known, refused = take_answers(p, answers, n)
        else:
            new, known, refused = _ask(p, answers if callable(answers) else AtTheTerminal(p), annotator, n), 0, {}
        return Labeled(new, known, p.store.count_superseded() - before, refused, len(p.store.questions(open_only=True)))


def _ask(p: Project, answerer: Answerer, annotator: str, n: int | None) -> int:
    """Put every open question to those it is for; each answer is kept before the next question is asked."""
    said = {(a.question_id, a.annotator) for a in p.store.answers()}
    todo = [
        (q, who)
        for q in p.store.questions(open_only=True)
        for who in q.assignees or (annotator,)
        if (q.id, who) not in said
    ][:n]
    examples = {e.id: e for e in p.store.examples(ids=[q.example_id for q, _ in todo])}
    for done, (q, who) in enumerate(todo):
        reply = answerer(q, examples[q.example_id], who)
        if reply is None:
            return done
        answer = make_answer(q, who, *reply, time.time())
        p.task.possible(answer, p.space)  # what fits no class must not get into a record that is never edited
        p.store.add_answers([answer])
        if not isinstance(answerer, AtTheTerminal):  # a bar would stand in the way of the prompt
            tell("answering", done + 1, len(todo))
    return len(todo)


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
        pool = {e.id for e in p.store.examples("pool")}
        said = [a for a in p.store.answers() if a.example_id in pool]
        if not said:
            raise NotEnoughData("there are no answers yet", hint="trilobe query, then trilobe label")
        table = AnswerTable.from_answers(said, p.space, lambda a: p.task.possible(a, p.space))
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
    engine.fit(table, _model_prior(p, table) if method == "model" else None)
    return table.beliefs(log_likelihood(table, engine.confusion_), engine.prior_), engine.quality()


def _model_prior(p: Project, table: AnswerTable) -> FloatArray | None:
    """The model's opinion on each example, never one it formed by training on that example's answers."""
    model = p.newest_model()
    if model is None or model.space.names != p.space.names:
        return None
    X = p.encode(p.store.examples(ids=table.examples))
    order = [e.id for e in p.store.examples(ids=table.examples)]
    prior = dict(zip(order, p.predict(model, X), strict=True))
    kept = p.store.recorded(f"out_of_fold/{model.id}", {})
    prior.update({id_: np.array(row) for id_, row in kept.items() if id_ in prior})
    return np.stack([prior[id_] for id_ in table.examples])


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
