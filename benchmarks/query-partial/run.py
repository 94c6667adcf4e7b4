"""Yes/no questions about a tree of classes: accuracy at 30% of the questions, and questions until all is labeled.

``python run.py [--quick] [--to FILE]``, with the data in ``TRILOBE_DATA``. Every arm trains the same small network on
the same frozen features with the same set beliefs; only the pairs (example, question) that are asked differ. Each
finished run is kept in the folder for temporary files, so a run that was killed goes on where it was.
"""

import csv
import hashlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "trilobe-query-partial"
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import numpy as np  # noqa: E402

POOL, TEST, START, ROUND, STEPS = 3000, 2000, 0.05, 0.05, 5  # start: a share of the pool; round: of the budget
AT, LAST, RIGHT = 0.30, 0.60, 0.9  # where accuracy is compared; where a curve ends; how often who errs is right
ONLY_PARTIAL = {"full": np.inf, "partial": 1.0}
ARMS = ("closing", "eig", "erc", "edc", "aq", "al_me", "search", "uniform")
EXTRA = ("closing, built tree", "closing, 10% wrong", "uniform, 10% wrong")
DRAWN = ("closing", "search", "uniform")
BLIND = ("search", "uniform", "al_me")  # their questions do not follow the model


class Task(NamedTuple):
    """Features of a pool and a test part, the classes, and the tree of these as ``parents``."""

    x: Any
    y: Any
    x_test: Any
    y_test: Any
    names: tuple[str, ...]
    parents: dict[str, str]


def fashion(seed: int, n: int) -> Task:
    names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    groups = {"top": "t-shirt pullover coat shirt", "one piece": "dress", "shoe": "sandal sneaker ankle_boot",
              "other": "trouser bag"}  # fmt: skip
    parents = {c.replace("_", " "): g for g, members in groups.items() for c in members.split()}
    parents |= {"top": "upper body", "one piece": "upper body", "shoe": "not upper body", "other": "not upper body"}
    kept = np.load(common.data("fashion_mnist") / "fashion_mnist.npz")
    images, y = (
        np.concatenate([kept["x_train"][:8000], kept["x_test"]]),
        np.concatenate([kept["y_train"][:8000], kept["y_test"]]),
    )
    return dealt("fashion", images[..., None], y, names, parents, seed, n)


def cifar(seed: int, n: int) -> Task:
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    groups = {"pet": "cat dog", "hoofed": "deer horse", "small wild": "bird frog", "on a road": "automobile truck",
              "not on a road": "airplane ship"}  # fmt: skip
    parents = {c: g for g, members in groups.items() for c in members.split()}
    parents |= {"pet": "animal", "hoofed": "animal", "small wild": "animal", "on a road": "vehicle",
                "not on a road": "vehicle"}  # fmt: skip
    from PIL import Image

    kept = np.load(common.data("cifar10") / "cifar10_test.npz")
    jpeg, ends = kept["jpeg"].tobytes(), kept["offsets"]
    images = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[a:b]))) for a, b in pairwise(ends)])
    return dealt("cifar", images, kept["labels"], names, parents, seed, n)


def omniglot(seed: int, n: int) -> Task:
    """136 characters in 5 alphabets: of each, 15 drawings for the pool and 5 to grade with."""
    from PIL import Image

    with zipfile.ZipFile(common.data("omniglot") / "images_background_small1.zip") as pack:
        files = sorted(f for f in pack.namelist() if f.endswith(".png"))
        drawings = [Image.open(io.BytesIO(pack.read(f))).convert("L") for f in files]
    images = np.stack([255 - np.asarray(d.resize((28, 28), Image.Resampling.BOX)) for d in drawings])[..., None]
    kind = ["/".join(f.split("/")[1:3]).replace("character", "") for f in files]
    names = tuple(sorted(set(kind)))
    y = np.array([names.index(k) for k in kind])
    x = described("omniglot", images)
    order = np.random.default_rng(seed).permutation(len(y))
    held = np.concatenate([order[y[order] == c][:5] for c in range(len(names))])
    pool = np.setdiff1d(order, held)[:n]
    return Task(x[pool], y[pool], x[held], y[held], names, {c: c.split("/")[0] for c in names})


