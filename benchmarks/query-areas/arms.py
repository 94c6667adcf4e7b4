"""Who chooses: Trilobe's strategies and those of four peers, each called through its own interface.

An arm is a function of one :class:`Turn` that returns ``n`` positions among the unlabeled. All arms see one and the
same model, :class:`Linear`; peers that want a fitted classifier get it by their own ``fit`` or ``fit_clf=False``, and
peers that want an ensemble get five of it, each fitted on a bootstrap sample of the labeled examples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from sets import Deal
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression

MEMBERS = 5
_FITS: dict[Any, Any] = {}


class Linear(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression over all ``n_classes``; a class not seen yet has probability 0."""

    def __init__(self, n_classes: int = 2) -> None:
        self.n_classes = n_classes

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Linear":
        y = np.asarray(y).astype(int)
        self.classes_, self.seen_ = np.arange(self.n_classes), np.unique(y)
        key = (hash((X.data if hasattr(X, "indptr") else np.ascontiguousarray(X)).tobytes()), hash(y.tobytes()))
        if key not in _FITS:  # peers fit anew what was fitted a moment ago
            if len(_FITS) > 20:
                _FITS.pop(next(iter(_FITS)))
            model = LogisticRegression(C=10.0, tol=1e-4, max_iter=300)
            _FITS[key] = model.fit(X, y) if len(self.seen_) > 1 else None
        self.model_ = _FITS[key]
        return self

    def predict_proba(self, X: Any) -> Any:
        proba = np.zeros((X.shape[0], self.n_classes))
        proba[:, self.seen_] = 1.0 if self.model_ is None else self.model_.predict_proba(X)
        return proba

    def predict(self, X: Any) -> Any:
        return self.predict_proba(X).argmax(axis=1)


@dataclass(frozen=True)
class Turn:
    """What one round of asking knows. ``known`` and ``rest`` index the pool; an arm returns positions in ``rest``."""

    deal: Deal
    known: Any
    rest: Any
    model: Linear | None
    n: int
    seed: int

    @cached_property
    def proba(self) -> Any:
        return self.model.predict_proba(self.deal.X[self.rest]) if self.model else None

    @property
    def y(self) -> Any:
        return self.deal.y[self.known]

    @cached_property
    def like(self) -> Any:
        return self.deal.like[self.rest]

    @cached_property
    def bootstraps(self) -> list[Any]:
        """Five bootstrap samples of ``known``; one of a single class is drawn again."""
        rng, samples = np.random.default_rng(self.seed), []
        while len(samples) < MEMBERS:
            rows = rng.choice(self.known, len(self.known))
            if len(np.unique(self.deal.y[rows])) > 1 or len(np.unique(self.y)) == 1:
                samples.append(rows)
        return samples

    @cached_property
    def opinions(self) -> Any:
        """What a model fitted on each bootstrap sample predicts: ``(5, n_rest, n_classes)``."""
        X, y, k = self.deal.X, self.deal.y, self.deal.n_classes
        return np.stack([Linear(k).fit(X[r], y[r]).predict_proba(X[self.rest]) for r in self.bootstraps])


Arm = Callable[[Turn], Any]


def ours(strategy: str, diversity: int = 1) -> Arm:
    """:func:`trilobe.data.query.select`, told what was asked before; committees get the ensemble's opinions."""

    def choose(t: Turn) -> Any:
        from trilobe.data.query import select

        samples = None
        if strategy in ("bald", "mean_std"):
            samples = t.opinions
        known = t.deal.like[t.known] if len(t.known) else None
        return select(strategy, t.n, t.proba, t.like, diversity, t.seed, known=known, samples=samples).index

    return choose


