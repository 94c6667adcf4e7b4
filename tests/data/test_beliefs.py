"""The one engine: every row of its table by hand, what must not matter, what must be refused, and its size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.data.beliefs import (
    AnswerTable,
    DawidSkene,
    log_likelihood,
    majority_vote,
    posterior,
    symmetric_confusion,
)
from trilobe.errors import AnswerError, NotEnoughData, UsageError
from trilobe.types import Answer, LabelSpace, Response

ABC = LabelSpace(("a", "b", "c"), parents={"a": "ab", "b": "ab"})
UNIFORM = np.full(3, 1 / 3)


def says(*rows: str) -> list[Answer]:
    """``"x ann a"``, ``"x ann a|b"``, ``"x ann not:a"``, ``"x ann ?"`` as answers."""
    made = []
    for i, row in enumerate(rows):
        example, who, what = row.split()
        if what == "?":
            response = Response("unsure")
        elif what.startswith("not:"):
            response = Response("not", tuple(what[4:].split("|")))
        else:
            response = Response("one_of" if "|" in what or what == "ab" else "class", tuple(what.split("|")))
        made.append(Answer(str(i), "q", example, who, response))
    return made


def table(*rows: str) -> AnswerTable:
    return AnswerTable.from_answers(says(*rows), ABC)


answer_rows = st.lists(
    st.tuples(
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["ann", "bob", "cy"]),
        st.sampled_from(["a", "b", "c", "a|b", "ab", "not:a", "not:a|b", "?", "a|b|c"]),
    ).map(" ".join),
    min_size=1,
    max_size=15,
)


# ---- every row of the table, by hand ----


def test_majority_vote_by_hand() -> None:
    proba = majority_vote(table("x ann a", "x bob a", "x cy b"), accuracy=0.8)
    want = np.array([0.8 * 0.8 * 0.1, 0.1 * 0.1 * 0.8, 0.1**3])
    np.testing.assert_allclose(proba[0], want / want.sum(), atol=1e-12)


def test_set_answers_by_hand() -> None:
    proba = majority_vote(table("x ann a|b", "x bob not:a"), accuracy=0.8)
    want = np.array([0.9 * 0.2, 0.9 * 0.9, 0.2 * 0.9])
    np.testing.assert_allclose(proba[0], want / want.sum(), atol=1e-12)
    np.testing.assert_allclose(majority_vote(table("x ann ab"))[0], majority_vote(table("x ann a|b"))[0])


def test_one_round_of_dawid_skene_by_hand() -> None:
    """x: ann a, bob a; y: ann b. Two rounds: the majority's beliefs, then one M-step."""
    t = AnswerTable.from_labels(["x", "x", "y"], ["ann", "bob", "ann"], [0, 0, 1])
    engine = DawidSkene(max_iter=2, tol=-np.inf).fit(t)
    x, y = 16 / 17, 0.2  # P(truth 0) by 0.8^2 : 0.2^2, and by 0.2 : 0.8
    ann = np.array([[x + 0.8, y + 0.2], [(1 - x) + 0.2, (1 - y) + 0.8]])
    bob = np.array([[x + 0.8, 0.2], [(1 - x) + 0.2, 0.8]])
    np.testing.assert_allclose(engine.confusion_[0], ann / ann.sum(1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(engine.confusion_[1], bob / bob.sum(1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(engine.prior_, [(x + y + 1) / 4, (3 - x - y) / 4], atol=1e-12)
    coin = DawidSkene("one_coin", max_iter=2, tol=-np.inf).fit(t)
    np.testing.assert_allclose(coin.confusion_[1, 0, 0], (x + 1.6) / 3, atol=1e-12)


def test_what_is_returned_belongs_together() -> None:
    """The beliefs are the posterior under the returned matrices and prior, converged or not."""
    t = table("x ann a", "x bob b", "y ann b|c", "y cy c", "z cy a", "z bob a")
    for max_iter in (1, 2, 3, 200):
        engine = DawidSkene(max_iter=max_iter).fit(t)
        np.testing.assert_allclose(posterior(t, engine.prior_, engine.confusion_)[0], engine.proba_, atol=1e-12)
        assert len(engine.objective_) <= max_iter


def test_the_models_prior_decides_where_nobody_else_does() -> None:
    """Model-bootstrapped EM: an unsure answer leaves the model's opinion as it was."""
    opinion = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    engine = DawidSkene().fit(table("x ann ?", "y ann c"), opinion)
    np.testing.assert_allclose(engine.proba_[0], opinion[0], atol=1e-3)
    assert engine.proba_[1, 2] > 0.8 and engine.prior_.shape == (2, 3)


def test_people_can_change_a_certain_models_mind() -> None:
    """Five people who agreed on thirty examples outweigh a prior of exactly 1."""
    names = np.repeat(np.arange(31), 5)
    t = AnswerTable.from_labels(names, list("abcde") * 31, np.where(names == 30, 1, names % 2))
    prior = np.full((31, 2), 0.5)
    prior[30] = [1.0, 0.0]
    assert DawidSkene().fit(t, prior).proba_[30, 1] > 0.9


def test_noise_free_partial_answers_by_hand() -> None:
    t = table("x ann not:a", "x ann b|c", "x bob not:c")
    proba, evidence = posterior(t, np.array([0.5, 0.2, 0.3]), np.stack([np.eye(3)] * 2))
    assert proba.tolist() == [[0.0, 1.0, 0.0]]
    assert evidence[0] == pytest.approx(np.log(0.2))
    t = table("x ann not:a")
    assert posterior(t, np.array([0.5, 0.2, 0.3]), np.eye(3)[None])[0][0] == pytest.approx([0, 0.4, 0.6])


def test_gold_by_hand() -> None:
    t = table("x ann a", "x bob a", "x gold b")
    assert majority_vote(t).tolist() == [[0.0, 1.0, 0.0]]
    engine = DawidSkene().fit(t)
    assert engine.proba_.tolist() == [[0.0, 1.0, 0.0]]
    assert engine.confusion_[t.annotators.index("gold")].tolist() == np.eye(3).tolist()
    belief = t.beliefs(log_likelihood(t, engine.confusion_), engine.prior_)[0]
    assert belief.possible.tolist() == [False, True, False] and belief.n_answers == 3


def test_known_matrices_stay() -> None:
    swap = np.eye(3)[[1, 0, 2]] * 0.9 + 0.1 / 3
    engine = DawidSkene().fit(table("x ann a", "y ann b", "y bob a"), known={"ann": swap, "nobody": np.eye(3)})
    np.testing.assert_array_equal(engine.confusion_[0], swap)
    assert engine.proba_[0].argmax() == 1


# ---- properties ----


@pytest.mark.parametrize("tie", ["annotator", "one_coin"])
@settings(max_examples=60, deadline=None)
@given(rows=answer_rows, smoothing=st.sampled_from([0.01, 1.0, 5.0]), seed=st.none() | st.integers(0, 9))
def test_the_penalized_likelihood_never_falls(tie: str, rows: list[str], smoothing: float, seed: int | None) -> None:
    t = table(*rows)
    prior = None if seed is None else np.random.default_rng(seed).dirichlet(np.ones(3), t.n_units)
    engine = DawidSkene(tie, smoothing, max_iter=30, tol=-np.inf).fit(t, prior)
    assert len(engine.objective_) == 30
    assert (np.diff(engine.objective_) >= -1e-9).all()
    np.testing.assert_allclose(engine.proba_.sum(1), 1)
    np.testing.assert_allclose(engine.confusion_.sum(2), 1)


def believed(rows: list[str], engine: DawidSkene | None) -> dict[str, np.ndarray]:
    t = table(*rows)
    return dict(zip(t.examples, majority_vote(t) if engine is None else engine.fit(t).proba_, strict=True))


@pytest.mark.parametrize("engine", [None, DawidSkene(), DawidSkene("one_coin")], ids=["vote", "matrix", "coin"])
@settings(max_examples=30, deadline=None)
@given(rows=answer_rows, order=st.randoms(use_true_random=False))
def test_neither_order_nor_names_matter(engine: DawidSkene | None, rows: list[str], order: object) -> None:
    before = believed(rows, engine)
    shuffled = list(rows)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    renamed = [r.replace("ann", "zoe").replace("bob", "abe") for r in shuffled]
    after = believed(renamed, engine)
    assert before.keys() == after.keys()
    for example, proba in before.items():
        np.testing.assert_allclose(after[example], proba, atol=1e-9)


@pytest.mark.parametrize("engine", [None, DawidSkene(), DawidSkene("one_coin")], ids=["vote", "matrix", "coin"])
@settings(max_examples=30, deadline=None)
@given(rows=answer_rows)
def test_unsure_answers_change_nothing(engine: DawidSkene | None, rows: list[str]) -> None:
    """Of people and on examples that are there anyway; EM is compared after equally many rounds."""
    engine = engine and DawidSkene(engine.tie, max_iter=5, tol=-np.inf)
    people = {r.split()[1] for r in rows}
    more = [f"{r.split()[0]} {who} ?" for r in rows for who in people]
    after = believed(rows + more, engine)
    for example, proba in believed(rows, engine).items():
        np.testing.assert_allclose(after[example], proba, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(rows=answer_rows)
def test_beliefs_multiply_to_the_posterior(rows: list[str]) -> None:
    t = table(*rows)
    engine = DawidSkene().fit(t)
    beliefs = t.beliefs(log_likelihood(t, engine.confusion_), engine.prior_)
    assert [b.example_id for b in beliefs] == list(t.examples)
    np.testing.assert_allclose(np.stack([b.proba for b in beliefs]), engine.proba_, atol=1e-9)
    assert all(b.likelihood.max() == 1 and b.possible.all() for b in beliefs)
    assert [b.n_answers for b in beliefs] == [sum(r.split()[0] == e for r in rows) for e in t.examples]


def test_a_hopeless_class_is_not_an_impossible_one() -> None:
    """A thousand votes underflow; zero still means that a certain answer ruled the class out."""
    t = AnswerTable.from_labels(["x"] * 1000, np.arange(1000) % 7, [0] * 1000, n_classes=2)
    belief = t.beliefs(log_likelihood(t, symmetric_confusion(7, 2, 0.9)), np.array([0.5, 0.5]))[0]
    assert belief.possible.all() and belief.proba.tolist() == pytest.approx([1, 0], abs=1e-300)


# ---- small and large ----


def test_one_annotator_with_one_answer() -> None:
    for tie in ("annotator", "one_coin"):
        engine = DawidSkene(tie).fit(table("x ann b"))
        assert engine.proba_[0].argmax() == 1 and 0.6 < engine.proba_[0, 1] < 0.999
        assert 0.7 < engine.quality()[0] < 1


def test_no_answers() -> None:
    empty = AnswerTable.from_answers([], ABC)
    assert (empty.n_units, empty.n_classes, empty.sets.dtype) == (0, 3, np.dtype(bool))
    assert majority_vote(empty).shape == (0, 3) and empty.beliefs(np.zeros((0, 3)), UNIFORM) == []
    with pytest.raises(NotEnoughData, match="no answers"):
        DawidSkene().fit(empty)


def test_a_single_class() -> None:
    t = AnswerTable.from_labels(["x", "y"], ["ann", "ann"], [0, 0])
    assert majority_vote(t).tolist() == [[1.0], [1.0]]
    assert DawidSkene().fit(t).proba_.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("tie", ["annotator", "one_coin"])
def test_two_hundred_thousand_answers_in_little_memory(tie: str) -> None:
    rng, n = np.random.default_rng(0), 200_000
    truth = rng.integers(0, 5, 50_000)
    task, worker = np.repeat(np.arange(50_000), 4), rng.integers(0, 300, n)
    label = np.where(rng.random(n) < 0.7, truth[task], rng.integers(0, 5, n))
    tracemalloc.start()
    t = AnswerTable.from_labels(task, worker, label)
    engine = DawidSkene(tie, max_iter=10).fit(t)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (engine.proba_.argmax(1) == truth).mean() > 0.9
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


def test_nothing_dense_of_examples_times_annotators_is_made() -> None:
    """20,000 examples by 20,000 people, one answer each: dense, that would be 3.2 GB for one matrix."""
    names = np.arange(20_000)
    tracemalloc.start()
    t = AnswerTable.from_labels(names, names, names % 3)
    engine = DawidSkene(max_iter=5).fit(t)
    beliefs = t.beliefs(log_likelihood(t, engine.confusion_), engine.prior_)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(beliefs) == 20_000 and (engine.proba_.argmax(1) == np.unique(names, return_inverse=True)[1] % 3).all()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


# ---- sequences ----


def tokens(answer: Answer) -> np.ndarray:
    """An answer whose label spells a class per token: ``"abc"`` is three tokens."""
    return np.array([[name == letter for name in ABC.names] for letter in answer.response.labels[0]])


def test_tokens_are_units_of_their_own() -> None:
    texts = [("s", "ann", "abc"), ("s", "bob", "abb"), ("t", "ann", "cc")]
    said = [Answer(str(i), "q", e, who, Response("class", (x,))) for i, (e, who, x) in enumerate(texts)]
    t = AnswerTable.from_answers(said, ABC, tokens)
    assert t.sequence and t.n_units == 5 and t.starts.tolist() == [0, 3, 5]
    flat = table("s0 ann a", "s1 ann b", "s2 ann c", "s0 bob a", "s1 bob b", "s2 bob b", "t0 ann c", "t1 ann c")
    np.testing.assert_allclose(majority_vote(t), majority_vote(flat), atol=1e-12)
    engine, alone = DawidSkene().fit(t), DawidSkene().fit(flat)
    np.testing.assert_allclose(engine.proba_, alone.proba_, atol=1e-12)
    beliefs = t.beliefs(log_likelihood(t, engine.confusion_), engine.prior_)
    assert [b.proba.shape for b in beliefs] == [(3, 3), (2, 3)] and [b.n_answers for b in beliefs] == [2, 1]
    np.testing.assert_allclose(np.concatenate([b.proba for b in beliefs]), engine.proba_, atol=1e-12)


def test_an_empty_sequence_and_one_of_one_token() -> None:
    said = [Answer(str(i), "q", e, "ann", Response("class", (x,))) for i, (e, x) in enumerate([("s", ""), ("t", "b")])]
    t = AnswerTable.from_answers(
        said, ABC, lambda a: tokens(a) if a.response.labels[0] else np.zeros((0, 3), dtype=bool)
    )
    beliefs = t.beliefs(log_likelihood(t, symmetric_confusion(1, 3, 0.8)), UNIFORM)
    assert [b.likelihood.shape for b in beliefs] == [(0, 3), (1, 3)] and [b.n_answers for b in beliefs] == [0, 1]


def test_answers_that_disagree_on_the_length_are_refused() -> None:
    said = [Answer(str(i), "q", "s", "ann", Response("class", (x,))) for i, x in enumerate(["abc", "ab"])]
    with pytest.raises(AnswerError, match="example s cover 3 and 2 tokens"):
        AnswerTable.from_answers(said, ABC, tokens)


# ---- refusals ----


@pytest.mark.parametrize(
    "engine", [majority_vote, lambda t: DawidSkene().fit(t), lambda t: DawidSkene("one_coin").fit(t)]
)
def test_gold_that_contradicts_itself_names_the_example(engine: object) -> None:
    t = table("w gold c", "x gold a", "x ann a", "x gold b")
    with pytest.raises(AnswerError, match=r"by ann, gold leave no class possible for 1 example\(s\), first x;"):
        engine(t)  # type: ignore[operator]


def test_noise_free_people_who_contradict_each_other_are_named() -> None:
    t = table("first ann a", "second ann not:a", "second bob a", "second cy a|b")
    with pytest.raises(AnswerError, match=r"by ann, bob, cy leave .* first second") as caught:
        posterior(t, UNIFORM, np.stack([np.eye(3)] * 3))
    assert "trilobe show second" in caught.value.hint


def test_a_contradiction_in_a_sequence_names_the_sequence_that_owns_the_token() -> None:
    said = [
        Answer(str(i), "q", e, "ann", Response("class", (x,)))
        for i, (e, x) in enumerate([("s", "ab"), ("t", "ab"), ("t", "ac")])
    ]
    t = AnswerTable.from_answers(said, ABC, tokens)
    with pytest.raises(AnswerError, match="first t;"):
        posterior(t, UNIFORM, np.eye(3)[None])


def test_log_likelihood_of_a_certain_answer_is_minus_infinity_without_a_warning() -> None:
    assert log_likelihood(table("x gold a"), np.eye(3)[None]).tolist() == [[0.0, -np.inf, -np.inf]]


def test_answers_that_do_not_fit_the_label_space() -> None:
    with pytest.raises(AnswerError, match="unknown label 'd'"):
        table("x ann d")
    with pytest.raises(AnswerError, match="about 2 classes; expected 3"):
        AnswerTable.from_answers(says("x ann a"), ABC, lambda a: np.ones(2, dtype=bool))


def test_columns_that_make_no_table() -> None:
    for label, n_classes in (([-1, 0], None), ([0, 3], 3), ([0.0, 1.0], None), ([0, np.nan], None)):
        with pytest.raises(AnswerError, match="indices of classes, from 0"):
            AnswerTable.from_labels(["x", "y"], ["ann", "ann"], label, n_classes)
    with pytest.raises(AnswerError, match="one length"):
        AnswerTable.from_labels(["x", "y"], ["ann"], [0, 1])
    with pytest.raises(AnswerError, match="one length"):
        AnswerTable.from_labels([("x", 1), ("y", 1)], ["ann", "bob"], [0, 1])


@pytest.mark.parametrize(
    ("prior", "problem"),
    [
        (np.ones((2, 3)), "shape"),
        (np.ones(3), "shape"),
        (np.zeros((1, 3)), "all-zero"),
        (np.array([[0.5, np.nan, 0.5]]), "NaN"),
        (np.array([[1.5, -0.5, 0.0]]), "negative"),
    ],
)
def test_a_prior_that_makes_no_sense(prior: np.ndarray, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        DawidSkene().fit(table("x ann a"), prior)


@pytest.mark.parametrize("engine", [DawidSkene("anotator"), DawidSkene(smoothing=0), DawidSkene(smoothing=np.nan)])
def test_settings_that_make_no_sense(engine: DawidSkene) -> None:
    with pytest.raises(UsageError, match="DawidSkene"):
        engine.fit(table("x ann a"))


@pytest.mark.parametrize("matrix", [np.ones(3) / 3, np.eye(2), np.ones((3, 3)), np.full((3, 3), np.nan)])
def test_known_matrices_that_make_no_sense(matrix: np.ndarray) -> None:
    with pytest.raises(UsageError, match="matrix of ann"):
        DawidSkene().fit(table("x ann a"), known={"ann": matrix})


@pytest.mark.parametrize("accuracy", [0.0, 1 / 3, 1.01, np.nan])
def test_a_vote_must_speak_for_its_class(accuracy: float) -> None:
    with pytest.raises(UsageError, match="accuracy"):
        majority_vote(table("x ann a"), accuracy)
