"""gRPC: messages that are exactly Triton's, requests of every kind and of none, and a server behind a real port."""

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.errors import DataError, PortInUse
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.pipeline import DATATYPES, Pipeline, Servable, TensorSpec, pack
from trilobe.infrastructure.serve.batching import Batching
from trilobe.infrastructure.serve.grpc import SERVICE, load_messages, read_call, start_grpc, write_answer
from trilobe.infrastructure.serve.protocol import Call, Reader, Wanted, Writer

MESSAGES, METHODS = load_messages()
X, Y = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1, 2))
READER = Reader([X], [Y])


def request(array: np.ndarray | None = None, **changes: Any) -> Any:
    array = np.array([[1, 2]], np.float32) if array is None else array
    made = MESSAGES["ModelInferRequest"](**{"model_name": "double", **changes})
    if "inputs" not in changes:
        made.inputs.add(name="x", datatype="FP32", shape=array.shape)
    if "raw_input_contents" not in changes:
        made.raw_input_contents.append(array.tobytes())
    return made


# --- messages -------------------------------------------------------------------------------------------------------


def test_names_and_numbers_are_those_of_triton() -> None:
    """Every field here is there, with its number, type and repetition; the pools do not get in each other's way."""
    theirs = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    files = theirs.service_pb2.DESCRIPTOR, theirs.model_config_pb2.DESCRIPTOR
    known = {name: d for file in files for name, d in file.message_types_by_name.items()}
    enums = {name: d for file in files for name, d in file.enum_types_by_name.items()}

    def compare(ours: Any, their: Any) -> int:
        count = 0
        for field in ours.fields:
            other = their.fields_by_name[field.name]
            for aspect in ("number", "type", "is_repeated"):
                assert getattr(field, aspect) == getattr(other, aspect), f"{ours.full_name}.{field.name}: {aspect}"
            assert (field.containing_oneof is None) == (other.containing_oneof is None)
            for part in ("message_type", "enum_type"):
                mine, yours = getattr(field, part), getattr(other, part)
                assert (mine and mine.full_name) == (yours and yours.full_name)
            count += 1
        return count + sum(compare(n, their.nested_types_by_name[n.name]) for n in ours.nested_types)

    assert sum(compare(made.DESCRIPTOR, known[name]) for name, made in MESSAGES.items()) > 100
    file = MESSAGES["ModelConfig"].DESCRIPTOR.file
    for value in file.enum_types_by_name["DataType"].values:
        assert enums["DataType"].values_by_name[value.name].number == value.number
    service = theirs.service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == SERVICE
    for name, method in METHODS.items():
        other = service.methods_by_name[name]
        assert method.takes.DESCRIPTOR.full_name == other.input_type.full_name
        assert method.gives.DESCRIPTOR.full_name == other.output_type.full_name
        assert method.stream == other.server_streaming == other.client_streaming


# --- requests -------------------------------------------------------------------------------------------------------

CONTENTS = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}


@settings(max_examples=60, deadline=None)
@given(datatype=st.sampled_from(sorted(DATATYPES)), data=st.data())
def test_raw_and_typed_contents_are_the_same(datatype: str, data: st.DataObject) -> None:
    dtype = DATATYPES[datatype]
    if dtype.kind in "iu":
        values: Any = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    else:
        values = {"b": st.booleans(), "f": st.floats(-6e4, 6e4, width=16), "O": st.binary(max_size=3)}[dtype.kind]
    listed = data.draw(st.lists(values, min_size=2, max_size=6).filter(lambda v: len(v) % 2 == 0))
    array = np.array(listed, dtype).reshape(-1, 2)
    spec = TensorSpec("t", datatype, (-1, 2))
    reader = Reader([spec], [spec])
    raw = MESSAGES["ModelInferRequest"](raw_input_contents=[pack(array, dtype)])
    raw.inputs.add(name="t", datatype=datatype, shape=array.shape)
    found = read_call(raw, reader)
    assert found.inputs["t"].tolist() == array.tolist() and found.inputs["t"].dtype == dtype
    assert found.rows == len(array) and found.outputs == (Wanted("t", True),)
    if datatype == "FP16":
        return
    typed = MESSAGES["ModelInferRequest"]()
    tensor = typed.inputs.add(name="t", datatype=datatype, shape=array.shape)
    name = CONTENTS.get(datatype) or ("uint" if datatype[0] == "U" else "int")
    getattr(tensor.contents, f"{name}_contents").extend(listed)
    assert read_call(typed, reader).inputs["t"].tolist() == array.tolist()
    # And back: what is answered can be asked.
    answer = write_answer(found, {"t": array}, Writer([spec], "m", "1"), {"note": "é", "n": 1, "sure": True, "p": 0.5})
    again = MESSAGES["ModelInferRequest"](raw_input_contents=answer.raw_output_contents)
    for output in answer.outputs:
        again.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    assert read_call(again, reader).inputs["t"].tolist() == array.tolist()
    assert answer.parameters["note"].string_param == "é" and answer.parameters["sure"].bool_param


