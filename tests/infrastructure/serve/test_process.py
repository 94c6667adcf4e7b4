"""Versions and workers of a real server: canaries, shadows, load and unload, workers that die, hang or grow."""

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.lines import line
from trilobe.errors import ServeError, TrilobeError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client

Start = Callable[..., endpoint.Endpoint]
ONES = np.ones((1, 3), np.float32)


def fetch(url: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else b"")
        response = connection.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode()
    finally:
        connection.close()


def ask(served: endpoint.Endpoint, name: str = "lines", n: int = 1) -> Counter[float]:
    with Client(served.url, name) as client:
        return Counter(float(client.call({"x": ONES})["y"][0, 0]) for _ in range(n))


def wait(done: Callable[[], Any], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.05)


def metric(url: str, start: str) -> float:
    lines = fetch(url, "GET", "/metrics")[1].splitlines()
    return sum(float(text.split()[-1]) for text in lines if text.startswith(start))


class Load:
    """Clients that never pause; what they got and what failed."""

    def __init__(self, url: str, name: str = "lines", clients: int = 3) -> None:
        self.answers: Counter[float] = Counter()
        self.failures: list[str] = []
        self.enough = threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(url, name)) for _ in range(clients)]

    def client(self, url: str, name: str) -> None:
        with Client(url, name) as client:
            while not self.enough.is_set():
                try:
                    self.answers[float(client.call({"x": ONES})["y"][0, 0])] += 1
                except TrilobeError as error:
                    self.failures.append(str(error))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        for thread in self.threads:
            thread.join()


def test_a_canary_gets_its_share_and_takes_over(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "old"))
    folder, new = tmp_path / "endpoint", line(4, tmp_path / "new")
    with pytest.raises(ServeError, match="nothing is served as 'other' yet"):
        endpoint.deploy(folder, new, "other", canary=0.5)
    before = served.bundle_id
    assert endpoint.replace(folder, new, canary=0.25).bundle_id == before, "the name still stands for the old one"
    assert ask(served, n=40) == {1.0: 30, 2.0: 10}, "exactly its share"
    state = endpoint.read_state(folder).models["lines"]
    assert state.share == 0.25 and state.canary in state.versions and len(state.versions) == 2
    connection_versions = fetch(served.url, "GET", "/v2/models/lines")[1]["versions"]
    assert set(connection_versions) == set(state.versions)
    body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}]}
    status, answer = fetch(served.url, "POST", f"/v2/models/lines/versions/{state.canary}/infer", body)
    assert status == 200 and answer["model_version"] == state.canary and answer["outputs"][0]["data"][0] == 2.0
    after = endpoint.replace(folder, new)
    assert after.bundle_id == state.canary and ask(served, n=8) == {2.0: 8}
    assert endpoint.read_state(folder).models["lines"].versions == (state.canary,), "the old one was let go"


def test_a_shadow_is_asked_and_never_heard(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "old"))
    endpoint.replace(tmp_path / "endpoint", line(4, tmp_path / "new"), shadow=True)
    assert ask(served, n=20) == {1.0: 20}
    wait(lambda: metric(served.url, "trilobe_shadow_total") == 20)
    shadow = endpoint.read_state(tmp_path / "endpoint").models["lines"].shadow
    assert metric(served.url, f'nv_inference_count{{model="lines",version="{shadow}"}}') == 20


