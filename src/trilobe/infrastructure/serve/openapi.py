"""What a server answers, as an OpenAPI 3.1 description: every path, and for each model exactly its tensors.

A pure function from declarations to a dictionary. The server sends it at ``/v2/openapi.json``; tools draw pages from
it, make clients and fuzz the server with it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from trilobe import __version__
from trilobe.infrastructure.pipeline import TensorSpec

Schema = dict[str, Any]
JSON, BINARY = "application/json", "application/octet-stream"


class Described(Protocol):
    """As much of a served version as its description needs."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def id(self) -> str:
        """The version."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a request must hold."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What an answer holds."""


def describe(versions: Iterable[Described]) -> Schema:
    """The description of a server that serves ``versions``.

    >>> class Double:
    ...     name, id = "double", "1"
    ...     inputs = outputs = (TensorSpec("x", "FP32", (-1, 2)),)
    >>> paths = describe([Double()])["paths"]
    >>> list(paths)[-2:]
    ['/v2/models/double/infer', '/v2/models/double/versions/1/infer']
    >>> paths["/v2/models/double/infer"]["post"]["operationId"]
    'infer double'
    """
    versions = list(versions)
    paths = _fixed_paths()
    for name in dict.fromkeys(version.name for version in versions):
        own = [version for version in versions if version.name == name]
        at = f"/v2/models/{quote(name, safe='')}"
        paths |= _about(name, at, [version.id for version in own])
        paths[f"{at}/infer"] = {"post": _infer(f"infer {name}", name, own)}
        for version in own:
            where = f"{at}/versions/{quote(version.id, safe='')}/infer"
            paths[where] = {"post": _infer(f"infer {name} {version.id}", name, [version])}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trilobe",
            "version": __version__,
            "description": "The Open Inference Protocol v2 with Triton's extensions for binary tensors, "
            "classification, statistics, model configuration and the model repository.",
        },
        "paths": paths,
        "components": {"schemas": _SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],  # whether a token is needed is the server's own decision
    }


# --- paths ----------------------------------------------------------------------------------------------------------


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answers(schema: Schema | None, description: str, **others: str) -> Schema:
    """Responses: the good one, others by status (``s503``) and anything else, which is always an error in JSON."""
    good: Schema = {"description": description}
    if schema is not None:
        good["content"] = {JSON: {"schema": schema}}
    error = {"content": {JSON: {"schema": _reference("Error")}}}
    named = {status[1:]: {"description": text, **error} for status, text in others.items()}
    return {"200": good, **named, "default": {"description": "what went wrong", **error}}


def _get(summary: str, schema: Schema | None, **others: str) -> Schema:
    return {"get": {"operationId": summary, "summary": summary, "responses": _answers(schema, summary, **others)}}


def _post(summary: str, schema: Schema | None, body: Schema | None = None, **others: str) -> Schema:
    operation: Schema = {"operationId": summary, "summary": summary, "responses": _answers(schema, summary, **others)}
    if body is not None:
        operation["requestBody"] = {"content": {JSON: {"schema": body}}}
    return {"post": operation}


def _flag(name: str) -> Schema:
    return {"type": "object", "required": [name], "properties": {name: {"type": "boolean"}}}


def _fixed_paths() -> Schema:
    index = {"type": "array", "items": _reference("Indexed")}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths = {
        "/v2": _get("describe the server", _reference("Server")),
        "/v2/health/live": _get("is the server alive", _flag("live")),
        "/v2/health/ready": _get("can the server answer", _flag("ready"), s503="not yet"),
        "/v2/models/stats": _get("figures of all models", _reference("Statistics")),
        "/v2/repository/index": _post("list all models", index, {"type": "object", "properties": {"ready": {}}}),
        "/v2/openapi.json": _get("this description", {"type": "object"}),
        "/metrics": _get("figures for Prometheus", None),
    }
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    for what in ("load", "unload"):
        where = f"/v2/repository/models/{{name}}/{what}"
        paths[where] = {**_post(f"{what} a model", None, s404="no such model"), "parameters": [name]}
    return paths


def _about(name: str, at: str, versions: Sequence[str]) -> Schema:
    """The paths that tell of a model, and of a version of it."""
    given = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": list(versions)}}
    paths = {}
    for where, what in ((at, name), (f"{at}/versions/{{version}}", f"a version of {name}")):
        paths[where] = _get(f"describe {what}", _reference("Model"), s404="no such model or version")
        paths[f"{where}/ready"] = _get(f"can {what} answer", _flag("ready"), s404="no such model", s503="not yet")
        paths[f"{where}/config"] = _get(f"configuration of {what}", {"type": "object"})
        paths[f"{where}/stats"] = _get(f"figures of {what}", _reference("Statistics"))
    for where in paths:
        if where.startswith(f"{at}/versions/"):
            paths[where]["parameters"] = [given]
    paths[f"{at}/answers/{{id}}"] = _fetch(name)
    return paths


def _fetch(name: str) -> Schema:
    """What became of what a model left to people."""
    given = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"}}
    state = {"id": {"type": "string"}, "status": {"enum": ["answered", "waiting"]}}
    schema = {"type": "object", "required": list(state), "properties": state}
    operation = _get(f"what people answered for {name}", schema, s404="that id was never given out")
    waits = {"description": "people have not answered yet", "content": {JSON: {"schema": schema}}}
    operation["get"]["responses"]["202"] = waits
    return {**operation, "parameters": [given]}


