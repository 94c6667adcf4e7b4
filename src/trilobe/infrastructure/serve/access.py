"""Who may do what at an endpoint: tokens with scopes, certificates of clients, and the server's own certificate.

Tokens live in ``tokens.json`` in the endpoint's folder, or in a file that the settings name (a mounted secret). While
that file has never been there the gate is open, which is meant for loopback only (:meth:`Gate.check_host`); from then
on it is shut, also when the last token is revoked or the file disappears. A token is kept as the SHA-256 of its secret.
That is enough here, where it would not be for a password: slow, salted hashes protect secrets that can be guessed, and
nobody guesses 256 random bits. So checking costs a microsecond or two, and needs no cache that would hold secrets in
memory.
"""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import ipaddress
import logging
import os
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hmac import compare_digest
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, get_args

import msgspec

from trilobe.errors import ConfigError, DiskFull, NotFoundError, StorageError, UsageError
from trilobe.files import FULL, sync_folder
from trilobe.infrastructure.serve.metrics import Meters, Tally
from trilobe.infrastructure.serve.protocol import Refused

Scope = Literal["infer", "admin", "metrics"]
SCOPES: tuple[str, ...] = get_args(Scope)
FILE = "tokens.json"
FORMAT = "trilobe-tokens.v1"
CERTIFICATE = "cn:"  # a client of this name shows a certificate with that common name instead of a token
LOOK_SECONDS = 1.0  # how old what is known of a file may be
logger = logging.getLogger(__name__)


