"""Pipelines: order, blame, counting; what a servable declares is held to; ONNX graphs against numpy."""

import threading

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from trilobe.errors import DataError, ServeError, UsageError
from trilobe.infrastructure.pipeline import (
    _HOLDS,
    DATATYPES,
    Pipeline,
    Servable,
    TensorSpec,
    onnx_step,
    takes_from_files,
)

RNG = np.random.default_rng(0)


def linear_softmax(weights: np.ndarray) -> bytes:
    """x (n, c) float -> softmax(x @ weights) (n, k), as an ONNX graph."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["p"], axis=-1)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weights.shape[0]])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_steps_run_in_order_and_see_everything() -> None:
    pipeline = Pipeline(
        [
            ("a", lambda d: {"y": d["x"] + 1}),
            ("b", lambda d: {"z": d["x"] * d["y"], "y": -d["y"]}),
        ]
    )
    x = np.array([1.0, 2.0])
    request = {"x": x}
    data = pipeline.run(request)
    assert data["x"] is x, "inputs are held once"
    assert data["y"].tolist() == [-2, -3] and data["z"].tolist() == [2, 6]
    assert list(request) == ["x"], "the caller's mapping is not touched"


def test_a_failing_step_is_named_and_not_counted() -> None:
    def refuse(data: object) -> dict[str, np.ndarray]:
        raise DataError("too small", expected="8 pixels", hint="send larger images")

    pipeline = Pipeline([("fine", lambda d: {}), ("bad", lambda d: {"y": d["nope"]})])
    with pytest.raises(ServeError, match="step 'bad' failed: KeyError"):
        pipeline.run({})
    assert [pipeline.times()[n][0] for n in ("fine", "bad")] == [1, 0]
    with pytest.raises(DataError, match="step 'shape': too small; expected 8 pixels") as caught:
        Pipeline([("shape", refuse)]).run({})
    assert caught.value.hint == "send larger images"


def test_counting_loses_nothing_across_threads() -> None:
    pipeline = Pipeline([("a", lambda d: {}), ("b", lambda d: {})])
    threads = [threading.Thread(target=lambda: [pipeline.run({}) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = pipeline.times()
    assert [times[n][0] for n in "ab"] == [2000, 2000] and all(ns > 0 for _, ns in times.values())


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_bad_pipelines(names: list[str]) -> None:
    with pytest.raises(UsageError, match="each name once"):
        Pipeline([(n, lambda d: {}) for n in names])


@given(st.sampled_from(sorted(DATATYPES)), st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_spec_takes_exactly_what_it_says(datatype: str, shape: list[int], data: st.DataObject) -> None:
    spec = TensorSpec("x", datatype, tuple(data.draw(st.sampled_from([n, -1])) for n in shape))
    array = np.full(shape, b"" if datatype == "BYTES" else 0, DATATYPES[datatype])
    spec.check(array)
    for wrong in (np.zeros([*shape, 1], array.dtype), array.astype("S1"), np.zeros([0, *shape[1:]], array.dtype)):
        with pytest.raises(DataError):
            spec.check(wrong)
    if datatype == "BYTES":
        with pytest.raises(DataError, match="not bytes"):
            spec.check(np.full(shape, "text", object))
    if array.dtype.kind == "f":
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(DataError, match="not finite"):
                spec.check(np.full(shape, value, array.dtype))


def test_bad_specs() -> None:
    with pytest.raises(UsageError, match="datatype"):
        TensorSpec("x", "STRING", (1,))
    for shape in ((0,), (-2,)):
        with pytest.raises(UsageError, match="shape"):
            TensorSpec("x", "FP32", shape)


def test_onnx_step_agrees_with_numpy() -> None:
    weights = RNG.normal(size=(3, 4)).astype(np.float32)
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    name, run = onnx_step(linear_softmax(weights), name="net", inputs={"x": "features"}, outputs={"p": "proba"})
    z = np.exp(x @ weights)
    assert name == "net"
    np.testing.assert_allclose(run({"features": x})["proba"], z / z.sum(axis=1, keepdims=True), rtol=1e-5)
    assert list(onnx_step(linear_softmax(weights))[1]({"x": x})) == ["p"]


def test_onnx_step_refuses_names_the_graph_does_not_have(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_softmax(np.eye(2, dtype=np.float32)))
    for wrong in ({"inputs": {"y": "y"}}, {"inputs": {}}, {"outputs": {"q": "q"}}, {"outputs": {}}):
        with pytest.raises(UsageError, match="expected the graph's inputs"):
            onnx_step(path, **wrong)
    with pytest.raises(ServeError, match="cannot be loaded"):
        onnx_step(tmp_path / "absent.onnx")


def servable(step, x: np.ndarray | None = None) -> Servable:
    x = np.ones((1, 2), np.float32) if x is None else x
    specs = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1,))
    return Servable(Pipeline([("step", step)]), specs[:1], specs[1:], {"x": x})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda d: {}, "no 'y'"),
        (lambda d: {"y": d["x"]}, "'y' has the shape"),
        (lambda d: {"y": d["x"].sum(axis=1).astype(float)}, "'y' has the dtype float64"),
        (lambda d: {"y": d["x"].sum(axis=1) * np.float32(np.nan)}, "not finite"),
    ],
)
def test_warming_up_holds_the_pipeline_to_what_it_declares(step, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        servable(step).warm_up()


def test_warming_up_checks_its_own_example() -> None:
    good = servable(lambda d: {"y": d["x"].sum(axis=1)})
    good.warm_up()
    assert good.pipeline.times()["step"][0] == 1
    with pytest.raises(DataError, match="shape"):
        servable(lambda d: {"y": d["x"].sum(axis=1)}, np.ones((1, 3), np.float32)).warm_up()
    with pytest.raises(ServeError, match="no 'x'"):
        Servable(good.pipeline, good.inputs, good.outputs, {}).warm_up()


# --- graphs that name files ---------------------------------------------------------------------------------------


def outside(name: str, location: str) -> onnx.TensorProto:
    """A tensor of two numbers that are said to be in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def with_tensor(where: str, tensor: onnx.TensorProto) -> bytes:
    """A graph that holds ``tensor`` at one of the places where a graph may hold tensors."""
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2])], [tensor])
    node = helper.make_node("Identity", ["x"], ["z"])
    match where:
        case "constant" | "list":
            key, value = ("value", tensor) if where == "constant" else ("values", [tensor])
            node = helper.make_node("Constant", [], ["z"], **{key: value})
        case "branch" | "branches":
            node = helper.make_node("If", ["x"], ["z"], **{where: inner if where == "branch" else [inner]})
        case "sparse attribute":
            sparse = helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.array([0, 1])), [2])
            node = helper.make_node("Constant", [], ["z"], sparse_value=sparse)
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])])
    model = helper.make_model(graph)
    match where:
        case "initializer":
            model.graph.initializer.append(tensor)
        case "sparse initializer":
            model.graph.sparse_initializer.add().indices.CopyFrom(tensor)
        case "training":
            model.training_info.add().initialization.initializer.append(tensor)
        case "function":
            model.functions.add().node.append(helper.make_node("Constant", [], ["w"], value=tensor))
        case "function attribute":
            model.functions.add().attribute_proto.append(helper.make_attribute("value", tensor))
    return model.SerializeToString()