def test_models_are_loaded_and_unloaded_by_those_who_may(start: Start, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    line(6, tmp_path / "shelf" / "six")
    served = start(line(2, tmp_path / "b"), f"repository=Path({str(tmp_path / 'shelf')!r})")
    url = served.url
    assert [row["state"] for row in fetch(url, "POST", "/v2/repository/index")[1]] == ["READY"]
    assert fetch(url, "POST", "/v2/repository/models/six/load")[0] == 200
    assert ask(served, "six") == {3.0: 1} and ask(served) == {1.0: 1}
    for bad in ("nope", "..%2Fb", "%2e%2e"):
        status, answer = fetch(url, "POST", f"/v2/repository/models/{bad}/load")
        assert status == 404 and "to load" in answer["error"]
    assert fetch(url, "POST", "/v2/repository/models/six/unload")[0] == 200
    assert fetch(url, "GET", "/v2/models/six/ready")[0] == 404
    rows = {row["name"]: row["state"] for row in fetch(url, "POST", "/v2/repository/index")[1]}
    assert rows == {"lines": "READY", "six": "UNAVAILABLE"}
    assert fetch(url, "POST", "/v2/repository/models/six/load")[0] == 200 and ask(served, "six") == {3.0: 1}
    (tmp_path / "shelf" / "six" / "model.onnx").write_bytes(b"")
    status, answer = fetch(url, "POST", "/v2/repository/models/six/load")
    assert status == 400 and "model.onnx has 0 bytes" in answer["error"]
    assert ask(served, "six") == {3.0: 1}, "what was loaded answers on"


def test_two_workers_share_socket_metrics_and_swaps(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "old"), "workers=2")
    folder = tmp_path / "endpoint"
    assert endpoint.read_state(folder).workers["alive"] == 2
    with Load(served.url) as load:
        for i in range(4):
            time.sleep(0.2)
            endpoint.replace(folder, line(4 if i % 2 == 0 else 2, tmp_path / f"b{i}"))
    assert load.failures == [] and set(load.answers) == {1.0, 2.0}
    assert metric(served.url, "nv_inference_count") == sum(load.answers.values()), "whoever is asked knows all"
    assert fetch(served.url, "GET", "/v2/health/ready")[0] == 200
    assert endpoint.stop(folder).state == "stopped"


def test_a_killed_worker_is_replaced_and_the_others_answer(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "b"), "workers=2")
    folder = tmp_path / "endpoint"
    pids = [int(path.stem) for path in (folder / "workers").glob("*.json")]
    with Load(served.url, clients=4) as load:
        time.sleep(0.3)
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(1.5)
    # A connection that the killed worker held is gone with it; the client's own second attempt finds another.
    assert load.failures == [] and sum(load.answers.values()) > 100
    wait(lambda: endpoint.read_state(folder).workers == {"alive": 2, "restarts": 1})
    assert pids[0] not in {int(path.stem) for path in (folder / "workers").glob("*.json")}
    assert metric(served.url, "nv_inference_count") >= sum(load.answers.values()), "what the dead had counted counts"
    os.kill(served.pid, 0)


HANGS = """
def odd(x):
    if x[0, 0] < 0:
        time.sleep(3600)
    return {"y": x}
step = function({"x": "FP32[-1,3]"}, {"y": "FP32[-1,3]"})(odd)
hangs = graph("hangs", {"x": "FP32[-1,3]"}, {"y": "odd.y"}, {"odd": Node(step, {"x": "x"})})
"""


def test_a_worker_whose_steps_hang_makes_room_for_another(start: Start, tmp_path: Path) -> None:
    options = 'workers=2, threads=2, flows=(hangs,), batching={"odd": Batching(where="threads", limit=0.2)}'
    served = start(line(2, tmp_path / "b"), options, HANGS)
    folder = tmp_path / "endpoint"
    with Load(served.url, clients=2) as load, Client(served.url, "hangs") as client:
        for _ in range(8):
            with pytest.raises(ServeError, match=r"did not finish within 0\.2 s|does not answer"):
                client.call({"x": -ONES})
            if endpoint.read_state(folder).workers.get("restarts"):
                break
        wait(lambda: endpoint.read_state(folder).workers.get("restarts", 0) >= 1)
        assert client.call({"x": ONES})["y"].tolist() == [[1.0] * 3]
    assert load.failures == [] and len(load.answers) == 1


LEAKS = """
kept = []
def leak(x):
    kept.append(np.ones(2_000_000))
    return {"y": x}
step = function({"x": "FP32[-1,3]"}, {"y": "FP32[-1,3]"})(leak)
leaks = graph("leaks", {"x": "FP32[-1,3]"}, {"y": "s.y"}, {"s": Node(step, {"x": "x"})})
"""


def test_a_worker_that_grows_too_large_is_replaced_without_a_failed_request(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "b"), "workers=2, flows=(leaks,), max_memory=300_000_000", LEAKS)
    folder = tmp_path / "endpoint"
    with Load(served.url, clients=2) as load, Client(served.url, "leaks") as client:
        deadline = time.monotonic() + 30
        while endpoint.read_state(folder).workers.get("restarts", 0) == 0 and time.monotonic() < deadline:
            assert client.call({"x": ONES})["y"].tolist() == [[1.0] * 3]
    assert load.failures == []
    assert endpoint.read_state(folder).workers["restarts"] >= 1


