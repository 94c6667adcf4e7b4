"""The report of a whole loop: one HTML file that a customer opens from disk, without server, network or JavaScript.

What the page tells is a :class:`ReportData`: plain values, one part for each stretch of the loop, every part optional,
so a project that has only got to training still has a report. Here live these parts, the sentences that put them in
plain words, and :func:`render`; the looks are in ``templates/``, the drawing in :mod:`trilobe.web.charts`.
"""

import base64
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trilobe.errors import DataError, UsageError
from trilobe.types import Evidence, Finding
from trilobe.web import charts
from trilobe.web.charts import Bin, Estimate, Series, Station, percent, seconds

if TYPE_CHECKING:
    from jinja2 import Environment

_DATA_URI = re.compile(r"data:image/(png|jpeg|webp|gif|svg\+xml);base64,[A-Za-z0-9+/]+={0,2}")
FINDING_HEADINGS = {
    "class_share": "One class has taken over",
    "low_confidence": "The model is unsure of what it sees",
    "class_drift": "The mix of answers has changed",
}
MOST_CLASSES = 20  # a larger confusion matrix is not readable as a table


@dataclass(frozen=True, slots=True)
class Picture:
    """A small image (a ``data:`` URI of a PNG, SVG, JPEG, WebP or GIF) with a few words under it.

    >>> Picture("https://example.org/cat.png")
    Traceback (most recent call last):
    trilobe.errors.UsageError: an image that is 'https://example.org/cat.png'; expected a data URI of an image (png_uri)
    """

    image: str
    caption: str = ""

    def __post_init__(self) -> None:
        _require_image(self.image)


@dataclass(frozen=True, slots=True)
class Pool:
    """What came in: ``examples`` to ask about, ``held_out`` only to grade; ``duplicates`` and ``refused`` left out."""

    examples: int
    held_out: int = 0
    duplicates: int = 0
    refused: int = 0
    classes: tuple[str, ...] = ()
    sample: tuple[Picture, ...] = ()
    how: str = ""


@dataclass(frozen=True, slots=True)
class Questions:
    """What was asked. ``chosen`` and ``baseline`` are held-out accuracy (0..1) over number of answers.

    The caption of a picture of ``last_round`` says why it was asked; ``right`` is as in :class:`Training`.
    """

    asked: int
    rounds: int = 1
    chosen: Series | None = None
    baseline: Series | None = None
    target: float | None = None
    last_round: tuple[Picture, ...] = ()
    right: str = "right"
    how: str = ""


@dataclass(frozen=True, slots=True)
class Annotator:
    """How often one annotator is right: estimated (``quality``, whose name is theirs) and true, where that is known."""

    quality: Estimate
    answers: int
    median_seconds: float
    true_quality: float | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """``answers`` on ``examples``; of ``judged`` with known truth, how many labels each way of summing up got wrong."""

    answers: int
    examples: int
    annotators: tuple[Annotator, ...] = ()
    wrong_majority: int | None = None
    wrong_weighed: int | None = None
    judged: int = 0
    how: str = ""


@dataclass(frozen=True, slots=True)
class Training:
    """The model on held-out examples. ``confusion[i][j]`` counts those of class ``i`` taken for class ``j``.

    ``right`` names what ``accuracy`` is, as people say it: "right", or for instance "entity F1".
    """

    accuracy: Estimate
    trained_on: int = 0
    ece: float | None = None
    bins: tuple[Bin, ...] = ()
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    right: str = "right"
    how: str = ""

    def __post_init__(self) -> None:
        k = len(self.classes)
        if self.confusion and (len(self.confusion) != k or any(len(row) != k for row in self.confusion)):
            raise UsageError(f"a confusion matrix of {len(self.confusion)} rows for {k} classes", expected=f"{k} x {k}")

    def worst(self, n: int = 3) -> list[tuple[str, str, int]]:
        """The ``n`` most frequent confusions: (true class, taken for, how often), most frequent first."""
        pairs = [
            (self.classes[i], self.classes[j], count)
            for i, row in enumerate(self.confusion)
            for j, count in enumerate(row)
            if i != j and count
        ]
        return sorted(pairs, key=lambda p: -p[2])[:n]


@dataclass(frozen=True, slots=True)
class Gate:
    """One check in words: what ``name`` means, its evidence, and whether its figure reads as percent or as number."""

    name: str
    evidence: Evidence
    meaning: str = ""
    form: Literal["percent", "number"] = "percent"


