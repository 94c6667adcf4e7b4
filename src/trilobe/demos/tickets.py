"""The loop on messages to a support team: which services and which versions do they name?

The corpus is the project's own (``tickets.jsonl``, described in ``tickets.md``). The annotators are simulated: they
overlook entities and mark others wrongly, at rates that stand below. Everything else is the product doing its work. The
messages are dealt into four hands that never mix: the pool, those to grade with, what comes in on good days, and what
comes in when letters on paper are scanned, and the scanner takes an o for a 0 and an l for a 1.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trilobe import loop
from trilobe.data.annotators import SimulatedReader
from trilobe.demos.stage import (
    Caller,
    Curve,
    Stage,
    clear,
    interval,
    play,
    random_copy,
    told_evidence,
    two_arms,
    watch,
)  # fmt: skip
from trilobe.infrastructure.client import Client
from trilobe.loop.asking import Answerer
from trilobe.loop.project import Project, opened, seed_of, tell
from trilobe.loop.story import tell_story
from trilobe.rows import as_rows
from trilobe.types import Evidence, Example, Model, Question, Response, Span

LABELS = ("SERVICE", "VERSION")
CROWD = (SimulatedReader("ada", 0.02, 0.01, 0.02), SimulatedReader("ben", 0.06, 0.03, 0.05, 6.0),
         SimulatedReader("cleo", 0.15, 0.05, 0.15, 4.0))  # fmt: skip
FIRST, PER_ROUND, ROUNDS, PEOPLE = 40, 40, 3, 2
MISREAD = str.maketrans("oOlIsS", "001155")
HAND, REPAIR = 50, 40
CONFIG = f"""\
[project]
name = "tickets"
task = "entity_recognition"
seed = {{seed}}

[labels]
names = {list(LABELS)}

[query]
strategy = "mnlp"
first = {FIRST}
n = {PER_ROUND}
answers = {PEOPLE}
annotators = {[a.name for a in CROWD]}

[train]
steps = 250
batch_size = 16
lr = 1e-2
folds = 2

[check]
eps = [0.1, 0.2]
attack_steps = 5

[check.gates]
f1 = 0.4
ece = 0.15
parity = 1e-4

[monitor]
window = {HAND}
"""


@dataclass(frozen=True)
class Message:
    """A text and its entities."""

    text: str
    spans: tuple[Span, ...]

    def scanned(self) -> "Message":
        """The same as a scanner reads it: letters that look like digits become digits; positions stay what they are."""
        return Message(self.text.translate(MISREAD), self.spans)


@dataclass
class Tickets:
    """The four hands."""

    pool: list[Message]
    test: list[Message]
    usual: list[Message]
    changed: list[Message]


@dataclass
class TicketsStage(Stage):
    """The stage, and the messages on it."""

    tickets: Tickets = field(kw_only=True)


def deal(seed: int) -> Tickets:
    """The corpus in four hands: its test part to grade with, and of its pool part two times 50 as traffic."""
    parts: dict[str, list[Message]] = {"pool": [], "test": []}
    for line in (Path(__file__).parent / "tickets.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        parts[row["split"]].append(Message(row["text"], tuple(Span(*s) for s in row["spans"])))
    order = np.random.default_rng(seed_of(seed, "deal")).permutation(len(parts["pool"]))
    pool = [parts["pool"][i] for i in order]
    changed = [m.scanned() for m in pool[HAND : 2 * HAND]]
    return Tickets(pool[2 * HAND :], parts["test"], pool[:HAND], changed)


def run(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The whole story; see :func:`trilobe.demos.demo`."""
    clear(folder)
    stage = TicketsStage(folder, seed, tickets=deal(seed))
    return play(stage, f"trilobe demo tickets --seed {seed}", _verdict, _learn_and_promote, _go_wrong_and_repair)


def answerer(messages: list[Message], folder: str, seed: int) -> Answerer:
    """The simulated readers; the same question always gets the same answer of the same person."""
    truth, by_name = {m.text: m.spans for m in messages}, {a.name: a for a in CROWD}

    def answer(question: Question, example: Example, who: str) -> tuple[Response, float]:
        with opened(folder) as p:
            text = p.item(example.id)
        rng = np.random.default_rng(seed_of(seed, "answer", question.id, who))
        return by_name[who].answer(truth[text], text, LABELS, rng)

    return answer


def learn(folder: str, messages: list[Message], seed: int) -> Curve:
    """The rounds of one arm until the budget is spent: its learning curve. Runs in a process of its own."""
    import torch

    torch.set_num_threads(1)  # two arms, two cores
    budget = PEOPLE * (FIRST + PER_ROUND * (ROUNDS - 1))
    return list(loop.run(answerer(messages, folder, seed), folder, goal=2.0, budget=budget, promote=False).rounds)


