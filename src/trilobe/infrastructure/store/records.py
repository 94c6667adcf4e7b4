"""Nouns to rows and back, without loss: one column type per kind of field, and two functions that use the field names.

Every column of a noun's table is named after its field, so a row is the fields in order. What a database cannot hold
as it is gets coded on the way in and decoded on the way out: file names that are not UTF-8 (lone surrogates), NUL,
NaN, mappings, tuples, arrays. Tables live in ``schema``, queries in ``store``.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Boolean, Column, Dialect, Double, Integer, Table, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

from trilobe.errors import UsageError
from trilobe.types import LabelSpace, Response, Span

_UNSTORABLE = re.compile("[\x00\\\\\ud800-\udfff]")  # text columns take no NUL and no lone surrogate; \ is the escape
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_ARRAY = "trilobe.array.v1"


class Coded(TypeDecorator[Any]):
    """A column that holds ``encode(value)`` and gives back ``decode`` of it."""

    impl = Text
    cache_ok = True

    def __init__(
        self, encode: Callable[[Any], Any], decode: Callable[[Any], Any], stored: TypeEngine[Any] | None = None
    ) -> None:
        super().__init__()
        self.encode, self.decode, self.stored = encode, decode, stored

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """The column type underneath."""
        return self.stored or Text()

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """On the way in."""
        return self.encode(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """On the way out."""
        return self.decode(value)


def escape(text: str) -> str:
    r"""Any ``str`` as text that every database takes, readable where it was, and injective.

    >>> escape("caf\udce9.png"), unescape(escape("caf\udce9.png")) == "caf\udce9.png"
    ('caf\\udce9.png', True)
    """
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def unescape(text: str) -> str:
    """The inverse of :func:`escape`.

    >>> unescape(escape("a/b")) == "a/b"
    True
    """
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\" in text else text


def to_json(value: Any) -> str:
    r"""A JSON value, also with numpy scalars and arrays in it, as text. Floats stay exact, NaN and infinity included.

    Tuples come back as lists. Raises :class:`~trilobe.errors.UsageError` for what JSON would change silently (a key
    that is not a string) or cannot hold.

    >>> to_json({"share": 0.1, "who": ["Zoë"]}), from_json(to_json(np.eye(2))).tolist()
    ('{"share": 0.1, "who": ["Zoë"]}', [[1.0, 0.0], [0.0, 1.0]])
    """
    text = json.dumps(_plain(value), ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def from_json(text: str) -> Any:
    """The inverse of :func:`to_json`.

    >>> from_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    return json.loads(text, object_hook=_array)


def _plain(value: Any) -> Any:
    """``value`` in dicts, lists, strings, numbers, booleans and None only."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise UsageError(f"the key {odd[0]!r} in a value to store", expected="strings as keys")
            return {key: _plain(part) for key, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
        case np.generic() if isinstance(value.item(), bool | int | float | str):
            return _plain(value.item())
        case np.ndarray() if not value.dtype.hasobject and value.dtype.names is None:
            data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            return {_ARRAY: data, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise UsageError(
        f"a {type(value).__name__} in a value to store",
        expected="mappings, lists, strings, numbers, booleans, None, and numpy arrays of numbers",
    )


def _array(found: dict[str, Any]) -> Any:
    if found.keys() != {_ARRAY, "dtype", "shape"}:
        return found
    flat = np.frombuffer(bytearray(base64.b64decode(found[_ARRAY])), dtype=found["dtype"])
    return flat.reshape(found["shape"])


def _response_out(response: Response) -> str:
    spans = [[span.start, span.end, span.label] for span in response.spans]
    return to_json({"kind": response.kind, "labels": response.labels, "spans": spans})


def _response_in(text: str) -> Response:
    found = json.loads(text)
    return Response(found["kind"], tuple(found["labels"]), tuple(Span(*span) for span in found["spans"]))


def _space_out(space: LabelSpace) -> str:
    return to_json({"names": space.names, "parents": space.parents, "scheme": space.scheme})


def _space_in(text: str) -> LabelSpace:
    found = json.loads(text)
    return LabelSpace(tuple(found["names"]), found["parents"], found["scheme"])


def _number_in(value: float | None) -> float:
    return math.nan if value is None else value  # SQLite has no NaN and keeps NULL instead


def _same(value: Any) -> Any:
    return value


def _maybe(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else kind(value)


WORDS = Coded(escape, unescape)
NAMES = Coded(to_json, lambda text: tuple(json.loads(text)))
VALUE = Coded(to_json, from_json)
NUMBER = Coded(float, _number_in, Double())
MAYBE_NUMBER = Coded(_maybe(float), _same, Double())
MAYBE_TRUE = Coded(_maybe(bool), _same, Boolean())
COUNT = Coded(int, _same, Integer())
PATH = Coded(lambda path: escape(str(path)), lambda text: Path(unescape(text)))
RESPONSE = Coded(_response_out, _response_in)
SPACE = Coded(_space_out, _space_in)


def columns(table: Table, noun: type[Any]) -> Sequence[Column[Any]]:
    """The columns of ``table`` that hold the fields of ``noun``, in their order: ``noun(*row)`` is the way back.

    >>> from trilobe.infrastructure.store.schema import bundles
    >>> from trilobe.types import Bundle
    >>> [column.name for column in columns(bundles, Bundle)]
    ['id', 'path', 'model_id', 'manifest']
    """
    return [table.c[field.name] for field in fields(noun)]


def row(noun: Any, **more: Any) -> dict[str, Any]:
    """A noun as the row to insert, with ``more`` columns that are not fields of it.

    >>> from trilobe.types import Evidence
    >>> row(Evidence("accuracy", 0.9, 0.8, 0.95), model_id="m")["model_id"]
    'm'
    """
    return {field.name: getattr(noun, field.name) for field in fields(noun)} | more
