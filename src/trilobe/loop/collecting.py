"""``init`` and ``add``: a project comes into being, and examples come into it."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from trilobe import tasks
from trilobe.config import FILE, load, parse
from trilobe.errors import AnswerError, NotFoundError, StorageError, UnreadableExample, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.store import Store
from trilobe.loop.project import STATE, UNASKED, Project, digest, opened, tell
from trilobe.loop.tables import read_table, written
from trilobe.types import GOLD, LISTED, Answer, Example, Question, Response, Split

TEMPLATE = """\
# A Trilobe project. Every key is optional but the name; `trilobe show config` prints them all with their values.

[project]
name = "{name}"
task = "{task}"
seed = {seed}

[labels]
names = [{labels}]

[query]
strategy = "{strategy}"   # or {others}, badge, k_center, typical, random
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
    """What became of the files: ids ``added``, names recognized as ``duplicates``, and why others were ``refused``.

    ``labeled`` counts truths that came with them, ``listed`` answers of a list of entities.
    """

    added: tuple[str, ...]
    duplicates: Mapping[str, str]
    refused: Mapping[str, str]
    labeled: int = 0
    listed: int = 0


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
        task: image_classification, text_classification or entity_recognition.
        seed: for everything random.

    Returns:
        The path of trilobe.toml.

    Example:
        trilobe init --project signs --labels stop,yield,go
    """
    if isinstance(labels, str):
        raise UsageError(f"labels = {labels!r}", expected='a list of names: labels=["cat", "dog"]')
    folder = Path(project)
    path = folder / FILE
    if not path.exists():
        wanted = name or folder.resolve().name
        plain = "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in wanted).strip("-._")
        quoted = ", ".join('"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"' for label in labels)
        kind = tasks.get(task)
        others = "token_entropy" if kind.strategy == "mnlp" else "entropy, least_confidence"
        text = TEMPLATE.format(name=plain or "project", task=task, seed=seed, labels=quoted, strategy=kind.strategy,
                               others=others)  # fmt: skip
        parsed = parse(text, FILE)
        _ = (
            kind.space(parsed) if labels else None
        )  # one class only, or one class twice, is an error now rather than later
        write_atomically(path, text.encode())
        tell(f"wrote {path}")
    settings = load(folder)
    if labels and tuple(labels) != settings.labels.names:
        tell(f"{path} was there already and stays as it is; its labels.names are {list(settings.labels.names)}")
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"cannot create {folder / STATE}: {e.strerror}", expected="a folder one may write to") from e
    Store.open(folder / STATE, settings.project.store or None, create=True).close()
    return path


def add(
    paths: Path | str | Sequence[Path | str],
    project: "Project | Path | str" = ".",
    split: Split = "pool",
    labels: str = "",
    source: str = "file",
    format: Literal["files", "comprehend", "comprehend_files"] = "files",
) -> Added:
    """Add examples: files, or folders with everything in them. Bytes are copied; the originals are not needed again.

    Unreadable files are refused one by one with their reasons; the rest go in. The same picture twice, also in another
    file format, or in the other split, is recognized and goes in once.

    Args:
        paths: files and folders (in Python also a single one).
        project: the project's folder.
        split: "pool" to learn from, "test" to be held out.
        labels: the truth, where it is known: "folders" (each file's folder is its class), "inside" (the files say it:
            JSON lines, CSV, CoNLL), or a CSV file with the columns example (file name, or the end of its path) and
            label. It is kept as answers of the annotator "gold", also of examples that are there already.
        source: a remark on where they come from.
        format: files (one example each, or as their suffix says); comprehend, what Amazon Comprehend's entity
            recognizer is trained on: text files with a document on each line, labels being a CSV file of annotations,
            or of entities (kept as answers of the annotator "entity-list"), or a manifest of Ground Truth;
            comprehend_files, the same with one document per file. Of these, all goes in or nothing.

    Returns:
        What was added, recognized, refused.

    Raises:
        NotFoundError: a path is not there, or nothing at all could be added.

    Example:
        trilobe add photos/ --project signs
        trilobe add held-out/ --split test --labels folders
        trilobe add documents.txt --format comprehend --labels annotations.csv
    """
    if split not in ("pool", "test"):
        raise UsageError(f"split {split!r}", expected="'pool' or 'test'")
    with opened(project) as p:
        paths = [paths] if isinstance(paths, Path | str) else paths
        if format != "files":
            return _add_comprehend(p, paths, split, labels, source, format == "comprehend")
        files = list(_files(paths, p.task.suffixes))
        truth = _truth(p, files, labels)
        examples: list[Example] = []
        contents: dict[str, str] = {}
        refused: dict[str, str] = {}
        now = time.time()
        for i, path in enumerate(files):
            try:
                parts = p.task.read(path.read_bytes(), path.suffix.lower(), p.config)
            except UnreadableExample as e:
                refused[str(path)] = str(e)
                continue
            except OSError as e:
                refused[str(path)] = f"cannot be read: {e.strerror}"
                continue
            for data, said, where in parts:
                examples.append(Example(p.store.blobs.put(data), f"{path}{where}", split, source, {}, now))
                contents[examples[-1].id] = p.task.content(p.task.decode(data, p.config))
                if said and labels == "inside":
                    truth[examples[-1].name] = said
            if i % 50 == 49 or i + 1 == len(files):
                tell("adding", i + 1, len(files))
        return _add(p, examples, contents, refused, truth)


def _add_comprehend(
    p: Project, paths: Sequence[Path | str], split: Split, labels: str, source: str, by_line: bool
) -> Added:
    """Documents in Comprehend's formats, all of them read before the first is kept."""
    from trilobe.tasks.entity_recognition.comprehend import DOCUMENTS, MANIFESTS, read

    if not p.space.scheme:
        raise UsageError("entities for a project without any", expected='task = "entity_recognition"')
    files = list(_files(paths, DOCUMENTS | (MANIFESTS - p.task.suffixes)))
    documents, who = read(files, labels, p.config.label_names(), by_line)
    if who == LISTED and split == "test":
        raise UsageError("a test part known from a list of entities", expected="annotations: a list misses some")
    examples: list[Example] = []
    contents: dict[str, str] = {}
    said: dict[str, Response] = {}
    now = time.time()
    for i, d in enumerate(documents):
        row = {"text": d.text} | ({"spans": d.spans} if d.spans is not None else {})
        for data, truth, where in p.task.read(msgspec.json.encode(row), ".jsonl", p.config):
            name = d.name + where.removeprefix("#1")  # of a long document, which part
            examples.append(Example(p.store.blobs.put(data), name, split, source, {}, now))
            contents[examples[-1].id] = p.task.content(p.task.decode(data, p.config))
            said |= {name: truth} if truth else {}
        if i % 1000 == 999 or i + 1 == len(documents):
            tell("adding", i + 1, len(documents))
    return _add(p, examples, contents, {}, said, who or GOLD)


