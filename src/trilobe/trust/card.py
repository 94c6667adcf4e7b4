"""The model card: one Markdown page that says what a model is, how it was made, what it was held to, and its limits.

The page opens with front matter as the Hugging Face Hub reads it (a ``model-index`` with each figure). Everything
is taken from the model, its evidence and the project's facts; what only a person can state and nobody stated is shown
as "not stated". Names come from users: none can break the front matter, a table or the page.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trilobe.errors import UsageError
from trilobe.trust.checks import in_words
from trilobe.types import Evidence, Model

NOT_STATED = "*not stated*"
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "ece": "Expected calibration error",
    "brier": "Brier score",
    "log_loss": "Log loss (nats)",
    "parity": "Largest difference of the export",
}
FACTS = {
    *("project", "n_examples", "n_answers", "annotators", "owner", "license", "dataset", "endpoint"),
    *("intended_use", "out_of_scope", "limits", "contact"),
}


def model_card(model: Model, evidence: Sequence[Evidence], facts: Mapping[str, Any] | None = None) -> str:
    """The model card as Markdown with front matter.

    Args:
        model: what the card is about.
        evidence: the outcome of the checks, gated or not, in the order to show.
        facts: what the model itself does not know, each optional: ``project``, ``dataset`` and ``endpoint`` (names),
            ``n_examples``, ``n_answers``, ``annotators`` (mappings with ``name``, ``n_answers`` and ``quality``, 0 to
            1), and what a person states: ``owner``, ``contact``, ``license``, ``intended_use``, ``out_of_scope``,
            ``limits``.

    Raises:
        UsageError: a fact of an unknown name.

    >>> from trilobe.types import LabelSpace
    >>> model = Model("m1", "image_classification", LabelSpace(("cat", "dog")), "ab12", {}, {"width": 16})
    >>> page = model_card(model, [Evidence("accuracy", 0.9, 0.85, 0.94, n=200)], {"project": "pets"})
    >>> page.splitlines()[:2]
    ['---', 'library_name: "trilobe"']
    >>> "| Accuracy | 0.9 | 0.85 to 0.94 | 200 | none | – |" in page
    True
    """
    known = dict(facts or {})
    if unknown := sorted(set(known) - FACTS):
        raise UsageError(
            f"the unknown facts {unknown} for a model card", expected="some of: " + ", ".join(sorted(FACTS))
        )
    title = _text(known.get("project") or model.id)
    sections = [
        f"---\n{_yaml(_front_matter(model, evidence, known))}---",
        f"# {title}",
        _what(model),
        _use(known),
        _data(model, known),
        _training(model),
        _evaluation(evidence),
        _robustness(model, evidence),
        _calibration(model, evidence),
        _limits(model, evidence, known),
        _how(model, known),
        _provenance(model),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(model: Model, evidence: Sequence[Evidence], facts: Mapping[str, Any]) -> dict[str, Any]:
    task = {"entity_recognition": "token-classification"}.get(model.task, model.task.replace("_", "-"))
    name = str(facts.get("project") or model.id)
    metrics = [{"name": _metric(e.check), "type": e.check, "value": float(e.figure)} for e in evidence if _measured(e)]
    dataset = {"name": str(facts.get("dataset") or name), "type": "private"}
    result = {"task": {"type": task, "name": task.replace("-", " ").capitalize()}, "dataset": dataset}
    front: dict[str, Any] = {"license": str(facts["license"])} if facts.get("license") else {}
    front |= {"library_name": "trilobe", "pipeline_tag": task, "tags": ["trilobe", "active-learning", task]}
    return front | ({"model-index": [{"name": name, "results": [result | {"metrics": metrics}]}]} if metrics else {})


def _what(model: Model) -> str:
    names = list(model.space.names)
    shown = ", ".join(_text(n) for n in names[:50]) + (f", and {len(names) - 50} more" if len(names) > 50 else "")
    made = time.strftime("%Y-%m-%d", time.gmtime(model.created_at)) if model.created_at else NOT_STATED
    rows = {"Task": _text(model.task.replace("_", " ")), "Classes": f"{len(names)}: {shown}", "Made": made}
    return "## What it is\n\n" + _listed(rows | {"Input": _settings(model.preprocessing)})


def _use(facts: Mapping[str, Any]) -> str:
    stated = ("owner", "contact", "license", "intended_use", "out_of_scope")
    rows = {key.replace("_", " ").capitalize(): _text(facts[key]) if facts.get(key) else NOT_STATED for key in stated}
    return "## Intended use\n\n" + _listed(rows)


def _data(model: Model, facts: Mapping[str, Any]) -> str:
    rows = {
        "Data set": _text(facts["dataset"]) if facts.get("dataset") else NOT_STATED,
        "Examples": _count(facts.get("n_examples")),
        "Answers": _count(facts.get("n_answers")),
    }
    people = facts.get("annotators") or []
    table = _table(
        ("Annotator", "Answers", "Estimated quality"),
        [
            (_text(p.get("name", "")), _count(p.get("n_answers")), "–" if q is None else _number(q))
            for p, q in ((p, p.get("quality")) for p in people)
        ],
    )
    note = "Estimated quality is the chance that an answer of theirs is right, as all answers together suggest."
    return "## Data and answers\n\n" + _listed(rows) + (f"\n\n{table}\n\n{note}" if people else "")


def _training(model: Model) -> str:
    return "## Training\n\n" + _listed({"Network": _settings(model.network), "Origin": _settings(model.origin)})


def _evaluation(evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return "## Evaluation\n\nNothing was measured."
    rows = [
        (_metric(e.check), *_figures(e), _gate(e), {True: "passed", False: "**failed**", None: "–"}[e.passed])
        for e in evidence
    ]
    table = _table(("Check", "Figure", "95% interval", "Examples", "Gate", "Verdict"), rows)
    gated = [e.passed for e in evidence if e.passed is not None]
    words = f"{sum(gated)} of {len(gated)} gates passed." if gated else "No gate was set."
    return f"## Evaluation\n\n{words}\n\n{table}"


ATTACKS = {
    "picture": "Accuracy when every value of an image (0 to 1) may change by up to eps, found by projected gradient "
    "descent. Each figure is an upper bound: a stronger attack can only lower it.",
    "text": "What is left of the first figure when a share eps of every text's words is hidden, the worst of several "
    "draws. Each figure is an upper bound, and no statement about words that somebody puts in their place.",
}


def _noun(model: Model) -> str:
    return "picture" if model.task == "image_classification" else "text"


def _robustness(model: Model, evidence: Sequence[Evidence]) -> str:
    rows = [
        (_number(e.detail.get("eps", e.check.split("@")[1])), *_figures(e), _text(_status(e)))
        for e in evidence
        if e.check.startswith("robust_accuracy@") and _measured(e)
    ]
    if not rows:
        return "## Robustness\n\nNot measured: nothing is known of this model under attack."
    words, name = ATTACKS[_noun(model)], "F1" if model.space.scheme else "Accuracy"
    return f"## Robustness\n\n{words}\n\n{_table(('eps', name, '95% interval', 'Examples', 'Status'), rows)}"


def _calibration(model: Model, evidence: Sequence[Evidence]) -> str:
    rows = {"Temperature": f"{_number(model.temperature)} (logits are divided by it)"}
    for e in evidence:
        if e.check in ("ece", "brier", "log_loss") and _measured(e):
            figure, interval, _ = _figures(e)
            rows[_metric(e.check)] = f"{figure} ({interval})"
    if len(rows) == 1:
        rows["Measured"] = "nothing: take its confidences with care"
    return "## Calibration\n\n" + _listed(rows)


def _limits(model: Model, evidence: Sequence[Evidence], facts: Mapping[str, Any]) -> str:
    lines = [f"Stated by its makers: {_text(facts['limits']) if facts.get('limits') else NOT_STATED}."]
    lines += [f"{_text(in_words(e))}." for e in evidence if e.passed is False or _status(e).startswith("inconclusive")]
    noun = _noun(model)
    if not model.space.scheme:
        lines.append(f"It gives one of its classes for any {noun}, also for one that shows none of them.")
    lines.append(f"The figures hold for {noun}s like those that it was measured on; elsewhere they can be worse.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _how(model: Model, facts: Mapping[str, Any]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(facts.get("endpoint") or facts.get("project") or "model")).strip("-.")
    name = name or "model"
    shape = [1, *(int(model.preprocessing.get(side, 1)) for side in ("height", "width", "channels"))]
    tensor: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": shape, "data": ["..."]}
    what = (
        f"`data` holds the {math.prod(shape)} bytes\nof the decoded image, row by row; an image of another size is "
        "resized as in training"
    )
    if _noun(model) == "text":
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["..."]}
        what = "`data` holds one or more texts"
    reply = "The reply's output `proba` holds a probability for each class, in the order above."
    if model.space.scheme:
        reply = (
            "The reply's output `entities` holds for each text a JSON list of its entities: start and end in\n"
            "characters, label, text and confidence; `proba` is about its least certain word."
        )
    return f"""## How to use

