"""``check`` and ``package``: gates hold, whatever happened between the check and the package."""

import json

import pytest

from trilobe import loop
from trilobe.errors import BundleError, CheckFailed, ConfigError, NotFoundError, UsageError
from trilobe.infrastructure.bundle import REQUIRED_FILES, open_bundle


def test_evidence_is_gathered_gated_and_kept(trained) -> None:
    found = loop.check(trained.folder, gates={"accuracy": 0.1, "ece": 0.0})
    passed = {e.check: e.passed for e in found}
    assert passed == {
        **{"accuracy": True, "ece": False, "brier": None, "log_loss": None},
        **{"robust_accuracy@0.02": None, "parity": None},
    }
    with loop.opened(trained.folder) as p:
        kept = {e.check: e.passed for e in p.store.evidence(p.store.model().id)}
        assert kept == {**dict.fromkeys(passed), "parity": True}, "gates tried out leave the verdict of the file alone"


def test_a_gate_on_what_nobody_measures_fails(trained) -> None:
    found = loop.check(trained.folder, gates={"robust_accuracy@0.3": 0.5})
    (missing,) = [e for e in found if e.check == "robust_accuracy@0.3"]
    assert missing.passed is False and missing.detail["status"] == "not measured"


@pytest.mark.parametrize(
    ("gates", "problem"),
    [
        ("{acuracy = 0.9}", r"unknown check 'acuracy'(.|\n)*did you mean 'accuracy'"),
        ("{accuracy = 90.0}", r"accuracy = 90.0; expected a number from 0 to 1(.|\n)*0.9 for 90%"),
    ],
)
def test_gates_that_cannot_be_meant(trained, gates: str, problem: str) -> None:
    trained.set("check", "gates", gates)
    for verb in (loop.check, loop.package):
        with pytest.raises(ConfigError, match=problem):
            verb(trained.folder)
    assert not trained.state()["bundles"]


def test_an_empty_project_has_nothing_to_promote(tiny) -> None:
    for verb in (loop.check, loop.package):
        with pytest.raises(NotFoundError, match=r"no model yet(.|\n)*trilobe train"):
            verb(tiny.folder)
    with pytest.raises(NotFoundError, match=r"no bundle yet; expected a packaged model(.|\n)*trilobe package"):
        loop.serve(project=tiny.folder)


def test_a_bundle_is_whole_and_says_what_it_is(trained) -> None:
    bundle = loop.package(trained.folder)
    again = open_bundle(bundle.path)
    assert set(REQUIRED_FILES) <= set(again.manifest["files"])
    assert again.manifest["gates_passed"] is True
    assert loop.package(trained.folder).id == bundle.id, "packaged twice, one bundle"
    card = (bundle.path / "README.md").read_text()
    assert "tiny" in card and "accuracy" in card.lower()
    labels = json.loads((bundle.path / "labels.json").read_text())
    assert labels["names"] == ["bar", "cross", "dot"]


def test_a_failed_gate_refuses_unless_allowed_and_is_recorded(trained) -> None:
    trained.set("check", "gates", "{ece = 0.0}")
    with pytest.raises(CheckFailed, match=r"1 of 1 gate failed: ece is .* not at most 0") as e:
        loop.package(trained.folder)
    assert e.value.exit_code == 3 and not trained.state()["bundles"]
    bundle = loop.package(trained.folder, allow_failed=True)
    assert bundle.manifest["gates_passed"] is False
    evidence = {e["check"]: e["passed"] for e in json.loads((bundle.path / "evidence.json").read_text())}
    assert evidence["ece"] is False


def test_evaluating_again_does_not_open_a_gate(trained) -> None:
    trained.set("check", "gates", "{ece = 0.0}")
    assert any(e.passed is False for e in loop.check(trained.folder))
    loop.evaluate(trained.folder)
    with pytest.raises(CheckFailed):
        loop.package(trained.folder)


def test_gates_changed_after_the_check_count(trained) -> None:
    trained.set("check", "gates", "{accuracy = 0.1}")
    loop.check(trained.folder)
    trained.set("check", "gates", "{ece = 0.0}")
    with pytest.raises(CheckFailed, match=r"ece"):
        loop.package(trained.folder)
    trained.set("check", "gates", "{accuracy = 0.1}")
    assert loop.package(trained.folder).manifest["gates_passed"] is True, "as the error advised"


@pytest.mark.parametrize("damage", ["edit", "cut", "lose"])
def test_a_damaged_bundle_is_not_served_and_the_file_is_named(trained, damage: str) -> None:
    bundle = loop.package(trained.folder)
    file = bundle.path / "model.onnx"
    data = file.read_bytes()
    if damage == "lose":
        file.unlink()
    else:
        file.write_bytes(data[:-20] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"model\.onnx"):
        loop.serve(project=trained.folder, background=True)
    file.write_bytes(data)
    assert open_bundle(bundle.path).id == bundle.id


@pytest.mark.parametrize("capture", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(trained, capture: float) -> None:
    loop.package(trained.folder)
    with pytest.raises(UsageError, match=r"capture = .*; expected a share from 0 to 1"):
        loop.serve(project=trained.folder, capture=capture)


def test_stopping_what_never_ran(trained) -> None:
    with pytest.raises(NotFoundError, match=r"no endpoint was ever started"):
        loop.serve(project=trained.folder, stop=True)
