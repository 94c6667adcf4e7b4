"""``query`` and ``label``: questions go out, answers come in."""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trilobe.errors import NotEnoughData
from trilobe.loop.choosing import Pick, Strategy, from_finding, from_pool, told_of
from trilobe.loop.deferring import STRATEGY as DEFERRED
from trilobe.loop.deferring import from_waiting, urgent_first, waiting
from trilobe.loop.project import UNASKED, Project, annotators, digest, opened, positive, seed_of, tell
from trilobe.loop.tables import make_answer, take_answers
from trilobe.loop.terminal import AtTheTerminal
from trilobe.types import NO_PERSON, Example, Question, Response

Answerer = Callable[[Question, Example, str], tuple[Response, float] | None]
"""Somebody who answers: (question, example, annotator) -> (response, seconds), or None to stop."""


@dataclass(frozen=True)
class Labeled:
    """What came in: ``new`` answers, ``known`` ones that were there already, ``superseded`` ones, rows ``refused``."""

    new: int
    known: int = 0
    superseded: int = 0
    refused: Mapping[str, str] | None = None
    open: int = 0


def query(
    project: "Project | Path | str" = ".",
    n: int | None = None,
    strategy: Strategy = "",
    finding: str = "",
    answers: int | None = None,
    partial: bool = False,
    explain: bool = False,
    seed: int | None = None,
) -> list[Question]:
    """Choose what to ask next. While questions are open, those are returned and nothing new is asked.

    What endpoints left to people comes first, also while other questions are open: somebody waits for those answers.
    Without a model the first questions are examples typical of the pool; then the strategy chooses by the model's
    calibrated predictions, spread over unlike examples, and a share (query.control) is left to chance, so that what
    the strategy saves can be measured. With a finding, the captures that caused it become the questions, and those
    annotators are asked who have proved best.

    Args:
        project: the project's folder.
        n: how many; query.first or query.n by default. More than there is asks everything.
        strategy: margin, entropy, least_confidence, mnlp (entities), badge, k_center, typical, random or another that
            is installed; in Python also your own score function.
        finding: the id of a finding (or its first letters, or "newest").
        answers: how many people are asked each question; query.answers by default.
        partial: ask "is it one of these?" where that teaches more per second than "which class?", also again about
            examples still in doubt; query.partial makes it the default.
        explain: say how these questions were chosen, and why each.
        seed: overrides the project's.

    Raises:
        NotEnoughData: the pool is empty, or everything in it has been asked.

    Example:
        trilobe query -n 30 --strategy entropy --explain
        trilobe query --finding newest -n 60
    """
    positive(n=n, answers=answers)
    with opened(project) as p:
        each = answers or p.config.query.answers
        questions = [q for q in p.store.questions(open_only=True) if q.strategy not in UNASKED]
        if questions:
            tell(f"{len(questions)} questions are still open; answer them first (trilobe label)")
            urgent = from_waiting(p, (n or p.config.query.n) - sum(q.strategy == DEFERRED for q in questions))
            questions = urgent_first(questions + _put(p, urgent, max(q.round for q in questions), each))
        else:
            questions = _ask_new(p, n, strategy, finding, each, partial, seed)
        for line in told_of(p, questions) if explain else ():
            tell(line)
        return questions


def _ask_new(
    p: Project, n: int | None, strategy: Strategy, finding: str, each: int, partial: bool, seed: int | None
) -> list[Question]:
    round_ = 1 + max((q.round for q in p.store.questions()), default=0)
    seed = seed_of(p.seed if seed is None else seed, "query", round_)
    if finding:
        picks = from_finding(p, p.finding(finding), n or p.config.query.n, strategy, seed)
        people = tuple(a["name"] for a in annotators(p) if a["name"] not in NO_PERSON)
        return _put(p, picks, round_, each, people[:each])
    count = n or (p.config.query.n if p.newest_model() else p.config.query.first)
    urgent = _put(p, from_waiting(p, count), round_, each)
    if len(urgent) == count:
        return urgent
    try:
        picks = from_pool(p, count - len(urgent), strategy, seed, partial or p.config.query.partial)
    except NotEnoughData:
        if urgent:
            return urgent
        raise
    return urgent + _put(p, picks, round_, each)


