"""The protocol alone: what is written can be read, what is refused is said, nothing else happens."""

import gzip
import json
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilobe.errors import DataError
from trilobe.infrastructure.pipeline import DATATYPES, TensorSpec
from trilobe.infrastructure.serve.protocol import (
    COMPRESS_FROM,
    HEADER_LENGTH,
    Call,
    Reader,
    Refused,
    Wanted,
    Writer,
    classify,
    compress,
    decompress,
    encode_response,
    parse_request,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
IMAGE, PROBA = TensorSpec("image", "UINT8", (-1, -1, -1, 3)), TensorSpec("proba", "FP32", (-1, 2))
READER = Reader([IMAGE], [PROBA, TensorSpec("words", "BYTES", (-1,))])


def image_tensor(images: np.ndarray = IMAGES, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    return {k: v for k, v in {**tensor, **changes}.items() if v is not None}


def body_of(*tensors: Any, **request: Any) -> bytes:
    return msgspec.json.encode({"inputs": list(tensors or [image_tensor()]), **request})


def with_bytes(head: bytes, data: bytes) -> tuple[bytes, dict[str, str]]:
    return head + data, {HEADER_LENGTH: str(len(head))}


# --- there and back -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(datatype=st.sampled_from(sorted(DATATYPES)), data=st.data())
def test_any_tensor_survives_both_codecs(datatype: str, data: st.DataObject) -> None:
    """What a writer writes, a reader reads back bit for bit, as JSON and as bytes."""
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    dtype = DATATYPES[datatype]
    finite: Any = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    elements = st.text(max_size=4).map(str.encode) if datatype == "BYTES" else finite
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    spec = TensorSpec("t", datatype, (-1,) * len(shape))
    for binary in (False, True):
        headers, body = encode_response(Call("é", {}, (Wanted("t", binary),)), {"t": array}, [spec], "m", "v")
        head = body[: int(headers.get(HEADER_LENGTH, len(body)))]
        answer = msgspec.json.decode(head)
        request = msgspec.json.encode({"id": answer["id"], "inputs": answer["outputs"]})
        length = {HEADER_LENGTH: str(len(request))} if binary else {}
        found = parse_request(request + body[len(head) :], length, [spec], [spec])
        assert found.id == "é" and found.rows == shape[0]
        assert found.inputs["t"].dtype == dtype and found.inputs["t"].flags.aligned
        assert found.inputs["t"].shape == array.shape
        same = found.inputs["t"].tolist() == array.tolist() if datatype == "BYTES" else None
        assert same or found.inputs["t"].tobytes() == array.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["FP64", "UINT8", "BYTES"]), min_size=2, max_size=4), st.data())
def test_several_inputs_lie_one_after_another(datatypes: list[str], data: st.DataObject) -> None:
    """In the order of the request, whatever that of the model, as bytes and as JSON mixed."""
    specs = [TensorSpec(f"t{i}", datatype, (-1,)) for i, datatype in enumerate(datatypes)]
    arrays = {s.name: np.array([b"a", b"bc"], object) if s.datatype == "BYTES" else np.arange(2, dtype=s.dtype)
              for s in specs}  # fmt: skip
    order = data.draw(st.permutations([spec.name for spec in specs]))
    wanted = tuple(Wanted(name, data.draw(st.booleans())) for name in order)
    headers, body = Writer(specs, "m", "1").encode(Call(None, {}, wanted), arrays)
    at = int(headers.get(HEADER_LENGTH, len(body)))
    head = msgspec.json.encode({"inputs": msgspec.json.decode(body[:at])["outputs"]})
    sent = {HEADER_LENGTH: str(len(head))} if HEADER_LENGTH in headers else {}
    found = Reader(specs, specs).parse(head + body[at:], sent).inputs
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in arrays.items()}


def test_wide_numbers_may_start_anywhere() -> None:
    spec, x = TensorSpec("x", "FP64", (-1,)), np.arange(3, dtype="<f8")
    for pad in range(8):
        tensor = {"name": "x", "shape": [3], "datatype": "FP64", "parameters": {"binary_data_size": 24}}
        head = json.dumps({"inputs": [tensor]}).encode() + b" " * pad
        found = parse_request(*with_bytes(head, x.tobytes()), [spec], [spec]).inputs["x"]
        assert found.flags.aligned and found.tolist() == x.tolist()


