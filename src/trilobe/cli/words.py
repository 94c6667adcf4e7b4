"""Results as words for people and as plain values for machines; progress on the terminal."""

import dataclasses
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def plain(value: Any) -> Any:
    """Any result as values that JSON can hold.

    >>> plain({"path": Path("a"), "x": (1, float("nan"))})
    {'path': 'a', 'x': [1, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def exit_code(result: Any) -> int:
    """3 when a gate failed or the monitor alarms, else 0."""
    if getattr(result, "verdict", "") == "alarm":
        return 3
    return 3 if isinstance(result, list) and any(getattr(e, "passed", None) is False for e in result) else 0


def words(verb: str, result: Any) -> str:
    """A result as people read it."""
    return _WORDS.get(verb, _default)(result)


class _Rate(ProgressColumn):
    """How many a second, of late."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "")


class Terminal:
    """A listener that shows remarks and bars on stderr; without bars when stderr is not a terminal.

    Bars are drawn only while something counts, so that a prompt has the screen to itself.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("left"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def __call__(self, message: str, done: int = 0, total: int = 0) -> None:
        """Show a remark, or move a bar."""
        if not total:
            text = message.encode("utf-8", "replace").decode()
            hang = " " * (len(text) - len(text.lstrip(" ")) + 2)
            for line in text.splitlines() or [""]:
                wrapped = textwrap.fill(
                    line,
                    max(40, self.console.width),
                    subsequent_indent=hang,
                    break_on_hyphens=False,
                    break_long_words=False,
                )
                self.console.print(wrapped, markup=False, soft_wrap=True)
            return
        if message not in self.bars:
            self.progress.start()
            self.bars[message] = self.progress.add_task(message, total=total)
        self.progress.update(self.bars[message], completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.bars.pop(message))
        if not self.bars:
            self.progress.stop()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under headings, as text; numbers to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(r[i], int | float) or str(r[i])[:1].isdigit() for r in rows)
        made.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        made.add_row(*[Text(str(cell).encode("utf-8", "replace").decode()) for cell in row])  # no markup
    console = Console(width=140, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(made)
    return captured.get().rstrip()


def _default(result: Any) -> str:
    if isinstance(result, Path | str):
        return str(result)
    return _tree(plain(result)) or "nothing"


def _tree(value: Any, indent: str = "") -> str:
    if isinstance(value, dict):
        width = max((len(k) for k in value), default=0)
        lines = []
        for k, v in value.items():
            nested = isinstance(v, dict | list) and v
            lines.append(f"{indent}{k}\n{_tree(v, indent + '  ')}" if nested else f"{indent}{k:<{width}}  {_scalar(v)}")
        return "\n".join(lines)
    if isinstance(value, list):
        if (
            value
            and all(isinstance(v, dict) and list(v) == list(value[0]) for v in value)
            and not any(isinstance(x, dict) for v in value for x in v.values())
        ):
            rows = [[_scalar(x) for x in v.values()] for v in value]
            return "\n".join(indent + line for line in table(list(value[0]), rows).splitlines())
        return "\n".join(f"{indent}{_scalar(v) if not isinstance(v, dict) else _tree(v, indent)}" for v in value)
    return indent + _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_scalar, value)) if isinstance(value, list) else str(value)


def _added(r: Any) -> str:
    text = f"{len(r.added)} added" + (f", {r.labeled} with their true label" if r.labeled else "")
    text += f", {len(r.duplicates)} duplicates recognized" if r.duplicates else ""
    return text + (f", {len(r.refused)} refused" if r.refused else "")


def _questions(questions: Any) -> str:
    rows = [
        [q.example_id[:10], f"{q.score:.3f}", q.strategy, ", ".join(q.assignees) or "anybody", q.reason]
        for q in questions
    ]
    return table(["example", "score", "strategy", "asks", "why"], rows) + "\nnext: trilobe label"


def _labeled(r: Any) -> str:
    parts = [f"{r.new} new answers", f"{r.known} known already", f"{r.superseded} superseded",
             f"{len(r.refused or {})} rows refused", f"{r.open} questions open"]  # fmt: skip
    return ", ".join(p for p in parts if not p.startswith("0 ") or p.endswith(("answers", "open")))


def _aggregated(r: Any) -> str:
    rows = [
        [a["name"], f"{a['quality']:.3f}", a["n"], f"{a['seconds']:.1f}"]
        for a in sorted(r.annotators, key=lambda a: -a["quality"])
    ]
    head = f"{r.n_answers} answers on {r.n} examples ({r.method})\n"
    return head + table(["annotator", "estimated quality", "answers", "median seconds"], rows)


def _evidence(found: Any) -> str:
    marks = {True: "passed", False: "FAILED", None: "-"}
    rows = []
    for e in found:
        bound = "-" if e.threshold is None else f"{'>=' if e.direction == 'at_least' else '<='} {e.threshold:g}"
        interval = f"{e.low:.4g} to {e.high:.4g}" if e.low < e.high else "-"
        rows.append([e.check, f"{e.figure:.4g}", interval, e.n, bound, marks[e.passed]])
    return table(["check", "figure", "95% interval", "n", "gate", "verdict"], rows)


def _model(m: Any) -> str:
    if not hasattr(m, "origin"):
        return str(m)  # a profile is its own table
    accuracy = m.metrics.get("out_of_fold_accuracy", float("nan"))
    return (f"model {m.id}: trained on {m.origin['n_examples']} examples, {m.origin['n_answers']} answers; "
            f"out-of-fold accuracy {accuracy:.1%}, temperature {m.temperature:.2f}")  # fmt: skip


def _bundle(b: Any) -> str:
    size = sum(f["bytes"] for f in b.manifest["files"].values())
    return f"bundle {b.id}: {len(b.manifest['files'])} files, {size / 1024:.0f} KiB\n{b.path}"


def _endpoint(e: Any) -> str:
    if e.state == "stopped":
        return f"{e.name} is stopped"
    return f"{e.name} is {e.state} at {e.url} with bundle {e.bundle_id}" + (f"; gRPC at {e.grpc}" if e.grpc else "")


def _delivered(r: Any) -> str:
    parts = [f"{r.answered} answered", f"{r.waiting} still wait", f"{r.posted} posted", f"{r.kept} kept for next time"]
    text = ", ".join(p for p in parts if not p.startswith("0 ") or p.endswith(("answered", "wait")))
    if r.unasked:
        return f"{text}\nnext: trilobe query ({r.unasked} were never asked)"
    return text + ("\nnext: trilobe label" if r.waiting else "")


def _granted(found: Any) -> str:
    if isinstance(found, str):
        return found
    day = "%Y-%m-%d %H:%M"
    rows = [
        [g.id, g.client, ", ".join(g.scopes), ", ".join(g.models) or "all", g.max_pending or "any",
         time.strftime(day, time.localtime(g.created_at)),
         time.strftime(day, time.localtime(g.expires)) if g.expires else "never"]
        for g in found
    ]  # fmt: skip
    return table(["id", "client", "may", "models", "at once", "since", "until"], rows) if rows else "nobody has a token"


def _inferred(r: Any) -> str:
    text = f"{r.n - r.n_failed:,} answers in {r.path}"
    text += f", {r.n_kept:,} inputs known already" if r.n_kept else ""
    return text + (f"; {r.n_failed:,} inputs failed, see {r.path / 'failed.jsonl'}" if r.n_failed else "")


def _window(w: Any) -> str:
    return f"{w.verdict}: {w.message}" + "".join(f"\n  finding {f.id} ({f.kind}): {f.message}" for f in w.findings)


def _explained(found: Any) -> str:
    rows = [
        ["flagged" if e.flagged else "clean", e.predicted, f"{e.confidence:.2f}", f"{e.residual:.1e}", e.overlay]
        for e in found
    ]
    return table(["", "predicted", "confidence", "residual", "heat map"], rows)


def _ran(r: Any) -> str:
    why = {
        "goal": "the goal is reached",
        "budget": "the budget is spent",
        "rounds": "all rounds are done",
        "worth": "more answers will not pay",
        "exhausted": "everything has been asked",
        "waiting": f"{r.open} questions wait for answers: trilobe label",
    }
    rows = [[c["round"], c["answers"], f"{c['accuracy']:.3f}", f"{c['low']:.3f} to {c['high']:.3f}"] for c in r.rounds]
    text = table(["round", "answers", "accuracy", "95% interval"], rows) + "\n" if rows else ""
    text += f"{why[r.outcome]}\n" + (_evidence(r.evidence) + "\n" if r.evidence else "")
    return text + (_bundle(r.bundle) if r.bundle else "")


def _planned(r: Any) -> str:
    rows = [[f"{c['answers']:.0f}", f"{c['accuracy']:.3f}", f"{c['low']:.3f} to {c['high']:.3f}"] for c in r.points]
    said = [t.sentence for t in (r.needed, r.gain, r.choosing, r.saved) if t]
    return "\n".join([table(["answers", "score", "95% interval"], rows), *said, *([r.why] if r.why else [])])


_WORDS: dict[str, Callable[[Any], str]] = {
    "add": _added, "query": _questions, "label": _labeled, "aggregate": _aggregated, "train": _model,
    "evaluate": _evidence, "check": _evidence, "package": _bundle, "serve": _endpoint, "token": _granted,
    "infer": _inferred, "monitor": _window, "deliver": _delivered, "explain": _explained, "plan": _planned, "run": _ran,
    "demo": lambda told: str(told["report"]), "export": lambda to: "" if to == "-" else str(to),
}  # fmt: skip
