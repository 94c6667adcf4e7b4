"""An endpoint's life: served, called, swapped, watched, found at fault, asked about, explained, stopped."""

import http.client
import io
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from trilobe import loop
from trilobe.errors import BundleError, NotEnoughData, NotFoundError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client
from trilobe.types import Response


def test_nothing_to_watch(trained) -> None:
    with pytest.raises(NotFoundError, match=r"no endpoint 'tiny'; expected one that was started(.|\n)*trilobe serve"):
        loop.monitor(trained.folder)
    with pytest.raises(NotEnoughData, match=r"no findings(.|\n)*trilobe monitor"):
        loop.explain(trained.folder)
    for verb in (lambda: loop.monitor(trained.folder, last=0), lambda: loop.explain(trained.folder, n=0)):
        with pytest.raises(UsageError, match=r"= 0; expected at least 1"):
            verb()


def captured(folder: Path, n: int) -> None:
    """Wait until ``n`` captures are on disk."""
    deadline = time.monotonic() + 10
    while len(read_captures(folder / ".trilobe" / "captures")) < n:
        assert time.monotonic() < deadline, "captures are missing"
        time.sleep(0.02)


def post(url: str, body: bytes, path: str = "/v2/models/tiny/infer") -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


@pytest.fixture
def served(trained) -> Any:
    trained.set("serve", "max_body", "100000")
    loop.label(trained.table(trained.folder / "all.csv"), trained.folder)
    trained.set("train", "steps", "150")
    loop.train(trained.folder)
    loop.package(trained.folder)
    endpoint = loop.serve(project=trained.folder, background=True)
    yield trained, endpoint
    loop.serve(project=trained.folder, stop=True)


def test_a_life(served, shapes) -> None:
    tiny, endpoint = served
    folder = tiny.folder
    assert endpoint.state == "ready" and endpoint.name == "tiny"
    assert loop.show(project=folder)["endpoints"][0]["state"] == "ready"
    with Client(endpoint.url, "tiny") as client:
        usual, labels = shapes(60, 11)
        right = np.mean([client.infer(i[None])[0].argmax() == k for i, k in zip(usual, labels, strict=True)])
        assert right > 0.8
        captured(folder, 60)
        window = loop.monitor(folder)
        assert (window.verdict, window.n, window.findings) == ("ok", 60, ())

        bad_requests(endpoint.url, client)
        captured(folder, 61)
        assert len(read_captures(folder / ".trilobe" / "captures")) == 61, "what is refused is not captured"

        for i in range(60):
            client.infer((255 - usual[i])[None])
        captured(folder, 121)
        window = loop.monitor(folder)
        assert window.verdict == "alarm" and window.findings
        assert loop.show(project=folder)["next"] == "trilobe query --finding newest"
        assert {f["id"] for f in loop.show("findings", folder)["findings"]} == {f.id for f in window.findings}
        assert loop.monitor(folder).findings and len(loop.show("findings", folder)["findings"]) == len(window.findings)

        explained = loop.explain(folder, n=3)
        assert {e.flagged for e in explained} == {True, False}
        for e in explained:
            for path in (e.image, e.overlay):
                with Image.open(path) as image:
                    image.load()
                    assert image.size[0] >= 8

        asked = loop.query(folder, n=12, finding="newest")
        assert len(asked) == 12 and all(q.reason for q in asked)
        inverted = {bytes((255 - u).tobytes()): k for u, k in zip(usual, labels, strict=True)}
        with loop.opened(folder) as p:
            examples = p.store.examples(ids=[q.example_id for q in asked])
            truth = {e.id: inverted[i.tobytes()] for e, i in zip(examples, p.items(examples), strict=True)}
        names = ("bar", "cross", "dot")
        loop.label(lambda q, e, who: (Response("class", (names[truth[e.id]],)), 1.0), folder)
        loop.train(folder)
        bundle = loop.package(folder)
        before = client.version
        swapped = loop.serve(project=folder)
        assert (swapped.url, swapped.pid) == (endpoint.url, endpoint.pid), "the client need not notice"
        client.infer(usual[:1])
        assert client.version == bundle.id != before

        damage_and_go_on(folder, client, bundle.id)
    path = loop.report(folder)
    assert "findings" in path.read_text() or "found" in path.read_text()
    assert loop.serve(project=folder, stop=True).state == "stopped"
    with pytest.raises(ServeError), Client(endpoint.url, "tiny", timeout=2) as client:
        client.infer(usual[:1])
    assert loop.monitor(folder).verdict in ("ok", "too_few"), "a stopped endpoint can still be looked at"


PIPELINE = """
[serve.pipelines.inspect]
inputs = { photo = "BYTES[-1]" }
outputs = { proba = "judge.proba" }
steps.pixels = { run = "trilobe.tasks.image_classification.serve:decode_gray", inputs = { photo = "photo" } }
steps.judge = { model = "tiny", inputs = { image = "pixels.image" } }
"""


