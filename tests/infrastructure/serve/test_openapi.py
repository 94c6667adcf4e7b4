"""The description of the server, held against the server: schemathesis makes requests from it, good and bad ones."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.pipeline import DATATYPES, TensorSpec
from trilobe.infrastructure.serve.openapi import describe, example
from trilobe.infrastructure.serve.protocol import Reader

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import Settings, serve_forever

folder = Path(sys.argv[1])

def load(bundle):
    if read_json(bundle, "preprocessing.json"):
        specs, out = (TensorSpec("image", "UINT8", (-1, 5, 5)),), TensorSpec("mean", "FP64", (-1,))
        run = lambda data: {"mean": data["image"].mean(axis=(1, 2))}
        warm = {"image": np.zeros((1, 5, 5), np.uint8)}
    else:
        specs = TensorSpec("text", "BYTES", (-1,)), TensorSpec("limit", "INT32", (-1,))
        out = TensorSpec("length", "INT32", (-1,))
        run = lambda data: {"length": np.minimum([len(t) for t in data["text"]], data["limit"]).astype(np.int32)}
        warm = {"text": np.array([b"words"], object), "limit": np.ones(1, np.int32)}
    return Servable(Pipeline([("run", run)]), specs, (out,), warm)

serve_forever(folder, "words", load, captures=folder / "captures", settings=Settings(repository=folder / "repository"))
"""


IMAGE, MEAN = TensorSpec("image", "UINT8", (-1, 5, 5)), TensorSpec("mean", "FP64", (-1,))


class Pictures(NamedTuple):
    """What the second model is, as far as its description goes."""

    id: str
    name: str = "pictures"
    inputs: tuple[TensorSpec, ...] = (IMAGE,)
    outputs: tuple[TensorSpec, ...] = (MEAN,)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("described")
    for name, what in (("words", b"{}"), ("pictures", b'{"pictures": true}')):
        files = {**dict.fromkeys(REQUIRED_FILES, b"{}"), "preprocessing.json": what}
        bundle = write_bundle(folder / "repository" / name, files, name, {})
        endpoint.deploy(folder, bundle.path, "" if name == "words" else name)
    yield endpoint.start(folder, "words", [sys.executable, "-W", "error", "-c", SCRIPT, str(folder)], timeout=60).url
    endpoint.stop(folder)
    log = (folder / "server.log").read_text()
    assert log == "", "whatever is asked, nothing of it is the server's own fault"


def test_the_server_sends_its_description(served: str) -> None:
    with urllib.request.urlopen(f"{served}/v2/openapi.json", timeout=10) as answer:
        assert answer.headers["content-type"] == "application/json"
        said = json.load(answer)
    (where,) = (path for path in said["paths"] if path.startswith("/v2/models/pictures/versions/") and "infer" in path)
    expected = json.loads(json.dumps(describe([Pictures(where.split("/")[5])])))
    assert {path: said["paths"][path] for path in expected["paths"]} == expected["paths"]
    assert set(said["paths"]) - set(expected["paths"]) and said["components"] == expected["components"]


ANY = [TensorSpec(kind, kind, (-1, 3)[: 1 + i % 2]) for i, kind in enumerate(DATATYPES)]


def test_the_example_of_any_model_is_accepted_and_fits_its_schema() -> None:
    class Every(NamedTuple):
        name: str = "every"
        id: str = "1"
        inputs: tuple[TensorSpec, ...] = tuple(ANY)
        outputs: tuple[TensorSpec, ...] = tuple(ANY)

    made = example(Every())
    call = Reader(ANY, ANY).parse(json.dumps(made).encode(), {})
    assert set(call.inputs) == {spec.name for spec in ANY} and call.rows == 1
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    body = describe([Every()])["paths"]["/v2/models/every/infer"]["post"]["requestBody"]["content"]
    validator = jsonschema.Draft202012Validator(body["application/json"]["schema"])
    validator.validate(made)
    wrongs: list[dict[str, Any]] = [{"shape": [0] * 9}, {"datatype": "IMAGE"}, {"name": "nope"}, {"data": [None]}]
    for i, tensor in enumerate(made["inputs"]):
        wrong = wrongs[i % len(wrongs)]
        bad = {"inputs": [{**t, **(wrong if t is tensor else {})} for t in made["inputs"]]}
        assert not validator.is_valid(bad), (tensor, wrong)


def hold_against(url: str, folder: Path, *options: str) -> None:
    """Everything schemathesis knows to check: examples, coverage of the schema, random data good and bad."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/v2/openapi.json", "--seed", "1", "--no-color",
               "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_inference_does_what_is_described(served: str, tmp_path: Path) -> None:
    """A schema cannot say that there are as many data as the shape says: what fits it may still be refused."""
    unsaid = "--exclude-checks", "positive_data_acceptance"
    hold_against(served, tmp_path, "--include-path-regex", "infer$", "--max-examples", "20", *unsaid)


def test_everything_else_does_what_is_described(served: str, tmp_path: Path) -> None:
    hold_against(served, tmp_path, "--exclude-path-regex", "infer$", "--max-examples", "10")
