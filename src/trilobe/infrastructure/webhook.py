"""Webhooks: a small JSON document posted to the one place that was named, at least once.

Headers are those of Standard Webhooks 1.0 (https://github.com/standard-webhooks/standard-webhooks): ``webhook-id`` is
the same however often a document is sent, so a receiver can drop what it has; ``webhook-timestamp`` is the time of the
attempt; ``webhook-signature`` is ``v1,`` and the base64 of HMAC-SHA256 over ``id.timestamp.body``. ``idempotency-key``
repeats the id, for receivers that look there. Redirects are not followed: an answer goes nowhere else.
"""

import base64
import binascii
import hashlib
import hmac
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from trilobe import __version__
from trilobe.errors import ConfigError, UsageError

TIMEOUT = 10.0  # seconds that one attempt may take to connect, and to be answered
PAUSES = (0.5, 2.0)  # seconds before the second attempt and the third
_LATER = {408, 425, 429}  # refusals that mean: try again


class Posted(NamedTuple):
    """How it went: ``accepted``; if not, the ``problem``, and whether the receiver is ``down`` for all others too."""

    accepted: bool
    down: bool = False
    problem: str = ""


def check_url(url: str) -> str:
    """``url``, if something can be posted there; else a :class:`~trilobe.errors.UsageError` that says why not.

    >>> check_url("file:///etc/passwd")
    Traceback (most recent call last):
    trilobe.errors.UsageError: a webhook at 'file:///etc/passwd'; expected https://host/path, without a password in it
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # no port, or no address
        usable = False
    if not usable or "@" in parts.netloc:
        shown = url if "@" not in url else "..."  # a password is not repeated
        raise UsageError(f"a webhook at {shown!r}", expected="https://host/path, without a password in it")
    return url


def key_of(secret: str) -> bytes:
    """The key in a secret: what follows ``whsec_`` in base64, as the standard has it; any other text as it is.

    >>> key_of("whsec_c2VjcmV0"), key_of("a long sentence")
    (b'secret', b'a long sentence')
    """
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(
            "the secret of the webhook is not base64 after whsec_", expected="whsec_ and base64"
        ) from None


def signature(key: bytes, id_: str, at: int, body: bytes) -> str:
    """The signature of a body sent under ``id_`` at ``at`` (whole seconds).

    >>> signature(b"key", "msg_1", 1674087231, b"{}")
    'v1,uJRqrsVdxSA6rVfjmEImCxf3zzM+BfFD1xgW/wMdTPw='
    """
    signed = hmac.new(key, f"{id_}.{at}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def post(
    url: str,
    id_: str,
    body: bytes,
    key: bytes = b"",
    timeout: float = TIMEOUT,
    pauses: tuple[float, ...] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> Posted:
    """Post ``body`` (JSON), and again after each of the ``pauses`` (seconds) while the receiver seems to be down.

    Any 2xx accepts it. What the receiver refuses for good (another 4xx, a redirect) is not tried again now. Never
    raises for the receiver's sake.

    >>> post("http://127.0.0.1:9", "a1", b"{}", pauses=()).down
    True
    """
    posted = Posted(False, True, "not tried")
    for pause in (0.0, *pauses):
        if pause:
            sleep(pause)
        posted = _attempt(url, id_, body, key, timeout)
        if not posted.down:
            break
    return posted


def _attempt(url: str, id_: str, body: bytes, key: bytes, timeout: float) -> Posted:
    at = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"trilobe/{__version__}",
        "Idempotency-Key": id_,
        "Webhook-Id": id_,
        "Webhook-Timestamp": str(at),
    }
    if key:
        headers["Webhook-Signature"] = signature(key, id_, at, body)
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _opener.open(request, timeout=timeout):
            return Posted(True)
    except urllib.error.HTTPError as error:
        error.close()
        return Posted(False, error.code >= 500 or error.code in _LATER, f"it answered {error.code} {error.reason}")
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are among them
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        return Posted(False, True, f"it does not answer ({reason})")


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is no acceptance."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere."""


_opener = urllib.request.build_opener(_StayHere)
