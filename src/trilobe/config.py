"""Settings: one ``trilobe.toml`` per project, checked key by key. What a setting does is explained where it is used.

A flag of the command line or an argument of a verb overrides the file; the file overrides the defaults below.
"""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from trilobe.errors import ConfigError, NotFoundError, UsageError
from trilobe.types import LabelSpace

FILE = "trilobe.toml"
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e9)]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z")]


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file. A key it does not know is an error, not a silence."""


class ProjectSection(Section, frozen=True):
    """``[project]``"""

    name: Name
    task: Literal["image_classification", "text_classification", "entity_recognition"] = "image_classification"
    seed: Natural = 0
    store: str = ""  # a database URL; empty: SQLite inside .trilobe/


class LabelsSection(Section, frozen=True):
    """``[labels]``: the class names (for entities their labels), in order, and the tree they form (name -> parent)."""

    names: tuple[str, ...] = ()
    parents: dict[str, str] = field(default_factory=dict)
    scheme: Literal["BIO", "BIOES"] = "BIO"  # how entities become tags of tokens


class ImageSection(Section, frozen=True):
    """``[image]``"""

    size: Natural = 0  # height and width the network sees; 0: the pool's median, at most 64
    max_pixels: Count = 50_000_000
    network: str = ""  # your own, "package.module:function" of (preprocessing, n_classes); empty: a small one of ours


class TextSection(Section, frozen=True):
    """``[text]``"""

    encoder: str = "words"  # our own small network; or a Hugging Face encoder by name or folder (extra "text")
    layers: Natural = 0  # of the encoder, from below; 0: all. Names are told best by lower ones
    max_tokens: Count = 256  # a longer document becomes several examples, cut between sentences


class QuerySection(Section, frozen=True):
    """``[query]``"""

    strategy: str = ""  # empty: margin for classes, mnlp for entities
    first: Count = 20  # questions of the first round, chosen as typical of the pool
    n: Count = 20  # questions of every later round
    answers: Count = 1  # people asked the same question
    diversity: Count = 10
    control: Share = 0.1  # share of every later round that is picked at random, so that the saving can be measured
    switch: bool = False  # go on with random questions where they prove to teach more
    duplicates: Share = 0.995  # likeness from which an example repeats another and is not asked; 1: only equal ones
    propagate: bool = False  # let an answer count for the examples that repeat the one it was given on
    partial: bool = False  # ask "is it one of these?" where that teaches more per second than "which class?"
    seconds: dict[str, float] = field(default_factory=dict)  # {full, partial}: what people take; measured where absent
    annotators: tuple[str, ...] = ()  # who may be asked; empty: whoever comes
    engine: Literal["here", "ray"] = "here"  # where the pool is scored: in this process, or by Ray (extra "ray")


class AggregateSection(Section, frozen=True):
    """``[aggregate]``"""

    method: Literal["dawid_skene", "one_coin", "majority_vote", "model"] = "dawid_skene"
    smoothing: Positive = 1.0


class TrainSection(Section, frozen=True):
    """``[train]``"""

    steps: Count = 300
    epochs: Natural = 20
    batch_size: Annotated[int, Meta(ge=2)] = 32
    lr: Positive | Literal["auto"] = 3e-3
    weight_decay: Annotated[float, Meta(ge=0.0, le=1e9)] = 1e-2
    bootstrap: Share = 1.0
    width: Count = 16
    folds: Annotated[int, Meta(ge=2)] = 5
    augment: bool = True
    optimizer: Literal["adamw", "sgd", "lion", "signum", "signsgd"] = "adamw"  # each wants a learning rate of its own
    schedule: Literal["one_cycle", "constant"] = "one_cycle"  # of the learning rate: up and down again, or none
    patience: Natural = 0  # epochs without progress after which training stops; 0: never
    held_out: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0  # share by which progress is judged; 0: by the training loss
    precision: Literal["float32", "bfloat16", "auto"] = "float32"  # auto: half where that is measured to be faster
    deterministic: bool = False  # the same bits on any number of cores: one thread, only operations that repeat
    workers: Count = 1  # processes that train the networks of all folds side by side
    engine: Literal["here", "ray"] = "here"  # where they run: on this machine, or by Ray (extra "ray")


class CheckSection(Section, frozen=True):
    """``[check]``"""

    eps: tuple[Share, ...] = (0.02, 0.05, 0.1)
    attack_steps: Count = 20
    attack_examples: Count = 200
    gates: dict[str, float] = field(default_factory=lambda: {"parity": 1e-4})


class BatchingSection(Section, frozen=True):
    """``[serve.batching.MODEL]`` and ``batching`` of a step: how it is computed; 0 and "": as ``[serve]`` says."""

    where: Literal["", "auto", "inline", "threads", "processes"] = ""  # processes: of a step that is a function, only
    replicas: Natural = 0  # batches computed at once, and processes; 0: as many as cores
    max_batch: Natural = 0  # rows that are computed together
    max_pending: Natural = 0  # requests that may wait
    delay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0  # seconds a request may be held for others to join it
    limit: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0  # seconds one batch may take
    max_memory: Natural = 0  # MB that a process may hold after a batch, before another takes its place; 0: any


class StepSection(Section, frozen=True):
    """``[serve.pipelines.NAME.steps.STEP]``: what runs (a model served here, or a function), and what it reads."""

    model: str = ""
    run: str = ""  # "package.module:function", declared with trilobe.infrastructure.serve.function
    inputs: dict[str, str] = field(default_factory=dict)  # its input = an input of the pipeline, or "step.output"
    batching: BatchingSection = BatchingSection()  # of a function; of a model: [serve.batching.MODEL]


class PipelineSection(Section, frozen=True):
    """``[serve.pipelines.NAME]``: several models behind one name, as a graph of steps or as a Python function."""

    flow: str = ""  # "package.module:function", declared with trilobe.infrastructure.serve.flow; then nothing else
    inputs: dict[str, str] = field(default_factory=dict)  # {photo = "BYTES[-1]"}
    outputs: dict[str, str] = field(default_factory=dict)  # {kind = "classify.proba"}
    steps: dict[str, StepSection] = field(default_factory=dict)


class ServeSection(Section, frozen=True):
    """``[serve]``"""

    host: str = "127.0.0.1"
    port: Port = 0  # 0: any free one
    grpc: bool = False  # gRPC as well (extra "grpc")
    grpc_port: Port = 0  # 0: any free one
    capture: Share = 1.0  # share of the traffic that is kept
    max_body: Count = 16 * 1024 * 1024
    workers: Count = 1  # processes
    threads: Natural = 0  # computations beside each other; 0: one for each core
    max_batch: Count = 64  # rows that are computed together
    max_pending: Count = 1024  # requests that may wait for one model
    delay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0  # seconds a request may be held for others to join it
    limit: Positive = 30.0  # seconds one batch may take
    max_memory: Natural = 0  # MB of one of several workers, before another takes its place; 0: any
    tls_cert: str = ""  # a PEM file; with it, HTTPS is spoken and nothing else
    tls_key: str = ""  # of the certificate; PEM, without a password
    tls_client_ca: str = ""  # whoever signs the certificates of clients; empty: they need none
    tokens: str = ""  # the file of `trilobe token --file`, a mounted secret say; empty: one the endpoint has itself
    open: bool = False  # serve other machines without tokens
    defer_error: Share = 0.0  # leave to people what is in doubt, so that what is answered errs at most so often; 0: off
    defer_share: Share = 0.0  # leave to people what is most in doubt, at most this share of the traffic; 0: off
    max_waiting: Count = 10_000  # answers that may wait for people; beyond that, what is in doubt is answered anyway
    webhook: str = ""  # where `trilobe deliver` posts what people answered, "https://..."; empty: nowhere
    webhook_secret: str = ""  # the environment variable with the key that posts are signed with; empty: unsigned
    log: Literal["text", "json"] = "text"  # lines for people, or one JSON object each
    log_share: Share = 0.0  # share of the requests that get a line in the log
    repository: str = ""  # a folder of bundles that clients with the right to may load by name
    batching: dict[str, BatchingSection] = field(default_factory=dict)  # of single models, by their names
    models: dict[str, str] = field(default_factory=dict)  # more models beside the endpoint's own: name = bundle
    pipelines: dict[str, PipelineSection] = field(default_factory=dict)  # several models behind one name


class MonitorSection(Section, frozen=True):
    """``[monitor]``"""

    alpha: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.01  # false alarms per window of clean traffic
    share: Share = 0.5
    window: Count = 200


class RunSection(Section, frozen=True):
    """``[run]``: when the loop has done enough."""

    goal: Share = 0.95  # accuracy
    budget: Count = 1000  # answers
    seconds: Positive = 1e9  # of people's time
    rounds: Count = 50
    worth: Share = 0.0  # stop when 100 more answers can't bring this much accuracy; 0: only say so


class Config(Section, frozen=True):
    """All of ``trilobe.toml``.

    >>> parse('[project]\\nname = "signs"\\n[labels]\\nnames = ["stop", "go"]').query.first
    20
    """

    project: ProjectSection
    labels: LabelsSection = LabelsSection()
    image: ImageSection = ImageSection()
    text: TextSection = TextSection()
    query: QuerySection = QuerySection()
    aggregate: AggregateSection = AggregateSection()
    train: TrainSection = TrainSection()
    check: CheckSection = CheckSection()
    serve: ServeSection = ServeSection()
    monitor: MonitorSection = MonitorSection()
    run: RunSection = RunSection()

    @property
    def space(self) -> LabelSpace:
        """The classes. Raises :class:`~trilobe.errors.ConfigError` for fewer than two, or parents that are no tree."""
        names = self.label_names(2)
        try:
            return LabelSpace(names, self.labels.parents)
        except UsageError as e:
            raise ConfigError(f"[labels]: {e.problem}", expected=e.expected, hint=f"edit {FILE}") from e

    def label_names(self, least: int = 1) -> tuple[str, ...]:
        """``labels.names``, each fit to stand in an answer.

        Raises :class:`~trilobe.errors.ConfigError` for fewer than ``least``, or one that is not fit.
        """
        names = self.labels.names
        if len(names) < least:
            raise ConfigError(
                f"labels.names has {len(names)} class(es)",
                expected=f"at least {('one', 'two')[least - 1]}",
                hint=f'write them into {FILE}: names = ["cat", "dog"]',
            )
        for name in names:
            if name != name.strip() or name in ("", "?") or "|" in name or name.startswith("not:"):
                raise ConfigError(
                    f"labels.names has a class called {name!r}",
                    expected="names that an answer can consist of: not '?', without '|', 'not:' and outer spaces",
                    hint=f"edit {FILE}",
                )
        return names


def parse(text: str, where: str = FILE) -> Config:
    """Settings from TOML text. Raises :class:`~trilobe.errors.ConfigError` naming the key, what came and what may.

    >>> parse('[project]\\nname = "signs"\\n[query]\\nn = "many"')
    Traceback (most recent call last):
        ...
    trilobe.errors.ConfigError: trilobe.toml: query.n = "many"; expected `int`
      next: edit trilobe.toml
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{where}: {e}", expected="valid TOML", hint=f"edit {where}") from e
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as e:
        raise _explained(str(e), raw, where) from e