# --- tokens at rest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """What a client may do: ``scopes``, on ``models`` (all where empty), ``max_pending`` requests at once (0: any).

    ``client`` is its name in lists and logs; one client may have several tokens. Times are seconds since the epoch;
    ``expires`` is None for a grant that does not end.
    """

    id: str
    client: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] = ()
    max_pending: int = 0
    created_at: float = 0.0
    expires: float | None = None


class _Entry(msgspec.Struct, frozen=True):
    grant: Grant
    sha256: str  # of the token; empty for a client that shows a certificate


class _Book(msgspec.Struct, frozen=True):
    format: str = FORMAT
    tokens: tuple[_Entry, ...] = ()


def create_token(
    folder: Path,
    client: str,
    scopes: Sequence[str] = ("infer",),
    models: Sequence[str] = (),
    max_pending: int = 0,
    expires: float | None = None,
    file: str = FILE,
) -> str:
    """A new token of ``client`` for the endpoint in ``folder``: ``tlb_<id>_<secret>``, which is not kept anywhere.

    A client called ``cn:NAME`` needs none: it shows a certificate of that common name, and the empty string is
    returned. Running servers know it within a second. Raises :class:`~trilobe.errors.UsageError` for a scope that
    does not exist, a name that is no name, a time that is past.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     token = create_token(Path(folder), "web", ["infer"])
    ...     client = Gate(Path(folder)).client({"authorization": f"Bearer {token}"})
    >>> len(token), client.name, client.may("infer"), client.may("admin")
    (77, 'web', True, False)
    """
    if not client.isprintable() or client.strip() != client or client in ("", CERTIFICATE):
        raise UsageError(f"a client called {client!r}", expected="a name, or cn:NAME for the name in a certificate")
    if not scopes or (unknown := sorted(set(scopes) - set(SCOPES))):
        problem = f"unknown scope {unknown[0]!r}" if scopes else "a token that may do nothing"
        raise UsageError(problem, expected=f"some of {', '.join(SCOPES)}")
    if expires is not None and not expires > time.time():
        raise UsageError("a token that has expired before it is made", expected="a time to come")
    if max_pending < 0:
        raise UsageError(f"max_pending = {max_pending}", expected="a number of requests, or 0 for any")
    number = token_hex(4)
    token = f"tlb_{number}_{token_hex(32)}"
    scopes = tuple(scope for scope in SCOPES if scope in scopes)
    grant = Grant(number, client, scopes, tuple(models), max_pending, time.time(), expires)
    shows_certificate = client.startswith(CERTIFICATE)
    entry = _Entry(grant, "" if shows_certificate else _digest(token))
    with _changing(folder / file) as tokens:
        if shows_certificate:  # a certificate says one thing: the latest grant
            tokens[:] = [known for known in tokens if known.grant.client != client]
        tokens.append(entry)
    return "" if shows_certificate else token


def list_tokens(folder: Path, file: str = FILE) -> list[Grant]:
    """What the clients of the endpoint in ``folder`` may do, the oldest first; no secrets.

    >>> list_tokens(Path("nowhere"))
    []
    """
    return [entry.grant for entry in (_read(folder / file) or _Book()).tokens]


def revoke_token(folder: Path, client: str, file: str = FILE) -> list[Grant]:
    """Take back all tokens of ``client`` (or the one of that id): those that were taken back.

    Running servers refuse them within a second. Raises :class:`~trilobe.errors.NotFoundError` where there are none.
    """
    with _changing(folder / file) as tokens:
        gone = [entry for entry in tokens if client in (entry.grant.client, entry.grant.id)]
        if not gone:
            known = sorted({entry.grant.client for entry in tokens})
            raise NotFoundError(f"no token of {client!r}", expected=f"one of {known}", hint="trilobe token --list")
        tokens[:] = [entry for entry in tokens if entry not in gone]
    return [entry.grant for entry in gone]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _read(path: Path) -> _Book | None:
    """The file's content; None where there is no file."""
    try:
        book = msgspec.json.decode(path.read_bytes(), type=_Book)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} cannot be used ({error})", expected="the file that `trilobe token` writes", hint="restore it"
        ) from error
    if book.format != FORMAT:
        raise StorageError(f"{path} has the format {book.format!r}", expected=FORMAT, hint="update Trilobe")
    return book


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[_Entry]]:
    """The entries, to be changed in place: one writer at a time, and all of the change or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list((_read(path) or _Book()).tokens)
            yield tokens
            _write_private(path, msgspec.json.encode(_Book(tokens=tuple(tokens))))
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no space left to write {path}", hint="free some space") from error
        raise StorageError(f"{path} could not be written: {error.strerror}") from error


def _write_private(path: Path, data: bytes) -> None:
    """As ``write_atomically``, readable by its owner only from its first byte."""
    temporary = path.with_name(f"{path.name}.{token_hex(4)}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# --- tokens at the door ---------------------------------------------------------------------------------------------

_ASK = 'Bearer realm="trilobe"'


class Client:
    """Who asks: its ``name`` (empty: unknown), what it may do, and how many of its requests are under way.

    ``limited`` says whether they are counted at all: in a ``tally``, which all workers of a server share.

    >>> nobody = Client(problem="no token came with the request")
    >>> nobody.require("infer", "digits")
    Traceback (most recent call last):
    trilobe.infrastructure.serve.protocol.Refused: no token came with the request; expected ...
    """

    __slots__ = ("expires", "limited", "max_pending", "models", "name", "problem", "scopes", "sha256", "tally")

    def __init__(
        self, grant: Grant | None = None, sha256: str = "", problem: str = "", tally: Tally | None = None
    ) -> None:
        self.name, self.problem, self.sha256, self.tally = grant.client if grant else "", problem, sha256, tally
        self.scopes, self.models = frozenset(grant.scopes if grant else ()), frozenset(grant.models if grant else ())
        self.max_pending = grant.max_pending if grant else 0
        self.limited = self.max_pending > 0 and tally is not None
        self.expires = float("inf") if grant is None or grant.expires is None else grant.expires

    def may(self, scope: str, model: str = "") -> bool:
        """Whether it may do that; whoever is held to some models only where one of them is named."""
        return scope in self.scopes and (not self.models or model in self.models)

    def require(self, scope: str = "", model: str = "") -> None:
        """Raise :class:`Refused` (the unknown 401, the known 403) unless it may; no ``scope``: unless it is known."""
        if scope in self.scopes and (not self.models or model in self.models):
            return
        if self.problem:
            raise Refused(
                401, self.problem, expected="Authorization: Bearer tlb_...",
                hint="trilobe token CLIENT --scopes infer makes one", headers={"www-authenticate": _ASK},
            )  # fmt: skip
        if not scope:
            return
        what = f"the scope {scope!r}" if scope not in self.scopes else f"the model {model!r}"
        has = self.models if scope in self.scopes else self.scopes
        raise Refused(
            403, f"{self.name!r} has no right to {what}", expected=f"one of {sorted(has)}",
            headers={"www-authenticate": f'{_ASK}, error="insufficient_scope", scope="{scope}"'},
        )  # fmt: skip

    def enter(self) -> None:
        """Count a request that begins. Raises :class:`Refused` (429) where ``max_pending`` of it are under way."""
        if self.tally is None:
            return
        self.tally.add(1)  # first, so that of two workers that look at once none lets in one too many
        if (pending := self.tally.total()) > self.max_pending:
            self.tally.add(-1)
            raise Refused(
                429, f"{self.name!r} has {pending - 1} requests under way", expected=f"at most {self.max_pending}",
                hint="wait for an answer before the next request", headers={"retry-after": "1"},
            )  # fmt: skip

    def leave(self) -> None:
        """Count a request that has ended, however it did."""
        if self.tally is not None:
            self.tally.add(-1)


_ANYBODY = Grant("", "anybody", SCOPES)


class Gate:
    """Tells who asks, by ``file`` in ``folder`` (None: anybody may do anything); follows its changes.

    It is ``shut`` to who has no token from when the file is first there. With ``local``, until then, only requests that
    name this machine (``localhost``, an address) are let in: a page in somebody's browser can reach loopback by a name
    of its own (DNS rebinding). ``meters`` are shared by all who count the same clients (default: this gate is alone).

    >>> Gate(None).client({}).may("admin")
    True
    """

    def __init__(
        self, folder: Path | None, local: bool = False, file: str = FILE, meters: Meters | None = None
    ) -> None:
        self._meters = meters
        self.path, self.local = folder / file if folder is not None else None, local
        self._anybody = Client(_ANYBODY)
        self._unknown = {problem: Client(problem=problem) for problem in _PROBLEMS}
        self._tokens: dict[str, Client] = {}
        self._certificates: dict[str, Client] = {}
        self._grants: dict[str, tuple[_Entry, Client]] = {}
        self.shut = False
        self._stamp: object = ()
        self._look_again = 0.0
        if self.path is not None:
            self._stamp = self._stamp_of_file()
            self._accept(_read(self.path))
            self._look_again = time.monotonic() + LOOK_SECONDS

    def check_host(
        self, host: str, with_certificates: bool = False, open: bool = False, encrypted: bool = True
    ) -> None:
        """Raise :class:`~trilobe.errors.ConfigError` where other machines would be served whoever they are.

        Fine are loopback, tokens, certificates of clients, and ``open`` (the settings' way to say "I know").
        """
        if is_loopback(host):
            return
        if not (self.shut or with_certificates or open):
            raise ConfigError(
                f"serving on {host!r} would let everybody who reaches it do everything",
                expected="tokens, certificates of clients, or a loopback address",
                hint="trilobe token CLIENT, or set serve.tls_client_ca; serve.open = true where that is meant",
            )
        if not encrypted:
            logger.warning("serving on %s without TLS: requests, answers and tokens can be read on the way", host)

    def client(self, headers: Mapping[str, str], peer: str = "") -> Client:
        """Who sent a request with these (lower-case) ``headers`` from a connection whose certificate names ``peer``.

        A token comes as ``Authorization: Bearer``, or as the password of ``Basic`` (what Triton's client plugin
        sends). Who is unknown is a client that may do nothing: health checks need no token. Raises :class:`Refused`
        (403) for what a page of another site made a browser send.
        """
        if self.path is not None and time.monotonic() >= self._look_again:
            self._look()
        if not self.shut:
            if self.local or "origin" in headers:
                _check_site(headers, self.local)
            return self._anybody
        if header := headers.get("authorization"):
            return self._by_token(header)
        if peer:
            return self._certificates.get(peer) or Client(Grant("", CERTIFICATE + peer, ()))
        return self._unknown[_NONE]

    def _by_token(self, header: str) -> Client:
        kind, _, token = header.partition(" ")
        if kind != "Bearer":
            token = _password(token) if kind.lower() == "basic" else token if kind.lower() == "bearer" else ""
        client = self._tokens.get(token[4:12])
        if client is None or not compare_digest(_digest(token), client.sha256):
            return self._unknown[_WRONG]
        return client if time.time() < client.expires else self._unknown[_EXPIRED]

    def _look(self) -> None:
        """Read the file again if it is another one. What is damaged or gone never opens the gate."""
        self._look_again = time.monotonic() + LOOK_SECONDS
        stamp = self._stamp_of_file()
        if stamp == self._stamp or self.path is None:
            return
        try:
            self._accept(_read(self.path))
            self._stamp = stamp
        except StorageError as error:
            logger.error("tokens stay as they were: %s", error)

    def _stamp_of_file(self) -> object:
        try:
            found = os.stat(str(self.path))  # noqa: PTH116
        except OSError as error:
            return error.errno
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _accept(self, book: _Book | None) -> None:
        if self.shut and book is None:
            logger.error("%s is gone: nobody is let in until it is back", self.path)
        self.shut = self.shut or book is not None
        before, self._grants = self._grants, {}
        for entry in book.tokens if book else ():
            known = before.get(entry.grant.id)
            client = known[1] if known and known[0] == entry else self._client(entry)
            self._grants[entry.grant.id] = entry, client
        clients = [client for _, client in self._grants.values()]
        self._tokens = {number: client for number, (entry, client) in self._grants.items() if entry.sha256}
        self._certificates = {c.name.removeprefix(CERTIFICATE): c for c in clients if not c.sha256}

    def _client(self, entry: _Entry) -> Client:
        if not entry.grant.max_pending:
            return Client(entry.grant, entry.sha256)
        self._meters = self._meters or Meters()
        tally = self._meters.tally("trilobe_token_pending", client=entry.grant.client, token=entry.grant.id)
        return Client(entry.grant, entry.sha256, tally=tally)


_NONE, _WRONG, _EXPIRED = "no token came with the request", "the token is not known", "the token has expired"
_PROBLEMS = (_NONE, _WRONG, _EXPIRED)


def _password(coded: str) -> str:
    try:
        return base64.b64decode(coded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def _check_site(headers: Mapping[str, str], local: bool) -> None:
    host, origin = headers.get("host", ""), headers.get("origin", "")
    if (origin and origin.partition("://")[2] != host) or (local and host and not _names_this_machine(host)):
        raise Refused(
            403, f"a request for {host!r}" + (f" made by {origin!r}" if origin else ""),
            expected="one that no other site made a browser send, for localhost or an address",
            hint="give clients tokens: trilobe token CLIENT",
        )  # fmt: skip


@lru_cache(maxsize=256)
def _names_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower().rstrip(".")
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == "localhost" or name.endswith(".localhost")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("")
    (True, True, False, False)
    """
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# --- TLS ------------------------------------------------------------------------------------------------------------


def server_context(cert: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 and 1.3 with the certificate (chain) and key in these PEM files, for connections of HTTP/1.1.

    With ``client_ca`` only clients come in that show a certificate signed by it. The files are looked at again while
    connections come (at most once a second): a renewed certificate serves new connections, a pair that does not fit is
    logged and the one before stays. Raises :class:`~trilobe.errors.ConfigError` that says which file is wrong and why;
    a certificate that is expired, or about to, is a warning.
    """
    files = [path for path in (cert, key, client_ca) if path is not None]
    context = current = _context(cert, key, client_ca)
    stamp, look_again = _stamps(files), time.monotonic() + LOOK_SECONDS

    def renew(connection: Any, name: str | None, first: ssl.SSLContext) -> None:
        nonlocal current, stamp, look_again
        if time.monotonic() >= look_again:
            look_again = time.monotonic() + LOOK_SECONDS
            if (found := _stamps(files)) != stamp:
                stamp = found
                try:
                    current = _context(cert, key, client_ca)
                    logger.info("new connections get the certificate now in %s", cert)
                except ConfigError as error:
                    logger.error("the certificate stays as it was: %s", error)
        connection.context = current

    context.sni_callback = renew
    return context


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    found = []
    for path in files:
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return found


def _context(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for TLS 1.2; those of 1.3 are all good
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, cert, key)
    if client_ca is not None:
        _pem(client_ca, "CERTIFICATE", "serve.tls_client_ca")
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"serve.tls_client_ca: {client_ca} cannot be used ({error.reason})") from error
        context.verify_mode = ssl.CERT_REQUIRED
    _warn_of_expiry(context, cert)
    return context


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    _pem(cert, "CERTIFICATE", "serve.tls_cert")
    if "ENCRYPTED" in _pem(key, "PRIVATE KEY", "serve.tls_key"):
        raise ConfigError(
            f"serve.tls_key: {key} is encrypted", expected="a key that can be read without a password",
            hint=f"openssl pkey -in {key} -out plain.pem, readable by the server only",
        )  # fmt: skip
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask at a terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"serve.tls_key: {key} is not the key of {cert}", expected="the key it was made with",
                hint="compare `openssl x509 -noout -pubkey -in CERT` with `openssl pkey -pubout -in KEY`",
            ) from error  # fmt: skip
        raise ConfigError(f"{cert} and {key} cannot be used ({error.reason or error})", expected="PEM") from error


def _pem(path: Path, what: str, setting: str) -> str:
    try:
        text = path.read_text("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror})", expected="a PEM file") from error
    if f"{what}-----" not in text:
        raise ConfigError(f"{setting}: there is no {what.lower()} in {path}", expected=f"PEM with a {what}")
    return text


def _warn_of_expiry(context: ssl.SSLContext, cert: Path) -> None:
    """Let a client of our own, which trusts this certificate as it stands, say what is wrong with its dates."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cert)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trusting.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)
    try:
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        logger.warning("clients may refuse the certificate in %s: %s", cert, error.verify_message)
        return
    ends = ssl.cert_time_to_seconds(str((client.getpeercert() or {}).get("notAfter", "Jan  1 00:00:00 2100 GMT")))
    if ends - time.time() < 14 * 86400:
        logger.warning("the certificate in %s expires in %.0f days", cert, (ends - time.time()) / 86400)
