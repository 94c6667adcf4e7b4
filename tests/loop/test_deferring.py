"""Human in the loop: an endpoint leaves what it doubts to people, people are asked, clients get the answers."""

import hashlib
import hmac
import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe import loop
from trilobe.errors import BundleError, ConfigError, NotEnoughData, ServeError, UsageError
from trilobe.infrastructure.deferral import chooser, pick, read_table
from trilobe.infrastructure.desk import Desk
from trilobe.infrastructure.monitor import Baseline
from trilobe.infrastructure.webhook import post
from trilobe.loop.choosing import _random_order
from trilobe.loop.deferring import WANTED, promises
from trilobe.trust.deferral import threshold_for_error, threshold_for_review_rate
from trilobe.types import Response, Span

KINDS = ("bar", "cross", "dot")


# --- what a bundle promises -------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
    skill=st.floats(0.0, 1.0),
    levels=st.sampled_from([0, 3]),
)
@settings(max_examples=25, deadline=None)
def test_a_server_picks_what_the_library_would(n: int, seed: int, skill: float, levels: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, n).astype(np.float32).astype(float)
    confidence = np.round(confidence * levels) / levels if levels else confidence  # many are equal
    right = rng.random(n) < confidence**skill
    errors, shares = promises(confidence, right)
    for made, sign in ((errors, 1), (shares, -1)):
        assert [m.at_most for m in made] == sorted({m.at_most for m in made})
        assert all(sign * b.answered > sign * a.answered for a, b in pairwise(made))
        for m in made:
            answered = confidence >= m.threshold
            assert m.answered == answered.mean() and m.error == (~right[answered]).mean() <= m.error_high
            assert made is shares or m.error_high <= m.at_most + 1e-9
            assert made is errors or 1 - m.answered <= m.at_most
    for wanted in (0.01, 0.05, 0.1, 0.2, 0.5):
        for made, search in (
            (errors, lambda: threshold_for_error(-confidence, right, wanted)),  # noqa: B023
            (shares, lambda: threshold_for_review_rate(-confidence, wanted)),  # noqa: B023
        ):
            try:
                kept = (~search().defer(-confidence)).mean()
            except NotEnoughData:
                kept = 0.0
            if not kept:
                assert all(m.at_most <= wanted for m in made) or not made or made[0].at_most > wanted
                continue
            mine = (confidence >= pick(made, wanted)).mean()
            assert mine >= kept if made is errors else mine == kept


def test_every_wanted_error_between_finds_a_promise() -> None:
    confidence = np.linspace(0.3, 1, 300)
    errors, _ = promises(confidence, np.random.default_rng(0).random(300) < confidence)
    for wanted in np.linspace(errors[0].at_most, 1, 200):
        pick(errors, float(wanted))
    with pytest.raises(BundleError, match=r"no promise; expected .* or more"):
        pick(errors, errors[0].at_most - 0.001)
    assert len(WANTED) == len({*WANTED}) == 108


def test_what_the_bundle_holds(trained: Any) -> None:
    bundle = loop.package(trained.folder)
    table = read_table(bundle)
    assert (table.format, table.on, table.n) == ("deferral.v1", "held-out test part", 30)
    assert table.shares and all(0 <= m.threshold <= 1 for m in (*table.errors, *table.shares))
    with loop.opened(trained.folder) as p:
        examples, _ = p.truth("test")
        proba = p.predict(p.store.model(), p.encode(examples))
    at = chooser(share=0.3)(bundle)  # type: ignore[misc]
    left = proba.max(axis=1) < at - 1e-6
    assert 0 < left.mean() <= 0.3
    assert loop.package(trained.folder).id == bundle.id, "packaged twice, one bundle"
    Baseline.from_json({k: v for k, v in json.loads((bundle.path / "baseline.json").read_text()).items() if k != "on"})


# --- from doubt to a question -----------------------------------------------------------------------------------------


