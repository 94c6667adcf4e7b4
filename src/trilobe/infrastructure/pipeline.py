"""Pipelines: a graph of steps over one request, now a chain, and what a model must declare to be served.

A step is a name and a function from arrays by name to arrays by name. Each step sees the request and everything the
steps before it added, so inputs are held once. Batching, queues and sockets live elsewhere (``serve.py``).
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, UsageError

Arrays = Mapping[str, NDArray[Any]]
Step = tuple[str, Callable[[Arrays], Arrays]]

# The datatypes of the Open Inference Protocol v2, little-endian as its binary extension sends them. BYTES, which are of
# any length, are object arrays of bytes here.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BYTES": np.dtype(object),
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"INT{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a request or a reply looks like: Open Inference datatype and shape, -1 where free.

    >>> TensorSpec("image", "UINT8", (-1, 28, 28, 1)).check(np.zeros((2, 28, 28, 3), np.uint8))
    Traceback (most recent call last):
    trilobe.errors.DataError: 'image' has the shape [2, 28, 28, 3]; expected [-1, 28, 28, 1] (-1: any size from 1)
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise UsageError(f"{self.name!r} has the datatype {self.datatype!r}", expected=f"one of {list(DATATYPES)}")
        if any(size < 1 and size != -1 for size in self.shape):
            raise UsageError(f"{self.name!r} has the shape {list(self.shape)}", expected="sizes from 1, or -1 for free")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the datatype."""
        return DATATYPES[self.datatype]

    @classmethod
    def parse(cls, name: str, text: str) -> "TensorSpec":
        """From the short form, a datatype and a shape.

        >>> TensorSpec.parse("image", "UINT8[-1, 28, 28, 1]")
        TensorSpec(name='image', datatype='UINT8', shape=(-1, 28, 28, 1))
        """
        datatype, bracket, sizes = text.replace(" ", "").partition("[")
        parts = sizes.removesuffix("]").split(",")
        if not bracket or not sizes.endswith("]") or not all(part.lstrip("-").isdigit() for part in parts):
            raise UsageError(f"{name!r} is declared as {text!r}", expected='a datatype and a shape, "FP32[-1,10]"')
        return cls(name, datatype, tuple(int(part) for part in parts))

    def takes(self, other: "TensorSpec") -> bool:
        """Whether every tensor like ``other`` may be one like this.

        >>> TensorSpec("x", "FP32", (-1, 3)).takes(TensorSpec("y", "FP32", (-1, 4)))
        False
        """
        return (
            self.datatype == other.datatype
            and len(self.shape) == len(other.shape)
            and all(a in (-1, b) or b == -1 for a, b in zip(self.shape, other.shape, strict=True))
        )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise :class:`~trilobe.errors.DataError` unless ``shape`` fits; an empty dimension never does."""
        fits = len(shape) == len(self.shape)
        if fits:  # as a loop: all() over a generator takes four times as long, and this is asked of every tensor
            for size, want in zip(shape, self.shape, strict=True):
                if size != want and (want != -1 or size < 1):
                    fits = False
        if not fits:
            raise DataError(
                f"{self.name!r} has the shape {list(shape)}", expected=f"{list(self.shape)} (-1: any size from 1)"
            )

    def check_type(self, array: NDArray[Any]) -> None:
        """Raise :class:`~trilobe.errors.DataError` unless ``array`` has this dtype and shape."""
        if array.dtype != DATATYPES[self.datatype]:
            raise DataError(f"{self.name!r} has the dtype {array.dtype}", expected=f"{self.dtype} ({self.datatype})")
        self.check_shape(array.shape)

    def check(self, array: NDArray[Any]) -> None:
        """Raise :class:`~trilobe.errors.DataError` unless ``array`` has this dtype and shape and only finite values."""
        self.check_type(array)
        kind = array.dtype.kind
        if kind == "f":
            self.check_finite(array)
        elif kind == "O" and not all(isinstance(entry, bytes) for entry in array.flat):
            raise DataError(f"{self.name!r} holds values that are not bytes", expected="BYTES")

    def check_finite(self, array: NDArray[Any]) -> None:
        """Raise :class:`~trilobe.errors.DataError` where an entry of a float array is NaN or infinite."""
        if np.count_nonzero(np.isfinite(array)) != array.size:  # a third of the time of .all() on small arrays
            raise DataError(f"{self.name!r} holds values that are not finite", expected="no NaN and no infinity")


def pack(array: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """An array as the binary extension sends it, row by row; each of BYTES after its length (4 bytes, little-endian).

    >>> pack(np.array([b"ab"], dtype=object), DATATYPES["BYTES"])
    b'\\x02\\x00\\x00\\x00ab'
    """
    if dtype.kind == "O":
        return b"".join(part for entry in array.flat for part in (len(entry).to_bytes(4, "little"), entry))
    return array.astype(dtype, copy=False).tobytes()


def unpack(data: bytes | memoryview, dtype: np.dtype[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The inverse of :func:`pack`. Raises :class:`~trilobe.errors.DataError` for data that do not fill the shape.

    >>> unpack(b"\\x02\\x00\\x00\\x00ab", DATATYPES["BYTES"], [1]).tolist()
    [b'ab']
    """
    count = math.prod(shape)
    if dtype.kind == "O":
        entries: list[bytes] = []
        at = 0
        while at + 4 <= len(data) and len(entries) <= count:
            size = int.from_bytes(data[at : at + 4], "little")
            entries.append(bytes(data[at + 4 : at + 4 + size]))
            at += 4 + size
        if at != len(data) or len(entries) != count:
            raise DataError(f"{len(data)} bytes that are not {count} strings", expected="each after its length")
        out = np.empty(count, dtype=object)
        out[:] = entries
        return out.reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{len(data)} bytes", expected=f"{count * dtype.itemsize} for the shape {list(shape)}")
    if dtype.kind == "b":  # any nonzero byte is true, but numpy trusts a boolean to be 0 or 1
        return np.frombuffer(data, np.uint8).astype(np.bool_).reshape(shape)
    # The JSON before it may have any length, so wide numbers may start anywhere: copied then, a view otherwise.
    return np.require(np.frombuffer(data, dtype).reshape(shape), requirements="A")


