"""The report: every part alone and absent, self-contained and well formed, escaped, round trip, seen by a browser."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from trilobe.errors import DataError, TrilobeError, UsageError
from trilobe.types import Evidence, Finding
from trilobe.web.charts import Bin, Estimate, Series
from trilobe.web.report import (
    SECTIONS,
    Annotator,
    Answers,
    BundleFile,
    Change,
    Checks,
    Gate,
    HeatMap,
    Monitoring,
    Origin,
    Picture,
    Pool,
    Questions,
    Repair,
    ReportData,
    Serving,
    Training,
    Why,
    from_json,
    png_uri,
    render,
    to_json,
)

NAMES = tuple(str(d) for d in range(10))
share = Estimate.of_counts
MARGIN = [0.69, 0.872, 0.902, 0.93, 0.945, 0.964, 0.971, 0.98, 0.984, 0.986]
MARGIN += [0.988, 0.986, 0.99, 0.991, 0.99, 0.992, 0.99, 0.991, 0.992, 0.991]
RANDOM = [0.70, 0.80, 0.886, 0.908, 0.914, 0.922, 0.924, 0.93, 0.93, 0.94]
RANDOM += [0.938, 0.941, 0.946, 0.945, 0.946, 0.948, 0.951, 0.955, 0.96, 0.963]


def uri(pixels: np.ndarray) -> str:
    """A PNG of ``pixels`` (height, width[, 3]) in 0..1."""
    file = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(file, "PNG", optimize=True)
    return png_uri(file.getvalue())


def warm(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """``pixels`` in gray with ``heat`` (both in 0..1) laid over it in orange."""
    gray = np.repeat(pixels[..., None], 3, axis=2)
    alpha = 0.75 * heat[..., None]
    return gray * (1 - alpha) + np.array([1.0, 0.35, 0.05]) * alpha


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X.reshape(-1, 8, 8) / 16, y


def heat_map(i: int, inverted: bool, predicted: str, confidence: float) -> HeatMap:
    X, y = digits()
    image = 1 - X[i] if inverted else X[i]
    smooth = image + np.roll(image, 1, 0) + np.roll(image, 1, 1)
    heat = np.zeros((8, 8)) + np.outer(np.r_[1.0, [0.1] * 6, 1.0], np.ones(8)) if inverted else smooth / smooth.max()
    return HeatMap(uri(image), uri(warm(image, heat)), predicted, confidence, truth=NAMES[y[i]])


def curve(name: str, y: list[float], style: str) -> Series:
    x = tuple(float(10 * (i + 1)) for i in range(len(y)))
    low, high = tuple(v - 0.6 * (1 - v) * 0.5 - 0.006 for v in y), tuple(min(1.0, v + 0.5 * (1 - v)) for v in y)
    return Series(name, x, tuple(y), low, high, style)  # type: ignore[arg-type]


@cache
def sample() -> ReportData:
    """A whole loop on handwritten digits, with plausible figures."""
    X, y = digits()
    rng = np.random.default_rng(0)
    pictures = tuple(Picture(uri(X[i])) for i in rng.choice(len(X), 20, replace=False))
    reasons = ["between 3 and 8", "between 1 and 8", "between 5 and 9", "like nothing asked yet", "between 4 and 7"]
    asked = tuple(Picture(uri(X[i]), f"{reasons[k % 5]}") for k, i in enumerate(rng.choice(len(X), 7, replace=False)))
    confusion = np.diag([49, 47, 50, 48, 51, 49, 50, 49, 46, 49])
    confusion[8, 1], confusion[1, 8], confusion[3, 8], confusion[9, 5], confusion[8, 3], confusion[3, 5] = (
        3,
        2,
        2,
        1,
        1,
        1,
    )
    confusion[4, 7], confusion[9, 7] = 1, 1
    people = [("ada", 0.945, 0.95, 100, 3.1), ("ben", 0.921, 0.93, 95, 3.6), ("cleo", 0.612, 0.60, 105, 1.6),
              ("dan", 0.902, 0.906, 90, 2.9), ("eva", 0.96, 1.0, 30, 9.4)]  # fmt: skip
    window = [0.08, 0.27, 0.09, 0.07, 0.09, 0.08, 0.08, 0.09, 0.115, 0.095]
    old, new = "the old style", "the new style"
    return ReportData(
        title="Handwritten digits",
        verdict="Served since 14:02. A change of traffic was caught, explained and repaired with 60 answers, "
        "and no request was lost on the way.",
        created_at=1_790_000_000.0,
        pool=Pool(1297, 500, 4, 2, NAMES, pictures),
        questions=Questions(
            200, 20,
            curve("margin", MARGIN, "main"),
            curve("random", RANDOM, "quiet"),
            0.95, asked, how="Three runs with seeds 0, 1, 2; the lines are their means, ten answers a round.",
        ),
        answers=Answers(
            420, 200, tuple(Annotator(share(n, round(q * k), k), k, s, t) for n, q, t, k, s in people), 17, 4, 200
        ),
        training=Training(
            share("held out", 488, 500), 200, 0.012,
            (Bin(0.44, 0.5, 4), Bin(0.56, 0.5, 6), Bin(0.66, 0.7, 10), Bin(0.76, 0.75, 16), Bin(0.86, 0.9, 30),
             Bin(0.985, 0.993, 434)),
            NAMES, tuple(tuple(int(n) for n in row) for row in confusion),
        ),
        checks=Checks(
            (
                Gate("Accuracy", Evidence("accuracy", 0.976, 0.959, 0.986, 500, 0.95, passed=True),
                     "right on held-out examples"),
                Gate("Calibration", Evidence("ece", 0.012, 0.009, 0.026, 500, 0.05, "at_most", True),
                     "gap between how sure it says it is and how often it is right"),
                Gate("Robustness", Evidence("pgd", 0.812, 0.775, 0.844, 500, 0.7, passed=True),
                     "right while under attack at strength 0.1"),
                Gate("Parity", Evidence("parity", 0.031, 0.004, 0.061, 500, 0.05, "at_most", True),
                     "largest difference in accuracy between groups"),
                Gate("Membership", Evidence("membership", 0.523, 0.497, 0.549, 824, 0.6, "at_most", True),
                     "how well an outsider can tell who was in the training data (50% is a coin toss)"),
                Gate("Same answers", Evidence("export", 1.2e-6, 1.2e-6, 1.2e-6, 500, 1e-4, "at_most", True),
                     "largest difference between the trained and the exported model", "number"),
                Gate("Size", Evidence("size", 84.0, 84.0, 84.0), "kB of weights", "number"),
            ),
            tuple(share(f"strength {s}" if s else "no attack", k, 500) for s, k in
                  [(0, 488), (0.05, 458), (0.1, 406), (0.2, 262)]),
            (share("thin strokes", 245, 253), share("thick strokes", 243, 247)),
        ),
        serving=Serving(
            "9c41d07be2f8", tuple(BundleFile(n, s, d * 4) for n, s, d in [
                ("manifest.json", 3120, "a81c9d"), ("model.onnx", 84_211, "77be01"),
                ("weights.safetensors", 83_904, "0c11fa"),
                ("baseline.json", 21_877, "e5d210"), ("evidence.json", 4410, "44b9c8"), ("card.md", 2950, "b2a6e7")]),
            "digits", "http://127.0.0.1:8471/v1/digits", 4812, 0, 1, 0.5, 1_789_999_320.0, 0.0021,
        ),
        monitoring=Monitoring(
            1204,
            (
                Finding("f1", "digits", "9c41d07be2f8", "class_share", "“1” is answered far more often than before",
                        0.27, 0.101, 0.232, 0.311, 3.1e-19, 400, tuple("abcdefgh")),
                Finding("f2", "digits", "9c41d07be2f8", "low_confidence", "The model is unsure far more often",
                        0.335, 0.048, 0.289, 0.383, 0.0, 400, tuple("abcdefghijkl")),
            ),
            tuple(share(n, round(400 * w), 400) for n, w in zip(NAMES, window, strict=True)),
            (0.1, 0.101, 0.098, 0.1, 0.102, 0.1, 0.1, 0.1, 0.099, 0.1), ("1",),
            804, 0, share("false alarms", 2, 200),
        ),
        why=Why(
            tuple(heat_map(i, True, p, c) for i, p, c in
                  [(0, "1", 0.41), (2, "8", 0.52), (7, "1", 0.38), (13, "1", 0.47)]),
            tuple(heat_map(i, False, NAMES[y[i]], c) for i, c in [(0, 0.99), (2, 0.97), (7, 0.99), (13, 0.98)]),
            "FullGrad (Srinivas and Fleuret 2019)",
        ),
        repair=Repair(
            (Change(old, share("", 488, 500), share("", 487, 500)),
             Change(new, share("", 203, 500), share("", 471, 500))),
            60, 812, 0, "e20b55c7a914",
        ),
        origin=Origin(
            "trilobe demo --seed 0", 0, "0.1.0", {"python": "3.11.7", "torch": "2.9.0", "onnxruntime": "1.23.0"},
            {"data": "5a1f09c2" * 4, "model": "c41d07be" * 4, "bundle": "9c41d07b" * 4},
            (("import", 1.4), ("query and label", 8.9), ("train", 12.2), ("check", 9.5), ("package", 2.1),
             ("serve and monitor", 14.8), ("explain", 1.1), ("repair", 7.6)),
        ),
    )  # fmt: skip


class Page(HTMLParser):
    """A strict reading of the page: every tag is closed by its own, in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def only(*names: str) -> ReportData:
    """The sample with no part but these."""
    whole = sample()
    return ReportData(whole.title, **{name: getattr(whole, name) for name in names})


