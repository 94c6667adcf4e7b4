"""The dashboard and the alerts against a real server under load, scraped by a real Prometheus: what they ask is there.

How rules behave on series that are made up, and the shape of the files, is tested in ``test_metrics.py``.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support import light
from trilobe.errors import ServeError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.serve import bind
from trilobe.infrastructure.serve.access import create_token
from trilobe.infrastructure.serve.grpc import SERVICE

DASHBOARDS = Path(str(files("trilobe.infrastructure.serve") / "dashboards"))
PROMETHEUS = shutil.which("prometheus")
SCRIPT = (
    light.SCRIPT
    + """
import time
from trilobe.infrastructure.serve import Node, Settings, function, graph, serve_forever

folder = Path(sys.argv[1])

@function({"image": "UINT8[-1,-1,-1]"}, {"image": "UINT8[-1,-1,-1]"})
def dim(image):
    time.sleep(0.02)
    return {"image": image // 2}

night = graph("night", {"image": "UINT8[-1,-1,-1]"}, {"proba": "light.proba"},
              {"dim": Node(dim, {"image": "image"}), "light": Node("light", {"image": "dim.image"})})
serve_forever(folder, "light", load, captures=folder / "captures",
              settings=Settings(workers=2, flows=(night,), defer=chooser(0.05), max_waiting=3,
                                grpc_port=int(sys.argv[2])))
"""
)
CLIENTS = (("prometheus", "metrics", 0), ("web", "infer", 0), ("batch", "infer", 1))
TABLE = {
    "format": "deferral.v1", "on": "held-out test part", "n": 100, "certainty": 0.95, "shares": [],
    "errors": [{"at_most": 0.05, "threshold": 0.75, "answered": 0.7, "error": 0.01, "error_high": 0.04}],
}  # fmt: skip


def bundle(path: Path) -> Path:
    named = {"README.md": path.name.encode(), "deferral.json": json.dumps(TABLE).encode()}
    return write_bundle(path, dict.fromkeys(REQUIRED_FILES, b"{}") | named, "m", {}).path


def wait(done: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.1)


class Busy(NamedTuple):
    """Where a server is, and the tokens of who may look at it and of who may ask it; the last not twice at once."""

    url: str
    grpc: str
    prometheus: str
    web: str
    batch: str


def keep_busy(server: Busy, enough: threading.Event) -> None:
    """What a day brings: clear answers, one in doubt, a pipeline, and a request that is wrong."""
    with Client(server.url, "light", token=server.web) as light:
        while not enough.is_set():
            for shade in (0, 128, 255):
                light.call({"image": np.full((1, 2, 3), shade, np.uint8)})
            with pytest.raises(ServeError):
                light.call({"image": np.zeros((1, 2), np.uint8)})
            time.sleep(0.02)


def keep_asking(server: Busy, enough: threading.Event) -> None:
    """One of two who share a token that is good for one request at a time."""
    with Client(server.url, "night", token=server.batch) as night:
        while not enough.is_set():
            try:
                night.call({"image": np.full((2, 2, 3), 200, np.uint8)})
            except ServeError as error:
                assert "429" in str(error)
            time.sleep(0.02)


def keep_greeting(server: Busy, enough: threading.Event) -> None:
    """Over gRPC, whether it lives."""
    import grpc

    with grpc.insecure_channel(server.grpc) as channel:
        while not enough.is_set():
            channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=20)
            time.sleep(0.1)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    """A server of two workers, with a pipeline, a desk and a shadow, that several clients call all along."""
    pytest.importorskip("grpc", reason="needs grpcio, the extra 'grpc'")
    folder = tmp_path_factory.mktemp("busy")
    endpoint.deploy(folder, bundle(folder / "live"))
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    tokens = [create_token(folder, who, [scope], max_pending=n) for who, scope, n in CLIENTS]
    run = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(port)]
    server = Busy(endpoint.start(folder, "light", run).url, f"127.0.0.1:{port}", *tokens)
    endpoint.replace(folder, bundle(folder / "shadow"), shadow=True)
    enough = threading.Event()
    work = [keep_busy, keep_asking, keep_asking, keep_greeting]
    clients = [threading.Thread(target=target, args=(server, enough)) for target in work]
    for client in clients:
        client.start()
    late = (
        *("shadow_total{", "deferred_total{", "deferral_refused_total{", 'http_responses_total{code="429"}'),
        *("grpc_responses_total{", "token_pending{"),
    )
    wait(lambda: all(f"\ntrilobe_{name}" in metrics(server) for name in late))
    yield server
    enough.set()
    for client in clients:
        client.join()
    endpoint.stop(folder)


def metrics(server: Busy) -> str:
    asked = urllib.request.Request(f"{server.url}/metrics", headers={"authorization": f"Bearer {server.prometheus}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def panels() -> list[Any]:
    shown: list[Any] = json.loads((DASHBOARDS / "grafana.json").read_text("utf-8"))["panels"]
    return [panel for panel in shown if panel["type"] != "row"]


def queries() -> list[tuple[str, str, str]]:
    """Title, query with Grafana's variables filled in, and legend, of everything the dashboard draws."""
    return [
        (
            panel["title"],
            re.sub(r"\$(job|model|version)\b", ".*", target["expr"].replace("$__rate_interval", "10s")),
            target.get("legendFormat", ""),
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def test_every_metric_that_is_asked_for_is_there_with_the_labels_that_are_matched(busy: Busy) -> None:
    series = re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", metrics(busy), re.MULTILINE)
    there = {name: {*re.findall(r'(\w+)="', labels)} | {"job", "instance"} for name, labels in series}
    text = " ".join([*(query for _, query, _ in queries()), (DASHBOARDS / "alerts.yml").read_text("utf-8")])
    asked = re.findall(r"\b((?:nv|trilobe)_\w+)(?:\{([^}]*)\})?", text)
    assert len({name for name, _ in asked}) > 25
    for name, matched in asked:
        assert name in there, f"no {name} in a busy server"
        assert {*re.findall(r"(\w+)=", matched)} <= there[name], f"{name}{{{matched}}} has {there[name]}"


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    for panel in panels():
        field = panel["fieldConfig"]["defaults"]
        assert field["unit"] in {"reqps", "s", "percentunit", "short", "bytes"}, panel["title"]
        assert len(panel["title"]) > 3 and panel.get("description", "").endswith("."), panel["title"]
        several = len(panel["targets"]) > 1 or re.search(r"\bby \((?!le\))", panel["targets"][0]["expr"])
        for target in panel["targets"]:
            assert target.get("legendFormat") or not several, f"{panel['title']}: lines without names"


@pytest.fixture
def prometheus(busy: Busy, tmp_path: Path) -> Iterator[str]:
    """A Prometheus that scrapes the busy server each half second, and holds it against the alert rules."""
    if PROMETHEUS is None:
        pytest.skip("needs prometheus, the Debian package")
    target = busy.url.removeprefix("http://")
    scrape = {
        "job_name": "trilobe",
        "static_configs": [{"targets": [target]}],
        "authorization": {"credentials": busy.prometheus},
    }
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"},
        "rule_files": [str(DASHBOARDS / "alerts.yml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        at = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [PROMETHEUS, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
               f"--web.listen-address={at}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://{at}"
    process.terminate()
    process.wait()


def ask(url: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.loads(answer.read())["data"]


def answers(url: str, query: str) -> list[tuple[dict[str, str], float]]:
    return [(s["metric"], float(s["value"][1])) for s in ask(url, "query", query=query)["result"]]


def scraped(url: str, times: int) -> bool:
    try:
        found = answers(url, "count_over_time(trilobe_step_queue_duration_seconds_count[1m])")
    except (urllib.error.URLError, ConnectionError):
        return False
    return bool(found) and found[0][1] >= times


@pytest.mark.slow
def test_a_prometheus_finds_figures_and_names_for_every_line_and_every_alert(prometheus: str) -> None:
    wait(lambda: scraped(prometheus, 5))
    for title, query, legend in queries():
        found = answers(prometheus, query)
        assert found, f"{title}: nothing for {query}"
        assert all(figure == figure for _, figure in found), f"{title}: {found} for {query}"
        for labels, _ in found:
            assert {*re.findall(r"\{\{(\w+)\}\}", legend)} <= labels.keys(), f"{title}: {legend} of {labels}"
    wait(lambda: all(rule["health"] == "ok" for rule in rules(prometheus)))
    for rule in rules(prometheus):
        asked = re.sub(r" (==|<|>) ", r" \1 bool ", rule["query"])  # what it compares, whether or not it is too much
        found = answers(prometheus, asked)
        assert found or "absent(" in asked, f"{rule['name']}: nothing for {asked}"
        for labels, _ in found:
            named = {*re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))}
            assert named <= labels.keys(), f"{rule['name']} speaks of {named}, and has {labels}"
        full = rule["name"] == "TrilobeDeskFull"  # nobody answers here what is left to people
        assert full or rule["state"] != "firing", f"{rule['name']} fires on a healthy server"


def rules(url: str) -> list[Any]:
    [group] = ask(url, "rules")["groups"]
    found: list[Any] = group["rules"]
    return found
