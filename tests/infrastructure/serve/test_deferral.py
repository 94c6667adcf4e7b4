"""What is in doubt is left to people: every answer says so, nothing with an id is lost, and ids are no paths."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import light
from trilobe.errors import ServeError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.desk import Desk
from trilobe.infrastructure.serve.access import create_token

SCRIPT = (
    light.SCRIPT
    + """
from trilobe.infrastructure.serve import Settings, serve_forever

folder, error, workers, grpc = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

settings = Settings(workers=workers, defer=chooser(error), grpc_port=grpc or None)
serve_forever(folder, "light", load, captures=folder / "captures", settings=settings)
assert "torch" not in sys.modules and "scipy" not in sys.modules
"""
)
THRESHOLD = 0.75
TABLE = {
    "format": "deferral.v1",
    "on": "held-out test part",
    "n": 100,
    "certainty": 0.95,
    "errors": [
        {"at_most": 0.05, "threshold": THRESHOLD, "answered": 0.7, "error": 0.01, "error_high": 0.04},
        {"at_most": 0.3, "threshold": 0.0, "answered": 1.0, "error": 0.2, "error_high": 0.28},
    ],
    "shares": [],
}


def make_bundle(path: Path, table: Any = TABLE) -> Path:
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {"README.md": path.name.encode()}
    if table is not None:
        files["deferral.json"] = json.dumps(table).encode()
    return write_bundle(path, files, "m", {}).path


def start(folder: Path, bundle: Path, error: float = 0.05, workers: int = 1, grpc: int = 0) -> endpoint.Endpoint:
    endpoint.deploy(folder, bundle)
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(error), str(workers), str(grpc)]
    return endpoint.start(folder, "light", command, timeout=60)


def pictures(*shades: int) -> np.ndarray:
    return np.stack([np.full((2, 3), shade, np.uint8) for shade in shades])


def call(url: str, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers or {})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    return response.status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode()


def infer(url: str, *shades: int, headers: Any = None, **request: Any) -> dict[str, Any]:
    images = pictures(*shades)
    tensor = {"name": "image", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    status, answer = call(url, "POST", "/v2/models/light/infer", {"inputs": [tensor], **request}, headers)
    assert status == 200, answer
    return dict(answer)


def ids_of(answer: dict[str, Any]) -> list[str]:
    return str(answer["parameters"]["deferred_ids"]).split(",")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("light")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[endpoint.Endpoint]:
    yield start(folder, make_bundle(folder / "b1"))
    assert endpoint.stop(folder).state == "stopped"
    assert (folder / "server.log").read_text() == ""


def test_one_row(served: endpoint.Endpoint, folder: Path) -> None:
    before = len(Desk(folder).waiting())
    sure = infer(served.url, 255)
    assert sure["parameters"] == {"deferred": False}
    assert len(Desk(folder).waiting()) == before
    doubtful = infer(served.url, 128, id="7")
    (id_,) = ids_of(doubtful)
    assert doubtful["parameters"]["deferred"] is True and re.fullmatch(r"[0-9a-f]{32}", id_)
    assert doubtful["id"] == "7"
    np.testing.assert_allclose(doubtful["outputs"][0]["data"], [127 / 255, 128 / 255], rtol=1e-6)
    assert Desk(folder).waiting()[-1] == id_, "the newest is the last"


def test_many_rows(served: endpoint.Endpoint, folder: Path) -> None:
    answer = infer(served.url, 0, 100, 255, 140)
    assert answer["parameters"]["deferred"] == "[false,true,false,true]"
    ids = ids_of(answer)
    assert [bool(id_) for id_ in ids] == [False, True, False, True]
    assert ids[1] < ids[3]
    for row, shade in ((1, 100), (3, 140)):
        item = Desk(folder).item(ids[row])
        assert item is not None and item.bundle_id == served.bundle_id and item.id == ids[row]
        np.testing.assert_array_equal(item.input, pictures(shade)[0])
        assert item.prediction == (shade > 127) and item.confidence < THRESHOLD
    assert infer(served.url, 0, 255)["parameters"] == {"deferred": "[false,false]"}


def test_the_threshold_can_be_looked_up(served: endpoint.Endpoint) -> None:
    said = call(served.url, "GET", "/v2/models/light/config")[1]["parameters"]
    assert said == {"deferral_threshold": {"string_value": str(THRESHOLD)}}


def test_requests_that_ran_together_get_their_own_ids(served: endpoint.Endpoint, folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shades = [int(s) for s in np.random.default_rng(0).integers(0, 256, 60)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda s: infer(served.url, s), shades))
    desk = Desk(folder)
    for shade, answer in zip(shades, answers, strict=True):
        doubtful = max(shade, 255 - shade) / 255 < THRESHOLD
        assert answer["parameters"]["deferred"] is doubtful
        if doubtful:
            item = desk.item(*ids_of(answer))
            assert item is not None and item.input.flat[0] == shade


def test_what_is_asked_for_in_bytes_or_as_classes_says_so_too(served: endpoint.Endpoint) -> None:
    answer = infer(served.url, 128, outputs=[{"name": "proba", "parameters": {"classification": 1}}])
    assert answer["outputs"][0]["data"] == ["0.501961:1"] and answer["parameters"]["deferred"] is True


def test_it_is_counted_in_rows(served: endpoint.Endpoint) -> None:
    def count() -> int:
        text = call(served.url, "GET", "/metrics")[1]
        return int(re.search(r'^trilobe_deferred_total\{model="light"\} (\d+)$', text, re.MULTILINE)[1])

    infer(served.url, 128)
    before = count()
    infer(served.url, 128, 0, 130)
    assert count() == before + 2


def test_nothing_of_it_is_a_capture(served: endpoint.Endpoint, folder: Path) -> None:
    infer(served.url, 128)
    assert read_captures(folder / "captures") == [], "the rate is 0, and what is in doubt is no fair sample"


def test_fetching(served: endpoint.Endpoint, folder: Path) -> None:
    (id_,) = ids_of(infer(served.url, 128))
    path = f"/v2/models/light/answers/{id_}"
    assert call(served.url, "GET", path) == (202, {"id": id_, "status": "waiting"})
    desk = Desk(folder)
    said = {"id": id_, "model": "light", "status": "answered", "answer": "é", "confidence": 0.9}
    desk.give(id_, said)
    assert call(served.url, "GET", path) == (200, said)
    desk.done(id_)
    assert call(served.url, "GET", path) == (200, said)
    assert call(served.url, "HEAD", path)[0] == 200
    assert call(served.url, "POST", path)[0] == 405


@pytest.mark.parametrize(
    "id_",
    [
        *(
            "0" * 32,
            "A" * 32,
            "a" * 31,
            "a" * 33,
            "",
            "..",
            "..%2F..%2Fdesired",
            "%2e%2e%2fstate",
            "a%00",
            "%C3%A9" * 16,
        ),
        *("..%2Fanswers%2F" + "a" * 32, "0" * 32 + ".json", "%EF%BC%90" * 32, "0" * 5000),
    ],
)
def test_ids_that_were_never_given_out(served: endpoint.Endpoint, id_: str) -> None:
    status, answer = call(served.url, "GET", f"/v2/models/light/answers/{id_}")
    assert status == 404 and "light" in answer["error"]


def test_our_own_client(served: endpoint.Endpoint, folder: Path) -> None:
    with Client(served.url, "light") as client:
        client.call({"image": pictures(0, 128)})
        empty, id_ = client.deferred
        assert empty == "" and client.answer(id_) is None
        Desk(folder).give(id_, {"id": id_, "status": "answered", "answer": "dark"})
        assert client.answer(id_) == {"id": id_, "status": "answered", "answer": "dark"}
        client.call({"image": pictures(255)})
        assert client.deferred == []
        with pytest.raises(ServeError, match=r"404: 'light' left nothing to people under that id"):
            client.answer("../" + id_)


def test_only_at_its_own_model(served: endpoint.Endpoint) -> None:
    (id_,) = ids_of(infer(served.url, 128))
    for path in (f"/v2/models/dark/answers/{id_}", f"/v2/models/light/versions/1/answers/{id_}", f"/answers/{id_}"):
        assert call(served.url, "GET", path)[0] == 404
    assert call(served.url, "GET", f"/v2/models/light/answers/{id_}/more")[0] == 404


def test_triton_clients_understand_it(served: endpoint.Endpoint) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        for shades, deferred in (((128,), True), ((255,), False), ((0, 128), "[false,true]")):
            images = pictures(*shades)
            sent = triton.InferInput("image", list(images.shape), "UINT8").set_data_from_numpy(images)
            answer = client.infer("light", [sent])
            assert answer.as_numpy("proba").shape == (len(shades), 2)
            assert answer.get_response()["parameters"]["deferred"] == deferred


# --- servers of their own ---------------------------------------------------------------------------------------------


def test_triton_clients_understand_it_over_grpc(tmp_path: Path) -> None:
    triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    from trilobe.infrastructure.serve import bind

    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    start(tmp_path, make_bundle(tmp_path / "b1"), grpc=port)
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            images = pictures(0, 128)
            sent = triton.InferInput("image", list(images.shape), "UINT8").set_data_from_numpy(images)
            parameters = client.infer("light", [sent]).get_response().parameters
            assert parameters["deferred"].string_param == "[false,true]"
            assert Desk(tmp_path).waiting() == [parameters["deferred_ids"].string_param.strip(",")]
            sent = triton.InferInput("image", [1, 2, 3], "UINT8").set_data_from_numpy(pictures(128))
            assert client.infer("light", [sent]).get_response().parameters["deferred"].bool_param is True
    finally:
        endpoint.stop(tmp_path)


def test_kill_9_loses_nothing_that_was_given_an_id(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "b1"))
    ids = [*ids_of(infer(served.url, 128, 129)), *ids_of(infer(served.url, 130))]
    os.kill(served.pid, signal.SIGKILL)
    hold = endpoint.hold_lock(tmp_path, patience=30.0)  # it is gone when its lock is free
    os.close(hold)
    desk = Desk(tmp_path)
    assert desk.waiting() == ids
    assert [desk.item(id_).input.flat[0] for id_ in ids] == [128, 129, 130]  # type: ignore[union-attr]
    again = start(tmp_path, tmp_path / "b1")
    try:
        assert call(again.url, "GET", f"/v2/models/light/answers/{ids[0]}")[0] == 202, "whoever serves next knows them"
    finally:
        endpoint.stop(tmp_path)


def test_workers_share_a_desk(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "b1"), workers=2)
    try:
        ids = [id_ for _ in range(12) for id_ in ids_of(infer(served.url, 128))]
        assert sorted(ids) == Desk(tmp_path).waiting() and len(set(ids)) == 12
        for _ in range(8):
            assert call(served.url, "GET", f"/v2/models/light/answers/{ids[0]}")[0] == 202
    finally:
        endpoint.stop(tmp_path)


def test_a_desk_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "b1"))
    try:
        (tmp_path / "waiting").write_text("no folder")
        for _ in range(2):
            answer = infer(served.url, 128)
            assert answer["parameters"] == {"deferred": True}, "an id that is not kept is not given out"
        (tmp_path / "waiting").unlink()
        assert ids_of(infer(served.url, 128)) == Desk(tmp_path).waiting()
        metrics = call(served.url, "GET", "/metrics")[1]
        assert 'trilobe_deferred_total{model="light"} 3' in metrics
        assert "trilobe_captures_dropped_total 2" in metrics
    finally:
        endpoint.stop(tmp_path)
    assert (tmp_path / "server.log").read_text().count("cannot be written") == 1, "said once"


def test_whoever_may_not_ask_may_not_fetch(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "b1"))
    try:
        (id_,) = ids_of(infer(served.url, 128))
        token = {who: create_token(tmp_path, who, [scope]) for who, scope in (("a", "infer"), ("b", "metrics"))}
    finally:
        endpoint.stop(tmp_path)
    served = start(tmp_path, tmp_path / "b1")
    try:
        path = f"/v2/models/light/answers/{id_}"
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {token['b']}"}, 403)):
            assert call(served.url, "GET", path, headers=headers)[0] == status
        assert call(served.url, "GET", path, headers={"Authorization": f"Bearer {token['a']}"})[0] == 202
    finally:
        endpoint.stop(tmp_path)


def test_a_bundle_that_cannot_promise_it_is_refused(tmp_path: Path) -> None:
    good = make_bundle(tmp_path / "good")
    lax = make_bundle(tmp_path / "lax", {**TABLE, "errors": TABLE["errors"][1:]})
    old = make_bundle(tmp_path / "old", None)
    odd = make_bundle(tmp_path / "odd", {**TABLE, "format": "deferral.v2"})
    served = start(tmp_path, good)
    try:
        for bundle, reason in (
            (
                lax,
                r"cannot promise that at most 0.05 of what it answers are wrong; expected 0.3 or more \(from 100 held",
            ),
            (old, r"does not say whom to trust when; expected deferral.json in it(.|\n)*package its model again"),
            (odd, r"has the format 'deferral.v2'; expected deferral.v1"),
        ):
            with pytest.raises(ServeError, match=reason):
                endpoint.replace(tmp_path, bundle)
            assert endpoint.read_state(tmp_path).bundle_id == served.bundle_id, "the one before serves on"
        assert infer(served.url, 128)["parameters"]["deferred"] is True
    finally:
        endpoint.stop(tmp_path)


def test_where_nothing_is_promised_all_is_as_before(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "old", None), error=0.0)
    try:
        assert "parameters" not in infer(served.url, 128)
        assert call(served.url, "GET", f"/v2/models/light/answers/{'0' * 32}")[0] == 404
    finally:
        endpoint.stop(tmp_path)
    assert not (tmp_path / "waiting").exists()


def test_a_threshold_that_nothing_is_below_still_says_so(tmp_path: Path) -> None:
    served = start(tmp_path, make_bundle(tmp_path / "b1"), error=0.3)
    try:
        assert infer(served.url, 128)["parameters"] == {"deferred": False}
    finally:
        endpoint.stop(tmp_path)


def test_the_doubts_of_a_shadow_are_nobodys(tmp_path: Path) -> None:
    calm = make_bundle(tmp_path / "calm", {**TABLE, "errors": [{**TABLE["errors"][0], "threshold": 0.0}]})  # type: ignore[dict-item]
    served = start(tmp_path, calm)
    try:
        endpoint.replace(tmp_path, make_bundle(tmp_path / "torn"), shadow=True)
        for _ in range(5):
            assert infer(served.url, 128)["parameters"] == {"deferred": False}
    finally:
        endpoint.stop(tmp_path)
    assert Desk(tmp_path).waiting() == []


def test_a_model_without_probabilities_cannot_defer(tmp_path: Path) -> None:
    endpoint.deploy(tmp_path, make_bundle(tmp_path / "b1"))
    script = SCRIPT.replace('"FP32", (-1, 2)', '"FP32", (-1, 2, 1)').replace("axis=1)}", "axis=1)[:, :, None]}")
    run = [sys.executable, "-W", "error", "-c", script, str(tmp_path), "0.05", "1", "0"]
    with pytest.raises(ServeError, match=r"cannot be left to people: the first output is FP32\[-1, 2, 1\]"):
        endpoint.start(tmp_path, "light", run, timeout=60)


def test_what_is_promised_may_change_while_it_runs(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "serve_forever(folder",
        """
