"""A project: a folder with ``trilobe.toml`` and ``.trilobe/``, opened. What several verbs need stands here once."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe import __version__, config, tasks
from trilobe.config import Config
from trilobe.errors import NotEnoughData, NotFoundError, UsageError
from trilobe.rows import apply, as_rows
from trilobe.types import GOLD, BoolArray, Capture, Example, Finding, FloatArray, LabelSpace, Model, Response

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.store import Store

STATE = ".trilobe"
AT_ONCE = 4096  # examples that one worker predicts at a time
UNASKED = ("truth.v1", "entity_list.v1")  # the strategies of questions that were answered before they could be asked
Where = "Project | Path | str"


class Listener(Protocol):
    """Who is told how long work is getting on."""

    def __call__(self, message: str, done: int = 0, total: int = 0) -> None:
        """``message`` with ``total`` 0 is a remark; otherwise a bar that stands at ``done`` of ``total``."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Verbs called inside tell ``listener`` what they are doing (a terminal, a notebook widget, a log)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(message: str, done: int = 0, total: int = 0) -> None:
    """Say something to whoever is listening; silence otherwise."""
    if listener := _listener.get():
        listener(message, done, total)


@contextlib.contextmanager
def indented() -> Iterator[None]:
    """Remarks made inside stand under the one before."""
    outer = _listener.get()

    def inner(message: str, done: int = 0, total: int = 0) -> None:
        if outer:
            outer(message if total else f"   {message}", done, total)

    with listening(inner):
        yield