def trec(seed: int, n: int) -> Task:
    """Questions by what they ask for: 50 fine classes in 6 coarse ones; graded on the official 500."""
    parts = []
    for part in ("train", "test"):
        rows = (common.data("trec") / f"TREC.{part}.raw").read_text("latin-1").splitlines()
        parts.append([row.split(" ", 1) for row in rows])
    train, test = parts
    names = tuple(sorted({kind for kind, _ in train}))
    x = kept("trec", lambda: text_features([text for _, text in train + test]))
    y = np.array([names.index(kind) for kind, _ in train + test])
    pool = np.random.default_rng(seed).permutation(len(train))[:n]
    held = np.arange(len(train), len(y))
    return Task(x[pool], y[pool], x[held], y[held], names, {c: c.split(":")[0] for c in names})


def gtsrb(seed: int, n: int) -> Task:
    """Traffic signs of 43 kinds, the tree made from their names alone. No strategy was chosen on these."""
    from trilobe.data.trees import name_points, tree

    folder = common.data("gtsrb")
    with (folder / "class_names.csv").open(encoding="utf-8", newline="") as file:
        names = tuple(row["SignName"] for row in csv.DictReader(file))
    signs = np.load(folder / "gtsrb32_subset.npz")
    some, rest = (np.random.default_rng(0).permutation(len(signs[f"y_{part}"])) for part in ("train", "test"))
    images = np.concatenate([signs["x_train"][some[:5000]], signs["x_test"][rest[:TEST]]])
    y = np.concatenate([signs["y_train"][some[:5000]], signs["y_test"][rest[:TEST]]]).astype(int)
    x, pool = described("gtsrb", images), np.random.default_rng(seed).permutation(5000)[:n]
    return Task(x[pool], y[pool], x[5000:], y[5000:], names, tree(names, name_points(names)))


def dealt(name: str, images: Any, y: Any, names: tuple[str, ...], parents: dict[str, str], seed: int, n: int) -> Task:
    """Frozen features of 8,000 images, dealt anew into pool and test part for every seed."""
    images, y = images[:8000], y[:8000].astype(int)
    x, order = described(name, images), np.random.default_rng(seed).permutation(len(images))
    pool, held = order[:n], order[-TEST:]
    return Task(x[pool], y[pool], x[held], y[held], names, parents)


