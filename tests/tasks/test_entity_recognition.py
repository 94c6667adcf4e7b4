"""Entities: the CRF in numpy against torch, figures against seqeval and brute force, an endpoint against training."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilobe.algorithms.crf import allowed_transitions
from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import Plan, fit, predict_logits
from trilobe.algorithms.weights import to_safetensors
from trilobe.config import Config, parse
from trilobe.data.tags import tag_space
from trilobe.errors import AnswerError, ConfigError, DataError, NotEnoughData, UsageError
from trilobe.infrastructure.bundle import REQUIRED_FILES, open_bundle, write_bundle
from trilobe.rows import apply, as_rows
from trilobe.statistics import softmax
from trilobe.tasks import get
from trilobe.tasks.entity_recognition.data import best_tags, entities, legal, log_marginals, space_of, watched
from trilobe.tasks.entity_recognition.metrics import entity_counts, measure, scores
from trilobe.tasks.entity_recognition.model import network
from trilobe.tasks.words import tokenize
from trilobe.types import Response, Span

TASK = get("entity_recognition")
SPACES = {scheme: tag_space(["X", "Y"], scheme) for scheme in ("BIO", "BIOES")}
SPEC = {"version": "words.v1", "buckets": 1024, "n_chars": 16, "max_tokens": 16}


def config_of(more: str = "", labels: str = '"SERVICE", "VERSION"') -> Config:
    return parse(f'[project]\nname = "p"\ntask = "entity_recognition"\n[labels]\nnames = [{labels}]\n{more}')


def sentences(n: int, seed: int = 0) -> list[tuple[str, Response]]:
    dice, made = np.random.default_rng(seed), []
    for _ in range(n):
        service = str(dice.choice(["Billing", "Login Gateway", "Search 👍", "Zürich-API"]))
        version = f"v{dice.integers(1, 9)}.{dice.integers(0, 9)}"
        parts = [str(dice.choice(["The", "Our", "Since noon the"])), service, "in", version, "is down ."]
        at, spans = 0, []
        for part in parts:
            if part in (service, version):
                spans.append(Span(at, at + len(part), "SERVICE" if part == service else "VERSION"))
            at += len(part) + 1
        made.append((" ".join(parts), Response("spans", spans=tuple(spans))))
    return made


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[str], Any, Any]:
    config, space = config_of(), TASK.space(config_of())
    told = sentences(60)
    X = TASK.encode([t for t, _ in told], SPEC)
    Y = as_rows([TASK.possible(r, space, lambda t=t: t).astype(float) for t, r in told])
    module = network(SPEC, space, width=4)
    fit(module, X, Y, Plan(steps=80, epochs=0, lr=0.02))
    other = sentences(30, seed=1)
    truth = as_rows([TASK.possible(r, space, lambda t=t: t).argmax(-1) for t, r in other])
    del config
    return module, [t for t, _ in other], TASK.encode([t for t, _ in other], SPEC), truth


@pytest.fixture(scope="module")
def bundle(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    module, _, X, _ = trained
    space = TASK.space(config_of())
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "weights.safetensors": to_safetensors(module.state_dict()),
        "model.onnx": to_onnx(module, np.stack(list(X[:1])), free=2),
        "preprocessing.json": json.dumps(SPEC).encode(),
        "labels.json": json.dumps({"names": space.names, "scheme": space.scheme}).encode(),
        "calibration.json": b'{"temperature": 1.3}',
    }
    folder = tmp_path_factory.mktemp("b") / "bundle"
    return open_bundle(write_bundle(folder, files, "m1", {"task": "entity_recognition"}).path)


@pytest.mark.parametrize("scheme", SPACES)
def test_what_may_follow_what_is_the_crf_s_rule(scheme: str) -> None:
    space = SPACES[scheme]
    np.testing.assert_array_equal(legal(space), allowed_transitions(space.names).numpy())
    assert space_of(space.names) == space


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(["BIO", "BIOES"]))
def test_best_tags_by_trying_all(seed: int, length: int, scheme: str) -> None:
    space = tag_space(["X"], scheme)
    proba = np.random.default_rng(seed).dirichlet(np.full(len(space), 0.5), size=length)
    rule = legal(space)
    all_ = [
        (float(np.log(np.maximum(proba[np.arange(length), tags], 1e-12)).sum()), tags)
        for tags in itertools.product(range(len(space)), repeat=length)
        if rule[(-1, *tags), (*tags, -1)].all()
    ]
    got = best_tags(proba, space)
    assert rule[np.append(-1, got), np.append(got, -1)].all()
    score = float(np.log(np.maximum(proba[np.arange(length), got], 1e-12)).sum())
    assert score == pytest.approx(max(all_)[0], abs=1e-9)


@pytest.mark.parametrize("scheme", SPACES)
def test_marginals_in_numpy_are_those_in_torch(scheme: str) -> None:
    module = network(SPEC, SPACES[scheme], width=2, seed=3).eval()
    with torch.no_grad():
        for p in module.crf.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    X = TASK.encode(["One", "Two words here .", "and " * 40], SPEC)
    for x in X:
        emissions = module(torch.from_numpy(x[None])).detach().numpy()[0]
        want = module.log_proba(torch.from_numpy(x[None])).numpy()[0]
        np.testing.assert_allclose(np.exp(TASK.finish(emissions, weights)), np.exp(want), atol=1e-5)
        np.testing.assert_allclose(np.exp(log_marginals(emissions, weights)).sum(axis=1), 1, atol=1e-9)


def random_tags(dice: np.random.Generator, scheme: str, n: int) -> list[np.ndarray]:
    space = SPACES[scheme]
    return [best_tags(dice.dirichlet(np.ones(len(space)), size=int(dice.integers(1, 9))), space) for _ in range(n)]


@pytest.mark.parametrize("scheme", SPACES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_f1_is_seqeval_s(scheme: str, seed: int) -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2, IOBES

    dice, space = np.random.default_rng(seed), SPACES[scheme]
    truth = random_tags(dice, scheme, 60)
    said = [
        np.where(dice.random(len(t)) < 0.3, best_tags(dice.dirichlet(np.ones(len(space)), size=len(t)), space), t)
        for t in truth
    ]
    said = [best_tags(np.eye(len(space))[t] * 0.9 + 0.01, space) for t in said]
    names = [[[space.names[i] for i in t] for t in part] for part in (truth, said)]
    strict = {"average": "micro", "mode": "strict", "scheme": IOB2 if scheme == "BIO" else IOBES, "zero_division": 0}
    f, p, r = (score(*names, **strict) for score in (f1_score, precision_score, recall_score))
    figures = {e.check: e for e in measure(as_rows([np.eye(len(space))[t] for t in said]), as_rows(truth), space)}
    assert 0 < f < 1
    assert [figures[k].figure for k in ("f1", "precision", "recall")] == pytest.approx([f, p, r])
    assert all(e.low <= e.figure <= e.high for e in figures.values())


def test_figures_by_hand_and_at_the_edges() -> None:
    space = SPACES["BIO"]
    o, bx, ix, by = (space.index(n) for n in ("O", "B-X", "I-X", "B-Y"))
    truth = [[bx, ix, o], [o, by, o]]
    said = [[bx, o, o], [o, by, by]]  # a span too short; a span too many
    assert entity_counts(np.eye(len(space))[said], truth, space).tolist() == [[0, 1, 1], [1, 2, 1]]
    found = {e.check: e for e in measure(np.eye(len(space))[said], truth, space)}
    assert found["f1"].figure == pytest.approx(2 / 5) and found["token_accuracy"].figure == pytest.approx(4 / 6)
    assert next(iter(found)) == "f1"
    nothing = {e.check: e.figure for e in measure(np.eye(len(space))[[[o]]], [[o]], space)}
    assert nothing["f1"] == 0 and nothing["token_accuracy"] == 1
    with pytest.raises(NotEnoughData):
        measure(as_rows([]), as_rows([]), space)
    with pytest.raises(UsageError, match="text 0 has 2 predictions and 1 tags"):
        measure(np.eye(len(space))[[[0, 0]]], [[0]], space)
    with pytest.raises(UsageError, match="1 predictions and 2 texts"):
        measure(np.eye(len(space))[[[0, 0]]], [[0, 0], [0, 0]], space)


def test_the_interval_covers_the_figure_of_many_texts() -> None:
    """95% intervals of samples of 50 texts hold the F1 of the population they were drawn from about 95 times of 100."""
    dice = np.random.default_rng(0)
    true = dice.poisson(2, 4000)
    right = dice.binomial(true, 0.7)
    people = np.stack([right, right + dice.poisson(0.5, 4000), true], axis=1)
    whole = 2 * people[:, 0].sum() / people[:, 1:].sum()
    held = 0
    for i in range(80):
        f1 = scores(people[dice.choice(4000, 50, replace=False)], seed=i)[0]
        held += f1.low <= whole <= f1.high
    assert held >= 68


def test_spans_are_learned_and_found(trained: Any) -> None:
    module, texts, X, truth = trained
    space = TASK.space(config_of())
    proba = apply(softmax, predict_logits(module, X))
    figures = {e.check: e.figure for e in TASK.measure(proba, truth, space)}
    assert figures["f1"] > 0.95
    said, sure = TASK.response(proba[0], space, lambda: texts[0])
    assert {texts[0][s.start : s.end] for s in said.spans} == {
        texts[0][s.start : s.end] for s in sentences(30, 1)[0][1].spans
    }
    assert 0 < sure <= 1
    assert TASK.possible(said, space, lambda: texts[0]).sum() == len(tokenize(texts[0]))
    found = entities(texts[0], proba[0], space)
    assert [(e["start"], e["end"], e["label"]) for e in found] == [(s.start, s.end, s.label) for s in said.spans]
    assert all(e["text"] == texts[0][e["start"] : e["end"]] and 0 <= e["confidence"] <= 1 for e in found)


def test_what_is_watched_is_the_least_certain_word() -> None:
    space = tag_space(["X"])
    sure, torn = [0.98, 0.01, 0.01], [0.5, 0.3, 0.2]
    rows = watched(as_rows([np.array([sure, torn, sure]), np.array([sure])]), space)
    np.testing.assert_allclose(rows, [[0.5, 0.5], [0.98, 0.02]])
    assert TASK.watched_space(space).names == ("O", "X")


def test_hidden_words_cost_entities_and_more_cost_more(trained: Any) -> None:
    module, _, X, truth = trained
    config = config_of("[check]\neps = [0.6, 0.1, 0.0]\nattack_steps = 4\nattack_examples = 20")
    found = TASK.attack(module, X, truth, config)
    assert [e.check for e in found] == ["robust_accuracy@0", "robust_accuracy@0.1", "robust_accuracy@0.6"]
    f1 = [e.figure for e in found]
    assert f1[0] >= f1[1] > f1[2] and found[0].n == 20
    proba = apply(softmax, predict_logits(module, X[:20]))
    assert f1[0] == TASK.measure(proba, truth[:20], TASK.space(config))[0].figure


def test_explanations_show_entities_and_what_they_rest_on(trained: Any) -> None:
    module, texts, X, _ = trained
    for picture, why, incomplete in TASK.explain(module, texts[:3], X[:3]):
        assert picture.startswith(b"<svg") and b">SERVICE<" in picture and why.startswith(b"<svg")
        assert 0 <= incomplete < 1 and why.count(b"<rect") > picture.count(b"<rect")


def objects(*texts: str) -> Any:
    out = np.empty(len(texts), dtype=object)
    out[:] = [t.encode() for t in texts]
    return out


def test_an_endpoint_says_what_training_says(trained: Any, bundle: Any) -> None:
    module, texts, X, _ = trained
    serving, space = TASK.servable(bundle), TASK.space(config_of())
    serving.warm_up()
    answer = serving.run({"text": objects(*texts)})
    proba = apply(lambda row: softmax(row, 1.3), predict_logits(module, X))
    assert answer["proba"].dtype == np.float32
    np.testing.assert_allclose(answer["proba"], watched(proba, space), atol=1e-5)
    for text, p, said in zip(texts, proba, answer["entities"], strict=True):
        got, want = json.loads(said), entities(text, p, space)
        assert [{**e, "confidence": 0} for e in got] == [{**e, "confidence": 0} for e in want]
        assert [e["confidence"] for e in got] == pytest.approx([e["confidence"] for e in want], abs=1e-5)
    alone = serving.run({"text": objects(texts[3])})
    assert alone["entities"][0] == answer["entities"][3]


def test_a_long_document_is_put_together_again(trained: Any, bundle: Any) -> None:
    _, texts, _, _ = trained
    serving = TASK.servable(bundle)
    short = [json.loads(e) for e in serving.run({"text": objects(*texts)})["entities"]]
    whole = "\n ".join(texts)
    found = json.loads(serving.run({"text": objects(whole)})["entities"][0])
    assert len(tokenize(whole)) > 20 * SPEC["max_tokens"]  # type: ignore[operator]
    assert all(whole[e["start"] : e["end"]] == e["text"] for e in found)
    assert [e["text"] for e in found] == [e["text"] for part in short for e in part]


def test_requests_that_are_no_text_are_refused(bundle: Any) -> None:
    serving = TASK.servable(bundle)
    (given_,), (proba, said) = serving.inputs, serving.outputs
    assert (given_.name, given_.datatype, given_.shape) == ("text", "BYTES", (-1,))
    assert (proba.name, proba.shape, said.name, said.datatype) == ("proba", (-1, 3), "entities", "BYTES")
    for wrong in (b"", b" ", b"\xff\xfe", b"a\0"):
        with pytest.raises(DataError, match="step 'preprocess': text 1 of the request"):
            serving.run({"text": np.array([b"fine", wrong], dtype=object)})
    with pytest.raises(DataError, match="'text' holds values that are not bytes"):
        given_.check(np.array(["text"], dtype=object))


CHILD = """
import sys
from pathlib import Path
from trilobe.infrastructure.bundle import open_bundle
from trilobe.tasks import get
get("entity_recognition").servable(open_bundle(Path(sys.argv[1]))).warm_up()
print(sorted({"torch", "transformers", "onnx", "sqlalchemy", "scipy", "rich"} & set(sys.modules)))
"""


def test_an_endpoint_loads_no_torch(bundle: Any) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, bundle.path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    space = TASK.space(config_of())
    for said, message in [
        (Response("spans", spans=(Span(0, 3, "SERVICE"), Span(2, 5, "VERSION"))), "overlaps"),
        (Response("spans", spans=(Span(0, 99, "SERVICE"),)), "0 to 99"),
        (Response("spans", spans=(Span(1, 3, "SERVICE"),)), "does not begin and end with tokens"),
        (Response("spans", spans=(Span(0, 3, "CITY"),)), "unknown label"),
        (Response("class", ("SERVICE",)), "an answer about spans"),
    ]:
        with pytest.raises(AnswerError, match=message):
            TASK.possible(said, space, lambda: "The text")
    assert TASK.possible(Response("unsure"), space, lambda: "The text").all()
    assert (
        TASK.possible(Response("span_accepted", spans=(Span(4, 8, "VERSION"),)), space, lambda: "The text").sum() == 6
    )
    with pytest.raises(ConfigError, match="at least one"):
        TASK.space(config_of(labels=""))


def test_files_become_parts(tmp_path: Path) -> None:
    parts = TASK.read(b"A O\nB B-VERSION\n\nC O\n", ".conll", config_of())
    assert [(p.data, p.truth, p.where) for p in parts] == [
        (b"A B", Response("spans", spans=(Span(2, 3, "VERSION"),)), "#1"),
        (b"C", Response("spans"), "#2"),
    ]
    long = TASK.read(("One two three. " * 20).encode(), ".txt", config_of("[text]\nmax_tokens = 9"))
    assert len(long) == 10 and {p.data for p in long} == {b"One two three. One two three."}
