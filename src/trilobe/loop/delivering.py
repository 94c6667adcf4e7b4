"""``deliver``: what people answered goes to the clients that wait for it."""

import os
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trilobe.config import ServeSection
from trilobe.errors import ConfigError, UsageError
from trilobe.infrastructure.webhook import Posted, check_url, key_of, post
from trilobe.loop.believing import aggregate, unpack_beliefs
from trilobe.loop.choosing import SURE
from trilobe.loop.deferring import examples_of_items, items
from trilobe.loop.project import Project, opened, tell
from trilobe.types import GOLD, Response


@dataclass(frozen=True)
class Delivered:
    """What happened to what clients wait for.

    ``answered`` were answered now; ``waiting`` still wait for people, ``unasked`` of them for a question. With a
    webhook, ``posted`` were accepted there and ``kept`` will be tried again next time, because of the ``problem``.
    """

    answered: int
    waiting: int
    unasked: int
    posted: int = 0
    kept: int = 0
    problem: str = ""


def deliver(project: "Project | Path | str" = ".") -> Delivered:
    """Give clients the answers to what endpoints left to people.

    An answer is what is believed of the example once everybody who was asked has answered, or once it is known beyond
    doubt. Clients find it at /v2/models/NAME/answers/ID; where serve.webhook is set, it is posted there as well, at
    least once. What the receiver does not accept is kept and posted next time. An answer that was given stays as it is.

    Args:
        project: the project's folder.

    Example:
        trilobe deliver
    """
    with opened(project) as p:
        send = _sender(p.config.serve)
        left = items(p)
        said = {id_: desk.look(id_) for id_, desk in left}
        known = examples_of_items(p) if left else {}
        open_ = [id_ for id_, data in said.items() if not data]
        answers = _answers(p, {known[id_] for id_ in open_ if id_ in known})
        answered = posted = kept = 0
        problem = ""
        for id_, desk in left:
            data = said[id_]
            if not data:
                answer = answers.get(known.get(id_, "?"))
                if answer is None:
                    continue
                item = desk.item(id_)
                model = (item.model if item is not None else "") or desk.folder.name
                data = desk.give(id_, {"id": id_, "model": model, "status": "answered", **answer})
                answered += 1
            sent = send(id_, data) if send is not None else Posted(True)
            if sent.accepted:
                desk.done(id_)
                posted += send is not None
            else:
                kept, problem = kept + 1, problem or sent.problem
        if problem:
            tell(f"{kept} answers were not posted, and will be next time: {problem}")
        return Delivered(answered, len(open_) - answered, sum(i not in known for i in open_), posted, kept, problem)


def _answers(p: Project, wanted: Set[str]) -> dict[str, dict[str, Any]]:
    """What can be said of the ``wanted`` examples ("" is what could be made no example), by id."""
    found = {"": {"answer": None, "confidence": 0.0, "n_answers": 0}} if "" in wanted else {}
    said = p.store.answers(example_ids=sorted(wanted))
    for a in said:
        if a.annotator == GOLD and a.response.kind in ("class", "spans"):  # perhaps of the test part
            found[a.example_id] = {"answer": _plain(p, a.response, a.example_id), "confidence": 1.0, "n_answers": 1}
    todo = {a.example_id for a in said} - set(found)
    if not todo:
        return found
    told = {a.example_id for a in said if a.response.kind != "unsure"}
    asking = {q.example_id for q in p.store.questions(open_only=True)}
    for belief in unpack_beliefs(p.store.blobs.get(aggregate(p).beliefs)):
        id_ = belief.example_id
        if id_ not in todo:
            continue
        response, sure = p.task.response(belief.proba, p.space, partial(p.item, id_))
        if id_ not in asking or (id_ in told and sure >= SURE):
            guess = {"answer": _plain(p, response, id_), "confidence": round(sure, 6)}
            nothing = {"answer": None, "confidence": 0.0}  # nobody could tell, and we do not guess
            found[id_] = {**(guess if id_ in told else nothing), "n_answers": belief.n_answers}
    return found


def _plain(p: Project, response: Response, example_id: str) -> Any:
    """An answer as JSON: the class, or the entities as the endpoint writes them."""
    if response.kind != "spans":
        return response.labels[0]
    text = p.item(example_id)
    return [{"start": s.start, "end": s.end, "label": s.label, "text": text[s.start : s.end]} for s in response.spans]


def _sender(section: ServeSection) -> Callable[[str, bytes], Posted] | None:
    """What posts an answer, once it is clear that it can; None without a webhook.

    While the receiver is down, only the first answer is tried: nobody waits for the others to fail too.
    """
    if not section.webhook:
        return None
    try:
        url = check_url(section.webhook)
    except UsageError as error:
        raise ConfigError(f"serve.webhook: {error.problem}", expected=error.expected) from error
    key = b""
    if section.webhook_secret:
        secret = os.environ.get(section.webhook_secret, "")
        if not secret:
            raise ConfigError(
                "serve.webhook_secret does not name an environment variable that is set",
                expected="the name of a variable that holds the key, not the key itself",
                hint="export it before trilobe deliver",
            )
        key = key_of(secret)
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        tell("serve.webhook is not https: answers can be read on the way")
    down: list[Posted] = []

    def send(id_: str, data: bytes) -> Posted:
        if down:
            return down[0]
        sent = post(url, id_, data, key)
        if sent.down:
            down.append(sent)
        return sent

    return send
