"""TLS with real handshakes: what is offered, who comes in, certificates renewed under way, and errors in words."""

import asyncio
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from trilobe.errors import ConfigError, ServeError, UsageError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.serve import access
from trilobe.infrastructure.serve.access import create_token, server_context
from trilobe.infrastructure.serve.http import HttpServer, Limits, Reply, Request, json_reply
from trilobe.types import Endpoint

if shutil.which("openssl") is None:
    pytest.skip("the certificates of these tests are made by openssl, which is not installed", allow_module_level=True)


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Authority:
    """One that signs certificates, in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.cert, self.key = folder, folder / f"{name}.pem", folder / f"{name}.key"
        self_signed(self.cert, self.key, name)

    def sign(self, name: str, days: int = 90, serial: int = 1) -> tuple[Path, Path]:
        """Certificate and key for ``name``; ``days`` below zero makes it one of the past."""
        cert, key, asked = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", key, "-out", asked)  # fmt: skip
        extra = self.folder / "extra.cnf"
        extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("x509", "-req", "-in", asked, "-CA", self.cert, "-CAkey", self.key, "-set_serial", str(serial),
                "-days", str(days), "-extfile", extra, "-out", cert)  # fmt: skip
        return cert, key


def self_signed(cert: Path, key: Path, name: str) -> None:
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "90",
            "-subj", f"/CN={name}", "-keyout", key, "-out", cert)  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("house"), "house")


@pytest.fixture(scope="module")
def pair(house: Authority) -> tuple[Path, Path]:
    return house.sign("server")


def who(request: Request) -> Reply:
    return 200, {"content-type": "text/plain"}, f"{request.path} by {request.peer!r}".encode()


@contextmanager
def serving(
    context: ssl.SSLContext, handler: Callable[[Request], Reply] = who, limits: Limits | None = None
) -> Iterator[int]:
    """A server with that context, in a thread of its own; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    front: list[HttpServer] = []

    async def begin() -> None:
        front.append(HttpServer(handler, limits))
        await front[0].start(listener, context)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(begin(), loop).result(5)
    try:
        yield listener.getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(front[0].stop(1.0), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def trusting(house: Authority, cert: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=house.cert)
    if cert:
        context.load_cert_chain(*cert)
    return context


@contextmanager
def connected(port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """A client's end of a connection whose handshake is done."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        yield tls


def ask(port: int, context: ssl.SSLContext, path: str = "/a") -> bytes:
    """All that is said over a connection of its own."""
    with connected(port, context) as tls:
        tls.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        out = b""
        while data := tls.recv(65536):
            out += data
        return out


# --- what is offered --------------------------------------------------------------------------------------------------


def test_an_answer_comes_over_tls_1_3_by_default(house: Authority, pair: tuple[Path, Path]) -> None:
    context = trusting(house)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with serving(server_context(*pair)) as port, connected(port, context) as tls:
        assert tls.version() == "TLSv1.3" and tls.selected_alpn_protocol() == "http/1.1"
        assert tls.compression() is None
        for path in ("/a", "/b"):  # kept alive
            tls.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            assert tls.recv(65536).endswith(f"{path} by ''".encode())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_are_spoken_with_forward_secrecy(
    version: ssl.TLSVersion, house: Authority, pair: tuple[Path, Path]
) -> None:
    context = trusting(house)
    context.minimum_version = context.maximum_version = version
    with serving(server_context(*pair)) as port, connected(port, context) as tls:
        name = tls.cipher()[0]
        assert "GCM" in name or "CHACHA20" in name
        assert name.startswith(("ECDHE-", "TLS_"))


@pytest.mark.parametrize("weak", ["TLSv1.1", "RSA", "CBC"])
def test_what_is_weak_is_refused(weak: str, house: Authority, pair: tuple[Path, Path]) -> None:
    context = trusting(house)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if weak == "TLSv1.1":
        with pytest.warns(DeprecationWarning):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    else:
        context.set_ciphers("AES128-GCM-SHA256" if weak == "RSA" else "ECDHE+AES+SHA1:ECDHE+AES+SHA256:!AESGCM")
    with serving(server_context(*pair)) as port, pytest.raises((ssl.SSLError, ConnectionError)):
        ask(port, context)


def test_large_bodies_and_answers_survive(house: Authority, pair: tuple[Path, Path]) -> None:
    def echo(request: Request) -> Reply:
        return 200, {}, request.body * 4

    body = np.random.default_rng(0).bytes(1_000_000)
    with serving(server_context(*pair), echo) as port, connected(port, trusting(house)) as tls:
        tls.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n" + body)
        out = b""
        while data := tls.recv(65536):
            out += data
        assert out.partition(b"\r\n\r\n")[2] == body * 4


def test_a_refusal_is_heard_over_tls_too(house: Authority, pair: tuple[Path, Path]) -> None:
    with serving(server_context(*pair), limits=Limits(max_head=1000)) as port:
        assert ask(port, trusting(house), "/" + "a" * 2000).startswith(b"HTTP/1.1 431 ")
        assert ask(port, trusting(house)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", b"GET /a HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_who_does_not_shake_hands_is_dropped_and_others_served(
    said: bytes, house: Authority, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "asyncio")
    with (
        serving(server_context(*pair), limits=Limits(head=0.5)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
    ):
        raw.sendall(said)
        assert ask(port, trusting(house)).startswith(b"HTTP/1.1 200 ")
        try:
            left = raw.recv(1000)
        except ConnectionError:
            left = b""
        assert b"HTTP" not in left


# --- who comes in -----------------------------------------------------------------------------------------------------


def test_mutual_tls_lets_in_who_the_authority_signed_and_says_who_it_is(
    house: Authority, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    with serving(server_context(*pair, client_ca=house.cert)) as port:
        out = ask(port, trusting(house, house.sign("robot", serial=7)))
        assert out.endswith(b"/a by 'robot'")
        for cert in (None, stranger.sign("robot")):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                out = ask(port, trusting(house, cert))
                assert not out
                raise ConnectionError  # TLS 1.3 may end without a word


def test_the_client_speaks_https_and_shows_what_it_has(house: Authority, pair: tuple[Path, Path]) -> None:
    seen = []

    def metadata(request: Request) -> Reply:
        seen.append(request)
        return json_reply(200, {"name": "digits"})

    cert = house.sign("robot", serial=8)
    both = house.folder / "both.pem"
    both.write_bytes(cert[0].read_bytes() + cert[1].read_bytes())
    with serving(server_context(*pair, client_ca=house.cert), metadata) as port:
        url = f"https://localhost:{port}"
        for shown in (cert, both):
            with Client(url, "digits", ca=house.cert, cert=shown, token="tlb_1_2") as client:
                assert client.metadata() == {"name": "digits"} and client.ready()
        assert {(r.peer, r.headers["authorization"]) for r in seen} == {("robot", "Bearer tlb_1_2")}
        with Client(url, "digits", cert=cert) as client, pytest.raises(ServeError, match="CERTIFICATE_VERIFY_FAILED"):
            client.metadata()
        with Client(url, "digits", ca=house.cert) as client, pytest.raises(ServeError):
            client.metadata()


@pytest.mark.parametrize(
    "wrong",
    [{"url": "ftp://a"}, {"url": "http://a", "ca": "x.pem"}, {"ca": "nowhere.pem"}, {"cert": "nowhere.pem"},
     {"token": "a\nb"}, {"token": "\u20ac"}],
    ids=str,
)  # fmt: skip
def test_the_client_says_what_is_wrong_before_it_calls(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Client(**({"url": "https://localhost:1", "name": "digits"} | wrong))


# --- certificates under way -------------------------------------------------------------------------------------------


def test_renewed_certificates_serve_new_connections(
    house: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "LOOK_SECONDS", 0.1)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(serial: int, whole: bool = True) -> None:
        new = house.sign("server", serial=serial)
        shutil.copy(new[0], cert)
        if whole:
            shutil.copy(new[1], key)

    def serial(port: int) -> int:
        with connected(port, trusting(house)) as tls:
            return int(tls.getpeercert()["serialNumber"], 16)

    def wait_for(wanted: int) -> None:
        deadline = time.monotonic() + 10
        while (found := serial(port)) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == wanted

    put(21)
    with serving(server_context(cert, key)) as port:
        wait_for(21)
        with connected(port, trusting(house)) as kept:
            put(22)
            wait_for(22)
            kept.sendall(b"GET /a HTTP/1.1\r\n\r\n")  # an old connection goes on
            assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
        put(23, whole=False)  # the certificate is there, its key is not yet
        deadline = time.monotonic() + 10
        while "is not the key of" not in caplog.text and time.monotonic() < deadline:
            assert serial(port) == 22
            time.sleep(0.05)
        assert serial(port) == 22 and "is not the key of" in caplog.text
        cert.unlink()
        time.sleep(0.15)
        assert serial(port) == 22
        put(24)
        wait_for(24)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_files_are_named_before_anything_listens(
    house: Authority, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = pair
    other = house.sign("other", serial=9)
    locked = tmp_path / "locked.key"
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked)
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    wrong: list[tuple[tuple[Path, Path, Path | None], str]] = [
        ((cert, other[1], None), "is not the key of"),
        ((cert, locked, None), "encrypted"),
        ((cert, tmp_path / "none.key", None), "none.key cannot be read"),
        ((tmp_path / "none.pem", key, None), "none.pem cannot be read"),
        ((empty, key, None), "no certificate in"),
        ((cert, cert, None), "no private key in"),
        ((key, key, None), "no certificate in"),
        ((broken, key, None), "cannot be used"),
        ((cert, key, empty), "no certificate in"),
        ((cert, key, broken), "cannot be used"),
        ((cert, key, tmp_path / "none.pem"), "cannot be read"),
    ]
    for files, words in wrong:
        with pytest.raises(ConfigError, match=words):
            server_context(*files)


@pytest.mark.parametrize(("days", "words"), [(-1, "expired"), (3, "expires in 3 days"), (90, "")])
def test_certificates_near_their_end_are_warned_of(
    days: int, words: str, house: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen before clients see it; a server with an expired certificate still starts, for its clients may accept it."""
    folder = house.folder
    cert, key = house.sign("dated", serial=30)
    if days != 90:
        now = time.time() + days * 86400 + (3600 if days > 0 else 0)
        stamps = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(t)) for t in (now - 100 * 86400, now)]
        (folder / "index.txt").write_text("")
        (folder / "serial").write_text("31\n")
        (folder / "ca.cnf").write_text(
            f"[ca]\ndefault_ca=here\n[here]\ndatabase={folder}/index.txt\nnew_certs_dir={folder}\n"
            f"serial={folder}/serial\ndefault_md=sha256\npolicy=any\nunique_subject=no\n[any]\ncommonName=supplied\n"
        )
        openssl("ca", "-batch", "-config", folder / "ca.cnf", "-notext", "-cert", house.cert, "-keyfile", house.key,
                "-in", folder / "dated.csr", "-out", cert, "-startdate", stamps[0], "-enddate", stamps[1])  # fmt: skip
    server_context(cert, key)
    assert words in caplog.text and (words or not caplog.text)