def kept(name: str, make: Any) -> Any:
    """An array made once and kept among the temporary files."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.npy"
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def described(name: str, images: Any) -> Any:
    """Patch features (Coates, Ng and Lee 2011): 256 whitened patches as the dictionary, pooled over quarters, PCA."""
    return kept(f"{name}-{len(images)}", lambda: whitened(patch_features(images.astype(np.float32) / 255), 256))


def patch_features(images: Any, size: int = 6, n_patches: int = 256) -> Any:
    from numpy.lib.stride_tricks import sliding_window_view

    rng, channels = np.random.default_rng(0), images.shape[-1]

    def patches(batch: Any) -> Any:
        views = sliding_window_view(batch, (size, size), axis=(1, 2))
        flat = views.reshape(*views.shape[:3], size * size * channels)
        return (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 0.01)

    some = patches(images[rng.choice(len(images), 500, replace=False)]).reshape(-1, size * size * channels)
    some = some[rng.choice(len(some), 40_000, replace=False)]
    mean = some.mean(0)
    values, vectors = np.linalg.eigh(np.cov(some.T))
    zca = ((vectors / np.sqrt(values + 0.1)) @ vectors.T).astype(np.float32)
    white = (some - mean) @ zca
    white = white[np.linalg.norm(white, axis=1) > 1]
    atoms = white[rng.choice(len(white), n_patches, replace=False)]
    atoms = (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).astype(np.float32)
    rows = []
    for start in range(0, len(images), 50):
        p = (patches(images[start : start + 50]) - mean.astype(np.float32)) @ zca
        active = np.maximum(p @ atoms.T - 0.5, 0)
        h, w = active.shape[1] // 2, active.shape[2] // 2
        parts = [active[:, a, b].mean((1, 2)) for a in (slice(h), slice(h, None)) for b in (slice(w), slice(w, None))]
        rows.append(np.concatenate(parts, axis=1))
    return np.sqrt(np.concatenate(rows))


def whitened(x: Any, dimensions: int) -> Any:
    """Standardized, then the first principal components, scaled to unit variance on average."""
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    _, s, vt = np.linalg.svd(x[:4000], full_matrices=False)
    return (x @ vt[:dimensions].T / (s[0] / np.sqrt(min(len(x), 4000)) / 4)).astype(np.float32)


def text_features(texts: list[str]) -> Any:
    """Words and pairs of words, weighed by rarity, in 300 dimensions (latent semantic analysis); first words apart."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import svds

    bags = []
    for text in texts:
        words = re.findall(r"\w+|\?", text.lower())
        pairs = [f"{a} {b}" for a, b in pairwise(words)]
        bags.append(Counter(words + pairs + [f"^{w}" for w in words[:1]] + [f"^{' '.join(words[:2])}"]))
    spread = Counter(piece for bag in bags for piece in bag)
    column = {piece: i for i, piece in enumerate(sorted(p for p, n in spread.items() if n > 2))}
    at = [
        (i, p, n * np.log(len(bags) / spread[p])) for i, bag in enumerate(bags) for p, n in bag.items() if p in column
    ]
    rows, cols, weights = map(np.array, zip(*((i, column[p], w) for i, p, w in at), strict=True))
    matrix = csr_array((weights, (rows, cols)), shape=(len(bags), len(column)))
    matrix = csr_array(matrix / np.sqrt(matrix.power(2).sum(1))[:, None])
    u, s, _ = svds(matrix, 300, random_state=0)
    return (u * s**0.5 / np.abs(u * s**0.5).std()).astype(np.float32)


TASKS = {"Fashion-MNIST": fashion, "CIFAR-10": cifar, "Omniglot": omniglot, "TREC": trec, "GTSRB": gtsrb}
NAMED = tuple(TASKS)[:4]  # the sets of the claim; ``closing`` was chosen looking at these, not at GTSRB