def test_a_pipelines_life(trained, shapes) -> None:
    """Image files to a pipeline: watched, found at fault, explained, asked about, and left to people."""
    from trilobe.tasks.image_classification.data import encode_png

    folder = trained.folder
    loop.label(trained.table(folder / "all.csv"), folder)
    trained.set("train", "steps", "150")
    trained.set("serve", "defer_share", "0.4")
    (folder / "trilobe.toml").write_text((folder / "trilobe.toml").read_text() + PIPELINE)
    loop.train(folder)
    bundle = loop.package(folder)
    endpoint = loop.serve(project=folder, background=True)
    usual, labels = shapes(60, 11)
    ids: dict[str, int] = {}
    try:
        with Client(endpoint.url, "inspect") as client:
            for i, image in enumerate([*usual, *(255 - usual)]):
                sent = np.array([encode_png(image), None], object)[:1]
                client.call({"photo": sent})
                ids |= dict.fromkeys(filter(None, client.deferred), i)
                if i == 59:
                    captured(folder, 60)
                    with pytest.raises(NotFoundError, match=r"answered as 'nope' was captured(.|\n)*\['inspect'\]"):
                        loop.monitor(folder, model="nope")
                    window = loop.monitor(folder, model="inspect")
                    assert (window.verdict, window.n) == ("ok", 60)
                    assert loop.monitor(folder).verdict == "too_few", "the endpoint's own was not called by its name"
            captured(folder, 120)
            window = loop.monitor(folder, model="inspect")
            assert window.verdict == "alarm" and {f.bundle_id for f in window.findings} == {bundle.id}
            assert len(loop.explain(folder, n=2)) >= 2
            assert len(loop.query(folder, n=3, finding="newest")) == 3
            assert "findings" in loop.report(folder).read_text()

            first = [id_ for id_, i in ids.items() if i < 60]
            assert first and loop.show(project=folder)["waiting"] == len(ids)
            loop.query(folder, n=len(ids) + 3)
            truth = {usual[i].tobytes(): labels[i] for i in range(60)} | {
                (255 - usual[i]).tobytes(): labels[i] for i in range(60)
            }
            with loop.opened(folder) as p:
                of = {e.id: i.tobytes() for e, i in zip(p.store.examples(), p.items(p.store.examples()), strict=True)}
            names = ("bar", "cross", "dot")
            loop.label(lambda q, e, who: (Response("class", (names[truth[of[e.id]]],)), 1.0), folder)
            assert loop.deliver(folder).answered == len(ids)
            for id_ in first:
                said = client.answer(id_)
                assert said is not None and said["answer"] == names[labels[ids[id_]]] and said["model"] == "inspect"
    finally:
        loop.serve(project=folder, stop=True)


def bad_requests(url: str, client: Client) -> None:
    """Each but the first is refused with its reason, and the server goes on."""
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1]}
    whole = json.dumps({"inputs": [image | {"data": [0] * 64}]}).encode()
    assert post(url, whole)[0] == 200
    short = json.dumps({"inputs": [image | {"data": [0] * 63}]}).encode()
    for body, status, reason in [
        (short, 400, "63"),
        (json.dumps({"inputs": [image | {"datatype": "FP32", "data": [0.5] * 64}]}).encode(), 400, "UINT8"),
        (json.dumps({"inputs": [image | {"shape": [1, 8, 8, 3], "data": [0] * 192}]}).encode(), 400, "shape"),
        (json.dumps({"inputs": [image | {"data": [300] * 64}]}).encode(), 400, ""),
        (b"{", 400, "JSON"),
        (b"x" * 200_000, 413, ""),
    ]:
        found, answer = post(url, body)
        assert found == status, answer
        assert reason in answer["error"]
    assert post(url, whole, "/v2/models/other/infer")[0] == 404
    for wrong in (np.zeros((1, 8, 8, 1)), np.zeros((8, 8), np.uint8)):
        with pytest.raises(UsageError, match=r"expected \(n, height, width, channels\) uint8"):
            client.infer(wrong)
    with pytest.raises(ServeError, match=r"shape"):
        client.infer(np.zeros((1, 8, 8, 3), np.uint8))


def damage_and_go_on(folder: Path, client: Client, good: str) -> None:
    """A bundle that was edited is refused, its file named, while the old one goes on serving."""
    import shutil

    with loop.opened(folder) as p:
        path = p.store.bundle().path
    broken = folder / "broken"
    shutil.copytree(path, broken)
    data = (broken / "labels.json").read_bytes()
    (broken / "labels.json").write_bytes(data.replace(b"bar", b"rab"))
    with pytest.raises(BundleError, match=r"labels\.json"):
        loop.serve(str(broken), folder)
    client.infer(np.zeros((1, 8, 8, 1), np.uint8))
    assert client.version == good


def test_a_port_in_use(trained) -> None:
    loop.package(trained.folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrilobeError, match=f"port {port} of 127.0.0.1 is in use; expected a free port"):
            loop.serve(project=trained.folder, port=port, background=True)
        assert loop.show(project=trained.folder)["endpoints"][0]["state"] == "stopped", "nothing is left running"


def test_pictures_are_pngs(trained) -> None:
    with loop.opened(trained.folder) as p:
        (item,) = p.items(p.store.examples("pool")[:1])
        assert Image.open(io.BytesIO(p.task.picture(item))).format == "PNG"