PLACES = ["initializer", "sparse initializer", "constant", "list", "branch", "branches", "sparse attribute",
          "training", "function", "function attribute"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_tensors_in_other_files_are_found_wherever_they_hide(where: str) -> None:
    inside = numpy_helper.from_array(np.ones(2, np.float32), "w")
    assert not takes_from_files(with_tensor(where, inside))
    assert takes_from_files(with_tensor(where, outside("w", "w.bin")))


def test_the_places_are_those_of_onnx() -> None:
    """Against ONNX's own description: every message that can hold a tensor is followed, and nothing is misnumbered."""
    names = {"ModelProto": "model", "TrainingInfoProto": "training", "GraphProto": "graph", "NodeProto": "node",
             "FunctionProto": "function", "AttributeProto": "attribute", "SparseTensorProto": "sparse",
             "TensorProto": "tensor"}  # fmt: skip
    for proto, name in names.items():
        fields = getattr(onnx, proto).DESCRIPTOR.fields
        assert _HOLDS[name] == {f.number: names[f.message_type.name] for f in fields
                                if f.message_type and f.message_type.name in names}  # fmt: skip
    numbers = TensorProto.DESCRIPTOR.fields_by_name
    assert (numbers["external_data"].number, numbers["data_location"].number) == (13, 14)


@pytest.mark.parametrize("location", ["secret.bin", "../secret/secret.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*"])
def test_a_graph_cannot_hand_out_files(location: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime alone would: it reads what such an output names, relative to the current folder, ``..`` included."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "secret.bin").write_bytes(np.array([1.5, 2.5], "<f4").tobytes())
    monkeypatch.chdir(tmp_path / "secret")
    model = onnx.load_from_string(with_tensor("initializer", outside("w", location)))
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]))
    with pytest.raises(ServeError, match="other files"):
        onnx_step(model.SerializeToString())
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ServeError, match="other files"):
        onnx_step(tmp_path / "model.onnx")


@given(st.binary(max_size=60), st.integers(0, 400))
def test_whatever_is_no_graph_is_an_error_in_words(noise: bytes, at: int) -> None:
    whole = with_tensor("initializer", numpy_helper.from_array(np.ones(2, np.float32), "w"))
    try:
        takes_from_files(whole[:at] + noise + whole[at + len(noise) :])
    except DataError:
        return