def _add(
    p: Project,
    examples: list[Example],
    contents: dict[str, str],
    refused: dict[str, str],
    truth: Mapping[str, Response],
    who: str = GOLD,
) -> Added:
    with p.store.transaction():
        added, again = p.store.add_examples(examples, contents)
        there = {e.id: e.split for e in p.store.examples(ids=[first for _, first in again])}
        gold = {e.id: truth[e.name] for e in added if e.name in truth}
        for e, first in again:  # a truth told later counts, but never for the other split
            if e.name in truth and there[first] == e.split:
                gold.setdefault(first, truth[e.name])
        labeled = record_truth(p, gold, who)
    if not added and not again:
        raise NotFoundError(
            f"none of {len(refused)} files could be added" if refused else "no files of a known kind were found",
            expected=f"{p.task.words.noun}s ({', '.join(sorted(p.task.suffixes))})",
            hint=next(iter(refused.values()), "name a folder that holds some"),
        )
    for name, reason in refused.items():
        tell(f"refused {name}: {reason}")
    known = {e.name for e in p.store.examples(ids=[first for _, first in again])}
    left = p.store.recorded("left_out", {"duplicates": [], "refused": []})
    p.store.record("left_out", {
        "duplicates": sorted({*left["duplicates"], *(e.name for e, _ in again if e.name not in known)}),
        "refused": sorted({*left["refused"], *refused}),
    })  # fmt: skip
    counts = {"labeled": labeled} if who == GOLD else {"listed": labeled}
    if who != GOLD:
        tell(f"{labeled} answers of {who!r}")
    return Added(tuple(e.id for e in added), {e.name: first for e, first in again}, refused, **counts)


