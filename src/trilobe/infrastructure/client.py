"""The client of an endpoint: arrays in, arrays out, over one kept-alive connection and the binary tensor extension.

Needs numpy and the standard library only. Any other client of the Open Inference Protocol v2 works as well.
"""

import http.client
import math
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe.errors import ServeError, UsageError
from trilobe.infrastructure.pipeline import DATATYPES


class Client:
    """Calls the model ``name`` behind ``url`` (``http://host:port``); one thread at a time may use it.

    A kept-alive connection that the server dropped meanwhile is opened again, once per call. Whatever else goes
    wrong is a :class:`~trilobe.errors.ServeError` with the server's own words. ``version`` is the id of the bundle
    that gave the last answer; ``timeout`` is in seconds.

    >>> with Client("http://127.0.0.1:9", "digits") as client:
    ...     client.ready()
    False
    """

    def __init__(self, url: str, name: str, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"an endpoint at {url!r}", expected="http://host:port")
        self.url, self.name, self.version = url, name, ""
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)
        self._model = f"/v2/models/{quote(name, safe='')}"

    def ready(self) -> bool:
        """Whether the endpoint answers and has a bundle to answer with."""
        try:
            self._call("GET", f"{self._model}/ready")
        except ServeError:
            return False
        return True

    def metadata(self) -> dict[str, Any]:
        """Name, versions, platform, and the names, datatypes and shapes of inputs and outputs (-1: any size)."""
        metadata: dict[str, Any] = msgspec.json.decode(self._call("GET", self._model)[1])
        return metadata

    def infer(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Class probabilities ``(n, n_classes)`` of ``images`` ``(n, height, width, channels)``, unsigned bytes."""
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UsageError(f"images {images.shape} {images.dtype}", expected="(n, height, width, channels) uint8")
        described = {"name": "image", "shape": images.shape, "datatype": "UINT8"}
        request = {
            "inputs": [{**described, "parameters": {"binary_data_size": images.nbytes}}],
            "outputs": [{"name": "proba", "parameters": {"binary_data": True}}],
        }
        head = msgspec.json.encode(request)
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        length, body = self._call("POST", f"{self._model}/infer", head + images.tobytes(), headers)
        try:
            answer = msgspec.json.decode(memoryview(body)[:length])
            output = answer["outputs"][0]
            dtype, shape = DATATYPES[output["datatype"]], output["shape"]
            proba = np.frombuffer(body, dtype, math.prod(shape), offset=length).reshape(shape)
            self.version = answer.get("model_version", "")
        except (msgspec.MsgspecError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ServeError(f"{self.url} gave an answer that is not understood ({error})") from error
        return proba.astype(np.float32)

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """The length of the answer's JSON part, and its body."""
        reused = self._connection.sock is not None
        try:
            self._connection.request(method, path, body, headers or {})
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if reused and isinstance(error, (ConnectionError, http.client.RemoteDisconnected)):
                return self._call(method, path, body, headers)  # on a fresh connection, so once
            reason = str(error) or type(error).__name__
            raise ServeError(f"{self.url} does not answer ({reason})", hint="see the endpoint's status") from error
        if response.status != 200:
            raise ServeError(f"{self.url} answered {response.status}: {_message(data)}")
        return int(response.headers.get("Inference-Header-Content-Length", len(data))), data


def _message(data: bytes) -> str:
    try:
        return str(msgspec.json.decode(data)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError):
        return data[:200].decode(errors="replace")
