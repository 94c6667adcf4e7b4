"""Signatures: a changed byte, another key, none at all; the same as OpenSSL's, in both directions."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from trilobe.errors import BundleError, MissingExtra, NotFoundError, UsageError
from trilobe.infrastructure.bundle import MANIFEST
from trilobe.infrastructure.packaging.signing import sign, signature_path, verify
from trilobe.types import Bundle

pytest.importorskip("cryptography", reason="the extra 'sign' is not installed")
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


def pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, secret: bytes = b"") -> tuple[bytes, bytes]:
    hidden = s.BestAvailableEncryption(secret) if secret else s.NoEncryption()
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden)
    return private, key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private, public = pem(ed25519.Ed25519PrivateKey.generate())
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    return tmp_path / "key.pem", tmp_path / "key.pub"


def test_signed_and_verified(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    path = sign(bundle.path, keys[0])
    assert path == tmp_path / "bundle.sig" == signature_path(bundle.path)
    first = path.read_bytes()
    assert len(first) == 64 and sign(bundle.path, keys[0]).read_bytes() == first, "the same twice"
    assert verify(bundle.path, keys[1]) == bundle
    path.rename(tmp_path / "elsewhere")
    assert verify(bundle.path, keys[1], tmp_path / "elsewhere").id == bundle.id


def test_every_byte_counts(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    path = sign(bundle.path, keys[0])
    manifest = bundle.path / MANIFEST
    for file in (path, manifest):
        whole = file.read_bytes()
        for i in range(0, len(whole), max(1, len(whole) // 40)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            with pytest.raises(BundleError, match="is not of this bundle by this key"):
                verify(bundle.path, keys[1])
        file.write_bytes(whole)
    for said in (b"", path.read_bytes() + b"x", path.read_bytes()[:-1]):
        path.write_bytes(said)
        with pytest.raises(BundleError, match="is not of this bundle"):
            verify(bundle.path, keys[1])


def test_a_changed_file_and_a_key_for_people(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    sign(bundle.path, keys[0])
    manifest = bundle.path / MANIFEST
    whole = manifest.read_bytes()
    manifest.write_text(json.dumps({**json.loads(whole), "gates_passed": True}))  # which the id does not cover
    with pytest.raises(BundleError, match="is not of this bundle"):
        verify(bundle.path, keys[1])
    manifest.write_bytes(whole)
    (bundle.path / "labels.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"labels\.json has 2 bytes"):
        verify(bundle.path, keys[1])
    with pytest.raises(BundleError, match=r"labels\.json"):
        sign(bundle.path, keys[0])


def test_another_key_and_no_signature(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no signature at .*bundle\.sig"):
        verify(bundle.path, keys[1])
    sign(bundle.path, keys[0])
    (tmp_path / "other.pub").write_bytes(pem(ed25519.Ed25519PrivateKey.generate())[1])
    with pytest.raises(BundleError, match="by this key"):
        verify(bundle.path, tmp_path / "other.pub")
    with pytest.raises(BundleError, match="there is no bundle at"):
        verify(tmp_path / "nowhere", keys[1], tmp_path / "bundle.sig")


def test_keys_that_are_none(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    with pytest.raises(UsageError, match="private Ed25519 key"):
        sign(bundle.path, public)
    with pytest.raises(UsageError, match="public Ed25519 key"):
        verify(bundle.path, private)
    for name, data in (
        ("noise", b"noise"),
        ("elliptic", pem(ec.generate_private_key(ec.SECP256R1()))[0]),
        ("locked", pem(ed25519.Ed25519PrivateKey.generate(), b"secret")[0]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=r"(not encrypted)(.|\n)*openssl genpkey"):
            sign(bundle.path, tmp_path / name)
    with pytest.raises(NotFoundError, match="no key at"):
        sign(bundle.path, tmp_path / "nowhere")
    assert not signature_path(bundle.path).exists()


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_as_openssl_has_it(bundle: Bundle, tmp_path: Path) -> None:
    """The commands of the module's docstring; what OpenSSL signs we verify, and the other way round."""

    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)

    key, public, manifest = tmp_path / "key.pem", tmp_path / "key.pub", bundle.path / MANIFEST
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    path = sign(bundle.path, key)
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", manifest, "-sigfile", path)
    ours = path.read_bytes()
    openssl("pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", manifest, "-out", path)
    assert path.read_bytes() == ours
    assert verify(bundle.path, public).id == bundle.id


def test_without_the_extra(bundle: Bundle, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trilobe\[sign\]'"):
        sign(bundle.path, keys[0])
