"""``check`` and ``package``: a model earns its evidence and becomes a bundle."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trilobe.errors import UsageError
from trilobe.infrastructure.bundle import bundle_id, write_bundle
from trilobe.loop.believing import unpack_beliefs
from trilobe.loop.deferring import deferral_table
from trilobe.loop.learning import evaluate, held_out
from trilobe.loop.packaging import deliver, expect_deliverable, packaged
from trilobe.loop.project import Project, annotators, calibrated, opened, tell
from trilobe.rows import as_rows, flat, is_ragged
from trilobe.types import Bundle, Evidence, FloatArray, Model


def check(
    project: "Project | Path | str" = ".", model: str = "", gates: Mapping[str, float] | None = None
) -> list[Evidence]:
    """Gather the evidence on a model and hold it against the gates of trilobe.toml.

    Measured are accuracy and calibration on the held-out part, accuracy under projected gradient attack at each
    strength of check.eps, and how far the exported ONNX graph is from the trained network. On the command line a
    failed gate gives exit code 3.

    Args:
        project: the project's folder.
        model: its id or first letters; the newest by default.
        gates: tried out in place of those of trilobe.toml, for this call only; names are accuracy (or f1,
            precision, recall), ece, brier, log_loss, parity, robust_accuracy@EPS.

    Returns:
        All evidence, gated: ``passed`` is None where there is no gate.

    Example:
        trilobe check --json
    """
    from trilobe.trust.checks import gate, parity

    with opened(project) as p:
        chosen = p.store.model(model or None)
        found = evaluate(p, chosen.id)
        module = p.module(chosen)
        X, labels = _attackable(p, chosen)
        tell("attacking the model")
        found += p.task.attack(module, X, labels, p.config)
        tell("comparing the exported graph with the trained network")
        sample = X[:500]
        found.append(parity(flat(p.predict(chosen, sample, module)), flat(_exported(p, chosen, sample))))
        kept = gate(found, p.config.check.gates)
        p.store.add_evidence(chosen.id, kept)
        return kept if gates is None else gate(found, gates)


def _attackable(p: Project, model: Model) -> tuple[FloatArray, NDArray[Any]]:
    """Inputs with labels: the test part, or failing that what is believed of the pool."""
    examples, labels = p.truth("test")
    if examples:
        return p.encode(examples), labels
    beliefs = unpack_beliefs(p.store.blobs.get(model.origin["beliefs"]))
    by_id = {e.id: e for e in p.store.examples(ids=[b.example_id for b in beliefs])}
    return p.encode([by_id[b.example_id] for b in beliefs]), as_rows([b.proba.argmax(axis=-1) for b in beliefs])


def onnx_graph(p: Project, model: Model) -> bytes:
    """The model as ONNX bytes, exported once."""
    from trilobe.algorithms.export import to_onnx

    if not (blob := p.store.recorded(f"onnx/{model.id}")):
        examples = p.store.examples("pool")[:1]
        blob = p.store.blobs.put(to_onnx(p.module(model), p.encode(examples), free=p.task.free_axes))
        p.store.record(f"onnx/{model.id}", blob)
    return p.store.blobs.get(blob)


def _exported(p: Project, model: Model, X: FloatArray) -> FloatArray:
    """What the endpoint will say, one example after the other where they are of unequal length."""
    from safetensors.numpy import load

    from trilobe.infrastructure.pipeline import onnx_step

    _, run = onnx_step(onnx_graph(p, model))
    weights = load(p.store.blobs.get(model.weights))
    outputs = run({"x": X})["logits"] if not is_ragged(X) else [run({"x": x[None]})["logits"][0] for x in X]
    return calibrated(as_rows([p.task.finish(output, weights) for output in outputs]), model.temperature)


def package(
    project: "Project | Path | str" = ".",
    model: str = "",
    allow_failed: bool = False,
    bundle: str = "",
    oci: str = "",
    base: str = "",
    packages: bool = False,
    sbom: str = "",
    kubernetes: str = "",
    sign: str = "",
) -> Bundle:
    """Make a bundle: all a server needs, the evidence and the card.

    It is one folder: weights, exported graph, preprocessing, label space, calibration, baseline, evidence, model card.
    Where a path is given for it, the bundle is also signed, listed part by part, and written as a container image
    that is a MONAI Application Package, or as manifests for a cluster.

    A model whose gates have not been checked is checked first; one that fails a gate is refused.

    Args:
        project: the project's folder.
        model: its id or first letters; the newest by default.
        allow_failed: package it all the same; the card and the evidence say which gate failed.
        bundle: one that was packaged before, by path or id, in place of a model.
        oci: write a container image there, without a daemon: an OCI layout, or one file if the name ends in .tar.
        base: an OCI layout with Python to build the image on; without it the image holds files only.
        packages: put the installed packages that serving needs into the image, for a base with this Python alone.
        sbom: write the bill of materials (CycloneDX) to this file.
        kubernetes: write manifests for Kubernetes and KServe to this folder.
        sign: a private Ed25519 key (PEM); the signature is written beside the bundle.

    Raises:
        CheckFailed: a gate failed.

    Example:
        trilobe package
        trilobe package --oci pets.tar --base python-3.11 --packages --sbom pets.cdx.json --sign key.pem
    """
    expect_deliverable(oci, base, packages, sign)
    if bundle and (model or allow_failed):
        raise UsageError("a bundle together with a model or --allow-failed", expected="one of them")
    if bundle:
        made = packaged(bundle, project)
    else:
        with opened(project) as p:
            made = _bundled(p, model, allow_failed)
    deliver(made, oci, base, packages, sbom, kubernetes, sign)
    return made


def _bundled(p: Project, model: str, allow_failed: bool) -> Bundle:
    """The bundle of a model, made once and then found."""
    from trilobe.infrastructure.monitor import Baseline
    from trilobe.trust.card import model_card
    from trilobe.trust.checks import gate, require, verdict

    chosen = p.store.model(model or None)
    evidence = p.store.evidence(chosen.id)
    if not any(e.check == "parity" for e in evidence):
        evidence = check(p, chosen.id)
    evidence = gate(evidence, p.config.check.gates)  # they may have changed since the check
    p.store.add_evidence(chosen.id, evidence)
    if not allow_failed:
        require(evidence)
    proba, _, on = held_out(p, chosen, fair=False)
    facts = {
        "project": p.config.project.name, "n_examples": chosen.origin["n_examples"],
        "n_answers": chosen.origin["n_answers"],
        "annotators": [{"name": a["name"], "quality": a["quality"], "n_answers": a["n"]} for a in annotators(p)],
        "endpoint": p.config.project.name,
    }  # fmt: skip
    files = {
        "weights.safetensors": p.store.blobs.get(chosen.weights),
        "model.onnx": onnx_graph(p, chosen),
        "preprocessing.json": _json(chosen.preprocessing),
        "labels.json": _json(
            {"names": chosen.space.names, "parents": chosen.space.parents, "scheme": chosen.space.scheme}
        ),
        "calibration.json": _json({"method": "temperature.v1", "temperature": chosen.temperature}),
        "baseline.json": _json({**Baseline.from_proba(p.task.watched(proba, p.space)).to_json(), "on": on}),
        "evidence.json": _json(evidence),
        "deferral.json": _json(deferral_table(p, chosen)),
        "README.md": model_card(chosen, evidence, facts).encode(),
    }
    meta = {"task": chosen.task, "project": p.config.project.name, "network": chosen.network,
            "origin": {k: v for k, v in chosen.origin.items() if k != "annotators"},
            "gates_passed": verdict(evidence)}  # fmt: skip
    id_ = bundle_id({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    folder = p.state / "bundles" / f"{p.config.project.name}-{id_}"
    bundle = write_bundle(folder, files, chosen.id, meta)
    p.store.add_bundle(bundle)
    return bundle


def _json(value: Any) -> bytes:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