class Pipeline:
    """Steps run in order over one request; every step's calls and nanoseconds are counted (safe across threads).

    >>> double = ("double", lambda data: {"y": 2 * data["x"]})
    >>> total = ("total", lambda data: {"sum": data["x"].sum() + data["y"].sum()})
    >>> pipeline = Pipeline([double, total])
    >>> int(pipeline.run({"x": np.arange(3)})["sum"])
    9
    >>> [(name, count) for name, (count, nanoseconds) in pipeline.times().items()]
    [('double', 1), ('total', 1)]
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        names = [name for name, _ in steps]
        if not names or len(set(names)) != len(names):
            raise UsageError(f"a pipeline of the steps {names}", expected="at least one step, each name once")
        self.steps = tuple(steps)
        self._times = {name: [0, 0] for name in names}
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """All arrays after the last step: ``inputs`` and whatever the steps added or replaced.

        A step that refuses its data with :class:`~trilobe.errors.DataError` blames the request; any other error of
        a step is :class:`~trilobe.errors.ServeError`. Both name the step.
        """
        data = dict(inputs)
        for name, step in self.steps:
            start = time.perf_counter_ns()
            try:
                data.update(step(data))
            except DataError as error:
                problem = f"step {name!r}: {error.problem}"
                raise DataError(problem, expected=error.expected, hint=error.hint) from error
            except Exception as error:
                raise ServeError(f"step {name!r} failed: {type(error).__name__}: {error}") from error
            spent = time.perf_counter_ns() - start
            times = self._times[name]
            with self._lock:
                times[0] += 1
                times[1] += spent
        return data

    def times(self) -> dict[str, tuple[int, int]]:
        """For each step, how often it finished and how many nanoseconds that took in all."""
        with self._lock:
            return {name: (count, total) for name, (count, total) in self._times.items()}


def declared(made: Arrays, specs: Sequence[TensorSpec], who: str, *, values: bool = True) -> dict[str, NDArray[Any]]:
    """Of what ``who`` made, what it had declared; :class:`~trilobe.errors.ServeError` where it did not keep to that.

    Without ``values`` they are not looked at: where those who made the arrays have been asked already.

    >>> declared({"y": np.ones(2), "z": np.ones(1)}, [TensorSpec("y", "FP32", (-1,))], "step 'a'")
    Traceback (most recent call last):
    trilobe.errors.ServeError: step 'a': output 'y' has the dtype float64; expected float32 (FP32)
    """
    kept: dict[str, NDArray[Any]] = {}
    for spec in specs:
        array = made.get(spec.name)
        if array is None:
            raise ServeError(f"{who} gave no {spec.name!r}", expected=f"one of: {', '.join(sorted(made))}")
        try:
            spec.check(array) if values else spec.check_type(array)
        except DataError as error:
            raise ServeError(f"{who}: output {error.problem}", expected=error.expected) from error
        kept[spec.name] = array
    return kept


@dataclass(frozen=True, slots=True)
class Servable:
    """What a bundle becomes when loaded: a pipeline, what it takes, what it gives, and an example to warm it up.

    ``preparation`` names what the first step does, in all that it depends on: of models that share one input, those
    with equal preparations have it done once (see ``serve/graph.py``). Empty: it is not shared. ``labels`` are names of
    the columns of an output, for clients that ask for the best classes. ``files`` is the same for whole files: it takes
    BYTES by the name under which this takes arrays, and is not warmed up.

    >>> spec = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
    >>> x = np.ones(2, np.float32)
    >>> servable = Servable(Pipeline([("add", lambda data: {"y": data["x"] + 1})]), spec[:1], spec[1:], {"x": x})
    >>> servable.run({"x": x})
    {'y': array([2., 2.], dtype=float32)}
    """

    pipeline: Pipeline
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    warmup: Arrays
    preparation: str = ""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: "Servable | None" = None

    def parts(self) -> "tuple[Servable, Servable] | None":
        """The first step and the rest, where the first is named as a ``preparation`` that models may share."""
        if not self.preparation or len(self.pipeline.steps) < 2:
            return None
        first, rest = Pipeline(self.pipeline.steps[:1]), Pipeline(self.pipeline.steps[1:])
        return Servable(first, self.inputs, (), self.warmup), Servable(rest, (), self.outputs, {})

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The declared outputs for ``inputs`` (already checked); an output not as declared is a ``ServeError``."""
        data = self.pipeline.run(inputs)
        if not self.outputs:  # a part of a pipeline: what it made
            return {name: array for name, array in data.items() if name not in inputs}
        return declared(data, self.outputs, "the pipeline")

    def warm_up(self) -> None:
        """Run the example once: the first real request must not pay for lazy set-up, nor be the first to fail."""
        for spec in self.inputs:
            if spec.name not in self.warmup:
                raise ServeError(f"the warm-up example has no {spec.name!r}", expected="every declared input")
            spec.check(self.warmup[spec.name])
        self.run(self.warmup)


