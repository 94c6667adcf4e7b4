"""Manifests for clusters, made from a bundle: Deployment and Service, an autoscaler, a KServe InferenceService.

They describe the image that ``image.py`` writes: an endpoint on port 8080 (HTTP) and 8001 (gRPC) with the probes of the
Open Inference Protocol, as a user without rights on a read-only file system, with its tokens from the Secret
``NAME-tokens``. The text is a small part of YAML, with scalars written so that YAML 1.1 and 1.2 read the same.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trilobe.errors import UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.packaging.image import TOKENS, USER, model_name, ports
from trilobe.infrastructure.packaging.map import WORK
from trilobe.infrastructure.packaging.resources import Resources
from trilobe.types import Bundle

Document = dict[str, Any]
_WRITABLE = {"state": f"{WORK}.trilobe", "tmp": "/tmp"}


def deployment(
    bundle: Bundle, image: str = "", replicas: int = 1, most: int = 0, resources: Resources | None = None
) -> list[Document]:
    """Deployment, Service and NetworkPolicy of an endpoint; with ``most`` also an autoscaler from ``replicas`` to it.

    ``image`` is what the cluster pulls, ``NAME:BUNDLE_ID`` by default. Pods wait for the Secret ``NAME-tokens`` with
    the file that ``trilobe token CLIENT --file tokens.json`` writes. Only pods of the same namespace may call. The
    autoscaler adds a pod while those there use more than 70% of the cores that they asked for.

    >>> [d["kind"] for d in deployment(Bundle("b1", Path("b1"), "m1", {"project": "digits"}), most=4)]
    ['Deployment', 'Service', 'NetworkPolicy', 'HorizontalPodAutoscaler']
    """
    if not 1 <= replicas <= (most or replicas):
        raise UsageError(f"{replicas} replicas, at most {most}", expected="at least 1, and no more than the most")
    name, labels = _name(bundle), _labels(bundle)
    select = {"app.kubernetes.io/name": name}
    pod = {
        "metadata": {"labels": labels},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [_container(bundle, "endpoint", image, resources)],
            "volumes": _volumes(bundle),
        },
    }  # fmt: skip
    spec: Document = {"selector": {"matchLabels": select}, "template": pod}
    opened = [{"name": k, "port": port, "targetPort": k} for k, port in ports().items()]
    made = [
        _document("apps/v1", "Deployment", name, labels, spec if most else {"replicas": replicas, **spec}),
        _document("v1", "Service", name, labels, {"selector": select, "ports": opened}),
        _document("networking.k8s.io/v1", "NetworkPolicy", name, labels, _neighbors(select)),
    ]
    if most:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
        scale = {"scaleTargetRef": target, "minReplicas": replicas, "maxReplicas": most,
                 "metrics": [{"type": "Resource", "resource": cpu}]}  # fmt: skip
        made.append(_document("autoscaling/v2", "HorizontalPodAutoscaler", name, labels, scale))
    return made


def inference_service(
    bundle: Bundle, image: str = "", replicas: int = 1, most: int = 0, resources: Resources | None = None
) -> Document:
    """The same endpoint as a KServe ``InferenceService`` with a custom predictor, speaking version 2 of the protocol.

    KServe takes one port of a container; it is HTTP here.

    >>> inference_service(Bundle("b1", Path("b1"), "m1", {"project": "digits"}))["kind"]
    'InferenceService'
    """
    container = _container(bundle, "kserve-container", image, resources)
    container["ports"] = [{"containerPort": ports()["http"], "protocol": "TCP"}]
    container["env"] = [{"name": "PROTOCOL", "value": "v2"}]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        container[probe] = {**container[probe], "httpGet": {**container[probe]["httpGet"], "port": ports()["http"]}}
    predictor = {"minReplicas": replicas, **({"maxReplicas": most} if most else {}),
                 "containers": [container], "volumes": _volumes(bundle)}  # fmt: skip
    name = _name(bundle)
    return _document("serving.kserve.io/v1beta1", "InferenceService", name, _labels(bundle), {"predictor": predictor})


def write_manifests(bundle: Bundle, folder: Path, image: str = "", resources: Resources | None = None) -> list[Path]:
    """Write ``deployment.yaml`` and ``inferenceservice.yaml`` to ``folder``; each replaces the file of that name."""
    files = {
        "deployment.yaml": deployment(bundle, image, most=4, resources=resources),
        "inferenceservice.yaml": [inference_service(bundle, image, most=4, resources=resources)],
    }
    for name, documents in files.items():
        write_atomically(folder / name, to_yaml(documents).encode())
    return [folder / name for name in files]


def to_yaml(documents: Sequence[Any]) -> str:
    """Documents of plain values as YAML: mappings and lists in block style, everything else as in JSON.

    Keys are quoted unless they are plain words that no reader of YAML takes for something else.

    >>> print(to_yaml([{"a": [1, {"b": "no", "c": []}], "yes": None}]), end="")
    a:
      - 1
      - b: "no"
        c: []
    "yes": null
    """
    return "---\n".join("\n".join(_lines(document)) + "\n" for document in documents)


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for k, v in value.items() for line in _entry(_key(k), v)]
    if isinstance(value, list | tuple) and value:
        return [line for v in value for line in _item(v)]
    return [_scalar(value)]


def _entry(key: str, value: Any) -> list[str]:
    """An entry of a mapping; a key of more than 1024 characters stands apart (YAML 1.2, production 154)."""
    return _under(f"{key}:", value) if len(key) <= 1024 else [f"? {key}", *_under(":", value)]


def _under(head: str, value: Any) -> list[str]:
    if isinstance(value, Mapping | list | tuple) and value:
        return [head, *(f"  {line}" for line in _lines(value))]
    return [f"{head} {_scalar(value)}"]


def _item(value: Any) -> list[str]:
    first, *rest = _lines(value)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return "{}" if isinstance(value, Mapping) else "[]"
    text = json.dumps(value, allow_nan=False)
    if isinstance(value, float) and "." not in text:
        return text.replace("e", ".0e")  # 1e-07 is a string in YAML 1.1
    pair = re.compile(r"\\u(d[89ab]..)\\u(d[c-f]..)")  # JSON writes characters beyond 16 bits as two halves
    return pair.sub(_whole, text).replace("\x7f", "\\u007f")


def _whole(pair: re.Match[str]) -> str:
    return f"\\U{0x10000 + ((int(pair[1], 16) - 0xD800) << 10) + int(pair[2], 16) - 0xDC00:08x}"


def _key(key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", key) and key.lower() not in _TAKEN
    return key if plain else _scalar(key)


_TAKEN = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def _document(api: str, kind: str, name: str, labels: Mapping[str, str], spec: Document) -> Document:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, "spec": spec}


def _container(bundle: Bundle, name: str, image: str, resources: Resources | None) -> Document:
    """A container that serves the bundle's image."""
    live, ready = ({"httpGet": {"path": f"/v2/health/{what}", "port": "http"}} for what in ("live", "ready"))
    return {
        "name": name,
        "image": image or f"{_name(bundle)}:{bundle.id}",
        "args": ["serve"],
        "ports": [{"name": k, "containerPort": port} for k, port in ports().items()],
        "startupProbe": {**ready, "periodSeconds": 1, "failureThreshold": 60},
        "livenessProbe": {**live, "periodSeconds": 10, "timeoutSeconds": 2},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 2},
        "resources": _amounts(resources or Resources()),
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
                            "runAsUser": USER, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [*({"name": k, "mountPath": path} for k, path in _WRITABLE.items()),
                         {"name": "tokens", "mountPath": str(PurePosixPath(TOKENS).parent), "readOnly": True}],
    }  # fmt: skip


