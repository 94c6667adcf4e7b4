"""What an endpoint leaves to people: the thresholds that travel in a bundle, and the questions that come back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trilobe.errors import NotEnoughData, TrilobeError, UnreadableExample
from trilobe.infrastructure.deferral import FORMAT, Promise, Table
from trilobe.infrastructure.desk import Desk
from trilobe.loop.choosing import Pick, torn
from trilobe.loop.learning import held_out
from trilobe.loop.project import Project, tell
from trilobe.statistics import clopper_pearson
from trilobe.types import BoolArray, Capture, Example, FloatArray, Model, Question

if TYPE_CHECKING:
    from trilobe.trust.deferral import Deferral

STRATEGY = "deferred.v1"
_KEY = "deferred/"  # in the journal: which example an item became
CERTAINTY = 0.95  # of every promise, over the draw of the held-out examples
WANTED = (*(n / 1000 for n in range(1, 10)), *(n / 100 for n in range(1, 100)))  # errors and shares to promise


# --- for the bundle -------------------------------------------------------------------------------------------------


def deferral_table(p: Project, model: Model) -> Table:
    """The thresholds on a model's confidence, with what each promises (see :mod:`trilobe.infrastructure.deferral`).

    They come from the held-out predictions, which must be like the traffic to come for the promises to hold. Of texts
    with entities the confidence is that of the least certain word, and right is what is right in every word.
    """
    proba, labels, on = held_out(p, model)
    right = np.array([bool(np.all(row.argmax(axis=-1) == label)) for row, label in zip(proba, labels, strict=True)])
    # As the endpoint sees them: float32.
    confidence = p.task.watched(proba, p.space).astype(np.float32).max(axis=1).astype(np.float64)
    return Table(FORMAT, on, len(right), CERTAINTY, *promises(confidence, right))


def promises(confidence: FloatArray, right: BoolArray) -> tuple[tuple[Promise, ...], tuple[Promise, ...]]:
    """What can be promised of the error, and of the share that people see, from ``(n,)`` held-out predictions.

    Of all thresholds that :mod:`trilobe.trust.deferral` finds, those that win something over a stricter promise.

    >>> errors, shares = promises(np.linspace(0.5, 1, 200), np.arange(200) >= 50)
    >>> [e.at_most for e in errors][:3], round(errors[0].threshold, 3), errors[0].error
    ([0.02, 0.05, 0.08], 0.628, 0.0)
    """
    from trilobe.trust.deferral import threshold_for_error, threshold_for_review_rate

    doubt = -confidence
    errors: list[Promise] = []
    shares: list[Promise] = []
    for wanted in WANTED:
        try:
            found = threshold_for_error(doubt, right, wanted, CERTAINTY)
            kept = _promise(wanted, confidence, right, found)
            if kept and (not errors or kept.answered > errors[-1].answered):
                errors.append(kept)
        except NotEnoughData:
            pass
        try:
            found = threshold_for_review_rate(doubt, wanted, CERTAINTY)
            kept = _promise(wanted, confidence, right, found)
            if kept and (not shares or kept.answered < shares[-1].answered):
                shares.append(kept)
        except NotEnoughData:
            pass
    return tuple(errors), tuple(shares)


def _promise(at_most: float, confidence: FloatArray, right: BoolArray, found: "Deferral") -> Promise | None:
    """A deferral by doubt as a threshold on the confidence: the lowest that is answered. None where nothing is."""
    answered = ~found.defer(-confidence)
    n, wrong = int(answered.sum()), int((~right[answered]).sum())
    if not n:
        return None
    threshold = 0.0 if found.threshold == np.inf else float(confidence[answered].min())
    high = clopper_pearson(wrong, n, 2 * CERTAINTY - 1)[1]  # one-sided
    return Promise(at_most, threshold, n / len(right), wrong / n, high)


# --- for people -----------------------------------------------------------------------------------------------------


def items(p: Project) -> list[tuple[str, Desk]]:
    """What is on the desks of the project's endpoints and not done: ids, oldest first, each with its desk."""
    desks = [Desk(folder) for folder in (p.state / "endpoints").glob("*")]
    return sorted(((id_, desk) for desk in desks for id_ in desk.waiting()), key=lambda item: item[0])


def examples_of_items(p: Project) -> dict[str, str]:
    """Of every item that was taken up, by its id, the example it became; "" where it could become none."""
    return {key.removeprefix(_KEY): str(made) for key, made in p.store.journal(_KEY).items()}


def waiting(p: Project) -> tuple[int, int]:
    """How many items clients wait for an answer to, and how many of those nobody was asked about yet."""
    ids = [id_ for id_, desk in items(p) if not desk.look(id_)]
    known = examples_of_items(p) if ids else {}
    return len(ids), sum(id_ not in known for id_ in ids)


def urgent_first(questions: Sequence[Question]) -> list[Question]:
    """The same questions, those whose answer somebody waits for before all others.

    >>> [q.id for q in urgent_first([Question("a", "x"), Question("b", "y", strategy="deferred.v1")])]
    ['b', 'a']
    """
    return sorted(questions, key=lambda q: q.strategy != STRATEGY)


def from_waiting(p: Project, n: int) -> list[Pick]:
    """At most ``n`` picks among what waits for people, oldest first; each is made an example of the pool.

    An item that repeats an example is that example: where that was asked about before, its answer will do.
    """
    known, asked = examples_of_items(p), {q.example_id for q in p.store.questions()}
    picks: dict[str, Pick] = {}
    for id_, desk in items(p):
        if len(picks) >= n:
            break
        if known.get(id_) in asked or desk.look(id_):
            continue
        item = desk.item(id_)
        example_id = known[id_] if id_ in known else _made(p, desk, id_, item)
        if item is None or example_id in asked or example_id in picks:
            continue
        for example in p.store.examples("pool", ids=[example_id]):  # what is held out for testing is never asked
            picks[example_id] = Pick(example, STRATEGY, 1 - item.confidence, _reason(p, item))
    return list(picks.values())


def _made(p: Project, desk: Desk, id_: str, captured: Capture | None) -> str:
    """The example that an item becomes, written down: its id, or "" where it can become none."""
    made, where = "", f"what waits as {id_} at {desk.folder.name!r}"
    try:
        if captured is None:
            raise UnreadableExample("it is damaged")
        item = p.task.captured(captured.input)
        data, content = p.task.to_bytes(item), p.task.content(item)
    except TrilobeError as error:
        tell(f"{where} cannot be asked: {error.problem}")
        p.store.record(_KEY + id_, made)
        return made
    made = p.store.blobs.put(data)
    example = Example(made, f"{desk.folder.name}/{id_}", "pool", f"deferred:{id_}", {}, captured.at)
    with p.store.transaction():
        _, duplicates = p.store.add_examples([example], {made: content})
        made = duplicates[0][1] if duplicates else made
        p.store.record(_KEY + id_, made)
    return made


def _reason(p: Project, item: Capture) -> str:
    names = p.task.watched_space(p.space).names
    known = len(names) == len(item.proba)  # not that of a bundle with other classes
    return "somebody waits for the answer" + (f": {torn(item.proba, names)}" if known else "")