def test_parameters() -> None:
    sent = request(id="7")
    sent.parameters["priority"].uint64_param = 1
    sent.parameters["timeout"].int64_param = 1500
    sent.parameters["note"].string_param = "é"
    sent.parameters["scale"].double_param = 0.5
    sent.parameters["triton_enable_empty_final_response"].bool_param = True
    output = sent.outputs.add(name="y")
    output.parameters["classification"].int64_param = 2
    found = read_call(sent, READER)
    assert (found.id, found.priority, found.timeout) == ("7", 1, 0.0015)
    assert dict(found.parameters) == {"note": "é", "scale": 0.5} and found.outputs == (Wanted("y", True, 2),)
    assert read_call(sent, READER, 0.001).timeout == 0.001 and read_call(sent, READER, 9.0).timeout == 0.0015
    assert read_call(request(), READER, 9.0).timeout == 9.0 and read_call(request(), READER).timeout is None


def _with(place: Callable[[Any], Any], kind: str, value: Any) -> Any:
    made = request()
    setattr(place(made), kind, value)
    return made


def _typed(field: str, values: list[Any], datatype: str = "FP32") -> Any:
    made = MESSAGES["ModelInferRequest"]()
    tensor = made.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(tensor.contents, field).extend(values)
    return made


def _both() -> Any:
    made = request()
    made.inputs[0].contents.fp32_contents.extend([1, 2])
    return made


BAD: dict[str, Any] = {
    "nothing": MESSAGES["ModelInferRequest"](),
    "no contents": MESSAGES["ModelInferRequest"](inputs=request().inputs),
    "too many raw contents": request(raw_input_contents=[b"12345678"] * 2),
    "raw of another size": request(raw_input_contents=[b"1234567"]),
    "raw and typed": _both(),
    "typed as another": _typed("int_contents", [1, 2]),
    "too few": _typed("fp32_contents", [1]),
    "NaN": _typed("fp32_contents", [float("nan"), 1]),
    "NaN, raw": request(np.array([[np.nan, 1]], np.float32)),
    "datatype": request(inputs=[{"name": "x", "datatype": "FP64", "shape": [1, 1]}]),
    "shape": request(inputs=[{"name": "x", "datatype": "FP32", "shape": [2, 1]}]),
    "negative": request(inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, -2]}]),
    "huge": request(inputs=[{"name": "x", "datatype": "FP32", "shape": [2**62, 2]}]),
    "unknown": request(inputs=[{"name": "z" * 9999, "datatype": "FP32", "shape": [1, 2]}]),
    "twice": request(
        inputs=[{"name": "x", "datatype": "FP32", "shape": [1, 2]}] * 2, raw_input_contents=[b"12345678"] * 2
    ),
    "shared memory in": _with(lambda r: r.inputs[0].parameters["shared_memory_region"], "string_param", "r"),
    "shared memory out": _with(
        lambda r: r.outputs.add(name="y").parameters["shared_memory_region"], "string_param", "r"
    ),
    "unknown output": request(outputs=[{"name": "nope"}]),
    "output twice": request(outputs=[{"name": "y"}] * 2),
    "classification": _with(lambda r: r.outputs.add(name="y").parameters["classification"], "string_param", "1"),
    "priority": _with(lambda r: r.parameters["priority"], "string_param", "high"),
    "reserved": _with(lambda r: r.parameters["triton_other"], "bool_param", True),
    "no value": request(parameters={"empty": {}}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_call(BAD[name], READER)
    assert 0 < len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [-129, 128])
