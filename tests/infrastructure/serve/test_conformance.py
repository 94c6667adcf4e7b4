"""Whether the unmodified clients of Triton and of KServe can tell this server from the one they were written for.

The server is a real process with several models; the clients are the packages ``tritonclient`` and, where it is
installed, ``kserve`` (too heavy to be a dependency of the tests), over HTTP and gRPC, blocking and async.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle

triton_http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http,grpc]")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[http,grpc]")
InferenceServerException = triton_http.InferenceServerException

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import Batching, Settings, serve_forever

folder, LABELS = Path(sys.argv[1]), ["red", "green", "blue"]

def colors(factor):
    def shares(data):
        means = data["image"].mean(axis=(1, 2)) * factor + 1
        return {"proba": (means / means.sum(axis=1, keepdims=True)).astype(np.float32)}
    image, proba = TensorSpec("image", "UINT8", (-1, -1, -1, 3)), TensorSpec("proba", "FP32", (-1, 3))
    warm = {"image": np.zeros((1, 4, 4, 3), np.uint8)}
    return Servable(Pipeline([("shares", shares)]), (image,), (proba,), warm, labels={"proba": LABELS})

KINDS = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES".split()

def same():
    ins = tuple(TensorSpec(kind, kind, (-1, 2)) for kind in KINDS)
    outs = tuple(TensorSpec("same_" + kind, kind, (-1, 2)) for kind in KINDS)
    warm = {s.name: np.full((1, 2), b"", object) if s.datatype == "BYTES" else np.zeros((1, 2), s.dtype) for s in ins}
    return Servable(Pipeline([("same", lambda data: {"same_" + kind: data[kind] for kind in KINDS})]), ins, outs, warm)

def slow():
    import time
    def wait(data):
        time.sleep(float(data["seconds"].max()))
        return {"slept": data["seconds"]}
    ins, outs = TensorSpec("seconds", "FP32", (-1, 1)), TensorSpec("slept", "FP32", (-1, 1))
    return Servable(Pipeline([("wait", wait)]), (ins,), (outs,), {"seconds": np.full((1, 1), 0.02, np.float32)})

def load(bundle):
    what = read_json(bundle, "preprocessing.json")
    return {"colors": lambda: colors(what["factor"]), "same": same, "slow": slow}[what["model"]]()

one_by_one = {"slow": Batching(max_batch=1)}
settings = Settings(grpc_port=int(sys.argv[2]), repository=folder / "repository", batching=one_by_one)
serve_forever(folder, "colors", load, captures=folder / "captures", max_body=1_000_000, settings=settings)
"""
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
LABELS = ["red", "green", "blue"]


def shares(images: np.ndarray = IMAGES, factor: float = 1.0) -> np.ndarray:
    means = images.mean(axis=(1, 2)) * factor + 1
    return np.asarray(means / means.sum(axis=1, keepdims=True), np.float32)


def make_bundle(path: Path, model: str, factor: float = 1.0) -> Any:
    what = json.dumps({"model": model, "factor": factor}).encode()
    files = {**dict.fromkeys(REQUIRED_FILES, b"{}"), "preprocessing.json": what}
    return write_bundle(path, files, model, {})


class Served:
    """Where the server is."""

    def __init__(self, folder: Path, http: str, grpc: str, version: str) -> None:
        self.folder, self.http, self.grpc, self.version = folder, http, grpc, version


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from trilobe.infrastructure.serve import bind

    folder = tmp_path_factory.mktemp("served")
    repository = folder / "repository"
    repository.mkdir()
    bundle = make_bundle(repository / "colors", "colors")
    make_bundle(repository / "other", "colors", factor=0.5)
    endpoint.deploy(folder, bundle.path)
    for name in ("same", "slow"):
        endpoint.deploy(folder, make_bundle(repository / name, name).path, name)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(port)]
    started = endpoint.start(folder, "colors", command, timeout=60)
    yield Served(folder, started.url.removeprefix("http://"), f"127.0.0.1:{port}", bundle.id)
    endpoint.stop(folder)
    log = (folder / "server.log").read_text()
    assert log == "", "clients that ask what a Triton client may ask give a server nothing to complain about"


