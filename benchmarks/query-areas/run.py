"""Area under the learning curve on texts and images: Trilobe's default questions beside every strategy of four peers.

``python run.py [--quick] [--to FILE]``, in an environment that has the peers (README.md). One model for all arms:
multinomial logistic regression on frozen features. Each seed deals a pool of 2,500 and a test of 1,500; 20 examples are
labeled to begin with, then 25 a round up to 395. The score of a run is its mean test accuracy over the 16 models. Every
(set, seed, arm) is kept in the cache as it is done, so that a killed run goes on where it stopped; ``--child table``
only sums up what is kept.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import arms  # noqa: E402
import common  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import sets  # noqa: E402
import tried  # noqa: E402

START, STEP, ROUNDS, LIMIT = 20, 25, 15, 60
SEEDS, RACE = range(4), 3.0
RUNS = sets.CACHE / "runs"
ALL = arms.ARMS | tried.TRIED
ALWAYS = ("random", report.DEFAULT)
SPARSE = ("trilobe: ", "tried: ", "random", "small-text: ")  # arms of the extra table


def area(arm: str, deal: sets.Deal, seed: int, fits: dict[Any, Any], rounds: int = ROUNDS) -> dict[str, Any]:
    """One arm's curve: accuracy and macro F1 after each round, and the seconds that it took to choose."""
    start, go_on = ALL[arm]
    everyone, seconds = np.arange(len(deal.y)), []
    known = np.random.default_rng(1000 + seed).permutation(everyone)[:START]
    if start:
        if start not in fits:
            fits[start] = _ask(start, arms.Turn(deal, everyone[:0], everyone, None, START, seed), [])
        known = fits[start]
    accuracy, f1 = [], []
    for i in range(rounds + 1):
        known = np.sort(known)
        if (key := known.tobytes()) not in fits:
            model = arms.Linear(deal.n_classes).fit(deal.X[known], deal.y[known])
            fits[key] = (model, *_grade(model, deal))
        model, a, f = fits[key]
        accuracy.append(a)
        f1.append(f)
        if i < rounds:
            rest = np.setdiff1d(everyone, known)
            turn = arms.Turn(deal, known, rest, model, STEP, 1000 * seed + i)
            known = np.concatenate([known, _ask(go_on, turn, seconds)])
    return {"accuracy": accuracy, "macro_f1": f1, "seconds": seconds}


def _ask(arm: arms.Arm, turn: arms.Turn, seconds: list[float]) -> Any:
    began = time.process_time()
    chosen = np.asarray(arm(turn))
    seconds.append(round(time.process_time() - began, 4))
    if len(np.unique(chosen)) != turn.n:
        raise ValueError(f"{len(np.unique(chosen))} distinct examples where {turn.n} were asked for")
    return turn.rest[chosen]


def _grade(model: Any, deal: sets.Deal) -> tuple[float, float]:
    from sklearn.metrics import f1_score

    guess = model.predict(deal.X_test)
    f1 = f1_score(deal.y_test, guess, average="macro", zero_division=0, labels=np.unique(deal.y_test))
    return round(float((guess == deal.y_test).mean()), 5), round(float(f1), 5)


def in_race(name: str, seed: int) -> list[str]:
    """Seed 0: every arm. After that: those within three points of the best of seed 0, but of twins only one."""
    every = [a for a in ALL if name not in sets.SPARSE or a.startswith(SPARSE)]
    if seed == 0:
        return every
    first = {a: run for a in every if (run := kept(name, 0, a)) and "accuracy" in run}
    same = arms.twins({a: run["accuracy"] for a, run in first.items()})
    score = {a: 100 * float(np.mean(run["accuracy"])) for a, run in first.items()}
    best = max(score.values())
    return [a for a in score if a in ALWAYS or (score[a] > best - RACE and a not in same)]


def kept(name: str, seed: int, arm: str) -> dict[str, Any] | None:
    """What is kept of one run."""
    path = _path(name, seed, arm)
    return json.loads(path.read_text()) if path.exists() else None


def _path(name: str, seed: int, arm: str) -> Path:
    return RUNS / f"{name}.{seed}.{arm}.json".replace(" ", "_").replace("/", "-")


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT} s a round")


def work(name: str, seed: int, chosen: list[str]) -> None:
    """Run what is not yet kept; an arm that fails or takes too long is kept with its reason."""
    RUNS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, _too_long)
    deal, fits = None, {}
    for arm in chosen:
        if kept(name, seed, arm):
            continue
        deal = deal or sets.deal(name, seed)
        signal.alarm(LIMIT * ROUNDS)
        try:
            found = area(arm, deal, seed, fits)
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its reason for not being in the table)
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        path = _path(name, seed, arm)
        path.with_suffix(".new").write_text(json.dumps(found | {"set": name, "seed": seed, "arm": arm}))
        path.with_suffix(".new").replace(path)
    if deal:
        print(f"{name}, seed {seed}: {time.process_time():.0f} s of processor time so far", file=sys.stderr, flush=True)


QUICK = ("random", report.DEFAULT, "trilobe: margin", "small-text: BreakingTies", "modAL: margin", "BAAL: Margin",
         "scikit-activeml: Uncertainty margin_sampling", "scikit-activeml: DropQuery")  # fmt: skip


def quick() -> list[dict[str, Any]]:
    """Seed 0 of the digits, and of TREC's bags of words where the data is; six rounds of the arms that take no time."""
    runs = []
    for name in ("digits", "trec coarse tfidf") if common.data("trec").exists() else ("digits",):
        sets.prepare(name)
        deal, fits = sets.deal(name, 0), {}
        for arm in QUICK:
            try:
                runs.append(area(arm, deal, 0, fits, 6) | {"set": name, "seed": 0, "arm": arm})
            except ImportError as missing:
                print(f"{arm} is not measured: {missing}", file=sys.stderr)
    return runs


def whole(run_them: bool) -> list[dict[str, Any]]:
    """Every run, after those that are not yet kept."""
    for seed in SEEDS if run_them else ():
        for name in (*sets.TEXTS, *sets.IMAGES, *sets.SPARSE):
            sets.prepare(name)
            work(name, seed, in_race(name, seed))
    runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    return [run for run in runs if run["seed"] in SEEDS and run["arm"] in ALL]


def main() -> None:
    warnings.simplefilter("ignore")
    chosen = common.arguments(__doc__)
    runs = quick() if chosen.quick else whole(run_them=not chosen.child)
    result = report.result(runs)
    common.keep(__file__, result, chosen)
    if not chosen.quick and not chosen.to:
        report.draw(runs, HERE)
    print(report.tables(result))


if __name__ == "__main__":
    main()
