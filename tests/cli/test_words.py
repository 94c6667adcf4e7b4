"""Results as words and as JSON: nothing is lost on the way, and nothing breaks it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.cli.words import exit_code, plain, table, words
from trilobe.loop import Added, Labeled, Ran
from trilobe.types import Endpoint, Evidence, Question

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=20)


@given(VALUES)
def test_any_value_is_json(value: object) -> None:
    def expected(v: object) -> object:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {k: expected(x) for k, x in v.items()}
        return [expected(x) for x in v] if isinstance(v, list) else v

    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected(value)


def test_nouns_and_arrays_are_json() -> None:
    noun = Evidence("ece", math.nan, np.float64(0.1), 0.2, n=np.int64(5), detail={"bins": np.arange(2)})
    found = plain({"e": (noun,), "path": Path("a")})
    assert found["e"][0]["figure"] is None and found["e"][0]["detail"] == {"bins": [0, 1]}
    assert found["path"] == "a" and json.dumps(found)


@given(VALUES)
def test_any_value_has_words(value: object) -> None:
    assert isinstance(words("show", value), str)


@pytest.mark.parametrize(
    ("verb", "result", "said"),
    [
        ("add", Added(("a", "b"), {"x": "a"}, {"y": "bad"}, 1), "2 added, 1 with their true label, 1 dup.*, 1 refused"),
        ("label", Labeled(0, 3, 0, {}, 2), "^0 new answers, 3 known already, 2 questions open$"),
        ("run", Ran("waiting", (), open=4), "4 questions wait for answers: trilobe label"),
        ("serve", Endpoint("pets", "http://h:1", "b1", "ready", 7), "pets is ready at http://h:1 with bundle b1"),
        ("serve", Endpoint("pets", "http://h:1", "b1", "stopped"), "^pets is stopped$"),
        ("export", "-", "^$"),
        ("report", Path("r.html"), "r.html"),
        ("check", [Evidence("ece", 0.2, 0.1, 0.3, 9, 0.1, "at_most", False)], r"(?s)ece .*0\.2 .*<= 0\.1 .*FAILED"),
        ("query", [Question("q", "e" * 64, reason="torn", assignees=("ann",))], "(?s)ann.*torn.*next: trilobe label"),
    ],
)
def test_what_people_read(verb: str, result: object, said: str) -> None:
    import re

    assert re.search(said, words(verb, result)), words(verb, result)


def test_exit_codes() -> None:
    failed = Evidence("ece", 0.2, 0.1, 0.3, 9, 0.1, "at_most", False)
    assert [exit_code(r) for r in ([failed], [], None, "x", Ran("budget", ()))] == [3, 0, 0, 0, 0]


def test_markup_in_names_is_text() -> None:
    assert "[red]x[/red]" in table(["name"], [["[red]x[/red]"]])


def test_names_that_are_no_text_can_be_shown() -> None:
    table(["name"], [["caf\udce9.png"]]).encode("utf-8")
