"""Bills of materials: valid by CycloneDX's own schema, complete, and the same bytes twice."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from trilobe.errors import BundleError, StorageError
from trilobe.infrastructure.packaging.installed import (
    TRAINING,
    Package,
    code,
    files_of,
    normal,
    requirements,
    serving,
)
from trilobe.infrastructure.packaging.sbom import sbom, sbom_json
from trilobe.types import Bundle


@pytest.fixture(scope="module")
def validate() -> Callable[[bytes], Any]:
    """The validator of CycloneDX's own library: None for a document that is valid."""
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib[json-validation] is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    return lambda data: validator.validate_str(data.decode())


def test_it_is_valid(bundle: Bundle, validate: Callable[[bytes], Any]) -> None:
    assert validate(sbom_json(bundle)) is None
    assert validate(sbom_json(bundle, [])) is None
    wrong = sbom(bundle) | {"components": [{"type": "rock", "name": "a"}]}
    assert validate(json.dumps(wrong).encode()) is not None, "the validator does say no"


def test_it_lists_every_file_the_model_and_the_packages(bundle: Bundle) -> None:
    made = sbom(bundle)
    files = {c["name"]: c["hashes"][0]["content"] for c in made["components"] if c["type"] == "file"}
    assert files == {name: file["sha256"] for name, file in bundle.manifest["files"].items()}
    (model,) = [c for c in made["components"] if c["type"] == "machine-learning-model"]
    (figure,) = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert figure == {
        "type": "accuracy",
        "value": "0.9",
        "confidenceInterval": {"lowerBound": "0.8", "upperBound": "0.95"},
    }
    libraries = {c["name"]: c["version"] for c in made["components"] if c["type"] == "library"}
    assert libraries["onnxruntime"] == metadata.version("onnxruntime") and "torch" not in libraries
    refs = [c["bom-ref"] for c in made["components"]]
    assert len(refs) == len(set(refs))
    assert {ref for d in made["dependencies"] for ref in [*d["dependsOn"]]} <= set(refs)


def test_the_same_bytes_twice(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sbom_json(bundle)
    script = f"""
import sys
from pathlib import Path
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.packaging.sbom import sbom_json
sys.stdout.buffer.write(sbom_json(open_bundle(Path({str(bundle.path)!r}))))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert json.loads(sbom_json(bundle))["metadata"]["timestamp"] == "2001-09-09T01:46:40Z"
    assert json.loads(sbom_json(bundle))["serialNumber"] != json.loads(first)["serialNumber"]


def test_a_damaged_bundle_gets_none(bundle: Bundle) -> None:
    (bundle.path / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        sbom(bundle)


# What is installed ---------------------------------------------------------------------------------------------------


def test_the_walk_follows_requirements_but_not_those_of_training() -> None:
    found = serving()
    names = [normal(p.name) for p in found]
    assert names[0] == "trilobe" and names[1:] == sorted(names[1:])
    declared = {normal(r.split(";")[0].strip(" ").split(">")[0].split("[")[0])
                for r in metadata.requires("trilobe") or [] if "extra" not in r}  # fmt: skip
    assert declared - TRAINING <= set(names) and not TRAINING & set(names)
    assert "protobuf" in names, "that of a requirement"
    assert "pytest" not in names and "sphinx" not in names, "those of extras"
    assert serving("a package that is not there") == []


def test_requirements_are_pinned_and_pip_reads_them() -> None:
    text = requirements(serving()[1:], ["other>=2"])
    lines = text.splitlines()
    assert lines[-1] == "other>=2" and all("==" in line for line in lines[:-1]) and "trilobe==" not in text
    requirement = pytest.importorskip("packaging.requirements").Requirement
    for line in lines:
        assert requirement(line).name


def test_files_of_a_package_are_those_it_was_installed_with() -> None:
    (found,) = [p for p in serving() if p.name == "msgspec"]
    files = dict(files_of([found]))
    assert all(place.is_file() for place in files.values())
    assert any(name.endswith("METADATA") for name in files) and any(name.endswith(".so") for name in files)
    assert not any("__pycache__" in name or ".." in name for name in files)


def test_a_package_without_a_list_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(metadata.PathDistribution):
        files = None

    monkeypatch.setattr(metadata, "distribution", lambda name: Silent(None))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"odd 1\.0 does not say which files"):
        list(files_of([Package("odd", "1.0", ())]))


def test_our_code_is_what_was_imported() -> None:
    files = code()
    assert files["trilobe/infrastructure/packaging/entry.py"]().startswith(b'"""What the image does')
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in files)
    assert any(not name.endswith(".py") for name in files), "templates and the like are code too"
