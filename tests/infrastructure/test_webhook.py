"""Webhooks against receivers that accept, refuse, fail, hang up, hang or send elsewhere: real ones, on this machine."""

import base64
import http.server
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trilobe.errors import ConfigError, UsageError
from trilobe.infrastructure.webhook import check_url, key_of, post, signature


class Receiver(http.server.ThreadingHTTPServer):
    """Answers with ``statuses`` in turn, then 200, and remembers what came."""

    def __init__(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses, self.headers = list(statuses), headers or {}
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?a=b"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Receiver]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made: list[Receiver] = []

    def make(*statuses: int, **options: Any) -> Receiver:
        made.append(Receiver(*statuses, **options))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


def test_what_arrives(receiver: Callable[..., Receiver]) -> None:
    one = receiver()
    before = time.time()
    assert post(one.url, "a1", b'{"x":1}', b"key").accepted
    ((path, headers, body),) = one.got
    assert (path, body) == ("/hook?a=b", b'{"x":1}')
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == headers["idempotency-key"] == "a1"
    at = int(headers["webhook-timestamp"])
    assert before - 1 <= at <= time.time()
    assert headers["webhook-signature"] == signature(b"key", "a1", at, b'{"x":1}')
    assert post(one.url, "a2", b"{}").accepted
    assert "webhook-signature" not in one.got[1][1], "no key, no signature"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, the second implementation")
@pytest.mark.parametrize("body", [b"{}", '{"answer":"é"}'.encode(), b""])
def test_the_signature_is_that_of_openssl(body: bytes) -> None:
    run = subprocess.run(
        ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", "hexkey:00ff10", "-binary"],
        input=b"msg_1.1674087231." + body, capture_output=True, check=True,
    )  # fmt: skip
    expected = "v1," + base64.b64encode(run.stdout).decode()
    assert signature(bytes.fromhex("00ff10"), "msg_1", 1674087231, body) == expected


def test_it_tries_again_while_the_receiver_is_down(receiver: Callable[..., Receiver]) -> None:
    one, slept = receiver(503, 429), list[float]()
    assert post(one.url, "a1", b"{}", sleep=slept.append).accepted
    assert slept == [0.5, 2.0]
    assert {headers["webhook-id"] for _, headers, _ in one.got} == {"a1"} and len(one.got) == 3
    one = receiver(500, 500, 500, 500)
    posted = post(one.url, "a1", b"{}", sleep=slept.append)
    assert not posted.accepted and posted.down and posted.problem == "it answered 500 Internal Server Error"
    assert len(one.got) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
def test_a_refusal_is_not_tried_again_now(receiver: Callable[..., Receiver], status: int) -> None:
    one = receiver(status)
    posted = post(one.url, "a1", b"{}", sleep=lambda _: pytest.fail("there is nothing to wait for"))
    assert (posted.accepted, posted.down) == (False, False) and str(status) in posted.problem
    assert len(one.got) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_it_goes_nowhere_else(receiver: Callable[..., Receiver], status: int) -> None:
    other = receiver()
    one = receiver(status, headers={"Location": other.url})
    posted = post(one.url, "a1", b"{}")
    assert not posted.accepted and not posted.down and str(status) in posted.problem
    assert other.got == []


def test_nobody_there_or_somebody_who_hangs(receiver: Callable[..., Receiver]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        port = mute.getsockname()[1]
        start = time.monotonic()
        posted = post(f"http://127.0.0.1:{port}/", "a1", b"{}", timeout=0.2, pauses=())
        assert posted.down and "timed out" in posted.problem and time.monotonic() - start < 20
    posted = post(f"http://127.0.0.1:{port}/", "a1", b"{}", pauses=())
    assert posted.down and "refused" in posted.problem


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\xff" * 70000])
def test_what_is_no_web_server(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as odd:

        def serve() -> None:
            connection, _ = odd.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(said)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        posted = post(f"http://127.0.0.1:{odd.getsockname()[1]}/", "a1", b"{}", timeout=2, pauses=())
        assert posted.down and posted.problem.startswith("it does not answer (")
        thread.join()


@pytest.mark.parametrize("url", ["https://example.org/hook", "http://localhost:8080", "https://[::1]:1/x?y=z"])
def test_places_to_post_to(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.org", "ftp://example.org", "file:///etc/passwd", "https://", "https:///path", "javascript:1"),
        *("https://example.org:port/", "https://example.org:99999/", "https://example.org/a b", "https://[::1"),
        *("https://example.org/\r\nX: y", "https://exämple.org/", "https://example.org:0/"),
    ],
)
def test_places_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"a webhook at (.|\n)*expected https://host/path"):
        check_url(url)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        check_url("https://me:hunter2@example.org/")
    assert "hunter2" not in str(caught.value)


def test_secrets() -> None:
    assert key_of("whsec_" + base64.b64encode(bytes(range(24))).decode()) == bytes(range(24))
    assert key_of("é") == "é".encode()
    with pytest.raises(ConfigError, match="not base64") as caught:
        key_of("whsec_***")
    assert "***" not in str(caught.value)