def _learn_and_promote(s: TicketsStage) -> None:
    t = s.tickets
    with s.step("pool", f"Pool: {len(t.pool)} unlabeled messages go in, {len(t.test)} are held out to grade with"):
        (s.folder / "trilobe.toml").write_text(CONFIG.format(seed=s.seed), "utf-8")
        loop.init(s.folder)
        for split, messages in (("test", t.test), ("pool", t.pool)):
            path = s.folder / "files" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = [{"text": m.text, **({"spans": [[*_plain(x)] for x in m.spans]} if split == "test" else {})}
                    for m in messages]  # fmt: skip
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            added = loop.add(path, s.folder, split="test" if split == "test" else "pool",
                             labels="inside" if split == "test" else "")  # fmt: skip
            tell(f"{split}: {len(added.added)} added" + (f", {added.labeled} with their entities" * (split == "test")))
        control = random_copy(s.folder, "mnlp")
    with s.step("learning", "Questions, answers, beliefs, model: round by round, beside random"):
        chosen, random = two_arms(s.folder, control, learn, ROUNDS, t.pool, s.seed)
        last, base = chosen[-1], random[-1]
        tell(f"{last['answers']} answers: F1 {last['accuracy']:.1%}; picked at random: {base['accuracy']:.1%}")
        s.told |= {"rounds": chosen, "rounds_random": random, "f1": last["accuracy"], "f1_random": base["accuracy"]}
    with s.step("check", "Check: entity F1, calibration, hidden words, parity of the exported graph"):
        s.told["gates"] = told_evidence(loop.check(s.folder))
    with s.step("package and serve", "Package and serve: a sealed bundle behind the name 'tickets'"):
        bundle = loop.package(s.folder)
        endpoint = loop.serve(project=s.folder, background=True)
        tell(f"bundle {bundle.id} at {endpoint.url}/v2/models/tickets")
        with Client(endpoint.url, endpoint.name) as client:
            for message in [m for m in t.usual if m.spans][:3]:
                (found,) = client.entities([message.text])
                tell(message.text)
                said = [f"{e['text']} ({e['label']}, {e['confidence']:.0%})" for e in found]
                tell(f"   found: {', '.join(said) or 'nothing'}")


def _plain(span: Span) -> tuple[int, int, str]:
    return span.start, span.end, span.label


def _go_wrong_and_repair(s: TicketsStage) -> None:
    t = s.tickets
    with opened(s.folder) as p:
        endpoint, first = loop.serve(project=p), p.store.model()
        styles = {"the usual style": t.test, "scanned letters": [m.scanned() for m in t.test]}
        before = {name: _f1(p, first, messages) for name, messages in styles.items()}
        with s.step("clean traffic", "Usual traffic: nothing should be found"):
            s.send(endpoint, [m.text for m in t.usual])
            s.told["findings_clean"] = watch(p)
            tell_story(p, clean={"captures": HAND, "findings": len(s.told["findings_clean"])})
        with s.step("scans", "Letters on paper are scanned now: an o is read as 0, an l as 1, an s as 5"):
            s.send(endpoint, [m.text for m in t.changed])
            s.told["findings_shift"] = watch(p)
            tell(f"F1 on scanned letters: {before['scanned letters'].figure:.1%} "
                 f"(in the usual style {before['the usual style'].figure:.1%})")  # fmt: skip
        if not s.told["findings_shift"]:
            tell("nothing was noticed, so nothing is repaired")
            return
        with s.step("repair", f"Repair: the flagged messages become {REPAIR} questions, while a client keeps calling"):
            loop.explain(p)
            caller = Caller(endpoint, [m.text for m in t.usual])
            caller.start()
            model, given = _repair(s, p)
            caller.enough.set()
            caller.join()
            s.count(caller)
        after = {name: _f1(p, model, messages) for name, messages in styles.items()}
        for name in styles:
            tell(f"{name}: {before[name].figure:.1%} -> {after[name].figure:.1%}")
        tell(f"{caller.requests} requests meanwhile, {caller.failed} failed; {len(caller.versions)} bundles answered")
        s.told |= {"f1_before": before["scanned letters"].figure, "f1_after": after["scanned letters"].figure,
                   "f1_usual_before": before["the usual style"].figure,
                   "f1_usual_after": after["the usual style"].figure, "repair_answers": given}  # fmt: skip
        changes = [{"name": name, "before": interval(before[name]), "after": interval(after[name])} for name in styles]
        counted = {"requests": caller.requests, "failed": caller.failed, "bundle_id": p.store.bundle().id}
        tell_story(p, repair={"changes": changes, "new_answers": given, **counted})


def _f1(p: Project, model: Model, messages: list[Message]) -> Evidence:
    proba = p.predict(model, p.task.encode([m.text for m in messages], model.preprocessing))
    tags = [p.task.possible(Response("spans", spans=m.spans), p.space, partial(str, m.text)) for m in messages]
    return p.task.measure(proba, as_rows([row.argmax(axis=-1) for row in tags]), p.space)[0]


def _repair(s: TicketsStage, p: Project) -> tuple[Model, int]:
    questions = loop.query(p, n=REPAIR, finding="newest", answers=1)
    given = loop.label(answerer(s.tickets.changed, str(s.folder), s.seed), p).new
    people = sorted({name for q in questions for name in q.assignees})
    tell(f"{given} answers by {', '.join(people)}, whose answers have proved best")
    model = loop.train(p)
    loop.check(p, model.id)
    loop.package(p, model.id)
    loop.serve(project=p)
    return model, given


def _verdict(told: dict[str, Any]) -> str:
    learned = (
        f"A model learned from {told['rounds'][-1]['answers']} answers to find services and versions in messages it "
        f"had never seen (F1 {told['f1']:.0%}; asked at random {told['f1_random']:.0%}), was checked and served."
    )
    if "f1_after" not in told:
        return learned
    return (
        f"{learned} Then letters were scanned, with errors; that was caught, and {told['repair_answers']} more answers "
        f"repaired it: F1 from {told['f1_before']:.0%} to {told['f1_after']:.0%} there, with "
        f"{told['failed_requests'] or 'no'} failed requests."
    )
