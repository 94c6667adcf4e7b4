"""The engine against slow transcriptions: the formula by explicit loops, Dawid and Skene 1979 step by step.

The transcriptions share no code with :mod:`trilobe.data.beliefs`; they take answers as (unit, annotator, set) triples.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilobe.data.annotators import SimulatedAnnotator, typical_crowd
from trilobe.data.beliefs import AnswerTable, DawidSkene, majority_vote, posterior, symmetric_confusion
from trilobe.types import Answer, LabelSpace, Question, Response

Said = list[tuple[int, int, frozenset[int]]]


def table_of(said: Said, n_units: int, n_annotators: int, k: int) -> AnswerTable:
    sets = list(dict.fromkeys(s for _, _, s in said)) or [frozenset({0})]
    return AnswerTable(
        np.array([u for u, _, _ in said], dtype=np.intp),
        np.array([j for _, j, _ in said], dtype=np.intp),
        np.array([sets.index(s) for _, _, s in said], dtype=np.intp),
        np.array([[c in s for c in range(k)] for s in sets]),
        tuple(f"x{i}" for i in range(n_units)),
        np.arange(n_units + 1),
        tuple(f"a{j}" for j in range(n_annotators)),
    )


@st.composite
def crowds(draw: st.DrawFn, single: bool = False) -> tuple[Said, int, int, int]:
    """Answers with sets of any size, repeated ones, units and people without any."""
    n_units, n_annotators, k = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    classes = st.integers(0, k - 1)
    sets = classes.map(lambda c: frozenset({c})) if single else st.frozensets(classes, min_size=1)
    one = st.tuples(st.integers(0, n_units - 1), st.integers(0, n_annotators - 1), sets)
    return draw(st.lists(one, min_size=1, max_size=20)), n_units, n_annotators, k


def rows(n: int, k: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(k), n)


def slow_posterior(said: Said, prior: np.ndarray, confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """belief(k) = prior(k) * product over answers of sum over l in R of pi_j[k, l], normalized."""
    n, k = prior.shape
    proba, evidence = np.zeros((n, k)), np.zeros(n)
    for i in range(n):
        for truth in range(k):
            p = prior[i, truth]
            for unit, j, possible in said:
                if unit == i:
                    p *= sum(confusion[j, truth, seen] for seen in possible)
            proba[i, truth] = p
        evidence[i] = math.log(proba[i].sum())
        proba[i] /= proba[i].sum()
    return proba, evidence


def slow_dawid_skene(
    said: Said, n: int, m: int, k: int, smoothing: float, iterations: int, one_coin: bool, prior: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dawid and Skene 1979, equations 2.3 to 2.5, smoothed; an answer that is a set counts by what was perceived."""
    start = np.array([[0.8 if a == b else 0.2 / (k - 1) for b in range(k)] for a in range(k)])
    confusion, share = np.stack([start] * m), np.full(k, 1 / k)
    T = np.zeros((n, k))
    for round_ in range(iterations):
        T, _ = slow_posterior(said, np.tile(share, (n, 1)) if prior is None else prior, confusion)  # (2.5)
        if round_ + 1 == iterations:
            break
        fresh = np.zeros_like(confusion)
        for j in range(m):
            count = smoothing * start
            for unit, who, possible in said:
                if who != j or len(possible) == k:  # "can't tell" counts for nothing
                    continue
                for truth in range(k):
                    total = sum(confusion[j, truth, seen] for seen in possible)
                    for seen in possible:
                        count[truth, seen] += T[unit, truth] * confusion[j, truth, seen] / total
            if one_coin:
                a = count.trace() / count.sum()
                count = np.where(np.eye(k, dtype=bool), a, (1 - a) / (k - 1))
            for truth in range(k):
                fresh[j, truth] = count[truth] / count[truth].sum()  # (2.3)
        confusion = fresh
        share = (T.sum(0) + 1) / (n + k)  # (2.4)
    return T, confusion, share


@settings(max_examples=60, deadline=None)
@given(crowds(), st.integers(0, 99))
def test_posterior_is_the_direct_product(crowd: tuple[Said, int, int, int], seed: int) -> None:
    said, n, m, k = crowd
    confusion, prior = rows(m * k, k, seed).reshape(m, k, k), rows(n, k, seed + 1)
    proba, evidence = posterior(table_of(said, n, m, k), prior, confusion)
    want, want_evidence = slow_posterior(said, prior, confusion)
    np.testing.assert_allclose(proba, want, atol=1e-12)
    np.testing.assert_allclose(evidence, want_evidence, atol=1e-10)


