"""Texts as they come from people, and as arrays: the same functions serve training and serving.

Bytes -> :func:`decode` -> text -> :func:`tokenize` -> offsets -> :func:`ids` -> input rows ``(T, 1 + n_chars)``
float32, one a word. Offsets count Unicode code points, as Python strings and :class:`~trilobe.types.Span` do. There
is no vocabulary: words and characters are hashed, so a word never seen has its place too, and nothing need be shipped.
No torch here: an endpoint imports this file.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np

from trilobe.errors import UnreadableExample, UsageError
from trilobe.types import FloatArray, Span

Offsets = list[tuple[int, int]]
VERSION = "words.v1"
UNKNOWN = 1  # the word id of a word that is hidden: in dropout, in attacks, in explanations
N_CHARS = 16  # characters kept of a word
FIRST = 2  # the smallest word id that words are hashed to

# Scripts that put no spaces between words: Han, kana, Hangul, Thai, Lao, Tibetan, Myanmar, Khmer.
_SINGLE = (
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd"
    "\uac00-\ud7a3\u0e01-\u0eff\u0f40-\u0fbc\u1000-\u109f\u1780-\u17dd"
)
_PICTURE = (
    "\u00a9\u00ae\u2122\u2190-\u23ff\u25a0-\u27bf\u2900-\u297f\u2b00-\u2bff\U0001f000-\U0001f1e5\U0001f200-\U0001fbff"
)
_END, _CLOSING = frozenset(".!?…。！？｡।؟"), frozenset("\"'”’»)]}」』）")


def decode(data: bytes) -> str:
    """The text in a file: UTF-8, with or without a byte order mark, otherwise unchanged.

    Raises:
        UnreadableExample: empty or only spaces, another encoding, or not a text at all.

    >>> decode("Zürich 🎉".encode())
    'Zürich 🎉'
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _not_utf8("a text in UTF-16", "utf-16")
    if b"\0" in data:
        raise UnreadableExample(f"not a text: byte {data.index(0)} is NUL", expected="a text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _not_utf8(f"not UTF-8: {e.reason} at byte {e.start} (0x{data[e.start]:02x})", "latin-1") from e
    if not text.strip():
        raise UnreadableExample("an empty text" if not text else "a text of spaces only", expected="at least one word")
    return text


def to_bytes(text: str) -> bytes:
    """A text as a file; :func:`decode` gives it back.

    Raises:
        UnreadableExample: half of a surrogate pair, which is no character.

    >>> decode(to_bytes("a b"))
    'a b'
    """
    try:
        return text.encode("utf-8-sig" if text.startswith("\ufeff") else "utf-8")
    except UnicodeEncodeError as e:
        raise UnreadableExample(f"half a surrogate pair at character {e.start}", expected="a text of characters") from e


def tokenize(text: str) -> Offsets:
    """The words of a text, ``(start, end)`` in code points, in order: rule ``words.v1``.

    Letters run together with their combining marks, and so do digits; letters and digits are apart. An emoji with its
    skin tone, a sequence joined by zero-width joiners, and a flag are one token. A character of a script without spaces
    between words (Chinese, Japanese, Korean, Thai, ...) and everything else is a token of its own. Every code point
    that is not a space is in exactly one token, and no token holds a space. What is a letter or a mark is what the
    running Python's Unicode tables say.

    >>> text = "v2.3 für 東京 👩🏽‍🚀!"
    >>> [text[a:b] for a, b in tokenize(text)]
    ['v', '2', '.', '3', 'für', '東', '京', '👩🏽‍🚀', '!']
    """
    return [m.span() for m in _rule().finditer(text)]


@cache
def _rule() -> re.Pattern[str]:
    """Compiled on first use: finding all combining marks takes some hundredths of a second."""
    marks, start = "\u200c\u200d", None
    planes = (*range(0x300, 0x20000), *range(0xE0000, 0xE0200))
    for code in (*planes, sys.maxunicode):
        is_mark = unicodedata.category(chr(code)).startswith("M")
        if is_mark and start is None:
            start = code
        elif not is_mark and start is not None:
            marks += f"{chr(start)}-{chr(code - 1)}"
            start = None
    tone, tags = "\U0001f3fb-\U0001f3ff", "\U000e0020-\U000e007f"
    picture = f"[{_PICTURE}]\ufe0f?[{tone}]?[{tags}]*"
    letter = f"(?![{_SINGLE}\\d_])\\w[{marks}]*"
    return re.compile(
        "[\U0001f1e6-\U0001f1ff]{2}"  # a flag
        f"|[0-9#*]\ufe0f?\u20e3"  # a keycap
        f"|{picture}(?:\u200d{picture})*[{marks}]*"
        f"|(?:{letter})+"
        f"|(?:\\d[{marks}]*)+"
        f"|\\S[{marks}]*"
    )


def split(text: str, max_tokens: int, keep: Iterable[Span] = ()) -> Offsets:
    """A long text in parts of at most ``max_tokens`` words: ``(start, end)`` of each part, in order.

    A part ends at the last end of a sentence (or line) that leaves it within the limit, else at the limit; never inside
    a span of ``keep``. A part is longer than the limit only where a span is. All words are in exactly one part, and the
    spaces around parts in none. Takes time proportional to the text.

    >>> text = "One two. Three four five."
    >>> [text[a:b] for a, b in split(text, 5)]
    ['One two.', 'Three four five.']
    >>> [text[a:b] for a, b in split(text, 5, keep=[Span(0, 14, "X")])]
    ['One two. Three four', 'five.']
    """
    if max_tokens < 1:
        raise UsageError(f"parts of {max_tokens} words", expected="at least 1")
    words = tokenize(text)
    n, parts, at = len(words), list[tuple[int, int]](), 0
    if n <= max_tokens:
        return [(words[0][0], words[-1][1])] if words else []
    rank = _breaks(text, words, keep)
    possible = np.flatnonzero(rank)
    while at < n:
        window = rank[at + 1 : at + 1 + max_tokens]  # the part may end before word at + 1, ..., at + max_tokens
        if at + max_tokens >= n:
            to = n
        elif best := int(window.max()):
            to = at + 1 + int(np.flatnonzero(window == best)[-1])
        else:
            to = int(possible[np.searchsorted(possible, at + 1)])
        parts.append((words[at][0], words[to - 1][1]))
        at = to
    return parts


def _breaks(text: str, words: Offsets, keep: Iterable[Span]) -> FloatArray:
    """Where a part may end, ``(n_words + 1,)``: before word i 2 ends a sentence, 1 is possible, 0 is inside a span."""
    n = len(words)
    rank = np.ones(n + 1)
    ended = False  # by the words so far, up to closing quotes
    for i, (_, end) in enumerate(words[:-1]):
        sign = text[end - 1]
        ended = sign in _END or (ended and sign in _CLOSING)
        gap = text[end : words[i + 1][0]]
        if (ended and (gap or sign in "。！？｡")) or "\n" in gap:
            rank[i + 1] = 2
    starts = np.array([start for start, _ in words])
    inside = np.zeros(n + 2)
    for span in keep:
        first = np.searchsorted(starts, span.start, side="right")
        last = np.searchsorted(starts, span.end, side="left")
        inside[first] += 1
        inside[max(first, last)] -= 1
    rank[np.cumsum(inside)[: n + 1] > 0] = 0
    rank[n] = 2
    return rank


def choose_preprocessing(texts: Iterable[str], n_chars: int = N_CHARS, most: int = 2**14) -> dict[str, Any]:
    """How every text becomes an input: twice as many hash buckets as the pool has different words, a power of two.

    Args:
        texts: the pool, or a part of it.
        n_chars: characters kept of each word, its first and its last.
        most: the largest number of buckets; each costs memory and time in every step of training.

    Returns:
        ``{"version": "words.v1", "buckets", "n_chars"}``, plain values that go into the bundle.

    >>> choose_preprocessing(["a b", "b c"])
    {'version': 'words.v1', 'buckets': 1024, 'n_chars': 16}
    """
    seen: set[str] = set()
    buckets = 1024
    for text in texts:
        seen.update(_normal(text[a:b]) for a, b in tokenize(text))
    while buckets < min(2 * len(seen), most):
        buckets *= 2
    return {"version": VERSION, "buckets": buckets, "n_chars": n_chars}


def ids(
    texts: Sequence[str], preprocessing: Mapping[str, Any], offsets: Sequence[Sequence[tuple[int, int]]] | None = None
) -> list[FloatArray]:
    """Texts as numbers: per text an array ``(T, 1 + n_chars)`` float32, one row a word.

    Column 0 is the word: the CRC-32 of its lower-case letters, every digit read as 0, in 2 .. ``buckets`` + 1 (1 is
    :data:`UNKNOWN`, 0 is padding). The others are its characters, 1 to 255, as they are written; of a long word the
    first and the last half of ``n_chars``; 0 behind the end.

    Args:
        texts: any, also empty (then T is 0).
        preprocessing: from :func:`choose_preprocessing`.
        offsets: the words of each text where they are known; else those of :func:`tokenize`.

    >>> spec = {"version": "words.v1", "buckets": 1024, "n_chars": 4}
    >>> [row] = ids(["Ab ab"], spec)
    >>> row[0, 0] == row[1, 0], row[:, 1:].astype(int).tolist()
    (np.True_, [[65, 98, 0, 0], [97, 98, 0, 0]])
    """
    if preprocessing.get("version") != VERSION:
        raise UsageError(f"preprocessing {preprocessing.get('version')!r}", expected=repr(VERSION))
    buckets, n_chars = int(preprocessing["buckets"]), int(preprocessing["n_chars"])
    table: list[list[int]] = []
    known: dict[str, int] = {}
    at: list[list[int]] = []
    for i, text in enumerate(texts):
        rows = []
        for a, b in tokenize(text) if offsets is None else offsets[i]:
            word = text[a:b]
            if word not in known:
                known[word] = len(table)
                table.append(_row(word, buckets, n_chars))
            rows.append(known[word])
        at.append(rows)
    values = np.array(table, dtype=np.float32).reshape(-1, 1 + n_chars)
    return [values[np.array(rows, dtype=np.intp)] for rows in at]


def _normal(word: str) -> str:
    word = unicodedata.normalize("NFC", word).lower()
    return re.sub(r"\d", "0", word)


def _row(word: str, buckets: int, n_chars: int) -> list[int]:
    number = FIRST + crc32(_normal(word).encode("utf-8", "surrogatepass")) % buckets
    half = n_chars // 2
    kept = word if len(word) <= n_chars else word[: n_chars - half] + word[len(word) - half :]
    chars = [ord(c) or 1 if ord(c) < 128 else 128 + crc32(c.encode("utf-8", "surrogatepass")) % 128 for c in kept]
    return [number, *chars, *[0] * (n_chars - len(chars))]


def _not_utf8(problem: str, encoding: str) -> UnreadableExample:
    return UnreadableExample(
        problem, expected="a text in UTF-8", hint=f"iconv -f {encoding} -t utf-8 FILE > NEW, if it is {encoding}"
    )
