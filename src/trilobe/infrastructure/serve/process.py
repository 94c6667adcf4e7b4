"""The process around a server: its socket, its workers, what it is told to serve and what it says of itself.

:func:`serve_forever` follows ``desired.json`` in the endpoint's folder and writes ``state.json`` (see ``endpoint.py``).
With one worker all of it is one process. With several, a parent that imports nothing heavy holds the socket, forks the
workers, starts a new one for each that dies, hangs or grows too large, and says of all of them what they say of
themselves; the socket outlives every worker, so no connection that waits is lost.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
from msgspec.structs import replace

from trilobe.errors import ConfigError, NotFoundError, PortInUse, ServeError, TrilobeError
from trilobe.files import write_atomically
from trilobe.infrastructure.capture import CaptureLog
from trilobe.infrastructure.desk import LIMIT, Desk
from trilobe.infrastructure.endpoint import (
    Served,
    State,
    Wish,
    hold_lock,
    read_desired,
    read_state,
    settle,
    wish_for,
    write_state,
)
from trilobe.infrastructure.serve.access import FILE as TOKENS
from trilobe.infrastructure.serve.access import Gate, is_loopback, server_context
from trilobe.infrastructure.serve.batching import Batching
from trilobe.infrastructure.serve.graph import Flow
from trilobe.infrastructure.serve.http import HttpServer, Limits
from trilobe.infrastructure.serve.logs import JsonFormatter, access_log
from trilobe.infrastructure.serve.metrics import Meters, resident_bytes
from trilobe.infrastructure.serve.models import Load
from trilobe.infrastructure.serve.server import MAX_BODY, Control, Deferral, Server
from trilobe.infrastructure.serve.traces import open_traces
from trilobe.types import Bundle

POLL_SECONDS = 0.2
HUNG_SECONDS = 20.0  # a worker whose event loop has not turned for so long is replaced
MAX_LOST = 3  # threads given up to steps that hang, before the worker itself is replaced
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is run, beyond what it serves.

    Attributes:
        workers: processes that answer.
        threads: computations beside each other in each (0: one for each core, shared by the workers).
        grpc_port: where gRPC is spoken (None: nowhere; 0: any free port).
        repository: a folder of bundles that may be loaded by their folders' names.
        flows: pipelines of several models.
        batching: how the models of that name are run; ``""`` is the default for all.
        limits: what one client may ask for.
        tls: certificate, key and, where clients must show a certificate too, the authority that signs theirs.
        tokens: the file that says who may do what (None: ``tokens.json`` in the endpoint's folder). One that is named
            and not there is an error, unless ``open``.
        open: serve other machines without tokens and without their certificates.
        max_memory: bytes of one worker, beyond which it is replaced (0: none).
        log_share: share of the requests that get a line in the log.
        json_log: whether the log is JSON lines.
        defer: what says, of a bundle, below which confidence an answer is left to people (None: no answer is). It
            raises where the bundle cannot keep what was promised.
        max_waiting: answers that may wait for people; beyond that, what is in doubt is answered all the same.
        look: what each process asks, five times a second, for settings that have changed (None: they do not). What it
            raises is said once, and changes nothing.
    """

    workers: int = 1
    threads: int = 0
    grpc_port: int | None = None
    repository: Path | None = None
    flows: tuple[Flow, ...] = ()
    batching: Mapping[str, Batching] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    tls: tuple[Path, Path, Path | None] | None = None
    tokens: Path | None = None
    open: bool = False
    max_memory: int = 0
    log_share: float = 0.0
    json_log: bool = False
    defer: Callable[[Bundle], float] | None = None
    max_waiting: int = LIMIT
    look: "Callable[[], Change | None] | None" = None


class Change(NamedTuple):
    """What the settings say now: those that may change while a server runs, the others as they were at its start.

    ``behind`` names what has changed among the others.
    """

    settings: Settings
    capture_rate: float
    behind: tuple[str, ...] = ()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises :class:`~trilobe.errors.PortInUse` where it is taken.

    >>> with bind("127.0.0.1", 0) as taken:
    ...     bind("127.0.0.1", taken.getsockname()[1])
    Traceback (most recent call last):
    trilobe.errors.PortInUse: port ... of 127.0.0.1 is in use; expected a free port
      next: choose another port, or 0 for any free one; `ss -ltnp` shows who listens
    """
    # The protocol is spelled out because asyncio turns Nagle's algorithm off only where it is: left on, it and the
    # client's delayed acknowledgments cost 40 ms a request.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} of {host} is in use",
                expected="a free port",
                hint="choose another port, or 0 for any free one; `ss -ltnp` shows who listens",
            ) from error
        raise ServeError(f"cannot listen on {host}:{port} ({error})", expected="an address of this machine") from error
    return listener


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything a worker needs to know."""

    folder: Path
    name: str
    load: Load
    captures: Path
    host: str
    capture_rate: float
    max_body: int
    settings: Settings


