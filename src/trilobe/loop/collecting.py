"""``init`` and ``add``: a project comes into being, and examples come into it."""

import csv
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilobe.config import FILE, parse
from trilobe.errors import NotFoundError, StorageError, UnreadableExample, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.store import Store
from trilobe.loop.project import STATE, Project, digest, opened, tell
from trilobe.types import GOLD, Answer, Example, Question, Response, Split

TEMPLATE = """\
# A Trilobe project. Every key is optional but the name; `trilobe show config` prints them all with their values.

[project]
name = "{name}"
task = "{task}"
seed = {seed}

[labels]
names = [{labels}]

[query]
strategy = "margin"   # or entropy, least_confidence, typical, random
first = 20            # questions of the first round: examples typical of the pool
n = 20                # questions of each later round
answers = 1           # people asked the same question
annotators = []       # who may be asked; empty: whoever comes

[check.gates]         # `trilobe check` exits with code 3 when one fails, and `trilobe package` refuses the model
# accuracy = 0.9      # at least, on the held-out test part
# ece = 0.1           # at most: expected calibration error
# "robust_accuracy@0.02" = 0.5
parity = 1e-4         # at most: largest difference between the exported graph and the trained network

[serve]
capture = 1.0         # share of the traffic that is kept for monitoring

[monitor]
alpha = 0.01          # false alarms per window of clean traffic

[run]
goal = 0.95           # stop at this accuracy
budget = 1000         # or after so many answers
"""


@dataclass(frozen=True)
class Added:
    """What became of the files: ids ``added``, names recognized as ``duplicates``, and why others were ``refused``."""

    added: tuple[str, ...]
    duplicates: Mapping[str, str]
    refused: Mapping[str, str]
    labeled: int = 0


def init(
    project: Path | str = ".",
    labels: Sequence[str] = (),
    name: str = "",
    task: str = "image_classification",
    seed: int = 0,
) -> Path:
    """Start a project: write ``trilobe.toml`` and create the store.

    A project that is already there is left as it is.

    Args:
        project: the folder.
        labels: the class names; they can also be written into trilobe.toml later.
        name: the project's and its endpoint's name; the folder's name by default.
        task: what kind of examples.
        seed: for everything random.

    Returns:
        The path of trilobe.toml.

    Example:
        trilobe init --project signs --labels stop,yield,go
    """
    folder = Path(project)
    path = folder / FILE
    if not path.exists():
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name or folder.resolve().name).strip("-._")
        quoted = ", ".join('"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"' for label in labels)
        text = TEMPLATE.format(name=plain or "project", task=task, seed=seed, labels=quoted)
        parse(text, FILE)
        write_atomically(path, text.encode())
        tell(f"wrote {path}")
    settings = parse(path.read_text("utf-8"), str(path))
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"cannot create {folder / STATE}: {e.strerror}", expected="a folder one may write to") from e
    Store.open(folder / STATE, settings.project.store or None, create=True).close()
    return path