def svgs(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


def with_part(name: str, **changes: object) -> ReportData:
    return dataclasses.replace(only(name), **{name: dataclasses.replace(getattr(sample(), name), **changes)})


def test_the_sections_are_the_parts() -> None:
    parts = [f.name for f in dataclasses.fields(ReportData)]
    assert [s.name for s in SECTIONS] == [p for p in parts if p not in {"title", "verdict", "created_at"}]


def test_the_whole_story_is_told_in_order() -> None:
    page = Page(render(sample()))
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert ids == [s.name for s in SECTIONS]
    for said in (
        "Served since 14:02.",
        "60 answers were enough to be right 95% of the time, where "
        "picking at random took 170, so 110 answers were saved.",
        "4 wrong labels of 200, where a simple majority vote left 17",
        "right 97.6% of the time, and how sure it says it is was off by 1.2 percentage points",
        "8 taken for 1 (3×)",
        "this one passed all 6",
        "it has answered 4,812 requests: none of them failed",
        "among 1,204 captures, 2 things stood out",
        "p = 3.1 × 10⁻¹⁹",
        "ordinary traffic the same tests raised nothing. Measured rate of false alarms: 1% (95% interval 0.3% to 3.6%",
        "60 new answers took the model from 40.6% to 94.2% right on the new style",
        "trilobe demo --seed 0",
        "21 September 2026, 14:13 UTC",
    ):
        assert said in page.text, said
    assert "Not yet" not in page.text


@pytest.mark.parametrize("name", [s.name for s in SECTIONS])
def test_each_part_stands_alone_and_the_others_say_what_to_run(name: str) -> None:
    assert Page(render(only(name))).text.count("Not yet: run") == len(SECTIONS) - 1
    without = Page(render(dataclasses.replace(sample(), **{name: None}))).text
    command = next(s.command for s in SECTIONS if s.name == name)
    assert f"Not yet: run {command} ." in without and without.count("Not yet: run") == 1


def test_an_empty_project_has_a_report() -> None:
    page = Page(render(ReportData("Nothing yet")))
    assert "So far: nothing yet. Next: trilobe add." in page.text
    assert page.text.count("Not yet: run") == len(SECTIONS)
    assert "So far: pool, model. Next: trilobe query." in Page(render(only("pool", "training"))).text


@pytest.mark.parametrize(
    "data",
    [
        ReportData("t", pool=Pool(1)),
        ReportData("t", questions=Questions(0)),
        ReportData("t", answers=Answers(1, 1)),
        ReportData("t", training=Training(Estimate("a", 0.5, 0.5, 0.5))),
        ReportData("t", checks=Checks(())),
        ReportData("t", serving=Serving("b")),
        ReportData("t", monitoring=Monitoring(0)),
        ReportData("t", why=Why(())),
        ReportData("t", repair=Repair((), 0)),
        ReportData("t", origin=Origin("c", 0, "v")),
    ],
    ids=lambda d: next(s.name for s in SECTIONS if getattr(d, s.name) is not None),
)
def test_the_least_of_each_part_is_enough(data: ReportData) -> None:
    assert Page(render(data)).text.count("Not yet: run") == len(SECTIONS) - 1


def test_it_is_self_contained_and_small() -> None:
    html = render(sample())
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for key, value in attrs.items():
            assert not key.startswith("on")
            if key in {"src", "href", "srcset", "action", "poster", "background"}:
                assert value and (value.startswith("data:image/") or value[1:] in {s.name for s in SECTIONS}), value
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert len(html.encode()) < 2_000_000
    for tag, attrs in page.tags:
        assert tag != "img" or attrs.get("alt")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_data_give_the_same_page() -> None:
    assert render(sample()) == render(sample())


def test_every_chart_parses() -> None:
    drawn = svgs(render(sample()))
    assert len(drawn) == 10  # the loop twice (wide and tall), and one for each of eight figures
    for svg in drawn:
        ElementTree.fromstring(svg)


def test_sample_images_are_real() -> None:
    images = [attrs["src"] or "" for tag, attrs in Page(render(sample())).tags if tag == "img"]
    assert len(images) == 20 + 7 + 2 * 8
    for source in images:
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).load()