@dataclass(frozen=True, slots=True)
class Checks:
    """The gates; ``attacks``: accuracy under attack, weakest first; ``groups``: accuracy for each group (parity)."""

    gates: tuple[Gate, ...]
    attacks: tuple[Estimate, ...] = ()
    groups: tuple[Estimate, ...] = ()
    how: str = ""


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of a bundle: its size in bytes and the digest of its content."""

    name: str
    size: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """The bundle, and the endpoint in front of it (``endpoint`` empty: packaged, not served).

    ``captured`` is the share of requests kept for monitoring, ``since`` seconds since the epoch.
    """

    bundle_id: str
    files: tuple[BundleFile, ...] = ()
    endpoint: str = ""
    url: str = ""
    requests: int = 0
    failed: int = 0
    swaps: int = 0
    captured: float | None = None
    since: float | None = None
    median_seconds: float | None = None
    how: str = ""


@dataclass(frozen=True, slots=True)
class Monitoring:
    """What was noticed in ``captures``. ``window`` (one estimate a class) stands against ``baseline``.

    ``clean_findings`` were raised on ``clean_captures`` of ordinary traffic; ``false_alarms`` is the measured rate.
    """

    captures: int
    findings: tuple[Finding, ...] = ()
    window: tuple[Estimate, ...] = ()
    baseline: tuple[float, ...] = ()
    flagged: tuple[str, ...] = ()
    clean_captures: int | None = None
    clean_findings: int = 0
    false_alarms: Estimate | None = None
    how: str = ""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A capture (``image``) and where the model looked (``overlay``), both data URIs, with its answer, 0..1 sure."""

    image: str
    overlay: str
    predicted: str
    confidence: float
    truth: str = ""

    def __post_init__(self) -> None:
        _require_image(self.image)
        _require_image(self.overlay)


@dataclass(frozen=True, slots=True)
class Why:
    """Heat maps of captures that a finding flagged, beside clean ones; ``method`` names how they were computed."""

    flagged: tuple[HeatMap, ...]
    clean: tuple[HeatMap, ...] = ()
    method: str = ""
    how: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Accuracy on one kind of traffic before and after the repair."""

    name: str
    before: Estimate
    after: Estimate


@dataclass(frozen=True, slots=True)
class Repair:
    """What ``new_answers`` bought; ``requests`` of which ``failed`` arrived while the bundles were swapped."""

    changes: tuple[Change, ...]
    new_answers: int
    requests: int = 0
    failed: int = 0
    bundle_id: str = ""
    right: str = "right"
    how: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What is needed to make this report again, and the seconds that each stage took."""

    command: str
    seed: int
    code_version: str
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[tuple[str, float], ...] = ()
    how: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page tells, in the order of the story. Only ``title`` is needed; ``verdict`` is one sentence.

    Raises :class:`~trilobe.errors.UsageError`, naming the field, where a figure is not a finite number.
    """

    title: str
    verdict: str = ""
    created_at: float = 0.0
    pool: Pool | None = None
    questions: Questions | None = None
    answers: Answers | None = None
    training: Training | None = None
    checks: Checks | None = None
    serving: Serving | None = None
    monitoring: Monitoring | None = None
    why: Why | None = None
    repair: Repair | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        _require_finite(self, "report")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: the field of :class:`ReportData` it tells, its heading, and what to run to have one."""

    name: str
    heading: str
    command: str


SECTIONS = (
    Section("pool", "Pool", "trilobe add"),
    Section("questions", "Questions", "trilobe query"),
    Section("answers", "Answers", "trilobe label"),
    Section("training", "Model", "trilobe train"),
    Section("checks", "Checks", "trilobe check"),
    Section("serving", "Bundle and endpoint", "trilobe package"),
    Section("monitoring", "Findings", "trilobe monitor"),
    Section("why", "Why", "trilobe explain"),
    Section("repair", "Repair", "trilobe query --finding newest"),
    Section("origin", "How to reproduce this", "trilobe run"),
)


def render(data: ReportData) -> str:
    """The page, as one self-contained HTML text. The same data always give the same text.

    >>> page = render(ReportData(title="Digits"))
    >>> "Digits" in page and "run <code>trilobe check</code>" in page
    True
    """
    html = _environment().get_template("report.html.j2").render(
        data=data, sections={s.name: (i, s) for i, s in enumerate(SECTIONS, 1)},
        said={s.name: _say(s.name, data) for s in SECTIONS},
        verdict=data.verdict or _verdict(data), key_figures=_key_figures(data), drawn=_draw(data),
        max_classes=MOST_CLASSES, finding_headings=FINDING_HEADINGS,
    )  # fmt: skip
    return charts.printable(html)


