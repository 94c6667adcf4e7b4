"""A bundle's bill of materials: its files with their digests, the model with its evidence, the packages it needs.

CycloneDX 1.6 (ECMA-424), as JSON. The same bundle among the same installed packages gives the same bytes: the serial
number follows from the content, the time is the bundle's.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from trilobe import __version__
from trilobe.infrastructure.bundle import read_bytes, read_json, source_date
from trilobe.infrastructure.packaging.installed import Package, serving
from trilobe.infrastructure.packaging.oci import timestamp
from trilobe.types import Bundle

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://trilobe.readthedocs.io/sbom")


def sbom(bundle: Bundle, packages: Sequence[Package] | None = None) -> dict[str, Any]:
    """The bill of materials of an opened bundle.

    ``packages`` are those it is served with, the first of which needs the others: by default Trilobe and what is
    installed here of its requirements, without those of training. Every file of the bundle is read and checked again;
    what the license of a package is, is what it declares itself.

    >>> import tempfile; from pathlib import Path
    >>> from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = sbom(write_bundle(Path(folder, "b"), dict.fromkeys(REQUIRED_FILES, b"[]"), "m1", {}))
    >>> [c["type"] for c in made["components"]][:2], made["components"][-1]["purl"].partition("/")[0]
    (['machine-learning-model', 'file'], 'pkg:pypi')
    """
    packages = serving() if packages is None else packages
    name = str(bundle.manifest.get("project") or "model")
    whole = {"type": "application", "bom-ref": f"bundle:{bundle.id}", "name": name, "version": bundle.id}
    files = [_file(bundle, file) for file in sorted(bundle.manifest["files"])]
    model = _model(bundle, name)
    parts = [model["bom-ref"], *(f["bom-ref"] for f in files), *(p.purl for p in packages[:1])]
    made = {
        "metadata": {
            "timestamp": timestamp(source_date(bundle.manifest["created_at"])),
            "tools": {"components": [{"type": "application", "name": "trilobe", "version": __version__}]},
            "component": whole,
        },
        "components": [model, *files, *map(_package, packages)],
        "dependencies": [{"ref": whole["bom-ref"], "dependsOn": parts}, *_dependencies(packages)],
    }
    serial = uuid.uuid5(_NAMESPACE, json.dumps(made, sort_keys=True))
    head = {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX",
            "specVersion": "1.6", "serialNumber": serial.urn, "version": 1}  # fmt: skip
    return {**head, **made}


def sbom_json(bundle: Bundle, packages: Sequence[Package] | None = None) -> bytes:
    """:func:`sbom` as the bytes of its file."""
    return json.dumps(sbom(bundle, packages), indent=2, ensure_ascii=False).encode() + b"\n"


def _file(bundle: Bundle, name: str) -> dict[str, Any]:
    size = len(read_bytes(bundle, name))
    return {
        "type": "file", "bom-ref": f"file:{name}", "name": name,
        "hashes": [{"alg": "SHA-256", "content": bundle.manifest["files"][name]["sha256"]}],
        "properties": [{"name": "trilobe:bytes", "value": str(size)}],
    }  # fmt: skip


def _model(bundle: Bundle, name: str) -> dict[str, Any]:
    """The model, with the evidence that was gathered on it as its model card."""
    evidence = read_json(bundle, "evidence.json")
    weights = bundle.manifest["files"]["weights.safetensors"]
    figures = [_figure(e) for e in evidence if isinstance(e, dict)] if isinstance(evidence, list) else []
    card: dict[str, Any] = {"quantitativeAnalysis": {"performanceMetrics": figures}}
    if task := bundle.manifest.get("task"):
        card["modelParameters"] = {"task": str(task)}
    return {
        "type": "machine-learning-model", "bom-ref": f"model:{bundle.model_id}", "name": name,
        "version": bundle.model_id, "hashes": [{"alg": "SHA-256", "content": weights["sha256"]}], "modelCard": card,
    }  # fmt: skip


def _figure(evidence: dict[str, Any]) -> dict[str, Any]:
    interval = {"lowerBound": str(evidence.get("low")), "upperBound": str(evidence.get("high"))}
    value = str(evidence.get("figure"))
    return {"type": str(evidence.get("check")), "value": value, "confidenceInterval": interval}


def _package(package: Package) -> dict[str, Any]:
    found = {"type": "library", "bom-ref": package.purl, "name": package.name, "version": package.version,
             "purl": package.purl}  # fmt: skip
    return {**found, "licenses": [{"license": {"name": package.license}}]} if package.license else found


def _dependencies(packages: Sequence[Package]) -> list[dict[str, Any]]:
    refs = {p.purl.rpartition("@")[0]: p.purl for p in packages}
    return [{"ref": p.purl, "dependsOn": [refs[f"pkg:pypi/{n}"] for n in p.needs]} for p in packages]
