"""Charts: they parse, tell the truth in pixels, never collide, escape names, and refuse data that cannot be drawn."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import NotEnoughData, TrilobeError, UsageError
from trilobe.statistics import wilson
from trilobe.web.charts import (
    Bin,
    Estimate,
    Series,
    Station,
    bars,
    before_after,
    line_chart,
    loop_diagram,
    paired_bars,
    percent,
    reliability_diagram,
    seconds,
    share_bars,
)

SVG = "{http://www.w3.org/2000/svg}"
share = Estimate.of_counts
EVIL = "<script>alert(\"x\")</script> & 'q' \x00\ud800"


def lines(*series: Series, target: float | None = None) -> str:
    return line_chart(series, title="t", x_label="answers", y_label="right", y_range=(0.5, 1.0), target=target)


CHARTS: dict[str, Callable[[str], str]] = {
    "line_chart": lambda name: lines(Series(name, (10, 20), (0.6, 0.9), (0.5, 0.8), (0.7, 0.95)), target=0.9),
    "reliability_diagram": lambda name: reliability_diagram([Bin(0.9, 0.8, 50), Bin(0.5, 0.5, 0)], title=name),
    "bars": lambda name: bars([share(name, 9, 10)], title=name),
    "paired_bars": lambda name: paired_bars([(share(name, 9, 10), 0.8)], title=name),
    "share_bars": lambda name: share_bars([share(name, 9, 10)], [0.1], title=name, flagged=[name]),
    "before_after": lambda name: before_after([(name, share("", 5, 10), share("", 9, 10))], title=name),
    "loop_diagram": lambda name: loop_diagram([Station(name, name, "#x")] * 10),
    "loop_diagram tall": lambda name: loop_diagram([Station(name)] * 10, tall=True),
}
every_chart = pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@every_chart
def test_parses_and_is_accessible(draw: Callable[[str], str]) -> None:
    root = ElementTree.fromstring(draw("seven"))
    assert root.tag == f"{SVG}svg"
    assert [child.tag for child in root][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text and root[1].text and root.get("role") in {"img", "group"}
    assert not [e for e in root.iter() if "id" in e.attrib], "an id would collide with that of the next chart"


@every_chart
def test_escapes_what_it_is_given(draw: Callable[[str], str]) -> None:
    svg = draw(EVIL)
    assert "<script" not in svg
    assert '"x"' in "".join(ElementTree.fromstring(svg).itertext())
    svg.encode()


@every_chart
@given(name=st.text(st.characters()))
def test_any_name_gives_well_formed_xml(draw: Callable[[str], str], name: str) -> None:
    ElementTree.fromstring(draw(name))


@every_chart
def test_every_coordinate_is_finite_and_inside(draw: Callable[[str], str]) -> None:
    root = ElementTree.fromstring(draw("seven"))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for e in root.iter():
        for key in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy"):
            if key in e.attrib:
                limit = width if key in {"x", "x1", "x2", "cx"} else height
                assert 0 <= float(e.attrib[key]) <= limit, (e.tag, key, e.attrib)
    assert "nan" not in ElementTree.tostring(root, "unicode").lower()


def test_colors_follow_the_page_and_stand_alone() -> None:
    for draw in CHARTS.values():
        colors = re.findall(r"(?:fill|stroke):([^;\"]+)", draw("seven"))
        assert colors
        assert all(c == "none" or re.fullmatch(r"var\(--\w+, #[0-9a-f]{6}\)", c) for c in colors), set(colors)


def test_line_chart_puts_points_where_they_belong() -> None:
    svg = lines(Series("margin", (0, 50, 100), (0.5, 0.75, 1.0)))
    dots = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in ElementTree.fromstring(svg).iter(f"{SVG}circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_line_chart_writes_when_the_target_is_reached() -> None:
    fast, slow = Series("fast", (10, 37, 90), (0.6, 0.9, 0.95)), Series("slow", (10, 37, 90), (0.6, 0.8, 0.85))
    assert fast.reaches(0.9) == 37 and slow.reaches(0.9) is None
    words = texts(lines(fast, slow, target=0.9))
    assert words.count("37") == 1 and "target 90%" in words and "fast 95%" in words and "slow 85%" in words
    assert "37" not in texts(lines(fast, slow))


def test_line_chart_keeps_labels_apart() -> None:
    same = [Series(name, (1, 2), (0.6, 0.9)) for name in ("one", "two", "three")]
    root = ElementTree.fromstring(lines(*same))
    ys = sorted(float(t.get("y", 0)) for t in root.iter(f"{SVG}text") if (t.text or "").endswith(" 90%"))
    assert len(ys) == 3 and min(b - a for a, b in pairwise(ys)) >= 17


def test_one_point_and_equal_points_are_drawn() -> None:
    ElementTree.fromstring(lines(Series("one", (20,), (0.7,)), target=0.7))
    ElementTree.fromstring(lines(Series("flat", (20, 20), (0.7, 0.7))))
    ElementTree.fromstring(bars([Estimate("none", 0, 0, 0)], title="t", form="seconds"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_bars_are_as_long_as_their_values(values: list[float]) -> None:
    svg = bars([Estimate("x", v, v, v) for v in values] + [Estimate("x", 1, 1, 1)], title="t")
    *drawn, whole = [float(r.get("width", 0)) for r in ElementTree.fromstring(svg).iter(f"{SVG}rect")]
    for value, width in zip(values, drawn, strict=True):
        assert width == pytest.approx(max(1.0, value * whole), abs=0.11)


def test_bars_tell_kinds_apart_without_color() -> None:
    rects = [
        r.get("style", "")
        for r in ElementTree.fromstring(paired_bars([(share("ada", 9, 10), 0.8)], title="t")).iter(f"{SVG}rect")
    ]
    assert ["fill-opacity:0;" in r for r in rects] == [False, True]


def test_flagged_shares_are_marked_in_words() -> None:
    svg = share_bars([share("a", 30, 100), share("b", 2, 100)], [0.1, 0.2], title="t", flagged=["a", "b"])
    assert {"▲ 30%, was 10%", "▼ 2%, was 20%"} <= set(texts(svg))
    assert "▲" not in share_bars([share("a", 30, 100)], [0.1], title="t")


def test_reliability_draws_the_wilson_interval() -> None:
    root = ElementTree.fromstring(reliability_diagram([Bin(0.9, 0.8, 50)]))
    diagonal = next(e for e in root.iter(f"{SVG}line") if "dasharray" in e.get("style", ""))
    zero, one = float(diagonal.get("y1", 0)), float(diagonal.get("y2", 0))
    whisker = next(e for e in root.iter(f"{SVG}line") if "stroke-width:2" in e.get("style", ""))
    drawn = sorted((zero - float(whisker.get(y, 0))) / (zero - one) for y in ("y1", "y2"))
    assert drawn == pytest.approx(sorted(wilson(40, 50)), abs=0.001)


def test_long_names_are_shortened_but_told_in_full() -> None:
    name = "a very long class name that nobody reads"
    svg = bars([share(name, 1, 2)], title="t")
    assert any(t.endswith("…") and len(t) == 20 for t in texts(svg)) and name in svg


def test_a_station_not_reached_is_hollow() -> None:
    root = ElementTree.fromstring(loop_diagram([Station("a", "1")] * 4 + [Station("b")] * 6))
    fills = [c.get("style", "").split(";")[0] for c in root.iter(f"{SVG}circle")]
    assert len(set(fills[:4])) == 1 and len(set(fills[4:])) == 1 and fills[0] != fills[4]
    assert texts(ElementTree.tostring(root, "unicode")).count("not yet") == 6


@pytest.mark.parametrize(
    "broken",
    [
        lambda: lines(),
        lambda: Series("empty", (), ()),
        lambda: bars([], title="t"),
        lambda: paired_bars([], title="t"),
        lambda: share_bars([], [], title="t"),
        lambda: before_after([], title="t"),
        lambda: reliability_diagram([]),
        lambda: reliability_diagram([Bin(0.5, 0.5, 0)]),
        lambda: share("of nothing", 0, 0),
    ],
)
def test_nothing_to_draw_is_an_error(broken: Callable[[], object]) -> None:
    with pytest.raises(NotEnoughData):
        broken()


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Series("nan", (1,), (math.nan,)),
        lambda: Series("infinite", (math.inf,), (0.5,)),
        lambda: Series("uneven", (1, 2), (0.5,)),
        lambda: Series("half a band", (1,), (0.5,), low=(0.4,)),
        lambda: Estimate("nan", math.nan, 0, 1),
        lambda: Estimate("reversed", 0.5, 0.6, 0.4),
        lambda: Bin(math.nan, 0.5, 3),
        lambda: Bin(1.5, 0.5, 3),
        lambda: share_bars([share("a", 1, 2)], [math.nan], title="t"),
        lambda: share_bars([share("a", 1, 2)], [0.1, 0.2], title="t"),
        lambda: lines(Series("a", (1,), (0.5,)), target=math.nan),
        lambda: line_chart([Series("a", (1,), (0.5,))], title="t", x_label="x", y_label="y", y_range=(1, 0)),
        lambda: loop_diagram([Station("a")]),
    ],
)
def test_wrong_data_is_an_error_that_says_what_was_expected(broken: Callable[[], object]) -> None:
    with pytest.raises(UsageError) as caught:
        broken()
    assert isinstance(caught.value, TrilobeError) and caught.value.expected


@given(st.floats(0, 1))
def test_percent_is_near_and_never_overstates(value: float) -> None:
    text = percent(value)
    assert abs(float(text.strip("<>%")) - 100 * value) <= 0.1
    assert (text == "100%") == (value == 1) and (text == "0%") == (value == 0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "0.4 ms"), (0.25, "250 ms"), (1, "1.0 s"), (59.96, "1 min 0 s"), (119.7, "2 min 0 s")]
)
def test_seconds_carry_over(value: float, text: str) -> None:
    assert seconds(value) == text
