"""The model card: it says what is known, shows what is not, and no name can break it."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import UsageError
from trilobe.trust.card import model_card
from trilobe.trust.checks import gate
from trilobe.types import Evidence, LabelSpace, Model

NASTY = [
    "a\"b'c",
    "pipe | pipe",
    "two\nlines",
    "\n---\nlicense: evil\n---\n",
    "# heading\r\n- item",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1)) `code` *bold* ```",
    "back\\slash: {yaml: true} & *anchor !tag %",
    "\u2028\x85\x00\ufeff\ud800\U000e0001",
    "日本語 – é 🙂",
    "",
]


def model(names: tuple[str, ...] = ("cat", "dog"), **more: Any) -> Model:
    fields = {
        "preprocessing": {"height": 8, "width": 8, "channels": 1},
        "network": {"name": "small", "width": 16},
        "origin": {"version": "0.1.0", "seed": 7, "data": "sha256:12ab"},
        "temperature": 1.25,
        "created_at": 1.7e9,
    }
    return Model("m-1", "image_classification", LabelSpace(names), "ab" * 32, **(fields | more))


EVIDENCE = gate(
    [
        Evidence("accuracy", 0.93, 0.9, 0.95, n=400),
        Evidence("ece", 0.02, 0.01, 0.04, n=400),
        Evidence("parity", 3e-7, 3e-7, 3e-7, n=400),
        Evidence("robust_accuracy@0.02", 0.8, 0.74, 0.85, n=200, detail={"eps": 0.02, "status": "measured"}),
        Evidence("robust_accuracy@0.1", 0.7, 0.63, 0.76, n=200, detail={"status": "inconclusive: zero gradients"}),
    ],
    {"accuracy": 0.9, "ece": 0.01, "robust_accuracy@0.05": 0.5},
)


def front_matter(page: str) -> Any:
    """The subset of YAML that the card uses: blocks by indentation, scalars as JSON. Anything else is an error."""
    opening, front, _ = page.split("---\n", 2)
    assert opening == ""
    lines = []
    for line in front.splitlines():
        assert line.isprintable()
        while match := re.match(r"( *)- (?=[a-z-]+:)(.*)", line):  # the first key of a mapping in a list
            lines.append((len(match[1]), "-", ""))
            line = match[1] + "  " + match[2]
        match = re.fullmatch(r"( *)(-|[a-z_-]+:)(?: (.+))?", line)
        assert match, line
        lines.append((len(match[1]), match[2].rstrip(":"), match[3] or ""))

    def block(at: int, indent: int) -> tuple[Any, int]:
        found: Any = [] if lines[at][1] == "-" else {}
        while at < len(lines) and lines[at][0] == indent:
            _, key, scalar = lines[at]
            if scalar:
                value, at = json.loads(scalar), at + 1
            else:
                value, at = block(at + 1, lines[at + 1][0])
            found.append(value) if key == "-" else found.update({key: value})
        return found, at

    value, end = block(0, 0)
    assert end == len(lines)
    return value


def tables(page: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return found[:-1]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front = front_matter(model_card(model(), EVIDENCE, {"project": "pets", "license": "apache-2.0", "dataset": "p"}))
    [entry] = front.pop("model-index")
    assert front == {
        "license": "apache-2.0",
        "library_name": "trilobe",
        "pipeline_tag": "image-classification",
        "tags": ["trilobe", "active-learning", "image-classification"],
    }
    assert entry["name"] == "pets"
    [result] = entry["results"]
    assert result["task"] == {"type": "image-classification", "name": "Image classification"}
    assert result["dataset"] == {"name": "p", "type": "private"}
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures == {e.check: e.figure for e in EVIDENCE[:-1]}  # the last was not measured
    assert "value: 3.0e-07\n" in model_card(model(), EVIDENCE)  # YAML 1.1 takes 3e-07 for a string


def test_without_evidence_there_are_no_results() -> None:
    page = model_card(model(), [])
    assert "model-index" not in front_matter(page) and "license" not in front_matter(page)
    assert "Nothing was measured." in page and "nothing is known of this model under attack" in page


def test_figures_intervals_gates_and_failures_are_shown() -> None:
    page = model_card(model(), EVIDENCE)
    evaluation, robustness = tables(page)
    assert evaluation[2] == ["Accuracy", "0.93", "0.9 to 0.95", "400", "at least 0.9", "passed"]
    assert evaluation[3] == ["Expected calibration error", "0.02", "0.01 to 0.04", "400", "at most 0.01", "**failed**"]
    assert evaluation[4][1:3] == ["3e-07", "exact"]
    assert evaluation[-1][1:] == ["not measured", "–", "0", "at least 0.5", "**failed**"]
    assert [row[0] for row in robustness[2:]] == ["0.02", "0.1"]
    assert "1 of 3 gates passed." in page
    limits = page.split("## Limits")[1].split("##")[0]
    assert "0.02" in limits and "not measured" in limits and "inconclusive: zero gradients" in limits
    assert "1.25" in page.split("## Calibration")[1].split("##")[0]


def test_what_nobody_stated_is_shown_as_such() -> None:
    page = model_card(model(), EVIDENCE)
    use = page.split("## Intended use")[1].split("##")[0]
    assert use.count("*not stated*") == 5
    stated = model_card(model(), EVIDENCE, {"owner": "the lab", "intended_use": "sorting", "limits": "no night"})
    assert "- **Owner:** the lab\n" in stated and "- **Intended use:** sorting\n" in stated
    assert "- Stated by its makers: no night." in stated


def test_data_and_people() -> None:
    people = [{"name": "ann", "quality": 0.91, "n_answers": 1200}, {"name": "bob | co", "quality": None}]
    page = model_card(model(), EVIDENCE, {"n_examples": 5000, "n_answers": 1200, "annotators": people})
    assert "- **Examples:** 5,000\n- **Answers:** 1,200" in page
    assert tables(page)[0][2:] == [["ann", "1,200", "0.91"], [r"bob \| co", "*not stated*", "–"]]


def test_how_to_use_is_a_request_the_protocol_knows() -> None:
    page = model_card(model(), EVIDENCE, {"project": "my pets'; rm -rf /"})
    [request] = re.findall(r"-d '(.*)'", page)
    [tensor] = json.loads(request)["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("image", "UINT8", [1, 8, 8, 1])
    assert '"$URL/v2/models/my-pets-rm--rf/infer"' in page
    assert "ab" * 32 in page


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_the_page(name: str) -> None:
    check_injection(name)


@given(st.text(max_size=40))
def test_no_text_breaks_the_page(name: str) -> None:
    check_injection(name)


def check_injection(name: str) -> None:
    """The page with a nasty name everywhere has the outline and the tables of the page with a plain one."""

    def page(text: str) -> str:
        facts = dict.fromkeys(("project", "owner", "license", "intended_use", "limits", "dataset", "endpoint"), text)
        people = [{"name": text, "quality": 0.5, "n_answers": 1}]
        evidence = [*EVIDENCE, Evidence(text, 0.5, 0.4, 0.6, n=10, detail={"status": text})]
        made = model((text, "other one"), network={text: text}, origin={"k": [text]}, preprocessing={text: 1})
        return model_card(made, evidence, {**facts, "annotators": people})

    nasty, plain = page(name), page("plain")
    nasty.encode("utf-8")
    lines, expected = nasty.splitlines(), plain.splitlines()
    body = lines.index("---", 1)
    assert lines[0] == "---" == lines[body] and lines.count("---") == 2
    assert [line for line in lines if line.startswith("## ")] == [line for line in expected if line.startswith("## ")]
    assert len(lines[body:]) == len(expected[expected.index("---", 1) :])
    assert [[len(r) for r in t] for t in tables(nasty)] == [[len(r) for r in t] for t in tables(plain)]
    assert not re.search(r"(?<!\\)<", nasty[nasty.index("\n# ") :])
    front = front_matter(nasty)
    assert set(front) <= {"license", "library_name", "pipeline_tag", "tags", "model-index"}
    [result] = front["model-index"][0]["results"]
    assert result["metrics"][-1]["value"] == 0.5
    if name.isprintable() and " ".join(name.split()) == name != "":
        assert front["license"] == front["model-index"][0]["name"] == result["dataset"]["name"] == name


def test_an_unknown_fact_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\['licence'\].*license"):
        model_card(model(), [], {"licence": "mit"})