def to_json(data: ReportData) -> str:
    """``data`` as JSON; :func:`from_json` gives the same back. Numpy numbers and arrays become plain ones.

    >>> from_json(to_json(ReportData("Digits", pool=Pool(7)))) == ReportData("Digits", pool=Pool(7))
    True
    """
    import msgspec

    try:
        return msgspec.json.encode(data, enc_hook=_plain).decode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"report data that JSON cannot hold: {error}", expected="plain values") from error


def from_json(text: str) -> ReportData:
    """The :class:`ReportData` that :func:`to_json` wrote. Raises :class:`~trilobe.errors.DataError` for any other."""
    import msgspec

    try:
        return msgspec.json.decode(text, type=ReportData)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise DataError(f"not the data of a report: {error}", expected="what to_json wrote") from error


def png_uri(png: bytes) -> str:
    """The data URI of an image file's bytes (PNG or SVG), as :class:`Picture` and :class:`HeatMap` take it.

    >>> png_uri(b"not really an image")[:26]
    'data:image/png;base64,bm90'
    """
    kind = "svg+xml" if png.lstrip().startswith(b"<svg") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(png).decode()


@cache
def _environment() -> "Environment":
    """Jinja with what the template may say; every value it prints is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("trilobe.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "percent": percent, "seconds": seconds, "count": _count, "size": _size, "clock": _clock,
        "p_value": _p_value, "figure": _figure, "plus": _plus,
        "arrows": lambda text: text.replace("->", "→"),
    }  # fmt: skip
    return env


# ---------------------------------------------------------------- figures


def _draw(data: ReportData) -> dict[str, Any]:
    """Every chart of the page by name, as markup; the empty text for those without data."""
    from markupsafe import Markup

    drawn = {"loop": charts.loop_diagram(_stations(data)), "loop_tall": charts.loop_diagram(_stations(data), tall=True)}
    if (q := data.questions) and q.chosen:
        lines = [line for line in (q.chosen, q.baseline) if line]
        lowest = min(min(line.y) for line in lines)
        drawn["curve"] = charts.line_chart(
            lines, title="Accuracy on held-out examples against number of answers", x_label="answers from people",
            y_label=f"{q.right} on held-out examples", y_range=(min(0.9, np.floor(10 * lowest) / 10), 1.0),
            target=q.target,
        )  # fmt: skip
    if data.answers and data.answers.annotators:
        pairs = [(a.quality, a.true_quality) for a in data.answers.annotators]
        drawn["annotators"] = charts.paired_bars(pairs, title="How often each annotator is right")
    if data.training and data.training.bins:
        drawn["reliability"] = charts.reliability_diagram(data.training.bins)
    if data.checks and data.checks.attacks:
        drawn["attacks"] = charts.bars(data.checks.attacks, title="Accuracy under attack")
    if data.checks and data.checks.groups:
        drawn["groups"] = charts.bars(data.checks.groups, title="Accuracy for each group")
    if (m := data.monitoring) and m.window:
        drawn["shares"] = charts.share_bars(
            m.window, m.baseline, title="Share of each class in the traffic", flagged=m.flagged
        )
    if data.repair and data.repair.changes:
        changes = [(c.name, c.before, c.after) for c in data.repair.changes]
        drawn["repair"] = charts.before_after(changes, title="Accuracy before and after the repair")
    if data.origin and data.origin.stages:
        stages = [Estimate(name, took, took, took) for name, took in data.origin.stages]
        drawn["stages"] = charts.bars(stages, title="Time that each stage took", form="seconds")
    return defaultdict(str, {name: Markup(svg) for name, svg in drawn.items()})  # charts escape what they are given


def _stations(data: ReportData) -> list[Station]:
    """The loop with what was counted at each stop."""
    d = data
    passed = d.checks and [g for g in d.checks.gates if g.evidence.passed]
    gated = d.checks and [g for g in d.checks.gates if g.evidence.passed is not None]
    served = d.serving and d.serving.endpoint
    heat_maps = d.why and len(d.why.flagged) + len(d.why.clean)
    stops: list[tuple[str, str, Any]] = [
        ("Pool", "pool", d.pool and _count(d.pool.examples, "example")),
        ("Question", "questions", d.questions and f"{d.questions.asked:,} asked"),
        ("Answer", "answers", d.answers and f"{d.answers.answers:,} given"),
        ("Belief", "answers", d.answers and _count(d.answers.examples, "label")),
        ("Model", "training", d.training and f"{percent(d.training.accuracy.value)} {d.training.right}"),
        ("Check", "checks", d.checks and f"{len(passed or [])} of {len(gated or [])} passed"),
        ("Package", "serving", d.serving and (_count(len(d.serving.files), "file") if d.serving.files else "1 bundle")),
        (
            "Serve",
            "serving",
            served and d.serving and (_count(d.serving.requests, "request") if d.serving.requests else "1 endpoint"),
        ),
        ("Monitor", "monitoring", d.monitoring and _count(len(d.monitoring.findings), "finding")),
        ("Explain", "why", d.why and _count(heat_maps or 0, "heat map")),
    ]
    return [Station(name, count or "", f"#{part}") for name, part, count in stops]


def _key_figures(data: ReportData) -> list[tuple[str, str]]:
    """At most five (figure, what it is), those that are known."""
    d, out = data, []
    if d.answers or d.questions:
        n = d.answers.answers if d.answers else d.questions.asked if d.questions else 0
        out.append((f"{n:,}", "answers given by people"))
    if d.training:
        out.append((percent(d.training.accuracy.value), f"{d.training.right} on held-out examples"))
    if d.checks:
        verdicts = [g.evidence.passed for g in d.checks.gates if g.evidence.passed is not None]
        out.append((f"{sum(verdicts)} of {len(verdicts)}", "checks passed"))
    if d.serving and d.serving.endpoint and d.serving.requests:
        out.append((f"{d.serving.requests:,}", f"requests served, {d.serving.failed:,} failed"))
    if d.repair and d.repair.changes:
        best = max(d.repair.changes, key=lambda c: c.after.value - c.before.value)
        out.append(
            (f"{percent(best.before.value, 0)} → {percent(best.after.value, 0)}", f"on {best.name}, before and after")
        )
    return out


# ---------------------------------------------------------------- words


def _say(name: str, data: ReportData) -> str:
    """The one sentence that opens a section; empty where the part is missing."""
    part = getattr(data, name)
    return _SENTENCES[name](part) if part is not None else ""


def _verdict(data: ReportData) -> str:
    """What stands under the title when nobody wrote a verdict: how far the loop has come."""
    missing = [s for s in SECTIONS[:-1] if getattr(data, s.name) is None]
    if not missing:
        return "The loop has closed: from unlabeled examples to a served model and back."
    done = [s.heading.lower() for s in SECTIONS[:-1] if s not in missing]
    return f"So far: {', '.join(done) or 'nothing yet'}. Next: {missing[0].command}."


def _pool_said(p: Pool) -> str:
    kept = (
        f"; {p.held_out:,} more, whose answers are known, were set aside and serve only to grade" if p.held_out else ""
    )
    return f"It starts with {_count(p.examples, 'example')} that nobody has labeled{kept}."


def _questions_said(q: Questions) -> str:
    opening = "Instead of having people label everything, the program asks about the examples it can learn most from"
    if not q.chosen:
        return f"{opening}: {_count(q.asked, 'question')} so far."
    last = f"{_scored(percent(q.chosen.y[-1]), q.right)} after {q.chosen.x[-1]:g} answers"
    if q.target is None:
        than = f", where picking at random gave {percent(q.baseline.y[-1])}" if q.baseline else ""
        return f"{opening}: {last}{than}."
    mine, aim = q.chosen.reaches(q.target), percent(q.target)
    other = q.baseline.reaches(q.target) if q.baseline else None
    if mine is None:
        sooner = "" if other is None else f", while picking at random took {other:g} answers"
        return f"{opening}; the target of {aim} is not reached yet ({last}){sooner}."
    reached = f"{opening}: {mine:g} answers were enough to be right {aim} of the time"
    if q.right != "right":
        reached = f"{opening}: {mine:g} answers were enough for {q.right} {aim}"
    if q.baseline is None:
        return f"{reached}."
    if other is None:
        return f"{reached}; picking at random had not got there after {q.baseline.x[-1]:g}."
    if other > mine:
        return f"{reached}, where picking at random took {other:g}, so {other - mine:g} answers were saved."
    return f"{reached}; picking at random took {other:g}, so nothing was saved this time."


def _answers_said(a: Answers) -> str:
    opening = "People make mistakes, so each person's reliability is estimated and their answers are weighed by it"
    if a.wrong_weighed is None or a.wrong_majority is None:
        return f"{opening}: {_count(a.answers, 'answer')} became {_count(a.examples, 'label')}."
    of = f" of {a.judged:,}" if a.judged else ""
    left = f"that left {_count(a.wrong_weighed, 'wrong label')}{of}"
    return f"{opening}: {left}, where a simple majority vote left {a.wrong_majority:,}."


def _training_said(t: Training) -> str:
    a = t.accuracy
    on = f"On {a.n:,} examples it had never seen" if a.n else "On examples it had never seen"
    sure = "" if t.ece is None else f", and how sure it says it is was off by {_points(t.ece)} on average"
    if t.right != "right":
        return f"{on}, the model's {t.right} is {percent(a.value)}{sure}."
    return f"{on}, the model was right {percent(a.value)} of the time{sure}."


def _checks_said(c: Checks) -> str:
    verdicts = [g.evidence.passed for g in c.gates if g.evidence.passed is not None]
    opening = "Before a model may serve anyone it has to pass checks whose limits were set beforehand"
    if not verdicts:
        return f"{opening}; no limit was set here, so the figures below are only measured."
    if all(verdicts):
        return f"{opening}: this one passed {'its only one' if len(verdicts) == 1 else f'all {len(verdicts)}'}."
    return f"{opening}: this one passed {sum(verdicts)} of {len(verdicts)}, so it may not be served."


def _serving_said(s: Serving) -> str:
    opening = "The model and everything it needs travel as one sealed folder"
    if not s.endpoint:
        return f"{opening}; it is not served yet."
    failed = "none of them failed" if not s.failed else f"{s.failed:,} of them failed"
    if not s.requests:  # nobody counted them
        return f"{opening}; programs call it by name."
    return f"{opening}; programs call it by name, and it has answered {_count(s.requests, 'request')}: {failed}."


def _monitoring_said(m: Monitoring) -> str:
    opening = "A sample of the live traffic is kept and compared with what the model was checked on"
    if not m.findings:
        return f"{opening}: nothing unusual in {_count(m.captures, 'capture')}."
    return f"{opening}: among {_count(m.captures, 'capture')}, {_count(len(m.findings), 'thing')} stood out."


def _why_said(_: Why) -> str:
    return (
        "A heat map shows where the model looked: the warmer a spot, the more it weighed in the answer. Warmth on the "
        "object itself is what one hopes for; warmth beside it is a sign that the answer came from something else."
    )


def _repair_said(r: Repair) -> str:
    opening = f"What stood out became the next questions: {_count(r.new_answers, 'new answer')}"
    if not r.changes:
        return f"{opening}."
    best = max(r.changes, key=lambda c: c.after.value - c.before.value)
    moved = f"from {percent(best.before.value)} to {percent(best.after.value)}"
    return f"{opening} took the model {_scored(moved, r.right)} on {best.name}."


def _scored(figure: str, right: str) -> str:
    """``"95% right"``, or ``"entity F1 95%"``."""
    return f"{figure} right" if right == "right" else f"{right} {figure}"


def _origin_said(o: Origin) -> str:
    return f"One command with the same seed ({o.seed}) goes through all of this again."


_SENTENCES: dict[str, Callable[[Any], str]] = {
    "pool": _pool_said, "questions": _questions_said, "answers": _answers_said, "training": _training_said,
    "checks": _checks_said, "serving": _serving_said, "monitoring": _monitoring_said, "why": _why_said,
    "repair": _repair_said, "origin": _origin_said,
}  # fmt: skip


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _points(share: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * share:.1f} percentage points"


def _figure(value: float, form: str) -> str:
    return percent(value) if form == "percent" else _number(value)


def _plus(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _size(n: int) -> str:
    return f"{n:,} B" if n < 1000 else f"{n / 1e3:.0f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"


def _clock(at: float) -> str:
    when = datetime.fromtimestamp(at, UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def _p_value(p: float) -> str:
    """As in print: p = 0.012, p = 3 × 10⁻⁹."""
    return "p < 10⁻³⁰⁰" if p < 1e-300 else f"p = {_number(p, 2)}"


def _number(value: float, digits: int = 3) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    shown, power = f"{value:.{digits - 1}e}".split("e")
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return f"{shown} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(value: object) -> object:
    """What JSON can hold of a numpy value."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _require_finite(value: object, where: str) -> None:
    """Walk through the fields: a figure that was not measured is left out, never shown as NaN."""
    if isinstance(value, float | np.floating) and not np.isfinite(value):
        raise UsageError(f"{where} is {value}", expected="a finite number", hint="leave out what was not measured")
    if is_dataclass(value):
        for part in fields(value):
            _require_finite(getattr(value, part.name), f"{where}.{part.name}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            _require_finite(item, f"{where}[{i}]")


def _require_image(uri: str) -> None:
    if not _DATA_URI.fullmatch(uri):
        raise UsageError(f"an image that is {uri[:60]!r}", expected="a data URI of an image (png_uri)")