@pytest.mark.parametrize("tie", ["annotator", "one_coin"])
@pytest.mark.parametrize("with_prior", [False, True])
@settings(max_examples=15, deadline=None)
@given(crowd=crowds(), smoothing=st.sampled_from([0.1, 1.0, 3.0]), seed=st.integers(0, 99))
def test_dawid_skene_is_the_textbook(
    tie: str, with_prior: bool, crowd: tuple[Said, int, int, int], smoothing: float, seed: int
) -> None:
    said, n, m, k = crowd
    prior = rows(n, k, seed) if with_prior else None
    engine = DawidSkene(tie, smoothing, max_iter=8, tol=-np.inf).fit(table_of(said, n, m, k), prior)
    floored = prior * (1 - 1e-4) + 1e-4 / k if prior is not None else None
    T, confusion, share = slow_dawid_skene(said, n, m, k, smoothing, 8, tie == "one_coin", floored)
    np.testing.assert_allclose(engine.proba_, T, atol=1e-8)
    np.testing.assert_allclose(engine.confusion_, confusion, atol=1e-8)
    np.testing.assert_allclose(engine.prior_, share if floored is None else floored, atol=1e-8)


def test_dawid_skene_at_convergence_is_the_textbook_at_convergence() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 40)
    said = []
    for j, accuracy in enumerate([0.9, 0.8, 0.5]):
        for i, t in enumerate(truth):
            seen = int(t if rng.random() < accuracy else rng.integers(3))
            said.append((i, j, frozenset({seen}) if rng.random() < 0.7 else frozenset({seen, (seen + 1) % 3})))
    engine = DawidSkene(tol=1e-13, max_iter=2000).fit(table_of(said, 40, 3, 3))
    rounds = len(engine.objective_)
    assert 5 < rounds < 2000
    T, confusion, _ = slow_dawid_skene(said, 40, 3, 3, 1.0, rounds, False, None)
    np.testing.assert_allclose(engine.proba_, T, atol=1e-8)
    np.testing.assert_allclose(engine.confusion_, confusion, atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(crowds(single=True))
def test_majority_vote_is_plurality_and_ties_stay_ties(crowd: tuple[Said, int, int, int]) -> None:
    said, n, m, k = crowd
    votes = np.zeros((n, k))
    for unit, _, seen in said:
        votes[unit, next(iter(seen))] += 1
    proba = majority_vote(table_of(said, n, m, k))
    winners = votes == votes.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.isclose(proba, proba.max(axis=1, keepdims=True), rtol=1e-9), winners)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    for i in range(n):  # more votes, more belief
        assert (np.diff(proba[i][np.argsort(votes[i], kind="stable")]) >= -1e-12).all()


@settings(max_examples=60, deadline=None)
@given(crowds(), st.integers(0, 99))
def test_noise_free_partial_answers_restrict_the_prior_to_the_intersection(
    crowd: tuple[Said, int, int, int], seed: int
) -> None:
    said, n, m, k = crowd
    said = [(u, j, s | {0}) for u, j, s in said]  # class 0 stays possible, so nothing contradicts
    prior = rows(n, k, seed)
    proba, _ = posterior(table_of(said, n, m, k), prior, np.stack([np.eye(k)] * m))
    for i in range(n):
        left = set(range(k)).intersection(*(s for u, _, s in said if u == i))
        want = np.array([prior[i, c] if c in left else 0.0 for c in range(k)])
        np.testing.assert_allclose(proba[i], want / want.sum(), atol=1e-12)


def simulated(
    crowd: list[SimulatedAnnotator], n: int, each: int, k: int, seed: int
) -> tuple[list[Answer], np.ndarray, LabelSpace]:
    rng, space = np.random.default_rng(seed), LabelSpace(tuple(f"c{i}" for i in range(k)))
    truth, answers = rng.integers(0, k, n), []
    for i in range(n):
        for j in rng.permutation(len(crowd))[:each]:
            response, seconds = crowd[j].answer(Question("q", f"x{i}"), int(truth[i]), space, rng)
            answers.append(Answer(f"{i}-{j}", "q", f"x{i}", crowd[j].name, response, seconds))
    return answers, truth, space


