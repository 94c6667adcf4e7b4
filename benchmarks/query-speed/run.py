"""Choosing 1,000 of 1,000,000 examples (128 features, 10 classes), ours beside four peers, on one thread.

OMP_NUM_THREADS=1 python benchmarks/query-speed/run.py [--quick] [--peer-python PYTHON_WITH_THE_PEERS]

Every measurement is a process of its own, so that its peak memory is known. Seconds are those of the processor (user
and system), since others use the machine too. Sizes rise from 2,000; a peer is not asked for a size that would take it
longer than ``CAP`` by its last time, and fails at one that takes more than ``MEMORY``. What has been measured is kept
in the temporary folder until the run ends, so an interrupted run goes on where it was.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import QUIET, arguments, ask_child, find_peer, keep, versions  # type: ignore[import-not-found]

SIZES, PICKS, CAP, MEMORY = (2000, 10_000, 100_000, 1_000_000), 1000, 300, 8 << 30
TASKS = ("margin", "entropy", "k_center", "badge")
PEERS = {"small-text": "small_text", "scikit-activeml": "skactiveml", "baal": "baal", "modAL": "modAL"}
PACKAGES = {"modAL": "modAL-python"}


def pool(n: int) -> tuple[Any, Any]:
    """Features of ten overlapping classes on a curved surface of 16 dimensions in 128, and predictions, as float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    where, bend, noise = rng.normal(size=(10, 16)), rng.normal(size=(16, 128)) / 4, rng.normal(size=(4096, 128)) / 10
    features, proba = np.empty((n, 128), np.float32), np.empty((n, 10), np.float32)
    for start in range(0, n, 4096):
        z = where[rng.integers(10, size=4096)] + rng.normal(size=(4096, 16))
        part = slice(start, min(start + 4096, n))
        logit = (z @ where.T / 2)[: part.stop - start]
        e = np.exp(logit - logit.max(axis=1, keepdims=True))
        features[part] = (np.tanh(z @ bend) + rng.permutation(noise))[: part.stop - start]
        proba[part] = e / e.sum(axis=1, keepdims=True)
    return features, proba


def ours(task: str, x: Any, p: Any, k: int) -> Callable[[], Any]:
    from trilobe.data.query import select

    if task in ("margin", "entropy"):
        return lambda: select(task, k, p).index
    if task == "margin, spread":  # one of each cluster among the best 10,000, nothing nearly alike
        return lambda: select("margin", k, p, x).index
    return lambda: select(task, k, p, x, known=x[:1]).index


def small_text(task: str, x: Any, p: Any, k: int) -> Callable[[], Any]:
    import numpy as np
    import small_text as st
    from small_text.integrations.pytorch.query_strategies import BADGE
    from small_text.query_strategies.coresets import greedy_coreset

    class Classifier:
        def predict_proba(self, dataset: Any) -> Any:
            return p

    everything, first = np.arange(len(x)), np.arange(1)
    if task == "k_center":
        return lambda: greedy_coreset(x, everything, first, k, distance_metric="euclidean")
    if task == "badge":
        return lambda: BADGE(10).sample(None, None, everything, first, None, k, x, embeddings_proba=p)
    score = st.BreakingTies() if task == "margin" else st.PredictionEntropy()
    return lambda: score.query(Classifier(), None, everything, first, None, n=k)


def scikit_activeml(task: str, x: Any, p: Any, k: int) -> Callable[[], Any]:
    import numpy as np
    from skactiveml.base import SkactivemlClassifier
    from skactiveml.pool import Badge, CoreSet, UncertaintySampling

    class Classifier(SkactivemlClassifier):  # type: ignore[misc]
        def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
            self.classes_ = np.arange(10)
            return self

        def predict_proba(self, X: Any) -> Any:
            return p[-len(X) :]

    y = np.full(len(x), np.nan)
    if task == "k_center":
        y[0] = 0
        return lambda: CoreSet(random_state=0).query(x, y, batch_size=k)
    method = {"margin": "margin_sampling"}.get(task, task)
    strategy = Badge(random_state=0) if task == "badge" else UncertaintySampling(method=method, random_state=0)
    clf = Classifier(classes=list(range(10))).fit(None, None)
    return lambda: strategy.query(x, y, clf, fit_clf=False, batch_size=k)


