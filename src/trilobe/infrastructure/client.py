"""The client of an endpoint: arrays in, arrays out, over one kept-alive connection and the binary tensor extension.

Needs numpy and the standard library only. Any other client of the Open Inference Protocol v2 works as well.
"""

import http.client
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, UsageError
from trilobe.infrastructure.pipeline import DATATYPES, pack, unpack


class Client:
    """Calls the model ``name`` behind ``url`` (``http://`` or ``https://host:port``); one thread at a time may use it.

    Over https the server must show a certificate for its host that is signed by ``ca`` (a PEM file; the system's
    authorities by default). ``cert`` is what the client shows of itself: a PEM file of certificate and key, or two.
    ``token`` is what ``trilobe token`` gave.

    A kept-alive connection that the server dropped meanwhile is opened again, once per call. Whatever else goes wrong
    is a :class:`~trilobe.errors.ServeError` with the server's own words. ``version`` is the id of the bundle that gave
    the last answer, ``deferred`` has the ids of its rows that were left to people ("" of the others; empty where none
    was); ``timeout`` is in seconds.

    >>> with Client("http://127.0.0.1:9", "digits") as client:
    ...     client.ready()
    False
    """

    def __init__(
        self,
        url: str,
        name: str,
        timeout: float = 30.0,
        ca: Path | str | None = None,
        cert: Path | str | tuple[Path | str, Path | str] | None = None,
        token: str = "",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"an endpoint at {url!r}", expected="http://host:port, or https")
        if not (token.isascii() and token.isprintable()):
            raise UsageError("a token that no header can hold", expected="what `trilobe token` gave, without line ends")
        self.url, self.name, self.version = url, name, ""
        self.deferred: list[str] = []
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port or 443, timeout=timeout, context=_trust(ca, cert)
            )
        elif ca or cert:
            raise UsageError(f"certificates for {url!r}", expected="an https:// address to use them with")
        else:
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

    def infer(self, items: NDArray[np.uint8] | Sequence[str]) -> NDArray[np.float32]:
        """Probabilities ``(n, n_classes)`` of images ``(n, height, width, channels)`` (unsigned bytes), or of texts."""
        if isinstance(items, np.ndarray):
            if items.dtype != np.uint8 or items.ndim != 4:
                raise UsageError(f"images {items.shape} {items.dtype}", expected="(n, height, width, channels) uint8")
            sent: dict[str, NDArray[Any]] = {"image": items}
        else:
            sent = {"text": _texts(items)}
        return self.call(sent, ["proba"])["proba"].astype(np.float32)

    def entities(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Of each text its entities: start and end (in characters), label, the words, and how sure the model is."""
        found = self.call({"text": _texts(texts)}, ["entities"])["entities"]
        return [msgspec.json.decode(entry) for entry in found]

    def answer(self, id: str) -> dict[str, Any] | None:
        """What people said of a row that was left to them; None while they have not.

        ``answer`` is a class, or a list of entities, or None where nobody could tell; ``confidence`` is 0 to 1.
        """
        said: dict[str, Any] = msgspec.json.decode(self._call("GET", f"{self._model}/answers/{quote(id, safe='')}")[1])
        return said if said["status"] == "answered" else None

    def call(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Any inputs by name, and the ``outputs`` that are wanted (all of them by default)."""
        tensors, blobs = [], []
        for name, array in inputs.items():
            datatype = next((d for d, dtype in DATATYPES.items() if dtype == array.dtype), "")
            if not datatype:
                raise UsageError(f"{name!r} is an array of {array.dtype}", expected=f"one of {list(DATATYPES)}")
            blobs.append(pack(array, DATATYPES[datatype]))
            tensors.append({"name": name, "shape": array.shape, "datatype": datatype,
                            "parameters": {"binary_data_size": len(blobs[-1])}})  # fmt: skip
        request: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
        request |= {"outputs": [{"name": n, "parameters": {"binary_data": True}} for n in outputs]} if outputs else {}
        head = msgspec.json.encode(request)
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        length, body = self._call("POST", f"{self._model}/infer", b"".join([head, *blobs]), headers)
        try:
            answer = msgspec.json.decode(memoryview(body)[:length])
            received, at = {}, length
            for output in answer["outputs"]:
                size = int(output["parameters"]["binary_data_size"])
                dtype = DATATYPES[output["datatype"]]
                received[output["name"]] = unpack(memoryview(body)[at : at + size], dtype, output["shape"])
                at += size
            self.version = answer.get("model_version", "")
            ids = str(answer.get("parameters", {}).get("deferred_ids", ""))
            self.deferred = ids.split(",") if ids else []
            return {n: received[n] for n in outputs or received or ["outputs"]}
        except (msgspec.MsgspecError, DataError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ServeError(f"{self.url} gave an answer that is not understood ({error})") from error

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
            self._connection.request(method, path, body, self._headers | (headers or {}))
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if reused and isinstance(error, (ConnectionError, http.client.RemoteDisconnected)):
                return self._call(method, path, body, headers)  # on a fresh connection, so once
            reason = str(error) or type(error).__name__
            raise ServeError(
                f"{self.url} does not answer ({reason})", hint="trilobe show: is it running, and at this address?"
            ) from error
        if response.status not in (200, 202):
            raise ServeError(f"{self.url} answered {response.status}: {_message(data)}")
        return int(response.headers.get("Inference-Header-Content-Length", len(data))), data


def _trust(ca: Path | str | None, cert: Path | str | tuple[Path | str, Path | str] | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            certificate, key = cert if isinstance(cert, tuple) else (cert, None)
            context.load_cert_chain(certificate, key, password=lambda: "")  # never ask at a terminal
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"ca={ca} and cert={cert} cannot be used ({error})", expected="PEM files") from error
    return context


def _texts(texts: Sequence[str]) -> NDArray[Any]:
    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise UsageError("texts that are not a list of strings", expected='["one text", "another"]')
    sent = np.empty(len(texts), dtype=object)
    sent[:] = [t.encode() for t in texts]
    return sent


def _message(data: bytes) -> str:
    try:
        return str(msgspec.json.decode(data)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError):
        return data[:200].decode(errors="replace")
