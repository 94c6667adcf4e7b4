"""``serve``: what stands behind an endpoint is what the settings say, also when they change."""

import json
import shutil
import time
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from trilobe import loop
from trilobe.config import BatchingSection, PipelineSection, ServeSection
from trilobe.errors import ConfigError
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.serve import Batching
from trilobe.infrastructure.serve.logs import ACCESS
from trilobe.loop import project, serving
from trilobe.loop.serving import LIVE


def test_what_the_settings_no_longer_name_is_no_longer_served(trained, monkeypatch) -> None:
    trained.set("check", "gates", "{}")
    bundle = loop.package(trained.folder)
    shutil.copytree(bundle.path, trained.folder / "beside")
    trained.set("serve.models", "twin", '"beside"')  # begins at the project's folder
    monkeypatch.chdir("/")
    try:
        url = loop.serve(project=trained.folder, background=True).url
        with Client(url, "twin") as client:
            assert client.ready()
        loop.serve(project=trained.folder, stop=True)
        text = (trained.folder / "trilobe.toml").read_text()
        (trained.folder / "trilobe.toml").write_text(text.replace('twin = "beside"', ""))
        url = loop.serve(project=trained.folder, background=True).url
        with Client(url, "twin") as client:
            assert not client.ready()
        with loop.opened(trained.folder) as p:
            folder = p.endpoint_folder("tiny")
        assert list(endpoints.read_desired(folder).models) == [""]
    finally:
        loop.serve(project=trained.folder, stop=True)


def test_show_says_why_a_model_does_not_answer(trained) -> None:
    trained.set("check", "gates", "{}")
    bundle = loop.package(trained.folder)
    broken = trained.folder / "broken"
    shutil.copytree(bundle.path, broken)
    trained.set("serve.models", "twin", '"broken"')
    try:
        loop.serve(project=trained.folder, background=True)
        assert "why" not in loop.show(project=trained.folder)["endpoints"][0]
        with loop.opened(trained.folder) as p:
            folder = p.endpoint_folder("tiny")
        state = endpoints.read_state(folder)
        (broken / "model.onnx").write_bytes(b"")
        endpoints.wish_for(folder, lambda models: {**models, "late": endpoints.Wish(str(broken))})
        while endpoints.read_state(folder).deployment == state.deployment:
            time.sleep(0.02)
        assert "late: " in loop.show(project=trained.folder)["endpoints"][0]["why"]
    finally:
        loop.serve(project=trained.folder, stop=True)


def test_a_line_of_json_for_each_request_with_the_id_that_its_answer_carries(trained) -> None:
    trained.set("check", "gates", "{}")
    loop.package(trained.folder)
    trained.set("serve", "log", '"json"')
    trained.set("serve", "log_share", "1.0")
    url = loop.serve(project=trained.folder, background=True).url
    try:
        host, given = urlsplit(url).netloc, []
        for headers in ({}, {"x-request-id": "a-17"}):
            connection = HTTPConnection(host, timeout=20)
            connection.request("POST", "/v2/models/tiny/infer", b"{}", headers)  # no input: 400
            answer = connection.getresponse()
            given.append((answer.headers["x-request-id"], answer.status))
            connection.close()
        with loop.opened(trained.folder) as p:
            log = p.endpoint_folder("tiny") / "server.log"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        said = [(line["request_id"], line["status"]) for line in lines if line["logger"] == ACCESS]
        assert said == given and given[1] == ("a-17", 400) and len(given[0][0]) == 32
    finally:
        loop.serve(project=trained.folder, stop=True)