def baal(task: str, x: Any, p: Any, k: int) -> Callable[[], Any]:
    from baal.active.heuristics import Entropy, Margin

    return lambda: {"margin": Margin, "entropy": Entropy}[task]()(p[:, :, None])[:k]


def modal(task: str, x: Any, p: Any, k: int) -> Callable[[], Any]:
    from modAL.uncertainty import entropy_sampling, margin_sampling
    from sklearn.base import BaseEstimator

    class Classifier(BaseEstimator):  # type: ignore[misc]
        def predict_proba(self, X: Any) -> Any:
            return p

    return lambda: (margin_sampling if task == "margin" else entropy_sampling)(Classifier(), x, n_instances=k)[0]


WHO: dict[str, Callable[..., Callable[[], Any]]] = {
    "trilobe": ours,
    "small-text": small_text,
    "scikit-activeml": scikit_activeml,
    "baal": baal,
    "modAL": modal,
}


def child(who: str, n: str, k: str, *tasks: str) -> None:
    """Time each task and print ``{"seconds", "GB", "distinct"}`` as soon as it is done."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CAP + 30, CAP + 30))  # the 30 for imports and data
    x, p = pool(int(n))
    for task in tasks:
        choose, runs = WHO[who](task, x, p, int(k)), 0
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        while not runs or time.process_time() - start < (5 if runs < 3 and int(k) == PICKS else 0.5):
            found, runs = choose(), runs + 1
        seconds = (time.process_time() - start) / runs
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
        seen = {"seconds": round(seconds, 5), "runs": runs, "GB beside the data": round(more, 2)}
        print(json.dumps(seen | {"distinct": len(set(map(int, found)))}), flush=True)


def measured(python: str, who: str, n: int, k: int, tasks: list[str]) -> list[dict[str, Any]]:
    """What the child says of each task; ``{"failed": why}`` from where it ends early."""
    command = [python, "-W", "ignore", __file__, "--child", who, str(n), str(k), *tasks]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET)
    why = f"not done after {CAP} s" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["?"])[-1][:100]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return seen + [{"failed": why}] * (len(tasks) - len(seen))


def climb(python: str, who: str, task: str, cache: Path) -> dict[str, dict[str, Any]]:
    """A task at rising sizes, as far as it goes."""
    kept = json.loads(cache.read_text()) if cache.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for before, n in zip((0, *SIZES), SIZES, strict=False):
        name, last = f"{who}/{task}/{n}", found.get(str(before), {}).get("seconds", 0)
        if before and last * n / before > CAP:
            found[str(n)] = {"failed": f"would take {last * n / before:.0f} s by its last time"}
        else:
            kept[name] = kept.get(name) or measured(python, who, n, PICKS, [task])[0]
            cache.write_text(json.dumps(kept))
            found[str(n)] = kept[name]
            print(name, kept[name], file=sys.stderr)
        if "failed" in found[str(n)]:
            break
    return found


def same_as_exact(n: int, k: int) -> dict[str, Any]:
    """k-center against a pass over the whole pool for each choice: same choices, and the ratio of covering radii."""
    import numpy as np

    from trilobe.data.diversity import k_center

    x, _ = pool(n)
    nearest, exact = ((x - x[0]) ** 2).sum(axis=1), []
    for _ in range(k):
        exact.append(int(nearest.argmax()))
        gap = x - x[exact[-1]]
        np.minimum(nearest, np.einsum("ij,ij->i", gap, gap), out=nearest)
        nearest[exact] = np.minimum(nearest[exact], 0)
    got = k_center(x, k, known=x[:1])

    def radius(chosen: Any) -> float:
        near = np.full(n, np.inf)
        for c in x[[0, *chosen]]:
            gap = x - c
            np.minimum(near, np.einsum("ij,ij->i", gap, gap), out=near)
        return float(np.sqrt(near.max()))

    return {"pool": n, "share of the same choices": float((got == exact).mean()), "same set": set(got) == set(exact),
            "radius / exact radius": round(radius(got) / radius(exact), 6)}  # fmt: skip


def stream(n: int) -> None:
    """The 1,000 highest margins of ``n`` x 100 predictions that come in pieces of 65,536; in a process of its own.

    The same piece comes again and again: what is timed is scoring and choosing, not reading. Nothing large is made and
    dropped before, which would hide what the stream itself needs.
    """
    import numpy as np

    from trilobe.data.query import top

    piece = np.random.default_rng(0).random((65_536, 100), dtype=np.float32)
    np.power(piece, 8, out=piece)
    piece /= piece.sum(axis=1, keepdims=True)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = top((piece[: min(65_536, n - at)] for at in range(0, n, 65_536)), PICKS)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {"rows": n, "chosen": len(found.index), "seconds": round(seconds, 1)}
    print(json.dumps(seen | {"peak MB of the process": peak // 1000, "of it before the stream": before // 1000}))


def duplicates(n: int) -> dict[str, float]:
    """Rows of the pool, a hundredth of them repeated with a little noise: seconds, and the share of those found."""
    import numpy as np

    from trilobe.data.duplicates import near_duplicates

    x, _ = pool(n)
    m = n // 100
    x[-m:] = x[:m] + np.random.default_rng(1).normal(size=(m, 128)) * 0.02
    start = time.process_time()
    found = near_duplicates(x, 0.995)
    seconds = time.process_time() - start
    right, others = (found[-m:] == np.arange(m)).mean(), int((found[:-m] != np.arange(n - m)).sum())
    return {"rows": n, "seconds": round(seconds, 1), "planted": m, "found": round(float(right), 4), "others": others}


def table(figures: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Per task and peer: the largest size both finished, both times, their ratio, and what it means for a million."""
    out: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        mine = figures["trilobe"][task]
        for who, tasks in figures.items():
            done = [n for n, seen in tasks.get(task, {}).items() if "seconds" in seen and "seconds" in mine.get(n, {})]
            if who == "trilobe" or not done:
                continue
            n = done[-1]
            theirs, our = tasks[task][n]["seconds"], mine[n]["seconds"]
            row = {"rows": int(n), "theirs": theirs, "ours": our, "ratio": round(theirs / our, 1)}
            if int(n) < SIZES[-1] and str(SIZES[-1]) in mine:
                row["theirs at 1,000,000, extrapolated"] = round(theirs * SIZES[-1] / int(n))
                row["why no more"] = next((s["failed"] for s in tasks[task].values() if "failed" in s), "")
            out[f"{task}, {who}"] = row
    return out


