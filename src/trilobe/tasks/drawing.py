"""Texts as people see them: SVG pictures with boxes around spans and colors under words, and lines for a terminal.

No font is measured: a character is one cell of a monospaced font wide, two where Unicode calls it wide, none for marks.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from zlib import crc32

CELL, LINE, SIZE, EDGE = 8.4, 24.0, 14, 10.0
COLUMNS, MOST_LINES = 76, 24
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7A5195", "#6B6B6B")  # Okabe and Ito's


@dataclass(frozen=True)
class Mark:
    """A stretch of a text to color: code points ``start`` to ``end``, how strongly (0 to 1), boxed with ``label``."""

    start: int
    end: int
    color: str
    strength: float = 0.2
    label: str = ""


def color_of(label: str) -> str:
    """A color for a label, always the same.

    >>> color_of("CITY") == color_of("CITY")
    True
    """
    return COLORS[crc32(label.encode()) % len(COLORS)]


def draw(text: str, marks: Sequence[Mark] = (), columns: int = COLUMNS, most: int = MOST_LINES) -> bytes:
    """An SVG of a text, wrapped at ``columns`` cells, at most ``most`` lines, with its marks.

    Text that begins from right to left is set from right to left.

    >>> draw("to Rome", [Mark(3, 7, "#0072B2", label="CITY")])[:4]
    b'<svg'
    """
    lines = lay(text, columns, most + 1)
    cut, lines = len(lines) > most, lines[:most]
    labeled = any(m.label for m in marks)
    step, top = LINE + 12 * labeled, EDGE + 12 * labeled
    used = max((_cells(text[a:b]) for a, b in lines), default=1)
    width, height = max(used, 8) * CELL + 2 * EDGE, len(lines) * step + (LINE if cut else 0) + 2 * EDGE
    rtl = next((unicodedata.bidirectional(c) in ("R", "AL") for c in text if c.isalpha()), False)
    shapes: list[str] = []
    words: list[str] = []
    for row, (start, end) in enumerate(lines):
        y = top + row * step
        for m in marks:
            a, b = max(m.start, start), min(m.end, end)
            if a < b:
                shapes.append(_box(m, text, (start, a, b), y, width if rtl else 0.0))
        for word in re.finditer(r"\S+", text[start:end]):
            x = EDGE + CELL * _cells(text[start : start + word.start()])
            words.append(f'<text x="{_x(x, width, rtl):.1f}" y="{y + 17:.1f}">{_clean(word[0])}</text>')
    if cut:
        words.append(f'<text x="{_x(EDGE, width, rtl):.1f}" y="{top + len(lines) * step + 12:.1f}">…</text>')
    direction = ' direction="rtl"' if rtl else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(shapes)}'
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{SIZE}" fill="#1a1a1a"{direction}>'
        f"{''.join(words)}</g></svg>"
    ).encode("utf-8", "replace")


def terminal(text: str, columns: int = COLUMNS, most: int = MOST_LINES) -> str:
    """The text in lines for a terminal; what would steer a terminal, or reorder its letters, is a dot.

    >>> terminal("a\\x1b[31mb  c")
    'a·[31mb  c'
    """
    lines = lay(text, columns, most + 1)
    shown = ["".join("·" if _steers(c) else c for c in text[a:b]) for a, b in lines[:most]]
    return "\n".join([*shown, *(["…"] if len(lines) > most else [])])


def lay(text: str, columns: int, most: int) -> list[tuple[int, int]]:
    """Where lines begin and end, ``(start, end)``, at most ``most`` of them; broken at spaces, else anywhere.

    >>> lay("one two three", 8, 9)
    [(0, 7), (8, 13)]
    """
    lines: list[tuple[int, int]] = []
    start, end, used = -1, -1, 0

    def close() -> None:
        nonlocal start, used
        if start >= 0:
            lines.append((start, end))
        start, used = -1, 0

    for part in re.finditer(r"\n|[^\S\n]+|\S+", text):
        if len(lines) >= most:
            break
        if part[0] == "\n":
            close()
        elif part[0].isspace():
            used += len(part[0]) if start >= 0 else 0
        else:
            if start >= 0 and used + _cells(part[0][: columns + 1]) > columns:
                close()
            for i in range(part.start(), part.end()):
                cells = _cells(text[i])
                if start >= 0 and used + cells > columns:
                    close()
                    if len(lines) >= most:
                        break
                start, end, used = (i if start < 0 else start), i + 1, used + cells
    close()
    return lines[:most]


def _cells(text: str) -> int:
    total = 0
    for c in text:
        if unicodedata.category(c) not in ("Mn", "Me", "Cf"):
            total += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return total


def _x(x: float, width: float, rtl: bool) -> float:
    return width - x if rtl else x


def _box(m: Mark, text: str, at: tuple[int, int, int], y: float, mirrored: float) -> str:
    line, a, b = at
    x, w = EDGE + CELL * _cells(text[line:a]), CELL * _cells(text[a:b])
    x = mirrored - x - w if mirrored else x
    edge = f' stroke="{m.color}"' if m.label else ""
    box = (
        f'<rect x="{x - 1:.1f}" y="{y:.1f}" width="{w + 2:.1f}" height="{LINE:.0f}" rx="3" '
        f'fill="{m.color}" fill-opacity="{m.strength:.2f}"{edge}/>'
    )
    if m.label and a == m.start:
        box += (
            f'<text x="{x:.1f}" y="{y - 2:.1f}" font-family="sans-serif" font-size="9" fill="{m.color}">'
            f"{_clean(m.label)}</text>"
        )
    return box


def _steers(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs") or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _clean(text: str) -> str:
    """What XML may hold."""
    return escape("".join("·" if _steers(c) or c in "\ufffe\uffff" else c for c in text))
