"""``show``, ``export`` and ``report``: what a project holds, for people, for other programs, and as a page."""

import contextlib
import csv
import functools
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trilobe.config import as_dict
from trilobe.errors import NotEnoughData, NotFoundError, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure import endpoint as endpoints
from trilobe.loop.believing import unpack_beliefs
from trilobe.loop.deferring import waiting
from trilobe.loop.project import UNASKED, Project, annotators, opened, tell
from trilobe.loop.tables import written
from trilobe.types import NO_PERSON

Kept = Literal["labels", "answers", "questions", "model"]


def show(what: str = "", project: "Project | Path | str" = ".") -> dict[str, Any]:
    """Show where a project stands, or one thing in it.

    Args:
        what: config, annotators, models, evidence, bundles, findings, or the id (or first letters) of an example, a
            model, a bundle or a finding; nothing for the overview.
        project: the project's folder.

    Example:
        trilobe show
        trilobe show findings
        trilobe show 3f2a91
    """
    with opened(project) as p:
        listed = p.store.findings
        lists: dict[str, Any] = {
            "": lambda: _overview(p),
            "config": lambda: as_dict(p.config),
            "annotators": lambda: {"annotators": list(annotators(p))},
            "models": lambda: {"models": [_brief(m) for m in p.store.models()]},
            "evidence": lambda: {"evidence": p.store.evidence(p.store.model().id)},
            "bundles": lambda: {"bundles": [_chosen(b, "id", "model_id", "path") for b in p.store.bundles()]},
            "findings": lambda: {"findings": [{**_fields(f), "capture_ids": len(f.capture_ids)} for f in listed()]},
        }
        if what in lists:
            found: dict[str, Any] = lists[what]()
            return found
        return _one(p, what)


def _overview(p: Project) -> dict[str, Any]:
    questions, model = [q for q in p.store.questions() if q.strategy not in UNASKED], p.newest_model()
    pool = {e.id for e in p.store.examples("pool")}
    said = [a for a in p.store.answers() if a.example_id in pool]
    out: dict[str, Any] = {
        "project": p.config.project.name,
        "examples": p.store.count_examples(),
        "questions": {"asked": len(questions), "open": len(p.store.questions(open_only=True))},
        "answers": {"current": len(said), "superseded": p.store.count_superseded()},
        "annotators": len({a.annotator for a in said}.difference(NO_PERSON)),
        "model": _brief(model) if model else None,
        "evidence": {e.check: e.figure for e in p.store.evidence(model.id)} if model else {},
        "bundles": [b.id for b in p.store.bundles()],
        "endpoints": [],
        "findings": len(p.store.findings()),
    }
    for folder in sorted((p.state / "endpoints").glob("*")):
        with contextlib.suppress(NotFoundError):  # one that never came up
            out["endpoints"].append(_fields(endpoints.status(folder)) | _why(endpoints.read_state(folder)))
    out["waiting"], unasked = waiting(p)  # for people
    out["next"] = "trilobe query" if unasked else _next(p, out)
    return out


def _why(state: endpoints.State) -> dict[str, str]:
    """What does not answer behind an endpoint, or why the last bundle was refused; which settings are not in force.

    Nothing where all is well.
    """
    why = state.error or "; ".join(f"{name}: {model.error}" for name, model in state.models.items() if model.error)
    return {key: said for key, said in (("why", why), ("settings", state.notice)) if said}


def _next(p: Project, now: Mapping[str, Any]) -> str:
    """The command a newcomer would want now."""
    if not now["examples"].get("pool"):
        return "trilobe add FOLDER"
    if now["questions"]["open"]:
        return "trilobe label"
    if now["waiting"]:
        return "trilobe deliver"
    if not now["answers"]["current"]:
        return "trilobe query"
    if not now["model"]:
        return "trilobe train"
    if "parity" not in now["evidence"]:
        return "trilobe check"
    if not now["bundles"]:
        return "trilobe package"
    if not any(e["state"] == "ready" for e in now["endpoints"]):
        return "trilobe serve --background"
    return "trilobe query --finding newest" if now["findings"] else "trilobe monitor"


def _one(p: Project, what: str) -> dict[str, Any]:
    for kind, get in (("model", p.store.model), ("bundle", p.store.bundle), ("finding", p.store.finding)):
        with contextlib.suppress(NotFoundError):
            return {kind: _fields(get(what))}
    hits = [e for e in p.store.examples() if e.id.startswith(what) or e.name == what or Path(e.name).name == what]
    if len(hits) != 1:
        raise NotFoundError(
            f"{len(hits)} examples, and no model, bundle or finding, called {what!r}",
            expected="one",
            hint="trilobe show, for what there is",
        )
    example = hits[0]
    answers = p.store.answers(example_ids=[example.id])
    return {
        "example": _fields(example),
        "questions": [_fields(q) for q in p.store.questions() if q.example_id == example.id],
        "answers": [{**_chosen(a, "annotator", "seconds"), "label": written(a.response)} for a in answers],
        "belief": _belief(p, example.id),
    }


