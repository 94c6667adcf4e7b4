"""What is known of a pipeline's requests, and of a shadow's answers, once they are answered: captures and questions."""

import http.client
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trilobe.errors import UnreadableExample
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.desk import Desk
from trilobe.tasks import get

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.deferral import chooser
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import Node, Settings, flow, function, graph, serve_forever
from trilobe.tasks.image_classification.serve import decode_gray

folder, capture, error, limit, workers = Path(sys.argv[1]), *map(float, sys.argv[2:])

def load(bundle):
    shift = read_json(bundle, "preprocessing.json")["shift"]
    def prepare(data):
        return {"level": data["image"].mean(axis=(1, 2, 3), dtype=np.float32)}
    def light(data):  # how light a picture is, as the probability of "light"
        p = np.clip(data["level"] / 255 + shift, 0, 1).astype(np.float32)
        return {"proba": np.stack([1 - p, p], axis=1)}
    image, proba = TensorSpec("image", "UINT8", (-1, -1, -1, 1)), TensorSpec("proba", "FP32", (-1, 2))
    example = {"image": np.zeros((1, 2, 2, 1), np.uint8)}
    shared = "levels" if shift != 0.25 else ""  # one of them prepares by itself
    return Servable(Pipeline([("prepare", prepare), ("light", light)]), (image,), (proba,), example, shared)

X = {"photo": "BYTES[-1]"}
nodes = {"pixels": Node(decode_gray, {"photo": "photo"}), "judge": Node("light", {"image": "pixels.image"}),
         "second": Node("beside", {"image": "pixels.image"})}
inspect = graph("inspect", X, {"proba": "judge.proba", "other": "second.proba"}, nodes)
turned = graph("turned", X, {"other": "second.proba", "proba": "judge.proba"}, nodes)

@flow(X, {"proba": "FP32[-1,2]"}, steps=[decode_gray, "light", "beside"])
async def careful(decode_gray, light, beside, photo):
    image = (await decode_gray(photo=photo))["image"]
    first = await light(image=image)
    return first if first["proba"].max() > 0.9 else await beside(image=image)

@flow(X, {"proba": "FP32[-1,2]"}, steps=[decode_gray, "light", "beside"])
async def mean(decode_gray, light, beside, photo):
    image = (await decode_gray(photo=photo))["image"]
    one, two = await light(image=image), await beside(image=image)
    return {"proba": (one["proba"] + two["proba"]) / 2}

@flow(X, {"size": "INT64[-1]"}, steps=[decode_gray])
async def size(decode_gray, photo):
    image = (await decode_gray(photo=photo))["image"]
    return {"size": np.full(len(image), image[0].size)}

settings = Settings(workers=int(workers), flows=(inspect, turned, careful, mean, size), defer=chooser(error),
                    max_waiting=int(limit))
serve_forever(folder, "light", load, captures=folder / "captures", capture_rate=capture, settings=settings)
"""
TASK = get("image_classification")
THRESHOLD = 0.75


def make_bundle(path: Path, shift: float = 0.0, names: Any = ("dark", "light"), threshold: float = THRESHOLD) -> Path:
    promise = {"at_most": 0.05, "threshold": threshold, "answered": 0.7, "error": 0.01, "error_high": 0.04}
    table = {"format": "deferral.v1", "on": "test", "n": 100, "certainty": 0.95, "errors": [promise], "shares": []}
    written = {"preprocessing.json": {"shift": shift}, "labels.json": {"names": names}, "deferral.json": table}
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {name: json.dumps(said).encode() for name, said in written.items()}
    return write_bundle(path, files | {"README.md": path.name.encode()}, "m", {}).path


def begin(
    folder: Path, error: float = 0.05, capture: float = 1.0, limit: int = 100, workers: int = 1, names: Any = None
) -> endpoint.Endpoint:
    """Serve "light", and "beside" it one that finds everything a quarter lighter."""
    endpoint.deploy(folder, make_bundle(folder / "light"))
    endpoint.deploy(folder, make_bundle(folder / "beside", 0.25, names or ("dark", "light")), "beside")
    options = [str(number) for number in (capture, error, limit, workers)]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), *options]
    return endpoint.start(folder, "light", command, timeout=60)


def png(shade: int, size: int = 4) -> bytes:
    """A file of one gray."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def call(url: str, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    return response.status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode()


