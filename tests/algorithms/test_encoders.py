"""Networks for texts: padding touches nothing, the graph says what the module says, sets are learned from too."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trilobe.algorithms.encoders import Tagger, TextClassifier, WordEncoder, encoder_for, features
from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import Plan, fit, predict_logits
from trilobe.algorithms.weights import load_into, to_safetensors
from trilobe.errors import UsageError
from trilobe.infrastructure.pipeline import onnx_step
from trilobe.rows import as_rows, pad

TAGS = ["O", "B-X", "I-X"]


def rows(lengths: list[int], extra: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Texts of words 2..33 with up to 4 letters, the first letters 65 + word."""
    dice, out = np.random.default_rng(seed), []
    for n in lengths:
        x = np.zeros((n, 5 + extra), dtype=np.float32)
        x[:, 0] = dice.integers(2, 34, n)
        for i in range(n):
            x[i, 1 : 2 + dice.integers(0, 4)] = 65 + x[i, 0]
        x[:, 5:] = dice.normal(size=(n, extra))
        out.append(x)
    return out


def networks(extra: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        Tagger(WordEncoder(32, 4, extra, width=8), 3, TAGS),
        TextClassifier(WordEncoder(32, 4, extra, width=8, layers=2), 3),
    ]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("which", [0, 1], ids=["tagger", "classifier"])
def test_a_text_is_judged_alike_alone_and_padded(which: int, extra: int) -> None:
    module = networks(extra)[which].eval()
    texts = rows([1, 7, 3, 20], extra)
    padded, _ = pad(texts)
    longer = np.concatenate([padded, np.zeros((4, 40, padded.shape[2]), dtype=np.float32)], axis=1)
    with torch.no_grad():
        together, more = module(torch.from_numpy(padded)), module(torch.from_numpy(longer))
        for i, x in enumerate(texts):
            alone = module(torch.from_numpy(x[None]))[0]
            for batch in (together, more):
                got = batch[i, : len(x)] if which == 0 else batch[i]
                torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_training_does_not_see_the_padding_either() -> None:
    """Dropout aside, gradients of a padded batch are those of its texts one by one."""
    torch.manual_seed(0)
    module = Tagger(WordEncoder(32, 4, width=8, dropout=0.0), 3, TAGS)
    texts = rows([2, 6])
    known = [np.eye(3)[[1, 2]], np.eye(3)[[0, 1, 2, 2, 0, 0]]]

    def gradients(batches: list[list[int]]) -> list[Tensor]:
        module.zero_grad()
        for batch in batches:
            x, told = pad([texts[i] for i in batch])[0], pad([known[i] for i in batch], 1.0)[0]
            n = sum(len(texts[i]) for i in batch)
            (module.loss(torch.from_numpy(x), torch.from_numpy(told)) * n).backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    for together, alone in zip(gradients([[0, 1]]), gradients([[0], [1]]), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_exported_graph_takes_any_number_of_texts_and_words() -> None:
    extra = 3
    module = networks(extra)[0].eval()
    _, run = onnx_step(to_onnx(module, np.stack(rows([5], extra)), free=2))
    for lengths in ([1], [9], [1, 1, 1], [4, 60, 2]):
        x, _ = pad(rows(lengths, extra, seed=len(lengths)))
        with torch.no_grad():
            want = module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run({"x": x})["logits"], want, atol=1e-5)


def test_log_proba_is_the_marginals_and_keeps_the_scheme() -> None:
    module = networks(0)[0].eval()
    x = torch.from_numpy(pad(rows([4, 2]))[0])
    said = module.log_proba(x).exp()
    torch.testing.assert_close(said[0].sum(-1), torch.ones(4))
    torch.testing.assert_close(said[1, :2].sum(-1), torch.ones(2))
    assert said[:, 0, 2].max() < 1e-6, "nothing begins inside"


def task() -> tuple[np.ndarray, np.ndarray]:
    """Even words are entities of one word, after word 33 of two: context is needed."""
    texts = rows([int(n) for n in np.random.default_rng(1).integers(1, 12, 150)], seed=1)
    tags = []
    for x in texts:
        x[np.random.default_rng(len(x)).random(len(x)) < 0.2, 0] = 33
        word, t = x[:, 0], np.zeros(len(x), dtype=int)
        for i in range(len(x)):
            if i and word[i - 1] == 33 and t[i - 1] == 1:
                t[i] = 2
            elif word[i] == 33 or word[i] % 2 == 0:
                t[i] = 1
        tags.append(t)
    return as_rows(texts), as_rows(tags)


@pytest.mark.parametrize("told", ["certain", "sets"])
def test_a_tagger_learns_from_answers_and_from_sets(told: str) -> None:
    X, y = task()
    dice = np.random.default_rng(0)
    sure = [np.eye(3)[t] for t in y]
    if told == "sets":  # every third word is only known not to be one of the tags
        for row, t in zip(sure, y, strict=True):
            for i in np.flatnonzero(dice.random(len(t)) < 0.3):
                row[i] = 1
                row[i, (t[i] + dice.integers(1, 3)) % 3] = 0
    torch.manual_seed(0)
    module = Tagger(WordEncoder(32, 4, width=16, layers=2), 3, TAGS)
    fit(module, X[:120], as_rows(sure[:120]), Plan(steps=120, epochs=0, lr=0.02))
    said = predict_logits(module, X[120:])
    right = np.concatenate([p.argmax(1) == t for p, t in zip(said, y[120:], strict=True)])
    assert right.mean() > 0.9, "chance is below 0.6"


def test_weights_travel_with_what_may_follow_what() -> None:
    one, other = networks(0)[0].eval(), Tagger(WordEncoder(32, 4, width=8), 3, TAGS).eval()
    assert {"crf.start", "crf.transition", "crf.end", "rule"} <= set(one.state_dict())
    load_into(other, to_safetensors(one.state_dict()))
    x = torch.from_numpy(pad(rows([4, 2]))[0])
    torch.testing.assert_close(one.log_proba(x), other.log_proba(x))


def test_features_are_of_the_text_alone() -> None:
    encoder = encoder_for({"buckets": 32, "n_chars": 4}, width=8, layers=1)
    texts = rows([3, 9, 1])
    together = features(encoder.train(), as_rows(texts))
    for row, x in zip(together, texts, strict=True):
        np.testing.assert_allclose(features(encoder, x[None])[0], row, atol=1e-5)
    assert features(encoder, as_rows([])).shape == (0, 32)


def test_hidden_words_are_met_while_training_only() -> None:
    torch.manual_seed(0)
    encoder = WordEncoder(32, 4, width=8, dropout=0.6)
    x = torch.full((1, 2000), 5)
    with torch.no_grad():
        hidden = (encoder._words(x) == encoder.word.weight[1]).all(dim=2).float().mean()
    assert 0.15 < float(hidden) < 0.25
    assert torch.equal(encoder.eval()._words(x)[0, 0], encoder.word.weight[5])


@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"n_chars": 0}, {"extra": -1}, {"layers": 0}])
def test_sizes_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="an encoder of"):
        WordEncoder(**({"buckets": 8, "n_chars": 4} | wrong))
