"""``serve``: a bundle answers under a name, beside others if need be, and is replaced without a failed request."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict

from trilobe.config import FILE, BatchingSection, PipelineSection, ServeSection, load
from trilobe.errors import ConfigError, NotFoundError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.deferral import chooser
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve import Batching, Flow, Function, Node, Settings, graph, serve_forever
from trilobe.infrastructure.serve.access import is_loopback
from trilobe.infrastructure.serve.graph import find
from trilobe.infrastructure.serve.process import Change
from trilobe.loop.project import Project, opened, tell
from trilobe.types import Bundle, Endpoint

# What of [serve] takes effect while a server runs. All else is part of how it was started, or of no concern to it.
LIVE = (
    *("capture", "max_batch", "max_pending", "delay", "limit", "max_memory", "log_share", "batching"),
    *("defer_error", "defer_share", "max_waiting", "webhook", "webhook_secret"),
)
_chooser = cache(chooser)  # the same promise is the same object: a server sees whether it has changed


def serve(
    bundle: str = "",
    project: "Project | Path | str" = ".",
    name: str = "",
    port: int | None = None,
    capture: float | None = None,
    background: bool = False,
    stop: bool = False,
    canary: float = 0.0,
    shadow: bool = False,
    engine: Literal["here", "ray"] = "here",
) -> Endpoint:
    """Put a bundle behind an endpoint name, or replace what is behind it without a failed request.

    The endpoint speaks the Open Inference Protocol v2 over HTTP (and gRPC) on this machine. If it is running already,
    the new bundle is loaded and warmed up beside the old one, takes over, and this call returns.

    Args:
        bundle: its id or first letters, or a path; the newest of the project by default.
        project: the project's folder.
        name: the endpoint's name; the project's name by default.
        port: 0 takes any free one.
        capture: share of the traffic kept for monitoring, 0 to 1.
        background: start a server that goes on when this program ends; otherwise serve until interrupted.
        stop: stop the endpoint.
        canary: give the bundle this share of the requests only, 0 to 1; the one before answers the others. Serving
            it once more without makes it the one.
        shadow: let the bundle answer a copy of the requests that nobody sees; metrics count how often both agree.
        engine: ray deploys it to a Ray cluster (or a local one), with serve.workers replicas, until interrupted.

    Raises:
        BundleError: the bundle is damaged; what is being served goes on.
        PortInUse: another program listens there.

    Example:
        trilobe serve --background --port 8000
        trilobe serve --canary 0.05
        trilobe serve --engine ray --port 8000
        trilobe serve --stop
    """
    with opened(project) as p:
        name = name or p.config.project.name
        folder = p.endpoint_folder(name)
        if stop:
            return endpoints.stop(folder)
        chosen = _bundle(p, bundle)
        fixed = {key: said for key, said in (("port", port), ("capture", capture)) if said is not None}
        settings = msgspec.structs.replace(p.config.serve, **fixed)
        port, capture = settings.port, settings.capture
        if not 0 <= capture <= 1:
            raise UsageError(f"capture = {capture}", expected="a share from 0 to 1")
        how_served = _settings(settings, p.folder, name)
        if engine == "ray":
            wishes = {n: Wish(str(b.path.resolve())) for n, b in {"": chosen, **_beside(p)}.items()}
            return _serve_on_ray(p, name, wishes, port or 8000, capture, how_served)
        if _running(folder):
            tell(f"replacing what is behind {name!r}" if not (canary or shadow) else f"trying it beside {name!r}")
            replaced = endpoints.replace(folder, chosen.path, canary=canary, shadow=shadow)
            if port and not replaced.url.endswith(f":{port}"):
                tell(f"it stays at {replaced.url}; to move it, trilobe serve --stop first")
            if "capture" in fixed:
                tell("it keeps the share that it kept; to change that while it runs, set serve.capture")
            return replaced
        if canary or shadow:
            raise ServeError(f"endpoint {name!r} is not running", hint="trilobe serve --background first")
        _deploy(folder, {"": chosen, **_beside(p)}, how_served.repository)
        if background:
            if not (is_loopback(settings.host) or how_served.tls):
                tell(f"serving on {settings.host} without TLS: requests, answers and tokens can be read on the way")
            where = ["--project", str(p.folder.resolve()), "--name", name]
            given = [word for key, said in fixed.items() for word in (f"--{key}", str(said))]
            command = [sys.executable, "-m", "trilobe", "serve", str(chosen.path.resolve()), *where, *given]
            return endpoints.start(folder, name, command)
        task, captures = p.task, p.captures
        how_served = replace(how_served, look=_look(settings, p.folder, name, fixed))
    if not how_served.json_log:  # else every line is JSON
        tell(f"serving {name!r}; interrupt with Ctrl-C")
    serve_forever(folder, name, task.servable, captures, settings.host, port, capture, settings.max_body, how_served)
    return endpoints.status(folder)


def _serve_on_ray(p: Project, name: str, wishes: dict[str, Wish], port: int, capture: float, how: Settings) -> Endpoint:
    from trilobe.infrastructure.serve.on_ray import serve_on_ray_forever

    unused = [key for key in ("grpc", "repository", "max_memory") if getattr(p.config.serve, key)]
    if unused:
        tell(f"on Ray this does nothing: {', '.join(f'serve.{key}' for key in unused)}")
    tell(f"serving {name!r} on Ray; interrupt with Ctrl-C")
    host = p.config.serve.host
    limit = p.config.serve.max_body
    folder = p.endpoint_folder(name)
    serve_on_ray_forever(name, p.task.servable, wishes, host, port, p.captures, capture, limit, how, folder)
    return Endpoint(name, f"http://{host}:{port}", "", "stopped")


def _look(start: ServeSection, base: Path, name: str, fixed: Mapping[str, Any]) -> Callable[[], Change | None]:
    """What tells a server that the settings in the folder ``base`` have changed since its ``start``, all but ``fixed``.

    The first look always tells, so that nothing is missed between the start and it.
    """
    seen: Any = None

    def look() -> Change | None:
        nonlocal seen
        before, seen = seen, _stamp(base / FILE)
        if seen == before:
            return None
        now = msgspec.structs.replace(load(base).serve, **fixed)
        live = {key: getattr(now, key) for key in LIVE}
        section = msgspec.structs.replace(start, **live)
        behind = [f"serve.{key}" for key in now.__struct_fields__ if getattr(now, key) != getattr(section, key)]
        return Change(replace(_settings(section, base, name), look=look), section.capture, tuple(behind))

    return look


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _settings(section: ServeSection, base: Path, name: str) -> Settings:
    """What ``[serve]`` says of the endpoint ``name``, with paths that begin at the project's folder.

    In a container the environment is at hand where the settings are not: ``TRILOBE_TOKENS``, ``TRILOBE_OPEN=1``.
    """
    if bool(section.tls_cert) != bool(section.tls_key):
        raise ConfigError("serve.tls_cert and serve.tls_key come together", expected="both, or neither")
    authority = base / section.tls_client_ca if section.tls_client_ca else None
    tokens = os.environ.get("TRILOBE_TOKENS") or section.tokens
    return Settings(
        workers=section.workers,
        threads=section.threads,
        grpc_port=section.grpc_port if section.grpc else None,
        repository=base / section.repository if section.repository else None,
        flows=pipelines(section, base),
        batching={"": _batching(section), **{model: _of_model(section, model, name) for model in section.batching}},
        tls=(base / section.tls_cert, base / section.tls_key, authority) if section.tls_cert else None,
        tokens=base / tokens if tokens else None,
        open=section.open or os.environ.get("TRILOBE_OPEN") == "1",
        max_memory=section.max_memory * 1024 * 1024,
        log_share=section.log_share,
        json_log=section.log == "json",
        defer=_chooser(section.defer_error, section.defer_share),
        max_waiting=section.max_waiting,
    )


def _batching(section: ServeSection, said: BatchingSection | None = None, **usual: Any) -> Batching:
    """How requests are computed: as ``[serve]`` says and is ``usual`` for them, but for what is ``said`` of them."""
    default = Batching(section.max_batch, section.max_pending, section.delay, limit=section.limit)
    given = {key: value for key, value in (asdict(said) if said is not None else {}).items() if value}
    if "max_memory" in given:
        given["max_memory"] *= 1024 * 1024
    return replace(default, **{**usual, **given})


def _of_model(section: ServeSection, name: str, endpoint: str) -> Batching:
    if section.batching[name].where == "processes":
        raise ConfigError(
            f'[serve.batching.{name}]: where = "processes"',
            expected="auto, inline or threads: a model's network computes beside Python's lock as it is",
            hint="processes are for steps of pipelines that are functions",
        )
    if name in section.pipelines:
        hint = "of its steps that are functions it is said beside them: batching = {...}"
        raise ConfigError(f"[serve.batching.{name}] is about a pipeline", expected="a model", hint=hint)
    if name not in (endpoint, *section.models) and not section.repository:  # from there, any may come
        known = ", ".join((endpoint, *section.models))
        problem = f"[serve.batching.{name}] is about no model that is served"
        raise ConfigError(problem, expected=f"one of: {known}", hint="name it so in [serve.models], or take this out")
    return _batching(section, section.batching[name])


def pipelines(section: ServeSection, base: Path) -> tuple[Flow, ...]:
    """The flows that ``[serve.pipelines]`` declares; Python files are looked for in ``base`` first.

    >>> from trilobe.config import StepSection
    >>> step = StepSection(model="digits", inputs={"image": "photo"})
    >>> one = PipelineSection(inputs={"photo": "UINT8[-1,8,8,1]"}, outputs={"p": "step.proba"}, steps={"step": step})
    >>> [flow.name for flow in pipelines(ServeSection(pipelines={"inspect": one}), Path())]
    ['inspect']
    """
    if section.pipelines and str(base.resolve()) not in sys.path:
        sys.path.insert(0, str(base.resolve()))
    return tuple(_pipeline(name, declared, section) for name, declared in section.pipelines.items())


def _pipeline(name: str, declared: PipelineSection, section: ServeSection) -> Flow:
    where = f"[serve.pipelines.{name}]"
    try:
        if declared.flow:
            made = find(declared.flow)
            if not isinstance(made, Flow) or declared.steps:
                raise UsageError(f"{declared.flow!r} is no pipeline", expected="a function declared with @flow, alone")
            return Flow(name, made.inputs, made.outputs, made.steps, made.run, made.check)
        nodes = {}
        for step, said in declared.steps.items():
            if bool(said.model) == bool(said.run):
                raise UsageError(
                    f"step {step!r} names {said.model!r} and {said.run!r}", expected="a model or a function"
                )
            run = find(said.run) if said.run else said.model
            if not isinstance(run, Function | str):
                raise UsageError(f"step {step!r}: {said.run!r} is no step", expected="declared with @function")
            if said.batching != BatchingSection():
                if isinstance(run, str):
                    raise UsageError(f"step {step!r} says how a model is computed", expected=f"[serve.batching.{run}]")
                run = replace(run, batching=_batching(section, said.batching, where="threads"))
            nodes[step] = Node(run, said.inputs)
        return graph(name, declared.inputs, declared.outputs, nodes)
    except TrilobeError as error:
        raise ConfigError(f"{where}: {error.problem}", expected=error.expected, hint=error.hint) from error


def _beside(p: Project) -> dict[str, Bundle]:
    """The bundles that ``[serve.models]`` names, by the names they shall have."""
    return {name: _bundle(p, source, p.folder) for name, source in p.config.serve.models.items()}


def _deploy(folder: Path, bundles: Mapping[str, Bundle], repository: Path | None) -> None:
    """Wish for these alone, and for what clients have loaded from the repository."""

    def kept(name: str, wish: Wish) -> bool:
        loaded = repository is not None and Path(wish.bundle).is_relative_to(repository.resolve())
        return name in bundles or loaded

    for name, bundle in bundles.items():
        endpoints.deploy(folder, bundle.path, name)
    endpoints.wish_for(folder, lambda models: {name: wish for name, wish in models.items() if kept(name, wish)})


def _bundle(p: Project, bundle: str, base: Path = Path()) -> Bundle:
    """A bundle by id or by path; what the settings name begins at the project's folder (``base``)."""
    if bundle and (base / bundle / "manifest.json").exists():
        return open_bundle(base / bundle)
    try:
        return open_bundle(p.store.bundle(bundle or None).path)
    except NotFoundError as e:
        raise NotFoundError(e.problem, expected="a packaged model", hint="trilobe package") from e


def _running(folder: Path) -> bool:
    try:
        return endpoints.status(folder).state in ("ready", "creating")
    except (NotFoundError, ServeError):
        return False