def main() -> None:
    chosen = arguments(__doc__)
    if chosen.child:
        stream(int(chosen.child[1])) if chosen.child[0] == "stream" else child(*chosen.child)
        return
    found = {who: find_peer(module, chosen.peer_python, PACKAGES.get(who, who)) for who, module in PEERS.items()}
    pythons = {"trilobe": sys.executable} | {who: python for who, (python, _) in found.items() if python}
    figures: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    cache = Path(tempfile.gettempdir()) / "trilobe-query-speed.json"
    for who, python in pythons.items():
        tasks = list(TASKS[:2] if who in ("baal", "modAL") else TASKS) + ["margin, spread"] * (who == "trilobe")
        if chosen.quick:
            seen = measured(python, who, 5000, 100, tasks)
            figures[who] = {task: {"5000": s} for task, s in zip(tasks, seen, strict=True)}
        else:
            figures[who] = {task: climb(python, who, task, cache) for task in tasks}
    # before this process grows: a child begins with the peak memory of its parent
    streamed = ask_child(sys.executable, __file__, "stream", "200000" if chosen.quick else "10000000")
    rows = table(figures)
    representation = [r["ratio"] for name, r in rows.items() if name.startswith(("k_center", "badge"))]
    ratio = min(representation, default=0.0)
    result = {
        "claim": "choosing 1,000 by coverage is at least 5 times faster than with any peer, "
        "in the largest pool it finishes",
        "ratio": ratio,
        "target": "5 for k-center and BADGE, at the largest size that the peer finishes in 5 minutes and 8 GiB",
        "met": ratio >= 5 and len(representation) == 4,
        "peers": {who: version for who, (_, version) in found.items()},
        "figures": {"beside peers": rows, "all": figures},
        "exactness": same_as_exact(5000, 100) if chosen.quick else same_as_exact(100_000, PICKS),
        "stream": streamed,
        "near duplicates": duplicates(10_000 if chosen.quick else 1_000_000),
        "versions": versions("numpy", "scipy"),
    }
    print(json.dumps(result, indent=1))
    keep(__file__, result, chosen)
    if not chosen.quick:
        cache.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
