"""One contract for every task: a new one is tested by bringing a few items and answers."""

import inspect
import json
import re
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import predict_logits
from trilobe.config import Config, ProjectSection, parse
from trilobe.data.query import find
from trilobe.errors import AnswerError, UnreadableExample, UsageError
from trilobe.infrastructure.pipeline import onnx_step
from trilobe.rows import apply, as_rows, flat, is_ragged
from trilobe.tasks import Task, get
from trilobe.trust.checks import gate
from trilobe.types import Evidence, Response, Span
from trilobe.web.report import png_uri

NAMES = get_args(get_type_hints(ProjectSection)["task"])
MEMBERS = {n: m for n, m in vars(Task).items() if inspect.isfunction(m) and not n.startswith("_")}


def image_items() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 1), (8, 8, 1), (9, 12, 1), (30, 20, 1), (8, 8, 1), (1, 1, 1)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def texts() -> list[Any]:
    return [
        "Rome is 2 big.",
        "a",
        "Zoë 👩‍🔬 said: 北京!",
        "no",
        "The sync agent v2.1 fails in Rome, again",
        "one more text",
    ]


ITEMS = {"image_classification": image_items, "text_classification": texts, "entity_recognition": texts}
CLASSES = [Response("class", ("b",)), Response("not", ("b",)), Response("one_of", ("a", "b")), Response("unsure")]
SPANS = [Response("spans", spans=(Span(0, 4, "a"),)), Response("spans"), Response("unsure"),
         Response("span_accepted", spans=(Span(0, 4, "c"),))]  # fmt: skip
ANSWERS = {"image_classification": CLASSES, "text_classification": CLASSES, "entity_recognition": SPANS}
FIRST = {"image_classification": "accuracy", "text_classification": "accuracy", "entity_recognition": "f1"}


def config_of(name: str, more: str = "") -> Config:
    return parse(f'[project]\nname = "p"\ntask = "{name}"\n[labels]\nnames = ["a", "b", "c"]\n{more}')


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return get(request.param)


def test_every_task_of_the_settings_is_here() -> None:
    assert set(NAMES) == set(ITEMS) == set(ANSWERS)
    with pytest.raises(UsageError, match="unknown task 'chess'; expected 'image_classification', 'text"):
        get("chess")


def test_every_member_is_there_with_the_same_arguments(task: Task) -> None:
    assert task.name in NAMES and all(s.startswith(".") and s == s.lower() for s in task.suffixes)
    for name, member in MEMBERS.items():
        own = getattr(type(task), name)
        assert list(inspect.signature(own).parameters) == list(inspect.signature(member).parameters), name
        assert inspect.getdoc(own), name
    public = {n for n in dir(task) if not n.startswith("_")}
    plain = {"name", "suffixes", "strategy", "architecture", "free_axes", "words"}
    assert public == {*MEMBERS, *plain}, "the loop asks nothing else"
    assert find(task.strategy).name and re.fullmatch(r"\w+\.v\d+", task.architecture) and task.free_axes in (1, 2)
    assert all(task.words) and "10%" in task.words.strength.format(0.1)


def test_items_come_back_from_bytes(task: Task) -> None:
    config = config_of(task.name)
    for item in ITEMS[task.name]():
        data = task.to_bytes(item)
        back = task.decode(data, config)
        np.testing.assert_array_equal(back, item)
        assert task.to_bytes(back) == data and task.content(back) == task.content(item)
    assert len({task.content(i) for i in ITEMS[task.name]()}) == len(ITEMS[task.name]())
    for data in (b"", b"\0\xff" * 40):
        with pytest.raises(UnreadableExample):
            task.decode(data, config)
        for suffix in task.suffixes:
            with pytest.raises(UnreadableExample):
                task.read(data, suffix, config)


def test_files_hold_examples_and_requests_hold_items(task: Task) -> None:
    config = config_of(task.name)
    for item in ITEMS[task.name]():
        data = task.to_bytes(item)
        parts = task.read(data, ".png" if task.name.startswith("image") else ".txt", config)
        assert [task.content(task.decode(part.data, config)) for part in parts] == [task.content(item)]
        assert parts[0].truth is None
        sent = item if isinstance(item, np.ndarray) else np.frombuffer(data, np.uint8)
        assert task.content(task.captured(sent)) == task.content(item)


