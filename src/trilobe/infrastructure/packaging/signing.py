"""Signatures: who vouches for a bundle. Detached, Ed25519 (RFC 8032), over the exact bytes of its manifest.

The manifest holds the digest of every file, so the signature covers all of them. It is 64 plain bytes in ``NAME.sig``
beside the folder ``NAME`` (a bundle holds nothing that its manifest does not list), as OpenSSL reads and writes it::

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
    openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in NAME/manifest.json -sigfile NAME.sig

Keys are PEM files, private ones PKCS #8 and not encrypted. A signature says who made a bundle, not that it is good.
"""

import json
from pathlib import Path
from typing import Any

from trilobe.errors import BundleError, MissingExtra, NotFoundError, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.bundle import MANIFEST, open_bundle
from trilobe.types import Bundle


def signature_path(folder: Path) -> Path:
    """Where the signature of the bundle in ``folder`` lies.

    >>> signature_path(Path("bundles/digits"))
    PosixPath('bundles/digits.sig')
    """
    folder = folder.absolute() if folder.name in ("", "..") else folder
    return folder.with_name(f"{folder.name}.sig")


def sign(folder: Path, key: Path) -> Path:
    """Sign the bundle in ``folder`` with the private key in the file ``key``; the signature's path.

    The bundle is verified first. Signing again with the same key gives the same signature.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: the key is no private Ed25519 key, or is encrypted.
        MissingExtra: the extra ``sign`` is not installed.
    """
    private = _key(key, private=True)
    open_bundle(folder)
    path = signature_path(folder)
    write_atomically(path, private.sign((folder / MANIFEST).read_bytes()))
    return path


def verify(folder: Path, key: Path, signature: Path | None = None) -> Bundle:
    """Open the bundle in ``folder`` if the signature beside it, or at ``signature``, is of the key's other half.

    ``key`` is the file of a public key. The manifest is checked before anything in it is used, and then every file
    against the manifest.

    Raises:
        BundleError: there is no signature, it is of other bytes or another key, or the bundle is damaged.
        UsageError: the key is no public Ed25519 key.
        MissingExtra: the extra ``sign`` is not installed.
    """
    public = _key(key, private=False)
    from cryptography.exceptions import InvalidSignature

    path = signature or signature_path(folder)
    said, manifest = _bytes(path, f"bundle {folder} has no signature"), _bytes(folder / MANIFEST, "there is no bundle")
    try:
        public.verify(said, manifest)
    except InvalidSignature:
        raise BundleError(
            f"the signature {path} is not of this bundle by this key",
            expected="the manifest as it was signed, and the public half of the key that signed it",
            hint="do not use this bundle; ask whoever made it",
        ) from None
    bundle = open_bundle(folder)
    if bundle.manifest != json.loads(manifest):
        raise BundleError(f"bundle {folder} changed while it was verified", hint="verify it again")
    return bundle


def _bytes(path: Path, problem: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise BundleError(
            f"{problem} at {path}: {e.strerror}", expected="a signed bundle, and its .sig beside it"
        ) from e


def _key(path: Path, private: bool) -> Any:
    """The key in a PEM file, private or public."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as e:
        raise MissingExtra(
            "the package cryptography is not installed",
            expected="it, to sign and verify",
            hint="pip install 'trilobe[sign]'",
        ) from e
    wanted = f"a {'private' if private else 'public'} Ed25519 key as PEM, not encrypted"
    hint = "openssl genpkey -algorithm ed25519 -out key.pem" if private else "openssl pkey -in key.pem -pubout"
    try:
        data = path.read_bytes()
    except OSError as e:
        raise NotFoundError(f"no key at {path}: {e.strerror}", expected=wanted, hint=hint) from e
    try:
        key = load_pem_private_key(data, None) if private else load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise UsageError(f"{path} is no usable key ({e})", expected=wanted, hint=hint) from e
    if not isinstance(key, Ed25519PrivateKey if private else Ed25519PublicKey):
        raise UsageError(f"{path} is a key of another kind", expected=wanted, hint=hint)
    return key
