"""Classes of texts: learned, attacked, explained, served."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import Plan, fit, predict_logits
from trilobe.algorithms.weights import to_safetensors
from trilobe.config import Config, parse
from trilobe.errors import DataError, UsageError
from trilobe.infrastructure.bundle import REQUIRED_FILES, open_bundle, write_bundle
from trilobe.statistics import softmax
from trilobe.tasks import get
from trilobe.tasks.text_classification.model import network
from trilobe.types import Response

FOLDER = Path(os.environ.get("TRILOBE_DATA", "/nowhere"))
TASK = get("text_classification")
SPEC = {"version": "words.v1", "buckets": 1024, "n_chars": 16, "max_tokens": 10}
GOOD, BAD = ["fine", "great", "lovely"], ["awful", "broken", "dreadful"]
REST = ["the", "service", "is", "today", "👍", "in", "Zürich"]


def config_of(more: str = "") -> Config:
    return parse(f'[project]\nname = "p"\ntask = "text_classification"\n[labels]\nnames = ["good", "bad"]\n{more}')


def reviews(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    dice = np.random.default_rng(seed)
    labels = dice.integers(0, 2, n)
    texts = []
    for label in labels:
        words = [*dice.choice(REST, dice.integers(1, 7)), str(dice.choice(BAD if label else GOOD))]
        texts.append(" ".join(dice.permutation(words)))
    return texts, labels


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[str], Any, np.ndarray]:
    texts, labels = reviews(60)
    module = network(SPEC, 2, width=4)
    fit(module, TASK.encode(texts, SPEC), np.eye(2)[labels], Plan(steps=60, epochs=0, lr=0.02))
    other, truth = reviews(40, seed=1)
    return module, other, TASK.encode(other, SPEC), truth


def test_learned_attacked_explained(trained: Any) -> None:
    module, texts, X, truth = trained
    config = config_of("[check]\neps = [0.5, 0.1]\nattack_steps = 5\nattack_examples = 30")
    proba = softmax(predict_logits(module, X))
    figures = TASK.measure(proba, truth, TASK.space(config))
    assert [e.check for e in figures] == ["accuracy", "ece", "brier", "log_loss"] and figures[0].figure > 0.95
    weak, strong = TASK.attack(module, X, truth, config)
    assert (weak.check, strong.check, weak.n) == ("robust_accuracy@0.1", "robust_accuracy@0.5", 30)
    assert figures[0].figure > weak.figure > strong.figure, "one word decides these texts"
    for text, (picture, why, rest) in zip(texts, TASK.explain(module, texts[:4], X[:4]), strict=False):
        assert picture.startswith(b"<svg") and 0 <= rest < 1
        decisive = next(w for w in text.split() if w in GOOD + BAD)
        assert why.count(b'fill="#D55E00" fill-opacity="0.80"') == 1, "the strongest is one word"
        [strongest] = re.findall(r'<rect x="([\d.]+)"[^>]*fill-opacity="0.80"', why.decode())
        x = 10.0 + 8.4 * (text.index(decisive) + text[: text.index(decisive)].count("👍"))
        assert float(strongest) == pytest.approx(x - 1, abs=0.2), "and it is the one that decides"
    said, sure = TASK.response(proba[0], TASK.space(config), lambda: texts[0])
    assert said == Response("class", (("good", "bad")[truth[0]],)) and sure == proba[0].max()


def test_likeness_before_and_after(trained: Any) -> None:
    module, _, X, truth = trained
    after = TASK.features(module, X)
    near = np.argsort(((after[:, None] - after) ** 2).sum(-1), axis=1)[:, 1]
    assert (truth[near] == truth).mean() > 0.9
    assert TASK.features(None, X).shape == (40, 512)


def test_an_endpoint_says_what_training_says(trained: Any, tmp_path: Path) -> None:
    module, texts, X, _ = trained
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "weights.safetensors": to_safetensors(module.state_dict()),
        "model.onnx": to_onnx(module, np.stack(list(X[:1])), free=2),
        "preprocessing.json": json.dumps(SPEC).encode(),
        "labels.json": json.dumps({"names": ["good", "bad"]}).encode(),
        "calibration.json": b'{"temperature": 1.7}',
    }
    serving = TASK.servable(open_bundle(write_bundle(tmp_path / "b", files, "m1", {}).path))
    serving.warm_up()
    sent = np.empty(len(texts) + 1, dtype=object)
    sent[:] = [t.encode() for t in [*texts, "fine " + "the service " * 10_000 + "awful"]]
    proba = serving.run({"text": sent})["proba"]
    assert proba.dtype == np.float32 and proba.shape == (41, 2)
    np.testing.assert_allclose(proba[:40], softmax(predict_logits(module, X), 1.7), atol=1e-5)
    long = TASK.encode([sent[-1].decode()], SPEC)
    assert len(long[0]) == 10
    np.testing.assert_allclose(proba[40], softmax(predict_logits(module, long), 1.7)[0], atol=1e-5)
    with pytest.raises(DataError, match="text 0 of the request: not UTF-8"):
        serving.run({"text": np.array([b"\xff"], dtype=object)})


def test_files_and_answers() -> None:
    config = config_of()
    parts = TASK.read(b"text,label\na,good\nb,\n", ".csv", config)
    assert [(p.data, p.truth, p.where) for p in parts] == [
        (b"a", Response("class", ("good",)), "#1"),
        (b"b", None, "#2"),
    ]
    assert TASK.possible(Response("not", ("good",)), TASK.space(config), lambda: "a").tolist() == [False, True]
    assert len(TASK.read(b"word " * 1000, ".txt", config)) == 1, "the class is of the whole"
    assert TASK.captured(np.frombuffer(b"a b", np.uint8)) == "a b"
    with pytest.raises(UsageError, match="1 class"):
        network(SPEC, 1)
    with pytest.raises(UsageError, match="no texts"):
        TASK.preprocessing([], config)


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "trec").exists(), reason="TRILOBE_DATA names no folder with trec")
def test_questions_of_trec() -> None:
    """From scratch, 800 of its questions: six kinds, told right far more often than the largest kind's share."""

    def load(name: str) -> tuple[list[str], list[str]]:
        lines = (FOLDER / "trec" / name).read_text("latin-1").splitlines()
        return [line.split(" ", 1)[1] for line in lines], [line.split(":")[0] for line in lines]

    texts, kinds = load("TREC.train.raw")
    other, truth = load("TREC.test.raw")
    names = sorted(set(kinds))
    order = np.random.default_rng(0).permutation(len(texts))[:800]
    texts, kinds = [texts[i] for i in order], [kinds[i] for i in order]
    config = parse('[project]\nname = "p"\ntask = "text_classification"\n[labels]\nnames = ["a", "b"]')
    spec = TASK.preprocessing(texts, config)
    module = network(spec, len(names))
    y = np.array([names.index(k) for k in kinds])
    fit(module, TASK.encode(texts, spec), np.eye(len(names))[y], Plan(steps=0, epochs=8))
    said = predict_logits(module, TASK.encode(other, spec)).argmax(1)
    assert np.mean([names[i] == t for i, t in zip(said, truth, strict=True)]) > 0.6