def digest(*parts: Any) -> str:
    """SHA-256 of plain values, for ids that depend on nothing but what they name.

    >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def seed_of(*parts: Any) -> int:
    """A random seed that follows from plain values: the same step of the same project always draws the same numbers.

    >>> seed_of(0, "round", 1) == seed_of(0, "round", 1)
    True
    """
    return int(digest(*parts)[:8], 16)


def positive(**given: int | None) -> None:
    """Raise :class:`~trilobe.errors.UsageError` for a count below 1; None is a count that was not given.

    >>> positive(n=0)
    Traceback (most recent call last):
    trilobe.errors.UsageError: n = 0; expected at least 1
    """
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} = {value}", expected="at least 1")


@dataclass
class Project:
    """An open project. Use :func:`opened`; close it when done."""

    folder: Path
    config: config.Config
    _arrays: dict[str, dict[str, FloatArray]] = field(default_factory=dict, repr=False)

    @cached_property
    def store(self) -> "Store":
        """Everything remembered, opened when first needed: who serves a bundle by its path needs no database."""
        from trilobe.infrastructure.store import Store

        return Store.open(self.state, self.config.project.store or None)

    def close(self) -> None:
        """Let go of the store."""
        if "store" in vars(self):
            self.store.close()

    @property
    def state(self) -> Path:
        """The folder ``.trilobe``."""
        return self.folder / STATE

    @property
    def seed(self) -> int:
        """The project's seed."""
        return self.config.project.seed

    @property
    def space(self) -> LabelSpace:
        """The label space: the columns of every prediction."""
        return self.task.space(self.config)

    @property
    def strategy(self) -> str:
        """What chooses questions here: by the settings, until random ones proved better (``query.switch``)."""
        if self.store.recorded("switched"):
            return "random"
        return self.config.query.strategy or self.task.strategy

    @property
    def task(self) -> tasks.Task:
        """The project's task."""
        return tasks.get(self.config.project.task)

    @property
    def captures(self) -> Path:
        """Where endpoints keep what they saw."""
        return self.state / "captures"

    def endpoint_folder(self, name: str | None) -> Path:
        """Where the endpoint of that name (the project's own by default) keeps its state."""
        return self.state / "endpoints" / (name or self.config.project.name)

    def items(self, examples: Sequence[Example]) -> list[tasks.Item]:
        """The examples, decoded."""
        return [self.item(e.id) for e in examples]

    def item(self, example_id: str) -> tasks.Item:
        """One example, decoded."""
        return self.task.decode(self.store.blobs.get(example_id), self.config)

    def possible(self, response: Response, example_id: str) -> BoolArray:
        """What an answer about an example leaves possible; an AnswerError where it does not fit."""
        return self.task.possible(response, self.space, lambda: self.item(example_id))

    def preprocessing(self) -> dict[str, Any]:
        """How this project's items become input; chosen from the pool when first needed, then kept."""
        key = f"preprocessing/{digest(config.as_dict(self.config.image), config.as_dict(self.config.text))[:16]}"
        if (kept := self.store.recorded(key)) is None:
            pool = self.store.examples("pool")
            if not pool:
                raise NotEnoughData("the pool is empty", expected="examples to learn from", hint="trilobe add FOLDER")
            kept = self.task.preprocessing(self.items(pool[:1000]), self._settings())
            self.store.record(key, kept)
        return dict(kept)

    def _settings(self) -> Config:
        """The settings, with a folder that they name relative to the project made absolute."""
        encoder = self.folder / self.config.text.encoder
        if self.config.text.encoder == "words" or not encoder.is_dir():
            return self.config
        text = msgspec.structs.replace(self.config.text, encoder=str(encoder.resolve()))
        return msgspec.structs.replace(self.config, text=text)

    def encode(self, examples: Sequence[Example]) -> FloatArray:
        """The examples as network input, decoded once per open project."""
        spec = self.preprocessing()
        known = self._arrays.setdefault(digest(spec), {})
        missing = [e for e in examples if e.id not in known]
        for start in range(0, len(missing), 256):
            part = missing[start : start + 256]
            known.update(zip([e.id for e in part], self.task.encode(self.items(part), spec), strict=True))
            if len(missing) > 2000:
                tell("reading examples", start + len(part), len(missing))
        return as_rows([known[e.id] for e in examples])

    def capture_input(self, captures: Sequence[Capture]) -> FloatArray:
        """What the endpoint saw, as network input."""
        return self.task.encode([self.task.captured(c.input) for c in captures], self.preprocessing())

    def module(self, model: Model) -> "nn.Module":
        """The network of a model with its weights, ready to predict. Raises TrainingError for NaN among them."""
        from trilobe.algorithms.fit import check_finite
        from trilobe.algorithms.weights import load_into

        module = self.task.network(model.preprocessing, model.space, int(model.network["width"]), seed=0)
        load_into(module, self.store.blobs.get(model.weights))
        check_finite(module)
        return module

    def predict(self, model: Model, X: FloatArray, module: "nn.Module | None" = None) -> FloatArray:
        """Calibrated probabilities ``(n, n_classes)``, or rows ``(n_tokens, n_classes)``.

        Where ``query.engine`` is "ray" and there is much to predict, Ray's workers do it: the same numbers.
        """
        from trilobe.algorithms.fit import predict_logits

        module = module or self.module(model)
        if self.config.query.engine == "ray" and len(X) > AT_ONCE:
            from trilobe.algorithms.spread import map_on_ray

            logits = as_rows([*chain(*map_on_ray(predict_logits, module, X, AT_ONCE))])
        else:
            logits = predict_logits(module, X)
        return calibrated(logits, model.temperature)

    def samples(
        self, model: Model, X: FloatArray, module: "nn.Module | None" = None, seed: int = 0
    ) -> list[FloatArray]:
        """What a committee predicts: the model with dropout left on, ten times."""
        from trilobe.algorithms.fit import predict_samples

        passes = predict_samples(module or self.module(model), X, seed=seed)
        return [calibrated(logits, model.temperature) for logits in passes]

    def newest_model(self) -> Model | None:
        """The model trained last, if any."""
        models = self.store.models()
        return models[-1] if models else None

    def finding(self, id: str) -> Finding:
        """The finding of that id; ``newest``: of the window looked at last, the one that most captures caused."""
        if id != "newest":
            return self.store.finding(id)
        if not (found := self.store.findings()):
            raise NotEnoughData("there are no findings", hint="trilobe monitor")
        return max(found, key=lambda f: (f.created_at, len(f.capture_ids)))

    def truth(self, split: str = "test") -> tuple[list[Example], NDArray[Any]]:
        """The examples of a split that are known for certain (gold answers), and their classes: indices, or rows."""
        gold = {a.example_id: a.response for a in self.store.answers() if a.annotator == GOLD}
        known, labels = [], []
        for e in self.store.examples("test" if split == "test" else "pool"):
            possible = self.possible(gold[e.id], e.id) if e.id in gold else None
            if possible is not None and (possible.sum(axis=-1) == 1).all():
                known.append(e)
                labels.append(possible.argmax(axis=-1))
        return known, as_rows(labels) if labels else np.empty(0, dtype=np.intp)

    def origin(self, **more: Any) -> dict[str, Any]:
        """What a record says about where it came from."""
        return {"code": f"trilobe {__version__}", "seed": self.seed, **more}


def calibrated(logits: FloatArray, temperature: float) -> FloatArray:
    """Probabilities from logits, of wholes or of rows."""
    from trilobe.statistics import softmax

    return apply(lambda row: softmax(row, temperature), logits)


@contextlib.contextmanager
def opened(project: "Project | Path | str") -> Iterator[Project]:
    """The project in a folder, open for the time of a ``with``; an open one is passed through as it is."""
    if isinstance(project, Project):
        yield project
        return
    folder = Path(project)
    settings = config.load(folder)
    if not (folder / STATE).exists():
        raise NotFoundError(f"{folder.resolve()} has no {STATE} folder", expected="a project", hint="trilobe init")
    with contextlib.closing(Project(folder, settings)) as found:
        yield found


def annotators(project: Project) -> list[Mapping[str, Any]]:
    """What the last aggregation says of each annotator, best first: name, quality, answers, median seconds."""
    kept = project.store.recorded("aggregate", {})
    return sorted(kept.get("annotators", []), key=lambda a: -a["quality"])