def _belief(p: Project, example_id: str) -> dict[str, float]:
    kept = p.store.recorded("aggregate")
    beliefs = unpack_beliefs(p.store.blobs.get(kept["beliefs"])) if kept else []
    for b in beliefs:
        if b.example_id == example_id and b.proba.ndim == 1:
            top = sorted(zip(p.space.names, b.proba.tolist(), strict=True), key=lambda kv: -kv[1])
            return {name: round(v, 4) for name, v in top[:5]}
    return {}


def _brief(model: Any) -> dict[str, Any]:
    return {"id": model.id, "trained_on": model.origin.get("n_examples"), "answers": model.origin.get("n_answers"),
            "temperature": round(model.temperature, 4), **model.metrics}  # fmt: skip


def _chosen(noun: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(noun, name) for name in names}


def _fields(noun: Any) -> dict[str, Any]:
    return _chosen(noun, *noun.__dataclass_fields__)


def export(what: Kept = "labels", project: "Project | Path | str" = ".", to: str = "-") -> str:
    """Write labels, answers, open questions or the model to a file.

    Labels are the most probable class of each answered example, with its probability. Questions are those still open,
    in the form ``trilobe label`` reads: fill in the column label.

    Args:
        what: labels, answers, questions (CSV) or model (ONNX).
        project: the project's folder.
        to: a file; "-" is stdout.

    Returns:
        The path written, "-" for stdout.

    Example:
        trilobe export questions --to questions.csv
        trilobe export model --to model.onnx
    """
    with opened(project) as p:
        if what == "model":
            from trilobe.loop.promoting import onnx_graph

            data = onnx_graph(p, p.store.model())
        elif what in ("labels", "answers", "questions"):
            rows = list({"labels": _labels, "answers": _answers, "questions": _questions}[what](p))
            if not rows:
                raise NotEnoughData(f"there are no {what} to export", hint=_next(p, _overview(p)))
            data = _table(rows)
        else:
            raise UsageError(f"export {what!r}", expected="labels, answers, questions or model")
    if to == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    else:
        write_atomically(Path(to), data)
        tell(f"wrote {to}")
    return to


def _labels(p: Project) -> Iterator[dict[str, Any]]:
    names = {e.id: e.name for e in p.store.examples("pool")}
    kept = p.store.recorded("aggregate")
    if not kept:
        raise NotEnoughData("there are no labels to export", hint=_next(p, _overview(p)))
    for b in unpack_beliefs(p.store.blobs.get(kept["beliefs"])):
        said, probability = p.task.response(b.proba, p.space, functools.partial(p.item, b.example_id))
        yield {"example": b.example_id, "name": names.get(b.example_id, ""), "label": written(said),
               "probability": round(probability, 6), "answers": b.n_answers}  # fmt: skip


def _answers(p: Project) -> Iterator[dict[str, Any]]:
    for a in p.store.answers():
        yield {"example": a.example_id, "annotator": a.annotator, "seconds": a.seconds, "answered_at": a.answered_at,
               "label": written(a.response)}  # fmt: skip


def _questions(p: Project) -> Iterator[dict[str, Any]]:
    names = {e.id: e.name for e in p.store.examples()}
    said = {(a.question_id, a.annotator) for a in p.store.answers()}
    for q in p.store.questions(open_only=True):
        for who in q.assignees or ("",):
            if (q.id, who) not in said:
                yield {"example": q.example_id, "name": names[q.example_id], "annotator": who, "label": "",
                       "asked": "|".join(q.choices), "reason": q.reason}  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")  # a file name may be no text


def report(project: "Project | Path | str" = ".", to: str = "") -> Path:
    """Write everything there is to tell as one HTML page.

    The page opens from disk, without a server or a network: what was asked and why, how good each annotator is, what
    the model can do, which gates it passed, what monitoring found and why, and what the repair brought.

    Args:
        project: the project's folder.
        to: the file; report.html in the project's folder by default.

    Returns:
        The path of the page.

    Example:
        trilobe report --to report.html
    """
    from trilobe.loop.story import story
    from trilobe.web.report import render

    with opened(project) as p:
        path = Path(to) if to else p.folder / "report.html"
        write_atomically(path, render(story(p)).encode())
        p.store.record("report", {"path": str(path), "at": time.time()})
        return path