from dataclasses import replace
from trilobe.infrastructure.serve.process import Change
choosers, seen = {"0": None, "0.05": chooser(0.05), "0.01": chooser(0.01)}, ""
def look():
    global seen
    said = Path(folder, "error.txt").read_text()
    if said == seen:
        return None
    seen, (error, room) = said, said.split()
    return Change(replace(settings, defer=choosers[error], max_waiting=int(room)), 0.0)
settings = replace(settings, defer=None, look=look)
serve_forever(folder""",
    )
    (tmp_path / "error.txt").write_text("0 9")
    endpoint.deploy(tmp_path, make_bundle(tmp_path / "b1"))
    run = [sys.executable, "-W", "error", "-c", script, str(tmp_path), "0", "1", "0"]
    served = endpoint.start(tmp_path, "light", run, timeout=60)

    def becomes(said: str, expected: Any) -> None:
        (tmp_path / "new").write_text(said)
        (tmp_path / "new").rename(tmp_path / "error.txt")
        deadline = time.monotonic() + 15
        while infer(served.url, 128).get("parameters", {}).get("deferred") is not expected:
            assert time.monotonic() < deadline, f"{said} never held"
            time.sleep(0.05)

    try:
        assert "parameters" not in infer(served.url, 128)
        becomes("0.05 9", True)
        becomes("0.05 1", None)  # the desk is full: answered, and nothing is said of it
        becomes("0.05 9999", True)
        becomes("0.01 9999", True)  # it cannot promise that, and keeps what it could
        while not (state := endpoint.read_state(tmp_path)).error:
            time.sleep(0.05)
        assert "cannot promise that at most 0.01 of what it answers are wrong" in state.error
        assert state.state == "ready" and infer(served.url, 128)["parameters"]["deferred"] is True
        becomes("0 9999", None)
        while endpoint.read_state(tmp_path).error:  # what it asks for is done before it is said
            time.sleep(0.05)
    finally:
        endpoint.stop(tmp_path)


def test_two_promises_at_once_cannot_be_kept() -> None:
    code = "from trilobe.infrastructure.deferral import chooser; chooser(0.1, 0.1)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected one of them" in said.stderr