def test_numbers_that_do_not_fit(value: int) -> None:
    reader = Reader([TensorSpec("x", "INT8", (-1, 2))], [Y])
    with pytest.raises(DataError, match="not usable"):
        read_call(_typed("int_contents", [value, 0], "INT8"), reader)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 70))
def test_no_bytes_do_anything_but_parse_or_be_refused(noise: bytes, at: int) -> None:
    """A good message with noise in its middle."""
    from google.protobuf.message import DecodeError

    good = request(id="1").SerializeToString()
    try:
        sent = MESSAGES["ModelInferRequest"].FromString(good[:at] + noise + good[at:])
        found = read_call(sent, READER)
    except (DecodeError, DataError) as error:
        assert str(error)
    else:
        assert found.inputs["x"].shape[1:] == (2,)


def test_classification() -> None:
    call = Call(None, {}, (Wanted("y", True, 1),))
    answer = write_answer(call, {"y": np.array([[1, 5]], np.float32)}, Writer([Y], "m", "1", {"y": ["a", "b"]}), {})
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [1, 1])
    assert answer.raw_output_contents[0] == b"\x0c\0\0\x005.000000:1:b"


# --- a server -------------------------------------------------------------------------------------------------------


def double(data: Any) -> dict[str, np.ndarray]:
    if (data["x"] < 0).any():
        raise ValueError("what the log is for")
    return {"y": 2 * data["x"]}


def serve(tmp_path: Path, talk: Callable[[Any, Any], Awaitable[None]], **options: Any) -> None:
    """Run ``talk`` with a server that doubles, and its gRPC front."""
    from trilobe.infrastructure.serve.server import Server

    files = dict.fromkeys(REQUIRED_FILES, b"{}")
    bundle = write_bundle(tmp_path / "bundle", files, "double", {})
    warm = {"x": np.ones((1, 2), np.float32)}

    async def run() -> None:
        server = Server("double", lambda _: Servable(Pipeline([("double", double)]), (X,), (Y,), warm), max_body=10**6)
        await server.apply({"": Wish(str(bundle.path))})
        front = await start_grpc(server, **options)
        try:
            await talk(server, front)
        finally:
            await front.stop(1.0)
            server.close()

    asyncio.run(run())


def ask(channel: Any, name: str, sent: Any, **options: Any) -> Any:
    method = METHODS[name]
    call = channel.unary_unary(f"/{SERVICE}/{name}", type(sent).SerializeToString, method.gives.FromString)
    return call(sent, **options)


