"""``train`` and ``evaluate``: from beliefs to a model, and what it can do; what must not become a model."""

from pathlib import Path

import numpy as np
import pytest

from trilobe import loop
from trilobe.errors import NotEnoughData, NotFoundError, TrainingError, UsageError


def answers(tiny, path: Path, labels: list[str]) -> Path:
    rows = [f"{e.id},ann,{label}" for e, label in zip(tiny.examples("pool"), labels, strict=False)]
    path.write_text("\n".join(["example,annotator,label", *rows]))
    return path


def test_a_model_of_every_kind_of_answer(tiny, tmp_path: Path) -> None:
    truth = [tiny.truth[e.id] for e in tiny.examples("pool")]
    others = [[k for k in ("bar", "cross", "dot") if k != t] for t in truth]
    said = [(t, f"not:{o[0]}", f"{t}|{o[0]}", "?")[i % 4] for i, (t, o) in enumerate(zip(truth, others, strict=True))]
    loop.label(answers(tiny, tmp_path / "a.csv", said), tiny.folder)
    model = loop.train(tiny.folder)
    assert model.origin["n_examples"] == 60
    assert loop.evaluate(tiny.folder, model.id[:6])[0].check == "accuracy"


def test_evaluated_on_the_held_out_part(trained) -> None:
    accuracy, ece, _, _ = loop.evaluate(trained.folder)
    assert (accuracy.check, accuracy.n, ece.check) == ("accuracy", 30, "ece")
    assert accuracy.detail["on"] == "held-out test part"
    with loop.opened(trained.folder) as p:
        examples, labels = p.truth()
        proba = p.predict(p.store.model(), p.encode(examples))
    assert accuracy.figure == pytest.approx((proba.argmax(1) == labels).mean())
    assert accuracy.low <= accuracy.figure <= accuracy.high + 1e-12


def test_without_a_test_part_the_estimate_says_so(template, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "trilobe.toml").write_text((template.folder / "trilobe.toml").read_text())
    loop.init(folder)
    loop.add([template.folder.parent / "pool"], folder)
    loop.query(folder, n=12)
    loop.label(template.answer, folder)
    loop.train(folder)
    found = loop.evaluate(folder)[0]
    assert found.n == 12 and "no test part" in found.detail["on"]


def test_nothing_answered(tiny) -> None:
    with pytest.raises(NotEnoughData, match=r"no answers yet(.|\n)*trilobe query, then trilobe label"):
        loop.train(tiny.folder)
    with pytest.raises(NotFoundError, match=r"no model yet(.|\n)*trilobe train"):
        loop.evaluate(tiny.folder)


def test_one_class_only(tiny, tmp_path: Path) -> None:
    loop.label(answers(tiny, tmp_path / "a.csv", ["dot"] * 10), tiny.folder)
    with pytest.raises(NotEnoughData, match=r"all 10 answered examples are 'dot'; expected answers for at least two"):
        loop.train(tiny.folder)


def test_one_answer_only(tiny, tmp_path: Path) -> None:
    loop.label(answers(tiny, tmp_path / "a.csv", ["dot"]), tiny.folder)
    with pytest.raises(NotEnoughData, match=r"1 answered example; expected at least 2"):
        loop.train(tiny.folder)


def test_a_loss_that_explodes(tiny, tmp_path: Path) -> None:
    tiny.set("train", "lr", "1e9")
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    before = tiny.state()
    with pytest.raises(TrainingError, match=r"lower train.lr|finite weights"):
        loop.train(tiny.folder)
    assert tiny.state() == before
    tiny.set("train", "lr", "0.01")
    assert loop.train(tiny.folder).id


def test_weights_that_are_no_numbers(trained) -> None:
    from dataclasses import replace

    from trilobe.algorithms.weights import from_safetensors, to_safetensors

    with loop.opened(trained.folder) as p:
        model = p.store.model()
        tensors, _ = from_safetensors(p.store.blobs.get(model.weights))
        name = next(k for k, v in tensors.items() if v.is_floating_point())
        tensors[name].view(-1)[0] = np.nan
        p.store.add_model(replace(model, id="bad0bad0bad0", weights=p.store.blobs.put(to_safetensors(tensors))))
    for verb in (loop.evaluate, loop.check, loop.package):
        with pytest.raises(TrainingError, match=f"NaN or infinity in the weights '{name}'"):
            verb(trained.folder, "bad0")
    with pytest.raises(TrainingError):
        loop.query(trained.folder)
    assert not trained.state()["bundles"]