def put(
    folder: Path, *images: np.ndarray, proba: tuple[float, ...] = (0.4, 0.35, 0.25), name: str = "tiny"
) -> list[str]:
    """Items on the desk of an endpoint, as its server puts them there."""
    with loop.opened(folder) as p:
        desk = Desk(p.endpoint_folder(name))
    return [desk.keep("b1", image[None], np.array([proba]), [0])[0] for image in images]


def answer_of(folder: Path, id_: str, name: str = "tiny") -> Any:
    with loop.opened(folder) as p:
        said = Desk(p.endpoint_folder(name)).look(id_)
    return json.loads(said) if said else said


def said_of(folder: Path, label: str, *asked: Any, who: str = "ann") -> None:
    """An answer to each of the questions."""
    rows = [f"{q.example_id},{who},{label}" for q in asked]
    (folder / "said.csv").write_text("\n".join(["example,annotator,label", *rows]) + "\n")
    assert not loop.label(folder / "said.csv", folder).refused


def test_what_waits_is_asked_first(tiny: Any, shapes: Any) -> None:
    images, _ = shapes(8, 5)
    ids = put(tiny.folder, *images[:3])
    assert loop.show(project=tiny.folder)["next"] == "trilobe query"
    asked = loop.query(tiny.folder, n=5)
    assert [q.strategy for q in asked] == ["deferred.v1"] * 3 + [asked[-1].strategy] * 2 != ["deferred.v1"] * 5
    assert {q.round for q in asked} == {1}
    assert asked[0].reason == "somebody waits for the answer: bar (40%) or cross (35%)"
    assert asked[0].score == pytest.approx(0.6)
    with loop.opened(tiny.folder) as p:
        made = p.store.examples("pool", ids=[q.example_id for q in asked[:3]])
        assert [e.source for e in made] == [f"deferred:{id_}" for id_ in ids], "the oldest first"
        assert [e.name for e in made] == [f"tiny/{id_}" for id_ in ids]
        np.testing.assert_array_equal(np.stack(p.items(made)), images[:3])
        assert not {e.id for e in made} & {e.id for e in _random_order(p, p.store.examples("pool"))}, "no fair sample"

    later = put(tiny.folder, *images[3:6])  # while questions are open
    again = loop.query(tiny.folder, n=5)
    assert len(again) == 7 and [q.strategy == "deferred.v1" for q in again] == [True] * 5 + [False] * 2
    assert {q.round for q in again} == {1} and loop.query(tiny.folder, n=5) == again, "no more than n of them at once"
    heard: list[str] = []

    def person(question: Any, example: Any, who: str) -> Any:
        heard.append(question.strategy)
        return Response("class", ("dot",)), 1.0

    loop.label(person, tiny.folder)
    assert heard == ["deferred.v1"] * 5 + heard[5:] and len(heard) == 7, "and they are answered first"
    (last,) = (q for q in loop.query(tiny.folder, n=2) if q.strategy == "deferred.v1")
    with loop.opened(tiny.folder) as p:
        assert p.store.examples(ids=[last.example_id])[0].name == f"tiny/{later[-1]}"


def test_without_a_pool_there_is_still_what_waits(tiny: Any, shapes: Any) -> None:
    loop.label(tiny.table(tiny.folder / "all.csv"), tiny.folder)
    with pytest.raises(NotEnoughData):
        loop.query(tiny.folder)
    put(tiny.folder, *shapes(2, 5)[0])
    assert len(loop.query(tiny.folder, n=5)) == 2


def test_one_answer_is_enough_where_one_is_asked(tiny: Any, shapes: Any, trilobe: Callable[..., Any]) -> None:
    ids = put(tiny.folder, *shapes(2, 5)[0])
    said = trilobe("deliver", "--project", tiny.folder)
    assert (said.code, said.out) == (0, f"0 answered, 2 still wait\nnext: trilobe query --project {tiny.folder} "
                                        "(2 were never asked)\n")  # fmt: skip
    asked = loop.query(tiny.folder, n=2)
    assert loop.deliver(tiny.folder).waiting == 2
    said_of(tiny.folder, "cross", asked[0])
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.waiting, told.unasked, told.posted) == (1, 1, 0, 0)
    found = answer_of(tiny.folder, ids[0])
    assert found.pop("confidence") > 0.5
    assert found == {"id": ids[0], "model": "tiny", "status": "answered", "answer": "cross", "n_answers": 1}
    assert answer_of(tiny.folder, ids[1]) == b""
    said_of(tiny.folder, "dot", asked[1])
    assert loop.show(project=tiny.folder)["next"] == "trilobe deliver"
    assert trilobe("deliver", "--project", tiny.folder, "--json").json["answered"] == 1
    assert trilobe("deliver", "--project", tiny.folder).out == "0 answered, 0 still wait\n"
    said_of(tiny.folder, "bar", asked[0])
    loop.deliver(tiny.folder)
    assert answer_of(tiny.folder, ids[0])["answer"] == "cross", "what was given stays as it is"


