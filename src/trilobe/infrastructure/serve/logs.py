"""Logs for machines: one JSON line for each record, and one for a sampled share of the requests.

Nothing here chooses where lines go: a process gives :class:`JsonFormatter` to its handlers. A request's line is off by
default: it costs some 12 µs, a good part of what the request itself costs, while one not drawn costs 0.2 µs.
"""

import logging
import random
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from trilobe.errors import UsageError

FIELDS = ("request_id", "model", "version", "status", "seconds", "client")
ACCESS = "trilobe.access"  # the logger of requests
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
Access = Callable[..., None]


class JsonFormatter(logging.Formatter):
    """One line of JSON for each record: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``; of
    :data:`FIELDS` those that the record has (given as ``extra=``); ``error``, the traceback, where there is one.

    Whatever a client managed to get into a message stays inside its string: a line break cannot forge a line.

    >>> record = logging.LogRecord("serve", logging.INFO, "", 0, "loaded %s", ("digits",), None)
    >>> record.created, record.model = 0.5, "digits"
    >>> JsonFormatter().format(record)
    '{"time":"1970-01-01T00:00:00.500000Z","level":"INFO","logger":"serve","message":"loaded digits","model":"digits"}'
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:26] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in FIELDS if (value := record.__dict__.get(name)) not in (None, "")}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return _encoded(line)


def request_id(headers: Mapping[str, str]) -> str:
    """What a client calls its request: ``x-request-id``, else the trace of ``traceparent``, else "".

    ``headers`` are by lower-case name. An id of over 128 characters, or of other than printable ASCII, is not taken.

    >>> request_id({"x-request-id": "a-17"})
    'a-17'
    >>> request_id({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    '0af7651916cd43dd8448eb211c80319c'
    """
    given = headers.get("x-request-id")
    if given is not None and _ID.fullmatch(given):
        return given
    parent = parse_traceparent(headers.get("traceparent"))
    return parent[0] if parent is not None else ""


def parse_traceparent(header: str | None) -> tuple[str, str, bool] | None:
    """Trace id, id of the caller's span, and whether the caller records it; None for no valid header.

    The rules are those of W3C Trace Context, section 3.2: ids of zeros and version ff are invalid, later versions
    may have more fields.

    >>> parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    ('0af7651916cd43dd8448eb211c80319c', 'b7ad6b7169203331', False)
    """
    found = _TRACEPARENT.fullmatch(header or "")
    if header is None or found is None or (header[:2] == "00" and len(header) != 55):
        return None
    return found[1], found[2], bool(int(found[3], 16) & 1)


def access_log(share: float, seed: int | None = None) -> Access | None:
    """A function that logs this share of the requests, 0 to 1; None for 0, so that "off" is one comparison.

    It takes the :data:`FIELDS` in their order. Requests answered with 500 or more are always written.

    Raises :class:`~trilobe.errors.UsageError` for a share outside 0 to 1.

    >>> access_log(0) is None
    True
    >>> log = access_log(0.01)
    >>> log("a-17", "digits", "1", 200, 0.0003, "")
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"a share of {share} of the requests in the log", expected="a number from 0 to 1")
    if share == 0.0:
        return None
    draw, logger = random.Random(seed).random, logging.getLogger(ACCESS)
    logger.setLevel(logging.INFO)

    def log(request_id: str, model: str, version: str, status: int, seconds: float, client: str = "") -> None:
        if status >= 500 or draw() < share:
            fields = (request_id, model, version, status, seconds, client)
            said = (model, status, 1e3 * seconds, request_id, client and f" of {client}")
            logger.info("%s: %d in %.2f ms (%s)%s", *said, extra=dict(zip(FIELDS, fields, strict=True)))

    return log


def _encoded(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=str).decode()
    except UnicodeEncodeError:  # half a surrogate pair, as in the names of files that are not UTF-8
        clean = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in line.items()}
        return msgspec.json.encode(clean, enc_hook=str).decode()
