"""Endpoints from the controlling side: start, replace, look at and stop a server that runs in another process.

The two sides meet in one folder and nowhere else. ``desired.json`` says what should be served (written here),
``state.json`` what is (written by ``serve.py``), ``server.log`` is what the process said, and a lock on
``server.lock``, which the operating system releases however the process ends, says whether it lives: no pid can be
mistaken for another's.
"""

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex

import msgspec

from trilobe.errors import NotFoundError, ServeError, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.bundle import open_bundle
from trilobe.types import Endpoint, EndpointState

_POLL_SECONDS = 0.05
_LOG_LINES = 15


class Wish(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one name should stand for: paths of bundles.

    ``canary`` gets a ``share`` (0 to 1) of the requests, ``shadow`` a copy of them whose answers nobody sees, ``older``
    are called by their version only. What is not ``loaded`` keeps its place and answers nobody.
    """

    bundle: str
    bundle_id: str = ""
    canary: str = ""
    share: float = 0.0
    shadow: str = ""
    older: tuple[str, ...] = ()
    loaded: bool = True


class Desired(msgspec.Struct, frozen=True):
    """What should be served, by name ("" is the endpoint's own).

    ``deployment`` is new for each wish, so that the same can be wished for again.
    """

    models: dict[str, Wish]
    deployment: str


class Served(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one name stands for: the versions that can be called, the one that answers, why the last wish failed."""

    state: str
    version: str = ""
    versions: tuple[str, ...] = ()
    canary: str = ""
    share: float = 0.0
    shadow: str = ""
    error: str = ""


class State(msgspec.Struct, frozen=True):
    """What is served; ``deployment`` is the wish last acted on and ``error`` why it failed (empty: it did not).

    ``bundle_id`` is what stands behind the endpoint's own name, ``models`` all of it; ``grpc`` is where gRPC is spoken.
    ``notice`` says what of the settings, as they are now, is not in force.
    """

    name: str
    state: EndpointState
    url: str = ""
    pid: int = 0
    bundle_id: str = ""
    error: str = ""
    deployment: str = ""
    since: float = 0.0
    models: dict[str, Served] = {}
    workers: dict[str, int] = {}
    grpc: str = ""
    notice: str = ""


def read_desired(folder: Path) -> Desired:
    """What should be served from ``folder``; :class:`~trilobe.errors.NotFoundError` where nobody said.

    >>> read_desired(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: nothing is deployed in nowhere; expected a usable desired.json ...
    """
    try:
        return msgspec.json.decode((folder / "desired.json").read_bytes(), type=Desired)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"nothing is deployed in {folder}",
            expected=f"a usable desired.json ({error})",
            hint="deploy a bundle first",
        ) from error


def read_state(folder: Path) -> State:
    """What the server of ``folder`` last said of itself, whether or not it still lives (see :func:`status`).

    >>> read_state(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: no endpoint was ever started in nowhere; expected a usable state.json ...
    """
    try:
        return msgspec.json.decode((folder / "state.json").read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"no endpoint was ever started in {folder}",
            expected=f"a usable state.json ({error})",
            hint="start it, or check the name",
        ) from error


def write_state(folder: Path, state: State) -> None:
    """Say what is served, atomically; only the holder of the lock does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(Path(folder), State("digits", "ready", pid=1))
    ...     (read_state(Path(folder)).state, status(Path(folder)).state)
    ('ready', 'stopped')
    """
    write_atomically(folder / "state.json", msgspec.json.encode(state))


def hold_lock(folder: Path, patience: float = 1.0) -> int:
    """Take the lock of ``folder`` for as long as this process lives, or until the returned descriptor is closed.

    Tries for ``patience`` seconds, as :func:`status` holds it for an instant; then raises
    :class:`~trilobe.errors.ServeError`: another server works in this folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lock = hold_lock(Path(folder))
    ...     try:
    ...         hold_lock(Path(folder), patience=0)
    ...     except ServeError as error:
    ...         str(error).splitlines()[0].startswith("another server")
    ...     finally:
    ...         os.close(lock)
    True
    """
    file = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(file)
                raise ServeError(
                    f"another server already works in {folder}", hint="stop it first, or replace what it serves"
                ) from None
            time.sleep(_POLL_SECONDS / 5)


def deploy(folder: Path, bundle_path: Path, name: str = "", canary: float = 0.0, shadow: bool = False) -> Desired:
    """Wish for the bundle at ``bundle_path``, verified first: a server of ``folder`` takes it up on its own.

    ``name`` is the model it stands behind (empty: the endpoint's own name). With a ``canary`` share, or as a
    ``shadow``, it is tried beside the bundle that is served now, which stays. Raises
    :class:`~trilobe.errors.BundleError` and leaves the earlier wish alone where the bundle is broken.

    >>> deploy(Path("nowhere"), Path("no-bundle"))
    Traceback (most recent call last):
    trilobe.errors.BundleError: there is no bundle at ...no-bundle; expected a folder with manifest.json ...
    """
    bundle = open_bundle(bundle_path.resolve())
    path = str(bundle.path)
    if not 0 <= canary <= 1:
        raise UsageError(f"a canary share of {canary}", expected="a number from 0 to 1")

    def wished(models: dict[str, Wish]) -> dict[str, Wish]:
        wish = models.get(name)
        if wish is None and (canary or shadow):
            raise ServeError(
                f"nothing is served as {name or 'the endpoint'!r} yet", hint="deploy a bundle first, then try another"
            )
        if wish is not None and shadow:
            wish = msgspec.structs.replace(wish, shadow=path)
        elif wish is not None and canary:
            wish = msgspec.structs.replace(wish, canary=path, share=canary)
        else:
            wish = Wish(path, bundle.id)
        return {**models, name: wish}

    return wish_for(folder, wished)


def wish_for(folder: Path, change: Callable[[dict[str, Wish]], dict[str, Wish]]) -> Desired:
    """Change what should be served from ``folder``: what ``change`` makes of the wishes so far, one writer at a time.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     desired = wish_for(Path(folder), lambda models: {**models, "digits": Wish("/bundles/b1", "b1")})
    ...     read_desired(Path(folder)).models["digits"].bundle_id
    'b1'
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "desired.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = dict(read_desired(folder).models)
        except NotFoundError:  # nothing yet, or nothing that can be read
            before = {}
        desired = Desired(change(before), token_hex(8))
        write_atomically(folder / "desired.json", msgspec.json.encode(desired))
    return desired


def start(folder: Path, name: str, command: Sequence[str], timeout: float = 60.0) -> Endpoint:
    """Start ``command``, which must end in :func:`~trilobe.infrastructure.serve.serve_forever` on ``folder``.

    It runs detached (its own session, output appended to ``server.log``) and outlives the caller. Returns once it
    is ready; raises :class:`~trilobe.errors.ServeError` with its reason or the end of its log where it dies, fails
    to load or is not ready after ``timeout`` seconds, and then leaves nothing running.

    >>> import sys, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     start(Path(folder), "digits", [sys.executable, "-c", "raise SystemExit('no such model')"])
    Traceback (most recent call last):
    trilobe.errors.ServeError: endpoint 'digits' ended with exit status 1 before it was ready: no such model ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _alive(folder):
        raise ServeError(
            f"endpoint {name!r} is already running in {folder}", hint="stop it first, or replace what it serves"
        )
    (folder / "state.json").unlink(missing_ok=True)
    log = folder / "server.log"
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # The thread reaps the process should we outlive it; it keeps nothing else alive.
    threading.Thread(target=process.wait, daemon=True).start()

    def settled() -> bool:
        return process.poll() is not None or _said(folder) in ("ready", "failed")

    _wait(settled, timeout)
    if _said(folder) == "ready" and _alive(folder):
        return status(folder)
    ended = process.poll()
    reason = read_state(folder).error if _said(folder) == "failed" else ""
    tail = "\n".join(log.read_bytes()[begin:].decode(errors="replace").splitlines()[-_LOG_LINES:])
    _end(partial(os.killpg, process.pid), lambda: process.poll() is not None, 10.0)
    what = (
        f"is not ready after {timeout:g} s" if ended is None else f"ended with exit status {ended} before it was ready"
    )
    what = "failed to load" if ended is None and reason else what
    raise ServeError(f"endpoint {name!r} {what}: {reason or tail or 'it said nothing'}", hint=f"read {log}")


def replace(
    folder: Path, bundle_path: Path, timeout: float = 60.0, name: str = "", canary: float = 0.0, shadow: bool = False
) -> Endpoint:
    """Deploy the bundle at ``bundle_path`` to the running server of ``folder`` and wait until it is what answers.

    Clients do not notice: requests under way finish on the old bundle. Where the new one is broken, cannot be
    loaded or is not up after ``timeout`` seconds, raises, and the old one goes on serving. The rest as in
    :func:`deploy`.

    >>> replace(Path("nowhere"), Path("no-bundle"))
    Traceback (most recent call last):
    trilobe.errors.ServeError: no server runs in nowhere; expected a running endpoint ...
    """
    if not _alive(folder):
        raise ServeError(f"no server runs in {folder}", expected="a running endpoint", hint="start it")
    desired = deploy(folder, bundle_path, name, canary, shadow)
    wished = desired.models[name].bundle_id
    state = settle(folder, desired, timeout)
    if state.error:
        raise ServeError(
            f"bundle {wished} cannot be served: {state.error}",
            hint=f"repair and package it again; {state.bundle_id or 'nothing'} still serves",
        )
    return status(folder)


def settle(folder: Path, desired: Desired, timeout: float = 60.0) -> State:
    """Wait until the server of ``folder`` has acted on ``desired``; what it says then, which may be an error.

    >>> settle(Path("nowhere"), Desired({}, "d1"), timeout=0)
    Traceback (most recent call last):
    trilobe.errors.ServeError: the server of nowhere ended meanwhile ...
    """
    _wait(lambda: not _alive(folder) or read_state(folder).deployment == desired.deployment, timeout)
    if not _alive(folder):
        raise ServeError(f"the server of {folder} ended meanwhile", hint=f"read {folder / 'server.log'}")
    state = read_state(folder)
    if state.deployment != desired.deployment:
        raise ServeError(
            f"what was wished for is not up after {timeout:g} s; {state.bundle_id or 'nothing'} still serves",
            hint=f"read {folder / 'server.log'}",
        )
    return state


def status(folder: Path) -> Endpoint:
    """What runs in ``folder`` now. A server that is gone is ``stopped``, whatever it last said of itself.

    >>> status(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: no endpoint was ever started in nowhere; ...
    """
    state = read_state(folder)
    if _alive(folder):
        return Endpoint(state.name, state.url, state.bundle_id, state.state, state.pid, state.grpc)
    return Endpoint(state.name, state.url, state.bundle_id, "stopped")


def stop(folder: Path, timeout: float = 30.0) -> Endpoint:
    """Stop the server of ``folder``: requests under way finish, captures are flushed. After ``timeout`` s it is killed.

    Stopping what is stopped is fine.

    >>> stop(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: no endpoint was ever started in nowhere; ...
    """
    state = read_state(folder)
    if _alive(folder):
        _end(partial(os.kill, state.pid), lambda: not _alive(folder), timeout)
    return status(folder)


def _alive(folder: Path) -> bool:
    """Whether a server holds the lock of ``folder``. Asks with a shared lock, so that askers do not meet each other."""
    try:
        file = os.open(folder / "server.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _said(folder: Path) -> str:
    try:
        return read_state(folder).state
    except NotFoundError:
        return ""


def _end(send: Callable[[int], None], gone: Callable[[], bool], timeout: float) -> None:
    """Ask politely, then firmly."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            send(sign)
        except ProcessLookupError:
            return
        if _wait(gone, timeout):
            return


def _wait(done: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not (finished := done()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return finished