def send(url: str, name: str, *files: bytes) -> dict[str, Any]:
    """Image files to a pipeline, in the binary form."""
    data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    size = {"binary_data_size": len(data)}
    tensor = {"name": "photo", "shape": [len(files)], "datatype": "BYTES", "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    status, answer = call(url, "POST", f"/v2/models/{name}/infer", head + data, headers)
    assert status == 200, answer
    return dict(answer)


def ask(url: str, name: str, *shades: int) -> dict[str, Any]:
    images = np.stack([np.full((2, 2, 1), shade, np.uint8) for shade in shades])
    tensor = {"name": "image", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    status, answer = call(url, "POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}))
    assert status == 200, answer
    return dict(answer)


def metric(url: str, name: str, **labels: str) -> float:
    """The sum over all samples with these labels."""
    lines = call(url, "GET", "/metrics")[1].splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = [line for line in lines if re.match(name + r"[ {]", line) and all(w in line for w in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def captured(folder: Path, n: int, **which: Any) -> list[Any]:
    """The captures, once there are n: they follow the answers."""
    deadline = time.monotonic() + 10
    while len(found := read_captures(folder / "captures", **which)) < n and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    found = read_captures(folder / "captures", **which)
    assert len(found) == n, [(c.model, c.bundle_id) for c in found]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    endpoint.stop(tmp_path)


# --- captures of pipelines ------------------------------------------------------------------------------------------


def test_a_compressed_image_is_captured_once_as_it_came_with_the_probabilities(folder: Path) -> None:
    served = begin(folder, error=0.0)
    files = [png(shade) for shade in (0, 60, 255)]
    for name in ("inspect", "turned"):
        send(served.url, name, *files)
    captures = captured(folder, 6)
    assert {c.endpoint for c in captures} == {"light"}
    beside = endpoint.read_state(folder).models["beside"].version
    for name, giver, shift in (("inspect", served.bundle_id, 0.0), ("turned", beside, 0.25)):
        of = read_captures(folder / "captures", "light", model=name)
        assert [c.input.tobytes() for c in of] == files and {c.bundle_id for c in of} == {giver}
        np.testing.assert_allclose([c.proba[1] for c in of], np.clip([shift, 60 / 255 + shift, 1 + shift], 0, 1), 1e-5)
        assert all(c.live == "" and c.live_proba is None for c in of)
    # What monitoring, explanation and the next questions do with one:
    item = TASK.captured(captures[1].input)
    assert item.shape == (4, 4, 1) and (item == 60).all()
    assert TASK.content(item) == TASK.content(TASK.captured(np.full((4, 4, 1), 60, np.uint8)))
    with pytest.raises(UnreadableExample):
        TASK.captured(captures[1].input[:-20])


def test_an_answer_belongs_to_the_bundle_that_gave_it(folder: Path) -> None:
    served = begin(folder, error=0.0)
    beside = endpoint.read_state(folder).models["beside"].version
    for name, shade, giver in (("careful", 0, served.bundle_id), ("careful", 120, beside), ("mean", 0, "")):
        send(served.url, name, png(shade))
        (capture,) = [c for c in captured(folder, 1) if c.model == name]
        assert capture.bundle_id == giver
        for path in (folder / "captures").rglob("*.captures-v1"):
            path.write_bytes(b"")
    send(served.url, "size", png(3))  # no probabilities: nothing to capture, and nothing to complain of
    assert "deferred" not in send(served.url, "careful", png(120)).get("parameters", {})
    captured(folder, 1)
    endpoint.stop(folder)
    assert (folder / "server.log").read_text() == ""


def test_what_is_called_by_name_is_told_apart(folder: Path) -> None:
    served = begin(folder, error=0.0)
    ask(served.url, "light", 10)
    ask(served.url, "beside", 20)
    send(served.url, "inspect", png(30))
    captures = captured(folder, 3)
    assert [(c.model, int(c.input.flat[0])) for c in captures[:2]] == [("", 10), ("beside", 20)]
    assert [c.model for c in captures] == ["", "beside", "inspect"], "the steps of a pipeline are no requests"


def test_a_request_that_fails_is_not_captured(folder: Path) -> None:
    served = begin(folder)
    body = json.dumps({"inputs": [{"name": "photo", "shape": [1], "datatype": "BYTES", "data": ["no image"]}]})
    status, answer = call(served.url, "POST", "/v2/models/inspect/infer", body)
    assert status == 400 and "decode_gray" in answer["error"]
    send(served.url, "inspect", png(0))
    captured(folder, 1)
    assert Desk(folder).waiting() == []


def test_a_share_of_nothing_captures_nothing(folder: Path) -> None:
    served = begin(folder, capture=0.0)
    send(served.url, "inspect", png(0), png(128))
    assert captured(folder, 0) == [] and not (folder / "captures").exists()
    assert len(Desk(folder).waiting()) == 1, "what is in doubt waits all the same"


# --- pipelines that leave something to people -------------------------------------------------------------------------


def test_a_pipeline_leaves_to_people_what_its_model_would(folder: Path) -> None:
    served = begin(folder)
    answer = send(served.url, "inspect", png(0), png(128), png(255))["parameters"]
    assert answer["deferred"] == "[false,true,false]"
    (id_,) = [i for i in answer["deferred_ids"].split(",") if i]
    desk = Desk(folder)
    item = desk.item(id_)
    assert item is not None and (item.model, item.bundle_id) == ("inspect", served.bundle_id)
    assert item.input.tobytes() == png(128) and (TASK.captured(item.input) == 128).all()
    assert item.confidence == pytest.approx(128 / 255)
    path = f"/v2/models/inspect/answers/{id_}"
    assert call(served.url, "GET", path) == (202, {"id": id_, "status": "waiting"})
    desk.give(id_, {"id": id_, "answer": "dark"})
    assert call(served.url, "GET", path) == (200, {"id": id_, "answer": "dark"})
    assert call(served.url, "GET", f"/v2/models/inspect/answers/{'0' * 32}")[0] == 404
    assert send(served.url, "inspect", png(0))["parameters"] == {"deferred": False}
    assert metric(served.url, "trilobe_deferred_total", model="inspect") == 1


def test_the_model_that_answers_decides_the_threshold(folder: Path) -> None:
    served = begin(folder)
    assert send(served.url, "careful", png(0))["parameters"] == {"deferred": False}
    assert send(served.url, "careful", png(120))["parameters"] == {"deferred": True} | {
        "deferred_ids": Desk(folder).waiting()[-1]
    }, "120/255 + 1/4 = 0.72"
    item = Desk(folder).item(Desk(folder).waiting()[-1])
    assert item is not None and item.bundle_id == endpoint.read_state(folder).models["beside"].version
    assert "parameters" not in send(served.url, "mean", png(128)), "nothing was measured of an answer of its own making"
    assert ask(served.url, "beside", 100)["parameters"]["deferred"] is True, "it knows the same classes"


def test_other_classes_are_not_left_to_people_who_know_these(folder: Path) -> None:
    served = begin(folder, names=["wet", "dry"])
    assert "parameters" not in ask(served.url, "beside", 100)
    assert "parameters" not in send(served.url, "careful", png(120))
    assert ask(served.url, "light", 128)["parameters"]["deferred"] is True
    assert "parameters" not in send(served.url, "turned", png(128)), "its first output is the other model's"


def test_one_beside_that_cannot_promise_it_answers_alone(folder: Path) -> None:
    served = begin(folder)
    lax = make_bundle(folder / "lax", 0.25)
    (lax / "deferral.json").unlink()
    files = {path.name: path.read_bytes() for path in lax.iterdir() if path.name != "manifest.json"}
    write_bundle(folder / "old", files, "m", {})
    endpoint.replace(folder, folder / "old", name="beside")
    assert "parameters" not in ask(served.url, "beside", 100)
    assert ask(served.url, "light", 128)["parameters"]["deferred"] is True
    assert "'beside' leaves nothing to people" in (folder / "server.log").read_text()


def test_kill_9_loses_no_question_of_a_pipeline(folder: Path) -> None:
    served = begin(folder)
    ids = [send(served.url, "inspect", png(shade))["parameters"]["deferred_ids"] for shade in (110, 120, 130)]
    os.kill(served.pid, signal.SIGKILL)
    desk = Desk(folder)
    assert desk.waiting() == ids
    assert [TASK.captured(desk.item(i).input).flat[0] for i in ids] == [110, 120, 130]  # type: ignore[union-attr]


# --- shadows ------------------------------------------------------------------------------------------------------


def test_a_shadows_answers_are_captured_beside_those_that_were_heard(folder: Path) -> None:
    served = begin(folder, error=0.0)
    endpoint.replace(folder, make_bundle(folder / "new", 0.1), shadow=True)
    new = endpoint.read_state(folder).models["light"].shadow
    shades = [0, 100, 110, 120, 200, 255]
    for shade in shades[:3]:
        ask(served.url, "light", shade)
    ask(served.url, "light", *shades[3:])
    heard, beside = captured(folder, 6, bundle_id=served.bundle_id), captured(folder, 6, bundle_id=new)
    assert all(c.live == "" for c in heard) and all(c.live == served.bundle_id for c in beside)
    assert [int(c.input.flat[0]) for c in beside] == shades
    np.testing.assert_allclose([c.live_proba[1] for c in beside], np.array(shades) / 255, rtol=1e-5)
    np.testing.assert_allclose([c.proba[1] for c in beside], np.minimum(np.array(shades) / 255 + 0.1, 1), rtol=1e-5)
    assert [c.agrees for c in beside] == [True, True, False, False, True, True]
    assert not any(c.agrees for c in heard)
    # The same as the metrics count, and as statistics say of the shadow's version:
    for agrees, n in (("true", 4), ("false", 2)):
        assert metric(served.url, "trilobe_shadow_total", model="light", version=new, agrees=agrees) == n
    said = call(served.url, "GET", f"/v2/models/light/versions/{new}/stats")[1]["model_stats"][0]
    assert said["shadow"] == {"compared": 6, "agreed": 4}
    assert "shadow" not in call(served.url, "GET", "/v2/models/light/stats")[1]["model_stats"][0]
    status, _ = call(served.url, "POST", f"/v2/models/light/versions/{new}/infer", "{}")
    assert status == 400
    endpoint.replace(folder, folder / "new")
    ask(served.url, "light", 50)
    assert captured(folder, 7, bundle_id=new)[-1].live == "", "now it is the one that is heard"


def test_a_shadow_of_another_shape_agrees_in_nothing() -> None:
    from trilobe.infrastructure.serve.models import _agreeing

    rng = np.random.default_rng(0)
    for shape in ((5, 3), (5, 4, 3), (5,)):
        a, b = rng.random(shape), rng.random(shape)
        b[:2] = a[:2]
        slow = sum(
            bool(np.all(x.argmax(-1) == y.argmax(-1))) if a.ndim > 1 else x == y for x, y in zip(a, b, strict=True)
        )
        assert _agreeing({"y": a}, {"z": b}, 5) == slow >= 2
    assert _agreeing({"y": np.ones((5, 3))}, {"y": np.ones((5, 4))}, 5) == 0
    words = np.array([b"a", b"b"], object)
    assert _agreeing({"y": words}, {"y": np.array([b"a", b"c"], object)}, 2) == 1
    assert _agreeing({"y": np.ones(3)}, {"y": np.ones(3)}, 2) == 2, "no rows: all of it or nothing"


# --- a desk with an end ---------------------------------------------------------------------------------------------


def test_a_full_desk_keeps_what_it_promised_and_says_so(folder: Path) -> None:
    served = begin(folder, limit=3)
    ids = send(served.url, "inspect", png(128), png(129))["parameters"]["deferred_ids"].split(",")
    answer = ask(served.url, "light", 0, 128, 130)
    assert answer["parameters"]["deferred"] == "[false,true,null]"
    ids.append(answer["parameters"]["deferred_ids"].split(",")[1])
    for _ in range(5):
        assert "parameters" not in ask(served.url, "light", 128), "neither sure nor left to people"
    assert ask(served.url, "light", 255)["parameters"] == {"deferred": False}
    assert ask(served.url, "light", 128, 255)["parameters"] == {"deferred": "[null,false]"}
    desk = Desk(folder)
    assert desk.waiting() == ids, "nothing that was promised made way"
    assert metric(served.url, "trilobe_deferral_refused_total", model="light") == 7
    assert metric(served.url, "trilobe_deferred_total") == 3
    for id_ in ids:
        desk.give(id_, {"id": id_, "answer": "dark"})
        desk.done(id_)
    deadline = time.monotonic() + 10
    while "parameters" not in (answer := ask(served.url, "light", 128)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer["parameters"]["deferred_ids"] in desk.waiting()
    endpoint.stop(folder)
    log = (folder / "server.log").read_text()
    assert log.count("wait for people") == 1 and "serve.max_waiting is 3" in log


def test_workers_share_the_limit(folder: Path) -> None:
    served = begin(folder, limit=20, workers=2)
    for _ in range(40):
        ask(served.url, "light", 128)
    assert 20 <= len(Desk(folder).waiting()) <= 21, "each may put one more at the same moment"
    assert metric(served.url, "trilobe_deferral_refused_total") + metric(served.url, "trilobe_deferred_total") == 40