def small_text(name: str, **settings: Any) -> Arm:
    """small-text, over its ``SklearnClassifier``, which here also knows its embeddings."""

    def choose(t: Turn) -> Any:
        import small_text as st
        from small_text.integrations.pytorch.query_strategies import BADGE

        class Classifier(st.SklearnClassifier):
            def embed(self, dataset: Any, return_proba: bool = False, pbar: Any = None, **_: Any) -> Any:
                found = like[dataset.x[:, -1].astype(int)]
                return (found, self.predict_proba(dataset)) if return_proba else found

        class Numbered(Linear):  # its last column is the number of the row, by which embeddings are found
            def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Numbered":
                super().fit(X[:, :-1], y, sample_weight)
                return self

            def predict_proba(self, X: Any) -> Any:
                return super().predict_proba(X[:, :-1])

        X, like = t.deal.X, t.deal.like
        X = np.column_stack([X.toarray() if hasattr(X, "toarray") else X, np.arange(X.shape[0])])
        pool = st.SklearnDataset(X, np.where(np.isin(np.arange(len(X)), t.known), t.deal.y, 0),
                                 target_labels=np.arange(t.deal.n_classes))  # fmt: skip
        clf = Classifier(Numbered(t.deal.n_classes), t.deal.n_classes)
        clf.model.seen_, clf.model.model_, clf.model.classes_ = t.model.seen_, t.model.model_, t.model.classes_
        np.random.seed(t.seed)  # noqa: NPY002 (the peer draws from numpy's global generator)
        base = st.BreakingTies()
        if name == "DiscriminativeActiveLearning":
            factory = st.SklearnClassifierFactory(Numbered(2), 2)
            strategy = st.DiscriminativeActiveLearning(factory, 5, pbar=None)
        elif name in ("SEALS", "AnchorSubsampling"):
            strategy = getattr(st, name)(base, **settings)
        elif name == "BADGE":
            strategy = BADGE(t.deal.n_classes)
        else:
            strategy = getattr(st, name)(**settings)
        more = {} if name not in ("SEALS", "AnchorSubsampling") else {"pbar": None}
        if name in ("GreedyCoreset", "LightweightCoreset", "EmbeddingKMeans", "BADGE", "ContrastiveActiveLearning"):
            more = {"pbar": None}
        found = strategy.query(clf, pool, t.rest, t.known, t.y, n=t.n, **more)
        return np.searchsorted(t.rest, found)

    return choose


def skactiveml(name: str, needs: str = "", **settings: Any) -> Arm:
    """scikit-activeml; ``needs``: "clf", "estimator", "ensemble", "discriminator", or nothing but X and y."""

    def choose(t: Turn) -> Any:
        from skactiveml import pool
        from skactiveml.classifier import SklearnClassifier

        classes = np.arange(t.deal.n_classes)
        X = t.deal.X.toarray() if hasattr(t.deal.X, "toarray") else t.deal.X
        X = t.deal.like if not needs else X
        y = np.full(len(X), np.nan)
        y[t.known] = t.deal.y[t.known]
        more: dict[str, Any] = {}
        if needs in ("clf", "estimator"):
            known = np.full(len(X), np.nan)
            known[t.known] = y[t.known]
            clf = SklearnClassifier(Linear(t.deal.n_classes), classes=classes).fit(X[t.known], known[t.known])
            more = {needs: clf, f"fit_{needs}": False}
        elif needs == "ensemble":
            members = [SklearnClassifier(Linear(t.deal.n_classes), classes=classes).fit(X[rows], t.deal.y[rows])
                       for rows in t.bootstraps]  # fmt: skip
            more = {"ensemble": members, "fit_ensemble": False}
        elif needs == "discriminator":
            more = {"discriminator": SklearnClassifier(Linear(2), classes=[0, 1])}
        if name in ("CostEmbeddingAL", "Quire"):
            more_settings = {"classes": classes}
        else:
            more_settings = {"n_classes": t.deal.n_classes} if name == "ProbCover" else {}
        strategy = getattr(pool, name)(random_state=t.seed, **settings, **more_settings)
        return np.searchsorted(t.rest, strategy.query(X, y, batch_size=t.n, **more))

    return choose


def modal(name: str) -> Arm:
    """modAL: an ``ActiveLearner``, or a ``Committee`` of five."""

    def choose(t: Turn) -> Any:
        from modAL import batch, disagreement, uncertainty
        from modAL.models import ActiveLearner, Committee

        X, k = t.deal.X, t.deal.n_classes
        if hasattr(disagreement, name):
            parts = [ActiveLearner(Linear(k), X_training=X[rows], y_training=t.deal.y[rows]) for rows in t.bootstraps]
            found = getattr(disagreement, name)(Committee(parts), X[t.rest], n_instances=t.n)
        else:
            learner = ActiveLearner(Linear(k), X_training=X[t.known], y_training=t.y)
            module = uncertainty if hasattr(uncertainty, name) else batch
            found = getattr(module, name)(learner, X[t.rest], n_instances=t.n)
        return np.asarray(found[0] if isinstance(found, tuple) else found)

    return choose