def serve_forever(
    folder: Path,
    name: str,
    load: Load,
    captures: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    capture_rate: float = 0.0,
    max_body: int = MAX_BODY,
    settings: Settings | None = None,
) -> None:
    """Serve what ``folder/desired.json`` names, and whatever it names later, until SIGTERM or SIGINT.

    Says in ``folder/state.json`` what it is doing. A bundle that cannot be loaded is reported there and the one
    before serves on. On the way out, requests under way finish and captures (a share ``capture_rate`` of all items,
    under ``captures``) are flushed. Must run in the main thread. Raises where it cannot begin: the folder is served
    already, nothing is deployed, the port is taken (:class:`~trilobe.errors.PortInUse`), other machines would be
    served without any way to tell who may.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     serve_forever(Path(folder), "digits", load=lambda bundle: None, captures=Path(folder))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: nothing is deployed in ...
    """
    settings = settings or Settings()
    lock = hold_lock(folder)
    if settings.json_log:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)  # the command line has set one up
    try:
        state = State(name, "creating", pid=os.getpid(), since=time.time())
        write_state(folder, state)
        read_desired(folder)
        tls = settings.tls
        gate_for(folder, host, settings).check_host(
            host, bool(tls and tls[2]), settings.open, encrypted=tls is not None
        )
        job = _Job(folder, name, load, captures, host, capture_rate, max_body, settings)
        with bind(host, port) as listener:
            scheme = "https" if settings.tls else "http"
            url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            state = replace(state, url=url)
            if settings.workers > 1:
                _supervise(job, listener, state)
            else:
                asyncio.run(_serve(job, listener, state, lambda said: write_state(folder, said)))
        write_state(folder, replace(read_state(folder), state="stopped", pid=0, since=time.time()))
    except TrilobeError as error:
        write_state(folder, replace(state, state="failed", error=str(error), since=time.time()))
        raise
    finally:
        os.close(lock)


def gate_for(folder: Path, host: str, settings: Settings, meters: Meters | None = None) -> Gate:
    """Who may do what: by the tokens that the settings name, else those of the endpoint's ``folder``.

    A secret that was not mounted must not leave the door open: raises :class:`~trilobe.errors.ConfigError` where the
    file that was named is not there.

    >>> gate_for(Path("nowhere"), "127.0.0.1", Settings(tokens=Path("no-tokens.json")))
    Traceback (most recent call last):
    trilobe.errors.ConfigError: there is no file of tokens at no-tokens.json; ...
    """
    file = settings.tokens or folder / TOKENS
    gate = Gate(file.parent, is_loopback(host) and not settings.open, file.name, meters)
    if settings.tokens and not (gate.shut or settings.open):
        raise ConfigError(
            f"there is no file of tokens at {file}",
            expected="one that `trilobe token CLIENT --file FILE` wrote, mounted there",
            hint="TRILOBE_TOKENS names another place; TRILOBE_OPEN=1 serves whoever reaches the port",
        )
    return gate


# --- one worker -----------------------------------------------------------------------------------------------------


async def _serve(
    job: _Job, listener: socket.socket, state: State, say: Callable[[State], None], worker: int = 0
) -> None:
    settings = job.settings
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, ended.set)
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.workers)
    meters = Meters(job.folder / "metrics", worker)
    server = Server(
        job.name,
        job.load,
        CaptureLog(job.captures, job.name, job.capture_rate),
        job.max_body,
        settings.flows,
        settings.batching,
        meters,
        gate_for(job.folder, job.host, settings, meters),
        threads,
    )
    server.traces = open_traces()
    _tune(server, job)
    server.control = _control(job, server)
    limits = dataclasses.replace(settings.limits, max_body=job.max_body, max_connections=_room(settings.limits))
    front = HttpServer(server.handle, limits, server.explain)
    context = server_context(*settings.tls) if settings.tls else None
    grpc: Any = None
    if settings.grpc_port is not None:
        from trilobe.infrastructure.serve.grpc import start_grpc

        grpc = await start_grpc(server, job.host, settings.grpc_port, settings.tls)
        state = replace(state, grpc=f"{job.host}:{grpc.port}")
    say(state)
    tried = asyncio.Event()
    following = asyncio.create_task(_follow(server, front, job, state, say, tried, ended))
    if settings.workers > 1:  # the others answer meanwhile: clients need not see how a new one begins
        await asyncio.wait([asyncio.create_task(e.wait()) for e in (tried, ended)], return_when="FIRST_COMPLETED")
    await front.start(listener, context)
    try:
        await ended.wait()
    finally:
        following.cancel()
        if grpc is not None:
            await grpc.stop(10.0)
        await front.stop()
        await asyncio.to_thread(server.close)
        if server.traces is not None:
            await asyncio.to_thread(server.traces.close)


