"""Pipelines: several models over one request; what is declared is checked, what is shared is done once."""

import asyncio
import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as struct_replace
from PIL import Image

from support.lines import line, load, run
from trilobe.config import BatchingSection, PipelineSection, ServeSection, StepSection
from trilobe.errors import ConfigError, DataError, ServeError, UsageError
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.pipeline import Pipeline, TensorSpec
from trilobe.infrastructure.serve import Batching, Flow, Function, Node, Server, flow, function, graph
from trilobe.infrastructure.serve.protocol import Refused
from trilobe.loop.serving import pipelines

X = {"x": "FP32[-1,3]"}
ONES = np.ones((1, 3), np.float32)


async def serve(flows: list[Flow], bundles: dict[str, Path], **settings: Any) -> Server:
    server = Server("lines", load, flows=flows, **settings)
    await server.apply({name: Wish(str(path)) for name, path in bundles.items()})
    return server


async def ask(server: Server, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    version = server.model(name)
    call = version.reader.call(None, inputs, ())
    return (await server.infer(name, "", call)).outputs


@pytest.fixture
def bundles(tmp_path: Path) -> dict[str, Path]:
    return {name: line(slope, tmp_path / name) for name, slope in (("two", 2), ("four", 4), ("six", 6))}


def test_a_graph_of_models_and_functions(bundles: dict[str, Path]) -> None:
    @function({"a": "FP32[-1,3]", "b": "FP32[-1,3]"}, {"sum": "FP32[-1,3]"})
    def add(a, b):
        return {"sum": a + b}

    nodes = {
        "last": Node(add, {"a": "first.y", "b": "second.y"}),
        "first": Node("two", {"x": "x"}),
        "second": Node("six", {"x": "first.y"}),
    }
    both = graph("both", X, {"sum": "last.sum", "six": "second.y"}, nodes)

    async def test() -> None:
        server = await serve([both], bundles)
        assert server.repository.models["both"].error == ""
        assert server.model("both").outputs == (TensorSpec("sum", "FP32", (-1, 3)), TensorSpec("six", "FP32", (-1, 3)))
        answers = await asyncio.gather(*[ask(server, "both", x=i * ONES) for i in range(5)])
        for i, answer in enumerate(answers):  # first: 2/2 = 1 times; second: 3 times that
            np.testing.assert_allclose(answer["sum"], i * 4 * ONES)
            np.testing.assert_allclose(answer["six"], i * 3 * ONES)
        text = server.meters.render()
        assert 'trilobe_step_compute_duration_seconds_count{model="both",version="1",step="last"}' in text
        server.close()

    run(test)


def test_python_control_flow_stops_early_and_loops(bundles: dict[str, Path]) -> None:
    @flow(X, {"y": "FP32[-1,3]"}, steps=["two", "four"])
    async def until(two, four, x):
        y = x
        for _ in range(10):
            if y.max() > 5:
                return {"y": y}
            y = (await four(x=y))["y"]
        return await two(x=y)

    async def test() -> None:
        server = await serve([until], bundles)
        assert (await ask(server, "until", x=ONES))["y"].tolist() == [[8.0] * 3]
        assert server.repository.models["four"].versions[server.model("four").id].rest.batches == 3
        assert server.repository.models["two"].versions[server.model("two").id].rest.batches == 0
        server.close()

    run(test)


def test_models_with_equal_preparations_share_one(bundles: dict[str, Path], tmp_path: Path) -> None:
    other = line(8, tmp_path / "other", key="another preparation")
    nodes = {name: Node(name, {"x": "x"}) for name in (*bundles, "other")}
    all_of_them = graph("all", X, {name: f"{name}.y" for name in nodes}, nodes)

    async def test() -> None:
        server = await serve([all_of_them], {**bundles, "other": other})
        answer = await ask(server, "all", x=ONES)
        assert {k: v[0, 0] for k, v in answer.items()} == {"two": 1.0, "four": 2.0, "six": 3.0, "other": 4.0}
        done = {name: server.model(name).preparation.batches for name in nodes}
        assert sum(done.values()) == 2 and done["other"] == 1, "three of a kind were prepared once, the other by itself"
        server.close()

    run(test)


def test_a_swap_reaches_the_pipeline_and_one_that_does_not_fit_is_refused(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    one = graph("one", X, {"y": "a.y"}, {"a": Node("two", {"x": "x"})})

    async def test() -> None:
        server = await serve([one], {"two": bundles["two"]})
        assert (await ask(server, "one", x=ONES))["y"][0, 0] == 1
        await server.apply({"two": Wish(str(bundles["six"]))})
        assert (await ask(server, "one", x=ONES))["y"][0, 0] == 3
        await server.apply({"two": Wish(str(line(1, tmp_path / "wide", width=5)))})
        assert "step 'a' reads 'x', FP32[-1, 3], as 'x'; expected FP32[-1, 5]" in server.repository.models["two"].error
        assert (await ask(server, "one", x=ONES))["y"][0, 0] == 3, "the one before answers on"
        server.close()

    run(test)


def test_a_pipeline_rests_while_a_model_of_it_is_unloaded(bundles: dict[str, Path]) -> None:
    nodes = {"a": Node("two", {"x": "x"}), "b": Node("six", {"x": "a.y"})}

    async def test() -> None:
        wishes = {name: Wish(str(bundles[name])) for name in ("two", "six")}
        server = Server("lines", load, flows=[graph("both", X, {"y": "b.y"}, nodes)])
        await server.apply(wishes)
        assert (await ask(server, "both", x=ONES))["y"][0, 0] == 3
        await server.apply({**wishes, "six": Wish(str(bundles["six"]), loaded=False)})
        with pytest.raises(Refused, match="step 'b' calls the model 'six', which is not served"):
            server.model("both")
        assert server.repository.models["two"].error == "" and server.index()[-1]["reason"] == "unloaded"
        await server.apply(wishes)
        assert (await ask(server, "both", x=ONES))["y"][0, 0] == 3
        assert not any(model.error for model in server.repository.models.values())
        server.close()

    run(test)


def test_errors_name_the_step(bundles: dict[str, Path]) -> None:
    def broken(kind: str) -> Flow:
        @function(X, {"y": "FP32[-1,3]"})
        def step(x):
            match kind:
                case "raises":
                    raise ZeroDivisionError("oh")
                case "refuses":
                    raise DataError("a strange image")
                case "shape":
                    return {"y": x[:, :2]}
                case "nothing":
                    return {}
                case _:
                    time.sleep(0.5)
                    return {"y": x}

        return graph(kind, X, {"y": "odd.y"}, {"ok": Node("two", {"x": "x"}), "odd": Node(step, {"x": "ok.y"})})

    async def test() -> None:
        kinds = ["raises", "refuses", "shape", "nothing", "hangs"]
        server = await serve(
            [broken(kind) for kind in kinds], bundles, batching={"odd": Batching(where="threads", limit=0.1)}, threads=1
        )
        for kind, error, words in (
            ("raises", ServeError, "step 'step' failed: ZeroDivisionError: oh"),
            ("refuses", DataError, "step 'step': a strange image"),
            ("shape", ServeError, r"step 'step': output 'y' has the shape \[1, 2\]"),
            ("nothing", ServeError, "step 'step' gave no 'y'"),
            ("hangs", Refused, r"step 'hangs: odd' did not finish within 0\.1 s"),
        ):
            with pytest.raises(error, match=words):
                await ask(server, kind, x=ONES)
        assert (await ask(server, "two", x=ONES))["y"][0, 0] == 1, "the others do not notice"
        server.close()

    run(test)


INLINE = Batching(where="inline")


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 7), st.integers(1, 4), st.sampled_from(["inline", "threads"]))
def test_any_graph_gives_what_its_steps_give_one_after_the_other(
    data: st.DataObject, size: int, clients: int, where: Any
) -> None:
    """Against a direct evaluation: each step adds up two things that are there already, times a factor of its own."""

    def adder(factor: float) -> Any:
        @function({"a": "FP32[-1,3]", "b": "FP32[-1,3]"}, {"y": "FP32[-1,3]"})
        def add(a, b):
            return {"y": factor * (a + b)}

        return add

    refs, nodes = ["x"], {}
    for i in range(size):
        a, b = (data.draw(st.sampled_from(refs)) for _ in "ab")
        nodes[f"s{i}"] = Node(adder(i + 0.5), {"a": a, "b": b})
        refs.append(f"s{i}.y")
    any_order = data.draw(st.permutations(list(nodes)))
    outputs = {f"out{i}": ref for i, ref in enumerate(refs)}
    flow_ = graph("g", X, outputs, {name: nodes[name] for name in any_order})
    inputs = [np.full((1 + i % 2, 3), i + 1, np.float32) for i in range(clients)]

    async def test() -> None:
        server = await serve([flow_], {}, batching=dict.fromkeys(nodes, Batching(where=where)))
        answers = await asyncio.gather(*[ask(server, "g", x=x) for x in inputs])
        for x, answer in zip(inputs, answers, strict=True):
            said = {"x": x}
            for i in range(size):
                of = nodes[f"s{i}"].inputs
                said[f"s{i}.y"] = ((i + 0.5) * (said[of["a"]] + said[of["b"]])).astype(np.float32)
            assert set(answer) == set(outputs)
            for key, ref in outputs.items():
                np.testing.assert_array_equal(answer[key], said[ref])
        assert not server.model("g").busy
        server.close()

    run(test)


