"""Charts as inline SVG: small pure functions from figures to a string.

Each chart carries a title and a description for those who cannot see it, keeps its words as text, labels its marks
directly, tells them apart by shape and lightness (not by hue alone), holds no ``id`` (so charts never collide on a
page) and takes its colors from CSS variables with fallbacks (so it follows dark mode, and stands alone). Names are
escaped. Empty or not finite data is an error: a broken chart is worse than none. No page is laid out here.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from trilobe.errors import NotEnoughData, UsageError
from trilobe.statistics import wilson

_Scale = Callable[[float], float]  # from a value to a pixel
INK, MUTED, LINE = "var(--ink, #1d2327)", "var(--muted, #59636b)", "var(--line, #d3d8db)"
MAIN, ALERT, PAPER = "var(--main, #14599c)", "var(--alert, #b4470c)", "var(--paper, #ffffff)"
# Characters that XML 1.0 (section 2.2) forbids even when escaped; lone surrogates cannot be written to a file at all.
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A named figure with its 95% interval (``low == high`` where it is exact) and what it was counted on.

    >>> Estimate.of_counts("ada", 95, 100)
    Estimate(name='ada', value=0.95, low=0.888..., high=0.978..., n=100)
    """

    name: str
    value: float
    low: float
    high: float
    n: int = 0

    def __post_init__(self) -> None:
        require_finite([self.value, self.low, self.high], f"the estimate {self.name!r}")
        if self.low > self.high:
            raise UsageError(f"the interval {self.low} to {self.high} of {self.name!r}", expected="low <= high")

    @classmethod
    def of_counts(cls, name: str, k: int, n: int) -> "Estimate":
        """The share ``k / n`` with its Wilson interval; ``n`` is at least 1."""
        if n < 1:
            raise NotEnoughData(f"the share {name!r} of no trials", expected="at least one")
        return cls(name, k / n, *wilson(k, n), n)


@dataclass(frozen=True, slots=True)
class Series:
    """One line of :func:`line_chart`: ``x`` and ``y`` ``(n,)``, and optionally the band ``low`` to ``high`` ``(n,)``.

    ``style``: ``main`` is solid with full dots, ``quiet`` is dashed, gray, with hollow dots.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    style: Literal["main", "quiet"] = "main"

    def __post_init__(self) -> None:
        if not self.x:
            raise NotEnoughData(f"the line {self.name!r} has no points", expected="at least one")
        if len(self.x) != len(self.y) or len(self.low) != len(self.high) or len(self.low) not in (0, len(self.x)):
            lengths = f"{len(self.x)} x, {len(self.y)} y, {len(self.low)} low, {len(self.high)} high"
            raise UsageError(
                f"the line {self.name!r} has {lengths}", expected="as many of each (no band: no low, high)"
            )
        require_finite([*self.x, *self.y, *self.low, *self.high], f"the line {self.name!r}")

    @property
    def color(self) -> str:
        """What its line, dots and words are drawn in."""
        return MAIN if self.style == "main" else MUTED

    def reaches(self, target: float) -> float | None:
        """The first ``x`` whose ``y`` is at least ``target``; None where it never is.

        >>> Series("random", (10, 20, 30), (0.7, 0.95, 0.9)).reaches(0.9)
        20
        """
        return next((x for x, y in zip(self.x, self.y, strict=True) if y >= target), None)


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions of similar ``confidence`` (their mean, 0..1): the share ``accuracy`` of the ``n`` was right."""

    confidence: float
    accuracy: float
    n: int

    def __post_init__(self) -> None:
        require_finite([self.confidence, self.accuracy], "a bin of the reliability diagram")
        if not (0 <= self.confidence <= 1 and 0 <= self.accuracy <= 1 and self.n >= 0):
            raise UsageError(f"{self}", expected="confidence and accuracy from 0 to 1, n at least 0")


@dataclass(frozen=True, slots=True)
class Station:
    """A stop of :func:`loop_diagram`: its name, the count reached there (empty: not yet), where a click leads."""

    name: str
    count: str = ""
    href: str = ""


@dataclass(frozen=True, slots=True)
class _Bar:
    """One horizontal bar: words go after its end, ``mark`` is a reference drawn across it."""

    value: Estimate
    words: str
    style: Literal["full", "hollow", "alert"] = "full"
    mark: float | None = None