def test_a_raw_body_is_a_batch_of_one() -> None:
    out = TensorSpec("y", "FP32", (-1,))
    item, raw = np.arange(6, dtype="<f4"), {HEADER_LENGTH: "0"}
    for shape in ((-1, 2, 3), (-1, -1, 3), (1, 6)):
        found = parse_request(item.tobytes(), raw, [TensorSpec("x", "FP32", shape)], [out])
        assert found.outputs == (("y", True, 0),) and found.inputs["x"].ravel().tolist() == item.tolist()
    for shape in ((-1, -1, -1), (-1, 7), (-1, -1, 4), (2, 3)):
        with pytest.raises(DataError):
            parse_request(item.tobytes(), raw, [TensorSpec("x", "FP32", shape)], [out])
    words = parse_request(b"any \xff", raw, [TensorSpec("text", "BYTES", (-1,))], [out])
    assert words.inputs["text"].tolist() == [b"any \xff"]
    with pytest.raises(DataError, match="empty"):
        parse_request(b"", raw, [TensorSpec("text", "BYTES", (-1,))], [out])
    two = [TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,))]
    with pytest.raises(DataError, match="without a description"):
        parse_request(item.tobytes(), raw, two, [out])


def test_whitespace_and_booleans() -> None:
    spec = TensorSpec("t", "BOOL", (-1, 2))
    data = b" [ \n" + b" " * 99 + b"[true,\tfalse] ]"
    body = b'{"inputs": [{"name": "t", "shape": [1, 2], "datatype": "BOOL", "data":' + data + b"}]}"
    assert parse_request(body, {}, [spec], [spec]).inputs["t"].tolist() == [[True, False]]
    with pytest.raises(DataError):
        parse_request(body.replace(b"true", b"1"), {}, [spec], [spec])


def test_bytes_that_are_no_text_go_out_as_bytes_only() -> None:
    array, spec = np.array([b"\xff"], dtype=object), TensorSpec("t", "BYTES", (-1,))
    call = Call(None, {}, (Wanted("t", True),))
    assert encode_response(call, {"t": array}, [spec], "m", "v")[1].endswith(b"\1\0\0\0\xff")
    with pytest.raises(DataError, match="no text; expected binary_data: true"):
        encode_response(Call(None, {}, (Wanted("t", False),)), {"t": array}, [spec], "m", "v")


def test_an_answer_says_what_it_was_asked() -> None:
    """Id and parameters only where there are any; the header length only where something is binary."""
    writer, y = Writer([PROBA], "colors", "abc"), np.array([[0.25, 0.75]], np.float32)
    headers, body = writer.encode(Call(None, {}, (Wanted("proba", False),)), {"proba": y})
    assert headers == {"content-type": "application/json"}
    output = {"name": "proba", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.75]}
    assert json.loads(body) == {"model_name": "colors", "model_version": "abc", "outputs": [output]}
    headers, body = writer.encode(Call("", {}, (Wanted("proba", True),)), {"proba": y}, {"deferred": True})
    at = int(headers[HEADER_LENGTH])
    assert headers["content-type"] == "application/octet-stream" and body[at:] == y.tobytes()
    answer = json.loads(body[:at])
    assert answer["id"] == "" and answer["parameters"] == {"deferred": True}
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 8} and "data" not in answer["outputs"][0]


# --- what a call may ask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_level", "of_output", "binary"),
    [(None, None, False), (None, True, True), (True, None, True), (True, False, False), (False, True, True)],
)
def test_what_is_said_of_an_output_wins(request_level: bool | None, of_output: bool | None, binary: bool) -> None:
    options: dict[str, Any] = {}
    if request_level is not None:
        options["parameters"] = {"binary_data_output": request_level}
    parameters = {} if of_output is None else {"parameters": {"binary_data": of_output}}
    found = READER.parse(body_of(outputs=[{"name": "proba", **parameters}], **options), {})
    assert found.outputs == (Wanted("proba", binary),)
    if of_output is None:  # no output named: all of them
        found = READER.parse(body_of(**options), {})
        assert found.outputs == (Wanted("proba", binary), Wanted("words", binary))
        assert READER.parse(body_of(outputs=[], **options), {}).outputs == found.outputs


