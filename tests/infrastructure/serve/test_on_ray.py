"""The same server on Ray: replicas answer what one process answers, and a redeployment fails nobody."""

import asyncio
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from support.clusters import cluster
from support.lines import line, load
from trilobe.errors import ConfigError, ServeError, UsageError
from trilobe.infrastructure.bundle import open_bundle, read_bytes, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.deferral import chooser
from trilobe.infrastructure.desk import Desk
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve import Settings, bind
from trilobe.infrastructure.serve.access import Gate, create_token
from trilobe.infrastructure.serve.on_ray import _make, start_on_ray


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ray import serve

    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with cluster():
        wish = Wish(str(line(4, tmp_path / "b")))
        url = start_on_ray("lines", load, {"": wish}, port=port, settings=Settings(workers=2))
        with Client(url, "lines") as client:
            for n in (1, 2, 5):
                x = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
                np.testing.assert_allclose(client.call({"x": x})["y"], 2 * x)
            assert client.ready() and client.metadata()["name"] == "lines"
        start_on_ray("lines", load, {"": Wish(str(line(6, tmp_path / "b2")))}, port=port)
        with Client(url, "lines") as client:
            np.testing.assert_allclose(client.call({"x": np.ones((1, 3), np.float32)})["y"], [[3.0] * 3])
        token = create_token(tmp_path, "web", ["infer"])
        start_on_ray("lines", load, {"": wish}, port=port, folder=tmp_path)
        with Client(url, "lines") as client, pytest.raises(ServeError, match="401"):
            client.call({"x": np.ones((1, 3), np.float32)})
        with Client(url, "lines", token=token) as client:
            np.testing.assert_allclose(client.call({"x": np.ones((1, 3), np.float32)})["y"], [[2.0] * 3])
        with pytest.raises(ConfigError, match="would let everybody"):
            start_on_ray("lines", load, {"": wish}, host="0.0.0.0", port=port)
        leaves_to_people(tmp_path, port)
        with pytest.raises(ServeError, match="Ray does not serve"):
            start_on_ray("lines", load, {"": Wish(str(tmp_path / "nothing"))}, port=port)
        serve.shutdown()


def leaves_to_people(tmp_path: Path, port: int) -> None:
    """What is in doubt waits at the endpoint's desk, whichever replica was asked; answers are fetched from any."""
    plain = open_bundle(line(2, tmp_path / "b3"))
    files = {name: read_bytes(plain, name) for name in plain.manifest["files"]}
    errors = [{"at_most": 0.05, "threshold": 0.75, "answered": 0.7, "error": 0.01, "error_high": 0.04}]
    table = {"format": "deferral.v1", "on": "test part", "n": 100, "certainty": 0.95, "errors": errors}
    path = write_bundle(tmp_path / "b4", {**files, "deferral.json": json.dumps(table).encode()}, "m", {}).path
    folder = tmp_path / "endpoints" / "lines"
    settings = Settings(workers=2, defer=chooser(0.05))
    url = start_on_ray("lines", load, {"": Wish(str(path))}, port=port, settings=settings, folder=folder)
    with Client(url, "lines") as client:
        for _ in range(6):
            client.call({"x": np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1]], np.float32)})
            sure, id_ = client.deferred
            assert sure == "" and Desk(folder).waiting()[-1] == id_ and client.answer(id_) is None
        Desk(folder).give(id_, {"id": id_, "status": "answered", "answer": "two"})
        assert [client.answer(id_) for _ in range(4)] == [{"id": id_, "status": "answered", "answer": "two"}] * 4
    with pytest.raises(ServeError, match="Ray does not serve"):  # it cannot promise that
        start_on_ray(
            "lines", load, {"": Wish(str(path))}, port=port, settings=Settings(defer=chooser(0.01)), folder=folder
        )


def test_what_ray_cannot_do_is_said_before_it_starts() -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    with pytest.raises(UsageError, match="left to people"):
        start_on_ray("lines", load, {}, settings=Settings(defer=chooser(0.05)))
    with pytest.raises(ConfigError, match="Ray's proxy speaks HTTP"):
        start_on_ray("lines", load, {}, settings=Settings(tls=(Path("cert"), Path("key"), None)))


def test_a_replica_that_does_not_find_the_desk_does_not_start(tmp_path: Path) -> None:
    making = _make(
        "lines", load, {}, None, 0.0, 1000, Settings(defer=chooser(0.05)), partial(Gate, None), tmp_path / "x"
    )
    with pytest.raises(ServeError, match="which is not on this node"):
        asyncio.run(making)