def test_several_people_answer_until_it_is_known(tiny: Any, shapes: Any) -> None:
    people = ["ann", "bob", "cyd"]
    tiny.set("query", "annotators", json.dumps(people))
    rows = [f"{id_},{who},{tiny.truth[id_]}" for id_ in [e.id for e in tiny.examples("pool")] for who in people]
    (tiny.folder / "all.csv").write_text("\n".join(["example,annotator,label", *rows]) + "\n")
    loop.label(tiny.folder / "all.csv", tiny.folder)  # three who are always right
    ids = put(tiny.folder, *shapes(2, 5)[0])
    asked = loop.query(tiny.folder, n=2, answers=3)
    assert {q.assignees for q in asked} <= {tuple(p) for p in (people,)} or all(len(q.assignees) == 3 for q in asked)
    said_of(tiny.folder, "bar", asked[0], who="ann")
    said_of(tiny.folder, "dot", asked[1], who="ann")
    said_of(tiny.folder, "cross", asked[1], who="bob")
    first = loop.deliver(tiny.folder)
    said_of(tiny.folder, "bar", asked[0], who="bob")
    second = loop.deliver(tiny.folder)
    assert first.answered + second.answered == 1, "known beyond doubt before the third has answered"
    assert answer_of(tiny.folder, ids[0])["confidence"] >= 0.99
    assert answer_of(tiny.folder, ids[1]) == b"", "two against each other: the third decides"
    said_of(tiny.folder, "cross", asked[1], who="cyd")
    loop.deliver(tiny.folder)
    found = answer_of(tiny.folder, ids[1])
    assert (found["answer"], found["n_answers"]) == ("cross", 3)


def test_what_is_known_already_is_not_asked(tiny: Any, shapes: Any) -> None:
    pool, test = tiny.examples("pool"), tiny.examples("test")
    with loop.opened(tiny.folder) as p:
        answered, held_out = p.item(pool[0].id), p.item(test[0].id)
    loop.label(tiny.table(tiny.folder / "one.csv", n=1), tiny.folder)
    new = shapes(1, 5)[0][0]
    first, second, third, fourth = put(tiny.folder, answered, held_out, new, new)
    asked = [q for q in loop.query(tiny.folder, n=9) if q.strategy == "deferred.v1"]
    assert len(asked) == 1, "the same twice is one question"
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.waiting, told.unasked) == (2, 2, 0)
    assert answer_of(tiny.folder, first)["answer"] == tiny.truth[pool[0].id]
    assert answer_of(tiny.folder, second) == {
        **{"id": second, "model": "tiny", "status": "answered"},
        **{"answer": tiny.truth[test[0].id], "confidence": 1.0, "n_answers": 1},
    }
    said_of(tiny.folder, "dot", *asked)
    assert loop.deliver(tiny.folder).answered == 2
    assert answer_of(tiny.folder, third)["answer"] == answer_of(tiny.folder, fourth)["answer"] == "dot"


def test_nobody_could_tell(tiny: Any, shapes: Any) -> None:
    ids = put(tiny.folder, *shapes(2, 5)[0])
    asked = loop.query(tiny.folder, n=2)
    said_of(tiny.folder, "?", asked[0])
    said_of(tiny.folder, "not:bar", asked[1])
    assert loop.deliver(tiny.folder).answered == 2
    found = answer_of(tiny.folder, ids[0])
    assert (found["answer"], found["confidence"], found["n_answers"]) == (None, 0.0, 1), "no guess"
    partial = answer_of(tiny.folder, ids[1])
    assert partial["answer"] in ("cross", "dot") and partial["confidence"] <= 0.6, "and it says how sure that is"


