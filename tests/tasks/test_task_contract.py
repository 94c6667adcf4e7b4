"""One contract for every task: a new one is tested by bringing a few items and answers."""

import inspect
import json
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from trilobe.config import Config, ProjectSection, parse
from trilobe.errors import UnreadableExample, UsageError
from trilobe.tasks import Task, get
from trilobe.types import Answer, Evidence, Response

NAMES = get_args(get_type_hints(ProjectSection)["task"])
MEMBERS = {n: m for n, m in vars(Task).items() if inspect.isfunction(m) and not n.startswith("_")}


def image_items() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 1), (8, 8, 1), (9, 12, 1), (30, 20, 1), (8, 8, 1), (1, 1, 1)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


ITEMS = {"image_classification": image_items}
ANSWERS = {"image_classification": [Response("class", ("b",)), Response("not", ("b",)), Response("unsure")]}


def config_of(name: str, more: str = "") -> Config:
    return parse(f'[project]\nname = "p"\ntask = "{name}"\n[labels]\nnames = ["a", "b", "c"]\n{more}')


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return get(request.param)


def test_every_task_of_the_settings_is_here() -> None:
    assert set(NAMES) == set(ITEMS) == set(ANSWERS)
    with pytest.raises(UsageError, match="unknown task 'chess'; expected 'image_classification'"):
        get("chess")


def test_every_member_is_there_with_the_same_arguments(task: Task) -> None:
    assert task.name in NAMES and all(s.startswith(".") and s == s.lower() for s in task.suffixes)
    for name, member in MEMBERS.items():
        own = getattr(type(task), name)
        assert list(inspect.signature(own).parameters) == list(inspect.signature(member).parameters), name
        assert inspect.getdoc(own), name
    public = {n for n in dir(task) if not n.startswith("_")}
    assert public == {*MEMBERS, "name", "suffixes"}, "the loop asks nothing else"


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


def test_preprocessing_is_plain_and_encoding_row_by_row(task: Task) -> None:
    items = ITEMS[task.name]()
    spec = task.preprocessing(items, config_of(task.name))
    assert json.loads(json.dumps(spec)) == spec
    X = task.encode(items, spec)
    assert len(X) == len(items) and X.dtype == np.float32 and np.isfinite(X).all()
    np.testing.assert_array_equal(task.encode(items, json.loads(json.dumps(spec))), X)
    for i, item in enumerate(items):
        np.testing.assert_array_equal(task.encode([item], spec)[0], X[i])
    assert task.encode([], spec).shape == (0, *X.shape[1:])


def test_network_features_and_variation(task: Task) -> None:
    items, config = ITEMS[task.name](), config_of(task.name)
    spec = task.preprocessing(items, config)
    X = task.encode(items, spec)
    module = task.network(spec, config.space, width=4, seed=0)
    again = task.network(spec, config.space, width=4, seed=0)
    for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert module.eval()(torch.from_numpy(X)).shape[-1] == 3
    for seen in (task.features(None, X), task.features(module.train(), X)):
        assert seen.ndim == 2 and len(seen) == len(X) and np.isfinite(seen).all()
    vary = task.augment(config)
    assert vary is not None and vary(torch.from_numpy(X), torch.Generator().manual_seed(0)).shape == X.shape
    assert task.augment(config_of(task.name, "[train]\naugment = false")) is None


def test_what_answers_leave_possible(task: Task) -> None:
    space = config_of(task.name).space
    for response in ANSWERS[task.name]:
        possible = task.possible(Answer("1", "q", "x", "ann", response), space)
        assert possible.dtype == bool and possible.shape[-1] == 3 and possible.any(axis=-1).all()


def test_figures(task: Task) -> None:
    items = ITEMS[task.name]()
    config = config_of(task.name, "[check]\neps = [0.01, 0.3]\nattack_steps = 3\nattack_examples = 4")
    spec = task.preprocessing(items, config)
    X, module = task.encode(items, spec), task.network(spec, config.space, width=4, seed=0).eval()
    labels = module(torch.from_numpy(X)).argmax(-1).numpy()
    figures = task.measure(np.eye(3)[labels], labels, config.space)
    assert figures[0].check == "accuracy" and figures[0].figure == 1.0
    attacked = task.attack(module, X, labels, config)
    for e in figures + attacked:
        assert isinstance(e, Evidence) and e.low <= e.figure <= e.high and e.n > 0
    assert len({e.check for e in figures + attacked}) == len(figures + attacked)
    assert len(attacked) == 2 and attacked[0].figure >= attacked[1].figure and attacked[0].n == 4


def test_what_people_see(task: Task) -> None:
    items, config = ITEMS[task.name](), config_of(task.name)
    spec = task.preprocessing(items, config)
    module = task.network(spec, config.space, width=4, seed=0).eval()
    shown = task.explain(module, items[:2], task.encode(items[:2], spec))
    assert len(shown) == 2
    for picture, why, incomplete in shown:
        assert picture[:4] == why[:4] == b"\x89PNG" and 0 <= incomplete < 1
    for item in items:
        assert task.picture(item)[:4] == b"\x89PNG" and task.terminal(item).strip()