def test_settings_follow_the_file_while_it_runs(trained) -> None:
    trained.set("check", "gates", "{}")
    loop.package(trained.folder)
    trained.set("serve", "capture", "0.0")
    url = loop.serve(project=trained.folder, background=True).url
    with loop.opened(trained.folder) as p:
        folder, captures, settings = p.endpoint_folder("tiny"), p.captures, trained.folder / "trilobe.toml"

    def change(**values: str) -> None:
        whole = trained.folder / "whole.toml"
        original = settings.read_text()
        for key, value in values.items():
            trained.set("serve", key, value)
        whole.write_text(settings.read_text())  # what a server reads of a file that is being written may be half of it
        settings.write_text(original)
        whole.replace(settings)

    def wait(done) -> None:
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline, (endpoints.read_state(folder), loop.show(project=trained.folder))
            time.sleep(0.02)

    def ask(path: str, body: bytes | None = None) -> dict:
        with urlopen(Request(f"{url}/v2/models/tiny/{path}", body), timeout=20) as answer:
            return json.load(answer)

    def listed() -> dict:
        return loop.show(project=trained.folder)["endpoints"][0]

    image = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": [0] * 64}
    request = json.dumps({"inputs": [image]}).encode()
    try:
        assert ask("config")["max_batch_size"] == 64 and "settings" not in listed()
        ask("infer", request)
        change(max_batch="7", capture="1.0", log_share="1.0", delay="0.001")
        wait(lambda: ask("config")["max_batch_size"] == 7)
        assert ask("config")["dynamic_batching"]["max_queue_delay_microseconds"] == 1000
        ask("infer", request)
        change(port="1", max_batch="9", threads="3", webhook='"https://localhost/x"')
        wait(lambda: ask("config")["max_batch_size"] == 9)
        wait(lambda: listed().get("settings") == "changed since start: serve.port, serve.threads; restart to apply")
        change(defer_error="0.1", defer_share="0.1")
        wait(lambda: "the settings of before hold: defer_error = 0.1" in endpoints.read_state(folder).notice)
        change(defer_error="0.0", max_batch='"none"')
        wait(lambda: 'serve.max_batch = "none"' in endpoints.read_state(folder).notice)
        assert ask("config")["max_batch_size"] == 9
        change(max_batch="8", port="0", threads="0", defer_share="0.0")
        wait(lambda: ask("config")["max_batch_size"] == 8)
        wait(lambda: "settings" not in listed())
    finally:
        loop.serve(project=trained.folder, stop=True)
    log = (folder / "server.log").read_text()
    assert log.count("restart to apply") == 1 and log.count("the settings of before hold") == 2
    assert log.count("tiny: 200 in") == 1, "a line for each request, once that was asked for"
    assert len(read_captures(captures)) == 1, "and a capture"


def test_what_was_said_on_the_command_line_stays_whatever_the_file_says(trained) -> None:
    trained.set("check", "gates", "{}")
    bundle = loop.package(trained.folder)
    said: list[str] = []
    endpoint = loop.serve(project=trained.folder, background=True, capture=0.0)
    try:
        with loop.opened(trained.folder) as p, project.listening(lambda message, *_: said.append(message)):
            folder = p.endpoint_folder("tiny")
            trained.set("serve", "capture", "0.5")
            loop.serve(bundle.id, project=trained.folder, capture=0.7)
        time.sleep(0.5)
        assert endpoints.read_state(folder).notice == "" and endpoint.state == "ready"
        assert said[-1] == "it keeps the share that it kept; to change that while it runs, set serve.capture"
    finally:
        loop.serve(project=trained.folder, stop=True)


def test_what_is_live_is_a_setting() -> None:
    assert set(LIVE) < set(ServeSection.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        (
            "kinds",
            {"max_batch": 8},
            r"\[serve.batching.kinds\] is about no model that is served; expected one of: pets, kind",
        ),
        ("kind", {"where": "processes"}, r"auto, inline or threads"),
        ("both", {"max_batch": 8}, r"is about a pipeline; expected a model"),
    ],
)
def test_how_a_model_is_computed_is_said_of_one_that_is_there(name: str, how: dict[str, Any], words: str) -> None:
    models, pipelines = {"kind": "b"}, {"both": PipelineSection(flow="json:loads")}
    section = ServeSection(models=models, pipelines=pipelines, batching={name: BatchingSection(**how)})
    with pytest.raises(ConfigError, match=words):
        serving._of_model(section, name, "pets")
    good = ServeSection(models=models, max_batch=32, batching={"kind": BatchingSection(limit=2.0)})
    assert serving._of_model(good, "kind", "pets") == Batching(max_batch=32, limit=2.0)
