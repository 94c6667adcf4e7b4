"""What the runs amount to: who reaches the target when, the profile over workloads, the tables, the picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = dict[str, Any]
TASKS = {"image": ("digits", "fashion"), "text": ("text",), "entity": ("tagger",), "tabular": ("tabular",)}
TITLES = {"adamw": "AdamW", "sgd": "SGD, momentum 0.9", "lion": "Lion", "signum": "Signum", "signsgd": "SignSGD",
          "efsignsgd": "EFSignSGD"}  # fmt: skip
WORDS = {"digits": "digits", "fashion": "Fashion-MNIST", "text": "TREC questions", "tagger": "CoNLL-2003 entities",
         "tabular": "oil temperature"}  # fmt: skip
MOST = 4.0  # how many times the best one's steps still count in the score, as AlgoPerf has it
MARKS = ("<!-- tables: run.py writes what stands between -->", "<!-- end of tables -->")


def reached(run: Run, target: float) -> tuple[float, float]:
    """Steps and seconds of training at the first scoring at or above ``target``; infinite where there is none."""
    return next(((step, used) for step, used, score in run["curve"] if score >= target), (math.inf, math.inf))


def final(run: Run) -> float:
    """The last score; 0 of a run that broke off."""
    return float(run["curve"][-1][2]) if run["curve"] and not run["failed"] else 0.0


def best(tried: Sequence[Run], target: float) -> Run:
    """The trial that reached ``target`` in the fewest steps; of equals, and where none did, the best at the end."""
    return min(tried, key=lambda run: (reached(run, target)[0], -final(run)))


def interval(values: Sequence[float], digits: int = 4) -> dict[str, float] | None:
    """Mean and 95% interval of Student's t, as few seeds deserve; None where a value is infinite or there is none."""
    from scipy.stats import t

    x = np.array(values, dtype=float)
    if not len(x) or not np.isfinite(x).all():
        return None
    half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    mean = float(x.mean())
    rounded = {"mean": round(mean, digits), "low": round(mean - half, digits), "high": round(mean + half, digits)}
    return {k: v for k, v in rounded.items() if not math.isnan(v)} | {"n": len(x)}


def paired(a: dict[int, float], b: dict[int, float], digits: int = 4) -> dict[str, float] | None:
    """:func:`interval` of ``a - b`` over the seeds that both have."""
    return interval([a[s] - b[s] for s in sorted(a.keys() & b.keys())], digits)


def of_optimizer(tried: Sequence[Run], seeds: Sequence[Run], target: float) -> dict[str, Any]:
    """One row: the trials, the setting chosen, and what it did with fresh seeds."""
    chosen, lrs = best(tried, target)["lr"], [r["lr"] for r in tried]
    times = [reached(r, target) for r in seeds]
    costs = [r["curve"][-1][1] / r["curve"][-1][0] for r in (*tried, *seeds) if r["curve"]]
    return {
        "trials": [
            {"lr": r["lr"], "steps": _finite(reached(r, target)[0]), "final": final(r), "failed": r["failed"]}
            for r in tried
        ],
        "lr": chosen,
        "at_edge": chosen in (min(lrs), max(lrs)),
        "seeds": len(seeds),
        "reached": sum(math.isfinite(steps) for steps, _ in times),
        "steps_of_seeds": {r["seed"]: _finite(steps) for r, (steps, _) in zip(seeds, times, strict=True)},
        "steps": interval([steps for steps, _ in times], 1),
        "seconds": interval([used for _, used in times], 3),
        "median_steps": _finite(float(np.median([steps for steps, _ in times]))),
        "median_seconds": _finite(float(np.median([used for _, used in times]))),
        "final": interval([final(r) for r in seeds]),
        "final_of_seeds": {r["seed"]: final(r) for r in seeds},
        "step_ms": round(1e3 * float(np.median(costs)), 3),
        "curve": _mean_curve(seeds),
    }  # fmt: skip