def test_priority_timeout_and_own_parameters() -> None:
    own = {"user": "é", "beam": 3, "sharp": True, "scale": 0.5, "sequence_id": 7, "sequence_start": True}
    found = READER.parse(body_of(parameters={"priority": 1, "timeout": 1500, "binary_data_output": True, **own}), {})
    assert (found.priority, found.timeout, dict(found.parameters)) == (1, 0.0015, own)
    assert all(output.binary for output in found.outputs)
    plain = READER.parse(body_of(parameters={"priority": 0, "timeout": 0}), {})
    assert (plain.priority, plain.timeout, dict(plain.parameters), plain.rows) == (0, None, {}, 3)
    assert READER.parse(body_of(parameters=None, outputs=None, id=None), {}).id is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"priority": -1},
        {"priority": "high"},
        {"priority": True},
        {"priority": 1.5},
        {"priority": 2**64},
        {"timeout": -1},
        {"timeout": 0.5},
        {"triton_enable_empty_final_response": True},
        {"sequence_id": True},
        {"sequence_start": 1},
        {"sequence_end": "yes"},
        {"binary_data_output": 1},
        {"binary_data_output": "true"},
        {"nothing": None},
        {"a": [1]},
        {"a": {"b": 1}},
        [],
        "text",
    ],
    ids=str,
)
def test_parameters_that_are_refused(parameters: Any) -> None:
    with pytest.raises(DataError):
        READER.parse(body_of(parameters=parameters), {})


def test_inputs_must_agree_on_their_items() -> None:
    specs = [TensorSpec("a", "UINT8", (-1, 2)), TensorSpec("b", "UINT8", (-1,)), TensorSpec("scale", "UINT8", (1,))]
    reader = Reader(specs, [PROBA])

    def sent(n: int) -> bytes:
        shapes: dict[str, tuple[int, ...]] = {"scale": (1,), "b": (n,), "a": (2, 2)}
        return body_of(*[{"name": name, "shape": shape, "datatype": "UINT8", "data": [1] * int(np.prod(shape))}
                         for name, shape in shapes.items()])  # fmt: skip

    assert reader.parse(sent(2), {}).rows == 2
    with pytest.raises(DataError, match=r"\{'a': 2, 'b': 3\} items"):
        reader.parse(sent(3), {})


# --- what is refused ------------------------------------------------------------------------------------------------