def add(
    paths: Sequence[Path | str],
    project: "Project | Path | str" = ".",
    split: Split = "pool",
    labels: str = "",
    source: str = "file",
) -> Added:
    """Add examples: files, or folders with everything in them. Bytes are copied; the originals are not needed again.

    Unreadable files are refused one by one with their reasons; the rest go in. The same picture twice, also in another
    file format, or in the other split, is recognized and goes in once.

    Args:
        paths: files and folders.
        project: the project's folder.
        split: "pool" to learn from, "test" to be held out.
        labels: the truth, where it is known: "folders" (each file's folder is its class), or a CSV file with the
            columns example (file name) and label. It is kept as answers of the annotator "gold".
        source: a remark on where they come from.

    Returns:
        What was added, recognized, refused.

    Raises:
        NotFoundError: a path is not there, or nothing at all could be added.

    Example:
        trilobe add photos/ --project signs
        trilobe add held-out/ --split test --labels folders
    """
    if split not in ("pool", "test"):
        raise UsageError(f"split {split!r}", expected="'pool' or 'test'")
    with opened(project) as p:
        truth = _truth_table(labels)
        files = list(_files(paths, p.task.suffixes))
        examples: list[Example] = []
        contents: dict[str, str] = {}
        refused: dict[str, str] = {}
        gold: dict[str, str] = {}
        now = time.time()
        for i, path in enumerate(files):
            try:
                data = path.read_bytes()
                item = p.task.decode(data, p.config)
                id_ = p.store.blobs.put(data)
            except UnreadableExample as e:
                refused[str(path)] = str(e)
                continue
            except OSError as e:
                refused[str(path)] = f"cannot be read: {e.strerror}"
                continue
            examples.append(Example(id_, str(path), split, source, {}, now))
            contents[id_] = p.task.content(item)
            if label := truth.get(path.name, path.parent.name if labels == "folders" else ""):
                p.space.index(label)
                gold[id_] = label
            if i % 50 == 49 or i + 1 == len(files):
                tell("adding", i + 1, len(files))
        return _add(p, examples, contents, refused, gold)


def _add(
    p: Project, examples: list[Example], contents: dict[str, str], refused: dict[str, str], gold: dict[str, str]
) -> Added:
    with p.store.transaction():
        added, again = p.store.add_examples(examples, contents)
        new = {e.id for e in added}
        record_truth(p, {k: v for k, v in gold.items() if k in new})
    if not added and not again:
        raise NotFoundError(
            f"none of {len(refused)} files could be added" if refused else "no files of a known kind were found",
            expected="images (" + ", ".join(sorted(p.task.suffixes)) + ")",
            hint=next(iter(refused.values()), "name a folder that holds some"),
        )
    for name, reason in refused.items():
        tell(f"refused {name.encode('utf-8', 'replace').decode()}: {reason}")
    duplicates = {e.name: id_ for e, id_ in again}
    return Added(tuple(e.id for e in added), duplicates, refused, len(new & set(gold)))


def record_truth(p: Project, truth: Mapping[str, str]) -> None:
    """Keep what is known for certain, example id -> class name, as answers of the annotator ``gold``."""
    questions = [
        Question(digest("truth", id_)[:16], id_, strategy="truth.v1", reason="known beforehand") for id_ in truth
    ]
    answers = [
        Answer(digest("truth", id_, label)[:16], digest("truth", id_)[:16], id_, GOLD, Response("class", (label,)))
        for id_, label in truth.items()
    ]
    p.store.add_questions(questions)
    p.store.add_answers(answers)


def read_table(path: Path | str, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; ``needed`` columns must be there. Errors name the file and the column."""
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(f"no file {path}", expected="a CSV file") from None
    except (UnicodeDecodeError, OSError) as e:
        raise UsageError(f"{path} cannot be read: {e}", expected="a CSV file in UTF-8") from e
    rows = list(csv.DictReader(text.splitlines()))
    have = list(rows[0]) if rows else []
    if missing := [c for c in needed if c not in have]:
        raise UsageError(
            f"{path} has the columns {have}", expected=f"also {missing}", hint=f"first line: {','.join(needed)}"
        )
    return rows


def _truth_table(labels: str) -> dict[str, str]:
    if labels in ("", "folders"):
        return {}
    return {Path(row["example"]).name: row["label"].strip() for row in read_table(labels, ["example", "label"])}


def _files(paths: Sequence[Path | str], suffixes: frozenset[str]) -> Iterator[Path]:
    """Every file named, and every file of a known kind in the folders named, in a stable order."""
    if not paths:
        raise UsageError("nothing to add", expected="files or folders", hint="trilobe add photos/")
    for path in map(Path, paths):
        if path.is_dir():
            found = [Path(top) / name for top, _, names in os.walk(path) for name in names]
            yield from sorted((f for f in found if f.suffix.lower() in suffixes), key=os.fsencode)
        elif path.exists():
            yield path
        else:
            raise NotFoundError(f"no file or folder {path}", expected="an existing path")