def swapped(value: object, text: str) -> object:
    """``value`` with every text in it replaced, pictures and keywords left alone."""
    if isinstance(value, str):
        keep = value.startswith("data:image/") or value in {
            "percent", "number", "at_least", "at_most", "main", "quiet", "class_share", "low_confidence",
        }  # fmt: skip
        return value if keep else text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: swapped(getattr(value, f.name), text) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {f"{text}{i}": swapped(v, text) for i, v in enumerate(value.values())}
    return tuple(swapped(v, text) for v in value) if isinstance(value, tuple) else value


def test_everything_given_is_escaped() -> None:
    evil = "</style><script>alert(1)</script><img src=x onerror='alert(2)'>\"&{{ 7*7 }}\x00\ud800"
    data = swapped(sample(), evil)
    assert isinstance(data, ReportData)
    html = render(data)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if any(key.startswith("on") for key in attrs)]
    assert page.text.count("alert(1)") > 50 and "{{ 7*7 }}" in page.text
    assert "\x00" not in html
    html.encode()
    for svg in svgs(html):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/cat.png",
        "data:text/html;base64,AAAA",
        "data:text/html;base64,AAAA",
        'data:image/png;base64,AA" onload="x',
        "data:image/png;base64,",
        "",
    ],
)
def test_an_image_from_elsewhere_is_refused(source: str) -> None:
    good = png_uri(b"x")
    for make in (lambda: Picture(source), lambda: HeatMap(source, good, "a", 1), lambda: HeatMap(good, source, "a", 1)):
        with pytest.raises(UsageError, match="data URI"):
            make()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_figures_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    for part, make in {
        "training.ece": lambda: with_part("training", ece=bad),
        "serving.captured": lambda: with_part("serving", captured=bad),
        "checks.gates[0].evidence.figure": lambda: with_part(
            "checks", gates=(Gate("g", Evidence("g", bad, 0.0, 1.0)),)
        ),
        "origin.stages[0][1]": lambda: with_part("origin", stages=(("train", bad),)),
        "created_at": lambda: ReportData("t", created_at=bad),
    }.items():
        with pytest.raises(UsageError, match=re.escape(f"report.{part} is {bad}")):
            make()