def of_workload(runs: Sequence[Run], target: float, tuning: int) -> dict[str, Any]:
    """All optimizers on one workload, the winner, and how far it is ahead."""
    rows = {}
    for name in TITLES:
        own = sorted((r for r in runs if r["optimizer"] == name), key=lambda r: (r["lr"], r["seed"]))
        tried = [r for r in own if r["seed"] == tuning]
        seeds = [r for r in own if tried and r["seed"] != tuning and r["lr"] == best(tried, target)["lr"]]
        if seeds:
            rows[name] = of_optimizer(tried, seeds, target)
    order = sorted(rows, key=lambda n: (-rows[n]["reached"] / rows[n]["seeds"], *_rank(rows[n])))
    ahead = {
        other: paired(_reached_seeds(rows[other]), _reached_seeds(rows[order[0]]), 1)
        for other in order[1:]
        if rows[other]["reached"] == rows[other]["seeds"] and rows[order[0]]["reached"] == rows[order[0]]["seeds"]
    }
    return {"target": target, "winner": order[0], "order": order, "steps_behind_the_winner": ahead, "optimizers": rows}


def figures(runs: Sequence[Run], targets: dict[str, float], tuning: int) -> dict[str, Any]:
    """All of result.json that is measured."""
    seen = [name for name in targets if any(r["workload"] == name and r["seed"] != tuning for r in runs)]
    works = {n: of_workload([r for r in runs if r["workload"] == n], targets[n], tuning) for n in seen}
    scores = {
        opt: {by: round(float(np.mean([_credit(ratio(w, opt, by)) for w in works.values()])), 3)
              for by in ("median_steps", "median_seconds")}
        for opt in TITLES if all(opt in w["optimizers"] for w in works.values())
    }  # fmt: skip
    found = defaults(works)
    return {"workloads": works, "scores": scores, "defaults": found, "tied": tied(works, found)}


def ratio(work: dict[str, Any], opt: str, by: str) -> float:
    """How many times the fewest steps (or seconds) anyone needed: 1 or more, infinite where the target was missed."""
    fewest = min((row[by] for row in work["optimizers"].values() if row[by] is not None), default=None)
    own = work["optimizers"][opt][by]
    return math.inf if own is None or fewest is None else float(own / fewest)


def defaults(works: dict[str, Any]) -> dict[str, str]:
    """Per task of the project the optimizer to begin with; of two workloads the least product of ratios decides."""
    out = {}
    for task, names in TASKS.items():
        if all(n in works for n in names):
            both = set.intersection(*(set(works[n]["optimizers"]) for n in names))
            product = {o: math.prod(ratio(works[n], o, "median_steps") for n in names) for o in both}
            places = {o: sum(works[n]["order"].index(o) for n in names) for o in both}
            out[task] = min(both, key=lambda o: (product[o], places[o]) if len(names) > 1 else (places[o], 0))
    return out


def tied(works: dict[str, Any], found: dict[str, str]) -> dict[str, list[str]]:
    """Per task who cannot be told from its default: on each workload both reach the target with every seed, and the
    95% interval of the difference in steps holds 0."""

    def alike(work: dict[str, Any], a: str, b: str) -> bool:
        rows = [work["optimizers"][o] for o in (a, b)]
        if any(row["reached"] < row["seeds"] for row in rows):
            return False
        gap = paired(_reached_seeds(rows[0]), _reached_seeds(rows[1]))
        return gap is not None and gap.get("low", -math.inf) <= 0 <= gap.get("high", math.inf)

    return {
        task: [
            o
            for o in works[TASKS[task][0]]["optimizers"]
            if o != first and all(o in works[n]["optimizers"] and alike(works[n], first, o) for n in TASKS[task])
        ]
        for task, first in found.items()
    }


def _credit(r: float) -> float:
    """The share of 1 .. MOST that lies above ``r``: the integral of one step of the performance profile."""
    return max(0.0, (MOST - r) / (MOST - 1)) if math.isfinite(r) else 0.0


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    known = [s for s in row["steps_of_seeds"].values() if s is not None]
    return (float(np.mean(known)) if known else math.inf, -row["final"]["mean"])