def test_steps_side_by_side_are_joined_across_requests_and_counted_each_by_itself(bundles: dict[str, Path]) -> None:
    nodes = {f"{name}{i}": Node(name, {"x": "x"}) for name in bundles for i in range(3)}
    nine = graph("nine", X, {name: f"{name}.y" for name in nodes}, nodes)

    async def test() -> None:
        server = await serve([nine], bundles, batching={"": INLINE})
        answers = await asyncio.gather(*[ask(server, "nine", x=i * ONES) for i in range(4)])
        for i, answer in enumerate(answers):
            assert {k: float(v[0, 0]) for k, v in answer.items()} == {
                name: i * {"two": 1.0, "four": 2.0, "six": 3.0}[name[:-1]] for name in nodes
            }
        for name in bundles:
            version = server.model(name)
            assert version.rest.batches == 1, "three steps of each of four requests, in one batch"
            said = server.meters.statistics(name, version.id)["inference_stats"]
            assert said["success"]["count"] >= 12 and said["queue"]["ns"] > 0 and said["compute_infer"]["ns"] > 0
            assert version.rest.cost < 0.1 and not version.busy
        said = server.meters.statistics("nine", "1")["inference_stats"]
        assert (said["success"]["count"], said["fail"]["count"]) == (4, 0)
        server.close()

    run(test)


