"""How an image goes to each server and how its answer is read: one function to write, one to read, for each format."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from serving import Call  # type: ignore[import-not-found]

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/cnn/infer"


@dataclass(frozen=True)
class Wire:
    """``write`` an image (1, 1, 28, 28) as a call; ``read`` headers and body of the answer as probabilities (10,)."""

    name: str
    write: Callable[[Any], Call]
    read: Callable[[Mapping[str, str], bytes], Any]


def _json(path: str, body: Any) -> Call:
    return Call(path, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _write_v2_binary(image: Any, **more: Any) -> Call:
    tensor = {"name": "image", "shape": list(image.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": image.nbytes}
    request = {**more, "inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json.dumps(request, separators=(",", ":")).encode()
    headers = {LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return Call(INFER, head + image.tobytes(), headers)


def _read_v2_binary(headers: Mapping[str, str], body: bytes) -> Any:
    head = int(headers[LENGTH.lower()])
    output = json.loads(body[:head])["outputs"][0]
    return np.frombuffer(body, "<f4", 10, head).reshape(output["shape"])[0]


def _write_v2_json(image: Any) -> Call:
    tensor = {"name": "image", "shape": list(image.shape), "datatype": "FP32", "data": image.ravel().tolist()}
    return _json(INFER, {"inputs": [tensor]})


def _write_v2_base64(image: Any) -> Call:
    data = [base64.b64encode(image.tobytes()).decode()]
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": data}
    return _json(INFER, {"inputs": [{**tensor, "parameters": {"content_type": "base64"}}]})


def _base64_in(path: str, wrap: Callable[[str], Any]) -> Callable[[Any], Call]:
    return lambda image: _json(path, wrap(base64.b64encode(image.tobytes()).decode()))


def _floats(headers: Mapping[str, str], body: bytes) -> Any:
    return np.frombuffer(body, "<f4")


V2_BINARY = Wire("v2 binary", _write_v2_binary, _read_v2_binary)
# KServe's SDK answers 500 to a request without an id.
V2_BINARY_ID = Wire("v2 binary", lambda image: _write_v2_binary(image, id="1"), _read_v2_binary)
V2_JSON = Wire("v2 JSON", _write_v2_json, lambda _, body: np.array(json.loads(body)["outputs"][0]["data"]))
V2_BASE64 = Wire("v2 JSON, base64", _write_v2_base64, V2_JSON.read)
LIT_BASE64 = Wire(
    "JSON, base64",
    _base64_in("/predict", lambda text: {"image": text}),
    lambda _, body: np.array(json.loads(body)["proba"]),
)
BENTO_BASE64 = Wire(
    "JSON, base64",
    _base64_in("/classify", lambda text: {"images": [text]}),
    lambda _, body: np.array(json.loads(body)[0]),
)
RAW = Wire("raw bytes", lambda image: Call("/", image.tobytes(), {"Content-Type": "application/octet-stream"}), _floats)
# An echo of the very body that our server gets; what comes back is the image.
ECHO = Wire("v2 binary", _write_v2_binary, lambda _, body: np.frombuffer(body[-3136:], "<f4"))