class Kind:
    """One of the two clients, so that a test is written once."""

    def __init__(self, name: str, module: Any, client: Any) -> None:
        self.name, self.module, self.client = name, module, client

    def input(self, name: str, array: np.ndarray, **how: Any) -> Any:
        datatype = "BYTES" if array.dtype == object else triton_http.InferInput(name, [1], "FP32") and _datatype(array)
        tensor = self.module.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, **how)
        return tensor

    def image(self, images: np.ndarray = IMAGES, **how: Any) -> list[Any]:
        return [self.input("image", images, **how)]

    def plain(self, answer: Any) -> Any:
        """What a client says of a model, as JSON (the gRPC client gives messages)."""
        if self.name == "http":
            return answer
        from google.protobuf import json_format

        return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def _datatype(array: np.ndarray) -> str:
    from tritonclient.utils import np_to_triton_dtype

    return str(np_to_triton_dtype(array.dtype))


@pytest.fixture(params=["http", "grpc"])
def kind(served: Served, request: pytest.FixtureRequest) -> Iterator[Kind]:
    if request.param == "http":
        client = triton_http.InferenceServerClient(served.http)
        yield Kind("http", triton_http, client)
    else:
        client = triton_grpc.InferenceServerClient(served.grpc)
        yield Kind("grpc", triton_grpc, client)
    client.close()


@pytest.fixture
def http(served: Served) -> Iterator[Kind]:
    client = triton_http.InferenceServerClient(served.http)
    yield Kind("http", triton_http, client)
    client.close()


@pytest.fixture
def grpc(served: Served) -> Iterator[Kind]:
    client = triton_grpc.InferenceServerClient(served.grpc)
    yield Kind("grpc", triton_grpc, client)
    client.close()


# --- health and description -----------------------------------------------------------------------------------------


def test_health(kind: Kind, served: Served) -> None:
    client = kind.client
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("colors") and client.is_model_ready("colors", served.version)
    assert not client.is_model_ready("nope") and not client.is_model_ready("colors", "7")


def test_server_metadata(kind: Kind) -> None:
    said = kind.plain(kind.client.get_server_metadata())
    assert said["name"] == "trilobe" and said["version"]
    assert {"binary_tensor_data", "classification", "statistics", "model_repository"} <= set(said["extensions"])


def test_model_metadata(kind: Kind, served: Served) -> None:
    for version in ("", served.version):
        said = kind.plain(kind.client.get_model_metadata("colors", version))
        assert said["name"] == "colors" and said["versions"] == [served.version] and said["platform"]
        (image,), (proba,) = said["inputs"], said["outputs"]
        assert (image["name"], image["datatype"], [int(n) for n in image["shape"]]) == (
            "image",
            "UINT8",
            [-1, -1, -1, 3],
        )
        assert (proba["name"], proba["datatype"], [int(n) for n in proba["shape"]]) == ("proba", "FP32", [-1, 3])


def test_model_configuration(kind: Kind) -> None:
    said = kind.plain(kind.client.get_model_config("colors"))
    said = said.get("config", said)
    assert said["name"] == "colors" and int(said["max_batch_size"]) > 1 and said["backend"] == "trilobe"
    (image,), (proba,) = said["input"], said["output"]
    assert (image["data_type"], [int(n) for n in image["dims"]]) == ("TYPE_UINT8", [-1, -1, 3])
    assert (proba["data_type"], [int(n) for n in proba["dims"]]) == ("TYPE_FP32", [3])