async def _follow(
    server: Server,
    front: HttpServer,
    job: _Job,
    state: State,
    say: Callable[[State], None],
    tried: asyncio.Event,
    ended: asyncio.Event,
) -> None:
    """Serve what is wished for whenever the wish changes, or the settings do, and say how it went."""
    said, complaint, again, untidy = state, "", False, False
    while True:
        before = job
        job, state = _followed(job, state, aloud=job.settings.workers == 1)  # else their parent says it, once
        if job != before:
            _tune(server, job)
            again = again or job.settings.defer is not before.settings.defer
        try:
            desired = read_desired(job.folder)
            if again or desired.deployment != state.deployment:
                await server.apply(desired.models)
                again, untidy = False, True
                state = replace(_described(server, state), deployment=desired.deployment, since=time.time())
                tried.set()
            if state is not said:
                await asyncio.to_thread(say, state)
            said, complaint = state, ""
        except TrilobeError as error:  # the wish is gone or damaged, or the disk is full: serve on, and try again
            if str(error) != complaint:
                logger.warning("%s", error)
            complaint = str(error)
        if untidy and not server.repository.draining:
            untidy = False
            _tidy()
        _count(server, front)
        if job.settings.workers > 1:
            with contextlib.suppress(OSError):
                os.utime(_worker_file(job.folder, os.getpid()))
            if server.scheduler.lost >= MAX_LOST:
                logger.error("%d threads hang: this worker makes room for another", server.scheduler.lost)
                ended.set()
        await asyncio.sleep(POLL_SECONDS)


def _followed(job: _Job, state: State, aloud: bool = True) -> tuple[_Job, State]:
    """The job with the settings as they are now, and the state with what of them is not in force."""
    if job.settings.look is None:
        return job, state
    try:
        change = job.settings.look()
    except TrilobeError as error:
        notice = f"the settings of before hold: {error}"
    else:
        if change is None:
            return job, state
        job = dataclasses.replace(job, settings=change.settings, capture_rate=change.capture_rate)
        notice = f"changed since start: {', '.join(change.behind)}; restart to apply" if change.behind else ""
    if notice == state.notice:
        return job, state
    if aloud and notice:
        logger.warning("%s", notice)
    return job, replace(state, notice=notice)


def _tidy() -> None:
    """Let go of what was loaded before, for good, and keep the collector from what is.

    What lies between blocks that are in use stays with glibc unless it is asked to hand it back; runtimes that come and
    go would leave more of that with every replacement.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it again and again costs a tenth of all time
    gc.set_threshold(10_000)  # a turn of 64 requests makes some 700 objects, all gone when it is over
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _tune(server: Server, job: _Job) -> None:
    """What the settings say that may change while a server runs. Thresholds follow when its wishes are applied."""
    settings = job.settings
    server.repository.tune(settings.batching)
    server.tune(job.capture_rate)
    server.access = access_log(settings.log_share)
    server.deferral = Deferral(Desk(job.folder, settings.max_waiting), settings.defer)


def _count(server: Server, front: HttpServer) -> None:
    """What is cheaper to count now and then than with every request."""
    server.meters.gauge("trilobe_ready", int(server.repository.ready))
    server.meters.gauge("trilobe_connections", len(front.connections))
    sent, front.responses = front.responses, {}
    for status, n in sent.items():
        server.meters.count("trilobe_http_responses_total", n, code=status)


def _room(limits: Limits) -> int:
    """How many connections this process may hold, after asking for as many as it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(16, min(limits.max_connections, soft - 128))


def _described(server: Server, state: State) -> State:
    """The state after an attempt to serve what is wished for."""
    models = {}
    for name, model in server.repository.models.items():
        models[name] = Served(
            model.state, model.current, tuple(model.versions), model.canary, model.share, model.shadow, model.error
        )
    errors = [f"{name}: {m.error}" if name != server.name else m.error for name, m in models.items() if m.error]
    own = models.get(server.name)
    ready = all(model.version for model in models.values())
    return replace(
        state,
        state="ready" if ready else "failed",
        bundle_id=own.version if own else "",
        error="; ".join(errors),
        models=models,
    )


