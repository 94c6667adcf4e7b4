"""One door for strategies, and what a selection of a batch must and must not do."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.data import query
from trilobe.data.diversity import badge, k_center, typical
from trilobe.data.query import find, margin, select, strategies, top
from trilobe.data.sequences import mnlp, token_margin
from trilobe.errors import NotEnoughData, UsageError
from trilobe.rows import as_rows


def random_proba(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.5), n)


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tight groups far apart, and which group each row is of."""
    rng, group = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    return group[:, None] * 100.0 + rng.normal(0, 1, (len(group), 2)), group


def test_without_diversity_the_top_scores_are_taken_in_order() -> None:
    proba = random_proba(50, 3)
    plain = select("margin", 5, proba), select("margin", 5, proba, proba, diversity=1, duplicates=None)
    for chosen in plain:
        assert chosen.index.tolist() == np.argsort(-margin(proba))[:5].tolist()
        assert chosen.score.tolist() == margin(proba)[chosen.index].tolist()
        assert (chosen.strategy, chosen.reason) == ("margin.v1", "the model is torn between classes here")


def test_diversity_asks_once_per_group_of_like_examples() -> None:
    features, group = blobs([20, 20, 20])
    doubt = np.where(group == 0, 0.50, np.where(group == 1, 0.55, 0.60)) + np.random.default_rng(0).random(60) * 1e-3
    proba = np.stack([doubt, 1 - doubt], axis=1)
    assert set(group[select("margin", 3, proba, features, diversity=1, duplicates=None).index]) == {0}
    spread = select("margin", 3, proba, features, diversity=20, duplicates=None)
    assert sorted(group[spread.index]) == [0, 1, 2] and (np.diff(spread.score) <= 0).all()


def test_only_the_best_few_times_n_compete() -> None:
    features, group = blobs([5, 5, 90])
    doubt = np.where(group == 2, 0.99, 0.5)
    proba = np.stack([doubt, 1 - doubt], axis=1)
    chosen = select("margin", 2, proba, features, diversity=5)
    assert sorted(group[chosen.index]) == [0, 1]


def test_ties_fall_by_seed_not_by_position() -> None:
    proba = np.full((100, 2), 0.5)
    first = {tuple(select("margin", 3, proba, seed=s).index.tolist()) for s in range(10)}
    assert len(first) > 5


def test_without_a_model_typical_is_used_whatever_was_wished() -> None:
    features, _ = blobs([5, 5])
    chosen = select("margin", 2, None, features, duplicates=None)
    assert chosen.strategy == "typical.v1" and chosen.index.tolist() == typical(features, 2)[0].tolist()


def test_random_is_neutral() -> None:
    proba = np.stack([np.linspace(0.5, 1, 50), np.linspace(0.5, 0, 50)], axis=1)
    counts = np.zeros(50)
    for seed in range(400):
        counts[select("random", 10, proba, seed=seed).index] += 1
    assert abs(counts[:25].sum() - 2000) < 150 and counts.min() > 40


def test_a_users_function_is_named_in_the_reason() -> None:
    def reddest(proba: np.ndarray) -> np.ndarray:
        return proba[:, 0]

    chosen = select(reddest, 1, np.array([[0.1, 0.9], [0.8, 0.2]]))
    assert (chosen.index.tolist(), chosen.strategy, chosen.reason) == ([1], "reddest", "scores high in reddest")