def test_statistics(kind: Kind, served: Served) -> None:
    def count() -> tuple[int, int]:
        (said,) = kind.plain(kind.client.get_inference_statistics("colors"))["model_stats"]
        assert (said["name"], said["version"]) == ("colors", served.version)
        stats = said["inference_stats"]
        assert set(stats) >= {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output"}
        return int(said.get("inference_count", 0)), int(stats["success"].get("count", 0))

    rows, requests = count()
    kind.client.infer("colors", kind.image())
    assert count() == (rows + 3, requests + 1)
    (said,) = kind.plain(kind.client.get_inference_statistics("colors", served.version))["model_stats"]
    assert any(int(b["batch_size"]) == 3 and int(b["compute_infer"]["ns"]) > 0 for b in said["batch_stats"])
    everything = kind.plain(kind.client.get_inference_statistics())["model_stats"]
    assert {"colors", "same", "slow"} <= {said["name"] for said in everything}


# --- inference ------------------------------------------------------------------------------------------------------


def test_infer(kind: Kind, served: Served) -> None:
    """No outputs named: all of them, binary."""
    answer = kind.client.infer("colors", kind.image())
    np.testing.assert_array_equal(answer.as_numpy("proba"), shares())
    said = kind.plain(answer.get_response())
    assert (said["model_name"], said["model_version"]) == ("colors", served.version)
    assert answer.as_numpy("nope") is None


def test_ids_and_versions(kind: Kind, served: Served) -> None:
    answer = kind.client.infer("colors", kind.image(), model_version=served.version, request_id="é-7")
    assert kind.plain(answer.get_response())["id"] == "é-7"


@pytest.mark.parametrize("there", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("back", [True, False, None], ids=["binary out", "JSON out", "any out"])
def test_json_and_binary(http: Kind, there: bool, back: bool | None) -> None:
    outputs = None if back is None else [triton_http.InferRequestedOutput("proba", binary_data=back)]
    answer = http.client.infer("colors", http.image(binary_data=there), outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("proba"), shares())
    (output,) = answer.get_response()["outputs"]
    assert ("data" in output) == (back is False)


@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_compression(http: Kind, there: str | None, back: str | None) -> None:
    images = np.zeros((400, 8, 8, 3), np.uint8)
    answer = http.client.infer(
        "colors", http.image(images), request_compression_algorithm=there, response_compression_algorithm=back
    )
    np.testing.assert_array_equal(answer.as_numpy("proba"), shares(images))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_over_grpc(grpc: Kind, algorithm: str) -> None:
    answer = grpc.client.infer("colors", grpc.image(), compression_algorithm=algorithm)
    np.testing.assert_array_equal(answer.as_numpy("proba"), shares())


def every_datatype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays: dict[str, np.ndarray] = {"BOOL": np.array([[True, False], [False, True]])}
    for bits in (8, 16, 32, 64):
        for name, letter in (("UINT", "u"), ("INT", "i")):
            info = np.iinfo(f"{letter}{bits // 8}")
            arrays[f"{name}{bits}"] = np.array([[info.min, info.max], [0, 1]], info.dtype)
    for bits in (16, 32, 64):
        arrays[f"FP{bits}"] = rng.normal(size=(2, 2)).astype(f"f{bits // 8}")
    arrays["BYTES"] = np.array([["é".encode(), b""], [b"a\0b", b"long" * 300]], object)
    return arrays


def test_every_datatype(kind: Kind) -> None:
    arrays = every_datatype()
    answer = kind.client.infer("same", [kind.input(name, array) for name, array in arrays.items()])
    for name, array in arrays.items():
        found = answer.as_numpy(f"same_{name}")
        assert found.dtype == array.dtype and found.tolist() == array.tolist()


def test_every_datatype_as_json(http: Kind) -> None:
    """FP16 excepted: the client sends it as bytes only, as Triton would refuse it."""
    arrays = every_datatype()
    inputs = [http.input(name, array, binary_data=name == "FP16") for name, array in arrays.items()]
    outputs = [triton_http.InferRequestedOutput(f"same_{name}", binary_data=name == "FP16") for name in arrays]
    answer = http.client.infer("same", inputs, outputs=outputs)
    for name, array in arrays.items():
        found = answer.as_numpy(f"same_{name}")
        if name == "BYTES":
            assert [str(v) for v in found.ravel()] == [str(v.decode()) for v in array.ravel()]
        else:
            assert found.dtype == array.dtype and found.tolist() == array.tolist()


def test_outputs_are_those_asked_for_in_their_order(kind: Kind) -> None:
    names = ["same_INT8", "same_BOOL"]
    inputs = [kind.input(name, array) for name, array in every_datatype().items()]
    answer = kind.client.infer("same", inputs[::-1], outputs=[kind.module.InferRequestedOutput(n) for n in names])
    assert [output["name"] for output in kind.plain(answer.get_response())["outputs"]] == names


@pytest.mark.parametrize("count", [1, 2, 9])
def test_classification(kind: Kind, count: int) -> None:
    outputs = [kind.module.InferRequestedOutput("proba", class_count=count)]
    found = kind.client.infer("colors", kind.image(), outputs=outputs).as_numpy("proba")
    proba = shares()
    expected = [[f"{row[j]:.6f}:{j}:{LABELS[j]}" for j in np.argsort(-row)[:count]] for row in proba]
    assert [[entry.decode() for entry in row] for row in found] == expected


def test_classification_as_json(http: Kind) -> None:
    outputs = [triton_http.InferRequestedOutput("proba", binary_data=False, class_count=1)]
    found = http.client.infer("colors", http.image(), outputs=outputs).get_response()["outputs"][0]
    assert (found["datatype"], found["shape"]) == ("BYTES", [3, 1]) and ":" in found["data"][0]


def test_priority_timeout_sequence_and_own_parameters(kind: Kind) -> None:
    options: list[dict[str, Any]] = [
        {"priority": 1},
        {"timeout": 10_000_000},
        {"sequence_id": 7, "sequence_start": True, "sequence_end": True},
        {"sequence_id": "seven", "sequence_start": True},
        {"parameters": {"text": "é", "whole": 3, "flag": True, "scale": 0.5}},
    ]
    for option in options:
        answer = kind.client.infer("colors", kind.image(), **option)
        np.testing.assert_array_equal(answer.as_numpy("proba"), shares())


def seconds(kind: Kind, value: float) -> list[Any]:
    return [kind.input("seconds", np.array([[value]], np.float32))]


def test_a_timeout_is_kept(kind: Kind) -> None:
    """Microseconds; 504 over HTTP, DEADLINE_EXCEEDED over gRPC, long before the model is done."""
    begin = time.monotonic()
    with pytest.raises(InferenceServerException, match="did not answer within") as caught:
        kind.client.infer("slow", seconds(kind, 2.0), timeout=50_000)
    assert time.monotonic() - begin < 1.9
    assert caught.value.status() in ("504", "StatusCode.DEADLINE_EXCEEDED")


def test_a_deadline_is_kept(grpc: Kind) -> None:
    with pytest.raises(InferenceServerException, match=r"Deadline|did not answer") as caught:
        grpc.client.infer("slow", seconds(grpc, 1.0), client_timeout=0.05)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Callable[[Kind], list[Any]], dict[str, Any], str]] = {
    "unknown model": ("nope", lambda k: k.image(), {}, "unknown model 'nope'"),
    "unknown version": ("colors", lambda k: k.image(), {"model_version": "7"}, "no version '7'"),
    "unknown input": ("colors", lambda k: [k.input("nope", IMAGES)], {}, "unknown input 'nope'"),
    "no input": ("colors", lambda k: [], {}, "input 'image' is missing"),
    "an input twice": ("colors", lambda k: [*k.image(), *k.image()], {}, "comes twice"),
    "datatype": ("colors", lambda k: [k.input("image", IMAGES.astype(np.float32))], {}, "the datatype 'FP32'"),
    "dimensions": ("colors", lambda k: k.image(IMAGES[0]), {}, r"3 dimensions; expected \[-1, -1, -1, 3\]"),
    "shape": ("colors", lambda k: k.image(IMAGES[..., :2]), {}, r"the shape \[3, 4, 5, 2\]"),
    "NaN": ("slow", lambda k: seconds(k, np.nan), {}, "not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_said(kind: Kind, name: str) -> None:
    model, inputs, options, words = WRONG[name]
    with pytest.raises(InferenceServerException, match=words) as caught:
        kind.client.infer(model, inputs(kind), **options)
    expected = ("404", "StatusCode.NOT_FOUND") if "unknown" in name and "input" not in name else None
    assert caught.value.status() in (expected or ("400", "StatusCode.INVALID_ARGUMENT"))


def test_an_unknown_output_is_refused(kind: Kind) -> None:
    with pytest.raises(InferenceServerException, match="unknown output 'nope'"):
        kind.client.infer("colors", kind.image(), outputs=[kind.module.InferRequestedOutput("nope")])


def test_too_much_is_refused(kind: Kind) -> None:
    with pytest.raises(InferenceServerException, match="large") as caught:
        kind.client.infer("colors", kind.image(np.zeros((40, 100, 100, 3), np.uint8)))
    assert caught.value.status() in ("413", "StatusCode.RESOURCE_EXHAUSTED")
    assert kind.client.is_server_live()


def test_shared_memory_is_refused(kind: Kind) -> None:
    tensor = kind.module.InferInput("image", [3, 4, 5, 3], "UINT8")
    tensor.set_shared_memory("region", 180)
    with pytest.raises(InferenceServerException, match="shared memory"):
        kind.client.infer("colors", [tensor])
    output = kind.module.InferRequestedOutput("proba")
    output.set_shared_memory("region", 36)
    with pytest.raises(InferenceServerException, match="shared memory"):
        kind.client.infer("colors", kind.image(), outputs=[output])


def test_what_is_not_served_says_so(kind: Kind) -> None:
    for call in (kind.client.get_system_shared_memory_status, kind.client.get_trace_settings):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() in ("404", "StatusCode.UNIMPLEMENTED")


# --- several at once ------------------------------------------------------------------------------------------------


def test_async_calls_of_the_blocking_clients(served: Served) -> None:
    http = Kind("http", triton_http, triton_http.InferenceServerClient(served.http, concurrency=4))
    waiting = [http.client.async_infer("colors", http.image(IMAGES[i % 3][None])) for i in range(12)]
    for i, request in enumerate(waiting):
        np.testing.assert_array_equal(request.get_result().as_numpy("proba")[0], shares()[i % 3])
    http.client.close()
    grpc = Kind("grpc", triton_grpc, triton_grpc.InferenceServerClient(served.grpc))
    found: list[tuple[Any, Any]] = []
    for _ in range(8):
        grpc.client.async_infer("colors", grpc.image(), lambda result, error: found.append((result, error)))
    deadline = time.monotonic() + 10
    while len(found) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(found) == 8 and all(error is None for _, error in found)
    grpc.client.close()


def test_cancelling_a_call(grpc: Kind) -> None:
    """The client leaves: its place in the queue is free again, and nobody waits for what it asked."""
    found: list[Any] = []
    calls = [
        grpc.client.async_infer("slow", seconds(grpc, 0.3), lambda result, error: found.append(error))
        for _ in range(20)
    ]
    for call in calls:
        call.cancel()
    begin = time.monotonic()
    answer = grpc.client.infer("slow", seconds(grpc, 0.0), priority=1)
    assert answer.as_numpy("slept").tolist() == [[0.0]]
    assert time.monotonic() - begin < 3.0, "twenty sleepers would have taken six seconds"
    assert len(found) == 20 and all("ancelled" in str(error) for error in found)


def test_the_asyncio_clients(served: Served) -> None:
    import tritonclient.grpc.aio
    import tritonclient.http.aio

    async def talk(module: Any, url: str) -> None:
        kind = Kind("aio", module, module.InferenceServerClient(url))
        try:
            assert await kind.client.is_server_ready() and await kind.client.is_model_ready("colors")
            answers = await asyncio.gather(*[kind.client.infer("colors", kind.image()) for _ in range(5)])
            for answer in answers:
                np.testing.assert_array_equal(answer.as_numpy("proba"), shares())
            with pytest.raises(InferenceServerException, match="unknown model"):
                await kind.client.infer("nope", kind.image())
        finally:
            await kind.client.close()

    async def both() -> None:
        await talk(tritonclient.http.aio, served.http)
        await talk(tritonclient.grpc.aio, served.grpc)

    asyncio.run(both())


def test_a_stream_answers_each_request_in_turn(grpc: Kind) -> None:
    found: list[tuple[Any, Any]] = []
    grpc.client.start_stream(lambda result, error: found.append((result, error)))
    grpc.client.async_stream_infer("colors", grpc.image(), request_id="1")
    grpc.client.async_stream_infer("nope", grpc.image(), request_id="2")
    grpc.client.async_stream_infer("colors", grpc.image(), request_id="3", enable_empty_final_response=True)
    grpc.client.stop_stream()
    (first, _), (second, error), (third, _) = found
    assert second is None and "unknown model" in str(error)
    assert [answer.get_response().id for answer in (first, third)] == ["1", "3"]
    assert third.get_response().parameters["triton_final_response"].bool_param
    np.testing.assert_array_equal(third.as_numpy("proba"), shares())


# --- what is loaded -------------------------------------------------------------------------------------------------


def index(kind: Kind) -> dict[str, str]:
    said = kind.plain(kind.client.get_model_repository_index())
    return {row["name"]: row.get("state", "") for row in (said if isinstance(said, list) else said.get("models", []))}


def test_load_and_unload(kind: Kind) -> None:
    assert index(kind)["colors"] == "READY" and not kind.client.is_model_ready("other")
    kind.client.load_model("other")
    assert kind.client.is_model_ready("other") and index(kind)["other"] == "READY"
    answer = kind.client.infer("other", kind.image())
    np.testing.assert_array_equal(answer.as_numpy("proba"), shares(factor=0.5))
    kind.client.load_model("other")  # again: nothing changes
    kind.client.unload_model("other")
    assert not kind.client.is_model_ready("other")
    with pytest.raises(InferenceServerException):
        kind.client.infer("other", kind.image())
    assert index(kind).get("other", "UNAVAILABLE") == "UNAVAILABLE"
    assert kind.client.is_model_ready("colors")


@pytest.mark.parametrize("name", ["nope", "..", "a b"])
def test_loading_what_is_not_there(kind: Kind, name: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        kind.client.load_model(name)
    assert caught.value.status() in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")


# --- raw HTTP, as no Triton client but curl sends it ----------------------------------------------------------------


def test_a_raw_body(served: Served) -> None:
    import http.client

    connection = http.client.HTTPConnection(served.http, timeout=10)
    packed = zlib.compress(np.array([[0.5]], "<f4").tobytes())
    headers = {"Inference-Header-Content-Length": "0", "Content-Encoding": "deflate"}
    connection.request("POST", "/v2/models/slow/infer", packed, headers)
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200
    at = int(response.headers["Inference-Header-Content-Length"])
    assert np.frombuffer(body[at:], "<f4").tolist() == [0.5]
    connection.close()


# --- KServe's own client --------------------------------------------------------------------------------------------

# In a process of its own: its generated code and that of tritonclient claim the same names.
KSERVE = """
import asyncio, sys
import numpy as np
import kserve

http, grpc, images, expected = sys.argv[1], sys.argv[2], np.load(sys.argv[3]), np.load(sys.argv[4])

def request(binary):
    tensor = kserve.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return kserve.InferRequest("colors", [tensor], request_id="7")

def check(answer):
    assert answer.id == "7" and answer.model_name == "colors", answer
    np.testing.assert_array_equal(answer.outputs[0].as_numpy(), expected)

async def rest():
    client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", retries=1, timeout=10))
    assert await client.is_server_live(http) and await client.is_server_ready(http)
    assert await client.is_model_ready(http, "colors") and not await client.is_model_ready(http, "nope")
    for binary in (False, True):
        check(await client.infer(http, request(binary), model_name="colors"))
    await client.close()

async def rpc():
    client = kserve.InferenceGRPCClient(grpc, timeout=10)
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready("colors")
    for binary in (False, True):
        check(await client.infer(request(binary)))
    await client.close()

asyncio.run({"http": rest, "grpc": rpc}[sys.argv[5]]())
"""


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_client_of_kserve(served: Served, tmp_path: Path, way: str) -> None:
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("kserve is not installed: it brings pandas and kubernetes, half a gigabyte")
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "expected.npy", shares())
    arguments = [
        f"http://{served.http}",
        served.grpc,
        str(tmp_path / "images.npy"),
        str(tmp_path / "expected.npy"),
        way,
    ]
    done = subprocess.run([sys.executable, "-c", KSERVE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