def _reached_seeds(row: dict[str, Any]) -> dict[int, float]:
    return {seed: float(steps) for seed, steps in row["steps_of_seeds"].items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_curve(seeds: Sequence[Run]) -> list[list[float]]:
    """(step, mean score) over the seeds, where all have come that far."""
    far = min(len(r["curve"]) for r in seeds)
    return [[seeds[0]["curve"][i][0], round(float(np.mean([r["curve"][i][2] for r in seeds])), 5)] for i in range(far)]


def said(e: dict[str, float] | None, scale: float = 1, digits: int = 0, unit: str = "") -> str:
    """``97.1% [96.6%, 97.5%]``; a dash where nothing is known."""
    if e is None:
        return "–"
    words = [f"{scale * e[k]:,.{digits}f}{unit}" for k in ("mean", "low", "high") if k in e]
    return words[0] if len(words) == 1 else f"{words[0]} [{words[1]}, {words[2]}]"


def tables(found: dict[str, Any]) -> str:
    """The README's tables."""
    works = found["workloads"]
    lines = [
        "## Last table",
        "",
        "| task | winner, the project's default | who cannot be told from it |",
        "|---|---|---|",
    ]
    for task, opt in found["defaults"].items():
        alike = ", ".join(TITLES[o] for o in found["tied"][task]) or "nobody"
        lines.append(f"| {task} | **{TITLES[opt]}** | {alike} |")
    lines += ["", "Steps to the target over the fewest anyone needed (medians over seeds; – missed the target), and the"
              " AlgoPerf score:", "", "| optimizer | " + " | ".join(WORDS[n] for n in works)
              + " | score by steps | score by seconds |", "|---" * (len(works) + 3) + "|"]  # fmt: skip
    for opt, score in sorted(found["scores"].items(), key=lambda kv: -kv[1]["median_steps"]):
        ratios = [ratio(w, opt, "median_steps") for w in works.values()]
        cells = [f"{r:.2f}" if math.isfinite(r) else "–" for r in ratios]
        lines.append(f"| {TITLES[opt]} | {' | '.join(cells)} | {score['median_steps']:.2f} | "
                     f"{score['median_seconds']:.2f} |")  # fmt: skip
    for name, work in works.items():
        heads = ("optimizer", "learning rate", "reached", "steps to target", "processor seconds",
                 "steps behind the winner", "score at the end", "ms a step")  # fmt: skip
        lines += ["", f"### {WORDS[name]}: target {100 * work['target']:.1f}%", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for opt in work["order"]:
            row = work["optimizers"][opt]
            edge = " (edge)" if row["at_edge"] else ""
            behind = "" if opt == work["winner"] else said(work["steps_behind_the_winner"].get(opt))
            lines.append(f"| {TITLES[opt]} | {row['lr']:g}{edge} | {row['reached']} of {row['seeds']} | "
                         f"{said(row['steps'])} | {said(row['seconds'], digits=2)} | {behind} | "
                         f"{said(row['final'], 100, 1, '%')} | {row['step_ms']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def fill(readme: Path, words: str) -> None:
    """Put the tables where the README wants them."""
    if readme.exists():
        text = readme.read_text("utf-8")
        before, _, rest = text.partition(MARKS[0])
        readme.write_text(f"{before}{MARKS[0]}\n{words}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", "utf-8")


def draw(found: dict[str, Any], path: Path) -> None:
    """The mean score against steps on each workload, and the performance profile; left out without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = found["workloads"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    styles = dict(zip(TITLES, ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3))), strict=True))
    colors = dict(zip(TITLES, ("#14599c", "#1d2327", "#b4470c", "#2f7d4f", "#7a4fa3", "#8a8f94"), strict=True))
    for ax, (name, work) in zip(axes.flat, works.items(), strict=False):
        for opt, row in work["optimizers"].items():
            ax.plot(*zip(*row["curve"], strict=True), ls=styles[opt], color=colors[opt], label=TITLES[opt], lw=1.8)
        ax.axhline(work["target"], color="#1d2327", lw=0.8, ls=(0, (2, 4)))
        ax.set(title=f"{WORDS[name]}, target {100 * work['target']:.1f}%", xlabel="steps", ylabel="score",
               ylim=(max(0.0, work["target"] - 0.35), min(1.0, work["target"] + 0.08)))  # fmt: skip
    ax, grid = axes.flat[5], np.linspace(1, MOST, 301)
    for opt in found["scores"]:
        rs = [ratio(w, opt, "median_steps") for w in works.values()]
        shares = [np.mean([r <= g for r in rs]) for g in grid]
        ax.plot(grid, shares, ls=styles[opt], color=colors[opt], label=TITLES[opt], lw=1.8)
    ax.set(title="performance profile", xlabel="steps over the fewest anyone needed", ylim=(-0.03, 1.03))
    ax.set_ylabel("share of workloads reached")
    ax.legend(fontsize=8, loc="lower right")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