def _control(job: _Job, server: Server) -> Control:
    """Clients with the right to change what is served write wishes like everybody else."""

    async def change(name: str, edit: Callable[[dict[str, Wish]], dict[str, Wish]]) -> str:
        desired = await asyncio.to_thread(wish_for, job.folder, edit)
        state = await asyncio.to_thread(settle, job.folder, desired)
        served = state.models.get(name)
        return served.error if served is not None else ""

    async def load(name: str) -> str:
        def edit(models: dict[str, Wish]) -> dict[str, Wish]:
            key = name if name in models or name != server.name else ""
            known = models.get(key)
            found = _in_repository(job.settings.repository, name)
            if known is None and found is None:
                raise NotFoundError(f"there is no model {name!r} to load", expected=f"one of {sorted(models)}")
            wish = Wish(str(found)) if found is not None else replace(models[key], loaded=True)
            return {**models, key: wish}

        return await change(name, edit)

    async def unload(name: str) -> str:
        def edit(models: dict[str, Wish]) -> dict[str, Wish]:
            key = name if name in models or name != server.name else ""
            if key not in models:
                raise NotFoundError(f"there is no model {name!r} to unload", expected=f"one of {sorted(models)}")
            return {**models, key: replace(models[key], loaded=False)}

        return await change(name, edit)

    return Control(load, unload)


def _in_repository(repository: Path | None, name: str) -> Path | None:
    if repository is None or set(name) & set("/\\\0") or name in ("", ".", ".."):
        return None
    path = repository / name
    return path if (path / "manifest.json").exists() else None


# --- several workers ------------------------------------------------------------------------------------------------


def _worker_file(folder: Path, pid: int) -> Path:
    return folder / "workers" / f"{pid}.json"


def _work(job: _Job, listener: socket.socket, state: State, worker: int) -> NoReturn:
    """A forked worker's whole life."""
    code = 1
    try:
        path = _worker_file(job.folder, os.getpid())
        asyncio.run(
            _serve(job, listener, state, lambda said: write_atomically(path, msgspec.json.encode(said)), worker)
        )
        code = 0
    except BaseException:
        logger.exception("worker %d failed", worker)
    finally:
        logging.shutdown()
        os._exit(code)  # nothing of the parent's may run a second time here


@dataclass(slots=True)
class _Worker:
    number: int
    pid: int
    born: float


def _supervise(job: _Job, listener: socket.socket, state: State) -> None:
    """Keep ``workers`` processes alive, and say what they say, until asked to stop."""
    stopping: list[int] = []
    before = {sign: signal.signal(sign, lambda number, _: stopping.append(number)) for sign in (15, 2)}
    folder = job.folder / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    workers: dict[int, _Worker] = {}
    restarts, said = 0, state
    try:
        while not stopping:
            job, state = _followed(job, state)
            for number in set(range(job.settings.workers)) - {w.number for w in workers.values()}:
                workers |= _fork(job, listener, state, number)
            time.sleep(POLL_SECONDS / 2)
            for pid in [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]:
                gone = workers.pop(pid)
                _worker_file(job.folder, pid).unlink(missing_ok=True)
                restarts += 1
                logger.error("worker %d (pid %d) ended; another takes its place", gone.number, pid)
                if time.monotonic() - gone.born < 2.0:  # it cannot even begin: do not burn the machine with attempts
                    time.sleep(1.0)
            if not workers:  # all ended at once: what was said last holds until there are others
                continue
            for worker in workers.values():
                _end_if_ill(job, worker)
            counts = {"alive": len(workers), "restarts": restarts}
            merged = replace(_merged(job, state, workers), workers=counts, notice=state.notice)
            if replace(merged, since=0.0) != replace(said, since=0.0):
                write_state(job.folder, merged)
                said = merged
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _fork(job: _Job, listener: socket.socket, state: State, number: int) -> dict[int, _Worker]:
    pid = os.fork()
    if pid == 0:
        _work(job, listener, state, number)
    return {pid: _Worker(number, pid, time.monotonic())}


def _end_if_ill(job: _Job, worker: _Worker) -> None:
    """End a worker that hangs (at once) or that has grown too large (politely: it answers what it has begun)."""
    path = _worker_file(job.folder, worker.pid)
    with contextlib.suppress(OSError, ValueError, ProcessLookupError):
        if time.time() - path.stat().st_mtime > HUNG_SECONDS:
            logger.error("worker %d (pid %d) hangs", worker.number, worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        resident = resident_bytes(worker.pid) or 0
        if job.settings.max_memory and resident > job.settings.max_memory:
            logger.error("worker %d (pid %d) holds %d MB", worker.number, worker.pid, resident >> 20)
            os.kill(worker.pid, signal.SIGTERM)
            worker.born = time.monotonic() - 10.0


def _merged(job: _Job, state: State, workers: Mapping[int, _Worker]) -> State:
    """What all workers say: ready where all are, and of one mind."""
    states = []
    for pid in workers:
        try:
            states.append(msgspec.json.decode(_worker_file(job.folder, pid).read_bytes(), type=State))
        except (OSError, msgspec.MsgspecError):
            continue
    settled = [s for s in states if s.deployment]
    if len(settled) < len(workers) or len({s.deployment for s in settled}) > 1:
        return state if not settled else replace(settled[0], pid=os.getpid(), state="creating", deployment="")
    worst = next((s for s in settled if s.error), settled[0])
    return replace(worst, pid=os.getpid())
