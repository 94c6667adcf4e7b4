"""What the runs amount to: differences to random and to the best arm, seed by seed; tables; the picture."""

from pathlib import Path
from typing import Any

import arms
import common
import numpy as np
import sets

DEFAULT = "trilobe: typical, then margin spread 10"
Scores = dict[str, dict[int, float]]  # arm -> seed -> mean accuracy over the rounds, in percent


def scores_of(runs: list[dict[str, Any]], name: str, figure: str = "accuracy") -> Scores:
    """Scores on one set. A twin that chose the same examples with seed 0 has its twin's scores with the others."""
    out: Scores = {}
    first: dict[str, Any] = {}
    for run in runs:
        if run["set"] == name and figure in run:
            out.setdefault(run["arm"], {})[run["seed"]] = 100 * float(np.mean(run[figure]))
            if run["seed"] == 0:
                first[run["arm"]] = run["accuracy"]
    for arm, same in arms.twins(first).items():
        out[arm] = out[same] | out[arm]
    return out


def paired(a: dict[int, float], b: dict[int, float]) -> dict[str, float]:
    """``a - b`` over the seeds that both have: mean, 95% bootstrap interval, and how many seeds."""
    d = _differences(a, b)
    means = d[np.random.default_rng(0).integers(0, len(d), (10_000, len(d)))].mean(axis=1)
    figures = {"mean": d.mean(), "low": np.quantile(means, 0.025), "high": np.quantile(means, 0.975)}
    return {k: round(float(v), 2) for k, v in figures.items()} | {"n": len(d)}


def student(a: dict[int, float], b: dict[int, float]) -> list[float] | None:
    """The 95% interval of Student's t for the mean of ``a - b``: wider than the bootstrap's, as few seeds deserve."""
    from scipy.stats import t

    d = _differences(a, b)
    if len(d) < 2:
        return None
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5
    return [round(float(d.mean() - half), 2), round(float(d.mean() + half), 2)]


def _differences(a: dict[int, float], b: dict[int, float]) -> Any:
    return np.array([a[s] - b[s] for s in sorted(a.keys() & b.keys())])


def summary(scores: Scores, default: str = DEFAULT, enough: int = 3) -> dict[str, Any]:
    """Of one set: every arm against random and the default against every arm; the best is the arm that leads it most.

    The default is tied with the best where no arm leads it by an interval without 0: stricter than asking only the
    arm of the highest mean. Arms count with at least ``enough`` seeds (or all there are), those of tried.py do not.
    """
    rows = {a: {"area": round(float(np.mean(list(s.values()))), 2), "over_random": paired(s, scores["random"]),
                "default_over": paired(scores[default], s)} for a, s in scores.items()}  # fmt: skip
    enough = min(enough, max(len(s) for s in scores.values()))
    real = [a for a, s in scores.items() if len(s) >= enough and not a.startswith("tried")]
    best = min(real, key=lambda a: rows[a]["default_over"]["mean"])
    over, behind = rows[default]["over_random"], [a for a in real if rows[a]["default_over"]["high"] < 0]
    return {
        "best": best,
        "default_over_random": over,
        "default_over_random_t": student(scores[default], scores["random"]),
        "default_over_best": rows[best]["default_over"],
        "worse_than_random": bool(over["high"] < 0),
        "best_or_tied": not behind,
        "behind": behind,
        "arms": dict(sorted(rows.items(), key=lambda row: -row[1]["over_random"]["mean"])),
    }


