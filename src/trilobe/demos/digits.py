"""The loop on the 1,797 handwritten digits of scikit-learn, from an unlabeled pool to a repaired endpoint.

Nothing is staged: the annotators are simulated (their confusion matrices stand in ``data/annotators.py``), everything
else is the product doing its work. The digits are dealt into four hands that never mix: the pool, a held-out test part,
what clients send on good days, and what they send when the style of writing changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe import loop
from trilobe.data.annotators import SimulatedAnnotator, typical_crowd
from trilobe.data.beliefs import AnswerTable, majority_vote
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
from trilobe.errors import MissingExtra
from trilobe.infrastructure.monitor import false_alarm_rate
from trilobe.loop.asking import Answerer
from trilobe.loop.believing import unpack_beliefs
from trilobe.loop.project import Project, annotators, opened, seed_of, tell
from trilobe.loop.story import tell_story
from trilobe.tasks.image_classification.data import Pixels, encode, encode_png
from trilobe.trust.metrics import accuracy
from trilobe.types import Example, LabelSpace, Question, Response

SPACE = LabelSpace(tuple("0123456789"))
ROUNDS, FIRST, PER_ROUND, PEOPLE = 6, 20, 20, 3
WINDOW, REPAIR = 200, 60
TARGET, STRENGTH = "8", 0.15
CONFIG = f"""\
[project]
name = "digits"
seed = {{seed}}

[labels]
names = {list(SPACE.names)}

[query]
strategy = "{{strategy}}"
first = {FIRST}
n = {PER_ROUND}
answers = {PEOPLE}
annotators = {{people}}

[check.gates]
accuracy = 0.9
ece = 0.1
"robust_accuracy@0.02" = 0.5
parity = 1e-4

[monitor]
window = {WINDOW}
"""


@dataclass
class Digits:
    """The four hands: pixels ``(n, 8, 8, 1)`` and their classes ``(n,)``."""

    pool: tuple[Pixels, NDArray[np.intp]]
    test: tuple[Pixels, NDArray[np.intp]]
    usual: tuple[Pixels, NDArray[np.intp]]
    changed: tuple[Pixels, NDArray[np.intp]]


def deal(seed: int) -> Digits:
    """The digits as images, dealt at random: 997 pool, 400 test, 200 usual traffic, 200 for the new style."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise MissingExtra(
            "the digits come with scikit-learn, which is not installed", hint="pip install 'trilobe[demo]'"
        ) from e
    data = load_digits()
    images = (data.images / 16 * 255).round().astype(np.uint8)[..., None]
    order = np.random.default_rng(seed_of(seed, "deal")).permutation(len(images))
    hands = np.split(order, [len(images) - 800, len(images) - 400, len(images) - 200])
    return Digits(*((images[i], data.target[i].astype(np.intp)) for i in hands))


def new_style(images: Pixels) -> Pixels:
    """White on black becomes black on white, and slanted: the digits as another scanner and another hand make them."""
    from PIL import Image

    slant = [
        Image.fromarray(i[:, :, 0]).transform((8, 8), Image.Transform.AFFINE, (1, 0.35, -1.4, 0, 1, 0), 2)
        for i in images
    ]
    return 255 - np.stack([np.asarray(s) for s in slant])[..., None]


def crowd_answerer(truth: dict[str, int], crowd: list[SimulatedAnnotator], seed: int) -> Answerer:
    """The simulated annotators; the same question always gets the same answer of the same person."""
    by_name = {a.name: a for a in crowd}

    def answer(question: Question, example: Example, who: str) -> tuple[Response, float]:
        rng = np.random.default_rng(seed_of(seed, "answer", question.id, who))
        return by_name[who].answer(question, truth[example.id], SPACE, rng)

    return answer


def ids_of(images: Pixels, labels: NDArray[np.intp]) -> dict[str, int]:
    """Example id -> class, for images that go in as PNG files."""
    import hashlib

    return {hashlib.sha256(encode_png(i)).hexdigest(): int(label) for i, label in zip(images, labels, strict=True)}