def percent(share: float, digits: int = 1) -> str:
    """A share in 0..1 as people read it; what is not quite all or nothing is never called so.

    >>> percent(0.9764), percent(1.0), percent(0.05), percent(0.99996), percent(0.0001), percent(0.996, 0)
    ('97.6%', '100%', '5%', '>99.9%', '<0.1%', '>99%')
    """
    value, step = round(100 * share, digits), 10**-digits
    if value == 100 and share < 1:
        return f">{100 - step:g}%"
    if value == 0 and share != 0:
        return f"<{step:g}%"
    return f"{value:.{digits}f}".removesuffix(".0") + "%"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
    target: float | None = None,
) -> str:
    """Shares (0..1) over counts, with bands; where a line first reaches ``target`` its ``x`` is written on the axis.

    >>> svg = line_chart([Series("margin", (20, 40), (0.8, 0.9))], title="t", x_label="answers", y_label="accuracy",
    ...                  y_range=(0.5, 1.0), target=0.9)
    >>> svg.startswith("<svg") and "margin 90%" in svg
    True
    """
    if not series:
        raise NotEnoughData("a line chart of no lines", expected="at least one series")
    require_finite([*y_range, *([] if target is None else [target])], "the y range or the target")
    if y_range[0] >= y_range[1]:
        raise UsageError(f"the y range {y_range}", expected="a low end below a high end")
    width, height, left, right, top, bottom = 560, 350, 46, 436, 30, 300
    xs = [x for s in series for x in s.x]
    x_at, y_at = _scale(min(xs), max(xs), left + 8, right), _scale(*y_range, bottom, top, clip=True)
    parts = [_text(0, 14, y_label, MUTED), _text((left + right) / 2, height - 4, x_label, MUTED, "middle")]
    for y in _ticks(*y_range):
        parts += [_line(left, y_at(y), right, y_at(y), LINE), _text(left - 8, y_at(y) + 4, percent(y), MUTED, "end")]
    parts += [_curve(s, x_at, y_at) for s in sorted(series, key=lambda s: s.style == "main")]
    written: list[float] = []  # pixels under the axis that hold an answer to "when?"; ticks give way to them
    if target is not None:
        parts.append(_line(left, y_at(target), right, y_at(target), INK, dash="2 4"))
        parts.append(_text(left + 4, y_at(target) - 6, f"target {percent(target)}", INK))
        for s in series:
            if (x := s.reaches(target)) is not None and x_at(x) not in written:
                below = bottom + 18 + 13 * sum(abs(x_at(x) - w) < 30 for w in written)
                parts.append(_line(x_at(x), y_at(s.y[s.x.index(x)]), x_at(x), bottom + 4, s.color, dash="1 3"))
                parts.append(_text(x_at(x), below, f"{x:g}", s.color, "middle", bold=True))
                written.append(x_at(x))
    for x in _ticks(min(xs), max(xs), 7):
        if all(abs(x_at(x) - w) > 30 for w in written):
            parts.append(_text(x_at(x), bottom + 18, f"{x:g}", MUTED, "middle"))
    for s, y in zip(series, _apart([y_at(s.y[-1]) + 4 for s in series], 17), strict=True):
        parts.append(_text(right + 10, y, f"{s.name} {percent(s.y[-1])}", s.color, bold=s.style == "main"))
    points = [", ".join(f"{percent(y)} at {x:g}" for x, y in zip(s.x, s.y, strict=True)) for s in series]
    told = "; ".join(f"{s.name}: {at}" for s, at in zip(series, points, strict=True))
    return _svg(width, height, title, f"{y_label} against {x_label}. {told}.", parts)