def test_workers_that_cannot_begin_say_why(start: Start, tmp_path: Path) -> None:
    bad = line(2, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    with pytest.raises(ServeError, match=r"failed to load|is not ready"):
        start(bad, 'workers=2, flows=(graph("g", {"x": "FP32[-1,3]"}, {"y": "a.y"}, {"a": Node("nope", {"x": "x"})}),)')
    assert manifest["id"] in endpoint.read_state(tmp_path / "endpoint").bundle_id
    assert "calls the model 'nope', which is not served" in endpoint.read_state(tmp_path / "endpoint").error


def test_captures_of_all_workers_are_kept(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "b"))
    ask(served, n=5)
    endpoint.stop(tmp_path / "endpoint")
    assert read_captures(tmp_path / "endpoint" / "captures") == [], "the rate of this server is 0"


LOOK = """
from trilobe.infrastructure.serve.process import Change
from trilobe.errors import ConfigError
seen = ""
def look():
    global seen
    text = Path(sys.argv[1], "settings.txt").read_text()
    if text == seen:
        return None
    seen, (rows, memory, *behind) = text, text.split()
    if not rows.isdigit():
        raise ConfigError(f"max_batch = {rows}")
    how = Settings(workers=WORKERS, batching={"": Batching(int(rows))}, max_memory=int(memory), look=look)
    return Change(how, 0.0, tuple(behind))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_settings_that_change_hold_at_the_next_look(start: Start, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "endpoint"
    folder.mkdir()
    settings = folder / "settings.txt"
    settings.write_text("5 0")
    served = start(line(2, tmp_path / "b"), f"workers={workers}, look=look", LOOK.replace("WORKERS", str(workers)))

    def change(text: str) -> None:
        (folder / "new").write_text(text)
        (folder / "new").rename(settings)

    def rows() -> set[int]:  # several connections: any worker may accept one
        return {fetch(served.url, "GET", "/v2/models/lines/config")[1]["max_batch_size"] for _ in range(8)}

    def notice() -> str:
        return endpoint.read_state(folder).notice

    wait(lambda: rows() == {5})
    with Load(served.url) as load:
        change("7 0")
        wait(lambda: rows() == {7})
        change("many 0")
        wait(lambda: notice() == "the settings of before hold: max_batch = many")
        time.sleep(0.5)
        assert workers > 1 or rows() == {7}, "of several, one may have looked too late to see the 7"
        change("9 0 serve.port serve.workers")
        wait(lambda: rows() == {9})
        wait(lambda: notice() == "changed since start: serve.port, serve.workers; restart to apply")
        change("9 0")
        wait(lambda: notice() == "")
    assert load.failures == [] and set(load.answers) == {1.0}
    log = (folder / "server.log").read_text().splitlines()
    assert log == [
        "the settings of before hold: max_batch = many",
        "changed since start: serve.port, serve.workers; restart to apply",
    ], "each is said once"
    if workers > 1:
        change("9 1000000")
        wait(lambda: endpoint.read_state(folder).workers["restarts"] > 0, 30)
        change("9 0")


ALIVE = """
import weakref
plain, made = load, []
def load(bundle):
    servable = plain(bundle)
    made.append(weakref.ref(servable.pipeline))
    return servable
def count(x):
    return {"y": x * 0 + sum(ref() is not None for ref in made)}
step = function({"x": "FP32[-1,3]"}, {"y": "FP32[-1,3]"})(count)
alive = graph("alive", {"x": "FP32[-1,3]"}, {"y": "s.y"}, {"s": Node(step, {"x": "x"})})
"""


def test_what_was_replaced_leaves_memory(start: Start, tmp_path: Path) -> None:
    served = start(line(2, tmp_path / "b0"), "flows=(alive,)", ALIVE)
    folder = tmp_path / "endpoint"
    endpoint.replace(folder, line(4, tmp_path / "b1"), shadow=True)
    assert ask(served, "alive") == {2.0: 1}
    with Load(served.url) as load:
        for i in range(2, 5):
            endpoint.replace(folder, line(2 * i, tmp_path / f"b{i}"))
    assert load.failures == []
    wait(lambda: ask(served, "alive") == {1.0: 1})
