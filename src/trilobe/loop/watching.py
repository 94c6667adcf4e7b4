"""``monitor`` and ``explain``: what an endpoint saw is held against its baseline, and a person sees why."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trilobe.errors import NotEnoughData, NotFoundError
from trilobe.files import write_atomically
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.monitor import Baseline, Window, find
from trilobe.loop.project import Project, digest, opened, positive, tell
from trilobe.types import Bundle, Capture, Finding


@dataclass(frozen=True)
class Explained:
    """Why one capture was judged as it was: a picture of it, and one that shows what the model looked at."""

    capture_id: str
    flagged: bool
    predicted: str
    confidence: float
    image: Path
    overlay: Path
    residual: float


def monitor(
    project: "Project | Path | str" = ".",
    name: str = "",
    last: int | None = None,
    since: float = 0.0,
    model: str = "",
) -> Window:
    """Hold what an endpoint captured against the baseline in its bundle, and keep what is found.

    Three rules look at every window: one class predicted more than half of the time, consistently low confidence, and
    drift of the predicted classes; together they raise at most monitor.alpha false alarms per window of clean traffic.
    On the command line an alarm gives exit code 3.

    Args:
        project: the project's folder.
        name: the endpoint; the project's by default.
        last: how many of the newest captures make the window; monitor.window by default.
        since: only captures from this time on (seconds since 1970).
        model: a model or a pipeline served beside the endpoint's own, by its name: what was asked under that name is
            held against the bundle that gave its newest answer.

    Returns:
        The verdict, with its findings (kept, see ``trilobe show findings``).

    Example:
        trilobe monitor --last 200
        trilobe monitor --model inspect
    """
    positive(last=last)
    with opened(project) as p:
        name = name or p.config.project.name
        bundle, settings = serving(p, name, model), p.config.monitor
        captures = read_captures(p.captures, name, since, bundle.id, last or settings.window, model)
        baseline = Baseline.from_json({k: v for k, v in read_json(bundle, "baseline.json").items() if k != "on"})
        window = find(baseline, captures, p.task.watched_space(p.space), settings.alpha, settings.share, seed=p.seed)
        known = {f.id for f in p.store.findings(name)}
        p.store.add_findings([f for f in window.findings if f.id not in known])
        return window


def serving(p: Project, name: str, model: str = "") -> Bundle:
    """The bundle behind an endpoint now (or when it was last running); of another ``model``, the last that answered."""
    from trilobe.infrastructure.bundle import open_bundle

    try:
        bundle_id = endpoints.status(p.endpoint_folder(name)).bundle_id
    except NotFoundError as e:
        raise NotFoundError(f"no endpoint {name!r}", expected="one that was started", hint="trilobe serve") from e
    if model:
        bundle_id = _answered_last(p, name, model)
    return open_bundle(_bundle_path(p, name, bundle_id))


def _answered_last(p: Project, name: str, model: str) -> str:
    captures = [c for c in read_captures(p.captures, name, model=model) if c.bundle_id and not c.live]
    if not captures:
        known = sorted({c.model for c in read_captures(p.captures, name) if c.model and c.bundle_id})
        raise NotFoundError(
            f"nothing that a bundle answered as {model!r} was captured at {name!r}",
            expected=f"one of {known}" if known else "a model or a pipeline whose answers were captured",
        )
    return captures[-1].bundle_id


def _bundle_path(p: Project, name: str, bundle_id: str) -> Path:
    """Where the bundle of an endpoint lies; it may have been served from a path the store never saw."""
    found = [b.path for b in p.store.bundles() if b.id == bundle_id]
    if found:
        return found[-1]
    wishes = endpoints.read_desired(p.endpoint_folder(name)).models
    same = [wish.bundle for wish in wishes.values() if wish.bundle_id == bundle_id]
    return Path(same[0] if same else wishes[""].bundle)


def explain(project: "Project | Path | str" = ".", finding: str = "newest", n: int = 6) -> list[Explained]:
    """Show what a model looked at: heat maps of captures that caused a finding, beside clean ones.

    Of pictures the maps are FullGrad's (Srinivas and Fleuret 2019), which leave nothing of the model's score out; of
    texts they show how far the model's confidence falls when a word is left out.

    Args:
        project: the project's folder.
        finding: its id or first letters; the newest by default.
        n: how many flagged captures, and how many clean ones.

    Returns:
        One record per capture, flagged ones first; the PNG or SVG files lie in .trilobe/explanations/.

    Raises:
        NotEnoughData: there are no findings, or their captures are gone.

    Example:
        trilobe explain --finding newest -n 8
    """
    positive(n=n)
    with opened(project) as p:
        chosen = p.finding(finding)
        flagged, clean = _pick(p, chosen, n)
        bundle = next((b for b in p.store.bundles() if b.id == chosen.bundle_id), None)
        model = p.store.model(bundle.model_id if bundle else None)
        module = p.module(model)
        folder = p.state / "explanations" / chosen.id[:12]
        explained = []
        for captures, is_flagged in ((flagged, True), (clean, False)):
            if not captures:
                continue
            items = [p.task.captured(c.input) for c in captures]
            drawn = p.task.explain(module, items, p.task.encode(items, model.preprocessing))
            for c, (image, overlay, residual) in zip(captures, drawn, strict=True):
                kind = "png" if image.startswith(b"\x89PNG") else "svg"
                shown, why = folder / f"{c.id}.{kind}", folder / f"{c.id}-why.{kind}"
                write_atomically(shown, image)
                write_atomically(why, overlay)
                label = p.task.watched_space(p.space).names[c.prediction]
                explained.append(Explained(c.id, is_flagged, label, c.confidence, shown, why, residual))
        kept = [{**asdict(e), "image": str(e.image), "overlay": str(e.overlay)} for e in explained]
        p.store.record(f"explain/{chosen.id}", kept)
        tell(f"heat maps of {len(explained)} captures are in {folder}")
        return explained


def _pick(p: Project, finding: Finding, n: int) -> tuple[list[Capture], list[Capture]]:
    """Flagged captures spread over their list, and captures of the same endpoint that no finding names."""
    captures = read_captures(p.captures, finding.endpoint, bundle_id=finding.bundle_id)
    by_id = {c.id: c for c in captures}
    flagged = [by_id[i] for i in finding.capture_ids if i in by_id]
    if not flagged:
        raise NotEnoughData(f"the captures of finding {finding.id} are gone", hint="trilobe monitor")
    blamed = {i for f in p.store.findings(finding.endpoint) for i in f.capture_ids}
    first = min(c.at for c in flagged)
    clean = [c for c in captures if c.id not in blamed and c.at < first] or [c for c in captures if c.id not in blamed]
    rng = np.random.default_rng(int(digest(finding.id)[:8], 16))
    spread = [flagged[i] for i in sorted(rng.permutation(len(flagged))[:n])]
    return spread, [clean[i] for i in sorted(rng.permutation(len(clean))[:n])]