def test_a_server_answers_and_says_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grpc = pytest.importorskip("grpc")
    code = grpc.StatusCode

    async def talk(server: Any, front: Any) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            answer = await ask(channel, "ModelInfer", request())
            assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [2, 4]
            large = np.ones((100_000, 2), np.float32)  # read beside the loop
            answer = await ask(channel, "ModelInfer", request(large))
            assert np.frombuffer(answer.raw_output_contents[0], "<f4").sum() == 400_000
            wrong = {
                code.NOT_FOUND: request(model_name="nope"),
                code.INVALID_ARGUMENT: request(outputs=[{"name": "nope"}]),
                code.INTERNAL: request(np.array([[-1, 1]], np.float32)),
                code.RESOURCE_EXHAUSTED: request(np.ones((200_000, 2), np.float32)),
            }
            for expected, sent in wrong.items():
                with pytest.raises(grpc.RpcError) as caught:
                    await ask(channel, "ModelInfer", sent)
                assert caught.value.code() == expected and caught.value.details()
                assert "what the log is for" not in caught.value.details() or expected == code.INTERNAL
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff\xff\xff")
            assert caught.value.code() in (code.INTERNAL, code.INVALID_ARGUMENT, code.UNKNOWN)
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/Nope")(b"")
            assert caught.value.code() == code.UNIMPLEMENTED
            assert (await ask(channel, "ServerLive", METHODS["ServerLive"].takes())).live

    serve(tmp_path, talk)
    assert "what the log is for" in caplog.text


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")

    async def talk(server: Any, front: Any) -> None:
        queue = server.model("double").queue
        object.__setattr__(queue.settings, "max_pending", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await ask(channel, "ModelInfer", request())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert ("retry-after", "1") in [tuple(pair) for pair in caught.value.trailing_metadata()]

    serve(tmp_path, talk)


def test_a_call_has_an_id_which_is_the_clients_or_ours(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def talk(server: Any, front: Any) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:

            async def id_of(name: str, sent: Any, *metadata: tuple[str, str]) -> str:
                call = ask(channel, name, sent, metadata=metadata)
                with contextlib.suppress(grpc.RpcError):
                    await call
                (found,) = [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
                return str(found)

            live = METHODS["ServerLive"].takes()
            for name, sent in (
                ("ModelInfer", request()),
                ("ModelInfer", request(model_name="?")),
                ("ServerLive", live),
            ):
                assert await id_of(name, sent, ("x-request-id", "a-17")) == "a-17"
                assert await id_of(name, sent, ("traceparent", parent)) == parent[3:35]
                made = {await id_of(name, sent, *given) for given in ((), (("x-request-id", "no id"),), ())}
                assert len(made) == 3 and all(len(id_) == 32 and int(id_, 16) for id_ in made)
            assert await id_of("ModelInfer", request(), ("x-request-id", "x" * 129)) != "x" * 129

    serve(tmp_path, talk)


def test_calls_are_logged_and_counted_as_over_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grpc = pytest.importorskip("grpc")
    from trilobe.infrastructure.serve.access import Gate, create_token
    from trilobe.infrastructure.serve.logs import ACCESS, FIELDS, access_log

    token = create_token(tmp_path, "web", ["infer"])

    async def talk(server: Any, front: Any) -> None:
        server.access, server.gate = access_log(1.0), Gate(tmp_path)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            who = ("authorization", f"Bearer {token}")
            sents = [request(), request(model_version="9"), request(np.array([[-1, 1]], np.float32))]
            for i, sent in enumerate(sents):
                call = ask(channel, "ModelInfer", sent, metadata=(who, ("x-request-id", f"r{i}")))
                assert (await call.code() == grpc.StatusCode.OK) == (i == 0)
            await ask(channel, "ModelInfer", request(), metadata=(("x-request-id", "r3"),)).code()

            async def several() -> Any:
                for sent in sents:
                    yield sent

            method = METHODS["ModelStreamInfer"]
            stream = channel.stream_stream(
                f"/{SERVICE}/ModelStreamInfer", lambda sent: sent.SerializeToString(), method.gives.FromString
            )(several(), metadata=(who, ("x-request-id", "stream")))
            assert [bool(answer.error_message) async for answer in stream] == [False, True, True]
            await ask(channel, "ServerLive", METHODS["ServerLive"].takes())
        text = server.meters.render()
        for code, n in (("OK", 3), ("NOT_FOUND", 2), ("INTERNAL", 2), ("UNAUTHENTICATED", 1)):
            assert f'trilobe_grpc_responses_total{{code="{code}"}} {n}\n' in text
        version = server.model("double").id
        assert f'nv_inference_request_success{{model="double",version="{version}"}} 2\n' in text
        assert f'nv_inference_request_failure{{model="double",version="{version}",reason="BACKEND"}} 2\n' in text

    with caplog.at_level("INFO", logger=ACCESS):
        serve(tmp_path, talk)
    lines = [[getattr(r, name) for name in FIELDS] for r in caplog.records if r.name == ACCESS]
    assert all(0 < seconds < 10 for *_, seconds, _ in lines)
    one = [["double", "", 200, "web"], ["double", "9", 404, "web"], ["double", "", 500, "web"]]
    assert [[id_, model, version, status, client] for id_, model, version, status, _, client in lines] == [
        *(["r" + str(i), *line] for i, line in enumerate(one)),
        ["r3", "double", "", 401, ""],
        *(["stream", *line] for line in one),
    ]


def test_a_client_that_leaves_is_counted(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")

    async def talk(server: Any, front: Any) -> None:
        server.model("double").queue.settings = Batching(delay=5.0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            call = ask(channel, "ModelInfer", request())
            while not server.model("double").queue.waiting:
                await asyncio.sleep(0.01)
            call.cancel()
            while server.meters.counted("trilobe_grpc_responses_total", code="CANCELLED") < 1:
                await asyncio.sleep(0.01)

    serve(tmp_path, talk)


def test_a_call_is_a_span_of_the_callers_trace(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from trilobe.infrastructure.serve.traces import Traces

    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def talk(server: Any, front: Any) -> None:
        server.traces = Traces(provider, 0.0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            for i, sent in enumerate([request(), request(np.array([[-1, 1]], np.float32)), request()]):
                recorded = ("traceparent", f"00-{trace}-{span}-{'00' if i == 2 else '01'}")
                await ask(channel, "ModelInfer", sent, metadata=(recorded, ("x-request-id", f"r{i}"))).code()

    serve(tmp_path, talk)
    spans = exporter.get_finished_spans()
    assert [s.name for s in spans] == ["queue", "compute", "infer double"] * 2, "the third was not to be recorded"
    for request_span, code, id_ in ((spans[2], 0, "r0"), (spans[5], 13, "r1")):
        assert f"{request_span.context.trace_id:032x}" == trace and f"{request_span.parent.span_id:016x}" == span
        said = dict(request_span.attributes)
        assert (said["rpc.system"], said["rpc.grpc.status_code"]) == ("grpc", code)
        assert said["trilobe.request_id"] == id_ and "http.response.status_code" not in said
    assert spans[0].parent.span_id == spans[2].context.span_id
    assert spans[2].status.status_code.name != "ERROR" and spans[5].status.status_code.name == "ERROR"


def test_what_was_packed_to_explode_does_not(tmp_path: Path) -> None:
    """A message of zeros that gzip makes a thousand times smaller is refused by its real size."""
    grpc = pytest.importorskip("grpc")

    async def talk(server: Any, front: Any) -> None:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{front.port}", options=[("grpc.max_send_message_length", -1)], compression=grpc.Compression.Gzip
        ) as channel:
            bomb = request(np.zeros((5_000_000, 2), np.float32))
            with pytest.raises(grpc.RpcError) as caught:
                await ask(channel, "ModelInfer", bomb)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await ask(channel, "ModelInfer", request())).raw_output_contents

    serve(tmp_path, talk)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    from trilobe.infrastructure.serve import bind

    async def talk(server: Any, front: Any) -> None:
        with bind("127.0.0.1", 0) as taken, pytest.raises(PortInUse, match="gRPC"):
            await start_grpc(server, port=taken.getsockname()[1])

    serve(tmp_path, talk)


def test_without_grpcio_the_extra_is_named() -> None:
    script = (
        "import sys, asyncio; sys.modules['grpc'] = None\n"
        "from trilobe.infrastructure.serve.grpc import start_grpc\n"
        "from trilobe.errors import MissingExtra\n"
        "try:\n    asyncio.run(start_grpc(None))\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert "trilobe[grpc]" in done.stdout


def test_importing_it_brings_neither_grpc_nor_protobuf() -> None:
    script = (
        "import sys, json, trilobe.infrastructure.serve.grpc\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('grpc', 'google')]))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_tokens_are_asked_for(tmp_path: Path) -> None:
    """The same tokens and scopes as over HTTP, in the metadata."""
    grpc = pytest.importorskip("grpc")
    from trilobe.infrastructure.serve.access import Gate, create_token

    tokens = {scope: create_token(tmp_path, scope, [scope]) for scope in ("infer", "admin", "metrics")}
    index, stats = METHODS["RepositoryIndex"].takes(), METHODS["ModelStatistics"].takes(name="double")

    async def talk(server: Any, front: Any) -> None:
        server.gate = Gate(tmp_path)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:

            async def code(name: str, sent: Any, scope: str) -> Any:
                metadata = (("authorization", f"Bearer {tokens.get(scope, 'tlb_x')}"),) if scope else ()
                try:
                    await ask(channel, name, sent, metadata=metadata)
                except grpc.RpcError as error:
                    return error.code().name
                return "OK"

            assert await code("ServerLive", METHODS["ServerLive"].takes(), "") == "OK"
            for name, sent, scope in (("ModelInfer", request(), "infer"), ("RepositoryIndex", index, "admin"),
                                      ("ModelStatistics", stats, "metrics")):  # fmt: skip
                for tried in (*tokens, "", "wrong"):
                    other = "UNAUTHENTICATED" if tried in ("", "wrong") else "PERMISSION_DENIED"
                    assert await code(name, sent, tried) == ("OK" if tried == scope else other), (name, tried)

    serve(tmp_path, talk)


def test_tls_and_certificates_of_clients(tmp_path: Path) -> None:
    """Who shows no certificate of the authority does not come in; one that is renewed needs no restart."""
    grpc = pytest.importorskip("grpc")
    made = certificates(tmp_path)

    async def talk(server: Any, front: Any) -> None:
        authority, key, certificate = (made[name].read_bytes() for name in ("ca", "client.key", "client"))
        known = grpc.ssl_channel_credentials(authority, key, certificate)
        url = f"localhost:{front.port}"

        async def serial() -> int:
            context = ssl.create_default_context(cafile=str(made["ca"]))
            context.load_cert_chain(made["client"], made["client.key"])
            context.set_alpn_protocols(["h2"])
            _, writer = await asyncio.open_connection("localhost", front.port, ssl=context)
            found = writer.get_extra_info("peercert")["serialNumber"]
            writer.close()
            return int(found, 16)

        async with grpc.aio.secure_channel(url, known) as channel:
            assert (await ask(channel, "ModelInfer", request(), timeout=10)).raw_output_contents
        async with grpc.aio.secure_channel(url, grpc.ssl_channel_credentials(authority)) as channel:
            with pytest.raises(grpc.RpcError):
                await ask(channel, "ServerLive", METHODS["ServerLive"].takes(), timeout=5)
        first = await serial()
        certificates(tmp_path, renew=True)
        assert await serial() != first
        made["server.key"].write_text("broken")  # whoever renews it next makes a mistake: the one before stays
        assert await serial() != first

    serve(tmp_path, talk, host="localhost", tls=(made["server"], made["server.key"], made["ca"]))


def test_the_name_in_the_certificate_is_who_asks(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    from trilobe.infrastructure.serve.access import Gate, create_token

    made = certificates(tmp_path)
    create_token(tmp_path, "cn:client", ["infer"])

    async def talk(server: Any, front: Any) -> None:
        server.gate = Gate(tmp_path)
        secrets = grpc.ssl_channel_credentials(*(made[name].read_bytes() for name in ("ca", "client.key", "client")))
        async with grpc.aio.secure_channel(f"localhost:{front.port}", secrets) as channel:
            assert (await ask(channel, "ModelInfer", request(), timeout=10)).raw_output_contents
            with pytest.raises(grpc.RpcError) as caught:
                await ask(channel, "RepositoryIndex", METHODS["RepositoryIndex"].takes(), timeout=10)
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED

    serve(tmp_path, talk, host="localhost", tls=(made["server"], made["server.key"], made["ca"]))


def certificates(folder: Path, renew: bool = False) -> dict[str, Path]:
    """An authority and two certificates that it signed, by openssl; skips where that is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make certificates")

    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    if not renew:
        run("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    (folder / "names").write_text("subjectAltName=DNS:localhost")
    for name in ("server", "client"):
        run("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", f"{name}.crt")  # fmt: skip
    keys = {f"{name}.key": folder / f"{name}.key" for name in ("server", "client")}
    return {**keys, **{name: folder / f"{name}.crt" for name in ("ca", "server", "client")}}
