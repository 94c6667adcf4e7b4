"""``serve``: a bundle answers under a name, beside others if need be, and is replaced without a failed request."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trilobe.config import PipelineSection, ServeSection
from trilobe.errors import ConfigError, NotFoundError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure import endpoint as endpoints
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.deferral import chooser
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve import Batching, Flow, Function, Node, Settings, graph, serve_forever
from trilobe.infrastructure.serve.access import is_loopback
from trilobe.infrastructure.serve.graph import find
from trilobe.loop.project import Project, opened, tell
from trilobe.types import Bundle, Endpoint


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
        settings = p.config.serve
        port = settings.port if port is None else port
        capture = settings.capture if capture is None else capture
        if not 0 <= capture <= 1:
            raise UsageError(f"capture = {capture}", expected="a share from 0 to 1")
        how_served = _settings(settings, p.folder)
        if engine == "ray":
            wishes = {n: Wish(str(b.path.resolve())) for n, b in {"": chosen, **_beside(p)}.items()}
            return _serve_on_ray(p, name, wishes, port or 8000, capture, how_served)
        if _running(folder):
            tell(f"replacing what is behind {name!r}" if not (canary or shadow) else f"trying it beside {name!r}")
            replaced = endpoints.replace(folder, chosen.path, canary=canary, shadow=shadow)
            if port and not replaced.url.endswith(f":{port}"):
                tell(f"it stays at {replaced.url}; to move it, trilobe serve --stop first")
            return replaced
        if canary or shadow:
            raise ServeError(f"endpoint {name!r} is not running", hint="trilobe serve --background first")
        _deploy(folder, {"": chosen, **_beside(p)}, how_served.repository)
        if background:
            if not (is_loopback(settings.host) or how_served.tls):
                tell(f"serving on {settings.host} without TLS: requests, answers and tokens can be read on the way")
            where = ["--project", str(p.folder.resolve()), "--name", name]
            how = ["--port", str(port), "--capture", str(capture)]
            command = [sys.executable, "-m", "trilobe", "serve", str(chosen.path.resolve()), *where, *how]
            return endpoints.start(folder, name, command)
        task, captures = p.task, p.captures
    if not how_served.json_log:  # else every line is JSON
        tell(f"serving {name!r}; interrupt with Ctrl-C")
    serve_forever(folder, name, task.servable, captures, settings.host, port, capture, settings.max_body, how_served)
    return endpoints.status(folder)


def _serve_on_ray(p: Project, name: str, wishes: dict[str, Wish], port: int, capture: float, how: Settings) -> Endpoint:
    from trilobe.infrastructure.serve.on_ray import serve_on_ray_forever

    tell(f"serving {name!r} on Ray; interrupt with Ctrl-C")
    host = p.config.serve.host
    limit = p.config.serve.max_body
    folder = p.endpoint_folder(name)
    serve_on_ray_forever(name, p.task.servable, wishes, host, port, p.captures, capture, limit, how, folder)
    return Endpoint(name, f"http://{host}:{port}", "", "stopped")


def _settings(section: ServeSection, base: Path) -> Settings:
    """What ``[serve]`` says, with paths that begin at the project's folder.

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
        batching={"": Batching(section.max_batch, section.max_pending, section.delay, limit=section.limit)},
        tls=(base / section.tls_cert, base / section.tls_key, authority) if section.tls_cert else None,
        tokens=base / tokens if tokens else None,
        open=section.open or os.environ.get("TRILOBE_OPEN") == "1",
        max_memory=section.max_memory * 1024 * 1024,
        log_share=section.log_share,
        json_log=section.log == "json",
        defer=chooser(section.defer_error, section.defer_share),
        max_waiting=section.max_waiting,
    )


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
    return tuple(_pipeline(name, declared) for name, declared in section.pipelines.items())


def _pipeline(name: str, declared: PipelineSection) -> Flow:
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