def run(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """One arm on one pool: budget, accuracy after each round as (share of it, accuracy), questions until all is known.

    With answers that may be wrong nothing is ever known for sure; asking then ends with the curve.
    """
    import torch
    from torch import nn

    from trilobe.algorithms.fit import Plan, fit, predict_logits
    from trilobe.data.beliefs import symmetric_confusion
    from trilobe.data.partial import choose, tree_questions
    from trilobe.data.trees import mean_points, tree
    from trilobe.statistics import softmax
    from trilobe.types import LabelSpace

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    strategy, _, variant = arm.partition(", ")
    questions, k, n = tree_questions(LabelSpace(task.names, task.parents))[1], len(task.names), len(task.y)
    confusion = symmetric_confusion(1, k, RIGHT if "wrong" in variant else 1.0)[0]
    rng = np.random.default_rng(seed)
    left, likelihood, blank = np.ones((n, k), dtype=bool), np.ones((n, k)), np.full((n, k), 1 / k)
    noisy = "wrong" in variant and strategy == "closing"  # doubts what was answered, instead of taking it as certain

    def ask(count: int, proba: Any, strategy: str, salt: int, rows: Any) -> int:
        belief = proba[rows] * likelihood[rows]
        asked = choose(belief / belief.sum(axis=1, keepdims=True), questions, count, ONLY_PARTIAL,
                       confusion if noisy and strategy == "closing" else None, 10_000 * seed + salt,
                       likelihood[rows] > 0 if noisy and strategy == "closing" else left[rows], strategy)  # fmt: skip
        for i, q in zip(rows[asked.index], questions[asked.question], strict=True):
            p_yes = q @ confusion.T
            yes = rng.random() < p_yes[task.y[i]]
            likelihood[i] *= p_yes if yes else 1 - p_yes
            left[i] &= q if yes else ~q
        return len(asked.index)

    def search(spent: int, rows: Any) -> int:
        while count := ask(n, blank, "search", spent, rows):
            spent += count
        return spent

    everything = np.arange(n)
    budget = search(0, everything)  # what naive annotation takes: a blind search for every label
    left[:], likelihood[:] = True, 1.0
    spent = search(0, rng.permutation(n)[: max(int(START * n), 20)])  # the start counts too
    if variant == "built tree":
        known = left.sum(axis=1) == 1
        built = tree(task.names, mean_points(task.x[known], left[known].astype(float)))
        questions = tree_questions(LabelSpace(task.names, built))[1]
    net = nn.Sequential(nn.Linear(task.x.shape[1], 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, k))
    curve, proba, round_ = [], blank, 0
    while left.sum() > n and not ("wrong" in variant and spent > LAST * budget):
        if spent <= LAST * budget or strategy not in BLIND:
            told = likelihood.min(axis=1) < likelihood.max(axis=1)
            fit(net, task.x[told], likelihood[told], Plan(200, 4, 64, seed=100 * seed + round_))
            proba = softmax(predict_logits(net, task.x))
            right = predict_logits(net, task.x_test).argmax(axis=1) == task.y_test
            curve.append((spent / budget, float(right.mean())))
        for step in range(STEPS):
            spent += ask(max(1, int(ROUND * budget / STEPS)), proba, strategy, STEPS * round_ + step, everything)
        round_ += 1
    return {"budget": budget, "questions": spent, "curve": curve, "pool": n}


def remembered(name: str, arm: str, seed: int, n: int, task: Any) -> dict[str, Any]:
    """The result of :func:`run` as it is written here, from the folder of temporary files where it is there."""
    FOLDER.mkdir(exist_ok=True)
    key = hashlib.sha256(repr((inspect.getsource(run), name, arm, seed, n)).encode()).hexdigest()[:16]
    path = FOLDER / f"{key}.json"
    if not path.exists():
        done = run(task(), arm, seed)
        path.with_suffix(".new").write_text(json.dumps(done), encoding="utf-8")
        path.with_suffix(".new").rename(path)
        print(name, arm, seed, file=sys.stderr)
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy(one: dict[str, Any], at: float) -> float:
    """Accuracy at a share of the budget, between the two nearest rounds."""
    return float(np.interp(at, *zip(*one["curve"], strict=True)))


def summary(done: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per arm: accuracy at 30% and questions an example, and both against uniform and blind search, seed by seed."""
    rows = {}
    shares = np.round(np.arange(0.1, LAST + 0.01, 0.05), 2)
    for arm, seeds in done.items():
        rivals = ("uniform, 10% wrong",) if "wrong" in arm else ("uniform", "search")
        row: dict[str, Any] = {"accuracy": common.estimate([accuracy(s, AT) for s in seeds])}
        if arm in DRAWN:
            row["curve"] = {f"{at:.2f}": common.estimate([accuracy(s, at) for s in seeds]) for at in shares}
        if "wrong" not in arm:
            row["questions"] = common.estimate([s["questions"] / s["pool"] for s in seeds])
        for rival in rivals:
            pairs = list(zip(seeds, done[rival], strict=False))
            row[f"points over {rival}"] = common.estimate([100 * (accuracy(a, AT) - accuracy(b, AT)) for a, b in pairs])
            if "wrong" not in arm:
                saved = [1 - a["questions"] / b["questions"] for a, b in pairs]
                row[f"saved against {rival}"] = common.estimate(saved)
        rows[arm] = row
    return rows


def draw(name: str, figures: dict[str, Any]) -> None:
    """Accuracy against the share of the budget; bands are 95% intervals of the mean over seeds."""
    from trilobe.web.charts import Series, line_chart

    series = []
    for arm in DRAWN:
        points = figures[arm]["curve"]
        y, low, high = (tuple(p[key] for p in points.values()) for key in ("mean", "low", "high"))
        series.append(Series(arm, tuple(map(float, points)), y, low, high, "main" if arm == "closing" else "quiet"))
    bottom, top = min(min(s.low) for s in series), max(max(s.high) for s in series)
    svg = line_chart(series, title=f"{name}: accuracy, mean of {figures['closing']['accuracy']['n']} seeds",
                     x_label="questions, as a share of a blind search for every label", y_label="accuracy",
                     y_range=(bottom // 0.05 * 0.05, min(1.0, top // 0.05 * 0.05 + 0.05)))  # fmt: skip
    (HERE / f"{name.lower()}.svg").write_text(svg, encoding="utf-8")


def main() -> None:
    chosen = common.arguments(__doc__)
    common.needed(*(["trec"] if chosen.quick else ["trec", "fashion_mnist", "cifar10", "omniglot", "gtsrb"]))
    names = ["TREC"] if chosen.quick else list(NAMED)
    n, few = (1200, ("closing", "eig", "search", "uniform")) if chosen.quick else (POOL, (*ARMS[:3], *ARMS[-2:]))
    jobs = [(names, ARMS, range(3)), (names, EXTRA, range(3)), (["GTSRB"], few, range(3))]
    done: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for sets, arms, seeds in [(names, few, range(1))] if chosen.quick else jobs:
        for seed in seeds:
            for name in sets:
                task = cache(partial(TASKS[name], seed, n))
                for arm in arms:
                    done.setdefault(name, {}).setdefault(arm, []).append(remembered(name, arm, seed, n, task))
    figures = {name: summary(seeds) for name, seeds in done.items()}
    points = [figures[name]["closing"]["points over uniform"]["mean"] for name in names]
    saved = {
        r: [figures[name]["closing"][f"saved against {r}"]["mean"] for name in names] for r in ("uniform", "search")
    }
    result = {
        "claim": "Choosing example and question together: 8 points more at 30% of the questions than uniform, and full "
        "annotation with 40% fewer yes/no questions",
        "figures": figures,
        "budget": {name: done[name]["search"][0]["budget"] for name in names},
        "peers": {"baselines of the paper": ", ".join(a for a in ARMS[4:] if a in figures[names[0]])},
        "ratio": round(1 / (1 - float(np.mean(saved["uniform"]))), 3),
        "ratio_of": "yes/no questions until every label is known, uniform over ours (from the mean saving over sets)",
        "target": "at least 8 points and 40% on every set",
        "points over uniform": dict(zip(names, points, strict=True)),
        "saved": {rival: dict(zip(names, values, strict=True)) for rival, values in saved.items()},
        "met": {"8 points": all(p >= 8 for p in points), "40% fewer": all(s >= 0.4 for s in saved["uniform"])},
        "versions": common.versions("numpy", "torch", "scipy"),
    }  # fmt: skip
    common.keep(__file__, result, chosen)
    for name in done:
        if not chosen.quick:
            draw(name, figures[name])
        print(f"\n### {name}\n\n| strategy | accuracy at 30% | points over uniform | questions an example "
              "| fewer than uniform | fewer than blind search |\n|---|---|---|---|---|---|")  # fmt: skip
        for arm, row in figures[name].items():
            over = row.get("points over uniform") or row["points over uniform, 10% wrong"]
            cells = [common.words(row["accuracy"], 100, 1, "%"), common.words(over, 1, 1)]
            if "questions" in row:
                cells += [common.words(row["questions"], 1, 2)]
                cells += [common.words(row[f"saved against {r}"], 100, 0, "%") for r in ("uniform", "search")]
            print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
