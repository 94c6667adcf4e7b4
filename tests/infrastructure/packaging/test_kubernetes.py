"""Manifests for clusters: valid by the schemas of Kubernetes and KServe, and YAML that others read the same."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import UsageError
from trilobe.infrastructure.packaging.kubernetes import deployment, inference_service, to_yaml, write_manifests
from trilobe.infrastructure.packaging.resources import Resources
from trilobe.types import Bundle

VERSIONS = ("1.27", "1.34")


def made(bundle: Bundle) -> list[dict[str, Any]]:
    return deployment(bundle, "registry.example/digits:1", 2, 5, Resources(cpu=0.5, gpu=1, cpu_limit=2))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(bundle: Bundle, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in [*made(bundle), *deployment(bundle)]:
        kubernetes_validate.validate(document, version, strict=True)
    broken = deployment(bundle)[0]
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_kserve_takes_its_own(bundle: Bundle) -> None:
    """Against the schema in KServe's own definition, config/crd/full/serving.kserve.io_inferenceservices.yaml."""
    crd = os.environ.get("TRILOBE_KSERVE_CRD", "")
    if not Path(crd).is_file():
        pytest.skip("TRILOBE_KSERVE_CRD names no file: KServe's definition of InferenceService (kserve/kserve)")
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    definition = yaml.load(Path(crd).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1beta1"]
    validator = jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))
    document = inference_service(bundle, "registry.example/digits:1", 2, 5, Resources(cpu=0.5, gpu=1))
    assert [e.message for e in validator.iter_errors(document)] == []
    document["spec"]["predictor"]["containers"][0]["imag"] = ""
    assert list(validator.iter_errors(document)), "the schema does say no"


def strict(schema: Any) -> Any:
    """An OpenAPI schema as the API server reads it: unknown fields are errors, int-or-string is either."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    found = {k: strict(v) for k, v in schema.items()}
    if found.get("x-kubernetes-int-or-string") is True:
        found.pop("type", None)
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        metadata = found["properties"].keys() >= {"apiVersion", "kind", "metadata"}
        found["additionalProperties"] = False
        if metadata:
            found["properties"]["metadata"] = {"type": "object"}
    return found


def test_the_predictor_is_a_pod(bundle: Bundle) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    predictor = inference_service(bundle)["spec"]["predictor"]
    spec = {k: predictor[k] for k in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)
    assert predictor["containers"][0]["name"] == "kserve-container", "the name that KServe looks for"


def test_what_an_operator_looks_for(bundle: Bundle) -> None:
    deploy, service, policy, scale = made(bundle)
    pod = deploy["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert {p["name"]: p["containerPort"] for p in container["ports"]}["http"] == 8080
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["requests"] == {"cpu": "0.5", "memory": "1Gi"}
    assert container["resources"]["limits"] == {"memory": "1Gi", "cpu": "2", "nvidia.com/gpu": "1"}
    assert {"name": "tokens", "secret": {"secretName": "digits-2-tokens"}} in pod["volumes"]
    assert {"name": "tokens", "mountPath": "/etc/trilobe", "readOnly": True} in container["volumeMounts"]
    predictor = inference_service(bundle)["spec"]["predictor"]
    assert predictor["volumes"] == pod["volumes"]
    assert predictor["containers"][0]["volumeMounts"] == container["volumeMounts"]
    selector = deploy["spec"]["selector"]["matchLabels"]
    assert selector == service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= deploy["spec"]["template"]["metadata"]["labels"].items()
    assert "replicas" not in deploy["spec"], "the autoscaler's business"
    assert (scale["spec"]["minReplicas"], scale["spec"]["maxReplicas"]) == (2, 5)
    assert scale["spec"]["scaleTargetRef"]["name"] == deploy["metadata"]["name"] == "digits-2"
    alone = deployment(bundle, replicas=3)
    assert [d["kind"] for d in alone] == ["Deployment", "Service", "NetworkPolicy"]
    assert alone[0]["spec"]["replicas"] == 3
    assert alone[0]["spec"]["template"]["spec"]["containers"][0]["image"] == f"digits-2:{bundle.id}"


@pytest.mark.parametrize(("name", "said"), [("7up", "m-7up"), ("A.b_C", "a-b-c"), ("x" * 90, "x" * 63), ("a-._", "a")])
def test_names_are_made_to_fit(name: str, said: str) -> None:
    assert deployment(Bundle("b", Path("b"), "m", {"project": name}))[0]["metadata"]["name"] == said


@pytest.mark.parametrize(("replicas", "most"), [(0, 0), (3, 2), (-1, 4)])
def test_replicas_that_cannot_be(bundle: Bundle, replicas: int, most: int) -> None:
    with pytest.raises(UsageError, match="expected at least 1"):
        deployment(bundle, "", replicas, most)


def test_files(bundle: Bundle, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    paths = write_manifests(bundle, tmp_path / "deep" / "k8s")
    assert [p.name for p in paths] == ["deployment.yaml", "inferenceservice.yaml"]
    kept = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_manifests(bundle, tmp_path / "deep" / "k8s")] == kept
    assert list(yaml.safe_load_all(kept[0])) == deployment(bundle, most=4)
    assert list(yaml.safe_load_all(kept[1])) == [inference_service(bundle, most=4)]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=15
)


@given(st.lists(PLAIN, min_size=1, max_size=3))
def test_another_reader_reads_what_was_written(documents: list[Any]) -> None:
    yaml = pytest.importorskip("yaml")
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@pytest.mark.parametrize(
    "text", ["no", "1e3", "0o7", "2001-01-01", "a: b", "- a", "#", "~", "\x7f", "\x85", "🦑", "\\ud83d", "é" * 200]
)
def test_text_stays_text(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    for value in (text, [text], {text: text}):
        assert yaml.safe_load(to_yaml([{text: value}])) == {text: value}