def test_preprocessing_is_plain_and_encoding_row_by_row(task: Task) -> None:
    items = ITEMS[task.name]()
    spec = task.preprocessing(items, config_of(task.name))
    assert json.loads(json.dumps(spec)) == spec
    X = task.encode(items, spec)
    assert len(X) == len(items) and flat(X).dtype == np.float32 and np.isfinite(flat(X)).all()
    assert is_ragged(X) == (task.free_axes == 2)
    np.testing.assert_array_equal(flat(task.encode(items, json.loads(json.dumps(spec)))), flat(X))
    for i, item in enumerate(items):
        np.testing.assert_array_equal(task.encode([item], spec)[0], X[i])
    assert len(task.encode([], spec)) == 0


def test_network_features_and_variation(task: Task) -> None:
    items, config = ITEMS[task.name](), config_of(task.name)
    spec = task.preprocessing(items, config)
    X = task.encode(items, spec)
    space = task.space(config)
    module, again = (task.network(spec, space, width=4, seed=0) for _ in range(2))
    for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    logits = predict_logits(module, X)
    assert len(logits) == len(X) and flat(logits).shape[-1] == len(space)
    for seen in (task.features(None, X), task.features(module.train(), X)):
        assert seen.ndim == 2 and len(seen) == len(X) and np.isfinite(seen).all()
    if vary := task.augment(config):
        assert vary(torch.from_numpy(X), torch.Generator().manual_seed(0)).shape == X.shape
    assert task.augment(config_of(task.name, "[train]\naugment = false")) is None


def test_what_answers_leave_possible_and_say(task: Task) -> None:
    space = task.space(config_of(task.name))
    watched = task.watched_space(space)
    item = ITEMS[task.name]()[0]
    for response in ANSWERS[task.name]:
        possible = task.possible(response, space, lambda: item)
        assert possible.dtype == bool and possible.shape[-1] == len(space) and possible.any(axis=-1).all()
        if (possible.sum(axis=-1) == 1).all():
            back, sure = task.response(possible.astype(float), space, lambda: item)
            assert back == response and sure == 1.0, "a certain belief says what was answered"
        proba = possible / possible.sum(axis=-1, keepdims=True)
        rows = task.watched(proba[None], space)
        assert rows.shape == (1, len(watched)) and np.allclose(rows.sum(axis=1), 1)
    strange = CLASSES[0] if task.name == "entity_recognition" else SPANS[0]
    with pytest.raises(AnswerError):
        task.possible(strange, space, lambda: item)


def test_the_exported_graph_finished_is_what_the_network_says(task: Task) -> None:
    config = config_of(task.name)
    items, space = ITEMS[task.name](), task.space(config)
    spec = task.preprocessing(items, config)
    X, module = task.encode(items, spec), task.network(spec, space, width=4, seed=0).eval()
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    _, run = onnx_step(to_onnx(module, X[0][None], free=task.free_axes))
    for x, logits in zip(X, predict_logits(module, X), strict=True):
        np.testing.assert_allclose(task.finish(run({"x": x[None]})["logits"][0], weights), logits, atol=1e-4)


def test_figures(task: Task) -> None:
    items = ITEMS[task.name]()
    config = config_of(task.name, "[check]\neps = [0.01, 0.3]\nattack_steps = 3\nattack_examples = 4")
    space = task.space(config)
    spec = task.preprocessing(items, config)
    X, module = task.encode(items, spec), task.network(spec, space, width=4, seed=0).eval()
    labels = as_rows([row.argmax(axis=-1) for row in predict_logits(module, X)])
    certain = apply(lambda row: np.eye(len(space))[row], labels)
    figures = task.measure(certain, labels, space)
    assert figures[0].check == FIRST[task.name] and "ece" in {e.check for e in figures}
    assert next(e for e in figures if "accuracy" in e.check).figure == 1.0
    attacked = task.attack(module, X, labels, config)
    for e in figures + attacked:
        assert isinstance(e, Evidence) and e.low <= e.figure <= e.high and e.n > 0
    gate(figures + attacked, {e.check: 0.5 for e in figures + attacked})  # each may be gated
    assert len({e.check for e in figures + attacked}) == len(figures + attacked)
    assert len(attacked) == 2 and attacked[0].figure >= attacked[1].figure and attacked[0].n == 4


def test_what_people_see(task: Task) -> None:
    items, config = ITEMS[task.name](), config_of(task.name)
    spec = task.preprocessing(items, config)
    module = task.network(spec, task.space(config), width=4, seed=0).eval()
    shown = task.explain(module, items[:2], task.encode(items[:2], spec))
    assert len(shown) == 2
    for picture, why, incomplete in shown:
        assert picture[:4] == why[:4] and picture.startswith((b"\x89PNG", b"<svg")) and incomplete >= 0
    for item in items:
        assert png_uri(task.picture(item)).startswith("data:image/") and task.terminal(item).strip()