def _infer(identifier: str, name: str, versions: Sequence[Described]) -> Schema:
    """The operation that runs a model. A model with several versions may take what any of them takes."""
    taken = [_request(version) for version in versions]
    given = [_answer(version) for version in versions]
    responses = _answers(None, f"what {name} makes of it", s400="the request does not fit", s404="no such model",
                         s503="overloaded, or not ready: see Retry-After", s504="too late")  # fmt: skip
    taking_files = any(getattr(getattr(version, "reader", None), "files", None) is not None for version in versions)
    responses["200"]["content"] = {
        JSON: {"schema": given[0] if len(given) == 1 else {"anyOf": given}},
        BINARY: {"schema": {"type": "string", "contentMediaType": BINARY}},
    }
    length = "bytes of JSON before the binary tensors; 0: the body is the one tensor of a batch of one"
    return {
        "operationId": identifier,
        "summary": f"run {name}",
        "parameters": [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": length,
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": taken[0] if len(taken) == 1 else {"anyOf": taken},
                    "examples": {version.id: {"value": example(version)} for version in versions},
                },
                BINARY: {"schema": {"type": "string", "contentMediaType": BINARY}},
                **({"image/*": {"schema": {"type": "string", "contentMediaType": "image/*"}}} if taking_files else {}),
            },
        },
        "responses": responses,
    }


# --- tensors --------------------------------------------------------------------------------------------------------


def example(version: Described) -> Schema:
    """A request that ``version`` takes: one item, of zeros or of short texts.

    >>> class Words:
    ...     name, id = "words", "1"
    ...     inputs = outputs = (TensorSpec("text", "BYTES", (-1,)),)
    >>> example(Words())
    {'inputs': [{'name': 'text', 'shape': [1], 'datatype': 'BYTES', 'data': ['text']}]}
    """
    tensors = []
    for spec in version.inputs:
        shape = [max(1, size) for size in spec.shape]
        value = {"b": False, "f": 0.0, "O": "text"}.get(spec.dtype.kind, 0)
        tensors.append(
            {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": [value] * int(np.prod(shape))}
        )
    return {"inputs": tensors}


def _request(version: Described) -> Schema:
    tensors = [_tensor(spec, with_data=True) for spec in version.inputs]
    wanted = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"enum": [spec.name for spec in version.outputs]},
            "parameters": _parameters(
                binary_data={"type": "boolean"}, classification={"type": "integer", "minimum": 0}
            ),
        },
    }
    scalar = {"type": ["boolean", "integer", "number", "string"]}
    whole = {"type": "integer", "minimum": 0}
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "parameters": {
                "type": ["object", "null"],
                "properties": {"binary_data_output": {"type": "boolean"}, "priority": whole, "timeout": whole},
                "additionalProperties": scalar,
            },
            "inputs": {
                "type": "array",
                "items": tensors[0] if len(tensors) == 1 else {"oneOf": tensors},
                "minItems": len(tensors),
                "maxItems": len(tensors),
            },
            "outputs": {"type": ["array", "null"], "items": wanted},
        },
    }


def _answer(version: Described) -> Schema:
    tensors = [_tensor(spec, with_data=False) for spec in version.outputs] + [_BEST]
    return {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "model_name": {"const": version.name},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": {"anyOf": tensors}, "maxItems": len(version.outputs)},
        },
    }


_BEST: Schema = {
    "description": "the best classes: value:index or value:index:label",
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {"datatype": {"const": "BYTES"}, "data": {"type": "array", "items": {"type": "string"}}},
}


def _parameters(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


def _tensor(spec: TensorSpec, with_data: bool) -> Schema:
    rank = len(spec.shape)
    element = _element(spec)
    flat: Schema = {"type": "array", "items": element, "minItems": 1}
    nested = element
    for size in reversed(spec.shape):
        bounds = {"minItems": 1} if size == -1 else {"minItems": size, "maxItems": size}
        nested = {"type": "array", "items": nested, **bounds}
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", *(["data"] if with_data else [])],
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": {
                "description": f"fits {list(spec.shape)}, where -1 is any size from 1",
                "type": "array",
                "items": {"type": "integer", "minimum": 1},
                "minItems": rank,
                "maxItems": rank,
            },
            "parameters": _parameters(binary_data_size={"type": "integer", "minimum": 0}),
            "data": flat if rank == 1 else {"anyOf": [flat, nested]},
        },
    }


def _element(spec: TensorSpec) -> Schema:
    kind = spec.dtype.kind
    if kind in "iu":
        limits = np.iinfo(spec.dtype)
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    return {"type": {"b": "boolean", "f": "number", "O": "string"}[kind]}


# --- what is said about models --------------------------------------------------------------------------------------


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TENSORS: Schema = {
    "type": "array",
    "items": _object(
        "name", "datatype", "shape", name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": {"type": "integer"}}
    ),
}
_SPENT = _object("count", "ns", count=_COUNT, ns=_COUNT)
_SCHEMAS: Schema = {
    "Error": _object("error", error=_TEXT),
    "Server": _object(
        "name", "version", "extensions", name=_TEXT, version=_TEXT, extensions={"type": "array", "items": _TEXT}
    ),
    "Model": _object(
        "name", "platform", "inputs", "outputs",
        name=_TEXT, versions={"type": "array", "items": _TEXT}, platform=_TEXT, inputs=_TENSORS, outputs=_TENSORS,
    ),
    "Indexed": _object("name", "state", name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT),
    "Statistics": _object("model_stats", model_stats={"type": "array", "items": _object(
        "name", "version", "inference_count", "execution_count", "inference_stats", "batch_stats",
        name=_TEXT, version=_TEXT, last_inference=_COUNT, inference_count=_COUNT, execution_count=_COUNT,
        inference_stats={"type": "object", "additionalProperties": _SPENT},
        batch_stats={"type": "array", "items": _object(
            "batch_size", batch_size=_COUNT, compute_input=_SPENT, compute_infer=_SPENT, compute_output=_SPENT)},
    )}),
}  # fmt: skip