def _put(p: Project, picks: Sequence[Pick], round_: int, each: int, people: tuple[str, ...] = ()) -> list[Question]:
    """Picks as questions, asked of ``people``, or of ``each`` who may be asked."""
    if picks and each > (n_people := len(people or p.config.query.annotators) or 1):
        tell(f"each question is asked of {n_people}, not of {each}: name the people in query.annotators")
    said: dict[str, set[str]] = {}
    for a in p.store.answers(example_ids=[pick.example.id for pick in picks]):
        said.setdefault(a.example_id, set()).add(a.annotator)
    questions = []
    for pick in picks:
        id_ = digest("question", pick.example.id, round_)[:16]
        who = people or _assign(p, id_, each, said.get(pick.example.id, set()))
        questions.append(
            Question(
                id_, pick.example.id, pick.choices, pick.strategy, pick.score, pick.reason, round_, who, time.time()
            )
        )
    p.store.add_questions(questions)
    return questions


def _assign(p: Project, question_id: str, each: int, said: Set[str]) -> tuple[str, ...]:
    """Who is asked: at random, those who have already ``said`` something about the example last."""
    names = p.config.query.annotators
    order = np.random.default_rng(seed_of(p.seed, "assign", question_id)).permutation(len(names))
    return tuple(sorted((names[i] for i in order), key=lambda name: name in said)[:each])


def label(
    answers: "Path | str | Answerer" = "",
    project: "Project | Path | str" = ".",
    annotator: str = "me",
    n: int | None = None,
) -> Labeled:
    """Take answers: from a CSV file, or at the terminal.

    The file has the columns example (id, its first letters, or file name), annotator, label, and optionally seconds
    and answered_at (seconds since 1970). A label is a class ("cat"), a node of the label tree, several of them joined
    by "|" ("one of these"), any of that after "not:" ("none of these"), or "?" ("can't tell"). Nobody's answer is
    ever changed: a later, different one of the same person supersedes it. Without answered_at, lower rows are later.
    A file taken twice changes nothing. Rows that fit nothing are refused with a reason, the others go in.

    Args:
        answers: a CSV file; nothing for the terminal; in Python also a function.
        project: the project's folder.
        annotator: who answers at the terminal.
        n: at most so many new answers.

    Returns:
        How many answers were new, known, superseding, refused, and how many questions are open.

    Example:
        trilobe label answers.csv
        trilobe label --annotator ann
    """
    positive(n=n)
    with opened(project) as p:
        before = p.store.count_superseded()
        if answers and not callable(answers):
            new, known, refused = take_answers(p, answers, n)
        else:
            new, known, refused = _ask(p, answers if callable(answers) else AtTheTerminal(p), annotator, n), 0, {}
        unanswered, unasked = waiting(p)
        if unanswered > unasked:
            tell(f"clients wait for answers to {unanswered - unasked} of the questions: trilobe deliver")
        return Labeled(new, known, p.store.count_superseded() - before, refused, len(p.store.questions(open_only=True)))


def _ask(p: Project, answerer: Answerer, annotator: str, n: int | None) -> int:
    """Put every open question to those it is for; each answer is kept before the next question is asked."""
    said = {(a.question_id, a.annotator) for a in p.store.answers()}
    todo = [
        (q, who)
        for q in urgent_first(p.store.questions(open_only=True))
        for who in q.assignees or (annotator,)
        if (q.id, who) not in said
    ][:n]
    examples = {e.id: e for e in p.store.examples(ids=[q.example_id for q, _ in todo])}
    for done, (q, who) in enumerate(todo):
        reply = answerer(q, examples[q.example_id], who)
        if reply is None:
            return done
        answer = make_answer(q, who, *reply, time.time())
        p.possible(answer.response, q.example_id)  # what fits no class must not get into a record that is never edited
        p.store.add_answers([answer])
        if not isinstance(answerer, AtTheTerminal):  # a bar would stand in the way of the prompt
            tell("answering", done + 1, len(todo))
    return len(todo)
