"""``run``: the whole loop until a goal or a budget, on one page, resumable at any point."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trilobe.errors import NotEnoughData
from trilobe.infrastructure.store import run_lock
from trilobe.loop.asking import Answerer, label, query
from trilobe.loop.learning import evaluate, train
from trilobe.loop.planning import notice
from trilobe.loop.project import STATE, Project, opened, positive, tell
from trilobe.loop.promoting import check, package
from trilobe.types import NO_PERSON, Bundle, Evidence

Outcome = Literal["goal", "budget", "rounds", "exhausted", "waiting", "worth"]


@dataclass(frozen=True)
class Ran:
    """How the loop ended: ``outcome``, the learning curve ``rounds``, the last model and, if it passed, its bundle.

    ``outcome`` is "goal", "budget", "rounds", "exhausted" (nothing left to ask), "worth" (100 more answers
    would not bring ``run.worth``) or "waiting" (questions are open).
    """

    outcome: Outcome
    rounds: tuple[dict[str, Any], ...]
    model: str = ""
    evidence: tuple[Evidence, ...] = ()
    bundle: Bundle | None = None
    open: int = 0


def run(
    answers: "Path | str | Answerer" = "",
    project: "Project | Path | str" = ".",
    goal: float | None = None,
    budget: int | None = None,
    rounds: int | None = None,
    strategy: str = "",
    promote: bool = True,
) -> Ran:
    """Ask, answer, train, evaluate until a goal or a budget is reached; then check and package.

    Interrupted at any moment, the next run goes on where this one stopped and ends with the same result. Questions the
    answers do not cover stop it: they are open until answered. Only one run works on a project at a time.

    Args:
        answers: a CSV file of answers (see ``trilobe label --help``); nothing asks at the terminal.
        project: the project's folder.
        goal: accuracy to reach, 0 to 1; run.goal by default.
        budget: answers to spend at most; run.budget by default. run.seconds limits people's time.
        rounds: rounds at most; run.rounds by default.
        strategy: overrides query.strategy.
        promote: check and package at the end.

    Raises:
        StoreBusy: another run works on this project.
        CheckFailed: the model at the end failed a gate (exit code 3); it and its evidence are kept.

    Example:
        trilobe run answers.csv --goal 0.9 --budget 500
    """
    positive(budget=budget, rounds=rounds)
    where = project.folder if isinstance(project, Project) else Path(project)
    with opened(project) as p, run_lock(where / STATE, "trilobe run"):
        limits = p.config.run
        goal = limits.goal if goal is None else goal
        budget, rounds = budget or limits.budget, rounds or limits.rounds
        outcome = _turn(p, answers, goal, budget, rounds, strategy)
        curve = tuple(p.store.journal("curve/").values())
        if outcome == "waiting" or not curve:
            return Ran(outcome, curve, open=len(p.store.questions(open_only=True)))
        if not promote:
            return Ran(outcome, curve, curve[-1]["model"])
        evidence = check(p)
        return Ran(outcome, curve, curve[-1]["model"], tuple(evidence), package(p))


def _turn(
    p: Project, answers: "Path | str | Answerer", goal: float, budget: int, rounds: int, strategy: str
) -> Outcome:
    """The loop itself: everything it needs to know is in the store, so it may start anywhere."""
    while True:
        if p.store.questions(open_only=True):
            label(answers, p)
            if still := p.store.questions(open_only=True):
                tell(
                    f"{len(still)} questions are open: trilobe export questions --to questions.csv, fill in, run again"
                )
                return "waiting"
        pool = {e.id for e in p.store.examples("pool")}
        known = [a for a in p.store.answers() if a.example_id in pool]
        said = [a for a in known if a.annotator not in NO_PERSON]
        asked = max((q.round for q in p.store.questions()), default=0)
        if known:
            point = learn(p)
            if point["accuracy"] >= goal:
                return "goal"
            if len(said) >= budget or sum(a.seconds for a in said) >= p.config.run.seconds:
                return "budget"
            if notice(p, p.store.model(point["model"])):
                return "worth"
            if asked >= rounds:
                return "rounds"
        each = min(p.config.query.answers, len(p.config.query.annotators) or 1)
        if (left := (budget - len(said)) // each) < 1:
            return "budget"
        try:
            query(p, min(left, p.config.query.n if known else p.config.query.first), strategy)
        except NotEnoughData:
            if not known:
                raise
            return "exhausted"


def learn(p: Project) -> dict[str, Any]:
    """Train on all there is and measure it: the newest point of the learning curve."""
    evaluate(p, train(p).id)
    point: dict[str, Any] = list(p.store.journal("curve/").values())[-1]
    about = f"{point['figure'].replace('_', ' ')} {point['accuracy']:.1%} [{point['low']:.1%}, {point['high']:.1%}]"
    tell(f"round {point['round']}: {point['answers']} answers, {about}")
    return point