def test_where_one_of_many_steps_fails_the_others_are_taken_back(bundles: dict[str, Path]) -> None:
    ran: list[str] = []

    def step(name: str) -> Any:
        @function(X, {"y": "FP32[-1,3]"})
        def work(x):
            ran.append(name)
            if name == "bad":
                raise ZeroDivisionError("oh")
            time.sleep(0.05)
            return {"y": x}

        return replace(work, name=name)

    names = ["bad", *(f"s{i}" for i in range(8))]
    many = graph("many", X, {n: f"{n}.y" for n in names}, {n: Node(step(n), {"x": "x"}) for n in names})

    async def test() -> None:
        server = await serve([many], bundles, threads=1)
        with pytest.raises(ServeError, match="step 'bad' failed: ZeroDivisionError: oh"):
            await ask(server, "many", x=ONES)
        await asyncio.sleep(0.3)
        assert ran[0] == "bad" and len(ran) <= 2, "what waited behind it was not computed any more"
        assert (await ask(server, "two", x=ONES))["y"][0, 0] == 1
        assert server.meters.statistics("many", "1")["inference_stats"]["fail"]["count"] >= 1
        assert not server.model("many").busy
        server.close()

    run(test)


def test_slow_steps_run_beside_each_other_and_a_timeout_ends_them(bundles: dict[str, Path]) -> None:
    def step(name: str) -> Any:
        @function(X, {"y": "FP32[-1,3]"})
        def work(x):
            time.sleep(0.5)
            return {"y": x}

        return replace(work, name=name)

    nodes = {name: Node(step(name), {"x": "x"}) for name in ("a", "b", "c")}
    slow = graph("slow", X, {n: f"{n}.y" for n in nodes}, nodes)

    async def test() -> None:
        server = await serve([slow], bundles, threads=3)
        start = time.perf_counter()
        await ask(server, "slow", x=ONES)
        assert time.perf_counter() - start < 1.4, "1.5 s of sleep, three at a time"
        version = server.model("slow")
        with pytest.raises(Refused, match=r"'slow' did not answer within 0\.05 s") as caught:
            await version.submit({"x": ONES}, 1, None, timeout=0.05)
        assert caught.value.status == 504 and not version.busy
        assert (await ask(server, "two", x=ONES))["y"][0, 0] == 1
        server.close()

    run(test)