def test_a_damaged_item_holds_up_nobody(tiny: Any, shapes: Any) -> None:
    ids = put(tiny.folder, *shapes(2, 5)[0])
    with loop.opened(tiny.folder) as p:
        path = p.endpoint_folder("tiny") / "waiting" / ids[0]
    path.write_bytes(path.read_bytes()[:-1])
    told: list[str] = []
    with loop.listening(lambda message, done=0, total=0: told.append(message)):
        asked = loop.query(tiny.folder, n=1)
        loop.query(tiny.folder, n=2)
    assert [q.strategy for q in asked] == ["deferred.v1"]
    assert sum("cannot be asked: it is damaged" in line for line in told) == 1
    assert loop.deliver(tiny.folder).answered == 1
    assert answer_of(tiny.folder, ids[0])["answer"] is None


def test_a_bundle_with_other_classes(tiny: Any, shapes: Any) -> None:
    put(tiny.folder, *shapes(1, 5)[0], proba=(0.5, 0.5))
    (asked, *_) = loop.query(tiny.folder, n=1)
    assert asked.reason == "somebody waits for the answer"


def test_a_query_that_was_killed_goes_on(tiny: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trilobe.infrastructure.store import Store

    ids = put(tiny.folder, *shapes(2, 5)[0])
    with monkeypatch.context() as broken:
        broken.setattr(Store, "add_questions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.query(tiny.folder, n=2)
    assert [q.strategy for q in loop.query(tiny.folder, n=2)] == ["deferred.v1"] * 2
    with loop.opened(tiny.folder) as p:
        assert len([e for e in p.store.examples() if e.source.startswith("deferred:")]) == len(ids) == 2


def test_entities(tmp_path: Path) -> None:
    loop.init(tmp_path, labels=["CITY"], task="entity_recognition")
    (tmp_path / "pool.jsonl").write_text('{"text": "Nothing here."}\n')
    loop.add(tmp_path / "pool.jsonl", tmp_path)
    with loop.opened(tmp_path) as p:
        name = p.config.project.name
        sent = np.array(["Nach Köln 🙂 und Rom".encode()], object)
        (id_,) = Desk(p.endpoint_folder(name)).keep("b1", sent, np.array([[0.6, 0.4]]), [0])
    asked = loop.query(tmp_path, n=1)
    assert asked[0].reason == "somebody waits for the answer: O (60%) or CITY (40%)"
    loop.label(lambda *_: (Response("spans", spans=(Span(5, 9, "CITY"), Span(16, 19, "CITY"))), 1.0), tmp_path)
    assert loop.deliver(tmp_path).answered == 1
    found = answer_of(tmp_path, id_, name)["answer"]
    assert found == [
        {"start": 5, "end": 9, "label": "CITY", "text": "Köln"},
        {"start": 16, "end": 19, "label": "CITY", "text": "Rom"},
    ]


# --- the webhook ------------------------------------------------------------------------------------------------------


class Receiver(http.server.ThreadingHTTPServer):
    """Answers with ``statuses`` in turn, then 200; ``meanwhile`` happens before it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
        self.server.meanwhile()
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,0.0.0.0")
    monkeypatch.setattr("trilobe.loop.delivering.post", partial(post, pauses=(0.01, 0.01)))
    one = Receiver()
    yield one
    one.shutdown()
    one.server_close()


def answered(folder: Path, images: Any) -> list[str]:
    """Items that were asked and answered, but not delivered."""
    ids = put(folder, *images)
    said_of(folder, "dot", *[q for q in loop.query(folder, n=len(ids)) if q.strategy == "deferred.v1"])
    return ids


def test_posted_once_it_is_known(tiny: Any, shapes: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.set("serve", "webhook", f'"{receiver.url}"\nwebhook_secret = "MY_KEY"')
    monkeypatch.setenv("MY_KEY", "a long secret")
    ids = answered(tiny.folder, shapes(3, 5)[0])
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.posted, told.kept, told.problem) == (3, 3, 0, "")
    assert [headers["idempotency-key"] for headers, _ in receiver.got] == ids
    for (headers, body), id_ in zip(receiver.got, ids, strict=True):
        assert json.loads(body) == answer_of(tiny.folder, id_), "what is posted is what is fetched"
        signed = f"{id_}.{headers['webhook-timestamp']}.".encode() + body
        digest = b64encode(hmac.new(b"a long secret", signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{digest}"
    assert loop.deliver(tiny.folder).posted == 0 and len(receiver.got) == 3


def test_a_receiver_that_is_down_gets_it_later(tiny: Any, shapes: Any, receiver: Receiver) -> None:
    tiny.set("serve", "webhook", f'"{receiver.url}"')
    ids = answered(tiny.folder, shapes(3, 5)[0])
    receiver.statuses = [503] * 3
    heard: list[str] = []
    with loop.listening(lambda message, done=0, total=0: heard.append(message)):
        told = loop.deliver(tiny.folder)
    assert (told.answered, told.waiting, told.posted, told.kept) == (3, 0, 0, 3)
    assert heard[-1] == "3 answers were not posted, and will be next time: it answered 503 Service Unavailable"
    assert len(receiver.got) == 3, "who is down for one is not asked for the others"
    assert all(answer_of(tiny.folder, id_)["answer"] == "dot" for id_ in ids), "whoever fetches has it all the same"
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.posted, told.kept) == (0, 3, 0)
    assert [headers["webhook-id"] for headers, _ in receiver.got[3:]] == ids
    assert receiver.got[0][1] == receiver.got[3][1], "byte for byte what was tried before"


def test_one_that_is_refused_does_not_hold_up_the_others(tiny: Any, shapes: Any, receiver: Receiver) -> None:
    tiny.set("serve", "webhook", f'"{receiver.url}"')
    ids = answered(tiny.folder, shapes(3, 5)[0])
    receiver.statuses = [200, 400]
    told = loop.deliver(tiny.folder)
    assert (told.posted, told.kept, told.problem) == (2, 1, "it answered 400 Bad Request")
    assert loop.deliver(tiny.folder).posted == 1
    assert [headers["webhook-id"] for headers, _ in receiver.got] == [*ids, ids[1]]


def test_killed_between_post_and_mark(tiny: Any, shapes: Any, receiver: Receiver) -> None:
    """At least once: the receiver has it, but the sender did not live to hear so."""
    tiny.set("serve", "webhook", f'"{receiver.url}"')
    (id_,) = answered(tiny.folder, shapes(1, 5)[0])
    started = threading.Event()
    command = [sys.executable, "-m", "trilobe", "deliver", "--project", str(tiny.folder)]

    def kill() -> None:
        started.wait(30)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    receiver.meanwhile = kill
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started.set()
    assert process.wait(60) == -signal.SIGKILL
    receiver.meanwhile = lambda: None
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.posted) == (0, 1)
    (first, body), (second, again) = receiver.got
    assert first["idempotency-key"] == second["idempotency-key"] == id_ and body == again
    assert loop.deliver(tiny.folder).posted == 0


def test_killed_between_answer_and_post(
    tiny: Any, shapes: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.set("serve", "webhook", f'"{receiver.url}"')
    ids = answered(tiny.folder, shapes(2, 5)[0])
    with monkeypatch.context() as broken:
        broken.setattr("trilobe.loop.delivering.post", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.deliver(tiny.folder)
    assert answer_of(tiny.folder, ids[0])["answer"] == "dot" and answer_of(tiny.folder, ids[1]) == b""
    told = loop.deliver(tiny.folder)
    assert (told.answered, told.posted) == (1, 2)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('"ftp://example.org"', r"serve.webhook: a webhook at 'ftp://example.org'; expected https://host/path"),
        ('"https://127.0.0.1:9"\nwebhook_secret = "NO_SUCH_KEY"', r"does not name an environment variable that is set"),
        ('"https://127.0.0.1:9"\nwebhook_secret = "BAD_KEY"', r"not base64 after whsec_"),
    ],
)
def test_settings_that_cannot_be_meant(
    tiny: Any, shapes: Any, lines: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "whsec_***")
    tiny.set("serve", "webhook", lines)
    (id_,) = answered(tiny.folder, shapes(1, 5)[0])
    with pytest.raises(ConfigError, match=problem):
        loop.deliver(tiny.folder)
    assert answer_of(tiny.folder, id_) == b"", "nothing is half done"


def test_answers_in_the_clear_are_remarked_on(tiny: Any, shapes: Any, receiver: Receiver) -> None:
    tiny.set("serve", "webhook", f'"{receiver.url.replace("127.0.0.1", "0.0.0.0")}"')
    answered(tiny.folder, shapes(1, 5)[0])
    heard: list[str] = []
    with loop.listening(lambda message, done=0, total=0: heard.append(message)):
        assert loop.deliver(tiny.folder).posted == 1
    assert "serve.webhook is not https: answers can be read on the way" in heard


# --- all of it --------------------------------------------------------------------------------------------------------


def ask(url: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode())
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_a_life(trained: Any, shapes: Any, receiver: Receiver) -> None:
    folder = trained.folder
    trained.set("serve", "defer_share", f'0.4\nwebhook = "{receiver.url}"\ncapture = 0.0')
    loop.package(folder)
    endpoint = loop.serve(project=folder, background=True)
    try:
        images, labels = shapes(30, 11)
        waits: dict[str, int] = {}
        for image, kind in zip(images // 2 + 60, labels, strict=True):  # without contrast: hard
            tensor = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": image.ravel().tolist()}
            status, reply = ask(endpoint.url, "POST", "/v2/models/tiny/infer", {"inputs": [tensor]})
            assert status == 200 and len(reply["outputs"][0]["data"]) == 3, (
                "the model's own answer is there all the same"
            )
            if reply["parameters"]["deferred"]:
                waits[reply["parameters"]["deferred_ids"]] = kind
        assert len(waits) >= 5, "what is hard is left to people"
        assert loop.show(project=folder)["waiting"] == len(waits)
        asked = loop.query(folder, n=len(waits))
        assert {q.strategy for q in asked} == {"deferred.v1"}
        with loop.opened(folder) as p:
            made = {e.id: e.name.removeprefix("tiny/") for e in p.store.examples("pool")}
        loop.label(lambda q, e, who: (Response("class", (KINDS[waits[made[e.id]]],)), 1.0), folder)
        receiver.statuses = [500, 500, 500]
        assert loop.deliver(folder).kept == len(waits)
        assert loop.deliver(folder).posted == len(waits)
        for id_, kind in waits.items():
            status, reply = ask(endpoint.url, "GET", f"/v2/models/tiny/answers/{id_}")
            assert (status, reply["answer"]) == (200, KINDS[kind])
        posted = {headers["webhook-id"]: json.loads(body)["answer"] for headers, body in receiver.got}
        assert posted == {id_: KINDS[kind] for id_, kind in waits.items()}
        loop.train(folder)
        bundle = loop.package(folder)
        assert loop.serve(project=folder).bundle_id == bundle.id, "and the answers taught the next model"
    finally:
        loop.serve(project=folder, stop=True)


def test_an_error_that_cannot_be_promised(trained: Any) -> None:
    trained.set("serve", "defer_error", "0.001")
    loop.package(trained.folder)
    with pytest.raises(ServeError, match=r"cannot promise that at most 0.001 of what it answers are wrong"):
        loop.serve(project=trained.folder, background=True)


def test_two_wishes_at_once(trained: Any) -> None:
    trained.set("serve", "defer_error", "0.1\ndefer_share = 0.1")
    loop.package(trained.folder)
    with pytest.raises(UsageError, match=r"defer_error = 0.1 and defer_share = 0.1; expected one of them"):
        loop.serve(project=trained.folder, background=True)