def baal(name: str) -> Arm:
    """BAAL: heuristics rank predictions ``(n, n_classes, n_draws)``; the draws are the five of the ensemble."""

    def choose(t: Turn) -> Any:
        from baal.active import heuristics
        from baal.active.heuristics import stochastics

        single = name.endswith(("Entropy", "Margin", "Certainty"))
        draws = t.proba[..., None] if single else np.moveaxis(t.opinions, 0, -1)
        np.random.seed(t.seed)  # noqa: NPY002 (the peer draws from numpy's global generator)
        if name == "EPIG":
            target = np.random.default_rng(t.seed).choice(len(draws), 100, replace=False)
            ranks = heuristics.EPIG()(draws, draws[target])
        elif name.startswith(("Power", "Gibbs", "Rank")):
            kind = {"P": "PowerSampling", "G": "GibbsSampling", "R": "RankBasedSampling"}[name[0]]
            base = getattr(heuristics, name.removeprefix("Power").removeprefix("Gibbs").removeprefix("Rank"))()
            ranks = getattr(stochastics, kind)(base, query_size=t.n).get_ranks(draws)[0]  # calling it raises TypeError
        else:
            ranks = getattr(heuristics, name)()(draws)
        return np.asarray(ranks)[: t.n]

    return choose


TYPICAL = ours("typical")
# name -> (how it starts: "random", or its own choice of the first batch; how it goes on)
ARMS: dict[str, tuple[Arm | None, Arm]] = {
    "random": (None, ours("random")),
    "trilobe: typical, then margin spread 10": (TYPICAL, ours("margin", 10)),
    "trilobe: margin spread 10": (None, ours("margin", 10)),
    "trilobe: margin": (None, ours("margin")),
    "trilobe: entropy": (None, ours("entropy")),
    "trilobe: least confidence": (None, ours("least_confidence")),
    "trilobe: typical": (None, ours("typical")),
    "trilobe: typical, own start, then random": (TYPICAL, ours("random")),
    "trilobe: k-center": (None, ours("k_center")),
    "trilobe: badge": (None, ours("badge")),
    "trilobe: facility location": (None, ours("facility_location")),
    "trilobe: BALD spread 10": (None, ours("bald", 10)),
    "trilobe: mean std spread 10": (None, ours("mean_std", 10)),
    "small-text: LeastConfidence": (None, small_text("LeastConfidence")),
    "small-text: BreakingTies": (None, small_text("BreakingTies")),
    "small-text: PredictionEntropy": (None, small_text("PredictionEntropy")),
    "small-text: GreedyCoreset": (None, small_text("GreedyCoreset")),
    "small-text: LightweightCoreset": (None, small_text("LightweightCoreset")),
    "small-text: EmbeddingKMeans": (None, small_text("EmbeddingKMeans")),
    "small-text: ContrastiveActiveLearning": (None, small_text("ContrastiveActiveLearning", pbar=None)),
    "small-text: DiscriminativeActiveLearning": (None, small_text("DiscriminativeActiveLearning")),
    "small-text: SEALS + BreakingTies": (None, small_text("SEALS")),
    "small-text: AnchorSubsampling + BreakingTies": (None, small_text("AnchorSubsampling")),
    "small-text: BADGE": (None, small_text("BADGE")),
    "scikit-activeml: Uncertainty least_confident": (None, skactiveml("UncertaintySampling", "clf")),
    "scikit-activeml: Uncertainty margin_sampling": (
        None, skactiveml("UncertaintySampling", "clf", method="margin_sampling")),
    "scikit-activeml: Uncertainty entropy": (None, skactiveml("UncertaintySampling", "clf", method="entropy")),
    "scikit-activeml: QueryByCommittee KL": (None, skactiveml("QueryByCommittee", "ensemble")),
    "scikit-activeml: QueryByCommittee vote entropy": (
        None, skactiveml("QueryByCommittee", "ensemble", method="vote_entropy")),
    "scikit-activeml: QueryByCommittee variation ratios": (
        None, skactiveml("QueryByCommittee", "ensemble", method="variation_ratios")),
    "scikit-activeml: GreedyBALD": (None, skactiveml("GreedyBALD", "ensemble")),
    "scikit-activeml: BatchBALD": (None, skactiveml("BatchBALD", "ensemble")),
    "scikit-activeml: CoreSet": (None, skactiveml("CoreSet")),
    "scikit-activeml: GreedySamplingX": (None, skactiveml("GreedySamplingX")),
    "scikit-activeml: MaxHerding": (None, skactiveml("MaxHerding")),
    "scikit-activeml: TypiClust": (None, skactiveml("TypiClust")),
    "scikit-activeml: TypiClust, own start": (skactiveml("TypiClust"), skactiveml("TypiClust")),
    "scikit-activeml: ProbCover": (None, skactiveml("ProbCover")),
    "scikit-activeml: ProbCover, own start": (skactiveml("ProbCover"), skactiveml("ProbCover")),
    "scikit-activeml: Badge": (None, skactiveml("Badge", "clf")),
    "scikit-activeml: Clue": (None, skactiveml("Clue", "estimator")),
    "scikit-activeml: DropQuery": (None, skactiveml("DropQuery", "clf")),
    "scikit-activeml: Falcun": (None, skactiveml("Falcun", "clf")),
    "scikit-activeml: ContrastiveAL": (None, skactiveml("ContrastiveAL", "clf")),
    "scikit-activeml: DiscriminativeAL": (None, skactiveml("DiscriminativeAL", "discriminator", greedy_selection=True)),
    "scikit-activeml: CostEmbeddingAL": (None, skactiveml("CostEmbeddingAL")),
    "modAL: uncertainty": (None, modal("uncertainty_sampling")),
    "modAL: margin": (None, modal("margin_sampling")),
    "modAL: entropy": (None, modal("entropy_sampling")),
    "modAL: ranked batch": (None, modal("uncertainty_batch_sampling")),
    "modAL: vote entropy": (None, modal("vote_entropy_sampling")),
    "modAL: consensus entropy": (None, modal("consensus_entropy_sampling")),
    "modAL: KL max disagreement": (None, modal("max_disagreement_sampling")),
    "BAAL: Certainty": (None, baal("Certainty")),
    "BAAL: Margin": (None, baal("Margin")),
    "BAAL: Entropy": (None, baal("Entropy")),
    "BAAL: BALD": (None, baal("BALD")),
    "BAAL: Variance": (None, baal("Variance")),
    "BAAL: EPIG": (None, baal("EPIG")),
    "BAAL: PowerBALD": (None, baal("PowerBALD")),
    "BAAL: PowerEntropy": (None, baal("PowerEntropy")),
    "BAAL: RankEntropy": (None, baal("RankEntropy")),
    "BAAL: GibbsEntropy": (None, baal("GibbsEntropy")),
}  # fmt: skip