def test_a_step_whose_queue_is_full_refuses_the_request(bundles: dict[str, Path]) -> None:
    nodes = {"a": Node("two", {"x": "x"}), "b": Node("four", {"x": "x"})}
    both = graph("both", X, {"a": "a.y", "b": "b.y"}, nodes)

    async def test() -> None:
        server = await serve([both], bundles, batching={"four": Batching(max_pending=1, where="inline")})
        answers = await asyncio.gather(*[ask(server, "both", x=ONES) for _ in range(3)], return_exceptions=True)
        refused = [a for a in answers if isinstance(a, Refused)]
        assert refused and all(a.status == 503 and "retry-after" in a.headers for a in refused)
        assert len(refused) < 3, "the others do not notice"
        assert (await ask(server, "both", x=ONES))["b"][0, 0] == 2
        assert not any(server.model(name).busy for name in ("both", "two", "four"))
        server.close()

    run(test)


def test_a_function_may_make_tasks_of_its_calls(bundles: dict[str, Path]) -> None:
    @flow(X, {"y": "FP32[-1,3]"}, steps=["two", "four"])
    async def beside(two, four, x):
        two(x=x).close()  # called, and not wanted after all
        async with asyncio.TaskGroup() as group:
            first, second = group.create_task(two(x=x)), group.create_task(four(x=x))
        return {"y": first.result()["y"] + second.result()["y"]}

    async def test() -> None:
        server = await serve([beside], bundles)
        assert (await ask(server, "beside", x=ONES))["y"][0, 0] == 3
        server.close()

    run(test)