def reliability_diagram(bins: Sequence[Bin], *, title: str = "Stated confidence against accuracy") -> str:
    """Accuracy against stated confidence with 95% Wilson intervals; under it, how many predictions each bin holds.

    On the diagonal, the model is right exactly as often as it says; below it, the model is too sure of itself.

    >>> "right 80% of 50" in reliability_diagram([Bin(0.9, 0.8, 50)])
    True
    """
    held = [b for b in bins if b.n > 0]
    if not held:
        raise NotEnoughData("a reliability diagram of no predictions", expected="at least one bin with n > 0")
    width, height, left, right, top, bottom = 400, 400, 50, 388, 30, 300
    x_at, y_at = _scale(0, 1, left, right), _scale(0, 1, bottom, top)
    parts = [
        _text(0, 14, "how often it was right", MUTED),
        _text((left + right) / 2, height - 6, "how sure it said it was", MUTED, "middle"),
        _line(x_at(0), y_at(0), x_at(1), y_at(1), MUTED, dash="4 4"),
        _text(x_at(0.1), y_at(0.03), "as sure as right", MUTED),
    ]
    for v in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [_line(left, y_at(v), right, y_at(v), LINE), _text(left - 8, y_at(v) + 4, percent(v), MUTED, "end")]
        parts.append(
            _text(x_at(v), height - 26, percent(v), MUTED, "end" if v == 1 else "start" if v == 0 else "middle")
        )
    tallest = max(b.n for b in held)
    for b in held:
        low, high = wilson(round(b.accuracy * b.n), b.n)
        x, tall = x_at(b.confidence), max(1.0, 38 * b.n / tallest)
        parts.append(_rect(x - 6, height - 44 - tall, 12, tall, LINE))
        parts.append(_line(x, y_at(low), x, y_at(high), MAIN, 2))
        parts.append(_dot(x, y_at(b.accuracy), 5, MAIN, MAIN))
        if b.n in (tallest, min(h.n for h in held)):
            parts.append(_text(min(x, right - 8), height - 48 - tall, f"{b.n:,}", MUTED, "middle"))
    told = "; ".join(f"{percent(b.confidence)} sure, right {percent(b.accuracy)} of {b.n}" for b in held)
    return _svg(width, height, title, f"{told}.", parts)


def bars(items: Sequence[Estimate], *, title: str, form: Literal["percent", "seconds"] = "percent") -> str:
    """One bar for each estimate, with its interval: shares in 0..1, or durations.

    >>> "no attack" in bars([Estimate.of_counts("no attack", 97, 100)], title="Accuracy under attack")
    True
    """
    words: Callable[[float], str] = seconds if form == "seconds" else percent
    return _rows([(e.name, [_Bar(e, words(e.value))]) for e in items], title, 1.0 if form == "percent" else None)


def paired_bars(items: Sequence[tuple[Estimate, float | None]], *, title: str) -> str:
    """For each name the estimated share (full bar, interval) above the true one (hollow bar) where it is known.

    >>> svg = paired_bars([(Estimate("ada", 0.94, 0.9, 0.97), 0.95), (Estimate("ben", 0.9, 0.8, 0.9), None)], title="q")
    >>> "94% estimated" in svg and "95% true" in svg
    True
    """
    rows = []
    for e, true in items:
        pair = [_Bar(e, f"{percent(e.value)} estimated")]
        if true is not None:
            pair.append(_Bar(Estimate(e.name, true, true, true), f"{percent(true)} true", "hollow"))
        rows.append((e.name, pair))
    return _rows(rows, title, 1.0)


def share_bars(
    window: Sequence[Estimate], baseline: Sequence[float], *, title: str, flagged: Sequence[str] = ()
) -> str:
    """The share of each class in the window (bar, interval) against the baseline (upright tick), flagged ones marked.

    >>> svg = share_bars([Estimate.of_counts("7", 30, 100)], [0.1], title="Shares", flagged=["7"])
    >>> "30%, was 10%" in svg
    True
    """
    if len(window) != len(baseline):
        came = f"{len(window)} classes in the window, {len(baseline)} in the baseline"
        raise UsageError(came, expected="the same classes in both")
    require_finite(baseline, "the baseline")
    rows = []
    for e, was in zip(window, baseline, strict=True):
        words = f"{percent(e.value)}, was {percent(was)}"
        if e.name in flagged:
            bar = _Bar(e, f"{'▲' if e.value > was else '▼'} {words}", "alert", was)
        else:
            bar = _Bar(e, words, mark=was)
        rows.append((e.name, [bar]))
    return _rows(rows, title, None)


def before_after(changes: Sequence[tuple[str, Estimate, Estimate]], *, title: str) -> str:
    """For each name a share before (hollow bar) and after (full bar), with intervals.

    >>> svg = before_after([("new", Estimate.of_counts("", 60, 100), Estimate.of_counts("", 95, 100))], title="Repair")
    >>> "60% before" in svg and "95% after" in svg
    True
    """
    rows = [
        (name, [_Bar(b, f"{percent(b.value)} before", "hollow"), _Bar(a, f"{percent(a.value)} after")])
        for name, b, a in changes
    ]
    return _rows(rows, title, 1.0)