def result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json, without machine and date."""
    names = names_of(runs)
    seeds = sorted({run["seed"] for run in runs})
    whole = {name: summary(scores_of(runs, name)) for name in names}
    main = [n for n in names if n not in sets.SPARSE]
    tied, worse = ([n for n in main if whole[n][key]] for key in ("best_or_tied", "worse_than_random"))
    return {
        "claim": "Trilobe's default questions are never significantly worse than random ones, and best or tied with "
        "the best of all strategies of four peers on at least 6 of 8 sets",
        "setting": "mean test accuracy over 16 models of 20, 45, ... 395 labels; percent; differences paired by seed",
        "default": DEFAULT,
        "seeds": seeds,
        "sets": whole,
        "macro_f1": {n: paired((f := scores_of(runs, n, "macro_f1"))[DEFAULT], f["random"]) for n in names},
        "failed": {f"{r['set']}, {r['arm']}": r["failed"] for r in runs if "failed" in r},
        "not_run": arms.NOT_RUN,
        "worse_than_random": [n for n in names if whole[n]["worse_than_random"]],
        "best_or_tied": tied,
        "ratio": len(tied),
        "ratio_of": "sets of 8 on which no strategy leads the default by an interval (95%, paired by seed) without 0",
        "target": "at least 6 of 8, and worse than random on none",
        "met": bool(len(tied) >= 6 and not worse),
        "peers": {p: _version(p) for p in ("small-text", "scikit-activeml", "modAL-python", "baal")},
        "versions": common.versions("scikit-learn", "numpy"),
    }


def names_of(runs: list[dict[str, Any]]) -> list[str]:
    """The sets that were run, in the order of the tables."""
    order = ("digits", *sets.TEXTS, *sets.IMAGES, *sets.SPARSE)
    return [name for name in order if any(run["set"] == name for run in runs)]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed: not measured"


def tables(found: dict[str, Any]) -> str:
    """The default's table, then that of all arms: points over random; * where the interval is clear of 0."""
    out = [
        "| set | random | default over random | Student's t | best of all | default over best |",
        "|---|" + "---|" * 5,
    ]
    for name, s in found["sets"].items():
        d, b = s["default_over_random"], s["default_over_best"]
        against = "itself" if s["best"] == found["default"] else s["best"]
        cells = [name, f"{s['arms']['random']['area']:.1f}", _words(d), _range(s["default_over_random_t"]), against]
        out.append(f"| {' | '.join(cells)} | {'' if against == 'itself' else _words(b)} |")
    names = [n for n in found["sets"] if n not in sets.SPARSE]
    for columns in filter(None, (names, [n for n in found["sets"] if n in sets.SPARSE])):
        every = {a for n in columns for a in found["sets"][n]["arms"]}
        cells = {a: [found["sets"][n]["arms"].get(a, {}).get("over_random") for n in columns] for a in every}
        mean = {a: float(np.mean([c["mean"] for c in cells[a] if c])) for a in every}
        out += ["", f"| strategy | mean | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
        for a in sorted(every, key=lambda a: -mean[a]):
            row = " | ".join(_cell(c) for c in cells[a])
            out.append(f"| {f'**{a}**' if a == found['default'] else a} | {mean[a]:+.1f} | {row} |")
    return "\n".join(out)


def _words(e: dict[str, float]) -> str:
    return f"{e['mean']:+.1f}" + (f" {_range([e['low'], e['high']])}" if e["n"] > 1 else "")


def _range(ends: list[float] | None) -> str:
    return f"[{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else ""


def _cell(e: dict[str, float] | None) -> str:
    if not e:
        return ""
    clear = e["n"] > 1 and (e["low"] > 0 or e["high"] < 0)
    return f"{e['mean']:+.1f}{'*' if clear else ''} ({e['n']})"


def draw(runs: list[dict[str, Any]], folder: Path) -> None:
    """The learning curves of random, the default, and the best other arm of each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = names_of(runs)
    figure, axes = plt.subplots(3, 4, figsize=(14, 9.5), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        scores = scores_of(runs, name)
        peers = [a for a in scores if not a.startswith(("trilobe", "tried", "random"))]
        peers = [a for a in peers if len(scores[a]) > 2] or peers
        peer = min(peers, key=lambda a: paired(scores[DEFAULT], scores[a])["mean"])
        of = [r for r in runs if r["set"] == name and "accuracy" in r]
        same = arms.twins({r["arm"]: r["accuracy"] for r in of if r["seed"] == 0})
        for arm, color in (("random", "#999999"), (peer, "#d08020"), (DEFAULT, "#1060b0")):
            curves = np.array([r["accuracy"] for r in of if r["arm"] == same.get(arm, arm)])
            x = 20 + 25 * np.arange(curves.shape[1])
            axis.plot(x, 100 * curves.mean(axis=0), color=color, label="Trilobe's default" if arm == DEFAULT else arm)
            if len(curves) > 1:
                error = 196 * curves.std(axis=0, ddof=1) / len(curves) ** 0.5
                axis.fill_between(
                    x, 100 * curves.mean(0) - error, 100 * curves.mean(0) + error, color=color, alpha=0.15
                )
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=7, loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("labels")
    figure.supylabel("test accuracy, %")
    figure.savefig(folder / "curves.png", dpi=80)
