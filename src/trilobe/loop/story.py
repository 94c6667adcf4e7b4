"""What the report tells: the project's records, put into the parts of :mod:`trilobe.web.report`.

What only somebody outside knows (the truth about simulated annotators, the curve of random selection, what a client
counted) is handed in with :func:`tell_story` and kept in the journal under ``told/``.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trilobe import __version__
from trilobe.errors import NotFoundError
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.capture import read_captures
from trilobe.loop.believing import unpack_beliefs
from trilobe.loop.learning import held_out
from trilobe.loop.project import UNASKED, Project, annotators
from trilobe.rows import flat
from trilobe.statistics import wilson
from trilobe.trust.metrics import confusion_matrix, reliability
from trilobe.types import GOLD, Evidence, Example, Model
from trilobe.web import report as page
from trilobe.web.charts import Bin, Estimate, Series


def tell_story(p: Project, **parts: Any) -> None:
    """Keep what only the caller knows, for the report: ``curve_random``, ``true_quality``, ``wrong``, ``clean``,
    ``traffic``, ``repair``, ``stages``, ``command``, ``verdict``."""
    for name, value in parts.items():
        p.store.record(f"told/{name}", value)


def story(p: Project) -> page.ReportData:
    """Everything the project can tell so far."""
    told = {k.removeprefix("told/"): v for k, v in p.store.journal("told/").items()}
    model = p.newest_model()
    if model and model.space.names != p.space.names:
        model = None  # labels.names has changed since; its figures would be about other classes
    return page.ReportData(
        title=p.config.project.name,
        verdict=str(told.get("verdict", "")),
        created_at=time.time(),
        pool=_pool(p, told),
        questions=_questions(p, told),
        answers=_answers(p, told),
        training=_training(p, model) if model else None,
        checks=_checks(p, p.store.evidence(model.id)) if model else None,
        serving=_serving(p, told),
        monitoring=_monitoring(p, told),
        why=_why(p),
        repair=_repair(p, told),
        origin=_origin(p, model, told),
    )


def estimate(name: str, e: "Evidence | Mapping[str, Any]") -> Estimate:
    """An evidence (or a mapping with the same fields) as a named figure."""
    figure, low, high, n = (e[k] if isinstance(e, Mapping) else getattr(e, k) for k in ("figure", "low", "high", "n"))
    return Estimate(name, float(figure), float(low), float(high), int(n))


def _pool(p: Project, told: Mapping[str, Any]) -> page.Pool | None:
    counts = p.store.count_examples()
    pool = [e for e in p.store.examples("pool") if not e.source.startswith("finding")]
    if not pool:
        return None
    shown = [pool[i] for i in np.random.default_rng(p.seed).permutation(len(pool))[:14]]
    return page.Pool(
        examples=len(pool), held_out=counts.get("test", 0), classes=p.config.labels.names,
        sample=tuple(_pictures(p, shown)),
        how=f"Every {p.task.words.noun} is named by the digest of its bytes. One that is already there, also in the "
            f"held-out part, is left out: {p.task.words.same}.",
        **{k: len(v) for k, v in p.store.recorded("left_out", {}).items()},
    )  # fmt: skip


def _pictures(p: Project, examples: Sequence[Example], captions: Sequence[str] = ()) -> list[page.Picture]:
    drawn = [page.png_uri(p.task.picture(item)) for item in p.items(examples)]
    return [page.Picture(uri, captions[i] if captions else "") for i, uri in enumerate(drawn)]


def _questions(p: Project, told: Mapping[str, Any]) -> page.Questions | None:
    asked = [q for q in p.store.questions() if q.strategy not in UNASKED]
    if not asked:
        return None
    normal = [q for q in asked if not q.reason.startswith(("class", "low"))]
    last = [q for q in normal if q.round == max((q.round for q in normal), default=0)][:7]
    examples = {e.id: e for e in p.store.examples(ids=[q.example_id for q in last])}
    captions = [f"{q.reason} ({q.score:.2f})" for q in last]
    figure = next((c["figure"] for c in p.store.journal("curve/").values() if "figure" in c), "accuracy")
    return page.Questions(
        asked=len(asked),
        rounds=len({q.round for q in asked}),
        chosen=_series("chosen by the program", list(p.store.journal("curve/").values()), "main"),
        baseline=_series("picked at random", told.get("curve_random", []), "quiet"),
        target=p.config.run.goal,
        last_round=tuple(_pictures(p, [examples[q.example_id] for q in last], captions)),
        right=NAMES.get(figure, "right"),
        how=f"The first round asks about examples typical of the pool; then the strategy {p.strategy!r} asks where "
        f"{p.task.words.torn}, spread over unlike examples, and a share is left to chance, so that what the strategy "
        f"saves can be measured. The number under a {p.task.words.noun} is its score (higher: asked sooner). The curve "
        f"shows {figure.replace('_', ' ')}; bands are 95% intervals.",
    )


def _series(name: str, points: Sequence[Mapping[str, Any]], style: Any) -> Series | None:
    if not points:
        return None
    x, y, low, high = (tuple(float(c[k]) for c in points) for k in ("answers", "accuracy", "low", "high"))
    return Series(name, x, y, low, high, style)


def _answers(p: Project, told: Mapping[str, Any]) -> page.Answers | None:
    kept, truth, wrong = p.store.recorded("aggregate"), told.get("true_quality", {}), told.get("wrong", {})
    if not kept:
        return None
    people = []
    for a in annotators(p):
        if a["name"] == GOLD:
            continue
        low, high = wilson(round(a["quality"] * a["n"]), a["n"])
        quality = Estimate(a["name"], a["quality"], min(low, a["quality"]), max(high, a["quality"]), a["n"])
        people.append(page.Annotator(quality, a["n"], a["seconds"], truth.get(a["name"])))
    return page.Answers(
        kept["n_answers"], kept["n"], tuple(people),
        wrong.get("majority"), wrong.get("weighed"), wrong.get("judged", 0),
        how="Dawid and Skene's method (1979): how good each annotator is and what is true are estimated together, each "
            "from the other, until they agree. Nobody is told the truth. Intervals are Wilson's for the estimate.",
    )  # fmt: skip


def _training(p: Project, model: Model) -> page.Training:
    proba, labels, on = held_out(p, model)
    figures = p.task.measure(proba, labels, p.space)
    tokens, truth = flat(proba), np.concatenate([np.atleast_1d(row) for row in labels])
    matrix = confusion_matrix(truth, tokens.argmax(1), len(p.space))
    bins = [Bin(b.confidence, b.accuracy, b.count) for b in reliability(tokens, truth)]
    return page.Training(
        estimate(figures[0].check, figures[0]),
        trained_on=int(model.origin["n_examples"]),
        ece=next(e.figure for e in figures if e.check == "ece"),
        bins=tuple(bins),
        classes=p.space.names,
        confusion=tuple(tuple(int(c) for c in row) for row in matrix),
        right=NAMES.get(figures[0].check, "right"),
        how=f"Measured on: {on}. The network trains on what is believed of each answered example, certain or not; its "
        f"confidence is scaled by one temperature ({model.temperature:.2f}), fitted on predictions of networks that "
        "had not seen the example. Expected calibration error in 15 bins.",
    )


NAMES = {"ece": "calibration error", "brier": "Brier score", "log_loss": "log loss", "f1": "entity F1",
         "token_accuracy": "accuracy of tokens"}  # fmt: skip
MEANINGS = {
    "accuracy": "share of held-out examples it gets right",
    "f1": "harmonic mean of precision and recall, exact spans only",
    "precision": "share of the entities it finds that are right, exactly",
    "recall": "share of the true entities that it finds, exactly",
    "token_accuracy": "share of held-out tokens it tags rightly",
    "ece": "how far its stated confidence is from its accuracy",
    "brier": "mean squared distance of its probabilities from the truth, 0 to 2",
    "log_loss": "mean surprise at the truth, in nats",
    "parity": "largest difference between the packaged and the trained network",
}


def _checks(p: Project, evidence: Sequence[Evidence]) -> page.Checks | None:
    if not evidence:
        return None
    attacks = [e for e in evidence if e.check.startswith("robust_accuracy@")]
    first = "entity F1" if p.space.scheme else "accuracy"
    gates = [
        page.Gate(
            NAMES.get(e.check, e.check.replace("robust_accuracy@", f"{first} under attack, strength ")),
            e, MEANINGS.get(e.check, "what is left of it under attack, at worst"),
            "number" if e.check in ("parity", "brier", "log_loss") else "percent",
        )
        for e in evidence
    ]  # fmt: skip
    clean = next((e for e in evidence if e.check in ("accuracy", "f1")), None)
    bars = [estimate("no attack", clean)] if clean and attacks else []
    bars += [estimate(p.task.words.strength.format(float(e.check.split("@")[1])), e) for e in attacks]
    return page.Checks(
        tuple(gates), tuple(bars),
        how=f"{p.task.words.attack} Gates are set before the check.",
    )  # fmt: skip


def _serving(p: Project, told: Mapping[str, Any]) -> page.Serving | None:
    bundles = p.store.bundles()
    if not bundles:
        return None
    bundle, traffic = bundles[-1], told.get("traffic", {})
    files = tuple(
        page.BundleFile(name, int(f["bytes"]), str(f["sha256"])) for name, f in bundle.manifest.get("files", {}).items()
    )
    try:
        running = endpoints.status(p.endpoint_folder(None))
    except NotFoundError:
        return page.Serving(bundle.id, files)
    return page.Serving(
        running.bundle_id, files, running.name, running.url, captured=p.config.serve.capture,
        how="The endpoint speaks the Open Inference Protocol v2 over HTTP. A new bundle is verified, loaded and warmed "
            "up beside the old one, then takes its place between two requests.",
        **traffic,
    )  # fmt: skip


def _monitoring(p: Project, told: Mapping[str, Any]) -> page.Monitoring | None:
    name = p.config.project.name
    captures, findings = read_captures(p.captures, name), p.store.findings(name)
    if not captures:
        return None
    clean = told.get("clean", {})
    window: tuple[Estimate, ...] = ()
    baseline: tuple[float, ...] = ()
    flagged: tuple[str, ...] = ()
    shares = [f for f in findings if f.kind in ("class_share", "class_drift")]
    if shares:
        f, names = shares[0], p.task.watched_space(p.space).names
        bundle = next((b for b in p.store.bundles() if b.id == f.bundle_id), p.store.bundles()[-1])
        counts = np.array(read_json(bundle, "baseline.json")["class_counts"], dtype=float)
        baseline = tuple((counts / counts.sum()).tolist())
        of = next((c.model for c in captures if c.id in f.capture_ids), "")  # under which name that was asked
        seen = _window_counts(p, f.n, f.created_at, f.bundle_id, [c for c in captures if c.model == of])
        window = tuple(Estimate.of_counts(c, int(k), int(seen.sum())) for c, k in zip(names, seen, strict=True))
        flagged = tuple(c for c, w, b in zip(names, window, baseline, strict=True) if w.low > b)
    alarms = clean.get("false_alarms")
    return page.Monitoring(
        len(captures), tuple(findings), window, baseline, flagged, clean.get("captures"), clean.get("findings", 0),
        estimate("false alarms", alarms) if alarms else None,
        how="Three rules look at every window of captures: one class above half of all predictions, confidence lower "
            "than it should be, and a changed mix of classes. Each is an exact two-sample test against the predictions "
            f"on held-out examples, together held to at most {p.config.monitor.alpha:.0%} false alarms per window.",
    )  # fmt: skip


def _window_counts(p: Project, n: int, until: float, bundle_id: str, captures: Sequence[Any]) -> Any:
    """Predictions of each class in the window of ``n`` captures that ended at ``until``."""
    window = [c for c in captures if c.bundle_id == bundle_id and c.at <= until][-n:]
    return np.bincount([c.prediction for c in window], minlength=len(p.task.watched_space(p.space)))


def _why(p: Project) -> page.Why | None:
    kept = [e for value in p.store.journal("explain/").values() for e in value if Path(e["image"]).exists()]
    if not kept:
        return None

    def maps(flagged: bool) -> tuple[page.HeatMap, ...]:
        return tuple(
            page.HeatMap(_uri(e["image"]), _uri(e["overlay"]), e["predicted"], float(e["confidence"]))
            for e in kept
            if bool(e["flagged"]) == flagged
        )

    worst = max(float(e["residual"]) for e in kept)
    return page.Why(
        maps(True), maps(False)[:6], "FullGrad" if p.task.words.noun == "picture" else "leaving words out",
        how=f"{p.task.words.why}: what the maps leave out is at most {worst:.1e} of the score.",
    )  # fmt: skip


def _uri(path: str) -> str:
    return page.png_uri(Path(path).read_bytes())


def _repair(p: Project, told: Mapping[str, Any]) -> page.Repair | None:
    if not (r := told.get("repair")):
        return _repair_by_hand(p)
    changes = tuple(page.Change(c["name"], estimate("", c["before"]), estimate("", c["after"])) for c in r["changes"])
    return page.Repair(changes, r["new_answers"], r.get("requests", 0), r.get("failed", 0), r.get("bundle_id", ""),
                       "entity F1" if p.space.scheme else "right", r.get("how", ""))  # fmt: skip


def _repair_by_hand(p: Project) -> page.Repair | None:
    """What is known where nobody has the truth of the new traffic: new answers, the held-out part before and after."""
    examples = {e.id for e in p.store.examples("pool") if e.source.startswith("finding:")}
    answers, models = [a for a in p.store.answers() if a.example_id in examples], p.store.models()
    first = next((b for f in p.store.findings() for b in p.store.bundles() if b.id == f.bundle_id), None)
    if not answers or first is None or models[-1].id == first.model_id:
        return None
    figures = [
        next((e for e in p.store.evidence(id_) if e.check == "accuracy"), None)
        for id_ in (first.model_id, models[-1].id)
    ]
    before, after = figures
    if before is None or after is None:
        return None
    change = page.Change("the held-out part", estimate("", before), estimate("", after))
    how = "What the new traffic shows is not known here: the held-out part says that nothing was lost on the old."
    return page.Repair((change,), len(answers), bundle_id=p.store.bundles()[-1].id, how=how)


def _origin(p: Project, model: Model | None, told: Mapping[str, Any]) -> page.Origin | None:
    if model is None:
        return None
    kept = p.store.recorded("aggregate")
    n = len(unpack_beliefs(p.store.blobs.get(kept["beliefs"]))) if kept else 0
    packages = ("numpy", "torch", "onnxruntime", "scipy")
    return page.Origin(
        command=str(told.get("command", f"trilobe run --project {p.config.project.name}")),
        seed=p.seed,
        code_version=f"trilobe {__version__}",
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        digests={"model": model.id, "weights": model.weights, "beliefs": kept["beliefs"] if kept else ""},
        stages=tuple((str(k), float(v)) for k, v in told.get("stages", [])),
        how=f"The model was trained on beliefs about {n} examples; its record names their digest, the settings, the "
        "seed and the code version.",
    )