SHARED = {"shared_memory_region": "r", "shared_memory_byte_size": 180}
BAD: dict[str, Any] = {
    "no JSON": b"nope",
    "empty": b"",
    "not UTF-8": b'{"inputs": "\xff"}',
    "a lone surrogate": b'{"inputs": [{"name": "\\ud800"}]}',
    "NaN": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": [NaN, 1, 2]}]}',
    "deep": b'{"inputs": ' + b"[" * 49_000,
    "deep and closed": b'{"inputs": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep data": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": '
    + b"[" * 40_000
    + b"]" * 40_000
    + b"}]}",
    "a list": b"[]",
    "no inputs": b"{}",
    "inputs null": b'{"inputs": null}',
    "missing input": b'{"inputs": []}',
    "unknown input": body_of(image_tensor(name="nope")),
    "a very long name": body_of(image_tensor(name="n" * 50_000)),
    "an input more": body_of(image_tensor(), image_tensor(name="nope")),
    "an input twice": body_of(image_tensor(), image_tensor()),
    "no shape": body_of(image_tensor(shape=None)),
    "no data": body_of(image_tensor(data=None)),
    "data null": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": null}]}',
    "data a number": body_of(image_tensor(data=3)),
    "data an object": body_of(image_tensor(data={"a": 1})),
    "wrong datatype": body_of(image_tensor(datatype="FP32")),
    "unknown datatype": body_of(image_tensor(datatype="IMAGE" * 1000)),
    "lower case": body_of(image_tensor(datatype="uint8")),
    "no dimension": body_of(image_tensor(shape=[])),
    "fewer dimensions": body_of(image_tensor(shape=[180])),
    "more dimensions": body_of(image_tensor(shape=[1, 3, 4, 5, 3])),
    "very many dimensions": body_of(image_tensor(shape=[1] * 50_000)),
    "fixed dimension": body_of(image_tensor(shape=[3, 3, 4, 5])),
    "product": body_of(image_tensor(shape=[3, 4, 4, 3])),
    "negative": body_of(image_tensor(shape=[-3, -4, 5, 3])),
    "free": body_of(image_tensor(shape=[-1, 4, 5, 3])),
    "zero": body_of(image_tensor(shape=[0, 4, 5, 3], data=[])),
    "huge": body_of(image_tensor(shape=[2**62, 2**62, 2**62, 3])),
    "larger than 64 bits": json.dumps({"inputs": [image_tensor(shape=[10**40, 4, 5, 3])]}).encode(),
    "of 5000 digits": b'{"inputs": [{"name": "image", "shape": [' + b"9" * 5000 + b',1,1,3], "datatype": "UINT8"}]}',
    "wraps to the right product": json.dumps({"inputs": [image_tensor(shape=[3, 2**64 + 4, 5, 3])]}).encode(),
    "fractional": body_of(image_tensor(shape=[3.5, 4, 5, 3])),
    "ragged": body_of(image_tensor(data=[[[[1, 2, 3]], [[1, 2]]]], shape=[1, 2, 1, 3])),
    "ragged, as many": body_of(image_tensor(data=[[[[1, 2, 3]], [[1, 2], [3]]]], shape=[1, 2, 1, 3])),
    "nested otherwise": body_of(image_tensor(data=IMAGES.reshape(3, 5, 4, 3).tolist())),
    "partly nested": body_of(image_tensor(data=IMAGES.reshape(3, 60).tolist())),
    "too large a number": body_of(image_tensor(data=[256] * 180)),
    "far too large a number": json.dumps({"inputs": [image_tensor(data=[2**70] * 180)]}).encode(),
    "negative number": body_of(image_tensor(data=[-1] * 180)),
    "fractions": body_of(image_tensor(data=[0.5] * 180)),
    "strings": body_of(image_tensor(data=["1"] * 180)),
    "booleans": body_of(image_tensor(data=[True] * 180)),
    "nulls": body_of(image_tensor(data=[None] * 180)),
    "id a number": body_of(id=7),
    "unknown output": body_of(outputs=[{"name": "nope" * 9999}]),
    "an output twice": body_of(outputs=[{"name": "proba"}] * 2),
    "output without name": body_of(outputs=[{}]),
    "classification of words": body_of(outputs=[{"name": "words", "parameters": {"classification": 1}}]),
    "classification below 0": body_of(outputs=[{"name": "proba", "parameters": {"classification": -1}}]),
    "classification a text": body_of(outputs=[{"name": "proba", "parameters": {"classification": "1"}}]),
    "classification true": body_of(outputs=[{"name": "proba", "parameters": {"classification": True}}]),
    "binary_data": body_of(outputs=[{"name": "proba", "parameters": {"binary_data": "yes"}}]),
    "binary_data_output": body_of(parameters={"binary_data_output": 1}),
    "binary without bytes": body_of(image_tensor(data=None, parameters={"binary_data_size": 180})),
    "binary and data": body_of(image_tensor(parameters={"binary_data_size": 180})),
    "shared memory in": body_of(image_tensor(data=None, parameters=SHARED)),
    "shared memory out": body_of(outputs=[{"name": "proba", "parameters": SHARED}]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name: str) -> None:
    with pytest.raises(DataError) as caught:
        READER.parse(BAD[name], {})
    said = str(caught.value)
    assert said and len(said) < 1000 and msgspec.json.encode({"error": said})


@pytest.mark.parametrize("length", ["-1", "x", "", "1.5", "9" * 30, "9" * 5000, "999999", "3", "²", "٣", " 9", "+9"])
def test_bad_header_lengths(length: str) -> None:
    body = body_of()
    assert len(body) > 9
    with pytest.raises(DataError) as caught:
        READER.parse(body, {HEADER_LENGTH: length})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("size", [-1, 0, 179, 181, 2**63, 10**30, 180.5, True, "180", [180]])
def test_bad_binary_sizes(size: Any) -> None:
    head = json.dumps({"inputs": [image_tensor(data=None, parameters={"binary_data_size": size})]}).encode()
    with pytest.raises(DataError, match="binary_data_size"):
        READER.parse(*with_bytes(head, IMAGES.tobytes()))


def test_bytes_left_over_or_missing() -> None:
    head = body_of(image_tensor(data=None, parameters={"binary_data_size": 180}))
    assert READER.parse(*with_bytes(head, IMAGES.tobytes())).rows == 3
    for data in (IMAGES.tobytes() + b"x", IMAGES.tobytes()[:-1]):
        with pytest.raises(DataError):
            READER.parse(*with_bytes(head, data))
    with pytest.raises(DataError, match="1 bytes follow"):
        READER.parse(*with_bytes(body_of(), b"x"))
    with pytest.raises(DataError):
        READER.parse(IMAGES.tobytes(), {HEADER_LENGTH: "0"})


@pytest.mark.parametrize("sent", [b"", b"\2\0\0\0a", b"\1\0\0\0a\0", b"\xff\xff\xff\xff"])
def test_strings_that_do_not_fill_their_bytes(sent: bytes) -> None:
    tensor = {"name": "t", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(sent)}}
    spec = TensorSpec("t", "BYTES", (-1,))
    with pytest.raises(DataError, match="'t' has"):
        parse_request(*with_bytes(body_of(tensor), sent), [spec], [spec])


