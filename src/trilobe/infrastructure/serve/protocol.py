"""Serving: the Open Inference Protocol v2 over HTTP, with its binary tensor extension, for one named model.

From bytes to arrays and back (:func:`parse_request`, :func:`encode_response`: pure), the :class:`Server` that holds
what is served and swaps it under load, and :func:`serve_forever`, the process around it. What a bundle means is given
from above as ``load``. There is no framework in the path of a request: it would cost more than the model. Inference
runs in one worker thread, so that health checks are answered meanwhile.

Left out on purpose: the ``classification`` parameter (refused, not ignored) and compressed replies.
"""

import asyncio
import errno
import logging
import math
import os
import re
import signal
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from trilobe import __version__
from trilobe.errors import DataError, PortInUse, ServeError, TrilobeError
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.capture import CaptureLog
from trilobe.infrastructure.endpoint import Desired, State, hold_lock, read_desired, read_state, write_state
from trilobe.infrastructure.pipeline import Arrays, Servable, TensorSpec, pack, unpack
from trilobe.types import Bundle

MAX_BODY = 16 * 1024 * 1024
POLL_SECONDS = 0.2
HEADER_LENGTH = "inference-header-content-length"
logger = logging.getLogger(__name__)

Load = Callable[[Bundle], Servable]
Reply = tuple[int, dict[str, str], bytes]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refused(DataError):
    """A request this server will not answer, with the HTTP status that says why."""

    def __init__(self, status: int, problem: str, *, expected: str = "", hint: str = "") -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.status = status


