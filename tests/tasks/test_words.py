"""Words of texts: exact offsets in any script, parts that cut nothing, numbers that stay the same."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import UnreadableExample, UsageError
from trilobe.tasks.words import FIRST, UNKNOWN, choose_preprocessing, decode, ids, split, to_bytes, tokenize
from trilobe.types import Span

PIECES = [
    "v2.3",
    "don't",
    "naïve",
    "nai\u0308ve",
    "東京",
    "สวัสดี",
    "नमस्ते",
    "مرحبا",
    "👩🏽‍🚀",
    "🇩🇪",
    "1️⃣",
    "❤️",
    "\u200d",
    "\u0301",
    "…",
]
SPACES = [" ", "\n", "\r\n", "\t", "\xa0", "\u2028", "\u3000", ""]
mixed = st.lists(st.sampled_from(PIECES + SPACES), max_size=30).map("".join)
anything = mixed | st.text(max_size=60)


@given(anything)
def test_every_character_that_is_no_space_is_in_exactly_one_word(text: str) -> None:
    words = tokenize(text)
    assert all(a < b for a, b in words)
    assert all(words[i][1] <= words[i + 1][0] for i in range(len(words) - 1))
    covered = {i for a, b in words for i in range(a, b)}
    assert covered == {i for i, c in enumerate(text) if not c.isspace()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v2.3 is out!", ["v", "2", ".", "3", "is", "out", "!"]),
        ("snake_case B2B", ["snake", "_", "case", "B", "2", "B"]),
        ("cafe\u0301 नमस्ते", ["cafe\u0301", "नमस्ते"]),
        ("東京タワー 서울", ["東", "京", "タ", "ワ", "ー", "서", "울"]),
        ("👨‍👩‍👧‍👦👍🏽🇩🇪🇫🇷1️⃣❤️", ["👨‍👩‍👧‍👦", "👍🏽", "🇩🇪", "🇫🇷", "1️⃣", "❤️"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("a\xa0b\u2028c", ["a", "b", "c"]),
        ("١٢٣ x²", ["١٢٣", "x²"]),
        ("...", [".", ".", "."]),
    ],
)
def test_words_as_people_see_them(text: str, words: list[str]) -> None:
    assert [text[a:b] for a, b in tokenize(text)] == words


@given(anything, st.integers(1, 9), st.data())
def test_parts_hold_all_words_and_cut_no_span(text: str, most: int, data: st.DataObject) -> None:
    words = tokenize(text)
    keep = []
    at = 0
    while words and at < len(words) and data.draw(st.booleans()):
        first = data.draw(st.integers(at, len(words) - 1))
        last = data.draw(st.integers(first, len(words) - 1))
        keep.append(Span(words[first][0], words[last][1], "X"))
        at = last + 1
    parts = split(text, most, keep)
    again = [(a + p, b + p) for p, q in parts for a, b in tokenize(text[p:q])]
    assert again == words, "a part has the words of the whole"
    for p, q in parts:
        inside = [s for s in keep if s.start < q and s.end > p]
        assert all(p <= s.start and s.end <= q for s in inside)
        n = len(tokenize(text[p:q]))
        longest = max((len(tokenize(text[s.start : s.end])) for s in inside), default=0)
        assert n <= max(most, longest + most)
        assert n <= most or inside


def test_parts_end_with_sentences() -> None:
    text = 'He said "No." Then v2.3 came. Nothing else。以上です。End'
    assert [text[a:b] for a, b in split(text, 8)] == [
        'He said "No."',
        "Then v2.3 came.",
        "Nothing else。以上です。",
        "End",
    ]
    assert [len(tokenize("a b c d e f g"[a:b])) for a, b in split("a b c d e f g", 3)] == [3, 3, 1]
    assert split("", 3) == split(" \n", 3) == []
    with pytest.raises(UsageError, match="parts of 0 words"):
        split("a", 0)


@pytest.mark.parametrize("piece", ["The quick fox, v2.3 of Zürich. ", "-", "word", "👩🏽‍🚀 ", "a\u0301"])
def test_a_large_document_takes_no_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    keep = [Span(a, b, "X") for a, b in tokenize(text[: len(piece) * 1000])[:1000]]
    began = time.monotonic()
    parts = split(text, 256, keep)
    assert time.monotonic() - began < 20  # it takes about one second; quadratic time would take hours
    assert parts[0][0] == 0 and parts[-1][1] == len(text.rstrip())


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip))
def test_texts_come_back_from_bytes(text: str) -> None:
    data = to_bytes(text)
    assert decode(data) == text and to_bytes(decode(data)) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty text"),
        (b" \n\t\xc2\xa0", "spaces only"),
        (b"\xef\xbb\xbf", "an empty text"),
        ("Zürich".encode("latin-1"), r"byte 1 \(0xfc\)"),
        ("Zürich".encode("utf-16"), "UTF-16"),
        (b"ab\0c", "byte 2 is NUL"),
        (b"\x89PNG\r\n\x1a\n\0", "byte 8 is NUL"),
        (b"\xff" * 40, "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableExample, match=message):
        decode(data)
    with pytest.raises(UnreadableExample, match="surrogate"):
        to_bytes("a\ud800")


def test_numbers_of_words() -> None:
    spec = choose_preprocessing(["some words"])
    [row] = ids(["Rome rome ROME 1996 2024 re\u0301sume\u0301 résumé"], spec)
    word = row[:, 0]
    assert word[0] == word[1] == word[2] and word[3] == word[4] and word[5] == word[6]
    assert len({*word.tolist()}) == 3
    assert (row[0, 1:] != row[1, 1:]).any(), "letters say which is which"
    assert row.dtype == np.float32 and row[:, 0].min() >= FIRST > UNKNOWN > 0
    assert row[:, 0].max() < FIRST + spec["buckets"] and row[:, 1:].min() >= 0 and row[:, 1:].max() < 256
    assert [r.shape for r in ids(["", "a"], spec)] == [(0, 17), (1, 17)] and ids([], spec) == []


def test_long_words_keep_both_ends() -> None:
    spec = {"version": "words.v1", "buckets": 1024, "n_chars": 4}
    [row] = ids(["abQQQyz"], spec)
    assert "".join(chr(int(c)) for c in row[0, 1:]) == "abyz"


def test_numbers_stay_the_same_in_another_process() -> None:
    code = "from trilobe.tasks.words import *; print(ids(['Zürich 👍'], choose_preprocessing(['a']))[0].tolist())"
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        )
        for s in ("1", "2")
    ]
    here = ids(["Zürich 👍"], choose_preprocessing(["a"]))[0].tolist()
    assert said[0].stdout == said[1].stdout == f"{here}\n"
    assert here[0][0] == 164.0, "words.v1 must not change: models in use depend on it"


def test_given_words_and_wrong_versions() -> None:
    spec = choose_preprocessing(["a"])
    assert ids(["don't"], spec, [[(0, 5)]])[0].shape == (1, 17)
    with pytest.raises(UsageError, match=r"expected 'words\.v1'"):
        ids(["a"], {**spec, "version": "words.v0"})


def test_buckets_follow_the_pool() -> None:
    many = [
        " ".join(
            f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{'uvwxyz'[i % 6]}{'é' * (i % 89)}" for i in range(3000)
        )
    ]
    assert choose_preprocessing(["a"])["buckets"] == 1024
    assert choose_preprocessing(many)["buckets"] in (4096, 8192)
    assert choose_preprocessing(many, most=2048)["buckets"] == 2048