@pytest.mark.parametrize("value", ["1e39", "-1e39", "1e999", "NaN", "Infinity"])
def test_floats_must_be_finite(value: str) -> None:
    spec = TensorSpec("t", "FP32", (-1,))
    tensor = f'{{"inputs": [{{"name": "t", "shape": [1], "datatype": "FP32", "data": [{value}]}}]}}'
    with pytest.raises(DataError):
        parse_request(tensor.encode(), {}, [spec], [spec])


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many_is_found(datatype: str, bad: float) -> None:
    spec = TensorSpec("t", datatype, (-1,))
    x = np.full(5000, np.finfo(spec.dtype).max, spec.dtype)  # whatever adds up on the way must not matter
    tensor = {"name": "t", "shape": [5000], "datatype": datatype, "parameters": {"binary_data_size": x.nbytes}}
    assert parse_request(*with_bytes(body_of(tensor), x.tobytes()), [spec], [spec]).rows == 5000
    for at in (0, 2500, 4999):
        broken = x.copy()
        broken[at] = bad
        with pytest.raises(DataError, match="not finite"):
            parse_request(*with_bytes(body_of(tensor), broken.tobytes()), [spec], [spec])


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=60), length=st.none() | st.integers(-1, 70).map(str))
def test_no_bytes_do_anything_but_parse_or_be_refused(body: bytes, length: str | None) -> None:
    headers = {} if length is None else {HEADER_LENGTH: length}
    spec = TensorSpec("t", "FP32", (-1, 2))
    try:
        found = parse_request(body, headers, [spec], [spec])
    except DataError as error:
        assert error.problem
    else:
        assert found.inputs["t"].tobytes() == body


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["image", "proba", "UINT8", "BYTES", "FP32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_json_does_anything_but_parse_or_be_refused(data: st.DataObject) -> None:
    """A good request with one of its parts replaced by anything, or taken away, and bytes that may not fit."""
    tensor: dict[str, Any] = image_tensor(data=None, parameters={"binary_data_size": 180})
    request: dict[str, Any] = {
        "inputs": [tensor],
        "id": "1",
        "parameters": {"priority": 1, "timeout": 5},
        "outputs": [{"name": "proba", "parameters": {"binary_data": True, "classification": 1}}],
    }
    places = [request, tensor, tensor["parameters"], request["parameters"], request["outputs"][0]["parameters"]]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(ODD)
    head = json.dumps(request).encode()
    sent = IMAGES.tobytes() + data.draw(st.binary(max_size=2))
    try:
        found = READER.parse(*with_bytes(head, sent))
    except DataError as error:
        assert len(str(error)) < 2000
    else:
        assert found.inputs["image"].tobytes() == IMAGES.tobytes()
        assert READER.wanted(found.outputs, True) == found.outputs


# --- classification -------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int8, np.uint8, np.uint64]),
        st.tuples(st.integers(1, 3), st.integers(1, 5)),
        elements=st.integers(0, 4),
    ),
    st.integers(1, 7),
)
def test_the_best_classes(array: np.ndarray, count: int) -> None:
    """Against the plain way: sort the classes of each item by value, then by place (Triton's TopkClassifications)."""
    labels = ["zero", "one", "two"]
    form = "{:.6f}" if array.dtype.kind == "f" else "{}"
    expected = []
    for row in array.tolist():
        best = sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]
        expected.append([f"{form.format(row[j])}:{j}" + (f":{labels[j]}" if j < 3 else "") for j in best])
    assert [[entry.decode() for entry in row] for row in classify(array, count, labels)] == expected