```sh
trilobe serve
```

Then, by the Open Inference Protocol (the URL is what `trilobe serve` prints; {what}):

```sh
curl "$URL/v2/models/{name}/infer" -H 'Content-Type: application/json' -d '{_json({"inputs": [tensor]})}'
```

{reply}"""


def _provenance(model: Model) -> str:
    return "## Provenance\n\n" + _listed({"Model": _text(model.id), "Weights (SHA-256)": _text(model.weights)})


def _status(e: Evidence) -> str:
    return str(e.detail.get("status", "measured"))


def _measured(e: Evidence) -> bool:
    return _status(e) != "not measured" and math.isfinite(e.figure)


def _metric(check: str) -> str:
    if check.startswith("robust_accuracy@"):
        return f"Accuracy under attack, eps {_text(check.split('@', 1)[1])}"
    return METRIC_NAMES.get(check) or _text(check)


def _figures(e: Evidence) -> tuple[str, str, str]:
    if not _measured(e):
        return "not measured", "–", str(e.n)
    return _number(e.figure), f"{_number(e.low)} to {_number(e.high)}" if e.low < e.high else "exact", str(e.n)


def _gate(e: Evidence) -> str:
    return "none" if e.threshold is None else f"{e.direction.replace('_', ' ')} {_number(e.threshold)}"


def _number(value: Any) -> str:
    return f"{float(value):.3g}"


def _count(value: Any) -> str:
    return NOT_STATED if value is None else f"{int(value):,}"


def _settings(values: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{_text(k)} {_text(v if isinstance(v, str) else _json(v))}" for k, v in values.items()) or NOT_STATED
    )


def _listed(rows: Mapping[str, str]) -> str:
    return "\n".join(f"- **{key}:** {value}" for key, value in rows.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    """Any value as plain text on one line of Markdown: characters that would format it or end its cell are escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&#$])", r"\\\1", _plain(str(value)))


def _json(value: Any) -> str:
    """JSON on one line, which is a YAML value too (YAML 1.2, 5.7)."""
    return _plain(json.dumps(value, ensure_ascii=False, default=str))


def _plain(text: str) -> str:
    """Line ends, control characters and others that no page can show become single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _yaml(value: Any, indent: str = "") -> str:
    """Block YAML of mappings, lists and scalars, each scalar as JSON writes it."""
    lines = []
    entries = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
    for key, item in entries:
        lead = f"{indent}{key}" if key == "-" else f"{indent}{key}:"
        if isinstance(item, Mapping | list) and item:
            block = _yaml(item, indent + "  ")
            lines.append(f"{lead} {block.lstrip()}" if key == "-" else f"{lead}\n{block}")
        else:
            lines.append(f"{lead} {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    """A number with the point that YAML 1.1 wants before an exponent, or JSON."""
    if isinstance(value, float):
        digits, _, exponent = repr(value).partition("e")
        return digits + ("" if "." in digits else ".0") + (f"e{exponent}" if exponent else "")
    return _json(value)