def loop_diagram(stations: Sequence[Station], *, tall: bool = False) -> str:
    """The ten stations on one track: the first feeds a ring of nine, whose last leads back to the second.

    ``tall`` draws the same track top to bottom, for narrow screens. A station without a count is hollow.

    >>> "back to the questions" in loop_diagram([Station(f"s{i}", "1") for i in range(10)])
    True
    """
    if len(stations) != 10:
        raise UsageError(f"a loop of {len(stations)} stations", expected="10: a pool and a ring of nine")
    told = "; ".join(f"{s.name}: {s.count or 'not yet'}" for s in stations) + "; back to the questions."
    if tall:
        spots = [(64.0, 26.0 + 54 * i) for i in range(10)]
        words = [(88.0, y - 2, y + 17, "start") for _, y in spots]
        track = "M64 26V512H40Q22 512 22 494V98Q22 80 40 80H64"
        arrows = [(64, 53, 90), (64, 296, 90), (22, 296, -90)]
        note = _text(88, 556, "What failed becomes the next questions", MUTED)
        width, height = 340, 566
    else:
        top, low, columns = 74.0, 186.0, [244.0, 400.0, 556.0, 712.0]
        ring = [(x, top) for x in columns] + [(810.0, 130.0)] + [(x, low) for x in reversed(columns)]
        spots = [(64.0, top), *ring]
        words = [(x, y - 40, y - 20, "middle") if y == top else (x, y + 32, y + 52, "middle") for x, y in spots]
        words[5] = (832.0, 127.0, 147.0, "start")
        track = f"M64 {top}H780Q810 {top} 810 104V156Q810 {low} 780 {low}H184Q154 {low} 154 156V104Q154 {top} 184 {top}"
        arrows = [(114, 74, 0), (322, 74, 0), (634, 74, 0), (634, 186, 180), (322, 186, 180), (154, 130, -90)]
        note = _text(172, 134, "What failed becomes the next questions", MUTED)
        width, height = 940, 252
    parts = [f'<path d="{track}" style="fill:none;stroke:{LINE};stroke-width:3"/>', note]
    parts += [
        f'<path d="M-4-5L4 0L-4 5" transform="translate({x} {y}) rotate({turn})" '
        f'style="fill:none;stroke:{MUTED};stroke-width:2"/>'
        for x, y, turn in arrows
    ]
    for station, (x, y), (wx, name_y, count_y, anchor) in zip(stations, spots, words, strict=True):
        drawn = _dot(x, y, 7, MAIN if station.count else PAPER, MAIN if station.count else MUTED)
        drawn += _text(wx, name_y, station.name, INK, anchor, bold=True)
        drawn += _text(wx, count_y, station.count or "not yet", MUTED, anchor)
        parts.append(f'<a href="{escape(station.href)}">{drawn}</a>' if station.href else drawn)
    return _svg(width, height, "The loop", told, parts, role="group")


def seconds(value: float) -> str:
    """A duration as people read it.

    >>> seconds(0.0021), seconds(3.21), seconds(125)
    ('2.1 ms', '3.2 s', '2 min 5 s')
    """
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


# ---------------------------------------------------------------- drawing


def _rows(rows: Sequence[tuple[str, list[_Bar]]], title: str, x_max: float | None) -> str:
    """Named groups of horizontal bars from zero; ``x_max`` None makes the longest bar or interval fill the width."""
    if not rows:
        raise NotEnoughData(f"the chart {title!r} has no bars", expected="at least one")
    width, thick, letter = 460, 13, 8.2  # a letter's width errs on the wide side: readers' fonts differ
    every = [bar for _, group in rows for bar in group]
    longest = max(max(b.value.high, b.value.value, b.mark or 0.0) for b in every)
    shown = [name if len(name) <= 20 else name[:19] + "…" for name, _ in rows]
    left = 14 + letter * max(len(name) for name in shown)
    words = max(len(b.words) * (letter + (b.style == "alert")) for b in every)
    x_at = _scale(0, x_max or longest or 1.0, left, width - 16 - words, clip=True)
    parts, y = [], 6.0
    for name, (_, group) in zip(shown, rows, strict=True):
        middle = y + (thick + 4) * len(group) / 2 + 2
        parts.append(_text(left - 10, middle, name, INK, "end", bold=any(b.style == "alert" for b in group)))
        for bar in group:
            parts.append(_drawn_bar(bar, x_at, y, thick))
            y += thick + 4
        y += 9
    parts.append(_line(left, 0, left, y - 6, MUTED))
    told = "; ".join(f"{name}: " + ", ".join(b.words for b in group) for name, group in rows)
    return _svg(width, y - 4, title, f"{told}.", parts)


