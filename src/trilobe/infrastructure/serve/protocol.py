"""The Open Inference Protocol v2 over HTTP: from bytes to arrays and back. Pure, and the same for every front end.

A :class:`Reader` is made once for what a model takes and gives, and turns each body into a :class:`Call`; a
:class:`Writer` turns a call's results into headers and a body. Spoken besides JSON are the binary tensor extension in
both directions, the classification, parameters, schedule-policy and sequence extensions, gzip and deflate. Tensors are
checked against their declaration before memory is taken for them.

Stricter than Triton: unknown fields of tensors aside, nothing that would change the answer is passed over in silence
(shared memory is refused, so are NaN and infinity). Wider than Triton: FP16 may come and go as JSON.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from reprlib import Repr
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError
from trilobe.infrastructure.pipeline import Arrays, TensorSpec, pack, unpack

HEADER_LENGTH = "inference-header-content-length"
MAX_STRINGS = 1 << 17  # in one tensor: empty ones take four bytes of a body each, and a hundred as objects
PICTURES = ("image/", "application/x-image")  # content types; the second is what SageMaker's clients send
COMPRESS_FROM = 1024  # bytes: below, an answer fits one packet anyway
Scalar = str | bool | int | float
_NONE: Mapping[str, Any] = MappingProxyType({})
_shorten = Repr()  # what a client sent is said back to it, but not at length
_shorten.maxstring = _shorten.maxlong = _shorten.maxother = 100
say = _shorten.repr


class Refused(DataError):
    """A request this server will not answer, with the HTTP status that says why and headers that say what to do.

    >>> str(Refused(404, "unknown model 'cats'", expected="'digits'"))
    "unknown model 'cats'; expected 'digits'"
    """

    def __init__(
        self, status: int, problem: str, *, expected: str = "", hint: str = "", headers: Mapping[str, str] = _NONE
    ) -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.status, self.headers = status, headers


class Wanted(NamedTuple):
    """An output that a call wants: as bytes or as JSON, whole or (``classification`` > 0) as its best classes."""

    name: str
    binary: bool
    classification: int = 0


class Call(msgspec.Struct, frozen=True, eq=False):
    """A parsed request.

    ``parameters`` are the client's own (and ``sequence_*``), ``priority`` is 1 for the most urgent and 0 where the
    client leaves it open, ``timeout`` is in seconds, ``rows`` the size of the first axis of the inputs. ``plain``: one
    file as the body, whose sender could not say what is wanted.
    """

    id: str | None
    inputs: Arrays
    outputs: tuple[Wanted, ...]
    parameters: Mapping[str, Any] = _NONE
    priority: int = 0
    timeout: float | None = None
    rows: int = 1
    plain: bool = False


# --- what is on the wire --------------------------------------------------------------------------------------------


class _Given(msgspec.Struct, frozen=True):
    """The parameters of an input that mean something here."""

    binary_data_size: int | None = None
    shared_memory_region: Any = None


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: _Given = _Given()
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Asked(msgspec.Struct, frozen=True):
    """The parameters of a wanted output that mean something here."""

    binary_data: bool | None = None
    classification: int = 0
    shared_memory_region: Any = None


class _Output(msgspec.Struct, frozen=True):
    name: str
    parameters: _Asked = _Asked()


class _Request(msgspec.Struct, frozen=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Scalar] | None = None
    outputs: list[_Output] | None = None


class _Size(msgspec.Struct, frozen=True):
    binary_data_size: int


class _Described(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: _Size | msgspec.UnsetType = msgspec.UNSET
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class _Answer(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str
    outputs: list[_Described]
    id: str | msgspec.UnsetType = msgspec.UNSET
    parameters: Mapping[str, Any] | msgspec.UnsetType = msgspec.UNSET


_decode = msgspec.json.Decoder(_Request).decode
_encode = msgspec.json.Encoder().encode
_NESTED = re.compile(rb"\s*\[\s*\[")
_ELEMENTS: dict[str, type] = {"b": bool, "u": int, "i": int, "f": float, "O": str}


@lru_cache(maxsize=64)
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[Any]:
    """A strict decoder of ``depth`` nested lists: no booleans as numbers, no fractions as integers."""
    nested: Any = _ELEMENTS[kind]
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)


# --- from bytes to arrays -------------------------------------------------------------------------------------------


class Slot:
    """One declared input, ready to be filled: what :class:`~trilobe.infrastructure.pipeline.TensorSpec` says, worked
    out once."""

    __slots__ = ("dtype", "free", "itemsize", "kind", "name", "spec", "tail")

    def __init__(self, spec: TensorSpec) -> None:
        self.spec, self.name, self.dtype = spec, spec.name, spec.dtype
        self.kind, self.itemsize = spec.dtype.kind, spec.dtype.itemsize
        self.free = spec.shape[:1] == (-1,)
        self.tail = list(spec.shape[1:])

    def check(self, datatype: str, shape: Sequence[int]) -> None:
        """Raise :class:`~trilobe.errors.DataError` unless a tensor of ``datatype`` and ``shape`` fits."""
        if datatype != self.spec.datatype:
            raise DataError(f"{self.name!r} has the datatype {say(datatype)}", expected=self.spec.datatype)
        if self.free and shape and shape[0] >= 1 and shape[1:] == self.tail:
            return  # the common case, decided fast
        if len(shape) != len(self.spec.shape):
            raise DataError(f"{self.name!r} has {len(shape)} dimensions", expected=f"{list(self.spec.shape)}")
        self.spec.check_shape(shape)

    def from_bytes(self, data: bytes, start: int, size: int, shape: Sequence[int]) -> NDArray[Any]:
        """The tensor of (checked) ``shape`` that lies in ``data`` from ``start``, ``size`` bytes of it."""
        if self.kind == "O":
            expected, fits = "as many", 0 <= size <= len(data) - start
        else:
            count = math.prod(shape) * self.itemsize
            expected, fits = f"{count}", size == count <= len(data) - start
        if not fits:
            raise DataError(
                f"{self.name!r} has the binary_data_size {say(size)} with {len(data) - start} bytes left in the body",
                expected=f"{expected} bytes for {list(shape)} {self.spec.datatype}",
            )
        if self.kind == "O" and math.prod(shape) > MAX_STRINGS:
            raise DataError(f"{self.name!r} holds {math.prod(shape)} strings", expected=f"at most {MAX_STRINGS}")
        if self.kind in "Ob":
            try:
                return unpack(memoryview(data)[start : start + size], self.dtype, shape)
            except DataError as error:
                raise DataError(f"{self.name!r} has {error.problem}", expected=error.expected) from error
        flat = np.frombuffer(data, self.dtype, size // self.itemsize, start)
        if not flat.flags.aligned:  # the JSON before it may have any length, so wide numbers may start anywhere
            flat = flat.copy()
        if self.kind == "f":
            self.spec.check_finite(flat)
        return flat.reshape(shape)

    def from_json(self, raw: msgspec.Raw, shape: list[int]) -> NDArray[Any]:
        """The tensor of (checked) ``shape`` that a JSON array holds, flat or nested as its shape."""
        text = bytes(raw)
        if self.kind != "O" and (count := text.count(b",") + 1) != math.prod(shape):
            raise self._miscounted(count, shape)  # before memory is taken for them
        nested = len(shape) > 1 and _NESTED.match(text) is not None
        try:
            values = _decoder(self.kind, len(shape) if nested else 1).decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self._unusable(error) from error
        return self.from_values(values, shape, nested)

    def from_values(self, values: Iterable[Any], shape: list[int], nested: bool = False) -> NDArray[Any]:
        """The tensor of (checked) ``shape`` that Python ``values`` make up (text or bytes for BYTES)."""
        try:
            with np.errstate(over="ignore"):  # what overflows becomes infinite, and infinite is refused
                array = np.array(values, dtype=self.dtype)
            if self.kind == "O":
                array = np.frompyfunc(_as_bytes, 1, 1)(array)
        except (OverflowError, ValueError, TypeError) as error:
            raise self._unusable(error) from error
        if array.size != math.prod(shape) or (nested and list(array.shape) != shape):
            raise self._miscounted(array.size, shape)
        if self.kind == "f":
            self.spec.check_finite(array)
        filled: NDArray[Any] = array.reshape(shape)
        return filled

    def _miscounted(self, count: int, shape: list[int]) -> DataError:
        return DataError(f"{self.name!r} holds {count} values", expected=f"{math.prod(shape)} for the shape {shape}")

    def _unusable(self, error: Exception) -> DataError:
        return DataError(
            f"the data of {self.name!r} is not usable ({error})",
            expected=f"{self.spec.datatype}, flat or nested as its shape",
        )


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


class Reader:
    """Turns requests for a model that takes ``inputs`` and gives ``outputs`` into calls; made once for each model.

    Where there is one for ``files``, it takes inputs that come as BYTES, and bodies that are a picture by their content
    type: so does the one of a model that takes BYTES in any case.

    >>> reader = Reader([TensorSpec("x", "FP32", (-1, 2))], [TensorSpec("y", "FP32", (-1,))])
    >>> body = b'{"id": "7", "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}]}'
    >>> call = reader.parse(body, {})
    >>> (call.id, call.inputs["x"].tolist(), call.outputs, call.rows)
    ('7', [[1.0, 2.5]], (Wanted(name='y', binary=False, classification=0),), 1)
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], files: "Reader | None" = None
    ) -> None:
        self.inputs, self.outputs, self.files = tuple(inputs), tuple(outputs), files
        if files is None and [(spec.datatype, spec.shape) for spec in inputs] == [("BYTES", (-1,))]:
            self.files = self
        self.slots = {spec.name: Slot(spec) for spec in inputs}
        self._first = self.inputs[0].name
        self._free = [slot.name for slot in self.slots.values() if slot.free]
        self._all = {binary: tuple(Wanted(spec.name, binary) for spec in outputs) for binary in (False, True)}
        self._kinds = {spec.name: spec.dtype.kind for spec in outputs}

    def parse(self, body: bytes, headers: Mapping[str, str]) -> Call:
        """The call that ``body`` (decompressed) and its (lower-case) ``headers`` ask for.

        Tensors come as JSON (flat or nested, row-major) or, with ``Inference-Header-Content-Length``, as
        little-endian bytes after the JSON; length 0 means that all of ``body`` is the one tensor of a batch of one,
        and the content type of a picture that it is a file, to be answered in JSON.
        Raises :class:`~trilobe.errors.DataError` for whatever does not fit.
        """
        if self.files is not None and headers.get("content-type", "").lower().startswith(PICTURES):
            call = self.files.call(None, {self._first: _one(body)}, self._all[False])
            return msgspec.structs.replace(call, plain=True)
        length = headers.get(HEADER_LENGTH)
        at = len(body)
        if length is not None:
            at = _header_length(length, at)
            if at == 0:
                return self._parse_raw(body)
        try:
            request = _decode(body if length is None else body[:at])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise DataError(f"the request is not usable JSON ({error})", expected="an inference request") from error
        arrays: dict[str, NDArray[Any]] = {}
        for tensor in request.inputs:
            slot = self.slot(tensor.name, arrays, tensor.datatype)
            slot.check(tensor.datatype, tensor.shape)
            given, data = tensor.parameters, tensor.data
            if given.shared_memory_region is not None:
                raise _no_shared_memory(tensor.name)
            size = given.binary_data_size
            if size is not None:
                if not isinstance(data, msgspec.UnsetType):
                    raise DataError(f"{tensor.name!r} has data and a binary_data_size", expected="one of them")
                arrays[tensor.name] = slot.from_bytes(body, at, size, tensor.shape)
                at += size
            elif isinstance(data, msgspec.UnsetType):
                raise DataError(f"{tensor.name!r} has no data", expected="data, or parameters.binary_data_size")
            else:
                arrays[tensor.name] = slot.from_json(data, tensor.shape)
        if at != len(body):
            raise DataError(f"{len(body) - at} bytes follow the last binary tensor", expected="none")
        if not request.parameters:
            return self.call(request.id, arrays, self._wanted(request.outputs, False))
        return self._with_parameters(request, arrays, request.parameters)

    def _with_parameters(self, request: _Request, arrays: Arrays, parameters: dict[str, Scalar]) -> Call:
        binary = parameters.pop("binary_data_output", False)
        if not isinstance(binary, bool):
            raise DataError("binary_data_output is not a boolean", expected="true or false")
        return self.call(request.id, arrays, self._wanted(request.outputs, binary), parameters)

    def slot(self, name: str, arrays: Arrays, datatype: str) -> Slot:
        """Where input ``name`` belongs; refused where it is unknown, or among the ``arrays`` already."""
        slot = (self.files if self.files is not None and datatype == "BYTES" else self).slots.get(name)
        if slot is None or name in arrays:
            problem = f"unknown input {say(name)}" if slot is None else f"input {name!r} comes twice"
            raise DataError(problem, expected=f"each of {list(self.slots)} once")
        return slot

    def call(
        self, id: str | None, arrays: Arrays, outputs: tuple[Wanted, ...], parameters: Mapping[str, Any] = _NONE
    ) -> Call:
        """The call made of checked ``arrays``; refused where one is missing or they disagree on how many items come."""
        if len(arrays) != len(self.slots):
            missing = [name for name in self.slots if name not in arrays]
            raise DataError(f"input {missing[0]!r} is missing", expected=f"each of {list(self.slots)} once")
        shape = arrays[self._first].shape
        rows = shape[0] if shape else 1
        if len(self._free) > 1 and len({len(arrays[name]) for name in self._free}) > 1:
            sizes = {name: len(arrays[name]) for name in self._free}
            raise DataError(f"the inputs hold {sizes} items", expected="as many in each")
        if not parameters:
            return Call(id, arrays, outputs, _NONE, 0, None, rows)
        own, priority, timeout = _read_parameters(parameters)
        return Call(id, arrays, outputs, own, priority, timeout, rows)

    def wanted(self, asked: Iterable[Wanted], binary: bool) -> tuple[Wanted, ...]:
        """The outputs ``asked`` for, checked; all of them, ``binary`` or not, where none is."""
        outputs = tuple(asked)
        for output in outputs:
            kind = self._kinds.get(output.name)
            if kind is None:
                raise DataError(f"unknown output {say(output.name)}", expected=f"one of {list(self._kinds)}")
            if output.classification and (output.classification < 0 or kind not in "uif"):
                raise DataError(
                    f"the best {say(output.classification)} classes of {output.name!r}",
                    expected="1 or more, of numbers",
                )
        if len(outputs) > 1 and len({output.name for output in outputs}) != len(outputs):
            raise DataError("an output is asked for twice", expected=f"each of {list(self._kinds)} at most once")
        return outputs or self._all[binary]

    def _wanted(self, asked: list[_Output] | None, binary: bool) -> tuple[Wanted, ...]:
        if not asked:
            return self._all[binary]
        outputs = []
        for output in asked:
            how = output.parameters
            if how.shared_memory_region is not None:
                raise _no_shared_memory(output.name)
            own = binary if how.binary_data is None else how.binary_data
            outputs.append(Wanted(output.name, own, how.classification))
        return self.wanted(outputs, binary)

    def _parse_raw(self, body: bytes) -> Call:
        """The single tensor that all of ``body`` is: a batch of one, with at most one more free size to work out."""
        if not body:
            raise DataError("an empty body", expected="a tensor")
        if self.files is not None:
            return self.files.call(None, {self._first: _one(body)}, self._all[True])
        slot = self.slots[self._first]
        shape = [1, *slot.tail]
        if len(self.inputs) != 1 or shape.count(-1) > 1:
            raise DataError(
                "a raw body without a description", expected="a model with one input and at most one free size per item"
            )
        if -1 in shape:
            known = -math.prod(shape) * slot.itemsize
            shape[shape.index(-1)] = max(1, len(body) // known)
        slot.check(slot.spec.datatype, shape)
        if slot.kind != "O" and len(body) != math.prod(shape) * slot.itemsize:
            expected = f"one {slot.spec.datatype} item of {list(slot.spec.shape)}"
            raise DataError(f"a raw body of {len(body)} bytes", expected=expected)
        return self.call(None, {slot.name: slot.from_bytes(body, 0, len(body), shape)}, self._all[True])


def _one(body: bytes) -> NDArray[np.object_]:
    return np.array([body], dtype=object)


def parse_request(
    body: bytes, headers: Mapping[str, str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Call:
    """One request, by a :class:`Reader` of its own.

    >>> spec = TensorSpec("x", "FP32", (-1, 2))
    >>> parse_request(np.ones(2, "<f4").tobytes(), {HEADER_LENGTH: "0"}, [spec], [spec]).inputs
    {'x': array([[1., 1.]], dtype=float32)}
    """
    return Reader(inputs, outputs).parse(body, headers)


def _header_length(text: str, n_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= n_bytes):
        raise DataError(
            f"Inference-Header-Content-Length is {say(text)}", expected=f"0 to {n_bytes}, the body's length"
        )
    return int(text)


def _no_shared_memory(name: str) -> DataError:
    return DataError(f"{say(name)} is in shared memory", expected="data in the request, or after it as bytes")


_TYPES: dict[str, tuple[type, ...]] = {"sequence_id": (str, int), "sequence_start": (bool,), "sequence_end": (bool,)}


def _read_parameters(parameters: Mapping[str, Any]) -> tuple[Mapping[str, Any], int, float | None]:
    """The client's own parameters (with ``sequence_*``), the priority, and the timeout in seconds."""
    own: dict[str, Any] = {}
    whole = {"priority": 0, "timeout": 0}
    for name, value in parameters.items():
        if name in whole:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
                raise DataError(f"the parameter {say(name)} is {say(value)}", expected="a whole number from 0")
            whole[name] = value
        elif name.startswith("triton_"):
            raise DataError(f"the parameter {say(name)}", expected="a name that does not begin with triton_")
        elif name in _TYPES and type(value) not in _TYPES[name]:
            kinds = " or ".join(kind.__name__ for kind in _TYPES[name])
            raise DataError(f"the parameter {say(name)} is {say(value)}", expected=kinds)
        else:
            own[name] = value
    return own, whole["priority"], whole["timeout"] / 1e6 or None


# --- from arrays to bytes -------------------------------------------------------------------------------------------


class Writer:
    """Turns results into answers in the name of model ``name`` in ``version``; made once for each.

    ``labels`` gives outputs names of their classes: for those who ask for the best classes only, and for those who
    sent a file and could not ask.

    >>> writer = Writer([TensorSpec("y", "FP32", (-1, 2))], "m", "v1", {"y": ["cat", "dog"]})
    >>> call, y = Call("7", {}, (Wanted("y", False),)), np.array([[0.5, 0.25]], np.float32)
    >>> writer.encode(call, {"y": y})[1].decode()
    '{"model_name":"m","model_version":"v1","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[0.5,0.25]}],"id":"7"}'
    >>> best = Call(None, {}, (Wanted("y", False, 1),))
    >>> msgspec.json.decode(writer.encode(best, {"y": y})[1])["outputs"]
    [{'name': 'y', 'shape': [1, 1], 'datatype': 'BYTES', 'data': ['0.500000:0:cat']}]
    >>> file = Call(None, {}, (Wanted("y", False),), plain=True)
    >>> msgspec.json.decode(writer.encode(file, {"y": y})[1])["parameters"]
    {'label': 'cat', 'confidence': 0.5}
    """

    def __init__(
        self,
        outputs: Sequence[TensorSpec],
        name: str,
        version: str,
        labels: Mapping[str, Sequence[str]] = _NONE,
    ) -> None:
        self.name, self.version, self.labels = name, version, labels
        self._types = {spec.name: (spec.datatype, spec.dtype) for spec in outputs}

    def tensor(self, wanted: Wanted, results: Arrays) -> tuple[NDArray[Any], str, np.dtype[Any]]:
        """A wanted output, its datatype and the dtype to pack it with: what the model gave, or its best classes."""
        array = results[wanted.name]
        if wanted.classification:
            return classify(array, wanted.classification, self.labels.get(wanted.name, ())), "BYTES", _OBJECT
        return array, *self._types[wanted.name]

    def decided(self, results: Arrays) -> dict[str, Any]:
        """The best class of the one item and its figure, in the words of ``trilobe infer``; nothing without names."""
        for name, labels in self.labels.items():
            row = results[name][0]
            best = int(row.argmax())
            return {"label": labels[best], "confidence": row[best].item()}
        return {}

    def encode(
        self, call: Call, results: Arrays, parameters: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, str], bytes]:
        """Headers and body of the answer to ``call``: its id, the outputs it wanted, ``parameters`` where there are."""
        if call.plain:
            parameters = {**self.decided(results), **(parameters or {})}
        described: list[_Described] = []
        blobs: list[bytes] = []
        for wanted in call.outputs:
            array, datatype, dtype = self.tensor(wanted, results)
            if wanted.binary:
                blob = pack(array, dtype)
                blobs.append(blob)
                described.append(_Described(wanted.name, array.shape, datatype, _Size(len(blob))))
            else:
                described.append(_Described(wanted.name, array.shape, datatype, data=_json_values(wanted.name, array)))
        head = _encode(
            _Answer(
                self.name,
                self.version,
                described,
                msgspec.UNSET if call.id is None else call.id,
                parameters or msgspec.UNSET,
            )
        )
        if not blobs:
            return {"content-type": "application/json"}, head
        headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
        return headers, b"".join([head, *blobs])


def encode_response(
    call: Call,
    results: Arrays,
    outputs: Sequence[TensorSpec],
    name: str,
    version: str,
    parameters: Mapping[str, Any] | None = None,
    labels: Mapping[str, Sequence[str]] = _NONE,
) -> tuple[dict[str, str], bytes]:
    """One answer, by a :class:`Writer` of its own.

    >>> call, spec = Call(None, {}, (Wanted("y", True),)), TensorSpec("y", "UINT8", (-1,))
    >>> encode_response(call, {"y": np.array([7], np.uint8)}, [spec], "m", "v1")[1][-1]
    7
    """
    return Writer(outputs, name, version, labels).encode(call, results, parameters)


_OBJECT = np.dtype(object)


def classify(array: NDArray[Any], count: int, labels: Sequence[str] = ()) -> NDArray[Any]:
    """The ``count`` highest entries of each item as Triton writes them: ``value:index`` or ``value:index:label``.

    ``array`` is ``(n, ...)``, everything after the first axis counts as classes; the result is ``(n, k)`` of bytes,
    k = the smaller of ``count`` and the number of classes, highest first, the earlier of equals first. Floats have six
    decimals, as C's ``%f`` (Triton's classification extension, ``TopkClassifications``).

    >>> classify(np.array([[1, 5, 10, 4]]), 2, ["pear", "pickle", "apple"]).tolist()
    [[b'10:2:apple', b'5:1:pickle']]
    """
    rows = array.reshape(len(array), -1)
    width = rows.shape[1]
    order = (width - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable"))[:, ::-1][:, :count]
    form = "%f:%d" if array.dtype.kind == "f" else "%d:%d"
    names = [f":{label}" for label in labels[:width]]
    names += [""] * (width - len(names))
    best = np.empty(order.shape, dtype=object)
    for i, indices in enumerate(order.tolist()):
        best[i] = [(form % (rows[i, j], j) + names[j]).encode() for j in indices]
    return best


def _json_values(name: str, array: NDArray[Any]) -> list[Any]:
    values: list[Any] = array.ravel().tolist()
    try:
        return [v.decode() for v in values] if array.dtype.kind == "O" else values
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} holds bytes that are no text", expected="binary_data: true for them") from error


# --- content codings ------------------------------------------------------------------------------------------------


_WINDOWS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """``body`` without its ``Content-Encoding`` (gzip, or deflate, which is zlib); never more than ``limit`` bytes.

    >>> decompress(zlib.compress(b"abc"), "deflate", 10)
    b'abc'
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise Refused(415, f"the content encoding {say(encoding)}", expected="gzip, deflate or none")
    unpacker = zlib.decompressobj(wbits=_WINDOWS[encoding])
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise DataError(f"the body is not {encoding} ({error})", expected="a whole compressed body") from error
    if len(data) > limit:
        raise Refused(
            413, "the body is too large", expected=f"at most {limit} bytes decompressed", hint="send smaller batches"
        )
    if not unpacker.eof or unpacker.unused_data:
        raise DataError(f"the {encoding} body does not end where it should", expected="a whole compressed body")
    return data


def compress(body: bytes, accept: str) -> tuple[str, bytes]:
    """The content coding chosen by ``accept`` (an ``Accept-Encoding`` header) and ``body`` in it.

    The coding is ``""`` and the body as it was where the client did not ask, where it is short, or where packing
    would not make it smaller. Fast rather than small (level 1). Of what weighs the same, gzip.

    >>> compress(bytes(5000), "br, deflate;q=0.5, gzip;q=0.8")[0]
    'gzip'
    >>> compress(b"short", "gzip")
    ('', b'short')
    """
    if len(body) < COMPRESS_FROM or not accept:
        return "", body
    coding = _chosen(accept)
    if not coding:
        return "", body
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[coding])
    packed = packer.compress(body) + packer.flush()
    return (coding, packed) if len(packed) < len(body) else ("", body)


@lru_cache(maxsize=64)
def _chosen(accept: str) -> str:
    """The best of our codings by an ``Accept-Encoding`` header (RFC 9110, 12.5.3), "" for none."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        coding, _, rest = part.strip().partition(";")
        key, _, text = rest.strip().partition("=")
        try:
            weights[coding.strip()] = float(text) if key.strip() == "q" else 1.0
        except ValueError:
            weights[coding.strip()] = 0.0
    other = weights.get("*", 0.0)
    best = max(_WINDOWS, key=lambda coding: weights.get(coding, other))
    weight = weights.get(best, other)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else ""
