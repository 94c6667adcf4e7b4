"""Answers about spans, as sets of tags for each token: how entity answers enter the one engine for answers.

A tagged text is a sequence of units, one per token, and a tag is a class (``O``, ``B-CITY``, ``I-CITY``, and in the
BIOES scheme also ``E-`` and ``S-``). An answer about spans leaves a set of tags possible for each token, so beliefs
about texts come from :mod:`trilobe.data.beliefs` unchanged.
"""

from collections.abc import Sequence

import numpy as np

from trilobe.errors import AnswerError, UsageError
from trilobe.types import BoolArray, LabelSpace, Response, Span

Offsets = Sequence[tuple[int, int]]


def tag_space(labels: Sequence[str], scheme: str = "BIO") -> LabelSpace:
    """The tags of entity ``labels`` under a scheme, ``O`` first.

    >>> tag_space(["CITY"]).names
    ('O', 'B-CITY', 'I-CITY')
    >>> len(tag_space(["CITY", "DATE"], "BIOES"))
    9
    """
    if scheme not in ("BIO", "BIOES"):
        raise UsageError(f"tagging scheme {scheme!r}", expected="'BIO' or 'BIOES'")
    return LabelSpace(("O", *(f"{p}-{label}" for label in labels for p in scheme.replace("O", ""))), scheme=scheme)


def spans_to_tags(spans: Sequence[Span], offsets: Offsets, space: LabelSpace) -> list[str]:
    """The tag of each token when ``spans`` and no others are the entities.

    Args:
        spans: in Unicode code points.
        offsets: ``(start, end)`` of each token, in order.
        space: from :func:`tag_space`.

    Raises:
        AnswerError: spans overlap, or one does not begin and end with tokens.

    >>> spans_to_tags([Span(3, 11, "CITY")], [(0, 2), (3, 6), (7, 11)], tag_space(["CITY"]))
    ['O', 'B-CITY', 'I-CITY']
    """
    tags = ["O"] * len(offsets)
    taken: dict[int, Span] = {}
    for span in sorted(spans):
        first, last = _tokens(span, offsets)
        for i in range(first, last + 1):
            if i in taken:
                raise AnswerError(f"{_said(span)} overlaps {_said(taken[i])}", expected="spans that do not overlap")
            taken[i] = span
            tags[i] = f"{_prefix(i, first, last, space.scheme)}-{span.label}"
            space.index(tags[i])
    return tags


def tags_to_spans(tags: Sequence[str], offsets: Offsets) -> list[Span]:
    """The spans a valid tag sequence stands for; the inverse of :func:`spans_to_tags` for both schemes.

    >>> tags_to_spans(["O", "B-CITY", "I-CITY"], [(0, 2), (3, 6), (7, 11)])
    [Span(start=3, end=11, label='CITY')]
    """
    spans: list[Span] = []
    for tag, (start, end) in zip(tags, offsets, strict=True):
        prefix, _, label = tag.partition("-")
        if prefix in ("B", "S"):
            spans.append(Span(start, end, label))
        elif prefix in ("I", "E") and spans and spans[-1].label == label:
            spans[-1] = Span(spans[-1].start, end, label)
    return spans


def possible_tags(response: Response, offsets: Offsets, space: LabelSpace) -> BoolArray:
    """What an answer about spans leaves possible for each token: ``(n_tokens, n_tags)`` booleans.

    ``spans`` fixes every token. ``span_accepted`` fixes the tokens of the span, and says that it ends there.
    ``span_rejected`` forbids one whole sequence of tags, which is not a set per token; kept of it is what never
    excludes the truth: a single token loses its tag where that tag alone would be the span (``S-`` in BIOES; ``B-`` in
    BIO at the end of the text), and longer spans lose nothing.

    >>> space = tag_space(["CITY"], "BIOES")
    >>> no = possible_tags(Response("span_rejected", spans=(Span(0, 5, "CITY"),)), [(0, 5), (6, 8)], space)
    >>> [space.names[i] for i in np.flatnonzero(~no[0])], bool(no[1].all())
    (['S-CITY'], True)
    """
    if not space.scheme:
        raise UsageError("a label space without a tagging scheme", expected="one made by tag_space")
    mask = np.ones((len(offsets), len(space)), dtype=bool)
    if response.kind == "unsure":
        return mask
    if response.kind == "spans":
        index = [space.index(tag) for tag in spans_to_tags(response.spans, offsets, space)]
        return np.eye(len(space), dtype=bool)[index].reshape(mask.shape)
    if response.kind not in ("span_accepted", "span_rejected"):
        raise AnswerError(f"a {response.kind!r} answer to a question about spans", expected="an answer about spans")
    span = response.spans[0]
    first, last = _tokens(span, offsets)
    if response.kind == "span_accepted":
        for i in range(first, last + 1):
            mask[i] = False
            mask[i, space.index(f"{_prefix(i, first, last, space.scheme)}-{span.label}")] = True
        if last + 1 < len(offsets) and space.scheme == "BIO":
            mask[last + 1, space.index(f"I-{span.label}")] = False
    elif first == last and (space.scheme == "BIOES" or last + 1 == len(offsets)):
        mask[first, space.index(f"{_prefix(first, first, last, space.scheme)}-{span.label}")] = False
    return mask


def _prefix(i: int, first: int, last: int, scheme: str) -> str:
    if scheme == "BIOES" and i == last:
        return "S" if first == last else "E"
    return "B" if i == first else "I"


def _tokens(span: Span, offsets: Offsets) -> tuple[int, int]:
    """The first and last token of a span that begins and ends with tokens."""
    starts = {start: i for i, (start, _) in enumerate(offsets)}
    ends = {end: i for i, (_, end) in enumerate(offsets)}
    if span.start not in starts or span.end not in ends or starts[span.start] > ends[span.end]:
        raise AnswerError(f"{_said(span)} does not begin and end with tokens", expected="a span of whole tokens")
    return starts[span.start], ends[span.end]


def _said(span: Span) -> str:
    return f"the span {span.start} to {span.end} ({span.label})"