@pytest.mark.parametrize(
    "score", [lambda p: p, lambda p: p[:1, 0], lambda p: p[:, 0] * np.nan, lambda p: -np.log(p[:, 0] * 0 + 1) + np.inf]
)
def test_scores_of_a_users_function_are_checked(score: object) -> None:
    with pytest.raises(UsageError, match="gave scores of shape"):
        select(score, 1, random_proba(4, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("proba", [None, random_proba(4, 2)], ids=["no model", "model"])
def test_wrong_wishes(proba: np.ndarray | None) -> None:
    features = np.eye(4)
    with pytest.raises(UsageError, match="unknown strategy 'margn'; expected one of margin, entropy"):
        select("margn", 2, proba, features)
    for n in (0, -1):
        with pytest.raises(UsageError, match=f"{n} questions; expected at least 1"):
            select("margin", n, proba, features)
    with pytest.raises(UsageError, match="NaN or infinity"):
        select("margin", 2, proba, features * np.nan)


def test_a_pool_of_nothing_and_features_of_another() -> None:
    for proba, features in ((None, None), (None, np.zeros((0, 3))), (np.zeros((0, 2)), np.zeros((0, 3)))):
        with pytest.raises(NotEnoughData, match="nothing to choose from"):
            select("margin", 2, proba, features)
    with pytest.raises(UsageError, match="3 rows of features for 4 examples"):
        select("margin", 2, random_proba(4, 2), np.eye(3))


def sentences(n: int, k: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return as_rows([rng.dirichlet(np.ones(k), size=rng.integers(1, 9)) for _ in range(n)])


def test_for_sequences_names_mean_their_tokens() -> None:
    rows = sentences(30)
    chosen = select("margin", 4, rows)
    assert chosen.strategy == "token_margin.v1"
    assert chosen.index.tolist() == np.argsort(-token_margin(rows))[:4].tolist()
    assert select("mnlp", 4, rows).index.tolist() == np.argsort(-mnlp(rows))[:4].tolist()
    dense = np.random.default_rng(0).dirichlet(np.ones(3), size=(6, 5))
    assert select("mnlp", 2, dense).index.tolist() == np.argsort(-mnlp(dense))[:2].tolist()


def test_a_score_of_tokens_is_no_score_of_classes_nor_the_other_way_round() -> None:
    with pytest.raises(UsageError, match="take margin, entropy or least_confidence"):
        select("mnlp", 1, random_proba(4, 2))
    with pytest.raises(UsageError, match=r"shape \(5,\)"):
        select("badge", 1, sentences(5), np.eye(5))


def test_batch_choosers_are_called_with_what_they_name() -> None:
    proba, x = random_proba(40, 3), np.random.default_rng(1).normal(size=(40, 6))
    known = x[:2] + 3
    assert select("k_center", 5, proba, x, known=known).index.tolist() == k_center(x, 5, known).tolist()
    chosen = select("badge", 5, proba, x, seed=7)
    assert chosen.index.tolist() == badge(proba, x, 5, 7).tolist()
    assert chosen.score == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2]) and chosen.strategy == "badge.v1"


def test_a_committee_brings_its_own_prediction() -> None:
    samples = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 20))
    samples[:, 11] = np.eye(3)[[0, 1, 2, 0]]  # here they contradict each other
    assert select("bald", 1, None, samples=samples).index.tolist() == [11]
    assert select("mean_std", 1, samples.mean(0), samples=samples).index.tolist() == [11]
    assert (
        select("margin", 3, None, samples=samples).index.tolist() == select("margin", 3, samples.mean(0)).index.tolist()
    )
    with pytest.raises(UsageError, match=r"bald.v1 without samples; expected samples, which it cannot"):
        select("bald", 1, samples.mean(0))


def test_a_chooser_without_what_it_needs() -> None:
    with pytest.raises(UsageError, match=r"k_center.v1 without features"):
        select("k_center", 1, random_proba(3, 2))


def last(size: int, n: int) -> np.ndarray:
    """A user's chooser."""
    return np.arange(size)[::-1][:n]


def test_a_user_s_strategy_is_a_function_a_path_or_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_a_user.py").write_text("def score(proba):\n    return proba[:, 0]\nthree = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    proba = random_proba(9, 2)
    assert select(last, 2, proba).index.tolist() == [8, 7]
    found = select("mine_of_a_user:score", 1, proba)
    assert (found.index[0], found.strategy) == (proba[:, 0].argmax(), "mine_of_a_user:score")
    with pytest.raises(UsageError, match=r"is a int; expected a function"):
        find("mine_of_a_user:three")
    for wrong in ("mine_of_a_user:gone", "not_a_package_at_all:score", "mine_of_a_user:", ":score"):
        with pytest.raises(UsageError, match=r"can't be imported"):
            find(wrong)

    def offered(group: str) -> list[EntryPoint]:
        assert group == "trilobe.strategies"
        entry = EntryPoint("first_class", "mine_of_a_user:score", group)
        object.__setattr__(entry, "dist", SimpleNamespace(version="2.1"))
        return [entry, EntryPoint("margin", "mine_of_a_user:score", group)]

    query._offered.cache_clear()
    monkeypatch.setattr(query, "entry_points", offered)
    assert strategies()[-1] == "first_class" and strategies().count("margin") == 1
    assert select("first_class", 1, proba).strategy == "first_class.v2.1"
    assert find("margin").function is margin  # a name of ours stays ours
    with pytest.raises(UsageError, match=r"facility_location, typical, random, first_class; package\.module:function"):
        find("frist_class")
    query._offered.cache_clear()
    sys.modules.pop("mine_of_a_user")