def collect(folder: Path, digits: Digits, seed: int, strategy: str = "margin") -> loop.Added:
    """A fresh project with the pool and the test part in it; five copies and a broken file slip in, to be noticed."""
    from PIL import Image

    people = [a.name for a in typical_crowd(SPACE)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trilobe.toml").write_text(CONFIG.format(seed=seed, strategy=strategy, people=people), "utf-8")
    loop.init(folder)
    files = folder / "files"
    for split, (images, labels) in (("test", digits.test), ("pool", digits.pool)):
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = files / split / (SPACE.names[label] if split == "test" else "") / f"{n:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
    for n in range(5):
        Image.fromarray(digits.pool[0][n][:, :, 0]).save(files / "pool" / f"copy-{n}.bmp")
    (files / "pool" / "broken.png").write_bytes(encode_png(digits.pool[0][0])[:60])
    loop.add([files / "test"], folder, split="test", labels="folders")
    return loop.add([files / "pool"], folder)


def learn(folder: str, truth: dict[str, int], seed: int) -> Curve:
    """The rounds of one arm until the budget is spent: its learning curve. Runs in a process of its own."""
    import torch

    torch.set_num_threads(1)  # two arms, two cores
    answerer = crowd_answerer(truth, typical_crowd(SPACE, ("3", "8")), seed)
    budget = PEOPLE * (FIRST + PER_ROUND * (ROUNDS - 1))
    return list(loop.run(answerer, folder, goal=2.0, budget=budget, promote=False).rounds)


@dataclass
class DigitsStage(Stage):
    """The stage, and the digits on it."""

    digits: Digits = field(kw_only=True)


def run(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The whole story; see :func:`trilobe.demos.demo`."""
    clear(folder)
    stage = DigitsStage(folder, seed, digits=deal(seed))
    return play(stage, f"trilobe demo --seed {seed}", _verdict, _learn_and_promote, _go_wrong_and_repair)


def _learn_and_promote(s: DigitsStage) -> None:
    truth = ids_of(*s.digits.pool)
    with s.step("pool", "Pool: 997 unlabeled digits go in, 400 are held out to grade with"):
        added = collect(s.folder, s.digits, s.seed)
        tell(f"{len(added.added)} added, {len(added.duplicates)} duplicates recognized, {len(added.refused)} refused")
        control = random_copy(s.folder, "margin")
    with s.step("learning", "Questions, answers, beliefs, model: round by round, beside random"):
        chosen, control_curve = two_arms(s.folder, control, learn, ROUNDS, truth, s.seed)
        last, base = chosen[-1], control_curve[-1]
        tell(f"{last['answers']} answers: {last['accuracy']:.1%} right; picked at random: {base['accuracy']:.1%}")
        s.told |= {"rounds": chosen, "rounds_random": control_curve,
                   "accuracy": last["accuracy"], "accuracy_random": base["accuracy"]}  # fmt: skip
        _judge_answers(s, truth)
    with s.step("check", "Check: accuracy, calibration, attacks, parity of the exported graph"):
        s.told["gates"] = told_evidence(loop.check(s.folder))
    with s.step("package and serve", "Package and serve: a sealed bundle behind the name 'digits'"):
        bundle = loop.package(s.folder)
        endpoint = loop.serve(project=s.folder, background=True)
        tell(f"bundle {bundle.id} at {endpoint.url}/v2/models/digits")


def _judge_answers(s: DigitsStage, truth: dict[str, int]) -> None:
    """Hold the estimates against the truth, which only the demonstration knows."""
    true = {a.name: a.quality for a in typical_crowd(SPACE, ("3", "8"))}
    with opened(s.folder) as p:
        people = [{"name": a["name"], "estimated": a["quality"], "true": true[a["name"]], "answers": a["n"]}
                  for a in annotators(p)]  # fmt: skip
        beliefs = unpack_beliefs(p.store.blobs.get(p.store.recorded("aggregate")["beliefs"]))
        pool = {e.id for e in p.store.examples("pool")}
        table = AnswerTable.from_answers([a for a in p.store.answers() if a.example_id in pool], p.space)
        votes = majority_vote(table)
        top = np.isclose(votes, votes.max(axis=1, keepdims=True))
        right = np.array([top[i, truth[e]] / top[i].sum() for i, e in enumerate(table.examples)])
        weighed = sum(int(b.proba.argmax()) != truth[b.example_id] for b in beliefs)
        wrong = {"majority": round(len(right) - float(right.sum())), "weighed": weighed, "judged": len(beliefs)}
        tell_story(p, true_quality=true, wrong=wrong)
    for a in people:
        tell(f"{a['name']:<5} estimated {a['estimated']:.2f}, true {a['true']:.2f}")
    tell(f"wrong labels: {wrong['weighed']} weighed by that, {wrong['majority']} by majority vote, of {len(beliefs)}")
    s.told |= {"annotators": people, "wrong_labels": wrong}


def _go_wrong_and_repair(s: DigitsStage) -> None:
    with opened(s.folder) as p:
        endpoint = loop.serve(project=p)
        first = p.store.model()
        module = p.module(first)
        old = accuracy(p.predict(first, encode(s.digits.test[0], first.preprocessing)), s.digits.test[1])
        new = accuracy(p.predict(first, encode(new_style(s.digits.test[0]), first.preprocessing)), s.digits.test[1])
        with s.step("clean traffic", "Usual traffic: nothing should be found"):
            s.send(endpoint, s.digits.usual[0])
            s.told["findings_clean"] = watch(p)
            _count_false_alarms(s, p)
        with s.step("attack", f"Adversarial traffic: images changed so that they look like {TARGET!r} to the model"):
            s.send(endpoint, _attack(s, module, first.preprocessing))
            s.told["findings_adversarial"] = watch(p)
            loop.explain(p)
        with s.step("new style", "Traffic in a new style: inverted and slanted digits"):
            s.send(endpoint, new_style(s.digits.changed[0]))
            s.told["findings_shift"] = watch(p)
            loop.explain(p)
            tell(f"accuracy on the new style: {new.figure:.1%} (on the old one {old.figure:.1%})")
        with s.step("repair", f"Repair: the flagged captures become {REPAIR} questions, while a client keeps calling"):
            caller = Caller(endpoint, s.digits.usual[0])
            caller.start()
            repaired = _repair(s, p)
            caller.enough.set()
            caller.join()
            s.count(caller)
        old_after = accuracy(p.predict(repaired, encode(s.digits.test[0], first.preprocessing)), s.digits.test[1])
        new_after = accuracy(
            p.predict(repaired, encode(new_style(s.digits.test[0]), first.preprocessing)), s.digits.test[1]
        )
        tell(f"new style {new.figure:.1%} -> {new_after.figure:.1%}")
        tell(f"old style {old.figure:.1%} -> {old_after.figure:.1%}")
        tell(f"{caller.requests} requests meanwhile, {caller.failed} failed; {len(caller.versions)} bundles answered")
        s.told |= {
            "accuracy_shift_before": new.figure, "accuracy_shift_after": new_after.figure,
            "accuracy_old_before": old.figure, "accuracy_old_after": old_after.figure, "repair_answers": REPAIR,
        }  # fmt: skip
        changes = [
            {"name": "the new style", "before": interval(new), "after": interval(new_after)},
            {"name": "the old style", "before": interval(old), "after": interval(old_after)},
        ]
        counted = {"requests": caller.requests, "failed": caller.failed, "bundle_id": p.store.bundle().id}
        tell_story(p, repair={"changes": changes, "new_answers": REPAIR, **counted})


def _count_false_alarms(s: DigitsStage, p: Project) -> None:
    """How often the monitor cries wolf: 300 windows in which nothing happened, drawn from unseen digits."""
    model = p.store.model()
    unseen = np.concatenate([s.digits.test[0], s.digits.usual[0], s.digits.changed[0]])
    proba = p.predict(model, encode(unseen, model.preprocessing))
    rate, low, high = false_alarm_rate(proba, n_windows=300, window=WINDOW, alpha=p.config.monitor.alpha, seed=s.seed)
    tell(f"false alarms in 300 clean windows: {rate:.1%} [{low:.1%}, {high:.1%}], set: {p.config.monitor.alpha:.0%}")
    alarms = {"figure": rate, "low": low, "high": high, "n": 300}
    s.told["false_alarm_rate"] = alarms
    tell_story(p, clean={"captures": WINDOW, "findings": len(s.told["findings_clean"]), "false_alarms": alarms})


def _attack(s: DigitsStage, module: Any, preprocessing: dict[str, Any] | Any) -> Pixels:
    from trilobe.trust.attacks import projected_gradient_descent, quantize_to_pixels

    images, labels = s.digits.usual
    X = encode(images, preprocessing)
    targets = np.full(len(labels), SPACE.index(TARGET))
    moved = projected_gradient_descent(module, X, labels, eps=STRENGTH, targets=targets, seed=s.seed)
    return quantize_to_pixels(moved).transpose(0, 2, 3, 1)


def _repair(s: DigitsStage, p: Project) -> Any:
    truth = ids_of(new_style(s.digits.changed[0]), s.digits.changed[1])
    questions = loop.query(p, n=REPAIR, finding="newest", answers=1)
    asked = sorted({name for q in questions for name in q.assignees})
    answerer: Callable[..., Any] = crowd_answerer(truth, typical_crowd(SPACE, ("3", "8")), s.seed)
    given = loop.label(answerer, p).new
    tell(f"{given} answers by {', '.join(asked)}, whose answers have proved best")
    model = loop.train(p)
    loop.check(p, model.id)
    loop.package(p, model.id)
    loop.serve(project=p)
    return model


def _verdict(told: dict[str, Any]) -> str:
    k, n = told["accuracy_shift_before"], told["accuracy_shift_after"]
    return (
        f"A model learned from {told['rounds'][-1]['answers']} answers, was checked and served. Its traffic changed; "
        f"that was caught and explained, and {told['repair_answers']} more answers repaired it: from {k:.0%} to "
        f"{n:.0%} right on the new style, with {told['failed_requests'] or 'no'} failed requests."
    )
