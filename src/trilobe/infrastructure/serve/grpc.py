"""The protocol over gRPC (extra ``grpc``): ``inference.GRPCInferenceService``, as Triton's clients know it.

``inference.proto`` beside this file says what is spoken; it is read here when the server starts, so there is no
generated code, and in a descriptor pool of its own, so that a client's generated code in the same process is no
conflict. Inference goes straight to :meth:`Server.infer`. All else is asked of :meth:`Server.handle` as an HTTP client
would, and its JSON retold, so the two front ends cannot differ in what they say or whom they let in. A call is seen as
one over HTTP is: in the figures, in the log of requests (with the status HTTP would give) and in traces.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec.structs import replace
from numpy.typing import NDArray

from trilobe.errors import DataError, MissingExtra, PortInUse, ServeError
from trilobe.infrastructure.pipeline import pack
from trilobe.infrastructure.serve.access import Client
from trilobe.infrastructure.serve.http import Request
from trilobe.infrastructure.serve.logs import request_id
from trilobe.infrastructure.serve.protocol import Call, Reader, Slot, Wanted, Writer, say

if TYPE_CHECKING:
    from trilobe.infrastructure.serve.server import Result, Server
    from trilobe.infrastructure.serve.traces import Trace

SERVICE = "inference.GRPCInferenceService"
LARGE = 256 * 1024  # bytes of a request that is read beside the event loop, not in it
MAX_CALLS = 4096  # under way at once; more are refused before they are read
ID = "x-request-id"  # of the metadata: what a call is known by, the client's or ours; it is sent back
_NOBODY = Client()
_CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

# --- from the .proto to messages ------------------------------------------------------------------------------------

_TOKEN = re.compile(r'//[^\n]*|"[^"]*"|[\w.]+|[{}()<>=;,]')


class Method(NamedTuple):
    """A method of the service: what it takes and gives, and whether as a stream."""

    takes: Any
    gives: Any
    stream: bool


@lru_cache(maxsize=1)
def load_messages() -> tuple[Mapping[str, Any], Mapping[str, Method]]:
    """The classes of all messages and the methods of the service, by name.

    >>> messages, methods = load_messages()
    >>> sent = messages["ModelInferRequest"](model_name="digits", raw_input_contents=[b"abc"])
    >>> methods["ModelInfer"].takes.FromString(sent.SerializeToString()).raw_input_contents[0]
    b'abc'
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    text = (Path(__file__).parent / "inference.proto").read_text("utf-8")
    file = descriptor_pb2.FileDescriptorProto(name="trilobe/inference.proto", syntax="proto3")
    _parse(iter(token for token in _TOKEN.findall(text) if not token.startswith("//")), file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    messages = {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{message.name}"))
        for message in file.message_type
    }
    service = file.service[0].method
    return messages, {
        m.name: Method(messages[m.input_type], messages[m.output_type], m.server_streaming) for m in service
    }


def _parse(tokens: Iterator[str], file: Any) -> None:
    """Fill a ``FileDescriptorProto`` from the tokens of a proto3 file: as much of the language as ours uses."""
    for word in tokens:
        if word == "package":
            file.package = next(tokens)
        elif word == "message":
            _parse_message(tokens, file.message_type.add(name=next(tokens)))
        elif word == "enum":
            enum = file.enum_type.add(name=next(tokens))
            for name, number in _enum_values(tokens):
                enum.value.add(name=name, number=number)
        elif word == "service":
            _parse_service(tokens, file.service.add(name=next(tokens)))


def _enum_values(tokens: Iterator[str]) -> Iterator[tuple[str, int]]:
    next(tokens)  # {
    while (name := next(tokens)) != "}":
        _, number, _ = next(tokens), next(tokens), next(tokens)  # = 1 ;
        yield name, int(number)


def _parse_service(tokens: Iterator[str], service: Any) -> None:
    next(tokens)  # {
    while next(tokens) == "rpc":
        method = service.method.add(name=next(tokens))
        words = [next(tokens)]
        while words[-1] != "}":
            words.append(next(tokens))
        types = [word for word in words if word not in ("(", ")", "stream", "returns", "{", "}")]
        method.input_type, method.output_type = types
        method.client_streaming = method.server_streaming = "stream" in words


def _parse_message(tokens: Iterator[str], message: Any, oneof: int | None = None) -> None:
    """The body of a message, or of a ``oneof`` in it."""
    next(tokens)  # {
    while (word := next(tokens)) != "}":
        if word == "message":
            _parse_message(tokens, message.nested_type.add(name=next(tokens)))
            continue
        if word == "oneof":
            message.oneof_decl.add(name=next(tokens))
            _parse_message(tokens, message, len(message.oneof_decl) - 1)
            continue
        repeated = word in ("repeated", "map")
        if word == "map":
            _, key, _, value, _ = (next(tokens) for _ in range(5))  # < string , Value >
            name, _, number, _ = (next(tokens) for _ in range(4))  # name = 1 ;
            kind = "".join(part.capitalize() for part in name.split("_")) + "Entry"
            entry = message.nested_type.add(name=kind)
            entry.options.map_entry = True
            _add_field(entry, key, "key", 1)
            _add_field(entry, value, "value", 2)
        else:
            kind = next(tokens) if repeated else word
            name, _, number, _ = (next(tokens) for _ in range(4))
        field = _add_field(message, kind, name, int(number), repeated)
        if oneof is not None:
            field.oneof_index = oneof


def _add_field(message: Any, kind: str, name: str, number: int, repeated: bool = False) -> Any:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    scalar = getattr(field, f"TYPE_{kind.upper()}", None) if kind.islower() or kind[-1].isdigit() else None
    if scalar is None:
        field.type_name = kind
    else:
        field.type = scalar
    return field


# --- requests and answers -------------------------------------------------------------------------------------------

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def read_call(request: Any, reader: Reader, remaining: float | None = None) -> Call:
    """The call that a ``ModelInferRequest`` asks for, with the ``remaining`` seconds of its deadline as its timeout.

    Tensors come all in ``raw_input_contents`` or all in their typed ``contents``. Raises
    :class:`~trilobe.errors.DataError` for whatever does not fit.

    >>> import numpy as np
    >>> from trilobe.infrastructure.pipeline import TensorSpec
    >>> spec = TensorSpec("x", "FP32", (-1, 2))
    >>> request = load_messages()[0]["ModelInferRequest"](raw_input_contents=[np.ones(2, "<f4").tobytes()])
    >>> _ = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    >>> read_call(request, Reader([spec], [spec]), 2.0).inputs
    {'x': array([[1., 1.]], dtype=float32)}
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise DataError(f"{len(raw)} raw contents for {len(request.inputs)} inputs", expected="one for each, or none")
    arrays: dict[str, NDArray[Any]] = {}
    for i, tensor in enumerate(request.inputs):
        slot = reader.slot(tensor.name, arrays, tensor.datatype)
        shape = list(tensor.shape)
        slot.check(tensor.datatype, shape)
        if "shared_memory_region" in tensor.parameters:
            raise DataError(f"{slot.name!r} is in shared memory", expected="data in the request")
        if not raw:
            arrays[slot.name] = _from_contents(slot, tensor.contents, shape)
        elif tensor.HasField("contents"):
            raise DataError(f"{slot.name!r} has contents besides its raw contents", expected="one of them")
        else:
            arrays[slot.name] = slot.from_bytes(raw[i], 0, len(raw[i]), shape)
    parameters = _read_parameters(request.parameters) if request.parameters else {}
    parameters.pop("triton_enable_empty_final_response", None)  # streams say it; every call has one answer here
    outputs = reader.wanted([_read_wanted(output) for output in request.outputs], True)
    call = reader.call(request.id or None, arrays, outputs, parameters)
    if remaining is not None:
        call = replace(call, timeout=min(remaining, call.timeout or remaining))
    return call


def _from_contents(slot: Slot, contents: Any, shape: list[int]) -> NDArray[Any]:
    fields = [field.name for field, _ in contents.ListFields()]
    expected = _CONTENTS.get(slot.spec.datatype, "raw_input_contents")
    if fields != [expected]:
        raise DataError(f"{slot.name!r} has {fields or 'no contents'}", expected=f"{expected}, or raw_input_contents")
    return slot.from_values(list(getattr(contents, expected)), shape)


def _read_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise DataError(f"the parameter {say(name)} has no value", expected="a value")
        found[name] = getattr(value, kind)
    return found


def _read_wanted(output: Any) -> Wanted:
    parameters = _read_parameters(output.parameters)
    if "shared_memory_region" in parameters:
        raise DataError(f"{say(output.name)} should go to shared memory", expected="outputs in the answer")
    best = parameters.get("classification", 0)
    if isinstance(best, bool) or not isinstance(best, int):
        raise DataError(f"the classification of {say(output.name)} is {say(best)}", expected="a whole number")
    return Wanted(output.name, True, best)


def write_answer(call: Call, results: Mapping[str, NDArray[Any]], writer: Writer, parameters: Mapping[str, Any]) -> Any:
    """The ``ModelInferResponse`` to ``call``, all of it in ``raw_output_contents`` (Triton's client reads no other).

    >>> import numpy as np
    >>> from trilobe.infrastructure.pipeline import TensorSpec
    >>> writer = Writer([TensorSpec("y", "UINT8", (-1,))], "m", "1")
    >>> write_answer(Call(None, {}, (Wanted("y", True),)), {"y": np.array([7], np.uint8)}, writer, {}).outputs[0].shape
    [1]
    """
    answer = load_messages()[0]["ModelInferResponse"](
        model_name=writer.name, model_version=writer.version, id=call.id or ""
    )
    for wanted in call.outputs:
        array, datatype, dtype = writer.tensor(wanted, results)
        answer.outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
        answer.raw_output_contents.append(pack(array, dtype))
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
        setattr(answer.parameters[name], kind, value if kind != "string_param" else str(value))
    return answer


# --- the server -----------------------------------------------------------------------------------------------------


class _Failed(Exception):
    """An answer that is an error: the HTTP status, the words, the headers."""

    def __init__(self, status: int, words: str, headers: Mapping[str, str]) -> None:
        super().__init__(words)
        self.status, self.headers = status, headers


class _Front:
    """The methods of the service, for one server."""

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.messages, self.methods = load_messages()

    def handlers(self) -> dict[str, Any]:
        """What grpc wants to know: for each method its function and its codecs."""
        import grpc

        made = {}
        for name, method in self.methods.items():
            make = grpc.stream_stream_rpc_method_handler if method.stream else grpc.unary_unary_rpc_method_handler
            function: Any = {"ModelInfer": self.infer, "ModelStreamInfer": self.stream}.get(name)
            made[name] = make(
                function or partial(self.tell, name), method.takes.FromString, method.gives.SerializeToString
            )
        return made

    async def infer(self, request: Any, context: Any) -> Any:
        """ModelInfer."""
        answer = await self._observed(request, *_who(context), context.time_remaining())
        return answer if not isinstance(answer, _Failed) else await _abort(context, answer)

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """ModelStreamInfer: one answer to each request, in their order; an error ends nothing but its request."""
        gives = self.messages["ModelStreamInferResponse"]
        headers, peer = _who(context)
        async for request in requests:
            answer = await self._observed(request, headers, peer, context.time_remaining())
            if isinstance(answer, _Failed):
                yield gives(error_message=str(answer))
                continue
            if request.parameters["triton_enable_empty_final_response"].bool_param:
                answer.parameters["triton_final_response"].bool_param = True
            yield gives(infer_response=answer)

    async def _tried(self, answer: Awaitable[Any]) -> Any:
        """The answer, or what went wrong as :class:`_Failed`; counted by its status."""
        try:
            found = await answer
        except asyncio.CancelledError:
            self.server.meters.count("trilobe_grpc_responses_total", code="CANCELLED")
            raise
        except _Failed as failed:
            found = failed
        except Exception as error:  # noqa: BLE001 (the server knows what to say of any)
            status, headers, body = self.server.explain(error)
            found = _Failed(status, msgspec.json.decode(body)["error"], headers)
        self.server.meters.count("trilobe_grpc_responses_total", code=_code(_status(found)))
        return found

    async def _observed(self, request: Any, headers: Mapping[str, str], peer: str, remaining: float | None) -> Any:
        """The answer to one request, or :class:`_Failed`; noted in a trace or in the log where its turn comes."""
        server, start, client = self.server, time.perf_counter_ns(), _NOBODY
        trace = server.traces.begin(headers) if server.traces is not None else None

        async def answered() -> Any:
            nonlocal client
            client = server.gate.client(headers, peer)
            return await self._infer(request, client, start, remaining, trace)

        answer = await self._tried(answered())
        status, name, version = _status(answer), request.model_name, request.model_version
        if trace is not None:
            trace.end(name, version, status, grpc=_code(status))
        if server.access is not None:
            seconds = (time.perf_counter_ns() - start) / 1e9
            server.access(headers[ID], name, version, status, seconds, client.name)
        return answer

    async def _infer(
        self, request: Any, client: Client, start: int, remaining: float | None, trace: "Trace | None"
    ) -> Any:
        server, name = self.server, request.model_name
        client.require("infer", name)
        chosen = server.choose(name, request.model_version)
        if request.ByteSize() > LARGE:
            loop = asyncio.get_running_loop()
            call = await loop.run_in_executor(server.readers, read_call, request, chosen.reader, remaining)
        else:
            call = read_call(request, chosen.reader, remaining)

        def finish(result: "Result") -> Any:
            return write_answer(call, result.outputs, result.version.writer, result.parameters)

        if not client.limited:
            return await server.infer(name, chosen, call, finish, time.perf_counter_ns() - start, trace)
        client.enter()
        try:
            return await server.infer(name, chosen, call, finish, time.perf_counter_ns() - start, trace)
        finally:
            client.leave()

    async def tell(self, name: str, request: Any, context: Any) -> Any:
        """Every other method: the same question over HTTP, its answer retold."""
        from google.protobuf import json_format

        method, path, body, shape = _ASKED[name](request)
        headers, peer = _who(context)
        answer = await self._tried(self._ask(Request(method, path, dict(headers), body, "", peer)))
        if isinstance(answer, _Failed):
            if name.endswith("Ready") and answer.status in (404, 503):
                return self.methods[name].gives(ready=False)
            return await _abort(context, answer)
        return json_format.ParseDict(shape(answer), self.methods[name].gives(), ignore_unknown_fields=True)

    async def _ask(self, request: Request) -> Any:
        reply = self.server.handle(request)
        status, headers, body = reply if isinstance(reply, tuple) else await reply
        answer = msgspec.json.decode(body) if body else {}
        if status >= 400:
            raise _Failed(status, answer.get("error", ""), headers)
        return answer


def _model(request: Any, rest: str = "") -> str:
    version = f"/versions/{quote(request.version, safe='')}" if request.version else ""
    return f"/v2/models/{quote(request.name, safe='')}{version}{rest}"


def _as_it_is(answer: Any) -> Any:
    return answer


# For each method: the HTTP method, path and body that ask the same, and how the answer becomes the message.
_Asked = tuple[str, str, bytes, Callable[[Any], Any]]
_ASKED: dict[str, Callable[[Any], _Asked]] = {
    "ServerLive": lambda _: ("GET", "/v2/health/live", b"", lambda _: {"live": True}),
    "ServerReady": lambda _: ("GET", "/v2/health/ready", b"", lambda _: {"ready": True}),
    "ModelReady": lambda r: ("GET", _model(r, "/ready"), b"", lambda _: {"ready": True}),
    "ServerMetadata": lambda _: ("GET", "/v2", b"", _as_it_is),
    "ModelMetadata": lambda r: ("GET", _model(r), b"", _as_it_is),
    "ModelConfig": lambda r: ("GET", _model(r, "/config"), b"", lambda answer: {"config": answer}),
    "ModelStatistics": lambda r: ("GET", _model(r, "/stats") if r.name else "/v2/models/stats", b"", _as_it_is),
    "RepositoryIndex": lambda r: (
        "POST",
        "/v2/repository/index",
        msgspec.json.encode({"ready": r.ready}),
        lambda answer: {"models": answer},
    ),
    "RepositoryModelLoad": lambda r: (
        "POST", f"/v2/repository/models/{quote(r.model_name, safe='')}/load", b"", _as_it_is,
    ),
    "RepositoryModelUnload": lambda r: (
        "POST", f"/v2/repository/models/{quote(r.model_name, safe='')}/unload", b"", _as_it_is,
    ),
}  # fmt: skip


def _who(context: Any) -> tuple[dict[str, str], str]:
    """The metadata as headers, and the common name of the client's certificate, where it showed one.

    A call without a usable id is given one. The id goes back with the answer, or with the error.
    """
    headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    headers[ID] = request_id(headers) or token_hex(16)
    context.set_trailing_metadata(((ID, headers[ID]),))
    names = context.auth_context().get("x509_common_name", [b""])
    return headers, names[0].decode(errors="replace")


def _status(answer: Any) -> int:
    return answer.status if isinstance(answer, _Failed) else 200


def _code(status: int) -> str:
    return _CODES.get(status, "INTERNAL")


async def _abort(context: Any, failed: _Failed) -> Any:
    import grpc

    kept = tuple((name.lower(), value) for name, value in failed.headers.items() if name.lower() == "retry-after")
    await context.abort(grpc.StatusCode[_code(failed.status)], str(failed), (*context.trailing_metadata(), *kept))


class GrpcFront(NamedTuple):
    """A gRPC server that listens: where, and how it ends."""

    port: int
    server: Any

    async def stop(self, patience: float = 30.0) -> None:
        """Accept nothing more, let what is under way finish for ``patience`` seconds, close everything."""
        await self.server.stop(patience)


def _credentials(certificate: Path, key: Path, authority: Path | None) -> Any:
    """TLS with these files, looked at again at every new connection: a renewed certificate needs no restart."""
    import grpc

    files = [path for path in (certificate, key, authority) if path is not None]

    def stamp() -> list[int]:
        return [path.stat().st_mtime_ns for path in files]

    def read() -> Any:
        pairs = [(key.read_bytes(), certificate.read_bytes())]
        return grpc.ssl_server_certificate_configuration(pairs, authority.read_bytes() if authority else None)

    known = stamp()

    def renewed() -> Any:
        nonlocal known
        with contextlib.suppress(OSError):  # files that are just being replaced: next time
            if (now := stamp()) != known:
                known = now
                return read()
        return None

    return grpc.dynamic_ssl_server_credentials(read(), renewed, authority is not None)


async def start_grpc(
    server: "Server",
    host: str = "127.0.0.1",
    port: int = 0,
    tls: tuple[Path, Path, Path | None] | None = None,
    max_message: int = 0,
) -> GrpcFront:
    """Answer gRPC for ``server`` at ``host:port`` (0: any free port).

    ``tls`` is a certificate, its key and, where clients must show a certificate too, the authority that signs theirs;
    ``max_message`` how many bytes a request may have (default: the server's ``max_body``). Raises
    :class:`~trilobe.errors.MissingExtra` without grpcio, :class:`~trilobe.errors.PortInUse` where the port is taken.
    """
    try:
        import grpc
        import grpc.aio
    except ImportError as error:
        raise MissingExtra(
            "gRPC needs grpcio, which is not installed", hint="pip install 'trilobe[grpc]', or serve HTTP only"
        ) from error
    front = grpc.aio.server(
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", max_message or server.max_body),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 32 * 1024),
            ("grpc.so_reuseport", int(port != 0)),  # workers share their port
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 600_000),  # a client that comes back connects again by itself
        ],
    )
    front.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _Front(server).handlers()),))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = front.add_insecure_port(address)
        else:
            bound = front.add_secure_port(address, _credentials(*tls))
    except RuntimeError as error:
        raise PortInUse(f"port {port} of {host} cannot be used for gRPC ({error})", expected="a free port") from error
    if not bound:
        raise ServeError(f"cannot listen on {address} for gRPC", expected="an address of this machine")
    await front.start()
    return GrpcFront(bound, front)
