"""The same server on a Ray cluster: Ray Serve starts the replicas, spreads the requests and replaces what dies.

Every replica is a :class:`~trilobe.infrastructure.serve.server.Server` behind
:class:`~trilobe.infrastructure.serve.asgi.Asgi`: the same models, pipelines, batches and answers as on one machine.
Ray's proxy costs more than our own front: use it to grow over machines, not to be fast on one.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trilobe.errors import ConfigError, MissingExtra, ServeError, UsageError
from trilobe.infrastructure.capture import CaptureLog
from trilobe.infrastructure.desk import Desk
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve.access import Gate
from trilobe.infrastructure.serve.asgi import Asgi
from trilobe.infrastructure.serve.logs import access_log
from trilobe.infrastructure.serve.models import Load
from trilobe.infrastructure.serve.process import Settings, gate_for
from trilobe.infrastructure.serve.server import MAX_BODY, Deferral, Server
from trilobe.infrastructure.serve.traces import open_traces


async def _make(
    name: str, load: Load, wishes: Mapping[str, Wish], captures: Path | None, rate: float, max_body: int,
    settings: Settings, gate: Callable[[], Gate], folder: Path | None,
) -> Server:  # fmt: skip
    if settings.defer is not None and not (folder and folder.is_dir()):
        raise ServeError(
            f"what is in doubt is left to people at {folder}, which is not on this node",
            expected="a folder that every node finds by the same path",
            hint="put the project on storage that all nodes mount, or set serve.defer_error and serve.defer_share to 0",
        )
    log = CaptureLog(captures, name, rate) if captures is not None else None
    server = Server(name, load, log, max_body, settings.flows, settings.batching, threads=settings.threads, gate=gate())
    server.traces, server.access = open_traces(), access_log(settings.log_share)
    if folder is not None:
        server.deferral = Deferral(Desk(folder, settings.max_waiting), settings.defer)
    await server.apply(wishes)
    if not server.repository.ready:
        reasons = [model.error for model in server.repository.models.values() if model.error]
        raise ServeError(f"{name!r} cannot be served: {'; '.join(reasons)}")
    return server


def start_on_ray(
    name: str,
    load: Load,
    wishes: Mapping[str, Wish],
    host: str = "127.0.0.1",
    port: int = 8000,
    captures: Path | None = None,
    capture_rate: float = 0.0,
    max_body: int = MAX_BODY,
    settings: Settings | None = None,
    folder: Path | None = None,
) -> str:
    """Deploy to the Ray cluster of this process (a local one is started where there is none); the endpoint's URL.

    ``settings.workers`` are the replicas. Bundles, captures, the tokens of ``settings`` and the endpoint's ``folder``,
    where what is left to people waits, must lie where every node finds them by the same path. Deploying the same name
    again replaces it without a failed request. Raises :class:`~trilobe.errors.MissingExtra` without Ray Serve,
    :class:`~trilobe.errors.ConfigError` where everybody who reaches ``host`` could do everything, or would read what
    was to be encrypted, :class:`~trilobe.errors.UsageError` where answers shall be left to people and there is no
    folder, :class:`~trilobe.errors.ServeError` where it does not become healthy.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtra(
            "Ray Serve is not installed", expected="ray with its serving part", hint="pip install 'trilobe[ray]'"
        ) from error
    settings = settings or Settings()
    if settings.tls is not None:
        raise ConfigError(
            "Ray's proxy speaks HTTP, and serve.tls_cert asks for HTTPS",
            expected="no certificate here",
            hint="let a proxy before Ray encrypt, and unset serve.tls_cert and serve.tls_key",
        )
    if settings.defer is not None and folder is None:
        raise UsageError("answers shall be left to people (defer), and no folder is named", expected="the endpoint's")
    if folder is not None:
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
    captures = captures.resolve() if captures is not None else None  # a replica works in a folder of its own
    gate = partial(gate_for, folder, host, settings) if folder else partial(Gate, None)
    gate().check_host(host, open=settings.open, encrypted=False)
    make = partial(_make, name, load, dict(wishes), captures, capture_rate, max_body, settings, gate, folder)
    replica: Any = serve.deployment(
        name=name, num_replicas=settings.workers, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1}
    )(serve.ingress(Asgi(make))(_Replica))
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(replica.bind(), name=name, route_prefix="/")
    except (RuntimeError, OSError) as error:
        raise ServeError(f"Ray does not serve {name!r}: {error}", hint="see the replica's log") from error
    return f"http://{host}:{port}"


def serve_on_ray_forever(*args: Any, **kwargs: Any) -> None:
    """:func:`start_on_ray`, until interrupted; then the deployment is taken down."""
    from ray import serve

    start_on_ray(*args, **kwargs)
    try:
        threading.Event().wait()
    finally:
        serve.shutdown()


class _Replica:
    """Ray wants a class to put the application into."""