def test_dawid_skene_makes_fewer_errors_than_majority_vote_on_a_mixed_crowd() -> None:
    """Five seeds of 400 examples with three answers each by good, careless and confused people."""
    mv_wrong, ds_wrong = [], []
    for seed in range(5):
        space = LabelSpace(tuple(f"c{i}" for i in range(4)))
        answers, truth, space = simulated(typical_crowd(space), 400, 3, 4, seed)
        table = AnswerTable.from_answers(answers, space)
        mv_wrong.append(int((majority_vote(table).argmax(1) != truth).sum()))
        ds_wrong.append(int((DawidSkene().fit(table).proba_.argmax(1) != truth).sum()))
    assert all(d < m for d, m in zip(ds_wrong, mv_wrong, strict=True)), (ds_wrong, mv_wrong)
    assert sum(ds_wrong) < 0.5 * sum(mv_wrong), (ds_wrong, mv_wrong)


@pytest.mark.parametrize("tie", ["annotator", "one_coin"])
def test_quality_and_confusion_are_those_simulated(tie: str) -> None:
    accuracies = [0.95, 0.8, 0.6, 0.4]
    crowd = [SimulatedAnnotator(f"a{j}", symmetric_confusion(1, 3, a)[0]) for j, a in enumerate(accuracies)]
    answers, truth, space = simulated(crowd, 1500, 4, 3, seed=1)
    table = AnswerTable.from_answers(answers, space)
    engine = DawidSkene(tie).fit(table)
    order = [table.annotators.index(c.name) for c in crowd]
    np.testing.assert_allclose(engine.quality()[order], accuracies, atol=0.04)
    np.testing.assert_allclose(engine.quality(np.array([1.0, 1.0, 1.0]))[order], accuracies, atol=0.04)
    for j, person in zip(order, crowd, strict=True):
        np.testing.assert_allclose(engine.confusion_[j], person.confusion, atol=0.08)
    np.testing.assert_allclose(engine.prior_, np.bincount(truth) / len(truth), atol=0.03)


def test_yes_no_questions_teach_as_much_about_people_as_full_ones() -> None:
    """Partial answers alone: the engine still finds out who is good."""
    space, rng = LabelSpace(("c0", "c1", "c2")), np.random.default_rng(0)
    accuracies = [0.95, 0.9, 0.6]
    crowd = [SimulatedAnnotator(f"a{j}", symmetric_confusion(1, 3, a)[0]) for j, a in enumerate(accuracies)]
    answers, truth = [], rng.integers(0, 3, 800)
    for i, t in enumerate(truth):
        for j, person in enumerate(crowd):
            asked = Question("q", f"x{i}", (space.names[int(rng.integers(3))],))
            answers.append(Answer(f"{i}-{j}", "q", f"x{i}", person.name, person.answer(asked, int(t), space, rng)[0]))
    engine = DawidSkene("one_coin").fit(AnswerTable.from_answers(answers, space))
    assert engine.quality()[0] > engine.quality()[1] > engine.quality()[2] + 0.15


def test_a_models_prior_repairs_what_a_careless_crowd_gets_wrong() -> None:
    rng = np.random.default_rng(5)
    crowd = [SimulatedAnnotator("cleo", symmetric_confusion(1, 3, 0.6)[0])]
    answers, truth, space = simulated(crowd, 300, 1, 3, seed=5)
    table = AnswerTable.from_answers(answers, space)
    order = [int(e[1:]) for e in table.examples]
    opinion = np.where(rng.random(300) < 0.85, truth, rng.integers(0, 3, 300))[order]
    prior = symmetric_confusion(1, 3, 0.85)[0][opinion]
    alone = (DawidSkene().fit(table).proba_.argmax(1) == truth[order]).mean()
    helped = (DawidSkene().fit(table, prior).proba_.argmax(1) == truth[order]).mean()
    assert helped > alone + 0.1 and helped >= (opinion == truth[order]).mean()


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(float, (3, 4), elements=st.floats(0.01, 1)),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=6),
)
def test_gold_is_certain_whatever_others_say(prior: np.ndarray, votes: list[tuple[int, int]]) -> None:
    space = LabelSpace(("a", "b", "c", "d"))
    said = [Answer(str(i), "q", f"x{i}", "gold", Response("class", (space.names[i],))) for i in range(3)]
    said += [Answer(f"v{n}", "q", f"x{u}", f"p{n % 2}", Response("class", (space.names[c],)))
             for n, (u, c) in enumerate(votes)]  # fmt: skip
    table = AnswerTable.from_answers(said, space)
    for proba in (
        majority_vote(table),
        DawidSkene().fit(table).proba_,
        DawidSkene("one_coin").fit(table, prior).proba_,
    ):
        np.testing.assert_array_equal(proba, np.eye(4)[:3])
