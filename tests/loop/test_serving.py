"""``serve``: what stands behind an endpoint is what the settings say, also when they change."""

import json
import shutil
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

from trilobe import loop
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.serve.logs import ACCESS


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