def record_truth(p: Project, truth: Mapping[str, Response], who: str = GOLD) -> int:
    """Keep what is known beforehand, by example id, as answers of ``who``: how many are new.

    The annotator ``gold`` is certain; another, as a list of names, is judged by the aggregation like anybody.
    """
    kind, strategy = ("truth", UNASKED[0]) if who == GOLD else (who, UNASKED[1])
    questions = [Question(digest(kind, id_)[:16], id_, strategy=strategy, reason="known beforehand") for id_ in truth]
    answers = []
    for id_, said in truth.items():
        p.possible(said, id_)
        question, key = digest(kind, id_)[:16], digest(kind, id_, written(said))[:16]
        answers.append(Answer(key, question, id_, who, said))
    p.store.add_questions(questions)
    return p.store.add_answers(answers)


def _truth(p: Project, files: Sequence[Path], labels: str) -> dict[str, Response]:
    """File -> what it is, as far as it is known. It must be one of the project's classes; the error names the file."""
    if labels in ("", "inside"):
        return {}
    truth = {str(f): f.parent.name for f in files} if labels == "folders" else _truth_table(files, labels)
    for name, label in truth.items():
        try:
            p.space.index(label)
        except AnswerError as e:
            raise AnswerError(f"{name}: {e.problem}", expected=e.expected, hint=e.hint) from e
    return {name: Response("class", (label,)) for name, label in truth.items()}


def _truth_table(files: Sequence[Path], table: str) -> dict[str, str]:
    """File -> class from a CSV file, where an example is named by its file name or by the end of its path."""
    by_name: dict[str, list[Path]] = {}
    for f in files:
        by_name.setdefault(f.name, []).append(f)
    truth: dict[str, str] = {}
    unknown = 0
    for line, row in read_table(table, ["example", "label"]):
        wanted, label = Path(row["example"].strip()), row["label"].strip()
        meant = [f for f in by_name.get(wanted.name, []) if f.parts[-len(wanted.parts) :] == wanted.parts]
        unknown += not meant
        if len(meant) > 1:
            raise AnswerError(
                f"{table}:{line}: {row['example']!r} may mean {len(meant)} files",
                expected="enough of the path to tell them apart",
                hint=f"for example {'/'.join(meant[0].parts[-2:])}",
            )
        for f in meant:
            if truth.setdefault(str(f), label) != label:
                raise AnswerError(f"{table}:{line}: {f.name} is {truth[str(f)]!r} and {label!r}", expected="one class")
    if unknown:
        tell(f"{unknown} rows of {table} name no file that was added")
    return truth


def _files(paths: Sequence[Path | str], suffixes: frozenset[str]) -> Iterator[Path]:
    """Every file named, and every file of a known kind in the folders named, in a stable order."""
    if not paths:
        raise UsageError("nothing to add", expected="files or folders", hint="trilobe add photos/")
    for path in map(Path, paths):
        if path.is_dir():
            found: list[Path] = []
            for top, folders, names in os.walk(path):
                folders[:] = [f for f in folders if f != STATE]  # what this program keeps is no new example
                found += [f for f in (Path(top) / name for name in names) if f.suffix.lower() in suffixes]
            yield from sorted((f for f in found if f.is_file()), key=os.fsencode)
        elif path.is_file():
            yield path
        else:
            raise NotFoundError(f"no file or folder {path}", expected="an existing path")