def load(folder: Path) -> Config:
    """The settings of the project in ``folder``.

    Raises :class:`~trilobe.errors.NotFoundError` where there is none, else what :func:`parse` raises.
    """
    path = folder / FILE
    try:
        return parse(path.read_text("utf-8-sig"), str(path))  # some editors put a byte order mark first
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"no {FILE} in {folder.resolve()}", expected="a Trilobe project", hint="trilobe init --labels cat,dog"
        ) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8: {e.reason} at byte {e.start}", expected="a UTF-8 text file") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", expected="a readable file") from e


def as_dict(value: Struct) -> dict[str, Any]:
    """A section as plain values, for records and digests.

    >>> as_dict(RunSection())["goal"]
    0.95
    """
    plain: dict[str, Any] = json.loads(msgspec.json.encode(value))
    return plain


def _explained(message: str, raw: dict[str, Any], where: str) -> ConfigError:
    """msgspec's message, with the key as people write it, the value that came, and the nearest known key."""
    what, _, at = message.partition(" - at `$")
    keys = re.findall(r"[\w-]+", at.rstrip("`"))
    if unknown := re.match(r"Object contains unknown field `(.+)`", what):
        section: Any = get_type_hints(Config).get(keys[0], Config) if keys else Config
        known = list(section.__struct_fields__)
        near = difflib.get_close_matches(unknown[1], known, 1)
        key = ".".join([*keys, unknown[1]])
        hint = f"did you mean {near[0]!r}?" if near else f"edit {where}"
        return ConfigError(f"{where}: unknown key {key}", expected=f"one of {', '.join(known)}", hint=hint)
    if missing := re.match(r"Object missing required field `(.+)`", what):
        key = ".".join([*keys, missing[1]])
        return ConfigError(f"{where}: {key} is missing", expected=f"a value for {key}", hint=f"edit {where}")
    value: Any = raw
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value.get(key)
    if what.startswith("Invalid enum value"):
        annotation = get_type_hints(get_type_hints(Config)[keys[0]])[keys[1]]
        named = [a for part in get_args(annotation) for a in (get_args(part) or (part,))]
        expected = "one of " + ", ".join("a number" if isinstance(a, type) else repr(a) for a in named)
    else:
        expected = re.sub(r"^Expected ", "", what).split(", got")[0].replace("`object`", "a table")
    return ConfigError(
        f"{where}: {'.'.join(keys)} = {json.dumps(value, default=str)}", expected=expected, hint=f"edit {where}"
    )