@pytest.mark.parametrize(
    ("nodes", "outputs", "words"),
    [
        ({"a": Node("m", {"x": "b.y"}), "b": Node("m", {"x": "a.y"})}, {"y": "a.y"}, "goes in a circle: "),
        ({"a": Node("m", {"x": "a.y"})}, {"y": "a.y"}, "goes in a circle: a -> a"),
        ({"a": Node("m", {"x": "z"})}, {"y": "a.y"}, "step 'a' reads 'z', which is not there"),
        ({"a": Node("m", {"x": "z.y"})}, {"y": "a.y"}, "step 'a' reads 'z.y', which is not there"),
        ({"a": Node("m", {"x": "x"})}, {"y": "b.y"}, "output 'y' reads 'b.y', which is not there"),
        ({"x": Node("m", {"x": "x"})}, {"y": "x.y"}, "calls a step and an input 'x'"),
    ],
)
def test_graphs_that_cannot_be(nodes: dict[str, Node], outputs: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        graph("g", X, outputs, nodes)


@pytest.mark.parametrize(
    ("inputs", "nodes", "outputs", "words"),
    [
        (X, {"a": Node("nope", {"x": "x"})}, {"y": "a.y"}, "step 'a' calls the model 'nope', which is not served"),
        (X, {"a": Node("two", {"z": "x"})}, {"y": "a.y"}, r"step 'a' gets \['z'\]; expected exactly \['x'\]"),
        (X, {"a": Node("two", {"x": "x"})}, {"y": "a.z"}, "output 'y' reads 'a.z', which is not there"),
        ({"x": "FP64[-1,3]"}, {"a": Node("two", {"x": "x"})}, {"y": "a.y"}, r"FP64\[-1, 3\], as 'x'"),
        ({"x": "FP32[-1,4]"}, {"a": Node("two", {"x": "x"})}, {"y": "a.y"}, r"expected FP32\[-1, 3\]"),
    ],
)
def test_graphs_that_do_not_fit_their_models(
    bundles: dict[str, Path], inputs: Any, nodes: Any, outputs: Any, words: str
) -> None:
    async def test() -> None:
        server = await serve([graph("g", inputs, outputs, nodes)], bundles)
        with pytest.raises(Refused, match=words):
            server.model("g")
        assert not server.repository.ready and server.model("two").id, "the models beside it answer"
        server.close()

    run(test)


def test_declared_in_the_settings(tmp_path: Path) -> None:
    (tmp_path / "steps_of_mine.py").write_text(
        "from trilobe.infrastructure.serve import flow, function\n"
        '@function({"x": "FP32[-1]"}, {"y": "FP32[-1]"})\ndef mine(x):\n    return {"y": x}\n'
        '@flow({"x": "FP32[-1]"}, {"y": "FP32[-1]"}, steps=[mine])\n'
        "async def careful(mine, x):\n    return await mine(x=x)\n"
    )
    step = StepSection(run="steps_of_mine:mine", inputs={"x": "x"})
    good = PipelineSection(inputs={"x": "FP32[-1]"}, outputs={"y": "a.y"}, steps={"a": step})
    declared = ServeSection(pipelines={"good": good, "mine": PipelineSection(flow="steps_of_mine:careful")})
    assert [(f.name, list(f.steps)) for f in pipelines(declared, tmp_path)] == [("good", ["a"]), ("mine", ["mine"])]
    for section, words in (
        (PipelineSection(flow="steps_of_mine:nope"), r"\[serve.pipelines.p\]: 'steps_of_mine:nope' cannot be found"),
        (PipelineSection(flow="steps_of_mine:mine"), "is no pipeline"),
        (PipelineSection(steps={"a": StepSection()}), "step 'a' names '' and ''"),
        (PipelineSection(steps={"a": StepSection(run="math:pi")}), "'math:pi' is no step"),
    ):
        with pytest.raises(ConfigError, match=words):
            pipelines(ServeSection(pipelines={"p": section}), tmp_path)

    own = BatchingSection(where="processes", limit=2.0, max_memory=3)
    apart = struct_replace(good, steps={"a": struct_replace(step, batching=own)})
    (made,) = pipelines(ServeSection(pipelines={"good": apart}, max_batch=8), tmp_path)
    function_ = made.steps["a"]
    assert isinstance(function_, Function)
    assert function_.batching == Batching(max_batch=8, limit=2.0, where="processes", max_memory=3 << 20)
    of_model = StepSection(model="m", inputs={"x": "x"}, batching=own)
    with pytest.raises(ConfigError, match=r"how a model is computed; expected \[serve.batching.m\]"):
        pipelines(ServeSection(pipelines={"p": struct_replace(apart, steps={"a": of_model})}), tmp_path)


def test_photos_are_decoded_exactly_as_for_training() -> None:
    """No skew: the step before a served model and the reader of training files give the same pixels."""
    from trilobe.tasks.image_classification.data import decode, encode
    from trilobe.tasks.image_classification.serve import decode_color, decode_gray

    rng = np.random.default_rng(0)
    spec = {"version": "resize.v1", "height": 8, "width": 8, "channels": 1}
    for mode, suffix in (("L", "PNG"), ("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "GIF")):
        size = (13, 17, {"L": 1, "P": 1, "RGB": 3, "RGBA": 4}[mode])
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8).squeeze(), mode)
        buffer = io.BytesIO()
        image.save(buffer, suffix)
        sent = np.array([buffer.getvalue(), b""], dtype=object)[:1]
        trained = encode([decode(buffer.getvalue())], spec)
        np.testing.assert_array_equal(encode(decode_gray({"photo": sent})["image"], spec), trained)
        assert decode_color({"photo": sent})["image"].shape == (1, 13, 17, 3)
    with pytest.raises(DataError, match="step 'decode_gray': not an image"):
        decode_gray({"photo": np.array([b"no image", b""], dtype=object)[:1]})


def test_models_whose_rows_depend_on_their_company_are_run_alone(tmp_path: Path) -> None:
    """The promise is the same bits; a network that cannot keep it in a batch gets no batches."""

    def company(bundle: Any) -> Any:
        honest = load(bundle)
        steps = [*honest.pipeline.steps, ("mean", lambda data: {"y": data["y"] + data["y"].std() + len(data["y"])})]
        return replace(honest, pipeline=Pipeline(steps))

    async def test() -> None:
        server = Server("lines", company)
        await server.apply({"": Wish(str(line(2, tmp_path / "b")))})
        version = server.model("lines")
        assert not version.queue.joins
        answers = await asyncio.gather(*[ask(server, "lines", x=ONES) for _ in range(3)])
        assert version.queue.batches == 3 and all(a["y"].tolist() == [[2.0] * 3] for a in answers)
        server.close()

    run(test)