# --- from bytes to arrays -------------------------------------------------------------------------------------------


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Output(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct, frozen=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed request: its id, its input arrays, and the outputs it wants with whether each comes binary."""

    id: str | None
    inputs: Mapping[str, NDArray[Any]]
    outputs: tuple[tuple[str, bool], ...]


def parse_request(
    body: bytes, headers: Mapping[str, str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Call:
    """The call that ``body`` and its (lower-case) ``headers`` ask for, checked against what the model declares.

    Tensors come as JSON (flat or nested, row-major) or, with ``Inference-Header-Content-Length``, as little-endian
    bytes after the JSON; length 0 means that all of ``body`` is the one tensor of a batch of one. Raises
    :class:`~trilobe.errors.DataError` for whatever does not fit.

    >>> spec = TensorSpec("x", "FP32", (-1, 2))
    >>> body = b'{"id": "7", "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}]}'
    >>> parse_request(body, {}, [spec], [TensorSpec("y", "FP32", (-1,))])
    Call(id='7', inputs={'x': array([[1. , 2.5]], dtype=float32)}, outputs=(('y', False),))
    """
    length = _header_length(headers, len(body))
    if length == 0:
        return Call(None, {inputs[0].name: _raw_tensor(body, inputs)}, tuple((spec.name, True) for spec in outputs))
    try:
        request = _REQUEST.decode(memoryview(body)[:length])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DataError(f"the request is not usable JSON ({error})", expected="an inference request") from error
    known = {spec.name: spec for spec in inputs}
    arrays: dict[str, NDArray[Any]] = {}
    at = len(body) if length is None else length
    for tensor in request.inputs:
        spec = known.get(tensor.name)
        if spec is None or tensor.name in arrays:
            problem = f"unknown input {tensor.name!r}" if spec is None else f"input {tensor.name!r} comes twice"
            raise DataError(problem, expected=f"each of {list(known)} once")
        if tensor.datatype != spec.datatype:
            raise DataError(f"{tensor.name!r} has the datatype {tensor.datatype!r}", expected=spec.datatype)
        spec.check_shape(tensor.shape)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _json_array(tensor, spec)
        else:
            arrays[tensor.name] = _binary_array(tensor, spec, memoryview(body)[at:], size)
            at += size
        spec.check(arrays[tensor.name])
    if missing := [name for name in known if name not in arrays]:
        raise DataError(f"input {missing[0]!r} is missing", expected=f"each of {list(known)} once")
    if at != len(body):
        raise DataError(f"{len(body) - at} bytes follow the last binary tensor", expected="none")
    return Call(request.id, arrays, _wanted(request, [spec.name for spec in outputs]))


_REQUEST = msgspec.json.Decoder(_Request)
_NESTED = re.compile(rb"\s*\[\s*\[")
_ELEMENTS: dict[str, type] = {"b": bool, "u": int, "i": int, "f": float, "O": str}


@lru_cache(maxsize=64)
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[Any]:
    """A strict decoder of ``depth`` nested lists: no booleans as numbers, no fractions as integers."""
    nested: Any = _ELEMENTS[kind]
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)


def _header_length(headers: Mapping[str, str], n_bytes: int) -> int | None:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= n_bytes):
        raise DataError(f"Inference-Header-Content-Length is {text!r}", expected=f"0 to {n_bytes}, the body's length")
    return int(text)


def _json_array(tensor: _Tensor, spec: TensorSpec) -> NDArray[Any]:
    if isinstance(tensor.data, msgspec.UnsetType):
        raise DataError(f"{tensor.name!r} has no data", expected="data, or parameters.binary_data_size")
    raw = memoryview(tensor.data)
    nested = len(spec.shape) > 1 and _NESTED.match(raw) is not None
    try:
        values = _decoder(spec.dtype.kind, len(spec.shape) if nested else 1).decode(raw)
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and infinite is refused
            array = np.array(values, dtype=spec.dtype)
        if spec.dtype.kind == "O":
            array = np.frompyfunc(str.encode, 1, 1)(array)
    except (msgspec.MsgspecError, RecursionError, OverflowError, ValueError) as error:
        raise DataError(
            f"the data of {tensor.name!r} is not usable ({error})",
            expected=f"{spec.datatype}, flat or nested as its shape",
        ) from error
    if array.size != math.prod(tensor.shape) or (nested and list(array.shape) != tensor.shape):
        raise DataError(
            f"{tensor.name!r} holds {array.size} values", expected=f"{math.prod(tensor.shape)} for {tensor.shape}"
        )
    shaped: NDArray[Any] = array.reshape(tensor.shape)
    return shaped


def _binary_array(tensor: _Tensor, spec: TensorSpec, rest: memoryview, size: Any) -> NDArray[Any]:
    if not isinstance(tensor.data, msgspec.UnsetType):
        raise DataError(f"{tensor.name!r} has data and a binary_data_size", expected="one of them")
    free = spec.dtype.kind == "O"
    expected = size if free else math.prod(tensor.shape) * spec.dtype.itemsize
    if not isinstance(size, int) or isinstance(size, bool) or size != expected or not 0 <= size <= len(rest):
        raise DataError(
            f"{tensor.name!r} has the binary_data_size {size!r} with {len(rest)} bytes left in the body",
            expected=f"{'as many' if free else expected} bytes for {tensor.shape} {spec.datatype}",
        )
    try:
        return unpack(rest[:size], spec.dtype, tensor.shape)
    except DataError as error:
        raise DataError(f"{tensor.name!r} has {error.problem}", expected=error.expected) from error


def _raw_tensor(body: bytes, inputs: Sequence[TensorSpec]) -> NDArray[Any]:
    """The single tensor that all of ``body`` is: a batch of one, with at most one more free size to work out."""
    spec = inputs[0]
    shape = [1, *spec.shape[1:]]
    if spec.dtype.kind == "O" and len(inputs) == 1 and shape == [1]:
        return np.array([body], dtype=object)
    if len(inputs) != 1 or shape.count(-1) > 1:
        raise DataError(
            "a raw body without a description", expected="a model with one input and at most one free size per item"
        )
    if -1 in shape:
        known = -math.prod(shape) * spec.dtype.itemsize
        shape[shape.index(-1)] = max(1, len(body) // known)
    if len(body) != math.prod(shape) * spec.dtype.itemsize:
        raise DataError(f"a raw body of {len(body)} bytes", expected=f"one {spec.datatype} item of {list(spec.shape)}")
    array = unpack(memoryview(body), spec.dtype, shape)
    spec.check(array)
    return array


def _wanted(request: _Request, names: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    default = request.parameters.get("binary_data_output", False)
    asked = [_Output(name) for name in names] if not request.outputs else request.outputs
    if len({output.name for output in asked}) != len(asked):
        raise DataError("an output is asked for twice", expected=f"each of {list(names)} at most once")
    for output in asked:
        if output.name not in names:
            raise DataError(f"unknown output {output.name!r}", expected=f"one of {list(names)}")
        if "classification" in output.parameters:
            raise DataError("the 'classification' parameter is not supported", expected="all values, sorted by you")
        if not isinstance(output.parameters.get("binary_data", default), bool):
            raise DataError("binary_data is not a boolean", expected="true or false")
    return tuple((output.name, output.parameters.get("binary_data", default)) for output in asked)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """``body`` without its ``Content-Encoding`` (gzip, or deflate, which is zlib); never more than ``limit`` bytes.

    >>> decompress(zlib.compress(b"abc"), "deflate", 10)
    b'abc'
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refused(415, f"the content encoding {encoding!r}", expected="gzip, deflate or none")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise DataError(f"the body is not {encoding} ({error})", expected="a whole compressed body") from error
    if len(data) > limit:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise DataError(f"the {encoding} body does not end where it should", expected="a whole compressed body")
    return data


def encode_response(
    call: Call, results: Arrays, outputs: Sequence[TensorSpec], name: str, version: str
) -> tuple[dict[str, str], bytes]:
    """Headers and body of the answer to ``call``: its id, the model's name and version, the outputs it wanted.

    >>> call, spec = Call("7", {}, (("y", False),)), TensorSpec("y", "FP32", (-1,))
    >>> encode_response(call, {"y": np.array([0.5], np.float32)}, [spec], "m", "v1")[1].decode()
    '{"model_name":"m","model_version":"v1","outputs":[{"name":"y","shape":[1],"datatype":"FP32","data":[0.5]}],"id":"7"}'
    """
    specs = {spec.name: spec for spec in outputs}
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for key, binary in call.outputs:
        array = results[key]
        tensor: dict[str, Any] = {"name": key, "shape": array.shape, "datatype": specs[key].datatype}
        if binary:
            blobs.append(pack(array, specs[key].dtype))
            described.append({**tensor, "parameters": {"binary_data_size": len(blobs[-1])}})
        else:
            described.append({**tensor, "data": _json_values(key, array)})
    answer: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": described}
    if call.id is not None:
        answer["id"] = call.id
    head = msgspec.json.encode(answer)
    if not blobs:
        return {"content-type": "application/json"}, head
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return headers, b"".join([head, *blobs])


def _json_values(name: str, array: NDArray[Any]) -> list[Any]:
    values: list[Any] = array.ravel().tolist()
    try:
        return [v.decode() for v in values] if array.dtype.kind == "O" else values
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} holds bytes that are no text", expected="binary_data: true for them") from error