def _amounts(needed: Resources) -> Document:
    """Requests and limits. Memory is limited to what was asked for, cores only where a limit was declared."""
    requests = {"cpu": str(needed.cpu), "memory": needed.memory}
    limits = {"memory": needed.memory_limit or needed.memory}
    if needed.cpu_limit:
        limits["cpu"] = str(needed.cpu_limit)
    if needed.gpu:
        limits["nvidia.com/gpu"] = str(-int(-needed.gpu // 1))  # whole ones only
    return {"requests": requests, "limits": limits}


def _neighbors(select: Mapping[str, str]) -> Document:
    """Calls come from pods of the same namespace only."""
    return {"podSelector": {"matchLabels": dict(select)}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {}}]}]}  # fmt: skip


def _volumes(bundle: Bundle) -> list[Document]:
    secret = {"name": "tokens", "secret": {"secretName": f"{_name(bundle)}-tokens"}}
    return [*({"name": name, "emptyDir": {}} for name in _WRITABLE), secret]


def _labels(bundle: Bundle) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": _name(bundle),
        "app.kubernetes.io/version": bundle.id,
        "app.kubernetes.io/managed-by": "trilobe",
    }


def _name(bundle: Bundle) -> str:
    """The model's name as Kubernetes takes it: a label of RFC 1035."""
    name = re.sub(r"[^a-z0-9-]", "-", model_name(bundle).lower())
    name = name if name[0].isalpha() else f"m-{name}"
    return name[:63].rstrip("-")