# Arms of one formula. Each is called through its own interface with seed 0; where it then chose the very examples of
# one before it in its row, it counts as that one with the other seeds.
FAMILIES = (
    ("trilobe: margin", "small-text: BreakingTies", "scikit-activeml: Uncertainty margin_sampling", "modAL: margin",
     "BAAL: Margin"),
    ("trilobe: entropy", "scikit-activeml: Uncertainty entropy", "small-text: PredictionEntropy", "modAL: entropy",
     "BAAL: Entropy"),
    ("trilobe: least confidence", "small-text: LeastConfidence", "scikit-activeml: Uncertainty least_confident",
     "modAL: uncertainty", "BAAL: Certainty"),
    ("trilobe: k-center", "scikit-activeml: CoreSet", "scikit-activeml: GreedySamplingX"),
    ("BAAL: BALD", "scikit-activeml: GreedyBALD", "scikit-activeml: QueryByCommittee KL"),
)  # fmt: skip


def twins(curves: dict[str, Any]) -> dict[str, str]:
    """Of the arms with the ``curves`` of seed 0: each that did what another of its family did -> that other."""
    out = {}
    for family in FAMILIES:
        ran = [arm for arm in family if arm in curves]
        for i, arm in enumerate(ran):
            same = next((other for other in ran[:i] if curves[other] == curves[arm]), None)
            if same:
                out[arm] = same
    return out


NOT_RUN = {
    "small-text: BALD": "wants a classifier with dropout; logistic regression has none",
    "small-text: ExpectedGradientLength and its two variants": "want a PyTorch classifier",
    "small-text: CategoryVectorInconsistencyAndRanking": "for several labels an example",
    "scikit-activeml: EpistemicUncertaintySampling": "wants its own kernel classifier or a bare LogisticRegression of "
    "two classes; refuses a classifier that knows all classes",
    "scikit-activeml: ProbabilisticAL, FourDs": "want a classifier of their own (kernel frequencies, a mixture model)",
    "scikit-activeml: Quire": "more than 60 s a round with 2,500 examples",
    "scikit-activeml: MonteCarloEER, ValueOfInformationEER": "fit the model for every example and class: 15,000 fits "
    "and more a round",
    "scikit-activeml: ExpectedModelChangeMaximization, ExpectedModelOutputChange, ExpectedModelVarianceReduction, "
    "KLDivergenceMaximization, GreedySamplingTarget, RegressionTreeBasedAL": "for regression",
    "scikit-activeml: SubSamplingWrapper, ParallelUtilityEstimationWrapper": "wrappers of the others",
    "modAL: expected_error_reduction": "fits the model for every example and class: 15,000 fits and more a round",
    "modAL: multilabel and Bayesian optimization": "for several labels an example; for regression",
    "BAAL: BatchBALD": "58 s a round with 4,000 examples of 6 classes; scikit-activeml's is in the table",
}