def test_classification_as_json_and_as_bytes() -> None:
    y = np.array([[0.1, 0.7, 0.2], [5, -1, 0]], np.float32)
    spec = TensorSpec("y", "FP32", (-1, 3))
    reader, writer = Reader([IMAGE], [spec]), Writer([spec], "m", "1", {"y": ["a", "b", "c"]})
    outputs = [{"name": "y", "parameters": {"classification": 2, "binary_data": False}}]
    call = reader.parse(body_of(outputs=outputs), {})
    assert call.outputs == (Wanted("y", False, 2),)
    _, body = writer.encode(call, {"y": y})
    found = json.loads(body)["outputs"][0]
    assert (found["datatype"], found["shape"]) == ("BYTES", [2, 2])
    assert found["data"] == ["0.700000:1:b", "0.200000:2:c", "5.000000:0:a", "0.000000:2:c"]
    headers, body = writer.encode(Call(None, {}, (Wanted("y", True, 1),)), {"y": y})
    words = ["0.700000:1:b", "5.000000:0:a"]
    sent = b"".join(len(word).to_bytes(4, "little") + word.encode() for word in words)
    assert body[int(headers[HEADER_LENGTH]) :] == sent
    outputs = [{"name": "y", "parameters": {"classification": 0}}]
    assert reader.parse(body_of(outputs=outputs), {}).outputs == (Wanted("y", False),)


def test_classification_of_other_shapes() -> None:
    assert classify(np.array([3, 1]), 5).tolist() == [[b"3:0"], [b"1:0"]]
    assert classify(np.arange(8).reshape(2, 2, 2), 1).tolist() == [[b"3:3"], [b"7:3"]]


# --- content codings ------------------------------------------------------------------------------------------------


def test_decompression_is_bounded() -> None:
    assert decompress(b"x", "", 1) == b"x" == decompress(b"x", "identity", 1)
    with pytest.raises(Refused, match="too large") as caught:
        decompress(zlib.compress(bytes(10**6)), "deflate", 10**5)
    assert caught.value.status == 413
    assert decompress(gzip.compress(bytes(10**5)), "gzip", 10**5) == bytes(10**5)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", b"x", 415),
        ("x" * 9999, b"x", 415),
        ("gzip", b"plain", 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(b"x", mtime=0)[:-1], 400),
        ("gzip", gzip.compress(b"x", mtime=0) * 2, 400),
        ("deflate", zlib.compress(b"x") + b"x", 400),
    ],
)
def test_bad_codings(encoding: str, body: bytes, status: int) -> None:
    with pytest.raises(DataError) as caught:
        decompress(body, encoding, 100)
    assert getattr(caught.value, "status", 400) == status and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("", ""),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0", ""),
        ("br, zstd", ""),
        ("*", "gzip"),
        ("gzip;q=0, *;q=0.5", "deflate"),
        ("*;q=0", ""),
        ("identity", ""),
        ("identity, gzip;q=0.5", ""),
        ("gzip ; q = 1", "gzip"),
        ("gzip;q=many", ""),
        (", ,;;", ""),
    ],
)
def test_which_coding_is_chosen(accept: str, coding: str) -> None:
    body = b"0.5, " * COMPRESS_FROM
    found, packed = compress(body, accept)
    assert found == coding and decompress(packed, coding, len(body)) == body


@settings(max_examples=40, deadline=None)
@given(
    st.binary(max_size=300).map(lambda b: b * 9) | st.binary(min_size=COMPRESS_FROM),
    st.sampled_from(["gzip", "deflate"]),
)
def test_what_is_compressed_comes_back(body: bytes, accept: str) -> None:
    coding, packed = compress(body, accept)
    assert decompress(packed, coding, len(body)) == body
    assert len(packed) <= len(body) and (coding == "") == (packed == body)
    assert coding == "" or len(body) >= COMPRESS_FROM