# --- all of it in a process of its own ------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import Settings, serve_forever

def load(bundle):
    specs = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1, 2))
    return Servable(Pipeline([("double", lambda data: {"y": data["x"] * 2})]), specs[:1], specs[1:],
                    {"x": np.zeros((1, 2), np.float32)})

folder, host, *tls = sys.argv[1:]
settings = Settings(tls=tuple(Path(path) if path else None for path in tls) if tls else None)
serve_forever(Path(folder), "double", load, Path(folder), host, settings=settings)
"""


def start(folder: Path, host: str, *tls: Path | str) -> Endpoint:
    endpoint.deploy(folder, write_bundle(folder / "b", dict.fromkeys(REQUIRED_FILES, b"{}"), "m1", {}).path)
    return endpoint.start(folder, "double", [sys.executable, "-c", SCRIPT, str(folder), host, *map(str, tls)], 30)


def test_an_endpoint_with_tls_tokens_and_certificates(
    house: Authority, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    robot = house.sign("robot", serial=40)
    token = create_token(tmp_path, "web", ["infer"], expires=time.time() + 100)
    create_token(tmp_path, "cn:robot", ["metrics"])
    served = start(tmp_path, "127.0.0.1", *pair, house.cert)
    try:
        assert served.url.startswith("https://")
        x = np.ones((3, 2), np.float32)
        with Client(served.url, "double", ca=house.cert, cert=robot, token=token) as client:
            assert client.call({"x": x})["y"].tolist() == (x * 2).tolist()
        with Client(served.url, "double", ca=house.cert, cert=robot) as client:
            assert client.ready() and client.metadata()["name"] == "double"
            with pytest.raises(ServeError, match=r"403.*'cn:robot' has no right to the scope 'infer'"):
                client.call({"x": x})
        with (
            Client(served.url, "double", ca=house.cert, cert=robot, token=token[:-1]) as client,
            pytest.raises(ServeError, match=r"401.*not known"),
        ):
            client.call({"x": x})
        with Client(served.url, "double", ca=house.cert, token=token) as client, pytest.raises(ServeError):
            client.call({"x": x})
    finally:
        endpoint.stop(tmp_path)
    assert token not in (tmp_path / "server.log").read_text()


def test_other_machines_are_not_served_without_knowing_them(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="would let everybody who reaches it do everything"):
        start(tmp_path, "0.0.0.0")
    create_token(tmp_path, "web")
    start(tmp_path, "0.0.0.0")
    endpoint.stop(tmp_path)
    assert "without TLS" in (tmp_path / "server.log").read_text()