def test_a_confusion_matrix_fits_its_classes() -> None:
    with pytest.raises(UsageError, match="2 rows for 3 classes"):
        Training(share("a", 1, 2), classes=("a", "b", "c"), confusion=((1, 0), (0, 1)))


def test_worst_confusions_come_first() -> None:
    t = Training(share("a", 1, 2), classes=("a", "b", "c"), confusion=((5, 1, 0), (4, 9, 2), (0, 0, 1)))
    assert t.worst(2) == [("b", "a", 4), ("b", "c", 2)]
    assert 'class="heat"' in render(ReportData("t", training=t))
    many = tuple(str(i) for i in range(25))
    none = tuple(tuple(0 for _ in many) for _ in many)
    page = render(ReportData("t", training=Training(share("a", 1, 2), classes=many, confusion=none)))
    assert 'class="heat"' not in page and "<dd>none</dd>" in page


@pytest.mark.parametrize(
    ("mine", "other", "said"),
    [
        ((0.8, 0.96), (0.7, 0.8), "enough to be right 95% of the time; picking at random had not got there after 20."),
        ((0.8, 0.96), (0.7, 0.96), "picking at random took 20, so nothing was saved this time."),
        ((0.8, 0.9), (0.7, 0.96), "(90% right after 20 answers), while picking at random took 20 answers."),
    ],
)  # fmt: skip
def test_savings_are_told_honestly(mine: tuple[float, ...], other: tuple[float, ...], said: str) -> None:
    q = Questions(20, 2, Series("margin", (10, 20), mine), Series("random", (10, 20), other, style="quiet"), 0.95)
    assert said in Page(render(ReportData("t", questions=q))).text