def _drawn_bar(bar: _Bar, x_at: _Scale, y: float, thick: float) -> str:
    """A pale bar with a strong end, so that the interval and the reference show on it and beyond it."""
    alert, e = bar.style == "alert", bar.value
    color = ALERT if alert else MUTED if bar.style == "hollow" else MAIN
    x0, x1 = x_at(0), x_at(e.value)
    out = _rect(x0, y, max(1.0, x1 - x0), thick, color, opacity=0 if bar.style == "hollow" else 0.32, stroke=color)
    out += _line(x1, y, x1, y + thick, color, 3)
    if e.high > e.low:
        out += _line(x_at(e.low), y + thick / 2, x_at(e.high), y + thick / 2, INK, 1.6)
    if bar.mark is not None:
        out += _line(x_at(bar.mark), y - 3, x_at(bar.mark), y + thick + 3, INK, 2.5)
    end = max(x1, x_at(e.high), x_at(bar.mark or 0.0))
    return out + _text(end + 8, y + thick - 2, bar.words, ALERT if alert else INK, bold=alert)


def _curve(s: Series, x_at: _Scale, y_at: _Scale) -> str:
    """A line with its band and dots."""

    def pixels(y: Sequence[float]) -> list[str]:
        return [f"{x_at(a):.1f},{y_at(b):.1f}" for a, b in zip(s.x, y, strict=True)]

    out = ""
    if s.low:
        edge = " ".join(pixels(s.high) + pixels(s.low)[::-1])
        out += f'<polygon points="{edge}" style="fill:{s.color};opacity:.14"/>'
    dash = "" if s.style == "main" else ";stroke-dasharray:6 4"
    out += f'<polyline points="{" ".join(pixels(s.y))}" style="fill:none;stroke:{s.color};stroke-width:2.2{dash}"/>'
    fill = s.color if s.style == "main" else PAPER
    return out + "".join(_dot(x_at(x), y_at(y), 3, fill, s.color) for x, y in zip(s.x, s.y, strict=True))


def _scale(start: float, stop: float, a: float, b: float, clip: bool = False) -> _Scale:
    """The straight map that sends ``start`` to pixel ``a`` and ``stop`` to ``b``; clipped to them if asked."""
    span = stop - start or 1.0

    def at(value: float) -> float:
        share = (value - start) / span
        return a + (min(1.0, max(0.0, share)) if clip else share) * (b - a)

    return at


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most + 1`` of them."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _apart(ys: Sequence[float], gap: float) -> list[float]:
    """The same heights, pushed down just so far that no two are nearer than ``gap``."""
    out, last = [0.0] * len(ys), -math.inf
    for i in sorted(range(len(ys)), key=lambda i: ys[i]):
        last = out[i] = max(ys[i], last + gap)
    return out


def _text(x: float, y: float, words: str, color: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ";font-weight:600" if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{color}{weight}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, wide: float = 1.0, dash: str = "") -> str:
    style = f"stroke:{color};stroke-width:{wide:g}" + (f";stroke-dasharray:{dash}" if dash else "")
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _rect(x: float, y: float, w: float, h: float, fill: str, opacity: float = 1.0, stroke: str = "none") -> str:
    style = f"fill:{fill};fill-opacity:{opacity:g};stroke:{stroke}"
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" style="{style}"/>'


def _dot(x: float, y: float, r: float, fill: str, stroke: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" style="fill:{fill};stroke:{stroke};stroke-width:2"/>'


def _svg(width: float, height: float, title: str, told: str, parts: Sequence[str], role: str = "img") -> str:
    """The whole drawing; never stretched beyond its natural size, shrunk to what room there is."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" role="{role}" '
        f'style="width:100%;max-width:{width / 16:g}rem;font:13px var(--sans, system-ui, sans-serif)">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>"
    )
    return printable(head + "".join(parts) + "</svg>")


def printable(text: str) -> str:
    """``text`` with what no XML or UTF-8 file may hold (control characters, lone surrogates) replaced by U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text)


def require_finite(values: Iterable[float], what: str) -> None:
    """Raise :class:`~trilobe.errors.UsageError` naming ``what`` if a value is infinite or not a number."""
    wrong = [v for v in values if not math.isfinite(v)]
    if wrong:
        raise UsageError(f"{what} holds {wrong[0]}", expected="finite numbers", hint="leave out what was not measured")
