"""The same server on Ray: replicas answer what one process answers, and a redeployment fails nobody."""

from pathlib import Path

import numpy as np
import pytest

from support.clusters import cluster
from support.lines import line, load
from trilobe.errors import ConfigError, ServeError
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve import Settings, bind
from trilobe.infrastructure.serve.access import create_token
from trilobe.infrastructure.serve.on_ray import start_on_ray


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
        with pytest.raises(ServeError, match="Ray does not serve"):
            start_on_ray("lines", load, {"": Wish(str(tmp_path / "nothing"))}, port=port)
        serve.shutdown()