@pytest.mark.parametrize(
    "choose",
    [
        lambda n: np.zeros(n, dtype=int),
        lambda n: np.arange(n) + 5,
        lambda n: np.arange(n) - 1,
        lambda n: np.arange(n - 1),
        lambda n: np.arange(n) * 1.0,
        lambda n: (np.arange(n), np.full(n, np.nan)),
    ],
)
def test_choices_of_a_users_function_are_checked(choose: object) -> None:
    with pytest.raises(UsageError, match="chose indices of shape"):
        select(choose, 2, random_proba(5, 2))  # type: ignore[arg-type]


def near_copies(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Twenty examples, each four times with a little noise: probabilities, features, and which is which."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(20), 4)
    x = rng.normal(size=(20, 16))[group] + rng.normal(size=(80, 16)) * 1e-3
    doubt = 0.5 + 0.02 * group + rng.random(80) * 1e-3
    return np.stack([doubt, 1 - doubt], axis=1), x, group


@pytest.mark.parametrize("strategy", [s for s in query.STRATEGIES if s not in ("random", "bald", "mean_std")])
def test_nobody_is_asked_the_same_thing_twice(strategy: str) -> None:
    if "token" in strategy or strategy in ("mnlp", "total_nlp", "total_entropy"):
        proba, x, group = near_copies()
        proba = as_rows([np.tile(p, (1 + i % 3, 1)) for i, p in enumerate(proba)])
    else:
        proba, x, group = near_copies()
    for n in (3, 12, 40):
        chosen = select(strategy, n, proba, x, diversity=2, known=x[group < 5][::4])
        assert len(chosen.index) == min(n, 15)
        assert len(set(group[chosen.index])) == len(chosen.index) and group[chosen.index].min() >= 5
    nothing_known = select(strategy, 80, proba, x, known=x[:0])
    assert len(nothing_known.index) == len(set(group[nothing_known.index])) == 20
    everything = select(strategy, 80, proba, x, duplicates=None)
    assert sorted(everything.index) == list(range(80))


def test_a_pool_that_only_repeats() -> None:
    proba, x, _ = near_copies()
    for strategy in ("margin", "k_center"):
        with pytest.raises(NotEnoughData, match="repeats what is known"):
            select(strategy, 3, proba, x, known=x)
        assert len(select(strategy, 3, proba, x, known=x, duplicates=None).index) == 3


def test_random_stays_a_fair_sample_of_the_pool_with_its_duplicates() -> None:
    proba, x, _ = near_copies()
    assert sorted(select("random", 80, proba, x).index) == list(range(80))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_a_stream_gives_what_the_whole_gives(size: int, n: int, seed: int, ties: bool) -> None:
    proba = np.full((size, 3), 1 / 3) if ties else random_proba(size, 3, seed)
    want = select("entropy", n, proba, seed=seed)
    cut = np.sort(np.random.default_rng(seed).integers(0, size + 1, 3))
    got = top((c for c in np.split(proba, cut) if len(c)), n, "entropy", seed)
    assert got.index.tolist() == want.index.tolist() and got.score.tolist() == want.score.tolist()
    assert top(proba, n, "entropy", seed).index.tolist() == want.index.tolist()


def test_a_stream_of_sequences() -> None:
    rows = sentences(50)
    got = top([rows[:20], rows[20:]], 5, "margin")
    assert (got.index.tolist(), got.strategy) == (select("margin", 5, rows).index.tolist(), "token_margin.v1")


def test_a_stream_needs_little_memory(tmp_path: Path) -> None:
    """From a file of 40 MB, in 12 MB."""
    import tracemalloc

    proba = np.lib.format.open_memmap(tmp_path / "p.npy", "w+", np.float32, (1_000_000, 10))
    proba[:] = 0.1
    proba[123_456] = np.eye(10)[0] * 0.4 + 0.06
    proba.flush()
    del proba
    tracemalloc.start()
    got = top(np.load(tmp_path / "p.npy", mmap_mode="r"), 7, lambda p: p.max(axis=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.index[0] == 123_456 and peak < 12e6


def test_what_is_no_stream() -> None:
    with pytest.raises(UsageError, match=r"k_center.v1 on a stream of predictions; expected a score"):
        top([random_proba(3, 2)], 1, "k_center")
    with pytest.raises(NotEnoughData):
        top([], 1)
    with pytest.raises(UsageError, match="0 questions"):
        top([random_proba(3, 2)], 0)
    with pytest.raises(UsageError, match="row 1 sum to 2"):
        top([random_proba(3, 2), np.array([[0.5, 0.5], [1.0, 1.0]])], 1)
