"""The nouns: what a label space covers, which responses exist, what a belief amounts to."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe import types
from trilobe.errors import AnswerError, UsageError
from trilobe.types import Belief, Capture, LabelSpace, Response, Span

TREE = LabelSpace(
    ("siamese", "persian", "pug", "car"),
    parents={"siamese": "cat", "persian": "cat", "cat": "animal", "dog": "animal", "pug": "dog"},
)


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (["pug"], [0, 0, 1, 0]),
        (["cat"], [1, 1, 0, 0]),
        (["animal"], [1, 1, 1, 0]),
        (["cat", "car"], [1, 1, 0, 1]),
        (["cat", "siamese"], [1, 1, 0, 0]),
        ([], [0, 0, 0, 0]),
    ],
)
def test_a_mask_covers_what_lies_below(names: list[str], mask: list[int]) -> None:
    found = TREE.mask(names)
    assert found.dtype == bool and found.tolist() == [bool(m) for m in mask]


@given(st.lists(st.sampled_from([*TREE.names, "cat", "dog", "animal"]), max_size=4), st.randoms())
def test_masks_are_unions(names: list[str], order: object) -> None:
    union = np.zeros(4, dtype=bool)
    for name in names:
        union |= TREE.mask([name])
    order.shuffle(names)  # type: ignore[attr-defined]
    assert TREE.mask(names).tolist() == union.tolist()


def test_a_class_may_have_classes_below_it() -> None:
    space = LabelSpace(("dog", "pug", "car"), parents={"pug": "dog"})
    assert space.mask(["dog"]).tolist() == [True, True, False] and space.mask(["pug"]).tolist() == [False, True, False]


def test_index_and_unknown_names() -> None:
    assert [TREE.index(n) for n in TREE.names] == [0, 1, 2, 3] and len(TREE) == 4
    for ask in (TREE.index, lambda n: TREE.mask([n, "cat"])):
        with pytest.raises(AnswerError, match="unknown label 'bus'; expected one of: siamese, persian, pug, car"):
            ask("bus")
    with pytest.raises(AnswerError, match="unknown label 'cat'"):
        TREE.index("cat")
    many = LabelSpace(tuple(f"c{i}" for i in range(100)))
    with pytest.raises(AnswerError, match=r"c11, \.\.\.\n"):
        many.index("x")


@pytest.mark.parametrize(
    ("names", "parents", "problem"),
    [
        (("a", "b", "a"), {}, r"names \['a'\] twice"),
        (("a", "b"), {"a": "x", "x": "y", "y": "x"}, "cycle through 'x'"),
        (("a", "b"), {"a": "a"}, "cycle through 'a'"),
        (("a", "b"), {"aa": "x"}, "gives 'aa' a parent"),
    ],
)
def test_no_label_space(names: tuple[str, ...], parents: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        LabelSpace(names, parents)


@pytest.mark.parametrize(
    ("response", "possible"),
    [
        (Response("class", ("pug",)), [0, 0, 1, 0]),
        (Response("one_of", ("pug", "car")), [0, 0, 1, 1]),
        (Response("one_of", ("cat",)), [1, 1, 0, 0]),
        (Response("not", ("animal",)), [0, 0, 0, 1]),
        (Response("not", ("cat", "car")), [0, 0, 1, 0]),
        (Response("unsure"), [1, 1, 1, 1]),
    ],
)
def test_every_answer_about_a_class_is_a_set(response: Response, possible: list[int]) -> None:
    assert response.possible(TREE).tolist() == [bool(p) for p in possible]


@given(st.lists(st.sampled_from(TREE.names), min_size=1, max_size=3, unique=True))
def test_no_is_the_complement_of_yes(labels: list[str]) -> None:
    yes, no = Response("one_of", tuple(labels)).possible(TREE), Response("not", tuple(labels)).possible(TREE)
    assert (yes ^ no).all()


SPAN = Span(0, 3, "PER")


@pytest.mark.parametrize(
    ("kind", "labels", "spans"),
    [
        ("maybe", (), ()),
        ("class", (), ()),
        ("class", ("a", "b"), ()),
        ("class", ("a",), (SPAN,)),
        ("one_of", (), ()),
        ("not", (), ()),
        ("unsure", ("a",), ()),
        ("unsure", (), (SPAN,)),
        ("spans", ("a",), (SPAN,)),
        ("span_accepted", (), ()),
        ("span_rejected", (), (SPAN, SPAN)),
    ],
)
def test_no_response(kind: str, labels: tuple[str, ...], spans: tuple[Span, ...]) -> None:
    with pytest.raises(AnswerError, match=repr(kind)):
        Response(kind, labels, spans)  # type: ignore[arg-type]


def test_a_response_that_does_not_fit_its_question_or_space() -> None:
    with pytest.raises(AnswerError, match=r"'not' \['animal', 'car'\] leaves no class possible"):
        Response("not", ("animal", "car")).possible(TREE)
    for response in (Response("spans", (), (SPAN,)), Response("spans"), Response("span_accepted", (), (SPAN,))):
        with pytest.raises(AnswerError, match="answer to a question about classes"):
            response.possible(TREE)
    with pytest.raises(AnswerError, match="unknown label 'animal'"):
        Response("class", ("animal",)).possible(TREE)  # an inner node is 'one_of', not a class
    with pytest.raises(AnswerError, match="unknown label 'bus'"):
        Response("not", ("bus",)).possible(TREE)


def test_a_belief_is_prior_times_likelihood() -> None:
    belief = Belief("x", np.array([[0.5, 1.0], [1.0, 0.0]]), np.array([0.8, 0.2]), 2)
    np.testing.assert_allclose(belief.proba, [[2 / 3, 1 / 3], [1, 0]])
    assert belief.possible.tolist() == [[True, True], [True, False]]
    scaled = Belief("x", belief.likelihood * 1e-9, belief.prior)
    np.testing.assert_allclose(scaled.proba, belief.proba)


def test_a_capture_says_what_was_predicted() -> None:
    capture = Capture("1", "e", "b", 0.0, np.zeros((2, 2, 1), np.uint8), np.array([0.2, 0.5, 0.3]))
    assert capture.prediction == 1 and capture.confidence == 0.5


def test_nouns_cannot_be_changed() -> None:
    nouns = [t for t in vars(types).values() if dataclasses.is_dataclass(t)]
    assert len(nouns) >= 13
    for noun in nouns:
        assert noun.__dataclass_params__.frozen and hasattr(noun, "__slots__"), noun  # type: ignore[union-attr]