def stands_alone(servable: Servable) -> bool:
    """Whether a row among others gets the bits it gets alone, so that rows may be computed together.

    It is tried out, with the warm-up example and two that are a little different.

    >>> x, y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
    >>> share = Pipeline([("share", lambda data: {"y": data["x"] / data["x"].sum()})])
    >>> stands_alone(Servable(share, (x,), (y,), {"x": np.ones(1, np.float32)}))
    False
    """
    if any(spec.shape[:1] != (-1,) for spec in (*servable.inputs, *servable.outputs)):
        return False
    rows = [{s.name: _varied(servable.warmup[s.name][:1], i) for s in servable.inputs} for i in range(3)]
    alone = [servable.run(row) for row in rows]
    among = servable.run({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    return all(np.array_equal(np.concatenate([row[name] for row in alone]), array) for name, array in among.items())


def _varied(array: NDArray[Any], by: int) -> NDArray[Any]:
    """A row like that: numbers a little larger, each by another bit, and texts longer; the row itself for 0."""
    if array.dtype.kind == "O":
        return np.frompyfunc(lambda entry: b" ".join([entry] * (1 + by)), 1, 1)(array)  # type: ignore[no-any-return]
    more = np.random.default_rng(by).integers(0, 1 + 4 * by, array.shape)
    return np.asarray(array ^ (more % 2 == 1) if array.dtype.kind == "b" else array + more.astype(array.dtype))


def onnx_step(
    model: bytes | Path,
    name: str = "model",
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Step:
    """A step that runs an ONNX graph on the CPU in one thread that sleeps, rather than spins, when idle.

    ``inputs`` and ``outputs`` map names of the graph to names of the request (default: the same names). Raises
    :class:`~trilobe.errors.ServeError` for a graph that cannot be loaded, or that names files to take tensors from
    (ONNX's external data: a stranger's graph could hand out any file of this machine as its answer);
    :class:`~trilobe.errors.UsageError` for a name the graph does not have or an input left without a source.

    >>> onnx_step(b"not a graph")
    Traceback (most recent call last):
    trilobe.errors.ServeError: the graph of step 'model' cannot be loaded ...
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # nothing here tells anybody anything
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 3
    try:
        data = model if isinstance(model, bytes) else model.read_bytes()
        if takes_from_files(data):
            raise DataError("it takes tensors from other files")
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ServeError(
            f"the graph of step {name!r} cannot be loaded ({error})", expected="an ONNX graph this runtime supports"
        ) from error
    takes, gives = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    sources = dict(inputs) if inputs is not None else {n: n for n in takes}
    targets = dict(outputs) if outputs is not None else {n: n for n in gives}
    if set(sources) != set(takes) or not set(targets) <= set(gives) or not targets:
        raise UsageError(
            f"step {name!r} maps inputs {sorted(sources)} and outputs {sorted(targets)}",
            expected=f"the graph's inputs {takes} and some of its outputs {gives}",
        )

    wanted, called = list(targets), list(targets.values())

    def run(data: Arrays) -> Arrays:
        values = session.run(wanted, {graph: data[key] for graph, key in sources.items()})
        return dict(zip(called, values, strict=True))

    return name, run


# Where tensors lie in an ONNX file: of each kind of message, the fields that hold messages that may hold tensors.
# https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_HOLDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


def takes_from_files(graph: bytes) -> bool:
    """Whether an ONNX graph says of any tensor that its values are in another file (or somewhere in memory).

    Walks the protobuf encoding itself: the ``onnx`` package costs a server 20 MB, and the runtime reads such files
    wherever they are, relative to the current folder. What is no protobuf raises :class:`~trilobe.errors.DataError`.

    >>> takes_from_files(b"")
    False
    """
    todo: list[tuple[str, memoryview]] = [("model", memoryview(graph))]
    while todo:
        kind, message = todo.pop()
        for number, value in _fields(message):
            if kind == "tensor" and (number == 13 or (number == 14 and value != 0)):  # external_data, data_location
                return True
            if isinstance(value, memoryview) and (inner := _HOLDS[kind].get(number)):
                todo.append((inner, value))
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: their numbers, with an integer or what stands between their ends."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7, -1)
        if tag & 7 == 2:
            size, at = _varint(message, at)
        if size < 0 or at + size > len(message):
            raise DataError("it is not an ONNX graph")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise DataError("it is not an ONNX graph")