def test_a_failed_check_is_told_in_words() -> None:
    gates = (
        Gate("Accuracy", Evidence("accuracy", 0.9, 0.88, 0.92, 500, 0.95, passed=False)),
        Gate("Parity", Evidence("parity", 0.01, 0.0, 0.02, 500, 0.05, "at_most", True)),
    )
    page = Page(render(ReportData("t", checks=Checks(gates))))
    assert "passed 1 of 2, so it may not be served" in page.text and "✗ failed" in page.text and "✓ passed" in page.text
    unset = Checks((Gate("Size", Evidence("size", 12_345_678.0, 12_345_678.0, 12_345_678.0), form="number"),))
    text = Page(render(ReportData("t", checks=unset))).text
    assert "no limit was set here" in text and "1.23 × 10⁷" in text and "passed all" not in text


def test_json_round_trip_of_the_sample() -> None:
    text = to_json(sample())
    assert from_json(text) == sample()
    assert render(from_json(text)) == render(sample())
    assert json.loads(text)["pool"]["examples"] == 1297


words = st.text(max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)


counts, texts = st.integers(0, 10**9), st.dictionaries(words, words)
estimates = st.builds(Estimate.of_counts, words, st.just(3), st.integers(3, 99))
findings = st.builds(
    Finding, words, words, words, st.just("class_drift"), words, finite, finite, finite, finite,
    st.floats(0, 1), counts,
    detail=st.dictionaries(words, words | counts),
)  # fmt: skip
reports = st.builds(
    ReportData,
    words,
    words,
    st.floats(0, 4e9),
    pool=st.none() | st.builds(Pool, counts, classes=st.lists(words).map(tuple), how=words),
    training=st.none() | st.builds(Training, estimates, ece=st.none() | finite),
    monitoring=st.none() | st.builds(Monitoring, counts, st.lists(findings).map(tuple)),
    origin=st.none()
    | st.builds(Origin, words, counts, words, texts, texts, st.lists(st.tuples(words, st.floats(0, 1e6))).map(tuple)),
)


@settings(max_examples=60)
@given(reports)
def test_json_round_trip(data: ReportData) -> None:
    assert from_json(to_json(data)) == data
    Page(render(data))


def test_json_of_numpy_values_is_plain() -> None:
    detail = {"share": np.float32(0.5), "counts": np.arange(3)}
    gate = Gate("g", Evidence("g", np.float64(0.5), 0.25, 0.75, detail=detail))  # type: ignore[arg-type]
    read = from_json(to_json(ReportData("t", checks=Checks((gate,)))))
    assert read.checks and read.checks.gates[0].evidence.detail == {"share": 0.5, "counts": [0, 1, 2]}


def test_json_says_what_it_cannot_hold() -> None:
    gate = Gate("g", Evidence("g", 0.5, 0.25, 0.75, detail={"file": object()}))
    with pytest.raises(UsageError, match="object"):
        to_json(ReportData("t", checks=Checks((gate,))))
    with pytest.raises(UsageError, match="JSON cannot hold"):
        to_json(ReportData("\ud800"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"title": 3}', '{"title": "t", "pool": {"examples": "many"}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        from_json(text)
    assert isinstance(caught.value, TrilobeError)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium) to open the report")
def test_a_browser_shows_every_section(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(sample()), encoding="utf-8")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--dump-dom",
    ]  # fmt: skip
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)  # type: ignore[arg-type]
    seen = Page(done.stdout.decode().split(">", 1)[1])  # after the doctype
    headings = [f"{i} {s.heading}" for i, s in enumerate(SECTIONS, 1)]
    assert all(heading in seen.text for heading in headings), seen.text[:500]
    assert sum(tag == "svg" for tag, _ in seen.tags) == 10