def test_classes_that_changed_since(trained) -> None:
    trained.set("labels", "names", '["bar", "cross", "dot", "star"]')
    with pytest.raises(UsageError, match=r"knows the classes .*; expected those of labels.names(.|\n)*trilobe train"):
        loop.evaluate(trained.folder)
    assert loop.train(trained.folder).space.names == ("bar", "cross", "dot", "star")
    assert loop.evaluate(trained.folder)


def test_one_class_in_the_settings(trained) -> None:
    trained.set("labels", "names", '["bar"]')
    with pytest.raises(UsageError, match=r"labels.names has 1 class"):
        loop.train(trained.folder)


def test_a_damaged_blob_is_named(trained) -> None:
    with loop.opened(trained.folder) as p:
        path = p.store.blobs.path(p.store.model().weights)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Exception, match=r"is damaged: its bytes hash to") as e:
        loop.evaluate(trained.folder)
    assert str(path) in str(e.value)


# ---- how it is trained ----


def weights(tiny) -> str:
    with loop.opened(tiny.folder) as p:
        return str(p.store.model().weights)


def test_networks_trained_side_by_side_are_those_of_one_worker(tiny, tmp_path: Path) -> None:
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    steps: list[tuple[int, int]] = []
    with loop.listening(lambda said, done=0, total=0: steps.append((done, total)) if said == "training" else None):
        one = loop.train(tiny.folder)
    before = weights(tiny)
    assert steps[-1] == (120, 120) and steps == sorted(steps), "two folds and the last network, forty steps each"
    tiny.set("train", "workers", "2")
    two = loop.train(tiny.folder)
    assert weights(tiny) == before and (two.temperature, two.metrics) == (one.temperature, one.metrics)
    assert two.id != one.id and two.origin["train"]["workers"] == 2
    with loop.opened(tiny.folder) as p:
        assert not [*(p.state / "work").iterdir()], "checkpoints go when the model is kept"


def test_a_rate_that_was_measured_stands_in_the_origin(tiny, tmp_path: Path) -> None:
    tiny.set("train", "lr", '"auto"')
    tiny.set("train", "optimizer", '"sgd"')
    tiny.set("train", "precision", '"auto"')
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        model = loop.train(tiny.folder)
    found = model.origin["settled"]
    assert 1e-7 <= found["lr"] <= 1 and found["precision"] in ("float32", "bfloat16")
    assert any(f"train.lr = {found['lr']:.2g}, train.precision = {found['precision']}" in line for line in said)
    assert model.origin["train"]["lr"] == "auto" and model.origin["train"]["optimizer"] == "sgd"
    with loop.opened(tiny.folder) as p:
        (kept,) = p.store.journal("settled/").values()
    assert kept == found


def test_what_was_not_measured_is_not_in_the_origin(trained) -> None:
    with loop.opened(trained.folder) as p:
        assert "settled" not in p.store.model().origin


def test_a_plan_that_cannot_be_is_refused_before_anything_is_trained(tiny, tmp_path: Path) -> None:
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    tiny.set("train", "held_out", "0.2")
    before = tiny.state()
    with pytest.raises(UsageError, match=r"held_out = 0\.2 without patience"):
        loop.train(tiny.folder)
    assert tiny.state() == before


@pytest.mark.slow
def test_a_profile_keeps_nothing_and_says_what_workers_bring(tiny, tmp_path: Path) -> None:
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    before = tiny.state()
    found = loop.train(tiny.folder, profile=True)
    assert tiny.state() == before and found.encode_s > 0
    assert found.forecasts[0].side_by_side > 1, "three networks can be trained side by side"
    assert "one worker keeps" in str(found)
