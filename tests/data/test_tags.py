"""Spans as tags: round trips, what each answer leaves possible (against enumeration), and the engine on tokens."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.beliefs import AnswerTable, DawidSkene, log_likelihood
from trilobe.data.tags import possible_tags, spans_to_tags, tag_space, tags_to_spans
from trilobe.errors import AnswerError, UsageError
from trilobe.types import Answer, LabelSpace, Response, Span

TEXT = "Zoë flog 🛫 nach New York City"
OFFSETS = [(0, 3), (4, 8), (9, 10), (11, 15), (16, 19), (20, 24), (25, 29)]


def all_taggings(n: int, space: LabelSpace) -> list[tuple[str, ...]]:
    """Every valid tag sequence of n tokens: those that survive a round trip through spans."""
    offsets = [(i, i + 1) for i in range(n)]
    return [
        tags
        for tags in product(space.names, repeat=n)
        if tuple(spans_to_tags(tags_to_spans(tags, offsets), offsets, space)) == tags
    ]


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    cuts = sorted(draw(st.sets(st.integers(0, len(OFFSETS)), min_size=2, max_size=6)))
    pairs = [(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    return [Span(OFFSETS[a][0], OFFSETS[b - 1][1], draw(st.sampled_from(["PER", "LOC"]))) for a, b in pairs]


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
@given(spans=span_lists())
def test_spans_survive_a_round_trip(scheme: str, spans: list[Span]) -> None:
    tags = spans_to_tags(spans, OFFSETS, tag_space(["PER", "LOC"], scheme))
    assert tags_to_spans(tags, OFFSETS) == spans


def test_offsets_count_code_points() -> None:
    assert [TEXT[a:b] for a, b in OFFSETS][2:5] == ["🛫", "nach", "New"]
    assert spans_to_tags([Span(16, 29, "LOC")], OFFSETS, tag_space(["LOC"], "BIOES"))[4:] == ["B-LOC", "I-LOC", "E-LOC"]


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("kind", ["span_accepted", "span_rejected", "unsure", "spans"])
def test_the_sets_never_exclude_the_truth_and_are_tight(kind: str, first: int, last: int, scheme: str) -> None:
    """Enumerate every tagging of three tokens, keep those the answer allows, project them on each token."""
    space, offsets = tag_space(["X", "Y"], scheme), [(0, 1), (1, 2), (2, 3)]
    span = Span(offsets[first][0], offsets[last][1], "X")
    response = Response(kind, spans=() if kind == "unsure" else (span,))  # type: ignore[arg-type]
    allowed = {
        "span_accepted": lambda found: span in found,
        "span_rejected": lambda found: span not in found,
        "unsure": lambda found: True,
        "spans": lambda found: found == [span],
    }[kind]
    expected = np.zeros((3, len(space)), dtype=bool)
    for tags in all_taggings(3, space):
        if allowed(tags_to_spans(tags, offsets)):
            expected[range(3), [space.index(t) for t in tags]] = True
    valid = np.zeros_like(expected)
    for tags in all_taggings(3, space):
        valid[range(3), [space.index(t) for t in tags]] = True
    mask = possible_tags(response, offsets, space)
    assert (mask | ~expected).all(), "the truth must never be excluded"
    if kind == "spans" or (kind == "span_rejected" and first == last):
        assert (mask & valid == expected).all()
    elif kind == "span_accepted":
        assert (mask[first : last + 1] & valid[first : last + 1] == expected[first : last + 1]).all()


def test_the_engine_takes_span_answers_token_by_token() -> None:
    """A full answer, an accepted span and a "can't tell" by different people meet in one belief per token."""
    space, offsets = tag_space(["LOC"]), OFFSETS
    said = [
        ("ann", Response("spans", spans=(Span(16, 29, "LOC"),))),
        ("bob", Response("span_accepted", spans=(Span(16, 29, "LOC"),))),
        ("cat", Response("unsure")),
    ]
    answers = [Answer(str(i), f"q{i}", "text", who, response) for i, (who, response) in enumerate(said)]
    table = AnswerTable.from_answers(answers, space, lambda a: possible_tags(a.response, offsets, space))
    engine = DawidSkene().fit(table)
    (belief,) = table.beliefs(log_likelihood(table, engine.confusion_), engine.prior_)
    assert belief.likelihood.shape == (len(OFFSETS), len(space))
    best = [space.names[i] for i in belief.proba.argmax(axis=1)]
    assert tags_to_spans(best, OFFSETS) == [Span(16, 29, "LOC")]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(16, 24, "LOC"), Span(20, 29, "LOC")], "overlaps"),
        ([Span(16, 18, "LOC")], "does not begin and end with tokens"),
        ([Span(24, 16, "LOC")], "does not begin and end with tokens"),
        ([Span(16, 19, "DATE")], "unknown label 'B-DATE'"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans: list[Span], message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        spans_to_tags(spans, OFFSETS, tag_space(["LOC"]))


def test_the_wrong_kind_of_space_or_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="tagging scheme"):
        tag_space(["LOC"], "IOB1")
    with pytest.raises(UsageError, match="without a tagging scheme"):
        possible_tags(Response("unsure"), OFFSETS, LabelSpace(("a", "b")))
    with pytest.raises(AnswerError, match="'class' answer to a question about spans"):
        possible_tags(Response("class", ("O",)), OFFSETS, tag_space(["LOC"]))
