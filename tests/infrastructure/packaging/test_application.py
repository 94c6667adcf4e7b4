"""Applications: what flows where, checked before it runs; folders and values; what they need of a machine."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import DataError, TrilobeError, UsageError
from trilobe.infrastructure.packaging.application import Application, Flow, Operator, arranged, load, main, outputs
from trilobe.infrastructure.packaging.resources import Resources, bytes_of, resource, together


@resource(cpu=2, memory="512Mi")
@outputs(texts=list)
class Read(Operator):
    def compute(self, input: Path) -> list[str]:
        return [p.read_text() for p in sorted(input.iterdir())]


@resource(memory="1.5Gi", gpu=1)
@outputs(words=list, n=int)
class Split(Operator):
    def compute(self, texts: list[str], at: str = " ") -> Mapping[str, Any]:
        words = [w for text in texts for w in text.split(at)]
        return {"words": words, "n": len(words)}


class Write(Operator):
    def compute(self, output: Path, words: list[str], n: float) -> None:
        (output / "words").write_text(f"{n} " + ",".join(words))


class Words(Application):
    version = "1.2.0"

    def compose(self) -> Flow:
        split, write = Split(), Write()
        return [(split, write), (Read(), split)]


@outputs(n=int)
class Length(Operator):
    def compute(self, text: str) -> int:
        return len(text)


def composed(flow: Any) -> Application:
    class Made(Application):
        def compose(self) -> Flow:
            return flow

    return Made()


def test_it_runs_in_order_over_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b").write_text("c d")
    (tmp_path / "in" / "a").write_text("a b")
    app = Words()
    assert [s.name for s in app.steps()] == ["Read", "Split", "Write"]
    assert app.run_folders(tmp_path / "in", tmp_path / "deep" / "out") == {}
    assert (tmp_path / "deep" / "out" / "words").read_text() == "4 a,b,c,d"


def test_it_runs_over_values_and_gives_what_nobody_takes() -> None:
    assert composed([Split()]).run(texts=["a b"]) == {"words": ["a", "b"], "n": 2}
    assert composed([Split()]).run(texts=["a,b"], at=",")["n"] == 2, "an input with a default may be given"
    assert composed([(Read(), Split())]).title == "Made"


def test_one_output_may_go_to_many_and_many_ports_join_two(tmp_path: Path) -> None:
    @outputs(x=int, y=int)
    class Twice(Operator):
        def compute(self, n: int) -> dict[str, int]:
            return {"x": n, "y": 10 * n}

    @outputs(difference=int)
    class Minus(Operator):
        def compute(self, left: int, right: int) -> int:
            return left - right

    length, twice, minus, other = Length(), Twice(), Minus(), Twice()
    other.name = "other"
    flow = [(length, twice), (twice, minus, {("y", "left"), ("x", "right")}), (length, other)]
    assert composed(flow).run(text="four") == {"difference": 36, "x": 4, "y": 40}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms())
def test_the_order_of_the_flow_does_not_matter(sizes: list[int], random: Any) -> None:
    """A chain, its edges shuffled, gives what the chain gives; the oracle is plain addition."""

    @outputs(x=int)
    class Add(Operator):
        def __init__(self, name: str, n: int) -> None:
            self.name, self.n = name, n

        def compute(self, x: int) -> int:
            return x + self.n

    chain = [Add(f"add-{i}", n) for i, n in enumerate(sizes)]
    edges: list[Any] = [*pairwise(chain), chain[0]]
    random.shuffle(edges)
    assert composed(edges).run(x=1) == {"x": 1 + sum(sizes)}


A, B = Length(), Length()
B.name = "B"


@outputs(text=str)
class Circle(Operator):
    def compute(self, n: int) -> str:
        return str(n)


class Bulk(Operator):
    def compute(self, *texts: str) -> None: ...


@outputs(text=np.ndarray)
class Arrays(Operator):
    def compute(self, n: int) -> np.ndarray:
        return np.zeros(n)


@pytest.mark.parametrize(
    ("flow", "said"),
    [
        ([], "without operators"),
        ([(A, 3)], "a flow with 3 in it"),
        ([A, (A, Circle()), (Circle(), B)], "two operators named 'Circle'(.|\n)*next: set their name"),
        (
            [(A, B)],
            "output 'n' of operator 'Length' is int; expected str, for 'text' of 'B'",
        ),
        ([(A, B, {"m": "text"})], "operator 'Length' has no output 'm'; expected one of"),
        ([(Circle(), B, {"text": "words"})], "operator 'B' has no input 'words'"),
        ([(Arrays(), B)], "output 'text' of operator 'Arrays' is ndarray; expected str, for 'text' of 'B'"),
        ([(A, c := Circle()), (c, A)], "in a circle: Length -> Circle -> Length"),
        ([Bulk()], "operator 'Bulk': compute takes 'texts' in bulk"),
        ([A, B], "operators 'Length' and 'B' both give 'n'"),
        ([(c, B), (c, B)], "operator 'B' gets 'text' from both 'Circle' and 'Circle'"),
        ([(Bulk(), Length())], "compute takes 'texts' in bulk"),
        ([(Write(), Read())], r"operator 'Write' gives \[\] and operator 'Read' takes \['input'\]"),
        ([Operator()], "operator 'Operator' has no compute"),
    ],
)
def test_a_flow_that_cannot_run_is_refused_by_name(flow: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        arranged(flow)


def test_an_edge_without_ports_is_an_order() -> None:
    assert [s.name for s in arranged([(B, Write(), []), (Arrays(), B, [])])] == ["Arrays", "B", "Write"]


def test_inputs_are_checked_before_anything_runs(tmp_path: Path) -> None:
    app = Words()
    with pytest.raises(UsageError, match="operator 'Read' lacks its input 'input'"):
        app.run(output=tmp_path)
    with pytest.raises(UsageError, match="Words takes no 'speed'"):
        app.run(input=tmp_path, output=tmp_path, speed=1)
    with pytest.raises(UsageError, match="'input' of operator 'Read' is str; expected Path"):
        app.run(input="folder", output=tmp_path)
    with pytest.raises(UsageError, match=r"there is no .*nowhere"):
        app.run_folders(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="Application has no compose"):
        Application().run()


def failing(result: Any, **kinds: Any) -> Application:
    @outputs(**kinds)
    class Step(Operator):
        def compute(self) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

    return composed([Step()])


@pytest.mark.parametrize(
    ("app", "kind", "said"),
    [
        (failing(ValueError("no")), TrilobeError, "operator 'Step' failed: ValueError: no"),
        (failing(DataError("bad", hint="other")), DataError, "operator 'Step': bad(.|\n)*next: other"),
        (failing(3, a=str), TrilobeError, "output 'a' of operator 'Step' is int; expected str"),
        (failing(3, a=int, b=int), TrilobeError, "'Step' returned int; expected a mapping with"),
        (failing({"a": 1}, a=int, b=int), TrilobeError, r"'Step' returned \['a'\]; expected a mapping with"),
    ],
)
def test_an_operator_that_fails_is_named(app: Application, kind: type[TrilobeError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        app.run()
    assert type(caught.value) is kind


def test_what_it_needs_is_declared_or_added_up() -> None:
    needs = Words().needs()
    assert (needs.cpu, needs.gpu, needs.memory) == (2, 1, "2Gi")

    @resource(cpu=4)
    class Declared(Words): ...

    assert Declared().needs() == Resources(cpu=4)
    assert Words.resources is None, "a decorated subclass leaves its parent alone"
    assert composed([Length()]).needs() == Resources()


@pytest.mark.parametrize("size", ["1", "1GB", "1 Gi", "-1Gi", "0Gi", "Gi", "1.Gi", 5, True])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(UsageError, match="expected a size such as"):
        Resources(memory=size)


@pytest.mark.parametrize("cpu", [0, 0.01, -1, True, "2", float("nan"), float("inf")])
def test_counts_that_are_none(cpu: Any) -> None:
    with pytest.raises(UsageError, match="expected a number of devices"):
        Resources(cpu=cpu)


@given(st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(["Mi", "Gi"])), min_size=1, max_size=5))
def test_memory_adds_up(sizes: list[tuple[int, str]]) -> None:
    total = together([Resources(memory=f"{n}{unit}") for n, unit in sizes])
    assert bytes_of(total.memory) == sum(n * {"Mi": 2**20, "Gi": 2**30}[unit] for n, unit in sizes)


MODULE = """
from pathlib import Path
from trilobe.infrastructure.packaging.application import Application, Operator

class Copy(Operator):
    def compute(self, input: Path, output: Path, models: Path) -> None:
        (output / "copy").write_text((input / "a").read_text() + str(models))

class App(Application):
    def compose(self):
        return [Copy()]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_app_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    return tmp_path


def test_as_its_package_runs_it(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLOSCAN_MODEL_PATH", "/m")
    assert main(["my_app_of_tests:App", f"{module}/in", f"{module}/out"]) == 0
    assert (module / "out" / "copy").read_text() == "a/m"
    for words in (["my_app_of_tests:App"], ["my_app_of_tests:Nobody", "a", "b"], ["nowhere:App", "a", "b"]):
        assert main(words) == 2
        assert "UsageError" in capsys.readouterr().err
    assert load("my_app_of_tests:App").title == "App"
